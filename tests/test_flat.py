"""flatten_: parameters, gradients and states end to end, and the bits of an ordinary optimizer; runs and launches.

The truth is the reference backend on ordinary copies (`Pair`), or a new optimizer on plain copies (`checked_step`).
"""

from __future__ import annotations

import cases
import pytest
import semantics
import torch
from flat_pairs import ALIKE, SHAPES, Pair, attached, fill
from semantics import build, checked_step, parameters, set_gradients
from torch import nn

from wd_kernels import flatten_

walk = semantics.walk
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]
every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


# The bits -------------------------------------------------------------------------------------------------------------


def pieces(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = (*SHAPES, (0,), (2, 3, 4, 5), (3, 0))
    drawn = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    values = [torch.randn(s, generator=generator, dtype=drawn).to(dtype) for s in shapes]
    values[4] = values[4].to(memory_format=torch.channels_last)
    values[1] = values[1].t().contiguous().t()
    return [nn.Parameter(v) for v in values]


def life(case: cases.Case, backend: str, steps: int = 4) -> None:
    """Steps of a case: all attached, some missing, all attached again, over two groups."""
    params = pieces(case.dtype)
    options = {"momentum": 0.0, **case.options} if case.rule == "sgdw" else dict(case.options)
    pair = Pair(case.rule, params, split=[i >= 5 for i in range(len(params))], backend=backend, **options)
    for t in range(steps):
        kept = params[2].grad
        if t == 2:
            params[2].grad = None
        # Channels last, say, is no reason to step a parameter by itself; empty ones are not flat.
        pair.step(t, runs=None if t >= 2 else 2)
        params[2].grad = kept
    assert params[4].is_contiguous(memory_format=torch.channels_last)
    assert not params[1].is_contiguous()


@pytest.mark.parametrize(
    ("case", "walk"),
    cases.covering_cases(dtypes=[(d, d) for d in DTYPES], walk=("native", "python")),
    indirect=["walk"],
    ids=cases.ids,
)
def test_bits(case: cases.Case, walk: str) -> None:
    """Every variant and decay mode, in every dtype."""
    life(case, "auto", steps=6)


@cases.covered(body=cases.BODIES, dtype=DTYPES, backend=("reference", "triton"))
def test_bits_of_other_backends(body: cases.Case, dtype: torch.dtype, backend: str) -> None:
    (case,) = cases.with_dtypes([body], [(dtype, dtype)])
    life(case, backend)


# Runs -----------------------------------------------------------------------------------------------------------------


@every
def test_one_run_for_one_group(rule: str, walk: str) -> None:
    pair = Pair(rule)
    for t in range(4):
        pair.step(t, runs=1)
        pair.opt.zero_grad(set_to_none=False)
        assert all(map(attached, pair.params))
        assert not any(bool(p.grad.any()) for p in pair.params if p.grad is not None)


@every
def test_runs_of_groups(rule: str, walk: str) -> None:
    """Groups in the order of the buffer are a run each; alternating ones are apart."""
    for split, runs in (((0, 0, 1, 1, 1), 2), ((0, 1, 0, 1, 0), 5), ((1, 1, 0, 0, 1), 3), ((0, 1, 2, 2, 3), 4)):
        pair = Pair(rule, parameters(ALIKE), split)
        for t in range(3):
            pair.step(t, runs=runs)


@every
def test_runs_where_gradients_are_missing(rule: str, walk: str) -> None:
    pair = Pair(rule, parameters(ALIKE))
    grads = [p.grad for p in pair.params]
    for t, (missing, runs) in enumerate((((), 1), ((2,), 2), ((1, 3), 3), ((0, 4), 1), ((0, 1, 2), 1), ((), 1))):
        # Who missed a step has another count for good, so all are given the same one again.
        for opt, params in pair.both():
            if t:
                for p in params:
                    opt.state[p]["step"].fill_(10 * t)
        for i, (p, grad) in enumerate(zip(pair.params, grads, strict=True)):
            p.grad = None if i in missing else grad
        pair.step(t, runs=runs)


@every
def test_runs_of_unlike_counts(rule: str, walk: str) -> None:
    pair = Pair(rule, parameters(ALIKE))
    pair.step(0, runs=1)
    kept, pair.params[2].grad = pair.params[2].grad, None
    pair.step(1, runs=2)
    pair.params[2].grad = kept
    for t in range(2, 4):
        pair.step(t, runs=3)
    for opt, params in pair.both():
        opt.state[params[2]]["step"] += 1
    pair.step(5, runs=1)


@every
@pytest.mark.parametrize("how", ["replaced", "data", "ddp", "other dtype"])
def test_gradients_elsewhere_are_stepped_singly(rule: str, how: str, walk: str) -> None:
    pair = Pair(rule, parameters(ALIKE))
    pair.step(0, runs=1)
    grads = [p.grad for p in pair.params]
    bucket = torch.randn(5 * 16 + 1)
    for i in (1, 2, 3):
        p = pair.params[i]
        assert p.grad is not None
        if how == "replaced":
            p.grad = torch.randn(16)
        elif how == "data":
            p.grad.data = torch.randn(16)
        elif how == "ddp":
            p.grad = bucket[16 * i + 1 : 16 * i + 17]
        else:
            p.grad.data = torch.randn(16).bfloat16()
    for t in range(1, 4):
        if how == "other dtype":  # not what the twins have, but exact in it
            fill(pair.params, t)
            with torch.no_grad():
                for p in pair.params:
                    p.grad.copy_(p.grad.bfloat16())
            pair.step(t, new=False, runs=5)
        else:
            pair.step(t, runs=5)
    for p, grad in zip(pair.params, grads, strict=True):
        p.grad = None if how in ("data", "other dtype") else grad  # these lost their memory: they are given new
    flatten_(pair.params)
    for t in range(5, 7):
        pair.step(t, runs=1)


@every
def test_gradients_of_another_width_at_flat_addresses(rule: str, walk: str) -> None:
    """The first half of each stretch as bfloat16: the same addresses, shapes and strides, and nothing to merge."""
    pair = Pair(rule, parameters(ALIKE))
    pair.step(0, runs=1)
    for p in pair.params[1:4]:
        assert p.grad is not None
        p.grad.data = p.grad.data.view(torch.bfloat16)[:16]
    for t in range(1, 4):
        for k, p in enumerate(pair.params):
            assert p.grad is not None
            p.grad.copy_(torch.randn(16, generator=torch.Generator().manual_seed(10 * t + k)).bfloat16())
        pair.step(t, runs=5, new=False)


@every
def test_parameters_of_another_dtype_at_flat_addresses(rule: str, walk: str) -> None:
    """Bits that are read as another dtype are another parameter, though nothing moved."""
    pair = Pair(rule, parameters(ALIKE, torch.float16))
    pair.step(0, runs=1)
    p = pair.params[2]
    assert p.grad is not None
    p.data, p.grad.data = p.data.view(torch.bfloat16), p.grad.data.view(torch.bfloat16)
    for _ in range(3):
        p.grad.copy_(torch.randn(16).bfloat16())
        checked_step(pair.opt)


@every
def test_one_launch_a_bucket(rule: str, launches: list[int]) -> None:
    """However many runs: one of float32, one of bfloat16."""
    params = parameters(ALIKE) + parameters(ALIKE, torch.bfloat16)
    pair = Pair(rule, params, split=[0, 0, 1, 1, 1] * 2, backend="triton")
    assert [b.numel for b in pair.buffers] == [160, 160]
    for t in range(3):
        launches.clear()
        params[3].grad = params[3].grad if t < 2 else None
        pair.step(t, runs=4 if t < 2 else 5)
        assert len(launches) == 2


@every
def test_chunks_follow_the_runs(rule: str, launches: list[int]) -> None:
    """Runs that merge and part from step to step, of more than one block."""
    pair = Pair(rule, parameters([(1030,), (31,), (2050,)]), backend="triton")
    grads = [p.grad for p in pair.params]
    for t, away in enumerate(((), (0,), (), (1,), (2,), (0, 1, 2), ())):
        for i, p in enumerate(pair.params):
            p.grad = torch.zeros(p.shape) if i in away else grads[i]
        pair.step(t)


def test_programs_of_one_run(launches: list[int]) -> None:
    """Forty small tensors are forty programs, and flat two."""
    for is_flat, programs in ((False, 40), (True, 2)):
        params = parameters([(33,)] * 40)
        if is_flat:
            flatten_(params)
        opt = build("adamw", params, backend="triton")
        if is_flat:
            fill(params, 0)
        else:
            set_gradients(params, 0)
        opt.step()
        assert launches == [-(-40 * 64 // 1024) if is_flat else programs]
        launches.clear()
