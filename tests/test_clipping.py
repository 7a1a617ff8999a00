"""Clipping, skipping and loss scaling within the step: every engine has the reference's bits, that has the numbers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from bits import assert_same_bits, raw
from cases import (
    CLASSES,
    SMALL,
    Case,
    Piece,
    bf16,
    cases,
    f16,
    f32,
    f64,
    gradient,
    has_gradient,
    make_params,
    optimizer,
    snapshot,
)
from covering import covering
from engines import ENGINES, GPU, Engine, engine_params
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wd_kernels
from wd_kernels import native, reference, sums
from wd_kernels.clipping import clip_of

#: What is asked for: of the optimizer, of its second group, and of a scaler.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "clip": ({"max_grad_norm": 0.7}, {}, False),
    "own": ({"max_grad_norm": 3.0, "skip_nonfinite": True}, {"max_grad_norm": 0.5}, False),
    "measure": ({"max_grad_norm": math.inf}, {}, False),
    "scaled": ({}, {}, True),
    "value": ({"max_grad_norm": 4.0, "max_grad_value": 0.01}, {"max_grad_value": 0.003}, True),
    "all": ({"max_grad_norm": 2.0, "skip_nonfinite": True}, {"max_grad_norm": 1.0}, True),
}
BODIES = [
    *cases(rules=["adamw"], names=["plain", "amsgrad"], decays=["lr_scaled"]),
    *cases(rules=["sgdw"], names=["no-momentum", "dampening"], decays=["independent"]),
    *cases(rules=["adagradw"], names=["slowed"], decays=["proximal"]),
]
DTYPES = [(f32, f32), (bf16, bf16), (f32, bf16), (f16, f32), (f64, f64)]
STEPS = 6
INFINITE, NAN, FOUND = 1, 3, 4  # the steps that have an infinity, a NaN, and a scaler that says so
SCALE = 64.0


def steps(case: Case, mode: str, backend: str, device: Any = "cpu") -> list[dict[str, Tensor]]:
    """All there is after each step, and what was found of the gradients."""
    options, own, scaled = MODES[mode]
    params = make_params(SMALL, case.dtype, case.grad_dtype, device=device)
    groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.3, **own}]
    opt = optimizer(case, groups, backend, **options)
    found = []
    for step in range(STEPS):
        opt.param_groups[0]["lr"] = 0.05 / (step + 1)
        for k, (p, piece) in enumerate(zip(params, SMALL, strict=True)):
            grad = gradient(piece, case.grad_dtype, 100 * step + k, device) if has_gradient(k, step) else None
            p.grad = grad
        if step in (INFINITE, NAN) and options.get("skip_nonfinite"):
            last = [p for p in params if p.grad is not None and p.numel() > 20][-1]
            last.grad = torch.full_like(last, math.nan if step == NAN else -math.inf, dtype=case.grad_dtype)
        if scaled:
            opt.grad_scale = torch.tensor(SCALE, device=device)
            opt.found_inf = torch.tensor(float(step == FOUND), device=device)
        before = {k: raw(p.grad) for k, p in enumerate(params) if p.grad is not None}
        opt.step()
        for k, grad in before.items():
            assert torch.equal(raw(params[k].grad), grad)  # they are read, not rewritten
        own_found = {"skipped": opt.skipped.cpu()}
        if opt.grad_norm is not None:
            own_found |= {"norm": opt.grad_norm.cpu(), "norms": opt.group_grad_norms.cpu()}
        found.append(snapshot(params, opt) | own_found)
    return found


def assert_same_steps(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """A device that skips the step in which a state is made has it already, as it begins."""
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name in {**a, **b}:
            if name in a and name in b:
                assert_same_bits(a[name], b[name], f"step {step}: {name}")
            else:
                begun = torch.zeros(()) if name.endswith("step") else a.get(name, b.get(name))
                assert name in a, name
                assert_same_bits(a[name], begun)


ROWS = covering(
    {"engine": [e for e in ENGINES if e.form != "gpu"], "case": BODIES, "dtypes": DTYPES, "mode": list(MODES)}
)
ROWS += [
    {"engine": e, "case": BODIES[k % len(BODIES)], "dtypes": DTYPES[k % 2], "mode": mode}
    for e in ENGINES[-2:] for k, mode in enumerate(MODES)
]  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "case", "dtypes", "mode"),
    [
        pytest.param(*r.values(), id="-".join(map(str, r.values())), marks=[pytest.mark.gpu] * (r["engine"] in GPU))
        for r in ROWS
    ],
    indirect=["engine"],
)  # fmt: skip
def test_every_engine_has_the_references_bits(engine: Engine, case: Case, dtypes: Any, mode: str) -> None:
    case = Case(case.rule, case.name, case.options, *dtypes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="invalid value", category=RuntimeWarning)
        found = steps(case, mode, engine.backend, engine.device)
    expected = steps(case, mode, "reference")
    assert_same_steps(found, expected)
    skipped = [bool(own["skipped"]) for own in expected]
    options, _, scaled = MODES[mode]
    nonfinite = options.get("skip_nonfinite", False)
    assert skipped == [(nonfinite and step in (INFINITE, NAN)) or (scaled and step == FOUND) for step in range(STEPS)]
    assert not skipped[-1]
    for before, after, skip in zip(expected, expected[1:], skipped[1:], strict=False):
        if skip:
            own = [name for name in before if name not in ("norm", "norms", "skipped")]
            assert own == [name for name in after if name not in ("norm", "norms", "skipped")]
            for name in own:
                assert_same_bits(before[name], after[name], name)


def test_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [steps(BODIES[k % len(BODIES)], mode, "reference") for k, mode in enumerate(MODES)]
    monkeypatch.setattr(native, "C", None)
    monkeypatch.setattr(native, "CHECKS", False)
    for k, (mode, own) in enumerate(zip(MODES, expected, strict=True)):
        assert_same_steps(steps(BODIES[k % len(BODIES)], mode, "reference"), own)


# Numbers, by other hands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f32, bf16, f64])
def test_the_norm_is_nearer_than_torchs(dtype: torch.dtype) -> None:
    """Root mean square of the relative error, of what float64 gives."""
    errors: dict[str, list[float]] = {"ours": [], "torch": []}
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        params = [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (7, 3000, 40_000 + seed)]
        opt = wd_kernels.SGDW(params, lr=0.1, weight_decay=0.1, max_grad_norm=math.inf)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) ** 3).to(dtype)
        exact = math.sqrt(math.fsum(x * x for p in params for x in p.grad.double().tolist()))
        opt.step()
        theirs = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        assert opt.grad_norm is not None
        for name, norm in (("ours", opt.grad_norm), ("torch", theirs)):
            errors[name].append((float(norm) / exact - 1) ** 2)
    ours, theirs_ = (math.sqrt(sum(own) / 12) for own in errors.values())
    assert ours <= theirs_
    assert ours < (1e-14 if dtype == f64 else 1e-7)


@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_it_is_torchs_clip_and_step(rule: str, max_norm: float) -> None:
    make = {"adamw": torch.optim.AdamW, "sgdw": torch.optim.SGD}[rule]
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if rule == "sgdw" else {})
    mine, theirs = ([nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 2000)] for _ in range(2))
    mode = {"decay": "l2"} if rule == "sgdw" else {}
    ours = CLASSES[rule](mine, max_grad_norm=max_norm, **options, **mode)
    torchs = make(theirs, **options)
    for step in range(20):
        for k, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k)) * (1 + step % 3)
            q.grad = p.grad.clone()
        ours.step()
        norm = nn.utils.clip_grad_norm_(theirs, max_norm)
        torchs.step()
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


def test_worked_by_hand() -> None:
    """Gradients (3, 0) and (0, 4), scaled by 8: a norm of 5, and a step of half of each."""
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = wd_kernels.SGDW([a, b], lr=1.0, weight_decay=0.5, decay="independent", max_grad_norm=2.5)
    a.grad, b.grad = torch.tensor([24.0, 0.0]), torch.tensor([0.0, 32.0])
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    opt.step()
    assert opt.grad_norm.item() == 5.0
    assert opt.group_grad_norms.tolist() == [5.0]
    clip = 2.5 / (5 + 1e-6)
    assert a.tolist() == pytest.approx([1 - 0.5 - 3 * clip, 0.5], rel=1e-6)
    assert b.tolist() == pytest.approx([0.5, 1 - 0.5 - 4 * clip], rel=1e-6)
    assert clip_of(5.0, 2.5) == clip


def test_groups_with_limits_of_their_own() -> None:
    """Norms 5 and 10 and 1: the second is clipped to 1 by itself, the others together by theirs, sqrt(26) to 2."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    groups = [{"params": [p], **({"max_grad_norm": 1.0} if k == 1 else {})} for k, p in enumerate(params)]
    opt = wd_kernels.SGDW(groups, lr=1.0, weight_decay=0.1, max_grad_norm=2.0)
    for p, grad in zip(params, ([3.0, 4.0], [6.0, 8.0], [0.0, 1.0]), strict=True):
        p.grad = torch.tensor(grad)
    opt.step()
    assert opt.grad_norm.item() == math.sqrt(25 + 100 + 1)
    assert opt.group_grad_norms.tolist() == [5.0, 10.0, 1.0]
    together = 2.0 / math.sqrt(26)
    for p, grad, clip in zip(params, ([3.0, 4.0], [6.0, 8.0], [0.0, 1.0]), (together, 0.1, together), strict=True):
        assert p.tolist() == pytest.approx([-x * clip for x in grad], rel=1e-5)
    del opt.param_groups[1]["max_grad_norm"]  # it may come and go
    before = [p.detach().clone() for p in params]
    opt.step()
    together = 2.0 / math.sqrt(126)
    for p, old, grad in zip(params, before, ([3.0, 4.0], [6.0, 8.0], [0.0, 1.0]), strict=True):
        assert p.tolist() == pytest.approx([0.9 * x - g * together for x, g in zip(old.tolist(), grad, strict=True)])


