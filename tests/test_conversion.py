"""A weight decay carried from mode to mode: what the optimizers then do, and the formulas worked by hand."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wd_kernels
from wd_kernels import convert_weight_decay
from wd_kernels.schedules import Cosine, NormalizedDecay, WarmRestarts, Warmup

f64 = torch.float64
LR = 0.1


def shrunk(
    rule: str, decay: str, weight_decay: float, schedule: Any, steps: int, metric: float = 1.0, **options: Any
) -> list[float]:
    """What is left of a weight of 1 after each step without gradients, as the optimizer does it.

    AdamW's metric is held at `metric` by AMSGrad's largest second moment.
    """
    p = torch.nn.Parameter(torch.ones(1, dtype=f64))
    if rule == "adamw":
        options = {"amsgrad": True, "eps": 0.0, "betas": (0.0, 0.9), **options}
    opt: Any = {"adamw": wd_kernels.AdamW, "sgdw": wd_kernels.SGDW}[rule](
        [p], lr=LR, weight_decay=weight_decay, decay=decay, schedule=schedule, **options
    )
    if rule == "adamw":
        values = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": metric**2}
        own = {name: torch.full((1,), value, dtype=f64) for name, value in values.items()}
        opt.state[p] = {"step": torch.tensor(1e6), **own}
    found = []
    for _ in range(steps):
        p.grad = torch.zeros(1, dtype=f64)
        opt.step()
        found.append(float(p.detach()))
    return found


MODES = ("lr_scaled", "independent", "proximal", "metric_proximal", "l2", "corrected")


@pytest.mark.parametrize("schedule", [None, Cosine(20, end=0.1)], ids=["constant", "cosine"])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(MODES, 2)))
@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
def test_the_optimizers_decay_alike(rule: str, source: str, target: str, schedule: Any) -> None:
    """Exact: in every step. Else: over the whole run, and no step deviates by more than is said.

    AdamW's l2 is approximated to first order: with the metric held fixed it shrinks as the model says.
    """
    weight_decay = {"independent": 0.02, "proximal": 0.02}.get(source, 0.2)
    more = {"metric": 0.5} if rule == "adamw" else {}
    found = convert_weight_decay(weight_decay, source, target, lr=LR, rule=rule, schedule=schedule, steps=20, **more)
    one = shrunk(rule, source, weight_decay, schedule, 20, **more)
    other = shrunk(rule, target, found.weight_decay, schedule, 20, **more)
    assert other[-1] == pytest.approx(one[-1], rel=1e-12)
    factors = [[b / a for a, b in itertools.pairwise([1.0, *path])] for path in (one, other)]
    deviation = max(abs((1 - b) / (1 - a) - 1) for a, b in zip(*factors, strict=True))
    if found.exact:
        assert found.deviation == 0
        assert deviation < 1e-11
    else:
        assert deviation == pytest.approx(found.deviation, rel=1e-6, abs=1e-11)
    families = ({"lr_scaled", "independent", "l2"}, {"proximal", "metric_proximal"}, {"corrected"})
    alike = any({source, target} <= family for family in families)
    assert found.exact == ((alike or schedule is None) and not (rule == "adamw" and "l2" in (source, target)))
    assert (found.deviation > 1e-4) == (not alike and schedule is not None)


def test_worked_by_hand() -> None:
    assert convert_weight_decay(0.1, "lr_scaled", "independent", lr=0.01) == (0.001, True, 0.0)
    assert convert_weight_decay(0.001, "independent", "lr_scaled", lr=0.01) == (pytest.approx(0.1), True, 0.0)
    assert convert_weight_decay(0.5, "independent", "proximal", lr=1) == (1.0, True, 0.0)  # 1/(1 + 1) = 1 - 0.5
    assert convert_weight_decay(1.0, "proximal", "lr_scaled", lr=0.25) == (2.0, True, 0.0)
    assert convert_weight_decay(0.2, "corrected", "lr_scaled", lr=0.5) == (0.2, True, 0.0)
    # eta 1/2 in every step: eta^2 alpha lambda is eta alpha (lambda/2)
    half = convert_weight_decay(0.2, "corrected", "lr_scaled", lr=0.5, schedule=lambda t: 0.5, steps=3)
    assert half == (0.1, True, 0.0)
    # x = 0.5 * 0.25 * 0.4 = 0.05 of a weight: x / (1 - x) is eta lambda
    prox = convert_weight_decay(0.4, "corrected", "proximal", lr=0.5, schedule=lambda t: 0.5, steps=3)
    assert prox == (pytest.approx(0.05 / 0.95 / 0.5, rel=1e-15), True, 0.0)
    assert convert_weight_decay(3.0, "metric_proximal", "proximal", lr=0.5, metric=0.25) == (6.0, True, 0.0)
    assert convert_weight_decay(0.2, "l2", "lr_scaled", lr=0.5, rule="sgdw") == (0.2, True, 0.0)
    assert convert_weight_decay(0.2, "l2", "lr_scaled", lr=0.05, metric=0.1) == (pytest.approx(2.0), False, 0.0)
    assert convert_weight_decay(0.2, "proximal", "proximal", lr=0.5) == (0.2, True, 0.0)
    assert convert_weight_decay(0, "lr_scaled", "proximal", lr=0.5) == (0, True, 0.0)
    # (1 - w)(1 - w/2) = (1/1.1)(1/1.05), so w = 0.0946...: between 0.1 with and without its own compounding
    two = convert_weight_decay(0.1, "proximal", "independent", lr=0.5, schedule=Cosine(2), steps=2)
    w = two.weight_decay
    assert (1 - w) * (1 - w / 2) == pytest.approx(1 / 1.1 / 1.05, rel=1e-14)
    assert two.exact is False
    assert two.deviation == pytest.approx(max(abs(w / (0.1 / 1.1) - 1), abs(w / 2 / (0.05 / 1.05) - 1)), rel=1e-12)


@pytest.mark.parametrize("mode", ["l2", "metric_proximal"])
def test_adagradw_decays_by_its_metric(mode: str) -> None:
    """Without a gradient its sum stays: D is 0.5 in every step of metric_proximal, and l2's is to first order."""
    with pytest.raises(ValueError, match=r"metric=None.*AdagradW's.*give a typical sqrt\(sum\) \+ eps"):
        convert_weight_decay(0.2, mode, "lr_scaled", lr=0.1, rule="adagradw")
    weight_decay = 0.2 if mode == "metric_proximal" else 1e-4
    found = convert_weight_decay(weight_decay, mode, "lr_scaled", lr=0.1, rule="adagradw", metric=0.5)
    paths = []
    for decay, lam in ((mode, weight_decay), ("lr_scaled", found.weight_decay)):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        options: dict[str, Any] = {"initial_accumulator_value": 0.25, "eps": 0.0, "decay": decay, "weight_decay": lam}
        opt = wd_kernels.AdagradW([p], lr=0.1, **options)
        for _ in range(5):
            p.grad = torch.zeros_like(p)
            opt.step()
        paths.append(1 - p[0].item())
    assert paths[0] == pytest.approx(paths[1], rel=1e-12 if mode == "metric_proximal" else 1e-6)
    assert paths[0] > 1e-5


