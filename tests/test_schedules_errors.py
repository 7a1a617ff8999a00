"""What schedules refuse, and what they warn of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same
from cases import snapshot
from training import small

from wd_kernels import NormalizedDecay, normalized_weight_decay, schedules
from wd_kernels.schedules import (
    Constant,
    Cosine,
    Product,
    Sequential,
    StepDrop,
    WarmRestarts,
    Warmup,
    WarmupStableDecay,
)

both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


class Endless(schedules.Schedule):
    """One of a user's own, which says nothing of its length."""

    def __call__(self, t: int) -> float:
        return 1 / (1 + t)


class Several:
    """A schedule that returns an array of two."""

    def __call__(self, t: int) -> Any:
        return torch.ones(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(0), "steps=0 of Cosine: allowed are whole numbers >= 1"),
        (lambda: Cosine(10.5), "steps=10.5 of Cosine"),
        (lambda: Cosine(10, end=-0.1), "end=-0.1 of Cosine: allowed are finite numbers >= 0"),
        (lambda: Constant(math.nan), "value=nan of Constant"),
        (lambda: Constant(1.0, steps=0), "steps=0 of Constant"),
        (lambda: Warmup(-3), "steps=-3 of Warmup"),
        (lambda: Warmup(3, start=math.inf), "start=inf of Warmup"),
        (lambda: StepDrop((3, 3)), "milestones=(3, 3) of StepDrop: each must be larger"),
        (lambda: StepDrop((0,)), "milestones[0]=0 of StepDrop"),
        (lambda: StepDrop((3,), -1), "factor=-1 of StepDrop"),
        (lambda: WarmRestarts(0), "period=0 of WarmRestarts"),
        (lambda: WarmRestarts(10, mult=0), "mult=0 of WarmRestarts: allowed are whole numbers >= 1"),
        (lambda: WarmRestarts(10, mult=0.5), "mult=0.5 of WarmRestarts"),
        (lambda: WarmupStableDecay(1, 1, 0), "decay=0 of WarmupStableDecay"),
        (lambda: WarmupStableDecay(-1, 1, 1), "warmup=-1 of WarmupStableDecay: allowed are whole numbers >= 0"),
        (lambda: WarmupStableDecay(1, 1, 1, "sqrt"), "shape='sqrt' of WarmupStableDecay: allowed are 'linear'"),
        (
            lambda: Product(WarmRestarts(2), Sequential(WarmRestarts(3))),
            "has several parts that restart: allowed is one",
        ),
        (lambda: Sequential(), "Sequential() has no parts"),
        (
            lambda: Sequential(Constant(), Cosine(3)),
            "part 0 of Sequential, Constant(value=1.0, steps=None), has",
        ),
        (lambda: Product(NormalizedDecay(Cosine(3))), "NormalizedDecay(Product(...)), the other way round"),
        (lambda: NormalizedDecay(Constant()), "Constant(value=1.0, steps=None) has no end"),
        (lambda: NormalizedDecay(Cosine), "does not say where it restarts"),
        (lambda: NormalizedDecay(Endless()), "has no end, so that there is no period to speak of"),
        (lambda: NormalizedDecay(math.cos), "does not say where it restarts"),
        (lambda: normalized_weight_decay(-1, 1, 1, 1), "weight_decay=-1 of normalized_weight_decay"),
        (lambda: normalized_weight_decay(1, 0, 1, 1), "batch_size=0 of normalized_weight_decay: allowed are finite"),
        (lambda: normalized_weight_decay(1, 1, math.inf, 1), "dataset_size=inf of"),
        (lambda: normalized_weight_decay(1, 1, 1, math.nan), "epochs=nan of normalized_weight_decay"),
        (lambda: small("adamw", schedule="cosine"), "schedule='cosine' in the arguments: allowed are None, 'from_lr'"),
        (lambda: small("adamw", {"schedule": "fixed"}), "schedule='fixed' in param group 0: allowed are None"),
        (lambda: small("sgdw", schedule=Cosine(3), eta=0.5), "eta=0.5 with a schedule"),
        (lambda: small("sgdw", {"eta": 0.5}, schedule=Cosine(3)), "eta=0.5 in param group 0, whose eta"),
        (
            lambda: small("sgdw", schedule="from_lr", lr=0.0),
            "base_lr=0.0 in param group 0: allowed are finite numbers > 0",
        ),
        (lambda: small("sgdw", schedule="from_lr", base_lr=-1.0), "base_lr=-1.0 in the arguments"),
        (lambda: small("sgdw", {"schedule": "from_lr", "base_lr": 0}), "base_lr=0 in param group 0"),
        (lambda: small("adamw", base_lr=0.1), "base_lr=0.1 in the arguments without schedule='from_lr'"),
        (lambda: small("adamw", {"schedule_step": -1}, schedule=Cosine(3)), "schedule_step=-1 in param group 0"),
        (lambda: small("adamw", {"schedule_step": 0.5}, schedule=Cosine(3)), "schedule_step=0.5 in param group 0"),
    ],
)
def test_bad_values(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small("adamw", schedule=Cosine), "schedule=Cosine in the arguments is a class: expected Cosine(...)"),
        (lambda: small("adamw", schedule=3), "schedule=3 in the arguments cannot be called"),
        (lambda: small("adamw", {"schedule": [1.0]}), "schedule=[1.0] in param group 0 cannot be called"),
        (lambda: StepDrop(30), "milestones=30 of StepDrop: expected a sequence of whole numbers"),
        (lambda: Sequential(Warmup(3), Cosine), "part 1 of Sequential is the class Cosine: expected a schedule"),
        (lambda: small("adamw", schedule=np.linspace(1, 0, 3)), "in the arguments cannot be called"),
        (lambda: Sequential(Cosine(3), 0.5), "part 1 of Sequential is 0.5: expected a schedule or a callable"),
        (lambda: normalized_weight_decay("1", 1, 1, 1), "weight_decay='1' of normalized_weight_decay"),
        (lambda: small("adamw", schedule="from_lr", base_lr="1"), "base_lr='1' in the arguments: expected a number"),
    ],
)
def test_bad_types(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("gives", "error", "message"),
    [
        (-0.5, ValueError, "schedule(1)=-0.5 in param group 1: allowed are finite numbers >= 0"),
        (math.nan, ValueError, "schedule(1)=nan in param group 1"),
        (math.inf, ValueError, "schedule(1)=inf in param group 1"),
        (torch.ones(2), ValueError, "schedule(1)=(2,)-shaped torch.float32 tensor in param group 1"),
        (None, TypeError, "schedule(1)=None in param group 1: expected a number"),
        ("0.5", TypeError, "schedule(1)='0.5' in param group 1: expected a number"),
        (1j, TypeError, "schedule(1)=1j in param group 1"),
        ([0.5, 0.5], TypeError, "schedule(1)=[0.5, 0.5] in param group 1"),
        (10**400, TypeError, "schedule(1)=1000"),
        (torch.ones(2).numpy(), TypeError, "schedule(1)=array([1., 1.], dtype=float32) in param group 1"),
    ],
)
@both
def test_a_schedule_that_returns_no_multiplier_writes_nothing(
    rule: str, gives: Any, error: type[Exception], message: str
) -> None:
    opt = small(rule, {}, {"schedule": lambda t: gives if t == 1 else 0.5})
    opt.step()
    params = [group["params"][0] for group in opt.param_groups]
    before = snapshot(params, opt)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    with pytest.raises(error, match=re.escape(message)):
        opt.step()
    assert_same(snapshot(params, opt), before)
    assert [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups] == settings


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule", "linear", "schedule='linear' in param group 0: allowed are None, 'from_lr' and callables"),
        ("schedule_step", 1.5, "schedule_step=1.5 in param group 0: allowed are whole numbers >= 0"),
        ("base_lr", 0.1, "base_lr=0.1 in param group 0 without schedule='from_lr'"),
    ],
)
def test_what_is_set_later_is_checked(key: str, value: Any, message: str) -> None:
    opt = small("adamw", schedule=Cosine(4))
    opt.step()
    p = opt.param_groups[0]["params"][0]
    before = p.detach().clone()
    opt.param_groups[0][key] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        opt.step()
    assert torch.equal(p, before)
    follower = small("adamw", schedule="from_lr")
    follower.param_groups[0]["base_lr"] = None
    with pytest.raises(ValueError, match="base_lr=None in param group 0: allowed are finite numbers > 0"):
        follower.step()


def test_a_saved_state_with_a_bad_count_is_refused() -> None:
    opt = small("adamw", schedule=Cosine(4))
    saved = opt.state_dict()
    saved["param_groups"][0]["schedule_step"] = -2
    with pytest.raises(ValueError, match="schedule_step=-2 in param group 0 of the saved state"):
        opt.load_state_dict(saved)
    saved["param_groups"][0]["schedule_step"] = torch.tensor(3)  # as some checkpoints hold numbers
    opt.load_state_dict(saved)
    opt.step()
    assert opt.param_groups[0]["schedule_step"] == 4
