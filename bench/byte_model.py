"""Bytes that a step must move: what each role's format costs to read and to write.

A parameter and its states are read and written, a gradient is read. Dividing by the time of a step gives a rate that
can be held against the machine's memory, and that is comparable between optimizers of different formats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from internals import KINDS, has_scales

#: How many states each rule has.
STATES = {kind: len(states) for kind, (_, states) in KINDS.items()}
BLOCK, SHORTEST = 256, 4096  # elements that share a float32 scale; shorter tensors are not quantised


def step_bytes(
    rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype, master: torch.dtype | None = None
) -> float:
    """Bytes per parameter and step, all states being of one dtype.

    A float32 master is read in place of the parameter, a remainder beside it; both are written. States in 8 bits have a
    scale of a byte for every 32.
    """
    read = 0 if master == torch.float32 else param.itemsize
    parts = 0 if master is None else 2 * master.itemsize
    each = state.itemsize + (1 / 32 if has_scales(state) else 0)
    return read + param.itemsize + parts + grad.itemsize + 2 * STATES[rule] * each


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
