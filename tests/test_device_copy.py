"""The table's copy for a device: how segments are cut into chunks, what a step sends, and what it never overwrites."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import bf16, f32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wd_kernels
from wd_kernels.backends import device, device_copy
from wd_kernels.backends.device_copy import LONGEST, DeviceCopy, chunk_size
from wd_kernels.layout import BLOCK, chunk_words, cut

pytest.importorskip("triton", reason="the backend that fills copies needs triton")

# Chunks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "processors", "expected"),
    [
        (0, 1, 1024),
        (1, 132, 1024),
        (65_535, 1, 1024),  # 64 chunks of 1024 for a processor of 32: from here on, 32 of 2048
        (65_536, 1, 2048),
        (131_071, 1, 2048),
        (131_072, 1, 4096),
        (8_650_751, 132, 1024),
        (8_650_752, 132, 2048),
        (69_206_015, 132, 8192),
        (69_206_016, 132, 16384),
        (2**40, 132, 16384),
    ],
)
def test_chunk_sizes_worked_by_hand(elements: int, processors: int, expected: int) -> None:
    assert chunk_size(elements, processors) == expected


def test_the_longest_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copy, "LONGEST", 4096)
    assert [chunk_size(n, 1) for n in (65_535, 65_536, 2**40)] == [1024, 2048, 4096]


@given(st.integers(0, 2**45), st.integers(1, 1000))
def test_a_chunk_size_is_whole_blocks_and_leaves_no_processor_idle(elements: int, processors: int) -> None:
    size = chunk_size(elements, processors)
    assert size in {BLOCK << k for k in range(5)}
    assert size == BLOCK or elements // size >= processors * device_copy.PER_PROCESSOR
    assert size == LONGEST or elements // (2 * size) < processors * device_copy.PER_PROCESSOR


def unpacked(chunks: Tensor) -> list[tuple[int, int]]:
    """(segment, ordinal) of each chunk, by arithmetic rather than by shifts."""
    assert chunks.dtype == torch.int64
    return [(c % 2**32, c // 2**32) for c in chunks.tolist()]


@pytest.mark.parametrize(
    ("first", "numels", "size", "expected"),
    [
        (0, [], 1024, []),
        (3, [0, 0], 1024, []),
        (0, [1024], 1024, [(0, 0)]),
        (2, [1025, 0, 1, 2048], 1024, [(2, 0), (2, 1), (4, 0), (5, 0), (5, 1)]),
        (2**32 - 2, [5, 5], 4, [(2**32 - 2, 0), (2**32 - 2, 1), (2**32 - 1, 0), (2**32 - 1, 1)]),
    ],
)
def test_cuts_worked_by_hand(first: int, numels: list[int], size: int, expected: list[tuple[int, int]]) -> None:
    assert unpacked(chunk_words(first, torch.tensor(numels, dtype=torch.int64), size)) == expected


@given(st.integers(0, 10**6), st.lists(st.integers(0, 5000) | st.integers(0, 2**42)), st.integers(1, 14))
@settings(deadline=None)
def test_every_element_is_in_exactly_one_chunk(first: int, numels: list[int], power: int) -> None:
    """Also of segments beyond 2**32 elements."""
    size = max(2**power, 2 ** math.ceil(math.log2(1 + sum(numels) / 1000)))  # a thousand chunks or so
    left = {first + k: 0 for k in range(len(numels))}
    for segment, ordinal in unpacked(chunk_words(first, torch.tensor(numels, dtype=torch.int64), size)):
        numel, begin = numels[segment - first], ordinal * size
        assert begin == left[segment]  # it begins where the one before ended
        assert begin < numel  # and has something to do
        left[segment] = min(begin + size, numel)
    assert list(left.values()) == numels


# What is sent ---------------------------------------------------------------------------------------------------------


class Sent:
    """Spies on what copies send, and keeps the tensors they send it in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[set[str | int]] = []
        self.there: list[dict[str | int, Tensor]] = []
        send = DeviceCopy._send

        def spy(own: DeviceCopy, parts: dict[str | int, Tensor]) -> None:
            send(own, parts)
            self.names.append(set(parts))
            self.there.append({name: own.there[name] for name in parts})

        monkeypatch.setattr(DeviceCopy, "_send", spy)

    def last(self) -> set[str | int]:
        """What was sent since the last call: in one buffer, so in one copy."""
        (names,) = self.names
        self.names.clear()
        return names


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


