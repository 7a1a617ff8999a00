"""SGDW (numerics, section 4): SGD with momentum and decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from .rule import VALUE, Hyperparameter, Part, Rule, Settings, State, TorchTwin
from .scalars import DECAY_MODES, at_least_zero, decay_scalars, finite, flag, frozen, one_of, value_limit

__all__ = ["FORMS", "SGDW", "Form"]

Form: TypeAlias = Literal["torch", "paper"]
FORMS: tuple[str, ...] = get_args(Form)


def check(group: Mapping[str, Any], where: str) -> Settings:
    form = one_of("form", group["form"], FORMS, where)
    momentum = at_least_zero("momentum", group["momentum"], where)
    dampening = finite("dampening", group["dampening"], where)
    nesterov = flag("nesterov", group["nesterov"], where)
    if form == "paper" and (nesterov or dampening != 0):
        raise ValueError(
            f"nesterov={nesterov}, dampening={dampening} in {where}: form='paper' (Algorithm 1) has neither; "
            "allowed are nesterov=False, dampening=0, or form='torch'"
        )
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov=True with momentum={momentum}, dampening={dampening} in {where}: "
            "Nesterov momentum needs momentum > 0 and dampening 0"
        )
    return Settings(
        one_of("decay", group["decay"], DECAY_MODES, where),
        at_least_zero("weight_decay", group["weight_decay"], where),
        SGDW.asked(momentum=momentum),
        (
            form == "paper",
            dampening,
            nesterov,
            -1.0 if flag("maximize", group["maximize"], where) else 1.0,
            value_limit(group[VALUE], where),
            momentum,
        ),
    )


def group_part(settings: Settings, lr: float, eta: float, a: float) -> Part:
    mode, lam, _, (paper, dampening, nesterov, sign, limit, momentum), *_ = settings
    if mode == "metric_proximal":  # the metric is the identity: proximal, with a in place of eta
        l2, decay, scale, _ = decay_scalars("proximal", lam, a, a)
    else:
        l2, decay, scale, _ = decay_scalars(mode, lam, eta, a)
    if paper and momentum:  # the lr sits inside the buffer
        first_grad_coef, later_grad_coef, step_size = a, a, scale
    else:
        first_grad_coef, later_grad_coef, step_size = 1.0, 1.0 - dampening, scale * a
    update_grad, update_buf = (1.0, momentum) if nesterov else (0.0, 1.0)
    return (
        frozen(lr, eta),
        sign,
        limit,
        l2,
        decay,
        momentum,
        update_grad,
        update_buf,
        step_size,
        first_grad_coef,
        later_grad_coef,
    )


def count_part(group: Part, t: int, fresh: bool) -> Part:
    *_, first_grad_coef, later_grad_coef = group
    return t, first_grad_coef if fresh else later_grad_coef


def equation(
    s: SimpleNamespace, theta: Tensor, g: Tensor, states: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    if "momentum_buffer" not in states:
        return s.step_size * g, {}
    b = s.momentum * states["momentum_buffer"] + s.grad_coef * g
    u = s.step_size * (s.update_grad * g + s.update_buf * b)
    return u, {"momentum_buffer": b}


def carry(saved: Mapping[str, Any], live: Mapping[str, Any], a: float) -> dict[str, float]:
    """In the next step the buffer of form "paper" moves weights as that of "torch" does times the lr of that step."""
    forms = [group.get("form", "torch") for group in (saved, live)]
    if forms[0] == forms[1]:
        return {}
    return {"momentum_buffer": a if forms[1] == "paper" else 1.0 / a if a else math.inf}


SGDW = Rule(
    name="sgdw",
    title="SGDW",
    hyperparameters=(
        Hyperparameter("momentum"),
        Hyperparameter("dampening"),
        Hyperparameter("weight_decay"),
        Hyperparameter("decay", "str"),
        Hyperparameter("form", "str", absent="torch"),
        Hyperparameter("nesterov", "bool"),
        Hyperparameter("maximize", "bool"),
    ),
    states=(State("momentum_buffer", "momentum_buffers", asked_by="momentum", late=True, fresh=True),),
    own=("paper", "dampening", "nesterov", "sign", "grad_limit", "momentum"),
    group_scalars=(
        "frozen", "grad_scale", "grad_limit", "l2", "decay", "momentum", "update_grad", "update_buf", "step_size",
        "first_grad_coef", "later_grad_coef",
    ),
    count_scalars=("t", "grad_coef"),
    check=check,
    group_part=group_part,
    count_part=count_part,
    equation=equation,
    torch=TorchTwin("torch.optim.SGD", decays=("l2",), counts_steps=False),
    metric="",
    carry=carry,
    variants=MappingProxyType({
        "no momentum": {},
        "momentum": {"momentum": 0.9},
        "dampening": {"momentum": 0.9, "dampening": 0.3},
        "paper form": {"momentum": 0.9, "form": "paper"},
        "nesterov": {"momentum": 0.9, "nesterov": True},
    }),
)  # fmt: skip
