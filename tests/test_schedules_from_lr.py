"""Schedules that follow an LR scheduler of torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same
from cases import gradient, make_params, snapshot
from torch.optim import lr_scheduler
from training import BUILD, PIECES, small

import wd_kernels
from wd_kernels.schedules import Cosine, WarmRestarts

every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])


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
@every
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


@every
def test_from_lr_keeps_its_base(rule: str) -> None:
    """base_lr is the first lr or what is given; it is saved and loaded, also into an optimizer made at another lr."""
    p = torch.nn.Parameter(torch.ones(4))
    opt = BUILD[rule]([p], lr=torch.tensor(0.5), weight_decay=0.2, decay="independent", schedule="from_lr")
    assert opt.param_groups[0]["base_lr"] == 0.5
    opt.param_groups[0]["lr"] = 0.125
    p.grad = torch.zeros(4)
    opt.step()
    assert p.tolist() == pytest.approx([1 - 0.25 * 0.2] * 4)
    assert opt.param_groups[0].get("eta", 1.0) == 1.0
    q = torch.nn.Parameter(p.detach().clone())
    other = BUILD[rule]([q], lr=0.3, weight_decay=0.2, decay="independent", schedule="from_lr")
    other.load_state_dict(opt.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["base_lr"]) == (0.125, 0.5)
    unscheduled = BUILD[rule]([q], lr=0.3)
    with pytest.warns(UserWarning, match="schedule=from_lr, this optimizer goes on with schedule=None"):
        unscheduled.load_state_dict(opt.state_dict())
    assert not {"base_lr", "schedule"} & set(unscheduled.param_groups[0])
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
    assert [group.get("base_lr") for group in opt.param_groups] == [float(lr), None, None]
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
    assert [group.get("schedule_step", 0) for group in again.param_groups] == [0, 1]


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
        of_torch = torch.optim.AdamW([torch.ones(1)]).state_dict()
        small("adamw", schedule=Cosine(4), decay="lr_scaled").load_state_dict(of_torch)
