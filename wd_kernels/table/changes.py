"""The check of every step: is everything where the table has it?

Native code (csrc/python/changes.cpp) compares the live groups, parameters, gradients and states with what is written
down here, and writes this step's gradient addresses and rows; what is not exactly as expected it returns. Without it,
every parameter is inspected in every step, which gives the same bits and takes longer.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..layout import CPU, GRAD, Moving, Segments, numel_of
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
}
_DEVICE_CODES = {"cpu": 1, "cuda": 10 if torch.version.hip else 2, "xpu": 14}

#: (odd, changed, keep, keys): positions of parameters with a gradient that are not as expected; whether another set of
#: parameters has gradients than in the last step; the gradients, to be held while their addresses are used; and the
#: (group, step count, fresh) keys of this step's rows, None where something is odd.
Changes = tuple[list[int], bool, list[Tensor], "Keys | None"]
#: What tells the rows of a step apart: (group, step count, fresh).
Keys = list[tuple[int, int, bool]]


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


class Expected:
    """What must be found of one parameter to leave it alone."""

    KIND, SEGMENT, NUMEL, DEVICE, ALIGNED, GROUP, FIRST_ROLE, ROLES, FLAT_GRAD, HELD, VIEW = range(11)

    @staticmethod
    def unseen(segment: int, group: int) -> list[int]:
        return [Kind.UNSEEN, segment, 0, 0, 0, group, 0, 0, 0, 0, 0]


#: What must be found of one of its tensors: its name among those of the state, dtype, shape with strides, and address
#: (0: anywhere). And, to be fetched ahead, where torch's storage object lies.
ExpectedRole = tuple[int, int, tuple[int, ...], int, int]


class FlatRange:
    """Where a segment lies in flat buffers: which (0: in none), its elements with padding, its gradient's address."""

    BUFFER, OFFSET, END, GRAD, NUMEL = 0, 1, 2, 3, 4
    NOWHERE = (0, 0, 0, 0)


class Seen:
    """Notes of native code about a parameter, and about each of its tensors: where torch's objects lie."""

    WORDS = 3
    STORAGE, ROLE_WORDS = 2, 3


def expect(
    p: Tensor, found: Finding, names: Sequence[str], view: Tensor | None, group: int
) -> tuple[list[int], list[ExpectedRole]]:
    """What must be found of a parameter, and of its tensors, to leave it alone."""
    kind, flat_grad = Kind.ORDINARY, 0
    may_be_held = _may_be_held(p)
    if found.place is not None:
        begin = found.place.buffer.grad_address
        flat_grad = begin and begin + found.place.offset * p.itemsize
    if found.known.param_copy is not None or found.known.grad_copy is not None or not native.CHECKS:
        kind = Kind.SPECIAL
    elif flat_grad and found.grad.data_ptr() == flat_grad and may_be_held:
        kind = Kind.FLAT
    places = [names.index(name) for name in found.known.spec.states]
    roles = []
    for role, (name, t) in enumerate(zip([0, 0, *places], (p, found.grad, *found.states), strict=True)):
        like = p if role == GRAD else t  # a gradient that lies otherwise is inspected every step
        address = 0 if role == GRAD else t.data_ptr()
        storage = t.untyped_storage()._cdata
        roles.append((name, dtype_code(t.dtype), (*like.shape, *like.stride()), address, storage))
    written = (found.theta, *found.states)
    expected = [
        kind,
        found.known.segment,
        numel_of(p),
        device_code(p.device),
        int(all(t.data_ptr() % 16 == 0 for t in written)),
        group,
        0,
        len(roles),
        flat_grad if may_be_held else 0,
        0,
        id(view),
    ]
    return expected, roles


