"""flatten_ and unflatten_: parameters, gradients and states that lie end to end in memory.

Every tensor keeps a storage of its own, made of its stretch of the buffer: pickles and checkpoints hold its bytes and
no others, `deepcopy` gives ordinary tensors, and nothing sees a view. Only the table knows that the stretches are
neighbours, and it believes that of an address, never of a name: what a framework moves, replaces or swaps is stepped
where it lies then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import dlpack
from torch.utils.weak import WeakIdKeyDictionary

from .checks import Extent, check_disjoint, check_gradient, check_memory, check_parameter, check_type, is_dense, label

__all__ = [
    "FlatBuffer",
    "Place",
    "flatten_",
    "generation",
    "padded",
    "place_of",
    "stretch",
    "stretches",
    "unflatten_",
]

#: Every tensor begins at a multiple of this many elements: 64 bytes or more, whatever the dtype.
PADDING = 32

Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


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
class Place:
    """Where a parameter was put: the buffer, the first of its elements, and how many there are."""

    buffer: FlatBuffer
    offset: int
    numel: int


_places: Any = WeakIdKeyDictionary()
_generation = 0


def generation() -> int:
    """Counts what was flattened and unflattened: tables look again when it has changed."""
    return _generation


def padded(numel: int) -> int:
    """Elements that a parameter takes in a buffer."""
    return -(-numel // PADDING) * PADDING


def place_of(p: Tensor) -> Place | None:
    """The place of a parameter in a flat buffer, if it still lies there."""
    place: Place | None = _places.get(p)
    return place if place is not None and place.numel == p.numel() and place.buffer.holds(p, place.offset) else None


def stretch(base: Tensor, offset: int, like: Tensor) -> Tensor:
    """The stretch of a flat tensor from `offset` on, of the shape and strides of `like`, with a storage of its own."""
    view = base.as_strided(like.shape, like.stride(), offset)
    return dlpack.from_dlpack(dlpack.to_dlpack(view))  # type: ignore[attr-defined]


def stretches(base: Tensor) -> int:
    """How many other tensors lie in a flat one."""
    storage = base.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 2  # `base` itself, and `storage`


def flatten_(params: Params) -> list[FlatBuffer]:
    """Moves parameters and their gradients into one buffer per device and dtype, in place.

    Every parameter keeps its identity, name, hooks, shape and strides, and begins at a multiple of 32 elements. A
    parameter that requires a gradient gets one that lies likewise: its values so far, or zeros. `AdamW` and `SGDW` then
    make states that lie likewise (those from before stay where they are; `load_state_dict` lays them flat). While
    gradients stay (`zero_grad(set_to_none=False)` keeps them, and is one memset), what shares a group and a step count
    is stepped as one long tensor. Where a gradient is set to None or replaced, by a framework's `zero_grad()`, say,
    its parameter is stepped like any other: nothing is lost but speed. Flattening again brings gradients back.

    Keeping gradients has torch's meaning: a parameter that takes no part in a loss has a gradient of zeros, and is
    decayed.

    Args:
        params: as an optimizer takes them: parameters, (name, parameter) pairs, or dicts of parameter groups. Buffers
            follow this order, so give the groups that the optimizer will have. A parameter may come twice (tied
            weights). Empty ones are left as they are.

    Returns:
        The buffers. They own no memory; `buffer.grad` is there for one all-reduce or one norm of all gradients.

    Raises:
        TypeError, ValueError, RuntimeError: naming the parameter: a DTensor or another subclass with memory of its own
            kind, sparse, expanded or with gaps, a view of other memory, not a leaf, overlapping another, or with a
            gradient of another dtype; or some of them are flat already and others not. Nothing was moved.

    Example:
        >>> import torch, wd_kernels
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
        >>> wd_kernels.flatten_(model.parameters())
        [FlatBuffer(128 elements of torch.float32 on cpu, gradients attached)]
        >>> opt = wd_kernels.AdamW(model.parameters(), lr=1e-3)
        >>> opt.zero_grad(set_to_none=False)
    """
    global _generation
    named = _named(params)
    by_kind: dict[tuple[torch.device, torch.dtype], dict[FlatBuffer | None, list[tuple[Tensor, str]]]] = {}
    for p, what in named:
        place = _check(p, what)
        by_buffer = by_kind.setdefault((p.device, p.dtype), {})
        by_buffer.setdefault(None if place is None else place.buffer, []).append((p, what))
    for by_buffer in by_kind.values():
        if None in by_buffer and len(by_buffer) > 1:
            flat, other = (by_buffer[b][0][1] for b in (next(b for b in by_buffer if b), None))
            raise ValueError(f"{flat} is flat already, and {other} is not: unflatten_ all of them first")
    check_disjoint(Extent(p.detach(), what) for p, what in named)
    with torch.no_grad(), torch.inference_mode(False):
        plans = [_plan(*item) for by_buffer in by_kind.values() for item in by_buffer.items()]
        for plan in plans:
            for p, theta, grad, place in plan.moves:
                if theta is not None:
                    theta.copy_(p)
                    p.data = theta
                    _places[p] = place
                if grad is not None:
                    p.grad = grad.zero_() if p.grad is None else grad.copy_(p.grad)
    _generation += 1
    return [plan.buffer for plan in plans]


@dataclass
class _Plan:
    """A buffer, and for every parameter its new memory, that of its gradient (None: they stay), and its place."""

    buffer: FlatBuffer
    moves: list[tuple[Tensor, Tensor | None, Tensor | None, Place]]


def _plan(buffer: FlatBuffer | None, members: Sequence[tuple[Tensor, str]]) -> _Plan:
    """Allocates what the parameters need: all of it, or gradients alone where they are flat already."""
    params = [p for p, _ in members]
    if buffer is not None:
        places = [place_of(p) for p in params]
        size, data = buffer.numel, None
    else:
        offsets, size = [], 0
        for p in params:
            offsets.append(size)
            size += padded(p.numel())
        data = torch.zeros(size, dtype=params[0].dtype, device=params[0].device)
    grad = buffer.grad if buffer is not None else None
    if buffer is not None and grad is not None and not all(_attached(p) for p in params if p.requires_grad):
        others = sum(place.buffer is buffer and _attached(p) for p, place in _places.items())
        if stretches(grad) != others:  # a gradient that is nobody's now, or another's: it keeps what it shows
            grad = None
    if grad is None and any(p.requires_grad for p in params):
        grad = torch.zeros(size, dtype=params[0].dtype, device=params[0].device)
    if buffer is None:
        assert data is not None
        buffer = FlatBuffer(data, grad)
        places = [Place(buffer, offset, p.numel()) for p, offset in zip(params, offsets, strict=True)]
    elif grad is not buffer.grad:
        buffer.attach(grad)
    moves: list[tuple[Tensor, Tensor | None, Tensor | None, Place]] = []
    for p, place in zip(params, places, strict=True):
        assert place is not None
        theta = None if data is None else stretch(data, place.offset, p)
        own = stretch(grad, place.offset, p) if p.requires_grad and grad is not None else None
        if own is not None and data is None and _attached(p):
            own = None
        moves.append((p, theta, own, place))
    return _Plan(buffer, moves)


def _attached(p: Tensor) -> bool:
    """Does the gradient of `p` lie in its buffer as `p` does?"""
    place = place_of(p)
    if place is None or p.grad is None or not place.buffer.grad_address:
        return False
    return p.grad.data_ptr() == place.buffer.grad_address + place.offset * p.itemsize


def unflatten_(params: Params) -> None:
    """Gives flat parameters and gradients memory of their own again, in place; others are left as they are.

    States stay where they are: they are ordinary tensors too. So do gradients that lie elsewhere, in a bucket of DDP's.

    Args:
        params: as for :func:`flatten_`.
    """
    global _generation
    with torch.no_grad(), torch.inference_mode(False):
        for p, _ in _named(params):
            lies, place = place_of(p), _places.pop(p, None)
            if lies is not None:
                p.data = p.data.clone(memory_format=torch.preserve_format)
            if place is not None and p.grad is not None and place.buffer.has_gradient(p.grad):
                p.grad = p.grad.clone(memory_format=torch.preserve_format)
    _generation += 1


def _named(params: Params) -> list[tuple[Tensor, str]]:
    """Parameters with what errors call them; a repeated one once, empty ones not."""
    if isinstance(params, Tensor):
        raise TypeError("params is a Tensor: expected an iterable of parameters, (name, parameter) pairs or dicts")
    entries: list[tuple[Any, str]] = []
    for index, entry in enumerate(params):
        if isinstance(entry, dict):
            own = entry["params"]
            own = [own] if isinstance(own, Tensor) else list(own)
            entries += [(q, label(entry, index, k)) for k, q in enumerate(own)]
        else:
            entries.append((entry, f"parameter {index}"))
    found: dict[int, tuple[Tensor, str]] = {}
    for p, what in entries:
        if isinstance(p, tuple) and len(p) == 2:
            p, what = p[1], f"parameter {p[0]!r}"
        if not isinstance(p, Tensor):
            raise TypeError(f"{what} is a {type(p).__name__}: expected a tensor")
        found.setdefault(id(p), (p, what))
    return [(p, what) for p, what in found.values() if p.layout != torch.strided or p.numel()]


def _check(p: Tensor, what: str) -> Place | None:
    """The place of `p` if it is flat already. Raises if it and its gradient cannot be made flat."""
    check_parameter(p, what)
    check_memory(p, what)
    if not p.is_leaf:
        raise ValueError(f"{what} is not a leaf of the autograd graph: a parameter is one")
    if p.is_inference():
        raise ValueError(f"{what} is an inference tensor: its memory cannot be exchanged")
    if not is_dense(p):
        raise ValueError(
            f"{what} of shape {tuple(p.shape)} and strides {p.stride()} has gaps: it is a view of other memory"
        )
    place = place_of(p)
    if place is None and p.untyped_storage().nbytes() != p.numel() * p.itemsize:
        raise ValueError(
            f"{what} is a view: its {p.numel() * p.itemsize} bytes lie in a storage of {p.untyped_storage().nbytes()}, "
            "which would be left behind; give it memory of its own first: p.data = p.data.clone()"
        )
    if p.grad is not None:
        check_type(p.grad, f"the gradient of {what}")
        check_gradient(p, p.grad, f"the gradient of {what}")
        if p.grad.dtype != p.dtype:
            raise TypeError(
                f"the gradient of {what} has dtype {p.grad.dtype}: flat gradients have their parameter's, {p.dtype}; "
                "set it to None first"
            )
    return place