# The same bits whatever lies around -----------------------------------------------------------------------------------


def norm_of(grads: list[Tensor], arrange: Callable[[list[nn.Parameter]], Any] = list, flat: bool = False) -> float:
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    if flat:
        wd_kernels.flatten_(params)
    opt = wd_kernels.SGDW(arrange(params), lr=0.1, weight_decay=0.1, max_grad_norm=math.inf)
    opt.step()
    assert opt.grad_norm is not None
    return opt.grad_norm.item()


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8), st.randoms(use_true_random=False), st.integers(-60, 60))
def test_the_norm_is_the_same_in_every_arrangement(sizes: list[int], random: Any, exponent: int) -> None:
    """Of tensors in any order and grouping, flat or not; it is the exact sum of what blocks have."""
    generator = torch.Generator().manual_seed(sum(sizes))
    grads = [torch.randn(n, generator=generator) * 2.0**exponent for n in sizes]
    expected = norm_of(grads)
    blocks = [x for g in grads for x in reference.block_sums(g * g).tolist()]
    assert expected == math.sqrt(math.fsum(blocks))
    cut = random.randint(0, len(grads))
    shuffled = random.sample(grads, len(grads))
    assert norm_of(shuffled, lambda own: [{"params": own[:cut]}, {"params": own[cut:]}]) == expected
    assert norm_of(grads, flat=True) == expected


