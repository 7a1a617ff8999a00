"""Cases, contenders, and the measurement: contenders step in turns, so that the machine's moods hit all of them.

A round gives every contender a turn (A B C, A B C, ...); a turn is several steps of one contender. What a training
loop does between two steps (new gradients, another lr) happens before each step, outside of the timed region.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from byte_model import torch_bytes, wd_kernels_bytes
from torch import Tensor

import wd_kernels
from wd_kernels.table import TensorTable

__all__ = ["BARE_LOOP", "CASES", "LEAST_ROUNDS", "OPTIMIZERS", "ROUNDS", "Case", "Contender", "Turns", "measure"]

ROUNDS, LEAST_ROUNDS = 15, 5
BARE_LOOP = "bare loop"
#: Name, bytes per parameter, and constructor.
OPTIMIZERS: dict[str, tuple[Callable[[str, torch.dtype], int], Callable[..., torch.optim.Optimizer]]] = {
    "wd_kernels": (wd_kernels_bytes, wd_kernels.AdamW),
    "torch fused": (torch_bytes, partial(torch.optim.AdamW, fused=True)),
    "torch foreach": (torch_bytes, partial(torch.optim.AdamW, foreach=True)),
}
_KIBI = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}
_PATTERN = re.compile(r"(\d+)x(\d+)(|Ki|Mi)-(\w+)-(kept|new)(?:-(\d+)groups-(constant|changing))?")


@dataclass(frozen=True)
class Case:
    """Tensors to step, and what happens between steps.

    Attributes:
        gradients: "kept": the same tensors every step; "new": every step has new gradients at new addresses.
        groups: where over 1, every optimizer runs with one group of all tensors and with this many groups.
        lr: "constant", or "changing" in every group before every step.
    """

    tensors: int
    elements: int
    dtype: torch.dtype = torch.float32
    gradients: str = "kept"
    groups: int = 1
    lr: str = "constant"

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that prints as `text`, such as 300x100000-float32-new or 465x256-float32-kept-465groups-changing."""
        found = _PATTERN.fullmatch(text)
        dtype = getattr(torch, found[4], None) if found else None
        if found is None or not isinstance(dtype, torch.dtype):
            raise ValueError(f"case {text!r}: expected TENSORSxELEMENTS-DTYPE-kept|new[-Ngroups-constant|changing]")
        size = int(found[2]) * _KIBI[found[3]]
        return cls(int(found[1]), size, dtype, found[5], int(found[6] or 1), found[7] or "constant")

    @property
    def size(self) -> str:
        """Tensors x elements, as people say it."""
        mebi, rest = divmod(self.elements, 1 << 20)
        return f"{self.tensors}x{self.elements if rest or not mebi else f'{mebi}Mi'}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def contenders(self) -> list[tuple[str, int]]:
        """(name, number of groups) of all that step this case."""
        pairs = [(name, groups) for groups in sorted({1, self.groups}) for name in OPTIMIZERS]
        return pairs if self.groups > 1 else [*pairs, (BARE_LOOP, 1)]

    def __str__(self) -> str:
        groups = f"-{self.groups}groups-{self.lr}" if self.groups > 1 else ""
        return f"{self.size}-{self.dtype_name}-{self.gradients}{groups}"


CASES = [
    *map(Case.parse, ("1x64Mi-float32-kept", "1x64Mi-bfloat16-kept")),
    *(
        Case(tensors, elements, dtype, gradients)
        for tensors, elements, dtype in (
            (300, 100_000, torch.float32),
            (2000, 4096, torch.float32),
            (2000, 256, torch.float32),
            (1000, 1000, torch.float32),
            (1000, 1000, torch.bfloat16),
        )
        for gradients in ("kept", "new")
    ),
    Case(465, 256, groups=465, lr="constant"),
    Case(465, 256, groups=465, lr="changing"),
]


