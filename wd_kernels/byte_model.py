"""Bytes of a step: what each role keeps in memory, and what a pass reads and writes of it.

A parameter and its states are read and written, a gradient is read. Dividing by the time of a step gives a rate that
can be held against the machine's memory, and that is comparable between optimizers of different formats. Scalars (step
counts, rows, what says where tensors lie) are left out: a few hundred bytes a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .epilogues import STATISTICS
from .formats import SCALE, arithmetic_dtype, has_scales, tiles
from .layout import Place
from .reference import BLOCK
from .rules import EMA, REFERENCE

__all__ = ["Moved", "Stored", "stored_as"]


class Moved(NamedTuple):
    """Bytes of one role: that stay in memory, and that a step reads and writes."""

    kept: float
    read: float
    written: float


@dataclass(frozen=True)
class Stored:
    """How the elements of a parameter lie in memory, and what a step is asked for beside the rule.

    Attributes:
        param, grad: the dtypes of parameter and gradient.
        states: those of the rule's states.
        master: that of what lies beside a 16-bit parameter: float32 (a master, of which the parameter is a copy that is
            written and never read), int16 or int8 (the bits that it lacks of one).
        average: that of the average of the weights, where one is kept.
        reference: that of what weights decay to, where it is a tensor.
        clips: is the norm of the gradients measured?
        accumulated: how many gradients `accumulate()` adds up for a step; 0: the step takes `p.grad`.
        statistics, marks: is the step watched?

    Example:
        >>> import torch
        >>> Stored(torch.float32, torch.float32, (torch.float32, torch.float32)).per_element()
        Moved(kept=16.0, read=16.0, written=12.0)
    """

    param: torch.dtype
    grad: torch.dtype
    states: tuple[torch.dtype, ...]
    master: torch.dtype | None = None
    average: torch.dtype | None = None
    reference: torch.dtype | None = None
    clips: bool = False
    accumulated: int = 0
    statistics: bool = False
    marks: bool = False

    def roles(self, numel: int) -> dict[str, Moved]:
        """Of one parameter of so many elements, by role."""

        def all_of(*dtypes: torch.dtype) -> int:
            scales = sum(map(has_scales, dtypes)) * tiles(numel) * SCALE.dtype.itemsize
            return numel * sum(dtype.itemsize for dtype in dtypes) + scales

        theta, grad = all_of(self.param), all_of(self.grad)
        # Sums of gradients have the squares of what they sum, so their norm takes no pass of its own.
        passes = self.accumulated or 1 + self.clips
        found = {
            "weights": Moved(theta, 0 if self.master == torch.float32 else theta, theta),
            "gradients": Moved(grad, passes * grad, 0),
        }

        def both_ways(role: str, size: float) -> None:
            found[role] = Moved(size, size, size)

        if self.accumulated:  # the first gradient of a sum is written, not added; the step reads the sum
            size = all_of(arithmetic_dtype(self.param))
            found["accumulators"] = Moved(size, self.accumulated * size, self.accumulated * size)
        if self.states:
            both_ways("states", all_of(*self.states))
        if self.master is not None:
            both_ways("masters", numel * self.master.itemsize)
        if self.average is not None:
            both_ways("average", all_of(self.average))
        if self.reference is not None:
            size = all_of(self.reference)
            found["decay reference"] = Moved(size, size, 0)
        if self.marks:  # a bit for each element, in words; at most, since words in which nothing changes may stay
            both_ways("marks", -(-numel // Place.MARKED) * Place.MARKED / 8)
        if self.statistics:
            numbers = len(STATISTICS.numbers) * arithmetic_dtype(self.param).itemsize
            size = -(-numel // BLOCK) * numbers
            found["statistics"] = Moved(size, 0, size)
        return found

    def whole(self, numels: Iterable[int]) -> dict[str, Moved]:
        """Of parameters of so many elements each, by role."""
        found: dict[str, Moved] = {}
        for numel in numels:
            for role, moved in self.roles(numel).items():
                found[role] = Moved(*map(sum, zip(found.get(role, Moved(0, 0, 0)), moved, strict=True)))
        return found

    def per_element(self) -> Moved:
        """Of one element of a long parameter, of all roles."""
        return Moved(*(sum(column) / BLOCK for column in zip(*self.roles(BLOCK).values(), strict=True)))

    @property
    def step_bytes(self) -> float:
        """That a step moves of one element of a long parameter.

        Example:
            >>> import torch
            >>> Stored(torch.bfloat16, torch.bfloat16, (torch.int8, torch.uint8)).step_bytes
            10.125
        """
        _, read, written = self.per_element()
        return read + written


def stored_as(optimizer: Any, grad: torch.dtype | None = None, **more: Any) -> Stored:
    """What the first parameter of an optimizer of this package is stored as; `more` is what Stored has beside that.

    Args:
        optimizer: one of :class:`wd_kernels.AdamW`, :class:`~wd_kernels.SGDW`, :class:`~wd_kernels.AdagradW`.
        grad: the dtype of gradients; by default the parameter's.

    Raises TypeError or ValueError, where a hyperparameter is not allowed.
    """
    group = optimizer.param_groups[0]
    dtype = group["params"][0].dtype
    ((settings, *_),) = optimizer.rule.hypers([group], default=optimizer.defaults["decay"])
    kept = {state: settings.storage.state_dtype(state, dtype) for state in settings.states}
    average, reference = kept.pop(EMA, None), kept.pop(REFERENCE, None)
    master = settings.storage.master_dtype(dtype)
    return Stored(dtype, grad or dtype, tuple(kept.values()), master, average, reference, **more)
