"""Draws what each decay mode does to weights, as the optimizers do it: the pictures of docs/decay-modes.md.

    python bench/decay_modes.py [path]     # default: bench/results/decay_modes.png, in half a minute

Weights begin at 1 and get gradients of one size and random sign, in pairs of opposite ones, so that updates cancel in
the mean and what is left of it is decay.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import wd_kernels
from wd_kernels import AdamW, DecayMode, schedules

PICTURE = Path(__file__).parent / "results" / "decay_modes.png"
MODES: dict[DecayMode, tuple[str, float]] = {  # color and width: where modes agree, each is seen around the next
    "lr_scaled": ("lightskyblue", 10), "independent": ("orange", 7.5), "proximal": ("tab:green", 5.5),
    "metric_proximal": ("gold", 3.5), "l2": ("tab:red", 2), "corrected": ("black", 1),
}  # fmt: skip
#: What takes λ alone off a weight, where the others take λ times the lr.
WITHOUT_LR = ("independent", "proximal")


def means(decay: DecayMode, steps: int, size: float = 1.0, pairs: int = 256, **options: Any) -> Iterator[float]:
    """The mean of the weights before the first step of AdamW, and after every one."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.ones(2, pairs, dtype=torch.float64))
    opt = AdamW([w], decay=decay, **options)
    yield float(w.detach().mean())
    for _ in range(steps):
        signs = torch.randint(0, 2, (pairs,), generator=generator, dtype=torch.float64) * 2 - 1
        w.grad = torch.stack([size * signs, -size * signs])
        opt.step()
        yield float(w.detach().mean())


def share(decay: DecayMode, lr: float, weight_decay: float, size: float = 1.0, steps: int = 50) -> float:
    """What share of a weight AdamW takes off in a step, in the mean over a few."""
    *_, last = means(decay, steps, size, lr=lr, weight_decay=weight_decay)
    return 1.0 - math.pow(abs(last), 1 / steps)


def left(decay: DecayMode, product: float) -> float:
    """What one step of SGD without a gradient leaves of a weight, where lr · λ, or λ, is `product`."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    wd_kernels.SGDW([w], lr=1.0, weight_decay=product, decay=decay).step()
    return float(w.detach())


def draw(path: Path) -> None:
    """Four pictures in one."""
    import matplotlib.pyplot as plt

    figure, ((over, after), (lrs, sizes)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    steps = 1000
    for decay, (color, width) in MODES.items():
        how: dict[str, Any] = {"color": color, "linewidth": width, "label": decay}
        decays = 2e-3 if decay in WITHOUT_LR else 0.1
        values = list(means(decay, steps, lr=0.02, weight_decay=decays, schedule=schedules.Cosine(steps)))
        over.plot(values, **how)
        x = np.geomspace(1e-4, 1e-1, 13)
        lrs.loglog(x, [share(decay, lr, 1e-3 if decay in WITHOUT_LR else 0.1) for lr in x], **how)
        x = np.geomspace(1e-2, 1e2, 17)
        sizes.loglog(x, [share(decay, 1e-3, 1e-4 if decay in WITHOUT_LR else 0.1, size) for size in x], **how)
    x = np.linspace(0, 3, 61)
    both: tuple[tuple[DecayMode, str], ...] = (
        ("lr_scaled", "lr_scaled, independent, l2, corrected"),
        ("proximal", "proximal, metric_proximal"),
    )
    for mode, label in both:
        after.plot(x, [left(mode, value) for value in x], color=MODES[mode][0], linewidth=3, label=label)
    after.axhline(0, color="gray", linewidth=0.5)
    for axes, title, label, what in (
        (over, "Weights under a cosine schedule", "step", "mean weight"),
        (after, "One step of SGD, no gradient", "lr · λ (λ in modes without lr)", "share of the weight that is left"),
        (lrs, "The lr changes and λ is kept", "lr", "share taken off by a step"),
        (sizes, "Gradients of other sizes", "size of the gradient", "share taken off by a step"),
    ):
        axes.set(title=title, xlabel=label, ylabel=what)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
