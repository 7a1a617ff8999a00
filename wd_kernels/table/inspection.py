"""One parameter, inspected with its gradient and state: what the table must know of it, or an error that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..averages import Mean
from ..flat.buffers import FlatPlace, place_of
from ..flat.states import FlatStates
from ..formats import SCALE, TILE, Storage, arithmetic_dtype, has_scales
from ..layout import Spec, spec_of
from ..reference import load, store
from ..rules import AVERAGE, CENTER, EMA, GIVEN, MASTER, REFERENCE, TO, Pull, Rule, State
from ..scales import check_tiles, conform_scale, lies_otherwise, like_scale, scale_of
from ..sharding import check_sharding, local, sharded_like
from ..validation import check_roles, check_storage, check_type, conform_state, is_dense, same_layout, step_count

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
    """The outcome of an inspection: what is known, where its tensors lie, what the state dictionary must be given.

    What lies where is said of views that were taken once (`theta`, `grad`, `memory`), and they keep it there: a
    signal's handler or another thread may exchange the memory of the very same tensors at any time.
    """

    known: Known
    theta: Tensor
    grad: Tensor
    memory: tuple[Tensor, ...]  # of the states, of the parameter's master weight, and of the states' scales
    states: tuple[Tensor, ...]  # themselves
    grad_itself: Tensor
    gapped: Tensor | None  # a parameter with gaps, which `theta` stands in for
    found: Any  # the parameter's state dictionary, or None
    own: dict[str, Any]  # the same, live or new
    put: dict[str, Tensor]
    count: float
    fresh: bool  # this step makes a state that the rule is told of
    place: FlatPlace | None  # in a flat buffer, if parameter and states lie in one
    bases: tuple[Tensor, ...]  # and the states' buffers

    @property
    def roles(self) -> tuple[Tensor, ...]:
        return (self.theta, self.grad, *self.memory)


def inspect(
    p: Tensor,
    grad_itself: Tensor,
    own: Any,
    rule: Rule,
    states: Sequence[State],
    storage: Storage,
    pull: Pull,
    settings: Mapping[str, Any],
    what: str,
    old: Known | None,
    flat: FlatStates,
    count: float | None = None,
    given: Tensor | None = None,
) -> Finding:
    """Everything that must hold of one parameter, its gradient and its state. Writes nothing but stand-ins.

    Args:
        p, grad_itself: the parameter and its gradient.
        own: its state dictionary, or None.
        rule, states, storage, pull: what steps it, the states that its group asks for, how they are to be stored, and
            what its decay pulls to.
        settings: its group, which has the states' first values.
        what: how errors call the parameter.
        old: what was known of it, whose stand-ins are used again.
        flat: makes the states of flat parameters.
        count: its step count, where that is known already.
        given: what it was given to decay to.

    Raises:
        TypeError, ValueError, RuntimeError: naming the parameter, what was found and what is allowed.
    """
    found = own
    if found is not None and not isinstance(found, dict):
        raise TypeError(f"the state of {what} is a {type(found).__name__}: expected a dict")
    own = {} if found is None else dict(found)
    check_type(p, what)
    check_type(grad_itself, f"the gradient of {what}")
    check_sharding(p, grad_itself, f"the gradient of {what}", gradient=True)
    theta, grad = local(p).data, local(grad_itself).data
    check_roles(theta, grad, what, f"the gradient of {what}")
    lies, place = theta, place_of(theta)
    gapped, param_copy, grad_copy = None, None, None
    if not (theta.is_contiguous() or is_dense(theta)):
        gapped, param_copy = theta, _stand_in(theta, theta.dtype, old.param_copy if old else None).copy_(theta)
        theta = param_copy
    if not same_layout(grad, theta) or grad.is_conj() or grad.is_neg() or grad._is_zerotensor():
        grad_copy = _stand_in(theta, grad.dtype, old.grad_copy if old else None).copy_(grad)
        grad = grad_copy

    if pull.center and p.is_complex():
        raise TypeError(
            f"{what} has dtype {p.dtype}, with decay_center={settings.get(CENTER)}: its real and its imaginary parts "
            "would both decay to that; allowed is decay_to= with a tensor"
        )
    of_rule = [state for state in states if state not in (EMA, REFERENCE)]
    present = [state.name for state in of_rule if own.get(state.name) is not None]
    if own.get("step") is not None:
        count = step_count(own["step"] if count is None else count, f"the step count of {what}")
    elif present and rule.torch.counts_steps:
        raise ValueError(f"the state of {what} has {present} but no 'step': give it all, or none for a new start")
    else:
        count = 1.0 if present else 0.0
    missing = [state.name for state in states if state.name not in present and not state.late]
    if missing and (count or present):
        names = [state.name for state in states]
        raise ValueError(f"the state of {what} has no {missing}: give it all of {names}, or none for a new start")

    check_storage(theta, storage, states, what)
    master, kept = storage.master_dtype(theta.dtype), own.get(MASTER.name)
    if isinstance(kept, Tensor) and kept.dtype != master:
        raise TypeError(
            f"the state {MASTER.name!r} of {what} has dtype {kept.dtype}: with master_weights={storage.masters!r}, "
            f"what is kept beside a parameter of {theta.dtype} is {master or 'nothing'}. To change it, take weights = "
            "optimizer.get_master_weights() before, and optimizer.load_master_weights(weights) after it"
        )
    dtypes = {state: storage.state_dtype(state, theta.dtype) for state in states}
    scales = [state.scale for state, dtype in dtypes.items() if has_scales(dtype)]
    if scales:
        check_tiles(p, what)
    states = (*states, *([] if master is None else [MASTER]), *scales)
    kept_master = local(kept).detach() if isinstance(kept, Tensor) else None
    like = like_scale(p, theta) if scales else theta
    put: dict[str, Tensor] = {}
    if given is not None and settings.get(TO) == GIVEN and own.get(REFERENCE.name) is None:
        own[REFERENCE.name] = put[REFERENCE.name] = given
    memory, themselves = list[Tensor](), list[Tensor]()
    begun: dict[str, Tensor] = {}  # the scales of new states
    for state in states:
        value, name = begun.get(state.name, own.get(state.name)), f"the state {state.name!r} of {what}"
        dtype = SCALE.dtype if state.of is not None else storage.state_dtype(state, theta.dtype)
        if state.of is not None and value is None:
            raise ValueError(f"the state of {what} has {state.of!r} in 8 bits, but no {state.name!r}: give it both")
        if state.of is not None:
            now = value if state.name in begun else conform_scale(p, like, value, name)
            if state.name in begun or now.shape != local(value).shape or now.data_ptr() != local(value).data_ptr():
                put[state.name] = value = scale_of(p, now)
        elif value is None:
            now, scale = _zeros(theta, theta.device, state.name, dtype, place, flat), None
            if state in dtypes and has_scales(dtype):
                scale = _zeros(like, theta.device, state.scale.name, SCALE.dtype, place, flat, TILE)
                begun[state.scale.name] = scale
            if state is REFERENCE and settings.get(TO) == GIVEN:
                raise ValueError(
                    f"the state of {what} has no {state.name!r}, and decay_to='given' in its group: allowed are a "
                    "tensor there, like the parameter, and decay_to='initial', which begins with the weights as they "
                    "are now"
                )
            if state is EMA:
                _check_mean(settings.get(AVERAGE), count, what)
            if state in (EMA, REFERENCE):
                store(now, load(theta, arithmetic_dtype(theta.dtype), kept_master), None, scale)
            elif state is not MASTER:
                now = state.begin(now, settings, scale)
            elif dtype.is_floating_point:  # of a remainder, zeros are the parameter as it is
                now.copy_(theta)
            put[state.name] = value = sharded_like(p, now)
        else:
            if isinstance(value, Tensor):
                check_type(value, name)
                check_sharding(p, value, name)
            seen = local(value).data if isinstance(value, Tensor) else value
            now = conform_state(theta, theta, seen, dtype, name)
            if now is not seen and state in dtypes and has_scales(dtype):
                raise lies_otherwise(name, seen, theta)
            if now is not seen:
                put[state.name] = value = sharded_like(p, now)
        memory.append(now.data)
        themselves.append(value)
    kinds = (theta.dtype, grad.dtype, *(t.dtype for t in memory))
    stochastic = (storage.stochastic_params, storage.stochastic_states)
    spec = spec_of(theta.device, kinds, tuple(states), stochastic, pull.level)
    assert spec is not None
    known = Known(spec, (lies.data_ptr(), lies.shape, lies.stride()), param_copy, grad_copy)
    # What a device made in a first step that it skipped has not begun: a count of 0, and zeros.
    started = [name for name in present if count or (isinstance(own[name], Tensor) and bool(local(own[name]).any()))]
    fresh = any(state.fresh and state.name not in started for state in states)
    bases: tuple[Tensor, ...] = ()
    if place is not None:
        each = list(zip(states, memory, strict=True))
        in_bases = (flat.base(place, t, state.name, 1 if state.of is None else TILE) for state, t in each)
        bases = tuple(base for base in in_bases if base is not None)
        alike = all(same_layout(t, theta) for state, t in each if state.of is None)
        if len(bases) < len(memory) or not alike or grad.dtype != theta.dtype:
            place = None
    return Finding(
        known=known, theta=theta, grad=grad, memory=tuple(memory), states=tuple(themselves), grad_itself=grad_itself,
        gapped=gapped, found=found, own={} if found is None else found, put=put, count=count, fresh=fresh, place=place,
        bases=bases,
    )  # fmt: skip


def _check_mean(average: object, count: float, what: str) -> None:
    """Raises ValueError where a mean would begin among the steps that it is of."""
    if isinstance(average, Mean) and count > average.after:
        raise ValueError(
            f"{what} has taken steps, of which it has no {EMA.name!r}: with ema_decay={average!r} that is the mean of "
            f"all that follow {average.after}. Allowed is averages.Mean(after=n), n of the steps that are taken or more"
        )


def _zeros(
    like: Tensor, device: torch.device, name: str, dtype: torch.dtype, place: FlatPlace | None, flat: FlatStates,
    per: int = 1,
) -> Tensor:  # fmt: skip
    """A new state that lies as `like`: beside its parameter in a flat buffer, where that is flat."""
    if place is not None:
        return flat.zeros(place, like, name, dtype, per)
    return torch.zeros_like(like, dtype=dtype, device=device, memory_format=torch.preserve_format)


def _stand_in(like: Tensor, dtype: torch.dtype, old: Tensor | None) -> Tensor:
    """Memory of the dense layout of `like`: last step's stand-in, or new."""
    wanted = torch.empty_like(like, dtype=dtype, device="meta")
    if old is not None and old.device == like.device and old.dtype == dtype and same_layout(old, wanted):
        return old
    return torch.empty_like(wanted, device=like.device)
