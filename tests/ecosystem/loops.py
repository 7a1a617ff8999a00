"""What the tests train and compare: ours with torch's class in the same loop, a resumed run with a whole one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import wd_kernels

STEPS, BATCH = 8, 4
X = torch.linspace(-1, 1, STEPS * BATCH * 3).view(STEPS * BATCH, 3).mul(7).sin()
Y = X.sum(1, keepdim=True).cos()
BATCHES = list(zip(X.split(BATCH), Y.split(BATCH), strict=True))


class SGD(wd_kernels.SGDW):
    """torch.optim.SGD under its name, for loops that take a class."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, decay="l2", **options)


#: Ours, torch's, what both are given; and a norm at which gradients are clipped in most steps.
ADAMW = (wd_kernels.AdamW, torch.optim.AdamW, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3})
SGD_PAIR = (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3})
MAX_NORM = 0.3


def new_model(seed: int = 0) -> nn.Sequential:
    """Small, with a norm, whose weights and those before it move in all elements."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator)
    return model


def assert_trained_alike(
    ours: nn.Module, theirs: nn.Module, before: Mapping[str, Tensor], *, tolerance: float = 2e-5
) -> None:
    """Same weights up to what orders of operations round off, and both moved far beyond that."""
    other = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        q = other[name]
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
        moved = (p - before[name]).abs().max().item()
        assert moved > 100 * tolerance, f"{name} moved by {moved:g} only"
