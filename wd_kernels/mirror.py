"""The table on another device: chunks, places, gradients and rows, in one pinned, asynchronous copy a step.

What a step changes is sent, in one buffer that nothing writes again; what did not change stays in the buffer of the
step that sent it. So no copy waits for the device, and none can overtake a kernel that still reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .records import Chunk, Moving, Place

if TYPE_CHECKING:
    from .slots import Bucket, Table

__all__ = ["BLOCK", "Mirror", "chunk_size", "cut"]

#: Chunks are multiples of this many elements, and so begin where their segment's alignment holds.
BLOCK = 1024
#: The longest chunk: reading the table is then under 1% of what a chunk moves.
LONGEST = 16 * BLOCK
#: Chunks wanted for each processor of the device: several waves of what it runs at once.
PER_PROCESSOR = 32

_LINE = 16  # parts of the buffer begin at multiples of 128 bytes
_PLACE = torch.tensor(Place.OF_SEGMENT, device="cpu")
_MOVING = torch.tensor(Moving.OF_SEGMENT, device="cpu")


def chunk_size(elements: int, processors: int) -> int:
    """Elements of a chunk: small ones, so that a small model fills the device; longer ones as it grows.

    >>> chunk_size(10**5, 132), chunk_size(10**7, 132), chunk_size(10**9, 132)
    (1024, 2048, 16384)
    """
    size = BLOCK
    while size < LONGEST and 2 * size * processors * PER_PROCESSOR <= elements:
        size *= 2
    return size


def cut(first: int, numels: Tensor, size: int) -> Tensor:
    """The Chunk records of segments `first`, `first + 1`, ... of `numels` elements: int64 [chunks].

    >>> [(c & 0xFFFFFFFF, c >> 32) for c in cut(7, torch.tensor([5, 0, 9]), 4).tolist()]
    [(7, 0), (7, 1), (9, 0), (9, 1), (9, 2)]
    """
    counts = (numels + (size - 1)) // size
    segment = torch.arange(numels.numel(), device="cpu").repeat_interleave(counts)
    ordinal = torch.arange(segment.numel(), device="cpu") - (counts.cumsum(0) - counts)[segment]
    return segment + first + (ordinal << Chunk.ORDINAL_SHIFT)


class Mirror:
    """What a device has of a table.

    Attributes:
        device: where.
        there: the parts on the device, by name: "places" and "moving" (records.py; int64 [n, 4]), "rows" (float64
            [r, width]), "control" (float64 [2]), and of each bucket, by its index, the chunks (int64 [c]).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.there: dict[str | int, Tensor] = {}
        self._sent: dict[str | int, Tensor] = {}  # host copies of `there`
        self._stream: int | None = None
        self._buckets: list[Bucket] = []
        self._capacities = torch.empty(0)
        self._chunks: dict[str | int, Tensor] = {}
        self._sizes: dict[int, int] = {}

    def chunks(self, bucket: Bucket) -> Tensor:
        """The chunks of a bucket, on the device."""
        return self.there[bucket.index]

    def size(self, bucket: Bucket) -> int:
        """Elements of a chunk of a bucket."""
        return self._sizes[bucket.index]

    def update(self, table: Table, rows: Tensor, processors: int) -> None:
        """Brings the device up to date with this step's table, on the current stream, without waiting for it."""
        if table.buckets is not self._buckets or not torch.equal(table.capacities, self._capacities):
            self._cut(table, processors)
        parts: dict[str | int, Tensor] = {
            **self._chunks,
            "places": table.runs.index_select(1, _PLACE),
            "moving": table.runs.index_select(1, _MOVING),
            "control": table.control,
            "rows": rows,
        }
        # What was sent on another stream may still be on its way: a new stream is sent everything anew. So memory also
        # returns to the stream that it came from.
        stream = 0 if self.device.type == "cpu" else torch.accelerator.current_stream(self.device).stream_id
        if stream != self._stream:
            self._stream, self._sent, self.there = stream, {}, {}
        sent = self._sent
        bits = {name: part.view(torch.int64) for name, part in parts.items()}
        self._send({k: parts[k] for k, b in bits.items() if k not in sent or not torch.equal(sent[k], b)})
        for stale in self.there.keys() - parts.keys():
            del self.there[stale], sent[stale]

    def _cut(self, table: Table, processors: int) -> None:
        """Chunks of the buckets on this device. They hold in a step that lacks gradients too."""
        chunks: dict[str | int, Tensor] = {}
        sizes: dict[int, int] = {}
        for bucket in table.buckets:
            if bucket.spec.device == self.device:
                first, count = table.span(bucket)
                numels = table.capacities[first : first + count]
                sizes[bucket.index] = chunk_size(int(numels.sum()), processors)
                chunks[bucket.index] = cut(first, numels, sizes[bucket.index])
        self._buckets, self._capacities = table.buckets, table.capacities.clone()
        self._chunks, self._sizes = chunks, sizes

    def _send(self, parts: Mapping[str | int, Tensor]) -> None:
        """One copy to the device, whatever the number of parts; their elements have 8 bytes."""
        lines = [-(-part.numel() // _LINE) for part in parts.values()]
        to_device = self.device.type != "cpu"
        # Pinned memory that is freed while a copy of it is under way is kept by torch until that is done.
        here = torch.empty(sum(lines) * _LINE, dtype=torch.int64, device="cpu", pin_memory=to_device)
        there = torch.empty_like(here, device=self.device) if to_device else here
        sent, arrived, begin = {}, {}, 0
        for (name, part), own in zip(parts.items(), lines, strict=True):
            at = slice(begin, begin + part.numel())
            sent[name] = here[at].view(part.shape).copy_(part.view(torch.int64))
            arrived[name] = there[at].view(part.dtype).view(part.shape)
            begin += own * _LINE
        if to_device:
            there.copy_(here, non_blocking=True)
        self._sent.update(sent)  # now, not before: what is noted as sent is there
        self.there.update(arrived)
