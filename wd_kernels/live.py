"""What a device reads of an optimizer's groups by itself: numbers, tensors that lie there, schedules as tables.

It makes the rows of a step of them (csrc/layout.h, `Begin`), so that nobody waits for it, and what is captured in a
graph follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .averages import AverageDecay, Mean, is_tabled
from .layout import CPU
from .norms import Bank
from .rules import AVERAGE, CENTER, LIMIT, VALUE, Hyper, Rule, at_least_zero, pair
from .schedules import Schedule, stepping
from .schedules.shapes import named
from .schedules.tables import can_be_tabled, with_decay

__all__ = ["LIVE", "Live", "of_host", "read", "sources"]

#: The hyperparameters that may be tensors on the device.
LIVE = ("lr", "eta", "weight_decay", "betas", "eps")
#: Of these the host wants to know the number.
READ_HERE = (LIMIT, VALUE, AVERAGE, CENTER, "base_lr", "seed")
#: After the sources of settings: of schedules a table's address, its length, and whether it goes on; of averages an
#: address and a length (csrc/layout.h, `SourceWord`).
OF_TABLES = 5
#: What is checked in the place of one: every hyperparameter may be it.
STAND_IN = 0.5


class Live(NamedTuple):
    """Of one group.

    Attributes:
        tensors: by the names of `Rule.settings`, of one element each.
        base_lr: where eta is lr over it; else 0.
        schedule: what eta is looked up of, by a count on the device; None: nothing.
    """

    tensors: Mapping[str, Tensor]
    base_lr: float
    schedule: Schedule | None


def of_host(groups: Sequence[Mapping[str, Any]], hypers: Sequence[Hyper]) -> list[Live]:
    """Of groups whose numbers the host has read, and whose schedules it has followed."""
    return [Live({}, _base_lr(group, g), None) for g, group in enumerate(groups[: len(hypers)])]


def read(
    rule: Rule, groups: Sequence[dict[str, Any]], device: torch.device, default: str, capturable: bool, captures: bool
) -> tuple[list[Hyper], list[Live]]:
    """The checked hyperparameters of groups; in the place of what `device` reads by itself, a number that it does not.

    Args:
        default: the decay mode of groups that name none.
        capturable: tensors are not read here, but for those on the CPU, where the device is another.
        captures: nor are these.

    Raises:
        KeyError, TypeError, ValueError: naming the hyperparameter and the group.
    """
    plain, lives = [], []
    for g, group in enumerate(groups):
        where = f"param group {g}"
        tensors, numbers = _tensors(rule, group, device, captures, where) if capturable else ({}, {})
        if capturable and not group.get("capturable", True):
            raise ValueError(
                f"capturable={group['capturable']!r} in {where}, of an optimizer with capturable=True: allowed is what "
                "all groups have"
            )
        _check_average(group.get(AVERAGE), capturable, device, where)
        schedule = group.get("schedule")
        if schedule is None or stepping.follows_lr(group):
            eta = group.get("eta", 1.0)
            if stepping.follows_lr(group) and ((captures and isinstance(eta, Tensor)) or eta != 1):
                raise ValueError(f"eta={eta!r} in {where} with schedule='from_lr', which sets it: allowed is 1")
            schedule = None
        else:
            _check_schedule("schedule", group, capturable, device, where)
            tensors, numbers = {k: t for k, t in tensors.items() if k != "eta"}, {**numbers, "eta": 1.0}
        if group.get(stepping.WEIGHT_DECAY) is not None:
            _check_schedule(stepping.WEIGHT_DECAY, group, capturable, device, where)
            if "eta" in tensors:
                raise TypeError(
                    f"eta of {where} is a tensor, with weight_decay_schedule={named(group[stepping.WEIGHT_DECAY])}: "
                    "allowed is a number, or a schedule"
                )
            eta = 1.0 if schedule is not None or stepping.follows_lr(group) else float(group.get("eta", 1.0))
            schedule = with_decay(schedule, eta, group[stepping.WEIGHT_DECAY])
        plain.append({**group, **numbers} if numbers else group)
        lives.append(Live(tensors, _base_lr(group, g), schedule))
    return rule.hypers(plain, default=default), lives


def sources(rule: Rule, hypers: Sequence[Hyper], lives: Sequence[Live], bank: Bank) -> Tensor:
    """Where settings lie on the device, and what is tabled: int64 [groups, settings + `OF_TABLES`]."""
    width = len(rule.settings) + OF_TABLES
    averages = [settings.average for settings, *_ in hypers]
    if not any(own.tensors or own.schedule is not None for own in lives) and averages.count(None) == len(averages):
        return torch.zeros(len(lives), width, dtype=torch.int64, device=CPU)
    words = []
    for own, average in zip(lives, averages, strict=True):
        at = [0] * len(rule.settings)
        for name, tensor in own.tensors.items():
            at[rule.settings.index(name)] = tensor.data_ptr() + (tensor.dtype == torch.float64)
        table = (0, 0, 0)
        if own.schedule is not None:
            values, endless = bank.table(own.schedule)
            table = values.data_ptr(), values.shape[1], int(endless)
        words.append((*at, *table, *_average(average, bank)))
    return torch.tensor(words, dtype=torch.int64, device=CPU).view(len(words), width)


def _average(average: Callable[[int], float] | None, bank: Bank) -> tuple[int, int]:
    """(address, length) of the table of an average's decays, from step 1 on; of a mean, which never settles, 1, and how
    many steps come before the second that it is of."""
    if average is None:
        return 0, 0
    if isinstance(average, Mean):
        return 1, average.after + 1
    assert isinstance(average, AverageDecay)
    values = bank.average_table(average)
    return values.data_ptr(), len(values)


def _base_lr(group: Mapping[str, Any], g: int) -> float:
    return at_least_zero("base_lr", group["base_lr"], f"param group {g}") if stepping.follows_lr(group) else 0.0


def _tensors(
    rule: Rule, group: Mapping[str, Any], device: torch.device, captures: bool, where: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a group by the names of settings, and numbers to be checked in their places."""
    tensors, numbers = {}, dict[str, Any]()
    parts = {own.name: own.parts for own in rule.hyperparameters}

    def is_there(item: Any) -> bool:
        readable = isinstance(item, Tensor) and item.device.type == "cpu" != device.type and not captures
        return isinstance(item, Tensor) and not readable

    for key in ("lr", "eta", *parts, *READ_HERE):
        value = group.get(key)
        names = parts.get(key) or (key,)
        each = pair(key, value, where) if len(names) > 1 and value is not None else (value,)
        if not any(map(is_there, each)):
            continue
        if key not in LIVE:
            raise TypeError(
                f"{key} of {where} is a tensor, in an optimizer with capturable=True: allowed is a number. Tensors may "
                f"be {', '.join(own for own in LIVE if own in ('lr', 'eta', *parts))}"
            )
        stand_ins = tuple(STAND_IN if is_there(item) else item for item in each)
        numbers[key] = stand_ins if len(names) > 1 else stand_ins[0]
        for k, (name, item) in enumerate(zip(names, each, strict=True)):
            if is_there(item):
                tensors[name] = _checked(item, f"{key}[{k}]" if len(names) > 1 else key, device, where)
    return tensors, numbers