def test_momentum_multiplies_l2() -> None:
    """With SGD's momentum l2 takes a lambda / (1 - mu) a step in the long run, to first order; exactly, a root."""
    found = convert_weight_decay(0.001, "l2", "lr_scaled", lr=LR, rule="sgdw", momentum=0.9)
    assert found.weight_decay == pytest.approx(0.001 / (1 - 0.9), rel=0.02)
    assert found.exact is False
    path = shrunk("sgdw", "l2", 0.001, None, 400, momentum=0.9)
    assert 1 - path[-1] / path[-2] == pytest.approx(LR * found.weight_decay, rel=1e-9)
    back = convert_weight_decay(found.weight_decay, "lr_scaled", "l2", lr=LR, rule="sgdw", momentum=0.9)
    assert back.weight_decay == pytest.approx(0.001, rel=1e-9)


def test_steps_in_which_nothing_decays_change_nothing() -> None:
    """Of a schedule that is 1 or 0 the conversion is that of a constant 1: exact, and 1/(1 + 1) is 1 - 0.5."""
    found = convert_weight_decay(0.5, "independent", "proximal", lr=LR, schedule=lambda t: float(t % 3 == 1), steps=9)
    assert found == (1.0, True, 0.0)


@settings(max_examples=200, deadline=None)
@given(
    modes=st.permutations(MODES),
    amount=st.floats(1e-8, 0.5),
    lr=st.floats(1e-6, 10),
    metric=st.floats(1e-4, 1e3),
    momentum=st.sampled_from([0.0, 0.0, 0.5, 0.9]),
    steps=st.integers(1, 50),
    warm=st.booleans(),
)
def test_there_and_back(
    modes: list[str], amount: float, lr: float, metric: float, momentum: float, steps: int, warm: bool
) -> None:
    """Any mode to any other and back is the same number, for any lr, schedule and strength."""
    source, target = modes[:2]
    rule = "sgdw" if momentum or steps % 2 else "adamw"
    more: dict[str, Any] = {"lr": lr, "rule": rule, "momentum": momentum, "metric": metric, "steps": steps}
    more["schedule"] = Warmup(steps) if warm else Cosine(steps, end=0.05)
    scale = (
        1.0
        if source in ("independent", "proximal")
        else lr
        if rule == "sgdw" or source in ("lr_scaled", "corrected")
        else lr / metric
    )
    strength = amount * (1 - math.sqrt(momentum)) ** 2 / scale
    there = convert_weight_decay(strength, source, target, **more)
    back = convert_weight_decay(there.weight_decay, target, source, **more)
    assert back.weight_decay == pytest.approx(strength, rel=1e-5)
    assert back.exact == there.exact


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight_decay": -1}, ValueError, "weight_decay=-1.0 in convert_weight_decay"),
        ({"lr": 0}, ValueError, "lr=0 in convert_weight_decay: allowed are finite numbers > 0"),
        ({"source": "decoupled"}, ValueError, "source='decoupled' in convert_weight_decay: allowed are 'l2'"),
        ({"target": "L2"}, ValueError, "target='L2' in"),
        ({"rule": "adam"}, ValueError, "rule='adam' in convert_weight_decay: allowed are 'adamw' and 'sgdw'"),
        ({"momentum": 0.9}, ValueError, "momentum=0.9 with rule='adamw'"),
        ({"momentum": 1.0, "rule": "sgdw"}, ValueError, "momentum=1.0 with rule='sgdw'"),
        ({"steps": 0}, ValueError, "steps=0 in convert_weight_decay: allowed are whole numbers >= 1"),
        ({"target": "l2"}, ValueError, "metric=None in convert_weight_decay: AdamW's 'l2' decays each weight by"),
        ({"target": "metric_proximal", "metric": 0.0}, ValueError, "metric=0.0 in"),
        ({"schedule": lambda t: math.nan, "steps": 3}, ValueError, "schedule(0)=nan in convert_weight_decay"),
        ({"schedule": lambda t: 0.0, "steps": 3}, ValueError, "is 0 in all of 3 steps"),
        ({"weight_decay": 20.0}, ValueError, "the decay of 'lr_scaled' in convert_weight_decay takes 2 of a weight"),
        ({"schedule": Warmup(3).__call__}, ValueError, "steps=None in convert_weight_decay"),
        ({"schedule": "from_lr"}, TypeError, "schedule='from_lr' in convert_weight_decay: expected a schedule"),
        ({"schedule": Cosine}, TypeError, "expected a schedule or a callable"),
        (
            {"lr": 1e-310, "source": "independent", "target": "l2", "rule": "sgdw"},
            ValueError,
            "no finite weight decay of",
        ),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay='0.1' in convert_weight_decay: expected a number"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"weight_decay": 0.1, "source": "lr_scaled", "target": "proximal", "lr": LR, **change}
    with pytest.raises(error, match=re.escape(message)):
        convert_weight_decay(**arguments)


