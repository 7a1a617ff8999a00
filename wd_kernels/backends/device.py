"""What the backends of GPUs share: the table is copied to the device, then a bucket is one launch there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..layout import Bucket, Chunks, Table, cut, cut_whole
from ..norms import Bank, Norms
from ..rules import Rule
from .device_copy import DeviceCopy, There, chunk_size
from .prepared import Prepared

__all__ = ["OnDevice", "arguments", "current", "machine"]


@cache
def machine(device: torch.device) -> tuple[int, int]:
    """(processors, threads of a warp) of a device."""
    if device.type == "cpu":  # in tests, one program after another: the fewer the better
        return 1, 32
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 64)), int(getattr(properties, "warp_size", 32))


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one meanwhile."""
    return torch.get_device_module(device).device(device)  # type: ignore[no-any-return]


def _refuse_capture(device: torch.device) -> None:
    """A graph would repeat this step's scalars, and read the memory that they travelled in when it is another's."""
    with current(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a step cannot be captured in a CUDA graph: its scalars and step counts are the host's")


def arguments(norms: Norms, bank: Bank, there: There) -> list[Tensor]:
    """What the kernel that begins a step is given: the pointers of `Begin`, in order."""
    limits = norms.limits
    scale = bank.given(limits.scale if limits else None, bank.one, "grad_scale")
    found_inf = bank.given(limits.found_inf if limits else None, bank.zero, "found_inf")
    return [
        bank.sums, bank.totals, bank.slots_of, there["limits"], scale, found_inf, there["groups"], there["keys"],
        there["active"], bank.steps, bank.fresh, there["rows"], bank.clips, bank.control, bank.found,
    ]  # fmt: skip


class OnDevice(ABC):
    """One launch a bucket, on the tensors' device and its current stream, never waiting for it."""

    needs_tensors = False
    counts_there = True

    def prepare(self, table: Table, buckets: list[Bucket]) -> Prepared:
        """Uploads what changed and brings what is new to the device; the launches that are left are one a bucket."""
        on: dict[torch.device, dict[int, Chunks]] = {}
        for bucket in buckets:
            size = partial(chunk_size, processors=machine(bucket.spec.device)[0])
            on.setdefault(bucket.spec.device, {})[bucket.index] = cut(table, bucket, size)

        def ready(table: Table, rows: Tensor) -> list[Callable[[], None]]:
            launches: list[Callable[[], None]] = []
            for device, chunks in on.items():
                if device.type == "cuda":
                    _refuse_capture(device)
                copy = table.device_copies.setdefault(device, DeviceCopy(device))
                parts: There = {"places": table.segments.places, "moving": table.segments.moving}
                parts |= {index: own.words for index, own in chunks.items()}
                own = [b for b in buckets if b.spec.device == device and chunks[b.index].words.numel()]
                norms = table.norms
                if norms is None or norms.bank is None:
                    parts |= {"control": table.control, "rows": rows}
                    there = copy.update(parts)
                else:
                    if norms.measures and table.whole is not table.segments:
                        whole: There = {f"whole {b.index}": cut_whole(table, b, chunks[b.index].size) for b in own}
                        parts |= whole | {"whole places": table.whole.places, "whole moving": table.whole.moving}
                    there = copy.update(parts | norms.inputs | {"limits": norms.limit_words()})
                    sizes = {b.index: chunks[b.index].size for b in own}
                    launches.append(self._begun(table, norms, norms.bank, own, sizes, there))
                launches += [self.launch(table, bucket, chunks[bucket.index].size, there) for bucket in own]
            return launches

        return Prepared([], ready)

    def _begun(
        self, table: Table, norms: Norms, bank: Bank, buckets: list[Bucket], sizes: Mapping[int, int], there: There
    ) -> Callable[[], None]:
        """Adds up the squares of the gradients, if they are wanted; the launch that begins the step is left."""
        there |= {"rows": bank.rows_for(there["keys"].shape[0], len(table.rule.scalars)), "control": bank.control}
        begin = self.begin(table.rule, norms, bank, there)
        if norms.measures:
            squares = []
            for bucket in buckets:
                tables: There = there
                if "whole places" in there:
                    words, places, moving = there[f"whole {bucket.index}"], there["whole places"], there["whole moving"]
                    tables = {bucket.index: words, "places": places, "moving": moving}
                squares.append(self.squares(table, bank, bucket, sizes[bucket.index], tables))
            if not bank.clean:  # a step came to nothing
                bank.sums.zero_()
            bank.clean = False
            for launch in squares:
                launch()
            norms.reduce(bank)

        def go() -> None:
            begin()
            bank.clean = True

        return go

    @abstractmethod
    def launch(self, table: Table, bucket: Bucket, size: int, there: There) -> Callable[[], None]:
        """The launch of a bucket, whose chunks have `size` elements; its kernel is on the device when this returns."""

    @abstractmethod
    def squares(self, table: Table, bank: Bank, bucket: Bucket, size: int, there: There) -> Callable[[], None]:
        """The launch that adds up the squares of its gradients; likewise."""

    @abstractmethod
    def begin(self, rule: Rule, norms: Norms, bank: Bank, there: There) -> Callable[[], None]:
        """The launch that begins a step; likewise."""
