"""Trains one network twice, with torch's fused AdamW and with wd_kernels', and compares what comes out.

Both copies start from the same weights and see the same batches, step by step in turns: so the machine's moods hit both
optimizers alike. The data are scikit-learn's handwritten digits, which it ships. The weights drift apart while
training, since the two round differently and training amplifies every ulp; the accuracies say whether that matters.

    python bench/demo.py [--epochs 40]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from internals import aligned
from rich.progress import track
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

import wd_kernels

LAYERS, BATCH, LR, WEIGHT_DECAY = 8, 64, 2e-3, 0.05


class Run:
    """One copy of the network, deep and narrow (many small tensors show launch costs best), with its optimizer."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], **options: bool) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)  # a digit's rows are its words
        self.model = nn.Sequential(nn.Linear(8, 16), encoder, nn.Flatten(), nn.Linear(8 * 16, 10))
        self.optimizer = optimizer(self.model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, **options)  # type: ignore
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

    def weights(self) -> Tensor:
        """All of them, end to end."""
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--epochs", type=int, default=40)
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)  # the tensors are small
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    test, rest = torch.tensor_split(torch.randperm(len(x), generator=generator), [len(x) // 5])
    runs = {"torch fused": Run(torch.optim.AdamW, fused=True), "wd_kernels": Run(wd_kernels.AdamW)}
    both, early = list(runs.values()), 0.0
    for _ in track(range(epochs), description="training both"):
        for batch in torch.split(rest[torch.randperm(len(rest), generator=generator)], BATCH):
            both.reverse()  # who is first changes
            for run in both:
                run.step(x[batch], y[batch])
            if len(run.losses) == 10:
                early = float(torch.dist(both[0].weights(), both[1].weights(), torch.inf))
    print(f"{len(list(both[0].model.parameters()))} parameter tensors, {len(both[0].losses)} steps each, 1 thread\n")
    rows: list[tuple[str, ...]] = [("optimizer", "test accuracy", "final loss", "optimizer ms/step", "speed-up")]
    base = statistics.median(runs["torch fused"].milliseconds)
    for name, run in runs.items():
        median, final = statistics.median(run.milliseconds), statistics.mean(run.losses[-10:])
        with torch.no_grad():
            accuracy = float((run.model.eval()(x[test]).argmax(1) == y[test]).float().mean())
        rows.append((name, f"{accuracy:.2%}", f"{final:.2g}", f"{median:.3f}", f"{base / median:.2f}x"))
    print(aligned(rows, indent=""))
    one, other = (run.weights() for run in both)
    apart = f"{early:.1e} after 10 steps, {torch.dist(one, other, torch.inf):.1e} after {len(both[0].losses)}"
    print(f"\nlargest difference of two weights: {apart} (the largest weight is {one.abs().max():.1f})")


if __name__ == "__main__":
    main()
