"""Covering arrays: of wide products of options, few cases in which every pair of values meets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from allpairspy import AllPairs

__all__ = ["covering", "pairs_of"]


def covering(
    options: Mapping[str, Sequence[Any]],
    allowed: Callable[[Mapping[str, Any]], bool] = lambda case: True,
    strength: int = 2,
) -> list[dict[str, Any]]:
    """Cases (a value for each option) in which every `strength` values of different options meet at least once.

    Combinations of which no complete case is `allowed` are left out. The result is the same in every run.

    >>> len(covering({"a": range(3), "b": range(4), "c": range(2), "d": range(2)})), 3 * 4 * 2 * 2
    (12, 48)
    """
    names = list(options)

    def possible(row: Sequence[Any]) -> bool:  # of a row that may be incomplete: what is missing may be anything
        return len(row) < len(names) or allowed(dict(zip(names, row, strict=True)))

    return [dict(zip(names, row, strict=True)) for row in AllPairs(list(options.values()), possible, n=strength)]


def pairs_of(cases: Sequence[Mapping[str, Any]]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """Every pair of values of different options that meets in some case, by their names."""
    found = set()
    for case in cases:
        own = [(name, repr(value)) for name, value in case.items()]
        found |= {(a, b) for i, a in enumerate(own) for b in own[i + 1 :]}
    return found
