"""The functional API: the bits of the optimizers, whatever lists it is given."""

from __future__ import annotations

import itertools

import pytest
import semantics
import torch
from bits import assert_same, assert_same_bits
from callers import DENSE, FEW, FLAT, LISTS, Caller, call_of, expected_run, functional_run, make, operator, options_of
from cases import (
    BODIES,
    DTYPES,
    Case,
    Piece,
    bf16,
    c64,
    c128,
    controlled,
    covered,
    covering_cases,
    f32,
    f64,
    gradient,
    ids,
    make_params,
    schedule,
    states_of,
    with_dtypes,
)
from torch import Tensor

from wd_kernels import functional

walk = semantics.walk


@pytest.mark.parametrize(("case", "half", "apart"), covering_cases(half=(0, 1), apart=(False, True)), ids=ids)
def test_matrix(case: Case, half: int, apart: bool) -> None:
    """Every variant and decay mode; lists that mix every pair of dtypes and most layouts, or lists of one kind."""
    pieces = DENSE[half::2]
    steps = 8  # the seventh is frozen
    expected = expected_run(case, pieces, DTYPES, steps)
    assert len({int(value) for name, value in expected.items() if name.endswith(" step")}) > 2
    found = functional_run(case, "cpu", pieces, DTYPES, steps, apart)
    assert_same(found, expected)
    start = make(case, pieces, DTYPES)
    for i, p in enumerate(start):
        assert bool(found[f"{i}"].isfinite().all())
        assert p.numel() < 20 or not torch.equal(found[f"{i}"], p.detach())


@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_other_backends_and_the_python_form(case: Case, walk: str) -> None:
    """The reference, Triton's kernels, and "auto"; several calls in a row, of lists that differ in every step."""
    for dtypes in (DTYPES, [(f32, f32)], [(c64, c64), (bf16, f32)]):
        expected = expected_run(case, FEW, dtypes, 3)
        for backend in ("auto", "reference", *(("triton",) if len(dtypes) < 5 and walk == "native" else ())):
            assert_same(functional_run(case, backend, FEW, dtypes, 3), expected)


@pytest.mark.parametrize(
    ("case", "half", "apart"),
    covering_cases(["independent", "metric_proximal"], half=(0, 1), apart=(False, True)),
    ids=ids,
)
def test_triton(case: Case, half: int, apart: bool) -> None:
    """Lists that mix every pair of dtypes, or lists of one kind."""
    pieces = FEW[half::2]
    expected = expected_run(case, pieces, DTYPES, 4)
    assert_same(functional_run(case, "triton", pieces, DTYPES, 4, apart), expected)


@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_counts_of_their_own_in_a_list_of_one_kind(case: Case, walk: str) -> None:
    """As in a call for each."""
    pieces = (Piece((33,)), Piece((5, 7)), Piece((1100,)))
    together, each = (Caller(case, make_params(pieces, case.dtype, case.grad_dtype)) for _ in range(2))
    for step in range(4):
        grads = [gradient(piece, case.grad_dtype, 10 * step + k) for k, piece in enumerate(pieces)]
        there = [g if step >= k else None for k, g in enumerate(grads)]
        together.step(there, "auto", lr=0.05, weight_decay=0.1)
        for k, g in enumerate(there):
            each.step([g if i == k else None for i in range(3)], "reference", lr=0.05, weight_decay=0.1)
    assert together.counts == [4, 3, 2]
    assert_same(together.result(), each.result())


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("case", with_dtypes(BODIES, [(f32, f32), (bf16, f32)]), ids=ids)
def test_grad_factor(case: Case, backend: str) -> None:
    pieces = (Piece((33,)), Piece((5, 7), "transposed"), Piece((1100,)))
    factors = (2.0**-16, -0.37, 1.0, 1e-3)
    expected = controlled(case, "reference", [(factor, 0.0) for factor in factors], 3.0, pieces)
    caller = Caller(case, make_params(pieces, case.dtype, case.grad_dtype))
    for step, factor in enumerate(factors):
        grads = [gradient(piece, case.grad_dtype, 10 * step + k) * 3.0 for k, piece in enumerate(pieces)]
        number = torch.tensor(factor, dtype=f64) if step % 2 else factor
        caller.step(grads, backend, lr=0.02 * (step + 1), weight_decay=0.1, grad_factor=number)
        assert_same(caller.result(), expected[step])


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_learning_rate_zero_freezes_even_a_nan(case: Case, backend: str) -> None:
    (p,) = make_params([Piece((1100,))], f32, f32)
    p.detach().view(torch.int32)[5] = 0x7FC12345
    before = p.detach().view(torch.int32).clone()
    caller = Caller(case, [p])
    for step in range(2):
        caller.step([gradient(Piece((1100,)), f32, step)], backend, lr=0.0, weight_decay=0.2)
        assert torch.equal(p.detach().view(torch.int32), before)
    assert all(bool(role[0][:5].any()) for role in caller.states)
    caller.step([gradient(Piece((1100,)), f32, 2)], backend, lr=0.1, weight_decay=0.2)
    assert not torch.equal(p.detach().view(torch.int32)[:5], before[:5])


