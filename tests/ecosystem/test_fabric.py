"""Lightning's Fabric: clipping by norm and by value, bf16-mixed; resumed by save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from loops import ADAMW, BATCHES, MAX_NORM, SGD_PAIR, assert_trained_alike, new_model
from torch import nn

STEPS, SAVED = 8, 3


def trained(
    rule: Any, options: dict[str, Any], file: Path, *, load: bool = False, clip: dict[str, float] | None = None,
    **settings: Any,
) -> nn.Module:  # fmt: skip
    fabric = lightning.Fabric(accelerator="cpu", devices=1, **settings)
    fabric.launch()
    model = new_model(seed=int(load))
    optimizer = rule(model.parameters(), **options)
    model, optimizer = fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    if load:
        fabric.load(file, state)
        assert state["step"] == SAVED
    for step in range(state["step"], STEPS):
        if step == SAVED and not load:
            fabric.save(file, {**state, "step": step})
        x, y = BATCHES[step]
        fabric.backward(nn.functional.mse_loss(model(x), y))
        if clip:
            fabric.clip_gradients(model, optimizer, **clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.module


def check(
    file: Path, pair: Any, *, ours: Any = None, tolerance: float = 2e-5, clip: Any = None, **settings: Any
) -> nn.Module:
    """`ours` clips within the step, in place of Fabric."""
    rule, other, options = pair
    mine = {"clip": None if ours else clip, **settings}
    whole = trained(rule, options | (ours or {}), file, **mine)
    resumed = trained(rule, options | (ours or {}), file, load=True, **mine)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    theirs = trained(other, options, file, clip=clip, **settings)
    assert_trained_alike(whole, theirs, new_model().state_dict(), tolerance=tolerance)
    if clip:
        free = trained(other, options, file, **settings)
        assert not torch.allclose(whole[0].weight, free[0].weight, rtol=0.02)
    return whole


@pytest.mark.works("lightning", "Fabric: saved and resumed")
def test_a_loop(tmp_path: Path) -> None:
    check(tmp_path / "saved.ckpt", ADAMW)


@pytest.mark.works("lightning", "Fabric: clipping by Fabric, or within the step")
@pytest.mark.parametrize("own", [False, True], ids=["theirs", "ours"])
@pytest.mark.parametrize("way", ["norm", "value"])
def test_clipping(way: str, own: bool, tmp_path: Path) -> None:
    theirs, ours = {"norm": ("max_norm", "max_grad_norm"), "value": ("clip_val", "max_grad_value")}[way]
    limit = MAX_NORM if way == "norm" else MAX_NORM / 5
    check(tmp_path / "saved.ckpt", SGD_PAIR, ours={ours: limit} if own else None, clip={theirs: limit})


@pytest.mark.works("lightning", "Fabric: bf16-mixed")
def test_bf16(tmp_path: Path) -> None:
    file = tmp_path / "saved.ckpt"
    whole = check(file, ADAMW, tolerance=2e-3, precision="bf16-mixed")
    assert not torch.equal(whole[0].weight, trained(*ADAMW[::2], file)[0].weight)
