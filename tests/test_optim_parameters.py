"""Groups, and parameters that are missing something: names, keys, gradients, elements."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_bits, assert_same_optimizers, assert_same_state, raw
from semantics import MODES, STATES, build, parameters, plain, set_gradients, untouched
from torch import nn

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


@both
def test_groups_have_their_own_hyperparameters(rule: str, walk: str) -> None:
    """One optimizer with many groups equals one optimizer a group, to the bit."""
    own: list[dict[str, Any]] = [{"lr": 0.1}, {"weight_decay": 0.5}, {"lr": 0.02, "maximize": True}, {"eta": 0.25}]
    own += [{"decay": mode, "weight_decay": 0.2} for mode in MODES]
    if rule == "adamw":
        own += [{"amsgrad": True}, {"betas": (0.5, 0.7), "eps": 1e-3}]
    else:
        own += [{"momentum": 0.0}, {"nesterov": True}, {"dampening": 0.5}, {"form": "paper"}]
    groups = [{"params": parameters(seed=i), **options} for i, options in enumerate(own)]
    opt = build(rule, groups)
    singles = [build(rule, parameters(seed=i), **options) for i, options in enumerate(own)]
    for t in range(5):
        set_gradients([p for group in groups for p in group["params"]], t)
        for group, single in zip(groups, singles, strict=True):
            for p, q in zip(group["params"], semantics.all_params(single), strict=True):
                q.grad = plain(p.grad)
        opt.step()
        for group, single in zip(groups, singles, strict=True):
            single.step()
            for p, q in zip(group["params"], semantics.all_params(single), strict=True):
                assert_same_bits(p, q)
                assert_same_state(opt.state[p], single.state[q])
    results = {tuple(raw(p).flatten().tolist()) for group in groups for p in group["params"][:1]}
    assert len(results) == len(groups)


@both
def test_unknown_group_keys_are_kept(rule: str) -> None:
    p, q = parameters([(3,), (4,)])
    opt = build(rule, [{"params": [p], "note": "mine", "base": {"x": 1}}, {"params": [q]}])
    for t in range(2):
        set_gradients([p, q], t)
        opt.step()
    for saved in (opt, copy.deepcopy(opt)):
        assert saved.state_dict()["param_groups"][0]["note"] == "mine"
        assert "note" not in saved.param_groups[1]
    opt.load_state_dict(opt.state_dict())
    assert (opt.param_groups[0]["note"], opt.param_groups[0]["base"]) == ("mine", {"x": 1})


@both
def test_named_parameters(rule: str) -> None:
    model, twin = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    opt, other = build(rule, model.named_parameters()), build(rule, twin.parameters())
    names = [name for name, _ in model.named_parameters()]
    for t in range(3):
        for m, o in ((model, opt), (twin, other)):
            set_gradients(list(m.parameters()), t)
            o.step()
    assert_same_optimizers(opt, other)
    assert opt.param_groups[0]["param_names"] == names
    assert opt.state_dict()["param_groups"][0]["param_names"] == names


@both
def test_empty_group_and_empty_list(rule: str, walk: str) -> None:
    params = parameters()
    opt = build(rule, [{"params": []}, {"params": params[:2], "lr": 0.1}, {"params": []}, {"params": params[2:]}])
    for t in range(3):
        set_gradients(params, t)
        semantics.checked_step(opt)
    assert [len(group["params"]) for group in opt.state_dict()["param_groups"]] == [0, 2, 0, 3]
    empty = build(rule, [{"params": []}])
    empty.step()
    assert not empty.state
    with pytest.raises(ValueError, match="empty parameter list"):
        build(rule, [])


@both
def test_group_added_in_the_middle(rule: str, walk: str) -> None:
    """The new group is stepped from count 1; the others go on as if nothing had happened."""
    old, new, alone = parameters(), parameters(seed=1), parameters()
    opt, other = build(rule, old), build(rule, alone)
    late = build(rule, parameters(seed=1), lr=0.2)
    for t in range(8):
        if t == 3:
            opt.add_param_group({"params": new, "lr": 0.2})
        set_gradients(old + new, t)
        opt.step()
        for p, q in zip(old + new, alone + semantics.all_params(late), strict=True):
            q.grad = plain(p.grad)
        other.step()
        if t >= 3:
            late.step()
        for p, q in zip(old, alone, strict=True):
            assert_same_bits(p, q)
            assert_same_state(opt.state[p], other.state[q])
    for p, q in zip(new, semantics.all_params(late), strict=True):
        assert_same_bits(p, q)
        assert_same_state(opt.state[p], late.state[q])
    assert {float(opt.state[p]["step"]) for p in old} == {8.0}
    assert {float(opt.state[p]["step"]) for p in new} == {5.0}


@both
def test_missing_gradients(rule: str, walk: str) -> None:
    """A parameter without gradient keeps its bits and its own count; each equals an optimizer that saw only its own."""
    params = parameters()
    opt = build(rule, params)
    singles = [build(rule, [p]) for p in parameters()]
    seen = [0] * len(params)
    for t in range(10):
        skip = [i for i in range(len(params)) if (t * 7 + i * 3) % 4 == 0 or (i == 4 and t < 6)]
        set_gradients(params, t, skip)
        before = [raw(p) for p in params]
        opt.step()
        for i, (p, single) in enumerate(zip(params, singles, strict=True)):
            if i in skip:
                assert torch.equal(raw(p), before[i])
            else:
                seen[i] += 1
                (q,) = semantics.all_params(single)
                q.grad = plain(p.grad)
                single.step()
                assert_same_bits(p, q)
                assert_same_state(opt.state[p], single.state[q], f"step {t}, parameter {i}")
            if seen[i]:
                assert float(opt.state[p]["step"]) == seen[i]
            else:
                assert p not in opt.state
    assert len(set(seen)) > 1
    assert max(seen) < 10


@both
def test_frozen_parameters_have_no_state(rule: str) -> None:
    """1000 of 1010 are frozen: no state for them, nothing saved for them, right bits for the others."""
    model = nn.ParameterList(
        [nn.Parameter(torch.full((3,), float(i)), requires_grad=i % 101 == 0) for i in range(1010)]
    )
    before = [raw(p) for p in model]
    opt = build(rule, model.parameters())
    for _ in range(3):
        opt.zero_grad()
        sum((p**2).sum() for p in model).backward()
        semantics.checked_step(opt)
    trained = [p for p in model if p.requires_grad]
    assert len(trained) == 10
    assert set(opt.state) == set(trained)
    assert len(opt.state_dict()["state"]) == 10
    for i, p in enumerate(model):
        assert torch.equal(raw(p), before[i]) == (i % 101 != 0 or i == 0), i


@both
def test_empty_tensors(rule: str, walk: str) -> None:
    """Empty tensors among others, and a model of empty tensors only: counted, never written."""
    shapes = [(0,), (3,), (2, 0), (5,), (0, 4, 1)]
    mixed, few = parameters(shapes), parameters([(0,), (2, 0)])
    for params in (mixed, few):
        opt = build(rule, params)
        for t in range(3):
            set_gradients(params, t, skip=[0] if t == 1 else [])
            semantics.checked_step(opt)
        assert [float(opt.state[p]["step"]) for p in params] == [2.0] + [3.0] * (len(params) - 1)
        for p in params:
            assert all(opt.state[p][name].shape == p.shape for name in STATES[rule])


@both
def test_all_gradients_missing(rule: str, walk: str) -> None:
    params = parameters()
    opt = build(rule, params)
    with untouched(opt):
        opt.step()
        opt.step()
    set_gradients(params, 0)
    semantics.checked_step(opt)
    opt.zero_grad()
    with untouched(opt):
        opt.step()
    set_gradients(params, 1)
    semantics.checked_step(opt)
    assert float(opt.state[params[0]]["step"]) == 2
