"""torchao: training for quantisation, and weights that are tensors of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.quantized_training import bitnet_training, int8_mixed_precision_training
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig

import wd_kernels

STEPS, WIDTH = 8, 32
X = torch.linspace(-1, 1, STEPS * 8 * WIDTH).mul(3e3).sin().view(STEPS, 8, WIDTH)
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
QUANTISED = {
    "int4 weights": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(WIDTH)),
    "int8 by int4": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(WIDTH)),
}
TENSORS = {"BitNet": bitnet_training, "int8 mixed precision": int8_mixed_precision_training}


def new_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))


def backward(model: nn.Module, t: int) -> None:
    (model(X[t]) - X[t, :, :4]).square().mean().backward()


def train(model: nn.Module, opt: Any, steps: range) -> None:
    for t in steps:
        backward(model, t)
        opt.step()
        opt.zero_grad()


@pytest.mark.works("torchao", "quantisation-aware training, int4 weights, int8 activations, prepared and converted")
@pytest.mark.parametrize("kind", QUANTISED)
def test_trained_for_quantisation(kind: str, tmp_path: Path) -> None:
    config = QUANTISED[kind]
    model, other, again = new_model(), new_model(), new_model(seed=1)
    for m in (model, other, again):
        quantize_(m, QATConfig(config, step="prepare"))
    before = copy.deepcopy(model.state_dict())
    opt = wd_kernels.AdamW(model.parameters(), **OPTIONS)
    theirs = torch.optim.AdamW(other.parameters(), **OPTIONS)
    for t in range(STEPS):
        other.load_state_dict(model.state_dict())  # a last place may be a code: two of torch's own part, too
        train(model, opt, range(t, t + 1))
        train(other, theirs, range(t, t + 1))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        if t == 3:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved.pt")
    assert all((p - before[name]).abs().max() > 0.02 for name, p in model.named_parameters())

    resumed = wd_kernels.AdamW(again.parameters(), **OPTIONS)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    train(again, resumed, range(4, 8))
    assert all(map(torch.equal, model.parameters(), again.parameters()))

    for m in (model, again):
        quantize_(m, QATConfig(config, step="convert"))
    assert type(model[0].weight.data) is not Tensor
    assert torch.equal(model(X[0]), again(X[0]))


@pytest.mark.works("torchao", "weights of BitNet and int8 mixed-precision training by `wd_kernels.functional`")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_its_own(kind: str) -> None:
    """The class refuses them by name; what they wrap is stepped by the functions, and the others as ever."""
    model, other = new_model(), new_model()
    for m in (model, other):
        quantize_(m, TENSORS[kind]())
    own = [p for p in model.parameters() if type(p) is not nn.Parameter or type(p.data) is not Tensor]
    assert len(own) == 3
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is a .*LinearWeight.* wd_kernels\.functional"):
        wd_kernels.AdamW(model.parameters(), **OPTIONS)

    inner = [p._data for p in own]
    firsts = [t.clone() for t in inner]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(t) for t in inner] for _ in range(2))
    opt = wd_kernels.AdamW([p for p in model.parameters() if all(p is not q for q in own)], **OPTIONS)
    for t in range(STEPS):
        backward(model, t)
        grads = [p.grad for p in own]
        wd_kernels.functional.adamw_(inner, grads, exp_avgs, exp_avg_sqs, step=t + 1, **OPTIONS)
        opt.step()
        for p in model.parameters():
            p.grad = None
    train(other, torch.optim.AdamW(other.parameters(), **OPTIONS), range(STEPS))
    theirs = [q._data if hasattr(q, "_data") else q for q in other.parameters()]
    for p, q in zip(model.parameters(), theirs, strict=True):
        torch.testing.assert_close(getattr(p, "_data", p), q, rtol=2e-5, atol=2e-5)
    assert all((t - first).abs().max() > 0.02 for t, first in zip(inner, firsts, strict=True))
