"""Averages of weights: every engine's, torch's, timm's formulas, hand-worked numbers; swapped, saved, loaded."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import ranks
import torch
from bits import assert_same_bits
from cases import CLASSES, Piece, bf16, c64, f16, f32, f64, gradient, make_params, snapshot
from covering import covering
from engines import CPU, ENGINES, MIRRORED, SOURCES, Engine, engine_params
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wd_kernels
from wd_kernels.averages import EMA, Mean, RatioEMA, WarmedEMA
from wd_kernels.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow

PIECES = (
    Piece((5,)), Piece((1500,)), Piece((0,)), Piece((2049,)), Piece((13, 7), "transposed", "transposed"),
    Piece((4096,)),
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {}, "adamw amsgrad": {"amsgrad": True}, "sgdw": {"momentum": 0.9}, "sgdw without momentum": {},
    "adagradw": {"lr_decay": 0.1},
}  # fmt: skip
#: What is stored how: parameter, gradient, options of the optimizer.
STORED: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "float32": (f32, f32, {}),
    "float64": (f64, f64, {}),
    "bfloat16": (bf16, bf16, {}),
    "bfloat16 copy": (bf16, bf16, {"master_weights": "float32"}),
    "split32": (bf16, bf16, {"master_weights": "split32"}),
    "float16, stochastic average": (f16, f32, {"ema_dtype": "bfloat16", "seed": 3}),
    "split24, all in 8 bits": (bf16, bf16, {"master_weights": "split24", "state_dtype": "int8", "ema_dtype": "int8"}),
    "stochastic, nearest average": (bf16, f32, {"stochastic_rounding": "params", "ema_dtype": "param"}),
}
COMPILED = ("float32", "float64", "bfloat16", "bfloat16 copy")
SHAPES = (0.75, EMA(0.5, after=1), WarmedEMA(0.9, gamma=2.0), RatioEMA(0.4, after=-1), Mean(after=1), lambda t: 1.0 / t)


def life(
    kind: str, stored: str, shape: Any, backend: str, pieces: tuple[Piece, ...] = PIECES, device: Any = None,
    steps: int = 4, **more: Any,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """All there is after each step, of three groups: averaged, not averaged, averaged otherwise and frozen once."""
    dtype, grad_dtype, options = STORED[stored]
    params = make_params(pieces, dtype, grad_dtype, device=device)
    groups = [
        {"params": params[:3]}, {"params": params[3:4], "ema_decay": None},
        {"params": params[4:], "ema_decay": 0.25, "lr": 0.02},
    ]  # fmt: skip
    rule = kind.split(" ")[0]
    opt = CLASSES[rule](
        groups, lr=0.05, weight_decay=0.2, ema_decay=shape, backend=backend, **OPTIONS[kind], **options, **more
    )
    found = []
    for t in range(1, steps + 1):
        opt.param_groups[2]["lr"] = 0.0 if t == 3 else 0.02
        for k, (p, piece) in enumerate(zip(params, pieces, strict=True)):
            p.grad = None if (t, k) == (2, 1) else gradient(piece, grad_dtype, 10 * t + k).to(p.device)
        opt.step()
        found.append(snapshot(params, opt))
    return found


def same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for t, (a, b) in enumerate(zip(found, expected, strict=True), 1):
        assert a.keys() == b.keys()
        for name in b:
            assert_same_bits(a[name], b[name], f"step {t}: {name}")
    names = [name for name in expected[-1] if name.endswith("ema")]
    assert len(names) == len(PIECES) - 1
    assert all(not torch.equal(expected[0][name], expected[-1][name]) for name in names if expected[0][name].numel())


ANY = [e for e in ENGINES if e in CPU or str(e) == "triton-interpreted"]  # these run all formats
OF_CUDA = [e for e in ENGINES if e.backend == "cuda"]
OF_TRITON = [e for e in ENGINES if e.backend == "triton" and e not in ANY]
ROWS = [
    of
    for engines, kinds, stored in (
        (ANY, list(OPTIONS), list(STORED)),
        (OF_CUDA, list(OPTIONS), COMPILED),
        (OF_TRITON, ("adamw", "sgdw"), COMPILED),
    )
    for of in covering({"engine": engines, "kind": list(kinds), "stored": list(stored), "shape": list(range(6))})
]


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(of, id="-".join(map(str, of.values())), marks=[pytest.mark.gpu] * (of["engine"].form == "gpu"))
        for of in ROWS
    ],
)
def test_every_engine_gives_the_references_bits(of: dict[str, Any], engine: Engine) -> None:
    shape = SHAPES[of["shape"]]
    expected = life(of["kind"], of["stored"], shape, "reference")
    same(life(of["kind"], of["stored"], shape, engine.backend, device=engine.device), expected)


def test_threads_and_fused_loops() -> None:
    """Large ones: threads take parts of them, and the loops of bfloat16 leave their pieces to the average."""
    pieces = tuple(Piece((n,)) for n in (70_001, 3, 0, 5, 40_000, 33))
    for stored in ("float32", "bfloat16", "stochastic, nearest average", "split24, all in 8 bits"):
        expected = life("adamw", stored, 0.75, "reference", pieces)
        found = life("adamw", stored, 0.75, "cpu", pieces)
        for t, (a, b) in enumerate(zip(found, expected, strict=True)):
            for name in b:
                assert_same_bits(a[name], b[name], f"{stored}, step {t}: {name}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=repr)
@pytest.mark.parametrize("engine", engine_params(MIRRORED), indirect=True)
def test_a_device_makes_rows_of_averages(engine: Engine, shape: Any, rule: str) -> None:
    """A device that counts the steps looks decays up, or makes those of a mean; a skipped step averages nothing."""

    def found(backend: str) -> list[dict[str, Tensor]]:
        params = make_params(PIECES[:2], f32, f32)
        groups = [{"params": params[:1]}, {"params": params[1:], "ema_decay": 0.25}]
        opt = CLASSES[rule](groups, lr=0.05, ema_decay=shape, backend=backend, skip_nonfinite=True)
        each = []
        for t in range(5):
            for k, p in enumerate(params):
                p.grad = gradient(PIECES[k], f32, 10 * t + k) * (math.inf if t == 2 else 1.0)
            opt.step()
            each.append(snapshot(params, opt))
        return each

    a, b = found(engine.backend), found("reference")
    for t in range(5):
        for name in b[t]:
            assert_same_bits(a[t][name], b[t][name], f"step {t}: {name}")
    assert_same_bits(b[1]["1 ema"], b[2]["1 ema"])
    assert not torch.equal(b[2]["1 ema"], b[3]["1 ema"])


# By other hands -------------------------------------------------------------------------------------------------------


def timm(step: int, decay: float, gamma: float, power: float, after: int, least: float) -> float:
    """What ModelEmaV3(use_warmup=True).get_decay says, from its formula."""
    s = max(0, step - after - 1)
    return 0.0 if s <= 0 else max(min(1 - (1 + s / gamma) ** -power, decay), least)


def diffusers(step: int, decay: float, after: int, least: float) -> float:
    """What EMAModel.get_decay says without its warm-up."""
    s = max(0, step - after - 1)
    return 0.0 if s <= 0 else max(min(decay, (1 + s) / (10 + s)), least)


def test_shapes_are_those_of_others() -> None:
    for t in (1, 2, 3, 4, 5, 17, 100, 10_000, 3_000_000):
        for decay, after, least in ((0.9999, 0, 0.0), (0.99, 3, 0.2)):
            warmed = WarmedEMA(decay, 1.5, 0.75, after, least)
            assert warmed(t) == pytest.approx(timm(t, decay, 1.5, 0.75, after, least), rel=1e-14)
            assert RatioEMA(decay, after, least)(t) == pytest.approx(diffusers(t, decay, after, least), rel=1e-14)
            assert EMA(decay, after)(t) == (decay if t > after + 1 else 0.0)
        assert Mean(2)(t) == (1 - 1 / (t - 2) if t > 3 else 0.0)


@pytest.mark.parametrize("shape", [EMA(0.9), EMA(0.0), WarmedEMA(0.99), WarmedEMA(0.9, after=4), RatioEMA(0.9999)])
def test_they_settle_where_they_say(shape: Any) -> None:
    settled = shape.settles()
    assert shape(settled) == shape(settled + 1) == shape(settled + 10**6) == shape.decay
    assert shape(settled - 1) < shape.decay or shape.decay == 0.0
    assert Mean().settles() is None
    with pytest.raises(ValueError, match=r"WarmedEMA\(decay=0.99999.* a table of them"):
        WarmedEMA(0.99999).settles()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [f32, f64, c64])
@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_it_is_torchs_averaged_model(kind: str, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 30), nn.Linear(30, 3)).to(dtype)
    fn = get_ema_multi_avg_fn(0.8) if kind == "ema" else None  # type: ignore[no-untyped-call]
    theirs = AveragedModel(model, multi_avg_fn=fn)
    opt = wd_kernels.AdamW(
        model.parameters(), lr=0.05, weight_decay=0.1, backend=backend,  # type: ignore[arg-type]
        ema_decay=EMA(0.8) if kind == "ema" else Mean(),
    )  # fmt: skip
    for _ in range(12):
        loss = model(torch.randn(8, 7, dtype=dtype)).abs().square().sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        theirs.update_parameters(model)
    near = {"rtol": 1e-13, "atol": 1e-14} if dtype == f64 else {"rtol": 1e-5, "atol": 2e-7}
    found = opt.ema_state_dict(model)
    for name, average in theirs.module.named_parameters():
        torch.testing.assert_close(found[name], average.detach(), **near)
        assert not torch.allclose(average.detach(), model.get_parameter(name))


def test_by_hand() -> None:
    """SGD with lr 1/2 on a gradient of 1: weights 1, 1/2, 0, -1/2; with a decay of 1/2 averages of 1, 3/4, 3/8, -1/16.
    A parameter that has no gradient in a step is not averaged in it."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = wd_kernels.SGDW([{"params": [p]}, {"params": [q], "ema_decay": Mean()}], lr=0.5, ema_decay=0.5)
    seen = []
    for t in range(3):
        p.grad = torch.ones(3)
        q.grad = None if t == 1 else torch.ones(3)
        opt.step()
        seen.append((opt.state[p]["ema"][0].item(), opt.state[q]["ema"][0].item()))
    assert seen == [(0.75, 0.5), (0.375, 0.5), (-0.0625, 0.25)]


