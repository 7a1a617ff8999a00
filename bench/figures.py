"""What the turns of a benchmark come to, CPU's or GPU's: medians, rates, shares of the ceiling, ratios.

A ratio is the median over rounds of the quotient of two contenders' turns in the same round, and so is the share of
the ceiling. A contender whose steps are long has the first rounds only. The ceiling is a contender of its own on the
CPU, and the rate of a copy in the same run on a GPU.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peers import OURS
from workloads import BARE_LOOP, CEILING

Report = dict[str, Any]


def iqr(values: Sequence[float]) -> float:
    """The distance of the quartiles; 0 of a single value."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0]
    return quartiles[-1] - quartiles[0]


@dataclass(frozen=True)
class Result:
    """One contender on one case."""

    case: str
    contender: str
    groups: int
    seconds: Sequence[float]  # of a step, by the wall clock, in every round
    device: Sequence[float]  # the same on the device alone, where there is one; else `seconds`
    info: dict[str, Any]  # pytest-benchmark's extra_info; its "launches", "device" and "host" are seconds of rounds too

    @property
    def bytes(self) -> float:
        """That a step moves."""
        return float(self.info["tensors"] * self.info["elements"] * self.info["bytes_per_parameter"])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """GB/s of the byte model."""
        return self.bytes / statistics.median(self.device) / 1e9

    @property
    def host(self) -> float:
        """Seconds of a step outside of its launches."""
        return float(statistics.median(s - k for s, k in zip(self.seconds, self.info["launches"], strict=True)))

    def ratio(self, other: Result) -> float:
        """How many times longer the other takes, round by round, in the rounds that both have."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=False))

    def device_ratio(self, other: Result) -> float:
        return statistics.median(b / a for a, b in zip(self.device, other.device, strict=False))

    def share(self, ceiling: Result | None) -> float | None:
        """Percent of the ceiling's rate; None where there was no ceiling."""
        return 100 * self.bytes / ceiling.bytes * self.device_ratio(ceiling) if ceiling else None


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
        info, seconds = absent | entry["extra_info"], entry["stats"]["data"]
        key = str(info["contender"]), int(info["groups"])
        result = Result(entry["group"], *key, seconds, info["device"] or seconds, info)
        cases.setdefault(result.case, {})[key] = result
    if (rate := copy_rate(report)) is not None:
        for case, them in cases.items():
            own = next(iter(them.values()))
            seconds = [own.bytes / rate / 1e9] * max(len(r.seconds) for r in them.values())
            them[CEILING, 1] = Result(case, CEILING, 1, seconds, seconds, own.info | {"host": []})
    return cases


def is_peer(name: str) -> bool:
    """Is it another library's optimizer?"""
    return not name.startswith(OURS) and name not in (BARE_LOOP, CEILING)


def device(report: Report) -> str:
    """The processor, or the GPU."""
    machine = report["machine_info"]
    return str(machine.get("device") or machine.get("cpu", {}).get("brand_raw", "an unknown processor"))


def of_gpu(report: Report) -> bool:
    return "device" in report["machine_info"]


def stem_of(report: Report) -> str:
    """How the files of a report are named: by date and device."""
    name = re.sub(r"[^a-z0-9]+", "-", device(report).lower()).strip("-")
    return f"{str(report['datetime'])[:10]}-{name}" + "-gpu" * of_gpu(report)


def behind(cases: Cases, own: str = OURS) -> tuple[list[tuple[float, Result, Result]], int]:
    """(ratio, ours, the peer) where one of ours is slower than a peer, worst first; and how many pairs there are."""
    peers = [(them, peer) for them in cases.values() for (name, _), peer in them.items() if is_peer(name)]
    pairs = [(them[own, peer.groups], peer) for them, peer in peers if (own, peer.groups) in them]
    slower = [(ours.ratio(peer), ours, peer) for ours, peer in pairs if ours.ratio(peer) < 1]
    return sorted(slower, key=lambda found: found[0]), len(pairs)


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
