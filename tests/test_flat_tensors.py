"""Flat parameters as tensors: gradients that are zeroed, and the memory behind them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import semantics
import torch
from bits import assert_untouched
from flat_pairs import ALIKE, SHAPES, Pair, assert_runs, attached, fill, swap_states
from semantics import STATES, build, checked_step, parameters, plain, set_gradients
from torch import Tensor, nn

from wd_kernels import flatten_, native, unflatten_
from wd_kernels.flat import buffers as flat
from wd_kernels.flat import place_of
from wd_kernels.layout import padded

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


# Gradients that are zeroed --------------------------------------------------------------------------------------------


def test_zero_grad_keeps_gradients() -> None:
    """As torch's, to the letter: gradients stay the tensors that they are, those elsewhere too; None stays None."""
    params = [*parameters(SHAPES), *parameters(ALIKE, torch.bfloat16)]
    opt = build("adamw", params)
    flatten_(params)
    for t, change in enumerate((lambda p: None, lambda p: p.grad, lambda p: torch.ones_like(p))):
        for p in params[2:4]:
            p.grad = change(p)
        fill(params, t)
        grads = [p.grad for p in params]
        opt.zero_grad(set_to_none=False)
        assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
        assert not any(bool(grad.any()) for grad in grads if grad is not None)
        opt.zero_grad()
        assert all(p.grad is None for p in params)
        flatten_(params)


def test_zero_grad_is_one_memset_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [*parameters(SHAPES), *parameters(ALIKE, torch.bfloat16)]
    flatten_(params)
    opt = build("adamw", [{"params": params[1::2]}, {"params": params[::2]}])
    fell_back: list[bool] = []
    ordinary = torch.optim.Optimizer.zero_grad
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda *args: (fell_back.append(True), ordinary(*args))[0])
    for missing in ((), (3,), (0, 1, 2)):
        for i in missing:
            params[i].grad = None
        fill(params, 1)
        opt.zero_grad(set_to_none=False)
        assert not any(bool(p.grad.any()) for p in params if p.grad is not None)
        assert [p.grad is None for p in params] == [i in (3, 0, 1, 2)[: 4 * len(missing)] and p.grad is None
                                                    for i, p in enumerate(params)]  # fmt: skip
    assert not fell_back


def test_zero_grad_of_one_of_two_optimizers() -> None:
    """A generator and its critic in one buffer: neither zeroes what is the other's, nor steps it."""
    params = parameters(SHAPES)
    flatten_(params)
    opts = [build("adamw", params[:3]), build("sgdw", params[3:])]
    for t in range(4):
        fill(params, t)
        grads = [plain(p.grad) for p in params]
        checked_step(opts[t % 2])
        checked_step(opts[t % 2])
        assert_runs(opts[t % 2], 1)
        opts[t % 2].zero_grad(set_to_none=False)
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            assert p.grad is not None
            assert_untouched(p.grad, torch.zeros_like(p) if (i >= 3) == (t % 2) else grad)


def test_zero_grad_spares_what_somebody_holds() -> None:
    """A gradient that its parameter no longer has is not zeroed: torch's zero_grad cannot know it either."""
    params = parameters(SHAPES)
    flatten_(params)
    opt = build("adamw", params)
    fill(params, 0)
    held, params[1].grad = params[1].grad, None
    assert held is not None
    copied = plain(held)
    opt.zero_grad(set_to_none=False)
    assert_untouched(held, copied)
    assert not any(bool(p.grad.any()) for p in params if p.grad is not None)
    flatten_(params)
    assert_untouched(held, copied)
    assert params[1].grad is not None
    assert not params[1].grad.any()
    assert all(map(attached, params))


def test_zero_grad_where_a_flat_buffer_was() -> None:
    """A new gradient at the address of the freed buffer is zeroed like any other."""
    n = 2**24  # what is as large is mapped by itself, the next of its size into the first hole: one of some lies there
    for _ in range(20):
        p = nn.Parameter(torch.zeros(n))
        flatten_([p])
        opt = build("adamw", [p])
        opt.zero_grad(set_to_none=False)
        assert p.grad is not None
        address, p.grad = p.grad.data_ptr(), None
        found = [torch.empty(n) for _ in range(32)]
        p.grad = next((t for t in found if t.data_ptr() == address), found[0]).fill_(1.0)
        again = p.grad.data_ptr() == address
        opt.zero_grad(set_to_none=False)
        assert not p.grad.any()
        if again:
            break
    assert again


def test_flattening_again_keeps_gradients() -> None:
    """Wherever they lie: in each other's stretch, elsewhere, in no place yet."""
    params = parameters(ALIKE)
    (buffer,) = flatten_(params)
    fill(params, 0)
    values = [plain(p.grad) for p in params]
    grads = [p.grad for p in params]
    for i, p in enumerate(params[:4]):
        p.grad = grads[(i + 1) % 4]
    params[4].grad = None
    params[4].grad = torch.full((16,), 7.0)
    (again,) = flatten_(params)
    assert again.data is buffer.data
    for i, p in enumerate(params):
        assert attached(p)
        assert p.grad is not None
        assert_untouched(p.grad, values[(i + 1) % 4] if i < 4 else torch.full((16,), 7.0))
    for grad, old in zip(grads, values, strict=True):
        assert grad is not None
        assert_untouched(grad, old)  # whoever holds them
    mine = [p.grad for p in params]
    flatten_(params[1:3])  # a part, all attached: nothing happens
    assert all(p.grad is grad for p, grad in zip(params, mine, strict=True))


