"""The optimizers that the benchmarks compare: how each is imported and made, what it keeps, what it takes and where.

What is not installed is named as missing, with its ImportError. Formats of other libraries' states are those of their
defaults: tests compare them with the tensors that they really keep, where a library is there. Options are chosen so
that all do the same mathematics where they can: decoupled decay scaled by lr, bias correction, torch's betas and eps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from byte_model import STATE_FORMATS, STATES
from internals import KINDS

from wd_kernels.turns import first_line

OURS, FUSED, FOREACH, DEEPSPEED = "wd_kernels", "torch fused", "torch foreach", "DeepSpeed CPU"
FLAT = f"{OURS} flat"  # on flat parameters
CUDA = f"{OURS} CUDA"  # by the CUDA library's kernels, where "auto" takes Triton's
LR, WEIGHT_DECAY = 1e-3, 0.1
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ALL, HALVES = (F32, BF16, F16, F64), (F32, BF16, F16)
EVERYWHERE, CPU = ("cpu", "cuda"), ("cpu",)
AS_TORCH = {"betas": (0.9, 0.999), "eps": 1e-8}


MOMENTUM = {"momentum": 0.9}
#: Options of the rules that are measured, of our classes and torch's.
RULES: dict[str, dict[str, Any]] = {"adamw": {}, "sgdw": MOMENTUM}


@dataclass(frozen=True, eq=False)
class Peer:
    """One optimizer."""

    name: str
    rule: str  # a key of RULES
    path: str  # module and class, "package.module:Class"
    states: str  # their format, a key of STATE_FORMATS
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (F32, BF16)
    mixed: bool = False  # takes gradients of another dtype than the parameter's
    devices: tuple[str, ...] = ("cuda",)  # types of those that it is measured on

    def grad_dtype(self, param: torch.dtype, grad: torch.dtype) -> torch.dtype:
        """Of the gradients that it is given where a case has `grad`."""
        return grad if self.mixed else param

    def bytes_per_parameter(self, param: torch.dtype, grad: torch.dtype, numel: int | None = None) -> float:
        """What a step of a tensor of `numel` elements moves, a parameter."""
        grad = self.grad_dtype(param, grad)
        states = STATE_FORMATS[self.states](STATES[self.rule], param.itemsize, numel)
        return 2 * param.itemsize + grad.itemsize + 2 * states

    def make(self, cls: Callable[..., Any], groups: Sequence[dict[str, Any]], **more: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(list(groups), lr=LR, weight_decay=WEIGHT_DECAY, **self.options | more)
        return optimizer


def _every_rule(name: str, states: str, devices: tuple[str, ...] = EVERYWHERE, **more: Any) -> Iterator[Peer]:
    """Ours, or one of torch's implementations."""
    ours = name.startswith(OURS)
    for key, options in RULES.items():
        rule = KINDS[key][0]
        module, _, cls = (f"{OURS}.{rule.title}" if ours else rule.torch.name).rpartition(".")
        yield Peer(name, key, f"{module}:{cls}", states, options | more, ALL, ours, devices)


PEERS = (
    *_every_rule(OURS, "float32 or wider"),
    *_every_rule(CUDA, "float32 or wider", ("cuda",), backend="cuda"),
    *_every_rule(FUSED, "own dtype", fused=True),
    *_every_rule(FOREACH, "own dtype", foreach=True),
    *_every_rule("torch for-loop", "own dtype", CPU, foreach=False, fused=False),
    Peer(DEEPSPEED, "adamw", "deepspeed.ops.adam:DeepSpeedCPUAdam", "float32", {}, HALVES, devices=CPU),
    Peer("apex", "adamw", "apex.optimizers:FusedAdam", "float32"),
    Peer("apex", "sgdw", "apex.optimizers:FusedSGD", "own dtype", MOMENTUM),
    Peer("TransformerEngine", "adamw", "transformer_engine.pytorch.optimizers:FusedAdam", "float32"),
    Peer("TransformerEngine", "sgdw", "transformer_engine.pytorch.optimizers:FusedSGD", "own dtype", MOMENTUM),
    Peer("torch-optimi", "adamw", "optimi:AdamW", "compensated", AS_TORCH, devices=EVERYWHERE),
    Peer("torch-optimi", "sgdw", "optimi:SGD", "compensated", MOMENTUM | {"decouple_wd": True}, devices=EVERYWHERE),
    Peer("torchao 8-bit", "adamw", "torchao.optim:AdamW8bit", "8 bits or own dtype", devices=EVERYWHERE),
    Peer("bitsandbytes 8-bit", "adamw", "bitsandbytes.optim:AdamW8bit", "8 bits or float32", devices=EVERYWHERE),
    Peer("bitsandbytes 32-bit", "adamw", "bitsandbytes.optim:AdamW32bit", "float32", devices=EVERYWHERE),
    # pytorch_optimizer.AdamW is torch's own class; this is the nearest of its own, which also clips the update.
    Peer("pytorch_optimizer", "adamw", "pytorch_optimizer:StableAdamW", "compensated", AS_TORCH, devices=CPU),
    Peer("pytorch_optimizer", "sgdw", "pytorch_optimizer:SGDW", "own dtype", MOMENTUM, devices=CPU),
    Peer("flashoptim", "adamw", "flashoptim:FlashAdamW", "companded"),
    Peer("flashoptim", "sgdw", "flashoptim:FlashSGDW", "companded", MOMENTUM),
)  # fmt: skip


def on(device: str) -> list[Peer]:
    """Those that are measured on a type of device."""
    return [peer for peer in PEERS if device in peer.devices]


def load(peers: Sequence[Peer]) -> tuple[dict[Peer, Callable[..., Any]], dict[str, str]]:
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
