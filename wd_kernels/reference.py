"""The normative arithmetic in plain torch (docs/numerics.md): the exact root, lerp, formats, and what all rules share.

Every backend equals `step_` to the bit, with the equations of `wd_kernels.rules`. Run on float64 copies it is the
accuracy oracle. It allocates freely and is slow; nothing here is a product path except `backend="reference"`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .formats import TILE, Format, arithmetic_dtype, format_of, has_scales

__all__ = [
    "BLOCK",
    "Draws",
    "Element",
    "Equation",
    "Produced",
    "block_sums",
    "lerp",
    "load",
    "new_values",
    "sqrt",
    "step_",
    "store",
]

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


def load(x: Tensor, dtype: torch.dtype, part: Tensor | None = None) -> Tensor:
    """Widens to the arithmetic type; complex tensors become their real and imaginary parts.

    `part` is what lies elsewhere: of a 16-bit parameter its float32 master, or the bits that it lacks; of an 8-bit
    state the scales of its tiles.
    """
    x = x.detach()
    if part is not None:
        part = part.detach()
        if has_scales(x.dtype):
            return _load_tiles(x, part)
        if part.dtype == torch.float32:
            return part
        shift = 32 - 8 * (x.itemsize + part.itemsize)
        return ((x.view(torch.int16).int() << 16) + (part.int() << shift)).view(torch.float32)
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.resolve_neg().to(dtype)


def store(memory: Tensor, value: Tensor, draws: Draws | None = None, part: Tensor | None = None) -> None:
    """Rounds `value` once into `memory`, in place; a 16-bit NaN is the canonical one.

    To nearest even; with `draws`, to one of the two numbers beside `value`, so that the mean is that. What `part` has
    of it is written too: all, or what a bfloat16 lacks; that is then the nearest one, the further from 0 of two. Of an
    8-bit state it is the scales.
    """
    memory = memory.detach()
    if part is not None and has_scales(memory.dtype):
        _store_tiles(memory, value, draws, part.detach())
        return
    if part is not None and part.dtype == torch.float32:
        part.detach().copy_(value)
    elif part is not None:
        part, bits = part.detach(), torch.where(value.isnan(), 0x7FC00000, value.view(torch.int32))
        if part.dtype == torch.int8:
            up = 0x7F + ((bits >> 8) & 1) if draws is None else draws.bits(elements(memory)).to(torch.int32) >> 8
            bits = (bits + up) & ~0xFF
        high = (bits + 0x8000) >> 16
        memory.view(torch.int16).copy_(high)
        part.copy_((bits - (high << 16)) >> (8 if part.dtype == torch.int8 else 0))
        return
    if memory.is_complex():
        memory = torch.view_as_real(memory)
    if memory.dtype == torch.bfloat16:  # on the bits: hardware conversions may flush subnormals
        bits = value.view(torch.int32)
        up = 0x7FFF + ((bits >> 16) & 1) if draws is None else draws.bits(elements(memory)).to(torch.int32)
        memory.view(torch.int16).copy_(torch.where(value.isnan(), 0x7FC0, (bits + up) >> 16))
    elif memory.dtype == torch.float16:
        memory.copy_(value)
        memory.view(torch.int16).masked_fill_(value.isnan(), 0x7E00)
    else:
        memory.copy_(value)


#: Bits of a float32 that an 8-bit state does not have: 3 are left of its fraction.
LOST = 20


def _in_order(dense: Tensor) -> Tensor:
    """The elements as they lie: [n]."""
    return dense.as_strided((dense.numel(),), (1,))


def _load_tiles(codes: Tensor, scale: Tensor) -> Tensor:
    """What an 8-bit state stands for, float32: |code| is the upper bits of y, and the number y - c."""
    code = _in_order(codes).int()
    c = scale.flatten().int().repeat_interleave(TILE)[: code.numel()] << 23
    magnitude = ((code.abs() << LOST) + c).view(torch.float32) - c.view(torch.float32)
    found = torch.empty_like(codes, dtype=torch.float32)
    _in_order(found).copy_(torch.where(code < 0, -magnitude, magnitude))
    return found


def _store_tiles(memory: Tensor, value: Tensor, draws: Draws | None, scale: Tensor) -> None:
    """Codes and scales of `value`, tile by tile (numerics, section 6).

    c is a power of 2 so far below the largest of a tile as the format has binades, and y = |x| + c: below c its bits
    are linear in x, above they are logarithmic. The code is the bits of y above those of c, but for the last 20.
    """
    fmt, n = format_of(memory.dtype, part=scale.dtype), memory.numel()
    x = torch.zeros(len(scale.flatten()) * TILE, dtype=torch.float32, device=memory.device)
    x[:n] = _in_order(torch.empty_like(memory, dtype=torch.float32).copy_(value))
    a = x.abs()
    exponent = (a.view(torch.int32) >> 23).view(-1, TILE).amax(1, keepdim=True)
    own = (exponent - fmt.binades).clamp(min=1)
    c = (own << 23).expand(-1, TILE).reshape(-1)
    y = a + c.view(torch.float32)
    bits = torch.where(y.isnan(), 0x7FC00000, y.view(torch.int32)) - c
    up = (1 << LOST - 1) - 1 + ((bits >> LOST) & 1)
    if draws is not None:
        up = draws.bits(torch.arange(len(x), device=x.device)).to(torch.int32) << LOST - 16
    code = (bits + up) >> LOST
    if memory.dtype == torch.int8:
        code = torch.where(x < 0, -code, code)
    else:  # what is not 0 never becomes 0
        code = torch.where((a > 0) & (code == 0), 1, code)
    _in_order(memory).copy_(code[:n])
    scale.copy_(own.view(scale.shape))


def elements(memory: Tensor) -> Tensor:
    """The place in storage order of each element of a dense tensor: int64 of its shape."""
    return torch.arange(memory.numel(), device=memory.device).as_strided(memory.shape, memory.stride())


_LOW = 0xFFFFFFFF


def _mix(x: int) -> int:
    """A bijection of 64-bit numbers that leaves no bit of its argument recognisable."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Draws:
    """The random bits of a step of one tensor (numerics, section 6): a function of seed, count, role and element.

    Attributes:
        seed: of the group, in [0, 2**53).
        step: the parameter's own count.
        origin: the number of the tensor's first element among all of the optimizer's.
        role: 0 the parameter, 2 the first state, ...
    """

    seed: int
    step: int
    origin: int
    role: int = 0

    def bits(self, elements: Tensor) -> Tensor:
        """16 bits for each element of the tensor, by its place in storage order: int64 to int64, in [0, 2**16)."""
        key = _mix(_mix(_mix(self.seed) + self.step & 0xFFFFFFFFFFFFFFFF) + self.role // 2 & 0xFFFFFFFFFFFFFFFF)
        n = elements + self.origin
        x = ((n & _LOW) * 0x9E3779B1 + (n >> 32) * 0x85EBCA77 + (key & _LOW)) & _LOW
        x = ((x ^ (x >> 16)) * 0x7FEB352D + (key >> 32)) & _LOW
        x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
        return x >> 16 if self.role % 2 == 0 else (x ^ (x >> 16)) & 0xFFFF


def lerp(x: Tensor, y: Tensor, beta: Tensor, w: Tensor) -> Tensor:
    """From the nearer end, as torch.lerp: beta*x + w*y would drift."""
    way = y - x
    return x + w * way if bool(w < 0.5) else y - beta * way


def _blocks(x: Tensor, size: int = BLOCK) -> Tensor:
    """The elements of a dense tensor as they lie, and zeros: [blocks, size]."""
    flat = _in_order(x)
    return torch.cat([flat, flat.new_zeros(-flat.numel() % size)]).view(-1, size)


def block_sums(x: Tensor) -> Tensor:
    """The sums of blocks of `BLOCK` elements, in storage order: [blocks]. What the last one lacks is 0.

    In the dtype of `x`, dense in any order: pairs of neighbours are added three times, which leaves 128 sums; of these,
    i is added to i + 64, then to i + 32, ... 1.
    """
    padded = _blocks(x)
    for _ in range(3):
        padded = padded[:, ::2] + padded[:, 1::2]
    while padded.shape[1] > 1:
        half = padded.shape[1] // 2
        padded = padded[:, :half] + padded[:, half:]
    return padded[:, 0]


def block_maxima(x: Tensor) -> Tensor:
    """The largest of the same blocks, of numbers >= 0: [blocks]. NaN is larger than any."""
    return _blocks(x).amax(1)


def marks_of(before: Tensor, after: Tensor) -> Tensor:
    """Which elements are other numbers than before: int32 words of 32 bits, in storage order. Any NaN is any NaN."""
    if before.is_complex():
        before, after = torch.view_as_real(before), torch.view_as_real(after)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before.itemsize]
    differs = (before.view(bits) != after.view(bits)) & ~(before.isnan() & after.isnan())
    each = _blocks(differs, 32).long() << torch.arange(32, device=before.device)
    return (each.sum(1) & _LOW).to(torch.uint32).view(torch.int32)