# Memory ---------------------------------------------------------------------------------------------------------------


def test_buffers_alias_their_tensors() -> None:
    params = parameters(SHAPES)
    (buffer,) = flatten_(iter(params))
    assert repr(buffer) == "FlatBuffer(448 elements of torch.float32 on cpu, gradients attached)"
    assert (buffer.numel, buffer.dtype, buffer.device) == (448, torch.float32, torch.device("cpu"))
    fill(params, 0)
    for whole, own in (buffer.data, [p.detach() for p in params]), (buffer.grad, [p.grad for p in params]):
        assert whole is not None
        offset = 0
        for t in own:
            assert t is not None
            assert t.data_ptr() == whole.data_ptr() + 4 * offset
            assert t.data_ptr() % 64 == 0
            assert_untouched(whole[offset : offset + t.numel()].view(t.shape), t)
            assert not whole[offset + t.numel() : padded(offset + t.numel())].any()
            offset += padded(t.numel())
        assert offset == whole.numel()
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    assert buffer.grad is not None
    assert torch.allclose(buffer.grad.norm(), norm)
    buffer.grad.mul_(2)
    assert torch.allclose(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]), 2 * norm)


@both
def test_buffers_are_freed(rule: str, walk: str) -> None:
    params = parameters(SHAPES)
    (buffer,) = flatten_(params)
    opt = build(rule, params)
    for t in range(2):
        fill(params, t)
        checked_step(opt)
    opt.zero_grad()
    set_gradients(params, 2)
    checked_step(opt)
    assert buffer.grad is None
    assert "elsewhere" in repr(buffer)
    for t in range(2):
        set_gradients(params, 3 + t)
        checked_step(opt)
    flatten_(params)  # again: the gradients are given new memory
    assert buffer.grad is not None
    fill(params, 5)
    checked_step(opt)
    assert_runs(opt, 1)
    memory = place_of(params[0]).memory
    for p in params[1:]:
        p.data = p.data.clone()
    assert memory.data is not None
    assert buffer.data is buffer.grad is None
    unflatten_(params)
    assert memory.data is None
    assert not any(place.memory is memory for place in flat.places.values())
    assert memory.grad is None or walk == "native"  # the table holds gradients until the next step
    fill(params, 6)
    checked_step(opt)
    assert memory.grad is None
    bases = [
        weakref.ref(base) for base in (b.tensor() for b in opt._table.flat_states._bases.values()) if base is not None
    ]
    assert bases
    opt.load_state_dict(opt.state_dict())
    assert all(ref() is None for ref in bases)


@both
@pytest.mark.usefixtures("own_garbage")
def test_what_is_deleted_is_freed(rule: str, walk: str) -> None:
    """The model with its optimizer, or either alone; without the garbage collector's help where torch needs none."""
    refs: list[weakref.ref[Any]] = []
    for _ in range(2):
        params = parameters(SHAPES)
        flatten_(params)
        memory = place_of(params[0]).memory
        opt = build(rule, params)
        for t in range(3):
            fill(params, t)
            opt.step()
        refs += [weakref.ref(p) for p in params]
        refs += [weakref.ref(p.grad) for p in params if p.grad is not None]
        refs += [weakref.ref(own[name]) for own in opt.state.values() for name in STATES[rule]]
        gone = [weakref.ref(own[name]) for own in opt.state.values() for name in STATES[rule]]
        del opt
        gc.collect()
        assert all(ref() is None for ref in gone)
        del params
        gc.collect()
        assert memory.data is None
        assert memory.grad is None
    assert all(ref() is None for ref in refs)


@pytest.mark.usefixtures("own_garbage")
def test_many_steps_keep_nothing(walk: str) -> None:
    """As many tensors live after fifty steps with every kind of exchange as after five."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    pair = Pair("adamw", parameters(ALIKE))
    counts = []
    for t in range(24):
        pair.step(t)
        swap_states(pair.opt, pair.params)
        swap_states(pair.twin, pair.twins)
        if t % 4 == 1:
            pair.opt.zero_grad()
        if t % 4 in (1, 3):
            flatten_(pair.params)
        if t % 4 == 2:
            for opt, _ in pair.both():
                opt.load_state_dict(opt.state_dict())
        if t % 4 == 3:
            unflatten_(pair.params)
            flatten_(pair.params)
            counts.append(alive())
    assert len(set(counts[1:])) == 1
    assert len({place_of(p) for p in pair.params}) == 5
    assert len([place for place in flat.places.values() if place.memory is place_of(pair.params[0]).memory]) == 5


@both
def test_a_step_without_gradients_where_all_are_inspected(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are taken away whose memory somebody still holds: nothing is stepped, and the step ends."""
    monkeypatch.setattr(native, "CHECKS", False)
    params = parameters(SHAPES)
    opt = build(rule, params)
    flatten_(params)
    fill(params, 0)
    checked_step(opt)
    held = [p.grad for p in params]
    for p in params:
        p.grad = None
    before = [p.detach().clone() for p in params]
    opt.step()
    for p, own in zip(params, before, strict=True):
        assert_untouched(p, own)
    for p, grad in zip(params, held, strict=True):
        p.grad = grad
    checked_step(opt)
