"""The normative rules in plain torch: NUMERICS sections 3 and 4, line for line.

Every backend equals these functions to the bit. Run on float64 copies they are the accuracy oracle. They allocate
freely and are slow; nothing here is a product path except `backend="reference"`.

Each takes one row of scalars (`wd_kernels.rules`), the tensors of one parameter in any dtype, and returns the new
parameter and states in the arithmetic type (`load` and `store` widen and round).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .storage import arithmetic_dtype

__all__ = ["adamw", "load", "sgdw", "sqrt", "step_", "store"]


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded root: torch's on the CPU is an ulp off for 16% of float32 values; numpy's is exact."""
    if x.device.type != "cpu":
        return x.double().sqrt().to(x.dtype)
    try:
        import numpy as np
    except ImportError:  # a root taken in float64 and rounded to float32 is correctly rounded too
        roots = [math.sqrt(v) if v >= 0 else math.nan for v in x.flatten().tolist()]
        return torch.tensor(roots, dtype=x.dtype, device="cpu").view_as(x)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.contiguous().numpy()))).view_as(x)


def load(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Widens to the arithmetic type; complex tensors become their real and imaginary parts."""
    x = x.detach()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.resolve_neg().to(dtype)


def store(memory: Tensor, value: Tensor) -> None:
    """Rounds `value` once into `memory`, in place; a 16-bit NaN is the canonical one."""
    memory = memory.detach()
    if memory.is_complex():
        memory = torch.view_as_real(memory)
    if memory.dtype == torch.bfloat16:  # on the bits: hardware conversions may flush subnormals
        bits = value.view(torch.int32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        memory.view(torch.int16).copy_(torch.where(value.isnan(), 0x7FC0, nearest))
    elif memory.dtype == torch.float16:
        memory.copy_(value)
        memory.view(torch.int16).masked_fill_(value.isnan(), 0x7E00)
    else:
        memory.copy_(value)


def lerp(x: Tensor, y: Tensor, beta: Tensor, w: Tensor) -> Tensor:
    """From the nearer end, as torch.lerp: beta*x + w*y would drift."""
    if bool(w < 0.5):
        return x + w * (y - x)
    return y + beta * (x - y)


def adamw(row: Tensor, grad_factor: float, theta: Tensor, g: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """One AdamW step on one tensor: (theta, m, v[, v_max]) after it, in the dtype of `theta`.

    Args:
        row: float64 [13], see `rules.ADAMW`.
        grad_factor: float64 factor of the gradient (1 unless gradients are unscaled or clipped).
        theta, g, states: the loaded tensors, float32 or float64, of one shape; states are m, v and, for amsgrad,
            v_max.
    """
    scalars: Any = row.to(device=theta.device, dtype=theta.dtype)
    _, _, grad_sign, l2, beta1, one_minus_beta1, beta2, one_minus_beta2 = scalars[:8]
    step_size, inv_sqrt_bias2, eps, decay, metric = scalars[8:]
    m, v = states[0], states[1]
    factor = torch.tensor(grad_factor, dtype=torch.float64, device="cpu").to(theta)

    g = g * (grad_sign * factor)
    g = g + l2 * theta
    m = lerp(m, g, beta1, one_minus_beta1)
    v = lerp(v, g * g, beta2, one_minus_beta2)
    new = [m, v]
    second = v
    if len(states) == 3:
        v_max = states[2]
        second = torch.where((v > v_max) | (v != v), v, v_max)
        new.append(second)
    d = sqrt(second) * inv_sqrt_bias2 + eps
    u = (step_size * m + metric * theta) / (d + metric)
    theta = theta - (decay * theta + u)
    return [theta, *new]


def sgdw(row: Tensor, grad_factor: float, theta: Tensor, g: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """One SGDW step on one tensor: (theta[, b]) after it, in the dtype of `theta`. Arguments as for `adamw`."""
    scalars: Any = row.to(device=theta.device, dtype=theta.dtype)
    _, _, grad_sign, l2, momentum, grad_coef, update_grad, update_buf, step_size, decay = scalars
    factor = torch.tensor(grad_factor, dtype=torch.float64, device="cpu").to(theta)

    g = g * (grad_sign * factor)
    g = g + l2 * theta
    new = []
    if states:
        b = momentum * states[0] + grad_coef * g
        u = step_size * (update_grad * g + update_buf * b)
        new.append(b)
    else:
        u = step_size * g
    theta = theta - (decay * theta + u)
    return [theta, *new]


_TINY = (5e-324, 0.0)  # their sum is 0 where subnormals are flushed
RULES = {"adamw": adamw, "sgdw": sgdw}


@contextmanager
def subnormals() -> Iterator[None]:
    """Undoes torch.set_flush_denormal(True) meanwhile: the arithmetic has subnormals."""
    flushes = sum(_TINY) == 0.0
    if flushes:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushes:
            torch.set_flush_denormal(True)


@torch.no_grad()
@subnormals()
def step_(rule: str, row: Tensor, grad_factor: float, theta: Tensor, g: Tensor, states: Sequence[Tensor]) -> None:
    """One step of `rule` ("adamw" or "sgdw") in place, on tensors as they are stored.

    The second scalar of the row is `frozen`: 1 keeps the bits of theta while the states advance.
    """
    dtype = arithmetic_dtype(theta.dtype)
    new = RULES[rule](row, grad_factor, load(theta, dtype), load(g, dtype), [load(s, dtype) for s in states])
    for memory, value in zip([theta, *states], new, strict=True):
        if memory is theta and float(row[1]) != 0:
            continue
        store(memory, value)
