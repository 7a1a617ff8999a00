"""What the turns of a benchmark come to, CPU's or GPU's: medians, rates, shares of the ceiling, ratios and slopes.

A ratio is the median over rounds of the quotient of two contenders' turns in the same round, and so is the share of
the ceiling. A contender whose steps are long has the first rounds only. The ceiling is a contender of its own on the
CPU, and the rate of a copy in the same run on a GPU.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peers import OURS
from workloads import BARE_LOOP, CEILING, TIMED

Report = dict[str, Any]


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
    """One contender on one case.

    Attributes:
        seconds: of a step on the wall clock, in every round.
        info: what pytest-benchmark keeps as extra_info; "launches", "device" and "host" are seconds in every round too.
    """

    case: str
    info: dict[str, Any]
    seconds: Sequence[float]

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
    def moving(self) -> Sequence[float]:
        """Seconds that are held against the ceiling: those on the device, where there is one."""
        return self.info["device"] or self.seconds

    @property
    def rate(self) -> float:
        """GB/s of the byte model."""
        return self.bytes / statistics.median(self.moving) / 1e9

    @property
    def kernel(self) -> float:
        """Seconds inside of the launches of a step."""
        return float(statistics.median(self.info["launches"]))

    @property
    def host(self) -> float:
        """Seconds of a step outside of its launches."""
        return float(statistics.median(s - k for s, k in zip(self.seconds, self.info["launches"], strict=True)))

    def ratio(self, other: Result) -> float:
        return ratio(self.seconds, other.seconds)

    def device_ratio(self, other: Result) -> float:
        return ratio(self.moving, other.moving)


#: Results by case, and there by (contender, groups), in the order of the report.
Cases = dict[str, dict[tuple[str, int], Result]]


def copy_rate(report: Report) -> float | None:
    """GB/s of the copy, median over rounds."""
    rates = report.get("copy", {}).get("gb_per_s")
    return statistics.median(rates) if rates else None


def results(report: Report) -> Cases:
    """Of a report, as pytest-benchmark or bench/gpu.py wrote it, or as bench/results keeps it."""
    threads = int(report["machine_info"].get("wd_kernels", {}).get("threads", 0))
    absent = {"rule": "adamw", "threads": threads, "sweep": "", "launches": [], "device": [], "host": []}
    cases: Cases = {}
    for entry in report.get("benchmarks", []):
        result = Result(entry["group"], absent | entry["extra_info"], entry["stats"]["data"])
        cases.setdefault(result.case, {})[result.contender, result.groups] = result
    rate = copy_rate(report)
    for case, them in cases.items():
        if rate is None:
            break
        own = next(iter(them.values()))
        seconds = [own.bytes / rate / 1e9] * max(len(r.seconds) for r in them.values())
        info = own.info | {"contender": CEILING, "groups": 1, "device": seconds, "host": []}
        them[CEILING, 1] = Result(case, info, seconds)
    return cases


def is_peer(name: str) -> bool:
    """Is it another library's optimizer?"""
    return not name.startswith(OURS) and name not in (BARE_LOOP, CEILING)


def share(own: Result, ceiling: Result | None) -> float | None:
    """Percent of the ceiling's rate, round by round; None where there was no ceiling."""
    if ceiling is None:
        return None
    return 100 * own.bytes / ceiling.bytes * own.device_ratio(ceiling)


def device(report: Report) -> str:
    """The processor, or the GPU."""
    machine = report["machine_info"]
    return str(machine.get("device") or machine.get("cpu", {}).get("brand_raw", "unknown"))


def of_gpu(report: Report) -> bool:
    return "device" in report["machine_info"]


def stem_of(report: Report) -> str:
    """How the files of a report are named: by date and device."""
    name = re.sub(r"[^a-z0-9]+", "-", device(report).lower()).strip("-")
    return f"{str(report['datetime'])[:10]}-{name}" + "-gpu" * of_gpu(report)


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
            if mine.ratio(other) < 1:
                found.append(Behind(case, groups, own, name, mine.ratio(other)))
    return sorted(found, key=lambda b: b.ratio), pairs


# Sweeps ---------------------------------------------------------------------------------------------------------------


def points(cases: Cases, sweep: str) -> dict[int, dict[str, Result]]:
    """Of a sweep: the results by what it varies (a key of workloads.SWEEPS), and there by contender."""
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
    return [(n, them[TIMED[own]].host) for n, them in at.items() if TIMED[own] in them]


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
