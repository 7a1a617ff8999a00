"""Gradients of every make and layout, and what lies beside them in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import semantics
import torch
from bits import assert_untouched, raw
from semantics import (
    STATES,
    all_params,
    build,
    checked_step,
    go_on,
    parameters,
    plain,
    running,
    set_gradients,
    untouched,
)
from torch import Tensor, nn

from wd_kernels.layout import Place

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


# Gradients ------------------------------------------------------------------------------------------------------------

SQUARE = torch.arange(16.0).view(4, 4) / 7 - 1
BUFFER = torch.arange(64.0) / 9 - 3

GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "new object": lambda: SQUARE.clone(),
    "view of a buffer": lambda: BUFFER[16:32].view(4, 4),
    "unaligned view": lambda: BUFFER[3:19].view(4, 4),
    "transposed": lambda: BUFFER[16:32].view(4, 4).t(),
    "gapped": lambda: BUFFER.view(8, 8)[::2, 1::2],
    "expanded": lambda: torch.tensor(0.3).expand(4, 4),
    "expanded rows": lambda: BUFFER[:4].expand(4, 4),
    "negative view": lambda: torch._neg_view(SQUARE.clone()),
    "imaginary part of a conjugate": lambda: torch.complex(SQUARE, SQUARE + 1).conj().imag,
    "as parameter": lambda: nn.Parameter(SQUARE.clone()),
    "that is a graph's": lambda: SQUARE.clone().requires_grad_() * 2,
    "shared": lambda: SQUARE,
    "bfloat16": lambda: SQUARE.bfloat16(),
    "float16": lambda: SQUARE.half(),
}


class Plain(Tensor):
    """A subclass without dispatch of its own."""


GRADIENTS["plain subclass"] = lambda: SQUARE.clone().as_subclass(Plain)


def give(p: Tensor, grad: Tensor) -> None:
    """Sets a gradient of whatever dtype."""
    if grad.dtype == p.dtype:
        p.grad = grad if type(grad) is not nn.Parameter else grad.detach()
        if type(grad) is nn.Parameter:
            p.grad = grad
    else:
        p.grad = torch.zeros_like(p)
        p.grad.data = grad


@both
@pytest.mark.parametrize("first", list(GRADIENTS))
def test_gradients_of_every_make_after_each_other(rule: str, first: str, walk: str) -> None:
    """From one make of gradient to each other one, with the parameter in the middle of two."""
    opt = running(rule, parameters(((33,), (4, 4), (7, 5))))
    p = all_params(opt)[1]
    for second in GRADIENTS:
        for name in (first, second):
            set_gradients(all_params(opt), len(name))
            give(p, GRADIENTS[name]())
            checked_step(opt, f"{first}, {second}")


@both
def test_an_address_comes_back_with_another_layout(rule: str, walk: str) -> None:
    """A gradient is freed, and its memory becomes the next one with other strides, another shape, another dtype."""
    memory = torch.randn(64)
    opt = running(rule, parameters(((4, 4), (33,))))
    p = all_params(opt)[0]
    views: list[Tensor] = [
        memory[:16].view(4, 4),
        memory[:16].view(4, 4).t(),
        memory[:64:4].view(4, 4),
        memory[:16].view(4, 4),
        memory[:4].expand(4, 4),
        memory.view(torch.bfloat16)[:16].view(4, 4),
        memory[:16].view(4, 4),
        torch._neg_view(memory[:16]).view(4, 4),
        memory[:16].view(4, 4),
    ]
    for view in views:
        assert view.data_ptr() == memory.data_ptr()
        give(p, view)
        assert p.grad is not None
        assert p.grad.data_ptr() == memory.data_ptr()
        checked_step(opt)
        p.grad = None
    p.data = torch.randn(2, 8)
    opt.state[p] = {}
    p.grad = memory[:16].view(2, 8)
    checked_step(opt)


@both
def test_the_same_gradient_object_changes_its_data(rule: str, walk: str) -> None:
    opt = running(rule, parameters(((4, 4), (33,))))
    p = all_params(opt)[0]
    grad = p.grad
    assert grad is not None
    for data in (SQUARE + 1, SQUARE.t(), BUFFER[1:17].view(4, 4), SQUARE.bfloat16(), SQUARE.expand(4, 4), SQUARE * 2):
        grad.data = data
        assert p.grad is grad
        checked_step(opt)
        grad.mul_(-3)
        checked_step(opt)


@both
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_element_with_a_negative_bit(rule: str, shape: tuple[int, ...], walk: str) -> None:
    """Autograd itself gives such gradients; one step has the bit, the next has not."""
    a, b = (nn.Parameter(torch.full(shape, v)) for v in (0.3, 0.4))
    opt = build(rule, [a, b])
    for t in range(6):
        opt.zero_grad()
        if t % 2:
            ((a + 2 * b) * (1 + t)).sum().backward()
        else:
            torch.complex(a, b).conj().backward(torch.full(shape, 1 + 2j * (1 + t)))
        assert a.grad is not None
        assert b.grad is not None
        assert b.grad.is_neg() == (t % 2 == 0)
        before = plain(b)
        checked_step(opt)
        if t == 0:
            assert (b - before).sum().item() > 0  # downhill for a gradient of -2
    for t in range(4):  # the bit goes and comes on the same object at the same address, seen before
        assert b.grad is not None
        b.grad.data = torch._neg_view(b.grad.data)
        assert b.grad.is_neg() == (t % 2 == 0)
        for _ in range(3):
            checked_step(opt)
    for value in (opt.state[b][STATES[rule][0]], b):
        value.data = torch._neg_view(value.data)
        if value is b:
            with untouched(opt), pytest.raises(ValueError, match="lazily conjugated or negated"):
                opt.step()
        else:
            checked_step(opt)
            checked_step(opt)


@both
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_views(rule: str, dtype: torch.dtype, walk: str) -> None:
    """Conjugate, negative, transposed and gapped gradients; conjugate states; parameters must be resolved."""
    opt = running(rule, parameters(((4, 4), (3,)), dtype))
    p = all_params(opt)[0]
    grad = torch.complex(SQUARE, SQUARE.t() * 2).to(dtype)
    for view in (grad, grad.conj(), grad, torch._neg_view(grad), grad.mH, grad.t(), grad[:, :1].expand(4, 4), grad):
        p.grad = view
        checked_step(opt)
    memory = p.grad.data
    for _ in range(2):
        for data in (memory.conj(), memory, memory):
            p.grad.data = data
            assert p.grad.is_conj() == data.is_conj()
            checked_step(opt)
    name = STATES[rule][0]
    opt.state[p][name] = opt.state[p][name].conj()
    checked_step(opt)
    checked_step(opt)
    opt.state[p][name].data = opt.state[p][name].conj()
    assert opt.state[p][name].is_conj()
    checked_step(opt)
    p.data = p.data.conj()
    with untouched(opt), pytest.raises(ValueError, match="parameter 0 of group 0 is a lazily conj"):
        opt.step()
    p.data = p.data.resolve_conj()
    go_on(opt)
    p.data = torch.view_as_complex(torch.randn(4, 4, 4, dtype=grad.real.dtype)[..., 2:])  # gaps in it
    go_on(opt)


@both
def test_gradients_missing_and_back_while_things_move(rule: str, walk: str) -> None:
    """What moves while a parameter has no gradient is noticed when the gradient is back."""
    opt = running(rule)
    params = all_params(opt)
    for t in range(5):
        set_gradients(params, t, skip=[0, 2])
        checked_step(opt)
        params[0].data = torch.randn(4, 4).t() if t % 2 else torch.randn(4, 8)[:, ::2]
        for name in STATES[rule]:
            opt.state[params[2]][name] = opt.state[params[2]][name] + 1
        opt.state[params[2]]["step"] = 20 + t
        checked_step(opt)
        set_gradients(params, 30 + t, skip=[4])
        checked_step(opt)
    assert float(opt.state[params[2]]["step"]) == 25


@both
def test_states_exchanged_while_one_has_no_gradient(rule: str, walk: str) -> None:
    """A count that lies in another parameter's place is not counted on with it."""
    opt = running(rule, parameters(((4, 4), (4, 4), (3,))))
    p, q, _ = all_params(opt)
    opt.state[q]["step"].fill_(10)
    opt.state[p], opt.state[q] = opt.state[q], opt.state[p]
    q.grad = None
    for _ in range(2):
        checked_step(opt)
    assert (float(opt.state[p]["step"]), float(opt.state[q]["step"])) == (12, 3)
    go_on(opt)


