"""16-bit formats in the native kernel: every pattern loaded, roundings stored, against numpy and exact distances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from cases import bf16, f16, f32
from torch import Tensor

import wd_kernels
from wd_kernels import reference

HALVES = [bf16, f16]
CANONICAL_NAN = {bf16: 0x7FC0, f16: 0x7E00}
#: Widths of vectors, of their tails, and one element.
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127)


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65536 numbers of a 16-bit format, in the order of their bits."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def widened(dtype: torch.dtype) -> np.ndarray:
    """What each of the 65536 patterns means, as float32, without torch."""
    codes = np.arange(65536, dtype=np.uint32)
    if dtype == bf16:
        return (codes << 16).view(np.float32)
    return codes.astype(np.uint16).view(np.float16).astype(np.float32)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The pattern of the nearest number, ties to the even pattern, NaN canonical: by exact distances in float64."""
    if dtype == f16:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            found = values.astype(np.float16).view(np.uint16)
        return np.where(np.isnan(values), 0x7E00, found).astype(np.uint16)
    magnitude = np.abs(values)
    below = magnitude.view(np.uint32) >> 16
    grid = np.append(widened(bf16)[:0x7F80].astype(np.float64), 2.0**128)  # infinity stands where the next number would
    exact = np.where(np.isfinite(magnitude), magnitude, 0).astype(np.float64)
    lower = np.minimum(below, 0x7F7F)
    down, up = exact - grid[lower], grid[lower + 1] - exact
    nearest = np.where((up < down) | ((up == down) & (lower % 2 == 1)), lower + 1, lower)
    nearest = np.where(np.isinf(magnitude), 0x7F80, nearest)
    sign = np.where(np.signbit(values), 0x8000, 0)
    return np.where(np.isnan(values), 0x7FC0, sign | nearest).astype(np.uint16)


def hard_values(dtype: torch.dtype) -> np.ndarray:
    """float32 numbers around every number of a format and every tie between two, and a million patterns at random."""
    grid = widened(dtype)[: 0x7F80 if dtype == bf16 else 0x7C00]
    ends = np.append(grid.astype(np.float64), 2.0**128 if dtype == bf16 else 65536.0)
    with np.errstate(over="ignore"):
        ties = ((ends[1:] + ends[:-1]) / 2).astype(np.float32)  # exact: a tie has one bit more than the format
    middle = np.concatenate([grid, ties])
    around = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2**32, 1_000_003, dtype=np.uint32).view(np.float32)
    small = rng.standard_normal(100_003, dtype=np.float32) * np.float32(2.0**-127)
    least = np.arange(1, 300, dtype=np.uint32).view(np.float32)
    nans = np.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7FBFFFFF], dtype=np.uint32).view(np.float32)
    positive = np.concatenate([*around, least, nans, np.array([np.inf, 65519.996, 65520, 65504], dtype=np.float32)])
    return np.concatenate([positive, -positive, drawn, small])


