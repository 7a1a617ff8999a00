"""What the turns of a CPU benchmark come to: medians, rates, shares of the ceiling, ratios, verdicts and slopes.

A ratio is the median over rounds of the quotient of two contenders' turns in the same round, and so is the share of
the ceiling. A contender whose steps are long has the first rounds only.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cpu_cases import BARE_LOOP, CEILING, TIMED
from peers import OURS

__all__ = [
    "Behind",
    "Cases",
    "Result",
    "behind",
    "gpu_stem_of",
    "group_costs",
    "iqr",
    "is_peer",
    "line",
    "neighbours",
    "points",
    "ratio",
    "results",
    "share",
    "stem_of",
]


def iqr(values: Sequence[float]) -> float:
    """The distance of the quartiles; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """How many times longer the other takes, round by round, in the rounds that both have."""
    return statistics.median(b / a for a, b in zip(own, other, strict=False))


@dataclass(frozen=True)
class Result:
    """One contender on one case: seconds per step of every round, and those of its launches where they were timed."""

    case: str
    info: dict[str, Any]
    seconds: tuple[float, ...]
    launches: tuple[float, ...] = ()

    @property
    def contender(self) -> str:
        return str(self.info["contender"])

    @property
    def groups(self) -> int:
        return int(self.info["groups"])

    @property
    def bytes(self) -> float:
        """That a step moves."""
        return float(self.info["tensors"] * self.info["elements"] * self.info["bytes_per_parameter"])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        return iqr(self.seconds)

    @property
    def rate(self) -> float:
        """GB/s of the byte model."""
        return self.bytes / self.median / 1e9

    @property
    def kernel(self) -> float:
        """Seconds inside of the launches of a step."""
        return statistics.median(self.launches)

    @property
    def host(self) -> float:
        """Seconds of a step outside of its launches."""
        return statistics.median(s - k for s, k in zip(self.seconds, self.launches, strict=True))

    def ratio(self, other: Result) -> float:
        return ratio(self.seconds, other.seconds)


#: Results by case, and there by (contender, groups), in the order of the report.
Cases = dict[str, dict[tuple[str, int], Result]]


def results(report: dict[str, Any]) -> Cases:
    """Of a report, as pytest-benchmark wrote it or as bench/results keeps it."""
    threads = int(report["machine_info"].get("wd_kernels", {}).get("threads", 0))
    absent = {"rule": "adamw", "threads": threads, "sweep": "", "launches": []}
    cases: Cases = {}
    for entry in report["benchmarks"]:
        info = absent | entry["extra_info"]
        result = Result(entry["group"], info, tuple(entry["stats"]["data"]), tuple(info["launches"]))
        cases.setdefault(result.case, {})[result.contender, result.groups] = result
    return cases


def is_peer(name: str) -> bool:
    """Is it another library's optimizer?"""
    return not name.startswith(OURS) and name not in (BARE_LOOP, CEILING)


def share(own: Result, ceiling: Result | None) -> float | None:
    """Percent of the ceiling's rate, round by round; None where there was no ceiling."""
    if ceiling is None:
        return None
    return 100 * own.bytes / ceiling.bytes * ratio(own.seconds, ceiling.seconds)


def _name(date: str, device: str) -> str:
    return f"{date[:10]}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}"


def stem_of(report: dict[str, Any]) -> str:
    """How the files of a report are named: by date and processor."""
    return _name(str(report["datetime"]), str(report["machine_info"].get("cpu", {}).get("brand_raw", "unknown")))


def gpu_stem_of(gpu: dict[str, Any]) -> str:
    """And those of what bench/gpu.py measured: by date and device."""
    return _name(str(gpu["date"]), str(gpu["machine"]["device"])) + "-gpu"


# Verdicts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behind:
    """A peer that is faster than one of ours: `ratio` times our time is its time."""

    case: str
    groups: int
    own: str
    peer: str
    ratio: float


def behind(cases: Cases, own: str = OURS) -> tuple[list[Behind], int]:
    """Every pair of a case and a peer in which one of ours is slower, the worst first; and how many pairs there are."""
    found = []
    pairs = 0
    for case, them in cases.items():
        for (name, groups), other in them.items():
            mine = them.get((own, groups))
            if mine is None or not is_peer(name):
                continue
            pairs += 1
            quotient = mine.ratio(other)
            if quotient < 1:
                found.append(Behind(case, groups, own, name, quotient))
    return sorted(found, key=lambda b: b.ratio), pairs


# Sweeps ---------------------------------------------------------------------------------------------------------------


def points(cases: Cases, sweep: str) -> dict[int, dict[str, Result]]:
    """Of a sweep: the results by what it varies (a key of cpu_cases.SWEEPS), and there by contender."""
    found: dict[int, dict[str, Result]] = {}
    for them in cases.values():
        of_sweep = [r for r in them.values() if r.info["sweep"] == sweep]
        groups = max((r.groups for r in of_sweep), default=1)
        for r in of_sweep:
            at = groups if sweep == "groups" else int(r.info[sweep])
            found.setdefault(at, {})[r.contender] = r
    return dict(sorted(found.items()))


def host_times(at: dict[int, dict[str, Result]], own: str) -> list[tuple[int, float]]:
    """(what the sweep varies, seconds of the host) of one of ours."""
    timed = TIMED[own]
    return [(n, them[timed].host) for n, them in at.items() if timed in them]


def line(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the least squares' line through two points or more.

    >>> line([(1, 3.0), (2, 5.0), (4, 9.0)])
    (1.0, 2.0)
    """
    slope, intercept = statistics.linear_regression(*zip(*values, strict=True))
    return intercept, slope


def neighbours(values: Sequence[tuple[int, float]]) -> list[tuple[int, int, float]]:
    """(from, to, slope) between each two neighbours."""
    return [(a, b, (y - x) / (b - a)) for (a, x), (b, y) in itertools.pairwise(values)]


def group_costs(cases: Iterable[dict[tuple[str, int], Result]]) -> list[tuple[Result, Result, float, float]]:
    """Of contenders with one group and with many: both, and median and quartile range of seconds a further group."""
    found = []
    for them in cases:
        for (name, groups), many in them.items():
            one = them.get((name, 1))
            if groups > 1 and one is not None:
                costs = [(b - a) / (groups - 1) for a, b in zip(one.seconds, many.seconds, strict=False)]
                found.append((one, many, statistics.median(costs), iqr(costs)))
    return found