# Layouts --------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dense_layouts_need_no_copies(rule: str, dtype: torch.dtype, walk: str) -> None:
    """channels_last and transposed parameters, gradients like them: the states too, and no stand-in is made."""
    params = [
        nn.Parameter(torch.randn(3, 4, 5, 2).to(dtype, memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(6, 7).to(dtype).t()),
        nn.Parameter(torch.randn(2, 3, 4).to(dtype).permute(2, 0, 1)),
        nn.Parameter(torch.randn(5, 1, 3).to(dtype).transpose(0, 1)),
    ]
    opt = build(rule, params)
    for t in range(3):
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
            assert p.grad.stride() == p.stride()
        checked_step(opt)
        for p in params:
            for name in STATES[rule]:
                assert opt.state[p][name].stride() == p.stride()
            if t:
                p.grad = torch.empty(p.shape, dtype=dtype).copy_(torch.randn(p.shape))
        checked_step(opt)
    assert all(known.param_copy is None for known in opt._table.known)


@both
def test_gaps_are_not_written(rule: str, walk: str) -> None:
    """Sliced parameters: right bits, and what lies between their elements keeps its own."""
    memory = torch.randn(8, 12)
    before = memory.clone()
    params = [nn.Parameter(memory[:4, 1:9:2]), nn.Parameter(memory[4:, 2:7]), nn.Parameter(memory[:4, 0:9:2][:, 1:3])]
    own = torch.zeros(8, 12, dtype=torch.bool)
    own[:4, 1:9:2] = own[4:, 2:7] = own[:4, 2:6:2] = True
    opt = build(rule, params)
    for t in range(4):
        set_gradients(params, t, skip=[t])
        checked_step(opt)
        with torch.no_grad():  # what a stand-in held is out of date
            params[t % 3].mul_(1.5)
    assert torch.equal(raw(memory)[~own], raw(before)[~own])
    assert bool((memory != before)[own].all())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_canaries(rule: str, dtype: torch.dtype, walk: str) -> None:
    """Nothing beside a parameter or a state is written, whatever its size and alignment; gradients are only read."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = [*range(1, 36), 63, 64, 65, 127, 129]
    pad = 3

    def cut(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
        memory = torch.randn(sum(sizes) + pad * len(sizes)).to(dtype)
        free = torch.ones(memory.shape, dtype=torch.bool)
        pieces, at = [], 1
        for i, size in enumerate(sizes):
            pieces.append(memory[at : at + size])
            free[at : at + size] = False
            at += size + i % (pad + 1)
        return memory, pieces, free

    weights, pieces, free = cut(dtype)
    gradients, grad_pieces, _ = cut(dtype)
    params = [nn.Parameter(piece) for piece in pieces]
    opt = build(rule, params)
    memories = [(weights, free)]
    for name in STATES[rule]:
        memory, state_pieces, free = cut(wide)
        memory.abs_()
        memories.append((memory, free))
        for p, piece in zip(params, state_pieces, strict=True):
            opt.state[p].update({name: piece, "step": 1})
    for p, grad in zip(params, grad_pieces, strict=True):
        p.grad = grad
    before = [memory.clone() for memory, _ in memories]
    read = gradients.clone()
    for t in range(3):
        params[t].grad = None
        checked_step(opt)
        params[t].grad = grad_pieces[t]
        for p in params:
            for name in STATES[rule]:
                assert any(opt.state[p][name]._base is memory for memory, _ in memories)
    assert_untouched(gradients, read)
    for (memory, free), old in zip(memories, before, strict=True):
        assert torch.equal(raw(memory)[free], raw(old)[free])
        assert int((memory != old).sum()) > 0.9 * int((~free).sum())


@both
def test_alignment_is_told_truly(rule: str, walk: str) -> None:
    """A segment's flag is 1 only if all its addresses are multiples of 16, in every step: vector code relies on it."""
    aligned, off = torch.randn(64), torch.randn(65)[1:]
    p, q = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(65)[1:])
    opt = build(rule, [p, q])
    for t in range(12):
        p.grad = q.grad = (aligned, off, aligned.clone())[t % 3]
        if t >= 6:
            opt.state[p][STATES[rule][-1]] = (aligned, off)[t % 2].square().clone() if t % 2 == 0 else off.square()
            if t % 4 == 1:
                opt.state[p][STATES[rule][-1]] = torch.cat([torch.zeros(1), off.square()])[1:]
        checked_step(opt)
        flags = set()
        segments = opt._table.segments
        for (grad, _, _, flag), place in zip(segments.moving.tolist(), segments.places.tolist(), strict=True):
            addresses = (grad, *place[Place.ADDRESSES : Place.ADDRESSES + 1 + len(STATES[rule])])
            assert flag == all(address % 16 == 0 for address in addresses)
            flags.add(flag)
        assert flags == ({0, 1} if t % 3 != 1 and (t < 6 or t % 4 != 1) else {0})


@both
def test_fewer_rows_at_the_same_place(rule: str, walk: str) -> None:
    """Address, strides and dtype of every role stay; what lies behind the rows that are left is not written."""
    whole, grads = SQUARE.clone(), BUFFER[16:32].view(4, 4)
    p = nn.Parameter(whole)
    opt = build(rule, [p])
    for _ in range(2):
        p.grad = grads
        opt.step()
    own = opt.state[p]
    states = {name: own[name] for name in STATES[rule]}
    p.grad = None
    p.data = p.data[:3]
    p.grad = grads[:3]
    for name, state in states.items():
        own[name] = state[:3]
    behind = [t[3:].clone() for t in (whole, *states.values())]
    for _ in range(2):
        checked_step(opt)
    for t, before in zip((whole, *states.values()), behind, strict=True):
        assert_untouched(t[3:], before)
