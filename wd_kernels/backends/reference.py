"""The reference as a backend: slow, on any device, and what all others must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .. import sums as exact
from ..layout import Bucket, Place, Spec, Table
from .prepared import Launch, Prepared

__all__ = ["Reference"]


class Reference:
    """Plain torch operations on one parameter after the other (wd_kernels.reference)."""

    name = "reference"
    needs_tensors = True
    counts_there = False

    def why_not(self) -> str | None:
        return None

    def refuses(self, spec: Spec) -> str | None:
        return None

    def prepare(self, table: Table, buckets: list[Bucket]) -> Prepared:
        def measure(table: Table) -> None:
            assert table.norms is not None
            for bucket in buckets:
                for i in bucket.members:
                    if table.active[i]:
                        squares = reference.squares(table.tensors(i).grad, bucket.spec.formats[0].dtype)
                        exact.add(table.norms.sum_of(i), squares)

        return Prepared([], lambda table, rows: [self._step(table, bucket, rows) for bucket in buckets], measure)

    def add_up(self, table: Table, buckets: list[Bucket], sums: Tensor, rows: Tensor) -> list[Launch]:
        writes: Launch = []
        for bucket in buckets:
            dtype = bucket.spec.formats[0].dtype
            for segment, i in enumerate(bucket.members, bucket.first):
                own = table.tensors(i)
                total = torch.empty_like(own.theta).copy_(own.grad)
                if not own.row:  # in the arithmetic type: torch multiplies complex numbers, by 1
                    reference.load(total, dtype).add_(reference.load(own.theta, dtype))
                at = int(table.segments.places[segment, Place.OUTPUT]) - sums.data_ptr()
                sum_ = sums[0, at // sums.stride(1) // sums.itemsize]
                exact.add(sum_, reference.squares(total, dtype))
                writes.append((own.theta, total))
        return [writes]

    def _step(self, table: Table, bucket: Bucket, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is to be copied where: all of it is computed before any of it is written."""
        grad_factor, skip = table.control.tolist()
        writes: list[tuple[Tensor, Tensor]] = []
        for i in bucket.members if not skip else ():
            if not table.active[i]:
                continue
            own = table.tensors(i)
            before = [own.theta, *own.states.values(), *own.outputs.values()]
            before += [*own.scales.values(), *([] if own.master is None else [own.master])]
            after = [torch.empty_like(t).copy_(t) for t in before]
            theta, rest = after[0], iter(after[1:])
            roles = (own.states, own.outputs, own.scales)
            states, outputs, scales = ({name: next(rest) for name in names} for names in roles)
            master = None if own.master is None else next(rest)
            watched = [t for t in (own.numbers, own.marks) if t is not None]
            numbers, marks = (None if t is None else t.clone() for t in (own.numbers, own.marks))
            reference.step_(
                table.rule, rows[own.row], grad_factor, theta, own.grad, states, bucket.spec.epilogues, outputs,
                numbers, marks, bucket.spec.formats, own.origin, master, scales, bucket.spec.pull, own.reference,
            )  # fmt: skip
            writes += zip(before, after, strict=True)
            writes += zip(watched, [t for t in (numbers, marks) if t is not None], strict=True)
        return writes
