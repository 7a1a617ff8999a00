"""The text of a report: machine, verdicts, steps, sweeps, groups, and who is not in it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from figures import (
    Cases,
    Report,
    Result,
    behind,
    copy_rate,
    device,
    group_costs,
    host_times,
    iqr,
    is_peer,
    line,
    neighbours,
    of_gpu,
    points,
    results,
    share,
)
from gpu_budgets import verdicts
from internals import aligned
from peers import OURS, RULES
from workloads import CEILING, SWEEPS, TIMED

Row = tuple[str, ...]
REHEARSAL = "REHEARSAL on the CPU with tiny sizes: it checks the program; no figure here is a GPU's."


def rule_name(info: dict[str, Any]) -> str:
    return RULES[info["rule"]].ours


def size(info: dict[str, Any]) -> str:
    """A model, or tensors x elements, with Mi where it is whole."""
    elements = info["elements"]
    return info.get("model") or f"{info['tensors']} x " + (str(elements) if elements % 2**20 else f"{elements >> 20}Mi")


def ms(seconds: float) -> str:
    """To three digits, and no more than are there."""
    value = seconds * 1e3
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def filled_columns(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows without the columns in which nothing stands."""
    columns = [column for column in zip(*rows, strict=True) if any(cell not in ("", "-") for cell in column[1:])]
    return list(zip(*columns, strict=True)) or [tuple(rows[0])]


def table(rows: Sequence[Row]) -> str:
    return aligned(filled_columns(rows), indent="")


def heading(report: Report) -> list[tuple[str, str]]:
    """Machine, versions and date; how the parts of a run on a GPU went."""
    machine, commit = report["machine_info"], report.get("commit_info", {})
    rows = [
        ("date", str(report["datetime"])[:16].replace("T", " ") + " UTC"),
        ("commit", str(commit.get("id", "unknown"))[:12] + (" and uncommitted changes" if commit.get("dirty") else "")),
    ]
    if of_gpu(report):
        rows += [(name, machine[name]) for name in ("device", "memory", "driver") if name in machine]
    else:
        rows.append(("processor", f"{device(report)}, {machine.get('cpu', {}).get('count', '?')} cores"))
    rows += machine.get("wd_kernels", {}).items()
    rows += [(part, report[part]["says"]) for part in ("build", "tests") if part in report]
    copy, rate = report.get("copy", {}), copy_rate(report)
    if rate:
        text = f"{rate:.0f} GB/s read and written, IQR {iqr(copy['gb_per_s']):.0f}, of {copy['bytes'] / 2**20:.0f} MiB"
        rows.append(("copy", text))
    elif "says" in copy:
        rows.append(("copy", copy["says"]))
    if "launches" in report:
        kinds = ", ".join(f"{n} {name}" for name, n in report["launches"].get("on_device", {}).items())
        rows.append(("a step runs", kinds or report["launches"].get("says", "nothing")))
    if of_gpu(report):
        rows.append(("run", "finished" if report.get("finished") else "CUT OFF or still running"))
    return rows


TIMES = ("ms", "IQR", "device ms", "IQR", "host ms")
RATES = ("GB/s", "% ceiling", "B/param", "x ours", "device: x ours")


def _row(own: Result, them: dict[tuple[str, int], Result]) -> tuple[Row, Row]:
    """What every table says of a contender: times (TIMES), and rate, share of the ceiling and time in ours (RATES)."""
    ours = them.get((OURS, own.groups))
    on_device, host = own.info["device"], own.info["host"]
    times = (
        ms(own.median),
        ms(own.iqr),
        ms(statistics.median(on_device)) if on_device else "-",
        ms(iqr(on_device)) if on_device else "-",
        ms(statistics.median(host)) if host else "-",
    )
    return times, (
        f"{own.rate:.1f}",
        percent(share(own, them.get((CEILING, 1)))),
        f"{own.info['bytes_per_parameter']:.4g}",
        f"{ours.ratio(own):.2f}" if ours else "-",
        f"{ours.device_ratio(own):.2f}" if ours and on_device else "-",
    )


def steps(cases: Cases) -> list[Row]:
    """A row per contender of every case that is no point of a sweep."""
    head = ("tensors", "rule", "dtype", "gradients", "threads", "optimizer", "groups")
    rows: list[Row] = [(*head, *TIMES, *RATES)]
    for them in cases.values():
        for i, own in enumerate(them.values()):
            info = own.info
            if info["sweep"]:
                break
            what = (size(info), rule_name(info), info["dtype"], info["gradients"], str(info["threads"]))
            times, rates = _row(own, them)
            rows.append((*(what if i == 0 else ("",) * 5), own.contender, str(own.groups), *times, *rates))
    return rows


def costs(cases: Cases) -> list[Row]:
    """A row per contender of every case with one group and with many: what each group after the first costs."""
    rows: list[Row] = [
        ("tensors", "lr", "optimizer", "1 group, ms", "many groups, ms", "groups", "us per group", "IQR")
    ]
    for one, many, cost, spread in group_costs(cases.values()):
        rows.append(
            (size(one.info), one.info["lr"], one.contender, ms(one.median), ms(many.median), str(many.groups),
             f"{cost * 1e6:.2f}", f"{spread * 1e6:.2f}")
        )  # fmt: skip
    return rows


