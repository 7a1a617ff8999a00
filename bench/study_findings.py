"""What the study's runs say: ridges, best errors, budgets, curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from study_plan import METHODS, Plan
from study_ridge import Array, Fit, fit, numbers
from study_train import STEPS_AN_EPOCH, TRAIN, VALIDATION, Run
from torch import Tensor

__all__ = ["HELD_OUT", "Findings", "Mean", "Result"]

TEST = 1797 - TRAIN - VALIDATION
HELD_OUT = VALIDATION + TEST


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
class Result:
    """A finished run: the shares of errors, "validation" and "test", [configurations, seeds]."""

    run: Run
    kept: dict[str, Tensor]

    def errors(self) -> Array:
        """Over both held-out sets, [configurations, seeds]; of a traced run [epochs, configurations, seeds]."""
        return (VALIDATION * numbers(self.kept["validation"]) + TEST * numbers(self.kept["test"])) / HELD_OUT


@dataclass
class Findings:
    """All results, and what is read off them.

    Attributes:
        grids: by (method, network, schedule).
        budgets: by (network, epochs).
        finals: test errors with new seeds, [seeds], by (network, method, schedule).
        anytime: errors over both held-out sets, [epochs, seeds], by network and configuration.
    """

    plan: Plan
    grids: dict[tuple[str, str, str], Result]
    budgets: dict[tuple[str, int], Result]
    finals: dict[tuple[str, str, str], Array] = field(default_factory=dict)
    anytime: dict[str, dict[str, Array]] = field(default_factory=dict)

    def table(self, method: str, network: str, schedule: str = "cosine") -> Array:
        """A grid's errors over both held-out sets, [lrs, decays, seeds]."""
        result = self.grids[method, network, schedule]
        return result.errors().reshape(self.plan.size, self.plan.size, result.run.seeds)

    def ridge(self, method: str, network: str) -> Fit:
        """How the best weight decay of a method moves with its learning rate."""
        lrs, decays = METHODS[method].grid(self.plan.size)
        return fit(lrs, self.table(method, network), decays, HELD_OUT)

    def chosen(self, method: str, network: str, schedule: str) -> tuple[float, float]:
        """(lr, weight decay) that is best on the validation sets."""
        best = int(np.argmin(numbers(self.grids[method, network, schedule].kept["validation"]).mean(-1)))
        lrs, decays = METHODS[method].grid(self.plan.size)
        return lrs[best // self.plan.size], decays[best % self.plan.size]

    def row(self, network: str) -> tuple[list[float], Array]:
        """(steps, errors [budgets, decays, seeds]) of a network's budgets."""
        steps = [float(epochs * STEPS_AN_EPOCH) for epochs in self.plan.budgets]
        return steps, np.stack([self.budgets[network, epochs].errors() for epochs in self.plan.budgets])

    def budget(self, network: str) -> Fit:
        """How the best weight decay moves with the number of steps."""
        steps, errors = self.row(network)
        return fit(steps, errors, self.plan.row(), HELD_OUT)
