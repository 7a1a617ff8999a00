"""What the functional API and its operators refuse, with nothing written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same
from callers import FEW, FLAT, LISTS, Caller, call_of, operator
from cases import BODIES, Case, bf16, c64, covered, f16, f32, gradient, make_params
from torch import Tensor

from wd_kernels import functional
from wd_kernels.torch_ops import OPERATORS

walk = semantics.walk

ROLES = {
    "adamw": ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
    "sgdw": ("params", "grads", "momentum_buffers"),
    "adagradw": ("params", "grads", "state_sums"),
}
MORE: dict[str, dict[str, Any]] = {"adamw": {"betas": (0.9, 0.99)}, "sgdw": {"momentum": 0.9}, "adagradw": {}}
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
    LISTS[rule](*own.values(), **{"step": 2, "lr": 0.1, "weight_decay": 0.1, **MORE[rule], **changed})


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
    "state's dtype": (put(-1, lambda t: t.half()), TypeError, r"{-1}\[3\] has dtype torch.float16: params\[3\]"),
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
    "last and first element": (neighbours(0, 0), ValueError, r"params\[1\] and params\[3\] overlap in memory"),
    "last and first of roles": (neighbours(-1, 0), ValueError, r"params\[1\] and {-1}\[3\] overlap in memory"),
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
        case = Case(rule, "", MORE[rule])
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


@pytest.mark.parametrize("dtype", [bf16, f32])
def test_float16_states_are_those_of_float16_parameters(dtype: torch.dtype, walk: str) -> None:
    roles = [[torch.rand(9).to(role) for _ in range(2)] for role in (dtype, dtype, f16, f32)]
    tensors = [t for own in roles for t in own]
    message = r"{}\[0\] has dtype torch.float16: params\[0\] needs torch.float32 or torch.bfloat16"
    refused(lambda: functional.adamw_(*roles, step=1), TypeError, message.format("exp_avgs"), tensors)
    roles[2:] = roles[:1:-1]
    refused(lambda: functional.adamw_(*roles, step=1), TypeError, message.format("exp_avg_sqs"), tensors)


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
    ("adagradw", "eps", -1e-10, ValueError, r"eps=-1e-10 in adagradw_"),
    ("adagradw", "lr_decay", -0.1, ValueError, r"lr_decay=-0.1 in adagradw_: allowed are finite numbers >= 0"),
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
            case = Case(rule, "", MORE[rule])
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
            at = len(OPERATORS["adamw_"].roles) + k
            arguments[at] = arguments[at].to("meta")
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
        names = OPERATORS[f"{rule}_flat_"].roles[: len(buffers)]  # a master weight is given by name
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
        ours.step(grads, "auto", weight_decay=0.1)
        theirs.step(grads, "reference", weight_decay=0.1)
    assert_same(ours.result(), theirs.result())
