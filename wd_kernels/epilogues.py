"""Epilogues: what else a pass over the tensors produces (numerics, section 8).

After a parameter is stored, an epilogue sees of each element what `Element` has. It may read and write one element of
tensors of its own, give numbers that are summed over blocks, or whose largest is kept, and have those elements marked
whose parameter has changed in memory. A backend runs several with any rule and any formats.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .reference import Element, lerp

__all__ = ["AVERAGE", "CHANGES", "STATISTICS", "Element", "Epilogue"]


@dataclass(frozen=True, eq=False)
class Epilogue:
    """One epilogue, declared.

    Attributes:
        name: what it is called.
        code: its number in native code (csrc/kernels.h), a bit of its own: those of a bucket are added up, and run in
            the order of these bits.
        scalars: what it reads of a row, after the rule's and those of the epilogues before it.
        outputs: tensors of its own: roles after the states, each with a format, of the parameter's shape and layout.
        sums: the numbers that each element gives, for sums over blocks of 1024 (numerics, section 7).
        maxima: numbers >= 0, or NaN, whose largest in a block is kept; NaN is larger than any.
        marks: a bit for each element is set where the parameter's memory holds another number than before, in the words
            that a place's `MARKS` names.
        equation: the normative arithmetic: (scalars by name, element, outputs by name) to (outputs, numbers).
        in_triton: gives the Triton function; asked when a GPU tensor needs it.

    A place's `OUTPUT` is where the numbers of blocks go: [blocks of the segment, numbers of all epilogues], in the
    arithmetic type, of each epilogue the sums, then the maxima.
    """

    name: str
    code: int
    scalars: tuple[str, ...]
    outputs: tuple[str, ...]
    sums: tuple[str, ...]
    equation: Callable[[SimpleNamespace, Element, Mapping[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]
    in_triton: Callable[[], Any]
    maxima: tuple[str, ...] = ()
    marks: bool = False

    @property
    def numbers(self) -> tuple[str, ...]:
        """Of a block, in order."""
        return (*self.sums, *self.maxima)


def _average(
    s: SimpleNamespace, of: Element, outputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mixed = lerp(outputs["ema"], of.after, s.ema_decay, s.one_minus_ema_decay)
    return {"ema": torch.where(s.ema_decay == 0, of.after, mixed)}, {}


def _in_triton(name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(".backends.triton_kernels", __package__), name)


#: The average of a parameter over its steps (`wd_kernels.averages`).
AVERAGE = Epilogue(
    name="average",
    code=1 << 0,
    scalars=("ema_decay", "one_minus_ema_decay"),
    outputs=("ema",),
    sums=(),
    equation=_average,
    in_triton=_in_triton("average"),
)


def _statistics(
    s: SimpleNamespace, of: Element, outputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    moved = of.after - of.before
    return {}, {
        "grad": of.g * of.g,
        "param": of.after * of.after,
        "change": moved * moved,
        "nonfinite": (~of.g.isfinite()).to(of.g.dtype),
        "largest": moved.abs(),
    }


#: What a step has made of every tensor (`wd_kernels.statistics`): squares, how many gradients are not finite, and the
#: largest change.
STATISTICS = Epilogue(
    name="statistics",
    code=1 << 1,
    scalars=(),
    outputs=(),
    sums=("grad", "param", "change", "nonfinite"),
    equation=_statistics,
    in_triton=_in_triton("statistics"),
    maxima=("largest",),
)

#: Which elements of the parameters a step has changed (`wd_kernels.changes`).
CHANGES = Epilogue(
    name="changes",
    code=1 << 2,
    scalars=(),
    outputs=(),
    sums=(),
    equation=lambda s, of, outputs: ({}, {}),
    in_triton=_in_triton("nothing"),
    marks=True,
)
