"""backend="triton" in Triton's interpreter against backend="reference": parameters and states equal to the bit.

The interpreter takes hints of alignment on trust; here every one is checked, since a false one is a fault on a device.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import subprocess
import sys
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
from wd_kernels import mirror, native
from wd_kernels.backends import BACKENDS, FallbackWarning, resolve
from wd_kernels.backends import triton as backend_module
from wd_kernels.mirror import Mirror
from wd_kernels.slots import Spec
from wd_kernels.storage import format_of
from wd_kernels.table import TensorTable

pytest.importorskip("triton", reason="the backend under test needs triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow and NaN

#: A dtype pair for each path of the formats.
SOME = [(f32, f32), (bf16, f32), (f16, f16), (f64, f64)]


@pytest.fixture(autouse=True)
def promises(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Checks every hint of alignment that a kernel gives; returns them."""
    found: list[int] = []
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_core

    def watched(lang: Any, scope: Any) -> None:
        patch(lang, scope)
        give = lang.multiple_of

        def multiple_of(value: Any, divisor: Any, **more: Any) -> Any:
            first = int(value.handle.data.flat[0])
            assert first % int(divisor) == 0, f"{first} was promised to be a multiple of {divisor}"
            found.append(int(divisor))
            return give(value, divisor, **more)

        scope.set_attr(lang, "multiple_of", multiple_of)

    monkeypatch.setattr(interpreter, "_patch_lang_core", watched)
    return found


def test_the_kernels_are_interpreted() -> None:
    assert BACKENDS["triton"].why_not() is None
    assert backend_module.interpreted()


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


def assert_matrix(case: Case, steps: int, seed: int) -> None:
    found = run(case, "triton", pieces=SMALL, steps=steps, seed=seed)
    assert_same(found, run(case, "reference", pieces=SMALL, steps=steps, seed=seed))
    counts = [int(value) for name, value in found.items() if name.endswith(" step")]
    assert len(counts) == len(SMALL)
    assert len(set(counts)) > 1  # some gradients were missing
    assert {name.split()[1] for name in found if " " in name} == {"step", *states_of(case)}
    for k, p in enumerate(make_params(SMALL, case.dtype, case.grad_dtype, seed)):
        assert bool(found[f"{k}"].isfinite().all())
        assert p.numel() < 20 or not torch.equal(found[f"{k}"], p.detach())


@pytest.mark.parametrize("case", part(), ids=ids)
def test_matrix(case: Case, launches: list[int], promises: list[int]) -> None:
    assert_matrix(case, steps=7, seed=0)  # the seventh is frozen
    assert len(launches) == 7
    assert promises  # blocks of aligned segments


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(DTYPES), ids=ids)
def test_matrix_all(case: Case) -> None:
    assert_matrix(case, steps=8, seed=2)


# Addresses ------------------------------------------------------------------------------------------------------------


def assert_placed(case: Case, offset: int, sizes: Sequence[int]) -> None:
    found, flags = placed_run(case, "triton", offset, sizes)
    assert_same(found, placed_run(case, "reference", offset, sizes)[0])
    widths = {dtype.itemsize for dtype in (case.dtype, case.grad_dtype, arithmetic(case))}
    assert flags == ({1} if all(offset * width % 16 == 0 for width in widths) else {0, 1})


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("case", with_dtypes([BODIES[1], BODIES[3]], SOME), ids=ids)
def test_unaligned_roles_and_canaries(case: Case, offset: int) -> None:
    """Each role in turn, and all of them, off alignment, beside aligned segments in the same launch."""
    assert_placed(case, offset, (1030,))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("case", with_dtypes(BODIES, REAL), ids=ids)
def test_unaligned_roles_and_canaries_all(case: Case, offset: int) -> None:
    assert_placed(case, offset, (1, 7, 511, 1024, 1537))


def test_only_aligned_segments_take_the_vector_path(promises: list[int]) -> None:
    """The interpreter gives the same bits on both paths; the hints tell them apart."""
    case = with_dtypes([BODIES[0]], [(bf16, f32)])[0]
    for offset, n, expected in ((0, 1023, 0), (0, 1024, 4), (0, 2100, 8), (1, 2100, 0)):
        p = nn.Parameter(guarded(torch.randn(n).to(bf16), offset)[1])
        p.grad_dtype = f32
        p.grad = torch.randn(n)
        promises.clear()
        optimizer(case, [p], "triton").step()
        assert len(promises) == expected, (offset, n)  # one for each role and block
        assert set(promises) <= {8, 16}  # bfloat16 beside float32


