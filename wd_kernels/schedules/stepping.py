"""What an optimizer does with the schedules of its groups: it checks them, follows them, and counts.

A group's `schedule` is None (its `eta` stands), a callable, or "from_lr". Its `schedule_step` counts the steps that a
callable has seen; it is saved with the group, the schedule itself is not. `weight_decay_schedule` multiplies the
group's weight decay by the same count, whatever sets eta. With `show_lr` the group's `lr` shows what
the schedule makes of its `base_lr`. A key that a group lacks has its value in `SETTINGS`. Nothing is written before a
step is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ..caller import warn
from ..rules import Hyper, at_least_zero, flag, scalar

__all__ = [
    "DEFAULTS",
    "FROM_LR",
    "SETTINGS",
    "WEIGHT_DECAY",
    "ScheduleLike",
    "Tick",
    "adopt",
    "called",
    "check",
    "counted",
    "follow",
    "follows_lr",
    "moved_beside",
]

FROM_LR = "from_lr"
#: The keys of a group, and what they are where nothing is given.
SETTINGS: dict[str, Any] = {
    "schedule": None, "schedule_step": 0, "base_lr": None, "show_lr": False, "weight_decay_schedule": None,
}  # fmt: skip
#: The key of a schedule of the weight decay.
WEIGHT_DECAY = "weight_decay_schedule"

#: Those that the optimizer has arguments for.
DEFAULTS = {key: value for key, value in SETTINGS.items() if key != "schedule_step"}

ScheduleLike: TypeAlias = Callable[[int], float] | Literal["from_lr"] | None
#: What a finished step writes: (group, key, value).
Tick: TypeAlias = tuple[dict[Any, Any], Any, Any]


def follows_lr(group: Mapping[str, Any]) -> bool:
    """Whether the group's schedule is "from_lr"."""
    schedule = group.get("schedule")
    return isinstance(schedule, str) and schedule == FROM_LR


def called(group: Mapping[str, Any]) -> bool:
    """Has the group a schedule of eta that is called?"""
    return group.get("schedule") is not None and not follows_lr(group)


def counted(group: Mapping[str, Any]) -> bool:
    """Has it one of eta or of the weight decay, whose steps are counted?"""
    return called(group) or group.get(WEIGHT_DECAY) is not None


def check(group: Mapping[str, Any], where: str) -> int:
    """A group's completed steps. Raises TypeError or ValueError if its schedule, or what goes with it, is wrong."""
    schedule, base_lr = group.get("schedule"), group.get("base_lr")
    if isinstance(schedule, str) and schedule != FROM_LR:
        raise ValueError(f"schedule={schedule!r} in {where}: allowed are None, {FROM_LR!r} and callables")
    if isinstance(schedule, type):
        raise TypeError(f"schedule={schedule.__name__} in {where} is a class: expected {schedule.__name__}(...)")
    if schedule is not None and not callable(schedule) and not isinstance(schedule, str):
        raise TypeError(
            f"schedule={schedule!r} in {where} cannot be called: expected a function of the completed steps, None, or "
            f"{FROM_LR!r}, which follows an LR scheduler"
        )
    _check_of_weight_decay(group.get(WEIGHT_DECAY), where)
    shows = flag("show_lr", group.get("show_lr", False), where)
    if shows and (schedule is None or follows_lr(group)):
        raise ValueError(f"show_lr=True in {where} with schedule={schedule!r}: it shows what a callable schedule does")
    if shows and isinstance(group.get("lr"), Tensor):
        raise TypeError(f"lr={group['lr']!r} in {where} with show_lr=True, which writes it: expected a number")
    if base_lr is not None:
        if not shows and not follows_lr(group):
            raise ValueError(
                f"base_lr={base_lr!r} in {where} without schedule={FROM_LR!r} or show_lr=True, which alone read it"
            )
        _base_lr(base_lr, where)
    completed = group.get("schedule_step", 0)
    if type(completed) is not int:
        number = scalar("schedule_step", completed, where)
        completed = int(number) if number.is_integer() else -1
    if completed < 0:
        raise ValueError(f"schedule_step={group['schedule_step']!r} in {where}: allowed are whole numbers >= 0")
    return completed


