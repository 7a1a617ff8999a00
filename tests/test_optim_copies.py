"""Copies of optimizers, several of them, and subclasses."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_bits, assert_same_optimizers, assert_same_state
from semantics import DEFAULTS, MODES, build, mode_of, parameters, plain, set_gradients, untouched
from torch import Tensor

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


def by_deepcopy(pair: Any) -> Any:
    return copy.deepcopy(pair)


def by_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def by_torch_save(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both
@pytest.mark.parametrize("way", [by_deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_copies_go_on_independently(rule: str, way: Callable[[Any], Any], backend: str, walk: str) -> None:
    """The copy has the same bits and settings; then each steps its own tensors only."""
    params = parameters()
    opt = build(rule, [{"params": params[:3]}, {"params": params[3:], "lr": 0.2}], backend=backend)
    for t in range(3):
        set_gradients(params, t, skip=[1] if t else [])
        opt.step()
    twins, twin = way((params, opt))
    assert twin.backend == backend
    assert_same_optimizers(opt, twin)
    for t in range(3, 7):
        set_gradients(params, t)
        with untouched(twin):
            opt.step()
        set_gradients(twins, t)
        with untouched(opt):
            twin.step()
        assert_same_optimizers(opt, twin, f"step {t}")


@both
@pytest.mark.parametrize("way", [by_deepcopy, by_pickle])
def test_copies_keep_the_decay_of_every_group(rule: str, way: Callable[[Any], Any]) -> None:
    """Whether it was given to the class, to a group, or set later."""
    for default in MODES:
        params = parameters([(3,)] * len(MODES))
        opt = build(
            rule, [{"params": [p], "decay": mode} for p, mode in zip(params, MODES, strict=True)], decay=default
        )
        copied = way(opt)
        assert [mode_of(copied, group) for group in copied.param_groups] == list(MODES)
        for group, mode in zip(opt.param_groups, reversed(MODES), strict=True):
            group["decay"] = mode
        twins, twin = way((params, opt))
        for t in range(2):
            set_gradients(params, t)
            set_gradients(twins, t)
            opt.step()
            twin.step()
        assert [mode_of(twin, group) for group in twin.param_groups] == list(reversed(MODES))
        assert_same_optimizers(opt, twin)


@both
def test_shallow_copy_steps_the_same_parameters(rule: str) -> None:
    a, b = build(rule, parameters()), build(rule, parameters())
    for t in range(4):
        if t == 2:
            a = copy.copy(a)
        for opt in (a, b):
            set_gradients(semantics.all_params(opt), t)
            opt.step()
    assert_same_optimizers(a, b)


@both
def test_optimizer_in_backward(rule: str) -> None:
    """One optimizer a parameter, stepped from a hook inside backward, as memory-saving trainers do."""
    params, others = parameters(), parameters()
    own = {p: build(rule, [p]) for p in params}
    other = build(rule, others)

    def step(p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    for p in params:
        p.register_post_accumulate_grad_hook(step)
    for _ in range(4):
        for ps in (params, others):
            sum((p**3).sum() for p in ps).backward()
        other.step()
        other.zero_grad()
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)
        assert_same_state(own[p].state[p], other.state[q])


@both
def test_zero_grad_and_accumulation(rule: str) -> None:
    """Gradients that are kept and accumulated in place, step after step."""
    (p,), (q,) = parameters([(6, 3)]), parameters([(6, 3)])
    opt, other = build(rule, [p]), build(rule, [q])
    for t in range(4):
        for _ in range(2):
            (p**2).sum().backward()
        q.grad = plain(2 * q) + plain(2 * q)
        opt.step()
        other.step()
        opt.zero_grad(set_to_none=t % 2 == 0)
    assert_same_optimizers(opt, other)


@both
def test_subclasses_work(rule: str) -> None:
    """As Lightning makes them: a class derived at run time, with its own step."""
    base = semantics.CLASSES[rule]
    derived = type("Wrapped", (base,), {"step": lambda self, closure=None: base.step(self, closure)})
    a, b = derived(parameters(), **DEFAULTS[rule]), build(rule, parameters())
    for t in range(3):
        for opt in (a, b):
            set_gradients(semantics.all_params(opt), t)
            opt.step()
    assert_same_optimizers(a, b)
    assert type(copy.deepcopy(a)) is derived
