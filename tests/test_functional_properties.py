"""Random lists, random callers: a functional step is the step of an optimizer on the reference, to the bit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from semantics import all_params
from test_properties import GRADIENTS, OPTIONS, laid_out, make_parameter, other_dtype, parameter, random_values, seeds
from torch import Tensor

from wd_kernels import functional
from wd_kernels.formats import full_state_dtype

NAMES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgdw": ("momentum_buffer",), "adagradw": ("sum",)}
CALLS = {"adamw": functional.adamw_, "sgdw": functional.sgdw_, "adagradw": functional.adagradw_}
quick = settings(deadline=None, suppress_health_check=list(HealthCheck))


def state_names(rule: str, options: dict[str, Any]) -> tuple[str, ...]:
    if rule == "sgdw":
        return NAMES[rule] if options["momentum"] else ()
    return (*NAMES[rule], "max_exp_avg_sq") if options.get("amsgrad") else NAMES[rule]


def begun(p: Tensor, value: float) -> Tensor:
    """A state before the first step."""
    return torch.full_like(p, complex(value, value) if p.is_complex() else value, dtype=full_state_dtype(p.dtype))


def life(rule: str, data: st.DataObject) -> None:
    """One caller and one optimizer; the caller gives what has a gradient, in any order, with a count for each."""
    specs = data.draw(st.lists(parameter.filter(lambda spec: spec[2] != "sliced"), min_size=1, max_size=5))
    options = data.draw(OPTIONS[rule])
    if rule == "sgdw":
        options = {"momentum": 0.8, **options}
    backend = data.draw(st.sampled_from(("auto", "cpu", "reference")))
    opt = semantics.build(rule, list(map(make_parameter, specs)), backend="reference", **options)
    own = [p.detach() for p in map(make_parameter, specs)]
    names = state_names(rule, opt.defaults)
    first = opt.defaults.get("initial_accumulator_value", 0.0)
    states = {name: [begun(p, first) for p in own] for name in names}
    counts = [0] * len(own)
    for _ in range(data.draw(st.integers(1, 4))):
        grads: list[Tensor | None] = []
        for p, q in zip(own, all_params(opt), strict=True):
            layout = data.draw(st.sampled_from((None, *GRADIENTS)))
            dtype = other_dtype.get(p.dtype, p.dtype) if layout == "other dtype" else p.dtype
            seed = data.draw(seeds)
            grads.append(None if layout is None else laid_out(random_values(tuple(p.shape), dtype, seed), layout))
            q.grad = None
            q.grad_dtype = dtype
            q.grad = grads[-1]
        order = data.draw(st.permutations([i for i, g in enumerate(grads) if g is not None]))
        for i in order:
            counts[i] += 1
        step: int | Tensor = torch.tensor([counts[i] for i in order], dtype=torch.int64)
        if len({counts[i] for i in order}) == 1 and data.draw(st.booleans()):
            step = counts[order[0]]
        roles = [[role[i] for i in order] for role in (own, grads, *states.values())]
        said = {name: opt.defaults[name] for name in inspect.signature(CALLS[rule]).parameters if name in opt.defaults}
        if data.draw(st.booleans()):
            said |= {name: torch.tensor(said[name], dtype=torch.float64) for name in ("lr", "weight_decay", "eta")}
        CALLS[rule](*roles, step=step, backend=backend, **said)
        opt.step()
        for i, (p, q) in enumerate(zip(own, all_params(opt), strict=True)):
            assert_same_bits(p, q.detach())
            shown = opt.state.get(q) or {"step": 0}
            assert float(shown["step"]) == counts[i]
            for name, role in states.items():
                assert_same_bits(role[i], shown.get(name, begun(p, first)))


@pytest.mark.parametrize("rule", list(CALLS))
@settings(quick, max_examples=60)
@given(data=st.data())
def test_lives(rule: str, data: st.DataObject) -> None:
    life(rule, data)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
@settings(quick, max_examples=1000)
@given(data=st.data())
def test_long_lives(rule: str, data: st.DataObject) -> None:
    life(rule, data)