def test_bfloat16_weights_have_an_exact_average() -> None:
    """Of the weights as they are stored: float32 beside them, though each is rounded."""
    p = nn.Parameter(torch.linspace(1, 2, 300).to(bf16))
    opt = wd_kernels.AdamW([p], lr=0.01, weight_decay=0.1, ema_decay=0.9, stochastic_rounding=True, seed=7)
    expected = p.detach().double()
    for t in range(20):
        p.grad = gradient(Piece((300,)), bf16, t)
        opt.step()
        expected = 0.9 * expected + 0.1 * p.detach().double()
    assert opt.state[p]["ema"].dtype == f32
    torch.testing.assert_close(opt.state[p]["ema"].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_fewer_bits_are_unbiased(dtype: str) -> None:
    """Stochastic rounding: a slow average follows in the mean, where nearest rounding would stand still."""
    n = 20_000
    found = {}
    for stochastic in (True, False):
        p = nn.Parameter(torch.ones(n))
        opt = wd_kernels.SGDW(
            [p], lr=1.0, ema_decay=0.999, ema_dtype=dtype, stochastic_rounding=stochastic, seed=1
        )  # fmt: skip
        p.grad = torch.full((n,), -1.0)
        opt.step()  # to 2, and stays there
        for _ in range(99):
            p.grad = torch.zeros(n)
            opt.step()
        model = nn.ParameterList([p])
        found[stochastic] = opt.ema_state_dict(model)["0"].double().mean().item()
    exact = 2.0 - 0.999**100
    assert found[True] == pytest.approx(exact, abs=0.01)
    assert found[False] == pytest.approx(1.0, abs=1e-4)


# In the place of the weights ------------------------------------------------------------------------------------------


def trained(steps: int = 3, make: Any = wd_kernels.AdamW, **options: Any) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 33), nn.BatchNorm1d(33), nn.Linear(33, 2)).to(options.pop("dtype", f32))
    model[2].bias.requires_grad_(False)
    opt = make(model.parameters(), lr=0.05, **{"ema_decay": 0.75, **options})
    for t in range(steps):
        train(model, opt, t)
    return model, opt


