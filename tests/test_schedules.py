"""Schedules: their formulas against hand-worked cases and torch, and what an optimizer does with them."""

from __future__ import annotations

import copy
import math
import pickle
import re
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from bits import assert_same
from cases import LR, Piece, gradient, make_params, snapshot
from conftest import TEST_DEVICE
from covering import covered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import wd_kernels
from wd_kernels import NormalizedDecay, normalized_weight_decay, schedules
from wd_kernels.rules import DECAY_MODES
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

pytestmark = pytest.mark.filterwarnings("ignore:this state has")
BUILD: dict[str, Callable[..., Any]] = {"adamw": wd_kernels.AdamW, "sgdw": wd_kernels.SGDW}
PIECES = (Piece((5,)), Piece((3, 4)), Piece((40,)), Piece((7,)))
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])

#: One of each kind, with its first values worked by hand.
WORKED: list[tuple[Callable[[int], float], list[float]]] = [
    (Constant(), [1, 1, 1]),
    (Constant(0.25, steps=2), [0.25, 0.25, 0.25]),
    (StepDrop((1, 3), 0.5), [1, 0.5, 0.5, 0.25, 0.25]),
    (Warmup(4), [0.25, 0.5, 0.75, 1, 1]),
    (Warmup(2, start=0.5), [0.75, 1, 1]),
    (Cosine(2), [1, 0.5, 0, 0]),
    (Cosine(4, end=0.5), [1, 0.5 + 0.25 * (1 + math.sqrt(0.5)), 0.75, 0.5 + 0.25 * (1 - math.sqrt(0.5)), 0.5, 0.5]),
    (WarmRestarts(2), [1, 0.5, 1, 0.5, 1]),
    (WarmRestarts(1, mult=2), [1, 1, 0.5, 1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5)), 1]),
    (WarmRestarts(2, end=0.2), [1, 0.6, 1]),
    (WarmupStableDecay(2, 1, 2), [0.5, 1, 1, 1, 0.5, 0, 0]),
    (WarmupStableDecay(0, 0, 4, "1-sqrt"), [1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0]),
    (WarmupStableDecay(1, 0, 2, "cosine", end=0.5), [1, 1, 0.75, 0.5]),
    (Sequential(Warmup(2), Constant(0.5, steps=1), Cosine(2)), [0.5, 1, 0.5, 1, 0.5, 0, 0]),
    (Sequential(lambda t: 2.0 + t), [2, 3, 4]),
    (Product(WarmRestarts(2), Warmup(4)), [0.25, 0.25, 0.75, 0.5, 1]),
    (NormalizedDecay(Cosine(2)), [1, 0.5, 0]),
]  # fmt: skip


def test_numbers_of_any_kind() -> None:
    """numpy's are taken, and kept as Python's."""
    assert repr(Cosine(np.int64(10), end=np.float32(0.5))) == "Cosine(steps=10, end=0.5)"
    assert StepDrop(np.array([3, 6]), factor=1).milestones == (3, 6)
    assert normalized_weight_decay(np.float64(0.5), np.int64(100), 1000, 10) == 0.05
    with pytest.raises(ValueError, match="steps=True of Cosine"):
        Cosine(True)


# Formulas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "worked"), WORKED, ids=lambda x: type(x).__name__ if callable(x) else "")
def test_worked_by_hand(schedule: Callable[[int], float], worked: list[float]) -> None:
    assert [schedule(t) for t in range(len(worked))] == pytest.approx(worked, abs=1e-15)


