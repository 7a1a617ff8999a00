"""What a device has that counts by itself: steps there may be skipped without anybody waiting to hear of it.

`Bank` is its memory, of one table on one device. A step is then: the squares of the gradients are added up (a launch a
bucket, where a norm is wanted); the step is begun (one launch: it decides, completes the rows, counts); every bucket is
stepped. csrc/layout.h has the same under `Begin`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import sums
from .clipping import Limits

__all__ = ["Bank", "limit_words"]

#: The exact sums of squares lie there so often: chunks add to them by turns, so that few wait for each other.
COPIES = 32


@dataclass
class Bank:
    """Of the parameters of one table, in order; of the sums of its groups.

    Attributes:
        steps: float32 [n], the step counts; `state[p]["step"]` is a view of one.
        fresh: float32 [n], 1 until a step is taken that makes a state which the rule is told of.
        sums: int64 [copies, slots, sums.WORDS], empty between steps.
        totals: int64 [groups + 2, sums.WORDS]: of each group in the last step, of all, of those without own limits.
        slots_of: int64 [groups + 1], where the slots of each group begin.
        clips: float64 [groups].
        control, found: float64 [2].
        one, zero: float32 [1]: the scale of a loss that has none, and no infinities found.
        clean: the sums are empty.
    """

    device: torch.device
    steps: Tensor
    fresh: Tensor
    sums: Tensor
    totals: Tensor
    slots_of: Tensor
    clips: Tensor
    control: Tensor
    found: Tensor
    one: Tensor
    zero: Tensor
    clean: bool = True
    rows: Tensor | None = None

    @classmethod
    def of(cls, device: torch.device, params: int, group_of_slot: Sequence[int], groups: int) -> Bank:
        """An empty one. `group_of_slot`: whose group each sum is, in order."""
        copies, slots = max(1, COPIES // max(len(group_of_slot), 1)), len(group_of_slot)
        firsts = [sum(own < group for own in group_of_slot) for group in range(groups + 1)]
        make = partial(torch.zeros, device=device)
        f32, f64, i64 = (partial(make, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.int64))
        return cls(
            device=device,
            steps=f32(params),
            fresh=f32(params),
            sums=i64(copies, slots, sums.WORDS),
            totals=i64(groups + 2, sums.WORDS),
            slots_of=torch.tensor(firsts, dtype=torch.int64, device=device),
            clips=f64(groups),
            control=f64(2),
            found=f64(2),
            one=f32(1) + 1,
            zero=f32(1),
        )

    def rows_for(self, n: int, scalars: int) -> Tensor:
        """Room for so many rows: float64 [n, scalars]."""
        if self.rows is None or self.rows.shape != (n, scalars):
            self.rows = torch.empty(n, scalars, dtype=torch.float64, device=self.device)
        return self.rows

    def given(self, value: Tensor | float | None, otherwise: Tensor, name: str) -> Tensor:
        """What torch.amp.GradScaler has left, float32 [1] on the device, without waiting for it."""
        if value is None:
            return otherwise
        if not isinstance(value, Tensor):
            return torch.full((1,), float(value), dtype=torch.float32, device=self.device)
        if value.numel() != 1:
            raise ValueError(f"{name} of the optimizer has shape {tuple(value.shape)}: allowed is one element")
        return value.detach().reshape(1).to(device=self.device, dtype=torch.float32, non_blocking=True)


def limit_words(limits: Limits | None, groups: int) -> Tensor:
    """As a device reads them: float64 [3 + groups]."""
    nan = float("nan")
    if limits is None:
        return torch.tensor([0.0, float("inf"), 0.0, *[nan] * groups], dtype=torch.float64, device="cpu")
    own = limits.own or (nan,) * groups
    words = [float(limits.measures), limits.max_norm, float(limits.skip_nonfinite), *own]
    return torch.tensor(words, dtype=torch.float64, device="cpu")
