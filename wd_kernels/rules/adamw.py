"""AdamW (numerics, section 3): Adam with decoupled weight decay, and AMSGrad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..reference import lerp, sqrt
from .rule import VALUE, Hyperparameter, Part, Rule, Settings, State, TorchTwin
from .scalars import DECAY_MODES, at_least_zero, decay_scalars, flag, frozen, ipow, one_of, pair, scalar, value_limit

__all__ = ["ADAMW"]


def check(group: Mapping[str, Any], where: str) -> Settings:
    beta1, beta2 = (scalar(f"betas[{i}]", beta, where) for i, beta in enumerate(pair("betas", group["betas"], where)))
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}]={beta} in {where}: allowed are 0 <= beta < 1")
    return Settings(
        one_of("decay", group["decay"], DECAY_MODES, where),
        at_least_zero("weight_decay", group["weight_decay"], where),
        ADAMW.asked(amsgrad=flag("amsgrad", group["amsgrad"], where)),
        (
            beta1,
            beta2,
            at_least_zero("eps", group["eps"], where),
            -1.0 if flag("maximize", group["maximize"], where) else 1.0,
            value_limit(group[VALUE], where),
        ),
    )


def group_part(settings: Settings, lr: float, eta: float, a: float) -> Part:
    mode, lam, _, (beta1, beta2, eps, sign, limit), *_ = settings
    l2, decay, scale, metric = decay_scalars(mode, lam, eta, a)
    return frozen(lr, eta), sign, limit, l2, decay, metric, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, scale * a


def count_part(group: Part, t: int, fresh: bool) -> Part:
    _, _, _, _, _, _, beta1, _, beta2, _, _, scaled_lr = group
    bias1, inv_sqrt_bias2 = _biases.get((beta1, beta2, t)) or _bias(beta1, beta2, t)
    return t, scaled_lr / bias1, inv_sqrt_bias2


_biases: dict[tuple[float, float, int], tuple[float, float]] = {}  # shared by all groups of a step


def _bias(beta1: float, beta2: float, t: int) -> tuple[float, float]:
    """(bias1, 1/sqrt(bias2))."""
    if len(_biases) >= 256:
        _biases.clear()
    found = _biases[beta1, beta2, t] = (1.0 - ipow(beta1, t), 1.0 / math.sqrt(1.0 - ipow(beta2, t)))
    return found


def equation(
    s: SimpleNamespace, theta: Tensor, g: Tensor, states: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    m = lerp(states["exp_avg"], g, s.beta1, s.one_minus_beta1)
    v = lerp(states["exp_avg_sq"], g * g, s.beta2, s.one_minus_beta2)
    new = {"exp_avg": m, "exp_avg_sq": v}
    second = v
    if "max_exp_avg_sq" in states:
        v_max = states["max_exp_avg_sq"]
        second = new["max_exp_avg_sq"] = torch.where((v > v_max) | (v != v), v, v_max)
    d = sqrt(second) * s.inv_sqrt_bias2 + s.eps
    u = (s.step_size * m + s.metric * theta) / (d + s.metric)
    return u, new


ADAMW = Rule(
    name="adamw",
    title="AdamW",
    hyperparameters=(
        Hyperparameter("betas", parts=("beta1", "beta2")),
        Hyperparameter("eps"),
        Hyperparameter("weight_decay"),
        Hyperparameter("decay", "str"),
        Hyperparameter("maximize", "bool"),
        Hyperparameter("amsgrad", "bool", of_states=True),
    ),
    states=(
        State("exp_avg", "exp_avgs"),
        State("exp_avg_sq", "exp_avg_sqs", signed=False),
        State("max_exp_avg_sq", "max_exp_avg_sqs", asked_by="amsgrad", late=True, signed=False),
    ),
    own=("beta1", "beta2", "eps", "sign", "grad_limit"),
    group_scalars=(
        "frozen", "grad_scale", "grad_limit", "l2", "decay", "metric", "beta1", "one_minus_beta1", "beta2",
        "one_minus_beta2", "eps", "scaled_lr",
    ),
    count_scalars=("t", "step_size", "inv_sqrt_bias2"),
    check=check,
    group_part=group_part,
    count_part=count_part,
    equation=equation,
    torch=TorchTwin("torch.optim.AdamW", decays=("lr_scaled", "l2"), decoupled_flag=True, capturable=True),
    metric="sqrt(v) + eps, the bias-corrected one",
    variants=MappingProxyType({"plain": {}, "maximize": {"maximize": True}, "amsgrad": {"amsgrad": True}}),
)  # fmt: skip
