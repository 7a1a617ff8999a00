"""The CUDA C++ backend: one launch of csrc/cuda/ a bucket, on the tensors' device and current stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..formats import arithmetic_dtype, format_of
from ..layout import Bucket, Spec, Table, native_kernel
from ..norms import Bank, Norms
from ..rules import Rule, code_of
from .device import OnDevice, arguments, refuse_loading
from .device_copy import There

__all__ = ["CUDA"]

#: A kernel that is always there (`native_kernel`): whether it loads tells it of all.
ANY_KERNEL = (0, 0, 0, [2, 2, 2, 2])


class CUDA(OnDevice):
    """Kernels compiled ahead of time, for CUDA tensors."""

    name = "cuda"
    device_type = "cuda"

    def __init__(self) -> None:
        self._fine: set[torch.device] = set()
        self._loaded: set[tuple[Any, ...]] = set()

    @property
    def ops(self) -> Any:
        """The operators of csrc/cuda/ops.cpp."""
        return native.OPS

    @property
    def token(self) -> int:
        """What its step wants to see."""
        return native.cuda_token()

    def why_not(self) -> str | None:
        missing = native.load_cuda()
        if missing is not None:
            return missing
        return None if torch.cuda.is_available() else "no GPU is there that torch can use"

    def refuses(self, spec: Spec) -> str | None:
        device = spec.device
        if device.type != self.device_type:
            return f"the tensors are on {device}, and this backend steps CUDA tensors"
        return self._unloadable(device) if device.type == "cuda" else None

    def _unloadable(self, device: torch.device) -> str | None:
        """Why the kernels do not load on a GPU, None where they do; only that is remembered: memory may come free."""
        if device in self._fine:
            return None
        wrong = self.ops.cuda_load(device.index, *ANY_KERNEL)
        if not wrong:
            self._fine.add(device)
            return None
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"its kernels do not load on {device}, {torch.cuda.get_device_name(device)} of compute capability "
            f"{major}.{minor}: {wrong}; they were built with {self.ops.cuda_built()}. If they are not for it, build "
            f"them with TORCH_CUDA_ARCH_LIST={major}.{minor} and a CUDA toolkit no newer than the driver"
        )

    def _load(self, device: torch.device, load: Callable[..., str], *which: Any) -> None:
        """Brings a kernel to a device, where a failure leaves every tensor as it was."""
        key = (device, str(which))
        if key not in self._loaded:
            refuse_loading(device)
            wrong = load(device.index or 0, *which)
            if wrong:
                raise RuntimeError(f"a CUDA kernel cannot be loaded on {device}: {wrong}")
            self._loaded.add(key)

    def launch(self, table: Table, bucket: Bucket, size: int, there: There) -> Callable[[], None]:
        kernel = native_kernel(table.rule, bucket.spec)
        self._load(bucket.spec.device, self.ops.cuda_load, *kernel)
        return partial(
            self.ops.cuda_step_.default, self.token, there[bucket.index], there["places"], there["moving"],
            there["control"], size, *kernel, there["rows"],
        )  # fmt: skip

    def squares(
        self, table: Table, sums: Tensor, bucket: Bucket, size: int, there: There, accumulates: bool = False
    ) -> Callable[[], None]:
        param, grad = bucket.spec.formats[:2]
        which = format_of(arithmetic_dtype(param.dtype)).code, grad.code, accumulates
        self._load(bucket.spec.device, self.ops.cuda_load_squares, *which)
        return partial(
            self.ops.cuda_squares_.default, self.token, there[bucket.index], there["places"], there["moving"], size,
            *which, len(sums), sums.stride(0),
        )  # fmt: skip

    def begin(self, rule: Rule, norms: Norms, bank: Bank, there: There) -> Callable[[], None]:
        self._load(bank.device, self.ops.cuda_load_begin, code_of(rule))
        given = self.token, code_of(rule), arguments(norms, bank, there)
        return partial(self.ops.cuda_begin_.default, *given)