def _may_be_held(p: Tensor) -> bool:
    """May native code have a handle of `p`? Else it is compared in full, which takes longer and finds the same.

    A complex tensor may be a conjugate at any time. A hook or an attribute may refer to the optimizer: the garbage
    collector cannot see that a handle closes the circle, and would keep model and optimizer for ever.
    """
    hooks = (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
    refers = any(hooks) or any(map(gc.is_tracked, vars(p).values()))
    return native.CHECKS and not p.is_complex() and not refers


class Watch:
    """What a table was built from, written down for native code to compare with what is there now.

    Attributes:
        params, places: the parameters, and (group, index in the group) of each.
        names: "step", and the names of the rule's states.
        expected, roles: of each parameter.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> None:
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.places = [(g, k) for g, group in enumerate(groups) for k in range(len(group["params"]))]
        self.names = names
        self.expected = [Expected.unseen(i, g) for i, (g, _) in enumerate(self.places)]
        self.roles: list[list[ExpectedRole]] = [[] for _ in self.params]
        self._index = {id(p): i for i, p in enumerate(self.params)}
        self._ids = _words(list(map(id, self.params)))
        self._held: object = None

    def order(self, state: Mapping[Any, Any]) -> list[int]:
        """Which parameter each entry of the state belongs to: native code then needs no hash of a tensor."""
        return [self._index.get(id(key), -1) for key in state]

    def hold(self, tensors: list[Tensor]) -> None:
        """Holds the tensors of flat parameters, whose addresses native code reads through handles."""
        self._held = native.C.holding(tensors, native.OPS.hold(tensors)) if tensors else None

    def publish(
        self, state: Mapping[Any, Any], counts: Counts, firsts: Sequence[int], segments: Segments,
        ranges: Tensor | None, runs: Segments,
    ) -> None:  # fmt: skip
        """Writes it all down as memory (csrc/python/changes.h, View), anew whenever something of it changes.

        Args:
            firsts: the first segment of every bucket, and the end.
            ranges: where the segments lie in flat buffers, if some do; then launches step `runs`.
        """
        roles, dims, storages = list[tuple[int, ...]](), list[int](), list[tuple[int, ...]]()
        where: dict[tuple[int, ...], int] = {}  # each shape with strides once
        for own, of_roles in zip(self.expected, self.roles, strict=True):
            own[Expected.FIRST_ROLE] = len(roles)
            for name, dtype, layout, address, storage in of_roles:
                at = where.setdefault(layout, len(dims))
                if at == len(dims):
                    dims += layout
                roles.append((name, dtype, len(layout) // 2, at, address))
                storages.append((0, 0, storage))
        order = self.order(state)
        self.run_firsts = _words(firsts)
        arrays = (
            self._ids, _words(order), _words(self.expected), _words(roles), _words(dims),
            torch.zeros(len(self.params), Seen.WORDS, dtype=torch.int64, device=CPU), _words(storages),
            counts.steps, counts.active, counts.fresh, _words(firsts), segments.moving, segments.places, ranges,
            runs.moving, runs.places, runs.capacities, self.run_firsts,
        )  # fmt: skip
        numbers = (len(self.params), len(order), len(firsts) - 1, segments.places.shape[1])
        self._kept, self._counts, self._moving = arrays, counts, segments.moving
        self._view = _words([*numbers, *(0 if t is None else t.data_ptr() for t in arrays)])
        self._address = self._view.data_ptr()

    def refresh(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> Changes | None:
        """What has changed since the last step; None if groups or state are not what was written down."""
        if native.CHECKS:
            return native.C.refresh(  # type: ignore[no-any-return]
                self._address, groups, state, self.names, self._held
            )
        if not all(isinstance(group["params"], (list, tuple)) for group in groups):
            return None
        live = [(g, p) for g, group in enumerate(groups) for p in group["params"]]
        if len(live) != len(self.params) or not all(
            p is q and g == h for (g, p), q, (h, _) in zip(live, self.params, self.places, strict=True)
        ):
            return None
        active = [0.0 if p.grad is None else 1.0 for p in self.params]
        for on, expected in zip(active, self.expected, strict=True):
            if not on:
                self._moving[expected[Expected.SEGMENT], Moving.NUMEL] = 0
        changed = active != self._counts.active.tolist()
        self._counts.active.copy_(torch.tensor(active, device=CPU))
        odd = [i for i, on in enumerate(active) if on]
        return odd, changed, [], None if odd else []

    def assign_rows(self) -> Keys:
        """Names the row of every segment: one per distinct (group, step count, fresh). Returns those keys."""
        if native.C is not None:
            return native.C.assign_rows(self._address)  # type: ignore[no-any-return]
        rows: dict[tuple[int, int, bool], int] = {}
        steps, fresh = self._counts.steps.tolist(), self._counts.fresh.tolist()
        self._moving[:, Moving.ROW] = 0
        for i, on in enumerate(self._counts.active.tolist()):
            if on:
                key = (self.places[i][0], int(steps[i]) + 1, bool(fresh[i]))
                self._moving[self.expected[i][Expected.SEGMENT], Moving.ROW] = rows.setdefault(key, len(rows))
        return list(rows)


def _words(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=CPU)
