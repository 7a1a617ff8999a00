"""The README's first plot and its section on performance, made of a report: no figure is typed by hand."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence

from figures import (
    Cases,
    Report,
    behind,
    copy_rate,
    device,
    group_costs,
    host_times,
    is_peer,
    line,
    points,
    results,
    share,
    stem_of,
)
from peers import FLAT, FUSED, OURS
from tables import filled_columns, percent, rule_name, size
from workloads import CEILING, LEAD

IN_CACHE = 1000  # tensors; the objects of ten times as many are larger than a core's caches
HEADER = (
    "tensors × elements", "rule", "dtype", "gradients", "ours, ms", "ours, device ms", "flat, ms", "torch fused, ms",
    "best of the others, ms", "against the best", "fused takes, device", "of the ceiling",
)  # fmt: skip


def markers(part: str) -> tuple[str, str]:
    """Where a part begins and ends."""
    return f"<!-- {part}:begin -->", f"<!-- {part}:end -->"


def replaced(text: str, part: str, content: str) -> str:
    """A text with what stands between the markers of a part made anew.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    begin, end = markers(part)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def rewritten(text: str, report: Report, gpu: Report | None) -> str:
    """A text with its plot and its section made anew. Raises as `replaced` does."""
    drawn = set(LEAD) & set(results(report))
    plot = f"![Time of a step, ours and others'](bench/results/{stem_of(report)}-lead.png)" if drawn else ""
    return replaced(replaced(text, "plot", plot), "performance", section(report, gpu))


def section(report: Report, gpu: Report | None) -> str:
    """What stands between the markers."""
    cases, results_of = results(report), f"bench/results/{stem_of(report)}"
    parts = [opening(report, cases), table(cases), legend(cases), *lost(cases), *scaling(cases)]
    parts.append(f"![All contenders side by side]({results_of}-peers.png)")
    if points(cases, "tensors"):
        parts.append(f"![Scaling over tensors, elements and groups]({results_of}-scaling.png)")
    if gpu is not None:
        rate = copy_rate(gpu)
        copy = f"; a copy, the ceiling there, moves {rate:.0f} GB/s" if rate else ""
        own = gpu["machine_info"].get("wd_kernels", {})
        parts.append(filled(f"On a GPU: {device(gpu)}, torch {own.get('torch')}, {str(gpu['datetime'])[:10]}{copy}."))
        parts += [table(results(gpu)), f"![Contenders on a GPU](bench/results/{stem_of(gpu)}-peers.png)"]
    parts.append(
        f"All rows, with quartile ranges and rates, are in [bench/results]({results_of}.txt); to measure again:"
        "\n\n    make peers  # optional: the other libraries; the benchmark names those that are missing\n"
        "    make bench\n    .venv/bin/python bench/report.py bench.json --save --readme"
    )
    return "\n\n".join(parts)


def filled(*sentences: str) -> str:
    """A paragraph, as wide as the README's others."""
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False)


