"""What the backends of GPUs share: the table is mirrored on the device, then a bucket is one launch there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..mirror import Mirror

if TYPE_CHECKING:
    from ..slots import Bucket, Table

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

    def prepare(self, table: Table, buckets: list[Bucket], rows: Tensor) -> list[Callable[[], None]]:
        """Uploads what changed and brings what is new to the device; the launches that are left are one a bucket."""
        launches: list[Callable[[], None]] = []
        for device in dict.fromkeys(bucket.spec.device for bucket in buckets):
            if device.type == "cuda":
                _refuse_capture(device)
            mirror = table.mirrors.setdefault(device, Mirror(device))
            mirror.update(table, rows, machine(device)[0])
            for bucket in buckets:
                if bucket.spec.device == device and mirror.chunks(bucket).numel():
                    launches.append(self.launch(table, bucket, mirror))
        return launches

    @abstractmethod
    def launch(self, table: Table, bucket: Bucket, mirror: Mirror) -> Callable[[], None]:
        """The launch of a bucket; its kernel is on the device when this returns."""
