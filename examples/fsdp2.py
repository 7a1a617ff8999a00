"""A transformer under fully_shard, with tensor parallelism if asked for, saved in the middle and resumed.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 4 examples/fsdp2.py --tensor-parallel 2
    torchrun --nproc-per-node 2 examples/fsdp2.py --release

Runs on GPUs where there are some, else on the CPU. It trains 20 steps and saves a distributed checkpoint after 10; then
another model, from another seed, loads that and trains the last 10 again: its losses must be the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import wd_kernels
from wd_kernels.schedules import Cosine, Sequential, Warmup

STEPS, SAVED = 20, 10
VOCABULARY, WIDTH, LENGTH, BATCH, LAYERS = 64, 64, 32, 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.cumsum(1) / torch.arange(1, LENGTH + 1, device=x.device).view(-1, 1)  # of what came before
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(mean))))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def build(mesh: DeviceMesh, seed: int, release: bool) -> tuple[Model, wd_kernels.AdamW]:
    torch.manual_seed(seed)
    model = Model().to(mesh.device_type)
    if "tp" in (mesh.mesh_dim_names or ()):
        for block in model.blocks:
            plan: dict[str, ParallelStyle] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = wd_kernels.AdamW(
        wd_kernels.decay_groups(model, weight_decay=0.01),
        lr=3e-3,
        decay="independent",
        weight_decay=0.01,
        schedule=Sequential(Warmup(4), Cosine(STEPS - 4)),
    )
    if release:
        wd_kernels.release_gradients(model, optimizer)  # each block is stepped as its gradients are reduced
    return model, optimizer


def batch(t: int, mesh: DeviceMesh) -> Tensor:
    """Counting in steps of one to three: what comes next can be learnt. Each data-parallel rank has its own."""
    generator = torch.Generator().manual_seed(1000 * t + mesh["dp"].get_local_rank())
    first, pace = (torch.randint(low, high, (BATCH, 1), generator=generator) for low, high in ((0, VOCABULARY), (1, 4)))
    return ((first + pace * torch.arange(LENGTH + 1)) % VOCABULARY).to(mesh.device_type)


def train(
    model: Model, optimizer: wd_kernels.AdamW, mesh: DeviceMesh, steps: range, then: Callable[[int], None]
) -> list[float]:
    losses = []
    for t in steps:
        tokens = batch(t, mesh)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
        then(t)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="AdamW with independent decay under fully_shard.")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="so many ranks share each matrix")
    parser.add_argument("--release", action="store_true", help="step in the backward pass, and free gradients there")
    options = parser.parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    world, tp = dist.get_world_size(), options.tensor_parallel
    if tp > 1:
        mesh = init_device_mesh(kind, (world // tp, tp), mesh_dim_names=("dp", "tp"))
    else:
        mesh = init_device_mesh(kind, (world,), mesh_dim_names=("dp",))
    folders: list[str | None] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)

    model, optimizer = build(mesh, 0, options.release)

    def save(t: int) -> None:
        if t + 1 == SAVED:
            of_model, of_optimizer = get_state_dict(model, optimizer)
            state_dict_saver.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folders[0])

    losses = train(model, optimizer, mesh, range(STEPS), save)

    other, again = build(mesh, 1, options.release)
    of_model, of_optimizer = get_state_dict(other, again)
    state: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
    state_dict_loader.load(state, checkpoint_id=folders[0])
    set_state_dict(other, again, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    resumed = train(other, again, mesh, range(SAVED, STEPS), lambda t: None)

    if folders[0] is not None and dist.get_rank() == 0:
        shutil.rmtree(folders[0])  # the losses of all ranks are there: all have loaded
        size = sum(p.numel() for p in model.parameters())
        print(f"{world} ranks on {kind}, mesh {tuple(mesh.shape)}, {size} parameters")
        print(f"{'step':>4}  {'loss':>8}  {'resumed':>8}")
        for t, loss in enumerate(losses):
            print(f"{t:>4}  {loss:>8.5f}  " + (f"{resumed[t - SAVED]:>8.5f}" if t >= SAVED else ""))
        exact = resumed == losses[SAVED:]
        print(f"resumed after {SAVED} steps: {'the same losses, to the bit' if exact else 'OTHER LOSSES'}")
    dist.destroy_process_group()
    if resumed != losses[SAVED:]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
