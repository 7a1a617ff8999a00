"""torchtitan: its own OptimizersContainer makes our classes; its LR schedulers, its state dicts through DCP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from loops import BATCHES, assert_trained_alike, new_model
from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

import wd_kernels

STEPS, SAVED = 8, 4


class Optimizers(OptimizersContainer):
    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name.startswith("wd_kernels."):
            return getattr(wd_kernels, name.removeprefix("wd_kernels."))
        return OptimizersContainer._resolve_optimizer_factory(name)


def config(name: str, **options: Any) -> OptimizersContainer.Config:
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, **options}
    return Optimizers.Config(
        param_groups=[
            ParamGroupConfig(pattern="bias", optimizer_name=name, optimizer_kwargs={**options, "weight_decay": 0.0}),
            ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs={**options, "weight_decay": 0.3}),
        ]
    )


def trained(
    made: OptimizersContainer.Config, *, save: Path | None = None, load: Path | None = None, follows: bool = True
) -> nn.Module:
    """As torchtitan's Trainer does: the containers' step(); checkpoints are DCP's of their states."""
    model = new_model(seed=int(load is not None))
    optimizers = made.build(model_parts=[model])
    warm = LRSchedulersContainer.Config(warmup_steps=3, decay_ratio=0.5, decay_type="linear")
    schedulers = warm.build(optimizers=optimizers, training_steps=STEPS)
    first = 0
    if load is not None:
        parts = {"model": model.state_dict(), "optimizer": optimizers.state_dict(), "lr": schedulers.state_dict()}
        dcp.load(parts, checkpoint_id=load, no_dist=True)
        model.load_state_dict(parts["model"])
        optimizers.load_state_dict(parts["optimizer"])
        schedulers.load_state_dict(parts["lr"])
        first = SAVED
    for step in range(first, STEPS):
        if step == SAVED and save is not None:
            parts = {"model": model.state_dict(), "optimizer": optimizers.state_dict(), "lr": schedulers.state_dict()}
            dcp.save(parts, checkpoint_id=save, no_dist=True)
        x, y = BATCHES[step]
        optimizers.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizers.step()
        if follows:
            schedulers.step()
    return model


@pytest.mark.works("torchtitan", "`OptimizersContainer`, `LRSchedulersContainer`")
@pytest.mark.works("torchtitan", "its states through DCP")
def test_its_containers(tmp_path: Path) -> None:
    whole = trained(config("wd_kernels.AdamW"), save=tmp_path)
    assert_trained_alike(whole, trained(config("AdamW")), new_model().state_dict())
    assert all(map(torch.equal, whole.parameters(), trained(config("wd_kernels.AdamW"), load=tmp_path).parameters()))


@pytest.mark.works("torchtitan", "decay modes and schedules")
def test_a_schedule_of_ours(tmp_path: Path) -> None:
    made = config("wd_kernels.AdamW", decay="independent", schedule=wd_kernels.schedules.WarmupStableDecay(2, 3, 3))
    whole = trained(made, save=tmp_path, follows=False)
    resumed = trained(made, load=tmp_path, follows=False)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert not torch.allclose(whole[0].weight, trained(config("wd_kernels.AdamW"))[0].weight, rtol=0.01)


@pytest.mark.works("torchtitan", '`schedule="from_lr"`')
def test_a_schedule_that_follows_theirs(tmp_path: Path) -> None:
    """With torch's form of decay it is what torch's class does; with another the decay follows as well."""
    made = config("wd_kernels.AdamW", schedule="from_lr")
    whole = trained(made, save=tmp_path)
    assert_trained_alike(whole, trained(config("AdamW")), new_model().state_dict())
    assert all(map(torch.equal, whole.parameters(), trained(made, load=tmp_path).parameters()))
    independent = trained(config("wd_kernels.AdamW", schedule="from_lr", decay="independent"))
    assert not torch.allclose(whole[0].weight, independent[0].weight, rtol=0.01)
