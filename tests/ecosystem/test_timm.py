"""timm: its factory, parameter groups, schedulers, checkpoints, averages and Lookahead, on a small ViT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

# isort: split
import pytest
import torch
from loops import assert_trained_alike
from timm.models import create_model, resume_checkpoint
from timm.optim import OptimInfo, create_optimizer_v2, param_groups_layer_decay
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

import wd_kernels
from wd_kernels import averages

STEPS = 8
IMAGES = torch.linspace(-1, 1, STEPS * 4 * 3 * 16 * 16).mul(3e4).sin().view(STEPS, 4, 3, 16, 16)
LABELS = torch.arange(STEPS * 4).view(STEPS, 4) % 3
BETAS = (0.8, 0.95)
# No underscore: timm takes what comes before one for the name of a wrapper.
default_registry.register(OptimInfo("wdadamw", wd_kernels.AdamW, has_betas=True))
default_registry.register(
    OptimInfo("wdsgd", wd_kernels.SGDW, has_eps=False, has_momentum=True, defaults={"nesterov": True, "decay": "l2"})
)


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3,
        qkv_bias=False, weight_init="reset",
    )  # fmt: skip


def train(model: nn.Module, opt: Any, steps: range, scheduler: Any = None, after: Any = None) -> None:
    for t in steps:
        if scheduler is not None:
            scheduler.step_update(t)
        nn.functional.cross_entropy(model(IMAGES[t]), LABELS[t]).backward()
        opt.step()
        opt.zero_grad()
        if after is not None:
            after(t)


def cosine(opt: Any) -> CosineLRScheduler:
    """Warm-up, and cycles that become lower."""
    return CosineLRScheduler(
        opt, t_initial=3, cycle_decay=0.7, cycle_limit=4, warmup_t=2, warmup_lr_init=1e-3, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.works("timm", "`create_optimizer_v2` by its registry, layer decay, `CosineLRScheduler`, `CheckpointSaver`")
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("wdadamw", "adamw", {"lr": 0.02, "eps": 1e-4, "betas": BETAS, "layer_decay": 0.75}),
        ("wdadamw", "adamw", {"lr": 0.02, "eps": 1e-4, "betas": BETAS, "foreach": True}),
        ("wdsgd", "sgd", {"lr": 0.1, "momentum": 0.8, "layer_decay": 0.75}),
        ("lookahead_wdadamw", "lookahead_adamw", {"lr": 0.02, "eps": 1e-4, "betas": BETAS}),
    ],
    ids=["layer decay", "weight decay", "SGD", "Lookahead"],
)
def test_trained_by_its_factory(ours: str, theirs: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, other, again = vit(), vit(), vit(seed=1)
    before = copy.deepcopy(model.state_dict())

    def made(model: nn.Module, name: str) -> Any:
        opt = create_optimizer_v2(model, name, weight_decay=0.3, **options)
        for group in opt.param_groups:
            group.update({"lookahead_k": 3} if "lookahead_k" in group else {})  # before the save, and after it
        return opt

    opt = made(model, ours)
    assert type(getattr(opt, "_base_optimizer", opt)).__module__ == "wd_kernels.optim"
    schedule = cosine(opt)
    train(model, opt, range(4), schedule)
    CheckpointSaver(model, opt, checkpoint_dir=str(tmp_path)).save_checkpoint(epoch=0)
    train(model, opt, range(4, 8), schedule)

    their_opt = made(other, theirs)
    train(other, their_opt, range(8), cosine(their_opt))
    assert_trained_alike(model, other, before)

    resumed = made(again, ours)
    assert resume_checkpoint(again, str(tmp_path / "last.pth.tar"), resumed, log_info=False) == 1
    train(again, resumed, range(4, 8), cosine(resumed))
    assert_same(again, model)


@pytest.mark.works("timm", '`schedule="from_lr"`')
@pytest.mark.parametrize("scaled", [False, True], ids=["one base_lr", "base_lr of each layer"])
def test_independent_decay_follows_its_scheduler(scaled: bool) -> None:
    """timm sets lr to value * lr_scale; torch's AdamW with decay / base_lr for weight decay is the truth."""
    lr, decay = 0.02, 0.05
    model, other = vit(), vit()
    before = copy.deepcopy(model.state_dict())
    groups, theirs = (param_groups_layer_decay(m, weight_decay=decay, layer_decay=0.75) for m in (model, other))
    assert min(group["lr_scale"] for group in groups) < 0.5
    opt = wd_kernels.AdamW(groups, lr, BETAS, 1e-4, weight_decay=decay, decay="independent", schedule="from_lr")
    for group, their in zip(opt.param_groups, theirs, strict=True):
        if scaled:
            group["base_lr"] = lr * group["lr_scale"]
        their["weight_decay"] = group["weight_decay"] / group["base_lr"]
    train(model, opt, range(STEPS), cosine(opt))
    their_opt = torch.optim.AdamW(theirs, lr, BETAS, 1e-4)
    train(other, their_opt, range(STEPS), cosine(their_opt))
    assert_trained_alike(model, other, before)


@pytest.mark.works("timm", "`ModelEmaV3` beside, and in place of it, `ema_decay=`")
@pytest.mark.parametrize(
    ("own", "options", "counted"),
    [
        (0.8, {"decay": 0.8}, False),
        (averages.EMA(0.8), {"decay": 0.8}, True),
        (averages.WarmedEMA(0.8, power=0.75), {"decay": 0.8, "use_warmup": True, "warmup_power": 0.75}, True),
    ],
    ids=["constant", "from step 1", "warm-up"],
)
def test_averages(own: Any, options: dict[str, Any], counted: bool) -> None:
    model = vit()
    ema = ModelEmaV3(model, **options)
    opt = wd_kernels.AdamW(model.parameters(), 0.02, BETAS, 1e-4, weight_decay=0.3, ema_decay=own)
    train(model, opt, range(STEPS), after=lambda t: ema.update(model, step=t + 1 if counted else None))
    found: dict[str, Tensor] = opt.ema_state_dict(model)
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
        assert (value - model.state_dict()[name]).abs().max() > 1e-4

    shown = vit(seed=1)
    shown.load_state_dict(found)
    with opt.swap_ema():
        assert_same(model, shown)
