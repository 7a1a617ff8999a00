"""Schedules made of schedules: one after another, multiplied."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from ..opaque import opaque
from .shapes import Schedule, named, where

__all__ = ["Product", "Sequential", "settles"]


def _length(part: Callable[[int], float]) -> int | None:
    return getattr(part, "steps", None)


def settles(part: Callable[[int], float]) -> int | None:
    """`part.settles`; of what is no schedule of this kind, its end."""
    return part.settles if isinstance(part, Schedule) else _length(part)


def _restarts(part: Callable[[int], float]) -> bool:
    return getattr(part, "restarts", False)


@opaque
@dataclass(frozen=True, init=False, repr=False)
class _Composed(Schedule):
    parts: tuple[Callable[[int], float], ...]

    def __init__(self, *parts: Callable[[int], float]) -> None:
        own = type(self).__name__
        if not parts:
            raise ValueError(f"{own}() has no parts: give it one or more schedules")
        for k, part in enumerate(parts):
            if not callable(part) or isinstance(part, type):
                found = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
                raise TypeError(f"part {k} of {own} is {found}: expected a schedule or a callable")
            if hasattr(part, "decay_factor"):
                raise ValueError(
                    f"part {k} of {own} is {part!r}, whose weight decay would be lost: allowed is "
                    f"NormalizedDecay({own}(...)), the other way round"
                )
        self._set(parts=parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(str(named(part)) for part in self.parts)})"


class Sequential(_Composed):
    r"""One schedule after another, each counting from its own first step.

    It restarts where its last part restarts. The parts before, a warm-up say, belong to the first period of the last.

    Args:
        parts: schedules or callables; all but the last have an end.

    Example:
        >>> from wd_kernels.schedules import Cosine, Warmup
        >>> [Sequential(Warmup(2), Cosine(2))(t) for t in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    firsts: tuple[int, ...]  # the first step of each part

    def __init__(self, *parts: Callable[[int], float]) -> None:
        super().__init__(*parts)
        lengths = [_length(part) for part in parts]
        for k, (part, length) in enumerate(zip(parts[:-1], lengths, strict=False)):
            if length is None:
                raise ValueError(f"part {k} of Sequential, {part!r}, has no end: what follows it would never come")
        *before, last = lengths
        firsts = tuple(accumulate((length or 0 for length in before), initial=0))
        self._set(firsts=firsts, steps=None if last is None else firsts[-1] + last, restarts=_restarts(parts[-1]))

    @property
    def settles(self) -> int | None:
        last = settles(self.parts[-1])
        return None if last is None else self.firsts[-1] + last

    def __call__(self, t: int) -> float:
        k = bisect_right(self.firsts, t) - 1
        return self.parts[k](t - self.firsts[k])

    def where(self, t: int) -> tuple[int, int]:
        if not self.restarts:
            return super().where(t)
        lead = self.firsts[-1]
        done, length = where(self.parts[-1], max(t - lead, 0))
        return (done, length) if done < t - lead else (t, lead + length)


class Product(_Composed):
    r"""Schedules multiplied: a warm-up on top of warm restarts, say.

    It restarts where one of its parts does; else its length is that of the longest.

    Args:
        parts: schedules or callables, of which one may restart.

    Example:
        >>> from wd_kernels.schedules import StepDrop, Warmup
        >>> [Product(StepDrop((2,), 0.5), Warmup(4))(t) for t in range(4)]
        [0.25, 0.5, 0.375, 0.5]
    """

    def __init__(self, *parts: Callable[[int], float]) -> None:
        super().__init__(*parts)
        restarting = [part for part in parts if _restarts(part)]
        if len(restarting) > 1:
            raise ValueError(f"{self!r} has several parts that restart: allowed is one")
        ends = [end for part in parts if (end := _length(part)) is not None]
        self._set(restarts=bool(restarting), steps=None if restarting or not ends else max(ends))

    @property
    def settles(self) -> int | None:
        each = [settles(part) for part in self.parts]
        return None if None in each else max(own for own in each if own is not None)

    def __call__(self, t: int) -> float:
        return math.prod(part(t) for part in self.parts)

    def where(self, t: int) -> tuple[int, int]:
        if not self.restarts:
            return super().where(t)
        return next(where(part, t) for part in self.parts if _restarts(part))
