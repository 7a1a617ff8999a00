"""TensorTable: every tensor of an optimizer end to end in one virtual flat index space.

A segment (one parameter) holds an address per role, how many elements it has, and the row of scalars it uses
(`wd_kernels/layout.py` has the records). A bucket is the segments that one launch steps: one device, one storage format
for every role. Tensors lie where torch put them; only the table knows that they are flat.

Nothing is cached unchecked. Each step compares the live groups, parameters, gradients and states with what the table
was built from (`changes.py`); only what differs is inspected again (`inspection.py`), and nothing of the optimizer is
written before all of it has passed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import backends, native
from ..clipping import Limits, Window
from ..epilogues import Epilogue
from ..flat import buffers
from ..flat.states import FlatStates
from ..formats import Storage
from ..layout import CPU, Bucket, Moving, Place, Segments, Spec, Tensors, numel_of, origins, padded, write_segment
from ..live import Live, of_host, sources
from ..norms import Accumulated, Bank, Norms, same_objects
from ..rules import EMA, MASTER, REFERENCE, Hyper, Pull, Rule, State
from ..schedules import stepping
from ..schedules.stepping import Tick
from ..sharding import is_sharded, is_unmarked_shard, local, shard_offset
from ..validation import Extent, check_disjoint, label, read_counts
from . import memoryless
from .changes import Changes, Counts, Expected, FlatRange, Inspected, Keys, Kind, Watch, Work, expect
from .inspection import Finding, Known, inspect
from .watched import Watched

__all__ = ["TensorTable"]

_increment_version = torch._C._increment_version
#: Of this process: what a child is forked with, whatever another thread was at, it starts anew.
_tables: weakref.WeakSet[TensorTable] = weakref.WeakSet()


def _after_fork() -> None:
    for table in list(_tables):
        table.lock, table.watch = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


#: What a group asks for: states, how they are stored, and what its decay pulls to.
Need: TypeAlias = tuple[tuple[State, ...], Storage, Pull]
#: How often a step looks again at what a signal's handler or another thread changes meanwhile, before it gives up.
TRIES = 1000
PATIENCE = 8


class TensorTable:
    """The segments, rows and step counts of one optimizer.

    Args:
        rule: what is stepped.
        resolve: gives the backend for a bucket's Spec, or raises.

    Attributes:
        states: all that a parameter may have beside it.
        beside: how many of them one has at most.
        counts: `state[p]["step"]` is a view of one of its steps.
        control: float64 [2], the gradient factor and the skip flag that every launch reads.
        counting: the device that counts the steps, where they may be skipped there; then `counts.steps` tells apart the
            parameters that have another history, which alone can have another count. None: the host does.
        norms: where the squares of gradients are added up, and what such a device has.
        capturable: steps may be captured in graphs.
        buckets: the launches of a step.
        written: the parameters that this step writes.
        window: what spikes are told by.
        sharded: are some of the parameters DTensors?
        averages: are some of them averaged?
        origins: of parameters, by id, where they are some of an optimizer's; None: they are all.
        inspected: what was inspected in this step, by position; it holds the memory of its tensors.
        accumulated: what the step under way has in the place of gradients; None: these.
        references: what parameters were given to decay to, which their states have from their first step on.
        watches: what watches the next step.
        marks: has the words of marks of the parameters, where one of these marks.
        watched: what the last step was watched by; None: by nothing.
    """

    def __init__(self, rule: Rule, resolve: Callable[[Spec], Any]) -> None:
        self.rule, self.resolve = rule, resolve
        self.states = (*rule.states, EMA, REFERENCE, MASTER, *(state.scale for state in (*rule.states, EMA)))
        self.control = torch.tensor([1.0, 0.0], dtype=torch.float64, device=CPU)
        self.controlled = False  # by the limits of the last step
        self.counting: torch.device | None = None
        self.capturable = self.captures = False  # the latter of the step that is under way
        self.lives: Sequence[Live] | None = None  # of that
        self.norms = Norms([], [], 0, None)
        self.window = Window.empty()
        self.history = torch.zeros(0, device=CPU)  # which parameters the last step had
        self._new_histories: dict[tuple[object, ...], float] = {}  # of this step
        self._known_row_keys: tuple[Keys | None, Tensor] | None = None  # and what they were made of is the same
        self.params: list[Tensor] = []
        self.places: list[tuple[int, int]] = []
        self.views: list[Tensor | None] = []
        self.sharded = self.averages = False
        self.origins: Mapping[int, int] | None = None
        self.device_copies: dict[torch.device, Any] = {}
        self.buckets: list[Bucket] = []
        self.segments = Segments.empty(0, 0)
        self.flat_states = FlatStates()
        self.lock = threading.RLock()
        self.watch: Watch | None = None  # None while a step is under way: what interrupts it makes the next start anew
        self.needs: list[Need] | None = None
        self.launches: backends.Prepared | None = None
        self.watches: tuple[Epilogue, ...] = ()
        self.marks: Any = None  # a `changes.Marks`
        self.watched: Watched | None = None
        self._watching: dict[tuple[object, object], tuple[Watched, backends.Prepared]] = {}
        self.keys: Keys | None = None
        self.written: list[Tensor] | None = None
        self.inspected: dict[int, Finding | None] = {}
        self.accumulated: Accumulated | None = None
        self.references: Mapping[Tensor, Tensor] = {}
        self.puts: list[tuple[int, Tensor, Any, dict[str, Any], dict[str, Any]]] = []
        _tables.add(self)

    # The way of a step ------------------------------------------------------------------------------------------------

    def step(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], hypers: Sequence[Hyper], ticks: Sequence[Tick],
        limits: Limits | None = None, lives: Sequence[Live] | None = None,
    ) -> None:  # fmt: skip
        """Takes one step: brings the table up to date with the live tensors, launches, counts.

        Everything that may fail comes first: until the one native call that launches, nothing of the optimizer is
        written, and states that were made are not yet its own.

        Args:
            ticks: (dict, key, value), written when the step is taken and was not skipped (`control`).
            limits: what it makes of the norm of the gradients.
            lives: what the device that counts reads of the groups by itself; None: nothing.

        Raises:
            TypeError, ValueError, RuntimeError: naming the parameter; nothing was written.
        """
        needs = [(own[0].states, own[0].storage, own[0].pull.kind) for own in hypers]
        if not isinstance(state, dict):
            raise TypeError(f"the optimizer's state is a {type(state).__name__}: expected a dict")
        if self.watch is None and memoryless.wanted(groups):
            memoryless.step(groups, state, hypers, ticks)
            self.norms.limits = None
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("a step writes in place: it cannot be taken inside a torch.func transform")
        watch, self.watch = self.watch, None
        self.groups, self.state, self.watched = groups, state, None
        self._new_histories, self.lives = {}, lives
        asked = limits is not None or lives is not None or self.counting is not None
        if asked and self._move_counts(groups):
            watch = None
        self.captures = self.counting is not None and backends.capturing(self.counting)
        if self.controlled and (limits is None or self.counting is not None):
            self.control.copy_(torch.tensor([1.0, 0.0], dtype=torch.float64, device=CPU))
        self.controlled = limits is not None and self.counting is None
        try:
            if watch is None or needs != self.needs or self._moved_in_memory():
                if self.captures:
                    raise _not_ready("the optimizer is new, or something of it was changed since its last step")
                watch = self._start(needs)
            for tried in range(TRIES):
                special = [i for i in self.special if i not in self.inspected]
                if special:
                    self._inspect(watch, special)
                work = self._work(hypers, ticks, tried, limits)
                found = watch.step(groups, state, work)
                if found is None:
                    if self.captures:
                        raise _not_ready("groups or parameters are others than in its last step")
                    watch = self._start(needs)
                elif found.done:
                    if self.captures:
                        self._note_captured()
                    self.keys = found.keys or None
                    watch.forget_inspections(self.inspected)
                    self.watch = watch
                    if self.norms.bank is not None and work.rows is None:
                        self.norms.begin_without_gradients(self.norms.bank, limits)
                    return
                else:
                    self._follow(watch, found)
            raise RuntimeError(
                f"parameters, gradients or states were exchanged {TRIES} times while a step was prepared, by a "
                "signal's handler or another thread: nothing was stepped"
            )
        finally:
            self.inspected, self.puts = {}, []

    def _moved_in_memory(self) -> bool:
        """Was anything flattened or unflattened, or has a flat buffer died, where others may lie now?"""
        return self.generation != buffers.generation() or any(ref() is None for ref in self.memory)

    def _work(self, hypers: Sequence[Hyper], ticks: Sequence[Tick], tried: int, limits: Limits | None) -> Work:
        """What a step is to do. Without rows it is not taken, unless no parameter has a gradient.

        Other threads may run while many elements are stepped, unless they keep exchanging what is to be stepped.
        """
        laid_out = self.keys is not None and self.launches is not None
        self.watched = None
        if laid_out and self.written is None:
            self.written = [p for p, on in zip(self.params, self.active.tolist(), strict=True) if on]
        rows, asked, norms, prepared = None, None, self.norms, backends.Prepared([], None)
        table: Any = self  # as the launches see it
        norms.limits, norms.capturable = limits, self.capturable
        norms.take(self.accumulated, self.params)
        if limits is not None or norms.bank is not None:
            self._check_limits()
        lives = self.lives
        if norms.bank is not None:
            lives = of_host(self.groups, hypers) if lives is None else lives
            norms.lent = [t for own in lives for t in own.tensors.values()]
            ticks = [*ticks, *self._follow_schedules(norms.bank, lives)]
            if self.captures:
                self._check_capture(norms.bank, limits, lives, ticks)
            norms.lrs = [own.tensors.get("lr", lr) for (_, lr, _, _), own in zip(hypers, lives, strict=True)]
            norms.schedules = [
                (g, norms.bank.table(own.schedule)) for g, own in enumerate(lives) if own.schedule is not None
            ]
            if not norms.captured:  # graphs have the tables of their schedules
                known = {id(own.schedule) for own in lives} | {settings.average for settings, *_ in hypers}
                norms.bank.tables = {key: table for key, table in norms.bank.tables.items() if key in known}
        if laid_out and self.keys and self.launches is not None:
            prepared = self.launches
            if self.watches:
                table, prepared = self._watched_launches()
            if norms.bank is None:
                rows = self.rule.rows(hypers, self.keys, self.averages)
            else:
                assert lives is not None
                rows = self.rule.settings_rows(hypers, [own.base_lr for own in lives])
                norms.inputs = {
                    "settings": rows, "sources": sources(self.rule, hypers, lives, norms.bank),
                    "keys": self._row_keys(), "active": self.active.long(),
                }  # fmt: skip
        if limits is not None and norms.bank is None:
            device = self.buckets[0].spec.device if self.buckets else CPU
            measure = None if prepared.measure is None else partial(prepared.measure, self)
            position = self.rule.scalars.index("grad_scale")
            asked = norms.asked(limits, device, list(prepared.squares), measure, position)
        return Work(
            increment=_increment_version,
            written=self.written or [],
            launches=prepared.plans,
            ready=partial(prepared.ready, table) if prepared.ready is not None else None,
            rows=rows,
            copies=[(f.gapped, f.theta) for f in self.inspected.values() if f is not None and f.gapped is not None],
            puts=self.puts,
            ticks=list(ticks),
            others=tried < PATIENCE and threading.active_count() > 1,
            clipping=asked,
            counts=norms.bank is None,
            gradients=None if self.accumulated is None else self.accumulated.by_position(self.params),
        )

    @torch.inference_mode(False)
    def _watched_launches(self) -> tuple[Watched, backends.Prepared]:
        """Those of a step that is watched, and the table as they see it."""
        own_marks = None if self.marks is None else (self.marks, self.marks.generation)
        key = (self.watches, own_marks)
        if key not in self._watching:
            if self.captures:
                raise _not_ready("it is watched as no step before it was (statistics, track_changes)")
            words = None if self.marks is None else self.marks.words
            watched, known = Watched(self, self.watches, self.resolve, words), self._watching
            self._watching = {own: made for own, made in known.items() if own[1] in (None, own_marks)}
            self._watching[key] = watched, backends.prepare(watched)
        self.watched, prepared = self._watching[key]
        watched = self.watched
        if self.captures:
            self.norms.captured.append(watched)
        if self.norms.bank is None or prepared.ready is None:  # the host may skip all launches
            watched.clearing()()
            return watched, prepared
        ready = prepared.ready
        return watched, prepared._replace(ready=lambda table, rows: [watched.clearing(), *ready(table, rows)])

    def _check_limits(self) -> None:
        if self.unmarked is not None and self.norms.measures:
            raise ValueError(
                f"{self._label(self.unmarked)} is a part that FullyShardedDataParallel has left this process: the norm "
                "of its gradients, and what they are skipped for, would be this process's alone. Allowed are "
                "model.clip_grad_norm_() before the step, with max_grad_norm=None, skip_nonfinite=False and "
                "skip_spikes=None, and fully_shard, whose norms are those of the whole"
            )
        devices = list(dict.fromkeys(str(bucket.spec.device) for bucket in self.buckets))
        if len(devices) > 1:
            raise ValueError(
                "max_grad_norm, skip_nonfinite, a GradScaler's scale or capturable=True, of parameters on "
                f"{' and '.join(devices)}: what is decided of all gradients is known on one device; allowed is an "
                "optimizer for each"
            )

    def _check_capture(
        self, bank: Bank, limits: Limits | None, lives: Sequence[Live], ticks: Sequence[Tick]
    ) -> None:  # fmt: skip
        """What a graph's replays would do again, or not at all, does not belong in it."""
        if self.accumulated is not None:
            raise RuntimeError(backends.ACCUMULATED)
        given = {} if limits is None else {"grad_scale": limits.scale, "found_inf": limits.found_inf}
        given |= {} if limits is None else {"latest_loss": limits.loss}
        for name, value in given.items():
            if value is not None and not (isinstance(value, Tensor) and value.device == bank.device):
                raise RuntimeError(
                    f"{name}={value!r} of the optimizer, in a step that is captured in a graph, which would have this "
                    f"number in every replay: allowed are tensors on {bank.device}"
                )
        if self.puts:
            raise _not_ready(f"{self._label(self.puts[0][0])} takes its first step, or has other states than before")
        for i, found in self.inspected.items():
            if found is not None and (found.gapped is not None or found.known.grad_copy is not None):
                raise RuntimeError(
                    f"{self._label(i)} or its gradient lies otherwise in memory than what is stepped, which is a copy: "
                    "such a step cannot be captured in a graph; pass contiguous tensors"
                )
        new = any(own.schedule is not None and id(own.schedule) not in bank.tables for own in lives)
        if ticks or new:
            raise _not_ready("a schedule, or its schedule_step, is another one than in the last step")

    def _note_captured(self) -> None:
        """A graph has the addresses of this step: they are kept, and are to stay those of the parameters."""
        for i, on in enumerate(self.active.tolist()):
            if on:
                own = self.tensors(i)
                roles = [own.theta.detach(), *own.states.values(), *own.outputs.values(), *own.scales.values()]
                roles += [t for t in (own.master, own.reference) if t is not None]
                self.norms.captured.append(roles)
                self.norms.captured_at[i] = [t.data_ptr() for t in roles]

    def _check_still_there(self, watch: Watch, i: int, f: Finding) -> None:
        """Raises where a parameter of a captured step has other memory by now, or another count."""
        captured = self.norms.captured_at.get(i)
        if captured is not None:
            now = [f.theta.data_ptr(), *(t.data_ptr() for t in f.memory)]
            if sorted(now) != sorted(captured) or watch.views[i] is not f.own.get("step"):
                raise RuntimeError(
                    f"{self._label(i)}, a state of it or its step count is another tensor than when a step was "
                    "captured in a graph, whose replays would step that one: write into it, or call end_captures() "
                    "when no graph is replayed any more"
                )

    def _gradient(self, p: Tensor) -> Tensor | None:
        return p.grad if self.accumulated is None else self.accumulated.of.get(p)

    def _label(self, i: int) -> str:
        g, k = self.places[i]
        return label(self.groups[g], g, k)

    def _follow_schedules(self, bank: Bank, lives: Sequence[Live]) -> list[Tick]:
        """What the groups are to show of schedules that the device counts."""
        ticks: list[Tick] = []
        self.norms.counts = []
        for g, (group, own) in enumerate(zip(self.groups, lives, strict=True)):
            steps, eta = bank.views[g]
            if own.schedule is None and stepping.counted(group):
                continue  # the host follows it
            shown = {"schedule_step": steps} if stepping.counted(group) else {}
            shown |= {"eta": eta} if stepping.called(group) else {}
            # It may have had one, whose last values stay; within a capture nothing is read.
            all_views = {"schedule_step": steps, "eta": eta}
            left = [(key, view) for key, view in all_views.items() if key not in shown and group.get(key) is view]
            ticks += [(group, key, None if self.captures else view.item()) for key, view in left]
            if own.schedule is None:
                continue
            ticks += [(group, key, view) for key, view in shown.items() if group.get(key) is not view]
            if group.get("schedule_step") is not steps and not self.captures:
                self.norms.counts.append((steps, stepping.check(group, f"param group {g}")))
        return ticks

    def counts_on(self, groups: Sequence[Mapping[str, Any]]) -> torch.device | None:
        """The device that could count the steps of these groups: that of their gradients, if its backend can."""
        for p in chain.from_iterable(group["params"] for group in groups):
            if isinstance(p, Tensor) and self._gradient(p) is not None:
                device = local(p).device
                return device if self.resolve(Spec(device, (), ())).counts_there else None
        return self.counting

    def _move_counts(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Steps are counted where the gradients are, if that can be; True: from now on elsewhere than before."""
        before, self.counting = self.counting, self.counts_on(groups)
        return before != self.counting

    def _follow(self, watch: Watch, found: Changes) -> None:
        """Brings the table up to date with what a step has found."""
        if found.changed or found.odd:
            self.written = None
        self.keys = found.keys
        if found.odd:
            self._inspect(watch, found.odd)
            self.keys = watch.assign_rows()
        if self.counting is not None and self.keys is not None and not torch.equal(self.history, self.active):
            self._part_histories()
            self.keys = watch.assign_rows()
        if self.ranges is not None and (found.runs or found.odd):
            firsts = watch.take_runs()
            count = int(firsts[-1])
            runs = Segments(self.runs.moving[:count], self.runs.places[:count], self.runs.capacities[:count].clone())
            self.run_firsts, self.segments, self.launches = firsts, runs, None
        if self.launches is None and self.keys:
            self.launches = backends.prepare(self)

    def _part_histories(self) -> None:
        """Another set of parameters than in the last step is stepped: these have another history from now on."""
        self._known_row_keys = None
        pairs = list(zip(self.counts.steps.tolist(), self.active.tolist(), strict=True))
        first_of: dict[float, int] = {}
        for i in self.norms.captured_at:
            one = first_of.setdefault(pairs[i][0], i)
            if pairs[one][1] != pairs[i][1]:
                raise RuntimeError(
                    f"of {self._label(one)} and {self._label(i)}, which a captured graph steps with one count, one "
                    "alone has a gradient: give both or none, or call end_captures() when no graph is replayed any more"
                )
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}  # few, whatever came before
        self.counts.steps.copy_(torch.tensor([numbers[pair] for pair in pairs], dtype=torch.float32, device=CPU))
        self.history = self.active.clone()
        self._new_histories = {}

    def _history(self, *of: object) -> float:
        """What stands for a history that began in this step."""
        self._known_row_keys = None
        if of not in self._new_histories:
            self._new_histories[of] = float(self.counts.steps.max()) + 1
        return self._new_histories[of]

    def _row_keys(self) -> Tensor:
        """Of each row its group, and a parameter that has its count: int64 [rows, 2]."""
        known, words = self._known_row_keys or (None, None)
        if words is None or known != self.keys:
            each = zip(self._group_of, self.counts.steps.tolist(), self.active.tolist(), strict=True)
            of = {(g, int(history) + 1): i for i, (g, history, on) in enumerate(each) if on}
            found = [of.get((g, history)) for g, history, _ in self.keys or ()]
            pairs = [(key[0], i or 0) for key, i in zip(self.keys or (), found, strict=True)]
            words = torch.tensor(pairs, dtype=torch.int64, device=CPU).view(-1, 2)
            # A history that began in this step is not among the keys yet: they are found anew before it is taken.
            self._known_row_keys = (self.keys, words) if None not in found else None
        return words

    # What a backend reads (layout.Table) ------------------------------------------------------------------------------

    @property
    def active(self) -> Tensor:
        return self.counts.active

    @property
    def whole(self) -> Segments:
        return self.own_segments

    def tensors(self, i: int) -> Tensors:
        known, p, found = self.known[i], self.params[i], self.inspected.get(i)
        assert known is not None
        row = int(self.own_segments.moving[known.segment, Moving.ROW])
        origin = int(self.own_segments.places[known.segment, Place.ORIGIN])
        if found is not None:
            beside = dict(zip(known.spec.beside, found.memory, strict=True))
            return Tensors.of(found.theta, found.grad, beside, row, origin)
        grad = self._gradient(p)
        assert grad is not None
        beside = {name: local(self.state[p][name]) for name in known.spec.beside}
        return Tensors.of(local(p), local(grad), beside, row, origin)

    def span(self, bucket: Bucket) -> tuple[int, int]:
        if self.ranges is None:
            return bucket.first, len(bucket.members)
        first, end = self.run_firsts[bucket.index : bucket.index + 2].tolist()
        return first, end - first

    # Building ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # what is made here outlives the caller's mode
    def _start(self, needs: list[Need]) -> Watch:
        """An empty table for the groups' parameters: none inspected, all step counts the table's own."""
        for g, group in enumerate(self.groups):
            if not isinstance(group, dict):
                raise TypeError(f"param group {g} is a {type(group).__name__}: expected a dict")
            if not isinstance(group["params"], (list, tuple)):
                group["params"] = list(group["params"])
        watch = Watch(self.groups, ("step", *(state.name for state in self.states)))
        self.generation = buffers.generation()
        goes_on = bool(self.norms.captured)
        if goes_on:
            self._check_captured(watch)
            watch.views = self.views
        self.params, n = watch.params, len(watch.params)
        self.places, self.views = watch.places, watch.views
        self.sharded = any(map(is_sharded, self.params))
        self.unmarked = next((i for i, p in enumerate(self.params) if is_unmarked_shard(p)), None)
        self.known: list[Known | None] = [None] * n
        self.range_of: list[tuple[int, int, int, int]] = [FlatRange.NOWHERE] * n
        self.numbers: dict[tuple[object, ...], int] = {}  # of sets of flat buffers
        self.memory_of: dict[int, list[weakref.ref[Tensor]]] = {}  # by these numbers
        self.memory: list[weakref.ref[Tensor]] = []  # flat, where segments lie: others may lie there once it dies
        steps, active = (torch.zeros(n, dtype=torch.float32, device=CPU) for _ in range(2))
        if goes_on:
            steps.copy_(self.counts.steps)
        else:
            self.history = torch.zeros(n, device=CPU)
        self.counts: Counts = Counts(steps, active, torch.zeros(n, dtype=torch.uint8, device=CPU))
        self._group_of = [g for g, _ in watch.places]
        self._known_row_keys = None
        self.averages = any(EMA in states for states, *_ in needs)
        self.beside = max((len(states) + storage.parts(states) for states, storage, _ in needs), default=0)
        self.own_segments = Segments.empty(n, self.beside)
        if any(type(t) is not Tensor for t in (self.control, self.own_segments.moving)):
            raise RuntimeError(
                f"the optimizer's own tensors would be {type(self.own_segments.moving).__name__}s: a step reads memory "
                "and cannot run under FakeTensorMode or another tensor mode, nor with an optimizer made under one"
            )
        if not goes_on:
            self.norms = Norms(self.params, self._group_of, len(self.groups), self.counting)
            self.window = self.norms.window = self.window.on(CPU if self.counting is None else self.counting)
        self.special: list[int] = [i for i, own in enumerate(watch.expected) if own[Expected.KIND] == Kind.SPECIAL]
        self.inspected, self.puts = {}, []
        self.buckets = []
        self.keys = self.written = None
        self._publish(watch)
        self.needs = needs
        return watch

    def _check_captured(self, watch: Watch) -> None:
        """Graphs count in the memory of this table, by its parameters and groups."""
        same = same_objects(watch.params, self.params) and watch.places == self.places
        bank = self.norms.bank
        if not (same and bank is not None and bank.device == self.counting):
            raise RuntimeError(
                "groups, parameters or their device were changed after a step was captured in a graph, whose replays "
                "would step what was there: call end_captures() when no graph is replayed any more, and capture again"
            )

    def _publish(self, watch: Watch) -> None:
        """Writes down what the next step compares, and what launches step."""
        ranges: list[tuple[int, ...]] = [()] * len(self.params)
        for expected, own in zip(watch.expected, self.range_of, strict=True):
            ranges[expected[Expected.SEGMENT]] = (*own, expected[Expected.NUMEL])
        numels = torch.tensor([own[FlatRange.NUMEL] for own in ranges], dtype=torch.int64, device=CPU)
        self.own_segments = Segments(self.own_segments.moving, self.own_segments.places, numels)
        flat = {own[FlatRange.BUFFER] for own in ranges} - {0}
        self.memory = [ref for number in flat for ref in self.memory_of[number]]
        self.runs: Segments = self.own_segments
        self.segments = self.runs
        self.ranges: Tensor | None = None
        firsts = [*(b.first for b in self.buckets), sum(len(b.members) for b in self.buckets)]
        if self.memory and native.C is not None:
            self.ranges = torch.tensor(ranges, dtype=torch.int64, device=CPU)
            self.runs = Segments(*map(torch.zeros_like, (self.runs.moving, self.runs.places, self.runs.capacities)))
        watch.publish(self.state, self.counts, firsts, self.own_segments, self.control, self.ranges, self.runs)
        self.run_firsts = watch.run_firsts
        self.launches, self._watching = None, {}

    # What differs from what the table has -----------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _inspect(self, watch: Watch, odd: Sequence[int]) -> None:
        """Inspects the given parameters, and lays out anew what they changed. Writes nothing of the optimizer."""
        grads = {i: self._gradient(self.params[i]) for i in odd}
        self.inspected.update(dict.fromkeys(odd))
        counts = self._counts_elsewhere(watch, odd)
        found = {i: self._inspect_one(watch, i, grad, counts.get(i)) for i, grad in grads.items() if grad is not None}
        self.inspected.update(found)
        for i, f in found.items():
            self._check_still_there(watch, i, f)
        if any(self._moved(i, f) for i, f in found.items()):
            self._check_overlaps(watch, found)
        special = {spec: self.resolve(spec).needs_tensors for spec in {f.known.spec for f in found.values()}}
        relayout = False
        before = {i: (watch.expected[i], watch.roles[i], watch.flat.get(i)) for i in found}
        for i, f in found.items():
            p, old = self.params[i], self.known[i]
            own = self._range(f)
            numel, now = watch.expected[i][Expected.NUMEL], numel_of(f.theta)
            relayout |= old is None or old.spec != f.known.spec or numel != now or own != self.range_of[i]
            self.range_of[i] = own
            f.known.segment = -1 if old is None else old.segment
            self.known[i] = f.known
            made = self._take_count(watch, i, f)
            relayout |= "step" in made
            if made or f.found is None:
                self.puts.append((i, p, f.found, f.own, made))
            self.counts.fresh[i] = f.fresh and self.counting is None
        if relayout:
            self._lay_out(watch)
        for i, f in found.items():
            p, group = self.params[i], watch.places[i][0]
            old_words = watch.expected[i]
            watch.expected[i], watch.roles[i] = expect(p, f, watch.names, group, special[f.known.spec])
            for word in (Expected.FIRST_ROLE, Expected.HELD, Expected.VIEW):  # written where all is published
                watch.expected[i][word] = old_words[word]
            watch.flat.pop(i, None)
            if watch.expected[i][Expected.KIND] == Kind.FLAT:
                watch.flat[i] = (p, f.grad_itself, *f.states)
            write_segment(self.own_segments, f.known.segment, f.roles, f.known.spec.scales)
        changed = any(_differs(before[i], watch, i) for i in found)
        if relayout or changed or self.launches is None:
            self._drop_missing_gradients(watch)
            self._publish(watch)
        watch.mark({i: Inspected.WITH_GRADIENT if i in found else Inspected.WITHOUT_GRADIENT for i in odd})
        active = [float(i in found) for i in odd]
        if self.counts.active[list(odd)].tolist() != active:
            self.counts.active[list(odd)] = torch.tensor(active, device=CPU, dtype=torch.float32)
            self.written = None
        for i in odd:
            if i not in found:
                self.own_segments.moving[watch.expected[i][Expected.SEGMENT], Moving.NUMEL] = 0
        self.special = [i for i, own in enumerate(watch.expected) if own[Expected.KIND] == Kind.SPECIAL]

    def _counts_elsewhere(self, watch: Watch, odd: Sequence[int]) -> dict[int, float]:
        """The step counts that are on a device, by position: read at once; of those that are ours, 1 stands for it."""
        kept = {}
        for i in odd:
            own = self.state.get(self.params[i])
            step = own.get("step") if isinstance(own, dict) else None
            if isinstance(step, Tensor) and step.device.type != "cpu":
                kept[i] = step
        found = {i: 1.0 for i, step in kept.items() if step is watch.views[i]}
        others = {i: step for i, step in kept.items() if i not in found and step.numel() == 1}
        if others and self.captures:
            raise _not_ready(f"the step count of {self._label(next(iter(others)))} is another tensor than before")
        return found | read_counts(others)

    def _inspect_one(self, watch: Watch, i: int, grad: Tensor, count: float | None) -> Finding:
        assert self.needs is not None
        p, (g, k) = self.params[i], watch.places[i]
        group = self.groups[g]
        own, old = self.state.get(p), self.known[i]
        what = label(group, g, k)
        given = self.references.get(p)
        return inspect(p, grad, own, self.rule, *self.needs[g], group, what, old, self.flat_states, count, given)

    def _take_count(self, watch: Watch, i: int, f: Finding) -> dict[str, Any]:
        """Makes the step count the table's own; returns what the state dictionary is to be given."""
        own, bank = watch.views[i], self.norms.bank
        steps = self.counts.steps if bank is None else bank.steps
        counted = False
        if own is not None:
            lies_here = own.data_ptr() == steps.data_ptr() + i * steps.itemsize
            counted = lies_here and f.own.get("step") is own
            if not counted:
                own.data = own.clone()  # whoever holds it keeps the count that it shows
        if bank is not None and (f.fresh or not counted):
            bank.fresh[i].fill_(float(f.fresh))
            self.counts.steps[i] = self._history("begun", i if counted else f.count, f.fresh)
        if counted:
            return f.put
        watch.views[i] = view = steps[i]
        view.fill_(f.count)
        return {"step": view, **f.put}

    def _drop_missing_gradients(self, watch: Watch) -> None:
        """Nothing is held of flat parameters without a gradient; the check says when it is back."""
        for i in [i for i in watch.flat if self._gradient(self.params[i]) is None]:
            del watch.flat[i]
            watch.expected[i][Expected.KIND] = Kind.ORDINARY

    def _moved(self, i: int, f: Finding) -> bool:
        """Does a tensor that is written lie elsewhere than before?"""
        known = self.known[i]
        if known is None or known.spec != f.known.spec or known.address != f.known.address:
            return True
        states = self.own_segments.places[known.segment, Place.ADDRESSES + 1 :].tolist()
        return states[: len(f.memory)] != [t.data_ptr() for t in f.memory]

    def _check_overlaps(self, watch: Watch, found: dict[int, Finding]) -> None:
        assert self.needs is not None
        extents = []
        for i, (p, (g, k)) in enumerate(zip(self.params, watch.places, strict=True)):
            if i not in found and self.known[i] is None:
                continue
            what, f = label(self.groups[g], g, k), found.get(i)
            if f is None:
                own = self.state.get(p, {})
                lies = local(p).detach()
                states = {s.name: local(t) for s in self.states if isinstance(t := own.get(s.name), Tensor)}
            else:
                lies = f.theta if f.gapped is None else f.gapped
                states = dict(zip(f.known.spec.beside, f.memory, strict=True))
            extents.append(Extent(lies, what))
            for name, t in states.items():
                extents.append(Extent(t, f"a state of {what}", written=name != REFERENCE.name))
        check_disjoint(extents)

    def _range(self, f: Finding) -> tuple[int, int, int, int]:
        """Where a parameter lies in flat buffers: FlatRange's first words. A complex element counts as two."""
        if f.place is None:
            return FlatRange.NOWHERE
        memory, offset = f.place.memory, f.place.offset
        bases = [base for base in (memory.data, memory.grad, *f.bases) if base is not None]
        key = (memory, memory.grad_address, *(base.data_ptr() for base in f.bases))
        number = self.numbers.setdefault(key, len(self.numbers) + 1)
        self.memory_of[number] = [weakref.ref(base) for base in bases]
        # Padding is nobody's, but it would count in the last tile of a state in 8 bits: no run goes over it there.
        end = offset + (f.place.numel if f.known.spec.scales else padded(f.place.numel))
        scale = 2 if f.theta.is_complex() else 1
        grad = memory.grad_address and memory.grad_address + offset * f.theta.itemsize
        return number, scale * offset, scale * end, grad

    def _lay_out(self, watch: Watch) -> None:
        """Sorts the segments by bucket, keeping the records of those that were there."""
        by_spec: dict[Spec, list[int]] = {}
        for i, known in enumerate(self.known):
            if known is not None:
                by_spec.setdefault(known.spec, []).append(i)
        self.buckets = []
        order: list[int] = []
        for spec, members in by_spec.items():
            members.sort(key=lambda i: self.range_of[i][:2])  # neighbours in a flat buffer are neighbours here
            self.buckets.append(Bucket(spec, self.resolve(spec), len(self.buckets), len(order), members))
            order += members
        devices = {spec.device for spec in by_spec}
        self.device_copies = {device: own for device, own in self.device_copies.items() if device in devices}
        order += [i for i, known in enumerate(self.known) if known is None]
        first = origins(self.params) if self.origins is None else [self.origins[id(p)] for p in self.params]
        old, self.own_segments = self.own_segments, Segments.empty(len(order), self.beside)
        for segment, i in enumerate(order):
            known = self.known[i]
            if known is not None:
                if known.segment >= 0:
                    self.own_segments.moving[segment] = old.moving[known.segment]
                    self.own_segments.places[segment] = old.places[known.segment]
                known.segment = segment
                origin = first[i]
                if any(fmt.stochastic for fmt in known.spec.formats):
                    origin += shard_offset(self.params[i])
                elif self.range_of[i] != FlatRange.NOWHERE:  # nothing reads it: neighbours in memory are to be one run
                    origin = self.range_of[i][FlatRange.OFFSET]
                self.own_segments.places[segment, Place.ORIGIN] = origin
                self.own_segments.places[segment, Place.OUTPUT] = self.norms.sum_of(i).data_ptr()
            watch.expected[i][Expected.SEGMENT] = segment


def _not_ready(why: str) -> RuntimeError:
    return RuntimeError(
        f"a step is captured in a graph, and {why}: take one outside of the graph first, with the same "
        "parameters, after zero_grad() and a backward pass: nothing of this one was computed"
    )


def _differs(before: tuple[Any, Any, Any], watch: Watch, i: int) -> bool:
    """Has what is expected of a parameter changed?"""
    expected, roles, flat = before
    unmarked = [own[: Expected.INSPECTED] for own in (expected, watch.expected[i])]
    now = watch.flat.get(i)
    same_objects = flat is now or (
        flat is not None and now is not None and all(a is b for a, b in zip(flat, now, strict=True))
    )
    same_specs = all(a.spec is b.spec for a, b in zip(roles, watch.roles[i], strict=False))
    return unmarked[0] != unmarked[1] or not same_specs or roles != watch.roles[i] or not same_objects