def test_threads_change_no_bit() -> None:
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (5, 300_001, 77_777, 40_000)]
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found |= {norm_of(grads) for _ in range(5)}
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_one_tensor_in_pieces_has_the_norm_of_the_whole() -> None:
    """Where they end between blocks of 1024: so shards do."""
    whole = torch.randn(5 * 1024 + 77, generator=torch.Generator().manual_seed(0))
    assert norm_of([whole]) == norm_of(list(whole.split([1024, 3072, 1024 + 77])))
    assert norm_of([whole]) != norm_of(list(whole.split([1000, len(whole) - 1000])))


# Skipping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [f32, bf16, f16, f64])
def test_one_element_anywhere_skips_the_whole_step(value: float, dtype: torch.dtype) -> None:
    """Parameters, states, counts and schedules; versions of tensors, which tell autograd of changes, too."""
    schedule = wd_kernels.schedules.Cosine(10)
    params = [nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3, 1500, 0)]
    opt = wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1, schedule=schedule, skip_nonfinite=True)
    for step in range(6):
        for p in params:
            p.grad = torch.ones_like(p)
        bad = step in (0, 2, 3)
        if bad:
            spoilt = params[step % 2].grad
            assert spoilt is not None
            spoilt.view(-1)[-1] = value
        before, versions = snapshot(params, opt), [p._version for p in params]
        count = opt.param_groups[0].get("schedule_step")
        opt.step()
        assert opt.skipped.item() is bad
        assert (opt.param_groups[0].get("schedule_step") == count) is bad
        if bad:
            after = snapshot(params, opt)
            assert list(after) == list(before)
            assert [p._version for p in params] == versions
            for name, own in before.items():
                assert_same_bits(after[name], own, name)
    assert {float(opt.state[p]["step"]) for p in params} == {3.0}


def test_a_skipped_step_is_as_none() -> None:
    def run(skipping: bool) -> dict[str, Tensor]:
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 1500)]
        opt = wd_kernels.SGDW(params, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1, skip_nonfinite=skipping)
        for step in range(5):
            for k, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k))
            if step in (0, 3):
                if not skipping:
                    continue
                params[0].grad = torch.full_like(params[0], math.nan)
            opt.step()
        return snapshot(params, opt)

    expected = run(False)
    for name, own in run(True).items():
        assert_same_bits(own, expected[name], name)