def stored(values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`values` after one store into parameters of `dtype`: a step from -0 along -value, which is exact."""
    params = [torch.nn.Parameter(torch.full(v.shape, -0.0, dtype=dtype)) for v in values]
    for p, v in zip(params, values, strict=True):
        p.grad_dtype = f32
        p.grad = -v
    wd_kernels.SGDW(params, lr=1.0, backend="cpu").step()
    return [p.detach() for p in params]


def pieces(t: Tensor) -> list[Tensor]:
    """The whole of a tensor, and pieces of many sizes from its start."""
    return [t, *(part.clone() for part in t[: sum(SIZES)].split(SIZES))]


@pytest.mark.parametrize("dtype", HALVES)
def test_stores(dtype: torch.dtype, isa: str) -> None:
    values = hard_values(dtype)
    expected = torch.from_numpy(rounded(values, dtype).view(np.int16))
    whole, *parts = stored(pieces(torch.from_numpy(values)), dtype)
    differ = whole.view(torch.int16) != expected
    assert not bool(differ.any()), f"{int(differ.sum())} differ, first {values[int(differ.nonzero()[0])]!r}"
    assert torch.equal(torch.cat(parts).view(torch.int16), expected[: sum(SIZES)])


@pytest.mark.parametrize("dtype", HALVES)
def test_stores_ties_in_small_tensors(dtype: torch.dtype, isa: str) -> None:
    """The tails of the vector loop round as the vectors do."""
    values = hard_values(dtype)
    values = values[:: len(values) // sum(SIZES)][: sum(SIZES)]
    expected = torch.from_numpy(rounded(values, dtype).view(np.int16))
    found = torch.cat(stored(list(torch.from_numpy(values.copy()).split(SIZES)), dtype))
    assert torch.equal(found.view(torch.int16), expected)


@pytest.mark.parametrize(
    ("dtype", "value", "pattern"),
    [
        (bf16, 1.0, 0x3F80),
        (bf16, -0.0, 0x8000),
        (bf16, 1 + 2.0**-8, 0x3F80),  # a tie, to even: down
        (bf16, 1 + 3 * 2.0**-8, 0x3F82),  # a tie, to even: up
        (bf16, 1 + 2.0**-8 + 2.0**-23, 0x3F81),
        (bf16, 2.0**-133, 0x0001),  # the least subnormal
        (bf16, 2.0**-134, 0x0000),  # half of it
        (bf16, -(2.0**-134) * 1.5, 0x8001),
        (bf16, 3.4028234663852886e38, 0x7F80),
        (bf16, 3.3961775292304957e38, 0x7F80),  # halfway from the greatest to 2**128
        (bf16, 3.39617732e38, 0x7F7F),
        (bf16, float("inf"), 0x7F80),
        (bf16, float("nan"), 0x7FC0),
        (f16, 1.0, 0x3C00),
        (f16, -0.0, 0x8000),
        (f16, 1 + 2.0**-11, 0x3C00),
        (f16, 1 + 3 * 2.0**-11, 0x3C02),
        (f16, 65504.0, 0x7BFF),
        (f16, 65519.99609375, 0x7BFF),
        (f16, 65520.0, 0x7C00),
        (f16, -65520.0, 0xFC00),
        (f16, 2.0**-24, 0x0001),
        (f16, 2.0**-25, 0x0000),
        (f16, -(2.0**-25) * (1 + 2.0**-23), 0x8001),
        (f16, 3 * 2.0**-25, 0x0002),
        (f16, 2.0**-14 - 2.0**-26, 0x0400),  # the greatest subnormal's neighbour rounds up into the normals
        (f16, 1e-40, 0x0000),
        (f16, float("-inf"), 0xFC00),
        (f16, float("nan"), 0x7E00),
    ],
)
def test_stores_known_patterns(dtype: torch.dtype, value: float, pattern: int) -> None:
    """Worked by hand; the independent rounding above agrees with them too."""
    (found,) = stored([torch.tensor([value])], dtype)
    assert int(found.view(torch.int16)) & 0xFFFF == pattern
    assert int(rounded(np.array([value], dtype=np.float32), dtype)[0]) == pattern
    memory = torch.zeros(1, dtype=dtype)
    reference.store(memory, torch.tensor([value]))
    assert int(memory.view(torch.int16)) & 0xFFFF == pattern


@pytest.mark.parametrize("dtype", HALVES)
def test_loads_as_gradient(dtype: torch.dtype, isa: str) -> None:
    """A float32 parameter at -0 becomes minus the gradient."""
    grads = pieces(patterns(dtype))
    params = [torch.nn.Parameter(torch.full(g.shape, -0.0)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad_dtype = dtype
        p.grad = g
    wd_kernels.SGDW(params, lr=1.0, backend="cpu").step()
    expected = -torch.from_numpy(widened(dtype))
    assert_same_bits(params[0].detach(), expected, "all patterns")
    assert_same_bits(torch.cat([p.detach() for p in params[1:]]), expected[: sum(SIZES)], "pieces")


@pytest.mark.parametrize("dtype", HALVES)
def test_loads_as_parameter(dtype: torch.dtype, isa: str) -> None:
    """With L2 decay of 1 the momentum buffer becomes the parameter; frozen weights keep all their bits, NaN too."""
    params = [torch.nn.Parameter(p) for p in pieces(patterns(dtype).clone())]
    opt = wd_kernels.SGDW(params, lr=0.0, momentum=0.5, weight_decay=1.0, decay="l2", backend="cpu")
    for p in params:
        p.grad = torch.full_like(p, -0.0)
        opt.state[p] = {"step": torch.tensor(1.0), "momentum_buffer": torch.full(p.shape, -0.0)}
    opt.step()
    expected = torch.from_numpy(widened(dtype))
    assert_same_bits(opt.state[params[0]]["momentum_buffer"], expected, "all patterns")
    assert_same_bits(params[0].detach(), patterns(dtype), "frozen parameter")
    found = torch.cat([opt.state[p]["momentum_buffer"] for p in params[1:]])
    assert_same_bits(found, expected[: sum(SIZES)], "pieces")


@pytest.mark.parametrize("dtype", HALVES)
def test_load_then_store_keeps_every_pattern(dtype: torch.dtype, isa: str) -> None:
    """Along a gradient of zero all numbers keep their bits."""
    p = torch.nn.Parameter(patterns(dtype).clone())
    p.grad = torch.zeros_like(p)
    wd_kernels.SGDW([p], lr=0.5, backend="cpu").step()
    found = p.detach().view(torch.int16).int() & 0xFFFF
    expected = torch.arange(65536, dtype=torch.int32)
    expected[~patterns(dtype).isfinite()] = CANONICAL_NAN[dtype]  # decay 0 times infinity is NaN, by the rule
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_reference_loads_and_stores(dtype: torch.dtype) -> None:
    values = hard_values(dtype)
    memory = torch.empty(len(values), dtype=dtype)
    reference.store(memory, torch.from_numpy(values))
    assert np.array_equal(memory.view(torch.int16).numpy().view(np.uint16), rounded(values, dtype))
    assert_same_bits(reference.load(patterns(dtype), f32), torch.from_numpy(widened(dtype)))


@pytest.mark.parametrize("dtype", HALVES)
def test_accumulates_in_float32(dtype: torch.dtype) -> None:
    """Decay and update are summed in float32 and rounded once: each alone is too small to move the parameter."""
    ulp = 2.0**-7 if dtype == bf16 else 2.0**-10
    p = torch.nn.Parameter(torch.full((40,), 1 + ulp, dtype=dtype))
    p.grad_dtype = f32
    opt = wd_kernels.SGDW([p], lr=0.4 * ulp, weight_decay=0.9, backend="cpu")
    p.grad = torch.full((40,), 0.9)  # decay and update: 0.36 ulp each
    opt.step()
    assert bool((p == 1).all())