def _check_of_weight_decay(schedule: Any, where: str) -> None:
    if isinstance(schedule, type):
        raise TypeError(f"{WEIGHT_DECAY}={schedule.__name__} in {where} is a class: expected {schedule.__name__}(...)")
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"{WEIGHT_DECAY}={schedule!r} in {where} cannot be called: expected a function of the completed steps, by "
            "which the weight decay is multiplied, or None"
        )
    if hasattr(schedule, "decay_factor"):
        raise ValueError(
            f"{WEIGHT_DECAY}={schedule!r} in {where} has a weight decay of its own beside eta: allowed is schedule= "
            "for it; the two are multiplied"
        )


def adopt(group: dict[str, Any], given: Mapping[str, Any], others: Sequence[Mapping[str, Any]], where: str) -> None:
    """Completes a new group: `base_lr` is its first lr; a schedule that it shares with others goes on where they are.

    Its first lr is torch's "initial_lr", where an LR scheduler has left one. Warns where groups that follow their lr
    are elsewhere by now.

    Args:
        group: the group, with the optimizer's defaults.
        given: what was given for it.
        others: the optimizer's other groups.
        where: what errors call it.
    """
    group.setdefault("schedule_step", 0)
    if "show_lr" not in given and (group["schedule"] is None or follows_lr(group)):
        group["show_lr"] = False
    if "base_lr" not in given and not follows_lr(group) and not group["show_lr"]:
        group["base_lr"] = None
    check(group, where)
    shared = next((key for key in ("schedule", WEIGHT_DECAY) if callable(group[key])), None)
    if shared is not None and shared not in given and "schedule_step" not in given:
        counts = (check(own, "another group") for own in others if own.get(shared) is group[shared])
        group["schedule_step"] = next(counts, 0)
    if group["schedule"] is None:
        return
    inherited = "schedule" not in given
    if inherited and "eta" in given:
        raise ValueError(
            f"eta={given['eta']!r} in {where}, whose eta the optimizer's schedule sets: allowed is one of them "
            "(schedule=None in the group keeps its eta)"
        )
    chosen = group["base_lr"] is not None
    if not chosen and (follows_lr(group) or group["show_lr"]):
        first_lr = group.get("initial_lr", group["lr"])
        group["base_lr"] = _base_lr(first_lr, where) if follows_lr(group) else at_least_zero("lr", first_lr, where)
    if follows_lr(group):
        group["base_lr"] = _base_lr(group["base_lr"], where)
        own, theirs = _eta_of(group), {_eta_of(other) for other in others if follows_lr(other)}
        if not chosen and theirs and own not in theirs:
            warn(
                f"{where} begins at eta = lr / base_lr = {own:g}, where the other groups are at "
                f"{', '.join(f'{eta:g}' for eta in sorted(theirs))}: give base_lr, the lr at which its eta is 1"
            )
        return
    scaled = any(other.get("show_lr") and other.get("eta", 1.0) != 1 for other in others)
    if group["show_lr"] and not chosen and "lr" in given and scaled:
        warn(
            f"{where} takes its lr={group['lr']} for its base_lr, which the schedule multiplies; that of other groups "
            "shows what it has made of theirs: give base_lr"
        )


def _eta_of(group: Mapping[str, Any]) -> float:
    return scalar("lr", group["lr"], "a param group") / scalar("base_lr", group["base_lr"], "a param group")


