"""What a step makes of the norm of its gradients: clipping, skipping, loss scaling (numerics, section 7).

`Clipping` is what an optimizer is asked for, `Limits` what one step is, and `decide` the arithmetic, which native code
has too (csrc/python/clipping.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sums
from .rules import flag, norm_limit

__all__ = ["Asked", "Clipping", "Decision", "Limits", "clip_of", "decide"]


class Limits(NamedTuple):
    """What one step is asked for.

    Attributes:
        measures: the norm of the gradients is wanted.
        max_norm: of all groups without a limit of their own; infinite: none.
        skip_nonfinite: a norm that is no number skips the step.
        scale: what the loss was multiplied by, as torch.amp.GradScaler has left it; None: by nothing.
        found_inf: not 0 where somebody else has found an infinity or a NaN; None: nobody has looked.
        own: the groups' own limits, NaN where one has none; None: none has.
    """

    measures: bool
    max_norm: float
    skip_nonfinite: bool
    scale: Any
    found_inf: Any
    own: tuple[float, ...] | None

    @property
    def skips(self) -> bool:
        """May the step be skipped?"""
        return self.skip_nonfinite or self.found_inf is not None

    def numbers(self, device: torch.device) -> tuple[float, float]:
        """Scale and infinities as numbers, where a step of tensors on `device` is decided on the host."""
        scale = 1.0 if self.scale is None else _number("grad_scale", self.scale, device)
        if not 0.0 < scale < math.inf:
            raise ValueError(f"grad_scale={scale} of the optimizer: allowed are finite numbers > 0")
        return scale, 0.0 if self.found_inf is None else _number("found_inf", self.found_inf, device)


class Asked(NamedTuple):
    """The same with what a table has for it, as native code reads it.

    Attributes:
        sums: int64 [slots, sums.WORDS], the exact sums of squares; None: none are wanted.
        plans: of the CPU backend, whose gradients are squared.
        group_of: int64 [slots], whose group each of them is.
        grad_scale: where the scalar is in a row that takes the clip of its group in.
        between: called when this process's gradients are added up; adds others'.
    """

    sums: Tensor | None
    plans: list[Any]
    group_of: Tensor
    found: Tensor
    grad_scale: int
    between: Callable[[], object] | None
    max_norm: float
    skip_nonfinite: bool
    scale: float
    found_inf: float
    own: tuple[float, ...] | None


class Decision(NamedTuple):
    """What a step does: with rows scaled by the clips of their groups, and the control pair."""

    norm: float
    skip: bool
    clip: float
    own: list[float]  # of every group, where some have limits of their own


def clip_of(norm: float, max_norm: float) -> float:
    """What scales gradients of that norm down to the largest that is allowed.

    >>> clip_of(4.0, 1.0), clip_of(0.5, 1.0), clip_of(math.inf, math.inf)
    (0.24999993750001562, 1.0, 1.0)
    """
    if max_norm == math.inf:
        return 1.0
    clip = max_norm / (norm + 1e-6)
    return 1.0 if clip > 1.0 else clip


def decide(asked: Asked) -> Decision:
    """The normative arithmetic, in float64."""
    own, words = asked.own or (), asked.sums
    norm, clip, clips = math.nan, 1.0, [1.0] * len(own)
    if words is not None:
        groups = asked.group_of.tolist()

        def norm_of(wanted: list[bool]) -> float:
            return math.sqrt(sums.value(words[wanted].sum(0))) / asked.scale

        norm = norm_of([True] * len(groups))
        limited = norm_of([math.isnan(own[group]) for group in groups]) if own else norm
        clip = clip_of(limited, asked.max_norm)
        for g, limit in enumerate(own):
            clips[g] = clip if math.isnan(limit) else clip_of(norm_of([group == g for group in groups]), limit)
    nonfinite = asked.sums is not None and not math.isfinite(norm)
    return Decision(norm, bool(asked.found_inf) or (asked.skip_nonfinite and nonfinite), clip, clips)


@dataclass
class Clipping:
    """What an optimizer is asked for, and what its last step has found.

    Attributes:
        max_norm, skip_nonfinite: as in `Limits`; None: no norm is asked for.
        last: what the last step was asked for; None: nothing.
    """

    max_norm: float | None = None
    skip_nonfinite: bool = False
    last: Limits | None = None

    @property
    def asked(self) -> bool:
        """Does the optimizer look at gradients by itself?"""
        return self.max_norm is not None or self.skip_nonfinite

    def of_step(self, own: Sequence[float | None], grad_scale: Any, found_inf: Any) -> Limits | None:
        """What a step is to do; None: as if there was nothing of this.

        Args:
            own: the groups' own limits.
            grad_scale, found_inf: what torch.amp.GradScaler has left: None, or tensors of one element.
        """
        limited = own.count(None) != len(own)
        if not limited and not self.asked and grad_scale is None and found_inf is None:
            return None
        limits = tuple(math.nan if limit is None else limit for limit in own) if limited else None
        max_norm = math.inf if self.max_norm is None else self.max_norm
        return Limits(limited or self.asked, max_norm, self.skip_nonfinite, grad_scale, found_inf, limits)

    def set(self, max_norm: Any, skip_nonfinite: Any, where: str) -> None:
        """Takes settings, checked."""
        self.max_norm = norm_limit(max_norm, where)
        self.skip_nonfinite = flag("skip_nonfinite", skip_nonfinite, where)


def _number(name: str, value: Any, device: torch.device) -> float:
    if isinstance(value, Tensor) and value.device.type not in ("cpu", device.type):
        raise ValueError(
            f"{name} of the optimizer is a tensor on {value.device}, and its parameters are on {device}: allowed are "
            "numbers, and tensors of one element there (torch.amp.GradScaler(device) has these)"
        )
    try:
        return torch.tensor(float(value), dtype=torch.float32, device="cpu").item()  # as devices have it
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}={value!r} of the optimizer: expected a number, or a tensor of one element") from None