def test_without_the_option_what_is_no_number_spreads() -> None:
    """As with torch's clip_grad_norm_: nobody is kept from seeing it."""
    p = nn.Parameter(torch.ones(3))
    opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.1, max_grad_norm=1.0)
    p.grad = torch.tensor([1.0, math.nan, 1.0])
    opt.step()
    assert math.isnan(opt.grad_norm.item())
    assert not opt.skipped.item()
    assert p.isnan().all()


# torch.amp.GradScaler -------------------------------------------------------------------------------------------------


def scaled_loop(opt: Any, model: nn.Module, overflow: tuple[int, ...], clip: bool = False) -> list[float]:
    """A loop as torch documents it; what scales there were."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scales = []
    for step in range(8):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean() * (math.inf if step in overflow else 1.0)
        opt.zero_grad()
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("options", [{"fused": True}, {"skip_nonfinite": True}, {"max_grad_norm": 0.1}, {}], ids=str)
def test_a_scaled_loop(options: dict[str, Any]) -> None:
    """The numbers of torch's AdamW in the same loop; where nobody has asked for it, the scaler does it by itself."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    ours, theirs = model(), model()
    opt = wd_kernels.AdamW(ours.parameters(), lr=0.05, weight_decay=0.1, **options)
    torchs = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.1)
    assert opt._step_supports_amp_scaling == bool(options)
    clip = "max_grad_norm" in options
    assert scaled_loop(opt, ours, (0, 4)) == scaled_loop(torchs, theirs, (0, 4), clip)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert float(opt.state[p]["step"]) == float(torchs.state[q]["step"]) == 6
    assert not hasattr(opt, "grad_scale")
    ordinary = wd_kernels.AdamW(ours.parameters(), lr=0.05)
    assert not ordinary._step_supports_amp_scaling
    ordinary.max_grad_norm = 1.0
    assert ordinary._step_supports_amp_scaling