def torchs(make: Callable[[Any], Any], steps: int) -> list[float]:
    """The lr of each step under one of torch's schedulers, with a first lr of 1."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, found = make(opt), []
    for _ in range(steps):
        found.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Cosine(30, end=0.1), lambda opt: lr_scheduler.CosineAnnealingLR(opt, 30, eta_min=0.1)),
        (WarmRestarts(3, 2, end=0.05), lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 2, eta_min=0.05)),
        (WarmRestarts(7), lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 7)),
        (StepDrop((4, 9, 20), 0.3), lambda opt: lr_scheduler.MultiStepLR(opt, [4, 9, 20], 0.3)),
        (Constant(), lambda opt: lr_scheduler.ConstantLR(opt, 1.0, 5)),
        # torch's n-th value is that of n - 1 of n steps: one step less makes them the same
        (Warmup(8, start=0.0), lambda opt: lr_scheduler.LinearLR(opt, 1 / 8, 1.0, 7)),
        (
            Sequential(StepDrop((2,), 0.5, steps=5), Cosine(25)),
            lambda opt: lr_scheduler.SequentialLR(
                opt, [lr_scheduler.MultiStepLR(opt, [2], 0.5), lr_scheduler.CosineAnnealingLR(opt, 25)], [5]
            ),
        ),
    ],
    ids=["cosine", "restarts", "restarts-1", "drop", "constant", "warmup", "sequential"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_as_torchs_schedulers(ours: Callable[[int], float], theirs: Callable[[Any], Any]) -> None:
    assert [ours(t) for t in range(30)] == pytest.approx(torchs(theirs, 30), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(period=st.integers(1, 9), mult=st.integers(1, 3), t=st.integers(0, 2000))
def test_restarts_are_where_the_periods_end(period: int, mult: int, t: int) -> None:
    """T_cur and T_i against the sum of the periods, one by one."""
    first, length = 0, period
    while t >= first + length:
        first, length = first + length, length * mult
    assert WarmRestarts(period, mult).where(t) == (t - first, length)
    eta = WarmRestarts(period, mult)(t)
    assert eta == 0.5 * (1 + math.cos(math.pi * ((t - first) / length)))
    assert (eta == 1.0) == (t == first)


parts = st.one_of(
    st.builds(Warmup, st.integers(1, 6)),
    st.builds(Cosine, st.integers(1, 6), st.sampled_from([0.0, 0.25])),
    st.builds(Constant, st.sampled_from([0.5, 1.0]), st.integers(1, 6)),
    st.builds(WarmupStableDecay, st.integers(0, 3), st.integers(0, 3), st.integers(1, 3)),
)


@settings(max_examples=200, deadline=None)
@given(own=st.lists(parts, min_size=1, max_size=4), factor=parts, period=st.integers(1, 4))
def test_compositions(own: list[Any], factor: Any, period: int) -> None:
    """One after another is the concatenation, times another the product; the period counts what led to it."""
    joined = [part(t) for part in own for t in range(part.steps)]
    whole = Sequential(*own)
    assert whole.steps == len(joined)
    assert [whole(t) for t in range(len(joined))] == joined
    assert whole(len(joined) + 5) == own[-1](own[-1].steps + 5)
    assert [Product(whole, factor)(t) for t in range(len(joined))] == [x * factor(t) for t, x in enumerate(joined)]
    assert [whole.where(t) for t in range(len(joined) + 3)] == [
        (min(t, len(joined)), len(joined)) for t in range(len(joined) + 3)
    ]
    ends = [factor.steps, *(part.steps for part in own)]
    assert Product(factor, *own).steps == max(ends)
    restarting = Sequential(*own, WarmRestarts(period, 2))
    for product in (Product(factor, restarting), Product(restarting, factor)):  # in whatever order they are written
        assert product.steps is None
        assert [product.where(t) for t in range(50)] == [restarting.where(t) for t in range(50)]
    lead = len(joined)
    expected = [(t, lead + period) for t in range(lead + period)] + [(t, 2 * period) for t in range(2 * period)]
    assert [restarting.where(t) for t in range(lead + 3 * period)] == expected
    assert restarting.steps is None
    assert pickle.loads(pickle.dumps(restarting)) == restarting
    assert eval(repr(restarting), vars(schedules)) == restarting
    assert hash(copy.deepcopy(restarting)) == hash(restarting)


# Through the optimizer ------------------------------------------------------------------------------------------------

NAMED: dict[str, Callable[[int], float]] = {
    "constant": Constant(0.7),
    "step-drop": StepDrop((2, 4), 0.3),
    "warmup": Warmup(4),
    "cosine": Cosine(6),
    "restarts": WarmRestarts(2, mult=2),
    "wsd": WarmupStableDecay(2, 2, 3, "1-sqrt"),
    "sequential": Sequential(Warmup(2), Cosine(4, end=0.1)),
    "normalised": NormalizedDecay(WarmRestarts(2, mult=2)),
    "callable": lambda t: 1 / (1 + t),
}


def train(
    rule: str,
    decay: str,
    backend: str,
    schedule: Any,
    by_hand: bool = False,
    steps: int = 6,
    reload_at: int | None = None,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Parameters and states of two groups under a schedule; `by_hand` sets eta and weight decay without one."""
    params = make_params(PIECES, torch.float32, torch.float32, device=device)
    more = {"momentum": 0.9, "form": "paper"} if rule == "sgdw" and decay == "independent" else {}

    def make() -> Any:
        groups = [{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:], "lr": LR[rule] / 3}]
        own = {} if by_hand else {"schedule": schedule}
        return BUILD[rule](groups, lr=LR[rule], weight_decay=0.1, decay=decay, backend=backend, **more, **own)

    opt = make()
    for t in range(steps):
        if by_hand:
            factor = getattr(schedule, "decay_factor", lambda t: 1.0)(t)
            for group, weight_decay in zip(opt.param_groups, (0.2, 0.1), strict=True):
                group["eta"], group["weight_decay"] = float(schedule(t)), weight_decay * factor
        for k, p in enumerate(params):
            p.grad = None if (k, t) == (3, 0) else gradient(PIECES[k], torch.float32, 10 * t + k, device)
        opt.step()
        if t == reload_at:
            saved, opt = opt.state_dict(), make()
            opt.load_state_dict(saved)
    if not by_hand and schedule != "from_lr":
        assert [group["schedule_step"] for group in opt.param_groups] == [steps] * 2
        assert [group["eta"] for group in opt.param_groups] == [float(schedule(steps - 1))] * 2
    return snapshot(params, opt)


