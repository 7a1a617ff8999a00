"""The kernel matrix: everything that executes the step, against the reference, to the bit, states included.

Cases are covering arrays (covering.py) whose first option is the engine (engines.py): every engine meets every kernel
(rule with and without its optional state x dtypes of parameter and gradient), and every pair of the other options meets
somewhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    EDGES,
    PULLS,
    REAL,
    SMALL,
    STORAGE,
    STORED,
    SUBTRACTED,
    VARIANTS,
    Case,
    Piece,
    assert_canaries,
    assert_same,
    bf16,
    c64,
    c128,
    controlled,
    f16,
    f32,
    f64,
    frozen_run,
    gradient,
    guarded,
    has_gradient,
    make_params,
    masters_of,
    optimizer,
    peculiar_run,
    placed_run,
    rounding_run,
    run,
    scales_of,
    snapshot,
    state_dtype,
    states_of,
)
from cases import (
    PIECES as LAYOUTS,
)
from covering import covering, pairs_of
from engines import COMPILED, CPU, ENGINES, Engine
from torch import nn

from wd_kernels.backends import cpu, device
from wd_kernels.backends.device_copy import DeviceCopy, There, chunk_size
from wd_kernels.layout import Moving, Place
from wd_kernels.rules import DECAY_MODES, RULES

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of overflow and NaN
    pytest.mark.usefixtures("promises"),
]

#: Kernel bodies: a rule with and without its optional state; the variants of the rule that take each.
BODIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "adamw": ("adamw", ("plain", "far-end")),
    "adamw amsgrad": ("adamw", ("amsgrad", "half")),
    "sgdw": ("sgdw", ("momentum", "dampening", "nesterov", "paper")),
    "sgdw without momentum": ("sgdw", ("no-momentum", "paper-no-momentum")),
    "adagradw": ("adagradw", ("plain", "slowed", "begun")),
}
KERNELS = [(body, dtypes) for body in BODIES for dtypes in REAL]
#: And those of other formats: all of the two rules that are used most, and what is new in the others.
KERNELS += [(body, stored) for body in ("adamw", "sgdw") for stored in STORED]
KERNELS += [("adamw amsgrad", STORED[-1]), ("sgdw without momentum", STORED[-1]), ("adagradw", STORED[0])]
INT8 = STORED[1]
COMPLEX = {(f32, f32): (c64, c64), (f64, f64): (c128, c128)}

PIECES = {"small": SMALL, "layouts": LAYOUTS, "edges": EDGES}


def case_of(of: Mapping[str, Any]) -> Case:
    """The case of a row of a covering array."""
    body, dtypes = of["kernel"]
    rule, names = BODIES[body]
    name = names[of["variant"] % len(names)]
    pair = COMPLEX.get(dtypes, dtypes) if of.get("complex") else dtypes
    options, stored = {**VARIANTS[rule][name], "decay": of["decay"]}, "".join(f"-{own}" for own in pair[2:])
    for own in pair[2:]:
        options |= STORAGE[own]
    return Case(rule, f"{name}-{of['decay']}{stored}", options, *pair[:2])


def params_of(found: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> list[Any]:
    """The rows of a covering array as parameters of a test, in the order of engines; those of a GPU are marked."""
    params = []
    for of in sorted(found, key=lambda of: ENGINES.index(of["engine"])):
        words = [str(of["engine"]), str(case_of(of)), *(str(of[name]) for name in options)]
        params.append(pytest.param(of, id="-".join(words), marks=[pytest.mark.gpu] * (of["engine"].form == "gpu")))
    return params


def rows(**options: Sequence[Any]) -> list[Any]:
    """A covering array over all engines, kernels, decay modes, variants and `options`, as parameters of a test."""
    own = {"engine": ENGINES, "kernel": KERNELS, "decay": DECAY_MODES, "variant": range(4)}
    return params_of(covering({**own, **options}), options)


def of_size(size: int | None, patch: pytest.MonkeyPatch) -> None:
    """Chunks of that many elements."""
    if size is not None:
        patch.setattr(device, "chunk_size", lambda elements, processors: size)
        patch.setattr(cpu, "CHUNK", size)


# The matrix -----------------------------------------------------------------------------------------------------------

MATRIX = rows(complex=(False, True), pieces=tuple(PIECES), size=(None, 1024, 2048))


@pytest.mark.parametrize("of", MATRIX)
def test_matrix(of: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven steps, the last frozen; missing and late gradients, two groups, a reload half-way."""
    case, pieces = case_of(of), PIECES[of["pieces"]]
    steps = 3 if of["pieces"] == "edges" else 7
    of_size(of["size"], monkeypatch)
    found = run(case, engine.backend, pieces=pieces, steps=steps, device=engine.device)
    assert_same(found, run(case, "reference", pieces=pieces, steps=steps))
    # AdagradW saves states of what took no step, too: torch's class cannot step a parameter without.
    counts = [int(value) for name, value in found.items() if name.endswith(" step") and value > 0]
    begun = [any(has_gradient(k, step) for step in range(steps)) for k in range(len(pieces))]
    if RULES[case.rule].torch.counts_steps:  # else the reload has begun them anew
        assert len(counts) == sum(begun)
        assert len(set(counts)) > 1  # some gradients were missing
    assert {name.split()[1] for name in found if " " in name} == {
        "step", *states_of(case), *masters_of(case), *scales_of(case),
    }  # fmt: skip
    for k, p in enumerate(make_params(pieces, case.dtype, case.grad_dtype)):
        assert bool(found[f"{k}"].isfinite().all())
        stepped = p.numel() >= 20 and begun[k]
        assert torch.equal(found[f"{k}"], p.detach()) != stepped or p.numel() < 20