def test_their_own_clipping_still_works() -> None:
    """unscale_ first, as frameworks do: the optimizer is handed no scale, and what was found."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    start = [p.detach().clone() for p in model.parameters()]
    opt = wd_kernels.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, fused=True)
    scaled_loop(opt, model, (2,), clip=True)
    other = nn.Linear(3, 2)
    with torch.no_grad():
        for p, q in zip(other.parameters(), start, strict=True):
            p.copy_(q)
    torchs = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.1)
    scaled_loop(torchs, other, (2,), clip=True)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert float(opt.state[p]["step"]) == 7


def test_what_a_scaler_leaves_is_for_its_step_alone() -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, plain = (wd_kernels.SGDW([x], lr=0.1, momentum=0.9, weight_decay=0.1) for x in (p, q))
    for step in range(4):
        p.grad, q.grad = torch.full((3,), 4.0), torch.full((3,), 4.0 if step % 2 else 1.0)
        if step % 2 == 0:
            ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        else:
            del ours.grad_scale, ours.found_inf
        ours.step()
        plain.step()
        assert_same_bits(p, q)
        assert ours.grad_norm is None


# Settings -------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm=-1.0 in the arguments: allowed are numbers > 0, math.inf"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm=0.0 in the arguments"),
    ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm=nan in the arguments"),
    ({"max_grad_norm": "1"}, TypeError, "max_grad_norm='1' in the arguments"),
    ({"skip_nonfinite": "yes"}, TypeError, "skip_nonfinite='yes' in the arguments: expected True or False"),
]


@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize(("options", "error", "match"), WRONG, ids=[str(own[0]) for own in WRONG])
def test_wrong_settings(rule: str, options: dict[str, Any], error: type[Exception], match: str) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=match):
        CLASSES[rule]([p], lr=0.1, **options)
    opt = CLASSES[rule]([p], lr=0.1, max_grad_norm=2.0)
    (name, value), *_ = options.items()
    with pytest.raises(error, match=match.replace("the arguments", "the optimizer")):
        setattr(opt, name, value)
    assert (opt.max_grad_norm, opt.skip_nonfinite) == (2.0, False)
    if name == "max_grad_norm":
        with pytest.raises(error, match=match.replace("the arguments", "param group 1")):
            opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "max_grad_norm": value})
        assert len(opt.param_groups) == 1
        opt.param_groups[0]["max_grad_norm"] = value
        p.grad = torch.ones(3)
        with pytest.raises(error, match=match.replace("the arguments", "param group 0")):
            opt.step()
        assert_same_bits(p, torch.ones(3))


@pytest.mark.parametrize(
    ("scale", "found", "error", "match"),
    [
        (torch.tensor(0.0), torch.tensor(0.0), ValueError, "grad_scale=0.0 of the optimizer: allowed are finite"),
        (torch.tensor(math.inf), torch.tensor(0.0), ValueError, "grad_scale=inf"),
        (torch.ones(2), torch.tensor(0.0), TypeError, "grad_scale="),
        (
            torch.ones(1, device="meta"),
            torch.tensor(0.0),
            ValueError,
            "grad_scale of the optimizer is a tensor on meta",
        ),
        (torch.tensor(1.0), torch.ones(1, device="meta"), ValueError, "found_inf of the optimizer is a tensor on meta"),
    ],
)
def test_what_a_scaler_leaves_may_be_wrong(scale: Any, found: Any, error: type[Exception], match: str) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.1)
    p.grad = torch.ones(3)
    opt.grad_scale, opt.found_inf = scale, found
    with pytest.raises(error, match=match):
        opt.step()
    assert_same_bits(p, torch.ones(3))
    assert not opt.state
    del opt.grad_scale, opt.found_inf
    opt.step()
    assert float(opt.state[p]["step"]) == 1


def test_settings_travel_but_not_in_checkpoints() -> None:
    p = nn.Parameter(torch.ones(3))
    groups = [{"params": [p], "max_grad_norm": 0.25}]
    opt = wd_kernels.AdamW(groups, lr=0.1, weight_decay=0.1, max_grad_norm=0.5, skip_nonfinite=True)
    p.grad = torch.ones(3)
    opt.step()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert (other.max_grad_norm, other.skip_nonfinite) == (0.5, True)
        assert other.grad_norm is None
        assert not other.skipped.item()
        (q,) = other.param_groups[0]["params"]
        q.grad = torch.full((3,), math.nan)
        other.step()
        assert other.skipped.item()
    saved = opt.state_dict()
    fresh = wd_kernels.AdamW([nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.1, max_grad_norm=3.0)
    fresh.load_state_dict(saved)
    assert (fresh.max_grad_norm, fresh.skip_nonfinite) == (3.0, False)
    assert fresh.param_groups[0].get("max_grad_norm") is None  # how to clip is the live optimizer's
    torch.optim.AdamW([nn.Parameter(torch.ones(3))]).load_state_dict(saved)
    old = opt.__getstate__()
    del old["clipping"]  # as they were pickled before there was any
    revived = wd_kernels.AdamW.__new__(wd_kernels.AdamW)
    revived.__setstate__(old)
    assert (revived.max_grad_norm, revived.skip_nonfinite) == (None, False)


def test_what_is_found_is_a_copy() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.1, max_grad_norm=0.5, skip_nonfinite=True)
    assert opt.grad_norm is None
    assert opt.group_grad_norms is None
    assert not opt.skipped.item()
    norms, skips = [], []
    for scale in (3.0, math.inf, 4.0):
        p.grad = torch.tensor([0.0, scale, 0.0])
        opt.step()
        norms.append(opt.grad_norm)
        skips.append(opt.skipped)
    assert [n.item() for n in norms] == [3.0, math.inf, 4.0]
    assert [s.item() for s in skips] == [False, True, False]
    assert all(n.dtype == f64 and n.shape == () for n in norms)
    p.grad = None
    opt.step()  # nothing is there to be measured
    assert opt.grad_norm.item() == 0.0
    opt.max_grad_norm, opt.skip_nonfinite = None, False
    p.grad = torch.full((3,), 2.0)
    before = p.detach().clone()
    opt.step()
    assert opt.grad_norm is None
    assert not torch.equal(p, before)


def test_gradient_release_refuses() -> None:
    model = nn.Linear(2, 2)
    opt = wd_kernels.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, max_grad_norm=1.0)
    with pytest.raises(
        ValueError, match="max_grad_norm, skip_nonfinite or skip_spikes of the optimizer with gradient release"
    ):
        wd_kernels.release_gradients(model, opt)
    opt.max_grad_norm = None
    opt.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match="skip_nonfinite or skip_spikes in param group 0 with gradient release"):
        wd_kernels.release_gradients(model, opt)
    del opt.param_groups[0]["max_grad_norm"]
    release = wd_kernels.release_gradients(model, opt)
    with pytest.raises(RuntimeError, match="skip_nonfinite=True: gradients are released"):
        opt.skip_nonfinite = True
    opt.found_inf = torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="of a GradScaler: gradients are released"):
        opt.step()
    del opt.found_inf
    start = [p.detach().clone() for p in model.parameters()]
    opt.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(RuntimeError, match="max_grad_norm in param group 0: gradients are released"):
        model(torch.ones(1, 2)).sum().backward()
    for p, q in zip(model.parameters(), start, strict=True):
        assert_same_bits(p, q)
    release.remove()


def mapping(opt: Any) -> Mapping[str, Any]:
    return {key: value for key, value in opt.param_groups[0].items() if key != "params"}


def test_groups_hold_nothing_of_it() -> None:
    """As torch's distributed checkpoints want it."""
    plain = wd_kernels.AdamW([nn.Parameter(torch.ones(3))], lr=0.1)
    asked = wd_kernels.AdamW([nn.Parameter(torch.ones(3))], lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    assert mapping(plain) == mapping(asked)


# Devices that count by themselves -------------------------------------------------------------------------------------

COUNTING = [e for e in ENGINES if str(e) in ("triton-interpreted", "cuda-on_cpu", "triton-gpu", "cuda-gpu")]


@pytest.mark.parametrize("engine", engine_params(tuple(COUNTING)), indirect=True)
def test_counts_move_to_the_device_and_stay(engine: Engine) -> None:
    """In the midst of a run: by then the host has counted. What it knows of them is asked of their tensors."""

    def run(backend: str, device: Any) -> tuple[list[dict[str, Tensor]], Any]:
        params = make_params([Piece((5,)), Piece((1500,)), Piece((7,))], f32, f32, device=device)
        opt = wd_kernels.SGDW(params, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1, backend=backend)
        found = []
        for step in range(9):
            for k, p in enumerate(params):
                p.grad = gradient(Piece(tuple(p.shape)), f32, 10 * step + k, device)
            if step in (1, 5):
                params[0].grad = None
            if step == 3:
                opt.skip_nonfinite = True
            if step in (4, 6):
                params[1].grad = torch.full_like(params[1], math.nan)
            if step == 7:
                opt.skip_nonfinite = False
            opt.step()
            found.append(snapshot(params, opt) | {"skipped": opt.skipped.cpu()})
            if step == 5:  # a state that comes late is fresh, when the others are not
                del opt.state[params[2]]["momentum_buffer"]
        return found, opt

    found, opt = run(engine.backend, engine.device)
    expected, _ = run("reference", "cpu")
    assert_same_steps(found, expected)
    bank = opt._table.norms.bank
    assert bank is not None
    assert all(own["step"].device.type == engine.device.type for own in opt.state.values())
    assert {own["step"].untyped_storage().data_ptr() for own in opt.state.values()} == {bank.steps.data_ptr()}
    again = copy.deepcopy(opt)
    assert {float(own["step"]) for own in again.state.values()} == {float(own["step"]) for own in opt.state.values()}


@pytest.mark.parametrize("engine", engine_params(tuple(COUNTING)), indirect=True)
def test_a_steady_step_sends_nothing(engine: Engine) -> None:
    """Its rows are completed on the device, so that of a constant learning rate nothing is left to be sent."""
    params = make_params([Piece((5,)), Piece((1500,))], f32, f32, device=engine.device)
    opt = wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1, max_grad_norm=1.0, backend=engine.backend)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.step()
    (copy_there,) = opt._table.device_copies.values()
    sent: list[Any] = []
    original = type(copy_there)._send
    copy_there._send = lambda parts: (sent.append(set(parts)), original(copy_there, parts))
    opt.step()
    opt.param_groups[0]["lr"] = 0.2
    opt.step()
    opt.max_grad_norm = 2.0
    opt.step()
    assert sent == [set(), {"settings"}, {"limits"}]


