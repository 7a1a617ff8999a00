"""Whole optimizer steps: wd_kernels, every peer that is there, a bare loop and a plain stream, in turns.

    python -m pytest bench --benchmark-quiet --benchmark-json=bench.json && python bench/report.py bench.json

A machine's speed drifts. So turns.measure times all contenders of a case in turns, once, and the test of each hands its
turns to pytest-benchmark: a round is a turn, and the timer is a clock that shows the time that the turn took.
"""

from __future__ import annotations

from typing import Any

import pytest
from workloads import Case

replayed = [0.0]  # seconds of turns so far, per step


@pytest.mark.benchmark(timer=lambda: replayed[0])
def test_step(benchmark: Any, measured: Any, case: Case, contender: str, groups: int) -> None:
    entries, skipped = measured(case)
    own = entries.get((contender, groups))
    if own is None:
        pytest.skip(skipped.get(contender, "it is not there"))
    data = own["stats"]["data"]
    durations = iter(data)

    def replay() -> None:
        replayed[0] += next(durations)

    benchmark.group, benchmark.extra_info = own["group"], own["extra_info"]
    benchmark.pedantic(replay, rounds=len(data), iterations=1)
