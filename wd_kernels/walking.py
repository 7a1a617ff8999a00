"""The check of every step: is everything where the table has it?

`walk` compares the live groups, parameters, gradients and states with a TensorTable and writes this step's gradient
addresses into it; what is not exactly as expected it returns. `assign` names the row of every segment and lays the
segments end to end. Both have a native form (csrc/walk.cpp) and the Python form below, which serves
where the extension is missing, and says in fewer words what the native one does.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native
from .records import WORDS, Expected, Kind, Lie, Segment
from .storage import state_dtype

if TYPE_CHECKING:
    from .slots import Finding
    from .table import TensorTable

__all__ = ["assign", "device_code", "dtype_code", "expect", "held", "numel", "walk"]

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
_TYPES = (Tensor, torch.nn.Parameter)


def dtype_code(dtype: torch.dtype) -> int:
    """DLPack's code of a dtype."""
    return _DTYPE_CODES[dtype]


def device_code(device: torch.device) -> int:
    """DLPack's code of a device; -1 for one it is not asked about, whose tensors are inspected every step."""
    code = _DEVICE_CODES.get(device.type)
    return -1 if code is None else (code << 32) | (device.index or 0)


def numel(p: Tensor) -> int:
    """Elements that a step writes: a complex one is two."""
    return p.numel() * (2 if p.is_complex() else 1)


def expect(p: Tensor, found: Finding, view: Tensor | None, group: int, dims_at: int) -> list[int]:
    """What walk must find of a parameter to leave it alone: an Expected record."""
    kind, flat_grad = Kind.ORDINARY, 0
    if found.place is not None:
        begin = found.place.buffer.grad_address
        flat_grad = begin and begin + found.place.offset * p.itemsize
    if found.slot.param_copy is not None or found.slot.grad_copy is not None:
        kind = Kind.SPECIAL
    elif flat_grad and found.grad.data_ptr() == flat_grad and _may_be_held(p):
        kind = Kind.FLAT
    return [
        kind,
        found.slot.segment,
        numel(p),
        dims_at,
        p.dim(),
        dtype_code(p.dtype),
        dtype_code(found.grad.dtype),
        dtype_code(state_dtype(p.dtype)),
        device_code(p.device),
        int(all(t.data_ptr() % 16 == 0 for t in found.written)),
        group,
        len(found.states),
        flat_grad if _may_be_held(p) else 0,
        0,
        id(view),
    ]


