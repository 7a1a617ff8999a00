"""The text of a report: machine, verdicts, steps, sweeps, what tensors and groups cost, and who is not in it."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

import figures
from figures import Cases, Report, copy_rate, iqr, of_gpu, points
from internals import KINDS, aligned
from peers import CUDA, FLAT, FUSED, OURS
from workloads import CEILING, MANY, TARGETS, TIMED

Row = tuple[str, ...]
REHEARSAL = "REHEARSAL on the CPU with tiny sizes: it checks the program; no figure here is a GPU's."
IN_CACHE = 1000  # tensors; the objects of ten times as many are larger than a core's caches
#: What the columns are, and more of a CPU's and of a GPU's.
COLUMNS = """\
Whole steps, contenders in turns; medians over rounds. us a group: what each group after the first adds; GB/s: by the
byte model; x ours: how many times longer it takes than wd_kernels (median over rounds); """
ON_CPU = """\
% ceiling: of the rate of a
plain stream over as many bytes with the same mix of reads and writes, in the same rounds. bare loop: the launch alone,
on one flat buffer of as many elements; where launches are timed, host ms is what passes outside of them."""
ON_GPU = """\
% ceiling: of the copy's rate,
by the device time. ms: steps one after another, awaited at the end of the turn; device: by events, on a cold L2 where
the case could stay in it; host: until step() returns. Who takes no gradients of another dtype has the parameters'."""


def size(info: dict[str, Any]) -> str:
    """A model, or tensors x elements, with Mi where it is whole."""
    elements = info["elements"]
    number = elements if elements % 2**20 else f"{elements >> 20}Mi"
    return info.get("model") or f"{info['tensors']} x {number}"


def ms(seconds: float) -> str:
    """Milliseconds, to three digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def filled(*sentences: str) -> str:
    """A paragraph, as wide as those of README and docs."""
    return textwrap.fill(" ".join(" ".join(sentences).split()), 120, break_long_words=False, break_on_hyphens=False)


def filled_columns(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows without the columns in which nothing stands."""
    columns = [column for column in zip(*rows, strict=True) if any(cell not in ("", "-") for cell in column[1:])]
    return list(zip(*columns, strict=True)) or [tuple(rows[0])]


def heading(report: Report) -> list[tuple[str, str]]:
    """Machine, versions and date; how the parts of a run on a GPU went."""
    machine, commit = report["machine_info"], report.get("commit_info", {})
    rows = [
        ("date", str(report["datetime"])[:16].replace("T", " ") + " UTC"),
        ("commit", str(commit.get("id", "unknown"))[:12] + (" and uncommitted changes" if commit.get("dirty") else "")),
    ]
    if not of_gpu(report):
        rows.append(("processor", f"{figures.device(report)}, {machine.get('cpu', {}).get('count', '?')} cores"))
    rows += [(name, machine[name]) for name in ("device", "memory", "driver") if name in machine]
    rows += machine.get("wd_kernels", {}).items()
    rows += [
        (part, report[part]["says"])
        for part in ("build", "tests", "copy", "clipping", "accumulation")
        if "says" in report.get(part, {})
    ]
    if (rate := copy_rate(report)) is not None:
        rows.append(("copy", f"{rate:.0f} GB/s read and written, IQR {iqr(report['copy']['gb_per_s']):.0f}"))
    if of_gpu(report):
        rows.append(("run", "finished" if report.get("finished") else "CUT OFF or still running"))
    return rows


def steps(cases: Cases) -> list[Row]:
    """A row per contender of every case."""
    head = ("tensors", "rule", "dtype", "gradients", "threads", "optimizer", "groups", "ms", "IQR", "us a group")
    last = ("GB/s", "% ceiling", "B/param", "x ours", "device: x ours")
    rows: list[Row] = [(*head, "launches ms", "device ms", "IQR", "host ms", *last)]
    for them in cases.values():
        for i, own in enumerate(them.values()):
            info, ours, one = own.info, them.get((OURS, own.groups)), them.get((own.contender, 1))
            between = info["gradients"] + ", lr changing" * (info["lr"] == "changing")
            what = (size(info), KINDS[info["rule"]][0].title, info["dtype"], between, str(info["threads"]))
            group_cost = launches = host = "-"
            if one and own.groups > 1:
                each = statistics.median(b - a for a, b in zip(one.seconds, own.seconds, strict=False))
                group_cost = f"{each * 1e6 / (own.groups - 1):.2f}"
            if info["launches"]:
                launches, host = ms(statistics.median(info["launches"])), ms(own.host)
            elif info["host"]:
                host = ms(statistics.median(info["host"]))
            on_device = [ms(f(own.device)) if info["device"] else "-" for f in (statistics.median, iqr)]
            rows.append(
                (*(what if i == 0 else ("",) * 5), own.contender, str(own.groups), ms(own.median), ms(iqr(own.seconds)),
                 group_cost, launches, *on_device, host, f"{own.rate:.1f}", percent(own.share(them.get((CEILING, 1)))),
                 f"{info['bytes_per_parameter']:.4g}", f"{ours.ratio(own):.2f}" if ours else "-",
                 f"{ours.device_ratio(own):.2f}" if ours and info["device"] else "-")
            )  # fmt: skip
    return rows


