"""Steps that are watched: epilogues that a step has, and its parameters have not (statistics, marks of changes).

Their launches are beside the plain ones, of the same segments, so steps that nobody watches are what they were. Blocks
and marks are counted in each parameter: here each is a segment, also of those that are else stepped as one, neighbours
in flat buffers.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..epilogues import Epilogue
from ..layout import BLOCK, CPU, Bucket, Place, Segments, Spec, Table, Tensors

__all__ = ["Watched"]


class Watched:
    """A table as such launches see it (`layout.Table`), and what they write.

    Args:
        table: whose.
        epilogues: what watches.
        resolve: gives the backend for a bucket.
        marks: gives the words of marks of a parameter; None where nothing marks.

    Attributes:
        numbers: of each bucket, what its blocks give: [blocks, numbers], in the arithmetic type; NaN until a step that
            is not skipped.
        slots: of each of these blocks, its parameter's position; on the host.
    """

    def __init__(
        self, table: Any, epilogues: Sequence[Epilogue], resolve: Callable[[Spec], Any],
        marks: Callable[[Tensor], Tensor] | None,
    ) -> None:  # fmt: skip
        self._table: Table = weakref.proxy(
            table
        )  # which holds it: no circle, whose memory the collector would free late
        self.epilogues = tuple(epilogues)
        self.device_copies: dict[torch.device, Any] = {}
        self.buckets: list[Bucket] = []
        self.numbers: list[Tensor] = []
        self._marks: dict[int, Tensor] = {}
        self._blocks: dict[int, tuple[int, int, int]] = {}  # of a parameter: its bucket, its first block, how many
        self.slots: list[Tensor] = []
        whole = table.whole
        places = whole.places.clone()
        for bucket in table.buckets:
            epilogues = sorted((*bucket.spec.epilogues, *self.epilogues), key=lambda own: own.code)
            spec = replace(bucket.spec, epilogues=tuple(epilogues))
            self.buckets.append(Bucket(spec, resolve(spec), bucket.index, bucket.first, bucket.members))
            numels = whole.capacities[bucket.first : bucket.first + len(bucket.members)]
            of_each = -(-numels // BLOCK)
            counts = of_each.tolist()
            self.slots.append(torch.tensor(list(bucket.members), device=CPU).repeat_interleave(of_each))
            shape = (sum(counts) if spec.numbers else 0, spec.numbers)
            numbers = torch.full(shape, math.nan, dtype=spec.arithmetic, device=spec.device)
            self.numbers.append(numbers)
            firsts = [0, *accumulate(counts)]
            for k, i in enumerate(bucket.members):
                segment = bucket.first + k
                if spec.numbers:
                    self._blocks[i] = (bucket.index, firsts[k], counts[k])
                    row = numbers.stride(0) * numbers.itemsize
                    places[segment, Place.OUTPUT] = numbers.data_ptr() + firsts[k] * row
                if marks is not None:
                    words = self._marks[i] = marks(table.params[i])
                    places[segment, Place.MARKS] = words.data_ptr()
        self.segments = Segments(whole.moving, places, whole.capacities)

    def clearing(self) -> Callable[[], None]:
        """What is launched before the steps: nothing is known of what they leave out."""

        def clear() -> None:
            for numbers in self.numbers:
                numbers.fill_(math.nan)

        return clear

    @property
    def memory(self) -> list[Tensor]:
        """All that is written."""
        return [*self.numbers, *self._marks.values()]

    # What a backend reads (layout.Table) ------------------------------------------------------------------------------

    @property
    def rule(self) -> Any:
        return self._table.rule

    @property
    def control(self) -> Tensor:
        return self._table.control

    @property
    def norms(self) -> Any:
        return self._table.norms

    @property
    def active(self) -> Tensor:
        return self._table.active

    @property
    def whole(self) -> Segments:
        return self._table.whole

    def span(self, bucket: Bucket) -> tuple[int, int]:
        return bucket.first, len(bucket.members)

    def tensors(self, i: int) -> Tensors:
        own = self._table.tensors(i)
        if i in self._blocks:
            bucket, first, count = self._blocks[i]
            own = own._replace(numbers=self.numbers[bucket][first : first + count])
        return own._replace(marks=self._marks.get(i))
