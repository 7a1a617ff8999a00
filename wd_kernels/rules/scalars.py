"""Hyperparameters as numbers: checked by name, and what decay modes make of them (numerics, section 2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch

__all__ = [
    "DECAY_MODES",
    "TORCHS_DECAY",
    "DecayMode",
    "at_least_zero",
    "check_chosen",
    "decay_scalars",
    "finite",
    "flag",
    "frozen",
    "ipow",
    "norm_limit",
    "one_of",
    "pair",
    "scalar",
    "value_limit",
]

DecayMode: TypeAlias = Literal["l2", "lr_scaled", "independent", "proximal", "metric_proximal", "corrected"]
#: By the numbers that native code has for them.
DECAY_MODES: tuple[str, ...] = get_args(DecayMode)


#: The default of AdamW's weight decay. It is told from a 0.01 that somebody has chosen by being this very object.
TORCHS_DECAY = float("0.01")


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


def finite(name: str, value: Any, where: str) -> float:
    """`value` as a finite float. Raises TypeError or ValueError as `scalar` does."""
    number = scalar(name, value, where)
    if not math.isfinite(number):
        raise ValueError(f"{name}={number} in {where}: allowed are finite numbers")
    return number + 0.0


def one_of(name: str, value: Any, allowed: Sequence[str], where: str) -> str:
    """`value` if it is allowed. Raises ValueError naming the hyperparameter and the group."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} in {where}: allowed are {', '.join(map(repr, allowed))}")
    return str(value)


def pair(name: str, value: Any, where: str) -> Any:
    """`value` if it is a pair; of an array, a tensor or a list of a configuration, the pair of its numbers.

    Raises TypeError naming the hyperparameter and the group.
    """
    if isinstance(value, (tuple, list)) and len(value) == 2:
        plain = all(type(item) in (float, int) or isinstance(item, torch.Tensor) for item in value)
        return value if plain else tuple(scalar(f"{name}[{i}]", item, where) for i, item in enumerate(value))
    if isinstance(value, (Sequence, torch.Tensor)) or hasattr(value, "__array__"):
        items = () if isinstance(value, (str, bytes, tuple, list)) or not _sized(value) else tuple(value)
        if len(items) == 2:
            return tuple(scalar(f"{name}[{i}]", item, where) for i, item in enumerate(items))
    one = name.removesuffix("s")
    raise TypeError(f"{name}={value!r} in {where}: expected a pair ({one}1, {one}2)")


def _sized(value: Any) -> bool:
    try:
        return len(value) == 2
    except TypeError:  # an array of no dimensions
        return False


def flag(name: str, value: Any, where: str) -> bool:
    """`value` as a truth. Raises TypeError naming the hyperparameter and the group."""
    if value not in (0, 1):
        raise TypeError(f"{name}={value!r} in {where}: expected True or False")
    return bool(value)


def norm_limit(value: Any, where: str) -> float | None:
    """The largest norm that gradients may have: a number > 0, infinite where it is only measured; None: none is asked.

    Raises TypeError or ValueError naming the hyperparameter and the group.
    """
    if value is None:
        return None
    number = scalar("max_grad_norm", value, where)
    if not number > 0.0:
        raise ValueError(
            f"max_grad_norm={number} in {where}: allowed are numbers > 0, math.inf (the norm is measured, nothing is "
            "clipped) and None (neither)"
        )
    return number


def value_limit(value: Any, where: str) -> float:
    """The largest magnitude that an element of a gradient keeps: a number > 0; None is infinite: nothing is clipped.

    Raises TypeError or ValueError naming the hyperparameter and the group.
    """
    number = math.inf if value is None else scalar("max_grad_value", value, where)
    if not number > 0.0:
        raise ValueError(
            f"max_grad_value={number} in {where}: allowed are numbers > 0, and None or math.inf (nothing is clipped)"
        )
    return number


def frozen(lr: float, eta: float) -> float:
    """1.0 where weights keep their bits, whatever the gradients: at lr 0 and at eta 0."""
    return 1.0 if lr == 0.0 or eta == 0.0 else 0.0


def check_chosen(weight_decay: Any, decay: str, lr: Any, where: str) -> None:
    """Raises where the weight decay that torch's AdamW has by default would be taken off whole in every step."""
    if weight_decay is TORCHS_DECAY and decay in ("independent", "proximal"):
        alpha = scalar("lr", lr, where)
        raise ValueError(
            f"weight_decay is not given in {where} with decay={decay!r}, which does not multiply it by lr: torch's "
            f"default, {TORCHS_DECAY}, would take 1% off every weight in every step. Give it: what torch's AdamW takes "
            f"off by default at lr={alpha:g} is weight_decay={alpha * TORCHS_DECAY:g}; convert_weight_decay carries "
            "other values over"
        )


def decay_scalars(mode: str, lam: float, eta: float, a: float) -> tuple[float, float, float, float]:
    """Where lambda enters: (l2, decay, scale of the step, metric), the table of section 2."""
    if mode == "lr_scaled":
        return 0.0, a * lam, 1.0, 0.0
    if mode == "l2":
        return lam, 0.0, 1.0, 0.0
    if mode == "independent":
        return 0.0, eta * lam, 1.0, 0.0
    if mode == "proximal":
        return 0.0, (eta * lam) / (1.0 + eta * lam), 1.0 / (1.0 + eta * lam), 0.0
    if mode == "corrected":
        return 0.0, a * eta * lam, 1.0, 0.0
    return 0.0, 0.0, 1.0, a * lam
