"""flatten_ and unflatten_: they move parameters and gradients into buffers, and out of them (`buffers.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import native
from ..formats import is_steppable
from ..layout import padded
from ..sharding import is_sharded
from ..validation import Extent, check_disjoint, check_roles, has_memory, is_dense, label
from .buffers import (
    FlatBuffer,
    FlatMemory,
    FlatPlace,
    attached,
    changed,
    memory_of_gradient,
    place_of,
    stretch,
    stretches,
)

__all__ = ["flatten_", "unflatten_"]

Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


def flatten_(params: Params) -> list[FlatBuffer]:
    """Moves parameters and their gradients into one buffer per device and dtype, in place.

    Every parameter keeps its identity, name, hooks, shape and strides, and begins at a multiple of 32 elements. A
    parameter that requires a gradient gets one that lies likewise: its values so far, or zeros. `AdamW` and `SGDW` then
    make states that lie likewise (those from before stay where they are; `load_state_dict` lays them flat). While
    gradients stay (`zero_grad(set_to_none=False)` keeps them, and is one memset), what shares a group and a step count
    is stepped as one long tensor. Where a gradient is set to None or replaced, by a framework's `zero_grad()`, say,
    its parameter is stepped like any other: nothing is lost but speed. Flattening again brings gradients back.

    Keeping gradients has torch's meaning: a parameter that takes no part in a loss has a gradient of zeros, is decayed,
    and goes on by its momentum. One that is frozen (`requires_grad=False`) after it had a gradient goes on likewise
    until `zero_grad`, which drops that gradient.

    Flat tensors are ordinary ones, but that their storages cannot be resized (`untyped_storage().resize_(0)`, as some
    offload): `unflatten_` first. What gives one other memory (`share_memory_()`, another process) takes it out.

    Args:
        params: as an optimizer takes them: parameters, (name, parameter) pairs, or dicts of parameter groups. Buffers
            follow this order, so give the groups that the optimizer will have. A parameter may come twice (tied
            weights). Empty ones are left as they are, and so is what is not trained and could not be, quantised weights
            say.

    Returns:
        The buffers. `buffer.grad` is there for one all-reduce or one norm of all gradients: it is all of them, or None
        as soon as one of them lies elsewhere.

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
    named = _named(params)
    by_kind: dict[tuple[torch.device, torch.dtype], dict[FlatMemory | None, list[tuple[Tensor, str]]]] = {}
    for p, what in named:
        place = _check(p, what)
        by_memory = by_kind.setdefault((p.device, p.dtype), {})
        by_memory.setdefault(None if place is None else place.memory, []).append((p, what))
    for by_memory in by_kind.values():
        if None in by_memory and len(by_memory) > 1:
            flat, other = (by_memory[b][0][1] for b in (next(b for b in by_memory if b), None))
            raise ValueError(f"{flat} is flat already, and {other} is not: unflatten_ all of them first")
    check_disjoint(Extent(p.detach(), what) for p, what in named)
    with torch.no_grad(), torch.inference_mode(False):
        plans = [_plan(*item) for by_memory in by_kind.values() for item in by_memory.items()]
        writes: list[Callable[[], object]] = [changed]
        for plan in plans:
            if plan.grad is not plan.memory.grad:
                writes.append(partial(plan.memory.attach, plan.grad))
            for p, theta, grad, place in plan.moves:
                if theta is not None:
                    theta.copy_(p)
                    writes.append(partial(setattr, p, "data", theta))
                if grad is not None:
                    writes.append(partial(setattr, p, "grad", grad.zero_() if p.grad is None else grad.copy_(p.grad)))
                if grad is not None or attached(p):
                    writes.append(partial(plan.memory.given.add, place.offset))
                elif plan.grad is not None and plan.grad is plan.memory.grad and place.offset in plan.memory.given:
                    stretch(plan.grad, place.offset, p).zero_()  # nobody has it any more
                    writes.append(partial(plan.memory.given.discard, place.offset))
        native.insist([*writes, changed])  # all or nothing: what raises has been done
    return [
        FlatBuffer(plan.memory, [p for p, *_ in plan.moves], [place.offset for *_, place in plan.moves])
        for plan in plans
    ]


