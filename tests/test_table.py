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
from bits import assert_same_optimizers
from semantics import (
    STATES,
    TWO_ALIKE,
    all_params,
    build,
    checked_step,
    contents,
    go_on,
    parameters,
    plain,
    running,
    set_gradients,
)
from torch import Tensor, nn

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


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
