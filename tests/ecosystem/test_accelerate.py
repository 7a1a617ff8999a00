"""accelerate: accumulation, clipping, a scheduler that is prepared, bf16; save_state and load_state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from loops import ADAMW, BATCH, MAX_NORM, SGD_PAIR, X, Y, assert_trained_alike, new_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, SAVED = 2, 1


def trained(
    rule: Any, options: dict[str, Any], *, save: Path | None = None, load: Path | None = None, clips: bool = False,
    **settings: Any,
) -> nn.Module:  # fmt: skip
    """Two epochs, saved after the first; or another model, which loads that and trains the second."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    model = new_model(seed=int(load is not None))
    optimizer = rule(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t / 8))
    loader = DataLoader(TensorDataset(X, Y), batch_size=BATCH)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    if load is not None:
        accelerator.load_state(str(load))
    for epoch in range(SAVED if load is not None else 0, EPOCHS):
        if epoch == SAVED and save is not None:
            accelerator.save_state(str(save))
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                if clips and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert not optimizer.step_was_skipped
    return accelerator.unwrap_model(model)


def check(folder: Path, pair: Any, *, tolerance: float = 2e-5, **ways: Any) -> nn.Module:
    rule, other, options = pair
    whole = trained(rule, options, save=folder, **ways)
    assert_trained_alike(whole, trained(other, options, **ways), new_model().state_dict(), tolerance=tolerance)
    resumed = trained(rule, options, load=folder, **ways)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    return whole


@pytest.mark.works("accelerate", "`save_state`, `load_state`")
@pytest.mark.works("accelerate", "LR schedulers")
def test_a_loop(tmp_path: Path) -> None:
    check(tmp_path, ADAMW)


@pytest.mark.works("accelerate", "accumulation")
@pytest.mark.works("accelerate", "clipping: by accelerate")
def test_accumulation_and_its_clipping(tmp_path: Path) -> None:
    ways = {"gradient_accumulation_steps": 2}
    whole = check(tmp_path, SGD_PAIR, clips=True, **ways)
    assert not torch.allclose(whole[0].weight, trained(*SGD_PAIR[::2], **ways)[0].weight, rtol=0.02)


@pytest.mark.works("accelerate", "clipping: by the optimizer, within the step")
def test_our_clipping(tmp_path: Path) -> None:
    rule, other, options = SGD_PAIR
    ours = options | {"max_grad_norm": MAX_NORM, "skip_nonfinite": True}
    whole = trained(rule, ours, save=tmp_path)
    assert_trained_alike(whole, trained(other, options, clips=True), new_model().state_dict())
    assert all(map(torch.equal, whole.parameters(), trained(rule, ours, load=tmp_path).parameters()))


@pytest.mark.works("accelerate", "bf16")
def test_bf16(tmp_path: Path) -> None:
    whole = check(tmp_path, ADAMW, tolerance=2e-3, mixed_precision="bf16")
    assert not torch.equal(whole[0].weight, trained(*ADAMW[::2])[0].weight)
