"""Storage formats: how one role (parameter, gradient, a state) lies in memory (numerics, section 6).

A role declares its format; a dtype alone does not tell it. Loading widens to the arithmetic type, storing rounds once.
Native code and kernels know a format by its code (csrc/layout.h, triton_kernels.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "FORMATS",
    "Format",
    "arithmetic_dtype",
    "exact_in",
    "gradient_formats",
    "parameter_format",
    "state_dtype",
    "state_format",
]


@dataclass(frozen=True)
class Format:
    """One storage format: its name, the dtype of the elements that it stores, and its code."""

    name: str
    dtype: torch.dtype
    code: int


FLOAT64 = Format("float64", torch.float64, 1)
FLOAT32 = Format("float32", torch.float32, 2)
BFLOAT16 = Format("bfloat16", torch.bfloat16, 3)
FLOAT16 = Format("float16", torch.float16, 4)
FORMATS = (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)

# A complex tensor is stepped as its real and imaginary parts.
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
#: What stores a tensor of a dtype where nothing else is asked for: itself, rounded to nearest even.
_PLAIN = {fmt.dtype: fmt for fmt in FORMATS} | {torch.complex64: FLOAT32, torch.complex128: FLOAT64}
_EXACT_IN = {
    torch.float16: (torch.float16, torch.float32, torch.float64),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float64),
    torch.float32: (torch.float32, torch.float64),
    torch.float64: (torch.float64,),
    torch.complex64: (torch.complex64, torch.complex128),
    torch.complex128: (torch.complex128,),
}


def parameter_format(dtype: torch.dtype) -> Format | None:
    """The format of a parameter, or None where there is none for its dtype (integers, float8, complex32)."""
    return _PLAIN.get(dtype)


def gradient_formats(dtype: torch.dtype) -> dict[torch.dtype, Format]:
    """What the gradients of a parameter of `dtype` may be, and their formats."""
    allowed = {dtype}
    if dtype == torch.float32:
        allowed |= {torch.bfloat16, torch.float16}
    elif dtype in (torch.bfloat16, torch.float16):
        allowed |= {torch.float32}
    return {own: _PLAIN[own] for own in allowed}


def state_format(dtype: torch.dtype) -> Format:
    """The format of the states of a parameter of `dtype`: its arithmetic type."""
    return _PLAIN[arithmetic_dtype(dtype)]


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 and complex128, float32 for every other parameter (numerics, section 1)."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the states of a parameter: that of their format, complex where the parameter is."""
    return dtype if dtype in _REAL else state_format(dtype).dtype


def exact_in(source: torch.dtype, target: torch.dtype) -> bool:
    """True if every value of `source` is exact in `target`."""
    return target in _EXACT_IN.get(source, ())
