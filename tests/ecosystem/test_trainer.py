"""Hugging Face's Trainer: an optimizer, or a class; clipping, accumulation, bf16; resumed from its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loops import ADAMW, BATCH, MAX_NORM, SGD_PAIR, X, Y, assert_trained_alike, new_model
from torch import Tensor, nn

ROWS = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
STEPS, SAVED = 16, 6


class Model(nn.Module):
    """What Trainer wants one to return."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = new_model(seed)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


def trained(
    folder: Path, rule: Any, options: dict[str, Any], *, given: str = "class", resume: bool = False, **arguments: Any
) -> Model:
    """By Trainer with its own schedule, saved after SAVED steps; or another model, which goes on from there."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "max_steps": STEPS, "use_cpu": True,
        "save_strategy": "steps", "save_steps": SAVED, "learning_rate": options["lr"], "max_grad_norm": 0.0,
        "weight_decay": options["weight_decay"], "warmup_steps": 3, "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "sequential", "report_to": [], "logging_strategy": "no", "disable_tqdm": True,
        "remove_unused_columns": False, "dataloader_pin_memory": False,
    }  # fmt: skip
    model = Model(seed=int(resume))
    ways: dict[str, Any] = {"optimizer_cls_and_kwargs": (rule, options)}
    if given == "object":
        ways = {"optimizers": (rule(model.parameters(), **options), None)}
    arguments = settings | arguments
    trainer = transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**arguments), train_dataset=ROWS, **ways
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    assert trainer.state.global_step == STEPS
    return model


def check(folder: Path, pair: Any, *, ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 2e-5) -> Model:
    """Ours beside torch's class; and ours, resumed, beside ours."""
    rule, other, options = pair
    whole = trained(folder / "ours", rule, options, **ours)
    expected = trained(folder / "theirs", other, options, **theirs)
    assert_trained_alike(whole, expected, Model(0).state_dict(), tolerance=tolerance)
    resumed = trained(folder / "ours", rule, options, resume=True, **ours)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    return whole


@pytest.mark.works("transformers", "`optimizers=`")
def test_an_optimizer(tmp_path: Path) -> None:
    check(tmp_path, ADAMW, ours={"given": "object"}, theirs={"given": "object"})


@pytest.mark.works("transformers", "`optimizer_cls_and_kwargs=`")
@pytest.mark.parametrize("pair", [ADAMW, SGD_PAIR], ids=["adamw", "sgd"])
def test_a_class(pair: Any, tmp_path: Path) -> None:
    check(tmp_path, pair, ours={}, theirs={})


@pytest.mark.works("transformers", "clipping: by Trainer")
@pytest.mark.works("transformers", "accumulation")
def test_its_clipping_and_accumulation(tmp_path: Path) -> None:
    clipped = {"max_grad_norm": MAX_NORM, "gradient_accumulation_steps": 2}
    whole = check(tmp_path, SGD_PAIR, ours=clipped.copy(), theirs=clipped)
    free = trained(tmp_path / "free", *SGD_PAIR[::2], gradient_accumulation_steps=2)
    assert not torch.allclose(whole.net[0].weight, free.net[0].weight, rtol=0.02)


@pytest.mark.works("transformers", "clipping: by the optimizer, within the step")
def test_our_clipping(tmp_path: Path) -> None:
    rule, other, options = SGD_PAIR
    options = options | {"max_grad_norm": MAX_NORM, "skip_nonfinite": True}
    expected = trained(tmp_path / "theirs", other, SGD_PAIR[2], max_grad_norm=MAX_NORM)
    whole = trained(tmp_path / "ours", rule, options)
    assert_trained_alike(whole, expected, Model(0).state_dict())
    resumed = trained(tmp_path / "ours", rule, options, resume=True)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


@pytest.mark.works("transformers", "bf16")
def test_bf16(tmp_path: Path) -> None:
    """The forward pass is in bfloat16, whose rounding tells last places of weights apart: so a wide tolerance."""
    whole = check(tmp_path, ADAMW, ours={"bf16": True}, theirs={"bf16": True}, tolerance=2e-3)
    in_float32 = trained(tmp_path / "float32", *ADAMW[::2])
    assert not torch.equal(whole.net[0].weight, in_float32.net[0].weight)


@pytest.mark.works("transformers", '`schedule="from_lr"`')
def test_a_schedule_that_follows_trainers(tmp_path: Path) -> None:
    """With torch's form of decay it is what torch's class does under Trainer's schedule."""
    rule, other, options = ADAMW
    ours = options | {"schedule": "from_lr"}
    whole = trained(tmp_path / "ours", rule, ours)
    assert_trained_alike(whole, trained(tmp_path / "theirs", other, options), Model(0).state_dict())
    resumed = trained(tmp_path / "ours", rule, ours, resume=True)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
