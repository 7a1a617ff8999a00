"""Sums that are exact: of doubles in any order, on any number of processes; against fractions and math.fsum."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wd_kernels import sums

LEAST, GREATEST = 5e-324, 1.7976931348623157e308


def words_of(values: list[float]) -> Tensor:
    words = torch.zeros(sums.WORDS, dtype=torch.int64)
    sums.add(words, values)
    return words


def both(words: Tensor) -> float:
    """The value, which is found in two ways."""
    one, many = sums.value(words), sums.values(words[None]).item()
    assert one == many or (math.isnan(one) and math.isnan(many)), (one, many)
    return one


numbers = st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)


@given(st.lists(numbers, max_size=40), st.randoms(use_true_random=False))
def test_the_sum_is_the_exact_one_rounded_once(values: list[float], random: random.Random) -> None:
    try:
        expected = math.fsum(values)
    except OverflowError:
        expected = math.inf
    words = words_of(values)
    assert both(words) == expected
    cut = random.randint(0, len(values))
    shuffled = random.sample(values, len(values))
    assert both(words_of(shuffled[:cut]) + words_of(shuffled[cut:])) == expected


@pytest.mark.parametrize(
    "values",
    [
        [], [0.0], [LEAST], [LEAST] * 3, [2.0**-1022, LEAST], [2.0**-1022 - LEAST, LEAST], [1.0, 2.0**-53],
        [1.0, 2.0**-53, LEAST], [1.0 + 2.0**-52, 2.0**-53], [GREATEST], [GREATEST, 2.0**969], [GREATEST, 2.0**970],
        [GREATEST, GREATEST], [2.0**1023] * 4, [2.0**52] * 2**10, [2.0**31 - 2.0**-22] * 1000,
        [1.0 - 2.0**-53, 2.0**-54], [2.0**k for k in range(-1074, 1023, 32)], [2.0**-1022 * (1 + 2.0**-52), LEAST / 2],
    ],
    ids=str,
)  # fmt: skip
def test_ties_ends_and_carries(values: list[float]) -> None:
    exact = sum((Fraction(x) for x in values), Fraction(0))
    try:
        expected = float(exact)
    except OverflowError:
        expected = math.inf
    assert both(words_of(values)) == expected


def test_words_that_are_full() -> None:
    """Each took some 2^31 summands: what a digit has too much is carried, over all digits above."""
    words = torch.zeros(sums.WORDS, dtype=torch.int64)
    words[30:40] = 2**62
    words[40] = 2**32 - 1
    exact = sum(Fraction(int(word)) * 2 ** (32 * k) for k, word in enumerate(words[: sums.DIGITS])) / 2**1074
    assert both(words) == float(exact)
    words[28:67] = 0xFFFFFFFF
    words[28] = 2**32
    assert both(words) == math.inf  # the carry runs through
    words[60:67] = 0
    assert both(words) == float(Fraction(2) ** (32 * 60 - 1074))


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0, math.inf], math.inf), ([math.nan, 1.0], math.nan), ([math.inf, math.nan], math.nan)]
)
def test_what_is_no_number(values: list[float], expected: float) -> None:
    found = both(words_of(values))
    assert found == expected or (math.isnan(found) and math.isnan(expected))