def test_the_matrix_has_every_pair() -> None:
    """Every engine with every kernel; every decay mode with every variant and dtype; and so on."""
    found = [param.values[0] for param in MATRIX]
    pairs = pairs_of(found)
    for a, b in itertools.combinations(("engine", "kernel", "decay", "variant", "complex", "pieces", "size"), 2):
        values = {name: {repr(of[name]) for of in found} for name in (a, b)}
        for x, y in itertools.product(values[a], values[b]):
            assert ((a, x), (b, y)) in pairs, (a, x, b, y)
    assert {of["engine"] for of in found} == set(ENGINES)
    assert {case_of(of).dtype for of in found} == {dtype for dtype, _ in DTYPES}
    names = {(rule, name) for rule, own in VARIANTS.items() for name in own}
    assert {(rule, name) for rule, own in BODIES.values() for name in own} == names


@pytest.mark.parametrize("engine", [CPU[-1]], indirect=True, ids=str)
@pytest.mark.parametrize("variant", [(rule, name) for rule, own in VARIANTS.items() for name in own], ids="-".join)
def test_different_decays_differ(engine: Engine, variant: tuple[str, str]) -> None:
    """The matrix could not see a decay that both sides ignore: every mode has results of its own."""
    rule, name = variant
    results = []
    for decay in DECAY_MODES:
        case = Case(rule, decay, {**VARIANTS[rule][name], "decay": decay})
        results.append(run(case, engine.backend, pieces=(Piece((1025,)),))["0"])
    for a, b in itertools.combinations(results, 2):
        assert not torch.equal(a, b)


# Addresses and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", rows(offset=(0, 1, 2, 3, 4), sizes=((1, 7, 1030), (511, 1537), (1024, 130))))
def test_unaligned_roles_and_canaries(of: dict[str, Any], engine: Engine) -> None:
    """Each role in turn, and all of them, off alignment; nothing outside of a tensor is written, nor a gradient."""
    case = case_of(of)
    found, flags = placed_run(case, engine.backend, of["offset"], of["sizes"], engine.device)
    assert_same(found, placed_run(case, "reference", of["offset"], of["sizes"])[0])
    widths = {dtype.itemsize for dtype in (case.dtype, case.grad_dtype, state_dtype(case))}
    assert flags == ({1} if all(of["offset"] * width % 16 == 0 for width in widths) else {0, 1})


FAR = covering({
    "engine": ENGINES[len(CPU) : -2], "body": tuple(BODIES), "dtypes": [(f32, f32), (bf16, f32), (f64, f64), INT8],
    "begin": [2**31 - 1024, 2**31, 2**32 - 1024, 2**32, 2**33 + 1024, 2**40],
})  # fmt: skip


