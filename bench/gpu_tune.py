"""Times launch parameters of the Triton backend, in turns in one run: `python bench/gpu.py --out DIR --only tune`.

Nothing is tuned at run time: the constants of wd_kernels/backends/triton.py and wd_kernels/mirror.py are what this
table shows to be best. A variant is those constants replaced for the time of its turn.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_around import about, say, write
from gpu_measure import Contender, Timer
from peers import first_line

from wd_kernels import AdamW
from wd_kernels.backends import device_copy
from wd_kernels.__main__ import aligned
from wd_kernels.backends import triton as backend

__all__ = ["PROBLEMS", "VARIANTS", "Variant", "best_first", "patched", "tune"]

ROUNDS, STEPS, BUDGET = 7, 4, 400.0
#: Elements and dtype of the tensor that is stepped.
PROBLEMS = tuple(product((10**9, 10**7), (torch.float32, torch.bfloat16)))


@dataclass(frozen=True)
class Variant:
    """Launch parameters; None leaves what the package has.

    Attributes:
        registers: the most that a thread may have (maxnreg); 0: no limit.
        longest: elements of the longest chunk.
        per_processor: chunks wanted for each processor.
    """

    warps: int | None = None
    block: int | None = None
    registers: int | None = None
    longest: int | None = None
    per_processor: int | None = None

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if value is not None) or "as it is"


VARIANTS = (
    Variant(),
    *(Variant(*own) for own in product((4, 8), (512, 1024, 2048), (None, 0))),
    *(Variant(registers=n) for n in (64, 72, 80, 96, 128)),
    *(Variant(longest=longest << 10) for longest in (4, 8, 32, 64)),
    *(Variant(per_processor=n) for n in (8, 16, 64)),
)


@contextmanager
def patched(variant: Variant) -> Iterator[None]:
    """The package with a variant's launch parameters."""
    block, options = backend.block, backend.options

    def own_block(formats: tuple[Any, ...]) -> int:
        return variant.block or block(formats)

    def own_options(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        how = options(*arguments, **keywords)
        how["num_warps"] = variant.warps or how["num_warps"]
        how["maxnreg"] = how.get("maxnreg") if variant.registers is None else variant.registers
        if not how["maxnreg"]:
            del how["maxnreg"]
        return how

    launch: dict[str, Any] = {"block": own_block, "options": own_options}
    chunks: dict[str, Any] = {
        "LONGEST": variant.longest or device_copy.LONGEST,
        "PER_PROCESSOR": variant.per_processor or device_copy.PER_PROCESSOR,
    }
    with mock.patch.multiple(backend, **launch), mock.patch.multiple(mirror, **chunks):
        yield


def time_problem(size: int, dtype: torch.dtype, device: torch.device, end: float) -> dict[str, Any]:
    """Seconds per step of every variant and round, on one optimizer; and why others failed."""
    timer = Timer(device)
    p = torch.nn.Parameter(torch.randn(size, dtype=dtype, device=device))
    p.grad = torch.randn_like(p)
    optimizer = AdamW([p], lr=1e-3, weight_decay=0.1)
    contender = Contender("wd_kernels", 1, 0, dtype, None, optimizer.step)
    cold = size < 10**8
    seconds: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    failed: dict[str, str] = {}
    for k in range(ROUNDS + 1):  # the first round compiles, and does not count
        for variant in list(seconds):
            if time.perf_counter() > end:
                break
            with patched(variant):
                optimizer._table.mirrors.clear()  # they hold chunks
                try:
                    timer.host(contender, 2)
                    contender.host = timer.host(contender, 1)
                    taken = timer.device(contender, STEPS, cold)
                except Exception as error:
                    failed[str(variant)] = first_line(error)
                    del seconds[variant]
                    continue
            if k:
                seconds[variant].append(taken)
    timer.free()
    return {
        "elements": size,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {str(variant): own for variant, own in seconds.items() if own},
        "failed": failed,
    }


def best_first(problems: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """A row per variant: median ms of each problem, and how many times as long as with the package's own parameters."""
    rows: list[tuple[object, ...]] = []
    names = dict.fromkeys(name for problem in problems for name in problem["seconds"])
    for name in names:
        cells: list[str] = []
        for problem in problems:
            own, base = problem["seconds"].get(name), problem["seconds"].get(str(Variant()))
            if own:
                median = statistics.median(own)
                cells += [f"{median * 1e3:.3f}", f"{median / statistics.median(base):.3f}" if base else "-"]
            else:
                cells += ["-", "-"]
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