def lost(cases: Cases) -> str:
    """Where we are behind, plainly."""
    found, pairs = figures.behind(cases)
    if not found:
        return f"Ours is ahead in all {pairs} comparisons of a peer and a case." if pairs else ""
    ahead = f"Ours is ahead in {pairs - len(found)} of {pairs} comparisons of a peer and a case"
    lines = [f"{ahead}, and behind in these:\n"]
    for ratio, own, peer in found:
        groups, flat = own.groups, cases[own.case].get((FLAT, own.groups))
        text = f"- `{own.case}`{f', {groups} groups' if groups > 1 else ''}: {peer.contender}, {ratio:.2f}×"
        if own.bytes != peer.bytes:
            ours, theirs = (r.info["bytes_per_parameter"] for r in (own, peer))
            text += f" (bytes a parameter: ours {ours:g}, theirs {theirs:g})"
        lines.append(text + (f"; flat: {flat.ratio(peer):.2f}×" if flat else ""))
    return "\n".join(lines)


def scaling(cases: Cases) -> str:
    """What a tensor and a group cost, and how far the largest tensor gets."""
    sentences = []
    tensors, groups, elements = (points(cases, sweep) for sweep in ("tensors", "groups", "elements"))
    for own, name in ((OURS, "Ours"), (FLAT, "Flat")):
        values = [(n, them[TIMED[own]].host) for n, them in tensors.items() if TIMED[own] in them]
        few = [(n, seconds) for n, seconds in values if n <= IN_CACHE]
        if len(few) > 1:
            slope, start = statistics.linear_regression(*zip(*few, strict=True))
            text = f"{name}: a step costs the host {start * 1e6:.0f} µs and {slope * 1e6:.2f} µs a tensor"
            if len(values) > len(few):
                (n, before), (most, last) = few[-1], values[-1]
                each = (last - before) / (most - n) * 1e6
                text += f" up to {n} tensors, {each:.2f} from there to {most}, whose objects leave the caches"
            sentences.append(f"{text} (10⁶ elements in all).")
    steps = [(n, them[OURS].median) for n, them in groups.items() if OURS in them]
    if len(steps) > 1:
        each = statistics.linear_regression(*zip(*steps, strict=True)).slope * 1e6
        sentences.append(f"A parameter group adds {each:.2f} µs to a step, lr changing in each.")
    for most, them in list(elements.items())[-1:]:
        if OURS in them and CEILING in them:
            ours = them[OURS]
            of_ceiling = f"{ours.rate:.0f} GB/s, {percent(ours.share(them[CEILING]))}% of the ceiling"
            sentences.append(f"One tensor of {most:.0e} elements takes {ms(ours.median)} ms, {of_ceiling}.")
    return filled(*sentences)


def verdicts(report: Report) -> list[Row]:
    """(target, where, what was found, verdict) of every budget. A rehearsal reaches nothing: nothing is measured."""
    cases = figures.results(report) if of_gpu(report) and not report.get("rehearsal") else {}
    pairs = {
        case + (f", {groups} groups" if groups > 1 else ""): (own, them[FUSED, groups])
        for case, them in cases.items()
        for (name, groups), own in them.items()
        if name == OURS and (FUSED, groups) in them
    }
    walls = {where: own.ratio(fused) for where, (own, fused) in pairs.items()}
    devices = {where: own.device_ratio(fused) for where, (own, fused) in pairs.items()}
    found: list[tuple[str, str, float | None, float, str]] = []  # what was found, the least that reaches the target
    for name in (OURS, CUDA):
        for case, least in TARGETS.items():
            them = cases.get(case, {})
            share = them[name, 1].share(them.get((CEILING, 1))) if (name, 1) in them else None
            where = case if name == OURS else f"{case}, CUDA"
            found.append((f">= {least}% of copy bandwidth", where, share, least, "{:.1f}%"))
    left_out = sum("all" in who for who in report.get("left_out", {}).values())
    for what, ratios in (("device time", devices), ("wall clock", walls)):
        worst = min(ratios, key=lambda where: ratios[where], default="")
        where = f"worst of {len(ratios)}: {worst}" if worst else "all cases"
        where += f" ({left_out} cases not measured)" if worst and left_out else ""
        found.append((f">= 1.0x {FUSED}, {what}", where, ratios.get(worst), 1.0, "{:.2f}x"))
    found += [(f">= 6x {FUSED}, wall clock", case, walls.get(case), 6.0, "{:.2f}x") for case in MANY]
    rows: list[Row] = [("target", "where", "found", "verdict")]
    for target, where, value, limit, form in found:
        verdict = "not measured" if value is None else "reached" if value >= limit else "not reached"
        rows.append((target, where, "-" if value is None else form.format(value), verdict))
    return rows


def absent(report: Report) -> list[str]:
    """Who is not in the tables, and why."""
    lines = [f"missing: {name}: {why}" for name, why in report.get("missing", {}).items()]
    for case, who in report.get("left_out", {}).items():
        for why in dict.fromkeys(who.values()):
            lines.append(f"left out: {case}: {', '.join(name for name in who if who[name] == why)}: {why}")
    return lines


def render(report: Report) -> str:
    """The whole text."""
    cases = figures.results(report)
    parts = [REHEARSAL] if report.get("rehearsal") else []
    parts += [aligned(heading(report), indent=""), lost(cases), scaling(cases)]
    if cases:
        parts += [COLUMNS + (ON_GPU if of_gpu(report) else ON_CPU), aligned(filled_columns(steps(cases)), indent="")]
    if of_gpu(report):
        parts.append("Budgets\n\n" + aligned(verdicts(report), indent=""))
    return "\n\n".join(part for part in (*parts, "\n".join(absent(report))) if part) + "\n"
