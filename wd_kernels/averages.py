r"""What `ema_decay` can be: how much of the average of the weights a step keeps.

.. math:: ema \leftarrow \beta_t\, ema + (1 - \beta_t)\, \theta_t

where :math:`\theta_t` is a parameter as step t has stored it, t its own step count, from 1. A number is a constant
:math:`\beta`, and the average begins as the parameter was before the step that makes it. The shapes here follow what
others do; in all of them the average is the parameter itself until step `after` + 1, with which it begins.

==============================  ========================================================================================
:class:`EMA`                    torch's ``AveragedModel`` with ``get_ema_multi_avg_fn(decay)``, and timm's
                                ``ModelEmaV3`` where its ``update`` is given the step
:class:`WarmedEMA`              timm's ``ModelEmaV3(use_warmup=True)``, diffusers' ``EMAModel(use_ema_warmup=True)``
:class:`RatioEMA`               diffusers' ``EMAModel``; with ``after=-1``, TensorFlow's
                                ``ExponentialMovingAverage(num_updates=)``
:class:`Mean`                   torch's ``AveragedModel`` as it comes: SWA, the mean of all weights from there on
==============================  ========================================================================================

timm's ``ModelEmaV3`` whose ``update`` is given no step is a number. Any other function of t will do that gives numbers
in [0, 1], 1 where a step leaves the average alone; but not where a device counts the steps.
"""

from __future__ import annotations

import contextlib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from .opaque import opaque

__all__ = ["EMA", "AverageDecay", "AverageLike", "Mean", "RatioEMA", "WarmedEMA"]

#: What `ema_decay` may be.
AverageLike: TypeAlias = float | Callable[[int], float] | None

#: The longest table that a device is given of an average's decays.
LONGEST = 2**24


class AverageDecay(ABC):
    """How much of an average is kept: a function of a parameter's own step count t, from 1."""

    after: int

    def __call__(self, t: int) -> float:
        """The decay of step t, in [0, 1]."""
        past = t - self.after - 1
        return self.past(past) if past > 0 else 0.0

    @abstractmethod
    def past(self, s: int) -> float:
        """The decay of the s-th step after the one that the average begins with; s > 0. It does not fall."""

    def settles(self) -> int | None:
        """From which step on it keeps its value: a device has a table of those before. None: it never does.

        Raises:
            ValueError: that is too far.
        """
        limit = getattr(self, "decay", None)
        if limit is None:
            return None
        first, last = 1, LONGEST - max(self.after, 0) - 1
        if last < 1 or self.past(last) < limit:
            raise ValueError(
                f"{self!r} reaches {limit} after {LONGEST} steps: a device that counts the steps has a table of them, "
                "which is no longer"
            )
        while first < last:
            middle = (first + last) // 2
            first, last = (middle + 1, last) if self.past(middle) < limit else (first, middle)
        return self.after + 1 + first

    def _check(self, **least: float) -> None:
        """Makes numbers of the fields, or raises an error that names one; `least`: what some must be greater than."""
        for name in self.__match_args__:  # type: ignore[attr-defined]
            value, what = getattr(self, name), f"{name}={getattr(self, name)!r} of {type(self).__name__}"
            if name == "after":
                with contextlib.suppress(TypeError):
                    value = value if isinstance(value, bool) else operator.index(value)
                if type(value) is not int or (value < -1 and not isinstance(self, Mean)):
                    raise ValueError(
                        f"{what}: allowed are whole numbers >= 0, and -1: the average begins before step 1"
                    )
                object.__setattr__(self, name, value)
                continue
            number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
            if name in ("decay", "least"):
                if not 0.0 <= number < 1.0:
                    raise ValueError(f"{what}: allowed are 0 <= {name} < 1")
            elif not least.get(name, -math.inf) < number < math.inf:
                raise ValueError(f"{what}: allowed are finite numbers > {least[name]:g}")
            object.__setattr__(self, name, number)


@opaque
@dataclass(frozen=True)
class EMA(AverageDecay):
    r"""An exponential moving average: :math:`\beta_t` is 0 until step `after` + 1, then `decay`.

    Args:
        decay: in [0, 1).
        after: the step before the average begins; -1: it begins as the parameter was before step 1.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> [EMA(0.9)(t) for t in (1, 2, 3)], EMA(0.9, after=-1)(1)
        ([0.0, 0.9, 0.9], 0.9)
    """

    decay: float
    after: int = 0

    def __post_init__(self) -> None:
        self._check()

    def past(self, s: int) -> float:
        return self.decay