@pytest.mark.parametrize("case", with_dtypes([BODIES[1], BODIES[2]], [(f32, f32), (bf16, bf16)]), ids=ids)
def test_split_tensor(case: Case) -> None:
    """A tensor stepped whole or as neighbours of odd sizes in one memory has the same bits."""
    sizes = (1, 15, 17, 1000, 33, 1090)
    total, results = sum(sizes), []
    for parts in ((total,), sizes):
        whole = make_params([Piece((total,))], case.dtype, case.grad_dtype)[0].detach()
        params = [nn.Parameter(part) for part in whole.split(parts)]
        opt = optimizer(case, params, "triton", weight_decay=0.1)
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
def test_several_chunks_a_segment(case: Case, size: int, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    of_size(size, monkeypatch)
    found = run(case, "triton", pieces=EDGES, steps=2)
    came = [min(step for step in range(9) if has_gradient(k, step)) for k in range(len(EDGES))]
    chunks = [-(-piece.shape[0] // size) for piece in EDGES]
    assert launches == [sum(n for n, c in zip(chunks, came, strict=True) if c <= step) for step in range(2)]
    assert_same(found, run(case, "reference", pieces=EDGES, steps=2))


@pytest.mark.parametrize("dtype", [f32, f64])
def test_the_longest_chunks(dtype: torch.dtype, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    of_size(mirror.LONGEST, monkeypatch)
    case = with_dtypes([BODIES[3]], [(dtype, dtype)])[0]
    pieces = (Piece((5,)), Piece((2 * mirror.LONGEST + 1700,)))
    assert_same(run(case, "triton", pieces=pieces, steps=2), run(case, "reference", pieces=pieces, steps=2))
    assert launches == [4, 4]


def test_the_interpreter_takes_chunks_by_the_models_size(launches: list[int]) -> None:
    """64Ki elements on one processor: chunks of 2048."""
    case = BODIES[2]
    pieces = (Piece((2**16,)), Piece((5,)))
    assert_same(run(case, "triton", pieces=pieces, steps=2), run(case, "reference", pieces=pieces, steps=2))
    assert launches == [33, 33]


@pytest.mark.parametrize("case", [BODIES[1], BODIES[3]], ids=ids)
def test_missing_gradients_and_other_sizes(case: Case, launches: list[int]) -> None:
    """Without a gradient a segment keeps its chunks, and nothing is written; with another size it is cut anew."""
    results = []
    for backend in ("triton", "reference"):
        (p, q) = make_params([Piece((2050,)), Piece((40,))], f32, f32)
        opt = optimizer(case, [p, q], backend, weight_decay=0.1)
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


def test_one_launch_a_bucket(launches: list[int]) -> None:
    """Complex parameters share the buckets of their real parts: ten pairs of dtypes are eight buckets."""
    results = []
    for backend in ("triton", "reference"):
        opt, params = mixed(backend)
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


def test_a_bucket_without_elements_is_not_launched(launches: list[int]) -> None:
    params = [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(3, dtype=bf16)), nn.Parameter(torch.ones(0, 4))]
    opt = wd_kernels.SGDW(params, lr=0.5, momentum=0.5, weight_decay=0.5, backend="triton")
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert launches == [1, 1]
    assert [float(opt.state[p]["step"]) for p in params] == [2, 2, 2]
    assert params[1].tolist() == [-0.5625] * 3  # 1 - (0.25 + 0.5) = 0.25; 0.25 - (0.0625 + 0.5 * 1.5)


def test_465_groups_in_one_launch(launches: list[int]) -> None:
    results = []
    for backend in ("triton", "reference"):
        params = make_params([Piece((1 + k % 3,)) for k in range(465)], f32, f32)
        groups = [{"params": [p], "lr": 1e-3 * (k % 50), "weight_decay": 0.01 * k} for k, p in enumerate(params)]
        opt = wd_kernels.AdamW(groups, backend=backend)
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
    dtypes: tuple[torch.dtype, torch.dtype], begin: int, far: Callable[[Any, int], None]
) -> None:
    """The same elements as the end of a tensor that began `begin` elements before: as in a tensor of that size."""
    for name in ("adamw", "sgdw"):
        case = with_dtypes([{"adamw": BODIES[1], "sgdw": BODIES[3]}[name]], [dtypes])[0]
        results = []
        for backend in ("triton", "reference"):
            generator = torch.Generator().manual_seed(5)
            values = [torch.randn(n, generator=generator).to(case.dtype) for n in (2500, 7, 1024)]
            held = [guarded(v, k % 2) for k, v in enumerate(values)]
            params = [nn.Parameter(view) for _, view in held]
            opt = optimizer(case, params, backend, weight_decay=0.1)
            for step in range(3):
                for k, p in enumerate(params):
                    p.grad_dtype = case.grad_dtype
                    missing = (k, step) == (0, 1)
                    p.grad = None if missing else gradient(Piece(tuple(p.shape)), case.grad_dtype, 10 * step + k)
                if backend == "triton":
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
def test_chunks_beyond_the_end_do_nothing(begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
    opt = wd_kernels.SGDW(params, lr=0.1, momentum=0.9, weight_decay=0.1, backend="triton")
    opt.step()
    for p, start in zip(params, make_params([Piece((2500,)), Piece((3,))], f32, f32), strict=True):
        assert_same_bits(p, start)
        assert not bool(opt.state[p]["momentum_buffer"].any())


# Scalars and controls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", with_dtypes(BODIES, SOME), ids=ids)
def test_frozen_groups_keep_every_bit(case: Case) -> None:
    assert_same(frozen_run(case, "triton"), frozen_run(case, "reference"))


FEW = (Piece((33,)), Piece((5, 7), "transposed"), Piece((1100,)))


@pytest.mark.parametrize("case", with_dtypes(BODIES, [(f32, f32), (f64, f64), (bf16, f32), (c64, c64)]), ids=ids)
def test_skip_leaves_everything(case: Case) -> None:
    found = controlled(case, "triton", [(1, 0), (1, 1), (math.nan, 1), (1, 0)], pieces=FEW)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    assert float(found[2]["0 step"]) == 1
    assert not torch.equal(found[2]["0"], found[3]["0"])
    assert_same(found[3], controlled(case, "reference", [(1, 0), (1, 1), (math.nan, 1), (1, 0)], pieces=FEW)[3])


@pytest.mark.parametrize("case", with_dtypes(BODIES, DTYPES), ids=ids)
def test_grad_factor_has_the_same_bits(case: Case) -> None:
    factors = [(0.3, 0), (1 / 3, 0), (7.7, 0)]
    found = controlled(case, "triton", factors, pieces=FEW)[-1]
    assert_same(found, controlled(case, "reference", factors, pieces=FEW)[-1])
    assert not torch.equal(found["0"], controlled(case, "reference", [(1, 0)] * 3, pieces=FEW)[-1]["0"])


# Numbers --------------------------------------------------------------------------------------------------------------


def assert_peculiar(case: Case) -> None:
    found = peculiar_run(case, "triton")
    assert_same(found, peculiar_run(case, "reference"))
    if case.dtype in (bf16, f16):
        nans = found["0"][found["0"].isnan()].view(torch.int16)
        assert nans.numel() > 0
        assert bool((nans == (0x7FC0 if case.dtype == bf16 else 0x7E00)).all())


@pytest.mark.parametrize("case", with_dtypes(BODIES, REAL), ids=ids)
def test_peculiar_numbers(case: Case) -> None:
    assert_peculiar(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", cases(REAL, names=["plain", "amsgrad", "far-end", "no-momentum", "nesterov", "paper"]), ids=ids
)
def test_peculiar_numbers_all(case: Case) -> None:
    assert_peculiar(case)


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_every_16_bit_number_and_every_rounding_between(dtype: torch.dtype) -> None:
    assert_same(rounding_run(dtype, "triton"), rounding_run(dtype, "reference"))


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
def test_any_life_equals_the_reference(life: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        of_size(life["size"], patch)
        found = list(live(life, "triton"))
    for a, b in zip(found, live(life, "reference"), strict=True):
        assert_same(a, b)


# Choice and failures --------------------------------------------------------------------------------------------------


def in_a_process(code: str, **env: str) -> str:
    """What a new Python prints, by default without the interpreter."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = """
import sys
def train(backend, steps=3):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 0, 1100)]
    opt = wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1, backend=backend)
    for step in range(steps):
        for k, p in enumerate(params):
            p.grad = None if (step + k) % 3 == 2 else torch.randn(p.shape)
        opt.step()
    return [t.tolist() for t in params + [v for p in params for _, v in sorted(opt.state[p].items())]]
def refused():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = wd_kernels.AdamW([p], backend="triton", weight_decay=0.5)
    try:
        opt.step()
    except RuntimeError as error:
        print(error)
    assert p.tolist() == [1, 1, 1] and not opt.state.get(p), "something was written"
"""
IMPORTS = "import torch, wd_kernels\n"
BLOCKED = "sys.modules['triton'] = None\n"  # an ImportError for whoever asks


def test_as_documented_with_the_environment_variable() -> None:
    """As a user has it, from the start of a process."""
    code = (
        IMPORTS
        + "assert train('triton') == train('reference') == train('cpu')\nprint(train('triton', 2) == train('cpu'))"
    )
    assert in_a_process(code, TRITON_INTERPRET="1") == "False\n"


def test_cpu_tensors_without_the_interpreter_are_an_error_that_says_how() -> None:
    code = IMPORTS + (
        "refused()\n"
        "wd_kernels.backends.BACKENDS['triton'].why_not = lambda: None\n"  # as on a machine with a GPU
        "refused()"
    )
    first, second = in_a_process(code).splitlines()
    for line in (first, second):
        assert line.startswith("backend='triton' cannot be used: ")
        assert "TRITON_INTERPRET=1" in line
        assert "CPU tensors" in line
    assert "no GPU is there" in first or torch.cuda.is_available()
    assert "the tensors are on cpu" in second


def test_without_triton() -> None:
    """One sentence that says so; "auto" steps CPU tensors and misses nothing."""
    code = BLOCKED + IMPORTS + "refused()\nprint(train('auto') == train('reference'))"
    error, same = in_a_process(code).splitlines()
    assert error.startswith("backend='triton' cannot be used: Triton is not there (import of triton halted")
    assert "pip install triton" in error
    assert same == "True"


def test_auto_does_not_import_triton_for_cpu_tensors() -> None:
    """No more of it than torch does by itself where an optimizer is made."""
    count = "print(sorted(m for m in sys.modules if m.split('.')[0] == 'triton' or m.endswith('triton_kernels')))\n"
    code = IMPORTS + count + "torch.optim.AdamW([torch.ones(3)])\n" + count + "train('auto')\ntrain('cpu')\n" + count
    at_import, of_torch, after = in_a_process(code).splitlines()
    assert at_import == "[]"
    assert after == of_torch


def test_triton_that_is_too_old() -> None:
    """Newer ones are used: here, until the import finds that the module is empty."""
    code = IMPORTS + (
        "import importlib.machinery, types\n"
        "train('reference')\n"  # torch imports Triton for itself where an optimizer is made
        "sys.modules['triton'] = fake = types.ModuleType('triton')\n"
        "fake.__spec__ = importlib.machinery.ModuleSpec('triton', None)\n"
        "for fake.__version__ in ('2.3.1', '3.5.9+git1', '3.6', '10.0.0'):\n"
        "    wd_kernels.backends.triton._kernels.cache_clear()\n"
        "    try:\n"
        "        refused()\n"
        "    except AttributeError as error:\n"
        "        print('used', error)"
    )
    first, second, *newer = in_a_process(code).splitlines()
    for version, line in (("2.3.1", first), ("3.5.9+git1", second)):
        assert line == (
            f"backend='triton' cannot be used: Triton {version} is too old: 3.6 is the oldest that is known here"
        )
    assert len(newer) == 2
    assert all(line.startswith("used ") for line in newer)


def spec(device: str, *dtypes: torch.dtype) -> Spec:
    return Spec(torch.device(device), tuple(format_of(dtype) for dtype in dtypes))


def test_the_interpreter_refuses_tensors_of_a_gpu() -> None:
    of_gpu = spec("cuda:0", f32, f32)
    assert BACKENDS["triton"].refuses(spec("cpu", f32, f32)) is None
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot be used: .* on cuda:0, and TRITON_INTERPRET=1"):
        resolve("triton", of_gpu)
    with pytest.warns(FallbackWarning, match="slow reference for tensors on cuda:0: .*TRITON_INTERPRET=1"):
        assert resolve("auto", of_gpu).name == "reference"


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtypes in itertools.product((f32, bf16, f64), repeat=2):
        assert resolve("auto", spec("cpu", *dtypes)).name == "cpu"
    monkeypatch.setattr(native, "WHY_NOT", "it is not there")
    with pytest.warns(FallbackWarning, match="it is not there"):
        assert resolve("auto", spec("cpu", f32, f32)).name == "reference"


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no such luck")


def upload_fails(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mirror, "_send", fail)


def second_compilation_fails(patch: pytest.MonkeyPatch) -> None:
    """The first bucket is ready to go then."""
    calls, launch = [], backend_module.Triton._launch

    def prepared(*args: Any) -> Any:
        calls.append(1)
        return launch(*args) if len(calls) % 2 else fail()

    patch.setattr(backend_module.Triton, "_launch", prepared)


def first_launch_fails(patch: pytest.MonkeyPatch) -> None:
    kernels: Any = importlib.import_module("wd_kernels.backends.triton_kernels")
    patch.setattr(type(kernels.step_kernel), "__getitem__", lambda self, grid: fail)


@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("spoil", [upload_fails, second_compilation_fails, first_launch_fails])
def test_a_failure_leaves_everything(spoil: Callable[[pytest.MonkeyPatch], None], steps: int, rule: str) -> None:
    """Parameters, states and counts are as they were; the steps after it are as if it had not been tried."""
    case = Case(rule, "any", {"amsgrad": True} if rule == "adamw" else {"momentum": 0.9, "dampening": 0.5})
    twins = []
    for _ in range(2):
        params = [*make_params(SMALL[:6], f32, f32), *make_params(SMALL[:6], bf16, bf16)]
        twins.append((params, optimizer(case, params, "triton", weight_decay=0.1)))

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
            spoil(patch)
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
