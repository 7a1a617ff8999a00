"""Normalised weight decay, and how the authors' Lua code differs from their paper: what to give wd_kernels for each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Piece, gradient
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import wd_kernels
from wd_kernels import NormalizedDecay, normalized_weight_decay
from wd_kernels.schedules import Constant, Cosine, Product, Sequential, WarmRestarts, Warmup

f64 = torch.float64
ETA = WarmRestarts(3, mult=2)


def test_worked_by_hand() -> None:
    """A run on CIFAR-10: 50000 images in batches of 128, 100 epochs, lambda_norm 0.05."""
    assert normalized_weight_decay(0.05, 128, 50_000, 100) == pytest.approx(0.05 / math.sqrt(39_062.5), rel=1e-15)
    assert normalized_weight_decay(0.05, 128, 50_000, 100) == pytest.approx(2.5298e-4, rel=1e-4)
    assert normalized_weight_decay(0, 128, 50_000, 100) == 0
    assert normalized_weight_decay(0.05, 1, 400, 1) == 0.05 * 0.05


@given(norm=st.floats(1e-6, 10), b=st.integers(1, 4096), per_epoch=st.integers(1, 1000), epochs=st.integers(1, 300))
def test_it_is_over_the_root_of_the_number_of_steps(norm: float, b: int, per_epoch: int, epochs: int) -> None:
    """Where batches divide the data: the formula of the paper, that of a run's NormalizedDecay, and the root agree."""
    steps = per_epoch * epochs
    found = normalized_weight_decay(norm, b, b * per_epoch, epochs)
    assert found == pytest.approx(norm / math.sqrt(steps), rel=1e-12)
    assert found == pytest.approx(norm * NormalizedDecay(Cosine(steps)).decay_factor(steps // 2), rel=1e-12)


def test_the_factor_is_rebased_at_restarts() -> None:
    factors = [NormalizedDecay(ETA).decay_factor(t) for t in range(10)]
    assert factors == [1 / math.sqrt(3)] * 3 + [1 / math.sqrt(6)] * 6 + [1 / math.sqrt(12)]
    warm = NormalizedDecay(Sequential(Warmup(2), ETA))  # the warm-up is of the first period
    assert [warm.decay_factor(t) ** -2 for t in range(12)] == pytest.approx([5] * 5 + [6] * 6 + [12])
    assert NormalizedDecay(Product(ETA, Warmup(50))).decay_factor(3) == 1 / math.sqrt(6)
    assert NormalizedDecay(Constant(0.5, steps=16)).decay_factor(1000) == 0.25
    assert NormalizedDecay(Cosine(16)).steps == 16


@pytest.mark.parametrize("rule", ["AdamW", "SGDW"])
def test_the_optimizer_decays_by_it(rule: str) -> None:
    """Without gradients a weight shrinks by 1 - eta lambda_norm / sqrt(T_i); groups keep lambda_norm, one has none."""
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=f64)) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "weight_decay": 0.0}]
    opt = getattr(wd_kernels, rule)(
        groups, lr=0.1, weight_decay=0.4, decay="independent", schedule=NormalizedDecay(ETA)
    )
    expected = 1.0
    for t in range(10):
        p.grad, q.grad = torch.zeros(3, dtype=f64), torch.zeros(3, dtype=f64)
        opt.step()
        expected *= 1 - ETA(t) * 0.4 / math.sqrt(3 if t < 3 else 6 if t < 9 else 12)
        assert p.tolist() == pytest.approx([expected] * 3, rel=1e-14)
    assert q.tolist() == [1.0] * 3
    assert [group["weight_decay"] for group in opt.param_groups] == [0.4, 0.0]


# The Lua code (loshchil/AdamW-and-SGDW) -------------------------------------------------------------------------------


def walk(opt: Any, p: Any, before: Any = lambda t: None, steps: int = 12) -> Tensor:
    path = []
    for t in range(steps):
        p.grad = gradient(Piece((5,)), f64, t)
        before(t)
        opt.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def weights() -> Any:
    return torch.nn.Parameter(torch.linspace(-2, 2, 5, dtype=f64))


