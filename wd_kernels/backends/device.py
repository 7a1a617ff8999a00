"""What the backends of GPUs share: the table is copied to the device, then a bucket is one launch there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..layout import Bucket, Chunks, Table, cut
from .device_copy import DeviceCopy, chunk_size
from .prepared import Prepared

__all__ = ["OnDevice", "current", "machine"]


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


class OnDevice(ABC):
    """One launch a bucket, on the tensors' device and its current stream, never waiting for it."""

    needs_tensors = False

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
                copy.update(table, chunks, rows)
                for bucket in buckets:
                    if bucket.spec.device == device and chunks[bucket.index].words.numel():
                        launches.append(self.launch(table, bucket, chunks[bucket.index].size, copy))
            return launches

        return Prepared([], ready)

    @abstractmethod
    def launch(self, table: Table, bucket: Bucket, size: int, copy: DeviceCopy) -> Callable[[], None]:
        """The launch of a bucket, whose chunks have `size` elements; its kernel is on the device when this returns."""
