"""What lies where: memory in which parameters and gradients lie end to end, and the places in it.

Every tensor keeps a storage of its own, made of its stretch of the memory: pickles and checkpoints hold its bytes and
no others, `deepcopy` gives ordinary tensors, and nothing sees a view. Only the table knows that the stretches are
neighbours, and it believes that of an address, never of a name: what a framework moves, replaces or swaps is stepped
where it lies then. Nothing is attached to a parameter, not even a weak reference, which `torch.utils.swap_tensors`
would refuse.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import dlpack

from ..validation import has_memory

__all__ = [
    "FlatBuffer",
    "FlatMemory",
    "FlatPlace",
    "attached",
    "changed",
    "generation",
    "memory_of_gradient",
    "place_of",
    "places",
    "stretch",
    "stretches",
]


class FlatMemory:
    """Memory of one device and dtype in which parameters lie end to end, and that where their gradients may likewise.

    It owns nothing: the memory lives as long as tensors that lie in it.

    Attributes:
        device, dtype: of all its parameters.
        numel: elements with padding.
        number: tells one from another.
        given: the offsets at which the memory of the gradients may hold something else than zeros.
    """

    _count = 0

    def __init__(self, data: Tensor, grad: Tensor | None) -> None:
        FlatMemory._count += 1
        self.number = FlatMemory._count
        self.device, self.dtype, self.numel = data.device, data.dtype, data.numel()
        self._offsets: list[int] = []
        self._grad: weakref.ref[Tensor] | None = None
        self._data, self._address = weakref.ref(data, self._forget), data.data_ptr()
        self.attach(grad)
        memories[self.number] = self

    def _forget(self, _: object) -> None:
        """Of its memory, something is gone: other tensors may lie there now."""
        if self.data is None:
            for offset in self._offsets:
                address = self._address + offset * self.dtype.itemsize
                if address in places and places[address].memory is self:
                    del places[address]
            self._offsets = []
            if self.grad is None:
                memories.pop(self.number, None)

    def put(self, offset: int, numel: int) -> FlatPlace:
        """The place of a parameter that is to lie at `offset`."""
        self._offsets.append(offset)
        place = places[self._address + offset * self.dtype.itemsize] = FlatPlace(self, offset, numel)
        return place

    def attach(self, grad: Tensor | None) -> None:
        """Makes `grad`, which is zeros, the memory of the gradients."""
        self._grad = None if grad is None else weakref.ref(grad, self._forget)
        self._grad_address = 0 if grad is None else grad.data_ptr()
        self.given = set[int]()

    @property
    def data(self) -> Tensor | None:
        """All of it, as one tensor; None once it is gone."""
        return self._data()

    @property
    def grad(self) -> Tensor | None:
        """All memory of gradients, as one tensor, whatever lies there; None once it is gone."""
        return None if self._grad is None else self._grad()

    @property
    def grad_address(self) -> int:
        """Where the gradients lie; 0 if they lie elsewhere."""
        return self._grad_address if self.grad is not None else 0

    def holds(self, p: Tensor, offset: int) -> bool:
        """Does `p` lie at `offset`?"""
        return (
            p.data_ptr() == self._address + offset * self.dtype.itemsize
            and p.dtype == self.dtype
            and p.device == self.device
            and self.data is not None
        )

    def has_gradient(self, grad: Tensor) -> bool:
        """Does `grad` lie here, at any place?"""
        return self.grad is not None and 0 <= grad.data_ptr() - self._grad_address < self.numel * self.dtype.itemsize


class FlatBuffer:
    """What `flatten_` has laid end to end: parameters of one device and dtype, and their gradients. It keeps them.

    Attributes:
        device, dtype: of all its parameters.
        numel: elements with padding.
    """

    def __init__(self, memory: FlatMemory, params: Sequence[Tensor], offsets: Sequence[int]) -> None:
        self._memory, self._members = memory, tuple(zip(params, offsets, strict=True))
        self.device, self.dtype, self.numel = memory.device, memory.dtype, memory.numel

    @property
    def data(self) -> Tensor | None:
        """The parameters, as one tensor; None where one of them lies elsewhere. Padding has no meaning."""
        whole = all(has_memory(p) and self._memory.holds(p, offset) for p, offset in self._members)
        return self._memory.data if whole else None

    @property
    def grad(self) -> Tensor | None:
        """All gradients, as one tensor, zeros where a parameter is frozen; None where that is not all of them.

        That is: where one lies elsewhere, was replaced or set to None, where a layer was unfrozen since, or where
        others lie here than `flatten_` was given this time. Padding is zero. `flatten_` brings gradients back.
        """
        memory = self._memory
        base, stale = memory.grad, set(memory.given)
        if base is None or self.data is None:
            return None
        for p, offset in self._members:
            if p.grad is not None:
                lies = has_memory(p.grad) and p.grad.data_ptr() == memory.grad_address + offset * p.itemsize
                if not lies or p.grad.dtype != p.dtype:
                    return None
                stale.discard(offset)
            elif p.requires_grad:
                return None
        return None if stale else base

    def __repr__(self) -> str:
        attached = "attached" if self.grad is not None else "elsewhere"
        return f"FlatBuffer({self.numel} elements of {self.dtype} on {self.device}, gradients {attached})"


@dataclass(frozen=True)
class FlatPlace:
    """Where a parameter was put: the memory, the first of its elements, and how many there are."""

    memory: FlatMemory
    offset: int
    numel: int


#: The place at each address at which a parameter was put, as long as its memory is there.
places: dict[int, FlatPlace] = {}
#: By their numbers, those of which anything is there.
memories: dict[int, FlatMemory] = {}
_generation = 0


def generation() -> int:
    """Counts what was flattened and unflattened: tables look again when it has changed."""
    return _generation


def changed() -> None:
    """Something was flattened or unflattened."""
    global _generation
    _generation += 1


def place_of(p: Tensor) -> FlatPlace | None:
    """The place at which a parameter, or a view of its memory, lies; None where that is in no flat memory."""
    if not places or not has_memory(p):
        return None
    place = places.get(p.data_ptr())
    there = place is not None and place.numel == p.numel() and place.memory.holds(p, place.offset)
    return place if there else None


def attached(p: Tensor) -> bool:
    """Does the gradient of `p` lie as `p` does?"""
    place = place_of(p)
    if place is None or p.grad is None or not place.memory.grad_address or not has_memory(p.grad):
        return False
    return p.grad.data_ptr() == place.memory.grad_address + place.offset * p.itemsize


def memory_of_gradient(grad: Tensor) -> FlatMemory | None:
    """The flat memory in which a gradient lies, wherever its parameter does."""
    known = list(memories.values()) if has_memory(grad) else []
    return next((memory for memory in known if memory.has_gradient(grad)), None)


def stretch(base: Tensor, offset: int, like: Tensor) -> Tensor:
    """The stretch of a flat tensor from `offset` on, of the shape and strides of `like`, with a storage of its own."""
    view = base.as_strided(like.shape, like.stride(), offset)
    return dlpack.from_dlpack(dlpack.to_dlpack(view))  # type: ignore[attr-defined]


def stretches(base: Tensor) -> int:
    """How many other tensors lie in a flat one."""
    storage = base.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 2  # `base` itself, and `storage`
