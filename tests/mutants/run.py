"""Does the suite find the faults of `faults.py`? Each is put into a copy of the working tree, alone, and the tests run.

First the hinted test files, with the default marks; then their slow tests and all other files, but what needs a GPU.
The first test that fails ends it. What does not compile or cannot be imported is no find, but a bad fault. The table is
written anew after each fault, and what it says already is not measured again, so a run may be interrupted.

    python tests/mutants/run.py                           # all (hours); `make mutants`
    python tests/mutants/run.py --hints-only              # all, by the hinted files alone (some hours)
    python tests/mutants/run.py --only 'walk: *' --again  # some, anew, by names or patterns
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from faults import FAULTS, Fault
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUT = ROOT / "build" / "mutants.txt"
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".hypothesis", ".benchmarks", ".*_cache", "__pycache__", "dist", "*.egg-info", "_cuda.*.so"
)
FOUND, SURVIVED, BAD = "found", "SURVIVED", "does not build"
COLORS = {FOUND: "green", SURVIVED: "red", BAD: "yellow"}
FIRST, SLOW, REST = "not slow and not gpu", "slow and not gpu", "not gpu"


@dataclass(frozen=True)
class Result:
    """What came of a fault: found (by which test), survived (which tests), or not a fault at all (why)."""

    name: str
    verdict: str
    seconds: float
    file: str
    by: str

    def cells(self) -> tuple[str, ...]:
        return self.verdict, f"{self.seconds:.0f} s", self.name, self.file, self.by


class Copy:
    """A copy of the working tree with a build of its own, whose package the tests import."""

    def __init__(self, folder: Path, pytest: Sequence[str], limit: float) -> None:
        self.root, self.pytest, self.limit = folder / "wd_kernels", list(pytest), limit
        self.log = folder / "log.txt"
        self.environment = {
            **os.environ, "PYTHONPATH": str(self.root), "WD_KERNELS_CUDA": "0", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        shutil.copytree(ROOT, self.root, ignore=LEFT_OUT)
        (self.root / ".venv").symlink_to(ROOT / ".venv")
        wrong = self.build() or self.imports()
        if wrong:
            raise SystemExit(f"the tree without any fault: {wrong}")

    def _run(self, command: Sequence[object], limit: float | None = None) -> tuple[int | None, str]:
        """Exit status (None: it took too long, and was ended with all that it had started) and output."""
        with self.log.open("w+", errors="replace") as log:
            process = subprocess.Popen(
                list(map(str, command)), cwd=self.root, env=self.environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            status: int | None = None
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if status is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            log.seek(0)
            return status, log.read()

    def build(self) -> str:
        """Builds what is out of date; why that fails, or ""."""
        native = self.root / "build" / "native"
        for command in (
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            [sys.executable, "-m", "ninja", "-C", native, native / "on_cpu.so"],
        ):
            status, output = self._run(command)
            if status:
                telling = [line for line in output.splitlines() if "error" in line.lower()]
                return (telling or output.splitlines()[-1:] or ["?"])[0].strip()
        return ""

    def imports(self) -> str:
        """Why the package of this copy cannot be imported, or "". Raises if another is."""
        for cached in (self.root / "wd_kernels").rglob("__pycache__"):
            shutil.rmtree(cached)
        status, output = self._run([sys.executable, "-c", "import wd_kernels.functional as f; print(f.__file__)"])
        if status:
            return (output.splitlines() or ["?"])[-1].strip()
        if Path(output.strip()).resolve().parent != (self.root / "wd_kernels").resolve():
            raise SystemExit(f"the tests would import {output.strip()}, not the package of {self.root}")
        return ""

    def files(self, beginnings: Sequence[str]) -> list[str]:
        """The test files whose names begin so, in this order; what begins like none of them is not there."""
        found = [file.name for name in beginnings for file in sorted((self.root / "tests").glob(f"test_{name}*.py"))]
        return [f"tests/{name}" for name in dict.fromkeys(found)]

    def fails(self, files: Sequence[str], marks: str) -> str:
        """The first test of these files that fails, "" if none does."""
        if not files:
            return ""
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)
        command = [sys.executable, "-m", "pytest", "-x", "-vv", "--tb=line", "-p", "no:cacheprovider", "-m", marks]
        status, output = self._run([*command, *self.pytest, *files], self.limit)
        if status in (0, 5):  # 5: no test has these marks
            return ""
        if status is None:
            return f"a hang in {_last_test(output)} (ended after {self.limit:.0f} s)"
        named = re.search(r"^(?:FAILED|ERROR) (\S+(?:.*?\])?)", output, re.MULTILINE)
        if named is None and status > 0:
            raise SystemExit(f"pytest ended with {status}:\n{output[-3000:]}")
        if named is not None:
            return named[1]
        name = signal.Signals(-status).name
        if name in ("SIGTERM", "SIGKILL", "SIGINT", "SIGHUP"):
            raise SystemExit(f"somebody ended pytest by {name}: nothing is known of this fault")
        return f"{name} in {_last_test(output)}"

    @contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        """The copy has the fault meanwhile."""
        path = self.root / fault.file
        right = path.read_text(encoding="utf-8")
        path.write_text(fault.applied(right), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(right, encoding="utf-8")

    def judge(self, fault: Fault, hints_only: bool, more: Sequence[str]) -> Result:
        """What the tests say of a fault."""
        begin = time.monotonic()

        def result(verdict: str, by: str) -> Result:
            return Result(fault.name, verdict, time.monotonic() - begin, fault.file, by)

        self.environment["WD_KERNELS_CUDA"] = "" if fault.of_nvcc else "0"
        with self.with_fault(fault):
            wrong = self._compiles(fault)
            if wrong:
                return result(BAD, wrong)
            hinted = self.files(fault.sees)
            rest = self.files(more) if more else [] if hints_only else self.files([""])
            rest = [file for file in rest if file not in hinted]
            rounds = [(hinted, FIRST)] + ([] if hints_only or more else [(hinted, SLOW)])
            rounds += [(rest, FIRST if more else REST)]
            for files, marks in rounds:
                test = self.fails(files, marks)
                if test:
                    return result(FOUND, test.removeprefix("tests/"))
        if hints_only or more:
            names = (Path(file).stem.removeprefix("test_") for file in [*hinted, *rest])
            return result(SURVIVED, f"the default tests of {' '.join(names)}")
        return result(SURVIVED, "all tests that need no GPU")

    def _compiles(self, fault: Fault) -> str:
        """Why a fault is none, or ""."""
        if fault.file.endswith(".py"):
            try:
                ast.parse((self.root / fault.file).read_text(encoding="utf-8"))
            except SyntaxError as error:
                return str(error)
        return self.build() or self.imports()


def _last_test(output: str) -> str:
    """The test that ran last, as `pytest -vv` names it when it begins."""
    begun = re.findall(r"^(?:tests/)?(\S+::\S+(?:.*?\])?)", output, re.MULTILINE)
    return begun[-1] if begun else "the start"


def table(results: Sequence[Result]) -> str:
    """The results as aligned text, and how many there are of which kind."""
    rows = [("result", "time", "fault", "file", "found by, or survived"), *(r.cells() for r in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join([*lines, "", _count(results), ""])


def _count(results: Sequence[Result]) -> str:
    counts = Counter(r.verdict for r in results)
    return f"{len(results)} faults: {counts[FOUND]} found, {counts[SURVIVED]} survived, {counts[BAD]} do not build"


def known(output: Path) -> dict[str, Result]:
    """The results that a table holds."""
    found: dict[str, Result] = {}
    for line in output.read_text(encoding="utf-8").splitlines() if output.exists() else ():
        cells = [cell.strip() for cell in line.split(" | ", 4)]
        if len(cells) == 5 and cells[0] in COLORS:
            verdict, seconds, name, file, by = cells
            found[name] = Result(name, verdict, float(seconds.removesuffix(" s")), file, by)
    return found


def main() -> int:
    """0 if every fault was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults by name, pattern or file")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the table (default: build/mutants.txt)")
    parser.add_argument("--again", action="store_true", help="run what the table has too")
    parser.add_argument("--survivors", action="store_true", help="run what has survived again")
    parser.add_argument("--hints-only", action="store_true", help="the hinted test files alone")
    parser.add_argument("--more", nargs="+", default=[], metavar="NAME", help="beside them these, not all")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one run of pytest")
    parser.add_argument("--pytest-args", default="", help="handed on, such as '-n 2'")
    options = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as for ^C: nothing goes on alone, no folder stays

    for fault in FAULTS:
        fault.check(ROOT)
    results = known(options.output)
    patterns = options.only or ["*"]
    wanted = [f for f in FAULTS if any(fnmatchcase(f.name, p) or fnmatchcase(f.file, p) for p in patterns)]
    if not wanted:
        raise SystemExit(f"--only {' '.join(patterns)}: no fault has such a name or file")
    todo = [
        f for f in wanted
        if options.again or f.name not in results or (options.survivors and results[f.name].verdict != FOUND)
    ]  # fmt: skip
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("builds", total=len(todo))
        copy = Copy(Path(folder), options.pytest_args.split(), options.limit) if todo else None
        for fault in todo:
            assert copy is not None
            progress.update(task, description=fault.name)
            found = results[fault.name] = copy.judge(fault, options.hints_only, options.more)
            ordered = [results[f.name] for f in FAULTS if f.name in results]
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(table(ordered), encoding="utf-8")
            color, seconds = COLORS[found.verdict], f"{found.seconds:4.0f} s"
            console.print(f"[{color}]{found.verdict:>8}[/] {seconds}  [bold]{fault.name}[/]")
            console.print(f"                 {found.by}", style="dim", markup=False, highlight=False)
            progress.advance(task)
    ours = [results[f.name] for f in wanted if f.name in results]
    console.print(f"{_count(ours)}; the table is {options.output}")
    return int(any(r.verdict != FOUND for r in ours))


if __name__ == "__main__":
    sys.exit(main())
