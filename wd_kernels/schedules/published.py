"""Warm restarts as the authors' published code takes them, to the bit."""

from __future__ import annotations

import math
import threading
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache

from ..opaque import opaque
from .shapes import Schedule, whole

__all__ = ["PublishedRestarts"]


@opaque
@dataclass(frozen=True)
class PublishedRestarts(Schedule):
    r"""Warm restarts as the authors' Lua code has them, to repeat its runs; for new ones take `WarmRestarts`.

    .. math:: \eta = \tfrac12(1 + \cos \pi T_{cur})

    Before each batch :math:`T_{cur} \leftarrow \min(T_{cur} + 1/(T_e n), 1)`, in doubles; it becomes 0, and :math:`T_e`
    grows by `mult`, where it is 1 in the epoch after the period. So the first period runs from :math:`1/n` to 1, whose
    last step does not move, later ones from 0; and a restart comes a batch late wherever the sum of so many fractions
    falls short of 1, which it does for most lengths. `NormalizedDecay` takes :math:`T_e n` steps, as that code does.

    Args:
        epochs: :math:`T_e \ge 1` of the first period.
        batches: :math:`n \ge 1`, steps an epoch.
        mult: by which the periods grow, a whole number >= 1.

    Example:
        >>> schedule = PublishedRestarts(epochs=1, batches=4, mult=2)
        >>> [round(schedule(t), 4) for t in range(8)]
        [0.8536, 0.5, 0.1464, 0.0, 1.0, 0.9619, 0.8536, 0.6913]
        >>> PublishedRestarts(1, 391, 2).where(1173), PublishedRestarts(1, 391, 2).where(1174)  # one late
        ((782, 782), (0, 1564))

    Source: github.com/loshchil/AdamW-and-SGDW, train.lua; Loshchilov & Hutter, ICLR 2019, appendix B.2.
    """

    epochs: int
    batches: int
    mult: int = 1
    steps = None
    restarts = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batches", "mult"):
            value = getattr(self, name)
            self._set(**{name: whole(value, f"{name}={value!r} of PublishedRestarts")})

    def __call__(self, t: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * _run(self.epochs, self.batches, self.mult).until(t).fractions[t]))

    def where(self, t: int) -> tuple[int, int]:
        run = _run(self.epochs, self.batches, self.mult).until(t)
        k = bisect_right(run.firsts, t) - 1
        return t - run.firsts[k], run.lengths[k]


class _Run:
    """What has been run through: T_cur of every step, the first step of every period, its length in steps."""

    def __init__(self, epochs: int, batches: int, mult: int) -> None:
        self.epochs, self.batches, self.mult = epochs, batches, mult
        self.next = 1 + epochs  # the epoch in which it restarts, from 1
        self.fractions = array("d")
        self.firsts, self.lengths = [0], [epochs * batches]
        self._lock = threading.Lock()

    def until(self, t: int) -> _Run:
        """At least until the step that follows `t` completed ones."""
        with self._lock:
            self._go(t)
        return self

    def _go(self, t: int) -> None:
        while len(self.fractions) <= t:
            done = len(self.fractions)
            fraction = min((self.fractions[-1] if done else 0.0) + 1 / (self.epochs * self.batches), 1.0)
            if fraction == 1.0 and done // self.batches + 1 == self.next:
                fraction = 0.0
                self.epochs *= self.mult
                self.next += self.epochs
                self.firsts.append(done)
                self.lengths.append(self.epochs * self.batches)
            self.fractions.append(fraction)


_run = cache(_Run)
