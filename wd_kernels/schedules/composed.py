"""Schedules made of schedules: one after another, multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .shapes import Schedule, where

__all__ = ["Product", "Sequential"]


def _parts(owner: object, parts: tuple[Any, ...]) -> None:
    if not parts:
        raise ValueError(f"{type(owner).__name__}() has no parts: give it one or more schedules")
    for k, part in enumerate(parts):
        if not callable(part):
            raise TypeError(f"part {k} of {type(owner).__name__} is {part!r}: expected a schedule or a callable")
        if hasattr(part, "decay_factor"):
            raise ValueError(
                f"part {k} of {type(owner).__name__} is {part!r}, whose weight decay would be lost: allowed is "
                f"NormalizedDecay({type(owner).__name__}(...)), the other way round"
            )


@dataclass(frozen=True, init=False)
class Sequential(Schedule):
    r"""One schedule after another, each counting from its own first step.

    It restarts where its last part restarts. The parts before, a warm-up say, belong to the first period of the last.

    Args:
        parts: schedules or callables; all but the last have an end.

    Example:
        >>> from wd_kernels.schedules import Cosine, Warmup
        >>> [Sequential(Warmup(2), Cosine(2))(t) for t in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    parts: tuple[Callable[[int], float], ...]

    def __init__(self, *parts: Callable[[int], float]) -> None:
        _parts(self, parts)
        object.__setattr__(self, "parts", parts)
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

    def __call__(self, t: int) -> float:
        for part in self.parts[:-1]:
            if t < part.steps:  # type: ignore[attr-defined]
                return part(t)
            t -= part.steps  # type: ignore[attr-defined]
        return self.parts[-1](t)

    def where(self, t: int) -> tuple[int, int]:
        if self.steps is not None:
            return super().where(t)
        lead = self._lead
        done, length = where(self.parts[-1], max(t - lead, 0))
        restarted = done < t - lead
        return (done, length) if restarted else (t, lead + length)


@dataclass(frozen=True, init=False)
class Product(Schedule):
    r"""Schedules multiplied: a warm-up on top of warm restarts, say. Its length and restarts are those of the first.

    Args:
        parts: schedules or callables.

    Example:
        >>> from wd_kernels.schedules import StepDrop, Warmup
        >>> [Product(StepDrop((2,), 0.5), Warmup(4))(t) for t in range(4)]
        [0.25, 0.5, 0.375, 0.5]
    """

    parts: tuple[Callable[[int], float], ...]

    def __init__(self, *parts: Callable[[int], float]) -> None:
        _parts(self, parts)
        object.__setattr__(self, "parts", parts)

    @property
    def steps(self) -> int | None:  # type: ignore[override]
        return getattr(self.parts[0], "steps", None)

    def __call__(self, t: int) -> float:
        return math.prod(part(t) for part in self.parts)

    def where(self, t: int) -> tuple[int, int]:
        return where(self.parts[0], t)
