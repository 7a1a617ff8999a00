"""Schedules through the optimizers: what they set, where they resume, and which steps they count."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from bits import assert_same
from cases import Piece, covered, gradient, snapshot
from engines import TEST_DEVICE
from torch import nn
from training import BUILD, NAMED, counts, small, train

import wd_kernels
from wd_kernels import NormalizedDecay, backends
from wd_kernels.backends import Prepared
from wd_kernels.rules import DECAY_MODES
from wd_kernels.schedules import Constant, Cosine, WarmRestarts, Warmup

every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])


# Through the optimizer ------------------------------------------------------------------------------------------------


@covered(rule=tuple(BUILD), decay=DECAY_MODES, name=tuple(NAMED))
def test_sets_eta_and_decay(rule: str, decay: str, name: str) -> None:
    """Every schedule in every mode, on the CPU's own backend and the reference, is eta (and lambda) set by hand."""
    schedule = NAMED[name]
    by_hand = train(rule, decay, "reference", schedule, by_hand=True)
    for backend in ("cpu", "reference"):
        assert_same(train(rule, decay, backend, schedule), by_hand)
    plain = train(rule, decay, "reference", Constant(), by_hand=True)
    assert any(not torch.equal(by_hand[key], plain[key]) for key in by_hand)


@covered(rule=tuple(BUILD), decay=DECAY_MODES, name=tuple(NAMED))
def test_through_the_backends_for_gpus(rule: str, decay: str, name: str, backend: str, launches: list[int]) -> None:
    """To the bit, and in one launch a step: the schedule takes none."""
    expected = train(rule, decay, "reference", NAMED[name])
    assert not launches
    assert_same(train(rule, decay, backend, NAMED[name]), expected)
    assert len(launches) == 6


@pytest.mark.gpu
@covered(rule=tuple(BUILD), decay=DECAY_MODES, name=tuple(NAMED))
def test_on_a_gpu(rule: str, decay: str, name: str, backend: str, launches: list[int]) -> None:
    """The compiled kernels, as above."""
    expected = train(rule, decay, "reference", NAMED[name])
    assert_same(train(rule, decay, backend, NAMED[name], device=TEST_DEVICE), expected)
    assert len(launches) == 6


@pytest.mark.parametrize("name", [name for name in NAMED if name != "callable"])
@every
def test_resumes_exactly(rule: str, name: str, tmp_path: Path) -> None:
    """Through state_dict, a file of torch.save without code, a pickle, and a deep copy in mid-run."""
    schedule = NAMED[name]
    expected = train(rule, "independent", "cpu", schedule)
    for at in range(5):
        assert_same(train(rule, "independent", "cpu", schedule, reload_at=at), expected)

    def lives(opt: Any) -> Any:
        return pickle.loads(pickle.dumps(opt))

    twin = lives(BUILD[rule]([torch.nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.1, schedule=schedule))
    assert twin.param_groups[0]["schedule"] == schedule
    for _ in range(3):
        twin.param_groups[0]["params"][0].grad = torch.ones(3)
        twin.step()
    twin = lives(copy.deepcopy(twin))
    assert twin.param_groups[0]["schedule_step"] == 3
    torch.save(twin.state_dict(), tmp_path / "state.pt")
    group = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]
    assert (group["schedule"], group["schedule_step"], group["eta"]) == (repr(schedule), 3, schedule(2))


# Counting -------------------------------------------------------------------------------------------------------------


@every
def test_groups_have_their_own_schedules(rule: str) -> None:
    opt = small(
        rule,
        {},
        {"schedule": Warmup(4)},
        {"schedule": None, "eta": 0.3},
        {"schedule": "from_lr", "lr": 0.05},
        schedule=Cosine(4),
    )
    opt.param_groups[3]["lr"] = 0.025
    for _ in range(2):
        opt.step()
    assert [group.get("eta", 1.0) for group in opt.param_groups] == [Cosine(4)(1), 0.5, 0.3, 1.0]
    assert counts(opt) == [2, 2, 0, 0]
    late = torch.nn.Parameter(torch.ones(1))
    late.grad = torch.ones(1)
    opt.add_param_group({"params": [late]})  # joins the optimizer's schedule where it is
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "schedule": Cosine(4)})  # has one of its own
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "schedule_step": 9})
    assert counts(opt) == [2, 2, 0, 0, 2, 0, 9]
    opt.step()
    assert opt.param_groups[4]["eta"] == Cosine(4)(2)


@every
def test_a_step_that_does_not_happen_is_not_counted(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped on the device's flag, refused for a bad gradient, failed in the backend: eta and count stay."""
    opt = small(rule, {}, {}, schedule=Cosine(8))
    opt.step()
    before = copy.deepcopy([(group["eta"], group["schedule_step"]) for group in opt.param_groups])
    opt._table.control[1] = 1.0
    opt.step()
    opt._table.control[1] = 0.0
    p = opt.param_groups[1]["params"][0]
    p.grad = torch.ones(1).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    p.grad = torch.ones(1)

    def broken() -> None:
        raise RuntimeError("no launch")

    monkeypatch.setattr(backends, "prepare", lambda table: Prepared([], lambda table, rows: [broken]))
    with pytest.raises(RuntimeError, match="no launch"):
        opt.step()
    monkeypatch.undo()
    assert [(group["eta"], group["schedule_step"]) for group in opt.param_groups] == before
    opt.step()
    assert counts(opt) == [2, 2]
    p.grad = opt.param_groups[0]["params"][0].grad = None
    opt.step()  # nothing to do, and yet a step
    assert counts(opt) == [3, 3]


def test_a_schedule_is_asked_once_a_step() -> None:
    """However many groups follow it, with the number of completed steps."""
    asked: list[int] = []

    def schedule(t: int) -> float:
        asked.append(t)
        return 1.0

    opt = small("adamw", {}, {}, {}, schedule=schedule)
    for _ in range(3):
        opt.step()
    assert asked == [0, 1, 2]
    assert "<locals>.schedule(asked=list)" in opt.state_dict()["param_groups"][0]["schedule"]


def test_threads_that_share_an_optimizer_count_every_step() -> None:
    opt = small("adamw", {}, {}, schedule=Cosine(1000))
    threads = [threading.Thread(target=lambda: [opt.step() for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(opt) == [100, 100]


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_hold_it(flatten: bool) -> None:
    """torch's get/set_optimizer_state_dict: the loaded run goes on where the saved one was."""

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "schedule": "from_lr", "weight_decay": 0.0}]
        schedule = NormalizedDecay(WarmRestarts(3))
        return model, wd_kernels.AdamW(groups, lr=0.1, decay="independent", weight_decay=0.05, schedule=schedule)

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)

    def steps(model: nn.Module, opt: Any, first: int, last: int) -> None:
        for t in range(first, last):
            opt.param_groups[1]["lr"] = 0.1 / (1 + t)
            for p in model.parameters():
                p.grad = gradient(Piece(tuple(p.shape)), torch.float32, t)
            opt.step()

    model, opt = made()
    steps(model, opt, 0, 4)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=options))
    twin, other = made()
    twin.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(twin, other, saved, options=options)
    assert counts(other) == [4, 0]
    steps(model, opt, 4, 8)
    steps(twin, other, 4, 8)
    assert_same(snapshot(model.parameters(), opt), snapshot(twin.parameters(), other))
