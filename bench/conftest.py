"""Options of the suite, what its JSON says of the machine, and one measurement per case for all its contenders."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from turns import CASES, ROUNDS, Case, Turns, measure

from wd_kernels.__main__ import choices, versions


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("wd_kernels")
    group.addoption(
        "--case",
        action="append",
        default=[],
        metavar="CASE",
        help="a case to measure, such as 300x100000-float32-new; may be repeated (default: all that the suite has)",
    )
    group.addoption("--seconds", type=float, default=10.0, help="how long a case is measured, about (default: 10)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contender of each case."""
    if "contender" in metafunc.fixturenames:
        cases = [Case.parse(text) for text in metafunc.config.getoption("--case")] or CASES
        tests = [(str(case), name, n) for case in cases for name, n in case.contenders]
        metafunc.parametrize(("case", "contender", "groups"), tests)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Case], dict[tuple[str, int], Turns]]:
    """Gives the turns of a case's contenders, by (name, groups). A case is measured once; its tensors are gone then."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    seconds = request.config.getoption("--seconds")

    @cache
    def turns_of(case: Case) -> dict[tuple[str, int], Turns]:
        with capture.global_and_fixture_disabled():
            console = Console(stderr=True)
            # Drawn between turns only: no thread of its own takes time from them.
            with Progress(
                console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
            ) as progress:
                bar = progress.add_task(str(case), total=ROUNDS)
                turns = measure(case, seconds, lambda: progress.update(bar, advance=1, refresh=True))
        return {(t.contender, t.groups): t for t in turns}

    return turns_of


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What decides the numbers, and not the host's name."""
    machine_info["node"] = ""
    machine_info["wd_kernels"] = dict([*versions(), *choices()])


def pytest_benchmark_group_stats(config: pytest.Config, benchmarks: list[Any], group_by: str) -> list[Any]:
    """No table of pytest-benchmark's: bench/table.py prints one with rates and ratios from the JSON."""
    return []
