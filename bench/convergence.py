"""Every storage format on real training: a classifier of digits, a transformer of characters, and pure weight decay.

python bench/convergence.py [--seeds N] [--steps N] [--out FOLDER]      (or: make convergence)

Weights are stored as a format says and computed with in float32, so that runs differ by the optimizer alone; each has
the same seed, first weights and batches in all formats. The text is the documentation that Python's own installation
brings (`pydoc_data.topics`). Writes convergence.txt, convergence.json and convergence.png.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import internals
import torch
from rich.progress import Progress
from torch import Tensor, nn

import wd_kernels

RESULTS = Path(__file__).parent / "results"
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Format:
    """How a run stores its weights, and what steps them."""

    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    torchs: bool = False

    def optimizer(self, params: list[Any], lr: float, weight_decay: float) -> Any:
        if self.torchs:
            return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
        return wd_kernels.AdamW(params, lr=lr, weight_decay=weight_decay, **self.options)


FORMATS: dict[str, Format] = {
    "float32": Format(F32),
    "float32; bfloat16 states": Format(F32, {"state_dtype": BF16}),
    "split32": Format(BF16, {"master_weights": "split32"}),
    "split32; bfloat16 states": Format(BF16, {"master_weights": "split32", "state_dtype": BF16}),
    "split24": Format(BF16, {"master_weights": "split24"}),
    "float32; 8-bit states": Format(F32, {"state_dtype": torch.int8}),
    "split24; bfloat16 states": Format(BF16, {"master_weights": "split24", "state_dtype": BF16}),
    "split24; 8-bit states": Format(BF16, {"master_weights": "split24", "state_dtype": torch.int8}),
    "bfloat16 stochastic; float32 states": Format(BF16, {"stochastic_rounding": True}),
    "bfloat16 stochastic; bfloat16 states": Format(BF16, {"stochastic_rounding": True, "state_dtype": "param"}),
    "bfloat16 stochastic; 8-bit states": Format(BF16, {"stochastic_rounding": True, "state_dtype": torch.int8}),
    "split24; 8-bit states, nearest": Format(
        BF16, {"master_weights": "split24", "state_dtype": torch.int8, "stochastic_rounding": False}
    ),
    "bfloat16 nearest; float32 states": Format(BF16, {"stochastic_rounding": "states"}),
    "bfloat16 nearest, all": Format(BF16, {"stochastic_rounding": False, "state_dtype": "param"}),
    "torch.optim.AdamW, bfloat16": Format(BF16, torchs=True),
}


# Tasks ----------------------------------------------------------------------------------------------------------------


class Task(Protocol):
    """What is trained. `loss(batch)` of a model; `score` of what it has not seen."""

    name: str
    score_name: str
    lr: float
    weight_decay: float

    def model(self) -> nn.Module: ...

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def held_out(self) -> tuple[Tensor, Tensor]: ...

    def score(self, logits: Tensor, target: Tensor) -> float: ...


class Digits(Task):
    """scikit-learn's 1797 digits of 8 x 8, a third held out; a network of two layers."""

    name, score_name = "digits", "accuracy, %"
    lr, weight_decay = 1e-3, 0.1

    def __init__(self) -> None:
        found = importlib.import_module("sklearn.datasets").load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(found.data[order], dtype=F32) / 16, torch.tensor(found.target[order])
        self.train, self.test = (x[:1200], y[:1200]), (x[1200:], y[1200:])

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(0, 1200, (64,), generator=generator)
            yield self.train[0][rows], self.train[1][rows]

    def held_out(self) -> tuple[Tensor, Tensor]:
        return self.test

    def score(self, logits: Tensor, target: Tensor) -> float:
        return 100 * float((logits.argmax(-1) == target).float().mean())


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        widened: Tensor = self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return x + widened