def train(model: nn.Module, opt: Any, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(8, 6, generator=generator).to(next(model.parameters()).dtype)
    model(x).float().square().sum().backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (f32, {}), (f64, {}), (bf16, {}), (bf16, {"master_weights": "split32"}), (bf16, {"master_weights": True}),
        (f32, {"ema_dtype": "int8"}), (f32, {"ema_dtype": "bfloat16", "ema_decay": Mean()}),
    ],
    ids=str,
)  # fmt: skip
def test_swapped_and_back(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """What is trained on has the bits of what was never swapped."""
    model, opt = trained(dtype=dtype, **options)
    other, plain = trained(dtype=dtype, **options)
    own = opt.ema_state_dict(model)
    before = [p.detach().clone() for p in model.parameters()]
    with opt.swap_ema():
        for name, p in model.named_parameters():
            assert_same_bits(p.detach(), own[name].to(dtype), name)
            assert own[name].dtype == (dtype if name == "2.bias" else f64 if dtype == f64 else f32)
        assert not torch.equal(before[0], model[0].weight)
        assert torch.equal(before[-1], model[2].bias)  # is not trained
    for p, kept in zip(model.parameters(), before, strict=True):
        assert_same_bits(p.detach(), kept)
    opt.swap_ema()
    opt.swap_ema_back()
    for t in (3, 4):
        train(model, opt, t)
        train(other, plain, t)
    found, expected = snapshot(model.parameters(), opt), snapshot(other.parameters(), plain)
    for name in expected:
        assert_same_bits(found[name], expected[name], name)


def test_while_swapped_nothing_is_stepped_saved_or_loaded() -> None:
    model, opt = trained()
    saved = opt.state_dict()
    averages_then = {name: t.clone() for name, t in opt.ema_state_dict(model).items()}
    opt.swap_ema()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    calls: dict[str, Any] = {
        r"step\(\)": opt.step, r"state_dict\(\)": opt.state_dict, r"swap_ema\(\)": opt.swap_ema,
        r"load_state_dict\(\)": lambda: opt.load_state_dict(saved), "a copy is made": lambda: copy.deepcopy(opt),
        r"load_ema_state_dict\(\)": lambda: opt.load_ema_state_dict(model, averages_then),
        r"load_master_weights\(\)": opt.load_master_weights, r"get_master_weights\(\)": opt.get_master_weights,
        r"accumulate\(\)": opt.accumulate,
    }  # fmt: skip
    for what, call in calls.items():
        with pytest.raises(RuntimeError, match=f"^{what} while the parameters hold their averages: call swap_ema_back"):
            call()
    for name, p in model.named_parameters():
        assert_same_bits(p.detach(), averages_then[name].to(p.dtype), name)
    opt.swap_ema_back()
    with pytest.raises(RuntimeError, match=r"swap_ema_back\(\) while the parameters hold themselves"):
        opt.swap_ema_back()
    opt.step()


def test_a_swap_ends_once() -> None:
    """What was put back within a `with` is not put back at its end, nor is what was swapped since."""
    model, opt = trained()
    before = model[0].weight.detach().clone()
    with opt.swap_ema():
        opt.swap_ema_back()
        train(model, opt, 3)
        after = model[0].weight.detach().clone()
    assert_same_bits(model[0].weight.detach(), after)
    assert not torch.equal(before, after)
    with pytest.raises(KeyError, match="in an evaluation"), opt.swap_ema():
        raise KeyError("in an evaluation")
    assert_same_bits(model[0].weight.detach(), after)


def test_before_the_first_step_a_parameter_is_its_average() -> None:
    model, opt = trained(steps=0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with opt.swap_ema():
        for name, t in model.state_dict().items():
            assert_same_bits(t, before[name], name)
    for name, t in opt.ema_state_dict(model).items():
        assert_same_bits(t, before[name], name)


def test_released_gradients_are_averaged_and_refused_while_swapped() -> None:
    expected, plain = trained()
    model, opt = trained(steps=0)
    release = wd_kernels.release_gradients(model, opt)
    for t in range(3):
        train(model, opt, t)
    found, other = snapshot(model.parameters(), opt), snapshot(expected.parameters(), plain)
    for name in other:
        assert_same_bits(found[name], other[name], name)
    with opt.swap_ema(), pytest.raises(RuntimeError, match="a gradient is released while the parameters hold their"):
        model(torch.ones(8, 6)).sum().backward()
    release.remove()


def test_complex_weights_are_swapped_and_loaded() -> None:
    for shape in ((2,), (2, 2), (), (0,), (5,)):
        p = nn.Parameter(torch.randn(shape, dtype=c64, generator=torch.Generator().manual_seed(1)))
        model, opt = nn.ParameterList([p]), wd_kernels.AdamW([p], lr=0.1, ema_decay=0.5)
        p.grad = torch.full_like(p, 1 - 2j)
        opt.step()
        own, before = opt.state[p]["ema"].clone(), p.detach().clone()
        with opt.swap_ema():
            assert torch.equal(p.detach(), own)
        assert torch.equal(p.detach(), before)
        opt.load_ema_state_dict(model, {"0": own + 1j})
        assert torch.equal(opt.state[p]["ema"], own + 1j)


def test_casts_that_autocast_has_kept_are_dropped() -> None:
    model, opt = trained(dtype=f32)
    x = torch.ones(4, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=bf16):
        model.eval()
        before = model(x)
        with opt.swap_ema():
            averaged = model(x)
        assert torch.equal(model(x), before)
    assert not torch.equal(averaged, before)


def sharded_swap() -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model = copy.deepcopy(whole)
    fully_shard(model[0])
    fully_shard(model)
    opts = [wd_kernels.SGDW(m.parameters(), lr=0.5, ema_decay=0.75) for m in (whole, model)]
    x = torch.linspace(-1, 1, 24).view(4, 6)
    for _ in range(2):
        outputs = []
        for m, opt in zip((whole, model), opts, strict=True):
            m(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
            with torch.no_grad():
                plain = m(x)
                with opt.swap_ema(m):
                    outputs.append((plain, m(x)))
                outputs[-1] += (m(x),)
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b)
        assert not torch.equal(outputs[0][0], outputs[0][1])
        assert torch.equal(outputs[1][0], outputs[1][2])
    with pytest.raises(TypeError, match=r"parameter 0.* is a DTensor, .*: expected its model, swap_ema\(model\)"):
        opts[1].swap_ema()


def test_what_fully_shard_has_gathered_is_dropped() -> None:
    ranks.run(2, sharded_swap)


def test_what_was_frozen_since_keeps_its_average() -> None:
    model, opt = trained()
    own = {name: t.clone() for name, t in opt.ema_state_dict(model).items()}
    model.requires_grad_(False)
    for name, t in opt.ema_state_dict(model).items():
        assert_same_bits(t, own[name], name)
    with opt.swap_ema():
        assert_same_bits(model[0].weight.detach(), own["0.weight"])


def test_what_diverged_before_the_average_begins_is_not_in_it() -> None:
    p = nn.Parameter(torch.ones(300))
    for backend in ("cpu", "reference"):
        opt = wd_kernels.SGDW([p], lr=1.0, ema_decay=Mean(after=2), backend=backend)  # type: ignore[arg-type]
        for value in (math.nan, 3e38, -3e38):
            with torch.no_grad():
                p.fill_(value)
            p.grad = torch.zeros(300)
            opt.step()
        assert opt.state[p]["ema"].tolist() == p.tolist()


# By name --------------------------------------------------------------------------------------------------------------


def test_names_buffers_and_shared_parameters() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"in": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "out": nn.Linear(4, 4)})
    model["out"].weight = model["in"].weight  # type: ignore[assignment]
    opt = wd_kernels.SGDW(
        [{"params": [model["in"].weight]}, {"params": [model["in"].bias, model["out"].bias], "ema_decay": None}],
        lr=0.1, ema_decay=0.5,
    )  # fmt: skip
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    found = opt.ema_state_dict(model)
    assert list(found) == list(model.state_dict())
    assert (
        found["out.weight"].data_ptr()
        == found["in.weight"].data_ptr()
        == opt.state[model["in"].weight]["ema"].data_ptr()
    )
    assert found["in.bias"].data_ptr() == model["in"].bias.data_ptr()
    assert not any(t.requires_grad for t in found.values())
    torch.testing.assert_close(found["in.weight"], model["in"].weight.detach() + 0.05)
    fresh = nn.ModuleDict({"in": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "out": nn.Linear(4, 4)})
    fresh.load_state_dict(found)
    with pytest.raises(
        ValueError,
        match=r"none of the tensors in the model's state_dict\(\) is a parameter that this optimizer averages",
    ):
        opt.ema_state_dict(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("flat", [False, True])
def test_averages_are_loaded_by_name(dtype: str, flat: bool) -> None:
    """Before the first step too, and of torch's AveragedModel; then all goes on as where they come from."""
    model, _ = trained()
    theirs = AveragedModel(model)
    theirs.update_parameters(model)
    with torch.no_grad():
        for p in theirs.module.parameters():
            p.add_(1.0)
    fresh = copy.deepcopy(model)
    if flat:
        wd_kernels.flatten_([p for p in fresh.parameters() if p.requires_grad])
    new = wd_kernels.AdamW(fresh.parameters(), lr=0.05, ema_decay=0.75, ema_dtype=dtype, stochastic_rounding=False)
    new.load_ema_state_dict(fresh, theirs.state_dict())
    near = {"float32": 0.0, "bfloat16": 2**-8, "int8": 2**-4}[dtype]
    found = new.ema_state_dict(fresh)
    for name, average in theirs.module.named_parameters():
        if name != "2.bias":
            torch.testing.assert_close(found[name], average.detach(), rtol=near, atol=0.0)
    before = found["0.weight"].clone()
    train(fresh, new, 3)
    expected = before * 0.75 + fresh[0].weight.detach() * 0.25
    torch.testing.assert_close(new.ema_state_dict(fresh)["0.weight"], expected, rtol=1.5 * near + 1e-6, atol=1e-6)


def test_names_without_what_wrappers_have_put_before_them() -> None:
    """DDP's, torch.compile's and AveragedModel's; of a parameter that is shared one name is enough."""
    model, opt = trained()
    good = {name: t + 1.0 for name, t in opt.ema_state_dict(model).items()}
    opt.load_ema_state_dict(model, {f"module._orig_mod.{name}": t for name, t in good.items()})
    assert_same_bits(opt.state[model[0].weight]["ema"], good["0.weight"])
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight  # type: ignore[assignment]
    other = wd_kernels.SGDW(tied.parameters(), ema_decay=0.5)
    other.load_ema_state_dict(tied, {"b.weight": torch.ones(2, 2)})
    assert other.ema_state_dict(tied)["a.weight"].tolist() == [[1.0, 1.0]] * 2
    with pytest.raises(ValueError, match=r"'a\.weight' and 'b\.weight' are one parameter .* averages differ"):
        other.load_ema_state_dict(tied, {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)})


