"""The native CPU backend: one call into csrc/cpu/ops.cpp a bucket."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from .. import native
from ..layout import Bucket, Spec, Table, cut, native_kernel

__all__ = ["CPU"]

#: Elements of a chunk: a scalar row is read once in so many.
CHUNK = 8192


class CPU:
    """AVX-512, AVX2 or baseline code, chosen at run time (WD_KERNELS_ISA forces one), on torch's threads."""

    name = "cpu"

    def why_not(self) -> str | None:
        return native.WHY_NOT

    def refuses(self, spec: Spec) -> str | None:
        if spec.device.type != "cpu":
            return f"the tensors are on {spec.device}, and this backend steps CPU tensors"
        native.OPS.instruction_set()  # raises if WD_KERNELS_ISA names one that is not here
        return None

    def prepare(self, table: Table, buckets: list[Bucket]) -> Callable[[Tensor], list[Callable[[], None]]]:
        step_, segments, rule = native.OPS.step_.default, table.segments, table.rule
        calls = []
        for bucket in buckets:
            chunks = cut(table, bucket, CHUNK)
            kernel = native_kernel(rule, bucket.spec)
            calls.append(
                partial(step_, chunks.words, segments.places, segments.moving, table.control, chunks.size, *kernel)
            )
        return lambda rows: [partial(call, rows) for call in calls]
