"""What the study trains: methods, grids, budgets, and the runs that the figures are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from wd_kernels import scaled_weight_decay
from wd_kernels.schedules import Constant, Cosine, NormalizedDecay, StepDrop, WarmRestarts

from .train import BATCH, NOISE, STEPS_AN_EPOCH, Run

RIVALS = ("Adam-L2", "AdamW independent")
BUDGET_LR = {"normalised": 1e-3, "noisy": 1e-2}  # where the weight decay matters in all of them

Schedule = Callable[[int], float]
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "fixed": lambda steps: Constant(),
    "step drop": lambda steps: StepDrop((steps * 3 // 10, steps * 6 // 10, steps * 8 // 10), 0.2),
    "cosine": Cosine,
}
#: (lr, weight decay) by (method, schedule).
Places = Mapping[tuple[str, str], tuple[float, float]]


@dataclass(frozen=True)
class Method:
    """An optimizer with a form of decay, and the grid on which it is tried.

    Its slopes are of ln(best weight decay) over ln(lr). What is derived: for "normalised", where lr c times as large is
    the same training of larger weights if the weight decay moves as c^slope; for "noisy", where training comes to rest
    at the minimum of a penalty that the slope keeps. tests/test_propositions.py shows both.
    """

    name: str
    rule: str  # the class
    options: dict[str, Any]  # what its groups set
    claim: int  # the slope by the paper's reading: -1 where the two are coupled, 0 where they are decoupled
    slopes: tuple[int, int]  # derived, for each network
    lrs: tuple[float, float]  # least, largest
    decays: tuple[float, float]

    def grid(self, size: int) -> tuple[list[float], list[float]]:
        """(learning rates, weight decays), each in equal ratios."""
        return np.geomspace(*self.lrs, size).tolist(), np.geomspace(*self.decays, size).tolist()

    def config(self, lr: float, weight_decay: float, schedule: Schedule) -> dict[str, Any]:
        return {**self.options, "lr": lr, "weight_decay": weight_decay, "schedule": schedule}


_ADAM, _SGD = (3e-4, 1e-1), (3e-3, 1.0)
_METHODS = (
    Method("SGD-L2", "SGDW", {"momentum": 0.9, "decay": "l2"}, -1, (-1, 0), _SGD, (1e-5, 3.0)),
    Method("SGDW", "SGDW", {"momentum": 0.9, "form": "paper", "decay": "independent"}, 0, (0, 1), _SGD, (1e-5, 0.3)),
    Method("Adam-L2", "AdamW", {"decay": "l2"}, -1, (-2, 0), _ADAM, (1e-5, 10.0)),
    Method("AdamW lr_scaled", "AdamW", {"decay": "lr_scaled"}, -1, (-1, 0), _ADAM, (1e-3, 300.0)),
    Method("AdamW independent", "AdamW", {"decay": "independent"}, 0, (0, 1), _ADAM, (1e-5, 0.3)),
    Method("ProxAdam", "AdamW", {"decay": "proximal"}, 0, (0, 1), _ADAM, (1e-5, 0.3)),
    Method("metric-proximal", "AdamW", {"decay": "metric_proximal"}, -1, (-2, 0), _ADAM, (1e-5, 10.0)),
)
METHODS = {method.name: method for method in _METHODS}


#: (f) What the weight decay of AdamW can be besides, in the place of the plain one.
PLAIN = "AdamW lr_scaled"
VARIANTS = {
    "cautious": replace(METHODS[PLAIN], name="cautious", options={"decay": "lr_scaled", "cautious": True}),
    "corrected": replace(METHODS[PLAIN], name="corrected", options={"decay": "corrected"}),
}


LAWS = {"time scale": "timescale", "normalised": "normalized", "per step": "per_step", "λ kept": "kept"}


@dataclass(frozen=True)
class Growth:
    """Something that grows from run to run, with the method whose best weight decay is looked for."""

    method: str
    decays: tuple[float, float]  # least, largest
    data: bool = False  # the training set, at the same number of epochs; else the width of two hidden layers
    mup: bool = False  # the lr of layers falls as 1/width, from the least width

    @property
    def laws(self) -> dict[str, str]:
        """What may be done with one weight decay for all layers, by its title.

        Where the lr of some layers alone changes, and with it what they lose by lr_scaled, each would want its own.
        """
        by_layer = self.mup and METHODS[self.method].options["decay"] == "lr_scaled"
        return {"λ kept": "kept"} if by_layer else LAWS

    def predicted(self, law: str, weight_decay: float, ratio: float) -> float:
        """What a law makes of the weight decay where what grows is `ratio` times as large."""
        if law == "kept":
            return weight_decay
        named: Any = {"law": law, "decay": METHODS[self.method].options["decay"]}
        return scaled_weight_decay(weight_decay, **named, dataset_size=ratio if self.data else 1.0)


GROWTHS = {
    "data": Growth("AdamW independent", (1e-4, 0.9), data=True),
    "width": Growth("AdamW independent", (1e-4, 0.9)),
    "width, muP": Growth("AdamW independent", (1e-4, 0.9), mup=True),
    "width, muP, lr_scaled": Growth("AdamW lr_scaled", (3e-2, 300.0), mup=True),
}


@dataclass(frozen=True)
class Plan:
    """How much is trained. The defaults are the study's; less is a rehearsal."""

    size: int = 12  # of a grid, in both directions
    epochs: int = 60  # of the grids
    seeds: int = 3  # networks for each configuration; budgets have twice, restarts and (e) three times as many
    budgets: tuple[int, ...] = (15, 30, 60, 120, 240)  # (c), in epochs
    decays: int = 24  # tried in each budget
    finals: int = 30  # new seeds for what was best of each method and schedule
    restarts: tuple[int, int, int] = (10, 2, 10 + 20 + 40 + 80 + 160)  # first period, T_mult, whole run, in epochs
    samples: tuple[int, ...] = (64, 96, 128, 192, 256, 384, 512)  # (e), to train on: multiples of a batch
    widths: tuple[int, ...] = (16, 32, 64, 128)  # (e), of both hidden layers
    grown_epochs: tuple[int, int] = (120, 40)  # (e), while data grow, and while the width grows
    grown_decays: int = 18  # (e), tried of each

    def period_ends(self) -> list[int]:
        """The last epoch of each of AdamWR's periods."""
        length, mult, epochs = self.restarts
        periods = itertools.accumulate(length * mult**k for k in range(epochs))
        return list(itertools.takewhile(lambda end: end <= epochs, periods))

    def row(self) -> list[float]:
        """The weight decays of a budget."""
        return METHODS["AdamW independent"].grid(self.decays)[1]

    def sizes(self, growth: Growth) -> tuple[int, ...]:
        """What a growth goes through."""
        return self.samples if growth.data else self.widths

    def grown_row(self, growth: Growth) -> list[float]:
        """The weight decays that are tried in each size."""
        row: list[float] = np.geomspace(*growth.decays, self.grown_decays).tolist()
        return row


