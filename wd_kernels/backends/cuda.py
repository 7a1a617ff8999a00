"""The CUDA C++ backend: one launch of csrc/cuda/ a bucket, on the tensors' device and current stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import native
from ..layout import Bucket, Spec, Table, native_kernel
from .device import OnDevice
from .device_copy import DeviceCopy

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

    def launch(self, table: Table, bucket: Bucket, size: int, copy: DeviceCopy) -> Callable[[], None]:
        there, spec = copy.there, bucket.spec
        kernel = native_kernel(table.rule, spec)
        key = (spec.device, *kernel[:3], *kernel[3])
        if key not in self._loaded:  # here, where a failure leaves every tensor as it was
            wrong = self.ops.cuda_load(spec.device.index or 0, *kernel)
            if wrong:
                raise RuntimeError(f"a CUDA kernel cannot be loaded on {spec.device}: {wrong}")
            self._loaded.add(key)
        return partial(
            self.ops.cuda_step_.default, self.token, there[bucket.index], there["places"], there["moving"],
            there["control"], size, *kernel, there["rows"],
        )  # fmt: skip
