"""Hyperparameters to scalars (NUMERICS, sections 2 to 4).

Everything that depends on lr, step, schedule or decay mode becomes a row of float64 scalars here, once per distinct
(group, step count); kernels know no lr and no mode. A row is a pure function of the group's hyperparameters, the
parameter's own step count t, and whether its momentum buffer is fresh.
"""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch

__all__ = ["ADAMW", "DECAY_MODES", "FORMS", "SGDW", "Rule", "at_least_zero", "ipow", "scalar"]

DECAY_MODES = ("l2", "lr_scaled", "independent", "proximal", "metric_proximal")
FORMS = ("torch", "paper")

Row = tuple[float, ...]
#: A group's hyperparameters but lr and eta, checked, as plain numbers: (decay mode, weight decay, ..., needed states).
Static = tuple[Any, ...]
#: All that a row takes from a group: (static, lr, eta, a), where a, the scaled learning rate, is eta * lr.
Hyper = tuple[Static, float, float, float]


def ipow(x: float, t: int) -> float:
    """x to the power t by squaring, in float64: the same bits on the host, the device and after a resume.

    >>> ipow(0.5, 10) == 0.5**10
    True
    """
    r = 1.0
    while t:
        if t % 2:
            r = r * x
        x = x * x
        t //= 2
    return r


