"""What the study's runs say: ridges (where the good weight decays lie), best errors, budgets, curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .plan import GROWTHS, METHODS, PLAIN, RIVALS, VARIANTS, Method, Plan
from .train import STEPS_AN_EPOCH, TRAIN, VALIDATION

Array: TypeAlias = NDArray[np.float64]
TEST = 1797 - TRAIN - VALIDATION
HELD_OUT = VALIDATION + TEST
#: Parts of the findings, and the number of samples of each share of errors, where it is not of both held-out sets.
KEPT = {
    "grids": TEST, "budgets": TEST, "finals": TEST, "anytime": HELD_OUT, "growths": TEST, "variant_grids": TEST,
    "variants": TEST,
}  # fmt: skip
GOOD = 2.0  # a row counts if its best error is within this factor of the grid's
BRACKET = 2.0  # and if both its ends are worse than its best by this many standard errors
DRAWS = 2000


class Mean(NamedTuple):
    """A mean over seeds, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Array) -> Mean:
        return cls(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} ± {100 * self.error:.2f}"


@dataclass(frozen=True)
class Fit:
    """A power law y ~ x^slope: its slope, the 95% interval of it, the offset of ln y, and which points were used."""

    slope: float
    low: float
    high: float
    offset: float
    used: tuple[bool, ...]

    def __str__(self) -> str:
        return "none" if np.isnan(self.slope) else f"{self.slope:+.2f} ({self.low:+.2f} to {self.high:+.2f})"

    def seen(self, expected: float, near: float = 0.5) -> str:
        """Whether the slope is the expected one: its interval holds it, it is nearer than `near`, or neither."""
        if np.isnan(self.slope):
            return "no ridge"
        if self.low <= expected <= self.high:
            return "yes"
        return "nearly" if abs(self.slope - expected) < near else "no"


def best_decays(
    errors: Array, decays: Sequence[float], samples: int, good: float = GOOD
) -> tuple[Array, NDArray[np.bool_]]:
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
    return best, (least <= good * least.min()) & (ends - least >= BRACKET * unit)


def fit(x: Sequence[float], errors: Array, decays: Sequence[float], samples: int = HELD_OUT, good: float = GOOD) -> Fit:
    """The slope of ln(best decay) over ln(x), with the 95% interval of a bootstrap over rows and seeds.

    NaN where fewer than three rows count.
    """
    logs = np.log(x)
    best, used = best_decays(errors, decays, samples, good)
    rows = np.flatnonzero(used)
    if len(rows) < 3:
        return Fit(np.nan, np.nan, np.nan, np.nan, tuple(used.tolist()))
    slope, offset = np.polyfit(logs[rows], best[rows], 1).tolist()
    generator = np.random.default_rng(0)
    count, slopes = errors.shape[-1], []
    # There are few ways to draw as many seeds.
    best_of = cache(lambda *seeds: best_decays(errors[:, :, seeds], decays, samples)[0])
    for _ in range(DRAWS):
        seeds: list[int] = generator.integers(0, count, size=(count,)).tolist()
        drawn = generator.choice(rows, len(rows))
        if len(set(drawn.tolist())) >= 2:
            slopes.append(np.polyfit(logs[drawn], best_of(*sorted(seeds))[drawn], 1)[0])
    low, high = np.quantile(slopes, (0.025, 0.975)).tolist()
    return Fit(slope, low, high, offset, tuple(used.tolist()))


class Errors(NamedTuple):
    """Shares of errors on the validation and the test sets, [configurations, seeds]; of a traced run [epochs, ...]."""

    validation: Array
    test: Array

    def both(self) -> Array:
        """Over both held-out sets."""
        return (VALIDATION * self.validation + TEST * self.test) / HELD_OUT


