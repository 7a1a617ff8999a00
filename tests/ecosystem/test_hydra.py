"""Hydra: optimizers, groups and schedules from YAML, beside the same by hand; resumed."""

from __future__ import annotations

import io

import pytest
import torch
from hydra.utils import instantiate
from loops import ADAMW, BATCHES, assert_trained_alike, new_model
from omegaconf import ListConfig, OmegaConf
from torch import nn

import wd_kernels
from wd_kernels import schedules

CONFIG = """
optimizer:
  _target_: wd_kernels.AdamW
  lr: 0.05
  betas: [0.8, 0.95]
  eps: 1.0e-6
  weight_decay: 0.3
groups:
  _target_: wd_kernels.decay_groups
  weight_decay: 0.3
  exclude: ["3.weight"]
restarts:
  _target_: wd_kernels.NormalizedDecay
  schedule:
    _target_: wd_kernels.schedules.Sequential
    _args_:
      - _target_: wd_kernels.schedules.Warmup
        steps: 2
      - _target_: wd_kernels.schedules.StepDrop
        milestones: [3, 5]
        factor: 0.5
        steps: 8
partial:
  _target_: wd_kernels.SGDW
  _partial_: true
  lr: 0.1
  momentum: 0.8
  weight_decay: 0.3
  decay: l2
"""


def train(optimizer: torch.optim.Optimizer, model: nn.Module, first: int = 0, last: int = 8) -> None:
    for x, y in BATCHES[first:last]:
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.works("hydra-core", "`_target_`, `_partial_`")
def test_beside_torch() -> None:
    config = OmegaConf.create(CONFIG)
    for key, other, options in (
        ("optimizer", torch.optim.AdamW, ADAMW[2]),
        ("partial", torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3}),
    ):
        ours, theirs = new_model(), new_model()
        if key == "partial":
            optimizer = instantiate(config.partial)(ours.parameters())
        else:
            optimizer = instantiate(config.optimizer, params=ours.parameters())
        train(optimizer, ours)
        train(other(theirs.parameters(), **options), theirs)
        assert_trained_alike(ours, theirs, new_model().state_dict())


@pytest.mark.works("hydra-core", "groups and schedules, nested")
def test_groups_and_schedules() -> None:
    """A state of what YAML built loads with weights_only, and goes on exactly."""
    config = OmegaConf.create(CONFIG)
    restarts = schedules.Sequential(schedules.Warmup(2), schedules.StepDrop((3, 5), 0.5, 8))
    by_hand = wd_kernels.NormalizedDecay(restarts)

    def built(model: nn.Module) -> torch.optim.Optimizer:
        groups = instantiate(config.groups, model)
        schedule = instantiate(config.restarts)
        return instantiate(config.optimizer, _partial_=True, decay="independent", schedule=schedule)(groups)

    whole, twin = new_model(), new_model()
    optimizer = built(whole)
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert decayed == [whole[0].weight]
    train(optimizer, whole, 0, 5)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, whole, 5)
    options = ADAMW[2] | {"decay": "independent", "schedule": by_hand}
    train(wd_kernels.AdamW(wd_kernels.decay_groups(twin, 0.3, exclude=["3.weight"]), **options), twin)
    assert all(map(torch.equal, whole.parameters(), twin.parameters()))
    assert optimizer.state_dict()["param_groups"][0]["schedule"] == repr(by_hand)

    resumed = new_model(seed=1)
    again = built(resumed)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(again, resumed, 5)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


@pytest.mark.works("hydra-core", "lists of OmegaConf")
def test_what_is_no_pair() -> None:
    """Lists of OmegaConf are pairs as others are; what is none is refused by name."""
    opt = wd_kernels.AdamW(new_model().parameters(), betas=ListConfig([0.8, 0.95]))
    kept = opt.state_dict()["param_groups"][0]["betas"]
    assert list(kept) == [0.8, 0.95]
    assert type(kept) in (tuple, list)
    with pytest.raises((TypeError, ValueError), match=r"betas.* in the arguments: expected"):
        wd_kernels.AdamW(new_model().parameters(), betas=ListConfig([0.9, "x"]))