def _checked(t: Tensor, name: str, device: torch.device, where: str) -> Tensor:
    what = f"{name} of {where}, in an optimizer with capturable=True, is a tensor"
    if t.device != device:
        raise ValueError(
            f"{what} on {t.device}, and the parameters are on {device}: the step reads it there; allowed are numbers "
            "and tensors on that device"
        )
    if t.dtype not in (torch.float32, torch.float64) or t.numel() != 1:
        raise ValueError(
            f"{what} of {t.dtype} and shape {tuple(t.shape)}: allowed are numbers, and one float32 or float64"
        )
    return t.detach()


def _check_average(average: object, capturable: bool, device: torch.device, where: str) -> None:
    if callable(average) and not is_tabled(average):
        why = "capturable=True" if capturable else f"skip_nonfinite or a GradScaler, on {device}"
        raise ValueError(
            f"ema_decay={named(average)} in {where} is Python code, with {why}: what may be skipped or captured is "
            "counted on the device, which cannot call it. Allowed are numbers and those of wd_kernels.averages"
        )
    if isinstance(average, AverageDecay):
        average.settles()  # its table is not too long


def _check_schedule(key: str, group: Mapping[str, Any], capturable: bool, device: torch.device, where: str) -> None:
    why = "capturable=True" if capturable else f"skip_nonfinite or a GradScaler, on {device}"
    schedule = group[key]
    if not can_be_tabled(schedule):
        raise ValueError(
            f"{key}={named(schedule)} in {where} is Python code, with {why}: what may be skipped or captured is "
            "counted on the device, which cannot call it. Allowed are those of wd_kernels.schedules and what derives "
            "from their Schedule, which become tables there, and schedule='from_lr' with an LR scheduler of torch"
        )
    if group.get("show_lr"):
        raise ValueError(
            f"show_lr=True in {where} with {why}: what the schedule makes of lr is known on the device alone; allowed "
            "is False"
        )
    stepping.check({**group, "schedule_step": 0}, where)
