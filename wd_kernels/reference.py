"""The normative arithmetic in plain torch (docs/numerics.md): the exact root, lerp, formats, and what all rules share.

Every backend equals `step_` to the bit, with the equations of `wd_kernels.rules`. Run on float64 copies it is the
accuracy oracle. It allocates freely and is slow; nothing here is a product path except `backend="reference"`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor

from .epilogues import Element, Epilogue
from .formats import arithmetic_dtype

__all__ = ["BLOCK", "Equation", "block_sums", "lerp", "load", "new_values", "sqrt", "step_", "store"]

#: Elements that a sum adds up in the arithmetic type.
BLOCK = 1024


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


def block_sums(x: Tensor) -> Tensor:
    """The sums of blocks of `BLOCK` elements, in storage order: [blocks]. What the last one lacks is 0.

    Within a block i is added to i + 512, then to i + 256, ... 1, in the dtype of `x`, dense in any order.
    """
    order = sorted(range(x.dim()), key=lambda dim: -x.stride()[dim])
    flat = x.permute(order).reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % BLOCK)]).view(-1, BLOCK)
    while padded.shape[1] > 1:
        half = padded.shape[1] // 2
        padded = padded[:, :half] + padded[:, half:]
    return padded[:, 0]


class Equation(Protocol):
    """What is needed of a rule (`wd_kernels.rules.Rule`)."""

    @property
    def scalars(self) -> tuple[str, ...]: ...

    def equation(
        self, s: SimpleNamespace, theta: Tensor, g: Tensor, states: Mapping[str, Tensor], /
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


def new_values(
    rule: Equation, row: Tensor, grad_factor: float, theta: Tensor, g: Tensor, states: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """One step on one tensor: (theta after it, g with its factor, update u, states after it), in theta's dtype.

    Args:
        rule: whose equation.
        row: float64 [len(rule.scalars)], or longer.
        grad_factor: float64 factor of the gradient (1 unless gradients are unscaled or clipped).
        theta, g, states: the loaded tensors, float32 or float64, of one shape; states by name.
    """
    s = _named(rule.scalars, row, theta)
    factor = torch.tensor(grad_factor, dtype=torch.float64, device="cpu").to(theta)

    g = g * (s.grad_scale * factor)
    u, new = rule.equation(s, theta, g + s.l2 * theta, states)
    theta = theta - (s.decay * theta + u)
    return theta, g, u, new


def _named(names: tuple[str, ...], row: Tensor, like: Tensor) -> SimpleNamespace:
    """The first scalars of a row, rounded to the arithmetic type."""
    scalars = row[: len(names)].to(device=like.device, dtype=like.dtype)
    return SimpleNamespace(**dict(zip(names, scalars, strict=True)))


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
    rule: Equation, row: Tensor, grad_factor: float, theta: Tensor, g: Tensor, states: Mapping[str, Tensor],
    epilogue: Epilogue | None = None, outputs: Mapping[str, Tensor] = MappingProxyType({}), sums: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of `rule` in place, on tensors as they are stored; a row's `frozen` keeps the bits of theta.

    Args:
        rule, row, grad_factor, theta, g, states: as for `new_values`; an epilogue's scalars follow in the row.
        epilogue, outputs: what is run after it, on tensors that it reads and writes.
        sums: [blocks, len(epilogue.sums)], for the sums of its blocks.
    """
    dtype = arithmetic_dtype(theta.dtype)
    own = {name: load(state, dtype) for name, state in states.items()}
    before = load(theta, dtype).clone()
    after, g, u, new = new_values(rule, row, grad_factor, before, load(g, dtype), own)
    if not float(row[rule.scalars.index("frozen")]):
        store(theta, after)
    for name, state in states.items():
        store(state, new[name])
    if epilogue is not None:
        s = _named(epilogue.scalars, row[len(rule.scalars) :], before)
        element = Element(before, load(theta, dtype), g, u, new)
        loaded = {name: load(output, dtype) for name, output in outputs.items()}
        produced, summands = epilogue.equation(s, element, loaded)
        for name, output in outputs.items():
            store(output, produced[name])
        if sums is not None:
            sums.copy_(torch.stack([block_sums(summands[name]) for name in epilogue.sums], -1))
