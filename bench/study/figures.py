"""The study's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .findings import HELD_OUT, Array, Findings, best_decays
from .plan import BUDGET_LR, METHODS, RIVALS, SCHEDULES
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
    with plt.rc_context(STYLE):
        figures = {f"ridges_{network}": _ridges(found, network) for network in NOISE}
        figures |= {"schedules": _schedules(found), "budgets": _budgets(found), "anytime": _anytime(found)}
        for name, figure in figures.items():
            figure.savefig(folder / f"study_{name}.png", dpi=130)
            plt.close(figure)
    return [folder / f"study_{name}.png" for name in figures]


def _new(rows: int, columns: int, size: tuple[float, float], title: str) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure, list(axes.flat)


def _finish(axes: Axes, title: str, legend: Any) -> None:
    axes.set_title(title)
    axes.legend(loc=legend)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _edges(centres: list[float]) -> Array:
    """Where cells end whose centres are in equal ratios."""
    half = (centres[1] / centres[0]) ** 0.5
    return np.asarray([centres[0] / half, *(c * half for c in centres)])


def _ridges(found: Findings, network: str) -> Figure:
    """(a) Error over lr and weight decay, the best weight decay of each lr, and the slope through them."""
    figure, panels = _new(2, 4, (16, 7.6), f"Where the good weight decays lie: {TITLES[network]}")
    tables = {name: 100 * found.table(name, network).mean(-1) for name in METHODS}
    least = min(float(table.min()) for table in tables.values())
    shades = mpl.colors.LogNorm(least, 4 * least)
    for axes, (name, method) in zip(panels, METHODS.items(), strict=False):
        lrs, decays = method.grid(found.plan.size)
        axes.pcolormesh(_edges(lrs), _edges(decays), tables[name].T, cmap="viridis_r", norm=shades)
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="weight decay")
        measured = found.ridge(name, network)
        best, _ = best_decays(found.table(name, network), decays, HELD_OUT)
        counted = np.asarray(measured.used)
        axes.plot(np.asarray(lrs)[counted], np.exp(best[counted]), "o", color="white", markeredgecolor="black")
        axes.plot(np.asarray(lrs)[~counted], np.exp(best[~counted]), "x", color="black")
        limits = axes.get_ylim()
        if not np.isnan(measured.slope):
            axes.plot(lrs, np.exp(measured.offset) * np.asarray(lrs) ** measured.slope, color="#d50000", linewidth=1.8)
        axes.set_ylim(limits)
        derived, claim = signed(method.slopes[list(NOISE).index(network)]), signed(method.claim)
        axes.set_title(f"{name}: slope {measured}\n(derived: {derived}; the paper's reading: {claim})")
    key = panels[-1]
    key.axis("off")
    bar = figure.colorbar(ScalarMappable(shades, "viridis_r"), cax=key.inset_axes((0.1, 0.05, 0.08, 0.9)), extend="max")
    bar.set_label("error on held-out digits, %")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    text = "o  best of its learning rate\nx  not counted: no clear best,\n    or far from the best rate\n—  the ridge"
    key.text(0.45, 0.5, text, transform=key.transAxes, va="center")
    return figure


def _schedules(found: Findings) -> Figure:
    """(b) Test error of the best configuration under each schedule."""
    title = "Best of Adam-L2 and of AdamW under three schedules, retrained with new seeds"
    figure, panels = _new(1, 2, (11, 4.2), title)
    for axes, network in zip(panels, NOISE, strict=True):
        for shift, name, color in ((-0.12, RIVALS[0], BROWN), (0.12, RIVALS[1], BLUE)):
            for k, schedule in enumerate(SCHEDULES):
                values = 100 * found.finals[network, name, schedule]
                mean, spread = values.mean(), 1.96 * values.std(ddof=1) / np.sqrt(len(values))
                jitter = np.random.default_rng(k).uniform(-0.07, 0.07, len(values))
                axes.plot(k + shift + jitter, values, ".", color=color, alpha=0.3, markersize=5)
                label = name if k == 0 else None
                axes.errorbar(k + shift, mean, spread, fmt="o", color=color, capsize=5, markersize=7, label=label)
        axes.set(xticks=range(len(SCHEDULES)), xticklabels=list(SCHEDULES), ylabel="test error, %", ylim=(0, None))
        _finish(axes, TITLES[network], "lower right")
    return figure


def _budgets(found: Findings) -> Figure:
    """(c) The best weight decay against the number of steps."""
    title = "AdamW independent, cosine: the best weight decay against the training budget"
    figure, panels = _new(1, 2, (11, 4.4), title)
    for axes, network in zip(panels, NOISE, strict=True):
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
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="weight decay")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.xaxis.set_minor_formatter(NullFormatter())
        _finish(axes, f"{TITLES[network]}, lr {BUDGET_LR[network]:g}", "center right")
    return figure


def _anytime(found: Findings) -> Figure:
    """(d) Error after every epoch."""
    figure, panels = _new(1, 2, (13, 4.6), "Anytime performance")
    ends = found.plan.period_ends()
    for axes, network in zip(panels, NOISE, strict=True):
        curves = {name: values for (own, name), values in found.anytime.items() if own == network}
        for color, (name, values) in zip((BLUE, GREEN, BROWN, RED), curves.items(), strict=True):
            x, mean = np.arange(1, len(values) + 1), 100 * values.mean(-1)
            error = 196 * values.std(-1, ddof=1) / np.sqrt(values.shape[-1])
            axes.plot(x, mean, color=color, label=name, linewidth=1.2)
            axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
            if name == "AdamWR":
                axes.plot(ends, mean[np.asarray(ends) - 1], "o", color=color, label="end of a period")
        lowest = min(100 * values.mean(-1).min() for values in curves.values())
        axes.set(xscale="log", xlabel=f"epochs of {STEPS_AN_EPOCH} steps", ylabel="error on held-out digits, %")
        axes.set_ylim(0.8 * lowest, 5 * lowest)
        axes.xaxis.set_major_formatter("{x:g}")
        _finish(axes, TITLES[network], "best")
    return figure
