"""Bytes that a step must move: what each role's format costs to read and to write.

A parameter and its states are read and written, a gradient is read. Dividing by the time of a step gives a rate that
can be held against the machine's memory, and that is comparable between optimizers of different formats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: States of each rule.
STATES = {"adamw": 2, "adamw amsgrad": 3, "sgdw": 1, "sgdw without momentum": 0, "adagradw": 1}
BLOCK, SHORTEST = 256, 4096  # elements that share a float32 scale; shorter tensors are not quantised


def step_bytes(rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> int:
    """Bytes per parameter and step, all states being of one dtype."""
    return 2 * param.itemsize + grad.itemsize + 2 * STATES[rule] * state.itemsize


def _whole_blocks(n: int, size: int, numel: int | None) -> float:
    short_or_with_a_tail = numel is not None and (numel < SHORTEST or numel % BLOCK != 0)
    return n * size if short_or_with_a_tail else n * (1 + 4 / BLOCK)


def _blocks(n: int, size: int, numel: int | None) -> float:
    if numel is not None and numel < SHORTEST:
        return 4 * n
    return n * (1 + 4 * (-(-numel // BLOCK) / numel if numel else 1 / BLOCK))


#: Bytes of all states of a parameter by their format: of `n` states, a parameter of `size` bytes, and the elements of
#: its tensor, where these decide; None stands for a long tensor.
STATE_FORMATS: dict[str, Callable[[int, int, int | None], float]] = {
    "float32": lambda n, size, numel: 4 * n,
    "float32 or wider": lambda n, size, numel: n * max(4, size),  # ours: the type of the arithmetic
    "own dtype": lambda n, size, numel: n * size,
    "compensated": lambda n, size, numel: (n + (size == 2)) * size,  # Kahan's, beside a 16-bit parameter
    "8 bits or own dtype": _whole_blocks,
    "8 bits or float32": _blocks,
    # A byte each and a float16 scale for 32 of them; 8 more bits of a 16-bit parameter.
    "companded": lambda n, size, numel: n * (1 + 2 / 32) + (size == 2),
}