def sweep_rows(cases: Cases, sweep: str) -> list[Row]:
    """A row per point of a sweep and contender; of ours with the time of host and launches apart."""
    rows: list[Row] = [(sweep, "optimizer", *TIMES[:2], "host ms", "kernel ms", *RATES)]
    for at, them in points(cases, sweep).items():
        keyed = {(name, r.groups): r for name, r in them.items()}
        names = [name for name in them if name not in TIMED.values()]
        for i, name in enumerate(names):
            times, rates = _row(them[name], keyed)
            timed = them.get(TIMED.get(name, ""))
            apart = (ms(timed.host), ms(timed.kernel)) if timed else ("-", "-")
            rows.append((str(at) if i == 0 else "", name, *times[:2], *apart, *rates))
    return rows


def slopes(cases: Cases) -> list[str]:
    """What a tensor costs the host, and what a group costs a step."""
    lines = []
    tensors, groups = points(cases, "tensors"), points(cases, "groups")
    for own in TIMED:
        lines += _slope(f"{own}: host time", "tensor", host_times(tensors, own))
    for name in SWEEPS["groups"]:
        if name not in TIMED.values():
            values = [(n, them[name].median) for n, them in groups.items() if name in them]
            lines += _slope(f"{name}: step", "group", values)
    return lines


def _slope(who: str, unit: str, values: list[tuple[int, float]]) -> list[str]:
    if len(values) < 2:
        return []
    start, slope = line(values)
    between = ", ".join(f"{a} to {b}: {s * 1e6:.3f}" for a, b, s in neighbours(values))
    return [f"{who}, us a {unit}: {slope * 1e6:.3f} by least squares (and {start * 1e6:.1f} us); {between}"]


def verdict(cases: Cases) -> list[str]:
    """Are we ahead of every peer in every case? Those where not, by name."""
    lines = []
    for own in TIMED:
        found, pairs = behind(cases, own)
        if not pairs:
            continue
        measured = sum(any((own, g) in them and is_peer(n) for n, g in them) for them in cases.values())
        lines.append(f"{own}: ahead in {pairs - len(found)} of {pairs} comparisons with peers, in {measured} cases")
        for b in found:
            groups = f", {b.groups} groups" if b.groups > 1 else ""
            lines.append(f"behind: {b.case}{groups}: {b.peer} takes {b.ratio:.2f} of the time of {own}")
    return lines


def absent(report: Report) -> list[str]:
    """Who is not in the tables, and why."""
    lines = [f"missing: {name}: {why}" for name, why in report.get("missing", {}).items()]
    for case, who in report.get("left_out", {}).items():
        reasons: dict[str, list[str]] = {}
        for name, why in who.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"left out: {case}: {', '.join(names)}: {why}" for why, names in reasons.items()]
    return lines


ON_CPU = (
    "% ceiling: of the\nrate of a plain stream over as many bytes with the same mix of reads and writes, in the same "
    "rounds;\nx ours: how many times longer it takes than wd_kernels (median over rounds).\n"
    "bare loop: the launch alone, on one flat buffer of as many elements."
)
ON_GPU = (
    "% ceiling: of the\ncopy's rate, by the device time; x ours: how many times longer it takes than wd_kernels "
    "(median over rounds).\nms: steps one after another, awaited at the end of the turn; device: by events, on a cold "
    "L2 where the case\ncould stay in it; host: until step() returns. Who takes no gradients of another dtype than "
    "the parameters' has these."
)


def render(report: Report) -> str:
    """The whole text."""
    cases = results(report)
    parts = [REHEARSAL] if report.get("rehearsal") else []
    parts += [aligned(heading(report), indent=""), "\n".join(verdict(cases))]
    whole, groups = steps(cases), costs(cases)
    if len(whole) > 1:
        explained = ON_GPU if of_gpu(report) else ON_CPU
        parts.append(
            f"Whole steps, contenders in turns. ms: median over rounds; GB/s: by the byte model; {explained}\n\n"
            + table(whole)
        )
    for sweep, title in (
        ("tensors", "1 to 10^4 tensors of 10^6 elements in all"),
        ("elements", "10^3 to 10^9 elements in one tensor"),
        ("groups", "1 to 1000 groups of 1000 tensors with 1000 elements, lr changing in each group"),
    ):
        rows = sweep_rows(cases, sweep)
        if len(rows) > 1:
            apart = "host: of a step outside of its launches; kernel: inside of them (a turn of its own)."
            parts.append(f"Scaling: {title}. float32.\n{apart}\n\n" + table(rows))
    parts.append("\n".join(slopes(cases)))
    if len(groups) > 1:
        parts.append("Host cost of parameter groups.\n\n" + table(groups))
    parts.append("\n".join(absent(report)))
    if of_gpu(report):
        parts.append("Budgets\n\n" + aligned([("target", "where", "found", "verdict"), *verdicts(report)], indent=""))
    return "\n\n".join(part for part in parts if part) + "\n"
