"""Epilogues: what else a pass over the tensors produces (numerics, section 8).

After a parameter is stored, an epilogue sees of each element what `Element` has. It may read and write one element of
tensors of its own, and give numbers that are summed over blocks. A backend runs one with any rule and any formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Element", "Epilogue"]


class Element(NamedTuple):
    """What an epilogue sees, in the arithmetic type.

    Attributes:
        before, after: the parameter as it was and as it is now stored, widened.
        g: the gradient with its factor, before its share of an "l2" decay.
        u: the update.
        states: as the rule made them, before they are stored.
    """

    before: Tensor
    after: Tensor
    g: Tensor
    u: Tensor
    states: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Epilogue:
    """One epilogue, declared.

    Attributes:
        name: what it is called.
        code: its number in native code (csrc/epilogues.h); 0 stands for none.
        scalars: what it reads of a row, after the rule's.
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
