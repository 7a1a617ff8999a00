"""Trains one network twice, with torch's fused AdamW and with wd_kernels', and compares what comes out.

Both copies start from the same weights and see the same batches, step by step in turns: so the machine's moods hit both
optimizers alike. The data are scikit-learn's handwritten digits, which it ships. The weights drift apart while
training, since the two round differently and training amplifies every ulp; the accuracies say whether that matters.

    python bench/demo.py [--epochs 40] [--seed 0] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from internals import aligned
from rich.progress import track
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

import wd_kernels

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


def network(seed: int) -> nn.Module:
    """Deep and narrow: many small parameter tensors, as launch costs show best."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1),
        *(Block() for _ in range(BLOCKS // 2)),
        nn.MaxPool2d(2),
        *(Block() for _ in range(BLOCKS // 2)),
        nn.Flatten(),
        nn.Linear(CHANNELS * 16, 10),
    )


class Run:
    """One copy of the network with its optimizer, and what was seen of it."""

    def __init__(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.name, self.model, self.optimizer = name, model, optimizer
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, cycle_momentum=False)
        self.losses: list[float] = []
        self.milliseconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        """One training step; only the optimizer is timed."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        started = time.perf_counter()
        self.optimizer.step()
        self.milliseconds.append((time.perf_counter() - started) * 1e3)
        self.losses.append(loss.item())
        self.schedule.step()

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return float((self.model.eval()(x).argmax(1) == y).float().mean())


def difference(a: Run, b: Run) -> float:
    """The largest difference between the weights of two runs."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def train(epochs: int, seed: int) -> tuple[list[Run], str]:
    """Trains both copies; returns them, and the table of what they came to."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    test, rest = order[: len(x) // 5], order[len(x) // 5 :]
    per_epoch = len(rest) // BATCH
    runs = []
    for name, cls, more in (
        ("torch fused", torch.optim.AdamW, {"fused": True}),
        ("wd_kernels", wd_kernels.AdamW, {}),  # the one line that differs
    ):
        model = network(seed)
        optimizer = cls(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, **more)  # type: ignore[arg-type]
        runs.append(Run(name, model, optimizer, epochs * per_epoch))
    early = 0.0
    for epoch in track(range(epochs), description="training both"):
        shuffled = rest[torch.randperm(len(rest), generator=generator)]
        for k in range(per_epoch):
            batch = shuffled[k * BATCH : (k + 1) * BATCH]
            for run in runs if k % 2 else reversed(runs):  # who is first changes
                run.step(x[batch], y[batch])
            if epoch * per_epoch + k + 1 == 10:
                early = difference(*runs)
    rows: list[tuple[str, ...]] = [("optimizer", "test accuracy", "final loss", "optimizer ms/step", "speed-up")]
    base = statistics.median(runs[0].milliseconds)
    for run in runs:
        median, final = statistics.median(run.milliseconds), statistics.mean(run.losses[-10:])
        accuracy = run.accuracy(x[test], y[test])
        rows.append((run.name, f"{accuracy:.2%}", f"{final:.2g}", f"{median:.3f}", f"{base / median:.2f}x"))
    largest = max(float(p.detach().abs().max()) for p in runs[0].model.parameters())
    apart = f"{early:.1e} after 10 steps, {difference(*runs):.1e} after {len(runs[0].losses)}"
    text = f"{aligned(rows, indent='')}\n\nlargest difference of two weights: {apart}"
    return runs, f"{text} (the largest weight is {largest:.1f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, plots; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1, the tensors are small)")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error("--epochs must be 1 or more")
    torch.set_num_threads(arguments.threads)
    runs, text = train(arguments.epochs, arguments.seed)
    sizes = [p.numel() for p in runs[0].model.parameters()]
    print(f"{len(sizes)} parameter tensors, {sum(sizes)} parameters, {len(runs[0].losses)} steps each, ", end="")
    print(f"torch.set_num_threads({arguments.threads})\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
