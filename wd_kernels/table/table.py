"""TensorTable: every tensor of an optimizer end to end in one virtual flat index space.

A segment (one parameter) holds an address per role, how many elements it has, and the row of scalars it uses
(`wd_kernels/layout.py` has the records). A bucket is the segments that one launch steps: one device, one storage format
for every role. Tensors lie where torch put them; only the table knows that they are flat.

Nothing is cached unchecked. Each step compares the live groups, parameters, gradients and states with what the table
was built from (`changes.py`); only what differs is inspected again (`inspection.py`), and nothing of the optimizer is
written before all of it has passed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import backends, native
from ..flat import buffers
from ..flat.states import FlatStates
from ..layout import CPU, Bucket, Moving, Place, Segments, Spec, Tensors, numel_of, write_segment
from ..rules import Hyper, Rule, State
from ..validation import Extent, check_disjoint, label
from .changes import Counts, Expected, FlatRange, Keys, Kind, Watch, expect
from .inspection import Finding, Known, inspect

__all__ = ["TensorTable"]


class TensorTable:
    """The segments, rows and step counts of one optimizer.

    Args:
        rule: what is stepped.
        resolve: gives the backend for a bucket's Spec, or raises.

    Attributes:
        counts: `state[p]["step"]` is a view of one of its steps.
        control: float64 [2], the gradient factor and the skip flag that every launch reads.
        buckets: the launches of a step.
        stepped: the parameters that this step writes.
    """

    def __init__(self, rule: Rule, resolve: Callable[[Spec], Any]) -> None:
        self.rule, self.resolve = rule, resolve
        self.control = torch.tensor([1.0, 0.0], dtype=torch.float64, device=CPU)
        self.params: list[Tensor] = []
        self.stepped: list[Tensor] = []
        self.lock = threading.RLock()
        self.device_copies: dict[torch.device, Any] = {}
        self.buckets: list[Bucket] = []
        self.any_fresh = False
        self.segments = Segments.empty(0, 0)
        self.run_firsts = torch.empty(0, dtype=torch.int64, device=CPU)
        self.flat_states = FlatStates()
        self.generation = buffers.generation()
        self.forget()

    def forget(self) -> None:
        """Drops what is known of the tensors; the next refresh inspects all of them."""
        self.needs: list[tuple[State, ...]] | None = None
        self.memory: list[weakref.ref[Tensor]] = []  # flat, where segments lie: others may lie there once it dies
        self.keep: list[Tensor] = []  # gradients of this step: another thread may drop them meanwhile
        self.watch: Watch | None = None
        self.launches: backends.Prepared | None = None

    # The way of a step ------------------------------------------------------------------------------------------------

    def refresh(self, groups: list[dict[str, Any]], state: dict[Any, Any], hypers: Sequence[Hyper]) -> Keys:
        """Brings the table up to date with the live tensors; returns the keys of this step's rows.

        Makes the state of parameters that have their first gradient. Raises before anything of the optimizer was
        written; the table then starts anew with the next refresh.
        """
        needs = [settings.states for settings, *_ in hypers]
        if not isinstance(state, dict):
            raise TypeError(f"the optimizer's state is a {type(state).__name__}: expected a dict")
        self.groups, self.state = groups, state
        if self.generation != buffers.generation() or any(ref() is None for ref in self.memory):
            self.generation = buffers.generation()
            self.forget()
        try:
            found = self.watch.refresh(groups, state) if self.watch and needs == self.needs else None
            if found is None:
                with torch.inference_mode(False):  # what is made here outlives the caller's mode
                    watch = self._start(needs)
                found = watch.refresh(groups, state)
                assert found is not None
            assert self.watch is not None
            odd, changed, self.keep, keys = found
            if odd:
                with torch.inference_mode(False), torch.no_grad():
                    self._inspect_again(odd)
            if odd or changed:
                self.stepped = [p for p, on in zip(self.params, self.active.tolist(), strict=True) if on]
            if keys is None:
                keys = self.watch.assign_rows()
            if self.ranges is not None:
                self._take_runs(self.watch.run_firsts)
            return keys
        except BaseException:
            self.forget()
            raise

    def _take_runs(self, firsts: Tensor) -> None:
        count = int(firsts[-1])
        runs = Segments(self.runs.moving[:count], self.runs.places[:count], self.runs.capacities[:count])
        if not torch.equal(firsts, self.run_firsts) or not torch.equal(runs.capacities, self.segments.capacities):
            self.launches = None
            self.run_firsts = firsts.clone()
            self.segments = Segments(runs.moving, runs.places, runs.capacities.clone())

    def launch(self, rows: Tensor) -> bool:
        """Steps every bucket and advances the step counts; False: the step was skipped (`control`), and not counted.

        The counts go first, and back if a launch fails: where torch allows no write (inside a torch.func transform,
        say), it says so before anything else was written.
        """
        try:
            if self.launches is None:
                self.launches = backends.prepare(self)
            launches = self.launches(rows)
            _, skip = self.control.tolist()
            counted = self.active if skip == 0 else torch.zeros_like(self.active)
            torch.autograd.graph.increment_version(self.stepped)
            self.counts.steps.add_(counted)
            try:
                for go in launches:
                    go()
            except BaseException:
                self.counts.steps.sub_(counted)
                raise
        finally:
            self.keep = []
        if self.any_fresh and counted is self.active:
            self.counts.fresh.zero_()
            self.any_fresh = False
        for i in self.gapped:
            known = self.known[i]
            if known is not None and known.param_copy is not None and self.active[i]:
                self.params[i].detach().copy_(known.param_copy)
        return counted is self.active

    # What a backend reads (layout.Table) ------------------------------------------------------------------------------

    @property
    def active(self) -> Tensor:
        return self.counts.active

    def tensors(self, i: int) -> Tensors:
        known, p = self.known[i], self.params[i]
        assert known is not None
        theta = p if known.param_copy is None else known.param_copy
        grad = p.grad if known.grad_copy is None else known.grad_copy
        assert grad is not None
        row = int(self.own_segments.moving[known.segment, Moving.ROW])
        return Tensors(theta, grad, {name: self.state[p][name] for name in known.spec.states}, row)

    def span(self, bucket: Bucket) -> tuple[int, int]:
        if self.ranges is None:
            return bucket.first, len(bucket.members)
        first, end = self.run_firsts[bucket.index : bucket.index + 2].tolist()
        return first, end - first

    # Building ---------------------------------------------------------------------------------------------------------

    def _start(self, needs: list[tuple[State, ...]]) -> Watch:
        """An empty table for the groups' parameters: none inspected, all step counts the table's own."""
        self.forget()
        for g, group in enumerate(self.groups):
            if not isinstance(group, dict):
                raise TypeError(f"param group {g} is a {type(group).__name__}: expected a dict")
            if not isinstance(group["params"], (list, tuple)):
                group["params"] = list(group["params"])
        watch = Watch(self.groups, ("step", *(state.name for state in self.rule.states)))
        self.params, n = watch.params, len(watch.params)
        self.known: list[Known | None] = [None] * n
        self.views: list[Tensor | None] = [None] * n  # the views of the step counts that the state dictionaries hold
        self.range_of: list[tuple[int, int, int, int]] = [FlatRange.NOWHERE] * n
        self.numbers: dict[tuple[object, ...], int] = {}  # of sets of flat buffers
        self.memory_of: dict[int, list[weakref.ref[Tensor]]] = {}  # by these numbers
        steps, active = (torch.zeros(n, dtype=torch.float32, device=CPU) for _ in range(2))
        self.counts = Counts(steps, active, torch.zeros(n, dtype=torch.uint8, device=CPU))
        self.own_segments = Segments.empty(n, len(self.rule.states))
        if any(type(t) is not Tensor for t in (self.control, self.own_segments.moving)):
            raise RuntimeError(
                f"the optimizer's own tensors would be {type(self.own_segments.moving).__name__}s: a step reads memory "
                "and cannot run under FakeTensorMode or another tensor mode, nor with an optimizer made under one"
            )
        self.any_fresh = False
        self.gapped: list[int] = []
        self.buckets = []
        self.watch = watch
        self._publish(watch)
        self.needs = needs
        return watch

    def _publish(self, watch: Watch) -> None:
        """Writes down what the next step compares, and what launches step."""
        ranges: list[tuple[int, ...]] = [()] * len(self.params)
        for expected, own in zip(watch.expected, self.range_of, strict=True):
            ranges[expected[Expected.SEGMENT]] = (*own, expected[Expected.NUMEL])
        numels = torch.tensor([own[FlatRange.NUMEL] for own in ranges], dtype=torch.int64, device=CPU)
        self.own_segments = Segments(self.own_segments.moving, self.own_segments.places, numels)
        flat = {own[FlatRange.BUFFER] for own in ranges} - {0}
        self.memory = [ref for number in flat for ref in self.memory_of[number]]
        self.segments = self.runs = self.own_segments
        self.ranges: Tensor | None = None
        firsts = [*(b.first for b in self.buckets), sum(len(b.members) for b in self.buckets)]
        if self.memory and native.C is not None:
            self.ranges = torch.tensor(ranges, dtype=torch.int64, device=CPU)
            self.runs = Segments(*map(torch.zeros_like, (self.runs.moving, self.runs.places, self.runs.capacities)))
            self.run_firsts = torch.full((len(firsts),), -1, dtype=torch.int64, device=CPU)
        watch.publish(self.state, self.counts, firsts, self.own_segments, self.ranges, self.runs)
        self.launches = None

    # What differs from what the table has -----------------------------------------------------------------------------

    def _inspect_again(self, odd: Sequence[int]) -> None:
        """Inspects the given parameters: all checks and allocations first, then the writes."""
        watch = self.watch
        assert watch is not None
        found = {i: self._inspect(i) for i in odd}
        if any(self._moved(i, f) for i, f in found.items()):
            self._check_overlaps(found)
        for spec in {f.known.spec for f in found.values()}:
            self.resolve(spec)
        steps = self.counts.steps
        views = {  # step counts that are not yet the table's own
            i: steps[i] for i, f in found.items() if self.views[i] is None or f.own.get("step") is not self.views[i]
        }

        relayout = False
        for i, f in found.items():  # from here on nothing raises
            p, old = self.params[i], self.known[i]
            own = self._range(p, f)
            numel = watch.expected[i][Expected.NUMEL]
            relayout |= old is None or old.spec != f.known.spec or numel != numel_of(p) or own != self.range_of[i]
            self.range_of[i] = own
            f.known.segment = -1 if old is None else old.segment
            self.known[i] = f.known
            if i in views:
                superseded = self.views[i]
                if superseded is not None:  # whoever holds it keeps the count that it shows
                    superseded.data = superseded.clone()
                self.views[i], steps[i] = views[i], f.count
                f.put = {"step": views[i], **f.put}
            new_entry = self.state.get(p) is not f.own
            f.own.update(f.put)
            if new_entry:
                self.state[p] = f.own
            relayout |= new_entry
            if f.fresh:
                self.counts.fresh[i] = 1
                self.any_fresh = True
        if relayout:
            self._lay_out(watch)
        before = [(watch.expected[i], watch.roles[i]) for i in odd]
        for (i, f), (old_expected, _) in zip(found.items(), before, strict=True):
            group = watch.places[i][0]
            watch.expected[i], watch.roles[i] = expect(self.params[i], f, watch.names, self.views[i], group)
            watch.expected[i][Expected.FIRST_ROLE] = old_expected[Expected.FIRST_ROLE]
            write_segment(self.own_segments, f.known.segment, f.roles)
            self.keep.append(f.grad)
        after = [(watch.expected[i], watch.roles[i]) for i in odd]
        if relayout or before != after or any(watch.expected[i][Expected.KIND] == Kind.FLAT for i in odd):
            self._hold(watch)
            self._publish(watch)
        self.gapped = [i for i, known in enumerate(self.known) if known and known.param_copy is not None]

    def _inspect(self, i: int) -> Finding:
        assert self.watch is not None
        assert self.needs is not None
        p, (g, k) = self.params[i], self.watch.places[i]
        group = self.groups[g]
        own, old = self.state.get(p), self.known[i]
        return inspect(p, own, self.rule, self.needs[g], group, label(group, g, k), old, self.flat_states)

    def _moved(self, i: int, f: Finding) -> bool:
        """Does a tensor that is written lie elsewhere than before?"""
        known = self.known[i]
        if known is None or known.spec != f.known.spec or known.address != f.known.address:
            return True
        states = self.own_segments.places[known.segment, Place.ADDRESSES + 1 :].tolist()
        return states[: len(f.states)] != [t.data_ptr() for t in f.states]

    def _check_overlaps(self, found: dict[int, Finding]) -> None:
        assert self.watch is not None
        assert self.needs is not None
        extents = []
        for i, (p, (g, k)) in enumerate(zip(self.params, self.watch.places, strict=True)):
            if i not in found and self.known[i] is None:
                continue
            what = label(self.groups[g], g, k)
            own = self.state.get(p, {})
            states = found[i].states if i in found else [own.get(state.name) for state in self.needs[g]]
            extents.append(Extent(p.detach(), what))
            extents += [Extent(s, f"a state of {what}") for s in states if isinstance(s, Tensor)]
        check_disjoint(extents)

    def _range(self, p: Tensor, f: Finding) -> tuple[int, int, int, int]:
        """Where a parameter lies in flat buffers: FlatRange's first words. A complex element counts as two."""
        if f.place is None:
            return FlatRange.NOWHERE
        buffer, offset = f.place.buffer, f.place.offset
        bases = [base for base in (buffer.data, buffer.grad, *f.bases) if base is not None]
        key = (buffer, buffer.grad_address, *(base.data_ptr() for base in f.bases))
        number = self.numbers.setdefault(key, len(self.numbers) + 1)
        self.memory_of[number] = [weakref.ref(base) for base in bases]
        end = offset + buffers.padded(f.place.numel)
        scale = 2 if p.is_complex() else 1
        grad = buffer.grad_address and buffer.grad_address + offset * p.itemsize
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
        sizes = (0 if is_lazy(p) else buffers.padded(p.numel()) * (2 if p.is_complex() else 1) for p in self.params)
        origins = [0, *accumulate(sizes)]
        old, self.own_segments = self.own_segments, Segments.empty(len(order), len(self.rule.states))
        for segment, i in enumerate(order):
            known = self.known[i]
            if known is not None:
                if known.segment >= 0:
                    self.own_segments.moving[segment] = old.moving[known.segment]
                    self.own_segments.places[segment] = old.places[known.segment]
                known.segment = segment
                self.own_segments.places[segment, Place.ORIGIN] = origins[i]
            watch.expected[i][Expected.SEGMENT] = segment

    def _hold(self, watch: Watch) -> None:
        """Holds the tensors of flat parameters, which native code compares through handles."""
        tensors: list[Tensor] = []
        for i, expected in enumerate(watch.expected):
            p, known = self.params[i], self.known[i]
            if expected[Expected.KIND] != Kind.FLAT or known is None:
                continue
            if p.grad is None:  # not in this step; the check says when it is back
                expected[Expected.KIND] = Kind.ORDINARY
                continue
            expected[Expected.HELD] = len(tensors)
            tensors += (p, p.grad, *(self.state[p][name] for name in known.spec.states))
        watch.hold(tensors)
