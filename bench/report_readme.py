"""The README's section on performance, made of a report: between two markers, so that no figure is typed by hand."""

from __future__ import annotations

from typing import Any

import gpu_report
from cases import BARE_LOOP, CEILING, FLAT, TIMED
from peers import FUSED, OURS
from report_figures import Cases, Result, behind, group_costs, host_times, is_peer, line, points, results, share
from report_tables import ms, percent, rule_name

__all__ = ["BEGIN", "END", "rewritten", "section"]

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
HEADER = (
    "tensors × elements", "rule", "dtype", "gradients", "ours, ms", "flat, ms", "torch fused, ms", "next peer",
    "its ms", "against the best", "of the ceiling",
)  # fmt: skip


def rewritten(text: str, report: dict[str, Any], gpu: dict[str, Any] | None, stem: str) -> str:
    """A text with its section made anew.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section(report, gpu, stem)}\n{END}{rest.split(END)[1]}"


def section(report: dict[str, Any], gpu: dict[str, Any] | None, stem: str) -> str:
    """What stands between the markers."""
    cases = results(report)
    parts = [opening(report, cases), table(cases), _legend(cases), *lost(cases), *scaling(cases)]
    parts.append(f"![All contenders side by side](bench/results/{stem}-peers.png)")
    if points(cases, "tensors"):
        parts.append(f"![Scaling over tensors, elements and groups](bench/results/{stem}-scaling.png)")
    if gpu is not None:
        parts += on_a_gpu(gpu)
    parts.append(
        f"All rows, with quartile ranges and rates, are in [bench/results](bench/results/{stem}.txt); again:\n"
        "\n    make peers  # installs the other libraries that run here; the benchmark names those that are missing\n"
        "    make bench\n    .venv/bin/python bench/report.py bench.json --save --readme"
    )
    return "\n\n".join(parts)


def opening(report: dict[str, Any], cases: Cases) -> str:
    machine = report["machine_info"]
    own = machine.get("wd_kernels", {})
    cpu = machine.get("cpu", {})
    names = dict.fromkeys(name for them in cases.values() for name, _ in them if is_peer(name))
    return (
        f"Whole `opt.step()` on {own.get('threads', '?')} threads of {cpu.get('brand_raw', 'an unknown processor')} "
        f"({own.get('instruction set', '?')}), torch {own.get('torch', '?')}, {str(report['datetime'])[:10]}. "
        f"Contenders take turns in one run: {', '.join(names)}. Times are medians over rounds, ratios medians of the quotients "
        "within a round."
    )


def _legend(cases: Cases) -> str:
    flat = any(name == FLAT for them in cases.values() for name, _ in them)
    lines = ['"Against the best" is how many times longer the fastest of all peers takes than ours.']
    if flat:
        lines.append('"Flat" is ours after `wd_kernels.flatten_`.')
    if any((CEILING, 1) in them for them in cases.values()):
        lines.append(
            "The ceiling is a plain stream over as many bytes with the same mix of reads and writes, "
            "measured in the same rounds."
        )
    return " ".join(lines)


def table(cases: Cases) -> str:
    """A row per case of one group, on the default number of threads, that is no point of a sweep."""
    rows = [_cells(HEADER), _cells(["---"] * len(HEADER))]
    most = max((r.info["threads"] for them in cases.values() for r in them.values()), default=1)
    for them in cases.values():
        ours = them.get((OURS, 1))
        peers = [r for (name, groups), r in them.items() if is_peer(name) and groups == 1]
        if ours is None or not peers or ours.info["sweep"] or any(groups > 1 for _, groups in them):
            continue
        info = ours.info
        dtype = info["dtype"] if info["threads"] == most else f"{info['dtype']}, {info['threads']} thread"
        fused, flat = them.get((FUSED, 1)), them.get((FLAT, 1))
        others = [r for r in peers if r.contender != FUSED]
        best = min(others, key=ours.ratio, default=None)
        rows.append(
            _cells(
                (
                    f"{info['tensors']} × " + (_elements(info["elements"])),
                    rule_name(info),
                    dtype,
                    info["gradients"],
                    ms(ours.median),
                    ms(flat.median) if flat else "",
                    ms(fused.median) if fused else "",
                    best.contender if best else "",
                    ms(best.median) if best else "",
                    f"{min(ours.ratio(r) for r in peers):.2f}×",
                    _of_ceiling(ours, them),
                )
            )
        )
    return "\n".join(rows)


def _elements(count: int) -> str:
    return str(count) if count % 2**20 else f"{count >> 20}Mi"


def _of_ceiling(own: Result, them: dict[tuple[str, int], Result]) -> str:
    value = share(own, them.get((CEILING, 1)))
    return "" if value is None else f"{percent(value)}%"


def _cells(values: Any) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def lost(cases: Cases) -> list[str]:
    """Where we are behind, plainly."""
    found, pairs = behind(cases)
    if not pairs:
        return []
    if not found:
        return [f"Ours is ahead in all {pairs} comparisons of a peer and a case."]
    text = f"Ours is ahead in {pairs - len(found)} of {pairs} comparisons of a peer and a case, and behind in these:\n"
    for b in found:
        where = f"{b.case}, {b.groups} groups" if b.groups > 1 else b.case
        flat = cases[b.case].get((FLAT, b.groups))
        better = f"; flat, {flat.ratio(cases[b.case][b.peer, b.groups]):.2f}×" if flat else ""
        text += f"\n- `{where}`: {b.peer}, {b.ratio:.2f}×{better}"
    return [text]


def scaling(cases: Cases) -> list[str]:
    """What a tensor and a group cost, and how far the largest tensor gets."""
    sentences = []
    tensors, elements = points(cases, "tensors"), points(cases, "elements")
    for own in TIMED:
        values = host_times(tensors, own)
        if len(values) > 1:
            start, slope = line(values)
            name = "Ours" if own == OURS else "Flat"
            sentences.append(
                f"{name}: a step costs the host {start * 1e6:.0f} µs and {slope * 1e6:.2f} µs a tensor, "
                f"over {values[0][0]} to {values[-1][0]} tensors of 10⁶ elements in all."
            )
    groups = [(n, them[OURS].median) for n, them in points(cases, "groups").items() if OURS in them]
    if len(groups) > 1:
        sentences.append(f"A parameter group adds {line(groups)[1] * 1e6:.2f} µs to a step, lr changing in each.")
    else:
        costs = [cost for one, _, cost, _ in group_costs(cases.values()) if one.contender == OURS]
        if costs:
            sentences.append(f"A parameter group adds up to {max(costs) * 1e6:.2f} µs to a step.")
    if elements:
        most, them = list(elements.items())[-1]
        if OURS in them and CEILING in them:
            sentences.append(
                f"One tensor of {most:.0e} elements takes {ms(them[OURS].median)} ms, {them[OURS].rate:.0f} GB/s, "
                f"{percent(share(them[OURS], them[CEILING]))}% of the ceiling"
                + (
                    f" (the bare loop: {percent(share(them[BARE_LOOP], them[CEILING]))}%)."
                    if BARE_LOOP in them
                    else "."
                )
            )
    return [" ".join(sentences)] if sentences else []


def on_a_gpu(gpu: dict[str, Any]) -> list[str]:
    """What bench/gpu.py measured, ours and torch's fused."""
    copy = gpu_report.copy_rate(gpu)
    header = ("case", "ours, device ms", "wall ms", "of the copy bandwidth", "torch fused takes, device", "wall")
    rows = [_cells(header), _cells(["---"] * len(header))]
    for f in gpu_report.all_figures(gpu):
        if f.contender == OURS:
            share_of_copy = "" if f.percent is None else f"{f.percent:.1f}%"
            against = ["" if r is None else f"{r:.2f}×" for r in (f.device_vs_fused, f.wall_vs_fused)]
            where = gpu_report.label(f.case, f.groups)
            rows.append(_cells((where, gpu_report.ms(f.device), gpu_report.ms(f.wall), share_of_copy, *against)))
    machine = gpu["machine"]
    rate = "" if copy is None else f"; a copy moves {copy:.0f} GB/s"
    where = f"On a GPU: {machine['device']}, torch {machine['torch']}, {str(gpu['date'])[:10]}{rate}."
    return [where, "\n".join(rows)]
