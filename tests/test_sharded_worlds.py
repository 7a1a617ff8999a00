"""The same run on any number of ranks, and after one of them was killed."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bits import assert_same_bits
from sharded import WIDTH, full, make, shard, train
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from wd_kernels import AdamW, release_gradients
from wd_kernels.schedules import Cosine

STEPS, EVERY, DIES = 7, 2, 5  # saved after 2 and 4 steps; killed within the sixth
SAMPLES = 8


def built(released: bool) -> tuple[Any, AdamW]:
    model = make(dtype=torch.bfloat16)
    shard(model, "fsdp")
    # Weights, with remainders, and states are rounded by random bits, of each element.
    options: dict[str, Any] = {"state_dtype": torch.bfloat16, "master_weights": "split24", "stochastic_rounding": True}
    opt = AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1, schedule=Cosine(9), seed=11, **options)
    if released:
        release_gradients(model, opt)
    return model, opt


def states(model: Any, opt: AdamW) -> list[Tensor]:
    return [full(t) for p in model.parameters() for t in (p, *opt.state[p].values())]


def whole_run(released: bool) -> list[Tensor]:
    model, opt = built(released)
    train(model, opt, range(STEPS), dtype=torch.bfloat16)
    return states(model, opt)


@cache
def uninterrupted() -> list[Tensor]:
    return ranks.run(1, whole_run, False)[0]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_same_data_everywhere(world: int, released: bool) -> None:
    """Means of 2 and 4 equal gradients are exact, so all that could differ is the step."""
    for found in ranks.run(world, whole_run, released):
        for a, b in zip(found, uninterrupted(), strict=True):
            assert_same_bits(a, b)


def split_samples() -> list[Tensor]:
    """Every rank has some of the samples; their gradients are summed in the order of the samples, wherever they are."""
    world, rank = dist.get_world_size(), dist.get_rank()
    twin, (model, opt) = make(), built(False)
    own = range(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    for t in range(4):
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.data.copy_(full(q))
        mine = []
        for sample in own:
            twin.zero_grad()
            x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(100 * t + sample))
            twin(x).square().sum().backward()
            mine.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
        gathered = [torch.empty(len(own), mine[0].numel()) for _ in range(world)]
        dist.all_gather(gathered, torch.stack(mine))
        total = torch.zeros_like(mine[0])
        for gradient in torch.cat(gathered):
            total += gradient
        pieces = total.split([p.numel() for p in twin.parameters()])
        for q, piece in zip(model.parameters(), pieces, strict=True):
            part = piece.view(q.shape).to(q.dtype)
            whole = DTensor.from_local(part, q.device_mesh, [torch.distributed.tensor.Replicate()])
            q.grad = whole.redistribute(placements=q.placements)
        opt.step()
    return states(model, opt)


def test_data_of_each_rank() -> None:
    first, *others = (ranks.run(world, split_samples)[0] for world in (1, 2, 4))
    for found in others:
        for a, b in zip(found, first, strict=True):
            assert_same_bits(a, b)


def gathered() -> list[Tensor]:
    """The whole optimizer state, on the first rank: remainders of 16 bits too."""
    model = make(dtype=torch.bfloat16)
    shard(model, "fsdp")
    opt = AdamW(model.named_parameters(), lr=0.01, master_weights="split32")
    train(model, opt, range(3), dtype=torch.bfloat16)
    found = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    weights = [full(t) for t in opt.get_master_weights().values()]
    if dist.get_rank() != 0:
        return weights
    again = make(dtype=torch.bfloat16)
    for p, q in zip(again.parameters(), weights, strict=True):
        p.data.copy_(q)
    alone = AdamW(again.named_parameters(), lr=0.01, master_weights="split32")
    set_optimizer_state_dict(again, alone, found)
    return (
        [t for p in again.parameters() for t in (alone.state[p]["exp_avg"],)]
        + weights
        + [p.detach() for p in alone.get_master_weights().values()]
    )


def test_a_whole_state_has_remainders() -> None:
    (alone,) = ranks.run(1, gathered)
    n = len(alone) // 3
    for a, b in zip(alone[n : 2 * n], alone[2 * n :], strict=True):
        assert_same_bits(a, b)
    first, second = ranks.run(2, gathered)
    for found, exact in ((first, alone), (second, alone[n : 2 * n])):
        for a, b in zip(found, exact, strict=True):
            assert_same_bits(a, b)


# Killed and restarted -------------------------------------------------------------------------------------------------


def save(model: Any, opt: AdamW, folder: Path) -> None:
    of_model, of_opt = get_state_dict(model, opt)
    dcp.save({"model": of_model, "optimizer": of_opt}, checkpoint_id=folder)


def dies(folder: Path) -> None:
    """Trains and saves; the last rank is killed within a step, between its checks and its launch."""
    model, opt = built(False)
    for t in range(STEPS):
        if t == DIES and dist.get_rank() == dist.get_world_size() - 1:
            opt._table._work = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        train(model, opt, range(t, t + 1), dtype=torch.bfloat16)
        if (t + 1) % EVERY == 0:
            save(model, opt, folder / str(t + 1))


def resumes(folder: Path) -> list[Tensor]:
    model, opt = built(False)
    done = max(int(path.name) for path in folder.iterdir() if (path / ".metadata").exists())
    assert done == DIES // EVERY * EVERY
    of_model, of_opt = get_state_dict(model, opt)
    state = {"model": of_model, "optimizer": of_opt}
    dcp.load(state, checkpoint_id=folder / str(done))
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, opt, range(done, STEPS), dtype=torch.bfloat16)
    return states(model, opt)


def test_a_rank_is_killed(tmp_path: Path) -> None:
    """Restarted from the last checkpoint, on as many ranks, more and fewer: the bits of the run that nothing ended."""
    with pytest.raises(AssertionError, match="rank 1 ended"):
        ranks.run(2, dies, tmp_path)
    for world in (2, 4, 1):
        for found in ranks.run(world, resumes, tmp_path):
            for a, b in zip(found, uninterrupted(), strict=True):
                assert_same_bits(a, b)
