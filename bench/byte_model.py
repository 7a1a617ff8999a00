"""Bytes that a step must move: what each role's format costs to read and to write.

A parameter and its states are read and written, a gradient is read. Dividing by the time of a step gives a rate that
can be held against the machine's memory, and that is comparable between optimizers of different formats.

The functions named `..._states` are the formats that optimizers keep states in: bytes of all states of one parameter,
by rule, the parameter's dtype, and the elements of its tensor, where that decides. None stands for a long tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: States of each rule.
STATES = {"adamw": 2, "adamw amsgrad": 3, "sgdw": 1, "sgdw without momentum": 0}
States = Callable[[str, torch.dtype, "int | None"], float]

FLOAT32 = torch.float32.itemsize
BLOCK, SHORTEST = 256, 4096  # elements that share a scale; shorter tensors are not quantised


def step_bytes(rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> int:
    """Bytes per parameter and step, all states being of one dtype.

    >>> step_bytes("adamw", torch.bfloat16, torch.bfloat16, torch.float32)
    22
    """
    return 2 * param.itemsize + grad.itemsize + 2 * STATES[rule] * state.itemsize


def float32_states(rule: str, param: torch.dtype, numel: int | None) -> float:
    return STATES[rule] * FLOAT32


def own_dtype_states(rule: str, param: torch.dtype, numel: int | None) -> float:
    return STATES[rule] * param.itemsize


def our_states(rule: str, param: torch.dtype, numel: int | None) -> float:
    """In the type of the arithmetic, float32 or wider."""
    return STATES[rule] * max(param.itemsize, FLOAT32)


def kahan_states(rule: str, param: torch.dtype, numel: int | None) -> float:
    """In the parameter's dtype, and a compensation beside a 16-bit parameter."""
    return (STATES[rule] + (param.itemsize == 2)) * param.itemsize


def blockwise_states(rule: str, param: torch.dtype, numel: int | None) -> float:
    """A byte each, and a float32 scale a block; of short tensors and those with a tail, in the parameter's dtype."""
    if numel is not None and (numel < SHORTEST or numel % BLOCK):
        return own_dtype_states(rule, param, numel)
    return STATES[rule] * (1 + FLOAT32 / BLOCK)


def blockwise_states_or_float32(rule: str, param: torch.dtype, numel: int | None) -> float:
    """A byte each, and a float32 scale a block, the last of which may be short; of short tensors, float32."""
    if numel is not None and numel < SHORTEST:
        return float32_states(rule, param, numel)
    return STATES[rule] * (1 + FLOAT32 * (-(-numel // BLOCK) / numel if numel else 1 / BLOCK))


def companded_states(rule: str, param: torch.dtype, numel: int | None) -> float:
    """A byte each and a float16 scale for 32 of them; 8 more bits of a 16-bit parameter."""
    return STATES[rule] * (1 + torch.float16.itemsize / 32) + (param.itemsize == 2)
