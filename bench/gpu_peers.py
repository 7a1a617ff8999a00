"""The contenders of bench/gpu.py: how each is imported and made, what it keeps of a parameter, which dtypes it takes.

What is not installed is named as missing, with its ImportError. Formats of other libraries' states are those of their
defaults, as their documentation has them: the rates of their steps are as good as that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from byte_model import STATES, step_bytes

from wd_kernels.storage import state_dtype

__all__ = ["FUSED", "OURS", "PEERS", "Peer", "first_line", "load"]

OURS, FUSED = "wd_kernels", "torch fused"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LR, WEIGHT_DECAY = 1e-3, 0.1
MOMENTUM = {"momentum": 0.9}


def float32_states(rule: str, param: torch.dtype) -> float:
    """Bytes of the states of one parameter, kept in float32."""
    return STATES[rule] * F32.itemsize


def own_dtype_states(rule: str, param: torch.dtype) -> float:
    return STATES[rule] * param.itemsize


def kahan_states(rule: str, param: torch.dtype) -> float:
    """In the parameter's dtype, and a compensation beside a 16-bit parameter."""
    return (STATES[rule] + (param.itemsize == 2)) * param.itemsize


def blockwise_states(rule: str, param: torch.dtype) -> float:
    """A byte each, and a float32 scale for 256 of them."""
    return STATES[rule] * (1 + F32.itemsize / 256)


def companded_states(rule: str, param: torch.dtype) -> float:
    """A byte each and a float16 scale for 32 of them; 8 more bits of a 16-bit parameter."""
    return STATES[rule] * (1 + F16.itemsize / 32) + (param.itemsize == 2)


def our_states(rule: str, param: torch.dtype) -> float:
    return STATES[rule] * state_dtype(param).itemsize


@dataclass(frozen=True, eq=False)
class Peer:
    """One optimizer.

    Attributes:
        path: module and class, "package.module:Class".
        states: bytes of all states of one parameter, by rule and the parameter's dtype.
        mixed: takes gradients of another dtype than the parameter's.
        cpu: steps CPU tensors too, and so takes part in a rehearsal.
    """

    name: str
    rule: str
    path: str
    states: Callable[[str, torch.dtype], float]
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (F32, BF16)
    mixed: bool = False
    cpu: bool = False

    def grad_dtype(self, param: torch.dtype, grad: torch.dtype) -> torch.dtype:
        """Of the gradients that it is given where a case has `grad`."""
        return grad if self.mixed else param

    def bytes_per_parameter(self, param: torch.dtype, grad: torch.dtype) -> float:
        """What a step moves: parameter and states are read and written, the gradient is read."""
        without = step_bytes("sgdw without momentum", param, self.grad_dtype(param, grad), param)
        return without + 2 * self.states(self.rule, param)

    def make(self, cls: Callable[..., Any], groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(list(groups), lr=LR, weight_decay=WEIGHT_DECAY, **self.options)
        return optimizer


PEERS = (
    Peer(OURS, "adamw", "wd_kernels:AdamW", our_states, mixed=True, cpu=True),
    Peer(FUSED, "adamw", "torch.optim:AdamW", own_dtype_states, {"fused": True}, cpu=True),
    Peer("torch foreach", "adamw", "torch.optim:AdamW", own_dtype_states, {"foreach": True}, cpu=True),
    Peer("apex", "adamw", "apex.optimizers:FusedAdam", float32_states),
    Peer("TransformerEngine", "adamw", "transformer_engine.pytorch.optimizers:FusedAdam", float32_states),
    Peer("torch-optimi", "adamw", "optimi:AdamW", kahan_states),
    Peer("torchao 8-bit", "adamw", "torchao.optim:AdamW8bit", blockwise_states),
    Peer("bitsandbytes 8-bit", "adamw", "bitsandbytes.optim:AdamW8bit", blockwise_states),
    Peer("bitsandbytes 32-bit", "adamw", "bitsandbytes.optim:AdamW32bit", float32_states),
    Peer("flashoptim", "adamw", "flashoptim:FlashAdamW", companded_states),
    Peer(OURS, "sgdw", "wd_kernels:SGDW", our_states, MOMENTUM, mixed=True, cpu=True),
    Peer(FUSED, "sgdw", "torch.optim:SGD", own_dtype_states, MOMENTUM | {"fused": True}, cpu=True),
    Peer("torch foreach", "sgdw", "torch.optim:SGD", own_dtype_states, MOMENTUM | {"foreach": True}, cpu=True),
    Peer("apex", "sgdw", "apex.optimizers:FusedSGD", own_dtype_states, MOMENTUM),
    Peer("TransformerEngine", "sgdw", "transformer_engine.pytorch.optimizers:FusedSGD", own_dtype_states, MOMENTUM),
    Peer("torch-optimi", "sgdw", "optimi:SGD", kahan_states, MOMENTUM),
    Peer("flashoptim", "sgdw", "flashoptim:FlashSGDW", companded_states, MOMENTUM),
)


def first_line(error: BaseException) -> str:
    """An error as one short line."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


def load(peers: Sequence[Peer] = PEERS) -> tuple[dict[Peer, Callable[..., Any]], dict[str, str]]:
    """The classes of the peers that are there; and why the others are not, by name and class."""
    there: dict[Peer, Callable[..., Any]] = {}
    missing: dict[str, str] = {}
    for peer in peers:
        module, cls = peer.path.split(":")
        try:
            there[peer] = getattr(importlib.import_module(module), cls)
        except Exception as error:  # a broken installation may raise anything
            missing[f"{peer.name} {cls}"] = first_line(error)
    return there, missing
