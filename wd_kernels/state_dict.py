"""Saving and loading, as functions of a rule, groups and states: torch's shape of state, our own policy of precision.

torch's base class casts loaded states to the parameter's dtype, which loses the float32 states of a bfloat16
parameter, and its loaded groups replace live ones whole. Here states keep their precision and keys that a saved group
lacks keep the live group's value.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .flat.buffers import place_of
from .flat.states import FlatStates
from .formats import state_dtype
from .rules import RULES, Rule
from .schedules import stepping
from .schedules.shapes import named
from .schedules.stepping import follows_lr
from .validation import conform_state, label, step_count

__all__ = ["adopt_group", "export", "load", "lost_on_torch", "with_own_counts"]

HOW = ("foreach", "fused", "capturable", "differentiable")  # how torch would step: the live group's stay
LIVE = (*HOW, "schedule")  # what a loaded group does not replace
#: The states of every rule: those of another one are kept in a loaded state, as they should lie.
STATES = frozenset(state.name for rule in RULES.values() for state in rule.states)


def adopt_group(group: dict[str, Any], live: Mapping[str, Any]) -> None:
    """Takes torch's `decoupled_weight_decay` out of `group`: False means decay "l2", True that it is not.

    Live groups hold `decay` alone; `export` writes torch's flag.
    """
    decoupled = group.pop("decoupled_weight_decay", None)
    if decoupled is False:
        group["decay"] = "l2"
    elif decoupled is True and group.get("decay", live.get("decay")) == "l2":
        group["decay"] = "lr_scaled"


def with_own_counts(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state with copies of the step counts: a view would carry the table's whole vector into a pickle."""
    own: dict[Any, Any] = defaultdict(dict)
    for key, value in state.items():
        if isinstance(value, dict) and isinstance(value.get("step"), Tensor):
            value = {**value, "step": value["step"].clone()}
        own[key] = value
    return own


