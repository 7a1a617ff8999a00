"""DTensors: what of one lies in this process, and whether what belongs together is sharded alike.

A step is elementwise. Where parameter, gradient and states are sharded alike, every process steps its own shards and
nothing is sent, so a table holds local tensors. torch.distributed.tensor is not imported here: where nobody has
imported it there are no DTensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PLAIN",
    "check_sharding",
    "is_dtensor",
    "is_sharded",
    "loaded",
    "local",
    "redistribute",
    "redistribute_gradients",
    "shard_offset",
    "sharded_like",
    "spec_of",
]

#: torch's own types, which native code looks into.
PLAIN = (Tensor, torch.nn.Parameter)
#: What can be done about other placements.
OF_GRADIENTS = (
    "gradients are not sent within a step: p.grad = p.grad.redistribute(placements=p.placements) does that before it, "
    "or optimizer.register_step_pre_hook(wd_kernels.redistribute_gradients) for all"
)
OF_STATES = "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict loads states of any sharding"


def loaded(module: str, name: str) -> Any:
    """A class of torch.distributed's, or no type at all where nobody has imported it: then nothing is one."""
    return getattr(sys.modules.get(module), name, ())


def is_sharded(t: object) -> bool:
    """Is it a DTensor, whatever its placements?"""
    return type(t) not in PLAIN and isinstance(t, loaded("torch.distributed.tensor", "DTensor"))


def is_dtensor(t: object) -> bool:
    """Is it one, and none of a subclass?"""
    return type(t) is loaded("torch.distributed.tensor", "DTensor")


def spec_of(t: Tensor) -> Any:
    """What torch says of a DTensor's sharding; None of an ordinary tensor."""
    return t._spec if is_sharded(t) else None  # type: ignore[attr-defined]


def local(t: Tensor) -> Tensor:
    """What of a tensor lies in this process: the tensor itself, or a DTensor's local one, once it has arrived."""
    if is_sharded(t):
        t = t._local_tensor  # type: ignore[attr-defined]
    if type(t) in PLAIN:
        return t
    arriving = loaded("torch.distributed._functional_collectives", "AsyncCollectiveTensor")
    return t.wait() if isinstance(t, arriving) else t


def is_unmarked_shard(p: Tensor) -> bool:
    """Is it an ordinary tensor, of which FSDP1 has left this process a part that other processes do not have?"""
    return getattr(p, "_fsdp_flattened", False) and torch.distributed.get_world_size() > 1


def shard_offset(p: Tensor) -> int:
    """How many elements of a sharded tensor come before this process's, where each shard is numbered in one piece.

    So elements have the numbers of the whole tensor, in whatever way its first dimension is sharded, and different ones
    on different shards in any case.
    """
    if not is_sharded(p):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spec, whole = spec_of(p), p.shape
    shape, begin = compute_local_shape_and_global_offset(whole, spec.mesh, spec.placements)
    offset = 0
    for dim in range(p.dim()):
        offset += begin[dim] * math.prod(shape[:dim]) * math.prod(whole[dim + 1 :])
    return offset * (2 if p.is_complex() else 1)


def sharded_over(p: Tensor) -> tuple[Any, ...]:
    """The process groups that have a shard each of a tensor, one for every dimension of its mesh that shards it."""
    if not is_sharded(p):
        return ()
    spec = spec_of(p)
    dims = [dim for dim, own in enumerate(spec.placements) if not own.is_replicate() and spec.mesh.size(dim) > 1]
    return tuple(spec.mesh.get_group(dim) for dim in dims)


def sum_over(group: Any, rows: Tensor, which: Tensor) -> None:
    """Adds up some of the rows of an integer tensor over a process group, in place. All of its processes call it."""
    _reduce_over(group, rows, which, torch.distributed.ReduceOp.SUM)


def largest_over(group: Any, rows: Tensor, which: Tensor) -> None:
    """The same of the largest numbers."""
    _reduce_over(group, rows, which, torch.distributed.ReduceOp.MAX)


