"""Real training loops: Hugging Face's Trainer, accelerate, Lightning, with their clipping or that of the optimizer.

The truth of each is a loop by hand with torch's own functions, on the same batches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
import transformers
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import wd_kernels
from wd_kernels.schedules import Warmup

STEPS, BATCH, MAX_NORM = 6, 4, 0.05
X = torch.linspace(-1, 1, STEPS * BATCH * 3).view(STEPS * BATCH, 3).sin()
Y = X.sum(1, keepdim=True).cos()
OPTIONS: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1, "momentum": 0.9}


class Model(nn.Module):
    """What Trainer wants one to return."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = self.b(self.a(x).tanh())
        return {"loss": nn.functional.mse_loss(found, labels), "logits": found}


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(X.split(BATCH), Y.split(BATCH), strict=True)


def by_hand(clips: bool, **options: Any) -> list[Tensor]:
    model = Model()
    opt = wd_kernels.SGDW(model.parameters(), **{**OPTIONS, **options})
    for x, y in batches():
        model(x, y)["loss"].backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        opt.step()
        opt.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def assert_near(found: nn.Module, expected: list[Tensor]) -> None:
    """Clipped twice by limit / (norm + 1e-6), gradients are 2e-5 shorter than once."""
    for p, q, free in zip(found.parameters(), expected, by_hand(False), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(p.detach(), free, rtol=1e-2, atol=1e-3)  # that they are clipped matters


#: (the framework clips, what the optimizer is given)
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "theirs": (True, {}),
    "ours": (False, {"max_grad_norm": MAX_NORM, "skip_nonfinite": True}),
    "both": (True, {"max_grad_norm": MAX_NORM}),
    "scheduled": (True, {"schedule": Warmup(4), "skip_spikes": 6.0, "capturable": True}),
}
all_ways = pytest.mark.parametrize("way", WAYS)


def truth(way: str) -> list[Tensor]:
    """What is clipped twice is clipped once: the second norm is below the limit by then."""
    return by_hand(True, **{k: v for k, v in WAYS[way][1].items() if k == "schedule"})


@all_ways
def test_accelerate(way: str) -> None:
    clips, options = WAYS[way]
    accelerator = accelerate.Accelerator(cpu=True)
    model = Model()
    opt = wd_kernels.SGDW(model.parameters(), **OPTIONS, **options)
    loader = DataLoader(TensorDataset(X, Y), batch_size=BATCH)
    model, prepared, loader = accelerator.prepare(model, opt, loader)
    for x, y in loader:
        accelerator.backward(model(x, y)["loss"])
        if clips:
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        prepared.step()
        prepared.zero_grad()
    assert_near(model, truth(way))
    assert not prepared.step_was_skipped


class Module(lightning.LightningModule):
    """What Lightning wants one to be."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.model, self.options = Model(), options
        self.opt: Any = None

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss: Tensor = self.model(*batch)["loss"]
        return loss

    def configure_optimizers(self) -> Any:
        self.opt = wd_kernels.SGDW(self.parameters(), **{**OPTIONS, **self.options})
        return self.opt


def fitted(module: Module, folder: Path, scaler: Any = None, **options: Any) -> Module:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(**quiet, **options)
        if scaler is not None:
            trainer.strategy.precision_plugin.scaler = scaler
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=BATCH))
    return module


@all_ways
def test_lightning(way: str, tmp_path: Path) -> None:
    clips, options = WAYS[way]
    module = fitted(Module(**options), tmp_path, gradient_clip_val=MAX_NORM if clips else None)
    assert_near(module.model, truth(way))


@all_ways
def test_transformers(way: str, tmp_path: Path) -> None:
    """Its scheduler moves nothing here; its own way with learning rates is `schedule="from_lr"`."""
    clips, options = WAYS[way]
    model = Model()
    opt = wd_kernels.SGDW(model.parameters(), **OPTIONS, **options)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=BATCH, num_train_epochs=1, use_cpu=True, report_to=[],
        max_grad_norm=MAX_NORM if clips else 0.0, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(
        model=model, args=arguments, train_dataset=rows,
        optimizers=(opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0)),
    )  # fmt: skip
    trainer.train()
    assert_near(model, truth(way))


def test_lightning_unscales(tmp_path: Path) -> None:
    """16-mixed on the CPU has no scaler: one is handed over, as on a GPU. Clipping would hide a scale that stays."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Module(max_grad_norm=math.inf, lr=0.01)
    fitted(module, tmp_path, scaler, plugins=[MixedPrecision("bf16-mixed", "cpu")])
    assert scaler.get_scale() == 2.0**10
    assert 0.01 < float(module.opt.grad_norm) < 20
    for p, q, first in zip(module.model.parameters(), by_hand(False, lr=0.01), Model().parameters(), strict=True):
        moved = (q - first.detach()).norm()
        assert (p.detach() - q).norm() < 0.05 * moved  # the forward pass is in bfloat16
        assert moved > 0.01
