"""Options of the suite, what its JSON says of the machine, and one measurement per case for all its contenders."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ceiling import why_not
from cpu_cases import CASES, CEILING, FLAT, Case
from peers import load, on
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from turns import ROUNDS, Turns, measure

import wd_kernels
from wd_kernels.__main__ import choices, versions

# Peers compile with this environment's ninja, and without a pool of processes that would stay.
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
peers = cache(lambda: load(on("cpu")))
#: Why contenders have no turns, by case and name.
left_out: dict[str, dict[str, str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("wd_kernels")
    group.addoption(
        "--case",
        action="append",
        default=[],
        metavar="CASE",
        help="a case to measure, such as 300x100000-float32-new; may be repeated (default: all that the suite has)",
    )
    group.addoption(
        "--contender",
        action="append",
        default=[],
        metavar="NAME",
        help="a contender, such as 'torch fused'; may be repeated; the ceiling takes part always (default: all)",
    )
    group.addoption("--seconds", type=float, default=8.0, help="how long a case is measured, about (default: 8)")


def names(config: pytest.Config, case: Case) -> list[tuple[str, int]]:
    """The contenders of a case, by (name, groups)."""
    there = [peer.name for peer in peers()[0] if peer.rule == case.rule and case.dtype in peer.dtypes]
    wanted = config.getoption("--contender")
    every = case.contenders(there)
    return [(name, groups) for name, groups in every if not wanted or name in wanted or name == CEILING]


def all_cases(config: pytest.Config) -> list[Case]:
    return [Case.parse(text) for text in config.getoption("--case")] or CASES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contender of each case."""
    if "contender" in metafunc.fixturenames:
        config = metafunc.config
        tests = [(str(case), name, n) for case in all_cases(config) for name, n in names(config, case)]
        metafunc.parametrize(("case", "contender", "groups"), tests)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], Any]]:
    """Gives a case's turns by (name, groups), and who was skipped; a case is measured once, then it is gone."""
    uncaptured = request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled
    seconds = request.config.getoption("--seconds")
    cases = all_cases(request.config)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    # Drawn between rounds only: no thread of its own takes time from the contenders.
    with uncaptured():
        console = Console(stderr=True)
        progress = Progress(
            *columns,
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        bar = progress.add_task("", total=len(cases))
        progress.start()

    def show(done: float, text: str) -> None:
        with uncaptured():
            progress.update(bar, completed=done, description=text, refresh=True)

    @cache
    def turns_of(case: Case) -> tuple[dict[tuple[str, int], Turns], dict[str, str]]:
        number = cases.index(case)
        rounds = 0

        def tick() -> None:
            nonlocal rounds
            rounds += 1
            show(number + rounds / ROUNDS, f"{number + 1} of {len(cases)}: {case}")

        show(number, f"{number + 1} of {len(cases)}: {case}")
        turns, skipped = measure(case, peers()[0], names(request.config, case), seconds, tick)
        if skipped:
            left_out[str(case)] = skipped
        return {(t.contender, t.groups): t for t in turns}, skipped

    yield turns_of
    with uncaptured():
        progress.stop()


def missing() -> dict[str, str]:
    """Who is not there at all, and why."""
    found = dict(peers()[1])
    found |= {f"{peer.name} {peer.path.split(':')[1]}": "it steps GPU tensors only" for peer in on("cuda")
              if "cpu" not in peer.devices}  # fmt: skip
    if not hasattr(wd_kernels, "flatten_"):
        found[FLAT] = "this version has no wd_kernels.flatten_"
    why = why_not()
    if why is not None:
        found[CEILING] = why
    return found


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What decides the numbers, and not the host's name."""
    machine_info["node"] = ""
    machine_info["wd_kernels"] = dict([*versions(), *choices()])


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Who is not in it."""
    output_json["missing"] = missing()
    output_json["left_out"] = left_out


def pytest_benchmark_group_stats(config: pytest.Config, benchmarks: list[Any], group_by: str) -> list[Any]:
    """No table of pytest-benchmark's: bench/report.py prints one with rates and ratios from the JSON."""
    return []
