r"""Schedules: the multiplier :math:`\eta_t` of learning rate and weight decay.

A schedule is any callable that takes the number of completed steps (0 in the first step) and returns
:math:`\eta \ge 0`. ``schedule=`` of :class:`wd_kernels.AdamW` and :class:`wd_kernels.SGDW` calls it once a step, on the
host, before anything is written: it costs no launch, and what :math:`\eta` multiplies is the decay mode's affair. Those
here can be compared, printed, pickled, composed and drawn:

    Constant   StepDrop   Warmup   Cosine   WarmRestarts   WarmupStableDecay
    Sequential   Product                                    one after another; multiplied
    NormalizedDecay                                         also rebases the weight decay
    PublishedRestarts                                       the restarts of the authors' code, to the bit

`plot` draws them; `ScheduledLR` shows them to trainers that want an LR scheduler.
"""

from .composed import Product, Sequential
from .drawing import plot
from .normalized import NormalizedDecay, normalized_weight_decay
from .published import PublishedRestarts
from .reporting import ScheduledLR
from .shapes import Constant, Cosine, Schedule, StepDrop, WarmRestarts, Warmup, WarmupStableDecay

__all__ = [
    "Constant",
    "Cosine",
    "NormalizedDecay",
    "Product",
    "PublishedRestarts",
    "Schedule",
    "ScheduledLR",
    "Sequential",
    "StepDrop",
    "WarmRestarts",
    "Warmup",
    "WarmupStableDecay",
    "normalized_weight_decay",
    "plot",
]
