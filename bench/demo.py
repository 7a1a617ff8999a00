"""Trains one network twice, with torch's fused AdamW and with wd_kernels', and compares what comes out.

Both copies start from the same weights and see the same batches, step by step in turns: so the machine's moods hit both
optimizers alike. The data are scikit-learn's handwritten digits, which it ships. The weights drift apart while
training, since the two round differently and training amplifies every ulp; the accuracies say whether that matters.

    python bench/demo.py [--epochs 40] [--seed 0] [--threads 1] [--out demo.png]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import wd_kernels
from wd_kernels.__main__ import aligned

BLOCKS, CHANNELS, BATCH = 24, 16, 64
LR, WEIGHT_DECAY = 2e-3, 0.05


class Block(nn.Module):
    """Convolution, normalisation, and a way around both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


def network() -> nn.Module:
    """Deep and narrow: many small parameter tensors, as launch costs show best."""
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1),
        *(Block() for _ in range(BLOCKS // 2)),
        nn.MaxPool2d(2),
        *(Block() for _ in range(BLOCKS - BLOCKS // 2)),
        nn.Flatten(),
        nn.Linear(CHANNELS * 16, 10),
    )


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1797 handwritten digits of 8x8 pixels, a fifth of them held out: (x, y, x_test, y_test)."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=generator)
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return x[train], y[train], x[test], y[test]


@dataclass
class Run:
    """One copy of the network with its optimizer, and what was seen of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One training step; only the optimizer is timed."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        started = time.perf_counter()
        self.optimizer.step()
        self.milliseconds.append((time.perf_counter() - started) * 1e3)
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        self.model.eval()
        right = (self.model(x).argmax(1) == y).float().mean()
        self.model.train()
        return float(right)


def difference(a: Run, b: Run) -> float:
    """The largest difference between the weights of two runs."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def train(epochs: int, seed: int) -> tuple[list[Run], float, tuple[Tensor, Tensor]]:
    """Trains both copies; returns them, their difference after 10 steps, and the test set."""
    generator = torch.Generator().manual_seed(seed)
    x, y, x_test, y_test = digits(generator)
    runs = []
    for name in ("torch fused", "wd_kernels"):
        torch.manual_seed(seed)
        model = network()
        # The one line that differs:
        if name == "torch fused":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True
            )
        else:
            optimizer = wd_kernels.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        runs.append(Run(name, model, optimizer))

    per_epoch = len(x) // BATCH
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(run.optimizer, LR, total_steps=epochs * per_epoch, cycle_momentum=False)
        for run in runs
    ]
    early = 0.0
    for epoch in track(range(epochs), description="training both"):
        order = torch.randperm(len(x), generator=generator)
        for k in range(per_epoch):
            batch = order[k * BATCH : (k + 1) * BATCH]
            for run in runs if k % 2 else reversed(runs):  # who is first changes
                run.step(x[batch], y[batch])
            for schedule in schedules:
                schedule.step()
            if epoch * per_epoch + k + 1 == 10:
                early = difference(*runs)
    return runs, early, (x_test, y_test)


def report(runs: Sequence[Run], early: float, test: tuple[Tensor, Tensor]) -> str:
    """The table, and how far the weights are apart."""
    base = statistics.median(runs[0].milliseconds)
    rows: list[tuple[str, ...]] = [("optimizer", "test accuracy", "final loss", "optimizer ms/step", "speed-up")]
    for run in runs:
        median = statistics.median(run.milliseconds)
        final = statistics.mean(run.losses[-10:])
        rows.append((run.name, f"{run.accuracy(*test):.2%}", f"{final:.2g}", f"{median:.3f}", f"{base / median:.2f}x"))
    largest = max(float(p.detach().abs().max()) for p in runs[0].model.parameters())
    return (
        f"{aligned(rows, indent='')}\n\n"
        f"largest difference of two weights: {early:.1e} after 10 steps, {difference(*runs):.1e} after "
        f"{len(runs[0].losses)} (the largest weight is {largest:.1f})"
    )


def plot(runs: Sequence[Run], path: Path) -> None:
    """Both loss curves, and how long the optimizers took."""
    import matplotlib as mpl

    mpl.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    colors = dict(zip((run.name for run in runs), ("#9a5b13", "#1565c0"), strict=True))
    with plt.rc_context():
        plt.rc("font", size=11)
        plt.rc("axes", titlelocation="left")
        plt.rc("axes.spines", top=False, right=False)
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(1.15, 1))
        for run, line in zip(runs, ("-", "--"), strict=True):
            losses = np.asarray(run.losses)
            width = min(15, len(losses))
            smooth = np.convolve(losses, np.ones(width) / width, "valid")
            steps = np.arange(len(smooth)) + width
            left.plot(steps, smooth, line, color=colors[run.name], label=run.name, linewidth=1.8)
        left.set(title="Training loss, same seed and batches", xlabel="step", ylabel=f"loss (mean of {width} steps)")
        left.set_yscale("log")
        left.grid(alpha=0.25)
        left.legend(frameon=False)

        times = [np.asarray(run.milliseconds) for run in runs]
        low, high = min(t.min() for t in times), max(np.quantile(t, 0.98) for t in times)
        bins = np.geomspace(low * 0.95, high * 1.05, 70).tolist()
        for run, t in zip(runs, times, strict=True):
            median = float(np.median(t))
            label = f"{run.name}: median {median:.3f} ms"
            right.hist(t, bins, color=colors[run.name], alpha=0.75, label=label)
            right.axvline(median, color=colors[run.name], linewidth=1, linestyle=":")
        count = sum(1 for _ in runs[0].model.parameters())
        right.set_xscale("log")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_formatter(NullFormatter())
        right.set_ylim(top=right.get_ylim()[1] * 1.25)  # room for the legend
        right.legend(frameon=False, loc="upper right")
        right.set(title=f"Time of optimizer.step(), {count} tensors", xlabel="ms (logarithmic)", ylabel="steps")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, plots; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1, the tensors are small)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the plot goes (default: demo.png)")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error("--epochs must be 1 or more")
    torch.set_num_threads(arguments.threads)
    runs, early, test = train(arguments.epochs, arguments.seed)
    count = [p.numel() for p in runs[0].model.parameters()]
    print(
        f"{len(count)} parameter tensors, {sum(count)} parameters, {len(runs[0].losses)} steps each, "
        f"torch.set_num_threads({arguments.threads})\n"
    )
    print(report(runs, early, test))
    plot(runs, arguments.out)
    print(f"\nplot: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
