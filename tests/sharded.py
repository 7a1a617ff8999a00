"""Sharded models: every way in which a model is sharded here, and the same model whole beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from bits import assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import wd_kernels

__all__ = ["KINDS", "Whole", "full", "make", "mesh_of", "shard", "train"]

BUILD: dict[str, Callable[..., Any]] = {
    "adamw": wd_kernels.AdamW, "sgdw": wd_kernels.SGDW, "adagradw": wd_kernels.AdagradW,
}  # fmt: skip
#: How models are sharded, and on how many ranks at least.
KINDS = {"fsdp": 1, "tp": 2, "hsdp": 4, "fsdp-tp": 4, "mixed": 2}
WIDTH, BATCH = 6, 4


def mesh_of(*names: str) -> DeviceMesh:
    """Of all ranks; of two dimensions two ranks wide, and the rest."""
    world = dist.get_world_size()
    shape = (world,) if len(names) == 1 else (2, world // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A model whose first dimensions are 7, 1 and 8: some shards are uneven, and some empty."""
    torch.manual_seed(seed)
    layers = [nn.Linear(WIDTH, 7), nn.LayerNorm(7), nn.Linear(7, 1), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2)]
    return nn.Sequential(*layers).to(dtype)


def shard(model: nn.Sequential, kind: str, **options: Any) -> nn.Module:
    """The model, sharded in place."""
    if kind == "tp":
        _parallel(model, mesh_of("tp"))
    elif kind == "fsdp-tp":
        mesh = mesh_of("dp", "tp")
        _parallel(model, mesh["tp"])
        _fully(model, mesh["dp"], **options)
    elif kind == "hsdp":
        _fully(model, mesh_of("replicate", "shard"), **options)
    elif kind == "mixed":  # DTensors over two meshes, and ordinary parameters
        _parallel(model, mesh_of("tp"))
        fully_shard(model[0], mesh=mesh_of("dp"), **options)
    else:
        assert kind == "fsdp"
        _fully(model, mesh_of("dp"), **options)
    return model


def _fully(model: nn.Sequential, mesh: DeviceMesh, **options: Any) -> None:
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def _parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})


def full(t: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()


def data(t: int) -> Tensor:
    """The same on every rank: how gradients are summed is not what is tested."""
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(t))


def backward(model: nn.Module, t: int, dtype: torch.dtype = torch.float32) -> float:
    loss = full_with_gradient(model(data(t).to(dtype))).square().sum()
    loss.backward()
    return float(loss.detach())


def full_with_gradient(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


class Whole:
    """The same model unsharded, stepped with the gathered gradients of the sharded one: its bits are the truth."""

    def __init__(self, model: nn.Module, build: Callable[[list[nn.Parameter]], Any]) -> None:
        self.params = [nn.Parameter(full(p).clone()) for p in model.parameters()]
        self.opt = build(self.params)

    def step(self, model: nn.Module) -> None:
        for p, q in zip(self.params, model.parameters(), strict=True):
            p.grad = None if q.grad is None else full(q.grad).clone()
        self.opt.step()

    def compare(self, model: nn.Module, opt: Any) -> None:
        """Parameters, states and counts have its bits, and lie as the parameters do."""
        for k, (p, q) in enumerate(zip(self.params, model.parameters(), strict=True)):
            assert_same_bits(full(q), p, f"parameter {k}")
            ours, theirs = opt.state.get(q, {}), self.opt.state.get(p, {})
            assert list(ours) == list(theirs)
            for name, value in ours.items():
                assert_same_bits(full(value), theirs[name], f"{name} of parameter {k}")
                if isinstance(q, DTensor) and name != "step":
                    assert isinstance(value, DTensor)
                    assert (value.device_mesh, value.placements) == (q.device_mesh, q.placements)
                    assert type(value.to_local()) is Tensor
                    assert value._spec.tensor_meta is not None
                    assert value._spec.tensor_meta.dtype == value.to_local().dtype == value.dtype
                else:
                    assert type(value) is Tensor


def train(model: nn.Module, opt: Any, steps: range, whole: Whole | None = None, dtype: Any = torch.float32) -> None:
    for t in steps:
        opt.zero_grad()
        backward(model, t, dtype)
        if whole is not None:
            whole.step(model)
        opt.step()