def test_lua_epsilon_stands_outside_the_bias_correction() -> None:
    """sqrt(v) + eps is divided by sqrt(1 - beta2^t) as a whole: the paper's form with eps / sqrt(1 - beta2^t)."""
    lr, weight_decay, eps = 0.1, 0.03, 0.05
    theta, m, v = weights().detach().clone(), torch.zeros(5, dtype=f64), torch.zeros(5, dtype=f64)
    expected = []
    for t in range(1, 13):
        g = gradient(Piece((5,)), f64, t - 1)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        size = lr * math.sqrt(1 - 0.99**t) / (1 - 0.9**t)
        theta = theta - size * m / (v.sqrt() + eps) - weight_decay * theta
        expected.append(theta)
    p = weights()
    opt = wd_kernels.AdamW([p], lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, decay="independent")
    paper = walk(opt, p)

    def correct(t: int) -> None:
        opt.param_groups[0]["eps"] = eps / math.sqrt(1 - 0.99 ** (t + 1))

    p = weights()
    opt = wd_kernels.AdamW([p], lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, decay="independent")
    assert torch.allclose(walk(opt, p, correct), torch.stack(expected), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(paper, torch.stack(expected), rtol=1e-2)


def test_lua_learning_rate_stands_outside_the_momentum_buffer() -> None:
    """x <- x - lr buf - eta lambda x, buf <- mu buf + g, which is form="torch".

    In Algorithm 1 it is inside: with a schedule that differs.
    """
    theta, buf, expected = weights().detach().clone(), torch.zeros(5, dtype=f64), []
    for t in range(12):
        buf = 0.9 * buf + gradient(Piece((5,)), f64, t)
        theta = theta - ETA(t) * 0.1 * buf - ETA(t) * 0.02 * theta
        expected.append(theta)
    paths = []
    for form in ("torch", "paper"):
        p = weights()
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "decay": "independent", "schedule": ETA}
        paths.append(walk(wd_kernels.SGDW([p], form=form, **options), p))
    assert torch.allclose(paths[0], torch.stack(expected), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(paths[1], torch.stack(expected), rtol=1e-2)


def lua_periods(period: int, mult: int, steps: int) -> list[tuple[float, int]]:
    """(T_cur as a fraction, period) of each step: a counter moves before use, and is reset once it has reached 1."""
    found, done, length, ends = [], 0, period, period
    for t in range(steps):
        if t == ends:
            done, length = 0, length * mult
            ends += length
        else:
            done += 1
        found.append((done / length, length))
    return found


def test_lua_counts_before_use_in_the_first_period() -> None:
    """T_cur runs 1/n .. 1 there, and 0 .. (n-1)/n, as in the paper, after each restart. Any callable may say so."""
    counted = lua_periods(3, 2, 21)
    assert [round(x * n) for x, n in counted] == [1, 2, 3, *range(6), *range(12)]

    def lua(t: int) -> float:
        done, length = ETA.where(t)
        return 0.5 * (1 + math.cos(math.pi * (done + (t < 3)) / length))

    assert [lua(t) for t in range(21)] == pytest.approx([0.5 * (1 + math.cos(math.pi * x)) for x, _ in counted])
    assert [abs(lua(t) - ETA(t)) < 1e-12 for t in range(21)] == [False] * 3 + [True] * 18
    assert lua(2) == 0.0


def test_lua_normalises_over_the_current_period() -> None:
    """As the paper has it for restarts, and NormalizedDecay: not over the whole run."""
    factors = [1 / math.sqrt(length) for _, length in lua_periods(3, 2, 21)]
    assert [NormalizedDecay(ETA).decay_factor(t) for t in range(21)] == factors
    assert normalized_weight_decay(1.0, 1, 21, 1) < min(factors)


def test_lua_does_not_decay_by_default() -> None:
    """Its default schedule ("multistep") never sets the decoupled decay, whatever weightDecay says: that is 0 here."""
    paths = []
    for weight_decay in (0.0, 0.05):
        p = weights()
        paths.append(walk(wd_kernels.AdamW([p], lr=0.1, weight_decay=weight_decay, decay="independent"), p))
    theta, m, v = weights().detach().clone(), torch.zeros(5, dtype=f64), torch.zeros(5, dtype=f64)
    for t in range(1, 13):
        g = gradient(Piece((5,)), f64, t - 1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        theta = theta - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert torch.allclose(paths[0][-1], theta, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(paths[1][-1], theta, rtol=1e-2)
