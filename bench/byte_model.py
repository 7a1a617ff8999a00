"""Bytes that a step must move: what each role's format costs to read and to write.

A parameter and its states are read and written, a gradient is read. Dividing by the time of a step gives a rate that
can be held against the machine's memory, and that is comparable between optimizers of different formats.
"""

from __future__ import annotations

import torch

from wd_kernels.storage import state_dtype

__all__ = ["STATES", "step_bytes", "torch_bytes", "wd_kernels_bytes"]

#: States of each rule.
STATES = {"adamw": 2, "adamw amsgrad": 3, "sgdw": 1, "sgdw without momentum": 0}


def step_bytes(rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> int:
    """Bytes per parameter and step.

    >>> step_bytes("adamw", torch.bfloat16, torch.bfloat16, torch.float32)
    22
    """
    return 2 * param.itemsize + grad.itemsize + 2 * STATES[rule] * state.itemsize


def wd_kernels_bytes(rule: str, param: torch.dtype) -> int:
    """As wd_kernels keeps them: gradients in the parameter's dtype, states in its arithmetic type."""
    return step_bytes(rule, param, param, state_dtype(param))


def torch_bytes(rule: str, param: torch.dtype) -> int:
    """As torch.optim keeps them: everything in the parameter's dtype."""
    return step_bytes(rule, param, param, param)
