"""Tensors that a caller holds, as a table: what a backend steps where there is no optimizer.

A list of tensors for every role (parameters, gradients, states) becomes segments and buckets like those of a
TensorTable, made anew for one step. Nothing is copied but gradients that lie otherwise than their parameters, and
nothing is remembered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import backends, native
from ..backends.cpu import CHUNK
from ..formats import MASTER_NAME, SCALE, TILE, has_scales, master_dtypes, state_dtypes, tiles
from ..layout import (
    CPU,
    GRAD,
    PARAM,
    Bucket,
    Moving,
    Place,
    Segments,
    Spec,
    Tensors,
    native_kernel,
    origins,
    spec_of,
    write_segment,
)
from ..rules import Rule, State
from ..sharding import check_sharding, local
from ..validation import (
    Extent,
    check_address,
    check_disjoint,
    check_gradient,
    check_parameter,
    check_roles,
    check_type,
    is_dense,
    same_layout,
)
from .changes import device_code, dtype_code

__all__ = ["ONE", "Lists", "examine", "held", "step_alike"]

Roles = Sequence[list[Tensor]]
#: A control whose gradient factor is 1, and which skips nothing.
ONE = torch.tensor([1.0, 0.0], dtype=torch.float64, device=CPU)


def step_alike(
    rule: Rule, states: tuple[State, ...], stochastic: tuple[bool, bool], roles: Roles, backend: str, control: Tensor,
    rows: Tensor, row_of: Sequence[int],
) -> bool:  # fmt: skip
    """A step of tensors of one kind, on the CPU, in one native call: nothing runs between the check and the launch.

    Args:
        rule, states: what is stepped, and what lies beside a parameter: its states, `MASTER`, scales.
        stochastic: are parameters, are states rounded stochastically, where their dtype can be?
        roles: lists of equal length: parameters, gradients, and each state.
        backend: by name.
        row_of: of each parameter.

    Returns:
        False where they are of several kinds, not as they should be, or for another backend; then nothing was done.
    """
    firsts = [own[0] for own in roles]
    if not native.CHECKS or not all(isinstance(t, Tensor) for t in firsts):
        return False
    dtypes = tuple([t.dtype for t in firsts])
    spec = spec_of(firsts[PARAM].device, dtypes, states, stochastic)
    if spec is None or spec.device.type != "cpu" or backend not in ("auto", "cpu"):
        return False
    kind = _kind(rule, spec, dtypes)
    written = [t for role, own in enumerate(roles) if role != GRAD for t in own]
    wrong = native.C.step_lists(
        tuple(roles), kind, list(row_of) if any(row_of) else None, control, rows, torch._C._increment_version, written,
        native.OPS.hold.default._op, threading.active_count() > 1,
    )  # fmt: skip
    return bool(wrong == -1)


@lru_cache
def _kind(rule: Rule, spec: Spec, dtypes: tuple[torch.dtype, ...]) -> tuple[Any, ...]:
    """What native code steps together; `dtypes` of every role."""
    return tuple(map(dtype_code, dtypes)), device_code(spec.device), CHUNK, *native_kernel(rule, spec), spec.scales


class Lists:
    """The table of one step. It has what a backend reads of a TensorTable (`layout.Table`).

    Args:
        rule, states: what is stepped, and what lies beside a parameter: its states, `MASTER`, scales.
        stochastic: are parameters, are states rounded stochastically, where their dtype can be?
        label: how errors call the i-th tensor of a role.
        roles: lists of equal length: parameters, gradients, and each state.
        backend: by name.

    Raises:
        TypeError, ValueError, RuntimeError: naming the tensor; nothing was written.
    """

    def __init__(
        self, rule: Rule, states: tuple[State, ...], stochastic: tuple[bool, bool], label: Callable[[int, int], str],
        roles: Roles, backend: str, control: Tensor = ONE,
    ) -> None:  # fmt: skip
        self.rule, self.states, self.stochastic, self.roles = rule, states, stochastic, list(roles)
        self.device_copies: dict[torch.device, Any] = {}
        self.control = control
        self.norms = None
        self.order: Sequence[int] = range(len(roles[PARAM]))  # segment k is of the tensors order[k]
        self.segments = Segments.empty(len(self.order), len(states))
        self.buckets: list[Bucket] = []
        firsts = [own[0] for own in roles]
        spec = self._spec(firsts) if all(isinstance(t, Tensor) for t in firsts) else None
        if spec is not None and self._gather(spec):
            self.buckets.append(Bucket(spec, _resolve(backend, spec), 0, 0, self.order))
        else:
            self.roles = held(label, roles)
            examine(label, states, self.roles)
            self._sort(backend)

    def _spec(self, own: Sequence[Tensor]) -> Spec | None:
        """What a bucket's segments share, of a parameter with its other roles; None for what no bucket has."""
        return spec_of(own[PARAM].device, tuple([t.dtype for t in own]), self.states, self.stochastic)

    def _gather(self, spec: Spec) -> bool:
        """Fills the segments of tensors that are all of one kind and as they should be; False if some are not."""
        device = device_code(spec.device)
        if not native.CHECKS or device < 0:
            return False
        dtypes = tuple([dtype_code(role[0].dtype) for role in self.roles])
        own = self.segments
        arrays = (own.moving, own.places, own.capacities)
        return bool(native.C.gather(tuple(self.roles), dtypes, device, *arrays, spec.scales) == -1)

    def _sort(self, backend: str) -> None:
        """Fills the segments of tensors of several kinds, which have been examined."""
        self.roles[GRAD] = [_like(*pair) for pair in zip(*self.roles[:2], strict=True)]
        by_spec: dict[Spec, list[int]] = {}
        for i, tensors in enumerate(zip(*self.roles, strict=True)):
            spec = self._spec(tensors)
            assert spec is not None
            by_spec.setdefault(spec, []).append(i)
        for spec, members in by_spec.items():
            first = sum(len(bucket.members) for bucket in self.buckets)
            self.buckets.append(Bucket(spec, _resolve(backend, spec), len(self.buckets), first, members))
        self.order = list(chain(*by_spec.values()))
        begins = origins(self.roles[PARAM])
        for segment, i in enumerate(self.order):
            scales = sum(state.of is not None for state in self.states)
            write_segment(self.segments, segment, [own[i] for own in self.roles], scales)
            self.segments.places[segment, Place.ORIGIN] = begins[i]
        self.segments.capacities.copy_(self.segments.moving[:, Moving.NUMEL])

    # What a backend reads ---------------------------------------------------------------------------------------------

    @property
    def active(self) -> Tensor:
        return torch.ones(len(self.order), device=CPU)

    @property
    def whole(self) -> Segments:
        return self.segments

    def span(self, bucket: Bucket) -> tuple[int, int]:
        return bucket.first, len(bucket.members)

    def tensors(self, i: int) -> Tensors:
        theta, grad, *states = (own[i] for own in self.roles)
        beside = {state.name: t for state, t in zip(self.states, states, strict=True)}
        segment = self.order.index(i)
        row, origin = self.segments.moving[segment, Moving.ROW], self.segments.places[segment, Place.ORIGIN]
        return Tensors.of(theta.detach(), grad, beside, int(row), int(origin))


