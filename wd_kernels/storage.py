"""Storage formats: how one role (parameter, gradient, a state) lies in memory.

A format is a dtype and the code that the native code knows it by (csrc/table.h). Loading widens to the arithmetic
type, storing rounds once to nearest even (NUMERICS, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["FORMATS", "Format", "arithmetic_dtype", "format_of", "state_dtype", "widens"]


@dataclass(frozen=True)
class Format:
    """One storage format: its name, the dtype it stores, and its code in csrc/table.h."""

    name: str
    dtype: torch.dtype
    code: int


FORMATS = (
    Format("float64", torch.float64, 1),
    Format("float32", torch.float32, 2),
    Format("bfloat16", torch.bfloat16, 3),
    Format("float16", torch.float16, 4),
)
# A complex tensor is stepped as its real and imaginary parts.
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_BY_DTYPE = {fmt.dtype: fmt for fmt in FORMATS}
_EXACT_IN = {
    torch.float16: (torch.float16, torch.float32, torch.float64),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float64),
    torch.float32: (torch.float32, torch.float64),
    torch.float64: (torch.float64,),
    torch.complex64: (torch.complex64, torch.complex128),
    torch.complex128: (torch.complex128,),
}


def format_of(dtype: torch.dtype) -> Format | None:
    """The format that stores `dtype`, or None where there is none (integers, float8, complex32)."""
    return _BY_DTYPE.get(_REAL.get(dtype, dtype))


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 and complex128, float32 for every other parameter (NUMERICS, section 1)."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the states of a parameter: its arithmetic type, complex where the parameter is."""
    return dtype if dtype in _REAL else arithmetic_dtype(dtype)


def widens(source: torch.dtype, target: torch.dtype) -> bool:
    """True if every value of `source` is exact in `target`."""
    return target in _EXACT_IN.get(source, ())