def squares(grad: Tensor, param: torch.dtype) -> list[float]:
    """The sums of the squares of a gradient, of every block; `param`: the dtype of its parameter."""
    g = load(grad, arithmetic_dtype(param))
    with subnormals():
        return block_sums(g * g).tolist()


class Equation(Protocol):
    """What is needed of a rule (`wd_kernels.rules.Rule`)."""

    @property
    def scalars(self) -> tuple[str, ...]: ...

    def equation(
        self, s: SimpleNamespace, theta: Tensor, g: Tensor, states: Mapping[str, Tensor], /
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


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


class Produced(Protocol):
    """What is needed of an epilogue (`wd_kernels.epilogues.Epilogue`)."""

    @property
    def scalars(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def sums(self) -> tuple[str, ...]: ...
    @property
    def maxima(self) -> tuple[str, ...]: ...

    def equation(
        self, s: SimpleNamespace, of: Element, outputs: Mapping[str, Tensor], /
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...


def new_values(
    rule: Equation, row: Tensor, grad_factor: float, theta: Tensor, g: Tensor, states: Mapping[str, Tensor],
    pull: int = 0, to: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """One step on one tensor: (theta after it, g with its factor, update u, states after it), in theta's dtype.

    Args:
        rule: whose equation.
        row: float64 [len(rule.scalars)], or longer.
        grad_factor: float64 factor of the gradient (1 unless gradients are unscaled or clipped).
        theta, g, states: the loaded tensors, float32 or float64, of one shape; states by name.
        pull, to: what decays is theta less the row's center (1), or less `to`, a loaded tensor (2).
    """
    s = _named(rule.scalars, row, theta)
    factor = torch.tensor(grad_factor, dtype=torch.float64, device="cpu").to(theta)

    g = g * (s.grad_scale * factor)
    g = torch.where(g > s.grad_limit, s.grad_limit, g)  # NaN stays
    g = torch.where(g < -s.grad_limit, -s.grad_limit, g)
    if not pull:
        u, new = rule.equation(s, theta, g + s.l2 * theta, states)
        theta = theta - (s.decay * theta + u)
        return theta, g, u, new
    pulled = theta - (s.decay_center if to is None else to)
    u, new = rule.equation(s, pulled, g + s.l2 * pulled, states)
    decayed = torch.where(u * pulled < s.decay_threshold, 0.0, s.decay * pulled)  # NaN decays
    theta = theta - (decayed + u)
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
    epilogues: Sequence[Produced] = (), outputs: Mapping[str, Tensor] = MappingProxyType({}),
    numbers: Tensor | None = None, marks: Tensor | None = None, formats: Sequence[Format] = (), origin: int = 0,
    master: Tensor | None = None, scales: Mapping[str, Tensor] = MappingProxyType({}), pull: int = 0,
    to: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of `rule` in place, on tensors as they are stored; a row's `frozen` keeps the bits of theta.

    Args:
        rule, row, grad_factor, theta, g, states: as for `new_values`; the epilogues' scalars follow in the row.
        epilogues, outputs: what is run after it, on tensors that it reads and writes, by name.
        numbers: [blocks, numbers of all epilogues], for those of each block.
        marks: int32 words, in which a bit is set for each element of theta that is another number than before.
        formats: of theta, g, states and outputs; by default what rounds their dtypes to nearest even.
        origin: the number of theta's first element among all of the optimizer's.
        master: what lies elsewhere of theta.
        scales: of the states and outputs that are in 8 bits, by their names.
        pull, to: as for `new_values`, `to` as it is stored.
    """
    dtype, was = arithmetic_dtype(theta.dtype), theta.clone()
    own = {name: load(state, dtype, scales.get(name)) for name, state in states.items()}
    before = load(theta, dtype, master).clone()
    center = None if to is None else load(to, dtype)
    after, g, u, new = new_values(rule, row, grad_factor, before, load(g, dtype), own, pull, center)
    written = (theta, g, *states.values(), *outputs.values())
    formats = formats or [format_of(t.dtype, part=torch.uint8 if has_scales(t.dtype) else None) for t in written]
    seed, step = (int(row[rule.scalars.index(name)]) for name in ("seed", "t"))
    draws = [Draws(seed, step, origin, role) if fmt.stochastic else None for role, fmt in enumerate(formats)]
    if not float(row[rule.scalars.index("frozen")]):
        store(theta, after, draws[0], master)
    for role, (name, state) in enumerate(states.items(), 2):
        store(state, new[name], draws[role], scales.get(name))
    element, row, found = Element(before, load(theta, dtype, master), g, u, new), row[len(rule.scalars) :], []
    role_of = {name: role for role, name in enumerate(outputs, 2 + len(states))}
    for epilogue in epilogues:
        loaded = {name: load(outputs[name], dtype, scales.get(name)) for name in epilogue.outputs}
        produced, given = epilogue.equation(_named(epilogue.scalars, row, before), element, loaded)
        row = row[len(epilogue.scalars) :]
        for name in epilogue.outputs:
            store(outputs[name], produced[name], draws[role_of[name]], scales.get(name))
        found += [block_sums(given[name]) for name in epilogue.sums]
        found += [block_maxima(given[name]) for name in epilogue.maxima]
    if numbers is not None:
        numbers.copy_(torch.stack(found, -1))
    if marks is not None:
        marks |= marks_of(was, theta)
