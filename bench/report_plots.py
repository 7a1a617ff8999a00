"""The plots of a CPU benchmark: peers side by side, the roofline, and the scaling sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cpu_cases import BARE_LOOP, CEILING, DEEPSPEED, FLAT, LEAD, REFERENCE, TIMED
from peers import FOREACH, FUSED, OURS
from report_figures import Cases, Result, is_peer, points, results, share
from report_tables import heading, rule_name, size

__all__ = ["plot"]

COLORS = {
    OURS: "#1565c0",
    FLAT: "#5ba3e6",
    REFERENCE: "#b4cfe8",
    FUSED: "#9a5b13",
    FOREACH: "#c08a4a",
    "torch for-loop": "#dcb98c",
    DEEPSPEED: "#5a7d3c",
    "torch-optimi": "#7b4fa3",
    "torchao 8-bit": "#b03a5b",
    "bitsandbytes 8-bit": "#3f8f8f",
    "bitsandbytes 32-bit": "#8fc4c4",
    "pytorch_optimizer": "#8a8a2a",
    BARE_LOOP: "#909090",
    CEILING: "#303030",
}
#: Ours are drawn over the others, with other marks.
MARKS = {OURS: "D", FLAT: "d", BARE_LOOP: "|", CEILING: "|", REFERENCE: "x"}


def plot(report: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draws what there is to draw; returns the paths. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = results(report)
    machine = dict(heading(report))
    title = f"{machine['processor']}, torch {machine.get('torch', '?')}, {machine['date'][:10]}"
    paths = []
    with plt.rc_context({"font.size": 9, "axes.titlelocation": "left", "axes.titlesize": 10}):
        plt.rc("axes.spines", top=False, right=False)
        for name, draw in (("lead", lead), ("peers", peers), ("roofline", roofline), ("scaling", scaling)):
            figure = draw(plt, cases)
            if figure is None:
                continue
            figure.suptitle(title, x=0.01, ha="left", size=11)
            paths.append(folder / f"{stem}-{name}.png")
            figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
            plt.close(figure)
    return paths


def lead(plt: Any, cases: Cases) -> Any:
    """What stands first in the README: a bar for every optimizer, with the time of its step, in a few cases."""
    chosen = {name: them for name in LEAD if OURS in (them := _only(cases.get(name, {})))}
    if not chosen:
        return None
    most = max(map(len, chosen.values()))
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(4.6 * len(chosen), 1.2 + 0.27 * most), layout="constrained", squeeze=False
    )
    for axis, them in zip(axes[0], chosen.values(), strict=True):
        order = sorted(them.values(), key=lambda r: r.median)
        values = [r.median * 1e3 for r in order]
        bars = axis.barh([r.contender for r in order], values, color=[_color(r.contender) for r in order], height=0.72)
        axis.bar_label(bars, [f"{v:.3g}" for v in values], padding=3)
        for label, r in zip(axis.get_yticklabels(), order, strict=True):
            label.set_fontweight("bold" if r.contender in (OURS, FLAT) else "normal")
        axis.invert_yaxis()
        axis.set_xlim(0, 1.12 * max(values))
        axis.set_title(f"{size(order[0].info)}, {order[0].info['dtype']}".replace(" x ", " × "))
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    figure.supxlabel("ms, one step of AdamW: shorter is better", size=9)
    return figure


def _only(them: dict[tuple[str, int], Result]) -> dict[str, Result]:
    """Ours and the peers of a case of one group."""
    return {name: r for (name, groups), r in them.items() if groups == 1 and (is_peer(name) or name in (OURS, FLAT))}


def rows(cases: Cases) -> dict[str, dict[str, Result]]:
    """The contenders of every case that is no point of a sweep, by a label of case and number of groups."""
    most = max((r.info["threads"] for them in cases.values() for r in them.values()), default=1)
    found: dict[str, dict[str, Result]] = {}
    for them in cases.values():
        for r in them.values():
            if r.info["sweep"]:
                continue
            parts = [f"{size(r.info)}  {rule_name(r.info)}", r.info["dtype"], r.info["gradients"]]
            if r.info["threads"] != most:
                parts.append(f"{r.info['threads']} thread")
            if any(groups > 1 for _, groups in them):
                parts.append(f"{r.groups} group{'s' * (r.groups > 1)}")
                parts += ["lr changing"] * (r.info["lr"] == "changing")
            found.setdefault(", ".join(parts), {})[r.contender] = r
    return {label: them for label, them in found.items() if OURS in them}


def _dots(axis: Any, labelled: dict[str, dict[str, Result]], value: Callable[[str, Result], float | None]) -> None:
    """A row per label, a mark per contender."""
    for y, (label, them) in enumerate(labelled.items()):
        axis.axhline(y, color="#e4e4e4", linewidth=0.7, zorder=0)
        for name, r in them.items():
            x = value(label, r)
            if x is not None:
                own = name in (OURS, FLAT)
                mark = MARKS.get(name, "o")
                axis.scatter(
                    x, y, s=46 if own else 90 if mark == "|" else 26, marker=mark, color=_color(name), zorder=3 + own,
                    linewidths=1.6 if mark in "|x" else 0.0,
                )  # fmt: skip
    axis.set_ylim(len(labelled) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _color(name: str) -> str:
    return COLORS.get(name, "#c2703d")


def _legend(plt: Any, figure: Any, names: Iterable[str], columns: int = 7) -> None:
    names = list(names)
    handles = [
        plt.Line2D([], [], linestyle="", marker=MARKS.get(n, "o"), color=_color(n), markersize=7, markeredgewidth=1.5)
        for n in names
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), columns), frameon=False)


def peers(plt: Any, cases: Cases) -> Any:
    """Every contender of every case: time of a step, and how much longer than ours."""
    labelled = rows(cases)
    if not labelled:
        return None
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 1.9 + 0.27 * len(labelled)), layout="constrained", sharey=True
    )
    _dots(left, labelled, lambda _, r: r.median * 1e3)
    _dots(right, labelled, lambda label, r: None if r.contender in (OURS, CEILING) else labelled[label][OURS].ratio(r))
    left.set_xscale("log")
    right.set_xscale("log")
    left.set_title("Time of a step, ms (logarithmic)")
    right.set_title("How many times longer than wd_kernels (logarithmic)")
    right.axvline(1, color=_color(OURS), linewidth=1.2)
    for axis in (left, right):
        axis.xaxis.set_major_formatter("{x:g}")
    left.set_yticks(range(len(labelled)), list(labelled))
    _legend(plt, figure, dict.fromkeys(name for them in labelled.values() for name in them))
    return figure


def roofline(plt: Any, cases: Cases) -> Any:
    """Rates against the measured ceiling: over the size of one tensor, and as percent of it in every case."""
    labelled = {label: them for label, them in rows(cases).items() if CEILING in them}
    at = {n: them for n, them in points(cases, "elements").items() if CEILING in them}
    if not labelled and not at:
        return None
    height = max(4.6, 1.9 + 0.27 * len(labelled))
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, height), layout="constrained", width_ratios=(1, 1.1))
    names = [n for n in dict.fromkeys(n for them in at.values() for n in them) if n not in TIMED.values()]
    for name in names:
        own = [(them[name].bytes, them[name].rate) for them in at.values() if name in them]
        ceiling = name == CEILING
        left.plot(
            *zip(*own, strict=True), color=_color(name), linewidth=2.2 if ceiling else 1.4,
            linestyle="--" if name in (CEILING, BARE_LOOP) else "-", marker="" if ceiling else "o", markersize=4,
            label="measured ceiling" if ceiling else name, zorder=2 if ceiling else 3,
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="bytes that a step moves (one tensor, float32)", ylabel="GB/s")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_title("Rate, by the byte model (logarithmic)")
    left.grid(alpha=0.25)
    if names:
        left.legend(frameon=False, loc="lower right")
    _dots(right, labelled, lambda label, r: None if r.contender == CEILING else share(r, labelled[label][CEILING]))
    right.axvline(100, color=_color(CEILING), linewidth=1.2)
    right.set_xlim(left=0)
    right.set_title("Percent of the ceiling")
    right.set_yticks(range(len(labelled)), list(labelled))
    shown = [name for name in dict.fromkeys(n for them in labelled.values() for n in them) if name != CEILING]
    if shown:
        _legend(plt, figure, shown)
    return figure


def scaling(plt: Any, cases: Cases) -> Any:
    """Time of a step over tensors, elements and groups; of ours, that of host and launches apart."""
    from matplotlib.ticker import LogLocator, NullFormatter

    sweeps = {sweep: points(cases, sweep) for sweep in ("tensors", "elements", "groups")}
    sweeps = {sweep: at for sweep, at in sweeps.items() if len(at) > 1}
    if not sweeps:
        return None
    titles = {
        "tensors": "Over tensors, 10⁶ elements in all",
        "elements": "Over elements of one tensor",
        "groups": "Over groups, 1000 tensors of 1000, lr changing",
    }
    figure, axes = plt.subplots(1, len(sweeps), figsize=(4.8 * len(sweeps), 4.9), layout="constrained", squeeze=False)
    for axis, (sweep, at) in zip(axes[0], sweeps.items(), strict=True):
        for name in (FUSED, DEEPSPEED, BARE_LOOP, FLAT, OURS):
            _line(axis, at, name, lambda r: r.median, "-", name)
            if name in TIMED and sweep != "groups":
                _line(axis, at, TIMED[name], lambda r: r.host, "--", f"{name}, host alone", name)
                _line(axis, at, TIMED[name], lambda r: r.kernel, ":", f"{name}, launches alone", name)
        axis.set(xscale="log", yscale="log", xlabel=sweep, ylabel="ms")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(titles[sweep])
        axis.grid(alpha=0.25)
    known: dict[str, Any] = {}
    for axis in axes[0]:
        handles, labels = axis.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    figure.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=5 if len(known) > 6 else 6, frameon=False
    )
    return figure


def _line(
    axis: Any,
    at: dict[int, dict[str, Result]],
    name: str,
    value: Callable[[Result], float],
    style: str,
    label: str,
    color: str = "",
) -> None:
    own: Sequence[tuple[int, float]] = [(n, value(them[name]) * 1e3) for n, them in at.items() if name in them]
    if own:
        marker = "o" if style == "-" else ""
        axis.plot(
            *zip(*own, strict=True), style, marker=marker, markersize=4, color=_color(color or name), label=label,
            linewidth=1.6,
        )  # fmt: skip
