"""Flat parameters of which anything is exchanged between two steps."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_state
from flat_pairs import ALIKE, SHAPES, Pair, assert_runs, fill, swap_states
from semantics import STATES, all_params, build, checked_step, parameters, set_gradients, untouched
from torch import Tensor, nn

from wd_kernels import flatten_, unflatten_
from wd_kernels.flat import place_of

walk = semantics.walk
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]
every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])


def replace_states(opt: Any, params: Sequence[Tensor]) -> None:
    for p in params[1:4]:
        opt.state[p] = {name: value if name == "step" else value.clone() for name, value in opt.state[p].items()}


def exchange_states(opt: Any, params: Sequence[Tensor]) -> None:
    """The memory of two states: each is still used by one tensor."""
    for name in STATES[type(opt).__name__.lower()]:
        a, b = opt.state[params[1]][name], opt.state[params[2]][name]
        a.data, b.data = b.data, a.data


def hold_states(opt: Any, params: Sequence[Tensor]) -> None:
    """As an offloader does that brings states back later: the old memory lives on."""
    opt.held = [value.data for own in opt.state.values() for name, value in own.items() if name != "step"]
    swap_states(opt, params)


def set_states(opt: Any, params: Sequence[Tensor]) -> None:
    for p in params[1:4]:
        for name, value in opt.state[p].items():
            if name != "step":
                value.set_(value.clone())


def clear_states(opt: Any, params: Sequence[Tensor]) -> None:
    opt.state[params[1]].clear()


def exchange_data(opt: Any, params: Sequence[Tensor]) -> None:
    a, b = params[1:3]
    a.data, b.data = b.data, a.data


def exchange_gradients(opt: Any, params: Sequence[Tensor]) -> None:
    a, b = params[1:3]
    a.grad, b.grad = b.grad, a.grad


def exchange_gradient_data(opt: Any, params: Sequence[Tensor]) -> None:
    a, b = params[1].grad, params[2].grad
    assert a is not None
    assert b is not None
    a.data, b.data = b.data, a.data


def swap_data(opt: Any, params: Sequence[Tensor]) -> None:
    for p in params[1:4]:
        p.data = p.data.clone()


def share(opt: Any, params: Sequence[Tensor]) -> None:
    """In place: the storages stay, their memory does not."""
    for p in params[1:4]:
        p.share_memory_()
        for name, value in opt.state[p].items():
            if name != "step":
                value.share_memory_()


def move_group(opt: Any, params: Sequence[Tensor]) -> None:
    own = opt.param_groups[0]["params"]
    group = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    opt.param_groups[0]["params"] = [own[0], *own[2:]]
    opt.param_groups.append({**group, "params": [own[1]]})
    params[:] = all_params(opt)


def reverse(opt: Any, params: Sequence[Tensor]) -> None:
    opt.param_groups[0]["params"].reverse()
    params[:] = all_params(opt)


MUTATIONS: dict[Callable[..., None], tuple[int, int]] = {  # runs, and once all is flattened and loaded again
    swap_states: (5, 1),
    replace_states: (5, 1),
    exchange_states: (4, 1),
    hold_states: (5, 1),
    set_states: (5, 1),
    clear_states: (3, 3),
    exchange_data: (4, 1),
    exchange_gradients: (4, 1),
    exchange_gradient_data: (4, 1),
    swap_data: (5, 1),
    share: (5, 1),
    move_group: (3, 2),
    reverse: (1, 1),
}


@every
@pytest.mark.parametrize("mutate", list(MUTATIONS), ids=lambda m: m.__name__)
def test_whatever_is_exchanged(rule: str, mutate: Callable[..., None], walk: str) -> None:
    """Between two steps; twice. The bits are right, what still lies flat is stepped as one, and all can be again."""
    pair = Pair(rule, parameters(ALIKE))
    states = 2 if rule == "adamw" else 1
    pair.step(0, runs=1)
    pair.step(1, runs=1)
    for opt, params in pair.both():
        mutate(opt, params)
    for t in range(2, 4):
        pair.step(t, runs=MUTATIONS[mutate][0])
    if mutate is not move_group:
        for opt, params in pair.both():
            mutate(opt, params)
        for t in range(4, 6):
            pair.step(t)
    unflatten_(pair.params)
    pair.step(6, runs=5)
    flatten_(pair.params)
    for opt, _ in pair.both():
        opt.load_state_dict(opt.state_dict())
    assert len(pair.opt._table.flat_states._bases) == states
    for t in range(7, 9):  # loaded states of SGDW have all begun, and no counts that differ
        pair.step(t, runs=1 if (rule, mutate) == ("sgdw", clear_states) else MUTATIONS[mutate][1])


@every
@pytest.mark.parametrize("of", ["parameter", "gradient", "state"])
def test_a_negative_bit_that_comes(rule: str, of: str, walk: str) -> None:
    """The same tensor at the same address, which now means the negative of what lies there."""
    params = parameters(ALIKE)
    flatten_(params)
    opt = build(rule, params)
    for step in range(2):
        fill(params, step)
        checked_step(opt)
    p = params[2]
    assert p.grad is not None
    t = {"parameter": p, "gradient": p.grad, "state": opt.state[p][STATES[rule][0]]}[of]
    address, values = t.data_ptr(), t.detach().clone()
    t.data.neg_()
    t.data = torch._neg_view(t.data)
    assert t.is_neg()
    assert t.data_ptr() == address
    assert torch.equal(t, values)
    if of == "parameter":
        with untouched(opt), pytest.raises(ValueError, match="negated view"):
            opt.step()
        return
    for _ in range(2):
        checked_step(opt)


@every
def test_states_that_were_begun_anew_and_then_moved(rule: str, walk: str) -> None:
    """Cleared states lie in a new buffer; those of the old one are watched as before."""
    pair = Pair(rule, parameters(ALIKE))
    pair.step(0, runs=1)
    for i in (0, 3, 0):
        for opt, params in pair.both():
            opt.state[params[i]].clear()
        pair.step(1)
    for opt, params in pair.both():
        swap_states(opt, params)
    pair.step(2)
    for opt, params in pair.both():
        exchange_states(opt, params)
    pair.step(3)


@every
def test_old_states_are_not_written(rule: str, walk: str) -> None:
    """Who holds a state dictionary from before keeps its numbers, flat memory or not."""
    pair = Pair(rule)
    pair.step(0, runs=1)
    pair.step(1, runs=1)
    for way in (lambda opt: opt.state.clear(), lambda opt: [own.clear() for own in opt.state.values()]):
        saved = pair.opt.state_dict()["state"]
        copies = copy.deepcopy(saved)
        for opt, _ in pair.both():
            way(opt)
        for t in range(3):
            pair.step(t, runs=1)
        for i, own in saved.items():
            assert_same_state(own, copies[i])


@every
def test_states_from_before_stay(rule: str, walk: str) -> None:
    """An optimizer that is made flat under way goes on to the bit, and in one run once its state was loaded."""
    params = parameters(SHAPES)
    opt = build(rule, params)
    for t in range(2):
        set_gradients(params, t)
        checked_step(opt)
    before = {p: dict(opt.state[p]) for p in params}
    flatten_(params)
    for t in range(2):
        fill(params, t)
        checked_step(opt)
        assert_runs(opt, len(SHAPES))
    assert all(opt.state[p][name] is before[p][name] for p in params for name in STATES[rule])
    opt.load_state_dict(opt.state_dict())
    for t in range(2):
        fill(params, 3 + t)
        checked_step(opt)
        assert_runs(opt, 1)
    flatten_(params)  # again: nothing moves, nothing is lost
    fill(params, 7)
    checked_step(opt)
    assert_runs(opt, 1)


def test_options_turned_on_later(walk: str) -> None:
    """amsgrad and momentum: the new state is flat as the others are."""
    for rule, off, on in (
        ("adamw", {"amsgrad": False}, {"amsgrad": True}),
        ("sgdw", {"momentum": 0.0}, {"momentum": 0.9}),
    ):
        pair = Pair(rule, dampening=0.25, **off) if rule == "sgdw" else Pair(rule, **off)
        for t in range(6):
            for opt, _ in pair.both():
                opt.param_groups[0].update(on if t in (2, 3, 5) else off)
            pair.step(t, runs=1)


def test_memory_that_is_no_longer_the_buffers(walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that lie where a buffer was, one by one: what is between them is somebody else's."""
    memory = torch.full((1000,), 0x5AC35AC3, dtype=torch.int32)
    zeros, taken = torch.zeros, [memory.data_ptr()]

    def at(address: int, n: int) -> Tensor:
        return torch.frombuffer((ctypes.c_float * n).from_address(address), dtype=torch.float32)

    def placed(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") is not torch.float32 or not isinstance(args[0], int) or args[0] != 160:
            return zeros(*args, **kwargs)
        taken.append(taken[-1] + 4 * 160)
        return at(taken[-2], 160).zero_()

    params = [nn.Parameter(torch.randn(20)) for _ in range(5)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", placed)
        flatten_(params)
        opt = build("adamw", params)
        fill(params, 0)
        checked_step(opt)
        assert_runs(opt, 1)
    assert len(taken) == 5
    buffer = place_of(params[0]).memory
    for p in params:  # all moves away, the buffers go
        p.data, p.grad.data = p.data.clone(), p.grad.data.clone()
    assert buffer.data is None
    memory.view(torch.float32)[:320].view(10, 32)[:, 20:] = torch.nan
    canaries = memory.clone()
    for k, p in enumerate(params):  # and back, to the same addresses
        assert p.grad is not None
        p.data = at(taken[0] + 128 * k, 20).copy_(p.data)
        p.grad.data = at(taken[1] + 128 * k, 20).copy_(p.grad.data)
    checked_step(opt)
    checked_step(opt)
    assert_runs(opt, 5)
    between = memory[:320].view(10, 32)[:, 20:]
    assert torch.equal(between, canaries[:320].view(10, 32)[:, 20:])


@every
def test_a_square_parameter_is_transposed_where_it_lies(rule: str, walk: str) -> None:
    """Its address and shape stay: only strides tell it."""
    params = parameters(((3,), (4, 4), (5, 2)))
    flatten_(params)
    opt = build(rule, params)
    for step in range(4):
        fill(params, step)
        if step == 2:
            params[1].data = params[1].data.t()
        checked_step(opt, f"step {step}")
