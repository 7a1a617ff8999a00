"""Bytes that a step must move, of ours by wd_kernels.byte_model, and of others' by what their states are stored in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from internals import KINDS

from wd_kernels.byte_model import Stored

#: How many states each rule has.
STATES = {kind: len(states) for kind, (_, states) in KINDS.items()}
BLOCK, SHORTEST = 256, 4096  # elements that share a float32 scale; shorter tensors are not quantised


def step_bytes(
    rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype, master: torch.dtype | None = None
) -> float:
    """Bytes per parameter and step, all states being of one dtype."""
    moved = Stored(param, grad, (state,) * STATES[rule], master).step_bytes
    return int(moved) if moved.is_integer() else moved


def _blocks(plain: int, n: int, numel: int | None, tail: bool) -> float:
    """Bytes of `n` quantised states; `plain` ones where the tensor is short, or has a tail and that is not allowed."""
    numel = BLOCK * SHORTEST if numel is None else numel
    if numel < SHORTEST or (numel % BLOCK and not tail):
        return plain
    return n * (1 + 4 * -(-numel // BLOCK) / numel)


#: Bytes of all states of a parameter by their format: of `n` states, a parameter of `size` bytes, and the elements of
#: its tensor, where these decide; None stands for a long tensor.
STATE_FORMATS: dict[str, Callable[[int, int, int | None], float]] = {
    "float32": lambda n, size, numel: 4 * n,
    "float32 or wider": lambda n, size, numel: n * max(4, size),  # ours: the type of the arithmetic
    "own dtype": lambda n, size, numel: n * size,
    "compensated": lambda n, size, numel: (n + (size == 2)) * size,  # Kahan's, beside a 16-bit parameter
    "8 bits or own dtype": lambda n, size, numel: _blocks(n * size, n, numel, tail=False),
    "8 bits or float32": lambda n, size, numel: _blocks(4 * n, n, numel, tail=True),
    # A byte each and a float16 scale for 32 of them; 8 more bits of a 16-bit parameter.
    "companded": lambda n, size, numel: n * (1 + 2 / 32) + (size == 2),
}
