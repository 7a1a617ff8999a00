"""Options of the suite, what its JSON says of the machine, and one measurement per case for all its contenders."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from contenders import library
from internals import versions_here
from peers import CUDA, load, on
from turns import Timer, measure
from workloads import CASES, CEILING, Case

# Peers compile with this environment's ninja, and without a pool of processes that would stay.
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
peers = cache(lambda: load(on("cpu")))
#: Why contenders have no turns, by case and name.
left_out: dict[str, dict[str, str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("wd_kernels")
    of_case = "a case to measure, such as 300x100000-float32-new; may be repeated (default: all that the suite has)"
    group.addoption("--case", action="append", default=[], metavar="CASE", help=of_case)
    who = "a contender, such as 'torch fused'; may be repeated; the ceiling takes part always (default: all)"
    group.addoption("--contender", action="append", default=[], metavar="NAME", help=who)
    group.addoption("--seconds", type=float, default=8.0, help="how long a case is measured, about (default: 8)")


def names(config: pytest.Config, case: Case) -> list[tuple[str, int]]:
    """The contenders of a case, by (name, groups)."""
    wanted = config.getoption("--contender")
    return [who for who in case.stepping(list(peers()[0])) if not wanted or who[0] in (*wanted, CEILING)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contender of each case."""
    cases = metafunc.config.getoption("--case") or CASES
    tests = [(case, *who) for case in map(Case, cases) for who in names(metafunc.config, case)]
    metafunc.parametrize(("case", "contender", "groups"), tests, ids=lambda value: str(value).replace(" ", "_"))


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Any:
    """Gives what was measured of a case by (name, groups), and who was skipped; a case is measured once."""

    @cache
    def of_case(case: Case) -> tuple[dict[tuple[str, int], dict[str, Any]], dict[str, str]]:
        who, seconds = names(pytestconfig, case), pytestconfig.getoption("--seconds")
        entries, skipped = measure(case, peers()[0], who, seconds, Timer(torch.device("cpu")))
        if skipped:
            left_out[str(case)] = skipped
        return {(e["extra_info"]["contender"], e["extra_info"]["groups"]): e for e in entries}, skipped

    return of_case


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """What decides the numbers, and not the host's name; who is not in it, and why."""
    output_json["machine_info"] |= {"node": "", "wd_kernels": versions_here()}
    elsewhere = [peer for peer in on("cuda") if "cpu" not in peer.devices and peer.name != CUDA]
    missing = {f"{peer.name} {peer.path.split(':')[1]}": "it steps GPU tensors only" for peer in elsewhere}
    no_ceiling = {CEILING: why} if isinstance(why := library(), str) else {}
    output_json |= {"missing": peers()[1] | missing | no_ceiling, "left_out": left_out}
