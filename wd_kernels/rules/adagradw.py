"""AdagradW (numerics, section 3a): Adagrad with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

from torch import Tensor

from ..reference import sqrt
from .rule import VALUE, Hyperparameter, Part, Rule, Settings, State, TorchTwin
from .scalars import DECAY_MODES, at_least_zero, decay_scalars, flag, frozen, one_of, value_limit

__all__ = ["ADAGRADW"]


def check(group: Mapping[str, Any], where: str) -> Settings:
    at_least_zero("initial_accumulator_value", group["initial_accumulator_value"], where)
    return Settings(
        one_of("decay", group["decay"], DECAY_MODES, where),
        at_least_zero("weight_decay", group["weight_decay"], where),
        ADAGRADW.states,
        (
            at_least_zero("lr_decay", group["lr_decay"], where),
            at_least_zero("eps", group["eps"], where),
            -1.0 if flag("maximize", group["maximize"], where) else 1.0,
            value_limit(group[VALUE], where),
        ),
    )


def group_part(settings: Settings, lr: float, eta: float, a: float) -> Part:
    mode, lam, _, (lr_decay, eps, sign, limit), *_ = settings
    l2, decay, scale, metric = decay_scalars(mode, lam, eta, a)
    fixed_decay = decay_scalars(mode, lam, eta, 0.0)[1]  # what lr_decay does not slow
    return frozen(lr, eta), sign, limit, l2, eps, lr_decay, scale * a, fixed_decay, decay - fixed_decay, metric


def count_part(group: Part, t: int, fresh: bool) -> Part:
    *_, lr_decay, scaled_lr, fixed_decay, scaled_decay, scaled_metric = group
    slowed = 1.0 + (t - 1) * lr_decay
    return t, scaled_lr / slowed, fixed_decay + scaled_decay / slowed, scaled_metric / slowed


def equation(
    s: SimpleNamespace, theta: Tensor, g: Tensor, states: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    total = states["sum"] + g * g
    d = sqrt(total) + s.eps
    u = (s.step_size * g + s.metric * theta) / (d + s.metric)
    return u, {"sum": total}


ADAGRADW = Rule(
    name="adagradw",
    title="AdagradW",
    hyperparameters=(
        Hyperparameter("lr_decay"),
        Hyperparameter("eps"),
        Hyperparameter("weight_decay"),
        Hyperparameter("decay", "str"),
        Hyperparameter("maximize", "bool"),
        Hyperparameter("initial_accumulator_value", of_states=True),
    ),
    states=(State("sum", "state_sums", initial="initial_accumulator_value", signed=False),),
    own=("lr_decay", "eps", "sign", "grad_limit"),
    group_scalars=(
        "frozen", "grad_scale", "grad_limit", "l2", "eps", "lr_decay", "scaled_lr", "fixed_decay", "scaled_decay",
        "scaled_metric",
    ),
    count_scalars=("t", "step_size", "decay", "metric"),
    check=check,
    group_part=group_part,
    count_part=count_part,
    equation=equation,
    torch=TorchTwin("torch.optim.Adagrad", decays=("l2",), all_states=True),
    metric="sqrt(sum) + eps",
    variants=MappingProxyType({
        "plain": {},
        "slowed": {"lr_decay": 0.5, "initial_accumulator_value": 0.25},
        "maximize": {"maximize": True, "eps": 1e-3},
    }),
)  # fmt: skip
