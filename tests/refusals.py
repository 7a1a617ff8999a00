"""Optimizers of which the tests spoil something, and what the message must say."""

from __future__ import annotations

import re
from typing import Any

import torch
from semantics import all_params, build, parameters, set_gradients
from torch import Tensor

NAMES = ["embed.weight", "head.weight", "head.bias"]
SHAPES = ((4, 4), (7,), (2, 3))


def mentions(*parts: str) -> str:
    """A pattern for a message that holds these parts in order."""
    return ".*".join(map(re.escape, parts))


def ready(rule: str, named: bool, steps: int = 2) -> Any:
    """An optimizer of two groups; the second holds two parameters."""
    params: list[Any] = list(parameters(SHAPES))
    if named:
        params = list(zip(NAMES, params, strict=True))
    opt = build(rule, [{"params": params[:1]}, {"params": params[1:]}])
    for t in range(steps):
        set_gradients(all_params(opt), t)
        opt.step()
    set_gradients(all_params(opt), 9)
    return opt


class Dispatching(Tensor):
    """A subclass whose memory is not its own to the table's knowledge."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Dispatching:
        made: Dispatching = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=False
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Dispatching) else x

        out = func(*[unwrap(a) for a in args], **{k: unwrap(v) for k, v in (kwargs or {}).items()})
        return cls(out) if isinstance(out, Tensor) and not func._schema.name.endswith("detach") else out
