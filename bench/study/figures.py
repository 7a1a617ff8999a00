"""The study's pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .findings import HELD_OUT, Array, Findings, best_decays
from .plan import BUDGET_LR, GROWTHS, LAWS, METHODS, PLAIN, RIVALS, SCHEDULES, VARIANTS
from .report import signed
from .train import NOISE, STEPS_AN_EPOCH

TITLES = {"normalised": "normalised network, clean labels", "noisy": "no normalisation, noisy labels"}
BLUE, BROWN, GREEN, RED = "#1565c0", "#9a5b13", "#2e7d32", "#c62828"
STYLE: Any = {
    "font.size": 10, "axes.titlelocation": "left", "axes.titlesize": 10, "legend.frameon": False,
    "figure.constrained_layout.use": True,
}  # fmt: skip


def draw(found: Findings, folder: Path) -> list[Path]:
    """Draws every figure into `folder`; returns the paths."""
    with mpl.rc_context(STYLE):
        figures = {f"ridges_{network}": _ridges(found, network) for network in NOISE}
        against = "AdamW independent, cosine: the best weight decay against the training budget"
        retrained = "Best of Adam-L2 and of AdamW under three schedules, retrained with new seeds"
        figures["schedules"] = _by_network(found, _schedules, (11, 4.2), retrained)
        figures["budgets"] = _by_network(found, _budgets, (11, 4.4), against)
        figures["anytime"] = _by_network(found, _anytime, (13, 4.6), "Anytime performance")
        figures["growths"] = _growths(found)
        varied = "Plain, cautious and corrected decay of AdamW, each at its best, retrained with new seeds"
        figures["variants"] = _by_network(found, _variants, (11, 4.2), varied)
        for name, figure in figures.items():
            figure.savefig(folder / f"study_{name}.png", dpi=130)
    return [folder / f"study_{name}.png" for name in figures]


def _new(rows: int, columns: int, size: tuple[float, float], title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure, list(figure.subplots(rows, columns).flat)


def _by_network(
    found: Findings, panel: Callable[[Findings, Axes, str], None], size: tuple[float, float], title: str
) -> Figure:
    """A panel for each network."""
    figure, panels = _new(1, 2, size, title)
    for axes, network in zip(panels, NOISE, strict=True):
        axes.set_title(TITLES[network])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        panel(found, axes, network)
    return figure


def _edges(centres: list[float]) -> Array:
    """Where cells end whose centres are in equal ratios."""
    half = (centres[1] / centres[0]) ** 0.5
    return np.asarray([centres[0] / half, *(c * half for c in centres)])


def _ridges(found: Findings, network: str) -> Figure:
    """(a) Error over lr and weight decay, the best weight decay of each lr, and the slope through them."""
    figure, panels = _new(2, 4, (16, 7.6), f"Where the good weight decays lie: {TITLES[network]}")
    tables = {name: 100 * found.table(name, network).mean(-1) for name in METHODS}
    least = min(float(table.min()) for table in tables.values())
    shades = LogNorm(least, 4 * least)
    for axes, (name, method) in zip(panels, METHODS.items(), strict=False):
        lrs, decays = method.grid(found.plan.size)
        axes.pcolormesh(_edges(lrs), _edges(decays), tables[name].T, cmap="viridis_r", norm=shades)
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="weight decay")
        measured = found.ridge(name, network)
        best, _ = best_decays(found.table(name, network), decays, HELD_OUT)
        counted = np.asarray(measured.used)
        axes.plot(np.asarray(lrs)[counted], np.exp(best[counted]), "o", color="white", markeredgecolor="black")
        axes.plot(np.asarray(lrs)[~counted], np.exp(best[~counted]), "x", color="black")
        axes.autoscale(False)  # the ridge may leave the grid
        if not np.isnan(measured.slope):
            axes.plot(lrs, np.exp(measured.offset) * np.asarray(lrs) ** measured.slope, color="#d50000", linewidth=1.8)
        derived, claim = signed(method.slopes[list(NOISE).index(network)]), signed(method.claim)
        axes.set_title(f"{name}: slope {measured}\n(derived: {derived}; the paper's reading: {claim})")
    key = panels[-1]
    key.axis("off")
    colors, place = ScalarMappable(shades, "viridis_r"), key.inset_axes((0.1, 0.05, 0.08, 0.9))
    ticks: Any = {"ticks": LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), "format": "{x:g}"}
    bar = figure.colorbar(colors, cax=place, extend="max", label="error on held-out digits, %", **ticks)
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    text = "o  best of its learning rate\nx  not counted: no clear best,\n    or far from the best rate\n—  the ridge"
    key.text(0.45, 0.5, text, transform=key.transAxes, va="center")
    return figure


def _schedules(found: Findings, axes: Axes, network: str) -> None:
    """(b) Test error of the best configuration under each schedule."""
    for shift, name, color in ((-0.12, RIVALS[0], BROWN), (0.12, RIVALS[1], BLUE)):
        for k, schedule in enumerate(SCHEDULES):
            values = 100 * found.finals[network, name, schedule]
            mean, spread = values.mean(), 1.96 * values.std(ddof=1) / np.sqrt(len(values))
            jitter = np.random.default_rng(k).uniform(-0.07, 0.07, len(values))
            axes.plot(k + shift + jitter, values, ".", color=color, alpha=0.3, markersize=5)
            label = name if k == 0 else None
            axes.errorbar(k + shift, mean, spread, fmt="o", color=color, capsize=5, markersize=7, label=label)
    axes.set(xticks=range(len(SCHEDULES)), xticklabels=list(SCHEDULES), ylabel="test error, %", ylim=(0, None))
    axes.legend(loc="lower right")


def _budgets(found: Findings, axes: Axes, network: str) -> None:
    """(c) The best weight decay against the number of steps."""
    steps, errors = found.row(network)
    fit, x = found.budget(network), np.asarray(steps)
    best = np.exp(best_decays(errors, found.plan.row(), HELD_OUT)[0])
    for values, color, name in ((best, BLUE, "λ"), (best * x**0.5, BROWN, "λ √steps")):
        axes.plot(x, values, "o", color=color, label=f"best {name}")
    if not np.isnan(fit.slope):
        line = np.exp(fit.offset) * x**fit.slope
        axes.plot(x, line, color=BLUE, label=f"slope {fit}")
        axes.plot(x, line * x**0.5, color=BROWN)
    axes.plot(x, best[0] * (x / x[0]) ** -0.5, ":", color="grey", label="slope -0.50, the paper's")
    title = f"{TITLES[network]}, lr {BUDGET_LR[network]:g}"
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="weight decay", title=title)
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="center right")


def _anytime(found: Findings, axes: Axes, network: str) -> None:
    """(d) Error after every epoch."""
    ends = found.plan.period_ends()
    curves = {name: values for (own, name), values in found.anytime.items() if own == network}
    for color, (name, values) in zip((BLUE, GREEN, BROWN, RED), curves.items(), strict=True):
        x, mean = np.arange(1, len(values) + 1), 100 * values.mean(-1)
        error = 196 * values.std(-1, ddof=1) / np.sqrt(values.shape[-1])
        axes.plot(x, mean, color=color, label=name, linewidth=1.2)
        axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        if name == "AdamWR":
            axes.plot(ends, mean[np.asarray(ends) - 1], "o", color=color, label="end of a period")
    lowest = min(100 * values.mean(-1).min() for values in curves.values())
    axes.set(xscale="log", xlabel=f"epochs of {STEPS_AN_EPOCH} steps", ylim=(0.8 * lowest, 5 * lowest))
    axes.set_ylabel("error on held-out digits, %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="best")


def _variants(found: Findings, axes: Axes, network: str) -> None:
    """(f) Test error of each at its best."""
    for k, (name, color) in enumerate(zip((PLAIN, *VARIANTS), (BLUE, GREEN, BROWN), strict=True)):
        values = 100 * found.variants[network, name]
        mean, spread = values.mean(), 1.96 * values.std(ddof=1) / np.sqrt(len(values))
        jitter = np.random.default_rng(k).uniform(-0.12, 0.12, len(values))
        axes.plot(k + jitter, values, ".", color=color, alpha=0.4, markersize=6)
        axes.errorbar(k, mean, spread, fmt="o", color=color, capsize=5, markersize=7)
        if name in VARIANTS:
            gain = found.gained(network, name)
            text = f"{100 * gain.value:+.2f} ± {196 * gain.error:.2f} below plain"
            axes.annotate(text, (k, values.max()), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    axes.set(xticks=range(1 + len(VARIANTS)), xticklabels=["plain", *VARIANTS], ylabel="test error, %")
    axes.margins(x=0.2, y=0.15)


def _growths(found: Findings) -> Figure:
    """(e) Error over size and weight decay, the best of each size, and where the laws lead from the least one."""
    title = (
        "The best weight decay (o) as data and width grow, and what each law makes of that of the least size: AdamW "
    )
    title += "independent, unless it is said"
    figure, panels = _new(len(NOISE), len(GROWTHS), (17, 8), title)
    shades = LogNorm(1, 3)
    styles = dict(zip(LAWS, ("-", "--", ":", "-."), strict=True))
    for axes, (network, name) in zip(panels, itertools.product(NOISE, GROWTHS), strict=True):
        (sizes, errors), decays = found.grown(network, name), found.plan.grown_row(GROWTHS[name])
        mean = errors.mean(-1)
        axes.pcolormesh(_edges(sizes), _edges(decays), (mean / mean.min(1)[:, None]).T, cmap="viridis_r", norm=shades)
        axes.set(xscale="log", yscale="log", xlabel="training samples" if GROWTHS[name].data else "width")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.autoscale(False)
        for title, law in GROWTHS[name].laws.items():
            line = [decay for decay, _ in found.followed(network, name, law)]
            axes.plot(sizes, line, styles[title], color=RED, linewidth=1.8, label=title)
        best = [decay for decay, _ in found.followed(network, name, None)]
        axes.plot(sizes, best, "o", color="white", markeredgecolor="black")
        axes.set_title(f"{network}: {name}\nslope {found.growth(network, name)}")
    panels[0].set_ylabel("weight decay")
    panels[len(GROWTHS)].set_ylabel("weight decay")
    panels[0].legend(loc="lower left", facecolor="white", frameon=True)
    colors = ScalarMappable(shades, "viridis_r")
    ticks: Any = {"ticks": (1, 1.5, 2, 3), "format": "{x:g}"}
    bar = figure.colorbar(colors, ax=panels, extend="max", label="error by the lowest of its size", **ticks)
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure
