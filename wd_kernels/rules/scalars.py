"""Hyperparameters as numbers: checked by name, and what decay modes make of them (numerics, section 2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["DECAY_MODES", "at_least_zero", "decay_scalars", "finite", "flag", "ipow", "one_of", "scalar"]

DECAY_MODES = ("l2", "lr_scaled", "independent", "proximal", "metric_proximal")


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


def flag(name: str, value: Any, where: str) -> bool:
    """`value` as a truth. Raises TypeError naming the hyperparameter and the group."""
    if value not in (0, 1):
        raise TypeError(f"{name}={value!r} in {where}: expected True or False")
    return bool(value)


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
    return 0.0, 0.0, 1.0, a * lam
