"""Schedules made of schedules: one after another, multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .shapes import Schedule, named, where

__all__ = ["Product", "Sequential"]


def _parts(owner: object, parts: tuple[Any, ...]) -> None:
    if not parts:
        raise ValueError(f"{type(owner).__name__}() has no parts: give it one or more schedules")
    for k, part in enumerate(parts):
        if not callable(part) or isinstance(part, type):
            found = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
            raise TypeError(f"part {k} of {type(owner).__name__} is {found}: expected a schedule or a callable")
        if hasattr(part, "decay_factor"):
            raise ValueError(
                f"part {k} of {type(owner).__name__} is {part!r}, whose weight decay would be lost: allowed is "
                f"NormalizedDecay({type(owner).__name__}(...)), the other way round"
            )


@dataclass(frozen=True, init=False, repr=False)
class _Composed(Schedule):
    parts: tuple[Callable[[int], float], ...]

    def __init__(self, *parts: Callable[[int], float]) -> None:
        _parts(self, parts)
        object.__setattr__(self, "parts", parts)

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

    def __init__(self, *parts: Callable[[int], float]) -> None:
        super().__init__(*parts)
        for k, part in enumerate(parts[:-1]):
            if getattr(part, "steps", None) is None:
                raise ValueError(f"part {k} of Sequential, {part!r}, has no end: what follows it would never come")

    @property
    def _lead(self) -> int:
        return sum(part.steps for part in self.parts[:-1])  # type: ignore[attr-defined]

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        last: int | None = getattr(self.parts[-1], "steps", None)
        return None if last is None else self._lead + last

    @property
    def restarts(self) -> bool:  # type: ignore[override]
        return getattr(self.parts[-1], "restarts", False)

    def __call__(self, t: int) -> float:
        for part in self.parts[:-1]:
            if t < part.steps:  # type: ignore[attr-defined]
                return part(t)
            t -= part.steps  # type: ignore[attr-defined]
        return self.parts[-1](t)

    def where(self, t: int) -> tuple[int, int]:
        if not self.restarts:
            return super().where(t)
        own = max(t - self._lead, 0)
        done, length = where(self.parts[-1], own)
        return (done, length) if done < own else (t, self._lead + length)


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
        if sum(getattr(part, "restarts", False) for part in parts) > 1:
            raise ValueError(f"{self!r} has several parts that restart: allowed is one")

    @property
    def restarts(self) -> bool:  # type: ignore[override]
        return any(getattr(part, "restarts", False) for part in self.parts)

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        ends = [end for part in self.parts if (end := getattr(part, "steps", None)) is not None]
        return None if self.restarts or not ends else max(ends)

    def __call__(self, t: int) -> float:
        return math.prod(part(t) for part in self.parts)

    def where(self, t: int) -> tuple[int, int]:
        for part in self.parts:
            if getattr(part, "restarts", False):
                return where(part, t)
        return super().where(t)
