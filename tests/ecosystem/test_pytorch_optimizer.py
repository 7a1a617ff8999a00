"""pytorch_optimizer's wrappers around our class, beside the same around torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from loops import BATCHES, assert_trained_alike, new_model
from torch import Tensor, nn

import wd_kernels

Build = Callable[[type, nn.Module], Any]
ADAMW: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3}
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.3}


def lookahead(base: type, model: nn.Module) -> Any:
    return pytorch_optimizer.Lookahead(base(model.parameters(), **ADAMW), k=3, alpha=0.4)


def pulled_back(base: type, model: nn.Module) -> Any:
    own = {"decay": "l2"} if base is wd_kernels.SGDW else {}
    return pytorch_optimizer.Lookahead(base(model.parameters(), **SGD, **own), k=3, pullback_momentum="pullback")


def sam(base: type, model: nn.Module) -> Any:
    return pytorch_optimizer.SAM(model.parameters(), base, rho=0.1, **ADAMW)


def schedule_free(base: type, model: nn.Module) -> Any:
    opt = pytorch_optimizer.ScheduleFreeWrapper(base(model.parameters(), **ADAMW), momentum=0.9, weight_decay=0.1)
    opt.train()
    return opt


def orthograd(base: type, model: nn.Module) -> Any:
    return pytorch_optimizer.OrthoGrad(base(model.parameters(), **ADAMW))


def train(model: nn.Module, opt: Any, steps: range) -> None:
    for x, y in BATCHES[steps.start : steps.stop]:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        closure()
        opt.step(closure if isinstance(opt, pytorch_optimizer.SAM) else None)


@pytest.mark.works("pytorch-optimizer", "`Lookahead`, `SAM`, `ScheduleFreeWrapper`, `OrthoGrad` around it")
@pytest.mark.parametrize("build", [lookahead, pulled_back, sam, schedule_free, orthograd])
def test_wrapped(build: Build, tmp_path: Path) -> None:
    ours, theirs = (wd_kernels.SGDW, torch.optim.SGD) if build is pulled_back else (wd_kernels.AdamW, torch.optim.AdamW)
    model, other, again = new_model(), new_model(), new_model(seed=1)
    before = copy.deepcopy(model.state_dict())
    opt = build(ours, model)
    train(model, opt, range(4))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved.pt")
    train(model, opt, range(4, 8))
    train(other, build(theirs, other), range(8))
    assert_trained_alike(model, other, before)

    resumed = build(ours, again)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    train(again, resumed, range(4, 8))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
