"""The functional API and its operators: the optimizers' bits, compilers, and every error with nothing written."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same, assert_same_bits
from cases import (
    BODIES,
    DTYPES,
    PIECES,
    SMALL,
    Case,
    Piece,
    bf16,
    c64,
    c128,
    controlled,
    covering_cases,
    f16,
    f32,
    f64,
    gradient,
    has_gradient,
    ids,
    make_params,
    optimizer,
    schedule,
    snapshot,
    states_of,
    with_dtypes,
)
from covering import covered
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wd_kernels import functional, native
from wd_kernels.operators import OPERATORS
from wd_kernels.storage import state_dtype

walk = semantics.walk

LISTS: dict[str, Callable[..., None]] = {"adamw": functional.adamw_, "sgdw": functional.sgdw_}
FLAT: dict[str, Callable[..., None]] = {"adamw": functional.adamw_flat_, "sgdw": functional.sgdw_flat_}
DENSE = tuple(piece for piece in PIECES if piece.layout != "gaps")
FEW = tuple(piece for piece in SMALL if piece.layout != "gaps")


def options_of(case: Case) -> dict[str, Any]:
    """The case's options as a function takes them: AMSGrad is where its state is."""
    return {name: value for name, value in case.options.items() if name != "amsgrad"}


@dataclass
class Caller:
    """Who keeps the parameters, the states and the counts."""

    case: Case
    params: list[Tensor]
    counts: list[int] = field(init=False)
    states: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.params)
        self.states = [
            [torch.zeros_like(p.detach(), dtype=state_dtype(p.dtype)) for p in self.params]
            for _ in states_of(self.case)
        ]

    def step(self, grads: Sequence[Tensor | None], backend: str, apart: bool = False, **more: Any) -> None:
        """Steps what has a gradient: in one call, or apart: in one for each pair of dtypes."""
        which: dict[Any, list[int]] = {}
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is not None:
                which.setdefault((p.dtype, g.dtype) if apart else None, []).append(i)
                self.counts[i] += 1
        for own in which.values():
            roles = [[role[i] for i in own] for role in (self.params, grads, *self.states)]
            counts = [self.counts[i] for i in own]
            same = len(set(counts)) == 1
            step = counts[0] if same else torch.tensor(counts, dtype=(torch.int64, f32)[counts[0] % 2])
            LISTS[self.case.rule](*roles, step=step, backend=backend, **{**options_of(self.case), **more})

    def result(self) -> dict[str, Tensor]:
        """As `snapshot` gives it."""
        found = {}
        for i, p in enumerate(self.params):
            found[f"{i}"] = p.detach().clone()
            own = {name: role[i].clone() for name, role in zip(states_of(self.case), self.states, strict=True)}
            own["step"] = torch.tensor(float(self.counts[i]))
            found.update({f"{i} {name}": own[name] for name in sorted(own)} if self.counts[i] else {})
        return found


def make(case: Case, pieces: Sequence[Piece], dtypes: Sequence[Any], seed: int = 0) -> list[Tensor]:
    """Parameters of every piece in every pair of dtypes, mixed."""
    by_dtype = [make_params(pieces, p, g, seed + k) for k, (p, g) in enumerate(dtypes)]
    return list(itertools.chain(*zip(*by_dtype, strict=True)))


def gradients(pieces: Sequence[Piece], dtypes: Sequence[Any], step: int) -> list[Tensor | None]:
    return [
        gradient(piece, g, 1000 * step + 10 * k + i) if has_gradient(k + i, step) else None
        for k, piece in enumerate(pieces)
        for i, (_, g) in enumerate(dtypes)
    ]


def expected_run(case: Case, pieces: Sequence[Piece], dtypes: Sequence[Any], steps: int) -> dict[str, Tensor]:
    """What the optimizer class gives, on the reference."""
    params = make(case, pieces, dtypes)
    opt = optimizer(case, params, "reference", weight_decay=0.1)
    for step in range(steps):
        opt.param_groups[0]["lr"], opt.param_groups[0]["eta"] = schedule(case.rule, step)
        for p, g in zip(params, gradients(pieces, dtypes, step), strict=True):
            p.grad = g
        opt.step()
    return snapshot(params, opt)


def functional_run(
    case: Case, backend: str, pieces: Sequence[Piece], dtypes: Sequence[Any], steps: int, apart: bool = False
) -> dict[str, Tensor]:
    caller = Caller(case, make(case, pieces, dtypes))
    for step in range(steps):
        lr, eta = schedule(case.rule, step)
        grads = gradients(pieces, dtypes, step)
        copies = [g if g is None else g.clone() for g in grads]
        caller.step(grads, backend, apart, lr=lr, eta=eta, weight_decay=0.1)
        for g, copy in zip(grads, copies, strict=True):
            if g is not None and copy is not None:
                assert_same_bits(g, copy, "a gradient")
    return caller.result()


# The bits -------------------------------------------------------------------------------------------------------------


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
        function([], [], *([[], []] if function is functional.adamw_ else []), step=1)


