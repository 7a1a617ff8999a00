"""The reference as a backend: slow, on any device, and what all others must equal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from .. import reference
from ..layout import Bucket, Spec, Table

__all__ = ["Reference"]


class Reference:
    """Plain torch operations on one parameter after the other (wd_kernels.reference)."""

    name = "reference"

    def why_not(self) -> str | None:
        return None

    def refuses(self, spec: Spec) -> str | None:
        return None

    def prepare(self, table: Table, buckets: list[Bucket]) -> Callable[[Tensor], list[Callable[[], None]]]:
        return lambda rows: [partial(self._step, table, bucket, rows) for bucket in buckets]

    def _step(self, table: Table, bucket: Bucket, rows: Tensor) -> None:
        grad_factor, skip = table.control.tolist()
        if skip:
            return
        for i in bucket.members:
            if table.active[i]:
                own = table.tensors(i)
                reference.step_(
                    table.rule, rows[own.row], grad_factor, own.theta, own.grad, own.states, bucket.spec.epilogue,
                    own.outputs, own.sums,
                )  # fmt: skip