def model(sizes: Sequence[int] = (5, 1030, 33), dtypes: Sequence[torch.dtype] = (f32, f32, bf16)) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(n, generator=generator).to(d)) for n, d in zip(sizes, dtypes, strict=True)]


def new_gradients(params: Sequence[Tensor], kept: list[Any]) -> None:
    """At other addresses than all before, which `kept` holds."""
    for p in params:
        kept.append(p.grad)
        p.grad = torch.randn_like(p)


def assert_up_to_date(opt: Any) -> None:
    """The copy holds what the live tensors say, one by one."""
    table = opt._table
    (found,) = table.device_copies.values()
    for bucket in table.buckets:
        for segment, i in enumerate(bucket.members, bucket.first):
            p = table.params[i]
            origin = sum(-(-q.numel() // 32) * 32 for q in table.params[:i])
            roles = [p, *(opt.state[p][name] for name in bucket.spec.states)]
            words = [origin, table.norms.sum_of(i).data_ptr(), 0, *(t.data_ptr() for t in roles)]
            assert found.there["places"][segment].tolist()[: len(words)] == words
            grad = p.grad
            if grad is None:
                assert found.there["moving"][segment].tolist()[1] == 0
            else:
                aligned = all(t.data_ptr() % 16 == 0 for t in (*roles, grad))
                moving = found.there["moving"][segment].tolist()
                row = found.there["rows"][moving[2]]
                assert moving == [grad.data_ptr(), p.numel(), moving[2], int(aligned)]
                skipped = int(opt._table.control[1])  # and so not counted
                assert not p.numel() or row[opt.rule.scalars.index("t")] == opt.state[p]["step"] + skipped
        numels = [table.params[i].numel() for i in bucket.members]
        size = chunk_size(sum(numels), 1)
        assert torch.equal(found.there[bucket.index], chunk_words(bucket.first, torch.tensor(numels), size))
    assert found.there["control"].tolist() == table.control.tolist()
    assert found.there["rows"].dtype == torch.float64
    assert {name for name in found.there if isinstance(name, int)} == {bucket.index for bucket in table.buckets}
    assert set(found._sent) == set(found.there)


def test_what_did_not_change_is_not_sent(sent: Sent) -> None:
    kept: list[Any] = []
    params = model()
    opt = wd_kernels.AdamW(params, lr=0.01, weight_decay=0.1, backend="triton")
    everything: set[str | int] = {"places", "moving", "rows", "control"}

    def step(expected: set[str | int]) -> None:
        opt.step()
        assert sent.last() == expected
        assert_up_to_date(opt)

    new_gradients(params, kept)
    step({0, 1, *everything})  # the chunks of two buckets
    step({"rows"})  # which hold the step count
    step({"rows"})
    new_gradients(params, kept)
    step({"moving", "rows"})
    opt.param_groups[0]["lr"] = 0.5
    step({"rows"})
    params[0].grad = None
    step({"moving", "rows"})
    step({"rows"})
    new_gradients(params[:1], kept)
    step({"moving", "rows"})
    opt.state[params[1]]["exp_avg"] = opt.state[params[1]]["exp_avg"].clone()
    step({"places", "rows"})
    with torch.no_grad():
        kept.append(params[2].data)
        params[2].data = params[2].data.clone()
    step({"places", "rows"})
    opt._table.control[0] = 0.5
    step({"control", "rows"})
    step({"rows"})
    late = model([7], [f32])
    new_gradients(late, kept)
    opt.add_param_group({"params": late})
    step({0, 1, "places", "moving", "rows"})  # all but control
    step({"rows"})


def test_rows_that_stay_are_not_sent(sent: Sent) -> None:
    """A step without a change of its own sends nothing at all but an empty buffer: here, a skipped one repeated."""
    params = model()
    opt = wd_kernels.SGDW(params, lr=0.01, weight_decay=0.1, backend="triton")
    new_gradients(params, [])
    opt.step()
    sent.last()
    opt._table.control[1] = 1.0
    opt.step()
    assert sent.last() == {"rows", "control"}
    opt.step()
    assert sent.last() == set()
    assert_up_to_date(opt)


def test_what_a_step_sent_is_never_written_again(sent: Sent) -> None:
    """A device may read it long after: while it is held, every step's buffer is memory of its own."""
    params = model()
    opt = wd_kernels.AdamW(params, lr=0.01, weight_decay=0.1, backend="triton")
    kept: list[Any] = []
    copies: list[dict[str | int, Tensor]] = []
    for step in range(6):
        opt.param_groups[0]["lr"] = 0.1 / (step + 1)
        new_gradients(params, kept)
        opt.step()
        copies.append({name: part.clone() for name, part in sent.there[step].items()})
    assert len(sent.there) == 6
    for parts, then in zip(sent.there, copies, strict=True):
        assert all(torch.equal(parts[name], then[name]) for name in then)
    spans = sorted(
        (part.data_ptr(), part.data_ptr() + part.numel() * part.element_size())
        for parts in sent.there
        for part in parts.values()
    )
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    offsets = [part.storage_offset() * part.element_size() for parts in sent.there for part in parts.values()]
    assert all(offset % 128 == 0 for offset in offsets)
    assert max(offsets) >= 5 * 128
    assert len({part.untyped_storage().data_ptr() for part in sent.there[0].values()}) == 1  # one copy
    assert not torch.equal(copies[1]["rows"], copies[2]["rows"])


def test_chunks_hold_while_gradients_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are cut anew where a parameter comes, grows or shrinks, and only then."""
    cuts = []
    monkeypatch.setattr(device, "cut", lambda *args: (cuts.append(1), cut(*args))[1])
    params = model((5, 2050, 33))
    opt = wd_kernels.SGDW(params, lr=0.01, momentum=0.9, weight_decay=0.1, backend="triton")
    counts = []
    for step in range(8):
        new_gradients(params, [])
        if step in (1, 2):
            params[1].grad = None
        if step in (3, 5, 6):
            n = {3: 1024, 5: 4097, 6: 0}[step]
            params[1].grad = None
            params[1].data = torch.randn(n)
            params[1].grad = torch.randn(n)
            opt.state[params[1]] = {}
        opt.step()
        assert_up_to_date(opt)
        (found,) = opt._table.device_copies.values()
        counts.append((len(cuts), found.there[0].numel()))
    assert counts == [(2, 4), (2, 4), (2, 4), (4, 2), (4, 2), (6, 6), (8, 1), (8, 1)]  # of two buckets


def test_a_new_stream_is_sent_everything(sent: Sent) -> None:
    """What was sent on another stream may still be on its way. (No stream is here: the mirror is told of another.)"""
    params = model()
    opt = wd_kernels.AdamW(params, lr=0.01, weight_decay=0.1, backend="triton")
    new_gradients(params, [])
    for _ in range(2):
        opt.step()
    assert sent.names == [{0, 1, "places", "moving", "rows", "control"}, {"rows"}]
    sent.names.clear()
    (found,) = opt._table.device_copies.values()
    found._stream = "another"
    opt.step()
    assert sent.last() == {0, 1, "places", "moving", "rows", "control"}
    assert_up_to_date(opt)
    late = model([7], [f32])
    new_gradients(late, [])
    opt.add_param_group({"params": late})
    found._stream = "another"  # in the step in which the second bucket begins elsewhere
    opt.step()
    assert sent.last() == {0, 1, "places", "moving", "rows", "control"}
    assert_up_to_date(opt)


def test_an_upload_that_failed_is_made_up_for(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the next step's layout is another."""
    params = model()
    opt = wd_kernels.AdamW(params, lr=0.01, weight_decay=0.1, backend="triton")
    new_gradients(params, [])
    opt.step()
    new_gradients(params, [])
    working = DeviceCopy._send

    def fail(self: DeviceCopy, parts: dict[str | int, Tensor]) -> None:
        raise torch.OutOfMemoryError("no memory for a test")

    for change in (False, True):
        monkeypatch.setattr(DeviceCopy, "_send", fail)
        with pytest.raises(torch.OutOfMemoryError, match="no memory for a test"):
            opt.step()
        if change:
            late = model([7], [f32])
            new_gradients(late, [])
            opt.add_param_group({"params": late})
        monkeypatch.setattr(DeviceCopy, "_send", working)
        opt.step()
        assert_up_to_date(opt)