def test_what_the_next_step_would_not_keep_is_not_loaded() -> None:
    """A mean goes on as a mean of all: what it is loaded with counts as so many."""
    model, _ = trained(ema_decay=Mean())
    theirs = AveragedModel(model)
    for _ in range(4):
        theirs.update_parameters(model)
    for shape, says in (
        (EMA(0.9), r"by ema_decay=EMA.* begins with step 1, which would keep nothing"),
        (Mean(), r"means of 4 weights, .* after 0 steps, it would be 0: allowed is averages\.Mean\(after=-4\)"),
    ):
        new = wd_kernels.SGDW(model.parameters(), lr=0.5, ema_decay=shape)
        with pytest.raises(ValueError, match=says):
            new.load_ema_state_dict(model, theirs.state_dict())
        assert not new.state
    for engine in ("cpu", "reference"):
        p = nn.Parameter(torch.full((3,), 2.0))
        new = wd_kernels.SGDW([p], lr=1.0, ema_decay=Mean(after=-4), backend=engine)  # type: ignore[arg-type]
        average = {"module.0": torch.ones(3), "n_averaged": torch.tensor(4)}
        new.load_ema_state_dict(nn.ParameterList([p]), average)
        p.grad = torch.full((3,), -4.0)
        new.step()  # to 6
        assert new.state[p]["ema"].tolist() == pytest.approx([2.0] * 3)