@pytest.mark.parametrize("of", FAR, ids=lambda of: "-".join(map(str, of.values())))
def test_offsets_beyond_32_bits(of: dict[str, Any], engine: Engine, far: Callable[[Any, int], None]) -> None:
    """The same elements as the end of a tensor that began `begin` elements before: as in a tensor of that size."""
    body = of["body"] if (of["body"], of["dtypes"]) in KERNELS else "adamw"
    case = case_of({"kernel": (body, of["dtypes"]), "variant": 0, "decay": "independent"})
    results = []
    for which in (engine.backend, "reference"):
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
            if which == engine.backend:
                far(opt, of["begin"])
            opt.step()
        for (buffer, view), p in zip(held, params, strict=True):
            assert_canaries(buffer, view, f"{p.numel()} elements")
        results.append(snapshot(params, opt))
    assert_same(*results)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], None]:
    """Makes the next step of an optimizer say "`begin` elements into a tensor that lies as much lower in memory"."""
    asked: list[tuple[Any, int]] = []
    update = DeviceCopy.update

    def updated(self: DeviceCopy, parts: There) -> There:
        there = update(self, parts)
        table, begin = asked.pop()
        (bucket,) = table.buckets
        size = chunk_size(sum(table.params[i].numel() for i in bucket.members), 1)
        assert begin % size == 0
        widths = [fmt.dtype.itemsize for fmt in bucket.spec.formats]
        places, moving = there["places"].clone(), there["moving"].clone()
        for word, width in enumerate((widths[0], *widths[2:]), Place.ADDRESSES):
            places[:, word] -= begin * width
        for word in range(bucket.spec.scales):
            places[:, Place.ADDRESSES + len(widths) - 1 + word] -= begin // 32
        places[:, Place.ORIGIN] -= begin  # so that random bits stay
        moving[:, Moving.GRAD] -= begin * widths[1]
        moving[:, Moving.NUMEL] += begin * (moving[:, Moving.NUMEL] > 0)
        chunks = there[bucket.index] + (begin // size * 2**32)
        return {**there, "places": places, "moving": moving, bucket.index: chunks}

    monkeypatch.setattr(DeviceCopy, "update", updated)
    return lambda opt, begin: asked.append((opt._table, begin))


@pytest.mark.parametrize("begin", [2**31, 2**32, 2**40])
@pytest.mark.parametrize("engine", ENGINES[len(CPU) : -2], indirect=True, ids=str)
def test_chunks_beyond_the_end_do_nothing(engine: Engine, begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count or an end in 32 bits would take them for the beginning."""
    update = DeviceCopy.update

    def updated(self: DeviceCopy, parts: There) -> There:
        there = update(self, parts)
        return {**there, 0: there[0] + (begin // chunk_size(2503, 1) * 2**32)}

    monkeypatch.setattr(DeviceCopy, "update", updated)
    case = Case("sgdw", "any", {"momentum": 0.9})
    params = make_params([Piece((2500,)), Piece((3,))], f32, f32)
    for p in params:
        p.grad = torch.ones_like(p)
    opt = optimizer(case, params, engine.backend, weight_decay=0.1)
    opt.step()
    for p, start in zip(params, make_params([Piece((2500,)), Piece((3,))], f32, f32), strict=True):
        assert torch.equal(p, start)
        assert not bool(opt.state[p]["momentum_buffer"].any())


# Numbers and controls -------------------------------------------------------------------------------------------------


def few(**options: Sequence[Any]) -> list[Any]:
    """A smaller covering array: engines, bodies and dtypes meet in pairs."""
    own = {
        "engine": ENGINES,
        "body": tuple(BODIES),
        "dtypes": (*REAL, STORED[0], INT8, *STORED[-2:]),
        "decay": DECAY_MODES,
        "variant": range(4),
    }
    found = covering({**own, **options})
    for of in found:
        body, dtypes = of.pop("body"), of.pop("dtypes")
        of["kernel"] = (body if (body, dtypes) in KERNELS else "adamw"), dtypes
    return params_of(found, options)


@pytest.mark.parametrize("of", few())
def test_peculiar_numbers(of: dict[str, Any], engine: Engine) -> None:
    """No flushing of subnormals, no approximate root or division, canonical NaN in 16 bits."""
    case = case_of(of)
    found = peculiar_run(case, engine.backend, device=engine.device)
    assert_same(found, peculiar_run(case, "reference"))
    if case.dtype in (bf16, f16):
        nans = found["0"][found["0"].isnan()].view(torch.int16)
        assert nans.numel() > 0
        assert bool((nans == (0x7FC0 if case.dtype == bf16 else 0x7E00)).all())


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("of", [pytest.param({"engine": e}, id=str(e), marks=[pytest.mark.gpu] * (e.form == "gpu"))
                                for e in ENGINES])  # fmt: skip
def test_every_16_bit_number_and_every_rounding_between(of: dict[str, Any], engine: Engine, dtype: torch.dtype) -> None:
    assert_same(rounding_run(dtype, engine.backend, engine.device), rounding_run(dtype, "reference"))


@pytest.mark.parametrize("of", few())
def test_frozen_groups_keep_every_bit(of: dict[str, Any], engine: Engine) -> None:
    case = case_of(of)
    assert_same(frozen_run(case, engine.backend, engine.device), frozen_run(case, "reference"))


FEW = (Piece((33,)), Piece((5, 7), "transposed"), Piece((1100,)))


@pytest.mark.parametrize("of", few(complex=(False, True)))
def test_gradient_factors_and_skipped_steps(of: dict[str, Any], engine: Engine) -> None:
    """A skipped step, whose factor is NaN, leaves every bit; other factors scale as in the reference."""
    case, pairs = case_of(of), [(0.3, 0), (1.0, 1), (math.nan, 1), (1 / 3, 0), (7.7, 0)]
    found = controlled(case, engine.backend, pairs, pieces=FEW, device=engine.device)
    for a, b in zip(found, controlled(case, "reference", pairs, pieces=FEW), strict=True):
        assert_same(a, b)
    assert_same(found[0], found[2])
    assert not torch.equal(found[2]["0"], found[3]["0"])
    assert not torch.equal(found[-1]["0"], controlled(case, "reference", [(1, 0)] * 5, pieces=FEW)[-1]["0"])


# What a decay pulls to ------------------------------------------------------------------------------------------------

PULLING = (*REAL, STORED[1], STORED[2], STORED[4], STORED[6], STORED[7], STORED[8], STORED[9])
ANY = [e for e in ENGINES if e in CPU or str(e) in ("triton-interpreted", "triton-gpu")]
OF_CUDA = [e for e in ENGINES if str(e) in ("cuda-on_cpu", "cuda-gpu")]  # which has these formats alone


def has_meaning(of: Mapping[str, Any]) -> bool:
    """A cautious decay is one that is subtracted; a complex weight has no center."""
    options = PULLS[of["pull"]]
    complex_center = "decay_center" in options and of.get("complex") and of["dtypes"] in COMPLEX
    return not complex_center and (of["decay"] in SUBTRACTED or "cautious" not in options)


def pulled_case(of: Mapping[str, Any]) -> Case:
    case = case_of({**of, "kernel": (of["body"], of["dtypes"])})
    options = {**case.options, **PULLS[of["pull"]]}
    return Case(case.rule, f"{case.name}-{of['pull']}", options, case.dtype, case.grad_dtype)


def pulled(engines: Sequence[Engine], dtypes: Sequence[Any], **options: Sequence[Any]) -> list[Any]:
    """A covering array over bodies, formats, pulls and decay modes."""
    own = {"engine": engines, "dtypes": dtypes, "body": tuple(BODIES), "pull": tuple(PULLS), "decay": DECAY_MODES}
    found = covering({**own, "variant": range(4), **options}, has_meaning)
    return [
        pytest.param(of, id=f"{of['engine']}-{pulled_case(of)}", marks=[pytest.mark.gpu] * (of["engine"].form == "gpu"))
        for of in found
    ]


#: What is compiled for all targets (`codegen.PULLED`): body, formats, pull, decay.
OF_PTX = (
    ("adamw", (f32, f32), "cautious-center", "corrected"), ("adamw", (f32, f32), "cautious-to", "lr_scaled"),
    ("adamw", (f32, f32), "to", "metric_proximal"), ("sgdw", (bf16, bf16), "center", "l2"),
    ("sgdw", (bf16, bf16), "cautious", "independent"), ("adagradw", (f32, f32), "to", "proximal"),
)  # fmt: skip


def pulled_on_ptx() -> list[Any]:
    found = []
    for (k, engine), (body, dtypes, pull, decay) in itertools.product(enumerate(COMPILED), OF_PTX):
        of = {"engine": engine, "body": body, "dtypes": dtypes, "pull": pull, "decay": decay, "variant": k}
        found.append(pytest.param({**of, "pieces": "small"}, id=f"{engine}-{pulled_case(of)}"))
    return [own for k, own in enumerate(found) if k % 2 == 0 or k < len(OF_PTX)]  # every other one of later engines


PULLED = [
    *pulled(ANY, PULLING, complex=(False, True), pieces=("small", "edges")),
    *pulled(OF_CUDA, ((f32, f32), (bf16, bf16)), pieces=("small", "edges")),
    *pulled_on_ptx(),
]


@pytest.mark.parametrize("of", PULLED)
def test_pulled_matrix(of: dict[str, Any], engine: Engine) -> None:
    """The matrix again, of kernels whose decay pulls to a center or a reference, or is left out."""
    case, pieces = pulled_case(of), PIECES[of["pieces"]]
    steps = 3 if of["pieces"] == "edges" else 7
    found = run(case, engine.backend, pieces=pieces, steps=steps, device=engine.device)
    assert_same(found, run(case, "reference", pieces=pieces, steps=steps))
    references = [name for name in found if name.endswith("decay_reference")]
    assert bool(references) == ("decay_to" in case.options)
    for name in references:  # what was begun with
        k = int(name.split()[0])
        start = make_params(pieces, case.dtype, case.grad_dtype)[k].detach()
        assert torch.equal(found[name], start.to(found[name].dtype))


@pytest.mark.parametrize("of", [of for of in PULLED if of.values[0]["engine"] not in COMPILED][::4])
def test_peculiar_numbers_that_are_pulled(of: dict[str, Any], engine: Engine) -> None:
    """Infinities, NaN and zeros of both signs, whose product with the update says whether they decay."""
    case = pulled_case({**of, "complex": False})
    assert_same(peculiar_run(case, engine.backend, device=engine.device), peculiar_run(case, "reference"))
    assert_same(frozen_run(case, engine.backend, engine.device), frozen_run(case, "reference"))


# What a launch moves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [of for of in few() if of.values[0]["engine"] in COMPILED])
def test_bytes_are_those_of_the_model(of: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are read once, parameters and states once each way: every element, by one thread."""
    from byte_model import step_bytes

    engine, case = of["engine"], case_of(of)
    backend = engine.provide(monkeypatch)
    sizes = (2500, 7, 1024, 0)
    params = make_params(
        [Piece((n,), "offset" if n == 7 else "contiguous") for n in sizes], case.dtype, case.grad_dtype
    )
    opt = optimizer(case, params, engine.backend, weight_decay=0.1)
    for step in range(2):
        for k, p in enumerate(params):
            p.grad = None if (k, step) == (0, 1) else gradient(Piece(tuple(p.shape)), case.grad_dtype, 10 * step + k)
        opt.step()
    for step, launch in enumerate(backend.launches):
        memory, n = launch.memory, sum(sizes[step:])
        masters = [*masters_of(case).values()]
        names = ["parameter", *(f"state {k}" for k in range(len(states_of(case)))), *["master"] * len(masters)]
        copied = masters == [f32]  # a parameter that is written, and not read
        assert memory.moved("gradient") == (n * case.grad_dtype.itemsize, 0)
        assert memory.moved("parameter") == ((not copied) * n * case.dtype.itemsize, n * case.dtype.itemsize)
        total = sum(sum(memory.moved(name)) for name in ("gradient", *names))
        model = step_bytes(of["kernel"][0], case.dtype, case.grad_dtype, state_dtype(case), *masters)
        assert total == n * int(model)  # but for scales, which several threads read
        tiles = sum(-(-size // 32) for size in sizes[step:])
        for k in range(len(scales_of(case))):
            assert memory.touched(f"scale {k}") == (tiles, tiles)
        for name in names:
            assert memory.touched(name) == (0 if copied and name == "parameter" else n, n)
        assert memory.touched("gradient") == (n, 0)
    assert len(backend.launches) == 2
