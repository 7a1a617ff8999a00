r"""Normalised weight decay: :math:`\lambda` for any training budget from one :math:`\lambda_{norm}`.

.. math:: \lambda = \lambda_{norm}\sqrt{\frac{b}{B\,T}}

with batch size :math:`b`, :math:`B` training samples and :math:`T` epochs: that is :math:`\lambda_{norm}` over the root
of the number of steps. With warm restarts :math:`T` is that of the current period.

Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, appendix B.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from ..opaque import opaque
from .composed import settles
from .shapes import Schedule, where

__all__ = ["NormalizedDecay", "normalized_weight_decay"]


def normalized_weight_decay(weight_decay: float, batch_size: float, dataset_size: float, epochs: float) -> float:
    r"""The weight decay :math:`\lambda = \lambda_{norm}\sqrt{b/(B\,T)}` of a run without restarts.

    It is made for ``decay="independent"``, the paper's own form. Where the last batch of an epoch is smaller, or
    dropped, the number of steps says what is meant: ``normalized_weight_decay(weight_decay, 1, steps, 1)``.

    Args:
        weight_decay: :math:`\lambda_{norm} \ge 0`; the authors take 0.025 and 0.05 on CIFAR-10.
        batch_size: :math:`b > 0`, samples a step, over all devices.
        dataset_size: :math:`B > 0`, samples an epoch.
        epochs: :math:`T > 0`.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> normalized_weight_decay(0.5, batch_size=100, dataset_size=1000, epochs=10)
        0.05

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, appendix B.1.
    """
    for name, value in (
        ("weight_decay", weight_decay), ("batch_size", batch_size), ("dataset_size", dataset_size), ("epochs", epochs),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} of normalized_weight_decay: expected a number")
        positive = name != "weight_decay"
        if not 0 <= value < math.inf or (positive and value == 0):
            least = "> 0" if positive else ">= 0"
            raise ValueError(f"{name}={value!r} of normalized_weight_decay: allowed are finite numbers {least}")
    return weight_decay * math.sqrt(batch_size / (dataset_size * epochs))


@opaque
@dataclass(frozen=True)
class NormalizedDecay(Schedule):
    r"""A schedule under which the groups' ``weight_decay`` is :math:`\lambda_{norm}`, rebased at each warm restart.

    .. math:: \lambda_i = \lambda_{norm} / \sqrt{n_i}

    :math:`n_i` is the number of steps of the current period, which is the whole run where nothing restarts:
    :math:`n_i = B\,T_i/b`, whence the paper's :math:`\lambda_{norm}\sqrt{b/(B\,T_i)}`. The multiplier :math:`\eta` is
    that of `schedule`. ``group["weight_decay"]`` stays :math:`\lambda_{norm}`, for each group its own. It is made for
    ``decay="independent"``, the paper's own form.

    Args:
        schedule: one of `wd_kernels.schedules` that has an end or restarts; or any callable with ``where(t)``, which is
            (steps since the last restart, steps of this period), and, for `Sequential`, ``restarts``.

    Raises:
        ValueError: `schedule` has neither.

    Example:
        >>> import torch, wd_kernels
        >>> from wd_kernels.schedules import WarmRestarts
        >>> schedule = NormalizedDecay(WarmRestarts(100, mult=4))
        >>> schedule(0), schedule.decay_factor(99), schedule.decay_factor(100)
        (1.0, 0.1, 0.05)
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> opt = wd_kernels.AdamW([w], weight_decay=0.05, decay="independent", schedule=schedule)  # AdamWR

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, appendix B.1 and B.2.
    """

    schedule: Callable[[int], float]

    def __post_init__(self) -> None:
        where(self.schedule, 0)
        self._set(steps=getattr(self.schedule, "steps", None), restarts=getattr(self.schedule, "restarts", False))

    @property
    def settles(self) -> int | None:
        return settles(self.schedule)

    def __call__(self, t: int) -> float:
        return self.schedule(t)

    def where(self, t: int) -> tuple[int, int]:
        return where(self.schedule, t)

    def decay_factor(self, t: int) -> float:
        """What multiplies the weight decay in the step that follows `t` completed ones."""
        return 1.0 / math.sqrt(self.where(t)[1])
