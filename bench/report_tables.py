"""The text of a CPU benchmark's report: machine, steps, sweeps, groups, verdicts, and who is not in it."""

from __future__ import annotations

from typing import Any

from cpu_cases import CEILING, SWEEPS, TIMED
from peers import OURS
from report_figures import (
    Cases,
    Result,
    behind,
    group_costs,
    host_times,
    is_peer,
    line,
    neighbours,
    points,
    results,
    share,
)

from wd_kernels.__main__ import aligned

__all__ = ["absent", "costs", "heading", "render", "rule_name", "size", "steps", "sweep_rows", "verdict"]

Row = tuple[str, ...]
RULES = {"adamw": "AdamW", "sgdw": "SGDW"}


def rule_name(info: dict[str, Any]) -> str:
    return RULES[info["rule"]]


def size(info: dict[str, Any]) -> str:
    """Tensors x elements, with Mi where it is whole."""
    elements = info["elements"]
    return f"{info['tensors']} x " + (str(elements) if elements % 2**20 else f"{elements >> 20}Mi")


def ms(seconds: float) -> str:
    """To three digits, and no more than are there."""
    value = seconds * 1e3
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def heading(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine, versions and date."""
    machine = report["machine_info"]
    cpu = machine.get("cpu", {})
    commit = report.get("commit_info", {})
    return [
        ("date", str(report["datetime"])[:16].replace("T", " ") + " UTC"),
        ("commit", str(commit.get("id", "unknown"))[:12] + (" and uncommitted changes" if commit.get("dirty") else "")),
        ("processor", f"{cpu.get('brand_raw', machine.get('processor', 'unknown'))}, {cpu.get('count', '?')} cores"),
        *machine.get("wd_kernels", {}).items(),
    ]


def _row(own: Result, them: dict[tuple[str, int], Result]) -> Row:
    """What every table says of a contender: time, rate, share of the ceiling, and its time in ours."""
    ours = them.get((OURS, own.groups))
    return (
        ms(own.median),
        ms(own.iqr),
        f"{own.rate:.1f}",
        percent(share(own, them.get((CEILING, 1)))),
        f"{own.info['bytes_per_parameter']:.4g}",
        f"{ours.ratio(own):.2f}" if ours else "-",
    )


def steps(cases: Cases) -> list[Row]:
    """A row per contender of every case that is no point of a sweep."""
    rows: list[Row] = [
        ("tensors", "rule", "dtype", "gradients", "threads", "optimizer", "groups", "ms", "IQR", "GB/s", "% ceiling",
         "B/param", "x ours")
    ]  # fmt: skip
    for them in cases.values():
        for i, own in enumerate(them.values()):
            info = own.info
            if info["sweep"]:
                break
            what = (size(info), rule_name(info), info["dtype"], info["gradients"], str(info["threads"]))
            rows.append((*(what if i == 0 else ("",) * 5), own.contender, str(own.groups), *_row(own, them)))
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
    rows: list[Row] = [
        (sweep, "optimizer", "ms", "IQR", "host ms", "kernel ms", "GB/s", "% ceiling", "B/param", "x ours")
    ]
    for at, them in points(cases, sweep).items():
        keyed = {(name, r.groups): r for name, r in them.items()}
        names = [name for name in them if name not in TIMED.values()]
        for i, name in enumerate(names):
            time, spread, *rest = _row(them[name], keyed)
            timed = them.get(TIMED.get(name, ""))
            apart = (ms(timed.host), ms(timed.kernel)) if timed else ("-", "-")
            rows.append((str(at) if i == 0 else "", name, time, spread, *apart, *rest))
    return rows


def slopes(cases: Cases) -> list[str]:
    """What a tensor costs the host, and what a group costs a step."""
    lines = []
    tensors, groups = points(cases, "tensors"), points(cases, "groups")
    for own in TIMED:
        values = host_times(tensors, own)
        lines += _slope(f"{own}: host time", "tensor", values)
    names = [name for name in SWEEPS["groups"] if name not in TIMED.values()]
    for name in names:
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


def absent(report: dict[str, Any]) -> list[str]:
    """Who is not in the tables, and why."""
    lines = [f"missing: {name}: {why}" for name, why in report.get("missing", {}).items()]
    for case, who in report.get("left_out", {}).items():
        reasons: dict[str, list[str]] = {}
        for name, why in who.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"left out: {case}: {', '.join(names)}: {why}" for why, names in reasons.items()]
    return lines


def render(report: dict[str, Any]) -> str:
    """The whole text."""
    cases = results(report)
    parts = [aligned(heading(report), indent="")]
    lines = verdict(cases)
    if lines:
        parts.append("\n".join(lines))
    whole, groups = steps(cases), costs(cases)
    if len(whole) > 1:
        parts.append(
            "Whole steps, contenders in turns. ms: median over rounds; GB/s: by the byte model; % ceiling: of the\n"
            "rate of a plain stream over as many bytes with the same mix of reads and writes, in the same rounds;\n"
            "x ours: how many times longer it takes than wd_kernels (median over rounds).\n"
            "bare loop: the launch alone, on one flat buffer of as many elements.\n\n" + aligned(whole, indent="")
        )
    for sweep, title in (
        ("tensors", "1 to 10^4 tensors of 10^6 elements in all"),
        ("elements", "10^3 to 10^9 elements in one tensor"),
        ("groups", "1 to 1000 groups of 1000 tensors with 1000 elements, lr changing in each group"),
    ):
        rows = sweep_rows(cases, sweep)
        if len(rows) > 1:
            apart = "host: of a step outside of its launches; kernel: inside of them (a turn of its own)."
            parts.append(f"Scaling: {title}. float32.\n{apart}\n\n" + aligned(rows, indent=""))
    lines = slopes(cases)
    if lines:
        parts.append("\n".join(lines))
    if len(groups) > 1:
        parts.append("Host cost of parameter groups.\n\n" + aligned(groups, indent=""))
    lines = absent(report)
    if lines:
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