def test_bad_averages_by_name() -> None:
    model, opt = trained()
    good = {name: t.clone() for name, t in opt.ema_state_dict(model).items()}

    def refused(error: type[Exception], says: str, **changes: Any) -> None:
        wrong = {name: t for name, t in {**good, **changes}.items() if t is not None}
        with pytest.raises(error, match=says):
            opt.load_ema_state_dict(model, wrong)

    refused(
        KeyError,
        r"1 names of averages are unknown: \['3.weight'\]; the model has \['0.weight', ",
        **{"3.weight": good["0.weight"]},
    )
    refused(KeyError, r"1 names of averages are missing: \['0.weight'\]", **{"0.weight": None})
    refused(
        ValueError,
        r"the average of .*parameter 0.*, '0.weight', has shape \(2,\); allowed is that of the",
        **{"0.weight": torch.ones(2)},
    )
    refused(
        TypeError,
        "has dtype torch.float64: allowed are torch.float32 and what is exact",
        **{"0.weight": good["0.weight"].double()},
    )
    refused(TypeError, "is a list: expected a tensor", **{"0.weight": [1.0]})
    refused(ValueError, "has no memory: it is on meta", **{"0.weight": good["0.weight"].to("meta")})
    with pytest.raises(TypeError, match="the averages are a list: expected a dict"):
        opt.load_ema_state_dict(model, [good])
    for name, t in opt.ema_state_dict(model).items():
        assert_same_bits(t, good[name], name)
    plain = wd_kernels.AdamW(model.parameters())
    for call in (plain.swap_ema, lambda: plain.load_ema_state_dict(model, good)):
        with pytest.raises(RuntimeError, match="no group of this optimizer has an ema_decay"):
            call()


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [wd_kernels.AdamW, wd_kernels.SGDW])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("how", ["saved", "copied", "pickled"])
def test_a_resumed_run_has_the_same_bits(how: str, dtype: str, make: Any, tmp_path: Any) -> None:
    """What is kept follows the step count, which SGD's states else do without."""
    options = {"ema_decay": WarmedEMA(0.9), "ema_dtype": dtype, "seed": 5}
    model, opt = trained(make=make, **options)
    if how == "saved":
        torch.save(opt.state_dict(), tmp_path / "state")
        other = copy.deepcopy(model)
        new = make(other.parameters(), lr=0.05, **options)
        new.load_state_dict(torch.load(tmp_path / "state"))  # weights_only: plain words and numbers
    else:
        other, new = copy.deepcopy((model, opt)) if how == "copied" else pickle.loads(pickle.dumps((model, opt)))
    for t in (3, 4):
        train(model, opt, t)
        train(other, new, t)
    found, expected = snapshot(other.parameters(), new), snapshot(model.parameters(), opt)
    assert any(name.endswith("ema") for name in expected)
    for name in expected:
        assert_same_bits(found[name], expected[name], name)


