"""What lies where: buffers of parameters and gradients that lie end to end in memory, and the places in them.

Every tensor keeps a storage of its own, made of its stretch of the buffer: pickles and checkpoints hold its bytes and
no others, `deepcopy` gives ordinary tensors, and nothing sees a view. Only the table knows that the stretches are
neighbours, and it believes that of an address, never of a name: what a framework moves, replaces or swaps is stepped
where it lies then.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import dlpack
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "PADDING",
    "FlatBuffer",
    "FlatPlace",
    "attached",
    "changed",
    "generation",
    "known_places",
    "padded",
    "place_of",
    "stretch",
    "stretches",
]

#: Every tensor begins at a multiple of this many elements: 64 bytes or more, whatever the dtype.
PADDING = 32


class FlatBuffer:
    """Parameters of one device and dtype that lie end to end, and the memory where their gradients may lie likewise.

    It owns nothing: the memory lives as long as tensors that lie in it.

    Attributes:
        device, dtype: of all its parameters.
        numel: elements with padding.
        number: tells buffers apart.
    """

    _count = 0

    def __init__(self, data: Tensor, grad: Tensor | None) -> None:
        FlatBuffer._count += 1
        self.number = FlatBuffer._count
        self.device, self.dtype, self.numel = data.device, data.dtype, data.numel()
        self._data, self._address = weakref.ref(data), data.data_ptr()
        self.attach(grad)

    def attach(self, grad: Tensor | None) -> None:
        """Makes `grad` the memory of the gradients."""
        self._grad = None if grad is None else weakref.ref(grad)
        self._grad_address = 0 if grad is None else grad.data_ptr()

    @property
    def data(self) -> Tensor | None:
        """The parameters, padding included, as one tensor; None once they lie elsewhere. Padding has no meaning."""
        return self._data()

    @property
    def grad(self) -> Tensor | None:
        """The gradients, as one tensor; None once they lie elsewhere. Their padding is zero."""
        return None if self._grad is None else self._grad()

    @property
    def grad_address(self) -> int:
        """Where the gradients lie; 0 if they lie elsewhere."""
        return self._grad_address if self.grad is not None else 0

    def holds(self, p: Tensor, offset: int) -> bool:
        """Does `p` lie at `offset` of this buffer?"""
        return (
            p.data_ptr() == self._address + offset * self.dtype.itemsize
            and p.dtype == self.dtype
            and p.device == self.device
            and self.data is not None
        )

    def has_gradient(self, grad: Tensor) -> bool:
        """Does `grad` lie in this buffer, at any place?"""
        return self.grad is not None and 0 <= grad.data_ptr() - self._grad_address < self.numel * self.dtype.itemsize

    def __repr__(self) -> str:
        attached = "attached" if self.grad is not None else "elsewhere"
        return f"FlatBuffer({self.numel} elements of {self.dtype} on {self.device}, gradients {attached})"


@dataclass(frozen=True)
class FlatPlace:
    """Where a parameter was put: the buffer, the first of its elements, and how many there are."""

    buffer: FlatBuffer
    offset: int
    numel: int


#: The place that each parameter was given.
known_places: Any = WeakIdKeyDictionary()
_generation = 0


def generation() -> int:
    """Counts what was flattened and unflattened: tables look again when it has changed."""
    return _generation


def changed() -> None:
    """Something was flattened or unflattened."""
    global _generation
    _generation += 1


def padded(numel: int) -> int:
    """Elements that a parameter takes in a buffer."""
    return -(-numel // PADDING) * PADDING


def place_of(p: Tensor, view: Tensor | None = None) -> FlatPlace | None:
    """The place of a parameter in a flat buffer, if it still lies there; `view`: of its memory, if that was taken."""
    place: FlatPlace | None = known_places.get(p)
    lies = p if view is None else view
    there = place is not None and place.numel == lies.numel() and place.buffer.holds(lies, place.offset)
    return place if there else None


def attached(p: Tensor) -> bool:
    """Does the gradient of `p` lie in its buffer as `p` does?"""
    place = place_of(p)
    if place is None or p.grad is None or not place.buffer.grad_address:
        return False
    return p.grad.data_ptr() == place.buffer.grad_address + place.offset * p.itemsize


def stretch(base: Tensor, offset: int, like: Tensor) -> Tensor:
    """The stretch of a flat tensor from `offset` on, of the shape and strides of `like`, with a storage of its own."""
    view = base.as_strided(like.shape, like.stride(), offset)
    return dlpack.from_dlpack(dlpack.to_dlpack(view))  # type: ignore[attr-defined]


def stretches(base: Tensor) -> int:
    """How many other tensors lie in a flat one."""
    storage = base.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 2  # `base` itself, and `storage`
