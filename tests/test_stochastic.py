"""State formats and stochastic rounding: unbiased, uncorrelated, the same bits however a step is taken; saved."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import CLASSES, Piece, assert_same, bf16, f16, f32, f64, gradient, make_params, snapshot
from engines import COMPILED, CPU, SOURCES, Engine, engine_params
from torch import Tensor, nn

import wd_kernels
from wd_kernels import functional, reference
from wd_kernels.layout import origins
from wd_kernels.reference import Draws
from wd_kernels.sharding import shard_offset

MASK = 2**64 - 1


# Random bits ----------------------------------------------------------------------------------------------------------


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def draw(seed: int, step: int, role: int, n: int) -> int:
    """Numerics, section 6, in whole numbers."""
    key = mix((mix((mix(seed) + step) & MASK) + role // 2) & MASK)
    x = ((n % 2**32) * 0x9E3779B1 + (n // 2**32) * 0x85EBCA77 + key) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D + (key >> 32)) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    x ^= x >> 16
    return x >> 16 if role % 2 == 0 else x % 2**16


def test_bits_are_those_of_the_page() -> None:
    elements = torch.tensor([0, 1, 2, 31, 1000, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**45])
    for seed, step, origin, role in [(0, 1, 0, 0), (7, 2, 64, 2), (2**53 - 1, 2**40 + 3, 2**32 - 32, 3), (5, 9, 32, 4)]:
        found = Draws(seed, step, origin, role).bits(elements).tolist()
        assert found == [draw(seed, step, role, n + origin) for n in elements.tolist()]


def deviations(draws: Tensor) -> Tensor:
    """Of 16 bits from their mean, in standard deviations."""
    return ((draws.double() + 0.5) / 65536 - 0.5) * math.sqrt(12)


def correlations(a: Tensor, b: Tensor, lags: int) -> Tensor:
    """Of a with b, which is shifted by up to so many elements either way, in standard errors: [2 * lags]."""
    n = a.numel()
    spectrum = torch.fft.rfft(a, 2 * n) * torch.fft.rfft(b, 2 * n).conj()
    found = torch.fft.irfft(spectrum, 2 * n) / math.sqrt(n)
    return torch.cat([found[:lags], found[-lags:]])


N = 2**21
OTHERS: dict[str, Draws] = {
    "step": Draws(0, 2, 0), "seed": Draws(1, 1, 0), "tensor": Draws(0, 1, 2**21), "far tensor": Draws(0, 1, 2**32),
    "another word": Draws(0, 1, 0, 2), "another half": Draws(0, 1, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("role", [0, 3])
def test_neighbours_are_uncorrelated(role: int) -> None:
    """The numbers, their upper and their lowest bits; 5.5 standard errors are one in 10^7."""
    bits = Draws(0, 1, 0, role).bits(torch.arange(N))
    for values in (deviations(bits), (bits >> 15) * 2.0 - 1, (bits & 1) * 2.0 - 1):
        found = correlations(values.double(), values.double(), 40_000)
        assert float(found[1:].abs().max()) < 5.5
    counts = torch.bincount(bits >> 4, minlength=4096).double()
    assert abs(float(((counts - N / 4096) ** 2 / (N / 4096)).sum()) - 4095) < 5 * math.sqrt(2 * 4095)


@pytest.mark.parametrize("other", OTHERS)
def test_steps_seeds_tensors_and_roles_are_uncorrelated(other: str) -> None:
    a, b = (deviations(draws.bits(torch.arange(N))) for draws in (Draws(0, 1, 0), OTHERS[other]))
    found = correlations(a, b, 40_000)
    assert float(found.abs().max()) < 5.5


def test_rounding_is_unbiased_in_every_binade() -> None:
    """10^7 numbers; errors in units of the last place, whose deviation for a lost part f is sqrt(f (1 - f))."""
    each = 40_000
    exponents = torch.arange(-126, 127)
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.randint(0, 2**23, (exponents.numel(), each), generator=generator, dtype=torch.int32)
    signs = torch.randint(0, 2, mantissas.shape, generator=generator, dtype=torch.int32) << 31
    values = (signs | ((exponents.int() + 127) << 23)[:, None] | mantissas).view(f32)
    stored = torch.empty_like(values, dtype=bf16)
    reference.store(stored, values, Draws(3, 1, 0))
    ulp = torch.ldexp(torch.ones(exponents.numel(), dtype=f64), exponents - 7)[:, None]
    error = (stored.double() - values.double()) / ulp * torch.where(values < 0, -1.0, 1.0)
    lost = (mantissas & 0xFFFF).double() / 65536
    assert bool((error.abs() < 1).all())
    assert bool((stored.double() == values.double())[lost == 0].all())
    deviation = (lost * (1 - lost)).sum(1).sqrt()
    assert abs(float(error.sum() / (deviation.square().sum().sqrt()))) < 3
    of_binades = error.sum(1) / deviation
    assert float(of_binades.abs().max()) < 4.2  # of 253: one in 150 has more by chance
    assert 0.8 < float(of_binades.square().mean()) < 1.2


# The same bits, however a step is taken -------------------------------------------------------------------------------

ALL: dict[str, Any] = {"state_dtype": "param", "stochastic_rounding": True, "seed": 9}
SHAPES = ((40, 50), (7,), (33, 3), (0,), (1025,))


def trained(opt: Any, params: Sequence[Tensor], steps: Sequence[int]) -> dict[str, Tensor]:
    for t in steps:
        for k, p in enumerate(params):
            grad = gradient(Piece(tuple(p.shape)), bf16, 100 * t + k)
            if p.grad is not None:
                p.grad.copy_(grad)
            else:
                p.grad = grad
        opt.step()
    return snapshot(params, opt)


def fresh() -> list[Tensor]:
    return make_params([Piece(shape) for shape in SHAPES], bf16, bf16)


@pytest.fixture(scope="module")
def plainly() -> dict[str, Tensor]:
    """Five steps of parameters as they are."""
    params = fresh()
    return trained(wd_kernels.AdamW(params, weight_decay=0.1, **ALL), params, range(5))


def test_flat(plainly: dict[str, Tensor]) -> None:
    params = fresh()
    wd_kernels.flatten_(params)
    opt = wd_kernels.AdamW(params, weight_decay=0.1, **ALL)
    found = trained(opt, params, range(5))
    assert len(opt._table.segments.moving) == 2  # one run, and what is empty
    assert_same(found, plainly)


def test_flat_in_another_order(plainly: dict[str, Tensor]) -> None:
    """Neighbours in memory that are none among the optimizer's parameters are no run."""
    params = fresh()
    wd_kernels.flatten_(params[::-1])
    assert_same(trained(wd_kernels.AdamW(params, weight_decay=0.1, **ALL), params, range(5)), plainly)


