"""Clipping by the norm of all gradients and a step: ours, in the step, and torch's two calls, in turns. Prints a table.

python bench/clipping.py [> bench/results/clipping.txt]

Bytes of an AdamW step in float32: 28 an element; ours reads the gradients once more (32), torch's clip_grad_norm_ also
rewrites them (40).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import internals
import torch

import wd_kernels

#: tensors x elements, dtype: rounds
CASES = {
    (1, 64 << 20, torch.float32): 11, (300, 100_000, torch.float32): 25, (2000, 256, torch.float32): 101,
    (1000, 1000, torch.float32): 101, (300, 100_000, torch.bfloat16): 25,
}  # fmt: skip
MAX_NORM = 1.0


def parameters(tensors: int, elements: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(elements).to(dtype)) for _ in range(tensors)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def sides(make: Callable[[], list[torch.nn.Parameter]]) -> dict[str, Callable[[], object]]:
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
    theirs = make()
    torchs = torch.optim.AdamW(theirs, fused=True, **options)
    clipping = wd_kernels.AdamW(make(), max_grad_norm=MAX_NORM, **options)
    plain = wd_kernels.AdamW(make(), **options)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, MAX_NORM)
        torchs.step()

    return {"torch": clip_and_step, "ours": clipping.step, "torch, step": torchs.step, "ours, step": plain.step}


def main() -> None:
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    print(f"{date.today()}; {versions}\nAdamW, median ms (quartiles): clip and step, and a step alone\n")
    names = ("torch", "ours", "torch, step", "ours, step")
    print(f"{'tensors':>14}  {'':<8}  " + "  ".join(f"{name:>22}" for name in names) + "  clip and step, torch / ours")
    for (tensors, elements, dtype), rounds in CASES.items():
        own = sides(partial(parameters, tensors, elements, dtype))
        times: dict[str, list[float]] = {name: [] for name in names}
        for t in range(rounds + 2):
            for name in names:
                start = time.perf_counter()
                own[name]()
                times[name] += [1e3 * (time.perf_counter() - start)] * (t >= 2)
        quartiles = {name: statistics.quantiles(times[name], n=4) for name in names}
        cells = [f"{q[1]:.2f} ({q[0]:.2f} to {q[2]:.2f})" for q in quartiles.values()]
        ratio = quartiles["torch"][1] / quartiles["ours"][1]
        size = f"{elements >> 20}Mi" if elements % (1 << 20) == 0 else str(elements)
        kind = str(dtype).removeprefix("torch.")
        print(
            f"{f'{tensors} x {size}':>14}  {kind:<8}  " + "  ".join(f"{c:>22}" for c in cells) + f"  {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