def test_gradients_may_be_one_tensor_and_share_memory(walk: str) -> None:
    shared = torch.randn(40, generator=torch.Generator().manual_seed(3))
    grads = [shared[:33], shared[:33], shared[7:], shared[:1].expand(33)]
    results = []
    for own in (grads, [g.clone() for g in grads]):
        caller = Caller(BODIES[0], make_params([Piece((33,))] * 4, f32, f32))
        for _ in range(3):
            caller.step(own, "cpu", weight_decay=0.1)
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
                caller.step([gradient(Piece((7,)), g.dtype, 5), form], "cpu", weight_decay=0.1)
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
                    caller.step(grads, "cpu", weight_decay=0.1)
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
            caller.step(grads, "cpu", weight_decay=0.1)
        return caller.result()

    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(live, range(8))):
            assert_same(found, live(seed))


# Operators ------------------------------------------------------------------------------------------------------------


def operator(rule: str, overload: str, flat: bool = False) -> Any:
    return getattr(getattr(native.OPS, f"{rule}_flat_" if flat else f"{rule}_"), overload)


def call_of(case: Case, roles: Sequence[Any], step: Any, overload: str = "default", flat: bool = False,
            **changed: Any) -> list[Any]:  # fmt: skip
    """The arguments of an operator, from the roles that are there and from options by name."""
    known = OPERATORS[f"{case.rule}_flat_" if flat else f"{case.rule}_"]
    tensors = [role[0] for role in roles] if flat else [list(role) for role in roles]
    tensors += [None if flat else []] * (len(known.roles) - len(tensors))
    given = {"eps": 1e-8, "weight_decay": 0.1, "lr": 0.05, "eta": 1.0, "grad_factor": 1.0, "momentum": 0.0,
             "dampening": 0.0, "nesterov": False, "form": "torch", "backend": "cpu", "step": step}  # fmt: skip
    given |= {**options_of(case), **changed}
    if case.rule == "adamw":
        given["beta1"], given["beta2"] = given["betas"]
    numbers = [given[name] for name in known.numbers]
    if overload == "tensor":
        numbers = [torch.as_tensor(number, dtype=f64) for number in numbers]
    return [*tensors, *numbers, *(given[name] for name in known.options)]


@pytest.mark.parametrize("overload", ["default", "tensor"])
@pytest.mark.parametrize("flat", [False, True], ids=["lists", "flat"])
@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_operators_are_the_functions(case: Case, flat: bool, overload: str) -> None:
    pieces = (Piece((65,)),) if flat else FEW
    dtypes = [(f32, f32)] if flat else [(f32, f32), (bf16, f32)]
    ours, theirs = (Caller(case, make(case, pieces, dtypes)) for _ in range(2))
    for step in range(1, 4):
        grads = [g for g in gradients(pieces, dtypes, 0) if g is not None]
        which = [i for i, g in enumerate(gradients(pieces, dtypes, 0)) if g is not None]
        roles = [[role[i] for i in which] for role in (ours.params, ours.params, *ours.states)]
        roles[1] = grads
        arguments = call_of(case, roles, step, overload, flat)
        if overload == "tensor" and not flat and step == 2:
            arguments[len(OPERATORS[f"{case.rule}_"].roles)] = torch.full((len(which),), step)  # a count for each
        operator(case.rule, overload, flat)(*arguments)
        theirs.step(gradients(pieces, dtypes, 0), "cpu", lr=0.05, weight_decay=0.1)
    ours.counts = theirs.counts
    assert_same(ours.result(), theirs.result())


@covered(
    body=BODIES,
    dtypes=((f32, f32), (bf16, f32), (c64, c64)),
    flat=(False, True),
    overload=("default", "tensor"),
    leaves=(True, False),
)
def test_opcheck(body: Case, dtypes: tuple[torch.dtype, torch.dtype], flat: bool, overload: str, leaves: bool) -> None:
    (case,) = with_dtypes([body], [dtypes])
    pieces = (Piece((65,)),) if flat else (Piece((7, 3)), Piece(()), Piece((4, 5), "transposed"))
    params = make_params(pieces, case.dtype, case.grad_dtype)
    caller = Caller(case, [p.requires_grad_(leaves) if leaves else p.detach() for p in params])
    grads = [gradient(piece, case.grad_dtype, k) for k, piece in enumerate(pieces)]
    arguments = call_of(case, [caller.params, grads, *caller.states], 3, overload, flat)
    torch.library.opcheck(operator(case.rule, overload, flat), arguments)


@pytest.mark.parametrize("rule", LISTS)
@pytest.mark.parametrize("flat", [False, True], ids=["lists", "flat"])
def test_schema_says_what_is_written(rule: str, flat: bool) -> None:
    for overload in ("default", "tensor"):
        schema = operator(rule, overload, flat)._schema
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        known = OPERATORS[f"{rule}_flat_" if flat else f"{rule}_"]
        assert written == [known.roles[0], *known.roles[2:]]
        assert schema.is_mutable
        assert not schema.returns


def small(case: Case, n: int = 3) -> Caller:
    return Caller(case, [p.detach() for p in make_params([Piece((7 + k, 3)) for k in range(n)], f32, f32)])


