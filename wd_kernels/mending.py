"""What differs from what the table has: inspected, then written into the table and the optimizer's state.

All checks and allocations come first; what raises here has written nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import flat, walking
from .checks import Extent, check_disjoint, label
from .records import WORDS, Expected, Kind, Lie, Seen, Segment
from .slots import Bucket, Finding, Spec, inspect

if TYPE_CHECKING:
    from .table import TensorTable

__all__ = ["mend"]


def mend(table: TensorTable, odd: Sequence[int]) -> None:
    """Inspects the given parameters anew: all checks and allocations first, then the writes."""
    found = {i: _inspect(table, i) for i in odd}
    if any(_moved(table, i, f) for i, f in found.items()):
        _check_overlaps(table, found)
    for spec in {f.slot.spec for f in found.values()}:
        table.resolve(spec)
    views = {  # step counts that are not yet the table's own
        i: table.steps[i] for i, f in found.items() if table.views[i] is None or f.own.get("step") is not table.views[i]
    }

    relayout = False
    for i, f in found.items():  # from here on nothing raises
        old = table.slots[i]
        numel = walking.numel(table.params[i])
        relayout |= old is None or old.spec != f.slot.spec or table.expected_of[i][Expected.NUMEL] != numel
        lie = _lie(table, table.params[i], f)
        relayout |= lie != table.lie_of[i]
        table.lie_of[i] = lie
        f.slot.segment = -1 if old is None else old.segment
        table.slots[i] = f.slot
        if i in views:
            superseded = table.views[i]
            if superseded is not None:  # whoever holds it keeps the count that it shows
                superseded.data = superseded.clone()
            table.views[i], table.steps[i] = views[i], f.count
            f.put = {"step": views[i], **f.put}
        f.own.update(f.put)
        if table.state.get(table.params[i]) is not f.own:
            table.state[table.params[i]] = f.own
        if f.fresh:
            table.fresh[i] = 1
            table.any_fresh = True
    table.note_order()
    if relayout:
        _lay_out(table)
    before = [(table.expected_of[i], table.dims_of[i]) for i in odd]
    for i, f in found.items():
        dims_at = table.expected_of[i][Expected.DIMS]
        table.expected_of[i] = walking.expect(table.params[i], f, table.views[i], table.places[i][0], dims_at)
        table.dims_of[i] = (*table.params[i].shape, *table.params[i].stride())
    after = [(table.expected_of[i], table.dims_of[i]) for i in odd]
    if relayout or before != after or any(table.expected_of[i][Expected.KIND] == Kind.FLAT for i in odd):
        _hold(table)
        table.publish()
    for i, f in found.items():
        _write_segment(table, i, f)
        table.keep.append(f.grad)
    table.gapped = [i for i, slot in enumerate(table.slots) if slot and slot.param_copy is not None]


def _inspect(table: TensorTable, i: int) -> Finding:
    p, (g, k) = table.params[i], table.places[i]
    assert table.needs is not None
    what = label(table.groups[g], g, k)
    countless = table.rule.name == "sgdw"
    return inspect(p, table.state.get(p), table.needs[g], what, table.slots[i], countless, table.flat_states)


def _moved(table: TensorTable, i: int, f: Finding) -> bool:
    """Does a tensor that is written lie elsewhere than before?"""
    slot = table.slots[i]
    if slot is None or slot.spec != f.slot.spec or slot.place != f.slot.place:
        return True
    at = slot.segment * WORDS + Segment.STATE
    return table.words[at : at + len(f.states)] != [t.data_ptr() for t in f.states]


def _check_overlaps(table: TensorTable, found: dict[int, Finding]) -> None:
    extents = []
    assert table.needs is not None
    for i, (p, (g, k)) in enumerate(zip(table.params, table.places, strict=True)):
        if i not in found and table.slots[i] is None:
            continue
        what = label(table.groups[g], g, k)
        own = table.state.get(p, {})
        states = found[i].states if i in found else [own.get(name) for name in table.needs[g]]
        extents.append(Extent(p.detach(), what))
        extents += [Extent(s, f"a state of {what}") for s in states if isinstance(s, Tensor)]
    check_disjoint(extents)


def _lie(table: TensorTable, p: Tensor, f: Finding) -> tuple[int, int, int, int]:
    """Where a parameter lies in flat buffers: Lie's first words. A complex element counts as two."""
    if f.place is None:
        return Lie.NOWHERE
    buffer, offset = f.place.buffer, f.place.offset
    bases = [base for base in (buffer.data, buffer.grad, *f.bases) if base is not None]
    key = (buffer, buffer.grad_address, *(base.data_ptr() for base in f.bases))
    number = table.numbers.setdefault(key, len(table.numbers) + 1)
    table.buffers_of[number] = [weakref.ref(base) for base in bases]
    end = offset + flat.padded(f.place.numel)
    scale = 2 if p.is_complex() else 1
    grad = buffer.grad_address and buffer.grad_address + offset * p.itemsize
    return number, scale * offset, scale * end, grad


def _lay_out(table: TensorTable) -> None:
    """Sorts the segments by bucket, keeping the records of those that were there."""
    by_spec: dict[Spec, list[int]] = {}
    for i, slot in enumerate(table.slots):
        if slot is not None:
            by_spec.setdefault(slot.spec, []).append(i)
    table.buckets = []
    order: list[int] = []
    for spec, members in by_spec.items():
        members.sort(key=lambda i: table.lie_of[i][:2])  # neighbours in a flat buffer are neighbours here
        table.buckets.append(Bucket(spec, table.resolve(spec), len(table.buckets), len(order), members))
        order += members
    table.mirrors = {device: m for device, m in table.mirrors.items() if any(s.device == device for s in by_spec)}
    order += [i for i, slot in enumerate(table.slots) if slot is None]
    old = table.segments
    table.segments = torch.zeros_like(old)
    for segment, i in enumerate(order):
        slot = table.slots[i]
        if slot is not None:
            if slot.segment >= 0:
                table.segments[segment] = old[slot.segment]
            slot.segment = segment
        kind, _, *rest = table.expected_of[i]
        table.expected_of[i] = [kind, segment, *rest]


def _hold(table: TensorTable) -> None:
    """Holds the tensors of flat parameters, which walk compares through handles."""
    assert table.needs is not None
    tensors: list[Tensor] = []
    for i, expected in enumerate(table.expected_of):
        p = table.params[i]
        if expected[Expected.KIND] != Kind.FLAT:
            continue
        if p.grad is None:  # not in this step; walk says when it is back
            expected[Expected.KIND] = Kind.ORDINARY
            continue
        expected[Expected.HELD] = len(tensors)
        tensors += (p, p.grad, *(table.state[p][name] for name in table.needs[table.places[i][0]]))
    table.held = walking.held(tensors)


def _write_segment(table: TensorTable, i: int, f: Finding) -> None:
    at = f.slot.segment * WORDS
    roles = (f.theta, f.grad, *f.states)
    addresses = [t.data_ptr() for t in roles]
    for role, address in enumerate(addresses):
        table.words[at + role] = address
    table.words[at + Segment.NUMEL] = table.expected_of[i][Expected.NUMEL]
    table.words[at + Segment.ALIGNED] = int(all(address % 16 == 0 for address in addresses))
    begin = i * Seen.WORDS + Seen.STORAGES
    table.notes[begin : begin + len(roles)] = [t.untyped_storage()._cdata for t in roles]
