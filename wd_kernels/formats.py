"""Storage formats: how one role (parameter, gradient, a state) lies in memory (numerics, section 6).

A role declares its format; a dtype alone does not tell it. Loading widens to the arithmetic type, storing rounds once.
A format may have a part, which lies at an address of its own: what a 16-bit parameter lacks of its master weight, or
the scales of 8-bit states, one for every 32 elements.
Native code and kernels know a format by its code (csrc/layout.h, triton_kernels.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = [
    "EMA_NAME",
    "FORMATS",
    "MASTER_NAME",
    "REFERENCE_NAME",
    "SCALE",
    "TILE",
    "Format",
    "Storage",
    "arithmetic_dtype",
    "code_name",
    "dtype_key",
    "exact_in",
    "format_of",
    "full_state_dtype",
    "gradient_dtypes",
    "has_scales",
    "is_steppable",
    "master_dtypes",
    "scale_name",
    "state_dtypes",
    "tiles",
]

#: Neighbours in storage order that share a scale.
TILE = 32


@dataclass(frozen=True)
class Format:
    """One storage format.

    Attributes:
        name: what errors and tables call it.
        dtype: of the elements that it stores.
        code: its number in native code.
        stochastic: rounded up or down at random, with a mean that is what was to be stored.
        part: what lies elsewhere of each element; a format that is only that has the code 0.
        binades: of 8-bit states, how far below the largest of a tile steps begin to be equal.
    """

    name: str
    dtype: torch.dtype
    code: int
    stochastic: bool = False
    part: Format | None = None
    binades: int = 0

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype | None]:
        """Of itself and of its part."""
        return self.dtype, None if self.part is None else self.part.dtype


FLOAT64 = Format("float64", torch.float64, 1)
FLOAT32 = Format("float32", torch.float32, 2)
BFLOAT16 = Format("bfloat16", torch.bfloat16, 3)
FLOAT16 = Format("float16", torch.float16, 4)
BFLOAT16_STOCHASTIC = Format("stochastic bfloat16", torch.bfloat16, 5, stochastic=True)
MASTER = Format("float32 master", torch.float32, 0)
REMAINDER16 = Format("16-bit remainder", torch.int16, 0)
REMAINDER8 = Format("8-bit remainder", torch.int8, 0)
SPLIT32 = Format("bfloat16 with a 16-bit remainder", torch.bfloat16, 6, part=REMAINDER16)
SPLIT24 = Format("bfloat16 with an 8-bit remainder", torch.bfloat16, 7, part=REMAINDER8)
SPLIT24_STOCHASTIC = Format("stochastic bfloat16 with an 8-bit remainder", torch.bfloat16, 8, True, REMAINDER8)
BFLOAT16_COPY = Format("bfloat16 copy of a master", torch.bfloat16, 9, part=MASTER)
FLOAT16_COPY = Format("float16 copy of a master", torch.float16, 10, part=MASTER)
SCALE = Format("scale of 32 elements", torch.uint8, 0)
INT8 = Format("int8", torch.int8, 11, False, SCALE, 14)
INT8_STOCHASTIC = Format("stochastic int8", torch.int8, 12, True, SCALE, 14)
UINT8 = Format("uint8", torch.uint8, 13, False, SCALE, 30)
UINT8_STOCHASTIC = Format("stochastic uint8", torch.uint8, 14, True, SCALE, 30)
FORMATS = (
    FLOAT64, FLOAT32, BFLOAT16, FLOAT16, BFLOAT16_STOCHASTIC,
    SPLIT32, SPLIT24, SPLIT24_STOCHASTIC, BFLOAT16_COPY, FLOAT16_COPY,
    INT8, INT8_STOCHASTIC, UINT8, UINT8_STOCHASTIC,
)  # fmt: skip

#: What stores tensors of a dtype to nearest even; a complex tensor is stepped as its real and imaginary parts.
_NEAREST = {fmt.dtypes: fmt for fmt in FORMATS if not fmt.stochastic}
_NEAREST |= {(torch.complex64, None): FLOAT32, (torch.complex128, None): FLOAT64}
_STOCHASTIC = {fmt.dtypes: fmt for fmt in FORMATS if fmt.stochastic}
_EXACT_IN = {
    torch.float16: (torch.float16, torch.float32, torch.float64),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float64),
    torch.float32: (torch.float32, torch.float64),
    torch.float64: (torch.float64,),
    torch.complex64: (torch.complex64, torch.complex128),
    torch.complex128: (torch.complex128,),
}


def format_of(dtype: torch.dtype, stochastic: bool = False, part: torch.dtype | None = None) -> Format:
    """What stores tensors of a dtype, with a part of another; `stochastic` where there is such a format."""
    return (_STOCHASTIC.get((dtype, part)) if stochastic else None) or _NEAREST[dtype, part]


def is_steppable(dtype: torch.dtype) -> bool:
    """May a parameter have this dtype? Integers, float8 and complex32 may not."""
    return (dtype, None) in _NEAREST


def master_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What may lie beside a parameter of `dtype` as its master weight: float32, or the bits that it lacks of one."""
    return tuple(part for own, part in _NEAREST if own == dtype and part is not None)