@covered(rule=tuple(BUILD), decay=DECAY_MODES, name=tuple(NAMED))
def test_sets_eta_and_decay(rule: str, decay: str, name: str) -> None:
    """Every schedule in every mode, on the CPU's own backend and the reference, is eta (and lambda) set by hand."""
    schedule = NAMED[name]
    by_hand = train(rule, decay, "reference", schedule, by_hand=True)
    for backend in ("cpu", "reference"):
        assert_same(train(rule, decay, backend, schedule), by_hand)
    plain = train(rule, decay, "reference", Constant(), by_hand=True)
    assert any(not torch.equal(by_hand[key], plain[key]) for key in by_hand)


@covered(rule=tuple(BUILD), decay=DECAY_MODES, name=tuple(NAMED), backend=("triton", "cuda"), indirect=["backend"])
def test_through_the_backends_for_gpus(rule: str, decay: str, name: str, backend: str, launches: list[int]) -> None:
    """To the bit, and in one launch a step: the schedule takes none."""
    expected = train(rule, decay, "reference", NAMED[name])
    assert not launches
    assert_same(train(rule, decay, backend, NAMED[name]), expected)
    assert len(launches) == 6


@pytest.mark.gpu
@covered(rule=tuple(BUILD), decay=DECAY_MODES, name=tuple(NAMED), backend=("triton", "cuda"), indirect=["backend"])
def test_on_a_gpu(rule: str, decay: str, name: str, backend: str, launches: list[int]) -> None:
    """The compiled kernels, as above."""
    expected = train(rule, decay, "reference", NAMED[name])
    assert_same(train(rule, decay, backend, NAMED[name], device=TEST_DEVICE), expected)
    assert len(launches) == 6


