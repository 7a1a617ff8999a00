"""The check of every step: is everything where the table has it?

Native code (csrc/python/changes.cpp) compares the live groups, parameters, gradients and states with what is written
down here, and writes this step's gradient addresses and rows; what is not exactly as expected it returns. Without it,
every parameter is inspected in every step, which gives the same bits and takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, native
from ..clipping import Asked, decide
from ..layout import CPU, GRAD, Moving, Segments, numel_of
from ..sharding import PLAIN, is_dtensor, spec_of
from .inspection import Finding

__all__ = [
    "Changes",
    "Counts",
    "Expected",
    "ExpectedRole",
    "FlatRange",
    "Keys",
    "Kind",
    "Watch",
    "device_code",
    "dtype_code",
    "expect",
]

# DLPack's type codes, with the bits of an element.
_DTYPE_CODES = {
    torch.float64: (2 << 8) | 64,
    torch.float32: (2 << 8) | 32,
    torch.float16: (2 << 8) | 16,
    torch.bfloat16: (4 << 8) | 16,
    torch.complex64: (5 << 8) | 64,
    torch.complex128: (5 << 8) | 128,
    torch.int16: 16,
    torch.int8: 8,
    torch.uint8: (1 << 8) | 8,
}
_DEVICE_CODES = {"cpu": 1, "cuda": 10 if torch.version.hip else 2, "xpu": 14}

#: What tells the rows of a step apart: (group, step count, fresh).
Keys = list[tuple[int, int, bool]]


class Changes(NamedTuple):
    """What a step has found.

    Attributes:
        done: it is taken.
        changed: another set of parameters has gradients than in the last step.
        odd: positions of parameters that are not as expected.
        runs: the runs are others than those that chunks were cut for.
        keys: of this step's rows, None where something is odd; of the next one's when this one is taken, where they are
            known by then.
    """

    done: bool
    changed: bool
    odd: list[int]
    runs: bool
    keys: Keys | None


class Work(NamedTuple):
    """What a step is to do where all is as expected.

    Attributes:
        increment: torch's function that counts versions.
        written: the parameters whose versions it counts.
        launches: plans of the CPU backend, which run with no Python code between them and the check.
        ready: gives what else is launched, from the rows.
        rows: of the keys that were found last; None where they are not made yet.
        copies: (to, from): copied after the launches.
        puts: (position, parameter, its state as found, that with what is new, what is new).
        ticks: (dict, key, value): written when the step is taken.
        others: there are other threads of Python.
        clipping: what is asked of the norm of the gradients, where the host decides.
        counts: the host counts the steps.
        gradients: what is stepped in the place of gradients, by position, emptied once it is; None: these.
    """

    increment: Callable[[list[Tensor]], object]
    written: list[Tensor]
    launches: list[Any]
    ready: Callable[[Tensor], list[Any]] | None
    rows: Tensor | None
    copies: list[tuple[Tensor, Tensor]]
    puts: list[tuple[int, Tensor, Any, dict[str, Any], dict[str, Any]]]
    ticks: list[tuple[dict[str, Any], str, Any]]
    others: bool
    clipping: Asked | None
    counts: bool
    gradients: list[Tensor | None] | None


@dataclass(frozen=True)
class Counts:
    """Of each parameter: float32 [n] step counts and whether it has a gradient; uint8 [n] whether a state is fresh."""

    steps: Tensor
    active: Tensor
    fresh: Tensor


def dtype_code(dtype: torch.dtype) -> int:
    """DLPack's code of a dtype."""
    return _DTYPE_CODES[dtype]


def device_code(device: torch.device) -> int:
    """DLPack's code of a device; -1 for one it is not asked about, whose tensors are inspected every step."""
    code = _DEVICE_CODES.get(device.type)
    return -1 if code is None else (code << 32) | (device.index or 0)


class Kind:
    """ORDINARY parameters are only compared, SPECIAL ones inspected every step, UNSEEN ones had no gradient yet.

    FLAT ones lie in flat buffers with gradient and states, and are compared through handles.
    """

    ORDINARY, SPECIAL, UNSEEN, FLAT = 0, 1, 2, 3