def gradient_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What the gradients of a parameter of `dtype` may be."""
    if dtype == torch.float32:
        return dtype, torch.bfloat16, torch.float16
    return (dtype, torch.float32) if dtype in (torch.bfloat16, torch.float16) else (dtype,)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 and complex128, float32 for every other parameter (numerics, section 1)."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def full_state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states that are not rounded: the arithmetic type, complex where the parameter is."""
    return dtype if dtype.is_complex else arithmetic_dtype(dtype)


def state_dtypes(dtype: torch.dtype, signed: bool) -> tuple[torch.dtype, ...]:
    """What a state of a parameter of `dtype` may be; `signed`: it may be negative."""
    full = full_state_dtype(dtype)
    if full != torch.float32:
        return (full,)
    small = (torch.bfloat16, torch.int8 if signed else torch.uint8)
    return (full, *small, torch.float16) if dtype == torch.float16 else (full, *small)


def has_scales(dtype: torch.dtype) -> bool:
    """Is a state of this dtype in 8 bits, with a scale for every `TILE` elements?"""
    return dtype in (torch.int8, torch.uint8)


def scale_name(name: str) -> str:
    """The key of the scales of a state."""
    return f"{name}_scale"


def code_name(name: str) -> str:
    """The key of a state in 8 bits in a checkpoint: what casts it to floats, as torch's classes do, finds no state."""
    return f"{name}_code"


def dtype_key(name: str) -> str:
    """The key of a group that says what a state is stored in."""
    return "ema_dtype" if name == EMA_NAME else "state_dtype"


def tiles(numel: int) -> int:
    """How many scales so many elements have."""
    return -(-numel // TILE)


def exact_in(source: torch.dtype, target: torch.dtype) -> bool:
    """True if every value of `source` is exact in `target`."""
    return source == target or target in _EXACT_IN.get(source, ())


#: The key of a parameter's state that has its average.
EMA_NAME = "ema"
#: The key of a parameter's state that has what it decays to.
REFERENCE_NAME = "decay_reference"
#: The key of a parameter's state that has its master weight, or what the parameter lacks of it.
MASTER_NAME = "master_param"
_MASTERS = {"float32": torch.float32, "split32": torch.int16, "split24": torch.int8}


# What a group asks for ------------------------------------------------------------------------------------------------


class _State(Protocol):
    """What is needed of a state (`wd_kernels.rules.State`)."""

    @property
    def name(self) -> str: ...
    @property
    def signed(self) -> bool: ...


@dataclass(frozen=True)
class Storage:
    """How a group has its parameters and states stored, from its "state_dtype" and "stochastic_rounding".

    Attributes:
        states: a word for all states, or (state, word) of some: "float32" (not rounded), "bfloat16", "int8" (or uint8,
            of what is never negative), "param" (the dtype of the parameter).
        stochastic_params, stochastic_states: are those in bfloat16 and in 8 bits rounded stochastically?
        masters: what 16-bit parameters have as master weights: "none", "float32" (beside them), "split32" or "split24"
            (a remainder beside bfloat16 ones).
        average: a word, as of one state, for the average of a parameter, which is rounded as states are.
    """

    states: str | tuple[tuple[str, str], ...] = "float32"
    stochastic_params: bool = False
    stochastic_states: bool = True
    masters: str = "none"
    average: str = "float32"

    def word(self, name: str) -> str:
        """What is asked for one state."""
        if name == EMA_NAME:
            return self.average
        if name == REFERENCE_NAME:
            return "param"
        return self.states if isinstance(self.states, str) else dict(self.states).get(name, "float32")

    def state_dtype(self, state: _State, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a state of a parameter of `dtype`."""
        if state.name == MASTER_NAME:
            return self.master_dtype(dtype) or torch.float32
        if state.name == REFERENCE_NAME:  # it holds every first weight exactly
            return torch.float32 if self.master_dtype(dtype) is not None else dtype
        eight = torch.int8 if state.signed else torch.uint8
        words = {"bfloat16": torch.bfloat16, "int8": eight, "param": dtype}
        return words.get(self.word(state.name)) or full_state_dtype(dtype)

    def parts(self, states: Sequence[_State]) -> int:
        """How many tensors a parameter with these states may have beside them."""
        return (self.masters != "none") + sum(self.word(state.name) == "int8" for state in states)

    def master_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype of what lies beside a parameter of `dtype` as its master weight; None where it is its own."""
        return _MASTERS.get(self.masters) if dtype in (torch.bfloat16, torch.float16) else None
