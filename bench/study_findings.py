"""What the study's runs say: ridges, best errors, budgets, curves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from study_plan import METHODS, Plan
from study_ridge import Array, Fit, fit
from study_train import STEPS_AN_EPOCH, TRAIN, VALIDATION
from torch import Tensor

__all__ = ["HELD_OUT", "Errors", "Findings", "Mean"]

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
class Errors:
    """Shares of errors on the validation and the test sets, [configurations, seeds]; of a traced run [epochs, ...]."""

    validation: Array
    test: Array

    @classmethod
    def of(cls, kept: dict[str, Tensor]) -> Errors:
        return cls(*(np.asarray(kept[name].numpy(), np.float64) for name in ("validation", "test")))

    def both(self) -> Array:
        """Over both held-out sets."""
        return (VALIDATION * self.validation + TEST * self.test) / HELD_OUT


@dataclass
class Findings:
    """All results, and what is read off them.

    Attributes:
        plan: what was trained.
        about: how long it took, when, where, with what.
        grids: by (method, network, schedule).
        budgets: by (network, epochs).
        finals: what was best of each (network, method, schedule), on the test sets of new seeds, [seeds].
        anytime: over both held-out sets by network and configuration, [epochs, seeds].
    """

    plan: Plan
    about: dict[str, Any]
    grids: dict[tuple[str, str, str], Errors]
    budgets: dict[tuple[str, int], Errors]
    finals: dict[tuple[str, str, str], Array] = field(default_factory=dict)
    anytime: dict[tuple[str, str], Array] = field(default_factory=dict)

    def table(self, method: str, network: str, schedule: str = "cosine") -> Array:
        """A grid's errors over both held-out sets, [lrs, decays, seeds]."""
        return self.grids[method, network, schedule].both().reshape(self.plan.size, self.plan.size, -1)

    def ridge(self, method: str, network: str) -> Fit:
        """How the best weight decay of a method moves with its learning rate."""
        lrs, decays = METHODS[method].grid(self.plan.size)
        return fit(lrs, self.table(method, network), decays, HELD_OUT)

    def chosen(self, method: str, network: str, schedule: str) -> tuple[float, float]:
        """(lr, weight decay) that is best on the validation sets."""
        best = int(np.argmin(self.grids[method, network, schedule].validation.mean(-1)))
        lrs, decays = METHODS[method].grid(self.plan.size)
        return lrs[best // self.plan.size], decays[best % self.plan.size]

    def row(self, network: str) -> tuple[list[float], Array]:
        """(steps, errors [budgets, decays, seeds]) of a network's budgets."""
        steps = [float(epochs * STEPS_AN_EPOCH) for epochs in self.plan.budgets]
        return steps, np.stack([self.budgets[network, epochs].both() for epochs in self.plan.budgets])

    def budget(self, network: str) -> Fit:
        """How the best weight decay moves with the number of steps."""
        steps, errors = self.row(network)
        return fit(steps, errors, self.plan.row(), HELD_OUT)

    # Kept as numbers of errors, of which there are few digits ---------------------------------------------------------

    def packed(self) -> dict[str, Any]:
        """As JSON has it."""

        def errors(own: Errors) -> dict[str, Any]:
            return {"validation": _counts(own.validation, VALIDATION), "test": _counts(own.test, TEST)}

        return {
            "about": self.about,
            "plan": asdict(self.plan),
            "grids": [[*key, errors(own)] for key, own in self.grids.items()],
            "budgets": [[*key, errors(own)] for key, own in self.budgets.items()],
            "finals": [[*key, _counts(own, TEST)] for key, own in self.finals.items()],
            "anytime": [[*key, _counts(own, HELD_OUT)] for key, own in self.anytime.items()],
        }

    @classmethod
    def unpacked(cls, kept: dict[str, Any]) -> Findings:
        """What `packed` gave."""

        def errors(own: dict[str, Any]) -> Errors:
            return Errors(np.asarray(own["validation"]) / VALIDATION, np.asarray(own["test"]) / TEST)

        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in kept["plan"].items()}
        plan = Plan(**settings)
        return cls(
            plan,
            kept["about"],
            {(m, n, s): errors(own) for m, n, s, own in kept["grids"]},
            {(n, epochs): errors(own) for n, epochs, own in kept["budgets"]},
            {(n, m, s): np.asarray(own) / TEST for n, m, s, own in kept["finals"]},
            {(n, name): np.asarray(own) / HELD_OUT for n, name, own in kept["anytime"]},
        )


def _counts(shares: Array, samples: int) -> Any:
    return np.rint(shares * samples).astype(int).tolist()
