"""The tensors that parameters decay to (`decay_to`): given ones, by place or by name, and what is kept of them.

A group has a word alone, "initial" or "given"; the tensors are states, `state[p]["decay_reference"]`, which are read
and never written. The inspection of a parameter makes those of "initial" (`table/inspection.py`), and takes those that
were given with its first step: an optimizer whose state is not empty has begun, to torch's distributed checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .formats import exact_in
from .rules import GIVEN, REFERENCE, TO, Rule
from .sharding import check_sharding, local, sharded_like
from .validation import check_type, conform_state, label

__all__ = ["Given", "matched", "retained", "taken"]

#: What a group may be given in the place of a word.
Given = Sequence[Any] | Mapping[str, Any]


def taken(settings: MutableMapping[str, Any]) -> Given | None:
    """The tensors that `settings` have as "decay_to", whose word they are given; None where there are none."""
    to = settings.get(TO)
    if isinstance(to, (Iterator, nn.ParameterList)):
        to = list(to)
    if isinstance(to, str) or not isinstance(to, (Sequence, Mapping)):
        return None
    settings[TO] = GIVEN
    return to if isinstance(to, Mapping) else list(to)


def matched(rule: Rule, group: Mapping[str, Any], index: int, given: Given) -> dict[Tensor, Tensor]:
    """The reference of every parameter of a group. Raises before anything was written.

    Raises:
        KeyError, TypeError, ValueError: naming the parameter, what was found and what is allowed.
    """
    params, where, storage = group["params"], f"param group {index}", rule.storage(group, f"param group {index}")
    if isinstance(given, Mapping):
        names = group.get("param_names")
        if names is None:
            raise TypeError(
                f"decay_to of {where} is a dict, and its parameters have no names: expected a list of tensors, one for "
                "each, or give the optimizer model.named_parameters()"
            )
        missing = [name for name in names if name not in given]
        if missing:
            raise KeyError(f"decay_to of {where} lacks {missing[:3]}: each of its {len(names)} parameters needs one")
        given = [given[name] for name in names]
    if len(given) != len(params):
        raise ValueError(
            f"decay_to of {where} has {len(given)} tensors for {len(params)} parameters: each needs one. A group can "
            "be given its own"
        )
    found = {}
    for k, (p, to) in enumerate(zip(params, given, strict=True)):
        what = f"decay_to[{k}], for {label(group, index, k)},"
        if not isinstance(to, Tensor):
            raise TypeError(f"{what} is a {type(to).__name__}: expected a tensor")
        if is_lazy(p) or is_lazy(to):
            raise ValueError(f"{what} or its parameter has no shape yet: run a forward pass of the lazy module first")
        check_type(to, what)
        check_sharding(p, to, what)
        theta, there = local(p).detach(), local(to).detach()
        wanted = storage.state_dtype(REFERENCE, theta.dtype)
        if not exact_in(there.dtype, wanted):
            raise TypeError(
                f"{what} has dtype {there.dtype}: allowed is {wanted}, that of its parameter: to.to({wanted}), or keep "
                "it as it is beside master_weights="
            )
        if to is p or (p.numel() and there.data_ptr() == theta.data_ptr()):
            raise ValueError(f"{what} is the parameter itself, which moves: give a copy, or decay_to='initial'")
        made = conform_state(theta, theta, there, wanted, what)
        own = to.detach() if to.requires_grad else to
        found[p] = own if made is there else sharded_like(p, made)
    return found


def retained(groups: Sequence[Mapping[str, Any]], before: Mapping[Any, Any], state: Any) -> None:
    """Puts references into a loaded `state` that has none of a parameter: those that there were `before`."""
    for group in groups:
        for p in group["params"]:
            own = before.get(p)
            kept = own.get(REFERENCE.name) if isinstance(own, Mapping) else None
            if kept is not None and REFERENCE.name not in state.get(p, ()):
                state[p][REFERENCE.name] = kept
