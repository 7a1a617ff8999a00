"""Clipping of gradients by value: what it equals, what it leaves alone, by other hands. Every engine has the
reference's bits in `test_kernels.py`, whose variants have limits, and in `test_clipping.py`."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import CLASSES, bf16, c64, c128, f16, f32, f64, snapshot
from engines import ENGINES, SOURCES, Engine, engine_params
from torch import Tensor, nn

import wd_kernels
from wd_kernels import functional, reference
from wd_kernels.rules import RULES

TORCHS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"amsgrad": True}),
    "sgdw": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adagradw": (torch.optim.Adagrad, {"lr_decay": 0.1}),
}


def clip_(p: nn.Parameter, limit: float) -> None:
    """As torch's function, which has it of no complex numbers: of these each part is clipped."""
    assert p.grad is not None
    if p.is_complex():
        torch.view_as_real(p.grad).clamp_(-limit, limit)
    else:
        nn.utils.clip_grad_value_([p], limit)


def draw(dtype: torch.dtype, n: int, seed: int) -> Tensor:
    kind = {c64: c64, c128: c128}.get(dtype, f64)
    return torch.randn(n, dtype=kind, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [f32, f64, c64, c128])
@pytest.mark.parametrize("rule", TORCHS)
def test_it_is_torchs_clip_and_step(rule: str, dtype: torch.dtype, backend: str) -> None:
    """Parameters and states, of two groups with limits of their own."""
    make, options = TORCHS[rule]
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    mode = {} if rule == "adamw" else {"decay": "l2"}
    mine, theirs = ([nn.Parameter(draw(dtype, n, n)) for n in (5, 1500)] for _ in range(2))
    groups = [{"params": [p], **({"max_grad_value": 0.2} if k else {})} for k, p in enumerate(mine)]
    ours = CLASSES[rule](groups, max_grad_value=1.25, backend=backend, **options, **mode)
    torchs = make(theirs, **options)
    for step in range(8):
        for k, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            p.grad, q.grad = (draw(dtype, p.numel(), 10 * step + k) for _ in range(2))
            clip_(q, 0.2 if k else 1.25)
        ours.step()
        torchs.step()
    near = {"rtol": 1e-12, "atol": 1e-13} if dtype in (f64, c128) else {"rtol": 2e-5, "atol": 2e-6}
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, **near)
        names = {name for name, state in torchs.state[q].items() if isinstance(state, Tensor)} - {"step"}
        assert names
        for name in names:
            torch.testing.assert_close(ours.state[p][name], torchs.state[q][name], **near)


