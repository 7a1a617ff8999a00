"""Figures, tables and verdicts of what bench/gpu.py measured, from its JSON alone.

A ratio is the median over rounds of the quotient of two contenders' turns in the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpu_cases import TARGETS
from peers import CUDA, FUSED, OURS
from report_figures import iqr, ratio

from wd_kernels.__main__ import aligned

__all__ = ["Figures", "Verdict", "case_figures", "copy_rate", "render", "verdicts"]

Row = tuple[object, ...]
REHEARSAL = "REHEARSAL on the CPU with tiny sizes: it checks the program; no figure here is a GPU's."
REACHED, MISSED, UNKNOWN = "reached", "not reached", "not measured"


def copy_rate(report: dict[str, Any]) -> float | None:
    """GB/s of the copy, median over rounds."""
    rates = report.get("copy", {}).get("gb_per_s")
    return statistics.median(rates) if rates else None


@dataclass(frozen=True)
class Figures:
    """What one contender's turns on one case come to. Percentages are of the measured copy bandwidth."""

    case: str
    contender: str
    groups: int
    gradient: str
    bytes_per_parameter: float
    device: float
    device_iqr: float
    wall: float
    wall_iqr: float
    host: float
    gb_per_s: float
    percent: float | None
    device_vs_fused: float | None
    wall_vs_fused: float | None


def case_figures(case: dict[str, Any], copy: float | None) -> list[Figures]:
    """Of every contender of a case."""
    fused = {r["groups"]: r for r in case["results"] if r["contender"] == FUSED}
    figures = []
    for own in case["results"]:
        device = statistics.median(own["device"])
        rate = case["elements"] * own["bytes_per_parameter"] / device / 1e9
        base = fused.get(own["groups"])
        figures.append(
            Figures(
                case["case"],
                own["contender"],
                own["groups"],
                own["gradient"],
                own["bytes_per_parameter"],
                device,
                iqr(own["device"]),
                statistics.median(own["wall"]),
                iqr(own["wall"]),
                statistics.median(own["host"]),
                rate,
                100 * rate / copy if copy else None,
                ratio(own["device"], base["device"]) if base else None,
                ratio(own["wall"], base["wall"]) if base else None,
            )
        )
    return figures


def all_figures(report: dict[str, Any]) -> list[Figures]:
    copy = copy_rate(report)
    return [figures for case in report.get("cases", []) for figures in case_figures(case, copy)]


# Budgets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A target, what was found, and whether that reaches it."""

    target: str
    where: str
    found: str
    verdict: str


def judge(target: str, where: str, found: float | None, least: float, form: str) -> Verdict:
    if found is None:
        return Verdict(target, where, "-", UNKNOWN)
    return Verdict(target, where, form.format(found), REACHED if found >= least else MISSED)


def verdicts(report: dict[str, Any]) -> list[Verdict]:
    """Every budget, judged by what was measured. A rehearsal reaches nothing: its budgets are not measured."""
    figures = [] if report.get("rehearsal") else all_figures(report)
    ours = [f for f in figures if f.contender == OURS]
    found = {f.case: f for f in ours}
    result = []
    for contender in (OURS, CUDA):
        percents = {f.case: f.percent for f in figures if f.contender == contender}
        for name, least in TARGETS.items():
            where = name if contender == OURS else f"{name}, CUDA"
            result.append(judge(f">= {least}% of copy bandwidth", where, percents.get(name), least, "{:.1f}%"))
    for what, ratios in (
        ("device time", {(f.case, f.groups): f.device_vs_fused for f in ours}),
        ("wall clock", {(f.case, f.groups): f.wall_vs_fused for f in ours}),
    ):
        known = {key: r for key, r in ratios.items() if r is not None}
        worst = min(known, key=lambda key: known[key], default=None)
        left_out = len(report.get("left_out", []))
        where = "all cases" if worst is None else f"worst of {len(known)}: {label(*worst)}"
        where += f" ({left_out} cases not measured)" if left_out and worst else ""
        result.append(judge(f">= 1.0x {FUSED}, {what}", where, known[worst] if worst else None, 1.0, "{:.2f}x"))
    for gradients in ("kept", "new"):
        name = f"10000 x 1000, {gradients} gradients"
        own = found.get(name)
        result.append(judge(f">= 6x {FUSED}, wall clock", name, own.wall_vs_fused if own else None, 6.0, "{:.2f}x"))
    return [*result, launch_verdict({} if report.get("rehearsal") else report.get("launches", {}))]


