"""The operators behind the functional API: torch.ops, opcheck, modes, tracers and transforms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bits import assert_same, assert_same_bits
from callers import FEW, FLAT, LISTS, Caller, call_of, gradients, make, operator, options_of, small
from cases import BODIES, Case, Piece, bf16, c64, covered, f32, gradient, ids, make_params, with_dtypes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wd_kernels.torch_ops import OPERATORS


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
        plain.step(grads, "cpu", weight_decay=0.1, lr=1e-3)
        for lr, overload in ((1e-3, "default"), (torch.tensor(1e-3), "tensor")):
            seen = Watcher()
            with seen:
                target = watched if overload == "default" else small(case)
                target.counts = [step - 1] * 3
                target.step(grads, "cpu", weight_decay=0.1, lr=lr)
            assert operator(case.rule, overload) in seen.seen

        def one(params: Any, grads: Any, states: Any, t: Tensor) -> None:
            more = {"lr": 1e-3, "weight_decay": 0.1, "backend": "cpu", **options_of(case)}
            LISTS[case.rule](params, grads, *states, step=t, **more)

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
