"""Schedules as tables, for a device that counts by itself: what cannot call Python looks up eta."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .composed import Product, Sequential
from .normalized import NormalizedDecay
from .shapes import Constant, Schedule

__all__ = ["LONGEST", "ScheduleTable", "WithDecay", "can_be_tabled", "tabled", "with_decay"]

#: Steps of the table of a schedule that never settles, since it restarts for ever.
LONGEST = 2**20
#: Steps of any table: a schedule is asked for each of them.
MOST = 2**24
_PACKAGE = __name__.rpartition(".")[0]


class ScheduleTable(NamedTuple):
    """What a schedule is in every step.

    Attributes:
        values: float64 [2, steps], of eta and of what multiplies the weight decay; the last ones hold from there on.
        endless: they do not: the schedule goes on.
    """

    values: Tensor
    endless: bool


@dataclass(frozen=True, eq=False)
class WithDecay(Schedule):
    """A schedule of eta, with one of the weight decay beside it."""

    schedule: Schedule
    decays: Schedule

    @property
    def settles(self) -> int | None:
        first, second = self.schedule.settles, self.decays.settles
        return None if first is None or second is None else max(first, second)

    def __call__(self, t: int) -> float:
        return self.schedule(t)

    def decay_factor(self, t: int) -> float:
        own = getattr(self.schedule, "decay_factor", None)
        return (1.0 if own is None else own(t)) * self.decays(t)


_together: dict[tuple[int, int, float], WithDecay] = {}  # by the ids of what they hold


def with_decay(schedule: Schedule | None, eta: float, decays: Schedule) -> WithDecay:
    """The same object for the same two: a device knows its table by it. `eta`: where there is no schedule of it."""
    key = id(schedule), id(decays), eta
    if key not in _together or _together[key].decays is not decays:
        if len(_together) >= 1024:
            _together.clear()
        _together[key] = WithDecay(Constant(eta) if schedule is None else schedule, decays)
    return _together[key]


def can_be_tabled(schedule: object) -> bool:
    """Is it made of `Schedule` alone, which are functions of the completed steps and nothing else?"""
    if isinstance(schedule, (Sequential, Product)):
        return all(map(can_be_tabled, schedule.parts))
    if isinstance(schedule, WithDecay):
        return can_be_tabled(schedule.schedule) and can_be_tabled(schedule.decays)
    if isinstance(schedule, NormalizedDecay):
        return can_be_tabled(schedule.schedule)
    return isinstance(schedule, Schedule)


def tabled(schedule: Schedule) -> ScheduleTable:
    """The table of a schedule; the last ones that were asked for are remembered, by what they are.

    Raises:
        ValueError: it gives no finite number >= 0, or does not keep its value when it says so.

    Example:
        >>> from wd_kernels.schedules import Warmup
        >>> tabled(Warmup(4))
        ScheduleTable(values=tensor([[0.2500, 0.5000, 0.7500, 1.0000, 1.0000],
                [1.0000, 1.0000, 1.0000, 1.0000, 1.0000]], dtype=torch.float64), endless=False)
    """
    return _known(schedule, LONGEST) if _is_ours(schedule) else _made(schedule, LONGEST)


def _is_ours(schedule: object) -> bool:
    """Is what it is said by the fields that are compared? Of a class that derives from it, not."""
    inner = [*getattr(schedule, "parts", ()), *([schedule.schedule] if isinstance(schedule, NormalizedDecay) else [])]
    inner += [schedule.schedule, schedule.decays] if isinstance(schedule, WithDecay) else []
    return type(schedule).__module__.startswith(_PACKAGE) and all(map(_is_ours, inner))


def _made(schedule: Schedule, longest: int) -> ScheduleTable:
    settles = schedule.settles
    if settles is not None and settles >= MOST:
        raise ValueError(
            f"{schedule!r} settles at step {settles}: allowed is one below {MOST}, of which there is a table"
        )
    steps = range(longest if settles is None else settles + 1)
    factor: Any = getattr(schedule, "decay_factor", None)
    rows = [[schedule(t) for t in steps], [1.0 if factor is None else factor(t) for t in steps]]
    values = torch.tensor(rows, dtype=torch.float64, device="cpu")
    for name, row in zip(("schedule", "schedule.decay_factor"), values, strict=True):
        wrong = ~((row >= 0) & (row < math.inf))
        if wrong.any():
            t = int(wrong.nonzero()[0])
            raise ValueError(f"{name}({t})={float(row[t])} of {schedule!r}: allowed are finite numbers >= 0")
    given = schedule.decays if isinstance(schedule, WithDecay) else schedule
    for later in (1, 2, 3, 10, 1000) if settles is not None else ():
        value = schedule(steps[-1] + later)
        if given is not schedule and given(steps[-1] + later) != given(steps[-1]):
            raise ValueError(f"{given!r} goes on after step {steps[-1]}, where it settles by its `settles`")
        if value != values[0, -1]:
            raise ValueError(
                f"{schedule!r} settles at step {settles}, by its `settles` (or `steps`), and is "
                f"{float(values[0, -1])} there and {value} at {steps[-1] + later}: from there on it must keep its value"
            )
    return ScheduleTable(values, settles is None)


_known = lru_cache(maxsize=4)(_made)
