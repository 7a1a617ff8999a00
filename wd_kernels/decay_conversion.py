r"""A weight decay carried from one decay mode to another.

What part of a weight to which no gradient comes a step takes off:

====================  =========================================================================  ==========
mode                  a step takes off                                                           family
====================  =========================================================================  ==========
``lr_scaled``         :math:`x = \eta\,\alpha\lambda`                                            linear
``independent``       :math:`x = \eta\,\lambda`                                                  linear
``corrected``         :math:`x = \eta^2\alpha\lambda`                                             squared
``l2``                :math:`x = \eta\,\alpha\lambda`; AdamW: over :math:`D`                     linear
``l2`` with momentum  the lesser root of :math:`p^2 - (1 - \mu + x)p + x`                        linear (*)
``proximal``          :math:`x/(1 + x)`, :math:`x = \eta\,\lambda`                               hyperbolic
``metric_proximal``   :math:`x/(1 + x)`, :math:`x = \eta\,\alpha\lambda`; AdamW: over :math:`D`  hyperbolic
====================  =========================================================================  ==========

So each mode is a family and a coefficient :math:`c`, with :math:`x = \eta c`; of a squared one :math:`x = \eta^2 c`.
Within a family a conversion is exact in
every step of every schedule. Between them it is exact at a constant :math:`\eta`; else it is made so that the whole run
shrinks a weight as much. With (*), and with ``l2`` for AdamW, whose :math:`D = \sqrt{\hat v} + \epsilon` moves with the
gradients and with the decay, it is an approximation. AdagradW is as AdamW, with :math:`D = \sqrt s + \epsilon` and the
lr as its ``lr_decay`` has left it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .rules import DECAY_MODES, RULES, DecayMode, Rule, at_least_zero
from .schedules.shapes import whole

__all__ = ["Conversion", "convert_weight_decay", "multipliers"]

WHERE = "convert_weight_decay"


class Conversion(NamedTuple):
    r"""A converted weight decay.

    Attributes:
        weight_decay: for the target mode.
        exact: whether every step takes as much off a weight to which no gradient comes. (The hyperbolic modes divide
            the whole step, by :math:`1 + \eta c`: between a linear and a hyperbolic mode, what a gradient moves
            differs by that, 20% at :math:`\eta c = 0.2`, also where `exact` is True.)
        deviation: the largest relative difference, over the steps, of what a step takes off a weight. 0 where exact.
            Where `l2` is approximated it is that of the approximation, not its error.
    """

    weight_decay: float
    exact: bool
    deviation: float


def convert_weight_decay(
    weight_decay: float,
    source: DecayMode,
    target: DecayMode,
    *,
    lr: float,
    rule: str = "adamw",
    schedule: Callable[[int], float] | None = None,
    steps: int | None = None,
    momentum: float = 0.0,
    metric: float | None = None,
) -> Conversion:
    r"""The weight decay with which `target` decays as `source` does with `weight_decay`.

    The schedule is that of :math:`\eta`, also of what ``"from_lr"`` makes of an LR scheduler. Under an LR scheduler
    without ``"from_lr"``, :math:`\eta` stays 1: ``"independent"`` and ``"proximal"`` do not follow it, and
    ``"corrected"`` is ``"lr_scaled"``.

    Args:
        weight_decay: :math:`\lambda \ge 0` in the source mode.
        source, target: decay modes.
        lr: :math:`\alpha > 0`.
        rule: "adamw", "sgdw" or "adagradw".
        schedule: :math:`\eta` by the number of completed steps; None: 1. With `NormalizedDecay` both weight decays are
            :math:`\lambda_{norm}`.
        steps: how many steps of the schedule the run has; None: all that it has.
        momentum: :math:`\mu` of SGDW, for ``"l2"`` (torch's form, without dampening).
        metric: a typical :math:`D > 0`, :math:`\sqrt{\hat v} + \epsilon` of AdamW, :math:`\sqrt{s} + \epsilon` of
            AdagradW, whose ``"l2"`` and ``"metric_proximal"`` need it: what they take off a weight depends on its
            gradients. The conversion is for weights with that D.

    Returns:
        A :class:`Conversion`: (weight_decay, exact, deviation).

    Raises:
        TypeError, ValueError: naming the argument; or a decay that turns a weight's sign, or that the target cannot
            reach.

    Example:
        >>> convert_weight_decay(0.1, "lr_scaled", "independent", lr=1e-3)  # torch's AdamW to the paper's
        Conversion(weight_decay=0.0001, exact=True, deviation=0.0)
        >>> found = convert_weight_decay(0.5, "independent", "proximal", lr=1e-3)
        >>> found.weight_decay, found.exact  # 1 / (1 + 1) = 1 - 0.5
        (1.0, True)

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Proposition 1 (SGD) and
    Proposition 2 (why AdamW's `l2` is only approximated); Zhuang et al., TMLR 2022, section 3 (proximal); Defazio,
    "Why Gradients Rapidly Increase Near the End of Training", 2025 (corrected).
    """
    decay = at_least_zero("weight_decay", weight_decay, WHERE)
    alpha, mu = at_least_zero("lr", lr, WHERE), at_least_zero("momentum", momentum, WHERE)
    if alpha == 0:
        raise ValueError(f"lr={lr} in {WHERE}: allowed are finite numbers > 0; with lr 0 nothing moves")
    for name, mode in (("source", source), ("target", target)):
        if mode not in DECAY_MODES:
            raise ValueError(f"{name}={mode!r} in {WHERE}: allowed are {', '.join(map(repr, DECAY_MODES))}")
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} in {WHERE}: allowed are {' and '.join(map(repr, RULES))}")
    own = RULES[rule]
    with_momentum = [name for name, other in RULES.items() if "momentum" in other.keys]
    if mu and (rule not in with_momentum or mu >= 1):
        raise ValueError(
            f"momentum={momentum} with rule={rule!r} in {WHERE}: allowed are 0 <= momentum < 1, for "
            f"{' and '.join(map(repr, with_momentum))}"
        )
    each = [multipliers(schedule, steps, WHERE, mode) for mode in (source, target)]
    pairs = [pair for pair in zip(*each, strict=True) if all(pair)]
    if source == target or decay == 0:
        return Conversion(decay, True, 0.0)

    scales = [_scale(mode, own, alpha, metric) for mode in (source, target)]
    c = decay * scales[0]
    before = [_taken(source, own * c, mu) for own, _ in pairs]
    etas = [other for _, other in pairs]
    constant = all(min(own) == max(own) for own in zip(*pairs, strict=True))
    if constant:
        c *= pairs[0][0] / pairs[0][1]  # of the target's multiplier, where they are not the same
    same_family = _family(source) == _family(target)
    heavy = mu > 0 and "l2" in (source, target)
    if heavy or not (same_family or constant):
        c = _solve(target, -sum(math.log1p(-taken) for taken in before), etas, mu)
    elif _hyperbolic(source) != _hyperbolic(target):
        c = c / (1.0 - etas[0] * c) if _hyperbolic(target) else c / (1.0 + etas[0] * c)
    if not math.isfinite(c / scales[1]):
        raise ValueError(f"lr={lr} in {WHERE}: no finite weight decay of {target!r} decays as much")
    if (same_family or constant) and not heavy and not (own.metric and "l2" in (source, target)):
        return Conversion(c / scales[1], True, 0.0)
    after = [_taken(target, eta * c, mu) for eta in etas]
    deviation = max(abs(new / old - 1) for new, old in zip(after, before, strict=True) if old)
    return Conversion(c / scales[1], False, deviation)


def multipliers(
    schedule: Callable[[int], float] | None, steps: int | None, where: str, mode: str = "lr_scaled"
) -> list[float]:
    """What multiplies the coefficient of a mode's decay in each step; without a schedule, in one step for all."""
    count = None if steps is None else whole(steps, f"steps={steps!r} in {where}")
    if schedule is None:
        return [1.0]
    if not callable(schedule) or isinstance(schedule, type):
        raise TypeError(
            f'schedule={schedule!r} in {where}: expected a schedule or a callable; what "from_lr" follows is '
            "lambda t: lr(t) / base_lr"
        )
    count = getattr(schedule, "steps", None) if count is None else count
    if count is None:
        raise ValueError(f"steps=None in {where}: {schedule!r} has no end, so say how many steps the run has")
    factor = getattr(schedule, "decay_factor", lambda t: 1.0)
    etas = [
        at_least_zero(f"schedule({t})", schedule(t), where) ** (2 if mode == "corrected" else 1)
        * at_least_zero(f"schedule.decay_factor({t})", factor(t), where)
        for t in range(count)
    ]
    if not any(etas):
        raise ValueError(f"schedule={schedule!r} in {where} is 0 in all of {count} steps: nothing decays")
    return etas


def _hyperbolic(mode: str) -> bool:
    return mode in ("proximal", "metric_proximal")


def _family(mode: str) -> str:
    return "hyperbolic" if _hyperbolic(mode) else "squared" if mode == "corrected" else "linear"


def _scale(mode: str, rule: Rule, alpha: float, metric: float | None) -> float:
    """c / lambda."""
    if mode in ("independent", "proximal"):
        return 1.0
    if not rule.metric or mode in ("lr_scaled", "corrected"):
        return alpha
    if metric is None:
        raise ValueError(
            f"metric=None in {WHERE}: {rule.title}'s {mode!r} decays each weight by its own gradients; give a typical "
            f"{rule.metric}, for which to convert"
        )
    given = at_least_zero("metric", metric, WHERE)
    if given == 0:
        raise ValueError(f"metric={metric} in {WHERE}: allowed are finite numbers > 0")
    return alpha / given


def _taken(mode: str, x: float, momentum: float) -> float:
    """The part of a weight that a step takes off, in forms that lose no small x."""
    if _hyperbolic(mode):
        return x / (1.0 + x)
    if mode == "l2" and momentum:
        b = 1.0 - momentum + x
        if b * b < 4 * x or x >= 1.0:
            raise ValueError(
                f"the decay of 'l2' in {WHERE} takes {x:.3g} of a weight into the buffer of a momentum of {momentum}: "
                "weights would swing through 0, at no rate that could be converted"
            )
        return 2 * x / (b + math.sqrt(b * b - 4 * x))
    if x >= 1.0:
        raise ValueError(
            f"the decay of {mode!r} in {WHERE} takes {x:.3g} of a weight in one step: only decays that leave its sign "
            "can be converted"
        )
    return x


def _solve(mode: str, wanted: float, etas: Sequence[float], momentum: float) -> float:
    """The c with which all steps together shrink a weight by exp(-wanted); by bisection, as it rises with c."""

    def total(c: float) -> float:
        try:
            return -sum(math.log1p(-_taken(mode, eta * c, momentum)) for eta in etas)
        except ValueError:
            return math.inf

    low, high = 0.0, 1.0
    while total(high) < wanted:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if total(middle) < wanted else (low, middle)
    if total(low) < wanted * (1 - 1e-9) and total(high) == math.inf:
        raise ValueError(
            f"no 'l2' with momentum {momentum} in {WHERE} decays as much: in one step it takes at most "
            f"{1 - math.sqrt(momentum):.3g} of a weight before it swings through 0"
        )
    return low
