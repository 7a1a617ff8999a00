"""Distributed checkpoints of sharded models: of other numbers of ranks, other meshes, of torch's classes and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bits import assert_same_bits
from semantics import assert_close
from sharded import full, make, shard, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from wd_kernels import SGDW, AdagradW, AdamW, schedules

#: Of each way: the class and its options.
MAKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "torch.AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "scheduled": (AdamW, {"lr": 0.01, "weight_decay": 0.01, "decay": "independent", "schedule": schedules.Cosine(9)}),
    "SGDW": (SGDW, {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "decay": "l2"}),
    "torch.SGD": (torch.optim.SGD, {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}),
    "AdagradW": (AdagradW, {"lr": 0.01, "weight_decay": 0.1, "decay": "l2"}),
    "torch.Adagrad": (torch.optim.Adagrad, {"lr": 0.01, "weight_decay": 0.1, "foreach": False}),
}
SAVED, AFTER = range(3), range(3, 6)


def built(kind: str, maker: str, seed: int, **change: Any) -> tuple[nn.Module, Any]:
    model = make(seed)
    shard(model, kind)
    build, options = MAKERS[maker]
    return model, build(model.parameters(), **{**options, **change})


def options_of(way: str) -> StateDictOptions:
    return StateDictOptions(
        flatten_optimizer_state_dict="flat" in way,
        full_state_dict="full" in way,
        cpu_offload="full" in way,
        broadcast_from_rank0="full" in way,
    )


def all_states(model: nn.Module, opt: Any) -> list[Tensor]:
    """Parameters and states, whole, after further steps."""
    train(model, opt, AFTER)
    own = [[full(t) for name, t in opt.state[p].items() if name != "step"] for p in model.parameters()]
    return [t for p, states in zip(model.parameters(), own, strict=True) for t in (full(p), *states)]


def saves(kind: str, maker: str, way: str, folder: Path) -> list[Tensor]:
    model, opt = built(kind, maker, 0)
    train(model, opt, SAVED)
    saving = options_of(way)
    saving.broadcast_from_rank0 = False
    state = {
        "model": get_model_state_dict(model, options=saving),
        "optimizer": get_optimizer_state_dict(model, opt, options=saving),
    }
    if "full" in way:
        if dist.get_rank() == 0:
            torch.save(state, folder / "full.pt")
        dist.barrier()
    elif "async" in way:
        dcp.async_save(state, checkpoint_id=folder).result()
    else:
        dcp.save(state, checkpoint_id=folder)
    return all_states(model, opt)


def loads(kind: str, maker: str, way: str, folder: Path) -> list[Tensor]:
    model, opt = built(kind, maker, 1, lr=0.5)
    loading = options_of(way)
    before = [full(p).clone() for p in model.parameters()]
    state: Any = {
        "model": get_model_state_dict(model, options=StateDictOptions()),
        "optimizer": get_optimizer_state_dict(
            model, opt, options=StateDictOptions(flatten_optimizer_state_dict="flat" in way)
        ),
    }
    for p, was in zip(model.parameters(), before, strict=True):  # torch has stepped at lr 0, to make states
        assert_same_bits(full(p), was)
    if "full" in way:
        first = dist.get_rank() == 0
        state = torch.load(folder / "full.pt", weights_only=True) if first else {"model": {}, "optimizer": {}}
    else:
        dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"], options=loading)
    set_optimizer_state_dict(model, opt, state["optimizer"], options=loading)
    assert [group["lr"] for group in opt.param_groups] == [0.01]
    return all_states(model, opt)


def exchange(
    way: str, folder: Path, source: tuple[int, str, str], target: tuple[int, str, str], exact: bool = True
) -> None:
    """What is loaded goes on as what was saved, by the bits of all parameters and states."""
    world, kind, maker = source
    saved = ranks.run(world, saves, kind, maker, way, folder)[0]
    world, kind, maker = target
    for found in ranks.run(world, loads, kind, maker, way, folder):
        for a, b in zip(found, saved, strict=True):
            (assert_same_bits if exact else assert_close)(a, b, *(() if exact else (64,)))


@pytest.mark.parametrize(
    ("world", "kind", "maker"),
    [
        *((2, "fsdp", maker) for maker in ("AdamW", "scheduled", "SGDW", "AdagradW")),
        *((world, kind, "AdamW") for world, kind in ((1, "fsdp"), (3, "fsdp"), (4, "hsdp"), (4, "fsdp-tp"))),
    ],
)
def test_resharding(world: int, kind: str, maker: str, tmp_path: Path) -> None:
    """Saved on 4 ranks. Of 3 the mean of gradients is rounded otherwise, as is a matrix product of parallel tensors."""
    exact = world != 3 and kind != "fsdp-tp"
    exchange("plain", tmp_path, (4, "fsdp", maker), (world, kind, maker), exact)


@pytest.mark.parametrize("way", ["flat", "full", "async"])
def test_ways(way: str, tmp_path: Path) -> None:
    exchange(way, tmp_path, (4, "fsdp", "scheduled"), (2, "fsdp", "scheduled"))


@pytest.mark.parametrize("way", ["plain", "flat"])
@pytest.mark.parametrize("rule", ["AdamW", "SGD", "Adagrad"])
def test_of_torch_and_back(rule: str, way: str, tmp_path: Path) -> None:
    ours = "AdamW" if rule == "AdamW" else f"{rule}W"
    exchange(way, tmp_path / "a", (2, "fsdp", f"torch.{rule}"), (2, "fsdp", ours), exact=False)
    exchange(way, tmp_path / "b", (2, "fsdp", ours), (2, "fsdp", f"torch.{rule}"), exact=False)
