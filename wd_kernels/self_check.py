"""The self-check: every backend against the reference, bit for bit, and each step of it against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import optim, reference
from .backends import triton
from .rules import DECAY_MODES, RULES

__all__ = ["LIMIT", "STEPS", "Case", "Outcome", "all_cases", "check", "device_of"]

STEPS = 10
#: Largest error allowed of one step against float64, in units of eps * max(|before|, |after|, rms of the role): a
#: rounding is 1/2 at most.
LIMIT = 8.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (33,), (0,), (1025,), (3, 5, 7))
WIDE_SHAPES = ((40_000,), (33,), (1025,))  # enough elements for more than one thread
OPTIMIZERS: dict[str, Any] = {rule.title: getattr(optim, rule.title) for rule in RULES.values()}
VARIANTS = {rule.title: rule.variants for rule in RULES.values()}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Case:
    """One optimizer configuration on one set of tensors."""

    optimizer: str
    variant: str
    decay: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...] = SHAPES

    def __str__(self) -> str:
        size = f"{sum(torch.Size(shape).numel() for shape in self.shapes)} elements"
        return f"{self.optimizer}, {self.variant}, decay={self.decay!r}, {self.dtype}, {size}"

    def build(self, backend: str) -> Any:
        """The optimizer over its own parameters, in two groups, on a device of the backend."""
        generator = torch.Generator().manual_seed(1)
        home = device_of(backend)
        params = [torch.randn(shape, generator=generator).to(home, self.dtype) for shape in self.shapes]
        options = dict(VARIANTS[self.optimizer][self.variant])
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        options = {"lr": 0.1, "weight_decay": 0.1, "decay": self.decay, "backend": backend, **options}
        return OPTIMIZERS[self.optimizer](groups, **options)


@dataclass
class Outcome:
    """What the cases of one row of the table showed."""

    cases: int = 0
    wrong: list[str] = field(default_factory=list)
    param_error: float = 0.0
    state_error: float = 0.0


def device_of(backend: str) -> torch.device:
    """Where a backend is checked."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_gpu = backend == "cuda" or (backend == "triton" and not triton.interpreted())
    return accelerator if on_gpu and accelerator is not None else torch.device("cpu")


def all_cases() -> list[Case]:
    """Every rule, variant, decay mode and dtype, and one wide case of each rule and dtype."""
    cases = [
        Case(rule, variant, decay, dtype)
        for rule, variants in VARIANTS.items()
        for variant, decay, dtype in product(variants, DECAY_MODES, DTYPES)
    ]
    wide = [(rule, list(variants)[-1]) for rule, variants in VARIANTS.items()]
    return cases + [Case(rule, variant, "lr_scaled", d, WIDE_SHAPES) for (rule, variant), d in product(wide, DTYPES)]


def set_hyperparameters(optimizer: Any, t: int) -> None:
    """Another lr, weight decay and schedule multiplier every step and group; lr 0 freezes one group once."""
    for g, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.0 if (t, g) == (6, 0) else 0.05 * (1 + g) / (1 + 0.2 * t)
        group["weight_decay"] = 0.1 + 0.02 * t
        group["eta"] = 1.0 - 0.05 * t


def roles(optimizer: Any, group: int, p: Tensor) -> list[Tensor]:
    """The parameter and its states, as the rule orders them; their first values for those that are yet to be made."""
    settings, own = optimizer.param_groups[group], optimizer.state.get(p, {})
    found = [p]
    for state in optimizer.rule.hypers([settings])[0][0].states:
        found.append(own.get(state.name, state.begin(torch.zeros_like(p, dtype=torch.float64), settings)))
    return found


def flat_roles(tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """One flat tensor a role, over all parameters, on the CPU."""
    return [torch.cat([t.detach().flatten() for t in role]).cpu() for role in zip(*tensors, strict=True)]


def exact_step(optimizer: Any, t: int, grads: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What step t should give, in float64, from the optimizer's present values: (after, scale) flat for each role."""
    rule, groups = optimizer.rule, optimizer.param_groups
    rows = rule.rows(rule.hypers(groups), [(g, t, t == 1) for g in range(len(groups))])
    places = [(g, p) for g, group in enumerate(groups) for p in group["params"]]
    tensors = [[x.detach().to(torch.float64, copy=True) for x in roles(optimizer, g, p)] for g, p in places]
    before = flat_roles(tensors)
    needs = [[state.name for state in settings.states] for settings, *_ in rule.hypers(groups)]
    for (g, _), grad, (theta, *states) in zip(places, grads, tensors, strict=True):
        reference.step_(rule, rows[g], 1.0, theta, grad.double(), dict(zip(needs[g], states, strict=True)))
    after = flat_roles(tensors)
    floors = (x.square().mean().sqrt().clamp(min=1e-300) for x in after)
    return [(x, x.abs().maximum(y.abs()).maximum(rms)) for x, y, rms in zip(after, before, floors, strict=True)]


def error(found: Tensor, exact: Tensor, scale: Tensor) -> float:
    """The largest error, in units of eps * scale."""
    worst = ((found.double() - exact).abs() / (torch.finfo(found.dtype).eps * scale)).max()
    return float("inf") if worst.isnan() else float(worst)


def check(case: Case, names: Sequence[str]) -> dict[str, Outcome]:
    """Steps the case with every backend at once. "reference" is among `names`; a backend that is wrong drops out."""
    optimizers = {name: case.build(name) for name in names}
    outcomes = {name: Outcome(cases=1) for name in names}
    generator = torch.Generator().manual_seed(2)
    for t in range(1, STEPS + 1):
        scale = (1.0, 1e-3, 10.0)[t % 3]
        grads = [(scale * torch.randn(shape, generator=generator)).to(case.dtype) for shape in case.shapes]
        for optimizer in optimizers.values():
            set_hyperparameters(optimizer, t)
        exact = exact_step(optimizers["reference"], t, grads)
        expected: list[Tensor] = []
        for name in ["reference", *(n for n in optimizers if n != "reference")]:
            try:
                found = step(optimizers[name], grads)
            except Exception as raised:
                wrong, found = f"{type(raised).__name__}: {raised}", []
            else:
                expected = expected or found
                wrong = compare(found, expected, exact, outcomes[name])
            if wrong:
                outcomes[name].wrong.append(f"{case}: step {t}: {wrong}")
                del optimizers[name]
        if "reference" not in optimizers:
            break
    return outcomes


def step(optimizer: Any, grads: Sequence[Tensor]) -> list[Tensor]:
    """Takes a step; returns a flat tensor a role."""
    places = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
    for (_, p), grad in zip(places, grads, strict=True):
        p.grad = grad.to(p.device, copy=True)
    optimizer.step()
    return flat_roles([roles(optimizer, g, p) for g, p in places])


def compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], exact: Sequence[tuple[Tensor, Tensor]], outcome: Outcome
) -> str:
    """What is wrong with a step, "" if nothing is; the errors are noted in `outcome`."""
    wrong = []
    for i, (x, y, z) in enumerate(zip(found, expected, exact, strict=True)):
        role = f"state {i}" if i else "parameter"
        integers = _INTEGERS[x.element_size()]
        differ = int((x.view(integers) != y.view(integers)).sum())
        off = error(x, *z)
        if differ:
            wrong.append(f"{differ} of {x.numel()} elements of the {role} differ from the reference")
        if not off <= LIMIT:
            wrong.append(f"the {role} is {off:.3g} units off float64, allowed are {LIMIT:g}")
        if i:
            outcome.state_error = max(outcome.state_error, off)
        else:
            outcome.param_error = max(outcome.param_error, off)
    return "; ".join(wrong)
