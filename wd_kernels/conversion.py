r"""A weight decay carried from one decay mode to another.

How much a step shrinks a weight to which no gradient comes, with :math:`a = \eta\alpha`:

====================  ==========================================================================  ===========
mode                  factor of a step                                                            family
====================  ==========================================================================  ===========
``lr_scaled``         :math:`1 - \eta\,\alpha\lambda`                                             linear
``independent``       :math:`1 - \eta\,\lambda`                                                   linear
``proximal``          :math:`1/(1 + \eta\,\lambda)`                                               hyperbolic
``metric_proximal``   AdamW: :math:`1/(1 + \eta\,\alpha\lambda/D)`, SGDW: with :math:`D = 1`      hyperbolic
``l2``                SGDW: :math:`1 - \eta\,\alpha\lambda`; AdamW: :math:`1 - \eta\,\alpha\lambda/D`  linear
``l2`` with momentum  the larger root of :math:`z^2 - (1 + \mu - a\lambda)z + \mu`                linear (*)
====================  ==========================================================================  ===========

So each mode is a family and a coefficient :math:`c` with factors :math:`1 - \eta c` or :math:`1/(1 + \eta c)`. Within a
family a conversion is exact in every step of every schedule. Between them it is exact at a constant :math:`\eta`; else
it is made so that the whole run shrinks a weight as much. With (*), and with ``l2`` for AdamW, whose :math:`D =
\sqrt{\hat v} + \epsilon` moves with the gradients and with the decay, it is an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .rules import DECAY_MODES, at_least_zero

__all__ = ["Conversion", "convert_weight_decay"]

WHERE = "convert_weight_decay"


class Conversion(NamedTuple):
    """A converted weight decay.

    Attributes:
        weight_decay: for the target mode.
        exact: whether every step decays as in the source mode.
        deviation: the largest relative difference, over the steps, of what a step takes off a weight. 0 where exact.
            Where `l2` is approximated it is that of the approximation, not its error.
    """

    weight_decay: float
    exact: bool
    deviation: float


def convert_weight_decay(
    weight_decay: float,
    source: str,
    target: str,
    *,
    lr: float,
    rule: str = "adamw",
    schedule: Callable[[int], float] | None = None,
    steps: int = 1,
    momentum: float = 0.0,
    metric: float | None = None,
) -> Conversion:
    r"""The weight decay with which `target` decays as `source` does with `weight_decay`.

    The schedule is one of :math:`\eta` (``schedule=``, also ``"from_lr"``). Under an LR scheduler without
    ``"from_lr"``, :math:`\eta` stays 1, and ``"independent"`` and ``"proximal"`` do not follow it.

    Args:
        weight_decay: :math:`\lambda \ge 0` in the source mode.
        source, target: decay modes.
        lr: :math:`\alpha > 0`.
        rule: "adamw" or "sgdw".
        schedule: :math:`\eta` by the number of completed steps; None: 1.
        steps: how many steps of the schedule the run has.
        momentum: :math:`\mu` of SGDW, for ``"l2"`` (torch's form, without dampening).
        metric: a typical :math:`D = \sqrt{\hat v} + \epsilon > 0`, which AdamW's ``"l2"`` and ``"metric_proximal"``
            need: what they take off a weight depends on its gradients. The conversion is for weights with that D.

    Returns:
        A :class:`Conversion`: (weight_decay, exact, deviation).

    Raises:
        TypeError, ValueError: naming the argument; or a decay so strong that a step would turn a weight's sign.

    Example:
        >>> convert_weight_decay(0.1, "lr_scaled", "independent", lr=1e-3)  # torch's AdamW to the paper's
        Conversion(weight_decay=0.0001, exact=True, deviation=0.0)
        >>> found = convert_weight_decay(0.5, "independent", "proximal", lr=1e-3)
        >>> found.weight_decay, found.exact  # 1 / (1 + 1) = 1 - 0.5
        (1.0, True)

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Proposition 1 (SGD) and
    Proposition 2 (why AdamW's `l2` is only approximated); Zhuang et al., TMLR 2022, section 3 (proximal).
    """
    decay = at_least_zero("weight_decay", weight_decay, WHERE)
    alpha, mu = at_least_zero("lr", lr, WHERE), at_least_zero("momentum", momentum, WHERE)
    if alpha == 0:
        raise ValueError(f"lr={lr} in {WHERE}: allowed are finite numbers > 0; with lr 0 nothing moves")
    for name, mode in (("source", source), ("target", target)):
        if mode not in DECAY_MODES:
            raise ValueError(f"{name}={mode!r} in {WHERE}: allowed are {', '.join(map(repr, DECAY_MODES))}")
    if rule not in ("adamw", "sgdw"):
        raise ValueError(f"rule={rule!r} in {WHERE}: allowed are 'adamw' and 'sgdw'")
    if mu and (rule == "adamw" or mu >= 1):
        raise ValueError(
            f"momentum={momentum} with rule={rule!r} in {WHERE}: allowed are 0 <= momentum < 1, for 'sgdw'"
        )
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps={steps!r} in {WHERE}: allowed are whole numbers >= 1")
    scale = {mode: _coefficient(mode, rule, alpha, metric) for mode in {source, target}}
    etas = [1.0] if schedule is None else [at_least_zero(f"schedule({t})", schedule(t), WHERE) for t in range(steps)]
    etas = [eta for eta in etas if eta]
    if not etas:
        raise ValueError(f"schedule={schedule!r} in {WHERE} is 0 in all of {steps} steps: nothing decays")
    if source == target or decay == 0:
        return Conversion(decay, True, 0.0)

    before = _shrinkage(source, decay * scale[source], etas, mu)
    c = decay * scale[source]
    same_family, constant = _hyperbolic(source) == _hyperbolic(target), min(etas) == max(etas)
    heavy = mu > 0 and "l2" in (source, target)
    if heavy or not (same_family or constant):
        c = _solve(target, sum(map(math.log, before)), etas, mu)
    elif not same_family:
        c = c / (1.0 - etas[0] * c) if _hyperbolic(target) else c / (1.0 + etas[0] * c)
    after = _shrinkage(target, c, etas, mu)
    deviation = max(abs((1 - new) / (1 - old) - 1) for new, old in zip(after, before, strict=True))
    approximate = heavy or (rule == "adamw" and "l2" in (source, target))
    exact = not approximate and (same_family or constant)
    return Conversion(c / scale[target], exact, 0.0 if exact else deviation)


def _hyperbolic(mode: str) -> bool:
    return mode in ("proximal", "metric_proximal")


def _coefficient(mode: str, rule: str, alpha: float, metric: float | None) -> float:
    """c / lambda."""
    if mode in ("independent", "proximal"):
        return 1.0
    if rule == "sgdw" or mode == "lr_scaled":
        return alpha
    if metric is None:
        raise ValueError(
            f"metric=None in {WHERE}: AdamW's {mode!r} decays each weight by its own gradients; give a typical "
            "sqrt(v) + eps, the bias-corrected one, for which to convert"
        )
    given = at_least_zero("metric", metric, WHERE)
    if given == 0:
        raise ValueError(f"metric={metric} in {WHERE}: allowed are finite numbers > 0")
    return alpha / given


def _shrinkage(mode: str, c: float, etas: Sequence[float], momentum: float) -> list[float]:
    """The factor of every step."""
    if _hyperbolic(mode):
        return [1.0 / (1.0 + eta * c) for eta in etas]
    heavy = mode == "l2" and momentum > 0
    found = [_root(eta * c, momentum) if heavy else 1.0 - eta * c for eta in etas]
    if not min(found) > 0:
        raise ValueError(
            f"the decay of {mode!r} in {WHERE} takes {max(etas) * c:.3g} of a weight in one step: only decays that "
            "leave its sign can be converted"
        )
    return found


def _root(x: float, momentum: float) -> float:
    """The slower of the two rates at which momentum with decay x = a * lambda forgets; NaN where it oscillates."""
    half = (1.0 + momentum - x) / 2
    square = half * half - momentum
    return half + math.sqrt(square) if square >= 0 else math.nan


def _solve(mode: str, wanted: float, etas: Sequence[float], momentum: float) -> float:
    """The c at which the logarithms of the factors sum to `wanted`, by bisection: the sum falls with c."""

    def total(c: float) -> float:
        try:
            return sum(map(math.log, _shrinkage(mode, c, etas, momentum)))
        except ValueError:
            return -math.inf

    low, high = 0.0, 1.0
    while total(high) > wanted:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if total(middle) > wanted else (low, middle)
    return high if total(high) > -math.inf else low