def grids(plan: Plan) -> dict[tuple[str, str, str], Run]:
    """The grids of figures (a) and (b), by (method, network, schedule)."""
    wanted = [(name, network, "cosine") for network in NOISE for name in METHODS]
    wanted += [(name, network, schedule) for network in NOISE for name in RIVALS for schedule in ("fixed", "step drop")]
    runs = {}
    for name, network, schedule in wanted:
        method, made = METHODS[name], SCHEDULES[schedule](plan.epochs * STEPS_AN_EPOCH)
        lrs, decays = method.grid(plan.size)
        configs = tuple(method.config(lr, decay, made) for lr in lrs for decay in decays)
        title = f"grid-{name}-{network}-{schedule}"
        runs[name, network, schedule] = Run(title, network, method.rule, configs, plan.epochs, plan.seeds)
    return runs


def budgets(plan: Plan) -> dict[tuple[str, int], Run]:
    """The runs of figure (c), by (network, epochs): a row of weight decays at one learning rate, cosine."""
    method, runs = METHODS["AdamW independent"], {}
    for network, lr in BUDGET_LR.items():
        for epochs in plan.budgets:
            configs = tuple(method.config(lr, decay, Cosine(epochs * STEPS_AN_EPOCH)) for decay in plan.row())
            title = f"budget-{network}-{epochs}"
            runs[network, epochs] = Run(title, network, method.rule, configs, epochs, 2 * plan.seeds)
    return runs