def _reduce_over(group: Any, rows: Tensor, which: Tensor, operation: Any) -> None:
    there = rows[which].contiguous()
    if not there.is_cuda and torch.distributed.get_backend(group) == "nccl":  # of CPU offload, say
        there = there.cuda()
    torch.distributed.all_reduce(there, operation, group=group)
    rows[which] = there.to(rows.device)


def sharded_like(p: Tensor, t: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """`t`, which belongs to `local(p)`, as what belongs to `p`: of its mesh and placements, with the memory of `t`.

    Args:
        shape: of the whole, where it is not that of `p`; then it is contiguous.
    """
    if not is_sharded(p):
        return t
    dtensor, like = loaded("torch.distributed.tensor", "DTensor"), spec_of(p)
    meta = like.tensor_meta._replace(dtype=t.dtype)
    if shape is not None:
        meta = meta._replace(shape=torch.Size(shape), stride=torch.empty(shape, device="meta").stride())
    spec = type(like)(like.mesh, like.placements, tensor_meta=meta, **_order(like))
    made: Tensor = dtensor(t, spec, requires_grad=False)
    return made


def check_sharding(p: Tensor, t: Tensor, what: str, gradient: bool = False, shape: Sequence[int] | None = None) -> None:
    """Raises unless `t`, a gradient or a state, is sharded as its parameter `p`, or both are ordinary tensors.

    `shape`: of the whole of `t`, where it is not that of `p`.
    What differs does so in every process, so all of them raise.
    """
    if _sharding(p) != _sharding(t):
        raise ValueError(
            f"{what} is {_described(t)}; allowed is what its parameter is, {_described(p)}: "
            f"{OF_GRADIENTS if gradient else OF_STATES}"
        )
    if is_sharded(p) and t.shape != (p.shape if shape is None else torch.Size(shape)):
        allowed = f"that of the parameter, {tuple(p.shape)}" if shape is None else str(tuple(shape))
        raise ValueError(f"{what} has shape {tuple(t.shape)}; allowed is {allowed}")


def same_sharding(a: Tensor, b: Tensor) -> bool:
    """Are they sharded alike, or both ordinary tensors?"""
    return _sharding(a) == _sharding(b)


def redistribute_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Gives every DTensor gradient the placements of its parameter, in place of the gradient: a pre-hook for steps.

    Sequence parallelism leaves gradients of norms `Partial`, and row-wise parallel embeddings leave `Replicate` ones
    beside `Shard`: torch's own optimizers sum and cut these within each operation of a step. wd_kernels sends nothing
    in a step; this does it before, once for each such gradient, in the order of the parameters, so every process must
    call it. Under `fully_shard` there is nothing to do.

    Args:
        optimizer: whose gradients; any torch optimizer.

    Example:
        >>> import torch, wd_kernels
        >>> opt = wd_kernels.AdamW([torch.nn.Parameter(torch.ones(3))])
        >>> handle = opt.register_step_pre_hook(wd_kernels.redistribute_gradients)

    Source: torch's tutorial "Large Scale Transformer model training with Tensor Parallel", whose gradients these are.
    """
    for group in optimizer.param_groups:
        redistribute(group["params"])


def redistribute(params: Iterable[Any]) -> None:
    """The same of some parameters."""
    for p in params:
        grad = p.grad
        if grad is not None and is_sharded(p) and is_sharded(grad) and grad.placements != p.placements:
            p.grad = grad.redistribute(placements=p.placements)


def _order(spec: Any) -> dict[str, Any]:
    """In which order dimensions of the mesh shard one of the tensor, where placements do not say it."""
    strided = getattr(spec, "use_strided_shard_as_shard_order", False)
    return {} if strided or not hasattr(spec, "shard_order") else {"shard_order": spec.shard_order}


def _sharding(t: Tensor) -> tuple[Any, ...] | None:
    spec = spec_of(t)
    return None if spec is None else (spec.mesh, tuple(spec.placements), _order(spec))


def _described(t: Tensor) -> str:
    spec = spec_of(t)
    if spec is None:
        return "an ordinary tensor"
    return f"a DTensor with placements {tuple(spec.placements)} over {spec.mesh}"