@pytest.mark.parametrize("name", [name for name in NAMED if name != "callable"])
@both
def test_resumes_exactly(rule: str, name: str, tmp_path: Path) -> None:
    """Through state_dict, a file of torch.save without code, a pickle, and a deep copy in mid-run."""
    schedule = NAMED[name]
    expected = train(rule, "independent", "cpu", schedule)
    for at in range(5):
        assert_same(train(rule, "independent", "cpu", schedule, reload_at=at), expected)

    def lives(opt: Any) -> Any:
        return pickle.loads(pickle.dumps(opt))

    twin = lives(BUILD[rule]([torch.nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.1, schedule=schedule))
    assert twin.param_groups[0]["schedule"] == schedule
    for _ in range(3):
        twin.param_groups[0]["params"][0].grad = torch.ones(3)
        twin.step()
    twin = lives(copy.deepcopy(twin))
    assert twin.param_groups[0]["schedule_step"] == 3
    torch.save(twin.state_dict(), tmp_path / "state.pt")
    group = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]
    assert (group["schedule"], group["schedule_step"], group["eta"]) == (repr(schedule), 3, schedule(2))


# Following an LR scheduler --------------------------------------------------------------------------------------------


def followed(rule: str, decay: str, scheduler: Callable[[Any], Any], how: str, steps: int = 6) -> dict[str, Any]:
    """Six steps under one of torch's schedulers, with schedule="from_lr", without, or with eta set by hand."""
    params = make_params(PIECES, torch.float32, torch.float32)
    base = {"from_lr": {"schedule": "from_lr"}}.get(how, {})
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}]
    opt = BUILD[rule](groups, lr=0.1, weight_decay=0.2, decay=decay, **base)
    follows = scheduler(opt)
    for t in range(steps):
        for k, p in enumerate(params):
            p.grad = gradient(PIECES[k], torch.float32, 10 * t + k)
        kept = [group["lr"] for group in opt.param_groups]
        if how == "by hand":
            for group, base_lr in zip(opt.param_groups, (0.1, 0.03), strict=True):
                group["eta"], group["lr"] = group["lr"] / base_lr, base_lr
        opt.step()
        for group, lr in zip(opt.param_groups, kept, strict=True):
            group["lr"] = lr
        follows.step()
    return snapshot(params, opt)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 8),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: (t + 1) / 4),
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(opt, [0.1, 0.03], total_steps=8, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@both
def test_from_lr(rule: str, name: str) -> None:
    """Where lr scales the decay it changes no bit; elsewhere it is eta = lr / base_lr, which "independent" follows."""
    scheduler = SCHEDULERS[name]
    for decay in ("lr_scaled", "l2"):
        assert_same(followed(rule, decay, scheduler, "from_lr"), followed(rule, decay, scheduler, "plain"))
    for decay in ("independent", "proximal", "metric_proximal"):
        own, by_hand = (followed(rule, decay, scheduler, how) for how in ("from_lr", "by hand"))
        for key in own:  # by hand a = (lr / base_lr) * base_lr, which is lr but for a rounding in float64
            assert torch.allclose(own[key], by_hand[key], rtol=1e-6, atol=1e-9), (decay, key)
    plain = followed(rule, "independent", scheduler, "plain")
    assert not torch.allclose(followed(rule, "independent", scheduler, "from_lr")["1"], plain["1"], rtol=1e-3)


@both
def test_from_lr_keeps_its_base(rule: str) -> None:
    """base_lr is the first lr or what is given; it is saved and loaded, also into an optimizer made at another lr."""
    p = torch.nn.Parameter(torch.ones(4))
    opt = BUILD[rule]([p], lr=torch.tensor(0.5), weight_decay=0.2, decay="independent", schedule="from_lr")
    assert opt.param_groups[0]["base_lr"] == 0.5
    opt.param_groups[0]["lr"] = 0.125
    p.grad = torch.zeros(4)
    opt.step()
    assert p.tolist() == pytest.approx([1 - 0.25 * 0.2] * 4)
    assert opt.param_groups[0]["eta"] == 1.0
    q = torch.nn.Parameter(p.detach().clone())
    other = BUILD[rule]([q], lr=0.3, weight_decay=0.2, decay="independent", schedule="from_lr")
    other.load_state_dict(opt.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["base_lr"]) == (0.125, 0.5)
    unscheduled = BUILD[rule]([q], lr=0.3)
    with pytest.warns(UserWarning, match="schedule=from_lr, this optimizer goes on with schedule=None"):
        unscheduled.load_state_dict(opt.state_dict())
    assert (unscheduled.param_groups[0]["base_lr"], unscheduled.param_groups[0]["schedule"]) == (None, None)
    other.load_state_dict(unscheduled.state_dict())  # which has no base_lr: the live one stays
    assert other.param_groups[0]["base_lr"] == 0.5
    given = BUILD[rule]([{"params": [q], "base_lr": 2.0}], lr=0.5, schedule="from_lr", base_lr=3.0)
    given.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert [group["base_lr"] for group in given.param_groups] == [2.0, 3.0]


def test_from_lr_beside_other_schedules() -> None:
    """A base_lr of the optimizer is of those groups that follow lr; a tensor that a scheduler fills is read once."""
    p, q, r = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(3))
    lr = torch.tensor(1e-3)
    groups = [{"params": [p]}, {"params": [q], "schedule": None}, {"params": [r], "schedule": Cosine(5)}]
    opt = wd_kernels.AdamW(groups, lr=lr, base_lr=lr, schedule="from_lr", decay="independent", weight_decay=0.5)
    assert [group["base_lr"] for group in opt.param_groups] == [float(lr), None, None]
    follows = lr_scheduler.StepLR(opt, 1, gamma=0.1)
    for _ in range(3):
        p.grad = torch.zeros(1, dtype=torch.float64)
        opt.step()
        follows.step()
    assert p.item() == pytest.approx(0.5 * 0.95 * 0.995, rel=1e-5)
    opt.param_groups[0]["eta"] = 0.5
    with pytest.raises(ValueError, match=r"eta=0.5 in param group 0 with schedule='from_lr'"):
        opt.step()


