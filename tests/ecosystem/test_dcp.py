"""torch's distributed checkpoints of a model that `fully_shard` has sharded over two ranks: torch, ours, torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pair
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from loops import BATCHES, new_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import wd_kernels

ADAMW = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
SGD = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.3}
KINDS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "AdamW": (wd_kernels.AdamW, ADAMW, torch.optim.AdamW, ADAMW),
    "SGD": (wd_kernels.SGDW, {**SGD, "decay": "l2"}, torch.optim.SGD, SGD),
}


def relay(kind: str, legs: list[tuple[bool, int]], folder: Path, flatten: bool) -> tuple[list[Tensor], int]:
    """All of the weights after legs of (ours, until which step), each in a new model that has loaded the last one's."""
    options, rank, t = StateDictOptions(flatten_optimizer_state_dict=flatten), dist.get_rank(), 0
    for number, (is_ours, until) in enumerate(legs):
        model = new_model(seed=number)
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
        ours, own, theirs, their_own = KINDS[kind]
        groups = wd_kernels.decay_groups(model, 0.3)
        opt = ours(groups, **own) if is_ours else theirs(groups, **their_own)
        if number:
            found = dict(zip(("model", "optimizer"), get_state_dict(model, opt, options=options), strict=True))
            dcp.load(found, checkpoint_id=folder / str(number - 1))
            set_state_dict(
                model, opt, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=options
            )
        for x, y in BATCHES[t:until]:
            nn.functional.mse_loss(model(x[rank::2]), y[rank::2]).backward()
            opt.step()
            opt.zero_grad()
        t = until
        saved = dict(zip(("model", "optimizer"), get_state_dict(model, opt, options=options), strict=True))
        dcp.save(saved, checkpoint_id=folder / str(number))
    return [p.detach().full_tensor() for p in model.parameters()], t


@pytest.mark.works("torch", "`fully_shard` on two ranks with `torch.distributed.checkpoint`, plain and flattened")
@pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flattened"])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_ours_torch(kind: str, flatten: bool, tmp_path: Path) -> None:
    def weights(name: str, *legs: tuple[bool, int]) -> list[Tensor]:
        (first, steps), (second, _) = pair.run(relay, kind, list(legs), tmp_path / name, flatten)
        assert steps == 8
        assert all(map(torch.equal, first, second))
        return first

    theirs = weights("theirs", (False, 8))
    through_ours = weights("through ours", (False, 3), (True, 6), (False, 8))
    for p, q, first in zip(through_ours, theirs, new_model().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-5)
        assert (p - first).abs().max() > 0.02
    assert all(map(torch.equal, weights("ours", (True, 8)), weights("resumed", (True, 4), (True, 8))))
