"""Flat parameters in files, copies, modules, processes and groups."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_optimizers, assert_untouched
from flat_pairs import ALIKE, SHAPES, Pair, assert_runs, attached, fill
from semantics import STATES, all_params, build, checked_step, parameters, plain, set_gradients
from torch import nn

from wd_kernels import flatten_, unflatten_
from wd_kernels.flat import place_of

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


def size(saved: Any, how: str) -> int:
    if how == "pickle":
        return len(pickle.dumps(saved))
    file = io.BytesIO()
    torch.save(saved, file)
    return len(file.getvalue())


@both
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_files_hold_a_tensors_own_bytes(rule: str, how: str) -> None:
    """No larger than those of ordinary tensors: no neighbour travels along."""
    sizes = []
    for is_flat in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(50, 50) for _ in range(10)))
        if is_flat:
            flatten_(model.parameters())
        opt = build(rule, model.parameters())
        for t in range(2):
            if is_flat:
                fill(all_params(opt), t)
            else:
                set_gradients(all_params(opt), t)
            opt.step()
        tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
        tensors += [own[name] for own in opt.state.values() for name in STATES[rule]]
        assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in tensors if t is not None)
        sizes.append(
            [size(x, how) for x in (model[3].weight, model[3].bias, model.state_dict(), opt.state_dict(), opt)]
        )
        loaded = pickle.loads(pickle.dumps((model, opt)))
        assert all(place_of(p) is None for p in loaded[0].parameters())
        assert_same_optimizers(loaded[1], opt)
        set_gradients(all_params(loaded[1]), 5)
        checked_step(loaded[1])
    assert all(abs(a - b) <= 256 for a, b in zip(*sizes, strict=True)), sizes
    assert sizes[0][2] > 100_000 > 20_000 > sizes[0][0]


@both
def test_copies_are_ordinary(rule: str, walk: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    (buffer,) = flatten_(model.parameters())
    opt = build(rule, model.parameters())
    fill(all_params(opt), 0)
    checked_step(opt)
    other = copy.deepcopy(model)
    assert buffer.data is not None
    begin, end = buffer.data.data_ptr(), buffer.data.data_ptr() + 4 * buffer.numel
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_untouched(p, q)
        assert place_of(p) is not None
        assert place_of(q) is None
        assert not begin <= q.data_ptr() < end
    before = [plain(p) for p in model.parameters()]
    both_copied = copy.deepcopy((other, build(rule, other.parameters())))
    twin = copy.deepcopy(opt)
    for t in range(2):
        set_gradients(all_params(twin), t)
        checked_step(twin)
        set_gradients(all_params(both_copied[1]), t)
        checked_step(both_copied[1])
    assert all(map(torch.equal, before, model.parameters()))
    fill(all_params(opt), 3)
    checked_step(opt)
    assert_runs(opt, 1)


@both
def test_modules_that_load_and_convert(rule: str, walk: str) -> None:
    """load_state_dict copies in place, and all stays flat; another dtype is other memory, and is stepped right."""
    model, source = (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) for _ in range(2))
    params = list(model.parameters())
    flatten_(params)
    opt = build(rule, params)
    for t in range(2):
        fill(params, t)
        checked_step(opt)
        model.load_state_dict(source.state_dict())
        assert all(map(attached, params))
    fill(params, 3)
    checked_step(opt)
    assert_runs(opt, 1)
    opt.state.clear()
    for convert in (model.double, model.float, model.bfloat16, lambda: model.to(torch.float32)):
        convert()
        assert all(place_of(p) is None for p in params)
        for t in range(2):
            fill(params, t)
            checked_step(opt)
            assert_runs(opt, 4)
        opt.state.clear()
    flatten_(params)
    fill(params, 4)
    checked_step(opt)
    assert_runs(opt, 1)


@both
def test_shared_memory(rule: str, walk: str) -> None:
    """share_memory_ moves each tensor to memory of its own, in place."""
    pair = Pair(rule)
    pair.step(0, runs=1)
    for p in pair.params:
        p.share_memory_()
        assert p.is_shared()
        assert place_of(p) is None
    pair.step(1, runs=len(SHAPES))
    for p in pair.params:
        assert p.grad is not None
        p.grad.share_memory_()
    pair.step(2, runs=len(SHAPES))


def test_tied_weights() -> None:
    """A parameter that comes twice, in a list or as a part of two modules, has one place."""
    model = nn.ModuleDict({"embed": nn.Embedding(9, 5), "head": nn.Linear(5, 9)})
    model["head"].weight = model["embed"].weight
    weight = model["embed"].weight
    entries = [*model["embed"].parameters(), *model["head"].parameters()]
    assert len(entries) == 3
    (buffer,) = flatten_(entries)
    assert buffer.numel == 64 + 32
    assert model["head"].weight is weight
    opt = build("adamw", model.parameters())
    twin = copy.deepcopy(model)
    other = build("adamw", twin.parameters(), backend="reference")
    for t in range(3):
        for m, o in ((model, opt), (twin, other)):
            m["head"](m["embed"](torch.tensor([1, 2, t]))).square().sum().backward()
            o.step()
            o.zero_grad(set_to_none=False)
        assert_same_optimizers(opt, other)
        assert_runs(opt, 1)


def test_forms_of_input() -> None:
    """Names, groups, names in groups, generators; errors use the names."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    groups = [{"params": model[1].parameters()}, {"params": [model[0].weight]}, {"params": model[0].bias}]
    forms: dict[str, Callable[[], Any]] = {
        "parameters": model.parameters,
        "names": model.named_parameters,
        "groups": lambda: [{**g, "params": list(model[1].parameters()) if i == 0 else g["params"]}
                           for i, g in enumerate(groups)],
        "named groups": lambda: [{"params": model.named_parameters()}],
    }  # fmt: skip
    for name, form in forms.items():
        (buffer,) = flatten_(form())
        assert buffer.numel == 64 + 32 + 32 + 32
        order = (
            [model[1].weight, model[1].bias, model[0].weight, model[0].bias]
            if name == "groups"
            else [*model.parameters()]
        )
        assert [place_of(p).offset for p in order] == sorted(place_of(p).offset for p in order)
        opt = build("adamw", form())
        fill(all_params(opt), 0)
        checked_step(opt)
        assert_runs(opt, (3 if name == "groups" else 1))
        unflatten_(form())
        assert all(place_of(p) is None for p in model.parameters())
        checked_step(opt)
    assert flatten_([]) == []
    assert flatten_([nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(3, 0))]) == []
    unflatten_([])


def test_frozen_parameters() -> None:
    """They lie in the buffer, and get no gradient; their neighbours are no run across them."""
    params = parameters(ALIKE)
    params[2].requires_grad_(False)
    flatten_(params)
    assert [p.grad is None for p in params] == [False, False, True, False, False]
    for given_params in (params, [p for p in params if p.requires_grad]):
        opt = build("adamw", given_params)
        before = plain(params[2])
        for t in range(3):
            fill(params, t)
            checked_step(opt)
            assert_runs(opt, 2)
            opt.zero_grad(set_to_none=False)
            assert not any(bool(p.grad.any()) for p in params if p.grad is not None)
        assert_untouched(params[2], before)