def test_a_group_that_was_refused_begins_anew() -> None:
    opt = wd_kernels.AdamW([torch.nn.Parameter(torch.ones(2))], schedule="from_lr")
    group: dict[str, Any] = {"params": [opt.param_groups[0]["params"][0].detach()[:1].requires_grad_()], "lr": 0.01}
    with pytest.raises(ValueError, match="overlap"):
        opt.add_param_group(group)
    assert group.keys() == {"params", "lr"}
    opt.add_param_group({**group, "params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5})
    assert opt.param_groups[1]["base_lr"] == 0.5


def test_groups_without_the_keys_of_schedules() -> None:
    """As a framework may rebuild them, or a pickle of an older version holds them."""
    opt = small("adamw")
    old = {k: v for k, v in opt.param_groups[0].items() if k not in ("schedule", "schedule_step", "base_lr")}
    opt.param_groups[:] = [old]
    opt.step()
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    state = opt.__getstate__()
    state["defaults"] = {
        k: v for k, v in state["defaults"].items() if k not in ("schedule", "schedule_step", "base_lr")
    }
    state["param_groups"] = [old]
    again = wd_kernels.AdamW.__new__(wd_kernels.AdamW)
    again.__setstate__(state)
    again.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "schedule": Cosine(3)})
    again.step()
    assert [group["schedule_step"] for group in again.param_groups] == [0, 1]