def held(label: Callable[[int, int], str], roles: Roles) -> list[list[Tensor]]:
    """Views of tensors, which keep their memory, whatever others do to them meanwhile."""
    views = []
    for role, own in enumerate(roles):
        for i, t in enumerate(own):
            if not isinstance(t, Tensor):
                raise TypeError(f"{label(role, i)} is a {type(t).__name__}: expected a tensor")
            check_type(t, label(role, i))
            check_sharding(roles[PARAM][i], t, label(role, i), gradient=role == GRAD)
        views.append([local(t).data for t in own])
    return views


def _like(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient, or a copy that lies in memory as its parameter."""
    if same_layout(grad, p) and not (grad.is_conj() or grad.is_neg() or grad._is_zerotensor()):
        return grad
    return torch.empty_like(p, dtype=grad.dtype, requires_grad=False).copy_(grad.detach())


@lru_cache
def _resolve(backend: str, spec: Spec) -> backends.Backend:
    return backends.resolve(backend, spec)


def examine(label: Callable[[int, int], str], states: Sequence[State], roles: Roles, memory: bool = True) -> None:
    """Raises if the tensors of the roles do not belong together.

    Args:
        label: how errors call the i-th tensor of a role.
        states: those that are there.
        roles: lists of equal length: parameters, gradients, and each state.
        memory: look at addresses too, which fake tensors have not.
    """
    for i, own in enumerate(zip(*roles, strict=True)):
        names = [label(role, i) for role in range(len(own))]
        for what, t in zip(names, own, strict=True):
            if not isinstance(t, Tensor):
                raise TypeError(f"{what} is a {type(t).__name__}: expected a tensor")
            if memory:
                check_type(t, what)
        p, grad = own[PARAM], own[GRAD]
        check_parameter(p, names[PARAM])
        if not is_dense(p):
            raise ValueError(
                f"{names[PARAM]} of shape {tuple(p.shape)} has strides {p.stride()}: allowed are layouts without gaps"
            )
        if memory:
            check_roles(p, grad, names[PARAM], names[GRAD])
        else:
            check_gradient(p, grad, names[GRAD])
        for kind, what, state in zip(states, names[2:], own[2:], strict=True):
            if kind.of is not None:
                of = [other.name for other in states].index(kind.of)
                _check_scale(p, state, what, names[PARAM], own[2 + of].dtype, names[2 + of])
            else:
                _check_state(p, state, _allowed(p, kind), what, names[PARAM])
            if has_scales(state.dtype) and kind.of is None and kind.scale not in states and kind.name != MASTER_NAME:
                raise ValueError(
                    f"{what} has dtype {state.dtype}, and no {kind.scale.plural} are given: it needs one for every "
                    f"{TILE} elements, {SCALE.dtype}, zeros before the first step"
                )
            if memory:
                check_address(state, what)
    if memory:
        check_disjoint(
            Extent(t.detach(), label(role, i), written=role != GRAD)
            for role, tensors in enumerate(roles)
            for i, t in enumerate(tensors)
        )


def _allowed(p: Tensor, kind: State) -> tuple[torch.dtype, ...]:
    return master_dtypes(p.dtype) if kind.name == MASTER_NAME else state_dtypes(p.dtype, kind.signed)


def _check_scale(p: Tensor, scale: Tensor, what: str, owner: str, dtype: torch.dtype, state: str) -> None:
    """Raises if `scale` cannot be the scales of a state of `p`, which has `dtype`."""
    if not has_scales(dtype):
        raise TypeError(f"{what} is given, and {state} has dtype {dtype}: states in 8 bits have scales")
    n = tiles(p.numel())
    if scale.dtype != SCALE.dtype or scale.numel() != n or scale.device != p.device or not scale.is_contiguous():
        raise ValueError(
            f"{what} has dtype {scale.dtype}, shape {tuple(scale.shape)} and strides {scale.stride()} on "
            f"{scale.device}: {owner} needs {n} of {SCALE.dtype} on {p.device}, contiguous, one for every {TILE} "
            "elements"
        )


def _check_state(p: Tensor, state: Tensor, allowed: Sequence[torch.dtype], what: str, owner: str) -> None:
    """Raises if `state` cannot be a state of `p`, as it is: a state is written, so no copy will do."""
    if not allowed:
        raise TypeError(f"{what} is given for {owner}, which has dtype {p.dtype}: bfloat16 and float16 have masters")
    if state.dtype not in allowed:
        raise TypeError(f"{what} has dtype {state.dtype}: {owner} needs {' or '.join(map(str, allowed))}")
    for name, a, b in (("shape", tuple(state.shape), tuple(p.shape)), ("device", state.device, p.device)):
        if a != b:
            raise ValueError(f"{what} has {name} {a}: {owner} needs {b}")
    if not same_layout(state, p):
        raise ValueError(f"{what} has strides {state.stride()}; allowed are those of {owner}, {p.stride()}")
    if state.is_conj() or state.is_neg():
        raise ValueError(f"{what} is a lazily conjugated or negated view: pass a tensor of its own")
