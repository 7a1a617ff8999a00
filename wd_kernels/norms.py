"""Where a table adds up the squares of its gradients, and what counts its steps where these may be skipped.

On the host that is exact sums alone. A device has a `Bank`, since nobody is to wait for what it decides. A step is then
the squares of the gradients (a launch a bucket, where a norm is wanted), its begin (one launch: it decides, completes
the rows, counts), and every bucket. csrc/layout.h has the same under `Begin`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import sums
from .averages import AverageDecay
from .clipping import Asked, Limits, Window, number
from .epilogues import AVERAGE
from .reference import sqrt
from .rules import LAST, Rule
from .schedules import Schedule
from .schedules.tables import ScheduleTable, tabled
from .sharding import sharded_over, sum_over

__all__ = ["Accumulated", "Bank", "Norms", "empty_sums", "reductions", "same_objects", "slots"]

CPU = torch.device("cpu")  # whatever the default device
#: The exact sums of squares lie there so often: chunks add to them by turns, so that few wait for each other.
COPIES = 32


def empty_sums(n: int, device: torch.device) -> Tensor:
    """So many exact sums, in as many copies as few chunks wait for each other: int64 [copies, n, sums.WORDS]."""
    return torch.zeros(max(1, COPIES // max(n, 1)), n, sums.WORDS, dtype=torch.int64, device=device)


def same_objects(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Are they, one by one, the very same?"""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def slots(params: Sequence[Tensor], group_of: Sequence[int]) -> tuple[list[int], dict[tuple[Any, ...], int]]:
    """Of each parameter the sum that its squares go to; of each of these (the group, the ids of `sharded_over`)."""
    kinds = [(group, tuple(map(id, sharded_over(p)))) for group, p in zip(group_of, params, strict=True)]
    known = {kind: slot for slot, kind in enumerate(dict.fromkeys(kinds))}
    return [known[kind] for kind in kinds], known


def reductions(params: Sequence[Tensor], slot_of: Sequence[int], device: torch.device) -> list[tuple[Any, Tensor]]:
    """(process group, the slots that are summed over it), in an order that all processes share."""
    members: dict[int, tuple[Any, list[int]]] = {}
    for slot, p in zip(slot_of, params, strict=True):
        for process_group in sharded_over(p):
            own = members.setdefault(id(process_group), (process_group, []))[1]
            if slot not in own:
                own.append(slot)
    return [(group, torch.tensor(own, device=device)) for group, own in members.values()]