def test_a_state_of_another_schedule() -> None:
    """Its count is loaded; what its schedule had set is no constant for an optimizer without; and a warning says so."""
    saved = small("adamw", schedule=Cosine(4))
    for _ in range(3):
        saved.step()
    plain = small("adamw", eta=0.7)
    with pytest.warns(
        UserWarning, match=r"schedule=Cosine\(steps=4, end=0.0\), this optimizer goes on with schedule=None"
    ):
        plain.load_state_dict(saved.state_dict())
    assert plain.param_groups[0]["eta"] == 0.7
    other = small("adamw", schedule=WarmRestarts(2))
    with pytest.warns(UserWarning, match=r"goes on with schedule=WarmRestarts\(period=2"):
        other.load_state_dict(saved.state_dict())
    other.step()
    assert (other.param_groups[0]["eta"], other.param_groups[0]["schedule_step"]) == (WarmRestarts(2)(3), 4)
    follower = small("adamw", schedule="from_lr")
    with pytest.warns(UserWarning, match="goes on with schedule=from_lr"):
        follower.load_state_dict(saved.state_dict())
    follower.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small("adamw", schedule=Cosine(4)).load_state_dict(saved.state_dict())
        small("adamw", schedule=Cosine(4)).load_state_dict(torch.optim.AdamW([torch.ones(1)]).state_dict())


# Counting -------------------------------------------------------------------------------------------------------------


def small(rule: str, *groups: dict[str, Any], **options: Any) -> Any:
    """An optimizer of one-element parameters with gradients, one a group."""
    made = [{"params": [torch.nn.Parameter(torch.ones(1))], **group} for group in (groups or ({},))]
    opt = BUILD[rule](made, **{"lr": 0.1, "weight_decay": 0.2, "decay": "independent", **options})
    for group in opt.param_groups:
        group["params"][0].grad = torch.ones(1)
    return opt


def counts(opt: Any) -> list[int]:
    return [group["schedule_step"] for group in opt.param_groups]


@both
def test_groups_have_their_own_schedules(rule: str) -> None:
    opt = small(
        rule,
        {},
        {"schedule": Warmup(4)},
        {"schedule": None, "eta": 0.3},
        {"schedule": "from_lr", "lr": 0.05},
        schedule=Cosine(4),
    )
    opt.param_groups[3]["lr"] = 0.025
    for _ in range(2):
        opt.step()
    assert [group["eta"] for group in opt.param_groups] == [Cosine(4)(1), 0.5, 0.3, 1.0]
    assert counts(opt) == [2, 2, 0, 0]
    late = torch.nn.Parameter(torch.ones(1))
    late.grad = torch.ones(1)
    opt.add_param_group({"params": [late]})  # joins the optimizer's schedule where it is
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "schedule": Cosine(4)})  # has one of its own
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "schedule_step": 9})
    assert counts(opt) == [2, 2, 0, 0, 2, 0, 9]
    opt.step()
    assert opt.param_groups[4]["eta"] == Cosine(4)(2)


@both
def test_a_step_that_does_not_happen_is_not_counted(rule: str) -> None:
    """Skipped on the device's flag, refused for a bad gradient, failed in the backend: eta and count stay."""
    opt = small(rule, {}, {}, schedule=Cosine(8))
    opt.step()
    before = copy.deepcopy([(group["eta"], group["schedule_step"]) for group in opt.param_groups])
    opt._table.control[1] = 1.0
    opt.step()
    opt._table.control[1] = 0.0
    p = opt.param_groups[1]["params"][0]
    p.grad = torch.ones(1).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    p.grad = torch.ones(1)

    def broken(rows: torch.Tensor) -> bool:
        raise RuntimeError("no launch")

    opt._table.launch = broken
    with pytest.raises(RuntimeError, match="no launch"):
        opt.step()
    del opt._table.launch
    assert [(group["eta"], group["schedule_step"]) for group in opt.param_groups] == before
    opt.step()
    assert counts(opt) == [2, 2]
    p.grad = opt.param_groups[0]["params"][0].grad = None
    opt.step()  # nothing to do, and yet a step
    assert counts(opt) == [3, 3]