@opaque
@dataclass(frozen=True)
class WarmedEMA(AverageDecay):
    r"""One that forgets faster in the beginning: :math:`\beta = 1 - (1 + s/\gamma)^{-p}`, at most `decay`.

    s is the number of steps since `after` + 1. After s steps the average reaches back over a fixed part of them.

    Args:
        decay: the largest, in [0, 1).
        gamma: :math:`\gamma > 0`.
        power: :math:`p > 0`: 2/3 for a million steps, 3/4 for less.
        after: as of :class:`EMA`.
        least: the smallest, in [0, 1).

    Raises:
        ValueError: naming the argument.

    Example:
        >>> warmed = WarmedEMA(0.9999, power=3 / 4)
        >>> [round(warmed(t), 4) for t in (1, 2, 11, 10**6)]
        [0.0, 0.4054, 0.8344, 0.9999]
    """

    decay: float
    gamma: float = 1.0
    power: float = 2 / 3
    after: int = 0
    least: float = 0.0

    def __post_init__(self) -> None:
        self._check(gamma=0.0, power=0.0)

    def past(self, s: int) -> float:
        return max(min(1.0 - math.pow(1.0 + s / self.gamma, -self.power), self.decay), self.least)


@opaque
@dataclass(frozen=True)
class RatioEMA(AverageDecay):
    r"""One with :math:`\beta = (1 + s)/(10 + s)`, at most `decay`; s is the number of steps since `after` + 1.

    Args:
        decay, after, least: as of :class:`WarmedEMA`.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> [round(RatioEMA(0.999)(t), 4) for t in (1, 2, 11, 10**5)]
        [0.0, 0.1818, 0.55, 0.999]
    """

    decay: float
    after: int = 0
    least: float = 0.0

    def __post_init__(self) -> None:
        self._check()

    def past(self, s: int) -> float:
        return max(min((1.0 + s) / (10.0 + s), self.decay), self.least)


@opaque
@dataclass(frozen=True)
class Mean(AverageDecay):
    r"""The mean of a parameter after steps `after` + 1, `after` + 2, ...: :math:`\beta = 1 - 1/(s + 1)`.

    Args:
        after: how many steps come before it. If it is negative, the average is loaded, and so many more weights are in
            it than steps were taken: `load_ema_state_dict`.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> [round(Mean(after=10)(t), 4) for t in (10, 11, 12, 13)]
        [0.0, 0.0, 0.5, 0.6667]

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, section 3.
    """

    after: int = 0

    def __post_init__(self) -> None:
        self._check()

    def past(self, s: int) -> float:
        return 1.0 - 1.0 / (s + 1)


def checked(value: Any, where: str) -> Callable[[int], float] | None:
    """What a group's `ema_decay` is as a function of the step count; None: no average.

    Raises:
        TypeError, ValueError: naming it and the group.
    """
    if value is None or isinstance(value, AverageDecay):
        return value
    if isinstance(value, type):
        raise TypeError(f"ema_decay={value.__name__} in {where} is a class: expected {value.__name__}(...)")
    if callable(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"ema_decay={value!r} in {where}: expected a number, one of wd_kernels.averages, a function of the step "
            "count, or None"
        )
    number = float(value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"ema_decay={value!r} in {where}: allowed are 0 <= ema_decay < 1, and None: no average")
    return EMA(number, after=-1)


def is_tabled(average: object) -> bool:
    """Is it one that a device can have as a table, or make? What derives from these may be anything."""
    return type(average) in (EMA, WarmedEMA, RatioEMA, Mean)


def decay_of(average: Callable[[int], float] | None, t: int) -> float:
    """The decay of step t; 1 where there is no average.

    Raises:
        ValueError: a function gave no number in [0, 1].
    """
    if average is None:
        return 1.0
    found = average(t)
    if not is_tabled(average):
        good = isinstance(found, Real) and not isinstance(found, bool) and 0.0 <= found <= 1.0
        if not good:
            raise ValueError(f"ema_decay({t})={found!r} of {average!r}: allowed are numbers in [0, 1]")
    return float(found)