def digits(seconds: float) -> str:
    """Milliseconds, to three digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def opening(report: Report, cases: Cases) -> str:
    machine = report["machine_info"]
    own = machine.get("wd_kernels", {})
    names = dict.fromkeys(name for them in cases.values() for name, _ in them if is_peer(name))
    lines = [
        f"Whole `opt.step()` on {own.get('threads', '?')} threads of {device(report)} "
        f"({own.get('instruction set', '?')}), torch {own.get('torch', '?')}, {str(report['datetime'])[:10]}.",
        f"Contenders take turns in one run: ours, {', '.join(names)}.",
        "Times are medians over rounds, ratios medians of the quotients within a round.",
    ]
    missing = report.get("missing", {})
    if missing:
        lines.append(f"Missing: {', '.join(missing)}.")
    return filled(*lines)


def legend(cases: Cases) -> str:
    lines = ['"Against the best" is how many times longer the fastest of all peers takes than ours.']
    if any(name == FLAT for them in cases.values() for name, _ in them):
        lines.append('"Flat" is ours after `wd_kernels.flatten_`.')
    if any((CEILING, 1) in them for them in cases.values()):
        lines.append(
            "The ceiling is the rate of a plain stream over as many bytes with the same mix of reads and writes, "
            "measured in the same rounds."
        )
    return filled(*lines)


def table(cases: Cases) -> str:
    """A row per case of one group that is no point of a sweep; columns in which nothing stands are left out."""
    rows = [HEADER]
    most = max((r.info["threads"] for them in cases.values() for r in them.values()), default=1)
    for them in cases.values():
        ours = them.get((OURS, 1))
        peers = [r for (name, _), r in them.items() if is_peer(name)]
        if ours is None or not peers or ours.info["sweep"] or any(groups > 1 for _, groups in them):
            continue
        info = ours.info
        threads = "" if info["threads"] == most else f", {info['threads']} thread"
        fused, flat, ceiling = (them.get((name, 1)) for name in (FUSED, FLAT, CEILING))
        next_best = min((r for r in peers if r is not fused), key=ours.ratio, default=None)
        rows.append(
            (
                size(info).replace(" x ", " × "),
                rule_name(info),
                info["dtype"] + threads,
                info["gradients"],
                digits(ours.median),
                digits(statistics.median(ours.info["device"])) if ours.info["device"] else "",
                digits(flat.median) if flat else "",
                digits(fused.median) if fused else "",
                f"{next_best.contender}: {digits(next_best.median)}" if next_best else "",
                f"{min(ours.ratio(r) for r in peers):.2f}×",
                f"{ours.device_ratio(fused):.2f}×" if fused and ours.info["device"] else "",
                f"{percent(share(ours, ceiling))}%" if ceiling else "",
            )
        )
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table, without the columns that are empty."""
    head, *rest = filled_columns(rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest))


def lost(cases: Cases) -> list[str]:
    """Where we are behind, plainly."""
    found, pairs = behind(cases)
    if not pairs:
        return []
    if not found:
        return [f"Ours is ahead in all {pairs} comparisons of a peer and a case."]
    lines = [
        f"Ours is ahead in {pairs - len(found)} of {pairs} comparisons of a peer and a case, and behind in these:\n"
    ]
    for b in found:
        them = cases[b.case]
        own, peer, flat = them[b.own, b.groups], them[b.peer, b.groups], them.get((FLAT, b.groups))
        text = f"- `{b.case}`{f', {b.groups} groups' if b.groups > 1 else ''}: {b.peer}, {b.ratio:.2f}×"
        if own.bytes != peer.bytes:
            each = (f"{r.info['bytes_per_parameter']:g}" for r in (own, peer))
            text += " (bytes a parameter: ours {}, theirs {})".format(*each)
        lines.append(text + (f"; flat: {flat.ratio(peer):.2f}×" if flat else ""))
    return ["\n".join(lines)]


def scaling(cases: Cases) -> list[str]:
    """What a tensor and a group cost, and how far the largest tensor gets."""
    sentences = []
    tensors, groups, elements = (points(cases, sweep) for sweep in ("tensors", "groups", "elements"))
    for own, name in ((OURS, "Ours"), (FLAT, "Flat")):
        values = host_times(tensors, own)
        few = [(n, seconds) for n, seconds in values if n <= IN_CACHE]
        if len(few) > 1:
            start, slope = line(few)
            text = f"{name}: a step costs the host {start * 1e6:.0f} µs and {slope * 1e6:.2f} µs a tensor"
            if len(values) > len(few):
                (n, before), (most, last) = few[-1], values[-1]
                each = (last - before) / (most - n) * 1e6
                text += f" up to {n} tensors, {each:.2f} from there to {most}, whose objects leave the caches"
            sentences.append(f"{text} (10⁶ elements in all).")
    steps = [(n, them[OURS].median) for n, them in groups.items() if OURS in them]
    costs = [cost for one, _, cost, _ in group_costs(cases.values()) if one.contender == OURS]
    if len(steps) > 1:
        sentences.append(f"A parameter group adds {line(steps)[1] * 1e6:.2f} µs to a step, lr changing in each.")
    elif costs:
        sentences.append(f"A parameter group adds up to {max(costs) * 1e6:.2f} µs to a step.")
    if elements:
        most, them = list(elements.items())[-1]
        if OURS in them and CEILING in them:
            ours = them[OURS]
            sentences.append(
                f"One tensor of {most:.0e} elements takes {digits(ours.median)} ms, {ours.rate:.0f} GB/s, "
                f"{percent(share(ours, them[CEILING]))}% of the ceiling."
            )
    return [filled(*sentences)] if sentences else []