def test_what_oscillates_is_refused() -> None:
    """An l2 so strong that momentum swings through 0 has no rate of decay; and none takes more than 1 - sqrt(mu)."""
    with pytest.raises(ValueError, match=r"the decay of 'l2' .* takes 0.5 of a weight into the buffer"):
        convert_weight_decay(5.0, "l2", "lr_scaled", lr=LR, rule="sgdw", momentum=0.9)
    with pytest.raises(ValueError, match=r"no 'l2' with momentum 0.9 .* at most 0.0513 of a weight"):
        convert_weight_decay(0.1, "independent", "l2", lr=LR, rule="sgdw", momentum=0.9)
    strongest = 1 - math.sqrt(0.9)
    just = convert_weight_decay(0.999 * strongest, "independent", "l2", lr=LR, rule="sgdw", momentum=0.9)
    path = shrunk("sgdw", "l2", just.weight_decay, None, 4000, momentum=0.9)
    assert path[-1] == 0 or 1 - path[-1] / path[-2] == pytest.approx(0.999 * strongest, rel=1e-2)


@pytest.mark.parametrize("weight_decay", [1e-14, 1e-10, 1e-6, 1e-3])
def test_small_decays_lose_no_digits(weight_decay: float) -> None:
    """Learning rates and decays as in fine-tuning: to first order all conversions are ratios of coefficients."""
    lr, long = 1e-6, Cosine(1000)
    for source, target, more, ratio in (
        ("lr_scaled", "independent", {}, lr),
        ("lr_scaled", "proximal", {}, lr),
        ("independent", "lr_scaled", {}, 1 / lr),
        ("proximal", "independent", {}, 1),
        ("l2", "lr_scaled", {"rule": "sgdw", "momentum": 0.9}, 10),
        ("lr_scaled", "l2", {"rule": "sgdw", "momentum": 0.9}, 0.1),
    ):
        scale = 1e-3 if source in ("independent", "proximal") else 1
        found = convert_weight_decay(scale * weight_decay, source, target, lr=lr, schedule=long, **more)
        assert found.weight_decay == pytest.approx(scale * weight_decay * ratio, rel=2e-6), (source, target)
        assert found.deviation < 2e-6


