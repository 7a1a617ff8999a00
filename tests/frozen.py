"""Runs whose states were saved by earlier versions and must load for ever: `tests/checkpoints/<version>.pt`, and DCP's.

`python tests/frozen.py` writes those of the version that is installed; what is there is never written again.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import wd_kernels
from wd_kernels import NormalizedDecay, averages, schedules

FOLDER = Path(__file__).parent / "checkpoints"
SAVED, AFTER = 4, 3  # steps before the state was saved, and after it


def runs() -> dict[str, tuple[type, dict[str, Any]]]:
    """Every way in which a state may differ: rules, forms, modes, schedules."""
    adamw, sgdw = {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    cosine = schedules.Sequential(schedules.Warmup(2), schedules.Cosine(20))
    independent = {"weight_decay": 0.02, "decay": "independent"}
    restarts = NormalizedDecay(schedules.WarmRestarts(3, mult=2))
    return {
        "adamw": (wd_kernels.AdamW, adamw),
        "adam, amsgrad": (wd_kernels.AdamW, {**adamw, "decay": "l2", "amsgrad": True}),
        "independent": (wd_kernels.AdamW, {"lr": 0.01, **independent, "schedule": cosine}),
        "proximal": (wd_kernels.AdamW, {"lr": 0.01, "weight_decay": 0.02, "decay": "proximal", "eta": 0.5}),
        "from_lr": (wd_kernels.AdamW, {"lr": 0.01, **independent, "schedule": "from_lr"}),
        "adamwr": (wd_kernels.AdamW, {"lr": 0.01, **independent, "weight_decay": 0.05, "schedule": restarts}),
        "sgd": (wd_kernels.SGDW, {**sgdw, "decay": "l2", "nesterov": True}),
        "sgdw": (wd_kernels.SGDW, sgdw),
        "paper": (wd_kernels.SGDW, {"lr": 0.05, "momentum": 0.9, **independent, "form": "paper"}),
        "plain sgd": (wd_kernels.SGDW, {"lr": 0.05, "weight_decay": 0.1, "decay": "l2"}),
        "adagradw": (wd_kernels.AdagradW, {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.1}),
        # since 0.2.0
        "corrected": (wd_kernels.AdamW, {**adamw, "decay": "corrected", "schedule": cosine}),
        "decay_to": (wd_kernels.AdamW, {**adamw, "decay_to": "initial"}),
        "cautious, around 1": (wd_kernels.SGDW, {**sgdw, "cautious": True, "decay_center": 1.0}),
        "weight_decay_schedule": (wd_kernels.AdamW, {**adamw, "weight_decay_schedule": schedules.Cosine(20, end=10)}),
        "bfloat16 states": (wd_kernels.AdamW, {**adamw, "state_dtype": torch.bfloat16, "seed": 7}),
        "8-bit states": (wd_kernels.AdamW, {**adamw, "state_dtype": torch.int8, "seed": 7}),
        "8-bit momentum": (wd_kernels.SGDW, {**sgdw, "state_dtype": torch.int8, "seed": 7}),
        "float32 masters": (wd_kernels.AdamW, {**adamw, "master_weights": "float32"}),
        "split32 masters": (wd_kernels.SGDW, {**sgdw, "master_weights": "split32"}),
        "split24 masters": (wd_kernels.AdagradW, {**adamw, "master_weights": "split24", "stochastic_rounding": True}),
        "ema": (wd_kernels.AdamW, {**adamw, "ema_decay": averages.WarmedEMA(0.9)}),
        "clipped": (wd_kernels.AdamW, {**adamw, "max_grad_norm": 0.5, "max_grad_value": 0.25, "skip_nonfinite": True}),
        "skip_spikes": (wd_kernels.SGDW, {**sgdw, "skip_spikes": 3.0, "spike_window": 4}),
    }


def saved_by(version: str) -> dict[str, Any]:
    """The runs of a version: a release adds some, and every one of its own is there for ever."""
    found: dict[str, Any] = torch.load(FOLDER / f"{version}.pt", weights_only=True)
    return found


def values(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Numbers that no generator's version changes."""
    return [
        torch.tensor([((7 * k + 13 * seed + 5 * n) % 31 - 15) / 16 for k in range(n)], dtype=dtype).reshape(shape)
        for n, shape in ((6, (2, 3)), (5, (5,)), (4, (2, 2)))
    ]


def make(name: str, weights: list[Tensor]) -> tuple[Any, list[nn.Parameter]]:
    """A run's optimizer and parameters: a named group each of decaying and other weights; the last has no gradients."""
    cls, options = runs()[name]
    params = [nn.Parameter(w.clone()) for w in weights]
    groups = [{"params": [("a", params[0]), ("c", params[2])]}, {"params": [("b", params[1])], "weight_decay": 0.0}]
    return cls(groups, **options), params


def train(opt: Any, params: list[nn.Parameter], steps: range) -> None:
    for t in steps:
        for group in opt.param_groups:  # as an LR scheduler would
            if group.get("schedule") == "from_lr":
                group["lr"] = 0.01 * (1 - t / 20)
        for p, g in zip(params[:2], values(t + 1, params[0].dtype), strict=False):
            p.grad = g
        opt.step()


def run(name: str) -> dict[str, Any]:
    opt, params = make(name, values(0, torch.bfloat16 if name.endswith("masters") else torch.float32))
    train(opt, params, range(SAVED))
    saved, weights = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    train(opt, params, range(SAVED, SAVED + AFTER))
    return {"state": saved, "weights": weights, "after": [p.detach().clone() for p in params]}


if __name__ == "__main__":
    file = FOLDER / f"{wd_kernels.__version__}.pt"
    if file.exists():
        raise SystemExit(f"{file} is there already: states of a version are saved once")
    FOLDER.mkdir(exist_ok=True)
    found = {name: run(name) for name in runs()}
    torch.save(found, file)
    for name in ("independent", "sgdw"):
        dcp.save(
            {"optimizer": found[name]["state"]},
            checkpoint_id=FOLDER / f"{wd_kernels.__version__}-dcp-{name}",
            no_dist=True,
        )
    print(f"wrote {file}")