def _may_be_held(p: Tensor) -> bool:
    """May walk have a handle of `p`? Else it is compared in full, which takes longer and finds the same.

    A complex tensor may be a conjugate at any time. A hook or an attribute may refer to the optimizer: the garbage
    collector cannot see that a handle closes the circle, and would keep model and optimizer for ever.
    """
    hooks = (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
    refers = any(hooks) or any(map(gc.is_tracked, vars(p).values()))
    return native.WALKS and not p.is_complex() and not refers


def held(tensors: list[Tensor]) -> object:
    """What keeps these tensors, and lets walk read their addresses; None where there are none."""
    return native.C.holding(tensors, native.OPS.hold(tensors)) if tensors else None


def walk(table: TensorTable) -> tuple[list[int], bool, list[Tensor]] | None:
    """None if groups or state are not what the table was built from; else (odd, changed, keep).

    odd: positions of parameters with a gradient that are not as expected; changed: whether another set of parameters
    has gradients than in the last step; keep: the gradients, to be held while their addresses are used.
    """
    if native.WALKS:
        return native.C.walk(  # type: ignore[no-any-return]
            table.groups,
            table.state,
            len(table.params),
            table.ids.data_ptr(),
            table.names,
            table.order.numel(),
            table.order.data_ptr(),
            table.expected.data_ptr(),
            table.dims.data_ptr(),
            table.seen.data_ptr(),
            table.segments.data_ptr(),
            table.steps.data_ptr(),
            table.active.data_ptr(),
            table.held,
        )
    if not all(isinstance(group["params"], (list, tuple)) for group in table.groups):
        return None
    places = [(g, p) for g, group in enumerate(table.groups) for p in group["params"]]
    if len(places) != len(table.params) or not all(
        p is q and g == h for (g, p), q, (h, _) in zip(places, table.params, table.places, strict=True)
    ):
        return None
    if [table.index.get(id(key), -1) for key in table.state] != table.order_of:
        return None
    odd: list[int] = []
    keep: list[Tensor] = []
    active = [0.0 if p.grad is None else 1.0 for p in table.params]
    for i, on in enumerate(active):
        expected = table.expected_of[i]
        if on and not (expected[Expected.KIND] == Kind.ORDINARY and _check(table, i, expected, keep)):
            odd.append(i)
        elif not on and expected[Expected.KIND] != Kind.UNSEEN:
            table.words[expected[Expected.SEGMENT] * WORDS + Segment.NUMEL] = 0
    changed = active != table.active.tolist()
    table.active.copy_(torch.tensor(active, device="cpu"))
    return odd, changed, keep


def _check(table: TensorTable, i: int, expected: list[int], keep: list[Tensor]) -> bool:
    """One parameter with a gradient: is it as expected? Then its segment is written."""
    p, own = table.params[i], table.state.get(table.params[i])
    view = table.views[i]
    grad = p.grad
    dims = table.dims_of[i]
    ndim, numel = expected[Expected.NDIM], expected[Expected.NUMEL]
    shape, strides = dims[:ndim], dims[ndim:]

    def agrees(t: object, dtype: int) -> bool:
        if not isinstance(t, Tensor) or type(t) not in _TYPES or t.layout != torch.strided:
            return False
        if _DTYPE_CODES.get(t.dtype) != dtype or t.shape != shape or device_code(t.device) != expected[Expected.DEVICE]:
            return False
        if numel == 0:
            return True
        loose = all(a == b or n == 1 for n, a, b in zip(shape, t.stride(), strides, strict=True))
        return loose and t.data_ptr() != 0

    at = expected[Expected.SEGMENT] * WORDS
    words = table.words
    if not (agrees(p, expected[Expected.PARAM_DTYPE]) and agrees(grad, expected[Expected.GRAD_DTYPE])) or grad is None:
        return False
    if p.data_ptr() != words[at + Segment.PARAM] or any(t.is_neg() or t.is_conj() for t in (p, grad)):
        return False
    if not isinstance(own, dict) or view is None or own.get("step") is not view:
        return False
    count = table.steps[i].item()
    if not (0 <= count < 2**53 and float(count).is_integer()):
        return False
    for s in range(expected[Expected.STATES]):
        value = own.get(table.names[s + 1])
        if value is None or not agrees(value, expected[Expected.STATE_DTYPE]):
            return False
        if value.data_ptr() != words[at + Segment.STATE + s]:
            return False
        if value.is_neg() or value.is_conj():
            return False
    keep.append(grad)
    words[at + Segment.GRAD], words[at + Segment.NUMEL] = grad.data_ptr(), numel
    words[at + Segment.ALIGNED] = int(bool(expected[Expected.ALIGNED]) and grad.data_ptr() % 16 == 0)
    return True


def assign(table: TensorTable) -> list[tuple[int, int, bool]]:
    """Names the row of every segment: one per distinct (group, step count, fresh). Returns those keys."""
    if native.C is not None:
        return native.C.assign(  # type: ignore[no-any-return]
            table.expected.data_ptr(),
            table.segments.data_ptr(),
            table.steps.data_ptr(),
            table.active.data_ptr(),
            table.fresh.data_ptr(),
            len(table.params),
            table.firsts.data_ptr(),
            len(table.buckets),
            0 if table.lies is None else table.lies.data_ptr(),
            table.room_for_runs.data_ptr(),
            table.run_firsts.data_ptr(),
            table.room_for_capacities.data_ptr(),
        )
    rows: dict[tuple[int, int, bool], int] = {}
    steps, fresh = table.steps.tolist(), table.fresh.tolist()
    for i, on in enumerate(table.active.tolist()):
        if on:
            key = (table.places[i][0], int(steps[i]) + 1, bool(fresh[i]))
            table.words[table.expected_of[i][Expected.SEGMENT] * WORDS + Segment.ROW] = rows.setdefault(key, len(rows))
    for b, bucket in enumerate(table.buckets):
        members = range(bucket.first, bucket.first + len(bucket.slots))
        for segment in members:
            if table.words[segment * WORDS + Segment.NUMEL] == 0:
                table.words[segment * WORDS + Segment.ROW] = 0
        if table.lies is None:
            _lay(table.segments, members)
        else:
            first = int(table.run_firsts[b])
            table.run_firsts[b + 1] = first + _merge(table, members, first)
    return list(rows)


def _lay(segments: Tensor, which: range) -> None:
    """Lays segments end to end."""
    numels = segments[which.start : which.stop, Segment.NUMEL]
    segments[which.start : which.stop, Segment.START] = numels.cumsum(0) - numels


def _merge(table: TensorTable, members: range, first: int) -> int:
    """Writes the runs of `members` from `first` on: neighbours in flat buffers that share a row are one."""
    count, offset = first, 0
    before: list[int] | None = None
    assert table.lies is not None
    runs, capacities = table.room_for_runs, table.room_for_capacities
    for segment in members:
        words, lie = table.segments[segment].tolist(), table.lies[segment].tolist()
        numel = words[Segment.NUMEL]
        attached = lie[Lie.BUFFER] != 0 and numel != 0 and words[Segment.GRAD] == lie[Lie.GRAD]
        follows = before is not None and before[Lie.BUFFER] == lie[Lie.BUFFER] and before[Lie.END] == lie[Lie.OFFSET]
        if attached and follows and runs[count - 1, Segment.ROW] == words[Segment.ROW]:
            capacities[count - 1] = runs[count - 1, Segment.NUMEL] = lie[Lie.OFFSET] - offset + numel
        else:
            runs[count] = table.segments[segment]
            capacities[count] = lie[Lie.NUMEL]
            count, offset = count + 1, lie[Lie.OFFSET]
        before = lie if attached else None
    _lay(runs, range(first, count))
    return count - first
