"""Times launch parameters of the Triton backend, in turns in one run: `python bench/gpu.py --out DIR --only tune`.

Nothing is tuned at run time: the package's constants are what this table shows to be best. A variant is those constants
replaced for the time of its turn.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from contenders import Contender
from gpu_around import say, write
from gpu_parts import about
from internals import aligned, launch_parameters
from peers import first_line
from turns import Timer

from wd_kernels import AdamW

ROUNDS, STEPS, BUDGET = 7, 4, 400.0
#: Elements and dtype of the tensor that is stepped.
PROBLEMS = tuple(product((10**9, 10**7), (torch.float32, torch.bfloat16)))
OWN = "as it is"
#: What internals.launch_parameters takes.
VARIANTS: dict[str, dict[str, int]] = {
    " ".join(f"{name}={value}" for name, value in own.items()) or OWN: own
    for own in (
        {},
        *({"warps": warps, "block": block} for warps, block in product((4, 8), (512, 1024, 2048))),
        *({"warps": w, "block": b, "registers": 0} for w, b in product((4, 8), (512, 1024, 2048))),
        *({"registers": n} for n in (64, 72, 80, 96, 128)),
        *({"longest": longest << 10} for longest in (4, 8, 32, 64)),
        *({"per_processor": n} for n in (8, 16, 64)),
    )
}


def time_problem(size: int, dtype: torch.dtype, device: torch.device, end: float) -> dict[str, Any]:
    """Seconds per step of every variant and round, on one optimizer; and why others failed."""
    timer = Timer(device)
    timer.cold = size < 10**8
    p = torch.nn.Parameter(torch.randn(size, dtype=dtype, device=device))
    p.grad = torch.randn_like(p)
    optimizer = AdamW([p], lr=1e-3, weight_decay=0.1)
    contender = Contender("wd_kernels", 1, 0, optimizer.step)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    failed: dict[str, str] = {}
    for k in range(ROUNDS + 1):  # the first round compiles, and does not count
        for name in list(seconds):
            if time.perf_counter() > end:
                break
            try:
                with launch_parameters(optimizer, **VARIANTS[name]):
                    timer.host(contender, 2)
                    contender.host = timer.host(contender, 1)
                    taken = timer.device(contender, STEPS)
            except Exception as error:
                failed[name] = first_line(error)
                del seconds[name]
                continue
            if k:
                seconds[name].append(taken)
    timer.free()
    found = {name: own for name, own in seconds.items() if own}
    return {"elements": size, "dtype": str(dtype).removeprefix("torch."), "seconds": found, "failed": failed}


def best_first(problems: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """A row per variant: median ms of each problem, and how many times as long as with the package's own parameters."""
    rows: list[tuple[object, ...]] = []
    for name in dict.fromkeys(name for problem in problems for name in problem["seconds"]):
        cells = []
        for problem in problems:
            own, base = (statistics.median(problem["seconds"].get(n, [0])) for n in (name, OWN))
            cells += [f"{own * 1e3:.3f}" if own else "-", f"{own / base:.3f}" if own and base else "-"]
        rows.append((name, *cells))
    rows.sort(key=lambda row: float(str(row[1])) if row[1] != "-" else float("inf"))
    head = [cell for problem in problems for cell in (f"{problem['elements']:.0e} {problem['dtype']}, ms", "x")]
    return [("variant", *head), *rows]


def tune(out: Path, device: torch.device, small: bool, seconds: float, show: Callable[[str], None] = say) -> None:
    """Times all variants on all problems; writes DIR/tune.json after each problem, prints the table last."""
    started, budget = time.perf_counter(), min(seconds, BUDGET)
    report: dict[str, Any] = {"machine": about(device), "rehearsal": device.type == "cpu", "problems": []}
    for k, (size, dtype) in enumerate(PROBLEMS):
        end = started + budget * (k + 1) / len(PROBLEMS)
        problem = time_problem(size // 10**5 if small else size, dtype, device, end)
        report["problems"].append(problem)
        write(out / "tune.json", json.dumps(report, indent=1) + "\n")
        show(f"{problem['elements']} elements of {problem['dtype']}: {time.perf_counter() - started:.0f} s so far")
    show("\n" + aligned(best_first(report["problems"]), indent=""))
    for problem in report["problems"]:
        for name, why in problem["failed"].items():
            show(f"{name}, {problem['elements']} elements of {problem['dtype']}: FAILED: {why}")
    if report["rehearsal"]:
        show("A REHEARSAL on the CPU, whose steps know none of these parameters: it checks the program alone.")