@dataclass
class Contender:
    """One optimizer on tensors of its own: `prepare` is what comes before each `step`, untimed."""

    name: str
    groups: int
    bytes_per_parameter: int
    prepare: Callable[[], None]
    step: Callable[[], object]

    def turn(self, steps: int) -> float:
        """Seconds of `steps` steps."""
        total = 0.0
        for _ in range(steps):
            self.prepare()
            started = time.perf_counter()
            self.step()
            total += time.perf_counter() - started
        return total


@dataclass
class Turns:
    """What was measured of one contender: seconds of each of its turns, in the order of the rounds."""

    contender: str
    groups: int
    bytes_per_parameter: int
    steps: int
    seconds: list[float]


def build(case: Case) -> list[Contender]:
    """All contenders of a case, each with its own copies of the same tensors."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(case.elements, generator=generator).to(case.dtype) for _ in range(case.tensors)]
    slopes = [torch.randn(case.elements, generator=generator).to(case.dtype) for _ in range(case.tensors)]
    result = []
    for name, groups in case.contenders:
        if name == BARE_LOOP:
            result.append(bare_loop(case, values, slopes))
            continue
        moved, construct = OPTIMIZERS[name]
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = construct([{"params": params[i::groups]} for i in range(groups)], lr=1e-3, weight_decay=0.1)
        prepare = _between(case, optimizer, params, slopes)
        result.append(Contender(name, groups, moved("adamw", case.dtype), prepare, optimizer.step))
    return result


def _between(
    case: Case, optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], slopes: list[Tensor]
) -> Callable[[], None]:
    """What happens before each step of an optimizer."""
    for p, slope in zip(params, slopes, strict=True):
        p.grad = slope.clone()
    steps = 0

    def prepare() -> None:
        nonlocal steps
        steps += 1
        if case.gradients == "new":  # all new ones are made before the old are freed: no address stays
            for p, grad in zip(params, [slope.clone() for slope in slopes], strict=True):
                p.grad = grad
        if case.lr == "changing":
            for g, group in enumerate(optimizer.param_groups):
                group["lr"] = 1e-3 * (1 + g / 1000) / (1 + steps / 1000)

    return prepare


def bare_loop(case: Case, values: list[Tensor], slopes: list[Tensor]) -> Contender:
    """The floor: the backend's launch alone, on one flat buffer of as many elements; nothing is checked or counted."""
    p = torch.nn.Parameter(torch.cat(values))
    p.grad = torch.cat(slopes)
    optimizer = wd_kernels.AdamW([p], lr=1e-3, weight_decay=0.1)
    optimizer.step()
    table = optimizer._table
    (bucket,) = table.buckets
    rows = optimizer.rule.rows(optimizer.rule.hypers(optimizer.param_groups), [(0, 2, False)])
    grad, again = p.grad, p.grad.clone() if case.gradients == "new" else None

    def prepare() -> None:
        if again is not None:  # as warm as the others' new gradients
            grad.copy_(again)

    moved = wd_kernels_bytes("adamw", case.dtype)
    (launch,) = bucket.backend.prepare(table, [bucket], rows)

    def step(table: TensorTable = table) -> None:  # which holds what the launch has only the addresses of
        launch()

    return Contender(BARE_LOOP, 1, moved, prepare, step)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(case: Case, seconds: float, tick: Callable[[], Any] = lambda: None) -> list[Turns]:
    """Measures all contenders of a case in turns, for about `seconds`; calls `tick` after each of the rounds.

    A turn has at least 3 steps; on a slow or busy machine there are fewer rounds, at least 5. Nothing of the case is
    alive afterwards.
    """
    them = build(case)
    with _no_collection():
        for contender in them:
            contender.turn(3)  # makes the states, fills the caches of the allocator
        started = time.perf_counter()
        for contender in them:
            contender.turn(2)
        one = (time.perf_counter() - started) / 2
        steps = min(max(int(seconds / (ROUNDS * one)), 3), 50)
        turns: list[list[float]] = [[] for _ in them]
        end = time.perf_counter() + 2 * seconds
        for done in range(ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            for contender, own in zip(them, turns, strict=True):
                own.append(contender.turn(steps))
            tick()
    return [Turns(c.name, c.groups, c.bytes_per_parameter, steps, own) for c, own in zip(them, turns, strict=True)]
