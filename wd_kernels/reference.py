"""The normative arithmetic in plain torch (docs/numerics.md): the exact root, lerp, formats, and what all rules share.

Every backend equals `step_` to the bit, with the equations of `wd_kernels.rules`. Run on float64 copies it is the
accuracy oracle. It allocates freely and is slow; nothing here is a product path except `backend="reference"`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor

from .formats import arithmetic_dtype

__all__ = ["Equation", "lerp", "load", "new_values", "sqrt", "step_", "store"]


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


class Equation(Protocol):
    """What is needed of a rule (`wd_kernels.rules.Rule`)."""

    @property
    def scalars(self) -> tuple[str, ...]: ...

    def equation(
        self, s: SimpleNamespace, theta: Tensor, g: Tensor, states: Mapping[str, Tensor], /
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


def new_values(
    rule: Equation, row: Tensor, grad_factor: float, theta: Tensor, g: Tensor, states: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One step on one tensor: (theta after it, update u, states after it), in the dtype of `theta`.

    Args:
        rule: whose equation.
        row: float64 [len(rule.scalars)].
        grad_factor: float64 factor of the gradient (1 unless gradients are unscaled or clipped).
        theta, g, states: the loaded tensors, float32 or float64, of one shape; states by name.
    """
    scalars = row.to(device=theta.device, dtype=theta.dtype)
    s = SimpleNamespace(**dict(zip(rule.scalars, scalars, strict=True)))
    factor = torch.tensor(grad_factor, dtype=torch.float64, device="cpu").to(theta)

    g = g * (s.grad_scale * factor)
    g = g + s.l2 * theta
    u, new = rule.equation(s, theta, g, states)
    theta = theta - (s.decay * theta + u)
    return theta, u, new


_TINY = (5e-324, 0.0)  # their sum is 0 where subnormals are flushed


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
def step_(
    rule: Equation, row: Tensor, grad_factor: float, theta: Tensor, g: Tensor, states: Mapping[str, Tensor]
) -> None:
    """One step of `rule` in place, on tensors as they are stored; a row's `frozen` keeps the bits of theta."""
    dtype = arithmetic_dtype(theta.dtype)
    own = {name: load(state, dtype) for name, state in states.items()}
    after, _, new = new_values(rule, row, grad_factor, load(theta, dtype), load(g, dtype), own)
    if not float(row[rule.scalars.index("frozen")]):
        store(theta, after)
    for name, state in states.items():
        store(state, new[name])
