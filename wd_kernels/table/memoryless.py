"""A step on tensors without memory, as torch's classes take it: on the meta device, under FakeTensorMode.

Estimators of memory and planners of sharding run one to see which states there will be, and where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..formats import has_scales
from ..layout import CPU
from ..rules import MASTER, Hyper, Settings
from ..scales import check_tiles, like_scale, scale_of
from ..schedules.stepping import Tick
from ..sharding import check_sharding, local, sharded_like
from ..validation import check_gradient, check_parameter, label, without_memory

__all__ = ["step", "wanted"]


def wanted(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Is a step to be one on tensors without memory?

    Raises:
        RuntimeError: parameters have neither memory nor gradients, so that a step would do nothing: those of a model
            that was made on the meta device and has others by now.
    """
    lists = [own for group in groups if isinstance(own := group["params"], (list, tuple))]
    there = [p for p in chain.from_iterable(lists) if isinstance(p, Tensor) and not is_lazy(p)]
    bare = [p for p in there if without_memory(p)]
    if not bare:
        return False
    with_gradient = [p for p in there if p.grad is not None]
    stepped = [p for p in bare if p.grad is not None]
    if not with_gradient and all(without_memory(p) for p in there if p.requires_grad):
        raise RuntimeError(
            f"{len(bare)} of {len(there)} parameters are on the meta device or fake, and none has a gradient: was the "
            "optimizer made before model.to_empty() or model.load_state_dict(..., assign=True), which put others in "
            "their place? Make it after that"
        )
    return bool(stepped) and len(stepped) == len(with_gradient)  # else an error, which names one


@torch.no_grad()
def step(groups: Sequence[Mapping[str, Any]], state: Any, hypers: Sequence[Hyper], ticks: Sequence[Tick]) -> None:
    """Makes the states that are missing, and counts. Nothing is computed: there are no numbers."""
    for g, group in enumerate(groups):
        for k, p in enumerate(group["params"]):
            if p.grad is not None:
                what = label(group, g, k)
                check_parameter(p, what)
                check_sharding(p, p.grad, f"the gradient of {what}", gradient=True)
                check_gradient(local(p), local(p.grad), f"the gradient of {what}")
    for group, (settings, *_) in zip(groups, hypers, strict=True):
        for p in group["params"]:
            if p.grad is not None:
                _count(p, state.setdefault(p, {}), settings)
    for own, key, value in ticks:
        own[key] = value


def _count(p: Tensor, own: dict[str, Any], settings: Settings) -> None:
    step = own.get("step")
    own["step"] = (torch.zeros((), dtype=torch.float32, device=CPU) if step is None else step) + 1
    masters = [] if settings.storage.master_dtype(p.dtype) is None else [MASTER]
    for state in (*settings.states, *masters):
        if own.get(state.name) is None:
            here, dtype = local(p).detach(), settings.storage.state_dtype(state, p.dtype)
            own[state.name] = sharded_like(p, torch.zeros_like(here, dtype=dtype, memory_format=torch.preserve_format))
            if state is not MASTER and has_scales(dtype):
                check_tiles(p, "a parameter")
                own[state.scale.name] = scale_of(p, torch.zeros_like(like_scale(p, here), device=here.device))
