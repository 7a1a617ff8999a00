"""The comparisons that the other tests rest on: what they tell apart, and what they take for the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bits import assert_same_bits, assert_untouched, bits, raw
from torch import Tensor

QUIET, OTHER = 0x7FC00000, 0x7FC12345
both = pytest.mark.parametrize("assert_same", [assert_same_bits, assert_untouched])


def nan32(pattern: int) -> Tensor:
    return torch.tensor([1, pattern], dtype=torch.int32).view(torch.float32)


def nan16(pattern: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([1, pattern], dtype=torch.int16).view(dtype)


@both
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23])),
        (torch.tensor([math.nan]), torch.tensor([1.0])),
        (torch.complex(torch.ones(1), torch.zeros(1)), torch.complex(torch.ones(1), -torch.zeros(1))),
        (nan16(0x7FC1, torch.bfloat16), nan16(0x7FC2, torch.bfloat16)),
        (nan16(0x7E01, torch.float16), nan16(0x7E02, torch.float16)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2), torch.ones(2, 1)),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
    ],
    ids=["zeros", "last place", "NaN", "imaginary", "bfloat16", "float16", "dtype", "shape", "integers", "booleans"],
)
def test_what_differs(assert_same: Callable[..., None], a: Tensor, b: Tensor) -> None:
    assert_same(a, a.clone())
    assert_same(b, b.clone())
    with pytest.raises(AssertionError, match="here: "):
        assert_same(a, b, "here")


@both
def test_lazy_bits_and_strides_are_no_difference(assert_same: Callable[..., None]) -> None:
    z = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    for lazy in (z.conj(), torch._neg_view(z), z.mT, z.conj().imag, z.real, z[:, :1].expand(3, 4)):
        assert_same(lazy, lazy.resolve_conj().resolve_neg().contiguous())


def test_which_nan_it_is_matters_to_what_is_untouched_alone() -> None:
    assert_same_bits(nan32(QUIET), nan32(OTHER))
    assert_same_bits(torch.complex(*[nan32(QUIET)] * 2), torch.complex(*[nan32(OTHER)] * 2))
    assert_untouched(nan32(OTHER), nan32(OTHER))
    with pytest.raises(AssertionError, match="1 of 2 differ, first at 1"):
        assert_untouched(nan32(QUIET), nan32(OTHER))


@pytest.mark.parametrize("taken", [bits, raw])
def test_what_was_taken_stays(taken: Callable[[Tensor], Tensor]) -> None:
    """Of numbers that are written later."""
    for t in (torch.ones(3), torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.complex64)):
        before = taken(t)
        t.zero_()
        assert not torch.equal(taken(t), before)
