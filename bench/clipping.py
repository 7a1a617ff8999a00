"""Clipping by the norm of all gradients and a step: ours, in the step, and torch's two calls, in turns. Prints a table.

python bench/clipping.py [> bench/results/clipping.txt]
python bench/clipping.py --device cuda [> bench/results/clipping-gpu.txt]     # and both in CUDA graphs

Bytes of an AdamW step in float32: 28 an element; ours reads the gradients once more (32), torch's clip_grad_norm_ also
rewrites them (40).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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


def parameters(tensors: int, elements: int, dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(elements, device=device).to(dtype)) for _ in range(tensors)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def sides(make: Callable[[], list[torch.nn.Parameter]], graphs: bool) -> dict[str, Callable[[], object]]:
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "capturable": graphs}
    theirs = make()
    torchs = torch.optim.AdamW(theirs, fused=True, **options)
    clipping = wd_kernels.AdamW(make(), max_grad_norm=MAX_NORM, **options)
    plain = wd_kernels.AdamW(make(), **options)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, MAX_NORM)
        torchs.step()

    found: dict[str, Callable[[], object]] = {
        "torch": clip_and_step, "ours": clipping.step, "torch, step": torchs.step, "ours, step": plain.step,
    }  # fmt: skip
    if graphs:
        found |= {"torch, graph": captured(clip_and_step), "ours, graph": captured(clipping.step)}
    return found


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of a step, after some outside of it."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(step: Callable[[], object], device: str) -> float:
    """Of one step; on a GPU of several, until the last one is done."""
    steps = 10 if device == "cuda" else 1
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """The quartiles of the milliseconds of each, measured one after another in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for t in range(rounds + 2):
        for name, call in calls.items():
            times[name] += [1e3 * seconds(call, device)] * (t >= 2)
    return {name: statistics.quantiles(own, n=4) for name, own in times.items()}


def row(tensors: int, elements: int, dtype: torch.dtype, quartiles: Mapping[str, Sequence[float]]) -> str:
    """The first columns of a table: the case, and what was measured of it."""
    size = f"{elements >> 20}Mi" if elements % (1 << 20) == 0 else str(elements)
    cells = [f"{q[1]:.3g} ({q[0]:.3g} to {q[2]:.3g})" for q in quartiles.values()]
    kind = str(dtype).removeprefix("torch.")
    return f"{f'{tensors} x {size}':>14}  {kind:<9}  " + "  ".join(f"{cell:>22}" for cell in cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="tiny tensors, few rounds: it checks this program")
    arguments = parser.parse_args(argv)
    device, graphs = arguments.device, arguments.device == "cuda"
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    where = f"; {torch.cuda.get_device_name()}" if graphs else ""
    print(f"{date.today()}; {versions}{where}\nAdamW, median ms (quartiles): clip and step, and a step alone\n")
    names = ["torch", "ours", "torch, step", "ours, step", *(["torch, graph", "ours, graph"] if graphs else [])]
    print(f"{'tensors':>14}  {'':<9}  " + "  ".join(f"{name:>22}" for name in names) + "  clip and step, torch / ours")
    for (tensors, elements, dtype), most in CASES.items():
        rounds = 2 if arguments.rehearse else most
        elements = min(elements, 100) if arguments.rehearse else elements
        own = sides(partial(parameters, tensors, elements, dtype, device), graphs)
        quartiles = in_turns({name: own[name] for name in names}, rounds, device)
        ratio = quartiles["torch"][1] / quartiles["ours"][1]
        print(f"{row(tensors, elements, dtype, quartiles)}  {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
