"""backend="cpu": what must not change the bits (threads, order, grouping, layouts, flushing), and what it refuses.

What every kernel computes, on every instruction set, is in test_kernels.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    BIG,
    BODIES,
    DTYPES,
    PIECES,
    Case,
    Piece,
    arrange,
    assert_same,
    assert_same_bits,
    bf16,
    bits,
    c64,
    controlled,
    f16,
    f32,
    f64,
    gradient,
    ids,
    make_params,
    optimizer,
    peculiar_run,
    run,
    snapshot,
    state_dtype,
    states_of,
    with_dtypes,
)
from covering import covering
from torch import Tensor

# The matrix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", with_dtypes(BODIES, [(f32, f32), (bf16, f32)]), ids=ids)
def test_large(case: Case) -> None:
    assert_same(run(case, "cpu", pieces=BIG), run(case, "reference", pieces=BIG))


LAYOUTS = covering({"layout": ["contiguous", "channels_last", "transposed", "gaps", "offset"],
                    "grad": ["contiguous", "channels_last", "transposed", "sliced", "expanded", "offset"],
                    "case": with_dtypes(BODIES, DTYPES)})  # fmt: skip


@pytest.mark.parametrize("of", LAYOUTS, ids=lambda of: "-".join(map(str, of.values())))
def test_layouts_alone(of: dict[str, Any]) -> None:
    """Each pair of layouts in a bucket of its own, of one shape and size."""
    pieces = (Piece((3, 5, 7, 11), of["layout"], of["grad"]),)
    assert_same(run(of["case"], "cpu", pieces=pieces), run(of["case"], "reference", pieces=pieces))


# What must not matter -------------------------------------------------------------------------------------------------


def test_instruction_set_is_read_when_launches_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BODIES[0]
    p, late = make_params([Piece((5,)), Piece((7,))], f32, f32)
    p.grad = torch.ones(5)
    opt = optimizer(case, [p], "cpu")
    opt.step()
    monkeypatch.setenv("WD_KERNELS_ISA", "avx1024")
    opt.step()
    before = snapshot([p, late], opt)
    assert float(opt.state[p]["step"]) == 2
    late.grad = torch.ones(7)
    opt.add_param_group({"params": [late]})
    for own, params in ((opt, (p, late)), (optimizer(case, [late], "cpu"), (late,))):
        kept = snapshot(params, own)
        with pytest.raises(RuntimeError, match=r"WD_KERNELS_ISA=avx1024: unknown.*avx512.*avx2.*baseline"):
            own.step()
        assert_same(snapshot(params, own), kept)
    assert_same(snapshot([p, late], opt), before)
    monkeypatch.setenv("WD_KERNELS_ISA", "")  # as if it were not set
    opt.step()
    assert not torch.equal(before["0"], p)
    assert not torch.equal(before["1"], late)
    assert [float(opt.state[own]["step"]) for own in (p, late)] == [3, 1]


#: Tensors of all sizes, so that the ranges of several threads begin and end inside of them, and between.
MANY = tuple(Piece((n,)) for n in (0, 7, 40_001, 0, 0, 1, 32_768, 31, 100_003, 5, 16_384, 65_537, 3, 0))


@pytest.mark.parametrize("case", with_dtypes(BODIES, [(f32, f32), (bf16, bf16)]), ids=ids)
def test_threads(case: Case) -> None:
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(case, "cpu", pieces=MANY))
    for other in results[1:]:
        assert_same(results[0], other)
    assert_same(results[0], run(case, "reference", pieces=MANY))


@pytest.mark.parametrize("case", with_dtypes(BODIES, [(f32, f32), (bf16, f32)]), ids=ids)
def test_order_of_tensors(case: Case) -> None:
    n = len(PIECES)
    one = run(case, "cpu")
    for order in (range(n)[::-1], [(7 * k + 3) % n for k in range(n)]):
        assert sorted(order) == list(range(n))
        assert_same(one, run(case, "cpu", order=list(order)))


@pytest.mark.parametrize("case", with_dtypes(BODIES, [(f32, f32), (f16, f16)]), ids=ids)
def test_grouping(case: Case) -> None:
    """One group, several, and a group for each tensor: the same bits. (`decays` is one value, so that it can be.)"""
    one = run(case, "cpu", groups=1, decays=(0.07,))
    for groups in (2, 5, len(PIECES), len(PIECES) + 3):  # the last leaves groups without a parameter
        assert_same(one, run(case, "cpu", groups=groups, decays=(0.07,)))
    assert not torch.equal(one["5"], run(case, "cpu", groups=1, decays=(0.08,))["5"])


@pytest.mark.parametrize("case", with_dtypes(BODIES, [(f32, f32), (bf16, bf16)]), ids=ids)
def test_split_tensor(case: Case) -> None:
    """A tensor stepped whole or in pieces of odd sizes has the same bits."""
    total, cuts = 5000, (1, 15, 17, 1000, 33, 3934)
    assert sum(cuts) == total
    results = []
    for sizes in ((total,), cuts):
        whole = make_params([Piece((total,))], case.dtype, case.grad_dtype)[0].detach()
        params = [torch.nn.Parameter(part) for part in whole.split(sizes)]
        for p in params:
            p.grad_dtype = case.grad_dtype
        opt = optimizer(case, params, "cpu", weight_decay=0.1)
        for step in range(10):
            opt.param_groups[0]["lr"] = 0.01 * (step + 1)
            for p, g in zip(params, gradient(Piece((total,)), case.grad_dtype, step).split(sizes), strict=True):
                p.grad = g
            opt.step()
        states = [torch.cat([opt.state[p][name] for p in params]) for name in states_of(case)]
        results.append([whole, *states])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_gaps_are_not_written(case: Case, backend: str) -> None:
    room = torch.full((6, 14), 77.0)
    p = torch.nn.Parameter(room[:, ::2])
    start = p.detach().clone()
    opt = optimizer(case, [p], backend, weight_decay=0.1)
    for step in range(3):
        p.grad = gradient(Piece((6, 7), grad="sliced"), f32, step)
        opt.step()
    assert bool((room[:, 1::2] == 77).all())
    assert not bool((p == start).any())


# Numbers --------------------------------------------------------------------------------------------------------------


def subnormal_run(case: Case, backend: str, flush: bool) -> dict[str, Tensor]:
    """Numbers that are subnormal as they are stored, and scalars (eps) that are in the state_dtype type."""
    tiny, arithmetic_tiny = torch.finfo(case.dtype).tiny, torch.finfo(state_dtype(case)).tiny
    (p,) = make_params([Piece((40_000,))], case.dtype, case.grad_dtype)  # enough for a second thread
    with torch.no_grad():
        p.mul_(tiny / 4)
    options = {**case.options, **({"eps": arithmetic_tiny / 8} if case.rule == "adamw" else {})}
    opt = optimizer(Case(case.rule, case.name, options), [p], backend, weight_decay=0.3, lr=0.25)
    grads = [(gradient(Piece((40_000,)), f64, step) * tiny).to(case.grad_dtype) for step in range(3)]
    torch.set_flush_denormal(flush)
    for step in range(3):
        opt.param_groups[0]["lr"] = 0.25 / (step + 1)
        p.grad = grads[step]
        opt.step()
    torch.set_flush_denormal(False)
    return snapshot([p], opt)


@pytest.mark.parametrize("case", with_dtypes(BODIES, [(f32, f32), (f64, f64), (bf16, bf16), (f16, f16)]), ids=ids)
def test_flushing_of_subnormals_changes_nothing(case: Case, isa: str) -> None:
    assert torch.set_flush_denormal(True)
    assert float(torch.tensor(1e-40) * 1.0) == 0.0  # it does flush
    torch.set_flush_denormal(False)
    for of in (peculiar_run, subnormal_run):
        flushed = of(case, "cpu", flush=True)
        assert_same(flushed, of(case, "reference", flush=False))
    if case.rule == "sgdw":  # subnormals were at issue
        assert bool(((flushed["0"] != 0) & (flushed["0"].abs() < torch.finfo(case.dtype).tiny)).any())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_a_bad_gradient_spoils_only_its_element(case: Case, backend: str) -> None:
    results = []
    for bad in (None, math.nan, math.inf):
        (p,) = make_params([Piece((70,))], f32, f32)
        opt = optimizer(case, [p], backend, weight_decay=0.1)
        for step in range(3):
            p.grad = gradient(Piece((70,)), f32, step)
            if bad is not None and step == 1:
                p.grad[37] = bad
            opt.step()
        results.append(p.detach())
    rest = torch.arange(70) != 37
    for result in results[1:]:
        assert not bool(result[37].isfinite())
        assert_same_bits(result[rest], results[0][rest])


# The control pair -----------------------------------------------------------------------------------------------------


CONTROLLED = with_dtypes(BODIES, [(f32, f32), (f64, f64), (bf16, f32), (c64, c64)])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CONTROLLED, ids=ids)
def test_grad_factor_scales_gradients(case: Case, backend: str) -> None:
    """A power of two scales without rounding, so scaled gradients give the same bits."""
    steps = 4
    factor = controlled(case, backend, [(0.125, 0)] * steps)
    scaled = controlled(case, backend, [(1, 0)] * steps, scale=0.125)
    plain = controlled(case, backend, [(1, 0)] * steps)
    assert_same(factor[-1], scaled[-1])
    assert not torch.equal(factor[-1]["0"], plain[-1]["0"])


# The comparison itself ------------------------------------------------------------------------------------------------


def test_comparison_sees_what_it_must() -> None:
    zero, nan = torch.tensor([0.0, 1.0]), torch.tensor([math.nan, 1.0])
    assert torch.equal(zero, -zero * torch.tensor([1.0, -1.0]))
    with pytest.raises(AssertionError, match="1 of 2 differ, first at 0"):
        assert_same_bits(zero, torch.tensor([-0.0, 1.0]))
    assert_same_bits(nan, torch.tensor([0x7FC12345, 0x3F800000], dtype=torch.int32).view(f32))
    with pytest.raises(AssertionError):
        assert_same_bits(nan.to(bf16), torch.tensor([0x7FC1, 0x3F80], dtype=torch.int16).view(bf16))
    with pytest.raises(AssertionError):
        assert_same_bits(torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]))
    for layout in ("channels_last", "transposed", "sliced", "offset", "negative", "conjugate"):
        for dtype in (f32, c64):
            values = torch.randn(2, 3, 4, 5, dtype=dtype)
            lying = arrange(values.clone(), layout)
            if layout in ("negative", "conjugate"):
                assert lying.is_neg() or lying.is_conj()
                values = values.conj() if layout == "conjugate" and dtype == c64 else -values
            else:
                assert lying.stride() != values.stride() or layout == "offset"
            assert torch.equal(bits(lying), bits(values.contiguous()))
