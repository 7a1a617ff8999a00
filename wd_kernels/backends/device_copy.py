"""The table on another device: chunks, segments and rows, in one pinned, asynchronous copy a step.

What a step changes is sent, in one buffer that nothing writes again; what did not change stays in the buffer of the
step that sent it. So no copy waits for the device, and none can overtake a kernel that still reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from ..layout import BLOCK

__all__ = ["DeviceCopy", "There", "chunk_size"]

#: The parts of a table on a device, by name.
There: TypeAlias = dict[str | int, Tensor]

#: The longest chunk: reading the table is then under 1% of what a chunk moves.
LONGEST = 16 * BLOCK
#: Chunks wanted for each processor of the device: several waves of what it runs at once.
PER_PROCESSOR = 32

_LINE = 16  # parts of the buffer begin at multiples of 128 bytes


def chunk_size(elements: int, processors: int) -> int:
    """Elements of a chunk: small ones, so that a small model fills the device; longer ones as it grows.

    >>> chunk_size(10**5, 132), chunk_size(10**7, 132), chunk_size(10**9, 132)
    (1024, 2048, 16384)
    """
    size = BLOCK
    while size < LONGEST and 2 * size * processors * PER_PROCESSOR <= elements:
        size *= 2
    return size


class DeviceCopy:
    """What a device has of a table.

    Attributes:
        device: where.
        there: the parts on the device, by name: "places", "moving" (layout.py), of each bucket, by its index, the
            chunks (int64 [c]); "rows" (float64 [r, scalars]) and "control" (float64 [2]), or what a device completes
            them from (`Table.of_step`).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.there: dict[str | int, Tensor] = {}
        self._sent: dict[str | int, Tensor] = {}  # host copies of `there`
        self._stream: int | None = None
        self._reserved: tuple[Tensor, Tensor] | None = None

    def update(self, parts: Mapping[str | int, Tensor]) -> There:
        """Brings the device up to date, on the current stream, without waiting for it: what it has of the parts."""
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
        return dict(self.there)

    def reserve(self, parts: Mapping[str | int, Tensor]) -> None:
        """Makes sure that there is memory for a step of such parts that is captured: none is to be asked for then."""
        size = _size(parts)
        if self._reserved is None or self._reserved[0].numel() < size:
            with torch.inference_mode(False):  # the capture may be outside of it
                here = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=self.device.type != "cpu")
                self._reserved = here, torch.empty_like(here, device=self.device)

    def capture(self, parts: Mapping[str | int, Tensor]) -> There:
        """All parts, in a step that is captured: every replay copies them again, from memory that nobody else has."""
        if self._reserved is None or self._reserved[0].numel() < _size(parts):
            raise RuntimeError(
                "a step is captured for which no memory is ready: take one outside of the graph first, with the "
                "gradients and groups of that which is captured; another one before each graph"
            )
        (here, there), self._reserved = self._reserved, None
        _, arrived = _laid_out(parts, here, there)
        there.copy_(here, non_blocking=True)
        arrived["captured"] = here  # kept as long as these are
        return arrived

    def _send(self, parts: Mapping[str | int, Tensor]) -> None:
        """One copy to the device, whatever the number of parts; their elements have 8 bytes."""
        to_device = self.device.type != "cpu"
        # Pinned memory that is freed while a copy of it is under way is kept by torch until that is done.
        here = torch.empty(_size(parts), dtype=torch.int64, device="cpu", pin_memory=to_device)
        there = torch.empty_like(here, device=self.device) if to_device else here
        sent, arrived = _laid_out(parts, here, there)
        if to_device:
            there.copy_(here, non_blocking=True)
        self._sent.update(sent)  # now, not before: what is noted as sent is there
        self.there.update(arrived)


def _lines(part: Tensor) -> int:
    return -(-part.numel() // _LINE)


def _size(parts: Mapping[str | int, Tensor]) -> int:
    return sum(map(_lines, parts.values())) * _LINE


def _laid_out(parts: Mapping[str | int, Tensor], here: Tensor, there: Tensor) -> tuple[There, There]:
    """Writes all parts to `here`, one after another; where they are in it, and will be in its copy."""
    sent, arrived, begin = {}, {}, 0
    for name, part in parts.items():
        at = slice(begin, begin + part.numel())
        sent[name] = here[at].view(part.shape).copy_(part.view(torch.int64))
        arrived[name] = there[at].view(part.dtype).view(part.shape)
        begin += _lines(part) * _LINE
    return sent, arrived
