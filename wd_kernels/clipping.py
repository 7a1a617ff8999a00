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
from .reference import BLOCK, block_sums
from .rules import flag, norm_limit, scalar

__all__ = ["Asked", "Clipping", "Decision", "Limits", "Window", "clip_of", "decide", "number"]


class Limits(NamedTuple):
    """What one step is asked for.

    Attributes:
        measures: the norm of the gradients is wanted.
        max_norm: of all groups without a limit of their own; infinite: none.
        skip_nonfinite: a norm that is no number skips the step.
        scale: what the loss was multiplied by, as torch.amp.GradScaler has left it; None: by nothing.
        found_inf: not 0 where somebody else has found an infinity or a NaN; None: nobody has looked.
        own: the groups' own limits, NaN where one has none; None: none has.
        sigma: a norm or a loss that many deviations above the mean of the last ones skips the step; infinite: none.
        window: of so many.
        loss: of this step; None: none is given.
    """

    measures: bool
    max_norm: float
    skip_nonfinite: bool
    scale: Any
    found_inf: Any
    own: tuple[float, ...] | None
    sigma: float = math.inf
    window: int = 1
    loss: Any = None

    def numbers(self, device: torch.device) -> tuple[float, float, float]:
        """Scale, infinities and loss (NaN: none) as numbers, where a step of tensors on `device` is decided here."""
        scale = 1.0 if self.scale is None else number("grad_scale", self.scale, device)
        if not 0.0 < scale < math.inf:
            raise ValueError(f"grad_scale={scale} of the optimizer: allowed are finite numbers > 0")
        found_inf = 0.0 if self.found_inf is None else number("found_inf", self.found_inf, device)
        return scale, found_inf, math.nan if self.loss is None else number("latest_loss", self.loss, device)


class Window(NamedTuple):
    """The last norms and losses, of which the next are told whether they are spikes.

    Attributes:
        values: float64 [2, reference.BLOCK], a ring for each of the two.
        seen: int64 [2], how many each has been given.
    """

    values: Tensor
    seen: Tensor

    @classmethod
    def empty(cls) -> Window:
        with torch.inference_mode(False):
            made = torch.zeros(2, BLOCK, dtype=torch.float64, device="cpu")
            return cls(made, torch.zeros(2, dtype=torch.int64, device="cpu"))

    def on(self, device: torch.device) -> Window:
        return Window(self.values.to(device), self.seen.to(device))

    def is_spike(self, which: int, x: float, sigma: float, window: int) -> bool:
        """Is `x` more than `sigma` deviations above the mean of the last `window`? With less than half of them: no."""
        n = min(int(self.seen[which]), window)
        if n < max(2, window // 2):
            return False
        there = torch.arange(BLOCK, device="cpu") < n
        values = self.values[which].to("cpu")
        mean = float(block_sums(torch.where(there, values, 0.0))) / n
        off = torch.where(there, values - mean, 0.0)
        deviation = math.sqrt(float(block_sums(off * off)) / (n - 1))
        return not x - mean <= sigma * deviation

    def spiked(self, norm: float, loss: float | None, sigma: float, window: int) -> bool:
        """Is one of the two a spike? Finite ones are remembered, whatever they are: a new level is none for ever."""
        given = [(which, x) for which, x in enumerate((norm, loss)) if x is not None]
        found = [self.is_spike(which, x, sigma, window) for which, x in given]
        for which, x in given:
            if math.isfinite(x):
                self.values[which, int(self.seen[which]) % window] = x
                self.seen[which] += 1
        return any(found)


class Asked(NamedTuple):
    """The same with what a table has for it, as native code reads it.

    Attributes:
        sums: int64 [slots, sums.WORDS], the exact sums of squares; None: none are wanted.
        plans: of the CPU backend, whose gradients are squared.
        group_of: int64 [slots], whose group each of them is.
        grad_scale: where the scalar is in a row that takes the clip of its group in.
        last: what spikes are told by, if `sigma` is finite.
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
    last: Window
    sigma: float
    window: int
    has_loss: bool
    loss: float


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
    skip = bool(asked.found_inf) or (asked.skip_nonfinite and nonfinite)
    if asked.sigma != math.inf:
        loss = asked.loss if asked.has_loss else None
        skip |= asked.last.spiked(norm, loss, asked.sigma, asked.window)
    return Decision(norm, skip, clip, clips)


@dataclass
class Clipping:
    """What an optimizer is asked for, and what its last step has found.

    Attributes:
        max_norm, skip_nonfinite: as in `Limits`; None: no norm is asked for.
        sigma, window: likewise; None: spikes are not asked for.
        last: what the last step was asked for; None: nothing.
    """

    max_norm: float | None = None
    skip_nonfinite: bool = False
    sigma: float | None = None
    window: int = 128
    last: Limits | None = None

    @property
    def asked(self) -> bool:
        """Does the optimizer look at gradients by itself?"""
        return self.max_norm is not None or self.skips

    @property
    def skips(self) -> bool:
        """May it skip a step by itself?"""
        return self.skip_nonfinite or self.sigma is not None

    def of_step(self, own: Sequence[float | None], grad_scale: Any, found_inf: Any, loss: Any) -> Limits | None:
        """What a step is to do; None: as if there was nothing of this.

        Args:
            own: the groups' own limits.
            grad_scale, found_inf: what torch.amp.GradScaler has left: None, or tensors of one element.
            loss: None, or what spikes are told by beside the norm.
        """
        limited = own.count(None) != len(own)
        if not limited and not self.asked and grad_scale is None and found_inf is None:
            return None
        limits = tuple(math.nan if limit is None else limit for limit in own) if limited else None
        max_norm = math.inf if self.max_norm is None else self.max_norm
        limits_of = Limits(limited or self.asked, max_norm, self.skip_nonfinite, grad_scale, found_inf, limits)
        return limits_of if self.sigma is None else limits_of._replace(sigma=self.sigma, window=self.window, loss=loss)

    def set(
        self, max_grad_norm: Any, skip_nonfinite: Any, skip_spikes: Any, spike_window: Any, where: str
    ) -> None:  # fmt: skip
        """Takes settings, checked."""
        self.max_norm = norm_limit(max_grad_norm, where)
        self.skip_nonfinite = flag("skip_nonfinite", skip_nonfinite, where)
        sigma = None if skip_spikes is None else scalar("skip_spikes", skip_spikes, where)
        if sigma is not None and not 0 < sigma < math.inf:
            raise ValueError(
                f"skip_spikes={skip_spikes!r} in {where}: allowed are None and finite numbers > 0, the deviations "
                "above the mean from which on a norm or a loss is a spike (6 is OLMo's)"
            )
        whole = isinstance(spike_window, int) and not isinstance(spike_window, bool)
        if not whole or not 2 <= spike_window <= BLOCK:
            raise ValueError(f"spike_window={spike_window!r} in {where}: allowed are whole numbers from 2 to {BLOCK}")
        self.sigma, self.window = sigma, spike_window


def number(name: str, value: Any, device: torch.device) -> float:
    """What an optimizer was given, as devices have it; an error names it."""
    if isinstance(value, Tensor) and value.device.type not in ("cpu", device.type):
        raise ValueError(
            f"{name} of the optimizer is a tensor on {value.device}, and its parameters are on {device}: allowed are "
            "numbers, and tensors of one element there (torch.amp.GradScaler(device) has these)"
        )
    try:
        return torch.tensor(float(value), dtype=torch.float32, device="cpu").item()  # as devices have it
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}={value!r} of the optimizer: expected a number, or a tensor of one element") from None