@dataclass
class Accumulated:
    """What a step has in the place of gradients.

    Attributes:
        of: that, by parameter.
        sums: what their squares have been added to, [copies, slots, sums.WORDS]; None: they were not, or may have been
            changed since.
        params, slot_of: of which parameters, in order, and to which of the sums.
        gradients: what is stepped, by position in a table. A step that is taken or skipped empties it.
    """

    of: dict[Tensor, Tensor]
    params: list[Tensor]
    slot_of: list[int]
    sums: Tensor | None
    gradients: list[Tensor | None] | None = None

    def by_position(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Of these parameters, in order."""
        self.gradients = list(map(self.of.get, params))
        return self.gradients

    @property
    def taken(self) -> bool:
        """Was the step taken, or skipped?"""
        return self.gradients == []


@dataclass
class Bank:
    """Of the parameters of one table, in order; of the sums of its groups.

    Attributes:
        steps: float32 [n], the step counts; `state[p]["step"]` is a view of one.
        fresh: float32 [n], 1 until a step is taken that makes a state which the rule is told of.
        sums: int64 [copies, slots, sums.WORDS], empty between steps.
        totals: int64 [groups + 2, sums.WORDS]: of each group in the last step, of all, of those without own limits.
        slots_of: int64 [groups + 1], where the slots of each group begin.
        clips: float64 [groups].
        schedule_steps: int64 [groups], the steps that schedules have seen, and float64 [groups], what they made of eta.
        views: of each group, of one element each, those two as the group shows them.
        control, found: float64 [2].
        one, zero, no_loss: float32 [1]: what stands for a scale, for infinities found, for a loss, where there is none.
        clean: the sums are empty.
    """

    device: torch.device
    steps: Tensor
    fresh: Tensor
    sums: Tensor
    totals: Tensor
    slots_of: Tensor
    clips: Tensor
    schedule_steps: Tensor
    etas: Tensor
    views: list[tuple[Tensor, Tensor]]
    control: Tensor
    found: Tensor
    one: Tensor
    zero: Tensor
    no_loss: Tensor
    clean: bool = True
    rows: Tensor | None = None
    groups: Tensor | None = None
    tables: dict[object, tuple[object, ScheduleTable]] = field(default_factory=dict)  # by id of schedules, by averages

    @classmethod
    def of(cls, device: torch.device, params: int, group_of_slot: Sequence[int], groups: int) -> Bank:
        """An empty one. `group_of_slot`: whose group each sum is, in order."""
        firsts = [sum(own < group for own in group_of_slot) for group in range(groups + 1)]
        make = partial(torch.zeros, device=device)
        f32, f64, i64 = (partial(make, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.int64))
        schedule_steps, etas = i64(groups), f64(groups) + 1
        return cls(
            device=device,
            steps=f32(params),
            fresh=f32(params),
            sums=empty_sums(len(group_of_slot), device),
            totals=i64(groups + 2, sums.WORDS),
            slots_of=torch.tensor(firsts, dtype=torch.int64, device=device),
            clips=f64(groups),
            schedule_steps=schedule_steps,
            etas=etas,
            views=[(schedule_steps[g], etas[g]) for g in range(groups)],
            control=f64(2),
            found=f64(2),
            one=f32(1) + 1,
            zero=f32(1),
            no_loss=f32(1),
        )

    def rows_for(self, n: int, rule: Rule) -> tuple[Tensor, Tensor]:
        """Room for so many rows, float64 [n, scalars and an average's], and for what each group gives to its own."""
        make = partial(torch.empty, dtype=torch.float64, device=self.device)
        shape = (n, len(rule.scalars) + len(AVERAGE.scalars))
        if self.rows is None or self.rows.shape != shape:
            self.rows = make(shape)
        if self.groups is None:
            self.groups = make(len(self.clips), len(rule.group_scalars) + len(LAST))
        return self.rows, self.groups

    def table(self, schedule: Schedule) -> ScheduleTable:
        """A schedule's table on the device."""
        if id(schedule) not in self.tables:
            values, endless = tabled(schedule)
            self.tables[id(schedule)] = schedule, ScheduleTable(values.to(self.device), endless)
        return self.tables[id(schedule)][1]

    def average_table(self, average: AverageDecay) -> Tensor:
        """What an average keeps in steps 1, 2, ... on the device, until it settles: float64 [n]."""
        last = average.settles()
        assert last is not None
        if average not in self.tables:
            values = torch.tensor([[average(t) for t in range(1, last + 1)]], dtype=torch.float64, device=self.device)
            self.tables[average] = average, ScheduleTable(values, False)
        return self.tables[average][1].values[0]

    def given(self, value: Tensor | float | None, otherwise: Tensor, name: str) -> Tensor:
        """What torch.amp.GradScaler has left, float32 [1] on the device, without waiting for it."""
        if value is None:
            return otherwise
        if not isinstance(value, Tensor) or value.numel() != 1:
            return torch.full((1,), number(name, value, self.device), dtype=torch.float32, device=self.device)
        there = value.detach().reshape(1).to(device=self.device, dtype=torch.float32, non_blocking=True)
        return there if there.data_ptr() % 16 == 0 else there.clone()  # Triton would compile for it


class Norms:
    """Of one table: a sum for each group, and in it for each set of processes over which parameters are sharded.

    Attributes:
        groups: how many groups there are.
        slot_of: which sum each parameter's squares go to.
        group_of: int64 [slots], whose group each sum is, in order.
        sums: int64 [slots, sums.WORDS], where the host decides.
        reductions: (process group, the slots that are summed over it), in an order that all processes share.
        bank: what a device has, where that decides; else None.
        limits: what this step makes of the norm.
        measured: what the squares of this step's gradients add up to, where that is known: int64 [slots, sums.WORDS].
        window: what spikes are told by, on the device that decides.
        schedules: (group, table) of those that look up their eta on the device.
        lrs: of all groups, numbers or tensors.
        counts: (where the device counts for a schedule, what the group has been set to), written when a step begins.
        capturable: steps may be captured there, in the graph of a device that counts.
        captured: what the graphs read and write in which steps were captured.
        captured_at: where parameters and states of these lie, by position.
        lent: tensors of groups that the device reads.
        inputs: what a device is sent that begins a step: "settings" float64 [groups, settings] (`Rule.settings_rows`),
            "sources" int64 (`live.sources`), "keys" int64 [rows, 2] (of each row its group, and a parameter that has
            its count), "active" int64 [n].
    """

    def __init__(
        self, params: Sequence[Tensor], group_of: Sequence[int], groups: int, device: torch.device | None
    ) -> None:
        self.groups = groups
        self.slot_of, known = slots(params, group_of)
        of_slots = [group for group, _ in known]
        self.group_of = torch.tensor(of_slots, dtype=torch.int64, device=CPU)
        self.sums = torch.zeros(len(known), sums.WORDS, dtype=torch.int64, device=CPU)
        self.bank = None if device is None else Bank.of(device, len(params), of_slots, groups)
        self.limits: Limits | None = None
        self.measured: Tensor | None = None
        self.capturable = False
        self.schedules: list[tuple[int, ScheduleTable]] = []
        self.lrs: list[float | Tensor] = []
        self.counts: list[tuple[Tensor, int]] = []
        self.window = Window.empty()
        self.captured: list[Any] = []
        self.captured_at: dict[int, list[int]] = {}
        self.lent: list[Tensor] = []
        self.inputs: dict[str | int, Tensor] = {}
        self._found = torch.zeros(2, dtype=torch.float64, device=CPU)
        self.reductions = reductions(params, self.slot_of, CPU if device is None else device)

    @property
    def measures(self) -> bool:
        """Is the norm of this step's gradients wanted?"""
        return self.limits is not None and self.limits.measures

    def take(self, accumulated: Accumulated | None, params: Sequence[Tensor]) -> None:
        """What a step of these parameters has in the place of gradients may have its squares added up already."""
        self.measured = None
        if accumulated is None or accumulated.sums is None or not self.measures:
            return
        if same_objects(params, accumulated.params) and accumulated.slot_of == self.slot_of:
            self.measured = accumulated.sums.sum(0)

    def sum_of(self, i: int) -> Tensor:
        """What the squares of a parameter's gradient are added to: int64 [sums.WORDS]; of copies, the first."""
        return (self.sums if self.bank is None else self.bank.sums[0])[self.slot_of[i]]

    def asked(
        self, limits: Limits, device: torch.device, plans: list[Any], measure: Callable[[], None] | None, position: int
    ) -> Asked:
        """What native code does of it, where the host decides.

        Args:
            device: of the gradients.
            plans, measure: what adds up squares: of native code, and else.
            position: of "grad_scale" in a row.
        """
        scale, found_inf, loss = limits.numbers(device)
        steps: list[Callable[[], object]] = [own for own in (measure,) if own is not None]
        if self.measured is not None:
            plans, steps = [], [partial(self.sums.copy_, self.measured)]
        steps += [partial(sum_over, group, self.sums, slots) for group, slots in self.reductions]

        def between() -> None:
            for step in steps:
                step()

        return Asked(
            sums=self.sums if limits.measures else None,
            plans=plans,
            group_of=self.group_of,
            found=self._found,
            grad_scale=position,
            between=between if steps else None,
            max_norm=limits.max_norm,
            skip_nonfinite=limits.skip_nonfinite,
            scale=scale,
            found_inf=found_inf,
            own=limits.own,
            last=self.window,
            sigma=limits.sigma,
            window=limits.window,
            has_loss=limits.loss is not None,
            loss=loss,
        )

    def limit_words(self) -> Tensor:
        """This step's limits as a device reads them: float64 [7 + groups] (csrc/layout.h, `LimitWord`)."""
        none = [float("nan")] * self.groups
        words = [0.0, float("inf"), 0.0, float("inf"), 1.0, 0.0, 0.0, *none]
        if self.limits is not None:
            own = self.limits
            spikes = (own.sigma, float(own.window), float(own.loss is not None))
            words = [float(own.measures), own.max_norm, float(own.skip_nonfinite), *spikes, float(own.own is not None)]
            words += own.own or none
        return torch.tensor(words, dtype=torch.float64, device=CPU)

    def reduce(self, bank: Bank) -> None:
        """Adds the sums of other processes to a device's own."""
        if not self.reductions:
            return
        total = bank.sums.sum(0)
        for group, slots in self.reductions:
            sum_over(group, total, slots)
        bank.sums.zero_()
        bank.sums[0] = total

    def set_schedule_steps(self) -> None:
        """What groups have been set to is what the device counts on from."""
        for steps, value in self.counts:
            steps.fill_(value)

    def begin_without_gradients(self, bank: Bank, limits: Limits | None) -> None:
        """What a step of a process finds that steps nothing: others wait for its sums, and schedules count it."""
        self.set_schedule_steps()
        bank.found[0].fill_(math.nan)
        bank.found[1].zero_()
        if limits is not None:
            self._decide_without_gradients(bank, limits)
        for g, (values, endless) in self.schedules:
            if endless:
                bank.found[1:] = (bank.found[1:] != 0) | (bank.schedule_steps[g] >= values.shape[1])
        moves = [lr != 0 for lr in self.lrs]
        counts = (bank.found[1] == 0) & any(move for move in moves if isinstance(move, bool))
        for move in moves:
            if isinstance(move, Tensor):
                counts = counts | ((bank.found[1] == 0) & move.reshape(()))
        for g, (values, _) in self.schedules:
            eta = values[0][bank.schedule_steps[g].clamp(0, values.shape[1] - 1)]
            bank.etas[g] = torch.where(counts, eta, bank.etas[g])
            bank.schedule_steps[g] += counts

    def _decide_without_gradients(self, bank: Bank, limits: Limits) -> None:
        bank.found[1:] = bank.given(limits.found_inf, bank.zero, "found_inf") != 0
        if not limits.measures:
            return
        bank.sums.zero_()
        self.reduce(bank)
        total = bank.sums.sum((0, 1))
        scale = bank.given(limits.scale, bank.one, "grad_scale").double()
        bank.found[:1] = sqrt(sums.values(total[None])) / scale
        if limits.skip_nonfinite:
            bank.found[1:] = (bank.found[1:] != 0) | ~bank.found[:1].isfinite()
        if limits.sigma != math.inf:  # reads what the device has: as rare as such a process
            here, loss = self.window.on(CPU), limits.numbers(bank.device)[2]
            given = None if limits.loss is None else loss
            if here.spiked(float(bank.found[0]), given, limits.sigma, limits.window):
                bank.found[1:] = 1
            for of_device, own in zip(self.window, here, strict=True):
                of_device.copy_(own)
        bank.totals.zero_()
        bank.sums.zero_()
        bank.clean = True

    def end_captures(self) -> None:
        """No graph is replayed any more."""
        if self.bank is not None and self.captured and self.bank.device.type != "cpu":
            torch.get_device_module(self.bank.device).synchronize(self.bank.device)  # the last replay may be under way
        self.captured.clear()
        self.captured_at.clear()

    @property
    def found(self) -> Tensor:
        """The norm of the gradients in the last step, and whether that was skipped: float64 [2]."""
        return self._found if self.bank is None else self.bank.found

    def of_groups(self, control: Tensor) -> Tensor:
        """The norms of every group's gradients in the last step that measured them, unscaled: float64 [groups]."""
        if self.bank is not None:
            totals, control = self.bank.totals[: self.groups], self.bank.control
        else:
            totals = torch.zeros(self.groups, sums.WORDS, dtype=torch.int64, device=CPU)
            totals.index_add_(0, self.group_of, self.sums)
        return sqrt(sums.values(totals)) * control[0]
