"""Whole optimizer steps: wd_kernels, every peer that is there, a bare loop and a plain stream, in turns.

    python -m pytest bench --benchmark-json=bench.json && python bench/report.py bench.json

pytest-benchmark times one function after the other, and a machine's speed drifts meanwhile. So turns.measure times all
contenders of a case in turns, once, and the test of each contender hands its turns to pytest-benchmark: a round is a
turn, and the timer is a clock that shows the time that the turn took.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu_cases import Case
from pytest_benchmark.fixture import BenchmarkFixture
from turns import Turns

_now = 0.0


def clock_of_turns() -> float:
    """Seconds of the turns replayed so far, per step."""
    return _now


@pytest.mark.benchmark(timer=clock_of_turns)
def test_step(
    benchmark: BenchmarkFixture,
    measured: Callable[[Case], tuple[dict[tuple[str, int], Turns], dict[str, str]]],
    case: str,
    contender: str,
    groups: int,
) -> None:
    what = Case.parse(case)
    turns, skipped = measured(what)
    own = turns.get((contender, groups))
    if own is None:
        pytest.skip(skipped.get(contender, "it is not there"))
    durations = iter(own.seconds)

    def replay() -> None:
        global _now
        _now += next(durations) / own.steps

    benchmark.group = case
    benchmark.extra_info = {
        "tensors": what.tensors,
        "elements": what.elements,
        "dtype": what.dtype_name,
        "gradients": what.gradients,
        "rule": what.rule,
        "threads": what.threads or torch.get_num_threads(),
        "lr": what.lr,
        "sweep": what.sweep,
        "contender": contender,
        "groups": groups,
        "bytes_per_parameter": own.bytes_per_parameter,
        "steps_per_round": own.steps,
        "launches": [seconds / own.steps for seconds in own.inside],
    }
    benchmark.pedantic(replay, rounds=len(own.seconds), iterations=1)  # type: ignore[no-untyped-call]