def test_the_steps_are_those_of_the_schedule() -> None:
    alone = convert_weight_decay(0.5, "independent", "proximal", lr=LR, schedule=Warmup(50))
    assert alone == convert_weight_decay(0.5, "independent", "proximal", lr=LR, schedule=Warmup(50), steps=50)
    longer = convert_weight_decay(0.5, "independent", "proximal", lr=LR, schedule=Warmup(50), steps=5000)
    assert 0.6 < alone.weight_decay < 0.9 < longer.weight_decay < 1.0
    assert not alone.exact


def test_normalised_decay() -> None:
    """Both weight decays are lambda_norm, and the optimizers decay alike over the run, also where it is above 1."""
    schedule = NormalizedDecay(WarmRestarts(25, mult=3))
    found = convert_weight_decay(3.0, "independent", "proximal", lr=LR, schedule=schedule, steps=100)
    one, other = (
        shrunk("adamw", *pair, schedule, 100) for pair in (("independent", 3.0), ("proximal", found.weight_decay))
    )
    assert other[-1] == pytest.approx(one[-1], rel=1e-12)
    plain = convert_weight_decay(3.0, "independent", "lr_scaled", lr=LR, schedule=schedule, steps=100)
    assert plain == (pytest.approx(30.0), True, 0.0)


def test_no_metric_where_none_is_needed() -> None:
    assert convert_weight_decay(0.1, "l2", "l2", lr=LR) == (0.1, True, 0.0)
    assert convert_weight_decay(0.0, "l2", "lr_scaled", lr=LR) == (0.0, True, 0.0)
