"""Loops that run in each process of a gloo group (`ranks.run`), and return the whole weights.

Every rank has half of a batch.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchvision_alone  # noqa: F401 (before Lightning)
from loops import BATCH, BATCHES, MAX_NORM, new_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

STEPS, SAVED = 8, 3
Weights = dict[str, Tensor]


def loss_of(model: nn.Module, step: int) -> Tensor:
    rank, half = dist.get_rank(), BATCH // 2
    x, y = (t[rank * half : (rank + 1) * half] for t in BATCHES[step])
    return nn.functional.mse_loss(model(x), y)


def whole(model: nn.Module) -> Weights:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def trained(
    kind: str, rule: Any, options: dict[str, Any], folder: str, *, resume: bool = False, clips: bool = False
) -> Weights:
    """Under DDP or fully_shard; saved by DCP after SAVED steps, or another model that goes on from there."""
    net = model = new_model(seed=int(resume))
    if kind == "ddp":
        model = DistributedDataParallel(net)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net[0], mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = rule(net.parameters(), **options)
    if resume:
        load(net, optimizer, folder)
    for step in range(SAVED if resume else 0, STEPS):
        if step == SAVED and not resume:
            save(net, optimizer, folder)
        loss_of(model, step).backward()
        if clips:
            nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return whole(net)


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """What a launcher says by environment variables, for libraries that ask for it."""
    port = [0]
    if dist.get_rank() == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = [s.getsockname()[1]]
    dist.broadcast_object_list(port)
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0"}
    said |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port[0]), "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update(said)
    try:
        yield
    finally:
        for name in said:
            del os.environ[name]


def by_accelerate(
    kind: str, rule: Any, options: dict[str, Any], folder: str, *, resume: bool = False, clips: bool = False
) -> Weights:
    """accelerate takes its FSDP plugin on accelerators alone: here it is told to take it on CPUs."""
    import accelerate
    from accelerate.state import AcceleratorState

    with launched():
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        assert accelerator.num_processes == dist.get_world_size()
        if kind == "fsdp2":
            plugin = accelerate.FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=20,
                state_dict_type="SHARDED_STATE_DICT",
            )  # fmt: skip
            for state in (accelerate.PartialState(), accelerator.state):
                state.distributed_type = accelerate.DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        net = new_model(seed=int(resume))
        model, optimizer = accelerator.prepare(net, rule(net.parameters(), **options))
        assert any(isinstance(p, DTensor) for p in model.parameters()) == (kind == "fsdp2")
        if resume:
            accelerator.load_state(folder)
        for step in range(SAVED if resume else 0, STEPS):
            if step == SAVED and not resume:
                accelerator.save_state(folder)
            accelerator.backward(loss_of(model, step))
            if clips:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        return whole(accelerator.unwrap_model(model))


def by_fabric(
    kind: str, rule: Any, options: dict[str, Any], folder: str, *, resume: bool = False, clips: bool = False
) -> Weights:
    """Fabric, whose ModelParallelStrategy shards by what it is told to call."""
    import lightning
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    def shard(net: nn.Module, mesh: Any) -> nn.Module:
        fully_shard(net[0], mesh=mesh["data_parallel"])
        return fully_shard(net, mesh=mesh["data_parallel"])

    with launched():
        sharded = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
        strategy = sharded if kind == "fsdp2" else DDPStrategy()
        fabric = lightning.Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
        fabric.launch()
        net = new_model(seed=int(resume))
        if kind == "fsdp2":
            model = fabric.setup_module(net)
            optimizer = fabric.setup_optimizers(rule(model.parameters(), **options))
        else:
            model, optimizer = fabric.setup(net, rule(net.parameters(), **options))
        assert any(isinstance(p, DTensor) for p in model.parameters()) == (kind == "fsdp2")
        state = {"model": model, "optimizer": optimizer}
        if resume:
            fabric.load(folder, state)
        for step in range(SAVED if resume else 0, STEPS):
            if step == SAVED and not resume:
                fabric.save(folder, state)
            fabric.backward(loss_of(model, step))
            if clips:
                fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        return whole(model.module)