@pytest.mark.parametrize("rule", CLASSES)
def test_resumed(rule: str) -> None:
    """The count of a step is saved, where torch's class has none, too."""
    runs, more = [], {"momentum": 0.9} if rule == "sgdw" else {}
    for resumed in (False, True):
        params = fresh()
        make = partial(CLASSES[rule], params, lr=0.01, weight_decay=0.1, **ALL, **more)
        opt = make()
        trained(opt, params, range(2))
        if resumed:
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            opt = make()
            opt.load_state_dict(torch.load(file, weights_only=True))
            assert opt.param_groups[0]["seed"] == 9
        runs.append(trained(opt, params, range(2, 5)))
    assert_same(*runs)


def test_released(plainly: dict[str, Tensor]) -> None:
    """A block of a gradient release numbers elements as the optimizer does."""
    params = fresh()
    model = nn.Module()
    for k, p in enumerate(params):
        model.register_parameter(f"p{k}", p)
    opt = wd_kernels.AdamW(params, weight_decay=0.1, **ALL)
    wd_kernels.release_gradients(model, opt, blocks=[[p] for p in params])
    for t in range(5):
        grads = [gradient(Piece(shape), bf16, 100 * t + k) for k, shape in enumerate(SHAPES)]
        sum((p * grad).sum() for p, grad in zip(params, grads, strict=True)).backward()
        opt.step()
    assert_same(snapshot(params, opt), plainly)


def test_functional_lists(plainly: dict[str, Tensor]) -> None:
    """Natively and, in two dtypes at once, through Python."""
    params = [p.detach() for p in fresh()]
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for t in range(5):
        grads = [gradient(Piece(shape), bf16, 100 * t + k) for k, shape in enumerate(SHAPES)]
        roles = [params, grads, *states]
        if t % 2:
            roles = [[*own, torch.zeros(3, dtype=f64)] for own in roles]
        functional.adamw_(*roles, step=t + 1, lr=1e-3, weight_decay=0.1, stochastic_rounding=True, seed=9)
    for k, p in enumerate(params):
        for name, t in zip(("", " exp_avg", " exp_avg_sq"), (p, states[0][k], states[1][k]), strict=True):
            assert_same_bits(t, plainly[f"{k}{name}"])


EVERYWHERE = [*CPU, *SOURCES, *(e for e in COMPILED if str(e) in ("triton-newest-sm_90", "cuda-nvcc-sm_90"))]


