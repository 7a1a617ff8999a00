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
from .prepared import Launch, Prepared

__all__ = ["ACCUMULATED", "OnDevice", "arguments", "capturing", "current", "machine", "refuse_loading"]


ACCUMULATED = (
    "gradients are accumulated by accumulate() within a capture of a graph, whose replays would not know which are the "
    "first: add them up in p.grad, with a backward pass for each micro-batch in the graph"
)


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


def capturing(device: torch.device) -> bool:
    """Is what is launched on a device's current stream captured in a graph?"""
    if device.type != "cuda":
        return False
    with current(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_loading(device: torch.device) -> None:
    """Raises where a kernel would be brought to a device within a capture."""
    if capturing(device):
        raise RuntimeError(
            f"a step is captured in a graph, and a kernel of it is not on {device} yet: take one outside of the graph "
            "first, with the same dtypes and the same limits"
        )


def _check_capture(norms: Norms | None) -> None:
    if norms is None or norms.bank is None or not norms.capturable:
        raise RuntimeError(
            "a step is captured in a CUDA graph, of an optimizer whose learning rate and step counts are the host's: "
            "every replay would repeat those of this step. Allowed is an optimizer with capturable=True"
        )
    if norms.measures and norms.reductions:
        raise RuntimeError(
            "a step is captured that measures the norm of sharded gradients, which other processes have their part in: "
            "allowed is max_grad_norm=None and skip_nonfinite=False, or a step outside of graphs"
        )


def arguments(norms: Norms, bank: Bank, there: There) -> list[Tensor]:
    """What the kernel that begins a step is given: the pointers of `Begin`, in order."""
    limits = norms.limits
    scale = bank.given(limits.scale if limits else None, bank.one, "grad_scale")
    found_inf = bank.given(limits.found_inf if limits else None, bank.zero, "found_inf")
    loss = bank.given(limits.loss if limits else None, bank.no_loss, "latest_loss")
    return [
        bank.sums, bank.totals, bank.slots_of, there["limits"], scale, found_inf, there["settings"], there["sources"],
        there["keys"], there["active"], bank.steps, bank.fresh, bank.schedule_steps, bank.etas, there["groups"],
        there["rows"], bank.clips, bank.control, bank.found, norms.window.values, norms.window.seen, loss,
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
                captured, norms = capturing(device), table.norms
                if captured:
                    _check_capture(norms)
                copy = table.device_copies.setdefault(device, DeviceCopy(device))
                parts: There = {"places": table.segments.places, "moving": table.segments.moving}
                parts |= {index: own.words for index, own in chunks.items()}
                own = [b for b in buckets if b.spec.device == device and chunks[b.index].words.numel()]
                if norms is None or norms.bank is None:
                    parts |= {"control": table.control, "rows": rows}
                    there = copy.update(parts)
                else:
                    if norms.measures and table.whole is not table.segments:
                        whole: There = {f"whole {b.index}": cut_whole(table, b, chunks[b.index].size) for b in own}
                        parts |= whole | {"whole places": table.whole.places, "whole moving": table.whole.moving}
                    parts |= {**norms.inputs, "limits": norms.limit_words()}
                    there = copy.capture(parts) if captured else copy.update(parts)
                    if norms.capturable and not captured:
                        copy.reserve(parts)
                    sizes = {b.index: chunks[b.index].size for b in own}
                    launches.append(self._begun(table, norms, norms.bank, own, sizes, there))
                launches += [self.launch(table, bucket, chunks[bucket.index].size, there) for bucket in own]
                if captured and norms is not None:
                    norms.captured.append((there, *norms.lent, *launches))
            return launches

        return Prepared([], ready)

    def add_up(self, table: Table, buckets: list[Bucket], sums: Tensor, rows: Tensor) -> list[Launch]:
        launches: list[Launch] = []
        for device in dict.fromkeys(bucket.spec.device for bucket in buckets):
            size = partial(chunk_size, processors=machine(device)[0])
            own = [bucket for bucket in buckets if bucket.spec.device == device]
            chunks = {bucket.index: cut(table, bucket, size) for bucket in own}
            parts: There = {"places": table.segments.places, "moving": table.segments.moving}
            parts |= {index: cut_into.words for index, cut_into in chunks.items()}
            there = table.device_copies.setdefault(device, DeviceCopy(device)).update(parts)
            own = [bucket for bucket in own if chunks[bucket.index].words.numel()]
            sizes = {bucket.index: chunks[bucket.index].size for bucket in own}
            launches += [self.squares(table, sums, b, sizes[b.index], there, accumulates=True) for b in own]
        return launches

    def _begun(
        self, table: Table, norms: Norms, bank: Bank, buckets: list[Bucket], sizes: Mapping[int, int], there: There
    ) -> Callable[[], None]:
        """Adds up the squares of the gradients, if they are wanted; the launch that begins the step is left."""
        there["rows"], there["groups"] = bank.rows_for(there["keys"].shape[0], table.rule)
        there["control"] = bank.control
        begin = self.begin(table.rule, norms, bank, there)
        squares = []
        norms.set_schedule_steps()
        if norms.measures:
            for bucket in buckets if norms.measured is None else ():
                tables: There = there
                if "whole places" in there:
                    words, places, moving = there[f"whole {bucket.index}"], there["whole places"], there["whole moving"]
                    tables = {bucket.index: words, "places": places, "moving": moving}
                squares.append(self.squares(table, bank.sums, bucket, sizes[bucket.index], tables))
            if not bank.clean or capturing(bank.device):  # a step came to nothing, now or between replays
                bank.sums.zero_()
            bank.clean = False
            if norms.measured is not None:
                bank.sums[0] = norms.measured
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
    def squares(
        self, table: Table, sums: Tensor, bucket: Bucket, size: int, there: There, accumulates: bool = False
    ) -> Callable[[], None]:
        """The launch that adds up the squares of its gradients, or of what it adds these to; likewise.

        `sums`: int64 [copies, slots, sums.WORDS]; places name those of the first copy.
        """

    @abstractmethod
    def begin(self, rule: Rule, norms: Norms, bank: Bank, there: There) -> Callable[[], None]:
        """The launch that begins a step; likewise."""
