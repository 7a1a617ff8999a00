"""Two processes: DDP and fully_shard, by torch alone, by accelerate and by Fabric; clipped, saved and resumed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import sharded_loops
import torch
from loops import ADAMW, SGD_PAIR, assert_trained_alike, new_model
from torch import nn

ranks.MOST = 2  # processes that are started
ranks.PATIENCE = 300.0  # seconds: to import a library, where others do so, too


def a_case(library: str, train: Callable[..., Any], kind: str) -> Any:
    name = {"ddp": "DDP", "fsdp2": "FSDP2"}[kind]
    by = {"torch": "", "accelerate": "", "lightning": "Fabric: "}[library]
    return pytest.param(train, kind, id=f"{library}-{kind}", marks=pytest.mark.works(library, f"{by}{name}"))


@pytest.mark.parametrize(
    ("train", "kind"),
    [
        a_case(library, train, kind)
        for library, train in (
            ("torch", sharded_loops.trained),
            ("accelerate", sharded_loops.by_accelerate),
            ("lightning", sharded_loops.by_fabric),
        )
        for kind in ("ddp", "fsdp2")
    ],
)
@pytest.mark.parametrize(("pair", "clips"), [(ADAMW, False), (SGD_PAIR, True)], ids=["adamw", "sgd-clipped"])
def test_two_processes(train: Callable[..., Any], kind: str, pair: Any, clips: bool, tmp_path: Path) -> None:
    """The second half of the runs clips by the library's own function, or that of torch."""

    def run(rule: Any, folder: str, **options: Any) -> nn.Module:
        train_so = functools.partial(train, clips=clips, **options)
        found = ranks.run(2, train_so, kind, rule, pair[2], str(tmp_path / folder))
        model = new_model()
        model.load_state_dict(found[0])
        assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())
        return model

    whole = run(pair[0], "ours")
    assert_trained_alike(whole, run(pair[1], "theirs"), new_model().state_dict())
    assert all(map(torch.equal, whole.parameters(), run(pair[0], "ours", resume=True).parameters()))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("ddp", marks=pytest.mark.works("torch", "DDP: clipping within the step")),
        pytest.param("fsdp2", marks=pytest.mark.works("torch", "FSDP2: clipping within the step")),
    ],
)
def test_our_clipping(kind: str, tmp_path: Path) -> None:
    """The norm is that of whole tensors, whatever of them lies where."""
    rule, other, options = SGD_PAIR
    clipped = functools.partial(sharded_loops.trained, clips=True)
    theirs, free, ours = new_model(), new_model(), new_model()
    theirs.load_state_dict(ranks.run(2, clipped, kind, other, options, str(tmp_path / "theirs"))[0])
    free.load_state_dict(ranks.run(2, sharded_loops.trained, kind, rule, options, str(tmp_path / "free"))[0])
    options = options | {"max_grad_norm": sharded_loops.MAX_NORM, "skip_nonfinite": True}
    ours.load_state_dict(ranks.run(2, sharded_loops.trained, kind, rule, options, str(tmp_path / "ours"))[0])
    assert_trained_alike(ours, theirs, new_model().state_dict())
    assert not torch.allclose(ours[0].weight, free[0].weight, rtol=0.02)
