"""Times launch parameters of the Triton backend, in turns in one run: `python bench/gpu.py --out DIR --only tune`.

Nothing is tuned at run time: the package's constants are what this shows to be best. A variant is a contender that
steps with those constants replaced; the package's own are called wd_kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from contenders import Contender, Tensors
from gpu_parts import WAYS, Report
from internals import launch_parameters
from peers import OURS, PEERS
from turns import Timer, entry, rounds
from workloads import Case

from wd_kernels import AdamW

BUDGET = 400.0
CASES = [f"1x{size}-{dtype}-kept" for size, dtype in product((10**9, 10**7), ("float32", "bfloat16"))]
#: What internals.launch_parameters takes.
VARIANTS: dict[str, dict[str, int]] = {
    " ".join(f"{name}={value}" for name, value in own.items()) or OURS: own
    for own in (
        {},
        *({"warps": warps, "block": block} for warps, block in product((4, 8), (512, 1024, 2048))),
        *({"warps": w, "block": b, "registers": 0} for w, b in product((4, 8), (512, 1024, 2048))),
        *({"registers": n} for n in (64, 72, 80, 96, 128)),
        *({"longest": longest << 10} for longest in (4, 8, 32, 64)),
        *({"per_processor": n} for n in (8, 16, 64)),
    )
}


def variants(case: Case, optimizer: AdamW, use: Callable[..., None]) -> list[Contender]:
    """A contender for each, on one optimizer: before another's turn its parameters are set."""
    active: list[str] = []

    def prepare(name: str) -> None:
        if active != [name]:
            active[:] = [name]
            use(**VARIANTS[name])

    moved = PEERS[0].bytes_per_parameter(case.dtype, case.grad)
    return [Contender(name, 1, moved, optimizer.step, partial(prepare, name)) for name in VARIANTS]


def tune(report: Report, device: torch.device, small: bool, seconds: float) -> str:
    """Measures all variants on all cases; the text of the report."""
    end, timer = time.perf_counter() + min(seconds, BUDGET), Timer(device, WAYS)
    for k, text in enumerate(CASES):
        case, skipped = Case(text.replace("00000-", "-") if small else text), dict[str, Any]()
        tensors = Tensors.of(case, case.grad, device)
        optimizer = AdamW(tensors.params, lr=1e-3, weight_decay=0.1)
        share = max(end - time.perf_counter(), 0.0) / (len(CASES) - k) / (100 if small else 1)
        with launch_parameters(optimizer) as use:
            found = rounds(case, variants(case, optimizer, use), skipped, share, timer)
        report.values["benchmarks"] += [entry(case, *one) for one in found]
        report.values["left_out"] |= {str(case): skipped} if skipped else {}
        report.save()
        del tensors, optimizer, use, found
        timer.free()
    report.values["finished"] = True
    return report.save()