class Inspected:
    """Whether a parameter was inspected in this step, and had a gradient then."""

    NOT_YET, WITH_GRADIENT, WITHOUT_GRADIENT = 0, 1, 2


class Expected:
    """What must be found of one parameter to leave it alone."""

    KIND, SEGMENT, NUMEL, DEVICE, ALIGNED, GROUP, FIRST_ROLE, ROLES, FLAT_GRAD, HELD, VIEW, INSPECTED = range(12)

    @staticmethod
    def nothing(kind: int, segment: int, group: int) -> list[int]:
        return [kind, segment, 0, 0, 0, group, 0, 0, 0, 0, 0, Inspected.NOT_YET]


class ExpectedRole(NamedTuple):
    """What must be found of one of its tensors: of a DTensor, of its local tensor.

    Attributes:
        name: its name among those of the state.
        dtype, layout: DLPack's code; shape with strides.
        address: 0 for anywhere.
        spec: of a DTensor, the very object that says how it is sharded; an equal one is another.
        storage: where torch's storage object lies, to be fetched ahead.
    """

    name: int
    dtype: int
    layout: tuple[int, ...]
    address: int
    spec: object
    storage: int


class FlatRange:
    """Where a segment lies in flat buffers: which (0: none), elements with padding (`TensorTable._range`), gradient."""

    BUFFER, OFFSET, END, GRAD, NUMEL = 0, 1, 2, 3, 4
    NOWHERE = (0, 0, 0, 0)


def compared(p: Tensor, dims: int) -> bool:
    """Can native code look at the parameter without running anybody's code? Others are inspected in every step."""
    return native.CHECKS and dims <= 5 and (type(p) in PLAIN or (is_dtensor(p) and native.looks_into(p)))


def expect(
    p: Tensor, found: Finding, names: Sequence[str], group: int, special: bool
) -> tuple[list[int], list[ExpectedRole]]:
    """What must be found of a parameter, and of its tensors, to leave it alone; `special`: nothing will do.

    A complex tensor may be a conjugate at any time: it is compared in full, flat or not.
    """
    theta, kind, flat_grad = found.theta, Kind.ORDINARY, 0
    may_be_held = all(type(t) in PLAIN for t in (p, found.grad_itself, *found.states)) and not p.is_complex()
    if found.place is not None:
        begin = found.place.memory.grad_address
        flat_grad = begin and begin + found.place.offset * theta.itemsize
    if special or found.gapped is not None or found.known.grad_copy is not None or not compared(p, theta.dim()):
        kind = Kind.SPECIAL
    elif flat_grad and found.grad.data_ptr() == flat_grad and may_be_held:
        kind = Kind.FLAT
    spec = found.known.spec
    places = [names.index(name) for name in spec.beside]
    roles = []
    themselves = (p, found.grad_itself, *found.states)
    for role, (name, t, whole) in enumerate(zip([0, 0, *places], found.roles, themselves, strict=True)):
        like = theta if role == GRAD else t  # a gradient that lies otherwise is inspected every step
        address = 0 if role == GRAD else t.data_ptr()
        layout, sharding = (*like.shape, *like.stride()), spec_of(whole)
        roles.append(ExpectedRole(name, dtype_code(t.dtype), layout, address, sharding, t.untyped_storage()._cdata))
    expected = [
        kind,
        found.known.segment,
        numel_of(theta),
        device_code(theta.device),
        int(all(t.data_ptr() % 16 == 0 for t in (theta, *found.memory[: len(found.memory) - spec.scales]))),
        group,
        0,
        len(roles),
        flat_grad if may_be_held else 0,
        0,
        0,
        Inspected.WITH_GRADIENT,
    ]
    return expected, roles


