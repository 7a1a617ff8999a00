"""Whole optimizer steps: wd_kernels, every peer that is there, a bare loop and a plain stream, in turns.

    python -m pytest bench --benchmark-quiet --benchmark-json=bench.json && python bench/report.py bench.json

pytest-benchmark times one function after the other, and a machine's speed drifts meanwhile. So turns.measure times all
contenders of a case in turns, once, and the test of each contender hands its turns to pytest-benchmark: a round is a
turn, and the timer is a clock that shows the time that the turn took.
"""

from __future__ import annotations

from typing import Any

import pytest
from workloads import Case

_now = 0.0


def clock_of_turns() -> float:
    """Seconds of the turns replayed so far, per step."""
    return _now


@pytest.mark.benchmark(timer=clock_of_turns)
def test_step(benchmark: Any, measured: Any, case: Case, contender: str, groups: int) -> None:
    entries, skipped = measured(case)
    own = entries.get((contender, groups))
    if own is None:
        pytest.skip(skipped.get(contender, "it is not there"))
    durations = iter(own["stats"]["data"])

    def replay() -> None:
        global _now
        _now += next(durations)

    benchmark.group, benchmark.extra_info = own["group"], own["extra_info"]
    benchmark.pedantic(replay, rounds=len(own["stats"]["data"]), iterations=1)
