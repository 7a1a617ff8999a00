"""Skipping on spikes: OLMo's rule, decided where the gradients are."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import Piece, bf16, f32, gradient, make_params, snapshot
from engines import ENGINES, Engine
from refusals import mentions
from torch import Tensor, nn

import wd_kernels
from wd_kernels import clipping

STEPS, WINDOW = 14, 6


def sizes(step: int) -> float:
    """What gradients are multiplied by: it wanders, with a spike in steps 6 and 9, and a NaN in step 11."""
    return {6: 40.0, 9: 200.0, 11: math.nan}.get(step, 1.0 + 0.2 * math.sin(step))


def losses(step: int) -> float | None:
    """With a spike in step 8; none is given in step 3."""
    return None if step == 3 else {8: 50.0}.get(step, 2.0 - 0.05 * step)


def steps(backend: str, device: Any, given: str, sigma: float = 2.0) -> tuple[list[dict[str, Tensor]], Any]:
    params = make_params([Piece((5,)), Piece((1500,))], bf16, f32, device=device)
    opt = wd_kernels.AdamW(params, lr=0.05, weight_decay=0.1, skip_spikes=sigma, spike_window=WINDOW, backend=backend)
    found = []
    for step in range(STEPS):
        for k, p in enumerate(params):
            p.grad = gradient(Piece(tuple(p.shape)), f32, 10 * step + k, device) * sizes(step)
        loss = losses(step)
        tensor = None if loss is None else torch.tensor(loss, dtype=bf16 if given == "closure" else f32, device=device)
        if given == "closure":
            opt.step(lambda loss=tensor: loss)  # type: ignore[misc]
        else:
            opt.latest_loss = tensor if given == "loss" else None
            opt.step()
            assert opt.latest_loss is None  # of one step alone
        found.append(snapshot(params, opt) | {"skipped": opt.skipped.cpu(), "norm": opt.grad_norm.cpu()})
    return found, opt


@pytest.mark.parametrize(
    ("engine", "given"),
    [
        pytest.param(e, given, id=f"{e}-{given}", marks=[pytest.mark.gpu] * (e.form == "gpu"))
        for e in ENGINES for given in (("loss",) if e.is_ptx else ("norm", "loss", "closure"))
    ],
    indirect=["engine"],
)  # fmt: skip
def test_every_engine_decides_alike(engine: Engine, given: str) -> None:
    found, opt = steps(engine.backend, engine.device, given)
    expected, other = steps("reference", "cpu", given)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name in b:
            assert_same_bits(a[name], b[name], f"step {step}: {name}")
    for a, b in zip(opt._table.window, other._table.window, strict=True):
        assert_same_bits(a.cpu(), b)


@pytest.mark.parametrize("given", ["norm", "loss"])
def test_it_is_the_published_rule(given: str) -> None:
    """Of torch.std_mean over lists, in float64: what OLMo-core does, where finite values alone are kept."""
    found, _ = steps("cpu", "cpu", given)
    norms: list[float] = []
    known: list[float] = []
    expected = []
    for step, own in enumerate(found):
        skip = False
        for values, x in ((norms, float(own["norm"])), (known, losses(step) if given == "loss" else None)):
            if x is None:
                continue
            if len(values) >= WINDOW // 2:
                std, mean = torch.std_mean(torch.tensor(values[-WINDOW:], dtype=torch.float64))
                skip |= not x - mean <= 2.0 * std
            if math.isfinite(x):
                values.append(float(torch.tensor(x)) if values is known else x)
        expected.append(skip)
    assert [bool(own["skipped"]) for own in found] == expected
    assert [step for step, skip in enumerate(expected) if skip] == ([6, 8, 9, 11] if given == "loss" else [6, 9, 11])
    for step in (6, 9, 11):
        before, after = found[step - 1], found[step]
        for name in before.keys() - {"skipped", "norm"}:
            assert_same_bits(after[name], before[name], name)


def test_worked_by_hand() -> None:
    """Norms 3, 4, 5, whose mean is 4 and deviation 1: 6.5 is no spike at sigma 3, 8 is, of 3, 4, 5 and 6.5."""
    p = nn.Parameter(torch.zeros(1))
    opt = wd_kernels.SGDW([p], lr=1.0, weight_decay=0.5, skip_spikes=3.0, spike_window=4)
    skipped = []
    for norm in (3.0, 4.0, 5.0, 6.5, 12.0, 12.0):
        p.grad = torch.tensor([norm])
        opt.step()
        skipped.append(bool(opt.skipped))
    assert skipped == [False, False, False, False, True, False]
    p.grad = torch.tensor([1000.0])
    opt.skip_spikes = None
    opt.step()
    assert not opt.skipped


def test_half_a_window_is_waited_for() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = wd_kernels.SGDW([p], lr=1.0, weight_decay=0.5, skip_spikes=2.0, spike_window=8)
    skipped = []
    for norm in (3.0, 3.1, 100.0, 3.0, 3.1, 1000.0):
        p.grad = torch.tensor([norm])
        opt.step()
        skipped.append(bool(opt.skipped))
    assert skipped == [False] * 5 + [True]


def test_it_is_set_between_steps() -> None:
    p = nn.Parameter(torch.ones(1))
    opt = wd_kernels.SGDW([p], lr=0.1, weight_decay=0.5, skip_spikes=2.0, spike_window=4)
    for norm in (3.0, 4.0, 5.0):
        p.grad = torch.tensor([norm])
        opt.step()
    assert opt._table.window.seen.tolist() == [3, 0]
    again = pickle.loads(pickle.dumps(opt))
    assert (again.skip_spikes, again.spike_window) == (2.0, 4)
    assert copy.deepcopy(opt)._table.window.seen.tolist() == [0, 0]  # it begins anew, as after a load
    opt.spike_window = 4
    assert opt._table.window.seen.tolist() == [3, 0]
    opt.spike_window = 8
    assert opt._table.window.seen.tolist() == [0, 0]
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    for _ in range(2):
        opt.step()
    assert opt._table.window.seen.tolist() == [2, 0]  # another table, the same window


def test_an_optimizer_that_is_made_in_inference_mode() -> None:
    p = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        opt = wd_kernels.AdamW([p], skip_spikes=6.0)
    p.grad = torch.ones(3)
    opt.step()
    opt.spike_window = 8
    assert opt.spike_window == 8


def test_bad_input() -> None:
    p = nn.Parameter(torch.ones(3))
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=mentions(f"skip_spikes={wrong!r} in the arguments", "numbers > 0")):
            wd_kernels.AdamW([p], skip_spikes=wrong)
    for window in (1, 1025, 6.0, True):
        with pytest.raises(ValueError, match=mentions(f"spike_window={window!r}", "from 2 to 1024")):
            wd_kernels.AdamW([p], skip_spikes=6.0, spike_window=window)  # type: ignore[arg-type]
    opt = wd_kernels.AdamW([p], skip_spikes=6.0)
    with pytest.raises(ValueError, match=mentions("spike_window=0 in the optimizer", "allowed are")):
        opt.spike_window = 0
    p.grad = torch.ones(3)
    for backend in ("cpu", "triton"):
        opt = wd_kernels.AdamW([p], skip_spikes=6.0, backend=backend)
        for loss in (torch.ones(2), "a"):
            opt.latest_loss = loss
            with pytest.raises(TypeError, match=mentions("latest_loss=", "a number, or a tensor of one element")):
                opt.step()
            assert not opt.state
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=mentions("skip_spikes", "gradient release")):
        wd_kernels.release_gradients(model, wd_kernels.AdamW(model.parameters(), skip_spikes=6.0))


def test_the_window_is_a_block() -> None:
    """What is added up is a block of the norms' sums: as many values as one has."""
    window = clipping.Window.empty()
    values = torch.linspace(1, 3, 1024, dtype=torch.float64)
    for x in values.tolist():
        assert not window.spiked(x, None, 4.0, 1024)
    std, mean = torch.std_mean(values)
    edge = float(mean + 4.0 * std)
    assert not window.is_spike(0, edge - 1e-9, 4.0, 1024)
    assert window.is_spike(0, edge + 1e-9, 4.0, 1024)