class Watch:
    """What a table was built from, written down for native code to compare with what is there now.

    Attributes:
        params, places: the parameters, and (group, index in the group) of each.
        names: "step", and those of all that a parameter may have beside it.
        expected, roles: of each parameter.
        views: of each parameter, the view of its step count that the state dictionary has.
        flat: the tensors of parameters that lie in flat buffers: parameter, gradient and states.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> None:
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.places = [(g, k) for g, group in enumerate(groups) for k in range(len(group["params"]))]
        self.names = names
        kinds = [Kind.UNSEEN if compared(p, 0) else Kind.SPECIAL for p in self.params]
        self.expected = [
            Expected.nothing(kind, i, g) for i, (kind, (g, _)) in enumerate(zip(kinds, self.places, strict=True))
        ]
        self.roles: list[list[ExpectedRole]] = [[] for _ in self.params]
        self.views: list[Tensor | None] = [None] * len(self.params)
        self.flat: dict[int, tuple[Tensor, ...]] = {}
        self._index = {id(p): i for i, p in enumerate(self.params)}
        self._keys: Keys = []

    def order(self, state: Mapping[Any, Any]) -> list[int]:
        """Which parameter each entry of the state belongs to: native code then needs no hash of a tensor."""
        return [self._index.get(id(key), -1) for key in list(state)]  # at once: another thread may add to it

    def publish(
        self, state: Mapping[Any, Any], counts: Counts, firsts: Sequence[int], segments: Segments, control: Tensor,
        ranges: Tensor | None, runs: Segments,
    ) -> None:  # fmt: skip
        """Writes it all down for native code, anew whenever something of it changes.

        Args:
            firsts: the first segment of every bucket, and the end.
            ranges: where the segments lie in flat buffers, if some do; then launches step `runs`.
        """
        self._counts, self._moving, self._control = counts, segments.moving, control
        roles, dims, storages = list[tuple[int, ...]](), list[int](), list[int]()
        specs = list[object]()  # kept, so that nothing else comes to lie there
        where: dict[tuple[int, ...], int] = {}  # each shape with strides once
        held: list[Tensor] = []
        for i, (own, of_roles) in enumerate(zip(self.expected, self.roles, strict=True)):
            own[Expected.HELD] = len(held)
            held += self.flat.get(i, ())
            own[Expected.VIEW] = len(held)
            held += [view for view in (self.views[i],) if view is not None]
            own[Expected.FIRST_ROLE] = len(roles)
            for name, dtype, layout, address, spec, storage in of_roles:
                at = where.setdefault(layout, len(dims))
                if at == len(dims):
                    dims += layout
                roles.append((name, dtype, len(layout) // 2, at, address, 0 if spec is None else id(spec)))
                storages.append(storage)
                specs.append(spec)
        self._expected = _words(self.expected, len(Expected.nothing(0, 0, 0)))
        self.run_firsts = torch.zeros(len(firsts), dtype=torch.int64, device=CPU)
        if native.C is None:
            return
        arrays = (
            _words(self.order(state)), self._expected, _words(roles, 6), _words(dims), _words(storages),
            counts.steps, counts.active, counts.fresh, _words(firsts), segments.moving, segments.places, control,
            ranges, runs.moving, runs.places, runs.capacities, self.run_firsts,
        )  # fmt: skip
        hold = native.OPS.hold.default._op
        view = native.C.view(tuple(self.params), arrays, self.names, hold, held)
        self._specs, self._held, self._view = specs, held, view

    def mark(self, inspected: Mapping[int, int]) -> None:
        """Notes what was inspected in this step, and is not compared in it."""
        for i, how in inspected.items():
            self.expected[i][Expected.INSPECTED] = how
        if inspected:
            self._expected[list(inspected), Expected.INSPECTED] = _words(list(inspected.values()))

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], work: Work) -> Changes | None:
        """The step, if all is where the table has it; None if groups or state are not what was written down."""
        if native.C is None:
            return self._step_in_python(groups, state, work)
        found = native.C.step(self._view, groups, state, work)
        return None if found is None else Changes(*found)

    def forget_inspections(self, inspected: Iterable[int]) -> None:
        """After a step that was taken."""
        for i in inspected:
            self.expected[i][Expected.INSPECTED] = Inspected.NOT_YET

    def assign_rows(self) -> Keys:
        """Names the row of every segment: one per distinct (group, step count, fresh). Returns those keys."""
        if native.C is not None:
            return native.C.assign_rows(self._view)  # type: ignore[no-any-return]
        rows: dict[tuple[int, int, bool], int] = {}
        steps, fresh = self._counts.steps.tolist(), self._counts.fresh.tolist()
        self._moving[:, Moving.ROW] = 0
        for i, on in enumerate(self._counts.active.tolist()):
            if on:
                key = (self.places[i][0], int(steps[i]) + 1, bool(fresh[i]))
                self._moving[self.expected[i][Expected.SEGMENT], Moving.ROW] = rows.setdefault(key, len(rows))
        self._keys = list(rows)
        return self._keys

    def take_runs(self) -> Tensor:
        """Chunks are cut for the runs that were found last; the first of every bucket's, and their end."""
        native.C.take_runs(self._view)
        return self.run_firsts.clone()

    # Where there is no native code ------------------------------------------------------------------------------------

    def _step_in_python(self, groups: list[dict[str, Any]], state: dict[Any, Any], work: Work) -> Changes | None:
        """The same, of parameters that have all been inspected. What interrupts it may come between its last writes."""
        if not all(isinstance(group, dict) and isinstance(group["params"], (list, tuple)) for group in groups):
            return None
        live = [(g, p) for g, group in enumerate(groups) for p in group["params"]]
        if len(live) != len(self.params) or not all(
            p is q and g == h for (g, p), q, (h, _) in zip(live, self.params, self.places, strict=True)
        ):
            return None
        inspected = [own[Expected.INSPECTED] for own in self.expected]
        active = [float(how == Inspected.WITH_GRADIENT) for how in inspected]
        for own, on in zip(self.expected, active, strict=True):
            if not on:
                self._moving[own[Expected.SEGMENT], Moving.NUMEL] = 0
        changed = active != self._counts.active.tolist()
        self._counts.active.copy_(torch.tensor(active, device=CPU))
        odd = [i for i, how in enumerate(inspected) if how == Inspected.NOT_YET]
        if odd:
            return Changes(False, changed, odd, False, None)
        last = self._keys
        keys = self.assign_rows()
        if keys != last or changed or (keys and work.rows is None):
            return Changes(False, changed, odd, False, keys)
        skip = bool(self._control[1])
        if work.clipping is not None:
            skip = self._decide(work.clipping, work.rows)
        if keys and work.rows is not None and not (skip and work.clipping is not None):
            work.increment(work.written)
            launches = [] if work.ready is None else work.ready(work.rows)
            backends.launch(launches, work.rows)
        if work.gradients is not None:
            work.gradients.clear()
        self._expected[:, Expected.INSPECTED] = Inspected.NOT_YET
        if skip:
            return Changes(True, False, [], False, keys)
        if work.counts:
            self._counts.steps.add_(self._counts.active)
        self._counts.fresh.zero_()
        for to, source in work.copies:
            to.copy_(source)
        for _, p, found, entry, made in work.puts:
            if any(state.get(p) is known for known in (found, entry)):
                entry.update(made)
                state[p] = entry
        for group, key, value in work.ticks:
            group[key] = value
        self._keys = [] if work.counts else self._keys
        return Changes(True, False, [], False, self._keys)

    def _decide(self, asked: Asked, rows: Tensor | None) -> bool:
        """What native code does with it (csrc/python/clipping.cpp); is the step skipped?"""
        if asked.sums is not None:
            asked.sums.zero_()
            if asked.between is not None:
                asked.between()
        found = decide(asked)
        asked.found.copy_(torch.tensor([found.norm, found.skip], dtype=torch.float64, device=CPU))
        self._control.copy_(torch.tensor([1 / asked.scale, found.skip], dtype=torch.float64, device=CPU))
        for row, (group, *_) in enumerate(self._keys if rows is not None and asked.sums is not None else ()):
            assert rows is not None
            rows[row, asked.grad_scale] *= found.own[group] if found.own else found.clip
        return found.skip


def _words(values: Sequence[Any], columns: int = 0) -> Tensor:
    words = torch.tensor(values, dtype=torch.int64, device=CPU)
    return words.view(-1, columns) if columns else words