class Watcher(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_modes_and_tracers_see_the_operator(case: Case) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    plain, watched, traced = (small(case) for _ in range(3))
    grads = [gradient(Piece((7 + k, 3)), f32, k) for k in range(3)]
    graph = None
    for step in (1, 2):
        plain.step(grads, "cpu", weight_decay=0.1)
        for lr, overload in ((1e-3, "default"), (torch.tensor(1e-3), "tensor")):
            seen = Watcher()
            with seen:
                target = watched if overload == "default" else small(case)
                target.counts = [step - 1] * 3
                target.step(grads, "cpu", weight_decay=0.1, lr=lr)
            assert operator(case.rule, overload) in seen.seen

        def one(params: Any, grads: Any, states: Any, t: Tensor) -> None:
            LISTS[case.rule](params, grads, *states, step=t, weight_decay=0.1, backend="cpu", **options_of(case))

        arguments = (traced.params, grads, traced.states)
        if graph is None:
            graph = make_fx(one, tracing_mode="fake")(*arguments, torch.tensor(1))
            assert operator(case.rule, "tensor") in [node.target for node in graph.graph.nodes]
            assert_same(traced.result(), small(case).result())  # tracing stepped nothing
        graph(*arguments, torch.tensor(step))
    traced.counts = plain.counts
    assert_same(watched.result(), plain.result())
    assert_same(traced.result(), plain.result())


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = BODIES[1]
    with FakeTensorMode() as mode:
        fake = [[mode.from_tensor(t) for t in role] for role in itertools.repeat(small(case).params, 5)]
        LISTS["adamw"](*fake, step=1, lr=torch.tensor(0.1))
        FLAT["adamw"](*[role[0].view(-1) for role in fake], step=1)
        LISTS["adamw"](*fake, step=torch.tensor([1, 2, 3]), weight_decay=0.1)
    LISTS["adamw"](*fake, step=1, weight_decay=0.1)  # outside of their mode too

    def put(role: int, index: int, value: Tensor) -> Callable[[list[list[Any]]], Any]:
        return lambda roles: roles[role].__setitem__(index, mode.from_tensor(value))

    for wrong, match in (
        (put(2, 1, torch.zeros(3, 8)), r"exp_avgs\[1\] has shape \(3, 8\)"),
        (put(2, 1, torch.zeros(3, 8).mT), r"exp_avgs\[1\] has strides"),
        (put(1, 2, torch.zeros(9, 3).long()), r"grads\[2\] has dtype"),
        (lambda roles: roles[4].pop(), "max_exp_avg_sqs in adamw_ has 2 tensors: params has 3"),
        (lambda roles: roles[1].pop(), "grads in adamw_ has 2 tensors: params has 3"),
    ):
        roles = [list(role) for role in fake]
        wrong(roles)
        for inside in (True, False):
            with pytest.raises((ValueError, TypeError, RuntimeError), match=match), mode if inside else torch.no_grad():
                LISTS["adamw"](*roles, step=1)
    with mode, pytest.raises(ValueError, match="exp_avg in adamw_flat_ has shape"):
        FLAT["adamw"](fake[0][0].view(-1), fake[1][0].view(-1), fake[2][0], fake[3][0].view(-1), step=1)
    real = small(case)
    before = real.result()
    with pytest.raises((AssertionError, RuntimeError, ValueError)), mode:  # real tensors have no place in the mode
        real.step([torch.randn(7 + k, 3) for k in range(3)], "cpu")
    real.counts = [0] * 3
    assert_same(real.result(), before)


def transformed(name: str, run: Callable[..., Any], tensors: list[Tensor]) -> Any:
    if name == "vmap":
        return torch.vmap(lambda *own: run(*own) or own[0])(*(t.expand(2, -1).clone() for t in tensors))
    return torch.func.functionalize(lambda *own: run(*(t.clone() for t in own)) or own[0])(*tensors)


def on_pieces(function: Callable[..., None], *tensors: Tensor) -> None:
    function(*([t] if function is LISTS["adamw"] else t for t in tensors), step=1)


@pytest.mark.parametrize("name", ["vmap", "functionalize"])
def test_transforms_of_functions_are_refused(name: str) -> None:
    """They have tensors without memory; nothing is written."""
    tensors = [torch.randn(5) for _ in range(4)]
    before = [t.clone() for t in tensors]
    for function in (LISTS["adamw"], FLAT["adamw"]):
        with pytest.raises(RuntimeError, match="adamw_"):
            transformed(name, partial(on_pieces, function), tensors)
    for t, old in zip(tensors, before, strict=True):
        assert_same_bits(t, old)


def test_autocast_changes_nothing() -> None:
    for case in BODIES:
        for backend in ("cpu", "reference"):
            plain, cast = small(case), small(case)
            for step in range(2):
                grads = [gradient(Piece((7 + k, 3)), f32, 10 * step + k) for k in range(3)]
                plain.step(grads, backend, weight_decay=0.1)
                with torch.autocast("cpu", dtype=bf16):
                    cast.step(grads, backend, weight_decay=0.1)
            assert_same(cast.result(), plain.result())


# Compilers ------------------------------------------------------------------------------------------------------------


class Compiler:
    """A backend of torch.compile that counts the graphs it is given, and what they call."""

    def __init__(self, inner: str) -> None:
        self.inner, self.graphs, self.calls = inner, 0, []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        self.calls += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return torch._dynamo.lookup_backend(self.inner)(graph, inputs)


def compiled_run(
    case: Case, flat: bool, compiler: Any, schedule_of: Callable[[int], dict[str, Any]], steps: int
) -> list[int]:
    """Gradients made, a step, and parameters read in one graph, against the same in eager mode.

    Returns the number of frames compiled until the end of each step.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compilations = []
    pieces = (Piece((65,)),) if flat else (Piece((7, 3)), Piece(()), Piece((4, 5), "transposed"), Piece((0,)))
    function = (FLAT if flat else LISTS)[case.rule]

    def one(params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], numbers: dict[str, Any]) -> Tensor:
        grads = [g * 2 for g in grads]
        roles = [params, grads, *states]
        tensors = [role[0] for role in roles] if flat else roles
        function(*tensors, weight_decay=0.1, backend="cpu", **{**options_of(case), **numbers})
        return sum(p.sum() for p in params)

    callers = [
        Caller(case, [p.detach() for p in make_params(pieces, case.dtype, case.grad_dtype, 4)]) for _ in range(2)
    ]
    compiled = torch.compile(one, backend=compiler, fullgraph=True)
    for step in range(steps):
        grads = [gradient(piece, case.grad_dtype, 10 * step + k) for k, piece in enumerate(pieces)]
        numbers = schedule_of(step)
        sums = [
            run(caller.params, grads, caller.states, dict(numbers))
            for run, caller in zip((one, compiled), callers, strict=True)
        ]
        eager, ours = (caller.result() for caller in callers)
        assert_same(ours, eager)
        assert all(bool(role[0].any()) for role in callers[0].states)
        torch.testing.assert_close(*sums)
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    return compilations


def as_tensors(step: int) -> dict[str, Any]:
    return {"step": torch.tensor(step + 1), "lr": torch.tensor(0.01 * (step + 1), dtype=f64)}


@covered(body=BODIES, dtypes=((f32, f32), (bf16, f32)), flat=(False, True))
def test_compiled(body: Case, dtypes: tuple[torch.dtype, torch.dtype], flat: bool) -> None:
    """One graph; 20 values of lr and step in tensors do not compile it again."""
    (case,) = with_dtypes([body], [dtypes])
    compiler = Compiler("aot_eager")
    counts = compiled_run(case, flat, compiler, as_tensors, 20 if case.dtype == f32 else 4)
    assert set(counts) == {1}
    assert compiler.graphs <= 2  # torch may begin the one anew
    name = OPERATORS[f"{case.rule}_flat_" if flat else f"{case.rule}_"].name
    assert f"{native.NAMESPACE}.{name}.tensor" in compiler.calls


def test_compiled_numbers_compile_anew() -> None:
    compiler = Compiler("aot_eager")
    case = BODIES[0]
    counts = compiled_run(case, False, compiler, lambda step: {"step": step + 1, "lr": (0.1, 0.2)[step // 3]}, 6)
    assert 2 <= counts[-1] <= 4  # a graph for each lr, and one for any step
    assert counts[2] < counts[3]
    assert f"{native.NAMESPACE}.adamw_.default" in compiler.calls


@pytest.mark.slow
@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_inductor(case: Case) -> None:
    for flat in (False, True):
        compiled_run(case, flat, "inductor", as_tensors, 3)


# Errors ---------------------------------------------------------------------------------------------------------------

ROLES = {
    "adamw": ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
    "sgdw": ("params", "grads", "momentum_buffers"),
}
SHAPE = (6, 5)


class Subclass(Tensor):
    """Dispatches for itself."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def good(rule: str, amsgrad: bool = True) -> dict[str, list[Any]]:
    """Five parameters in float32 and what belongs to them, by role; the last with states of the range of its own."""
    roles = ROLES[rule] if amsgrad else ROLES[rule][:4]
    generator = torch.Generator().manual_seed(5)
    return {role: [torch.rand(SHAPE, generator=generator) + 0.1 for _ in range(5)] for role in roles}


def step_of(rule: str, own: dict[str, Any], **changed: Any) -> None:
    momentum = {} if rule == "adamw" else {"momentum": 0.9}
    LISTS[rule](*own.values(), **{"step": 2, "lr": 0.1, "weight_decay": 0.1, **momentum, **changed})


def contents(values: Any) -> list[Any]:
    """Bytes and versions of every tensor that has some."""
    found = []
    for t in values:
        if isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu":
            storage = t.untyped_storage()
            found.append((bytes(storage.tolist()) if storage.size() else b"", t._version))
    return found


def refused(call: Callable[[], Any], error: Any, match: str, tensors: Sequence[Any]) -> None:
    before = contents(tensors)
    assert len(before) >= min(len(tensors), 3)
    with pytest.raises(error, match=match):
        call()
    assert contents(tensors) == before


def put(role: int, value: Callable[[Tensor], Any], index: int = 3) -> Callable[[list[list[Any]]], None]:
    """Replaces the tensor of a role at an index by what `value` makes of it."""

    def change(roles: list[list[Any]]) -> None:
        roles[role][index] = value(roles[role][index])

    return change


def share(role: int, index: int, other: int, at: int, view: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    """roles[role][index] becomes (a view of) roles[other][at]."""

    def change(roles: list[list[Any]]) -> None:
        roles[role][index] = view(roles[other][at])

    return change


def neighbours(role: int, other: int) -> Callable[[list[list[Any]]], None]:
    """Two tensors of a memory in which they share the last element of one, the first of the other."""

    def change(roles: list[list[Any]]) -> None:
        n = roles[0][0].numel()
        memory = torch.rand(2 * n)
        roles[role][3], roles[other][1] = memory[:n].view(SHAPE), memory[n - 1 : -1].view(SHAPE)

    return change


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def gaps(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


BELONGING: dict[str, tuple[Callable[[list[list[Any]]], None], Any, str]] = {
    "no tensor": (put(0, lambda t: None), TypeError, r"params\[3\] is a NoneType: expected a tensor"),
    "no first tensor": (put(0, lambda t: None, 0), TypeError, r"params\[0\] is a NoneType: expected a tensor"),
    "no gradient": (put(1, lambda t: None), TypeError, r"grads\[3\] is a NoneType: expected a tensor"),
    "a number": (put(2, lambda t: 0.0), TypeError, r"{2}\[3\] is a float: expected a tensor"),
    "parameter's shape": (put(0, lambda t: t[:5].clone()), ValueError, r"grads\[3\] has shape \(6, 5\)"),
    "gradient's shape": (put(1, lambda t: t.view(5, 6)), ValueError, r"grads\[3\] has shape \(5, 6\)"),
    "gradient's size": (put(1, lambda t: t[:3]), ValueError, r"grads\[3\] has shape \(3, 5\)"),
    "gradient's dtype": (put(1, lambda t: t.double()), TypeError, r"grads\[3\] has dtype torch.float64"),
    "gradients' dtype": (put(1, lambda t: t.long(), 0), TypeError, r"grads\[0\] has dtype torch.int64"),
    "sparse gradient": (put(1, lambda t: t.to_sparse()), RuntimeError, r"grads\[3\] has layout torch.sparse_coo"),
    "sparse parameter": (put(0, lambda t: t.to_sparse()), RuntimeError, r"params\[3\] has layout torch.sparse_coo"),
    "sparse state": (put(2, lambda t: t.to_sparse()), RuntimeError, r"{2}\[3\] has layout torch.sparse_coo"),
    "integers": (put(0, lambda t: t.long()), TypeError, r"params\[3\] has dtype torch.int64: allowed are float64"),
    "first integers": (put(0, lambda t: t.int(), 0), TypeError, r"params\[0\] has dtype torch.int32"),
    "state's shape": (put(2, lambda t: t.flatten()), ValueError, r"{2}\[3\] has shape \(30,\): params\[3\] needs"),
    "state's size": (put(-1, lambda t: t[:2]), ValueError, r"{-1}\[3\] has shape \(2, 5\): params\[3\] needs \(6, 5\)"),
    "no elements": (put(-1, lambda t: t[:0]), ValueError, r"{-1}\[3\] has shape \(0, 5\)"),
    "state's dtype": (put(-1, lambda t: t.bfloat16()), TypeError, r"{-1}\[3\] has dtype torch.bfloat16: params\[3\]"),
    "states' dtype": (put(2, lambda t: t.double(), 0), TypeError, r"{2}\[0\] has dtype torch.float64: params\[0\]"),
    "16-bit parameter": (put(0, lambda t: t.double()), TypeError, r"grads\[3\] has dtype torch.float32"),
    "state's strides": (put(2, lambda t: t.mT.contiguous().mT), ValueError, r"{2}\[3\] has strides \(1, 6\).*\(5, 1\)"),
    "state with gaps": (put(-1, gaps), ValueError, r"{-1}\[3\] has strides \(10, 2\); .* those of params\[3\]"),
    "expanded state": (put(-1, expanded), ValueError, r"{-1}\[3\] has strides \(0, 1\)"),
    "expanded": (put(0, expanded), ValueError, r"params\[3\] of shape \(6, 5\) and strides \(0, 1\) overlaps itself"),
    "gaps": (put(0, gaps), ValueError, r"params\[3\] of shape .* strides \(10, 2\): allowed are layouts without gaps"),
    "parameter on meta": (put(0, lambda t: t.to("meta")), ValueError, r"params\[3\] is on the meta device"),
    "gradient on meta": (put(1, lambda t: t.to("meta")), ValueError, r"grads\[3\] is on meta; allowed is .* cpu"),
    "state on meta": (put(-1, lambda t: t.to("meta")), ValueError, r"{-1}\[3\] has device meta: params\[3\] needs cpu"),
    "subclass": (put(0, lambda t: t.as_subclass(Subclass)), TypeError, r"params\[3\] is a Subclass: subclasses"),
    "subclass of a gradient": (put(1, lambda t: t.as_subclass(Subclass)), TypeError, r"grads\[3\] is a Subclass"),
    "subclass of a state": (put(2, lambda t: t.as_subclass(Subclass), 0), TypeError, r"{2}\[0\] is a Subclass"),
    "one parameter twice": (share(0, 3, 0, 1), ValueError, r"params\[[13]\] and params\[[13]\] overlap in memory"),
    "one state twice": (share(-1, 3, -1, 4), ValueError, r"{-1}\[[34]\] and {-1}\[[34]\] overlap in memory"),
    "a state is the parameter": (share(2, 3, 0, 3), ValueError, r"(params|{2})\[3\] and (params|{2})\[3\] overlap"),
    "a state of another role": (share(-1, 3, 2, 1), ValueError, r"overlap in memory"),
    "the gradient is the parameter": (share(1, 2, 0, 2), ValueError, r"(params|grads)\[2\] and (params|grads)\[2\] ov"),
    "the gradient is a state": (share(1, 2, -1, 0), ValueError, r"(grads\[2\] and {-1}\[0\]|{-1}\[0\] and grads\[2\])"),
    "an expanded gradient": (share(1, 2, 0, 0, expanded), ValueError, r"params\[0\] and grads\[2\]|grads\[2\] and par"),
    "last and first element": (neighbours(0, 0), ValueError, r"params\[3\] and params\[1\] overlap in memory"),
    "last and first of roles": (neighbours(-1, 0), ValueError, r"{-1}\[3\] and params\[1\] overlap in memory"),
    "gradient over a state": (neighbours(1, -1), ValueError, r"grads\[3\] and {-1}\[1\] overlap in memory"),
    "lengths": (lambda roles: roles[1].pop(), ValueError, r"grads in {f} has 4 tensors: params has 5, and each"),
    "more states": (lambda roles: roles[2].append(torch.zeros(2)), ValueError, r"{2} in {f} has 6 tensors"),
    "no parameters": (lambda roles: roles[0].clear(), ValueError, r"grads in {f} has 5 tensors: params has 0"),
}  # fmt: skip


@covered(name=tuple(BELONGING), rule=tuple(LISTS), walk=("native", "python"), indirect=["walk"])
def test_what_does_not_belong(name: str, rule: str, walk: str) -> None:
    """Through the function and, where torch lets it through, the operator."""
    change, error, match = BELONGING[name]
    own = good(rule)
    roles = list(own.values())
    kept = [t for role in roles for t in role]
    change(roles)
    names = {"2": ROLES[rule][2], "-1": ROLES[rule][-1], "f": f"{rule}_"}
    for key, value in names.items():
        match = match.replace(f"{{{key}}}", value)
    tensors = [*kept, *(t for role in roles for t in role)]
    refused(lambda: step_of(rule, own), error, match, tensors)
    plain = all(type(t) is Tensor and t.layout == torch.strided for role in roles for t in role)
    if plain and not any(t.device.type == "meta" for role in roles for t in role):
        case = Case(rule, "", {"betas": (0.9, 0.99)} if rule == "adamw" else {"momentum": 0.9})
        for overload in ("default", "tensor"):
            arguments = call_of(case, roles, 2, overload, decay="l2", maximize=False)
            refused(partial(operator(rule, overload), *arguments), error, match, tensors)


def test_lazy_bits_are_refused_where_they_are_written(walk: str) -> None:
    for dtype, made, shape in (
        (c64, lambda t: t.conj(), (4,)),
        (c64, lambda t: t.conj(), ()),
        (f32, lambda t: torch.complex(t, t).conj().imag, (1,)),
        (f32, lambda t: torch.complex(t, t).conj().imag, ()),
        (f32, lambda t: torch.complex(t, t).conj().imag, (4,)),
    ):
        for role, match in (
            (0, r"params\[1\] (is a lazily|of shape)"),
            (2, r"exp_avgs\[1\] (is a lazily|has strides)"),
        ):
            roles = [[torch.rand(shape, dtype=dtype) for _ in range(3)] for _ in range(4)]
            roles[role][1] = made(roles[role][1])
            tensors = [t for own in roles for t in own]
            refused(partial(functional.adamw_, *roles, step=1), ValueError, match, tensors)


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_states_of_16_bit_parameters_have_32(dtype: torch.dtype, walk: str) -> None:
    roles = [[torch.rand(9).to(dtype) for _ in range(2)] for _ in range(4)]
    tensors = [t for own in roles for t in own]
    refused(
        lambda: functional.adamw_(*roles, step=1), TypeError, r"exp_avgs\[0\] has dtype .* needs torch.float32", tensors
    )
    roles[2] = [t.float() for t in roles[2]]
    refused(
        lambda: functional.adamw_(*roles, step=1), TypeError, r"exp_avg_sqs\[0\] has dtype .*params\[0\] needs", tensors
    )


NUMBERS: list[tuple[str, str, Any, Any, str]] = [
    ("both", "step", 0, ValueError, r"step=0.* in .*: allowed are whole numbers from 1 on"),
    ("both", "step", -3, ValueError, r"step=-3"),
    ("both", "step", 1.5, ValueError, r"step=1.5"),
    ("both", "step", torch.nan, ValueError, r"step=nan"),
    ("both", "step", torch.inf, ValueError, r"step=inf"),
    ("both", "step", 2**53, ValueError, r"step=9007199254740992"),
    ("both", "step", "1", TypeError, r"step='1' in .*: expected a number"),
    ("both", "step", None, TypeError, r"step=None"),
    ("both", "step", torch.tensor(0), ValueError, r"step=0"),
    ("both", "step", torch.tensor([1, 2, 3]), ValueError, r"step in .* of shape \(3,\) .* one or of 5"),
    ("both", "step", torch.ones(5, 1), ValueError, r"step in .* of shape \(5, 1\)"),
    ("both", "step", torch.tensor([1, 2, 0, 4, 5]), ValueError, r"step\[2\]=0"),
    ("both", "step", torch.tensor([1.0, 2.0, 3.0, 4.5, 5.0]), ValueError, r"step\[3\]=4.5"),
    ("both", "step", torch.tensor([1.0, torch.nan, 3.0, 4.0, 5.0]), ValueError, r"step\[1\]=nan"),
    ("both", "step", torch.ones(5, dtype=c64), ValueError, r"step in .* is a torch.complex64 tensor"),
    ("both", "step", torch.ones(5, device="meta"), ValueError, r"step in .* on meta"),
    ("both", "step", torch.ones((), device="meta"), ValueError, r"step in .* on meta"),
    ("both", "lr", torch.nan, ValueError, r"lr=nan in .*_: allowed are finite numbers >= 0"),
    ("both", "lr", torch.inf, ValueError, r"lr=inf"),
    ("both", "lr", -0.1, ValueError, r"lr=-0.1"),
    ("both", "lr", "0.1", TypeError, r"lr='0.1'"),
    ("both", "lr", torch.tensor(-0.5), ValueError, r"lr=-0.5"),
    ("both", "lr", torch.ones(2), ValueError, r"lr=\(2,\)-shaped"),
    ("both", "lr", torch.ones((), device="meta"), ValueError, r"lr in .* is a tensor on meta"),
    ("both", "lr", torch.ones((), dtype=c64), ValueError, r"lr=\(\)-shaped torch.complex64"),
    ("both", "eta", -1.0, ValueError, r"eta=-1.0"),
    ("both", "eta", torch.tensor(torch.nan), ValueError, r"eta=nan"),
    ("both", "weight_decay", torch.inf, ValueError, r"weight_decay=inf"),
    ("both", "weight_decay", torch.ones(3), ValueError, r"weight_decay=\(3,\)-shaped"),
    ("both", "grad_factor", torch.inf, ValueError, r"grad_factor=inf in .*: allowed are finite numbers"),
    ("both", "grad_factor", torch.nan, ValueError, r"grad_factor=nan"),
    ("both", "grad_factor", torch.ones(2), ValueError, r"grad_factor=\(2,\)-shaped"),
    ("both", "grad_factor", None, TypeError, r"grad_factor=None"),
    ("both", "decay", "decoupled", ValueError, r"decay='decoupled' in .*: allowed are 'l2', 'lr_scaled'"),
    ("both", "backend", "gpu", ValueError, r"backend='gpu': allowed are 'auto', 'cpu'"),
    ("both", "maximize", "yes", TypeError, r"maximize='yes'"),
    ("adamw", "betas", 0.9, TypeError, r"betas=0.9 in adamw_: expected a pair"),
    ("adamw", "betas", (0.9,), TypeError, r"betas=\(0.9,\) in adamw_: expected a pair"),
    ("adamw", "betas", (1.0, 0.9), ValueError, r"betas\[0\]=1.0"),
    ("adamw", "betas", (0.9, torch.tensor(-0.1)), ValueError, r"betas\[1\]=-0.1"),
    ("adamw", "betas", (0.9, torch.nan), ValueError, r"betas\[1\]=nan"),
    ("adamw", "betas", (torch.ones((), device="meta"), 0.9), ValueError, r"betas\[0\] in adamw_ is a tensor on meta"),
    ("adamw", "eps", -1e-8, ValueError, r"eps=-1e-08"),
    ("sgdw", "momentum", -0.9, ValueError, r"momentum=-0.9"),
    ("sgdw", "dampening", torch.nan, ValueError, r"dampening=nan"),
    ("sgdw", "form", "other", ValueError, r"form='other' in sgdw_: allowed are 'torch', 'paper'"),
    ("sgdw", "nesterov", 3, TypeError, r"nesterov=3"),
    ("sgdw", "momentum", 0.0, ValueError, r"momentum_buffers in sgdw_ has 5 tensors, and momentum is 0"),
]  # fmt: skip


@pytest.mark.parametrize("rule", LISTS)
def test_numbers_and_options(rule: str) -> None:
    tested = 0
    for which, name, value, error, match in NUMBERS:
        if which not in ("both", rule):
            continue
        tested += 1
        own = good(rule)
        tensors = [t for role in own.values() for t in role]
        refused(partial(step_of, rule, own, **{name: value}), error, match, tensors)
        known = OPERATORS[f"{rule}_"]
        given: dict[str, Any] = {"decay": "l2", "maximize": False, **({} if name == "step" else {name: value})}
        if name in known.numbers and type(value) in (float, int) and abs(value) < 2**53:
            case = Case(rule, "", {"betas": (0.9, 0.99)} if rule == "adamw" else {"momentum": 0.9})
            for overload in ("default", "tensor"):
                if name == "step" and overload == "default" and type(value) is float:
                    continue  # torch refuses it
                arguments = call_of(case, [*own.values()], value if name == "step" else 2, overload, **given)
                refused(partial(operator(rule, overload), *arguments), error, match, tensors)
    assert tested > 30


def test_numbers_on_meta_are_refused_by_operators() -> None:
    """One argument on meta makes torch call the implementation for fake tensors, which steps nothing."""
    case = Case("adamw", "", {"betas": (0.9, 0.99), "decay": "l2", "maximize": False})
    for flat in (False, True):
        own = [[t.flatten() for t in role] for role in good("adamw").values()]
        for k, name in enumerate(OPERATORS["adamw_"].numbers):
            arguments = call_of(case, own, 2, "tensor", flat)
            arguments[5 + k] = arguments[5 + k].to("meta")
            tensors = [t for role in own for t in role]
            refused(partial(operator("adamw", "tensor", flat), *arguments), ValueError, f"{name} in adamw_", tensors)
    own = list(good("adamw").values())
    tensors = [t for role in own for t in role]
    mixed = [[*role[:3], role[3].to("meta")] for role in own]
    match = r"params in adamw_ are on \['cpu', 'meta'\]"
    refused(lambda: operator("adamw", "default")(*call_of(case, mixed, 2)), ValueError, match, tensors)


def test_states_that_are_missing_or_too_many() -> None:
    own = good("sgdw")
    tensors = [t for role in own.values() for t in role]
    for changed, momentum, match in (
        (
            {"momentum_buffers": []},
            0.9,
            r"momentum_buffers in sgdw_ has 0 tensors, and momentum is not 0: .* 5 tensors",
        ),
        ({}, 0.0, r"momentum_buffers in sgdw_ has 5 tensors, and momentum is 0.*: allowed are an empty list"),
        ({"momentum_buffers": None}, 0.9, "momentum_buffers in sgdw_ is a NoneType: expected a list"),
        ({"params": own["params"][0]}, 0.9, "params in sgdw_ is a Tensor: expected a list"),
    ):
        roles = {**own, **changed}
        refused(partial(step_of, "sgdw", roles, momentum=momentum), (TypeError, ValueError), match, tensors)
    own = good("adamw")
    tensors = [t for role in own.values() for t in role]
    for changed, match in (
        ({"exp_avgs": []}, r"exp_avgs in adamw_ has 0 tensors: params has 5"),
        ({"max_exp_avg_sqs": own["max_exp_avg_sqs"][:2]}, r"max_exp_avg_sqs in adamw_ has 2 tensors: params has 5"),
        ({"max_exp_avg_sqs": None}, r"max_exp_avg_sqs in adamw_ is a NoneType"),
    ):
        refused(partial(step_of, "adamw", {**own, **changed}), (TypeError, ValueError), match, tensors)


def test_flat_errors() -> None:
    for rule, roles in (("adamw", good("adamw")), ("sgdw", good("sgdw"))):
        buffers = {role: own[0].flatten() for role, own in roles.items()}
        names = OPERATORS[f"{rule}_flat_"].roles
        settings = {"step": 2, "weight_decay": 0.1, **({"momentum": 0.9} if rule == "sgdw" else {})}
        for k, name in enumerate(names):
            for change, error, match in (
                (lambda t: t.view(6, 5), ValueError, rf"{name} in {rule}_flat_ has shape \(6, 5\)"),
                (lambda t: t[0], ValueError, rf"{name} in {rule}_flat_ has shape \(\)"),
                (lambda t: torch.stack([t, t], 1)[:, 0], ValueError, rf"{name} in .* strides \(2,\): .* contiguous"),
                (lambda t: t[:1].expand(30), ValueError, rf"{name} in .* strides \(0,\)"),
                (lambda t: t[:7], ValueError, r"has shape \((7|30),\)"),
                (lambda t: t.long(), TypeError, rf"{name} has dtype torch.int64"),
                (lambda t: t.to("meta"), ValueError, "meta"),
                (lambda t: 3.0, TypeError, rf"{name} is a float: expected a tensor"),
            ):
                own = list(buffers.values())
                own[k] = change(own[k])
                tensors = [*buffers.values(), *own]
                refused(partial(FLAT[rule], *own, **settings), error, match, tensors)
        own = [*buffers.values()]
        own[2] = own[0]
        match = rf"param and {names[2]} overlap|{names[2]} and param"
        refused(partial(FLAT[rule], *own, **settings), ValueError, match, own)
        own = [*buffers.values()]
        with pytest.raises(ValueError, match=r"step in .*_flat_ is .* of shape \(2,\)"):
            FLAT[rule](*own, **{**settings, "step": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=r"momentum_buffer in sgdw_flat_ has 0 tensors.*momentum is not 0"):
        functional.sgdw_flat_(own[0], own[1], step=1, momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum_buffer in sgdw_flat_ has 1 tensors.*allowed are None"):
        functional.sgdw_flat_(own[0], own[1], own[2], step=1)
    with pytest.raises(TypeError, match="param is a NoneType: expected a tensor"):
        functional.sgdw_flat_(None, own[1], step=1)


def test_a_failing_call_leaves_the_next_one_right(walk: str) -> None:
    ours, theirs = Caller(BODIES[1], make_params(FEW, f32, f32)), Caller(BODIES[1], make_params(FEW, f32, f32))
    for step in range(3):
        grads = [gradient(piece, f32, 10 * step + k) for k, piece in enumerate(FEW)]
        roles = [ours.params, [*grads[:-1], torch.ones(3)], *ours.states]
        with pytest.raises(ValueError, match=rf"grads\[{len(FEW) - 1}\] has shape"):
            functional.adamw_(*roles, step=step + 1)
        ours.step(grads, "cpu", weight_decay=0.1)
        theirs.step(grads, "reference", weight_decay=0.1)
    assert_same(ours.result(), theirs.result())
