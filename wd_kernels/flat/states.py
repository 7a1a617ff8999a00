"""What an optimizer has of flat parameters: states that lie likewise, and gradients that are zeroed at once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import padded
from .buffers import FlatMemory, FlatPlace, attached, generation, place_of, stretch, stretches

__all__ = ["FlatGradients", "FlatStates"]


class FlatGradients:
    """The gradients of an optimizer that lie in flat buffers, to be zeroed at once."""

    def __init__(self) -> None:
        self._known: tuple[int, list[int]] = (-1, [])
        self._addresses: list[int] | None = None  # where they lie while all are attached; None: somewhere else
        self._memories: list[FlatMemory] = []

    def zero_(self, params: Sequence[Tensor]) -> bool:
        """Zeroes the gradients of `params`; False, and nothing is done, if one of them lies elsewhere.

        Or if somebody holds one that its parameter no longer has.
        """
        known = (generation(), list(map(id, params)))
        if known != self._known:
            self._known, (self._addresses, self._memories) = known, _whole_memories(params)
        for p in params:
            if not p.requires_grad and p.grad is not None and (place := place_of(p)) is not None and attached(p):
                p.grad.zero_()  # a parameter that was frozen since has no gradient
                p.grad = None
                place.memory.given.discard(place.offset)
        if self._addresses is None:
            return False
        memory = [base for base in (memory.grad for memory in self._memories) if base is not None]
        if len(memory) < len(self._memories):
            return False
        lie = [0 if p.grad is None else p.grad.data_ptr() for p in params]
        if lie != self._addresses:
            if any(a not in (0, b) for a, b in zip(lie, self._addresses, strict=True)):
                return False
            if sum(map(stretches, memory)) != sum(a != 0 for a in lie):
                return False
        for base in memory:
            base.zero_()
        return True


def _whole_memories(params: Sequence[Tensor]) -> tuple[list[int] | None, list[FlatMemory]]:
    """Where the gradients of `params` lie if they are flat, and in which memory if nobody else has a part in it."""
    places = [place_of(p) for p in params]
    taken: dict[FlatMemory, int] = {}
    addresses = []
    for p, place in zip(params, places, strict=True):
        if place is None or not place.memory.grad_address:
            return None, []
        taken[place.memory] = taken.get(place.memory, 0) + padded(place.numel)
        addresses.append(place.memory.grad_address + place.offset * p.itemsize)
    if any(count != memory.numel for memory, count in taken.items()):
        return None, []
    return addresses, list(taken)


class FlatStates:
    """The states of an optimizer that lie as their parameters do: a buffer for each flat buffer and state.

    Memory that was given out is never given out again: whoever holds an old state keeps what it shows.
    """

    def __init__(self) -> None:
        self._bases: dict[tuple[int, str, torch.dtype], _Base] = {}

    def zeros(self, place: FlatPlace, like: Tensor, name: str, dtype: torch.dtype, per: int = 1) -> Tensor:
        """A new state of zeros for the parameter that lies at `place`, of the shape and strides of `like`.

        It has an element for every `per` of the parameter's.
        """
        key = (place.memory.number, name, dtype)
        base = self._bases.get(key)
        tensor = None if base is None else base.tensor()
        if base is None or tensor is None or place.offset in base.given:
            tensor = torch.zeros(place.memory.numel // per, dtype=dtype, device=place.memory.device)
            base = self._bases[key] = _Base(weakref.ref(tensor), set())
        base.given.add(place.offset)
        return stretch(tensor, place.offset // per, like)

    def base(self, place: FlatPlace, state: Tensor, name: str, per: int = 1) -> Tensor | None:
        """The buffer in which `state` lies as its parameter does; None if it lies elsewhere."""
        base = self._bases.get((place.memory.number, name, state.dtype))
        tensor = None if base is None else base.tensor()
        if tensor is None or state.data_ptr() != tensor.data_ptr() + place.offset // per * state.itemsize:
            return None
        return tensor


@dataclass(frozen=True)
class _Base:
    """The memory of one state of the parameters of a buffer, and the offsets that were given out."""

    tensor: weakref.ref[Tensor]
    given: set[int]