class Transformer(nn.Module):
    def __init__(self, symbols: int, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.symbols(x) + self.places(torch.arange(x.shape[1]))
        logits: Tensor = self.out(self.norm(self.blocks(x)))
        return logits


class Characters(Task):
    """The next character of Python's documentation; the last tenth held out."""

    name, score_name = "characters", "loss, held out"
    lr, weight_decay = 2e-3, 0.1
    length = 64

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[key] for key in sorted(topics))
        symbols = sorted(set(text))
        number = {symbol: k for k, symbol in enumerate(symbols)}
        codes = torch.tensor([number[c] for c in text])
        self.symbols, self.text, self.unseen = len(symbols), codes[: -len(codes) // 10], codes[-len(codes) // 10 :]

    def model(self) -> nn.Module:
        return Transformer(self.symbols, length=self.length)

    def _cut(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.stack([text[k : k + self.length + 1] for k in starts.tolist()])
        return found[:, :-1], found[:, 1:]

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._cut(self.text, torch.randint(0, len(self.text) - self.length - 1, (16,), generator=generator))

    def held_out(self) -> tuple[Tensor, Tensor]:
        return self._cut(self.unseen, torch.arange(0, len(self.unseen) - self.length - 1, 256))

    def score(self, logits: Tensor, target: Tensor) -> float:
        return float(nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten()))


@dataclass
class Run:
    """The loss of every step, and what came of it."""

    losses: list[float]
    score: float

    @property
    def final(self) -> float:
        """The mean loss of the last tenth."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return statistics.fmean(last)


def train(task: Task, how: Format, seed: int, steps: int, tick: Callable[[], object]) -> Run:
    """A run with a cosine from the task's lr to a tenth of it."""
    torch.manual_seed(seed)
    model = task.model()
    names = [name for name, _ in model.named_parameters()]
    params = [nn.Parameter(p.detach().to(how.dtype)) for p in model.parameters()]
    opt = how.optimizer(params, task.lr, task.weight_decay)
    losses = []

    def logits(x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(
            model, {n: p.float() for n, p in zip(names, params, strict=True)}, (x,)
        )
        return found

    for step, (x, y) in zip(range(steps), task.batches(seed), strict=False):
        for group in opt.param_groups:
            group["lr"] = task.lr * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        loss = nn.functional.cross_entropy(logits(x).flatten(0, -2), y.flatten())
        opt.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        losses.append(float(loss.detach()))
        tick()
    with torch.no_grad():
        x, y = task.held_out()
        return Run(losses, task.score(logits(x), y))


# Pure decay -----------------------------------------------------------------------------------------------------------


def decayed(make: Callable[[list[Any]], Any], dtype: torch.dtype, steps: int = 500) -> float:
    """The norm after `steps` steps of lr * weight_decay = 1e-4 without gradient, in units of that before."""
    p = nn.Parameter(torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(dtype))
    before = p.detach().double().norm()
    opt = make([p])
    for _ in range(steps):
        p.grad = torch.zeros_like(p)
        opt.step()
    return float(p.detach().double().norm() / before)


class ErrorBits:
    """flashoptim's arithmetic, as it does not run on a CPU: 8 bits of what is lost, in units of half a last place."""

    def __init__(self, params: list[Any]) -> None:
        self.p = params[0]
        self.bits = torch.zeros_like(self.p, dtype=F32)

    def step(self) -> None:
        def half_ulp(narrow: Tensor) -> Tensor:
            exponent = torch.frexp(narrow.float()).exponent - 1
            return torch.ldexp(torch.ones_like(exponent, dtype=F32), exponent - 8)

        with torch.no_grad():
            exact = (self.p.float() + self.bits / 127 * half_ulp(self.p)) * (1 - 1e-4)
            self.p.copy_(exact)
            self.bits = ((exact - self.p.float()) / half_ulp(self.p)).clamp(-1, 1).mul(127).round()


def decays() -> dict[str, float | None]:
    """The ratio by format, and by other libraries that are here; 0.9512 is exact."""
    how: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
    found: dict[str, float | None] = {}
    for name, own in FORMATS.items():
        found[name] = decayed(partial(own.optimizer, lr=1e-3, weight_decay=0.1), own.dtype)
    found["flashoptim's arithmetic, 24 bits"] = decayed(ErrorBits, BF16)
    for name, module, title, more in (
        ("optimi.AdamW, bfloat16", "optimi", "AdamW", {"kahan_sum": False}),
        ("optimi.AdamW, bfloat16, Kahan", "optimi", "AdamW", {"kahan_sum": True}),
        ("bitsandbytes AdamW8bit, bfloat16", "bitsandbytes.optim", "AdamW8bit", {}),
        ("torchao AdamW8bit, stochastic bfloat16", "torchao.optim", "AdamW8bit", {"bf16_stochastic_round": True}),
    ):
        try:
            there = getattr(importlib.import_module(module), title)
            found[name] = decayed(partial(there, **how, **more), BF16)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            found[name] = None
    return found


# Results --------------------------------------------------------------------------------------------------------------


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def table(task: Task, runs: dict[str, list[Run]]) -> str:
    """Mean and standard deviation over seeds; the difference from float32 of the same seed, in its standard errors."""
    rows: list[tuple[object, ...]] = [(task.name, "loss", "spread", "differs by", "+-", task.score_name, "spread")]
    base = [run.final for run in runs["float32"]]
    for name, own in runs.items():
        loss, spread = mean_and_spread([run.final for run in own])
        score, of_score = mean_and_spread([run.score for run in own])
        apart, error = mean_and_spread([run.final - b for run, b in zip(own, base, strict=True)])
        rows.append(
            (name, f"{loss:.4f}", f"{spread:.4f}", f"{apart:+.4f}", f"{error / math.sqrt(len(own)):.4f}",
             f"{score:.3f}", f"{of_score:.3f}")
        )  # fmt: skip
    return internals.aligned(rows, indent="")


def plot(found: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Losses over steps, smoothed, the mean of the seeds; below, how far each format is from float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(found), figsize=(6.2 * len(found), 7.5), height_ratios=(3, 2), layout="constrained"
    )
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for column, (task, runs) in zip(axes.T, found.items(), strict=True):
        curves = {}
        for name, own in runs.items():
            mean = torch.tensor([run.losses for run in own]).mean(0)
            width = max(1, len(mean) // 20)
            curves[name] = nn.functional.avg_pool1d(mean[None, None], width, 1).flatten()
        for k, (name, curve) in enumerate(curves.items()):
            dashes = "--" if name.startswith("torch") else "-"
            column[0].plot(curve, dashes, label=name, color=colours[k], linewidth=1.4)
            column[1].plot(curve - curves["float32"], dashes, color=colours[k], linewidth=1.2)
        column[0].set(title=f"{task}: training loss, mean of {len(own)} seeds", yscale="log", xlabel="step")
        column[1].set(title="its difference from float32", xlabel="step")
        spread = float(torch.tensor([run.final for run in runs["float32"]]).std())
        column[1].axhspan(-spread, spread, color="0.9", zorder=0, label="spread of float32 over seeds")
        column[1].legend(loc="upper left", fontsize=7)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    tasks: list[Task] = [Digits(), Characters()]
    found: dict[str, dict[str, list[Run]]] = {}
    with Progress() as progress:
        for task in tasks:
            bar = progress.add_task(task.name, total=len(FORMATS) * arguments.seeds * arguments.steps)
            found[task.name] = {
                name: [
                    train(task, how, seed, arguments.steps, partial(progress.advance, bar))
                    for seed in range(arguments.seeds)
                ]
                for name, how in FORMATS.items()
            }
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    how = f"{arguments.seeds} seeds, {arguments.steps} steps each"
    parts = [f"{date.today()}; {versions}; {how}. Losses are means of the last tenth of the steps."]
    parts += [table(task, found[task.name]) for task in tasks]
    ratios = decays()
    rows: list[tuple[object, ...]] = [("500 steps of decay by 1e-4; exact: 0.9512", "norm after / before")]
    rows += [(name, "not here" if ratio is None else f"{ratio:.4f}") for name, ratio in ratios.items()]
    parts.append(internals.aligned(rows, indent=""))
    text = "\n\n".join(parts) + "\n"
    print(text, end="")
    (arguments.out / "convergence.txt").write_text(text)
    kept = {
        task: {name: [{"final": run.final, "score": run.score} for run in own] for name, own in runs.items()}
        for task, runs in found.items()
    }
    (arguments.out / "convergence.json").write_text(json.dumps({"runs": kept, "decay": ratios}, indent=1) + "\n")
    plot(found, arguments.out / "convergence.png")


if __name__ == "__main__":
    main()
