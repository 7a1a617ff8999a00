"""TensorTable: every tensor of an optimizer end to end in one virtual flat index space.

A segment (one parameter) holds an address per role, its place in the flat space of its bucket, and the row of scalars
it uses (csrc/table.h has the record). A bucket is the segments that one launch steps: one device, one storage format
for every role. Tensors lie where torch put them; only the table knows that they are flat.

Nothing is cached unchecked. Each step compares the live groups, parameters, gradients and states with what the table
was built from (`walking`); only what differs is inspected again (`mending`), and nothing of the optimizer is written
before all of it has passed.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, flat, mending, walking
from .flat_states import FlatStates
from .mirror import Mirror
from .records import WORDS, Expected, Kind, Lie, Seen, Segment
from .rules import Hyper, Rule
from .slots import Bucket, Slot, Spec

__all__ = ["TensorTable"]

CPU = torch.device("cpu")  # the table's own memory, whatever the default device


class TensorTable:
    """The segments, rows and step counts of one optimizer.

    Args:
        rule: what is stepped.
        resolve: gives the backend for a bucket's Spec, or raises.

    Attributes:
        segments: int64 [n, 12], a record per parameter.
        runs: int64 [m, 12], what a launch reads: the segments, where neighbours in flat buffers are one.
        capacities: int64 [m], the most elements that each run may have until the runs change.
        steps: float32 [n], the step counts; `state[p]["step"]` is a view of one of them.
        active: float32 [n], 1 for a parameter with a gradient in this step.
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
        self.mirrors: dict[torch.device, Mirror] = {}  # what other devices have of this table
        self.buckets: list[Bucket] = []
        self.runs, self.capacities = torch.empty(0), torch.empty(0)
        self.any_fresh = False
        self.flat_states = FlatStates()
        self.generation = flat.generation()
        self.forget()

    def forget(self) -> None:
        """Drops what is known of the tensors; the next refresh inspects all of them."""
        self.needs: list[tuple[str, ...]] | None = None
        self.held: object = None  # flat parameters, gradients and states, for walk
        self.buffers: list[weakref.ref[Tensor]] = []  # where segments lie: other tensors may lie there once they die
        self.keep: list[Tensor] = []  # gradients of this step: another thread may drop them meanwhile

    # The way of a step ------------------------------------------------------------------------------------------------

    def refresh(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], hypers: Sequence[Hyper]
    ) -> list[tuple[int, int, bool]]:
        """Brings the table up to date with the live tensors; returns the keys of this step's rows.

        Makes the state of parameters that have their first gradient. Raises before anything of the optimizer was
        written; the table then starts anew with the next refresh.
        """
        needs = [static[-1] for static, *_ in hypers]
        if not isinstance(state, dict):
            raise TypeError(f"the optimizer's state is a {type(state).__name__}: expected a dict")
        self.groups, self.state = groups, state
        if self.generation != flat.generation() or any(ref() is None for ref in self.buffers):
            self.generation = flat.generation()
            self.forget()
        try:
            found = walking.walk(self) if needs == self.needs else None
            if found is None:
                with torch.inference_mode(False):  # what is made here outlives the caller's mode
                    self._start(needs)
                found = walking.walk(self)
                assert found is not None
            odd, changed, self.keep = found
            if odd:
                with torch.inference_mode(False), torch.no_grad():
                    mending.mend(self, odd)
            if odd or changed:
                self.stepped = [p for p, on in zip(self.params, self.active.tolist(), strict=True) if on]
            keys = walking.assign(self)
            self._take_runs()
            return keys
        except BaseException:
            self.forget()
            raise

    def _take_runs(self) -> None:
        if self.lies is not None:
            count = int(self.run_firsts[-1])
            self.runs, self.capacities = self.room_for_runs[:count], self.room_for_capacities[:count]

    def launch(self, rows: Tensor) -> bool:
        """Steps every bucket and advances the step counts; False: the step was skipped (`control`), and not counted.

        The counts go first, and back if a launch fails: where torch allows no write (inside a torch.func transform,
        say), it says so before anything else was written.
        """
        try:
            launches = backends.prepare(self, rows)
            _, skip = self.control.tolist()
            counted = self.active if skip == 0 else torch.zeros_like(self.active)
            torch.autograd.graph.increment_version(self.stepped)
            self.steps += counted
            try:
                for go in launches:
                    go()
            except BaseException:
                self.steps -= counted
                raise
        finally:
            self.keep = []
        if self.any_fresh and counted is self.active:
            self.fresh.zero_()
            self.any_fresh = False
        for i in self.gapped:
            slot = self.slots[i]
            if slot is not None and slot.param_copy is not None and self.active[i]:
                self.params[i].detach().copy_(slot.param_copy)
        return counted is self.active

    def tensors(self, i: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...], int]:
        """Parameter, gradient, states and row of parameter `i`, for a backend that works on tensors."""
        slot, p = self.slots[i], self.params[i]
        assert slot is not None
        assert self.needs is not None
        own, names = self.state[p], self.needs[self.places[i][0]]
        theta = p if slot.param_copy is None else slot.param_copy
        grad = p.grad if slot.grad_copy is None else slot.grad_copy
        assert grad is not None
        return theta, grad, tuple(own[name] for name in names), int(self.words[slot.segment * WORDS + Segment.ROW])

    def span(self, bucket: Bucket) -> tuple[int, int]:
        """(first, count) of the runs of a bucket in this step."""
        if self.lies is None:
            return bucket.first, len(bucket.slots)
        first, end = self.run_firsts[bucket.index : bucket.index + 2].tolist()
        return first, end - first

    # Building ---------------------------------------------------------------------------------------------------------

    def _start(self, needs: list[tuple[str, ...]]) -> None:
        """An empty table for the groups' parameters: none inspected, all step counts the table's own."""
        self.forget()
        self.needs = needs
        for g, group in enumerate(self.groups):
            if not isinstance(group, dict):
                raise TypeError(f"param group {g} is a {type(group).__name__}: expected a dict")
            if not isinstance(group["params"], (list, tuple)):
                group["params"] = list(group["params"])
        self.params = [p for group in self.groups for p in group["params"]]
        self.places = [(g, k) for g, group in enumerate(self.groups) for k in range(len(group["params"]))]
        self.index = {id(p): i for i, p in enumerate(self.params)}
        self.ids = torch.tensor(list(map(id, self.params)), dtype=torch.int64, device=CPU)
        n = len(self.params)
        self.slots: list[Slot | None] = [None] * n
        self.views: list[Tensor | None] = [None] * n  # the views of `steps` that the state dictionaries hold
        self.dims_of: list[tuple[int, ...]] = [()] * n
        self.expected_of = [
            [Kind.UNSEEN, i, 0, 0, 0, 0, 0, 0, 0, 0, g, 0, 0, 0, 0] for i, (g, _) in enumerate(self.places)
        ]
        self.lie_of: list[tuple[int, int, int, int]] = [Lie.NOWHERE] * n
        self.numbers: dict[tuple[object, ...], int] = {}  # of sets of flat buffers
        self.buffers_of: dict[int, list[weakref.ref[Tensor]]] = {}  # by these numbers
        self.segments = torch.zeros(n, WORDS, dtype=torch.int64, device=CPU)
        self.steps = torch.zeros(n, dtype=torch.float32, device=CPU)
        self.active = torch.zeros(n, dtype=torch.float32, device=CPU)
        self.fresh = torch.zeros(n, dtype=torch.uint8, device=CPU)
        self.seen = torch.zeros(n, Seen.WORDS, dtype=torch.int64, device=CPU)  # walk's own notes
        if any(type(t) is not Tensor for t in (self.control, self.segments)):
            raise RuntimeError(
                f"the table's tensors would be {type(self.segments).__name__}s: a step reads memory and cannot run "
                "under FakeTensorMode or another tensor mode, nor with an optimizer made under one"
            )
        self.notes = (ctypes.c_int64 * self.seen.numel()).from_address(self.seen.data_ptr())
        self.any_fresh = False
        self.gapped: list[int] = []
        self.buckets = []
        self.names = ("step", *max(needs, key=len, default=()))
        self.note_order()
        self.publish()

    def note_order(self) -> None:
        """Which parameter each entry of the state belongs to, in order: walk then needs no hash of a tensor."""
        self.order_of = [self.index.get(id(key), -1) for key in self.state]
        self.order = torch.tensor(self.order_of, dtype=torch.int64, device=CPU)

    def publish(self) -> None:
        """Hands the expectations to walk, as memory."""
        at = 0
        flat: list[int] = []
        for expected, dims in zip(self.expected_of, self.dims_of, strict=True):
            expected[Expected.DIMS] = at
            flat += dims
            at += len(dims)
        self.expected = torch.tensor(self.expected_of, dtype=torch.int64, device=CPU)
        self.dims = torch.tensor(flat, dtype=torch.int64, device=CPU)
        firsts = [*(b.first for b in self.buckets), sum(len(b.slots) for b in self.buckets)]
        self.firsts = torch.tensor(firsts, dtype=torch.int64, device=CPU)
        lies: list[tuple[int, ...]] = [()] * len(self.params)
        for expected, lie in zip(self.expected_of, self.lie_of, strict=True):
            lies[expected[Expected.SEGMENT]] = (*lie, expected[Expected.NUMEL])
        self.capacities = torch.tensor([lie[Lie.NUMEL] for lie in lies], dtype=torch.int64, device=CPU)
        self.buffers = [ref for number in {lie[Lie.BUFFER] for lie in lies} - {0} for ref in self.buffers_of[number]]
        if self.buffers:
            self.lies: Tensor | None = torch.tensor(lies, dtype=torch.int64, device=CPU)
            self.room_for_runs, self.run_firsts = torch.zeros_like(self.segments), torch.zeros_like(self.firsts)
        else:
            self.lies, self.runs = None, self.segments
            self.room_for_runs, self.run_firsts = self.segments, self.firsts
        self.room_for_capacities = self.capacities
        self.words = (ctypes.c_int64 * self.segments.numel()).from_address(self.segments.data_ptr())