GRADS = (math.inf, -math.inf, math.nan, -0.0, 0.0, 3.0, -3.0, 2.0, -2.0, 0.5, 5e-324, -1e-45)
CLIPPED = (2.0, -2.0, math.nan, -0.0, 0.0, 2.0, -2.0, 2.0, -2.0, 0.5, 5e-324, -1e-45)


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize(("limit", "expected"), [(2.0, CLIPPED), (math.inf, GRADS)])
def test_infinities_nan_and_zeros(dtype: torch.dtype, limit: float, expected: tuple[float, ...]) -> None:
    """Without a limit every bit stays."""
    rule = RULES["sgdw"]
    group = {**wd_kernels.SGDW([nn.Parameter(torch.ones(1))], lr=1.0).defaults, "max_grad_value": limit}
    row = rule.rows(rule.hypers([group]), [(0, 1, True)])[0]
    g = torch.tensor(GRADS, dtype=dtype)
    _, found, *_ = reference.new_values(rule, row, 1.0, torch.ones_like(g), g, {})
    assert_same_bits(found, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("dtypes", [(f32, f32), (f64, f64), (bf16, bf16), (f16, f32)], ids=str)
@pytest.mark.parametrize("engine", engine_params(ENGINES), indirect=True)
def test_every_engine_clips_what_is_peculiar(engine: Engine, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The buffer of a first step is the gradient as it was clipped: zeros keep their sign, as -0 began it and a share
    of "l2" would be -0."""
    dtype, grad_dtype = dtypes
    n = 1100
    p = nn.Parameter(torch.full((n,), -1.0, dtype=dtype, device=engine.device))
    p.grad_dtype = grad_dtype
    grads = torch.tensor(GRADS, dtype=f64).repeat(n // len(GRADS) + 1)[:n].to(grad_dtype)
    p.grad = grads.to(engine.device)
    opt = wd_kernels.SGDW([p], lr=0.25, momentum=0.5, weight_decay=0.5, backend=engine.backend, max_grad_value=2.0)
    begun = torch.full((n,), -0.0, dtype=f64 if dtype == f64 else f32, device=engine.device)
    opt.state[p] = {"step": torch.tensor(3.0), "momentum_buffer": begun}
    opt.step()
    own = grads.to(begun.dtype).cpu()
    expected = torch.where(own.abs() > 2.0, own.sign() * 2.0, own)
    assert_same_bits(opt.state[p]["momentum_buffer"].cpu(), expected)
    assert bool(p.detach().isfinite().logical_or(p.grad.isnan()).all())


def test_it_comes_after_scale_and_norm() -> None:
    """Gradients (3, 0) and (0, 4), scaled by 8: a norm of 5, so half of each, and then at most 1.75."""
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = wd_kernels.SGDW([a, b], lr=1.0, weight_decay=0.5, decay="l2", max_grad_norm=2.5, max_grad_value=1.75)
    a.grad, b.grad = torch.tensor([-24.0, 0.0]), torch.tensor([0.0, -32.0])
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    opt.step()
    assert opt.grad_norm is not None
    assert opt.grad_norm.item() == 5.0
    assert a.tolist() == pytest.approx([0.5 + 3 * 2.5 / (5 + 1e-6), 0.5], rel=1e-6)
    assert b.tolist() == [0.5, 0.5 + 1.75]  # l2's share comes after it
    del opt.grad_scale, opt.found_inf
    opt.max_grad_norm, opt.skip_nonfinite = None, True
    a.grad = torch.tensor([math.inf, 0.0])
    opt.step()
    assert opt.skipped.item()  # an infinity is seen before it is clipped
    opt.skip_nonfinite = False
    opt.step()
    assert a.tolist() == pytest.approx([(0.5 + 3 * 2.5 / (5 + 1e-6)) * 0.5 - 1.75, 0.25], rel=1e-6)


def test_a_limit_may_change_between_steps() -> None:
    p = nn.Parameter(torch.zeros(3))
    opt = wd_kernels.SGDW([p], lr=1.0, weight_decay=0.5, decay="l2")
    assert "max_grad_value" not in opt.param_groups[0]  # where it says what torch's class does
    seen = []
    for limit in (None, 2.0, torch.tensor(1.0), math.inf, "absent"):
        opt.param_groups[0]["max_grad_value"] = limit
        if limit == "absent":
            del opt.param_groups[0]["max_grad_value"]
        p.grad = torch.tensor([-5.0, 0.5, 4.0])
        before = p.detach().clone()
        opt.step()
        seen.append((before - p.detach() - 0.5 * before).tolist())
    whole = [-5.0, 0.5, 4.0]
    assert seen == [whole, [-2.0, 0.5, 2.0], [-1.0, 0.5, 1.0], whole, whole]


def life(backend: str = "auto", flat: bool = False, reload: Any = None) -> dict[str, Tensor]:
    params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (64, 1536)]
    if flat:
        wd_kernels.flatten_(params)

    def make() -> wd_kernels.AdamW:
        groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "max_grad_value": 0.5}]
        return wd_kernels.AdamW(groups, lr=0.05, weight_decay=0.2, max_grad_value=1.0, backend=backend)

    opt = make()
    for step in range(5):
        for k, p in enumerate(params):
            p.grad = draw(f32, p.numel(), 10 * step + k)
        opt.step()
        if step == 2 and reload is not None:
            opt = reload(opt, make)
    return snapshot(params, opt)


def loaded(opt: Any, make: Any) -> Any:
    fresh = make()
    fresh.load_state_dict(opt.state_dict())
    return fresh


def test_flat_and_saved() -> None:
    expected = life("reference")
    for found in (life(), life(flat=True), life(reload=loaded)):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same_bits(found[name], expected[name], name)


def test_checkpoints() -> None:
    """The limit is the loop's, as that of the norm is: a saved one is not loaded, and said; an absent one is none."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opts = {limit: wd_kernels.AdamW([p], weight_decay=0.1, max_grad_value=limit) for limit in (None, 0.5, 0.25)}
    for opt in opts.values():
        opt.step()
    saved = {limit: opt.state_dict() for limit, opt in opts.items()}
    assert [own["param_groups"][0].get("max_grad_value") for own in saved.values()] == [None, 0.5, 0.25]
    assert "max_grad_value" not in saved[None]["param_groups"][0]
    for limit, opt in opts.items():
        opt.load_state_dict(saved[limit])
        opt.load_state_dict(saved[None])  # an old one, or torch's
        assert opt.param_groups[0].get("max_grad_value") == limit
    with pytest.warns(UserWarning, match=r"it has max_grad_value=0\.5, this optimizer goes on with 0\.25"):
        opts[0.25].load_state_dict(saved[0.5])
    assert opts[0.25].param_groups[0]["max_grad_value"] == 0.25
    for other in (pickle.loads(pickle.dumps(opts[0.5])), copy.deepcopy(opts[0.5])):
        assert other.param_groups[0]["max_grad_value"] == 0.5
    torchs = torch.optim.AdamW([p])
    torchs.load_state_dict(saved[0.5])
    torchs.step()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("limit", [None, math.inf, 0.5, torch.tensor(0.5)], ids=str)
def test_functional(limit: Any, flat: bool) -> None:
    theta, g = draw(f32, 1500, 0), draw(f32, 1500, 1)
    p = nn.Parameter(theta.clone())
    p.grad = g * 8
    opt = wd_kernels.AdamW([p], lr=0.05, weight_decay=0.2, max_grad_value=limit)
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    opt.step()
    own = [theta, g * 8, torch.zeros_like(g), torch.zeros_like(g)]
    step: Any = functional.adamw_flat_ if flat else functional.adamw_
    options: dict[str, Any] = {"step": 1, "lr": 0.05, "weight_decay": 0.2, "grad_factor": 1 / 8}
    step(*(own if flat else [[t] for t in own]), max_grad_value=limit, **options)
    assert_same_bits(theta, p.detach())
    assert_same_bits(own[3], opt.state[p]["exp_avg_sq"])


BAD = [
    (0.0, ValueError, r"max_grad_value=0\.0 in {}: allowed are numbers > 0, and None or math\.inf"),
    (-1, ValueError, r"max_grad_value=-1\.0 in {}"),
    (math.nan, ValueError, r"max_grad_value=nan in {}"),
    ("1", TypeError, r"max_grad_value='1' in {}: expected a number"),
    (torch.ones(2), ValueError, r"max_grad_value=\(2,\)-shaped"),
]


@pytest.mark.parametrize(("value", "error", "says"), BAD, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("rule", RULES)
def test_bad_limits(rule: str, value: Any, error: type[Exception], says: str) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(error, match=says.format("the arguments")):
        CLASSES[rule]([p], max_grad_value=value)
    opt = CLASSES[rule]([p], lr=0.1, weight_decay=0.1)
    with pytest.raises(error, match=says.format("param group 1")):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "max_grad_value": value})
    opt.param_groups[0]["max_grad_value"] = value
    with pytest.raises(error, match=says.format("param group 0")):
        opt.step()
    assert p.tolist() == [1.0] * 3
    if rule == "sgdw":
        with pytest.raises(error, match=says.format("sgdw_")):
            functional.sgdw_([p.detach()], [p.grad], step=1, max_grad_value=value)
    assert p.tolist() == [1.0] * 3


@pytest.mark.parametrize("engine", engine_params(SOURCES[:1]), indirect=True)
def test_a_tensor_is_refused_where_a_device_reads(engine: Engine) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    limit = torch.tensor(0.5)
    opt = wd_kernels.AdamW([p], capturable=True, max_grad_value=limit, backend=engine.backend)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_grad_value of param group 0 is a tensor, in an optimizer with capturable"):
        opt.step()


@pytest.mark.parametrize("rule", TORCHS)
@pytest.mark.parametrize("engine", engine_params(SOURCES), indirect=True)
def test_a_device_makes_rows_with_limits(engine: Engine, rule: str) -> None:
    options = {**TORCHS[rule][1], "lr": 0.05, "weight_decay": 0.1, "skip_nonfinite": True}
    found = []
    for backend in (engine.backend, "reference"):
        params = [nn.Parameter(draw(f32, n, n)) for n in (5, 1500)]
        groups = [{"params": [p], "max_grad_value": limit} for p, limit in zip(params, (0.25, None), strict=True)]
        opt = CLASSES[rule](groups, backend=backend, **options)
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = draw(f32, p.numel(), 10 * step + k)
            opt.step()
        found.append(snapshot(params, opt))
    for name in found[1]:
        assert_same_bits(found[0][name], found[1][name], name)