@dataclass
class Findings:
    """All results, and what is read off them."""

    plan: Plan
    about: dict[str, Any]  # how long it took, when, where, with what
    grids: dict[tuple[str, str, str], Errors]  # by method, network, schedule
    budgets: dict[tuple[str, int], Errors]  # by network, epochs
    #: On the test sets of new seeds, by network, method, schedule: [seeds].
    finals: dict[tuple[str, str, str], Array] = field(default_factory=dict)
    #: Over both held-out sets, by network and configuration: [epochs, seeds].
    anytime: dict[tuple[str, str], Array] = field(default_factory=dict)
    growths: dict[tuple[str, str, int], Errors] = field(default_factory=dict)  # by network, growth, size
    variant_grids: dict[tuple[str, str], Errors] = field(default_factory=dict)  # by network, variant
    #: On the test sets of new seeds, by network and variant, the plain one too: [seeds].
    variants: dict[tuple[str, str], Array] = field(default_factory=dict)

    def table(self, method: str, network: str) -> Array:
        """A cosine grid's errors over both held-out sets, [lrs, decays, seeds]."""
        return self.grids[method, network, "cosine"].both().reshape(self.plan.size, self.plan.size, -1)

    def ridge(self, method: str, network: str) -> Fit:
        """How the best weight decay of a method moves with its learning rate."""
        lrs, decays = METHODS[method].grid(self.plan.size)
        return fit(lrs, self.table(method, network), decays)

    def chosen(self, method: str, network: str, schedule: str) -> tuple[float, float]:
        """(lr, weight decay) that is best on the validation sets."""
        return self._chosen(METHODS[method], self.grids[method, network, schedule])

    def _chosen(self, method: Method, errors: Errors) -> tuple[float, float]:
        best = int(np.argmin(errors.validation.mean(-1)))
        lrs, decays = method.grid(self.plan.size)
        return lrs[best // self.plan.size], decays[best % self.plan.size]

    def varied(self, network: str) -> dict[str, tuple[float, float]]:
        """The same of the plain AdamW, and of each variant, under the cosine."""
        own = {name: self._chosen(method, self.variant_grids[network, name]) for name, method in VARIANTS.items()}
        return {PLAIN: self.chosen(PLAIN, network, "cosine"), **own}

    def gained(self, network: str, variant: str) -> Mean:
        """How far a variant's test error is below the plain one's, seed by seed."""
        return Mean.of(self.variants[network, PLAIN] - self.variants[network, variant])

    def gap(self, network: str, schedule: str) -> Mean:
        """How far AdamW's test error is below Adam-L2's, seed by seed."""
        one, other = (self.finals[network, name, schedule] for name in RIVALS)
        return Mean.of(one - other)

    def row(self, network: str) -> tuple[list[float], Array]:
        """(steps, errors [budgets, decays, seeds]) of a network's budgets."""
        steps = [float(epochs * STEPS_AN_EPOCH) for epochs in self.plan.budgets]
        return steps, np.stack([self.budgets[network, epochs].both() for epochs in self.plan.budgets])

    def budget(self, network: str) -> Fit:
        """How the best weight decay moves with the number of steps."""
        return fit(*self.row(network), self.plan.row())

    def grown(self, network: str, growth: str) -> tuple[list[float], Array]:
        """(sizes, errors [sizes, decays, seeds]) of what grows."""
        sizes = self.plan.sizes(GROWTHS[growth])
        return list(map(float, sizes)), np.stack([self.growths[network, growth, size].both() for size in sizes])

    def growth(self, network: str, growth: str) -> Fit:
        """How the best weight decay moves with what grows; errors of less data are higher, and count all the same."""
        return fit(*self.grown(network, growth), self.plan.grown_row(GROWTHS[growth]), good=np.inf)

    def followed(self, network: str, growth: str, law: str | None) -> list[tuple[float, float]]:
        """(weight decay, error) at each size, of who follows a law from the best of the least one; None: of the best.

        The error is interpolated between those of the weight decays that were tried.
        """
        (sizes, errors), row = self.grown(network, growth), self.plan.grown_row(GROWTHS[growth])
        decays: list[float] = np.exp(best_decays(errors, row, HELD_OUT)[0]).tolist()
        if law is not None:
            decays = [GROWTHS[growth].predicted(law, decays[0], size / sizes[0]) for size in sizes]
        means = (float(np.interp(np.log(x), np.log(row), own)) for x, own in zip(decays, errors.mean(-1), strict=True))
        return list(zip(decays, means, strict=True))

    # As JSON has it: numbers of errors, of which there are few digits -------------------------------------------------

    def packed(self) -> dict[str, Any]:
        def counts(shares: Array | Errors, samples: int) -> Any:
            if isinstance(shares, Errors):
                return {"validation": counts(shares.validation, VALIDATION), "test": counts(shares.test, TEST)}
            return np.rint(shares * samples).astype(int).tolist()

        kept = {part: [[*key, counts(v, n)] for key, v in getattr(self, part).items()] for part, n in KEPT.items()}
        return {"about": self.about, "plan": asdict(self.plan), **kept}

    @classmethod
    def unpacked(cls, kept: dict[str, Any]) -> Findings:
        """What `packed` gave."""

        def shares(own: Any, samples: int) -> Any:
            if isinstance(own, dict):
                return Errors(shares(own["validation"], VALIDATION), shares(own["test"], TEST))
            return np.asarray(own) / samples

        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in kept["plan"].items()}
        own = {part: {tuple(key): shares(v, n) for *key, v in kept.get(part, ())} for part, n in KEPT.items()}
        return cls(Plan(**settings), kept["about"], **own)
