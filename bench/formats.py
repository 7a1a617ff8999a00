"""What a step costs by the formats of parameters and states: ours beside torch's fused AdamW, in turns. Prints a table.

python bench/formats.py [--rounds N] [> bench/results/formats.txt]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import internals
import torch
from byte_model import step_bytes
from rich.progress import track
from torch import nn

import wd_kernels

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = {"1 x 64Mi": [2**26], "300 x 100000": [100_000] * 300, "1000 x 1000": [1000] * 1000}
NEAREST: dict[str, Any] = {"stochastic_rounding": False}


@dataclass(frozen=True)
class Row:
    """A contender: its name, the dtypes of parameter and states, and how it is made."""

    name: str
    param: torch.dtype
    state: torch.dtype
    make: Callable[[list[Any]], Any]

    @property
    def bytes(self) -> float:
        """A parameter and step, the gradient being of the parameter's dtype."""
        return step_bytes("adamw", self.param, self.param, self.state)


def ours(name: str, param: torch.dtype, state: torch.dtype, **options: Any) -> Row:
    return Row(name, param, state, lambda params: wd_kernels.AdamW(params, lr=1e-3, state_dtype=state, **options))


def torchs(param: torch.dtype) -> Row:
    return Row("torch fused", param, param, lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True))


ROWS = (
    torchs(F32), ours("float32", F32, F32), ours("float32, bfloat16 states, nearest", F32, BF16, **NEAREST),
    ours("float32, bfloat16 states, stochastic", F32, BF16),
    torchs(BF16), ours("bfloat16, float32 states", BF16, F32),
    ours("bfloat16 stochastic, float32 states", BF16, F32, stochastic_rounding=True),
    ours("bfloat16 all, nearest", BF16, BF16, **NEAREST), ours("bfloat16 all, states stochastic", BF16, BF16),
    ours("bfloat16 all, stochastic", BF16, BF16, stochastic_rounding=True),
    ours("float32, 8-bit states", F32, torch.int8), ours("bfloat16, 8-bit states", BF16, torch.int8),
    ours("bfloat16 stochastic, 8-bit states", BF16, torch.int8, stochastic_rounding=True),
)  # fmt: skip


def parameters(shapes: list[int], dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    params = [nn.Parameter((torch.randn(n) * 0.02).to(dtype)) for n in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape) * 0.01).to(dtype)
    return params


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def begin(description: str) -> int:
    """Prints what is measured on; returns how many rounds are asked for."""
    parser = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds: int = parser.parse_args().rounds
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    print(f"{date.today()}; {versions}; {torch.get_num_threads()} threads\n")
    return rounds


def main() -> None:
    rounds = begin(str(__doc__))
    print("AdamW, gradients kept and of the parameter's dtype; ms of step(), median (quartiles) of", rounds, "rounds\n")
    for name, shapes in SHAPES.items():
        rows: list[tuple[object, ...]] = [(name, "B", "ms", "quartiles", "torch / ours")]
        # Each pair by itself, beside torch's of the same dtype: all at once would not lie in memory.
        for row in track([own for own in ROWS if own.name != "torch fused"], name, transient=True):
            pair = (torchs(row.param), row)
            held = [(params := parameters(shapes, own.param), own.make(params)) for own in pair]
            times: list[list[float]] = [[], []]
            for turn in range(rounds + 2):
                for own, run in zip(times, (held[0][1].step, held[1][1].step), strict=True):
                    own += [milliseconds(run)] * (turn >= 2)
            theirs, mine = times
            low, middle, high = statistics.quantiles(mine, n=4)
            ratio = statistics.median(a / b for a, b in zip(theirs, mine, strict=True))
            rows.append((row.name, f"{row.bytes:g}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{ratio:.2f}"))
        print(internals.aligned(rows, indent=""), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
