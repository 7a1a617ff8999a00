"""A picture of schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .shapes import named, whole

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

__all__ = ["plot"]


def plot(
    schedule: Callable[[int], float] | Mapping[str, Callable[[int], float]],
    steps: int | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draws a schedule, or several by name; beside it, for `NormalizedDecay`, the factor on the weight decay.

    Needs matplotlib.

    Args:
        schedule: a schedule or callable, or a dict of them by name.
        steps: how many; the default is the longest schedule's length.
        path: where to save the picture, by its ending (.png, .pdf, .svg); None: nowhere.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: there is no matplotlib.
        TypeError, ValueError: what is drawn is no schedule; `steps` is not given and no schedule has an end, or it is
            not positive.

    Example:
        >>> from wd_kernels.schedules import Cosine, WarmRestarts
        >>> figure = plot({"cosine": Cosine(100), "restarts": WarmRestarts(10, mult=2)})
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['cosine', 'restarts']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("wd_kernels.schedules.plot draws with matplotlib: pip install matplotlib") from error
    drawn = schedule if isinstance(schedule, Mapping) else {str(named(schedule)): schedule}
    for name, own in drawn.items():
        if not callable(own) or isinstance(own, type):
            raise TypeError(f"{name}={own!r} in plot: expected a schedule or a callable")
    if steps is None:
        ends = [end for own in drawn.values() if (end := getattr(own, "steps", None)) is not None]
        if not ends:
            raise ValueError(f"steps=None: no end in {', '.join(drawn) or 'an empty dict'}: say how many to draw")
        steps = max(ends)
    steps = whole(steps, f"steps={steps!r} in plot")
    factors = {name: own.decay_factor for name, own in drawn.items() if hasattr(own, "decay_factor")}
    panels: list[tuple[str, Mapping[str, Callable[[int], float]]]] = [("multiplier η", drawn)]
    if factors:
        panels.append(("factor on the weight decay", factors))
    colors = {name: f"C{k}" for k, name in enumerate(drawn)}
    figure = Figure(figsize=(6.4 * len(panels), 4.0), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, curve in curves.items():
            values = [float(curve(t)) for t in range(steps)]
            axes.step(range(steps), values, where="post", label=name, color=colors[name], linewidth=1.6)
        axes.set(title=title, xlabel="completed steps", xlim=(0, steps), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(handles=figure.axes[0].get_lines(), loc="outside lower center", ncols=3, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
