"""The check of every step: is everything where the table has it?

`walk` compares the live groups, parameters, gradients and states with a TensorTable and writes this step's gradient
addresses into it; what is not exactly as expected it returns. `assign` names the row of every segment and lays the
segments end to end. Both have a native form (csrc/walk.cpp) and the Python form below, which serves
where the extension is missing, and says in fewer words what the native one does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native

if TYPE_CHECKING:
    from .table import TensorTable

__all__ = ["assign", "device_code", "dtype_code", "walk"]

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


def walk(table: TensorTable) -> tuple[list[int], bool, list[Tensor]] | None:
    """None if groups or state are not what the table was built from; else (odd, changed, keep).

    odd: positions of parameters with a gradient that are not as expected; changed: whether another set of parameters
    has gradients than in the last step; keep: the gradients, to be held while their addresses are used.
    """
    if native.WALKS:
        return native.C.walk(  # type: ignore[no-any-return]
            table.groups,
            table.state,
            table.params,
            table.views,
            table.names,
            table.order.numel(),
            table.order.data_ptr(),
            table.expected.data_ptr(),
            table.dims.data_ptr(),
            table.seen.data_ptr(),
            table.segments.data_ptr(),
            table.steps.data_ptr(),
            table.active.data_ptr(),
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
        if on and not (expected[0] == 0 and _check(table, i, expected, keep)):
            odd.append(i)
        elif not on and expected[0] != 2:
            table.words[expected[1] * 12 + 9] = 0
    changed = active != table.active.tolist()
    table.active.copy_(torch.tensor(active, device="cpu"))
    return odd, changed, keep


def _check(table: TensorTable, i: int, expected: list[int], keep: list[Tensor]) -> bool:
    """One parameter with a gradient: is it as expected? Then its segment is written."""
    p, own = table.params[i], table.state.get(table.params[i])
    view = table.views[i]
    grad = p.grad
    dims = table.dims_of[i]
    shape, strides = dims[: expected[4]], dims[expected[4] :]

    def agrees(t: object, dtype: int) -> bool:
        if not isinstance(t, Tensor) or type(t) not in _TYPES or t.layout != torch.strided:
            return False
        if _DTYPE_CODES.get(t.dtype) != dtype or t.shape != shape or device_code(t.device) != expected[8]:
            return False
        if expected[2] == 0:
            return True
        loose = all(a == b or n == 1 for n, a, b in zip(shape, t.stride(), strides, strict=True))
        return loose and t.data_ptr() != 0

    at = expected[1] * 12
    words = table.words
    if not (agrees(p, expected[5]) and agrees(grad, expected[6])) or grad is None:
        return False
    if p.data_ptr() != words[at] or any(t.is_neg() or t.is_conj() for t in (p, grad)):
        return False
    if not isinstance(own, dict) or view is None or own.get("step") is not view:
        return False
    count = table.steps[i].item()
    if not (0 <= count < 2**53 and float(count).is_integer()):
        return False
    for s in range(expected[11]):
        value = own.get(table.names[s + 1])
        if value is None or not agrees(value, expected[7]) or value.data_ptr() != words[at + 2 + s]:
            return False
        if value.is_neg() or value.is_conj():
            return False
    keep.append(grad)
    words[at + 1], words[at + 9] = grad.data_ptr(), expected[2]
    words[at + 11] = int(bool(expected[9]) and grad.data_ptr() % 16 == 0)
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
        )
    rows: dict[tuple[int, int, bool], int] = {}
    steps, fresh = table.steps.tolist(), table.fresh.tolist()
    for i, on in enumerate(table.active.tolist()):
        if on:
            key = (table.places[i][0], int(steps[i]) + 1, bool(fresh[i]))
            table.words[table.expected_of[i][1] * 12 + 10] = rows.setdefault(key, len(rows))
    for bucket in table.buckets:
        start = 0
        for segment in range(bucket.first, bucket.first + len(bucket.slots)):
            table.words[segment * 12 + 8] = start
            start += table.words[segment * 12 + 9]
            if table.words[segment * 12 + 9] == 0:
                table.words[segment * 12 + 10] = 0
    return list(rows)
