"""Saving and loading, as functions of a rule, groups and states: torch's shape of state, our own policy of precision.

torch's base class casts loaded states to the parameter's dtype, which loses the float32 states of a bfloat16
parameter, and its loaded groups replace live ones whole. Here states keep their precision, and the decay of a live
group (weight_decay, decay, form) is replaced by one of the same kind alone.

A group holds no key that torch's class lacks while that says what torch's class does (`settle`): so torch's
distributed checkpoints, which must have every key that is asked for, load; and a key that is absent means that, for
ever.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import master_weights, reference, scales
from .caller import warn
from .flat.buffers import place_of
from .flat.states import FlatStates
from .formats import MASTER_NAME, TILE, Storage, code_name, format_of, has_scales, is_steppable
from .rules import AVERAGE, CAUTIOUS, EMA, FLAG, LIMIT, MASTER, PULLS, REFERENCE, RULES, TO, VALUE, Rule
from .schedules import stepping
from .schedules.shapes import is_called, named
from .schedules.stepping import follows_lr
from .sharding import check_sharding, local, sharded_like
from .validation import check_type, conform_state, label, read_counts, step_count, without_memory

__all__ = ["export", "load", "settle", "unwrapped", "with_own_counts", "with_own_schedule"]

HOW = ("foreach", "fused", "capturable", "differentiable")  # how torch would step: the live group's stay
STORED = ("state_dtype", "stochastic_rounding", "master_weights", "ema_dtype")  # so do these
#: What a loaded group does not replace.
LIVE = (*HOW, *STORED, "schedule", stepping.WEIGHT_DECAY, "show_lr", LIMIT, VALUE, AVERAGE, *PULLS)
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: What lies beside parameters whose states have not begun.
NO_STATES = {MASTER_NAME, REFERENCE.name, EMA.name, EMA.scale.name, code_name(EMA.name)}
#: What lies beside parameters, of every rule: that of another one is kept in a loaded state, as it should lie.
STATES = frozenset([MASTER_NAME, *scales.STATES, *scales.SCALES])


def settle(rule: Rule, group: dict[str, Any], default: str) -> None:
    """Takes out of `group` what it need not say, and tells torch's flag of its decay mode.

    The mode itself is told where torch's class has another one and weights decay, or where `default`, the optimizer's
    own mode, is another one.
    """
    mode = rule.mode_of(group, default)
    group.pop("decay", None)
    if rule.torch.decoupled_flag:
        group[FLAG] = mode != "l2"
    decays = not _is_zero(group.get("weight_decay", 0.0))
    if rule.mode_of(group, default) != mode or (mode not in rule.torch.decays and decays):
        group["decay"] = mode
    kept = [*(["eta"] if stepping.called(group) else []), *(["schedule_step"] if stepping.counted(group) else [])]
    for key, absent in {**stepping.SETTINGS, **rule.absent}.items():
        said = key != FLAG and key in group and key not in kept
        if said and type(group[key]) in (int, float, bool, str, type(None)) and group[key] == absent:
            del group[key]


def with_own_schedule(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with numbers in the place of what a device counts of its schedule, and shows there."""
    own = dict(group)
    if stepping.counted(own) and isinstance(own.get("schedule_step"), Tensor):
        own["schedule_step"] = stepping.check(own, "a param group")
    if stepping.called(own) and isinstance(own.get("eta"), Tensor):
        own["eta"] = float(own["eta"])
    return own


