"""The measurement: contenders step in turns, so that the machine's moods hit all of them.

A round gives every contender a turn (A B C, A B C, ...); a turn is one step or several of one contender. What a
training loop does between two steps (new gradients, another lr) happens before each step, outside of the timed region.
All contenders have the same share of the time: one whose steps are long takes part in the first rounds only, and
quotients are of rounds that both have.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from contenders import Contender, build
from cpu_cases import Case, free_memory
from peers import Peer, first_line

__all__ = ["LEAST_ROUNDS", "ROUNDS", "Turns", "measure"]

ROUNDS, LEAST_ROUNDS, MOST_STEPS = 15, 3, 50
SHORT = 5e-3  # seconds of a step before which the caches are warmed by an untimed one
MOST_MEMORY = 0.92  # of what is free


@dataclass
class Turns:
    """What was measured of one contender: seconds of each of its turns, in the order of the rounds.

    Attributes:
        inside: of these seconds, those that passed inside of launches, where they are timed.
    """

    contender: str
    groups: int
    bytes_per_parameter: float
    steps: int
    seconds: list[float]
    inside: list[float]


def turn(contender: Contender, steps: int, warm: bool = False) -> tuple[float, float]:
    """Seconds of `steps` steps, and of their launches; where `warm`, after a step that does not count."""
    if warm:
        contender.prepare()
        contender.step()
    before = contender.inside() if contender.inside else 0.0
    total = 0.0
    for _ in range(steps):
        contender.prepare()
        started = time.perf_counter()
        contender.step()
        total += time.perf_counter() - started
    return total, contender.inside() - before if contender.inside else 0.0


@contextmanager
def _surroundings(threads: int) -> Iterator[None]:
    """No garbage collection, and a number of threads (0: as it is)."""
    had = torch.get_num_threads()
    torch.set_num_threads(threads or had)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(had)


def plan(one: float, share: float) -> tuple[int, int]:
    """Rounds, and steps of a turn, of a contender whose step takes `one` second, in a share of the time.

    >>> plan(0.001, 1.0), plan(0.2, 1.0), plan(2.0, 1.0)
    ((15, 50), (5, 1), (3, 1))
    """
    rounds = min(max(round(share / one), LEAST_ROUNDS), ROUNDS)
    return rounds, min(max(round(share / (rounds * one)), 1), MOST_STEPS)


def measure(
    case: Case,
    peers: dict[Peer, Callable[..., Any]],
    names: Sequence[tuple[str, int]],
    seconds: float,
    tick: Callable[[], Any] = lambda: None,
) -> tuple[list[Turns], dict[str, str]]:
    """Measures the contenders of a case in turns, for about `seconds`; calls `tick` after each of the rounds.

    Returns their turns, and why others have none, by name. Nothing of the case is alive afterwards.
    """
    free = free_memory()
    if free is not None and case.bytes_needed > MOST_MEMORY * free:
        needed = f"needs {case.bytes_needed / 2**30:.3g} GiB, free are {free / 2**30:.3g}"
        return [], {name: needed for name, _ in names}
    with _surroundings(case.threads):
        them, skipped = build(case, peers, names)
        share = seconds / max(len(them), 1)
        results: list[tuple[Contender, int, Turns]] = []
        for c in them:
            one = turn(c, 1, warm=True)[0]  # the first step after the others were made finds its table out of date
            if one < SHORT:
                one = turn(c, 3)[0] / 3
            rounds, steps = plan(one, share)
            results.append((c, rounds, Turns(c.name, c.groups, c.bytes_per_parameter, steps, [], [])))
        end = time.perf_counter() + 2 * seconds
        for done in range(ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            for c, rounds, own in results[:: -1 if done % 2 else 1]:  # whom each comes after changes
                if done >= rounds:
                    continue
                try:
                    total, inside = turn(c, own.steps, warm=own.steps > 1)
                except Exception as error:
                    skipped[c.name] = first_line(error)
                    results.remove((c, rounds, own))
                    continue
                own.seconds.append(total)
                if c.inside:
                    own.inside.append(inside)
            tick()
        return [own for _, _, own in results], skipped