def test_what_is_loaded_without_and_with() -> None:
    model, opt = trained()
    saved = opt.state_dict()
    assert saved["param_groups"][0]["ema_decay"] == 0.75
    without = wd_kernels.AdamW(model.parameters(), lr=0.05)
    with pytest.warns(UserWarning, match=r"it has ema_decay=0\.75, this optimizer goes on with None"):
        without.load_state_dict(saved)
    assert not any("ema" in own for own in without.state.values())
    old = without.state_dict()
    assert not {"ema_decay", "ema_dtype"} & old["param_groups"][0].keys()
    opt.load_state_dict(old)  # one from before, or torch's: the average begins as the parameter is
    before = model[0].weight.detach().clone()
    train(model, opt, 3)
    torch.testing.assert_close(opt.state[model[0].weight]["ema"], 0.75 * before + 0.25 * model[0].weight.detach())
    narrow = wd_kernels.AdamW(model.parameters(), lr=0.05, ema_decay=0.75, ema_dtype="bfloat16")
    with pytest.raises(TypeError, match="'ema'"):
        narrow.load_state_dict(opt.state_dict())
    narrow.load_state_dict(opt.state_dict(), convert_states=True)
    assert narrow.state[model[0].weight]["ema"].dtype == bf16
    torchs = torch.optim.AdamW(model.parameters())
    torchs.load_state_dict(opt.state_dict())
    train(model, torchs, 4)


