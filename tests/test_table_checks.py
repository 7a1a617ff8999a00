"""The native check of every step, and none, where everything is inspected: the same rows, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same
from cases import PIECES, Case, cases, f32, gradient, ids, make_params, optimizer, run, snapshot
from torch import Tensor

from wd_kernels import native
from wd_kernels.table import TensorTable


def inspecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches the comparisons off: every parameter is inspected in every step; the kernels stay."""
    monkeypatch.setattr(native, "CHECKS", False)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The keys of the rows of every step from here on."""
    notes: list[Any] = []
    last: list[Any] = []
    work, step = TensorTable._work, TensorTable.step

    def noting_work(self: TensorTable, *args: Any) -> Any:
        last[:] = self.keys or []
        return work(self, *args)

    def noting(self: TensorTable, *args: Any) -> None:
        step(self, *args)
        notes.append([(int(g), int(t), bool(fresh)) for g, t, fresh in last])

    monkeypatch.setattr(TensorTable, "_work", noting_work)
    monkeypatch.setattr(TensorTable, "step", noting)
    return notes


def both(monkeypatch: pytest.MonkeyPatch, scenario: Callable[[], dict[str, Tensor]]) -> None:
    """Runs a scenario with and without native code: same results, same row keys."""
    assert native.CHECKS
    outcomes = []
    for python in (False, True):
        with monkeypatch.context() as patch:
            if python:
                inspecting(patch)
            notes = recorded(patch)
            outcomes.append((scenario(), notes))
    (a, notes_a), (b, notes_b) = outcomes
    assert_same(a, b)
    assert notes_a == notes_b
    assert any(notes_a)


@pytest.mark.parametrize("case", cases(names=["amsgrad", "dampening", "no-momentum"], decays=["independent"]), ids=ids)
def test_walks_agree_on_the_matrix(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    both(monkeypatch, lambda: run(case, "cpu"))
    both(monkeypatch, lambda: run(case, "cpu", groups=7, pieces=PIECES[::-1]))


ADAMW = Case("adamw", "scenario", {"betas": (0.8, 0.9), "decay": "independent"})
SGDW = Case("sgdw", "scenario", {"momentum": 0.9, "dampening": 0.2, "decay": "proximal"})


class Scene:
    """Three groups under way, for something to change."""

    def __init__(self, case: Case) -> None:
        self.params = make_params(PIECES[:9], f32, f32)
        groups = [{"params": self.params[:4]}, {"params": self.params[4:8]}, {"params": self.params[8:]}]
        for k, group in enumerate(groups):
            group["weight_decay"] = 0.1 * (k + 1)
        self.opt = optimizer(case, groups, "cpu")
        self.count = 0
        self.step(5)

    def step(self, times: int = 2, absent: tuple[int, ...] = ()) -> None:
        for _ in range(times):
            self.count += 1
            self.opt.param_groups[1]["lr"] = 0.01 * self.count
            for k, (p, piece) in enumerate(zip(self.params, PIECES, strict=False)):
                p.grad = None if k in absent else gradient(piece, f32, 100 * self.count + k)
            self.opt.step()

    def state(self, k: int) -> dict[str, Any]:
        return self.opt.state[self.params[k]]


def swap_data(s: Scene) -> None:
    for k in (0, 4):
        s.params[k].data = s.params[k].detach().clone() * 2


def replace_states(s: Scene) -> None:
    for k in (0, 5, 8):
        own = s.state(k)
        for name in [n for n in own if n != "step"]:
            own[name] = own[name].clone()


def replace_state_dicts(s: Scene) -> None:
    for k in (0, 5):
        s.opt.state[s.params[k]] = dict(s.state(k))


def foreign_counts(s: Scene) -> None:
    s.state(4)["step"] = torch.tensor(40.0)
    s.state(0)["step"] = 7


def counts_in_place(s: Scene) -> None:
    s.state(4)["step"].fill_(20)


def forget_states(s: Scene) -> None:
    del s.opt.state[s.params[4]]
    s.state(5).clear()


def forget_buffer(s: Scene) -> None:
    for k in (0, 4, 6):
        s.state(k).pop("momentum_buffer", None)


def forget_all(s: Scene) -> None:
    s.opt.state.clear()


def reorder_state(s: Scene) -> None:
    items = list(s.opt.state.items())[::-1]
    s.opt.state.clear()
    s.opt.state.update(items)


def move_parameter(s: Scene) -> None:
    first, second = s.opt.param_groups[0]["params"], s.opt.param_groups[1]["params"]
    second.append(first.pop())


def replace_list(s: Scene) -> None:
    s.opt.param_groups[0]["params"] = list(s.opt.param_groups[0]["params"])


def add_group(s: Scene) -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    s.opt.add_param_group({"params": [p], "weight_decay": 0.5})
    s.params.append(p)


def switch_states(s: Scene) -> None:
    for group in s.opt.param_groups[:2]:
        if "amsgrad" in group:
            group["amsgrad"] = True
        else:
            group["momentum"] = 0.0


def strange_gradient(s: Scene) -> None:
    s.params[5].grad = torch.randn(2 * 1023, generator=torch.Generator().manual_seed(0))[::2]
    s.params[0].grad = torch._neg_view(torch.ones(31))
    s.params[2].grad = torch.ones(1).expand(1)
    s.opt.step()


def other_dtype(s: Scene) -> None:
    s.params[4].grad_dtype = None
    s.params[4].grad = torch.ones(33, dtype=torch.bfloat16)
    s.opt.step()


def same_gradient_again(s: Scene) -> None:
    s.opt.step()
    s.params[0].grad.mul_(2)
    s.opt.step()


def narrow(s: Scene) -> None:
    state = {name: v[:20].clone() for name, v in s.state(4).items() if name != "step"}
    s.params[4].data = s.params[4].detach()[:20].clone()
    s.params[4].grad = torch.ones(20)
    s.opt.state[s.params[4]] = {"step": torch.tensor(3.0), **state}
    for k in range(len(s.params)):
        if k != 4:
            s.params[k].grad = None
    s.opt.step()
    s.params[4].data = torch.ones(33)
    del s.opt.state[s.params[4]]


CHANGES = [
    swap_data, replace_states, replace_state_dicts, foreign_counts, counts_in_place, forget_states, forget_buffer,
    forget_all, reorder_state, move_parameter, replace_list, switch_states, strange_gradient, other_dtype,
    same_gradient_again, narrow,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("case", [ADAMW, SGDW], ids=lambda case: case.rule)
def test_walks_agree_on_a_change(case: Case, change: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario() -> dict[str, Tensor]:
        scene = Scene(case)
        scene.step(2, absent=(1, 4))
        change(scene)
        scene.step(2, absent=(5,))
        scene.step(2)
        return snapshot(scene.params, scene.opt)

    both(monkeypatch, scenario)
    plain = Scene(case)
    plain.step(2, absent=(1, 4))
    plain.step(2, absent=(5,))
    plain.step(2)
    same = (replace_states, replace_state_dicts, reorder_state, replace_list)
    if change not in same and not (change is forget_buffer and case is ADAMW):
        with pytest.raises(AssertionError):  # the change changes something
            assert_same(scenario(), snapshot(plain.params, plain.opt))
    else:
        assert_same(scenario(), snapshot(plain.params, plain.opt))


@pytest.mark.parametrize("case", [ADAMW, SGDW], ids=lambda case: case.rule)
def test_walks_agree_on_a_new_group(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario() -> dict[str, Tensor]:
        scene = Scene(case)
        add_group(scene)
        for _ in range(3):
            for p in scene.params:
                p.grad = torch.full_like(p, 0.25)
            scene.opt.step()
        return snapshot(scene.params, scene.opt)

    both(monkeypatch, scenario)
    assert float(scenario()["9 step"]) == 3


@pytest.mark.parametrize("case", [ADAMW, SGDW], ids=lambda case: case.rule)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.state(0).update(step=torch.tensor(-1.0)),
        lambda s: s.state(0)["step"].fill_(1.5),
        lambda s: s.state(0).update(exp_avg=torch.ones(3), momentum_buffer=torch.ones(3)),
        lambda s: s.state(0).update(exp_avg="text", momentum_buffer="text"),
        lambda s: s.opt.state.update({s.params[0]: 5}),
    ],
    ids=["negative-count", "half-count", "shape", "text", "number"],
)
def test_walks_refuse_alike(case: Case, spoil: Callable[[Scene], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error from both, and no tensor is written."""
    found = []
    for python in (False, True):
        with monkeypatch.context() as patch:
            if python:
                inspecting(patch)
            scene = Scene(case)
            spoil(scene)
            before = [p.detach().clone() for p in scene.params]
            for p in scene.params:
                p.grad = torch.ones_like(p)
            with pytest.raises((TypeError, ValueError), match="parameter 0 of group 0") as error:
                scene.opt.step()
            assert all(torch.equal(p, b) for p, b in zip(scene.params, before, strict=True))
            found.append((error.type, str(error.value)))
    assert found[0] == found[1]