@covered(body=BODIES, dtypes=((f32, f32), (bf16, f32), (c128, c128)), backend=("cpu", "triton"))
def test_flat_equals_pieces(body: Case, dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    """One buffer and the tensors that it is the concatenation of: sizes that are no multiple of anything."""
    (case,) = with_dtypes([body], [dtypes])
    sizes = (5, 1023, 1, 517, 0, 33)
    pieces = [Piece((n,)) for n in sizes]
    apart = Caller(case, make_params(pieces, case.dtype, case.grad_dtype))
    whole = Caller(case, [torch.cat([p.detach() for p in apart.params])])
    for step in range(4):
        lr, eta = schedule(case.rule, step)
        grads = [gradient(piece, case.grad_dtype, 100 * step + k) for k, piece in enumerate(pieces)]
        apart.step(grads, backend, lr=lr, eta=eta, weight_decay=0.1)
        (param,), states = whole.params, [role[0] for role in whole.states]
        FLAT[case.rule](
            param, torch.cat(grads), *states, step=step + 1, lr=lr, eta=eta, weight_decay=0.1, backend=backend,
            **options_of(case),
        )  # fmt: skip
        assert_same_bits(param, torch.cat([p.detach() for p in apart.params]), "param")
        for name, state, own in zip(states_of(case), states, apart.states, strict=True):
            assert_same_bits(state, torch.cat(own), name)
    assert states or case.rule == "sgdw"


def test_lists_may_be_any_sequence_or_iterator(walk: str) -> None:
    case = BODIES[0]
    grads = [gradient(piece, f32, k) for k, piece in enumerate(FEW)]
    results = []
    for form in (list, tuple, iter):
        caller = Caller(case, make_params(FEW, f32, f32))
        for step in (1, 2):
            roles = [form(role) for role in (caller.params, grads, *caller.states)]
            functional.adamw_(*roles, step=step, weight_decay=0.1)
            assert form is iter or [len(role) for role in roles] == [len(FEW)] * 4
        results.append(caller.result())
    for other in results[1:]:
        assert_same(other, results[0])
    for function in LISTS.values():
        states = {functional.adamw_: [[], []], functional.adagradw_: [[]]}.get(function, [])
        function([], [], *states, step=1)


def test_gradients_may_be_one_tensor_and_share_memory(walk: str) -> None:
    shared = torch.randn(40, generator=torch.Generator().manual_seed(3))
    grads = [shared[:33], shared[:33], shared[7:], shared[:1].expand(33)]
    results = []
    for own in (grads, [g.clone() for g in grads]):
        caller = Caller(BODIES[0], make_params([Piece((33,))] * 4, f32, f32))
        for _ in range(3):
            caller.step(own, "auto", weight_decay=0.1)
        results.append(caller.result())
    assert_same(*results)


@pytest.mark.parametrize("rule", LISTS)
def test_lazy_bits_and_strides_of_gradients(rule: str, walk: str) -> None:
    """Gradients that are copied: conjugate, negative in every way there is, and lying otherwise than the parameter."""
    z = torch.randn(66, dtype=c64, generator=torch.Generator().manual_seed(1))
    lazy = [
        z[:33].conj(), z[:1].conj(), z[0].conj(), z[:33].conj().imag, z[:1].conj().imag, z[3].conj().imag,
        z.conj().imag.as_strided((66,), (1,)), torch._neg_view(z.real.contiguous()),
        torch._neg_view(z.reshape(6, 11).mT), z.reshape(6, 11)[::2].imag, z.real.flip(0)[::2].reshape(3, 11).mT,
    ]  # fmt: skip
    assert sum(g.is_neg() for g in lazy) == 6
    case = next(c for c in BODIES if c.rule == rule and states_of(c))
    for g in lazy:
        results = []
        for form in (g, g.resolve_conj().resolve_neg().contiguous()):
            caller = Caller(case, make_params([Piece((7,)), Piece(tuple(g.shape))], g.dtype, g.dtype))
            for _ in range(2):
                caller.step([gradient(Piece((7,)), g.dtype, 5), form], "auto", weight_decay=0.1)
            results.append(caller.result())
        assert_same(*results)


@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_autograd_is_told_of_what_is_written(case: Case, walk: str) -> None:
    """Every function and operator, in grad mode and without it; leaves that require a gradient stay leaves."""
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        caller = Caller(case, make_params(FEW, f32, f32))
        grads = [gradient(piece, f32, k) for k, piece in enumerate(FEW)]
        written = [*caller.params, *itertools.chain(*caller.states)]
        versions = [t._version for t in written], [g._version for g in grads]
        for step in (1, 2):
            with mode():
                if step == 1:
                    caller.step(grads, "auto", weight_decay=0.1)
                else:
                    operator(case.rule, "default")(*call_of(case, [caller.params, grads, *caller.states], step))
            assert [t._version for t in written] == [v + step for v in versions[0]]
            assert [g._version for g in grads] == versions[1]
        assert all(p.is_leaf and p.requires_grad and p.grad is None for p in caller.params)


def test_threads() -> None:
    """Calls at the same time, on tensors of each thread's own."""
    from concurrent.futures import ThreadPoolExecutor

    def live(seed: int) -> dict[str, Tensor]:
        caller = Caller(BODIES[seed % len(BODIES)], make_params(FEW * 3, c64 if seed % 3 == 0 else f32, f32, seed))
        dtype = caller.params[0].dtype
        for step in range(12):
            grads = [gradient(piece, dtype, 100 * step + k) for k, piece in enumerate(FEW * 3)]
            caller.step(grads, "auto", weight_decay=0.1)
        return caller.result()

    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(live, range(8))):
            assert_same(found, live(seed))
