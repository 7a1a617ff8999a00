"""Covering arrays: of wide products of options, few cases in which every pair of values meets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

try:
    from allpairspy import AllPairs
except ImportError:  # a machine with a GPU may have no network to bring it
    AllPairs = None

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
    if AllPairs is None:
        return _in_turn(options, allowed)

    def possible(row: Sequence[Any]) -> bool:  # of a row that may be incomplete: what is missing may be anything
        return len(row) < len(names) or allowed(dict(zip(names, row, strict=True)))

    found = [dict(zip(names, row, strict=True)) for row in AllPairs(list(options.values()), possible, n=strength)]
    return _varied(found, options, allowed) if strength == 2 else found


def _varied(
    found: list[dict[str, Any]], options: Mapping[str, Sequence[Any]], allowed: Callable[[Mapping[str, Any]], bool]
) -> list[dict[str, Any]]:
    """The same, with values in turn where any would do: the library repeats one."""

    def pairs(case: Mapping[str, Any], name: str) -> list[Any]:
        own = options[name].index(case[name])
        return [(name, own, other, options[other].index(case[other])) for other in options if other != name]

    met = Counter(pair for case in found for name in options for pair in pairs(case, name))
    for k, case in enumerate(found):
        for name, values in options.items():
            before = case[name]
            after = {**case, name: values[(k * 7 + k // len(values)) % len(values)]}
            if after[name] != before and allowed(after) and all(met[pair] > 1 for pair in pairs(case, name)):
                for of, change in ((case, -1), (after, 1)):
                    for pair in pairs(of, name):
                        met[pair] += change
                        met[pair[2], pair[3], pair[0], pair[1]] += change
                case[name] = after[name]
    return found


def _in_turn(
    options: Mapping[str, Sequence[Any]], allowed: Callable[[Mapping[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Without the library: every pair of the first two options, with all others in turn."""
    first, second, *others = options
    found = []
    for k, (a, b) in enumerate(itertools.product(options[first], options[second])):
        more = {name: options[name][(k // (i + 1) + k) % len(options[name])] for i, name in enumerate(others)}
        found.append({first: a, second: b, **more})
    return [case for case in found if allowed(case)]


def pairs_of(cases: Sequence[Mapping[str, Any]]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """Every pair of values of different options that meets in some case, by their names."""
    found = set()
    for case in cases:
        own = [(name, repr(value)) for name, value in case.items()]
        found |= {(a, b) for i, a in enumerate(own) for b in own[i + 1 :]}
    return found
