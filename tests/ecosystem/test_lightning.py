"""Lightning's Trainer: clipping, accumulation, bf16-mixed, a loss scale; resumed by fit(ckpt_path=)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from loops import ADAMW, BATCH, MAX_NORM, SGD_PAIR, X, Y, assert_trained_alike, new_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 2


class Module(lightning.LightningModule):
    def __init__(self, rule: Any, options: dict[str, Any], seed: int = 0) -> None:
        super().__init__()
        self.net, self.rule, self.options = new_model(seed), rule, options

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = self.rule(self.parameters(), **self.options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t / 8))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trained(module: Module, folder: Path, *, epochs: int = EPOCHS, scaler: Any = None, **settings: Any) -> Module:
    """An epoch at a time: the checkpoint of the first is what another resumes from."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    load = settings.pop("load", None)
    trainer = lightning.Trainer(max_epochs=epochs, **quiet, **settings)
    if scaler is not None:
        trainer.strategy.precision_plugin.scaler = scaler
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=BATCH), ckpt_path=load)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


def check(folder: Path, pair: Any, *, ours: dict[str, Any], tolerance: float = 2e-5, **settings: Any) -> Module:
    """`ours` are options of our optimizer beside those of both; `settings` those of the Trainer."""
    rule, other, options = pair
    whole = trained(Module(rule, options | ours), folder, **settings)
    if ours:
        settings = settings | {"gradient_clip_val": MAX_NORM}
    theirs = trained(Module(other, options), folder, **settings)
    assert_trained_alike(whole.net, theirs.net, new_model().state_dict(), tolerance=tolerance)
    if ours:
        settings = settings | {"gradient_clip_val": None}
    trained(Module(rule, options | ours), folder, epochs=1, **settings)
    resumed = trained(Module(rule, options | ours, seed=1), folder, load=folder / "1.ckpt", **settings)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    return whole


@pytest.mark.works("lightning", "Trainer: fit, saved and resumed")
@pytest.mark.works("lightning", "LR schedulers")
def test_fit(tmp_path: Path) -> None:
    check(tmp_path, ADAMW, ours={})


@pytest.mark.works("lightning", "accumulation")
@pytest.mark.works("lightning", "clipping: by Lightning")
def test_accumulation_and_its_clipping(tmp_path: Path) -> None:
    whole = check(tmp_path, SGD_PAIR, ours={}, gradient_clip_val=MAX_NORM, accumulate_grad_batches=2)
    free = trained(Module(*SGD_PAIR[::2]), tmp_path, accumulate_grad_batches=2)
    assert not torch.allclose(whole.net[0].weight, free.net[0].weight, rtol=0.02)


@pytest.mark.works("lightning", "clipping: by the optimizer, within the step")
def test_our_clipping(tmp_path: Path) -> None:
    check(tmp_path, SGD_PAIR, ours={"max_grad_norm": MAX_NORM, "skip_nonfinite": True})


@pytest.mark.works("lightning", "bf16-mixed")
def test_bf16(tmp_path: Path) -> None:
    whole = check(tmp_path, ADAMW, ours={}, tolerance=2e-3, precision="bf16-mixed")
    in_float32 = trained(Module(*ADAMW[::2]), tmp_path)
    assert not torch.equal(whole.net[0].weight, in_float32.net[0].weight)


@pytest.mark.works("lightning", "a GradScaler")
@pytest.mark.parametrize("unscales", [False, True], ids=["scaler", "optimizer"])
def test_a_loss_scale(unscales: bool, tmp_path: Path) -> None:
    """Lightning has none for the CPU: one is handed over, as on a GPU. The scaler unscales, or the step does."""
    rule, other, options = SGD_PAIR
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    ours = options | ({"max_grad_norm": math.inf} if unscales else {})
    whole = trained(Module(rule, ours), tmp_path, scaler=scaler, plugins=[MixedPrecision("bf16-mixed", "cpu")])
    assert scaler.get_scale() == 2.0**13
    theirs = trained(Module(other, options), tmp_path, precision="bf16-mixed")
    assert_trained_alike(whole.net, theirs.net, new_model().state_dict(), tolerance=2e-3)


@pytest.mark.works("lightning", "clipping: by the optimizer, under a precision at which Lightning does not for it")
def test_a_clipping_that_lightning_refuses(tmp_path: Path) -> None:
    rule, other, options = SGD_PAIR
    mixed = {"precision": "bf16-mixed"}
    ours = options | {"max_grad_norm": MAX_NORM}
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trained(Module(rule, ours), tmp_path, gradient_clip_val=MAX_NORM, **mixed)
    theirs = trained(Module(other, options), tmp_path, gradient_clip_val=MAX_NORM, **mixed)
    whole = trained(Module(rule, ours), tmp_path, **mixed)
    assert_trained_alike(whole.net, theirs.net, new_model().state_dict(), tolerance=2e-3)
