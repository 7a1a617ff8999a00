"""Epilogues: what else a pass over the tensors produces (numerics, section 8).

After a parameter is stored, an epilogue sees of each element what `Element` has. It may read and write one element of
tensors of its own, and give numbers that are summed over blocks. A backend runs several with any rule and any formats.
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

__all__ = ["AVERAGE", "Element", "Epilogue"]


@dataclass(frozen=True, eq=False)
class Epilogue:
    """One epilogue, declared.

    Attributes:
        name: what it is called.
        code: its number in native code (csrc/kernels.h), a bit of its own: those of a bucket are added up, and run in
            the order of these bits.
        scalars: what it reads of a row, after the rule's and those of the epilogues before it.
        outputs: tensors of its own: roles after the states, each with a format, of the parameter's shape and layout.
        sums: the numbers that each element gives, for sums over blocks of 1024 (numerics, section 7). A place's
            `OUTPUT` is where they go: [blocks of the segment, len(sums)], in the arithmetic type.
        equation: the normative arithmetic: (scalars by name, element, outputs by name) to (outputs, summands).
        in_triton: gives the Triton function; asked when a GPU tensor needs it.
    """

    name: str
    code: int
    scalars: tuple[str, ...]
    outputs: tuple[str, ...]
    sums: tuple[str, ...]
    equation: Callable[[SimpleNamespace, Element, Mapping[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]
    in_triton: Callable[[], Any]


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
