"""Sums that are exact, and so the same in any order, of any number of processes (numerics, section 7).

A sum is a row of `WORDS` int64: digits of 32 bits, of which the lowest is worth 2^-1074, each in a word that takes 2^31
summands before it overflows; then how many summands were infinite, and how many were NaN. Rows are added word by word.
csrc/sums.h has the same words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["WORDS", "add", "scattered", "value", "values"]

DIGITS, INFINITIES, NANS, WORDS = 68, 68, 69, 70
MASK = 0xFFFFFFFF  # a digit's largest value
_ONE = 1 << 1074  # a digit of 1, in units of the lowest


def add(words: Tensor, values: Iterable[float]) -> None:
    """Adds float64 numbers >= 0 to a sum, int64 [WORDS], in place."""
    whole, infinities, nans = 0, 0, 0
    for x in values:
        if math.isnan(x):
            nans += 1
        elif math.isinf(x):
            infinities += 1
        else:
            numerator, denominator = x.as_integer_ratio()
            whole += numerator * (_ONE // denominator)
    digits = [(whole >> 32 * k) & 0xFFFFFFFF for k in range(DIGITS)]
    words += words.new_tensor([*digits, infinities, nans])


def value(words: Tensor) -> float:
    """The sum, rounded once to nearest even.

    >>> import torch
    >>> words = torch.zeros(WORDS, dtype=torch.int64)
    >>> add(words, [1e16, 1.0, 1.0])
    >>> value(words), 1e16 + 1.0 + 1.0
    (1.0000000000000002e+16, 1e+16)
    """
    *digits, infinities, nans = words.tolist()
    if nans or infinities:
        return math.nan if nans else math.inf
    try:
        whole: int = sum(digit << 32 * k for k, digit in enumerate(digits))
        return whole / _ONE
    except OverflowError:
        return math.inf


def values(words: Tensor) -> Tensor:
    """The same of many sums, int64 [n, WORDS] to float64 [n], on whatever device they are, without waiting for it."""
    digits = words[:, :DIGITS]
    digits = (digits & MASK) + _one_up(digits >> 32)  # below 2^33
    digits = (digits & MASK) + _one_up(digits >> 32)  # 2^32 at most: what is that carries 1, through any that are MASK
    places = torch.arange(DIGITS, device=words.device)
    ends = torch.where(digits != MASK, places, -1).cummax(1).values  # the last up to here that carries nothing on
    carried = (digits > MASK).long().gather(1, ends.clamp(min=0)) * (ends >= 0)
    digits = (digits + _one_up(carried)) & MASK
    place = torch.where(digits != 0, places, 0).amax(1, keepdim=True)
    at = place - torch.arange(3, device=words.device)
    top, second, third = (digits.gather(1, at.clamp(min=0)) * (at >= 0)).unbind(1)
    rest = ((digits != 0) & (places < place - 2)).any(1)
    upper = ((top << 21) | (second >> 11)).double()
    lower = (((second & 0x7FF) << 33) | (third << 1) | rest).double()
    exponent = 32 * place[:, 0] - 1139
    first = exponent.clamp(-1000, 1000)
    found = (upper * 2.0**44 + lower) * _power_of_2(first) * _power_of_2(exponent - first)
    found = torch.where(words[:, INFINITIES] != 0, math.inf, found)
    return torch.where(words[:, NANS] != 0, math.nan, found)


def scattered(values: Tensor, slots: Tensor, n: int) -> Tensor:
    """The sums of float64 numbers >= 0 by their slots, on whatever device they are: [k] and [k] to int64 [n, WORDS].

    A number is three digits from one on, or one to a count, as `summand_of` in csrc/sums.h has it.
    """
    bits = values.view(torch.int64)
    exponent = (bits >> 52) & 0x7FF
    significand = (bits & ((1 << 52) - 1)) | ((exponent != 0).long() << 52)
    at = (exponent - 1).clamp(min=0)
    shift = at & 31
    low, high = (significand & MASK) << shift, (significand >> 32) << shift
    middle = (low >> 32) + (high & MASK)
    digits = (low & MASK, middle & MASK, (high >> 32) + (middle >> 32))
    special = exponent == 0x7FF
    count = torch.where(values.isnan(), NANS, INFINITIES)
    first = slots * WORDS + torch.where(special, count, at >> 5)
    words = values.new_zeros(n * WORDS, dtype=torch.int64)
    for k, digit in enumerate(digits):
        own = torch.where(special, int(k == 0), digit)
        words.index_add_(0, first + torch.where(special, 0, k), own)
    return words.view(n, WORDS)


def _one_up(carried: Tensor) -> Tensor:
    """Each to the next digit; nothing comes out of the last."""
    return torch.nn.functional.pad(carried[:, :-1], (1, 0))


def _power_of_2(n: Tensor) -> Tensor:
    return ((n + 1023) << 52).view(torch.float64)