def launch_verdict(launches: dict[str, Any]) -> Verdict:
    target, kernels, buckets = "one launch a bucket", launches.get("step_kernels"), launches.get("buckets")
    if kernels is None or buckets is None:
        return Verdict(target, "profiler", "-", UNKNOWN)
    where = f"profiler, {launches['tensors']} tensors, {buckets} buckets"
    return Verdict(target, where, f"{kernels} kernels", REACHED if kernels == buckets else MISSED)


# Tables ---------------------------------------------------------------------------------------------------------------


def label(case: str, groups: int) -> str:
    return f"{case}, {groups} groups" if groups > 1 else case


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def steps(report: dict[str, Any]) -> Iterator[Row]:
    """A row per contender of every case."""
    yield (
        "case", "optimizer", "groups", "device ms", "IQR", "wall ms", "IQR", "host ms", "B/param", "GB/s", "% of copy",
        "device vs fused", "wall vs fused",
    )  # fmt: skip
    before = ""
    for f in all_figures(report):
        yield (
            "" if f.case == before else f.case, f.contender, f.groups, ms(f.device), ms(f.device_iqr), ms(f.wall),
            ms(f.wall_iqr), ms(f.host), f"{f.bytes_per_parameter:g}", f"{f.gb_per_s:.0f}",
            "-" if f.percent is None else f"{f.percent:.1f}", times(f.device_vs_fused), times(f.wall_vs_fused),
        )  # fmt: skip
        before = f.case


def remarks(report: dict[str, Any]) -> list[str]:
    """What a reader should know of the cases, and who is absent."""
    lines = [f"{case['case']}: {case['note']}" for case in report.get("cases", []) if case["note"]]
    for case in report.get("cases", []):
        lines += [f"{case['case']}: without {name}: {why}" for name, why in case["skipped"].items()]
    lines += [f"{name}: FAILED: {why}" for name, why in report.get("errors", {}).items()]
    lines += [f"{name}: not measured, the time was over" for name in report.get("left_out", [])]
    return lines + [f"missing: {name}: {why}" for name, why in report.get("missing", {}).items()]


def heading(report: dict[str, Any]) -> list[Row]:
    """Machine, versions, and how the parts went."""
    rows: list[Row] = [("date", report["date"]), ("commit", report["commit"]), *report["machine"].items()]
    for part in ("build", "tests"):
        if part in report:
            rows.append((part, report[part]["says"]))
    copy = report.get("copy", {})
    rate = copy_rate(report)
    if rate is not None:
        spread = iqr(copy["gb_per_s"])
        rows.append(("copy", f"{rate:.0f} GB/s read and written, IQR {spread:.0f}, of {copy['bytes'] / 2**20:.0f} MiB"))
    elif "says" in copy:
        rows.append(("copy", copy["says"]))
    if "launches" in report:
        kinds = report["launches"].get("on_device", {})
        on_device = ", ".join(f"{n} {name}" for name, n in kinds.items()) or report["launches"].get("says", "nothing")
        rows.append(("a step runs", on_device))
    rows.append(("run", "finished" if report.get("finished") else "CUT OFF or still running"))
    return rows


def render(report: dict[str, Any]) -> str:
    """The whole text."""
    parts = [REHEARSAL] if report.get("rehearsal") else []
    parts.append(aligned(heading(report), indent=""))
    if report.get("cases"):
        parts.append(
            "Steps, all contenders on the same tensors in turns; medians over rounds.\n"
            "device: by events, on a cold L2 where the case could stay in it; wall: steps one after another, awaited\n"
            "at the end of the turn; host: until step() returns; GB/s by the byte model, from the device time;\n"
            f"vs fused: how many times longer {FUSED} takes (median over rounds).\n\n"
            + aligned(list(steps(report)), indent="")
        )
    lines = remarks(report)
    if lines:
        parts.append("\n".join(lines))
    budget = [(v.target, v.where, v.found, v.verdict) for v in verdicts(report)]
    parts.append("Budgets\n\n" + aligned([("target", "where", "found", "verdict"), *budget], indent=""))
    return "\n\n".join(parts) + "\n"
