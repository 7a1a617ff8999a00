"""The plots of a report, CPU's or GPU's: the leading cases, peers side by side, and the scaling sweeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from figures import Cases, Report, Result, copy_rate, device, is_peer, points, results
from internals import KINDS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from peers import CUDA, DEEPSPEED, FLAT, FOREACH, FUSED, OURS
from tables import REHEARSAL, heading, size
from workloads import BARE_LOOP, CEILING, LEAD, REFERENCE, TARGETS, TIMED

COLORS = defaultdict(lambda: "#c2703d", {
    OURS: "#1565c0", FLAT: "#5ba3e6", CUDA: "#00796b", REFERENCE: "#b4cfe8", FUSED: "#9a5b13", FOREACH: "#c08a4a",
    "torch for-loop": "#dcb98c", DEEPSPEED: "#5a7d3c", "torch-optimi": "#7b4fa3", "torchao 8-bit": "#b03a5b",
    "bitsandbytes 8-bit": "#3f8f8f", "bitsandbytes 32-bit": "#8fc4c4", "pytorch_optimizer": "#8a8a2a",
    "apex": "#606060", "TransformerEngine": "#b0306b", "flashoptim": "#d08020", BARE_LOOP: "#909090",
    CEILING: "#303030",
})  # fmt: skip
#: Ours are drawn over the others, with other marks.
MARKS = {OURS: "D", FLAT: "d", CUDA: "s", BARE_LOOP: "|", CEILING: "|", REFERENCE: "x"}
SWEEP_TITLES = {
    "tensors": "Over tensors, 10⁶ elements in all", "elements": "Over elements of one tensor",
    "groups": "Over groups, 1000 tensors of 1000, lr changing",
}  # fmt: skip
STYLE: Any = {
    "font.size": 9, "axes.titlelocation": "left", "axes.titlesize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "figure.constrained_layout.use": True, "legend.frameon": False,
}  # fmt: skip


def plot(report: Report, folder: Path, stem: str = "") -> list[Path]:
    """Draws what there is to draw, into STEM-NAME.png; returns the paths."""
    cases, machine = results(report), dict(heading(report))
    title = f"{machine.get('processor', device(report))}, torch {machine.get('torch', '?')}, {machine['date'][:10]}"
    rate = copy_rate(report)
    title = REHEARSAL if report.get("rehearsal") else title + (f", a copy moves {rate:.0f} GB/s" if rate else "")
    paths = []
    with mpl.rc_context(STYLE):
        for name, draw in {"lead": lead, "peers": peers, "scaling": scaling}.items():
            if (figure := draw(cases)) is not None:
                figure.suptitle(title, x=0.01, ha="left", size=11)
                paths.append(folder / "-".join(filter(None, (stem, f"{name}.png"))))
                figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
    return paths


def lead(cases: Cases) -> Figure | None:
    """What stands first in the README: a bar for every optimizer, with the time of its step, in a few cases."""
    chosen = []
    for them in (cases[name] for name in LEAD if (OURS, 1) in cases.get(name, {})):
        own = [r for (name, groups), r in them.items() if groups == 1 and (is_peer(name) or name in (OURS, FLAT))]
        chosen.append(sorted(own, key=lambda r: r.median))
    if not chosen:
        return None
    figure = Figure(figsize=(4.6 * len(chosen), 1.2 + 0.27 * max(map(len, chosen))))
    axes = figure.subplots(1, len(chosen), squeeze=False)
    for axis, own in zip(axes[0], chosen, strict=True):
        values = [r.median * 1e3 for r in own]
        bars = axis.barh([r.contender for r in own], values, color=[COLORS[r.contender] for r in own], height=0.72)
        axis.bar_label(bars, [f"{v:.3g}" for v in values], padding=3)
        for label, r in zip(axis.get_yticklabels(), own, strict=True):
            label.set_fontweight("bold" if r.contender in (OURS, FLAT) else "normal")
        axis.invert_yaxis()
        title = f"{size(own[0].info)}, {own[0].info['dtype']}".replace(" x ", " × ")
        axis.set(xlim=(0, 1.12 * max(values)), title=title)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    figure.supxlabel("ms, one step of AdamW: shorter is better", size=9)
    return figure


def rows(cases: Cases) -> dict[str, dict[str, Result]]:
    """The contenders of every case that is no point of a sweep, by a label of case and number of groups."""
    most = max((r.info["threads"] for them in cases.values() for r in them.values()), default=1)
    found: dict[str, dict[str, Result]] = {}
    for them in cases.values():
        for r in them.values():
            if r.info["sweep"]:
                continue
            parts = [f"{size(r.info)}  {KINDS[r.info['rule']][0].title}", r.info["dtype"], r.info["gradients"]]
            if r.info["threads"] != most:
                parts.append(f"{r.info['threads']} thread")
            if any(groups > 1 for _, groups in them):
                parts.append(f"{r.groups} group{'s' * (r.groups > 1)}")
                parts += ["lr changing"] * (r.info["lr"] == "changing")
            found.setdefault(", ".join(parts), {})[r.contender] = r
    return {label: them for label, them in found.items() if OURS in them}


def peers(cases: Cases) -> Figure | None:
    """Every contender of every case: time of a step, how much longer than ours, and how near to the ceiling."""
    labelled = rows(cases)
    if not labelled:
        return None
    on_device = any(r.info["device"] for them in labelled.values() for r in them.values())
    panels: dict[str, Callable[[Result, dict[str, Result]], float | None]] = {
        "Time of a step, ms (logarithmic)": lambda r, them: r.median * 1e3,
        "How many times longer than wd_kernels (logarithmic)": lambda r, them: them[OURS].ratio(r),
    }
    if on_device:
        panels["The same on the device (logarithmic)"] = lambda r, them: them[OURS].device_ratio(r)
    panels["Percent of the ceiling"] = lambda r, them: r.share(them.get(CEILING))
    figure = Figure(figsize=(3 + 5 * len(panels), 1.9 + 0.27 * len(labelled)))
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for y, them in enumerate(labelled.values()):
            axis.axhline(y, color="#e4e4e4", linewidth=0.7, zorder=0)
            for name, r in them.items():
                x, own, mark = value(r, them), name in (OURS, FLAT, CUDA), MARKS.get(name, "o")
                if x is None or (name == CEILING and not title.startswith("Time")):
                    continue
                area, width = (46 if own else 90 if mark == "|" else 26), (1.6 if mark in "|x" else 0.0)
                axis.scatter(x, y, s=area, marker=mark, color=COLORS[name], zorder=3 + own, linewidths=width)
            budget = TARGETS.get(them[OURS].case) if on_device and title.startswith("Percent") else None
            if budget:
                axis.plot([budget] * 2, [y - 0.4, y + 0.4], color="red", linewidth=1.6)
        axis.set(title=title, axisbelow=True)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.25)
        if "logarithmic" in title:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        if not title.startswith("Time"):
            axis.axvline(100 if title.startswith("Percent") else 1, color=COLORS[OURS], linewidth=1.2)
    axes[0].set(yticks=range(len(labelled)), yticklabels=list(labelled), ylim=(len(labelled) - 0.4, -0.6))
    names = dict.fromkeys(name for them in labelled.values() for name in them)
    looks: Any = {"linestyle": "", "markersize": 7, "markeredgewidth": 1.5}
    lines = [Line2D([], [], marker=MARKS.get(name, "o"), color=COLORS[name], label=name, **looks) for name in names]
    lines += [Line2D([], [], color="red", label="budget")] * on_device
    figure.legend(handles=lines, loc="outside lower center", ncols=8)
    return figure


def scaling(cases: Cases) -> Figure | None:
    """Time of a step over tensors, elements and groups; of ours, that of host and launches apart."""
    sweeps = {sweep: at for sweep in SWEEP_TITLES if len(at := points(cases, sweep)) > 1}
    if not sweeps:
        return None
    figure = Figure(figsize=(4.8 * len(sweeps), 4.9))
    axes = figure.subplots(1, len(sweeps), squeeze=False)
    known: dict[str, Any] = {}
    for axis, (sweep, at) in zip(axes[0], sweeps.items(), strict=True):
        lines: list[tuple[str, str, str, Callable[[Result], float]]] = []
        for name in (FUSED, DEEPSPEED, BARE_LOOP, FLAT, OURS):
            lines.append((name, name, "-o", lambda r: r.median))
            if name in TIMED and sweep != "groups":
                lines.append((TIMED[name], f"{name}, host alone", "--", lambda r: r.host))
                lines.append((TIMED[name], f"{name}, launches alone", ":", lambda r: median(r.info["launches"])))
        for name, label, style, value in lines:
            x, y = [n for n in at if name in at[n]], [value(at[n][name]) * 1e3 for n in at if name in at[n]]
            if x:
                color = COLORS[label.split(",")[0]]
                (known[label],) = axis.plot(x, y, style, markersize=4, color=color, linewidth=1.6)
        axis.set(xscale="log", yscale="log", xlabel=sweep, ylabel="ms", title=SWEEP_TITLES[sweep])
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=5 if len(known) > 6 else 6)
    return figure