@pytest.mark.parametrize("engine", engine_params(tuple(COUNTING)), indirect=True)
def test_a_launch_that_fails_leaves_nothing_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares were added up already: the next step begins with empty sums."""
    backend = wd_kernels.backends.BACKENDS[engine.backend]
    p = make_params([Piece((1500,))], f32, f32, device=engine.device)[0]
    opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.1, max_grad_norm=1.0, backend=engine.backend)
    p.grad = torch.ones_like(p)
    opt.step()
    before = snapshot([p], opt)
    norm = opt.grad_norm

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for a test")

    with monkeypatch.context() as patch:
        patch.setattr(type(backend), "launch", fails)
        with pytest.raises(torch.OutOfMemoryError, match="no memory for a test"):
            opt.step()
    for name, own in snapshot([p], opt).items():
        assert_same_bits(own, before[name], name)
    assert int(opt._table.norms.bank.sums.abs().sum()) > 0
    opt.step()
    assert_same_bits(opt.grad_norm.cpu(), norm.cpu())
    assert int(opt._table.norms.bank.sums.abs().sum()) == 0
    assert float(opt.state[p]["step"]) == 2


@pytest.mark.parametrize("engine", engine_params(tuple(COUNTING)), indirect=True)
def test_a_schedule_that_is_called_cannot_be_told(engine: Engine) -> None:
    p = make_params([Piece((5,))], f32, f32, device=engine.device)[0]
    schedule = functools.partial(max, 1)
    opt = wd_kernels.AdamW([p], lr=0.1, schedule=schedule, skip_nonfinite=True, backend=engine.backend)
    p.grad = torch.ones_like(p)
    with pytest.raises(
        ValueError, match=r"is Python code, with skip_nonfinite or a GradScaler, on .*those of wd_kernels\.schedules"
    ):
        opt.step()
    assert not opt.state
    opt.skip_nonfinite, opt.max_grad_norm = False, 1.0
    opt.step()
    assert opt.param_groups[0]["schedule_step"] == 1


def test_sums_are_the_references() -> None:
    """Digit by digit: native code adds the very words that Python's whole numbers make."""
    grads = [torch.randn(n) * 10.0**e for n, e in ((5, -20), (3000, 3), (1024, 15), (1, -45))]
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    opt = wd_kernels.SGDW(params, lr=0.1, weight_decay=0.1, max_grad_norm=math.inf)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    opt.step()
    words = torch.zeros(sums.WORDS, dtype=torch.int64)
    for g in grads:
        sums.add(words, reference.squares(g, f32))
    (found,) = opt._table.norms.sums
    assert sums.value(found) == sums.value(words)
    carried = [int(w) for w in found[: sums.DIGITS]]
    assert sum(w << 32 * k for k, w in enumerate(carried)) == sum(int(w) << 32 * k for k, w in enumerate(words[:68]))


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"capturable": True, "backend": "triton"}], ids=str)
def test_parameters_on_two_devices_are_refused(options: dict[str, Any]) -> None:
    """There is one device here: another is written into the table."""
    p = nn.Parameter(torch.ones(3))
    opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.1, **options)
    p.grad = torch.ones(3)
    opt.step()
    (bucket,) = opt._table.buckets
    elsewhere = dataclasses.replace(bucket.spec, device=torch.device("cuda", 1))
    opt._table.buckets.append(dataclasses.replace(bucket, spec=elsewhere))
    before = snapshot([p], opt)
    with pytest.raises(ValueError, match="of parameters on cpu and cuda:1: what is decided of all gradients"):
        opt.step()
    for name, own in snapshot([p], opt).items():
        assert_same_bits(own, before[name], name)