@pytest.mark.parametrize("engine", engine_params(tuple(EVERYWHERE)))
def test_numbers_beyond_32_bits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that begin before, at and after a multiple of 2^32, one of which passes it."""
    engine.provide(monkeypatch)
    found = []
    for backend in (engine.backend, "reference"):
        params = make_params([Piece((1100,)), Piece((2100,)), Piece((77,), "offset")], bf16, bf16)
        opt = wd_kernels.AdamW(params, weight_decay=0.1, backend=backend, **ALL)
        begin = (2**32 - 1120 - 1056, 2**32 - 1056, 2**35 + 1056)
        opt._table.origins = dict(zip(map(id, params), begin, strict=True))
        found.append(trained(opt, params, range(2)))
    assert_same(*found)
    params = make_params([Piece((1100,)), Piece((2100,)), Piece((77,), "offset")], bf16, bf16)
    near = trained(wd_kernels.AdamW(params, weight_decay=0.1, **ALL), params, range(2))
    assert not torch.equal(near["1"], found[0]["1"])


def test_origins() -> None:
    params = [torch.zeros(5, 7), torch.zeros(0), torch.zeros(32, dtype=torch.complex64), torch.zeros(1)]
    assert origins(params) == [0, 64, 64, 128]
    assert shard_offset(params[0]) == 0


# What it is for -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stochastic", "ratio"), [(True, 0.9512), (False, 1.0)])
def test_decay_survives_bfloat16(stochastic: bool, ratio: float) -> None:
    """500 steps of lr * weight_decay = 1e-4 and no gradient."""
    p = nn.Parameter(torch.randn(20_000, generator=torch.Generator().manual_seed(0)).to(bf16))
    before = p.detach().float().norm()
    opt = wd_kernels.AdamW([p], lr=1e-3, weight_decay=0.1, stochastic_rounding=stochastic, state_dtype="param")
    p.grad = torch.zeros_like(p)
    for _ in range(500):
        opt.step()
    assert float(p.detach().float().norm() / before) == pytest.approx(ratio, abs=0.002 if stochastic else 0)


@pytest.mark.parametrize(("stochastic", "least", "most"), [("states", 0.36, 0.375), (False, 0.99, 1.0)])
def test_second_moments_fall(stochastic: str | bool, least: float, most: float) -> None:
    """0.999^1000 is 0.3677; to nearest, 8 bits lose every thousandth."""
    p = nn.Parameter(torch.ones(20_000))
    opt = wd_kernels.AdamW([p], lr=0.0, state_dtype=bf16, stochastic_rounding=stochastic)
    p.grad = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    opt.step()
    before = opt.state[p]["exp_avg_sq"].double().sum()
    p.grad.zero_()
    for _ in range(1000):
        opt.step()
    assert least < float(opt.state[p]["exp_avg_sq"].double().sum() / before) <= most


# What is stored, saved and loaded -------------------------------------------------------------------------------------

ASKED: list[tuple[Any, torch.dtype, tuple[torch.dtype, torch.dtype]]] = [
    (f32, bf16, (f32, f32)), (bf16, f32, (bf16, bf16)), ("param", bf16, (bf16, bf16)), ("param", f32, (f32, f32)),
    ("param", f16, (f16, f16)), ({"exp_avg": bf16}, f32, (bf16, f32)), ({"exp_avg_sq": "bfloat16"}, bf16, (f32, bf16)),
    ("exp_avg=param,exp_avg_sq=bfloat16", f64, (f64, bf16)),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "dtype", "stored"), ASKED, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_states_are_stored_as_asked(asked: Any, dtype: torch.dtype, stored: Any, backend: str) -> None:
    p = nn.Parameter(torch.ones(40, dtype=dtype))
    opt = wd_kernels.AdamW([p], state_dtype=asked, backend=backend)
    p.grad = torch.ones_like(p)
    if bf16 in stored and dtype == f64:
        with pytest.raises(TypeError, match=r"state 'exp_avg_sq' of parameter 0 of group 0.*allowed .*torch.float64"):
            opt.step()
        assert torch.equal(p, torch.ones_like(p))
        assert not opt.state
        return
    opt.step()
    assert (opt.state[p]["exp_avg"].dtype, opt.state[p]["exp_avg_sq"].dtype) == stored
    saved = opt.state_dict()["state"][0]
    assert (saved["exp_avg"].dtype, saved["exp_avg_sq"].dtype) == stored


@pytest.mark.parametrize("rule", CLASSES)
def test_param_is_torchs_layout(rule: str) -> None:
    """State for state, byte for byte; and torch's class goes on with them."""
    names = {"adamw": torch.optim.AdamW, "sgdw": torch.optim.SGD, "adagradw": torch.optim.Adagrad}
    more = {"momentum": 0.9} if rule == "sgdw" else {}
    p, q = (nn.Parameter(torch.ones(40, dtype=bf16)) for _ in range(2))
    ours, theirs = CLASSES[rule]([p], state_dtype="param", **more), names[rule]([q], **more)
    for opt, own in ((ours, p), (theirs, q)):
        own.grad = torch.ones_like(own)
        opt.step()
    kept = [{n: t.nbytes for n, t in opt.state[own].items() if n != "step"} for opt, own in ((ours, p), (theirs, q))]
    assert kept[0] == kept[1]
    ours.load_state_dict(theirs.state_dict())
    for name, size in kept[1].items():
        assert ours.state[p][name].nbytes == size
        assert_same_bits(ours.state[p][name], theirs.state[q][name])


