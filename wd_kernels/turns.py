"""The measurement: contenders step in turns, so that the machine's moods hit all of them.

A round gives every contender a turn (A B C, C B A, A B C, ...). A turn is the same number of steps in each of the ways:
    wall    of steps one after another, the device awaited at the end; where something happens between steps (new
            gradients, another lr), that is not timed, and the device is awaited after each step.
    device  from the step's first kernel to its last, by events, on a cold L2 where the case could stay in it. The
            device is held back until the host has queued the step: gaps that the host leaves do not count, as far
            as a queue of about a thousand launches reaches.
    host    until step() returns, beginning on an idle device.
On the CPU the first is all there is. All contenders have the same share of the time: one of long steps takes part in
the first rounds only, and quotients are of rounds that both have.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Contender", "Timer", "filled", "first_line", "free_memory", "plan", "random_values", "rounds"]

ROUNDS, LEAST_ROUNDS, MOST_STEPS = 15, 3, 50
MOST_MEMORY = 0.92  # of what is free
FLUSHED_UNDER = 1 << 30  # cases of more bytes do not stay in any L2
CLOCK = 2e9  # cycles of a second, about: for how long the device is held back
LONGEST_HOLD = 0.25


def first_line(error: BaseException) -> str:
    """An error as one short line."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


def random_values(device: torch.device) -> Tensor:
    """A block of normal values that tensors are filled from: those of the largest would take minutes to draw."""
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device)


def filled(shape: tuple[int, ...], dtype: torch.dtype, values: Tensor) -> Tensor:
    """A tensor of a shape, on the device of `values`, which it repeats."""
    new = torch.empty(shape, dtype=dtype, device=values.device)
    for part in torch.split(new.view(-1), len(values)):
        part.copy_(values[: len(part)])
    return new


@dataclass(eq=False)
class Contender:
    """What is measured: one optimizer on tensors.

    Attributes:
        name, groups: what it is, and of how many parameter groups.
        bytes_per_parameter: that a step moves.
        step: takes one.
        prepare: what comes before each step, untimed.
        inside: seconds that its launches took so far, where they are timed from within.
        host: seconds of a step on the host, about.
    """

    name: str
    groups: int
    bytes_per_parameter: float
    step: Callable[[], object]
    prepare: Callable[[], object] | None = None
    inside: Callable[[], float] | None = None
    host: float = 0.0


class Timer:
    """Takes turns on a device: seconds per step, in each way. On the CPU every way is the wall clock."""

    def __init__(self, device: torch.device, ways: Sequence[str] = ("wall",), flush: int = 256 << 20) -> None:
        self.where, self.ways, self.on_device, self.cold = device, ways, device.type != "cpu", True
        self.buffer = torch.zeros(flush if self.on_device else 0, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.on_device:
            torch.cuda.synchronize()

    def _ready(self, contender: Contender) -> None:
        (contender.prepare or (lambda: None))()
        self.wait()

    def turn(self, contender: Contender, steps: int) -> dict[str, float]:
        """Seconds per step by way, and of "launches" where they are timed; after a step that warms the caches."""
        self._ready(contender)
        contender.step()
        before = contender.inside() if contender.inside else 0.0
        found: dict[str, float] = {way: getattr(self, way)(contender, steps) for way in self.ways}
        if contender.inside:
            found["launches"] = (contender.inside() - before) / steps
        return found

    def _steps(self, contender: Contender, steps: int, together: int, wait: bool) -> float:
        """Some together, after what comes before a step, and on an idle device; to where the device is idle again."""
        total = 0.0
        for _ in range(0, steps, together):
            self._ready(contender)
            started = time.perf_counter()
            for _ in range(together):
                contender.step()
            if wait:
                self.wait()
            total += time.perf_counter() - started
        if not wait:
            self.wait()
        return total / steps

    def wall(self, contender: Contender, steps: int) -> float:
        return self._steps(contender, steps, steps if contender.prepare is None else 1, wait=True)

    def host(self, contender: Contender, steps: int) -> float:
        return self._steps(contender, steps, 1, wait=False)

    def device(self, contender: Contender, steps: int) -> float:
        if not self.on_device:
            return self.wall(contender, steps)
        event = partial(torch.cuda.Event, enable_timing=True)
        pairs = [(event(), event()) for _ in range(steps)]
        for start, end in pairs:
            self._ready(contender)
            if self.cold:
                self.buffer.zero_()
            hold = min(1.5 * contender.host + 1e-4, LONGEST_HOLD)
            torch.cuda._sleep(int(CLOCK * hold))  # type: ignore[no-untyped-call]
            start.record()
            contender.step()
            end.record()
        self.wait()
        return sum(float(start.elapsed_time(end)) for start, end in pairs) / steps / 1e3

    def free(self) -> None:
        """Gives back the device's memory that nothing holds any more."""
        gc.collect()
        if self.on_device:
            torch.cuda.empty_cache()


def free_memory() -> int | None:
    """Bytes that programs can still take, as Linux estimates it; None where nobody says."""
    told = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+)", told.read_text()) if told.exists() else None
    return int(found[1]) << 10 if found else None


def plan(one: float, share: float, least: int = LEAST_ROUNDS, most: int = ROUNDS) -> tuple[int, int]:
    """Rounds, and steps of a turn, of a contender whose turn of one step takes `one` second, in a share of the time."""
    rounds = min(max(round(share / one), least), most)
    return rounds, min(max(round(share / (rounds * one)), 1), MOST_STEPS)


def rounds(
    them: list[Contender],
    skipped: dict[str, str],
    seconds: float,
    timer: Timer,
    elements: int,
    least: int = LEAST_ROUNDS,
    most: int = ROUNDS,
    after: Callable[[], object] = lambda: None,
) -> list[tuple[Contender, int, list[dict[str, float]]]]:
    """Contenders, steps of a turn, and their turns in about `seconds`; who fails drops out, and `skipped` says why.

    Args:
        elements: of all tensors.
        least, most: how many rounds there are.
        after: called after every round.
    """
    timer.cold = elements * max((c.bytes_per_parameter for c in them), default=0) < FLUSHED_UNDER
    end = 0.0
    turns: dict[Contender, list[dict[str, float]]] = {c: [] for c in them}
    plans: dict[Contender, tuple[int, int]] = {}
    for done in range(-1, most):  # the first finds how long a turn is
        if done == 0:
            end = time.perf_counter() + 1.5 * seconds
        if done >= least and time.perf_counter() > end:
            break
        for c in them[:: -1 if done % 2 else 1]:  # whom each comes after changes
            try:
                if done < 0:
                    timer.host(c, 1)  # after the others were made, a step finds its table out of date
                    c.host = timer.host(c, 1)
                    started = time.perf_counter()
                    timer.turn(c, 1)
                    steps = 1 + 1 / len(timer.ways)
                    plans[c] = plan((time.perf_counter() - started) / steps, seconds / len(turns), least, most)
                elif done < plans[c][0]:
                    turns[c].append(timer.turn(c, plans[c][1]))
            except Exception as error:
                skipped[c.name] = first_line(error)
                them.remove(c)
        after()
    return [(c, plans[c][1], turns[c]) for c in them]