@pytest.mark.parametrize("engine", engine_params(tuple(COUNTING)), indirect=True)
def test_what_was_found_without_gradients(engine: Engine) -> None:
    """And a step that somebody else had skipped on the host, when there were none, keeps no later one."""
    params = make_params([Piece((5,)), Piece((70,))], f32, f32, device=engine.device)
    opt = wd_kernels.SGDW(
        params, lr=0.1, momentum=0.9, weight_decay=0.1, max_grad_norm=10.0, skip_nonfinite=True, backend=engine.backend
    )
    opt.grad_scale, opt.found_inf = torch.tensor([1.0]), torch.tensor([1.0])
    opt.step()
    assert opt.skipped.item()
    del opt.grad_scale, opt.found_inf
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
    assert {float(own["step"]) for own in opt.state.values()} == {2.0}
    params[0].grad = torch.full_like(params[0], math.nan)
    opt.step()
    assert opt.skipped.item()
    opt.zero_grad()
    opt.step()
    assert not opt.skipped.item()
    assert opt.grad_norm.item() == 0.0
    assert opt.group_grad_norms.tolist() == [0.0]


@pytest.mark.parametrize("engine", engine_params(tuple(COUNTING)), indirect=True)
@pytest.mark.parametrize("how", ["load", "copy", "group"])
def test_a_first_step_that_was_skipped_begins_nothing(engine: Engine, how: str) -> None:
    """However the optimizer goes on: the first gradient that counts is undampened."""

    def run(backend: str, device: Any) -> dict[str, Tensor]:
        params = make_params([Piece((5,)), Piece((70,))], f32, f32, device=device)
        opt = wd_kernels.SGDW(
            params, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1, skip_nonfinite=True, backend=backend
        )
        for step in range(4):
            for k, p in enumerate(params):
                p.grad = gradient(Piece(tuple(p.shape)), f32, 10 * step + k, device)
            if step == 0:
                params[0].grad = torch.full_like(params[0], math.nan)
            opt.step()
            if step == 0 and how == "load":
                opt.load_state_dict(opt.state_dict())
            elif step == 0 and how == "copy":
                opt = copy.deepcopy(opt)
                params = opt.param_groups[0]["params"]
            elif step == 0:
                opt.add_param_group({"params": make_params([Piece((3,))], f32, f32, device=device)})
        return snapshot(params, opt)

    found, expected = run(engine.backend, engine.device), run("reference", "cpu")
    assert list(found) == list(expected)
    for name, own in found.items():
        assert_same_bits(own, expected[name], name)