def test_a_schedule_is_asked_once_a_step() -> None:
    """However many groups follow it, with the number of completed steps."""
    asked: list[int] = []

    def schedule(t: int) -> float:
        asked.append(t)
        return 1.0

    opt = small("adamw", {}, {}, {}, schedule=schedule)
    for _ in range(3):
        opt.step()
    assert asked == [0, 1, 2]
    assert opt.state_dict()["param_groups"][0]["schedule"].endswith("<locals>.schedule")


def test_threads_that_share_an_optimizer_count_every_step() -> None:
    opt = small("adamw", {}, {}, schedule=Cosine(1000))
    threads = [threading.Thread(target=lambda: [opt.step() for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(opt) == [100, 100]


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_hold_it(flatten: bool) -> None:
    """torch's get/set_optimizer_state_dict: the loaded run goes on where the saved one was."""

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "schedule": "from_lr", "weight_decay": 0.0}]
        return model, wd_kernels.AdamW(groups, lr=0.1, decay="independent", schedule=NormalizedDecay(WarmRestarts(3)))

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)

    def steps(model: nn.Module, opt: Any, first: int, last: int) -> None:
        for t in range(first, last):
            opt.param_groups[1]["lr"] = 0.1 / (1 + t)
            for p in model.parameters():
                p.grad = gradient(Piece(tuple(p.shape)), torch.float32, t)
            opt.step()

    model, opt = made()
    steps(model, opt, 0, 4)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=options))
    twin, other = made()
    twin.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(twin, other, saved, options=options)
    assert counts(other) == [4, 0]
    steps(model, opt, 4, 8)
    steps(twin, other, 4, 8)
    assert_same(snapshot(model.parameters(), opt), snapshot(twin.parameters(), other))


# Bad input ------------------------------------------------------------------------------------------------------------


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


def test_what_torch_would_lose_is_said() -> None:
    """A schedule is lost on torch's class; one that follows lr is not, where lr scales the decay."""
    scheduled = small("adamw", schedule=Cosine(4), decay="lr_scaled")
    with pytest.warns(UserWarning, match=r"this state has a schedule, which torch.optim.AdamW does not know"):
        scheduled.state_dict()


@pytest.mark.filterwarnings("error:this state has")
def test_what_torch_would_not_lose_is_not_said() -> None:
    opt = small("adamw", schedule="from_lr", decay="lr_scaled")
    opt.param_groups[0]["lr"] = 0.01
    opt.step()
    opt.state_dict()


# Drawing --------------------------------------------------------------------------------------------------------------


def test_plot(tmp_path: Path) -> None:
    """The numbers of the curves are those of the schedules; a second panel shows what happens to the decay."""
    drawn = {"AdamWR": NormalizedDecay(WarmRestarts(4, 2)), "cosine": Cosine(28)}
    figure = schedules.plot(drawn, path=tmp_path / "plot.png")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["AdamWR", "cosine"]
    for line, schedule in zip(left.lines, drawn.values(), strict=True):
        assert list(line.get_ydata()) == [schedule(t) for t in range(28)]
    (line,) = right.lines
    assert list(line.get_ydata()) == [0.5] * 4 + [1 / math.sqrt(8)] * 8 + [0.25] * 16
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = schedules.plot(math.exp, steps=3).axes
    assert axes.lines[0].get_label() == "exp"
    for drawn, message in (
        (WarmRestarts(3), "no end in WarmRestarts(period=3, mult=1, end=0.0)"),
        ({}, "no end in an empty dict"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            schedules.plot(drawn)
    with pytest.raises(ValueError, match="steps=0 in plot: allowed"):
        schedules.plot(Cosine(3), steps=0)
    with pytest.raises(TypeError, match=r"Cosine=.* in plot: expected a schedule"):
        schedules.plot(Cosine)


def test_plot_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        schedules.plot(Cosine(3))
