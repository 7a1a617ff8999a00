"""The native CPU backend: one call into csrc/ops.cpp a bucket."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from .. import native

if TYPE_CHECKING:
    from ..slots import Bucket, Spec, Table

__all__ = ["CPU"]


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

    def prepare(self, table: Table, buckets: list[Bucket], rows: Tensor) -> list[Callable[[], None]]:
        step_ = native.OPS.step_.default
        common = (table.runs, rows, table.control, table.rule.code)
        return [partial(step_, *common, bucket.codes, *table.span(bucket)) for bucket in buckets]