def test_scales_without_codes_are_refused() -> None:
    """Whoever asks for tensors by the names of a fresh optimizer's states may lose those in 8 bits."""
    _, opt = trained(ema_dtype="int8")
    saved = opt.state_dict()
    del saved["state"][0]["ema_code"]
    with pytest.raises(ValueError, match=r"the saved state of parameter 0.* has 'ema_scale', and no 'ema' that it is"):
        opt.load_state_dict(saved)


def test_a_mean_that_begins_in_the_midst_is_refused() -> None:
    model, opt = trained(ema_decay=None)
    opt.param_groups[0]["ema_decay"] = Mean()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(model.parameters(), opt)
    with pytest.raises(
        ValueError, match=r"parameter 0.* has taken steps, of which it has no 'ema': with .*Mean\(after=0"
    ):
        opt.step()
    for name, t in snapshot(model.parameters(), opt).items():
        assert_same_bits(t, before[name], name)
    opt.param_groups[0]["ema_decay"] = Mean(after=3)
    opt.step()
    assert_same_bits(opt.state[model[0].weight]["ema"], model[0].weight.detach())


def test_it_may_be_set_between_steps() -> None:
    """On, another one, off: then it stays what it was."""
    p = nn.Parameter(torch.ones(40))
    opt = wd_kernels.SGDW([p], lr=0.5)
    group, seen = opt.param_groups[0], []
    assert "ema_decay" not in group
    for decay in (None, 0.5, 0.25, None):
        group["ema_decay"] = decay
        p.grad = torch.ones(40)
        opt.step()
        seen.append(opt.state[p]["ema"][0].item() if "ema" in opt.state[p] else None)
    assert p[0].item() == -1.0
    assert seen == [None, 0.25, -0.3125, -0.3125]


