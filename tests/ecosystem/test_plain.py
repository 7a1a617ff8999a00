"""Plain PyTorch: the same loop with torch's class, and resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from loops import BATCHES, assert_trained_alike, new_model

import wd_kernels

OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def train(optimizer: torch.optim.Optimizer, model: torch.nn.Module, first: int, last: int) -> None:
    for x, y in BATCHES[first:last]:
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.works("torch", "plain loops, saved and resumed to the bit")
def test_a_plain_loop(tmp_path: Path) -> None:
    ours, theirs = new_model(), new_model()
    before = copy.deepcopy(ours.state_dict())
    optimizer = wd_kernels.AdamW(ours.parameters(), **OPTIONS)
    train(optimizer, ours, 0, 4)
    torch.save({"model": ours.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(optimizer, ours, 4, 8)
    train(torch.optim.AdamW(theirs.parameters(), **OPTIONS), theirs, 0, 8)
    assert_trained_alike(ours, theirs, before)

    resumed = new_model(seed=1)
    again = wd_kernels.AdamW(resumed.parameters(), **OPTIONS)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(again, resumed, 4, 8)
    assert all(map(torch.equal, ours.parameters(), resumed.parameters()))
