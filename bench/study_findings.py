"""What the study's runs say: ridges, best errors, budgets, curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from study_plan import METHODS, Plan
from study_ridge import Array, Fit, fit, numbers
from study_train import STEPS_AN_EPOCH, TRAIN, VALIDATION, Run
from torch import Tensor

__all__ = ["HELD_OUT", "Findings", "Result"]

TEST = 1797 - TRAIN - VALIDATION
HELD_OUT = VALIDATION + TEST


@dataclass(frozen=True)
class Result:
    """A finished run: the shares of errors, "validation" and "test", [configurations, seeds]."""

    run: Run
    kept: dict[str, Tensor]

    def errors(self) -> Array:
        """Over both held-out sets, [configurations, seeds]."""
        return (VALIDATION * numbers(self.kept["validation"]) + TEST * numbers(self.kept["test"])) / HELD_OUT

    def curves(self) -> list[Array]:
        """Of a traced run: for each configuration the errors over both held-out sets, [epochs, seeds]."""
        return list(self.errors().transpose(1, 0, 2))


class Best(NamedTuple):
    """A configuration: (lr, weight decay), its mean test error, and the standard error of that over the seeds."""

    place: tuple[float, float]
    error: float
    spread: float


@dataclass
class Findings:
    """All results, and the figures that are read off them.

    Attributes:
        grids: by (method, network, schedule).
        budgets: by (network, epochs).
        anytime: errors over both held-out sets by configuration, [epochs, seeds].
    """

    plan: Plan
    grids: dict[tuple[str, str, str], Result]
    budgets: dict[tuple[str, int], Result]
    anytime: dict[str, Array] = field(default_factory=dict)

    def table(self, method: str, network: str, schedule: str = "cosine") -> Array:
        """A grid's errors over both held-out sets, [lrs, decays, seeds]."""
        result = self.grids[method, network, schedule]
        return result.errors().reshape(self.plan.size, self.plan.size, result.run.seeds)

    def ridge(self, method: str, network: str) -> Fit:
        """How the best weight decay of a method moves with its learning rate."""
        lrs, decays = METHODS[method].grid(self.plan.size)
        return fit(lrs, self.table(method, network), decays, HELD_OUT)

    def chosen(self, method: str, schedule: str, network: str = "normalised") -> Best:
        """What is best on the validation sets, and its error on the test sets."""
        kept = self.grids[method, network, schedule].kept
        best = int(np.argmin(numbers(kept["validation"]).mean(-1)))
        lrs, decays = METHODS[method].grid(self.plan.size)
        test = numbers(kept["test"])[best]
        spread = float(test.std(ddof=1) / np.sqrt(len(test)))
        place = lrs[best // self.plan.size], decays[best % self.plan.size]
        return Best(place, float(test.mean()), spread)

    def budget(self, network: str) -> Fit:
        """How the best weight decay moves with the number of steps."""
        steps, errors, decays = self.rows(network)
        return fit(steps, errors, decays, HELD_OUT)

    def rows(self, network: str) -> tuple[list[float], Array, list[float]]:
        """(steps, errors [budgets, decays, seeds], decays) of a network's budgets."""
        steps = [float(epochs * STEPS_AN_EPOCH) for epochs in self.plan.budgets]
        errors = np.stack([self.budgets[network, epochs].errors() for epochs in self.plan.budgets])
        decays = np.geomspace(*METHODS["AdamW independent"].decays, self.plan.decays).tolist()
        return steps, errors, decays
