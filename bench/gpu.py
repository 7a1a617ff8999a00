"""Builds, tests and measures wd_kernels on a machine with a GPU, in one command and under nine minutes.

    python bench/gpu.py --out DIR                                    # all of it
    python bench/gpu.py --out DIR --only copy,steps --case GPT-2     # parts, and cases by a part of their name
    python bench/gpu.py --out DIR --only tune                        # launch parameters, into DIR/tune.json
    python bench/gpu.py --out DIR --from DIR/gpu.json                # the tables and plots of a report again
    python bench/gpu.py --out DIR --device cpu --scale small         # a rehearsal of this program, without a GPU

DIR then has gpu.json (everything, written after every case), gpu.txt (the tables), tests.txt, peers.png, roofline.png.
Each part has a budget of time; what fails is said in the report and ends nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_around import ROOT, about, build, commit, run_tests, say, write

sys.path.insert(0, str(ROOT))  # nothing need be installed; the package is imported after the build

PARTS = ("build", "tests", "copy", "launches", "steps", "plots")
SECONDS = {"build": 100.0, "tests": 220.0, "steps": 200.0}
MOST_OF_A_CASE = {"full": 15.0, "small": 0.1}


class Report:
    """What is known so far, kept on disk."""

    def __init__(self, out: Path, rehearsal: bool) -> None:
        self.out = out
        now = datetime.datetime.now(datetime.timezone.utc)
        self.values: dict[str, Any] = {
            "date": now.strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(),
            "rehearsal": rehearsal,
            "finished": False,
            "machine": {},
        }

    def save(self) -> str:
        """Writes the JSON and the text; returns the text."""
        from gpu_report import render

        write(self.out / "gpu.json", json.dumps(self.values, indent=1) + "\n")
        text = render(self.values)
        write(self.out / "gpu.txt", text)
        return text

    def part(self, name: str, run: Callable[[], Any]) -> None:
        """Notes what a part gives, or how it failed."""
        try:
            self.values[name] = run()
        except Exception as error:
            self.values[name] = {"says": f"FAILED: {type(error).__name__}: {error}"}
        self.save()


def measure_steps(report: Report, device: torch.device, scale: str, seconds: float, only: Sequence[str]) -> None:
    """Measures the cases, one after another, as long as there is time."""
    from gpu_cases import cases
    from gpu_measure import Timer, measure
    from peers import always_there, first_line, load, on

    peers, missing = load(always_there() if device.type == "cpu" else on("cuda"))
    timer = Timer(device)
    timer.free()
    free = 0 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    todo = [case for case in cases(scale, free) if not only or any(part in case.name for part in only)]
    end = time.perf_counter() + seconds
    values = report.values
    values.update(missing=missing, cases=[], left_out=[case.name for case in todo])
    for k, case in enumerate(todo):
        left = end - time.perf_counter()
        if left <= 0:
            break
        started = time.perf_counter()
        try:
            done = measure(case, peers, timer, device, min(left / (len(todo) - k), MOST_OF_A_CASE[scale]))
        except Exception as error:
            values.setdefault("errors", {})[case.name] = first_line(error)
            timer.free()
        else:
            values["cases"].append(done)
        values["left_out"].remove(case.name)
        report.save()
        say(f"{case.name}: {time.perf_counter() - started:.1f} s")


def draw(values: dict[str, Any], out: Path) -> None:
    try:
        from gpu_plots import plot

        for path in plot(values, out):
            say(f"plot: {path}")
    except ImportError as error:
        say(f"no plots: {error}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts: {','.join(PARTS)} (default: all), or tune")
    parser.add_argument("--case", action="append", default=[], help="cases whose name has this in it; may be repeated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="small: tiny tensors")
    parser.add_argument("--minutes", type=float, default=8.8, help="for everything (default: 8.8)")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="render a report again, nothing else")
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.only.split(",")
    unknown = set(arguments.parts) - {*PARTS, "tune"}
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: allowed are {', '.join((*PARTS, 'tune'))}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts, prints the tables last; returns the exit status."""
    started = time.perf_counter()
    arguments = parse(argv)
    end: float = started + 60 * arguments.minutes
    out, parts = arguments.out, arguments.parts
    if arguments.source is None and arguments.device == "cuda" and not torch.cuda.is_available():
        print("No GPU is there; --device cpu --scale small rehearses this program without one.", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    if arguments.source is not None:
        from gpu_report import render

        values = json.loads(arguments.source.read_text())
        draw(values, out)
        write(out / "gpu.txt", render(values))
        say(render(values))
        return 0

    def left(part: str) -> float:
        """Seconds for a part, some kept for the plots."""
        return max(min(SECONDS.get(part, 60.0), end - time.perf_counter() - 20), 0.0)

    small = arguments.scale == "small"
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # the tensors are small
    built = build(left("build")) if "build" in parts else None  # before anything imports the package
    if "tune" in parts:
        from gpu_tune import tune

        tune(out, device, small, end - time.perf_counter())
        return 0
    report = Report(out, device.type == "cpu")
    report.values["machine"] = about(device)
    if built is not None:
        report.values["build"] = built
    report.save()
    if "tests" in parts:
        report.part("tests", lambda: run_tests(left("tests"), out / "tests.txt"))
    if "copy" in parts:
        from gpu_measure import copy_bandwidth

        report.part("copy", lambda: copy_bandwidth(device, 1 << 20 if small else 4 << 30))
    if "launches" in parts:
        from gpu_cases import gpt2
        from gpu_measure import launches

        import wd_kernels

        report.part("launches", lambda: launches(wd_kernels.AdamW, device, gpt2(2, 32, 101, 16) if small else gpt2()))
    if "steps" in parts:
        measure_steps(report, device, arguments.scale, left("steps"), arguments.case)
    report.values["finished"] = True
    text = report.save()
    if "plots" in parts:
        draw(report.values, out)
    say("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
