r"""A weight decay from a time scale, and from one training to another.

A step takes a share of every weight off and puts an update in its place, so weights are an average of the last updates,
and the share is one over the time scale of that average, in steps:

===============  ===============================================================  ==============
mode             a step's share :math:`1/\tau`                                    needs the lr
===============  ===============================================================  ==============
``lr_scaled``    :math:`x = \bar\eta\,\alpha\lambda`                              yes
``independent``  :math:`x = \bar\eta\,\lambda`                                    no
``proximal``     :math:`x/(1 + x)`, :math:`x = \bar\eta\,\lambda`                 no
===============  ===============================================================  ==============

:math:`\bar\eta` is the mean multiplier of the schedule. All of it holds for any rule, since the decay of these modes
does not pass through it. What ``l2`` takes off does, and in AdamW and AdagradW so does what ``metric_proximal`` takes
off: there, each weight has a time scale of its own, which its gradients make. For SGDW they can be had by
`convert_weight_decay`.

Source: Wang & Aitchison, "How to set AdamW's weight decay as you scale model and dataset size", ICML 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

from .decay_conversion import multipliers
from .rules import DECAY_MODES, DecayMode, at_least_zero

__all__ = ["ScalingLaw", "scaled_weight_decay", "timescale_of", "weight_decay_for"]

ScalingLaw: TypeAlias = Literal["timescale", "normalized", "per_step"]

MODES = ("lr_scaled", "independent", "proximal", "corrected")
WITH_LR = ("lr_scaled", "corrected")
#: What a law makes of a step's share: powers of (batch size / training samples) and of the number of epochs.
LAWS: dict[str, tuple[float, float]] = {"timescale": (1.0, 0.0), "normalized": (0.5, -0.5), "per_step": (0.0, 0.0)}


def weight_decay_for(
    *,
    timescale: float,
    decay: DecayMode = "lr_scaled",
    lr: float | None = None,
    steps_per_epoch: float = 1.0,
    schedule: Callable[[int], float] | None = None,
    steps: int | None = None,
) -> float:
    r"""The weight decay with which weights average their updates over a time scale.

    .. math:: \lambda = \frac{1}{\bar\eta\,\alpha\,\tau}\;(\text{lr\_scaled}),\qquad
       \frac{1}{\bar\eta\,\tau}\;(\text{independent}),\qquad \frac{1}{\bar\eta\,(\tau - 1)}\;(\text{proximal})

    (corrected: as lr_scaled, with the mean of :math:`\eta^2` for :math:`\bar\eta`)
    with :math:`\tau` in steps, `timescale` times `steps_per_epoch`. A weight to which no update comes is at
    :math:`1/e` of itself after :math:`\tau` steps, nearly: at :math:`(1 - 1/\tau)^\tau`, if :math:`\eta` is constant.

    Args:
        timescale: :math:`\tau`, in epochs if `steps_per_epoch` is given, else in steps. The authors look for it between
            one epoch and all that there are.
        decay: "lr_scaled", "independent", "proximal" or "corrected".
        lr: :math:`\alpha > 0`; "lr_scaled" and "corrected" need it.
        steps_per_epoch: training samples by batch size, which need not be whole.
        schedule: :math:`\eta` by the number of completed steps, over whose mean :math:`\tau` is meant; with
            `NormalizedDecay` the weight decay is :math:`\lambda_{norm}`. None: :math:`\tau` is meant at
            :math:`\eta = 1`, which is what papers mean that quote an lr and a weight decay.
        steps: how many steps of the schedule the run has; None: all that it has.

    Raises:
        TypeError, ValueError: naming the argument; a mode that has no time scale; a step that would take all of a
            weight, or more.

    Example:
        >>> weight_decay_for(timescale=10_000, lr=1e-3)  # torch's AdamW
        0.1
        >>> weight_decay_for(timescale=8, steps_per_epoch=50_000 / 400, decay="independent")  # eight epochs
        0.001
        >>> from wd_kernels.schedules import Cosine
        >>> round(weight_decay_for(timescale=8, steps_per_epoch=125, decay="independent", schedule=Cosine(10_000)), 6)
        0.002

    Source: Wang & Aitchison, "How to set AdamW's weight decay as you scale model and dataset size", ICML 2025
    (``lr_scaled``); the other modes by the same share of a weight in a step.
    """
    where = "weight_decay_for"
    lr_factor, etas = _lr_factor(decay, lr, where), multipliers(schedule, steps, where, decay)
    tau = _positive("timescale", timescale, where) * _positive("steps_per_epoch", steps_per_epoch, where)
    mean = sum(etas) / len(etas)
    if tau <= 1 or (decay != "proximal" and max(etas) >= mean * tau):
        raise ValueError(
            f"timescale={timescale} in {where} is {tau:.3g} steps: with {decay!r} a step would take all of a weight, "
            "or more; allowed are longer ones"
        )
    return 1.0 / (mean * lr_factor * (tau - 1.0 if decay == "proximal" else tau))


def timescale_of(
    *,
    weight_decay: float,
    decay: DecayMode = "lr_scaled",
    lr: float | None = None,
    steps_per_epoch: float = 1.0,
    schedule: Callable[[int], float] | None = None,
    steps: int | None = None,
) -> float:
    r"""The time scale that a weight decay gives: the inverse of `weight_decay_for`.

    .. math:: \tau = \frac{1}{\bar\eta\,\alpha\lambda}\;(\text{lr\_scaled}),\qquad
       \frac{1}{\bar\eta\,\lambda}\;(\text{independent}),\qquad \frac{1}{\bar\eta\,\lambda} + 1\;(\text{proximal})

    Args:
        weight_decay: :math:`\lambda \ge 0`; 0 has the time scale `math.inf`.
        decay, lr, steps_per_epoch, schedule, steps: as of `weight_decay_for`.

    Returns:
        :math:`\tau` in epochs if `steps_per_epoch` is given, else in steps.

    Raises:
        TypeError, ValueError: naming the argument; a mode that has no time scale.

    Example:
        >>> timescale_of(weight_decay=0.1, lr=1e-3)
        10000.0
        >>> timescale_of(weight_decay=0.1, lr=1e-3, steps_per_epoch=500)  # epochs
        20.0

    Source: Wang & Aitchison, "How to set AdamW's weight decay as you scale model and dataset size", ICML 2025.
    """
    where = "timescale_of"
    lr_factor, etas = _lr_factor(decay, lr, where), multipliers(schedule, steps, where, decay)
    per_epoch = _positive("steps_per_epoch", steps_per_epoch, where)
    x = at_least_zero("weight_decay", weight_decay, where) * lr_factor * sum(etas) / len(etas)
    return (1.0 / x + (decay == "proximal")) / per_epoch if x else math.inf


def scaled_weight_decay(
    weight_decay: float,
    *,
    law: ScalingLaw,
    decay: DecayMode = "lr_scaled",
    lr: float = 1.0,
    batch_size: float = 1.0,
    dataset_size: float = 1.0,
    epochs: float = 1.0,
) -> float:
    r"""A weight decay that was tuned in one training, for another one.

    Everything that changes is given as a ratio, new by old. A law says what becomes of the share :math:`s` of a weight
    that a step takes off; the mode, what weight decay that is (of ``lr_scaled`` :math:`s/\alpha`: so it is divided by
    the ratio of the lr):

    ================  ==============================================  ================================================
    law               :math:`s` becomes                               what stays as it was
    ================  ==============================================  ================================================
    ``"timescale"``   :math:`s\,\frac{b}{B}`                          the time scale in epochs
    ``"normalized"``  :math:`s\,\sqrt{\frac{b}{B\,T}}`                the normalised weight decay
    ``"per_step"``    :math:`s`                                       the time scale in steps; the independent
                                                                      :math:`\lambda` of muP
    ================  ==============================================  ================================================

    with the ratios :math:`b` of the batch size, :math:`B` of the training set, :math:`T` of the epochs. A model's width
    is in none of them. Under muP it comes in by Adam's lr, which falls as 1/width in layers whose inputs become more:
    for four times the width these have ``lr=1/4``, and so four times the ``lr_scaled`` weight decay.

    Args:
        weight_decay: :math:`\lambda \ge 0` that was found.
        law: which to follow; docs/weight-decay.md says when which holds.
        decay: "lr_scaled", "independent", "proximal" or "corrected", before and after.
        lr: new by old :math:`\alpha`, as all ratios > 0.
        batch_size: samples a step.
        dataset_size: samples an epoch; tokens, where each is seen once.
        epochs: how often they are seen.

    Raises:
        TypeError, ValueError: naming the argument; a mode that has no time scale; a step that would take all of a
            weight, or more (``lr_scaled`` and ``corrected`` cannot tell).

    Example:
        >>> scaled_weight_decay(0.1, law="timescale", dataset_size=8)  # eight times the data
        0.0125
        >>> scaled_weight_decay(0.1, law="normalized", batch_size=4, decay="independent")  # a quarter of the steps
        0.2
        >>> scaled_weight_decay(0.1, law="per_step", lr=1 / 4)  # muP, four times the width
        0.4

    Source: ``"timescale"``: Wang & Aitchison, ICML 2025. ``"normalized"``: Loshchilov & Hutter, ICLR 2019, appendix
    B.1. ``"per_step"``: Kosson et al., "Weight Decay may matter more than muP for Learning Rate Transfer in Practice",
    2025, for the width alone.
    """
    where = "scaled_weight_decay"
    number = at_least_zero("weight_decay", weight_decay, where)
    if law not in LAWS:
        raise ValueError(f"law={law!r} in {where}: allowed are {', '.join(map(repr, LAWS))}")
    lr_factor = _lr_factor(decay, lr, where)
    per_epoch, of_epochs = LAWS[law]
    per_step = _positive("batch_size", batch_size, where) / _positive("dataset_size", dataset_size, where)
    factor: float = per_step**per_epoch * _positive("epochs", epochs, where) ** of_epochs
    if decay in WITH_LR:
        return number * factor / lr_factor
    share = factor * (number / (1.0 + number) if decay == "proximal" else number)
    if share >= 1.0:
        raise ValueError(
            f"weight_decay={weight_decay} in {where} becomes {share:.3g} of a weight in one step: allowed are decays "
            "that take less than all of it"
        )
    return share / (1.0 - share) if decay == "proximal" else share


def _lr_factor(decay: str, lr: float | None, where: str) -> float:
    """What the mode multiplies the weight decay by: the lr, or 1. Checks both."""
    if decay not in MODES:
        because = (
            ". What it takes off a weight depends on that weight's gradients in AdamW and AdagradW, so there is no one "
            "time scale; for SGDW, take 'lr_scaled' here, and convert_weight_decay after it"
        )
        known = because if decay in DECAY_MODES else ""
        raise ValueError(f"decay={decay!r} in {where}: allowed are {', '.join(map(repr, MODES))}{known}")
    if lr is None:
        if decay in WITH_LR:
            raise TypeError(f"lr=None in {where}: expected a number, which {decay!r} multiplies the weight decay by")
        return 1.0
    given = _positive("lr", lr, where)
    return given if decay in WITH_LR else 1.0


def _positive(name: str, value: float, where: str) -> float:
    number = at_least_zero(name, value, where)
    if number == 0:
        raise ValueError(f"{name}={value} in {where}: allowed are finite numbers > 0")
    return number
