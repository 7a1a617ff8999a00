"""The plots of bench/gpu.py: all contenders in time and bandwidth, and ours against the budget lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_cases import BILLION, TARGETS
from gpu_report import REHEARSAL, Figures, all_figures, copy_rate, label
from peers import CUDA, FLAT, FUSED, OURS

__all__ = ["plot"]

COLORS = {OURS: "#1565c0", FLAT: "#5ba3e6", CUDA: "#00796b", FUSED: "#9a5b13", "torch foreach": "#c08a4a"}
OTHERS = ("#5a7d3c", "#7b4fa3", "#b03a5b", "#3f8f8f", "#8a8a2a", "#606060", "#c2703d")


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what there is to draw; returns the paths. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figures = all_figures(report)
    if not figures:
        return []
    with plt.rc_context({"font.size": 9, "axes.titlelocation": "left", "axes.titlesize": 10}):
        plt.rc("axes.spines", top=False, right=False)
        paths = [peers(plt, report, figures, folder / "peers.png")]
        billion = [f for f in figures if f.case in TARGETS and f.percent is not None]
        if billion:
            paths.append(roofline(plt, report, billion, folder / "roofline.png"))
    return paths


def colors(figures: list[Figures]) -> dict[str, str]:
    others = [name for name in dict.fromkeys(f.contender for f in figures) if name not in COLORS]
    return COLORS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def title(report: dict[str, Any]) -> str:
    machine = report["machine"]
    where = REHEARSAL if report.get("rehearsal") else f"{machine.get('device')}, torch {machine.get('torch')}"
    rate = copy_rate(report)
    return where if rate is None else f"{where}\ncopy bandwidth measured in the same run: {rate:.0f} GB/s"


def peers(plt: Any, report: dict[str, Any], figures: list[Figures], path: Path) -> Path:
    """Bars of every contender of every case: wall clock, device time, share of the copy bandwidth."""
    color = colors(figures)
    groups: dict[str, list[Figures]] = {}
    for f in figures:
        groups.setdefault(label(f.case, f.groups), []).append(f)
    at: list[float] = []
    ticks: list[float] = []
    ordered: list[Figures] = []
    y = 0.0
    for members in groups.values():
        ticks.append(y + (len(members) - 1) / 2)
        for f in members:
            at.append(y)
            ordered.append(f)
            y += 1
        y += 0.8
    figure, axes = plt.subplots(
        1, 3, figsize=(14, 1.6 + 0.19 * y), layout="constrained", sharey=True, width_ratios=(1, 1, 1)
    )
    panels = (
        ("Wall clock of a step, ms (logarithmic)", [f.wall * 1e3 for f in ordered], "{:.3g}"),
        ("Device time of a step, ms (logarithmic)", [f.device * 1e3 for f in ordered], "{:.3g}"),
        ("Device: percent of the copy bandwidth", [f.percent or 0.0 for f in ordered], "{:.0f}%"),
    )
    for axis, (name, values, form) in zip(axes, panels, strict=True):
        axis.barh(at, values, height=0.86, color=[color[f.contender] for f in ordered])
        for where, value in zip(at, values, strict=True):
            axis.annotate(form.format(value), (value, where), (3, 0), textcoords="offset points", va="center", size=7)
        axis.set_title(name)
        axis.grid(axis="x", alpha=0.25)
        axis.set_axisbelow(True)
        if "logarithmic" in name:
            axis.set_xscale("log")
            axis.set_xlim(min(values) / 2, max(values) * 4)
        else:
            axis.set_xlim(0, max(105.0, max(values) * 1.15))
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(ticks, list(groups))
    axes[0].set_ylim(y - 0.3, -0.9)
    names = list(dict.fromkeys(f.contender for f in figures))
    handles = [plt.Rectangle((0, 0), 1, 1, color=color[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), frameon=False)
    figure.suptitle(title(report), x=0.01, ha="left", size=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def roofline(plt: Any, report: dict[str, Any], figures: list[Figures], path: Path) -> Path:
    """Share of the copy bandwidth of one long tensor, and the budget of each mode as a line."""
    color = colors(figures)
    cases = list(dict.fromkeys(f.case for f in figures))
    names = list(dict.fromkeys(f.contender for f in figures))
    width = 0.84 / len(names)
    figure, axis = plt.subplots(figsize=(13, 5.2), layout="constrained")
    for i, case in enumerate(cases):
        own = [f for f in figures if f.case == case]
        for k, f in enumerate(own):
            where, value = i + (k - (len(own) - 1) / 2) * width, f.percent or 0.0
            axis.bar(where, value, width * 0.94, color=color[f.contender])
            inside = value > 20
            axis.annotate(
                f"{value:.1f}%  ({f.bytes_per_parameter:.3g} B)",
                (where, 1.5 if inside else value + 1.5),
                ha="center",
                va="bottom",
                rotation=90,
                size=8,
                color="white" if inside else "black",
            )
    for i, case in enumerate(cases):
        axis.plot([i - 0.45, i + 0.45], [TARGETS[case]] * 2, color="#c62828", linewidth=1.4, linestyle="--")
    axis.axhline(100, color="#404040", linewidth=0.8)
    modes = [case.removeprefix(f"{BILLION}, ") + f"\nbudget {TARGETS[case]}%" for case in cases]
    axis.set_xticks(range(len(cases)), modes)
    axis.set_xlim(-0.6, len(cases) - 0.4)
    axis.set_ylim(0, max(105.0, 1.05 * max(f.percent or 0.0 for f in figures)))
    axis.set(ylabel="percent of the copy bandwidth", title=title(report) + f"\n{BILLION} in one tensor, device time")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color[name]) for name in names]
    handles.append(plt.Line2D([], [], color="#c62828", linestyle="--"))
    axis.legend(handles, [*names, "budget"], frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
