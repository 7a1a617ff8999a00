"""Tensors that a caller holds, as a table: what a backend steps where there is no optimizer.

A list of tensors for every role (parameters, gradients, states) becomes segments and buckets like those of a
TensorTable, made anew for one step. Nothing is copied but gradients that lie otherwise than their parameters, and
nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import backends, native
from .checks import (
    Extent,
    check_address,
    check_disjoint,
    check_gradient,
    check_memory,
    check_parameter,
    check_type,
    gradient_dtypes,
    is_dense,
    same_layout,
)
from .records import WORDS, Segment
from .rules import Rule
from .slots import Bucket, Spec
from .storage import format_of, state_dtype
from .walking import device_code, dtype_code, numel

__all__ = ["Lists", "examine"]

CPU = torch.device("cpu")
Roles = Sequence[list[Tensor]]
_CONTROL = torch.tensor([1.0, 0.0], dtype=torch.float64, device=CPU)


class Lists:
    """The table of one step. It has what a backend reads of a TensorTable.

    Args:
        rule: what is stepped.
        label: how errors call the i-th tensor of a role.
        roles: lists of equal length: parameters, gradients, and each state.
        backend: by name.

    Raises:
        TypeError, ValueError, RuntimeError: naming the tensor; nothing was written.
    """

    def __init__(self, rule: Rule, label: Callable[[int, int], str], roles: Roles, backend: str) -> None:
        self.rule, self.roles = rule, list(roles)
        self.mirrors: dict[torch.device, Any] = {}
        self.control = _CONTROL
        self.order: Sequence[int] = range(len(roles[0]))  # segment k is of the tensors order[k]
        self.runs = torch.empty(len(self.order), WORDS, dtype=torch.int64, device=CPU)
        self.buckets: list[Bucket] = []
        firsts = [own[0] for own in roles]
        spec = _spec(firsts) if all(isinstance(t, Tensor) for t in firsts) else None
        if spec is not None and self._gather(spec):
            self.buckets.append(Bucket(spec, _resolve(backend, spec), 0, 0, list(self.order)))
        else:
            examine(label, roles)
            self._sort(backend)

    def _gather(self, spec: Spec) -> bool:
        """Fills the segments of tensors that are all of one kind and as they should be; False if some are not."""
        device = device_code(spec.device)
        if not native.WALKS or device < 0:
            return False
        dtypes = tuple([dtype_code(own[0].dtype) for own in self.roles])
        return bool(native.C.gather(tuple(self.roles), dtypes, device, self.runs.data_ptr()) == -1)

    def _sort(self, backend: str) -> None:
        """Fills the segments of tensors of several kinds, which have been examined."""
        self.roles[1] = [_like(*pair) for pair in zip(*self.roles[:2], strict=True)]
        by_spec: dict[Spec, list[int]] = {}
        for i, tensors in enumerate(zip(*self.roles, strict=True)):
            spec = _spec(tensors)
            assert spec is not None
            by_spec.setdefault(spec, []).append(i)
        for spec, members in by_spec.items():
            first = sum(len(bucket.slots) for bucket in self.buckets)
            self.buckets.append(Bucket(spec, _resolve(backend, spec), len(self.buckets), first, members))
        self.order = list(chain(*by_spec.values()))
        self.runs.zero_()
        for segment, i in enumerate(self.order):
            addresses = [own[i].data_ptr() for own in self.roles]
            self.runs[segment, : len(addresses)] = torch.tensor(addresses, device=CPU)
            self.runs[segment, Segment.NUMEL] = numel(self.roles[0][i])
            self.runs[segment, Segment.ALIGNED] = all(address % 16 == 0 for address in addresses)
        for bucket in self.buckets:
            runs = self.runs[bucket.first : bucket.first + len(bucket.slots)]
            runs[:, Segment.START] = runs[:, Segment.NUMEL].cumsum(0) - runs[:, Segment.NUMEL]

    @property
    def capacities(self) -> Tensor:
        return self.runs[:, Segment.NUMEL]

    @property
    def active(self) -> Tensor:
        return torch.ones(len(self.order), device=CPU)

    def span(self, bucket: Bucket) -> tuple[int, int]:
        return bucket.first, len(bucket.slots)

    def tensors(self, i: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...], int]:
        theta, grad, *states = (own[i] for own in self.roles)
        return theta.detach(), grad, tuple(states), int(self.runs[self.order.index(i), Segment.ROW])


def _spec(own: Sequence[Tensor]) -> Spec | None:
    """What a bucket's segments share, of a parameter, its gradient and states; None for what no bucket has."""
    return _spec_of(own[0].device, *[t.dtype for t in own])


@lru_cache
def _spec_of(device: torch.device, dtype: torch.dtype, grad: torch.dtype, *states: torch.dtype) -> Spec | None:
    formats = tuple(format_of(d) for d in (dtype, grad, *states))
    if None in formats or grad not in gradient_dtypes(dtype) or any(d != state_dtype(dtype) for d in states):
        return None
    return Spec(device, formats)  # type: ignore[arg-type]


def _like(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient, or a copy that lies in memory as its parameter."""
    if same_layout(grad, p) and not (grad.is_conj() or grad.is_neg()):
        return grad
    return torch.empty_like(p, dtype=grad.dtype, requires_grad=False).copy_(grad.detach())


@lru_cache
def _resolve(backend: str, spec: Spec) -> backends.Backend:
    return backends.resolve(backend, spec)


def examine(label: Callable[[int, int], str], roles: Roles, memory: bool = True) -> None:
    """Raises if the tensors of the roles do not belong together.

    Args:
        label: how errors call the i-th tensor of a role.
        roles: lists of equal length: parameters, gradients, and each state.
        memory: look at addresses too, which fake tensors have not.
    """
    for i, own in enumerate(zip(*roles, strict=True)):
        p = own[0]
        for role, t in enumerate(own):
            if not isinstance(t, Tensor):
                raise TypeError(f"{label(role, i)} is a {type(t).__name__}: expected a tensor")
            if memory:
                check_type(t, label(role, i))
        check_parameter(p, label(0, i))
        if not is_dense(p):
            raise ValueError(
                f"{label(0, i)} of shape {tuple(p.shape)} has strides {p.stride()}: allowed are layouts without gaps"
            )
        if memory:
            check_memory(p, label(0, i))
        check_gradient(p, own[1], label(1, i))
        for role, state in enumerate(own[2:], 2):
            _check_state(p, state, label(role, i), label(0, i))
        for role, t in enumerate(own):
            if memory:
                check_address(t, label(role, i))
    if memory:
        check_disjoint(
            Extent(t.detach(), label(role, i), written=role != 1)
            for role, tensors in enumerate(roles)
            for i, t in enumerate(tensors)
        )


def _check_state(p: Tensor, state: Tensor, what: str, owner: str) -> None:
    """Raises if `state` cannot be a state of `p`, as it is: a state is written, so no copy will do."""
    found = (tuple(state.shape), state.dtype, state.device)
    allowed = (tuple(p.shape), state_dtype(p.dtype), p.device)
    for name, a, b in zip(("shape", "dtype", "device"), found, allowed, strict=True):
        if a != b:
            raise (TypeError if name == "dtype" else ValueError)(f"{what} has {name} {a}: {owner} needs {b}")
    if not same_layout(state, p):
        raise ValueError(f"{what} has strides {state.stride()}; allowed are those of {owner}, {p.stride()}")
    if state.is_conj() or state.is_neg():
        raise ValueError(f"{what} is a lazily conjugated or negated view: pass a tensor of its own")
