"""Nothing is cached unchecked: whatever is exchanged, moved or laid out anew between two steps, the bits are right.

`checked_step` compares each step with one of a new optimizer on plain copies.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_bits, assert_same_optimizers, assert_untouched, raw
from semantics import (
    STATES,
    all_params,
    build,
    checked_step,
    contents,
    parameters,
    plain,
    plain_copy,
    set_gradients,
    untouched,
)
from torch import Tensor, nn

walk = semantics.walk
pytestmark = pytest.mark.filterwarnings("ignore:this state has")
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


def running(rule: str, params: list[nn.Parameter] | None = None, steps: int = 3, **options: Any) -> Any:
    """An optimizer after some steps: the table is built, and knows its gradients."""
    opt = build(rule, parameters() if params is None else params, **options)
    for t in range(steps):
        set_gradients(all_params(opt), t)
        opt.step()
    return opt


def go_on(opt: Any, steps: int = 3) -> None:
    for t in range(steps):
        set_gradients(all_params(opt), 50 + t, skip=[1] if t == 1 else [])
        checked_step(opt, f"step {t} after")


# Parameters -----------------------------------------------------------------------------------------------------------


def narrow_shape(opt: Any, p: Tensor) -> None:
    p.grad = None
    p.data = torch.randn(9)
    opt.state[p] = {}


def larger_shape(opt: Any, p: Tensor) -> None:
    """As 3D Gaussian splatting densifies: state grown by hand, the same step count."""
    p.grad = None
    p.data = torch.cat([p.data, torch.randn(3, 4)])
    for name in STATES["adamw"] + STATES["sgdw"]:
        if name in opt.state[p]:
            opt.state[p][name] = torch.cat([opt.state[p][name], torch.zeros(3, 4)])


def other_dtype(dtype: torch.dtype) -> Callable[[Any, Tensor], None]:
    def mutate(opt: Any, p: Tensor) -> None:
        p.grad = None
        p.data = p.data.to(dtype)

    return mutate


def transposed_view(opt: Any, p: Tensor) -> None:
    p.data = p.data.t()  # same address, same shape


def gapped_view(opt: Any, p: Tensor) -> None:
    p.data = torch.randn(4, 9)[:, 1::2]


def set_storage(opt: Any, p: Tensor) -> None:
    with torch.no_grad():
        p.set_(torch.randn(4, 4))


def swapped_with_another(opt: Any, p: Tensor) -> None:
    other = nn.Parameter(torch.randn(4, 4))
    p.grad = None
    torch.utils.swap_tensors(p, other)


def swapped_data(opt: Any, p: Tensor) -> None:
    q = next(q for q in all_params(opt) if q is not p and q.shape == p.shape)
    p.data, q.data = q.data, p.data


PARAMETERS: dict[str, Callable[[Any, Tensor], None]] = {
    "new data": lambda opt, p: setattr(p, "data", torch.randn(4, 4)),
    "unaligned data": lambda opt, p: setattr(p, "data", torch.randn(17)[1:].view(4, 4)),
    "smaller data": narrow_shape,
    "larger data": larger_shape,
    "float64": other_dtype(torch.float64),
    "bfloat16": other_dtype(torch.bfloat16),
    "float16": other_dtype(torch.float16),
    "transposed view": transposed_view,
    "gapped view": gapped_view,
    "set_": set_storage,
    "swap_tensors": swapped_with_another,
    "data of two exchanged": swapped_data,
}

# States ---------------------------------------------------------------------------------------------------------------


def each_state(change: Callable[[Any, dict[str, Any], str], None]) -> Callable[[Any, Tensor], None]:
    def mutate(opt: Any, p: Tensor) -> None:
        for name, value in list(opt.state[p].items()):
            if name != "step" and isinstance(value, Tensor):
                change(value, opt.state[p], name)

    return mutate


def put(make: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], None]:
    return each_state(lambda value, own, name: own.__setitem__(name, make(value)))


def put_data(make: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], None]:
    return each_state(lambda value, own, name: setattr(value, "data", make(value)))


def put_step(make: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], None]:
    return lambda opt, p: opt.state[p].__setitem__("step", make(opt.state[p]["step"]))


def own_dict(opt: Any, p: Tensor) -> None:
    opt.state[p] = {k: v.clone() for k, v in opt.state[p].items()}


def unaligned(t: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape)


def exchanged_states(opt: Any, p: Tensor) -> None:
    q = next(q for q in all_params(opt) if q is not p and q.shape == p.shape)
    opt.state[p]["step"].fill_(11)
    opt.state[p], opt.state[q] = opt.state[q], opt.state[p]


def entry_moved_to_the_end(opt: Any, p: Tensor) -> None:
    opt.state[p] = opt.state.pop(p)


def foreign_entries(opt: Any, p: Tensor) -> None:
    opt.state["mine"] = {"step": torch.tensor(5.0)}
    opt.state[torch.zeros(3)] = {}


def given_away(opt: Any, p: Tensor) -> None:
    """The last entry of the state, under a key that is no parameter: its parameter starts anew."""
    q = next(q for q in reversed(opt.state) if q in set(all_params(opt)))
    opt.state[torch.zeros(1)] = opt.state.pop(q)


STATE: dict[str, Callable[[Any, Tensor], None]] = {
    "own dict": own_dict,
    "shallow copy of the dict": lambda opt, p: opt.state.__setitem__(p, dict(opt.state[p])),
    "ordered dict": lambda opt, p: opt.state.__setitem__(p, OrderedDict(opt.state[p])),
    "new tensors": put(lambda t: t * 2),
    "unaligned tensors": put(unaligned),
    "tensors laid out otherwise": put(lambda t: t.t().contiguous().t()),
    "gapped tensors": put(lambda t: torch.stack([t, t], -1)[..., 0]),
    "bfloat16 tensors": put(lambda t: t.bfloat16()),
    "negative tensors": put(lambda t: torch._neg_view(-t)),
    "parameters as tensors": put(lambda t: nn.Parameter(t.clone())),
    "new data": put_data(lambda t: t * 3),
    "data laid out otherwise": put_data(lambda t: t.t()),
    "changed in place": each_state(lambda value, own, name: value.mul_(0.5)),
    "cleared": lambda opt, p: opt.state.clear(),
    "deleted": lambda opt, p: opt.state.pop(p),
    "emptied": lambda opt, p: opt.state[p].clear(),
    "None": lambda opt, p: opt.state.__setitem__(p, None),
    "a new dict for all": lambda opt, p: setattr(opt, "state", defaultdict(dict, opt.state)),
    "an ordered dict for all": lambda opt, p: setattr(opt, "state", OrderedDict(reversed(opt.state.items()))),
    "copies for all": lambda opt, p: setattr(
        opt, "state", {q: {k: v.clone() for k, v in own.items()} for q, own in opt.state.items()}
    ),
    "moved to the end": entry_moved_to_the_end,
    "exchanged": exchanged_states,
    "foreign entries": foreign_entries,
    "given away": given_away,
    "step in place": lambda opt, p: opt.state[p]["step"].fill_(9),
    "step int": put_step(lambda s: 9),
    "step float": put_step(lambda s: 9.0),
    "step float64": put_step(lambda s: torch.tensor(9.0, dtype=torch.float64)),
    "step int64 of shape (1,)": put_step(lambda s: torch.tensor([9])),
    "step of another": lambda opt, p: opt.state[p].__setitem__("step", opt.state[all_params(opt)[0]]["step"]),
}

# Groups ---------------------------------------------------------------------------------------------------------------


def group_change(make: Callable[[list[Any]], Any]) -> Callable[[Any, Tensor], None]:
    def mutate(opt: Any, p: Tensor) -> None:
        opt.param_groups[0]["params"] = make(opt.param_groups[0]["params"])

    return mutate


def replaced_parameter(opt: Any, p: Tensor) -> None:
    """Another object takes the place and the state, as pruning does."""
    params = opt.param_groups[0]["params"]
    i = next(i for i, q in enumerate(params) if q is p)
    params[i] = nn.Parameter(torch.randn(p.shape))
    opt.state[params[i]] = opt.state.pop(p)


def split_group(opt: Any, p: Tensor) -> None:
    group = opt.param_groups[0]
    opt.param_groups.insert(0, {**group, "params": group["params"][2:], "lr": 0.2})
    group["params"] = group["params"][:2]


GROUPS: dict[str, Callable[[Any, Tensor], None]] = {
    "another list": group_change(list),
    "tuple": group_change(tuple),
    "ParameterList": group_change(nn.ParameterList),
    "reversed": group_change(lambda params: params[::-1]),
    "fewer": group_change(lambda params: params[1:]),
    "more": group_change(lambda params: [*params, nn.Parameter(torch.randn(5))]),
    "another object": replaced_parameter,
    "groups as a tuple": lambda opt, p: setattr(opt, "param_groups", tuple(opt.param_groups)),
    "new groups": lambda opt, p: setattr(opt, "param_groups", [dict(group) for group in opt.param_groups]),
    "split in two": split_group,
    "empty group in front": lambda opt, p: opt.param_groups.insert(0, {**opt.param_groups[0], "params": []}),
    "unknown keys": lambda opt, p: opt.param_groups[0].update(note=1),
}


def cases(table: dict[str, Callable[[Any, Tensor], None]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutate", list(table.values()), ids=list(table))


TWO_ALIKE = ((7, 5), (4, 4), (33,), (4, 4), ())


@both
@cases({**PARAMETERS, **STATE, **GROUPS})
def test_exchanged_between_steps(rule: str, mutate: Callable[[Any, Tensor], None], walk: str) -> None:
    opt = running(rule, parameters(TWO_ALIKE))
    mutate(opt, opt.param_groups[0]["params"][1])
    go_on(opt)
    again = [p for p in all_params(opt) if p.shape == (4, 4) and p.dtype == torch.float32]
    mutate(opt, again[-1])
    go_on(opt, 2)


@both
def test_the_border_between_two_groups_moves(rule: str, walk: str) -> None:
    """The same parameters in the same order, another group for one of them."""
    params = parameters(TWO_ALIKE)
    opt = build(rule, [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}])
    for t, border in enumerate((2, 2, 3, 3, 1, 1, 0, 5, 2)):
        opt.param_groups[0]["params"], opt.param_groups[1]["params"] = params[:border], params[border:]
        set_gradients(params, t)
        checked_step(opt, f"border {border}")


@both
def test_params_given_as_a_generator(rule: str, walk: str) -> None:
    a, b = running(rule), running(rule)
    a.param_groups[0]["params"] = iter(all_params(a))
    for t in range(3):
        set_gradients(all_params(b), t)
        if t == 0:
            for p, q in zip(list(a.state), all_params(b), strict=True):
                p.grad = plain(q.grad)
        else:
            set_gradients(all_params(a), t)
        a.step()
        b.step()
    assert_same_optimizers(a, b)


def test_every_mutation_can_be_seen() -> None:
    """Each case of the lists above changes what a table could have kept."""

    def seen(opt: Any) -> list[Any]:
        params = opt.param_groups[0]["params"]
        found = [contents(opt), id(opt.state), id(opt.param_groups), type(params), id(params)]
        found += [(id(p), p.data_ptr(), p.stride()) for p in all_params(opt)]
        found += [
            (id(v), v.data_ptr()) for own in opt.state.values() for v in (own or {}).values() if torch.is_tensor(v)
        ]
        return found + [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]

    for name, mutate in {**PARAMETERS, **STATE, **GROUPS}.items():
        opt = running("adamw", parameters(TWO_ALIKE))
        before = seen(opt)
        mutate(opt, opt.param_groups[0]["params"][1])
        assert seen(opt) != before, name


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
    assert all(slot.param_copy is None for slot in opt._table.slots)


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
        for segment in opt._table.segments.tolist():
            addresses = segment[: 2 + len(STATES[rule])]
            assert segment[11] == all(address % 16 == 0 for address in addresses)
            flags.add(segment[11])
        assert flags == ({0, 1} if t % 3 != 1 and (t < 6 or t % 4 != 1) else {0})


# Options that change what is needed -----------------------------------------------------------------------------------


def test_momentum_turned_on_off_and_on(walk: str) -> None:
    """The buffer begins undampened with the first gradient it sees, and is kept while momentum is off, as in torch."""
    mine, theirs = parameters(), parameters()
    opt = build("sgdw", mine, momentum=0.0, dampening=0.5, decay="l2")
    other = torch.optim.SGD(theirs, 0.05, 0.0, 0.5, 0.1, foreach=False)
    for t in range(10):
        momentum = 0.9 if t in (2, 3, 4, 7, 8, 9) else 0.0
        skip = [0] if t == 2 else []
        for o, params in ((opt, mine), (other, theirs)):
            o.param_groups[0]["momentum"] = momentum
            set_gradients(params, t, skip)
        checked_step(opt, f"step {t}")
        other.step()
        for p, q in zip(mine, theirs, strict=True):
            semantics.assert_close(p, q, 24)
        assert ("momentum_buffer" in opt.state[mine[1]]) == (t >= 2)
        assert ("momentum_buffer" in opt.state[mine[0]]) == (t >= 3)


def test_a_buffer_that_begins_beside_others_of_the_same_count(walk: str) -> None:
    """It takes its first gradient whole, in the step in which the others dampen theirs."""
    opt = running("sgdw", momentum=0.5, dampening=0.5)
    params = all_params(opt)
    for missing in ((2,), (0, 4), ()):
        for i in missing:
            del opt.state[params[i]]["momentum_buffer"]
        before = [opt.state[p].get("momentum_buffer", torch.zeros(())).clone() for p in params]
        set_gradients(params, 7)
        opt.step()
        for i, p in enumerate(params):
            assert p.grad is not None
            expected = p.grad if i in missing else 0.5 * before[i] + 0.5 * p.grad
            assert_same_bits(opt.state[p]["momentum_buffer"], expected)
        assert len({float(opt.state[p]["step"]) for p in params}) == 1


def test_amsgrad_turned_on_and_off(walk: str) -> None:
    """Its maximum begins at zero when it is turned on, and is kept while it is off."""
    params = parameters()
    opt = build("adamw", params)
    for t in range(9):
        opt.param_groups[0]["amsgrad"] = t in (3, 4, 7, 8)
        kept = plain(opt.state[params[1]]["max_exp_avg_sq"]) if t > 3 else None
        set_gradients(params, t, skip=[2] if t == 3 else [])
        checked_step(opt, f"step {t}")
        assert ("max_exp_avg_sq" in opt.state[params[1]]) == (t >= 3)
        assert ("max_exp_avg_sq" in opt.state[params[2]]) == (t >= 4)
        if t in (5, 6):
            assert kept is not None
            assert_untouched(opt.state[params[1]]["max_exp_avg_sq"], kept)


@both
def test_options_that_differ_between_groups(rule: str, walk: str) -> None:
    """Groups with and without the optional state, turned round and round."""
    params = parameters()
    opt = build(rule, [{"params": params[:2]}, {"params": params[2:3]}, {"params": params[3:]}])
    for t in range(6):
        for i, group in enumerate(opt.param_groups):
            on = (t + i) % 3 == 0
            group.update({"amsgrad": on} if rule == "adamw" else {"momentum": 0.8 if on else 0.0})
        set_gradients(params, t, skip=[t % 5])
        checked_step(opt, f"step {t}")


# Nothing half done ----------------------------------------------------------------------------------------------------


def last(opt: Any) -> Tensor:
    return all_params(opt)[-1]


def set_last_grad(make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def spoil(opt: Any) -> None:
        grad = last(opt).grad
        assert grad is not None
        grad.data = make(grad)

    return spoil


def sparse_gradient(opt: Any) -> None:
    last(opt).grad = torch.randn(last(opt).shape).to_sparse()


def emptied_gradient(opt: Any) -> None:
    grad = last(opt).grad
    assert grad is not None
    grad.untyped_storage().resize_(0)


def set_state(name: str, value: Any) -> Callable[[Any], None]:
    def spoil(opt: Any) -> None:
        p = last(opt)
        opt.state[p] = {k: v.clone() for k, v in opt.state[p].items()} if p in opt.state else {"step": 4.0}
        for key in semantics.STATES["adamw" if "betas" in opt.defaults else "sgdw"]:
            opt.state[p].setdefault(key, torch.ones_like(p))
            if name == "state":
                opt.state[p][key] = value
        if name != "state":
            opt.state[p][name] = value

    return spoil


def set_group(**options: Any) -> Callable[[Any], None]:
    return lambda opt: opt.param_groups[-1].update(options)


def overlapping(opt: Any) -> None:
    last(opt).data = all_params(opt)[0].data.view(-1)[: last(opt).numel()].view(last(opt).shape)


def twice(opt: Any) -> None:
    opt.param_groups[-1]["params"] = [*opt.param_groups[-1]["params"], all_params(opt)[0]]


def no_backend(opt: Any) -> None:
    opt.backend = "nothing"
    opt._new_table()


SPOILED: dict[str, Callable[[Any], None]] = {
    "gradient of another shape": set_last_grad(lambda g: torch.randn(99)),
    "gradient of another dtype": set_last_grad(lambda g: g.double()),
    "sparse gradient": sparse_gradient,
    "gradient without memory": emptied_gradient,
    "state of another shape": set_state("state", torch.zeros(99)),
    "state of a wider dtype": set_state("state", torch.zeros(2, 3, dtype=torch.float64)),
    "state that is no tensor": set_state("state", "mine"),
    "state that is no dict": lambda opt: opt.state.__setitem__(last(opt), [1]),
    "step -1": set_state("step", -1),
    "step 1.5": set_state("step", torch.tensor(1.5)),
    "step nan": set_state("step", torch.tensor(torch.nan)),
    "step 1e30": set_state("step", torch.tensor(1e30)),
    "step of two": set_state("step", torch.ones(2)),
    "step text": set_state("step", "1"),
    "lr nan": set_group(lr=torch.nan),
    "lr of two": set_group(lr=torch.ones(2)),
    "weight_decay -1": set_group(weight_decay=-1.0),
    "decay unknown": set_group(decay="decoupled"),
    "eta inf": set_group(eta=torch.inf),
    "overlapping data": overlapping,
    "given twice": twice,
    "unknown backend": no_backend,
}


@both
@pytest.mark.parametrize("spoil", list(SPOILED.values()), ids=list(SPOILED))
@pytest.mark.parametrize("steps", [0, 3])
def test_a_failed_step_changes_nothing(rule: str, spoil: Callable[[Any], None], steps: int, walk: str) -> None:
    """The last parameter is bad: the others keep bits, counts and keys; repaired, the next steps are right."""
    params = parameters()
    opt = running(rule, [*params], steps, dampening=0.5) if rule == "sgdw" else running(rule, [*params], steps)
    opt.add_param_group({"params": parameters([(8,), (2, 3)], seed=9)})
    set_gradients(all_params(opt), 20)
    p = last(opt)
    good = p.data, dict(opt.param_groups[-1]), opt.backend
    state = opt.state.get(p)
    spoil(opt)
    for _ in range(2):
        with untouched(opt), pytest.raises((TypeError, ValueError, RuntimeError)):
            opt.step()
    p.data, opt.backend = good[0], good[2]
    opt.param_groups[-1].clear()
    opt.param_groups[-1].update(good[1])
    if spoil is no_backend:
        opt._new_table()
    if state is None:
        opt.state.pop(p, None)
    else:
        opt.state[p] = state
    assert len(opt.state) == (len(params) if steps else 0)
    go_on(opt)


@both
def test_a_failed_step_in_the_midst(rule: str, walk: str) -> None:
    """Failing and good steps in turn, with the spoiled value in the table's own step vector."""
    opt = running(rule)
    params = all_params(opt)
    for t in range(3):
        opt.state[params[3]]["step"].fill_(0.5)
        set_gradients(params, t, skip=[1])
        with untouched(opt), pytest.raises(ValueError, match=r"step count of parameter 3 of group 0 is 0\.5"):
            opt.step()
        opt.state[params[3]]["step"].fill_(7)
        checked_step(opt)
        assert float(opt.state[params[3]]["step"]) == 8
        assert float(opt.state[params[1]]["step"]) == 3