def scalar(name: str, value: Any, where: str) -> float:
    """`value` as a float: a number, or a tensor of one element.

    Raises TypeError or ValueError naming the hyperparameter and the group.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{name}={tuple(value.shape)}-shaped {value.dtype} tensor in {where}: expected one real number"
            )
        return float(value.detach())
    if not isinstance(value, (str, bytes)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # an array of several numbers, say
            return float(value)
    raise TypeError(f"{name}={value!r} in {where}: expected a number or a tensor of one element")


def at_least_zero(name: str, value: Any, where: str) -> float:
    """`value` as a finite float >= 0. Raises TypeError or ValueError as `scalar` does."""
    number = scalar(name, value, where)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name}={number} in {where}: allowed are finite numbers >= 0")
    return number + 0.0  # -0.0 becomes 0.0: equal hyperparameters give equal rows


def _finite(name: str, value: Any, where: str) -> float:
    number = scalar(name, value, where)
    if not math.isfinite(number):
        raise ValueError(f"{name}={number} in {where}: allowed are finite numbers")
    return number + 0.0


def _one_of(name: str, value: Any, allowed: Sequence[str], where: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} in {where}: allowed are {', '.join(map(repr, allowed))}")
    return str(value)


def _flag(name: str, value: Any, where: str) -> bool:
    if value not in (0, 1):
        raise TypeError(f"{name}={value!r} in {where}: expected True or False")
    return bool(value)


def _place_decay(mode: str, lam: float, eta: float, a: float) -> tuple[float, float, float, float]:
    """Where lambda enters: (l2, decay, scale of the step, metric), the table of NUMERICS section 2."""
    if mode == "lr_scaled":
        return 0.0, a * lam, 1.0, 0.0
    if mode == "l2":
        return lam, 0.0, 1.0, 0.0
    if mode == "independent":
        return 0.0, eta * lam, 1.0, 0.0
    if mode == "proximal":
        return 0.0, (eta * lam) / (1.0 + eta * lam), 1.0 / (1.0 + eta * lam), 0.0
    return 0.0, 0.0, 1.0, a * lam


class Rule:
    """One update rule: its states, its hyperparameters, and the row that they make.

    Attributes:
        name: "adamw" or "sgdw".
        code: RuleCode of csrc/table.h.
        width: scalars in a row.
        static_keys: group keys that a row depends on, besides "lr" and "eta".
        check: a group's Static, or an error that names the hyperparameter and the group.
        row: (static, lr, eta, a, t, fresh) to the row's scalars.
    """

    def __init__(
        self,
        name: str,
        code: int,
        width: int,
        static_keys: Sequence[str],
        check: Callable[[Mapping[str, Any], str], Static],
        row: Callable[[Static, float, float, float, int, bool], Row],
    ) -> None:
        self.name, self.code, self.width = name, code, width
        self.static_keys = tuple(static_keys)
        self.check, self.row = check, row
        self._key_of = itemgetter("lr", "eta", *static_keys)
        self._memo: dict[tuple[Any, ...], Static] = {}

    def hypers(self, groups: Sequence[Mapping[str, Any]], first: int = 0, where: str = "param group {}") -> list[Hyper]:
        """The checked hyperparameters of every group. Raises before anything was written.

        Args:
            first: the number of the first of `groups`.
            where: what errors call a group, by its number.

        Raises:
            KeyError, TypeError, ValueError: naming the hyperparameter, the group, what was found and what is allowed.
        """
        result = []
        memo = self._memo
        try:
            keys = list(map(self._key_of, groups))
        except KeyError:
            for i, group in enumerate(groups, first):
                for name in ("lr", "eta", *self.static_keys):
                    if name not in group:
                        raise KeyError(f"{where.format(i)} has no {name!r}; it has {sorted(map(str, group))}") from None
            raise
        for i, (lr, eta, *key) in enumerate(keys, first):
            key = tuple(key)
            try:
                static = memo.get(key)
            except TypeError:  # an unhashable value: betas as a list, say
                static = None
            if static is None:
                static = self._checked(groups[i - first], key, where.format(i))
            if type(lr) is not float or not 0.0 <= lr < math.inf:
                lr = at_least_zero("lr", lr, where.format(i))
            if type(eta) is not float or not 0.0 <= eta < math.inf:
                eta = at_least_zero("eta", eta, where.format(i))
            result.append((static, lr, eta, eta * lr))
        return result

    def _checked(self, group: Mapping[str, Any], key: tuple[Any, ...], where: str) -> Static:
        static = self.check(group, where)
        # A tensor may hold another number under the same key: only plain values are remembered.
        if all(type(v) in (float, bool, str) for k in key for v in (k if type(k) is tuple else (k,))):
            if len(self._memo) >= 4096:  # a schedule that moves weight_decay makes a new key a step
                self._memo.clear()
            self._memo[key] = static
        return static

    def rows(self, hypers: Sequence[Hyper], keys: Iterable[tuple[int, int, bool]]) -> torch.Tensor:
        """The rows of the given (group, step count, fresh) keys: float64 [len(keys), width]."""
        flat = array("d")
        for group, t, fresh in keys:
            flat.extend(self.row(*hypers[group], t, fresh))
        if not flat:
            return torch.empty(0, self.width, dtype=torch.float64, device="cpu")
        return torch.frombuffer(flat, dtype=torch.float64).view(-1, self.width)


# AdamW ---------------------------------------------------------------------------------------------------------------


def _check_adamw(group: Mapping[str, Any], where: str) -> Static:
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas={betas!r} in {where}: expected a pair (beta1, beta2)")
    beta1, beta2 = (scalar(f"betas[{i}]", beta, where) for i, beta in enumerate(betas))
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}]={beta} in {where}: allowed are 0 <= beta < 1")
    return (
        _one_of("decay", group["decay"], DECAY_MODES, where),
        at_least_zero("weight_decay", group["weight_decay"], where),
        beta1,
        beta2,
        at_least_zero("eps", group["eps"], where),
        -1.0 if _flag("maximize", group["maximize"], where) else 1.0,
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        if _flag("amsgrad", group["amsgrad"], where)
        else ("exp_avg", "exp_avg_sq"),
    )


_bias_memo: dict[tuple[float, float, int], tuple[float, float]] = {}


def _bias(beta1: float, beta2: float, t: int) -> tuple[float, float]:
    """(bias1, 1/sqrt(bias2)), shared by all groups of a step."""
    key = (beta1, beta2, t)
    found = _bias_memo.get(key)
    if found is None:
        if len(_bias_memo) >= 4096:
            _bias_memo.clear()
        found = _bias_memo[key] = (1.0 - ipow(beta1, t), 1.0 / math.sqrt(1.0 - ipow(beta2, t)))
    return found


def _adamw_row(static: Static, lr: float, eta: float, a: float, t: int, fresh: bool) -> Row:
    mode, lam, beta1, beta2, eps, sign, _ = static
    l2, decay, scale, metric = _place_decay(mode, lam, eta, a)
    bias1, inv_sqrt_bias2 = _bias(beta1, beta2, t)
    step_size = (scale * a) / bias1
    frozen = 1.0 if lr == 0.0 else 0.0
    return (
        t, frozen, sign, l2, beta1, 1.0 - beta1, beta2, 1.0 - beta2, step_size, inv_sqrt_bias2, eps, decay, metric,
    )  # fmt: skip


ADAMW = Rule(
    "adamw", 0, 13, ("betas", "eps", "weight_decay", "maximize", "decay", "amsgrad"),
    _check_adamw, _adamw_row,
)  # fmt: skip


# SGDW ----------------------------------------------------------------------------------------------------------------


def _check_sgdw(group: Mapping[str, Any], where: str) -> Static:
    form = _one_of("form", group["form"], FORMS, where)
    momentum = at_least_zero("momentum", group["momentum"], where)
    dampening = _finite("dampening", group["dampening"], where)
    nesterov = _flag("nesterov", group["nesterov"], where)
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
    return (
        _one_of("decay", group["decay"], DECAY_MODES, where),
        at_least_zero("weight_decay", group["weight_decay"], where),
        form == "paper",
        dampening,
        nesterov,
        -1.0 if _flag("maximize", group["maximize"], where) else 1.0,
        momentum,
        ("momentum_buffer",) if momentum else (),
    )


def _sgdw_row(static: Static, lr: float, eta: float, a: float, t: int, fresh: bool) -> Row:
    mode, lam, paper, dampening, nesterov, sign, momentum, _ = static
    if mode == "metric_proximal":  # the metric is the identity: proximal, with a in place of eta
        l2, decay, scale, _ = _place_decay("proximal", lam, a, a)
    else:
        l2, decay, scale, _ = _place_decay(mode, lam, eta, a)
    if paper and momentum:  # the lr sits inside the buffer
        grad_coef, step_size = a, scale
    else:
        grad_coef, step_size = (1.0 if fresh else 1.0 - dampening), scale * a
    update_grad, update_buf = (1.0, momentum) if nesterov else (0.0, 1.0)
    frozen = 1.0 if lr == 0.0 else 0.0
    return (t, frozen, sign, l2, momentum, grad_coef, update_grad, update_buf, step_size, decay)


SGDW = Rule(
    "sgdw", 1, 10, ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "decay", "form"),
    _check_sgdw, _sgdw_row,
)  # fmt: skip