def export(rule: Rule, packed: Mapping[str, Any], live: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What leaves an optimizer: step counts of its own, and what torch's class cannot do without.

    That is `decoupled_weight_decay`, as its Adam reads it, and the states of parameters that have taken no step, where
    it makes all at the start. `live` are the optimizer's groups.
    """
    state = with_own_counts(packed["state"])
    groups = []
    for group in packed["param_groups"]:
        group = {**group, "schedule": named(group.get("schedule"))}
        if rule.torch.decoupled_flag:
            group["decoupled_weight_decay"] = group["decay"] != "l2"
        groups.append(group)
    for group, own in zip(groups, live, strict=True) if rule.torch.all_states else ():
        for key, p in zip(group["params"], own["params"], strict=True):
            if not state.get(key) and not is_lazy(p):
                state[key] = {"step": torch.tensor(0.0, device="cpu"), **_first_states(rule, p, own)}
    return {**packed, "state": dict(state), "param_groups": groups}


def _first_states(rule: Rule, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    zeros = partial(torch.zeros_like, p.detach(), dtype=state_dtype(p.dtype))
    return {state.name: state.begin(zeros(), group) for state in rule.states}


def lost_on_torch(rule: Rule, groups: Sequence[Mapping[str, Any]]) -> str | None:
    """What torch's class cannot express of exported groups, in words; None where it can all."""
    lost = {reason for group in groups for reason in _lost(rule, group)}
    if not lost:
        return None
    return (
        f"this state has {', '.join(sorted(lost))}, which {rule.torch.name} does not know: wd_kernels loads it back "
        "as it is, torch would train on differently"
    )


def _lost(rule: Rule, group: Mapping[str, Any]) -> list[str]:
    lost = []
    if group["decay"] not in rule.torch.decays and float(group["weight_decay"]) != 0:
        lost.append(f"decay={group['decay']!r}")
    lost += [f"{key}={group[key]!r}" for key, value in rule.torch.fixed.items() if group.get(key, value) != value]
    if group["schedule"] is not None and not follows_lr(group):
        lost.append("a schedule")
    elif float(group["eta"]) != 1:
        lost.append("eta != 1")
    return lost


def load(
    rule: Rule, live: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[Any, Any], FlatStates]:
    """(groups, state, the memory of flat states) of an optimizer that has loaded `state_dict`; `live` are its groups.

    Raises ValueError or TypeError, naming what does not fit; nothing is changed.
    """
    saved = _groups_of(state_dict)
    if len(live) != len(saved):
        raise ValueError(f"the saved state has {len(saved)} parameter groups, this optimizer has {len(live)}")
    for i, (own, other) in enumerate(zip(live, saved, strict=True)):
        if len(own["params"]) != len(other["params"]):
            raise ValueError(
                f"param group {i} of the saved state has {len(other['params'])} parameters, that of this optimizer "
                f"{len(own['params'])}"
            )

    groups = []
    for own, other in zip(live, saved, strict=True):
        adopt_group(other, own)
        settings = {k: deepcopy(v) for k, v in other.items() if k not in ("params", *LIVE)}
        for key in _of_another_schedule(own, other):
            settings.pop(key, None)
        groups.append({**own, **settings})
    rule.hypers(groups)
    for i, group in enumerate(groups):
        stepping.check(group, f"param group {i} of the saved state")

    keys = chain.from_iterable(g["params"] for g in saved)
    places = [(g, k, p) for g, group in enumerate(groups) for k, p in enumerate(group["params"])]
    parameter_of = dict(zip(keys, places, strict=True))
    state: defaultdict[Any, Any] = defaultdict(dict)
    flat = FlatStates()
    for key, value in state_dict["state"].items():
        if key in parameter_of:
            g, k, p = parameter_of[key]
            state[p] = _load_one(value, p, label(groups[g], g, k), flat)
        else:
            state[key] = value
    return groups, state, flat


def _groups_of(state_dict: Any) -> list[dict[str, Any]]:
    """The groups of a saved state, whose lists are its own. Raises where it is not built as one."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"the saved state is a {type(state_dict).__name__}: expected a dict, of an optimizer's state_dict()"
        )
    for key, kind, name in (("param_groups", (list, tuple), "list of dicts"), ("state", Mapping, "dict")):
        if key not in state_dict:
            raise ValueError(f"the saved state has no {key!r}; it has {sorted(map(str, state_dict))}")
        if not isinstance(state_dict[key], kind):
            raise TypeError(f"{key!r} of the saved state is a {type(state_dict[key]).__name__}: expected a {name}")
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            found = type(group).__name__ if not isinstance(group, Mapping) else "dict without a list of 'params'"
            raise TypeError(f"param group {i} of the saved state is a {found}: expected a dict with a list of 'params'")
    return [{**group, "params": list(group["params"])} for group in state_dict["param_groups"]]


def _of_another_schedule(own: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
    """The keys of a saved group that mean nothing under the live group's schedule; warns where that is another one."""
    theirs, ours = saved.get("schedule"), named(own.get("schedule"))
    lost = set()
    if saved.get("base_lr") is None or not follows_lr(own):
        lost.add("base_lr")
    if follows_lr(own) or (ours is None and theirs is not None):
        lost.add("eta")  # what a schedule has set last is not a constant to go on with
    if theirs is not None and theirs != ours:
        warnings.warn(
            f"the saved state has schedule={theirs}, this optimizer goes on with schedule={ours}", stacklevel=5
        )
    return lost


def _load_one(saved: Mapping[str, Any], p: Tensor, what: str, flat: FlatStates) -> dict[str, Any]:
    """One parameter's state, copied to its device and laid out as the parameter, in flat buffers where it is flat."""
    place = place_of(p)
    if not isinstance(saved, Mapping):
        raise TypeError(f"the saved state of {what} is a {type(saved).__name__}: expected a dict")
    own: dict[str, Any] = {}
    for name, value in saved.items():
        if name == "step" and value is not None:
            own[name] = torch.tensor(
                step_count(value, f"the saved step count of {what}"), dtype=torch.float32, device="cpu"
            )
        elif name in STATES and isinstance(value, Tensor):
            detached = value.detach()  # a state is a leaf that needs no gradient, whatever was saved
            moved = detached.to(p.device)
            loaded = conform_state(p, p.detach(), moved, f"the saved state {name!r} of {what}")
            if place is not None:
                own[name] = flat.zeros(place, p.detach(), name, loaded.dtype).copy_(loaded)
            else:
                own[name] = loaded.clone(memory_format=torch.preserve_format) if loaded is detached else loaded
        else:
            own[name] = deepcopy(value)
    return own
