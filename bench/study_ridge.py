"""Where the good weight decays lie: the best one of each row of a grid, and how it moves with the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fit", "best_decays", "fit"]

Array: TypeAlias = NDArray[np.float64]

GOOD = 2.0  # a row counts if its best error is within this factor of the grid's
BRACKET = 2.0  # and if both its ends are worse than its best by this many standard errors
DRAWS = 2000


@dataclass(frozen=True)
class Fit:
    """A power law y ~ x^slope: its slope, the 95% interval of it, the offset of ln y, and which points were used."""

    slope: float
    low: float
    high: float
    offset: float
    used: tuple[bool, ...]

    def __str__(self) -> str:
        if np.isnan(self.slope):
            return "none"
        return f"{self.slope:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def best_decays(errors: Array, decays: Sequence[float], samples: int) -> tuple[Array, NDArray[np.bool_]]:
    """(ln of the best weight decay, whether it is a row's to count) of each row of errors [rows, decays, seeds].

    The best is an average over the row's ln(decay), weighted by exp(-(error - least error) / standard error), the
    standard error being that of `samples` held-out samples a seed: it moves smoothly where single errors are rough.
    """
    mean = errors.mean(-1)
    least = mean.min(1)
    unit = np.sqrt(np.maximum(least * (1 - least), 1 / samples) / (samples * errors.shape[-1]))
    weight = np.exp(-(mean - least[:, None]) / unit[:, None])
    best = (weight * np.log(decays)).sum(1) / weight.sum(1)
    ends = np.minimum(mean[:, 0], mean[:, -1])
    return best, (least <= GOOD * least.min()) & (ends - least >= BRACKET * unit)


def fit(x: Sequence[float], errors: Array, decays: Sequence[float], samples: int) -> Fit:
    """The slope of ln(best decay) over ln(x), with the 95% interval of a bootstrap over rows and seeds.

    NaN where fewer than three rows count.
    """
    logs = np.log(x)
    best, used = best_decays(errors, decays, samples)
    rows = np.flatnonzero(used)
    if len(rows) < 3:
        return Fit(np.nan, np.nan, np.nan, np.nan, tuple(used.tolist()))
    slope, offset = _line(logs[rows], best[rows])
    generator = np.random.default_rng(0)
    count, slopes = errors.shape[-1], []
    known: dict[tuple[int, ...], Array] = {}  # there are few ways to draw as many seeds
    for _ in range(DRAWS):
        picked: list[int] = generator.integers(0, count, size=(count,)).tolist()
        seeds = tuple(sorted(picked))
        drawn = generator.choice(rows, len(rows))
        if len(set(drawn.tolist())) >= 2:
            if seeds not in known:
                known[seeds] = best_decays(errors[:, :, seeds], decays, samples)[0]
            slopes.append(_line(logs[drawn], known[seeds][drawn])[0])
    low, high = np.quantile(slopes, (0.025, 0.975)).tolist()
    return Fit(slope, low, high, offset, tuple(used.tolist()))


def _line(x: Array, y: Array) -> tuple[float, float]:
    slope, offset = np.polyfit(x, y, 1).tolist()
    return slope, offset