@both
def test_a_failed_step_with_other_gradients_than_the_last(rule: str, walk: str) -> None:
    """The set of parameters that autograd is told of is the next step's own, not what the failed one found."""
    opt = running(rule)
    params = all_params(opt)
    for skips in ([0, 2], []), ([], [1]), ([3], [0]):
        set_gradients(params, 1, skips[0])
        checked_step(opt)
        set_gradients(params, 2, skips[1])
        assert params[4].grad is not None
        good = params[4].grad.clone()
        params[4].grad.data = torch.zeros(5)
        with untouched(opt), pytest.raises(ValueError, match="the gradient of parameter 4"):
            opt.step()
        params[4].grad = None
        params[4].grad = good
        checked_step(opt)
        checked_step(opt)


@both
@pytest.mark.parametrize("steps", [0, 3])
def test_a_launch_that_fails_moves_and_counts_nothing(
    rule: str, steps: int, walk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the operator can refuse: the next step is as if this one had not been tried."""
    opt, twin = running(rule, steps=steps), running(rule, steps=steps)
    for o in (opt, twin):
        set_gradients(all_params(o), 7)
    before = [raw(p) for p in all_params(opt)]
    monkeypatch.setenv("WD_KERNELS_ISA", "none of them")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="WD_KERNELS_ISA=none of them"):
            opt.step()
    monkeypatch.delenv("WD_KERNELS_ISA")
    assert all(torch.equal(raw(p), old) for p, old in zip(all_params(opt), before, strict=True))
    assert all(float(own["step"]) == steps for own in opt.state.values())
    for t in range(2):
        opt.step()
        twin.step()
        assert_same_optimizers(opt, twin, f"step {t}")


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_overlaps_that_come_later(momentum: float, walk: str) -> None:
    """A parameter that grows or spreads over another one at the same address, or a gapped one that moves over it."""

    def grow(p: Tensor, memory: Tensor) -> None:
        p.data = memory[:32]

    def spread(p: Tensor, memory: Tensor) -> None:
        p.data = memory.as_strided((4, 2), (8, 1))

    def move(p: Tensor, memory: Tensor) -> None:
        p.data = memory.as_strided((4, 2), (4, 1), 8)

    for start, change in (
        (lambda m: m[:8], grow),
        (lambda m: m.as_strided((4, 2), (4, 1)), spread),
        (lambda m: m.as_strided((4, 2), (4, 1)), move),
    ):
        memory = torch.randn(64)
        p, q = nn.Parameter(start(memory.data)), nn.Parameter(memory.data[16:24])  # each with its own version counter
        opt = running("sgdw", [p, q], momentum=momentum)
        p.grad = None
        change(p, memory)
        opt.state[p] = {}
        set_gradients([p, q], 9)
        with untouched(opt), pytest.raises(ValueError, match=r"parameter 0 of group 0 and .* overlap in memory"):
            opt.step()
        q.data = torch.randn(8)
        go_on(opt)


@both
def test_states_may_not_overlap(rule: str, walk: str) -> None:
    opt = running(rule, parameters(TWO_ALIKE))
    p, q = (all_params(opt)[i] for i in (1, 3))
    name = STATES[rule][0]
    for value in (opt.state[q][name], opt.state[q][name].view(4, 4), p.data, q.data):
        kept = opt.state[p][name]
        opt.state[p][name] = value
        with untouched(opt), pytest.raises(ValueError, match="overlap in memory"):
            opt.step()
        opt.state[p][name] = kept
        go_on(opt, 1)


# What a step costs ----------------------------------------------------------------------------------------------------


def allocated(step: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator hands out during `step`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        torch.empty(1)  # one event at least: the measurement works
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert sizes
    return sum(size for size in sizes if size > 0)


@both
def test_a_settled_step_allocates_nothing_of_the_models_size(rule: str, walk: str) -> None:
    """Also with new gradients, another lr, missing gradients, gaps and foreign strides: stand-ins are kept."""
    params = parameters([(300, 100)] * 4)
    params += [nn.Parameter(torch.randn(300, 100).t()), nn.Parameter(torch.randn(300, 200)[:, ::2])]
    opt, other = build(rule, params), torch.optim.AdamW(parameters([(300, 100)] * 4), foreach=False)
    for t in range(5):
        set_gradients(params, t)
        set_gradients(all_params(other), t)
        opt.param_groups[0]["lr"] = 0.05 / (t + 1)
        if t >= 2:
            assert allocated(opt.step) < 20_000
            assert allocated(other.step) > 100_000  # the measurement sees such allocations
        else:
            opt.step()
            other.step()
    set_gradients(params, 9, skip=[0])
    assert allocated(opt.step) < 20_000


@both
def test_counts_are_views_of_one_vector(rule: str, walk: str) -> None:
    """Counting is one add; the counts that parameters show are its elements, and survive a new table."""
    opt = running(rule)
    params = all_params(opt)
    for _ in range(2):
        steps = [opt.state[p]["step"] for p in params]
        assert all(s.shape == () and s.dtype == torch.float32 for s in steps)
        assert len({s.untyped_storage().data_ptr() for s in steps}) == 1
        assert len({s.data_ptr() for s in steps}) == len(params)
        before = [float(s) for s in steps]
        set_gradients(params, 5)
        checked_step(opt)
        assert [float(s) for s in steps] == [b + 1 for b in before]
        opt.add_param_group({"params": parameters([(3,)], seed=4)})
        params = all_params(opt)
        set_gradients(params, 6)
        checked_step(opt)


@both
def test_the_oracle_of_these_tests_sees_a_wrong_step(rule: str) -> None:
    """`checked_step` fails if the optimizer keeps stepping memory that is no longer the parameter's."""
    opt = running(rule)
    other = plain_copy(opt)
    set_gradients(all_params(opt), 1)
    for p, q in zip(all_params(opt), all_params(other), strict=True):
        q.grad = plain(p.grad)
    opt.step = lambda: None
    with pytest.raises(AssertionError):
        checked_step(opt)
    other.step()
    with pytest.raises(AssertionError):
        assert_same_optimizers(opt, other)