def with_own_counts(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state with copies of the step counts: a view would carry the table's whole vector into a pickle."""
    own: dict[Any, Any] = defaultdict(dict)
    for key, value in state.items():
        if isinstance(value, dict) and isinstance(value.get("step"), Tensor):
            value = {**value, "step": value["step"].clone()}
        own[key] = value
    return own


def export(rule: Rule, packed: Mapping[str, Any], live: Sequence[Mapping[str, Any]], default: str) -> dict[str, Any]:
    """What leaves an optimizer, whose groups are `live`: what torch's class has, and what that does not do.

    Step counts are copies; where torch's class keeps none they stay at home, unless something is rounded by them. Where
    it has the states of all parameters from the start, those that have taken no step are given theirs.
    """
    state = with_own_counts(packed["state"])
    stepped = set(state) if rule.torch.counts_steps else _stepped(state)
    groups = []
    for packed_group in packed["param_groups"]:
        group = with_own_schedule(packed_group)
        settle(rule, group, default)
        for key in ("schedule", stepping.WEIGHT_DECAY, AVERAGE):
            if callable(group.get(key)):
                group[key] = named(group[key])
        groups.append(group)
    for group, own in zip(groups, live, strict=True):
        storage = rule.storage(own, "a param group")
        for key, p in zip(group["params"], own["params"], strict=True):
            found = state.get(key)
            if found is not None:
                state[key] = found = master_weights.exported(found, p)
            counts = rule.torch.counts_steps or _counts_for_more(storage, p, found)
            if not counts and isinstance(found, dict) and "step" in found:
                state[key] = {name: value for name, value in found.items() if name != "step" and key in stepped}
                if not state[key]:
                    del state[key]
            known = not is_lazy(p) and is_steppable(p.dtype)
            if rule.torch.all_states and known and not {*(found or ())} - NO_STATES:
                begun = {"step": torch.tensor(0.0, device="cpu"), **_first_states(rule, p, own, storage)}
                state[key] = {**begun, **(found or {})}
            if key in state:
                state[key] = scales.exported(state[key])
    return {**packed, "state": dict(state), "param_groups": groups}


def _stepped(state: Mapping[Any, Any]) -> set[Any]:
    """Whose states have taken a step: a device that skipped the first one left them as they begin. Read at once."""
    steps = {key: own["step"] for key, own in state.items() if isinstance(own, dict) and "step" in own}
    there = {key: step for key, step in steps.items() if isinstance(step, Tensor) and step.numel() == 1}
    return set(state) - {key for key, count in read_counts(there).items() if count == 0}


def _counts_for_more(storage: Storage, p: Tensor, found: Any) -> bool:
    """Are a parameter or its states rounded by their step count, or is it averaged by that?"""
    kept = found.items() if isinstance(found, dict) else ()
    states = [t.dtype for name, t in kept if isinstance(t, Tensor) and name not in (MASTER_NAME, REFERENCE.name)]
    roles = [(p.dtype, storage.stochastic_params), *((dtype, storage.stochastic_states) for dtype in states)]
    in_8_bits = storage.stochastic_states and any(map(has_scales, states))
    return (
        in_8_bits
        or EMA.name in dict(kept)
        or any(is_steppable(dtype) and format_of(dtype, stochastic).stochastic for dtype, stochastic in roles)
    )


def _first_states(rule: Rule, p: Tensor, group: Mapping[str, Any], storage: Storage) -> dict[str, Tensor]:
    theta, found = local(p).detach(), dict[str, Tensor]()
    for state in rule.states:
        dtype, scale = storage.state_dtype(state, p.dtype), None
        if has_scales(dtype):
            like = scales.like_scale(p, torch.empty_like(theta, device="meta"))
            scale = torch.zeros_like(like, device=theta.device)
            found[state.scale.name] = scales.scale_of(p, scale)
        found[state.name] = sharded_like(p, state.begin(torch.zeros_like(theta, dtype=dtype), group, scale))
    return found


def load(
    rule: Rule, live: Sequence[dict[str, Any]], state_dict: Mapping[str, Any], default: str, convert: bool = False
) -> tuple[list[dict[str, Any]], dict[Any, Any], FlatStates, list[Any]]:
    """What an optimizer has that has loaded `state_dict`; `live` are its groups.

    Args:
        convert: round states that are to be stored in fewer bits than they were saved in, and store master weights
            otherwise.

    Returns:
        Groups, state, the memory of flat states, and the master weights that are to be written (`master_weights.put`).

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
    keys = list(chain.from_iterable(g["params"] for g in saved))
    states = {key: scales.imported(own, f"parameter {key!r}") for key, own in state_dict["state"].items()}
    state_dict = {**state_dict, "state": states}
    _check_keys(keys, state_dict["state"])
    _check_rule(rule, saved, [state_dict["state"].get(key) for key in keys])

    groups = []
    remarks = dict[str, list[str]]()  # what is not as it was saved, and the groups of which that is true
    for i, (own, other) in enumerate(zip(live, saved, strict=True)):
        group, found = _load_group(rule, own, other, default, f"param group {i} of the saved state")
        groups.append(group)
        begun = [value for key in other["params"] if (value := state_dict["state"].get(key))]
        for remark in (*found, *_begins(group, other, begun), *_misnamed(own, other)):
            remarks.setdefault(remark, []).append(str(i))
    where = "param group {} of the saved state"
    for i, group in enumerate(groups):
        stepping.check(group, where.format(i))

    places = [(g, k, p) for g, group in enumerate(groups) for k, p in enumerate(group["params"])]
    parameter_of = dict(zip(keys, places, strict=True))
    factors: list[Mapping[str, float]] = [{} for _ in groups]
    if any(_form(rule, own) != _form(rule, other) for own, other in zip(live, saved, strict=True)):
        next_step, _ = stepping.follow(groups, rule.hypers(groups, where=where, default=default))
        scaled = [a for *_, a in next_step]
        factors = [rule.carry(other, own, a) for other, own, a in zip(saved, groups, scaled, strict=True)]
    storages = [rule.storage(group, where.format(i)) for i, group in enumerate(groups)]
    state: defaultdict[Any, Any] = defaultdict(dict)
    flat, masters, kept_nowhere = FlatStates(), list[master_weights.Written](), set[int]()
    for key, value in state_dict["state"].items():
        if key in parameter_of:
            g, k, p = parameter_of[key]
            what = label(groups[g], g, k)
            if groups[g].get(AVERAGE) is None and isinstance(value, Mapping) and EMA.name in value:
                if AVERAGE not in saved[g]:  # else that has been said
                    kept_nowhere.add(g)
                value = {name: own for name, own in value.items() if name not in (EMA.name, EMA.scale.name)}
            dropped = groups[g].get(TO) is None and saved[g].get(TO) is not None  # which is said
            if dropped and isinstance(value, Mapping) and REFERENCE.name in value:
                value = {name: own for name, own in value.items() if name != REFERENCE.name}
            value = master_weights.imported(value, saved[g], what)
            if convert and isinstance(value, Mapping) and MASTER_NAME in value:
                value, master = _without_master(value, p, what, storages[g])
                masters += [] if master is None else [master_weights.Written(p, g, k, master)]
            state[p] = _load_one(value, p, what, flat, factors[g], storages[g], convert)
        else:
            state[key] = value
    for g in sorted(kept_nowhere):
        remarks.setdefault("it has averages of weights, this optimizer keeps none (ema_decay)", []).append(str(g))
    for remark, numbers in remarks.items():
        of = f"param group {numbers[0]}" if len(numbers) == 1 else f"param groups {', '.join(numbers)}"
        warn(f"{of} of the saved state: {remark}")
    return groups, state, flat, master_weights.planned(rule, groups, masters)


def _load_group(
    rule: Rule, own: Mapping[str, Any], saved: Mapping[str, Any], default: str, where: str
) -> tuple[dict[str, Any], list[str]]:
    """A live group with what is saved of it, and what is to be said of that.

    What absent keys mean is loaded too: a saved group without "eta" has had eta 1.
    """
    keep = {"params", *LIVE, "decay", FLAG}
    schedule, theirs = own.get("schedule"), saved.get("schedule")
    loaded = {key: deepcopy(value) for key, value in saved.items() if key not in keep}
    remarks = []

    live_decay = {"weight_decay": own["weight_decay"], "decay": rule.mode_of(own, default), **_form(rule, own)}
    decay = {
        "weight_decay": saved.get("weight_decay", 0.0),
        "decay": _saved_mode(rule, saved, own, default),
        **_form(rule, saved),
    }
    rule.hypers([{**own, **loaded, **decay, CAUTIOUS: False}], where=where, default=default)
    for key in _form(rule, own):
        loaded.pop(key, None)
    same_form, nothing = _form(rule, saved) == _form(rule, own), _is_zero(decay["weight_decay"])
    same_norm = _normalizes(theirs) == _normalizes(schedule) or (
        theirs is not None and is_called(schedule, str(theirs))
    )
    if nothing:  # which means the same in every mode
        for key in ("weight_decay", "decay"):
            del decay[key], live_decay[key]
    if not same_form or not (nothing or (decay["decay"] == live_decay["decay"] and same_norm)):
        if not nothing:
            loaded.pop("weight_decay", None)
        remarks.append(_of_another_decay(rule, decay, live_decay, theirs, schedule))

    if follows_lr(own) or (schedule is None and theirs is not None):
        loaded.pop("eta", None)  # what a schedule has set last is not a constant to go on with
    elif schedule is None:
        loaded.setdefault("eta", 1.0)
    if not _counted(saved) and not loaded.get("schedule_step"):
        loaded.pop("schedule_step", None)  # it has counted nothing: what was set of ours stays
    if theirs is not None and not is_called(schedule, str(theirs)):
        remarks.append(f"it has schedule={theirs}, this optimizer goes on with schedule={named(schedule)}")
    theirs, of_decay = saved.get(stepping.WEIGHT_DECAY), own.get(stepping.WEIGHT_DECAY)
    if theirs is not None and not is_called(of_decay, str(theirs)):
        remarks.append(f"it has {stepping.WEIGHT_DECAY}={theirs}, this optimizer goes on with {named(of_decay)}")
    remarks += _load_lr(own, saved, loaded)
    for key in ("stochastic_rounding", VALUE, AVERAGE, *PULLS):
        was, goes_on = (_plain({**rule.absent, **group}[key]) for group in (saved, own))
        goes_on = named(goes_on) if callable(goes_on) else goes_on
        if key in saved and was != goes_on:
            remarks.append(f"it has {key}={was!r}, this optimizer goes on with {goes_on!r}")
    group = {**own, **loaded}
    settle(rule, group, default)
    return group, remarks


def _load_lr(own: Mapping[str, Any], saved: Mapping[str, Any], loaded: dict[str, Any]) -> list[str]:
    """What lr and base_lr are when another kind of schedule was saved, and what is to be said of that."""
    first = loaded.pop("base_lr", None)
    if saved.get("show_lr") and not follows_lr(own) and not own.get("show_lr"):
        loaded["lr"] = first
    if own.get("show_lr"):
        loaded["base_lr"] = loaded.get("lr", own["lr"]) if first is None else first
        loaded["lr"] = loaded["base_lr"] if not saved.get("show_lr") else loaded["lr"]
        loaded["eta"] = 1.0 if not saved.get("show_lr") else loaded.get("eta", 1.0)
    elif own.get("schedule") is not None and not follows_lr(own):
        first = saved.get("initial_lr")
        if saved.get("schedule") is None and first is not None and not _same(first, saved.get("lr")):
            return [
                f"its lr={_plain(saved['lr'])} is what an LR scheduler made of {_plain(first)}, and schedule="
                f"{named(own['schedule'])} multiplies it: set group['lr'] to the lr that it is to be of"
            ]
    elif follows_lr(own):
        base_lr = own.get("base_lr")
        chosen = not _same(base_lr, own.get("lr")) and not _same(base_lr, own.get("initial_lr"))
        first = saved.get("initial_lr") if first is None and not chosen else first
        if first is not None:
            loaded["base_lr"] = deepcopy(first)
        elif "lr" in saved and not chosen and not _same(saved["lr"], own.get("base_lr")):
            return [
                f"it has lr={_plain(saved['lr'])}, and neither base_lr nor an LR scheduler's initial_lr: eta is "
                f"lr / base_lr with this optimizer's base_lr={own.get('base_lr')}; if that is not meant, set "
                "group['base_lr']"
            ]
    return []


def _saved_mode(rule: Rule, saved: Mapping[str, Any], own: Mapping[str, Any], default: str) -> Any:
    """The decay mode of a saved group. Without a name and without torch's flag it may be Adam's or AdamW's."""
    ours = rule.mode_of(own, default)
    either = rule.torch.decoupled_flag and FLAG not in saved and ours in rule.torch.decays
    return rule.mode_of(saved, ours if either else rule.torch.decays[0])


def _form(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """What else of a group says what its weight decay and its states mean."""
    return {own.name: group.get(own.name, own.absent) for own in rule.hyperparameters if own.absent is not None}


def _normalizes(schedule: object) -> bool:
    """Is a group's weight_decay under this schedule, or under one of this name, not the lambda of a step?"""
    return schedule.startswith("NormalizedDecay(") if isinstance(schedule, str) else hasattr(schedule, "decay_factor")


def _of_another_decay(
    rule: Rule, saved: Mapping[str, Any], live: Mapping[str, Any], theirs: object, schedule: object
) -> str:
    had, goes_on = (", ".join(f"{key}={_plain(value)!r}" for key, value in own.items()) for own in (saved, live))
    normal = [" under NormalizedDecay" if _normalizes(own) else "" for own in (theirs, schedule)]
    carried = (
        "; its buffers are carried over, by the lr of the next step" if saved.get("form") != live.get("form") else ""
    )
    return (
        f"it has {had}{normal[0]}, {rule.title} here goes on with its own {goes_on}{normal[1]}{carried}. To go "
        "on as saved, make the optimizer so, or set the group's after loading; convert_weight_decay carries a weight "
        "decay from one mode to another"
    )


def _begins(group: Mapping[str, Any], saved: Mapping[str, Any], states: Sequence[Any]) -> list[str]:
    """What is to be said of a schedule that begins anew beside states that do not."""
    if not stepping.counted(group) or not states or group.get("schedule_step") or _counted(saved):
        return []
    key = "schedule" if stepping.called(group) else stepping.WEIGHT_DECAY
    counts = [
        own["step"] for own in states if isinstance(own, Mapping) and isinstance(own.get("step"), (Tensor, int, float))
    ]
    steps = int(max(map(float, counts), default=0))
    if counts and not steps:
        return []
    so_many = f", {steps} steps by its states" if counts else ""
    return [
        f"it has followed no schedule{so_many}: {key}={named(group[key])} begins at its first step. To begin "
        f"elsewhere, set group['schedule_step']{f' = {steps}' if counts else ''}, before loading or after"
    ]


def _counted(saved: Mapping[str, Any]) -> bool:
    """Had a saved group a schedule, whose steps it has counted?"""
    return saved.get("schedule") is not None or saved.get(stepping.WEIGHT_DECAY) is not None


def _misnamed(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What is to be said of parameters that have other names than the saved ones, which are taken in order."""
    ours, theirs = own.get("param_names"), saved.get("param_names")
    if not isinstance(ours, (list, tuple)) or not isinstance(theirs, (list, tuple)):
        return []
    ours, theirs = ([unwrapped(str(name)) for name in names] for names in (ours, theirs))
    if ours == theirs:
        return []
    k = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    a, b = (names[k] if k < len(names) else None for names in (ours, theirs))
    return [
        f"its parameter {k} is {b!r}, that of this optimizer {a!r}: states are taken in order, not by name. Give the "
        "parameters in the order in which they were saved"
    ]


def unwrapped(name: str) -> str:
    """A parameter's name without what wrappers put into it: DDP, torch.compile, FSDP, activation checkpoints."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _check_keys(keys: Sequence[Any], states: Mapping[Any, Any]) -> None:
    """Raises ValueError where there are states, and none of them is that of a parameter: all would begin anew."""
    if not any(key in states for key in keys):
        lost = [key for key, own in states.items() if isinstance(own, Mapping) and STATES & set(own)]
        if lost:
            raise ValueError(
                f"the saved state has states of {lost[:3]}, ..., and its parameters are {list(keys[:3])}, ...: none of "
                "them fits. JSON makes strings of numbers, and names want the same in 'params'"
            )


def _check_rule(rule: Rule, groups: Sequence[Mapping[str, Any]], states: Sequence[Any]) -> None:
    """Raises ValueError where states are those of another rule; where there are none yet, the hyperparameters."""
    own = {state.name for state in rule.states}
    found = {name for value in states if isinstance(value, Mapping) for name in value} & {*scales.STATES} - NO_STATES
    given = set[str]().union(*groups) - {"lr"}
    alone = set(rule.keys).difference(*(other.keys for other in RULES.values() if other is not rule))
    if found & own or (not found and given & alone):
        return
    others = [other for other in RULES.values() if other is not rule]
    theirs = max(
        others, key=lambda other: (len(found & {state.name for state in other.states}), len(given & set(other.keys)))
    )
    what = sorted(found or given & (set(theirs.keys) - set(rule.keys)))
    if what:
        raise ValueError(
            f"the saved state is one of {theirs.title}, it has {what}; this optimizer is {rule.title}, whose states "
            f"are {sorted(own)}"
        )


def _same(a: object, b: object) -> bool:
    return _plain(a) == _plain(b)


def _is_zero(value: object) -> bool:
    number = _plain(value)
    return isinstance(number, (int, float)) and number == 0


def _plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _groups_of(state_dict: Any) -> list[dict[str, Any]]:
    """The groups of a saved state, whose lists are its own. Raises where it is not built as one."""
    if not isinstance(state_dict, Mapping):
        way = ": load the file first, torch.load(...)" if isinstance(state_dict, (str, os.PathLike)) else ""
        raise TypeError(
            f"the saved state is a {type(state_dict).__name__}: expected a dict, of an optimizer's state_dict(){way}"
        )
    for key, kind, name in (("param_groups", (list, tuple), "list of dicts"), ("state", Mapping, "dict")):
        if key not in state_dict:
            raise ValueError(f"the saved state has no {key!r}; {_looks_like(state_dict)}")
        if not isinstance(state_dict[key], kind):
            raise TypeError(f"{key!r} of the saved state is a {type(state_dict[key]).__name__}: expected a {name}")
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            found = type(group).__name__ if not isinstance(group, Mapping) else "dict without a list of 'params'"
            raise TypeError(f"param group {i} of the saved state is a {found}: expected a dict with a list of 'params'")
    return [{**group, "params": list(group["params"])} for group in state_dict["param_groups"]]


def _looks_like(state_dict: Mapping[Any, Any]) -> str:
    """What somebody gave in place of an optimizer's state."""
    names = sorted(map(str, state_dict))
    shown = f"it has {names[:6]}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    inner = [k for k, v in state_dict.items() if isinstance(v, Mapping) and "param_groups" in v and "state" in v]
    if inner:
        return f"{shown}: a whole checkpoint, of which load_state_dict(checkpoint[{inner[0]!r}]) takes the optimizer's"
    if any(name.startswith(("state.", "param_groups.")) for name in names):
        return f"{shown}: a flattened one, which torch.distributed.checkpoint's set_optimizer_state_dict loads"
    if state_dict and all(isinstance(value, Tensor) for value in state_dict.values()):
        return f"{shown}: a model's state_dict(), which model.load_state_dict takes"
    return f"{shown}: expected an optimizer's state_dict()"


def _without_master(
    saved: Mapping[str, Any], p: Tensor, what: str, storage: Storage
) -> tuple[Mapping[str, Any], Tensor | None]:
    """A saved state without a master weight that is stored otherwise here, and that in float32."""
    value, theta = saved[MASTER_NAME], local(p).detach()
    if not isinstance(value, Tensor) or value.dtype == storage.master_dtype(theta.dtype):
        return saved, None
    of_state = f"the saved state {MASTER_NAME!r} of {what}"
    check_type(value, of_state)
    check_sharding(p, value, of_state)
    here = local(value).detach().to(theta.device)
    remainder = here.dtype in (torch.int16, torch.int8)
    if here.shape != theta.shape or (remainder and theta.dtype != torch.bfloat16):
        raise TypeError(
            f"{of_state} has dtype {value.dtype} and shape {tuple(value.shape)}, the parameter {theta.dtype} and "
            f"{tuple(theta.shape)}: a remainder is what a bfloat16 parameter of its shape lacks of a float32"
        )
    master = reference.load(theta, torch.float32, here) if remainder else here
    return {name: own for name, own in saved.items() if name != MASTER_NAME}, sharded_like(p, master.clone())


def _load_one(
    saved: Mapping[str, Any], p: Tensor, what: str, flat: FlatStates, factors: Mapping[str, float], storage: Storage,
    convert: bool,
) -> dict[str, Any]:  # fmt: skip
    """One parameter's state, copied to its device and laid out as the parameter, in flat buffers where it is flat.

    Args:
        factors: what a state is multiplied by, by its name.
        storage: how it is to be stored.
        convert: round what is saved in more bits.
    """
    place = place_of(p)
    if not isinstance(saved, Mapping):
        raise TypeError(f"the saved state of {what} is a {type(saved).__name__}: expected a dict")
    own: dict[str, Any] = {}
    saved = scales.restored(saved, p, what, storage, factors, convert)
    for key, state in scales.STATES.items():
        if saved.get(state.scale.name) is not None and saved.get(key) is None:
            raise ValueError(
                f"the saved state of {what} has {state.scale.name!r}, and no {key!r} that it is the scale of: whoever "
                "carried it has lost what is in 8 bits"
            )
    for name, value in saved.items():
        if (name == "step" or name in STATES) and isinstance(value, Mapping) and not value:
            continue  # torch's distributed checkpoints make it of what they have not found
        if isinstance(value, Tensor) and (without_memory(value) or without_memory(p)):
            own[name] = value.detach().clone()  # a shape alone
        elif name == "step" and value is not None:
            own[name] = torch.tensor(
                step_count(value, f"the saved step count of {what}"), dtype=torch.float32, device="cpu"
            )
        elif name in scales.SCALES and isinstance(value, Tensor):
            like = scales.like_scale(p, torch.empty_like(local(p).detach(), device="meta"))
            scale = scales.conform_scale(p, like, value, f"the saved state {name!r} of {what}", move=True)
            if place is not None:
                own[name] = flat.zeros(place, like, name, scale.dtype, TILE).copy_(scale)
            else:
                own[name] = scales.scale_of(p, scale.clone())
        elif name in STATES and isinstance(value, Tensor):
            of_state = f"the saved state {name!r} of {what}"
            check_type(value, of_state)
            check_sharding(p, value, of_state)
            theta = local(p).detach()
            detached = local(value).detach()  # a state is a leaf that needs no gradient, whatever was saved
            dtype = storage.state_dtype(MASTER if name == MASTER_NAME else scales.STATES[name], theta.dtype)
            if name == MASTER_NAME and storage.master_dtype(theta.dtype) != value.dtype:
                raise TypeError(
                    f"{of_state} has dtype {value.dtype}: with master_weights={storage.masters!r}, what is kept beside "
                    f"a parameter of {theta.dtype} is {storage.master_dtype(theta.dtype) or 'nothing'}. Give the "
                    "optimizer the master_weights that it was saved with, or have them stored as this one's, "
                    "load_state_dict(..., convert_states=True)"
                )
            loaded = conform_state(theta, theta, detached.to(theta.device), dtype, of_state, convert)
            if not has_scales(dtype) or name == MASTER_NAME:
                loaded = scales.carried(loaded, factors.get(name, 1.0), of_state)
            if place is not None:
                own[name] = flat.zeros(place, theta, name, loaded.dtype).copy_(loaded)
            else:
                made = loaded.clone(memory_format=torch.preserve_format) if loaded is detached else loaded
                own[name] = sharded_like(p, made)
        else:
            own[name] = deepcopy(value)
    return own
