"""One parameter as the table knows it (inspected with its gradient and state, or refused by name), and buckets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .checks import (
    check_address,
    check_gradient,
    check_memory,
    check_parameter,
    check_type,
    conform_state,
    is_dense,
    same_layout,
    step_count,
)
from .flat import Place, place_of
from .flat_states import FlatStates
from .storage import Format, format_of, state_dtype

if TYPE_CHECKING:
    from .rules import Rule

__all__ = ["Bucket", "Finding", "Slot", "Spec", "Table", "inspect"]

# States that may begin at any step count: momentum or amsgrad switched on later, torch's SGD state.
MADE_LATER = ("momentum_buffer", "max_exp_avg_sq")


@dataclass(frozen=True)
class Spec:
    """What the segments of a bucket share: the device, and the format of parameter, gradient and each state."""

    device: torch.device
    formats: tuple[Format, ...]


@dataclass
class Bucket:
    """What one launch steps, the `index`-th of a table; segment `first + k` is parameter `slots[k]`."""

    spec: Spec
    backend: Any
    index: int
    first: int
    slots: list[int]

    @property
    def codes(self) -> list[int]:
        return [fmt.code for fmt in self.spec.formats]


class Table(Protocol):
    """What a backend reads: of a TensorTable, and of the lists of a caller."""

    rule: Rule
    runs: Tensor
    control: Tensor
    buckets: list[Bucket]
    mirrors: dict[torch.device, Any]

    @property
    def capacities(self) -> Tensor:
        """The most elements that each run may have."""

    @property
    def active(self) -> Tensor:
        """1 for a parameter that is stepped."""

    def span(self, bucket: Bucket) -> tuple[int, int]:
        """(first, count) of the runs of a bucket in this step."""

    def tensors(self, i: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...], int]:
        """Parameter, gradient, states and row of parameter `i`, for a backend that works on tensors."""


@dataclass
class Slot:
    """One parameter that has had a gradient. It holds no gradient and no state: those live where torch has them."""

    spec: Spec
    place: tuple[object, ...]  # address, shape and strides of the parameter itself
    param_copy: Tensor | None = None  # dense stand-in for a parameter with gaps, copied back after the step
    grad_copy: Tensor | None = None  # for a gradient with other strides, or a conjugate or negative bit
    segment: int = -1


@dataclass
class Finding:
    """The outcome of an inspection: a slot, where its tensors lie, and what the state dictionary must be given."""

    slot: Slot
    theta: Tensor
    grad: Tensor
    states: tuple[Tensor, ...]
    own: dict[str, Any]  # the parameter's state dictionary, live or new
    put: dict[str, Tensor]
    count: float
    fresh: bool  # this step makes the momentum buffer
    place: Place | None  # in a flat buffer, if parameter and states lie in one
    bases: tuple[Tensor, ...]  # and the states' buffers

    @property
    def written(self) -> tuple[Tensor, ...]:
        return (self.theta, *self.states)


def inspect(
    p: Tensor, own: Any, names: tuple[str, ...], what: str, old: Slot | None, countless: bool, flat: FlatStates
) -> Finding:
    """Everything that must hold of one parameter, its gradient and its state. Writes nothing but stand-ins.

    Args:
        p: the parameter; it has a gradient.
        own: its state dictionary, or None.
        names: the states that the rule needs.
        what: how errors call the parameter.
        old: its slot so far, whose stand-ins are used again.
        countless: a state without a step count counts as started once (torch.optim.SGD keeps none).
        flat: makes the states of flat parameters.

    Raises:
        TypeError, ValueError, RuntimeError: naming the parameter, what was found and what is allowed.
    """
    check_parameter(p, what)
    check_memory(p, what)
    grad = p.grad
    assert grad is not None
    check_type(grad, f"the gradient of {what}")
    check_gradient(p, grad, f"the gradient of {what}")
    check_address(grad, f"the gradient of {what}")

    theta, param_copy = p.detach(), None
    if not (p.is_contiguous() or is_dense(p)):
        param_copy = _stand_in(theta, theta.dtype, old.param_copy if old else None).copy_(theta)
        theta = param_copy
    grad, grad_copy = grad.detach(), None
    if not same_layout(grad, theta) or grad.is_conj() or grad.is_neg():
        grad_copy = _stand_in(theta, grad.dtype, old.grad_copy if old else None).copy_(grad)
        grad = grad_copy

    if own is not None and not isinstance(own, dict):
        raise TypeError(f"the state of {what} is a {type(own).__name__}: expected a dict")
    own = {} if own is None else own
    present = [name for name in names if own.get(name) is not None]
    if own.get("step") is not None:
        count = step_count(own["step"], f"the step count of {what}")
    elif present and not countless:
        raise ValueError(f"the state of {what} has {present} but no 'step': give it all, or none for a new start")
    else:
        count = 1.0 if present else 0.0
    missing = [name for name in names if name not in present and name not in MADE_LATER]
    if missing and (count or present):
        raise ValueError(f"the state of {what} has no {missing}: give it all of {list(names)}, or none for a new start")

    put: dict[str, Tensor] = {}
    place, dtype = place_of(p), state_dtype(p.dtype)
    for name in names:
        if name in present:
            conformed = conform_state(p, theta, own[name], f"the state {name!r} of {what}")
            if conformed is not own[name]:
                put[name] = conformed
        elif place is not None:
            put[name] = flat.zeros(place, theta, name, dtype)
        else:
            put[name] = torch.zeros_like(theta, dtype=dtype, memory_format=torch.preserve_format)
    states = tuple(put[name] if name in put else own[name] for name in names)
    formats = tuple(format_of(t.dtype) for t in (p, grad, *states))
    slot = Slot(Spec(p.device, formats), (p.data_ptr(), p.shape, p.stride()), param_copy, grad_copy)  # type: ignore[arg-type]
    fresh = "momentum_buffer" in names and "momentum_buffer" not in present
    bases: tuple[Tensor, ...] = ()
    if place is not None:
        found = (flat.base(place, t, name) for name, t in zip(names, states, strict=True))
        bases = tuple(base for base in found if base is not None)
        if len(bases) < len(states) or not all(same_layout(t, theta) for t in states) or grad.dtype != p.dtype:
            place = None
    return Finding(slot, theta, grad, states, own, put, count, fresh, place, bases)


def _stand_in(like: Tensor, dtype: torch.dtype, old: Tensor | None) -> Tensor:
    """Memory of the dense layout of `like`: last step's stand-in, or new."""
    wanted = torch.empty_like(like, dtype=dtype, device="meta")
    if old is not None and old.device == like.device and old.dtype == dtype and same_layout(old, wanted):
        return old
    return torch.empty_like(wanted, device=like.device)