@pytest.mark.parametrize("engine", engine_params(tuple(COUNTING)), indirect=True)
def test_histories_are_few(engine: Engine) -> None:
    """They are numbered anew whenever they part: no number grows, and rows are told apart to the end."""
    params = make_params([Piece((3,))] * 4, f32, f32, device=engine.device)
    others = make_params([Piece((3,))] * 4, f32, f32)
    opts = [
        wd_kernels.AdamW(own, lr=0.1, weight_decay=0.1, max_grad_norm=2.0, backend=backend)
        for own, backend in ((params, engine.backend), (others, "reference"))
    ]
    for step in range(12):
        for own, device in ((params, engine.device), (others, "cpu")):
            for k, p in enumerate(own):
                there = step == 0 or (step * 7 + k * k) % 3 != 1
                p.grad = gradient(Piece((3,)), f32, 10 * step + k, device) if there else None
        for opt in opts:
            opt.step()
    assert float(opts[0]._table.counts.steps.max()) < 8
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.detach().cpu(), q.detach())
        assert float(opts[0].state[p]["step"]) == float(opts[1].state[q]["step"])


@pytest.mark.parametrize("engine", engine_params(tuple(COUNTING)), indirect=True)
def test_counts_beyond_2_to_the_24(engine: Engine) -> None:
    """float32 counts end there; what is made of them does not."""

    def run(backend: str, device: Any) -> Tensor:
        p = make_params([Piece((3,))], f32, f32, device=device)[0]
        opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.1, max_grad_norm=2.0, backend=backend)
        p.grad = torch.ones_like(p)
        opt.step()
        saved = opt.state_dict()
        saved["state"][0]["step"] = torch.tensor(float(2**24 - 1))
        opt.load_state_dict(saved)
        for _ in range(2):
            opt.step()
        return p.detach().cpu()

    assert_same_bits(run(engine.backend, engine.device), run("reference", "cpu"))


def test_counts_come_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tensors do: of another backend, here."""
    Engine("cuda", "on_cpu").provide(monkeypatch)
    p = nn.Parameter(torch.ones(5))
    opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.1, max_grad_norm=1.0, backend="cuda")
    p.grad = torch.ones(5)
    opt.step()
    assert opt._table.norms.bank is not None
    opt._table.resolve = lambda spec: wd_kernels.backends.BACKENDS["cpu"]
    for _ in range(2):
        opt.step()
    assert opt._table.norms.bank is None
    assert float(opt.state[p]["step"]) == 3
    other = nn.Parameter(torch.ones(5))
    plain = wd_kernels.AdamW([other], lr=0.1, weight_decay=0.1, max_grad_norm=1.0, backend="reference")
    other.grad = torch.ones(5)
    for _ in range(3):
        plain.step()
    assert_same_bits(p, other)


def test_results_belong_to_the_last_step() -> None:
    """Of one that fails, of another kind, or of other groups, there are none of the one before."""
    p = nn.Parameter(torch.ones(3))
    opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    p.grad = torch.ones(3)
    opt.step()
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert opt.group_grad_norms.tolist() == pytest.approx([math.sqrt(3)])
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr=-1"):
        opt.step()
    del opt.param_groups[1]
    opt.param_groups[0]["lr"] = 0.1
    p.grad = torch.full((3,), math.nan)
    opt.step()
    assert opt.skipped.item()
    opt.max_grad_norm, opt.skip_nonfinite = None, False
    model = nn.Sequential(nn.Linear(2, 2))
    released = wd_kernels.AdamW(model.parameters(), lr=0.1, max_grad_norm=1.0, skip_nonfinite=True)
    for q in model.parameters():
        q.grad = torch.full_like(q, math.nan)
    released.step()
    assert released.skipped.item()
    released.max_grad_norm, released.skip_nonfinite = None, False
    released.zero_grad()
    release = wd_kernels.release_gradients(model, released)
    model(torch.ones(1, 2)).sum().backward()
    released.step()
    assert not released.skipped.item()
    assert released.grad_norm is None
    release.remove()
    meta = nn.Parameter(torch.ones(3, device="meta"))
    planned = wd_kernels.AdamW([meta], lr=0.1, max_grad_norm=1.0)
    meta.grad = torch.ones(3, device="meta")
    planned.step()
    assert planned.grad_norm is planned.group_grad_norms is None
    with pytest.warns(UserWarning, match="is 'max_grad_norm' meant"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "max_grad_nrom": 1.0})
