"""Builds, tests and measures wd_kernels on a machine with a GPU, in one command and under nine minutes.

    python bench/gpu.py --out DIR                                    # all of it
    python bench/gpu.py --out DIR --only copy,steps --case gpt2      # parts, and cases by a part of their name
    python bench/gpu.py --out DIR --only tune                        # launch parameters, into DIR/tune.json and .txt
    python bench/gpu.py --out DIR --rehearse                         # on the CPU with tiny tensors

DIR then has gpu.json (everything, written after every case), gpu.txt (the tables), tests.txt, clipping.txt,
accumulation.txt, averages.txt, watching.txt and peers.png. Each part has a budget of time; what fails is said in the
report and ends nothing else.
bench/report.py keeps gpu.json.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # nothing need be installed; the package is imported after the build

BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")
TESTS = (sys.executable, "-u", "-m", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider", "tests")
PROGRAMS = ("clipping", "accumulation", "averages", "watching")  # that print a table
PARTS = ("build", "tests", "copy", *PROGRAMS, "steps", "plots")
SECONDS = {
    "build": 100.0,
    "tests": 220.0,
    "clipping": 50.0,
    "accumulation": 20.0,
    "averages": 25.0,
    "watching": 25.0,
    "steps": 200.0,
}


def run(arguments: Sequence[str], seconds: float, path: Path) -> tuple[int | None, str, str]:
    """Runs it in the root folder, its output into a file; exit status (None: cut off), that in words, its output."""
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    status, started = None, time.perf_counter()
    with path.open("w") as output:
        streams: Any = {"stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(arguments, cwd=ROOT, env=env, start_new_session=True, **streams)
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(seconds)
        finally:
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: itself and what it started
                process.wait()
    how = "CUT OFF" if status is None else f"exit status {status}"
    return status, f"{how} after {time.perf_counter() - started:.0f} s", path.read_text(errors="replace")


def build(seconds: float, arguments: Sequence[str] = BUILD) -> dict[str, Any]:
    """Builds the native libraries in place."""
    with tempfile.TemporaryDirectory() as folder:
        status, how, text = run(arguments, seconds, Path(folder) / "output")
    lines = text.splitlines()
    without = [line.removeprefix("wd_kernels: installing ") for line in lines if ": installing without the " in line]
    if status == 0 and not any("native extension" in line for line in without):
        return {"says": ", ".join([how, *without])}
    return {"says": f"FAILED: {how}: {lines[-1] if lines else 'no output'}", "tail": lines[-30:]}


def run_tests(seconds: float, path: Path, arguments: Sequence[str] = TESTS) -> dict[str, Any]:
    """Runs the tests that need a GPU, their output into a file; counts what it says, also where it was cut off."""
    _, how, text = run(arguments, seconds, path)
    counts = Counter(re.findall(r"::.*? (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", text))
    says = [f"{n} {outcome.lower()}" for outcome, n in counts.items()] or ["no tests"]
    return {**counts, "says": ", ".join([*says, how])}


def measure(name: str, seconds: float, path: Path, rehearse: bool) -> dict[str, Any]:
    """What a program beside this one measures; its table into a file."""
    how = ("--rehearse",) if rehearse else ("--device", "cuda")
    status, says, text = run((sys.executable, "-u", f"bench/{name}.py", *how), seconds, path)
    return {"says": says if status == 0 else f"FAILED: {says}: {(text.splitlines() or ['no output'])[-1]}"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts, prints the tables last; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts: {','.join(PARTS)} (default: all), or tune")
    parser.add_argument("--case", action="append", default=[], help="cases whose name has this in it; may be repeated")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with tiny tensors: it checks this program")
    parser.add_argument("--minutes", type=float, default=8.8, help="for everything (default: 8.8)")
    arguments = parser.parse_args(argv)
    end: float = time.perf_counter() + 60 * arguments.minutes
    asked, out = arguments.only.split(","), arguments.out
    if not {*asked} <= {*PARTS, "tune"}:
        parser.error(f"--only {arguments.only}: allowed are {', '.join((*PARTS, 'tune'))}")
    if not arguments.rehearse and not torch.cuda.is_available():
        print("No GPU is there; --rehearse runs this program without one.", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    torch.set_num_threads(1 if arguments.rehearse else torch.get_num_threads())  # the tensors are small
    out.mkdir(parents=True, exist_ok=True)

    def left(part: str) -> float:
        """Seconds for a part, some kept for the plots."""
        return max(min(SECONDS.get(part, 60.0), end - time.perf_counter() - 20), 0.0)

    built = build(left("build")) if "build" in asked else {}
    import gpu_parts  # which imports the package

    if "tune" in asked:
        print(gpu_parts.tune(gpu_parts.Report(out, device, "tune"), device, end - time.perf_counter()))
        return 0
    report = gpu_parts.Report(out, device)

    def measured(name: str) -> dict[str, Any]:
        return measure(name, left(name), out / f"{name}.txt", arguments.rehearse)

    parts: dict[str, Callable[[], Any]] = {
        "build": lambda: built,
        "tests": lambda: run_tests(left("tests"), out / "tests.txt"),
        **{own: partial(measured, own) for own in PROGRAMS},
        "copy": lambda: gpu_parts.copy_bandwidth(device, 1 << 20 if arguments.rehearse else 4 << 30),
    }
    for part in (part for part in parts if part in asked):
        report.part(part, parts[part])
    if "steps" in asked:
        gpu_parts.measure_steps(report, device, left("steps"), arguments.case)
    report.values["finished"] = True
    text = report.save()
    if "plots" in asked:
        try:
            from plots import plot

            print(f"plots: {', '.join(map(str, plot(report.values, out)))}")
        except ImportError as error:
            print(f"no plots: {error}")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