def test_wider_states_are_rounded_when_asked() -> None:
    p = nn.Parameter(torch.ones(40))
    wide = wd_kernels.AdamW([p])
    p.grad = torch.linspace(-1, 1, 40)
    wide.step()
    narrow = wd_kernels.AdamW([p], state_dtype=bf16)
    before = {name: t.clone() for name, t in narrow.state.get(p, {}).items()}
    with pytest.raises(TypeError, match=r"'exp_avg' of parameter 0 of group 0 has dtype torch.float32.*convert_states"):
        narrow.load_state_dict(wide.state_dict())
    assert dict(narrow.state.get(p, {})) == before
    narrow.load_state_dict(wide.state_dict(), convert_states=True)
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(narrow.state[p][name], wide.state[p][name].bfloat16())
    again = wd_kernels.AdamW([p])
    again.load_state_dict(narrow.state_dict())  # which is exact
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(again.state[p][name], narrow.state[p][name].float())


def test_a_state_of_another_dtype_is_an_error() -> None:
    p = nn.Parameter(torch.ones(40))
    opt = wd_kernels.AdamW([p], state_dtype=bf16)
    p.grad = torch.ones(40)
    opt.step()
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].float() + 1e-3
    before = snapshot([p], opt)
    with pytest.raises(TypeError, match=r"the state 'exp_avg' of parameter 0 of group 0 has dtype torch.float32"):
        opt.step()
    assert_same(snapshot([p], opt), before)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"state_dtype": torch.float64}, ValueError, r"state_dtype=torch.float64 in the arguments: allowed are"),
    ({"state_dtype": 16}, TypeError, r"state_dtype=16 in the arguments: allowed are"),
    ({"state_dtype": {"exp_avg": "int4"}}, ValueError, r"state_dtype\['exp_avg'\]='int4'"),
    ({"state_dtype": {"momentum": bf16}}, ValueError, r"names \['momentum'\]: the states here are \['exp_avg', "),
    ({"stochastic_rounding": "weights"}, ValueError, "stochastic_rounding='weights' in the arguments"),
    ({"stochastic_rounding": None}, ValueError, "stochastic_rounding=None in the arguments"),
    ({"seed": -1}, ValueError, "seed=-1 in the arguments"),
    ({"seed": 2**53}, ValueError, "seed=9007199254740992 in the arguments"),
    ({"seed": 0.5}, ValueError, "seed=0.5 in the arguments"),
    ({"seed": "a"}, TypeError, "seed='a' in the arguments"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        wd_kernels.AdamW([nn.Parameter(torch.ones(3))], **options)


def test_float16_is_not_rounded_stochastically() -> None:
    p = nn.Parameter(torch.ones(3, dtype=f16))
    opt = wd_kernels.AdamW([p], stochastic_rounding=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"stochastic_rounding for parameter 0 of group 0, which has .*float16"):
        opt.step()
    assert torch.equal(p, torch.ones_like(p))


def test_functional_states_must_have_a_format() -> None:
    p = torch.ones(3, dtype=f64)
    with pytest.raises(TypeError, match=r"exp_avg_sqs\[0\] has dtype torch.bfloat16: .*float64"):
        functional.adamw_([p], [p], [torch.zeros(3, dtype=f64)], [torch.zeros(3, dtype=bf16)], step=1)


def test_groups_have_formats_of_their_own() -> None:
    params = [nn.Parameter(torch.ones(40, dtype=bf16)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "state_dtype": bf16, "seed": 4},
              {"params": params[2:], "state_dtype": {"exp_avg": bf16}, "stochastic_rounding": "params"}]  # fmt: skip
    opt = wd_kernels.AdamW(groups, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.linspace(-1, 1, 40).to(bf16)
        opt.step()
    kept = [[opt.state[p][name].dtype for name in ("exp_avg", "exp_avg_sq")] for p in params]
    assert kept == [[f32, f32], [bf16, bf16], [bf16, f32]]
    assert [group.get("state_dtype") for group in opt.param_groups] == [None, "bfloat16", "exp_avg=bfloat16"]
    assert len(opt._table.buckets) == 3
