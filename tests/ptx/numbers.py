"""The arithmetic of PTX on arrays: every operation rounded once, to nearest even; a NaN result is the canonical one."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["CANONICAL", "FLOATS", "bfloat16_bits", "canonical", "fma", "narrow", "widen"]

#: The type that each floating-point type of PTX is computed in, as it lies in numpy.
FLOATS: dict[str, Any] = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64}
#: NaN as an operation gives it (PTX ISA, 9.7.3 to 9.7.5): payloads are not kept.
CANONICAL = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}
BITS = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}


def canonical(value: Any, kind: str) -> Any:
    """The bits of floating-point values of `kind`, any NaN as the canonical one."""
    nan = value != value
    bits = np.ascontiguousarray(value).view(BITS[kind])
    return np.where(nan, BITS[kind](CANONICAL[kind]), bits) if nan.any() else bits


def bfloat16_bits(value: Any) -> Any:
    """float32 rounded to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(value != value, np.uint16(CANONICAL["bf16"]), nearest.astype(np.uint16))


def widen(bits: Any, kind: str) -> Any:
    """The bits of a 16-bit type as float32: exact."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def narrow(value: Any, kind: str) -> Any:
    """float32 or float64 values as the bits of `kind`, rounded once to nearest even."""
    if kind == "bf16":
        return bfloat16_bits(value if value.dtype == np.float32 else odd_float32(value))
    return canonical(value.astype(FLOATS[kind]), kind)


def odd_float32(value: Any) -> Any:
    """float64 to float32 towards zero, the last bit set where it is inexact: a second rounding is then right."""
    near = value.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32)
    inexact = (back != value) & np.isfinite(value)
    towards_zero = bits - (inexact & (np.abs(back) > np.abs(value))).astype(np.uint32)
    return (towards_zero | inexact.astype(np.uint32)).view(np.float32)


def _odd_sum(product: Any, c: Any) -> Any:
    """product + c in float64, the last bit odd where the sum is inexact (Boldo and Melquiond, 2008)."""
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    wrong = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(wrong, bits + step, bits).view(np.float64)


_LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
_LIBM.fma.argtypes, _LIBM.fma.restype = [ctypes.c_double] * 3, ctypes.c_double
_fma64: Callable[..., Any] = np.frompyfunc(_LIBM.fma, 3, 1)


def fma(a: Any, b: Any, c: Any, kind: str) -> Any:
    """a * b + c rounded once, as bits; f16 and bf16 are given as float32."""
    if kind == "f64":
        return canonical(np.asarray(_fma64(a, b, c), dtype=np.float64), kind)
    product = np.asarray(a, dtype=np.float64) * np.asarray(b, dtype=np.float64)  # exact: 48 bits at most
    total = _odd_sum(product, np.asarray(c, dtype=np.float64))
    return narrow(total, kind) if kind != "f32" else canonical(total.astype(np.float32), kind)
