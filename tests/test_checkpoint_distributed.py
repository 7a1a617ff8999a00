"""torch's distributed checkpoints, plain and flattened: of torch's classes into ours and back; of older versions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import frozen
import pytest
import torch
import torch.distributed.checkpoint as dcp
from bits import assert_same_bits
from semantics import assert_close
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from wd_kernels import SGDW, AdagradW, AdamW, decay_groups, schedules

PAIRS: list[Any] = [
    pytest.param(AdamW, torch.optim.AdamW, {}, {}, id="AdamW"),
    pytest.param(AdamW, torch.optim.AdamW, {"amsgrad": True}, {}, id="AdamW-amsgrad"),
    pytest.param(AdamW, torch.optim.Adam, {}, {"decay": "l2"}, id="Adam"),
    pytest.param(SGDW, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.0}, {}, id="SGD"),
    pytest.param(SGDW, torch.optim.SGD, {"momentum": 0.9}, {"decay": "l2"}, id="SGD-decay"),
    pytest.param(SGDW, torch.optim.SGD, {}, {"decay": "l2"}, id="SGD-plain"),
    pytest.param(AdagradW, torch.optim.Adagrad, {}, {"decay": "l2"}, id="Adagrad"),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed")


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))


def run(model: nn.Module, opt: Any, steps: range) -> None:
    for t in steps:
        opt.zero_grad()
        (model(torch.linspace(-1, 1, 12).view(4, 3)) * (t + 1)).sum().backward()
        opt.step()


def save(model: nn.Module, opt: Any, folder: Path, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    dcp.save({"optimizer": get_optimizer_state_dict(model, opt, options=options)}, checkpoint_id=folder, no_dist=True)


def load(model: nn.Module, opt: Any, folder: Path, flatten: bool) -> None:
    """As torch's documentation has it: a state that the optimizer's own step at lr 0 has made is filled in place."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = {"optimizer": get_optimizer_state_dict(model, opt, options=options)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(model, opt, state["optimizer"], options=options)


@pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flattened"])
@pytest.mark.parametrize("way", ["torch to ours", "ours to torch", "ours to ours"])
@pytest.mark.parametrize(("ours", "theirs", "both", "own"), PAIRS)
def test_exchange(
    ours: Any, theirs: Any, both: dict[str, Any], own: dict[str, Any], way: str, flatten: bool, tmp_path: Path
) -> None:
    """The loaded run goes on as the saved one, which has the hyperparameters; nothing is missed, nothing said."""
    options = {"lr": 0.01, "weight_decay": 0.1, **both}
    makes = [
        lambda m: theirs(decay_groups(m, options["weight_decay"]), **options),
        lambda m: ours(decay_groups(m, options["weight_decay"]), **options, **own),
    ]
    first, second = {"torch to ours": (0, 1), "ours to torch": (1, 0), "ours to ours": (1, 1)}[way]
    model, other = model_of(0), model_of(1)
    a = makes[first](model)
    run(model, a, range(3))
    save(model, a, tmp_path, flatten)
    b = makes[second](other)
    for group in b.param_groups:
        group["lr"] = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(other, b, tmp_path, flatten)
    other.load_state_dict(model.state_dict())
    assert [group["lr"] for group in b.param_groups] == [0.01, 0.01]
    for m, opt in ((model, a), (other, b)):
        run(m, opt, range(3, 6))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if way == "ours to ours":
            assert_same_bits(p, q)
        assert_close(p, q, 64)


@pytest.mark.parametrize("flatten", [False, True], ids=["plain", "flattened"])
def test_schedules_and_modes_travel(flatten: bool, tmp_path: Path) -> None:
    """What torch lacks is in the checkpoint where it is not what torch does."""

    def make(model: nn.Module) -> Any:
        groups = decay_groups(model, 0.01)
        return AdamW(groups, lr=0.01, decay="independent", weight_decay=0.01, schedule=schedules.Cosine(9))

    model, other = model_of(0), model_of(1)
    a, b = make(model), make(other)
    run(model, a, range(4))
    save(model, a, tmp_path, flatten)
    load(other, b, tmp_path, flatten)
    other.load_state_dict(model.state_dict())
    assert [group["schedule_step"] for group in b.param_groups] == [4, 4]
    for m, opt in ((model, a), (other, b)):
        run(m, opt, range(4, 7))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p, q)


def test_a_checkpoint_that_does_not_say_how_it_decays(tmp_path: Path) -> None:
    """torch's has no word for the paper's decay: DCP names the key that is missing, and nothing is loaded."""
    model, other = model_of(0), model_of(1)
    a = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    run(model, a, range(2))
    save(model, a, tmp_path, False)
    b = AdamW(other.parameters(), decay="independent", weight_decay=1e-4)
    with pytest.raises(
        CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer\.param_groups\.0\.decay"
    ):
        load(other, b, tmp_path, False)
    assert b.param_groups[0]["weight_decay"] == 1e-4


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
@pytest.mark.parametrize("name", ["independent", "sgdw"])
def test_checkpoints_of_older_versions(name: str, version: str) -> None:
    saved = frozen.saved_by(version)[name]
    opt, params = frozen.make(name, saved["weights"])
    frozen.train(opt, params, range(1))  # makes the states that are to be filled
    state = {"optimizer": opt.state_dict()}
    dcp.load(state, checkpoint_id=frozen.FOLDER / f"{version}-dcp-{name}", no_dist=True)
    opt.load_state_dict(state["optimizer"])
    for p, weights in zip(params, saved["weights"], strict=True):
        p.data.copy_(weights)
    frozen.train(opt, params, range(frozen.SAVED, frozen.SAVED + frozen.AFTER))
    for p, expected in zip(params, saved["after"], strict=True):
        assert_same_bits(p, expected)
