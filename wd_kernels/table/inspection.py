"""One parameter, inspected with its gradient and state: what the table must know of it, or an error that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..flat.buffers import FlatPlace, place_of
from ..flat.states import FlatStates
from ..formats import state_dtype
from ..layout import Spec, spec_of
from ..rules import Rule, State
from ..validation import check_roles, conform_state, is_dense, local, same_layout, step_count

__all__ = ["Finding", "Known", "inspect"]


@dataclass
class Known:
    """One parameter that has had a gradient. It holds no gradient and no state: those live where torch has them."""

    spec: Spec
    address: tuple[object, ...]  # address, shape and strides of the parameter itself
    param_copy: Tensor | None = None  # dense stand-in for a parameter with gaps, copied back after the step
    grad_copy: Tensor | None = None  # for a gradient with other strides, or a conjugate or negative bit
    segment: int = -1


@dataclass
class Finding:
    """The outcome of an inspection: what is known, where its tensors lie, what the state dictionary must be given."""

    known: Known
    theta: Tensor
    grad: Tensor
    states: tuple[Tensor, ...]
    own: dict[str, Any]  # the parameter's state dictionary, live or new
    put: dict[str, Tensor]
    count: float
    fresh: bool  # this step makes a state that the rule is told of
    place: FlatPlace | None  # in a flat buffer, if parameter and states lie in one
    bases: tuple[Tensor, ...]  # and the states' buffers

    @property
    def roles(self) -> tuple[Tensor, ...]:
        return (self.theta, self.grad, *self.states)


def inspect(
    p: Tensor,
    own: Any,
    rule: Rule,
    states: Sequence[State],
    settings: Mapping[str, Any],
    what: str,
    old: Known | None,
    flat: FlatStates,
) -> Finding:
    """Everything that must hold of one parameter, its gradient and its state. Writes nothing but stand-ins.

    Args:
        p: the parameter; it has a gradient.
        own: its state dictionary, or None.
        rule, states: what steps it, and the states that its group asks for.
        settings: its group, which has the states' first values.
        what: how errors call the parameter.
        old: what was known of it, whose stand-ins are used again.
        flat: makes the states of flat parameters.

    Raises:
        TypeError, ValueError, RuntimeError: naming the parameter, what was found and what is allowed.
    """
    grad = p.grad
    assert grad is not None
    check_roles(p, grad, what, f"the gradient of {what}")

    theta, param_copy = local(p).detach(), None
    if not (p.is_contiguous() or is_dense(p)):
        param_copy = _stand_in(theta, theta.dtype, old.param_copy if old else None).copy_(theta)
        theta = param_copy
    grad, grad_copy = local(grad).detach(), None
    if not same_layout(grad, theta) or grad.is_conj() or grad.is_neg():
        grad_copy = _stand_in(theta, grad.dtype, old.grad_copy if old else None).copy_(grad)
        grad = grad_copy

    if own is not None and not isinstance(own, dict):
        raise TypeError(f"the state of {what} is a {type(own).__name__}: expected a dict")
    own = {} if own is None else own
    present = [state.name for state in states if own.get(state.name) is not None]
    if own.get("step") is not None:
        count = step_count(own["step"], f"the step count of {what}")
    elif present and rule.torch.counts_steps:
        raise ValueError(f"the state of {what} has {present} but no 'step': give it all, or none for a new start")
    else:
        count = 1.0 if present else 0.0
    missing = [state.name for state in states if state.name not in present and not state.late]
    if missing and (count or present):
        names = [state.name for state in states]
        raise ValueError(f"the state of {what} has no {missing}: give it all of {names}, or none for a new start")

    put: dict[str, Tensor] = {}
    place = place_of(p)
    for state in states:
        if state.name in present:
            conformed = conform_state(p, theta, own[state.name], f"the state {state.name!r} of {what}")
            if conformed is not own[state.name]:
                put[state.name] = conformed
        else:
            put[state.name] = _first(state, theta, settings, place, flat)
    found = tuple(put[state.name] if state.name in put else own[state.name] for state in states)
    spec = spec_of(p.device, p.dtype, grad.dtype, tuple(states))
    assert spec is not None
    known = Known(spec, (p.data_ptr(), p.shape, p.stride()), param_copy, grad_copy)
    fresh = any(state.fresh and state.name not in present for state in states)
    bases: tuple[Tensor, ...] = ()
    if place is not None:
        lie = (flat.base(place, t, state.name) for state, t in zip(states, found, strict=True))
        bases = tuple(base for base in lie if base is not None)
        if len(bases) < len(found) or not all(same_layout(t, theta) for t in found) or grad.dtype != p.dtype:
            place = None
    return Finding(known, theta, grad, found, own, put, count, fresh, place, bases)


def _first(
    state: State, theta: Tensor, settings: Mapping[str, Any], place: FlatPlace | None, flat: FlatStates
) -> Tensor:
    """A state as it begins: beside its parameter in a flat buffer, where that is flat."""
    dtype = state_dtype(theta.dtype)
    if place is not None:
        made = flat.zeros(place, theta, state.name, dtype)
    else:
        made = torch.zeros_like(theta, dtype=dtype, memory_format=torch.preserve_format)
    return state.begin(made, settings)


def _stand_in(like: Tensor, dtype: torch.dtype, old: Tensor | None) -> Tensor:
    """Memory of the dense layout of `like`: last step's stand-in, or new."""
    wanted = torch.empty_like(like, dtype=dtype, device="meta")
    if old is not None and old.device == like.device and old.dtype == dtype and same_layout(old, wanted):
        return old
    return torch.empty_like(wanted, device=like.device)
