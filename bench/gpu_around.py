"""What is around the measurements of bench/gpu.py: the build, the tests, files. It needs no package."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")
TESTS = (sys.executable, "-u", "-m", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider", "tests")


def say(text: str) -> None:
    print(text, flush=True)


def write(path: Path, text: str) -> None:
    """Whole or not at all, whenever this program is cut off."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)


def run(arguments: Sequence[str], seconds: float, path: Path) -> tuple[int | None, str, str]:
    """Runs it in the root folder, its output into a file; exit status (None: cut off), that in words, its output."""
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    status, started = None, time.perf_counter()
    with path.open("w") as output:
        streams: Any = {"stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(arguments, cwd=ROOT, env=env, start_new_session=True, **streams)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
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


def output_of(*arguments: str) -> str:
    """What a command prints, nothing where it fails."""
    try:
        return subprocess.check_output(arguments, cwd=ROOT, text=True, timeout=20, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> dict[str, Any]:
    """As pytest-benchmark notes it."""
    dirty = bool(output_of("git", "status", "--porcelain", "--untracked-files=no"))
    return {"id": output_of("git", "rev-parse", "HEAD") or "unknown", "dirty": dirty}