@dataclass
class _Plan:
    """Flat memory, and for every parameter its new tensor, that of its gradient (None: they stay), and its place."""

    memory: FlatMemory
    grad: Tensor | None  # the memory of the gradients
    moves: list[tuple[Tensor, Tensor | None, Tensor | None, FlatPlace]]


def _plan(memory: FlatMemory | None, members: Sequence[tuple[Tensor, str]]) -> _Plan:
    """Allocates what the parameters need: all of it, or gradients alone where they are flat already."""
    params = [p for p, _ in members]
    data = grad = None
    if memory is not None:
        places = [place for place in map(place_of, params) if place is not None]
        size, grad = memory.numel, memory.grad
        missing = [p.requires_grad or place.offset in memory.given for p, place in zip(params, places, strict=True)]
        whole = all(attached(p) or not lacks for p, lacks in zip(params, missing, strict=True))
        # A gradient that is nobody's now, another's, or that of a parameter which is not given, keeps what it shows.
        if grad is not None and not whole and stretches(grad) != sum(map(attached, params)):
            grad = None
    else:
        offsets, size = [], 0
        for p in params:
            offsets.append(size)
            size += padded(p.numel())
        data = torch.zeros(size, dtype=params[0].dtype, device=params[0].device)
    if grad is None and any(p.requires_grad for p in params):
        grad = torch.zeros(size, dtype=params[0].dtype, device=params[0].device)
    if memory is None:
        assert data is not None
        memory = FlatMemory(data, grad)
        places = [memory.put(offset, p.numel()) for p, offset in zip(params, offsets, strict=True)]
    moves: list[tuple[Tensor, Tensor | None, Tensor | None, FlatPlace]] = []
    for p, place in zip(params, places, strict=True):
        theta = None if data is None else stretch(data, place.offset, p)
        own = stretch(grad, place.offset, p) if p.requires_grad and grad is not None else None
        if own is not None and data is None and grad is memory.grad and attached(p):
            own = None
        moves.append((p, theta, own, place))
    return _Plan(memory, grad, moves)


def unflatten_(params: Params) -> None:
    """Gives flat parameters and gradients memory of their own again, in place; others are left as they are.

    States stay where they are: they are ordinary tensors too. So do gradients that lie elsewhere, in a bucket of DDP's.

    Args:
        params: as for :func:`flatten_`.
    """
    with torch.no_grad(), torch.inference_mode(False):
        for p, _ in _named(params):
            if place_of(p) is not None:
                p.data = p.data.clone(memory_format=torch.preserve_format)
            if p.grad is not None and memory_of_gradient(p.grad) is not None:
                p.grad = p.grad.clone(memory_format=torch.preserve_format)
    changed()


def _named(params: Params) -> list[tuple[Tensor, str]]:
    """Parameters with what errors call them; a repeated one once, empty ones not."""
    if isinstance(params, (Tensor, torch.nn.Module)):
        hint = ": give its .parameters()" if isinstance(params, torch.nn.Module) else ""
        raise TypeError(
            f"params is a {type(params).__name__}{hint}; expected an iterable of parameters, (name, parameter) pairs "
            "or dicts"
        )
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
    return [(p, what) for p, what in found.values() if not _stays(p)]


def _stays(p: Tensor) -> bool:
    """Is it left as it is: empty, or not trained and nothing that could be, quantised weights, say?"""
    if p.requires_grad or p.grad is not None:
        return p.layout == torch.strided and not p.numel()
    return not has_memory(p) or not is_steppable(p.dtype)


def _check(p: Tensor, what: str) -> FlatPlace | None:
    """The place of `p` if it is flat already. Raises if it and its gradient cannot be made flat."""
    if is_sharded(p):
        raise TypeError(
            f"{what} is a DTensor: who shards it, fully_shard, say, keeps the address of its local tensor, which must "
            "stay where it is. Flat are ordinary tensors; DTensors are stepped in one launch as they are"
        )
    check_roles(p, p.grad, what, f"the gradient of {what}")
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
    if p.grad is not None and p.grad.dtype != p.dtype:
        raise TypeError(
            f"the gradient of {what} has dtype {p.grad.dtype}: flat gradients have their parameter's, {p.dtype}; "
            "set it to None first"
        )
    return place