# Bad input ------------------------------------------------------------------------------------------------------------

BAD = [
    (1.0, ValueError, r"ema_decay=1\.0 in {}: allowed are 0 <= ema_decay < 1, and None"),
    (-0.1, ValueError, r"ema_decay=-0\.1 in {}"),
    (math.nan, ValueError, r"ema_decay=nan in {}"),
    (True, TypeError, r"ema_decay=True in {}: expected a number, one of wd_kernels\.averages"),
    ("0.9", TypeError, r"ema_decay='0\.9' in {}"),
    (Mean, TypeError, r"ema_decay=Mean in {} is a class: expected Mean\(\.\.\.\)"),
]


@pytest.mark.parametrize(("value", "error", "says"), BAD, ids=lambda value: str(value)[:12])
def test_bad_decays(value: Any, error: type[Exception], says: str) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(error, match=says.format("the arguments")):
        wd_kernels.AdamW([p], ema_decay=value)
    opt = wd_kernels.AdamW([p])
    opt.param_groups[0]["ema_decay"] = value
    with pytest.raises(error, match=says.format("param group 0")):
        opt.step()
    assert p.tolist() == [1.0] * 3


def test_bad_shapes_dtypes_and_functions() -> None:
    for make, says in (
        (lambda: EMA(1.0), r"decay=1\.0 of EMA: allowed are 0 <= decay < 1"),
        (lambda: WarmedEMA(0.9, gamma=0), r"gamma=0 of WarmedEMA: allowed are finite numbers > 0"),
        (lambda: WarmedEMA(0.9, power=math.inf), r"power=inf of WarmedEMA"),
        (lambda: RatioEMA(0.9, least=-1), r"least=-1 of RatioEMA: allowed are 0 <= least < 1"),
        (lambda: EMA(0.9, after=0.5), r"after=0\.5 of EMA: allowed are whole numbers >= 0"),
        (lambda: EMA(0.5, after=-2), r"after=-2 of EMA"),
        (lambda: EMA("0.9"), r"decay='0\.9' of EMA"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            make()  # type: ignore[no-untyped-call]
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"ema_dtype='float8' in the arguments: allowed are torch\.float32"):
        wd_kernels.AdamW([p], ema_dtype="float8")
    opt = wd_kernels.AdamW([p], ema_decay=lambda t: 1.5)
    with pytest.raises(ValueError, match=r"ema_decay\(1\)=1\.5 of .*: allowed are numbers in \[0, 1\]"):
        opt.step()
    assert p.tolist() == [1.0] * 3


@pytest.mark.parametrize("engine", engine_params(SOURCES[:1]), indirect=True)
def test_a_device_calls_no_python(engine: Engine) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)

    class Late(EMA):
        def __call__(self, t: int) -> float:
            return 0.5 if t < 3 else 0.9

    for shape, says in (
        (lambda t: 0.5, r"ema_decay=.*lambda.* in param group 0 is Python code, with skip_nonfinite"),
        (Late(0.9), r"ema_decay=.*Late.* in param group 0 is Python code"),
        (WarmedEMA(0.99999), "a device that counts the steps has a table of them"),
    ):  # fmt: skip
        options: dict[str, Any] = {"skip_nonfinite": True, "backend": engine.backend}
        opt = wd_kernels.AdamW([p], ema_decay=shape, **options)
        with pytest.raises(ValueError, match=says):
            opt.step()
    assert p.tolist() == [1.0] * 3


def test_the_average_of_a_parameter_that_lies_with_gaps() -> None:
    """It is dense, and follows the parameter as it is stored."""
    gapped = nn.Parameter(torch.linspace(-1, 1, 40)[::2])
    opt = wd_kernels.SGDW([gapped], lr=0.5, ema_decay=0.5)
    before = gapped.detach().clone()
    gapped.grad = torch.ones_like(gapped)
    opt.step()
    torch.testing.assert_close(opt.state[gapped]["ema"], before - 0.25)
    with opt.swap_ema():
        torch.testing.assert_close(gapped.detach(), before - 0.25)
    torch.testing.assert_close(gapped.detach(), before - 0.5)