def growths(plan: Plan) -> dict[tuple[str, str, int], Run]:
    """The runs of figure (e), by (network, growth, size): a row of weight decays at the budgets' lr, cosine."""
    runs = {}
    for network, (name, growth) in itertools.product(NOISE, GROWTHS.items()):
        method = METHODS[growth.method]
        epochs = plan.grown_epochs[0 if growth.data else 1]
        for size in plan.sizes(growth):
            own: dict[str, Any] = {"samples": size} if growth.data else {"hidden": (size, size)}
            if growth.mup:
                own["base"] = plan.widths[0]
            schedule = Cosine(epochs * (size // BATCH if growth.data else STEPS_AN_EPOCH))
            configs = tuple(method.config(BUDGET_LR[network], d, schedule) for d in plan.grown_row(growth))
            title = f"growth-{network}-{name}-{size}"
            runs[network, name, size] = Run(title, network, method.rule, configs, epochs, 3 * plan.seeds, **own)
    return runs


def finals(plan: Plan, network: str, places: Places) -> Run:
    """Figure (b) without the luck of the choice: what was best, at its `places`, trained with new seeds."""
    steps = plan.epochs * STEPS_AN_EPOCH
    configs = tuple(METHODS[name].config(*place, SCHEDULES[s](steps)) for (name, s), place in places.items())
    return Run(f"finals-{network}", network, "AdamW", configs, plan.epochs, plan.finals, first_seed=1000)


def variant_grids(plan: Plan) -> dict[tuple[str, str], Run]:
    """The grids of figure (f), by (network, variant), cosine: plain AdamW has its own in figure (a)."""
    schedule, runs = Cosine(plan.epochs * STEPS_AN_EPOCH), {}
    for network, (name, method) in itertools.product(NOISE, VARIANTS.items()):
        lrs, decays = method.grid(plan.size)
        configs = tuple(method.config(lr, decay, schedule) for lr in lrs for decay in decays)
        runs[network, name] = Run(f"grid-{name}-{network}", network, method.rule, configs, plan.epochs, plan.seeds)
    return runs


def variants(plan: Plan, network: str, places: Mapping[str, tuple[float, float]]) -> Run:
    """Figure (f): each of them at its place, and the plain one, trained with new seeds."""
    schedule, methods = Cosine(plan.epochs * STEPS_AN_EPOCH), {**METHODS, **VARIANTS}
    configs = tuple(methods[name].config(*place, schedule) for name, place in places.items())
    return Run(f"variants-{network}", network, "AdamW", configs, plan.epochs, plan.finals, first_seed=3000)


def anytime(plan: Plan, network: str, places: Places) -> tuple[list[str], Run]:
    """The run of figure (d), all of whose optimizers are param groups of one, and what its configurations are called.

    `places` were best at `plan.epochs`. AdamW's under the cosine becomes the normalised weight decay of both its runs.
    """
    period, mult, epochs = plan.restarts
    steps = epochs * STEPS_AN_EPOCH
    l2, decoupled = (METHODS[name] for name in RIVALS)
    lr, decay = places[decoupled.name, "cosine"]
    normal = decay * (plan.epochs * STEPS_AN_EPOCH) ** 0.5
    restarts = WarmRestarts(period * STEPS_AN_EPOCH, mult)
    configs = {
        "AdamWR": decoupled.config(lr, normal, NormalizedDecay(restarts)),
        "AdamW, cosine": decoupled.config(lr, normal, NormalizedDecay(Cosine(steps))),
        "Adam-L2, cosine": l2.config(*places[l2.name, "cosine"], Cosine(steps)),
        "Adam-L2, fixed": l2.config(*places[l2.name, "fixed"], Constant()),
    }
    run = Run(f"anytime-{network}", network, "AdamW", tuple(configs.values()), epochs, 3 * plan.seeds, 2000, trace=True)
    return list(configs), run