def follow(groups: Sequence[dict[str, Any]], hypers: Sequence[Hyper]) -> tuple[list[Hyper], list[Tick]]:
    """The hyperparameters of a step as the groups' schedules have them, and what is to be written when it is done.

    Raises:
        TypeError, ValueError: a schedule gave no finite number >= 0, or a group's base_lr, schedule_step or shown lr is
            wrong.
    """
    result, ticks = list(hypers), list[Tick]()
    schedules = [(group.get("schedule"), group.get(WEIGHT_DECAY)) for group in groups]
    if schedules.count((None, None)) == len(schedules):
        return result, ticks
    seen: dict[tuple[int, int], tuple[float, float]] = {}  # groups mostly share a schedule, which is asked once
    for i, (group, (schedule, of_decay)) in enumerate(zip(groups, schedules, strict=True)):
        if schedule is None and of_decay is None:
            continue
        settings, lr, eta, a = result[i]
        t, base_lr, decayed = group.get("schedule_step", 0), group.get("base_lr"), 1.0
        if of_decay is not None:
            if type(t) is not int or (id(of_decay), t) not in seen:
                t = check(group, f"param group {i}")
                decayed = at_least_zero(f"{WEIGHT_DECAY}({t})", of_decay(t), f"param group {i}")
                seen[id(of_decay), t] = decayed, 1.0
            decayed = seen[id(of_decay), t][0]
        if not called(group):
            if of_decay is not None:
                settings = settings._replace(weight_decay=settings.weight_decay * decayed)
                ticks.append((group, "schedule_step", t + 1))
            if follows_lr(group):
                eta, a = _ratio(lr, base_lr, eta, i), lr
            result[i] = settings, lr, eta, a
            continue
        found = seen.get((id(schedule), t)) if type(t) is int and base_lr is None else None
        if found is None:
            t = check(group, f"param group {i}")
            assert schedule is not None
            found = seen[id(schedule), t] = _multipliers(schedule, t, f"param group {i}")
        if base_lr is not None:
            lr = _base_of_shown(lr, base_lr, eta, i)
        eta, factor = found[0], found[1] * decayed
        if factor != 1.0:
            settings = settings._replace(weight_decay=settings.weight_decay * factor)
        result[i] = settings, lr, eta, eta * lr
        ticks += ((group, "eta", eta), (group, "schedule_step", t + 1))
        if base_lr is not None and (lr or not base_lr):
            ticks.append((group, "lr", eta * lr))
    if all(lr == 0.0 for _, lr, _, _ in result):
        ticks = []  # nothing moves: so torch's distributed checkpoints make the states that they fill
    return result, ticks


def moved_beside(groups: Sequence[Mapping[str, Any]]) -> int | None:
    """The first group with a schedule whose lr an LR scheduler of torch's kind has moved as well."""
    for i, group in enumerate(groups):
        first = group.get("initial_lr")
        if first is None or group.get("schedule") is None or follows_lr(group) or group.get("show_lr"):
            continue
        if isinstance(group["lr"], Tensor):  # it may be on a device, which nobody is to wait for
            continue
        if scalar("lr", group["lr"], "a param group") not in (0.0, scalar("initial_lr", first, "a param group")):
            return i
    return None


def moved_uncorrected(groups: Sequence[Mapping[str, Any]]) -> int | None:
    """The first group whose "corrected" decay does not see that an LR scheduler of torch's kind moves its lr."""
    for i, group in enumerate(groups):
        first, lr = group.get("initial_lr"), group["lr"]
        if first is None or group.get("schedule") is not None or group.get("decay") != "corrected":
            continue
        if not isinstance(lr, Tensor) and lr not in (0.0, first):
            return i
    return None


def _base_of_shown(lr: float, base_lr: Any, eta: float, index: int) -> float:
    """The lr of a group whose `lr` shows what its schedule made of it; 0 where somebody freezes the group by it."""
    base = at_least_zero("base_lr", base_lr, f"param group {index}")
    if lr in (base, eta * base):
        return base
    if lr == 0.0:
        return 0.0
    raise ValueError(
        f"lr={lr} in param group {index} with show_lr=True, where it shows what the schedule makes of base_lr={base}: "
        "it is set by something else, an LR scheduler perhaps; allowed is to set both, base_lr and lr, to a new base"
    )


def _ratio(lr: float, base_lr: Any, eta: float, index: int) -> float:
    """eta of a group that follows its lr."""
    if type(base_lr) is not float or not 0.0 < base_lr < math.inf:
        base_lr = _base_lr(base_lr, f"param group {index}")
    if eta != 1.0:
        raise ValueError(f"eta={eta} in param group {index} with schedule={FROM_LR!r}, which sets it: allowed is 1")
    ratio = lr / base_lr
    return ratio if ratio < math.inf else at_least_zero("lr / base_lr", ratio, f"param group {index}")


def _multipliers(schedule: Callable[[int], float], t: int, where: str) -> tuple[float, float]:
    eta = at_least_zero(f"schedule({t})", schedule(t), where)
    decay_factor = getattr(schedule, "decay_factor", None)
    if decay_factor is None:
        return eta, 1.0
    return eta, at_least_zero(f"schedule.decay_factor({t})", decay_factor(t), where)


def _base_lr(value: Any, where: str) -> float:
    base_lr = math.nan if value is None else scalar("base_lr", value, where)
    if not 0.0 < base_lr < math.inf:
        raise ValueError(
            f"base_lr={value!r} in {where}: allowed are finite numbers > 0. It is the lr at which eta is 1; by default "
            "the lr that the group is made with"
        )
    return base_lr
