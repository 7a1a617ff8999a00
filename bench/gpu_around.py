"""What is around the measurements of bench/gpu.py: the build, the tests, files. It needs no package."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")
TESTS = (sys.executable, "-u", "-m", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider", "tests")
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def say(text: str) -> None:
    print(text, flush=True)


def write(path: Path, text: str) -> None:
    """Whole or not at all, whenever this program is cut off."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)


def command(arguments: Sequence[str], seconds: float, path: Path) -> int | None:
    """Runs it in the root folder, its output into a file; the exit status, None where it ran out of time."""
    path_of = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path_of, "PYTHONUNBUFFERED": "1"}
    with path.open("w") as output:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: itself and what it started
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def build(seconds: float, arguments: Sequence[str] = BUILD) -> dict[str, Any]:
    """Builds the native libraries in place."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output"
        status = command(arguments, seconds, path)
        lines = path.read_text(errors="replace").splitlines()
    took = time.perf_counter() - started
    without = [line.removeprefix("wd_kernels: installing ") for line in lines if ": installing without the " in line]
    if status == 0 and not any("native extension" in line for line in without):
        return {"status": 0, "says": ", ".join([f"done in {took:.0f} s", *without])}
    why = f"exit status {status}" if status is not None else f"cut off after {took:.0f} s"
    return {"status": status, "says": f"FAILED: {why}: {lines[-1] if lines else 'no output'}", "tail": lines[-30:]}


def run_tests(seconds: float, path: Path, arguments: Sequence[str] = TESTS) -> dict[str, Any]:
    """Runs the tests that need a GPU, their output into a file; counts what it says, also where it was cut off."""
    started = time.perf_counter()
    status = command(arguments, seconds, path)
    took = time.perf_counter() - started
    text = path.read_text(errors="replace")
    if len(text) > 8 << 20:
        write(path, text[: 1 << 20] + "\n\n(cut here)\n\n" + text[-(1 << 20) :])
    counts = count(text)
    says = ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n) or "no tests"
    says += f" in {took:.0f} s" + (", CUT OFF" if status is None else f", exit status {status}")
    return {"status": status, **counts, "says": says}


def count(output: str) -> dict[str, int]:
    """Outcomes in pytest's output: of its last line, or of the lines of the tests where it has none."""
    summary = re.compile(r"\d+ (passed|failed|errors?|skipped|deselected)\b.* in [\d.]+s")
    summaries = [line for line in output.splitlines() if summary.search(line)]
    if summaries:
        found = {word.removesuffix("s"): int(n) for n, word in re.findall(r"(\d+) ([a-z]+)", summaries[-1])}
    else:
        words = re.findall(r"::.*? (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", output)
        found = {outcome: sum(w[:5].lower() == outcome[:5] for w in words) for outcome in OUTCOMES}
    return {outcome: found.get(outcome, 0) for outcome in OUTCOMES}


def output_of(*arguments: str) -> str:
    """The first line that a command prints, or "unknown"."""
    try:
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().split("\n")[0] or "unknown"


def commit() -> dict[str, Any]:
    """As pytest-benchmark notes it."""
    dirty = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return {"id": output_of("git", "rev-parse", "HEAD"), "dirty": dirty != "unknown"}
