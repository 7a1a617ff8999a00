"""The parts of bench/gpu.py that need the package: its report, the copy, the steps, launch parameters."""

from __future__ import annotations

import datetime
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from contenders import Tensors
from internals import launch_parameters, versions_here
from peers import OURS, PEERS, load, on
from tables import render
from turns import Timer, entry, measure, rounds
from workloads import BARE_LOOP, CEILING, REFERENCE, SMALL, Case, gpu_cases

import wd_kernels
from wd_kernels.turns import Contender, first_line

WAYS = ("device", "wall", "host")
MOST_OF_A_CASE = 15.0  # seconds; a hundredth in a rehearsal


def write(path: Path, text: str) -> None:
    """Whole or not at all, whenever this program is cut off."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)


def output_of(*arguments: str) -> str:
    """What a command prints, nothing where it fails."""
    try:
        here = Path(__file__).parent
        done = subprocess.run(arguments, cwd=here, check=True, capture_output=True, text=True, timeout=20)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> dict[str, Any]:
    """As pytest-benchmark notes it."""
    dirty = bool(output_of("git", "status", "--porcelain", "--untracked-files=no"))
    return {"id": output_of("git", "rev-parse", "HEAD") or "unknown", "dirty": dirty}


class Report:
    """What is known so far, kept on disk; its parts are those of pytest-benchmark's JSON, and more."""

    def __init__(self, out: Path, device: torch.device, name: str = "gpu") -> None:
        self.path = out / name
        machine: dict[str, Any] = {"device": "CPU", "driver": "none", "wd_kernels": versions_here()}
        if device.type != "cpu":
            properties = torch.cuda.get_device_properties(device)
            driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            machine |= {"device": str(properties.name), "memory": memory, "driver": driver}
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        self.values: dict[str, Any] = {"datetime": now, "commit_info": commit(), "machine_info": machine, "missing": {}}
        self.values |= {"rehearsal": device.type == "cpu", "finished": False, "left_out": {}, "benchmarks": []}

    def save(self) -> str:
        """Writes the JSON and the text; returns the text."""
        write(self.path.with_suffix(".json"), json.dumps(self.values, indent=1) + "\n")
        text = render(self.values)
        write(self.path.with_suffix(".txt"), text)
        return text

    def part(self, name: str, run: Callable[[], Any]) -> None:
        """Notes what a part gives, or how it failed."""
        try:
            self.values[name] = run()
        except Exception as error:
            self.values[name] = {"says": f"FAILED: {type(error).__name__}: {error}"}
        self.save()


def measure_steps(report: Report, device: torch.device, seconds: float, only: Sequence[str]) -> None:
    """Measures the cases, one after another, as long as there is time."""
    values = report.values
    peers, values["missing"] = load(on(device.type))
    timer = Timer(device, WAYS)
    timer.free()
    small = device.type == "cpu"
    cases = [*map(Case, SMALL)] if small else gpu_cases(torch.cuda.mem_get_info(device)[0])
    todo = [case for case in cases if not only or any(part in str(case) for part in only)]
    end = time.perf_counter() + seconds
    values["left_out"] = {str(case): {"all": "the time was over"} for case in todo}
    for k, case in enumerate(todo):
        started = time.perf_counter()
        if started >= end:
            break
        names = [who for who in case.stepping(list(peers)) if who[0] not in (REFERENCE, BARE_LOOP, CEILING)]
        share = min((end - started) / (len(todo) - k), MOST_OF_A_CASE / (100 if small else 1))
        try:
            entries, skipped = measure(case, peers, names, share, timer)
        except Exception as error:
            entries, skipped = [], {"all": f"FAILED: {first_line(error)}"}
        values["benchmarks"] += entries
        del values["left_out"][str(case)]
        values["left_out"] |= {str(case): skipped} if skipped else {}
        report.save()
        print(f"{case}: {time.perf_counter() - started:.1f} s", flush=True)


def copy_bandwidth(device: torch.device, size: int, rounds: int = 9, copies: int = 5) -> dict[str, Any]:
    """GB/s of device-to-device copies of `size` bytes, read and written bytes both counted, of each round."""
    timer = Timer(device, WAYS, 0)
    timer.cold = False
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)  # not zeros: they can run faster
    target = torch.empty_like(source)
    contender = Contender("copy", 1, 2, lambda: target.copy_(source))
    timer.device(contender, 2)
    return {"bytes": size, "gb_per_s": [2 * size / timer.device(contender, copies) / 1e9 for _ in range(rounds)]}


# Launch parameters of Triton: nothing is tuned at run time, the package has those that this shows to be best ----------

BUDGET = 400.0  # seconds
TUNED = [f"1x{size}-{dtype}-kept" for size, dtype in product((10**9, 10**7), ("float32", "bfloat16"))]
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


def tune(report: Report, device: torch.device, seconds: float) -> str:
    """Measures all variants on all cases, each a contender on one optimizer; the text of the report."""
    end, timer, small = time.perf_counter() + min(seconds, BUDGET), Timer(device, WAYS), device.type == "cpu"
    for k, text in enumerate(TUNED):
        case, skipped = Case(text.replace("00000-", "-") if small else text), dict[str, Any]()
        tensors, moved = Tensors.of(case, case.grad, device), PEERS[0].bytes_per_parameter(case.dtype, case.grad)
        optimizer = wd_kernels.AdamW(tensors.params, lr=1e-3, weight_decay=0.1)
        share = max(end - time.perf_counter(), 0.0) / (len(TUNED) - k) / (100 if small else 1)
        with launch_parameters(optimizer) as use:
            prepare = lru_cache(1)(lambda name, use=use: use(**VARIANTS[name]))  # does nothing for the same name again
            them = [Contender(name, 1, moved, optimizer.step, partial(prepare, name)) for name in VARIANTS]
            found = rounds(them, skipped, share, timer, case.elements)
        report.values["benchmarks"] += [entry(case, *one) for one in found]
        report.values["left_out"] |= {str(case): skipped} if skipped else {}
        report.save()
        del tensors, optimizer, use, prepare, them, found
        timer.free()
    report.values["finished"] = True
    return report.save()
