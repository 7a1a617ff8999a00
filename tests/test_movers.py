"""The kernels for GPUs, run on the CPU, against backend="reference": parameters and states equal to the bit.

Triton's in its interpreter; CUDA's as the test build whose grid is plain loops (on_cpu.py). What is false about
alignment is a fault on a device: here every hint that a Triton kernel gives is checked, and the test build traps.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import (
    BODIES,
    DTYPES,
    REAL,
    SMALL,
    Case,
    Piece,
    arithmetic,
    assert_canaries,
    assert_same,
    assert_same_bits,
    bf16,
    bits,
    c64,
    cases,
    controlled,
    f16,
    f32,
    f64,
    frozen_run,
    gradient,
    guarded,
    has_gradient,
    ids,
    make_params,
    optimizer,
    peculiar_run,
    placed_run,
    rounding_run,
    run,
    snapshot,
    states_of,
    with_dtypes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wd_kernels
from wd_kernels import mirror
from wd_kernels.backends import BACKENDS
from wd_kernels.mirror import Mirror
from wd_kernels.table import TensorTable

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of overflow and NaN
    pytest.mark.usefixtures("promises"),
]

#: A dtype pair for each path of the formats.
SOME = [(f32, f32), (bf16, f32), (f16, f16), (f64, f64)]


# The matrix -----------------------------------------------------------------------------------------------------------


def part() -> list[Case]:
    """Every other pair of variant and dtypes, with one decay mode each: another one for each neighbour."""
    modes, pairs = 5, len(DTYPES)
    found = []
    for k, case in enumerate(cases(DTYPES)):  # by variant, then mode, then dtypes
        place = k // (modes * pairs) + k % pairs
        if place % 2 == 0 and place % modes == k // pairs % modes:
            found.append(case)
    return found


def test_the_part_has_everything_in_turn() -> None:
    found = part()
    for rule in ("adamw", "sgdw"):
        of_rule = [c for c in found if c.rule == rule]
        assert {c.options["decay"] for c in of_rule} == {c.options["decay"] for c in cases()}
        assert {(c.dtype, c.grad_dtype) for c in of_rule} == set(DTYPES)
    assert len({str(c) for c in found}) == len(found) == 50


def assert_matrix(backend: str, case: Case, steps: int, seed: int) -> None:
    found = run(case, backend, pieces=SMALL, steps=steps, seed=seed)
    assert_same(found, run(case, "reference", pieces=SMALL, steps=steps, seed=seed))
    counts = [int(value) for name, value in found.items() if name.endswith(" step")]
    assert len(counts) == len(SMALL)
    assert len(set(counts)) > 1  # some gradients were missing
    assert {name.split()[1] for name in found if " " in name} == {"step", *states_of(case)}
    for k, p in enumerate(make_params(SMALL, case.dtype, case.grad_dtype, seed)):
        assert bool(found[f"{k}"].isfinite().all())
        assert p.numel() < 20 or not torch.equal(found[f"{k}"], p.detach())


@pytest.mark.parametrize("case", part(), ids=ids)
def test_matrix(backend: str, case: Case, launches: list[int], promises: list[int]) -> None:
    assert_matrix(backend, case, steps=7, seed=0)  # the seventh is frozen
    assert len(launches) == 7
    assert promises or backend == "cuda"  # blocks of aligned segments


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(DTYPES), ids=ids)
def test_matrix_all(backend: str, case: Case) -> None:
    assert_matrix(backend, case, steps=8, seed=2)


# Addresses ------------------------------------------------------------------------------------------------------------


def assert_placed(backend: str, case: Case, offset: int, sizes: Sequence[int]) -> None:
    found, flags = placed_run(case, backend, offset, sizes)
    assert_same(found, placed_run(case, "reference", offset, sizes)[0])
    widths = {dtype.itemsize for dtype in (case.dtype, case.grad_dtype, arithmetic(case))}
    assert flags == ({1} if all(offset * width % 16 == 0 for width in widths) else {0, 1})


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("case", with_dtypes([BODIES[1], BODIES[3]], SOME), ids=ids)
def test_unaligned_roles_and_canaries(backend: str, case: Case, offset: int) -> None:
    """Each role in turn, and all of them, off alignment, beside aligned segments in the same launch."""
    assert_placed(backend, case, offset, (1030,))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("case", with_dtypes(BODIES, REAL), ids=ids)
def test_unaligned_roles_and_canaries_all(backend: str, case: Case, offset: int) -> None:
    assert_placed(backend, case, offset, (1, 7, 511, 1024, 1537))


@pytest.mark.parametrize("case", with_dtypes([BODIES[1], BODIES[2]], [(f32, f32), (bf16, bf16)]), ids=ids)
def test_split_tensor(backend: str, case: Case) -> None:
    """A tensor stepped whole or as neighbours of odd sizes in one memory has the same bits."""
    sizes = (1, 15, 17, 1000, 33, 1090)
    total, results = sum(sizes), []
    for parts in ((total,), sizes):
        whole = make_params([Piece((total,))], case.dtype, case.grad_dtype)[0].detach()
        params = [nn.Parameter(part) for part in whole.split(parts)]
        opt = optimizer(case, params, backend, weight_decay=0.1)
        for step in range(3):
            for p, g in zip(params, gradient(Piece((total,)), case.grad_dtype, step).split(parts), strict=True):
                p.grad = g
            opt.step()
        results.append([whole, *(torch.cat([opt.state[p][name] for p in params]) for name in states_of(case))])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    assert not torch.equal(results[0][0], make_params([Piece((total,))], case.dtype, case.grad_dtype)[0])


# Chunks ---------------------------------------------------------------------------------------------------------------

#: At, before and after the ends of blocks and chunks, aligned and not.
EDGES = tuple(
    Piece((n,), layout)
    for n, layout in itertools.product((511, 512, 1023, 1024, 1025, 2048, 2049, 3584, 5000), ("contiguous", "offset"))
)


def of_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "chunk_size", lambda elements, processors: size)


@pytest.mark.parametrize("size", [1024, 2048, 4096])
@pytest.mark.parametrize("case", with_dtypes([BODIES[1]], [(f32, f32), (bf16, f32), (f64, f64)]), ids=ids)
def test_several_chunks_a_segment(
    backend: str, case: Case, size: int, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_size(size, monkeypatch)
    found = run(case, backend, pieces=EDGES, steps=2)
    came = [min(step for step in range(9) if has_gradient(k, step)) for k in range(len(EDGES))]
    chunks = [-(-piece.shape[0] // size) for piece in EDGES]
    assert launches == [sum(n for n, c in zip(chunks, came, strict=True) if c <= step) for step in range(2)]
    assert_same(found, run(case, "reference", pieces=EDGES, steps=2))


@pytest.mark.parametrize("dtype", [f32, f64])
def test_the_longest_chunks(
    backend: str, dtype: torch.dtype, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_size(mirror.LONGEST, monkeypatch)
    case = with_dtypes([BODIES[3]], [(dtype, dtype)])[0]
    pieces = (Piece((5,)), Piece((2 * mirror.LONGEST + 1700,)))
    assert_same(run(case, backend, pieces=pieces, steps=2), run(case, "reference", pieces=pieces, steps=2))
    assert launches == [4, 4]


def test_chunks_are_taken_by_the_models_size(backend: str, launches: list[int]) -> None:
    """64Ki elements on one processor: chunks of 2048."""
    case = BODIES[2]
    pieces = (Piece((2**16,)), Piece((5,)))
    assert_same(run(case, backend, pieces=pieces, steps=2), run(case, "reference", pieces=pieces, steps=2))
    assert launches == [33, 33]


@pytest.mark.parametrize("case", [BODIES[1], BODIES[3]], ids=ids)
def test_missing_gradients_and_other_sizes(backend: str, case: Case, launches: list[int]) -> None:
    """Without a gradient a segment keeps its chunks, and nothing is written; with another size it is cut anew."""
    results = []
    for which in (backend, "reference"):
        (p, q) = make_params([Piece((2050,)), Piece((40,))], f32, f32)
        opt = optimizer(case, [p, q], which, weight_decay=0.1)
        found = {}
        for step in range(8):
            if step in (4, 6):
                p.grad = None
                p.data = gradient(Piece(({4: 3100, 6: 700}[step],)), f32, 99)
                opt.state[p] = {}
            p.grad = None if step in (1, 2) else gradient(Piece(tuple(p.shape)), f32, step)
            q.grad = None if step == 2 else gradient(Piece((40,)), f32, 50 + step)
            before = snapshot([p], opt)
            opt.step()
            if p.grad is None:
                assert_same(snapshot([p], opt), before)
            found.update({f"{step} {name}": value for name, value in snapshot([p, q], opt).items()})
        results.append(found)
    assert_same(*results)
    assert launches == [4, 4, 4, 5, 5, 2, 2]  # none where no gradient is there


# Buckets --------------------------------------------------------------------------------------------------------------


def mixed(backend: str, device: str = "cpu") -> tuple[Any, list[nn.Parameter]]:
    """An optimizer over all pairs of dtypes, two parameters of each, in two groups."""
    params: list[Any] = []
    for k, (dtype, grad_dtype) in enumerate(DTYPES):
        params += make_params([Piece((33,)), Piece((7, 5), "transposed")], dtype, grad_dtype, k, device)
    groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.03, "lr": 0.2}]
    return wd_kernels.AdamW(groups, lr=0.1, amsgrad=True, backend=backend), params


def test_one_launch_a_bucket(backend: str, launches: list[int]) -> None:
    """Complex parameters share the buckets of their real parts: ten pairs of dtypes are eight buckets."""
    results = []
    for which in (backend, "reference"):
        opt, params = mixed(which)
        found = {}
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = gradient(Piece(tuple(p.shape)), DTYPES[k // 2][1], 100 * step + k)
            opt.step()
            found.update({f"{step} {name}": value for name, value in snapshot(params, opt).items()})
        results.append(found)
    assert_same(*results)
    assert len(launches) == 3 * len(opt._table.buckets) == 24
    assert sorted(launches[:8]) == [2] * 6 + [4] * 2


def test_a_bucket_without_elements_is_not_launched(backend: str, launches: list[int]) -> None:
    params = [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(3, dtype=bf16)), nn.Parameter(torch.ones(0, 4))]
    opt = wd_kernels.SGDW(params, lr=0.5, momentum=0.5, weight_decay=0.5, backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert launches == [1, 1]
    assert [float(opt.state[p]["step"]) for p in params] == [2, 2, 2]
    assert params[1].tolist() == [-0.5625] * 3  # 1 - (0.25 + 0.5) = 0.25; 0.25 - (0.0625 + 0.5 * 1.5)


def test_465_groups_in_one_launch(backend: str, launches: list[int]) -> None:
    results = []
    for which in (backend, "reference"):
        params = make_params([Piece((1 + k % 3,)) for k in range(465)], f32, f32)
        groups = [{"params": [p], "lr": 1e-3 * (k % 50), "weight_decay": 0.01 * k} for k, p in enumerate(params)]
        opt = wd_kernels.AdamW(groups, backend=which)
        for step in range(2):
            for k, p in enumerate(params):
                p.grad = gradient(Piece((1 + k % 3,)), f32, 1000 * step + k)
            opt.step()
        results.append(snapshot(params, opt))
    assert_same(*results)
    assert launches == [465, 465]


# 64-bit arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [2**31 - 1024, 2**31, 2**32 - 1024, 2**32, 2**33 + 1024, 2**40])
@pytest.mark.parametrize("dtypes", [(f32, f32), (bf16, f32), (f64, f64)], ids=str)
def test_offsets_beyond_32_bits(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], begin: int, far: Callable[[Any, int], None]
) -> None:
    """The same elements as the end of a tensor that began `begin` elements before: as in a tensor of that size."""
    for name in ("adamw", "sgdw"):
        case = with_dtypes([{"adamw": BODIES[1], "sgdw": BODIES[3]}[name]], [dtypes])[0]
        results = []
        for which in (backend, "reference"):
            generator = torch.Generator().manual_seed(5)
            values = [torch.randn(n, generator=generator).to(case.dtype) for n in (2500, 7, 1024)]
            held = [guarded(v, k % 2) for k, v in enumerate(values)]
            params = [nn.Parameter(view) for _, view in held]
            opt = optimizer(case, params, which, weight_decay=0.1)
            for step in range(3):
                for k, p in enumerate(params):
                    p.grad_dtype = case.grad_dtype
                    missing = (k, step) == (0, 1)
                    p.grad = None if missing else gradient(Piece(tuple(p.shape)), case.grad_dtype, 10 * step + k)
                if which == backend:
                    far(opt, begin)
                opt.step()
            for (buffer, view), p in zip(held, params, strict=True):
                assert_canaries(buffer, view, f"{p.numel()} elements")
            results.append(snapshot(params, opt))
        assert_same(*results)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], None]:
    """Makes the next step of an optimizer say "`begin` elements into a tensor that lies as much lower in memory"."""
    kept: dict[Mirror, dict[str | int, Tensor]] = {}  # what they hold without it
    begins: list[int] = []
    update = Mirror.update

    def updated(self: Mirror, table: TensorTable, rows: Tensor, processors: int) -> None:
        self.there.update(kept.get(self, {}))
        update(self, table, rows, processors)
        kept[self] = dict(self.there)
        begin = begins.pop()
        (bucket,) = table.buckets
        size = self.size(bucket)
        assert begin % size == 0
        widths = [fmt.dtype.itemsize for fmt in bucket.spec.formats]
        places, moving = self.there["places"].clone(), self.there["moving"].clone()
        for word, width in enumerate((widths[0], *widths[2:])):
            places[:, word] -= begin * width
        moving[:, 0] -= begin * widths[1]
        moving[:, 1] += begin * (moving[:, 1] > 0)
        self.there["places"], self.there["moving"] = places, moving
        self.there[bucket.first] = self.there[bucket.first] + (begin // size * 2**32)

    monkeypatch.setattr(Mirror, "update", updated)
    return lambda opt, begin: begins.append(begin)


@pytest.mark.parametrize("begin", [2**31, 2**32, 2**40])
def test_chunks_beyond_the_end_do_nothing(backend: str, begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count or an end in 32 bits would take them for the beginning."""
    update = Mirror.update

    def updated(self: Mirror, table: TensorTable, rows: Tensor, processors: int) -> None:
        update(self, table, rows, processors)
        (bucket,) = table.buckets
        self.there[bucket.first] = self.there[bucket.first] + (begin // self.size(bucket) * 2**32)

    monkeypatch.setattr(Mirror, "update", updated)
    params = make_params([Piece((2500,)), Piece((3,))], f32, f32)
    for p in params:
        p.grad = torch.ones_like(p)
    opt = wd_kernels.SGDW(params, lr=0.1, momentum=0.9, weight_decay=0.1, backend=backend)
    opt.step()
    for p, start in zip(params, make_params([Piece((2500,)), Piece((3,))], f32, f32), strict=True):
        assert_same_bits(p, start)
        assert not bool(opt.state[p]["momentum_buffer"].any())


# Scalars and controls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", with_dtypes(BODIES, SOME), ids=ids)
def test_frozen_groups_keep_every_bit(backend: str, case: Case) -> None:
    assert_same(frozen_run(case, backend), frozen_run(case, "reference"))


FEW = (Piece((33,)), Piece((5, 7), "transposed"), Piece((1100,)))


@pytest.mark.parametrize("case", with_dtypes(BODIES, [(f32, f32), (f64, f64), (bf16, f32), (c64, c64)]), ids=ids)
def test_skip_leaves_everything(backend: str, case: Case) -> None:
    found = controlled(case, backend, [(1, 0), (1, 1), (math.nan, 1), (1, 0)], pieces=FEW)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    assert float(found[2]["0 step"]) == 1
    assert not torch.equal(found[2]["0"], found[3]["0"])
    assert_same(found[3], controlled(case, "reference", [(1, 0), (1, 1), (math.nan, 1), (1, 0)], pieces=FEW)[3])


@pytest.mark.parametrize("case", with_dtypes(BODIES, DTYPES), ids=ids)
def test_grad_factor_has_the_same_bits(backend: str, case: Case) -> None:
    factors = [(0.3, 0), (1 / 3, 0), (7.7, 0)]
    found = controlled(case, backend, factors, pieces=FEW)[-1]
    assert_same(found, controlled(case, "reference", factors, pieces=FEW)[-1])
    assert not torch.equal(found["0"], controlled(case, "reference", [(1, 0)] * 3, pieces=FEW)[-1]["0"])


# Numbers --------------------------------------------------------------------------------------------------------------


def assert_peculiar(backend: str, case: Case) -> None:
    found = peculiar_run(case, backend)
    assert_same(found, peculiar_run(case, "reference"))
    if case.dtype in (bf16, f16):
        nans = found["0"][found["0"].isnan()].view(torch.int16)
        assert nans.numel() > 0
        assert bool((nans == (0x7FC0 if case.dtype == bf16 else 0x7E00)).all())


@pytest.mark.parametrize("case", with_dtypes(BODIES, REAL), ids=ids)
def test_peculiar_numbers(backend: str, case: Case) -> None:
    assert_peculiar(backend, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", cases(REAL, names=["plain", "amsgrad", "far-end", "no-momentum", "nesterov", "paper"]), ids=ids
)
def test_peculiar_numbers_all(backend: str, case: Case) -> None:
    assert_peculiar(backend, case)


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_every_16_bit_number_and_every_rounding_between(backend: str, dtype: torch.dtype) -> None:
    assert_same(rounding_run(dtype, backend), rounding_run(dtype, "reference"))


# Anything else --------------------------------------------------------------------------------------------------------


@st.composite
def lives(draw: Any) -> dict[str, Any]:
    """Parameters with dtypes, sizes and offsets, their groups, the steps they miss, and the size of a chunk."""
    one = st.fixed_dictionaries(
        {
            "dtypes": st.sampled_from(REAL),
            "n": st.sampled_from((0, 1, 31, 130, 512, 1023, 1025, 1600)) | st.integers(0, 1300),
            "offsets": st.tuples(st.integers(0, 4), st.integers(0, 4)),
            "group": st.integers(0, 2),
            "misses": st.sets(st.integers(0, 2)),
        }
    )
    return {
        "params": draw(st.lists(one, min_size=1, max_size=5)),
        "case": draw(st.sampled_from(cases())),
        "rates": draw(st.lists(st.sampled_from((0.0, 0.01, 0.3)), min_size=9, max_size=9)),
        "size": draw(st.sampled_from((1024, 2048))),
        "clip": draw(st.sampled_from((1.0, 0.3))),
    }


def live(life: dict[str, Any], backend: str) -> Iterator[dict[str, Tensor]]:
    case, params, buffers = life["case"], [], []
    for k, one in enumerate(life["params"]):
        (start,) = make_params([Piece((one["n"],))], *one["dtypes"], seed=k)
        buffers.append(guarded(start.detach(), one["offsets"][0]))
        params.append(nn.Parameter(buffers[-1][1]))
        params[-1].grad_dtype = one["dtypes"][1]
    groups = [
        {"params": [p for p, one in zip(params, life["params"], strict=True) if one["group"] == g], "weight_decay": d}
        for g, d in enumerate((0.1, 0.02, 0.3))
    ]
    opt = optimizer(case, groups, backend)
    opt._table.control[0] = life["clip"]
    for step in range(3):
        for g, group in enumerate(opt.param_groups):
            group["lr"] = life["rates"][3 * step + g]
        for k, (p, one) in enumerate(zip(params, life["params"], strict=True)):
            values = gradient(Piece((one["n"],)), one["dtypes"][1], 10 * step + k)
            p.grad = None if step in one["misses"] else guarded(values, one["offsets"][1])[1]
        opt.step()
        for buffer, view in buffers:
            assert_canaries(buffer, view, f"{view.numel()} elements")
        yield snapshot(params, opt)


@settings(
    max_examples=60, deadline=None, derandomize=bool(os.environ.get("CI")), suppress_health_check=list(HealthCheck)
)
@given(life=lives())
def test_any_life_equals_the_reference(backend: str, life: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        of_size(life["size"], patch)
        found = list(live(life, backend))
    for a, b in zip(found, live(life, "reference"), strict=True):
        assert_same(a, b)


# Failures -------------------------------------------------------------------------------------------------------------


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no such luck")


def upload_fails(patch: pytest.MonkeyPatch, kind: Any) -> None:
    patch.setattr(Mirror, "_send", fail)


def second_kernel_fails(patch: pytest.MonkeyPatch, kind: Any) -> None:
    """The first bucket is ready to go then."""
    calls, launch = [], kind.launch

    def prepared(*args: Any) -> Any:
        calls.append(1)
        return launch(*args) if len(calls) % 2 else fail()

    patch.setattr(kind, "launch", prepared)


def first_launch_fails(patch: pytest.MonkeyPatch, kind: Any) -> None:
    patch.setattr(kind, "launch", lambda *args: fail)


@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("spoil", [upload_fails, second_kernel_fails, first_launch_fails])
def test_a_failure_leaves_everything(backend: str, spoil: Callable[..., None], steps: int, rule: str) -> None:
    """Parameters, states and counts are as they were; the steps after it are as if it had not been tried."""
    case = Case(rule, "any", {"amsgrad": True} if rule == "adamw" else {"momentum": 0.9, "dampening": 0.5})
    twins = []
    for _ in range(2):
        params = [*make_params(SMALL[:6], f32, f32), *make_params(SMALL[:6], bf16, bf16)]
        twins.append((params, optimizer(case, params, backend, weight_decay=0.1)))

    def gradients(step: int) -> None:
        for params, _ in twins:
            for k, p in enumerate(params):
                missing = (k + step) % 5 == 4
                p.grad = None if missing else gradient(Piece(tuple(p.shape)), p.dtype, 100 * step + k)

    for step in range(steps):
        gradients(step)
        for _, opt in twins:
            opt.step()
    (params, opt), (others, twin) = twins
    gradients(7)
    before = snapshot(params, opt)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, type(BACKENDS[backend]))
            with pytest.raises(RuntimeError, match="no such luck"):
                opt.step()
    after = snapshot(params, opt)
    assert_same({name: after[name] for name in before}, before)
    assert all(
        not bool(bits(after[name]).any()) for name in after.keys() - before.keys()
    )  # states that are yet to begin
    for step in (7, 8):
        gradients(step)
        opt.step()
        twin.step()
        assert_same(snapshot(params, opt), snapshot(others, twin))
    assert not torch.equal(before["0"], params[0])
