"""TensorTable: every tensor of an optimizer end to end in one virtual flat index space.

A segment (one parameter) holds an address per role, its place in the flat space of its bucket, and the row of scalars
it uses (csrc/table.h has the record). A bucket is the segments that one launch steps: one device, one storage format
for every role. Tensors lie where torch put them; only the table knows that they are flat.

Nothing is cached unchecked. Each step compares the live groups, parameters, gradients and states with what the table
was built from (`walk`); only what differs is inspected again, and nothing of the optimizer is written before all of it
has passed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import walking
from .checks import (
    Extent,
    check_disjoint,
    check_gradient,
    check_memory,
    check_parameter,
    conform_state,
    is_dense,
    label,
    same_layout,
    step_count,
)
from .rules import Hyper, Rule
from .storage import Format, format_of, state_dtype

__all__ = ["GRAD", "PARAM", "STATE", "Bucket", "Slot", "Spec", "TensorTable"]

WORDS = 12  # int64 words of a segment, and of what walk expects of a parameter
PARAM, GRAD, STATE = 0, 1, 2  # roles: positions of the addresses in a segment
START, NUMEL, ROW, ALIGNED = 8, 9, 10, 11
ORDINARY, SPECIAL, UNSEEN = 0, 1, 2  # kinds of parameters: SPECIAL is inspected every step
MADE_LATER = ("momentum_buffer", "max_exp_avg_sq")  # states that may begin at any step count


@dataclass(frozen=True)
class Spec:
    """What the segments of a bucket share: the device, and the format of parameter, gradient and each state."""

    device: torch.device
    formats: tuple[Format, ...]


@dataclass
class Slot:
    """One parameter that has had a gradient, as the table knows it."""

    spec: Spec
    states: tuple[Tensor, ...]
    param_copy: Tensor | None = None  # dense stand-in for a parameter with gaps, copied back after the step
    grad_copy: Tensor | None = None  # for a gradient with other strides, or a conjugate or negative bit
    segment: int = -1


@dataclass
class Bucket:
    """A range of segments for one launch."""

    spec: Spec
    backend: Any
    first: int
    slots: list[int] = field(default_factory=list)

    @property
    def codes(self) -> list[int]:
        return [fmt.code for fmt in self.spec.formats]


@dataclass
class _Found:
    """The outcome of an inspection: a slot, and what the state dictionary must be given."""

    slot: Slot
    own: dict[str, Any]
    put: dict[str, Tensor]
    count: float | None  # a step count that is not the table's own
    fresh: bool


class TensorTable:
    """The segments, rows and step counts of one optimizer.

    Args:
        rule: what is stepped.
        resolve: gives the backend for a bucket's Spec, or raises.

    Attributes:
        segments: int64 [n, 12], a record per parameter.
        steps: float32 [n], the step counts; `state[p]["step"]` is a view of one of them.
        control: float64 [2], the gradient factor and the skip flag that every launch reads.
        buckets: the launches of a step.
        stepped: the parameters that this step writes.
    """

    def __init__(self, rule: Rule, resolve: Callable[[Spec], Any]) -> None:
        self.rule, self.resolve = rule, resolve
        self.control = torch.tensor([1.0, 0.0], dtype=torch.float64)
        self.forget()

    def forget(self) -> None:
        """Drops what is known of the tensors; the next refresh inspects all of them."""
        self.needs: list[tuple[str, ...]] | None = None

    # The way of a step ------------------------------------------------------------------------------------------------

    def refresh(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], hypers: Sequence[Hyper]
    ) -> list[tuple[int, int, bool]]:
        """Brings the table up to date with the live tensors; returns the keys of this step's rows.

        Makes the state of parameters that have their first gradient. Raises before anything of the optimizer was
        written; the table then starts anew with the next refresh.
        """
        needs = [static[-1] for static, _, _ in hypers]
        try:
            found = walking.walk(self, groups, state) if needs == self.needs else None
            if found is None:
                self._start(groups, state, needs)
                found = walking.walk(self, groups, state)
                assert found is not None
            odd, changed = found
            if odd:
                self._mend(odd, groups, state)
            if odd or changed:
                self.stepped = [p for p, on in zip(self.params, self.active.tolist(), strict=True) if on]
            return walking.assign(self)
        except BaseException:
            self.forget()
            raise

    def launch(self, rows: Tensor) -> None:
        """Steps every bucket, then advances the step counts."""
        torch.autograd.graph.increment_version(self.stepped)
        for bucket in self.buckets:
            bucket.backend.step(self, bucket, rows)
        self.steps += self.active
        if self.any_fresh:
            self.fresh.zero_()
            self.any_fresh = False
        for i in self.gapped:
            if self.active[i]:
                self.params[i].copy_(self.slots[i].param_copy)  # type: ignore[union-attr, arg-type]

    def tensors(self, i: int) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Parameter, gradient and states of slot `i`, as a backend that works on tensors wants them."""
        slot = self.slots[i]
        assert slot is not None
        p = self.params[i]
        return (
            p if slot.param_copy is None else slot.param_copy,
            p.grad if slot.grad_copy is None else slot.grad_copy,
            slot.states,
        )

    def row_of(self, i: int) -> int:
        """The index of slot `i`'s row in this step's matrix of rows."""
        slot = self.slots[i]
        assert slot is not None
        return self.words[slot.segment * WORDS + ROW]

    # Building ---------------------------------------------------------------------------------------------------------

    def _start(self, groups: list[dict[str, Any]], state: dict[Any, Any], needs: list[tuple[str, ...]]) -> None:
        """An empty table for these parameters: none inspected, step counts all the table's own."""
        self.needs = needs
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.places = [(g, k) for g, group in enumerate(groups) for k in range(len(group["params"]))]
        n = len(self.params)
        self.slots: list[Slot | None] = [None] * n
        self.held: list[tuple[Any, ...]] = [()] * n
        self.dims_of: list[tuple[int, ...]] = [()] * n
        self.expected_of = [[UNSEEN, i, 0, 0, 0, 0, 0, 0, 0, 0, g, 0] for i, (g, _) in enumerate(self.places)]
        self.segments = torch.zeros(n, WORDS, dtype=torch.int64)
        self.steps = torch.zeros(n, dtype=torch.float32)
        self.active = torch.zeros(n, dtype=torch.float32)
        self.fresh = torch.zeros(n, dtype=torch.uint8)
        self.seen = torch.zeros(n, 8, dtype=torch.int64)  # walk's own notes
        self.any_fresh = False
        self.gapped: list[int] = []
        self.buckets: list[Bucket] = []
        self.stepped: list[Tensor] = []
        self.names = ("step", *max(needs, key=len, default=()))
        self._snapshot(state)
        self._publish()

    def _snapshot(self, state: dict[Any, Any]) -> None:
        self.keys, self.values = list(state.keys()), list(state.values())

    def _publish(self) -> None:
        """Hands the expectations to walk, as memory."""
        at = 0
        flat: list[int] = []
        for expected, dims in zip(self.expected_of, self.dims_of, strict=True):
            expected[3] = at
            flat += dims
            at += len(dims)
        self.expected = torch.tensor(self.expected_of, dtype=torch.int64).view(-1, WORDS)
        self.dims = torch.tensor(flat, dtype=torch.int64)
        self.firsts = torch.tensor([*(b.first for b in self.buckets), *self._end()], dtype=torch.int64)
        self.words = (ctypes.c_int64 * self.segments.numel()).from_address(self.segments.data_ptr())

    def _end(self) -> list[int]:
        return [self.buckets[-1].first + len(self.buckets[-1].slots)] if self.buckets else [0]

    # Inspecting what differs ------------------------------------------------------------------------------------------

    def _mend(self, odd: Sequence[int], groups: list[dict[str, Any]], state: dict[Any, Any]) -> None:
        """Inspects the given parameters anew: all checks and allocations first, then the writes."""
        found = {i: self._inspect(i, groups, state) for i in odd}
        moved = [i for i in odd if self._moved(i, found[i].slot)]
        if moved:
            self._check_overlaps(found, groups)
        for spec in {f.slot.spec for f in found.values()}:
            self.resolve(spec)
        views = {i: self.steps[i] for i in odd if not self._own_step(i, found[i].own)}

        relayout = False
        for i, f in found.items():
            old = self.slots[i]
            relayout |= old is None or old.spec != f.slot.spec
            f.slot.segment = -1 if old is None else old.segment
            self.slots[i] = f.slot
            if i in views:
                self.steps[i] = 0.0 if f.count is None else f.count
                f.put = {"step": views[i], **f.put}
            f.own.update(f.put)
            if f.put and state.get(self.params[i]) is not f.own:
                state[self.params[i]] = f.own
            if f.fresh:
                self.fresh[i] = 1
                self.any_fresh = True
            self.held[i] = (f.own, f.own["step"], *f.slot.states)
        self._snapshot(state)
        if relayout:
            self._lay_out()
        before = [(self.expected_of[i], self.dims_of[i]) for i in odd]
        for i in odd:
            self._describe(i)
        if relayout or before != [(self.expected_of[i], self.dims_of[i]) for i in odd]:
            self._publish()
        for i in odd:
            self._write_segment(i)
        self.gapped = [i for i, slot in enumerate(self.slots) if slot and slot.param_copy is not None]

    def _own_step(self, i: int, own: dict[str, Any]) -> bool:
        """Is the step count in this state dictionary the table's view?"""
        return len(self.held[i]) > 1 and own.get("step") is self.held[i][1]

    def _moved(self, i: int, slot: Slot) -> bool:
        """Does a tensor that is written lie elsewhere than before?"""
        old = self.slots[i]
        if old is None:
            return True
        words = self.words[old.segment * WORDS : old.segment * WORDS + STATE + len(slot.states)]
        written = (slot.param_copy if slot.param_copy is not None else self.params[i], *slot.states)
        return [words[PARAM], *words[STATE:]] != [t.data_ptr() for t in written]

    def _inspect(self, i: int, groups: list[dict[str, Any]], state: dict[Any, Any]) -> _Found:
        """Everything that must hold of one parameter, its gradient and its state. Writes nothing but stand-ins."""
        p = self.params[i]
        g, k = self.places[i]
        what = label(groups[g], g, k)
        old = self.slots[i]
        check_parameter(p, what)
        check_memory(p, what)
        grad = p.grad
        assert grad is not None
        check_gradient(p, grad, what)

        like: Tensor = p.detach()
        param_copy = None
        if not (p.is_contiguous() or is_dense(p)):
            param_copy = _reused(old.param_copy if old else None, torch.empty_like(like, device="meta"), p.device)
            like = param_copy.copy_(like)

        grad_copy = None
        if not same_layout(grad, like) or grad.is_conj() or grad.is_neg():
            wanted = torch.empty_like(like, dtype=grad.dtype, device="meta")
            grad_copy = _reused(old.grad_copy if old else None, wanted, p.device).copy_(grad.detach())

        own = state.get(p)
        if own is not None and not isinstance(own, dict):
            raise TypeError(f"the state of {what} is a {type(own).__name__}: expected a dict")
        own = {} if own is None else own
        names = self.needs[g]  # type: ignore[index]
        present = [name for name in names if own.get(name) is not None]
        count = None
        if own.get("step") is not None:
            count = step_count(own["step"], f"the step count of {what}")
        elif present and self.rule.name == "sgdw":
            count = 1.0  # torch.optim.SGD keeps no count: a buffer that is there has been started
        elif present:
            raise ValueError(f"the state of {what} has {present} but no 'step': give it all, or none for a new start")
        missing = [name for name in names if name not in present and name not in MADE_LATER]
        if missing and (count or present):
            raise ValueError(f"the state of {what} has no {missing}: give it all of {list(names)}, or none")
        put: dict[str, Tensor] = {}
        for name in names:
            value = own.get(name)
            if value is None:
                put[name] = torch.zeros_like(like, dtype=state_dtype(p.dtype), memory_format=torch.preserve_format)
                continue
            conformed = conform_state(p, like, value, f"the state {name!r} of {what}")
            if conformed is not value:
                put[name] = conformed
        states = tuple(put.get(name, own.get(name)) for name in names)
        formats = (format_of(p.dtype), format_of(grad.dtype), *(format_of(s.dtype) for s in states))
        slot = Slot(Spec(p.device, formats), states, param_copy, grad_copy)  # type: ignore[arg-type]
        fresh = bool(count) and "momentum_buffer" in names and "momentum_buffer" not in present
        return _Found(slot, own, put, count, fresh)

    def _check_overlaps(self, found: dict[int, _Found], groups: list[dict[str, Any]]) -> None:
        extents = []
        for i, p in enumerate(self.params):
            slot = found[i].slot if i in found else self.slots[i]
            if slot is None:
                continue
            g, k = self.places[i]
            what = label(groups[g], g, k)
            extents.append(Extent(p.detach(), what))
            extents += [Extent(s, f"a state of {what}") for s in slot.states]
        check_disjoint(extents)

    # Layout -----------------------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Sorts the segments by bucket, keeping the records of those that were there."""
        by_spec: dict[Spec, list[int]] = {}
        for i, slot in enumerate(self.slots):
            if slot is not None:
                by_spec.setdefault(slot.spec, []).append(i)
        self.buckets, order = [], []
        for spec, members in by_spec.items():
            self.buckets.append(Bucket(spec, self.resolve(spec), len(order), members))
            order += members
        unseen = [i for i, slot in enumerate(self.slots) if slot is None]
        old = self.segments
        self.segments = torch.zeros_like(old)
        for segment, i in enumerate([*order, *unseen]):
            slot = self.slots[i]
            if slot is not None:
                if slot.segment >= 0:
                    self.segments[segment] = old[slot.segment]
                slot.segment = segment
            self.expected_of[i] = [*self.expected_of[i][:1], segment, *self.expected_of[i][2:]]

    def _describe(self, i: int) -> None:
        """What walk must find at slot `i` to leave it alone."""
        slot, p = self.slots[i], self.params[i]
        assert slot is not None
        special = slot.param_copy is not None or slot.grad_copy is not None
        grad_dtype = p.grad.dtype if p.grad is not None else p.dtype
        written = (slot.param_copy if slot.param_copy is not None else p, *slot.states)
        self.expected_of[i] = [
            SPECIAL if special else ORDINARY,
            slot.segment,
            p.numel() * (2 if p.is_complex() else 1),
            self.expected_of[i][3],
            p.dim(),
            walking.dtype_code(p.dtype),
            walking.dtype_code(grad_dtype),
            walking.dtype_code(state_dtype(p.dtype)),
            walking.device_code(p.device),
            int(all(t.data_ptr() % 16 == 0 for t in written)),
            self.places[i][0],
            len(slot.states),
        ]
        self.dims_of[i] = (*p.shape, *p.stride())

    def _write_segment(self, i: int) -> None:
        slot = self.slots[i]
        theta, grad, states = self.tensors(i)
        assert slot is not None
        assert grad is not None
        at = slot.segment * WORDS
        addresses = [theta.data_ptr(), grad.data_ptr(), *(s.data_ptr() for s in states)]
        self.words[at : at + len(addresses)] = addresses
        self.words[at + NUMEL] = self.expected_of[i][2]
        self.words[at + ALIGNED] = int(all(a % 16 == 0 for a in addresses))


def _reused(old: Tensor | None, wanted: Tensor, device: torch.device) -> Tensor:
    """A stand-in of the wanted layout: last step's, or a new one."""
    if old is not None and old.device == device and old.dtype == wanted.dtype and same_layout(old, wanted):
        return old
    return torch.empty_like(wanted, device=device)
