"""Every error of parameters, gradients and states: as in test_errors.py, and nothing was written."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import raw
from refusals import Dispatching, mentions, ready
from semantics import STATES, all_params, build, checked_step, parameters, set_gradients, untouched
from torch import Tensor, nn

walk = semantics.walk
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


# Parameters -----------------------------------------------------------------------------------------------------------


PARAMETERS: dict[str, tuple[Callable[[], Tensor], type[Exception], tuple[str, ...]]] = {
    "float8": (
        lambda: torch.zeros(3).to(torch.float8_e4m3fn),
        TypeError,
        ("has dtype torch.float8_e4m3fn", "float64, float32, bfloat16, float16, complex64"),
    ),
    "complex32": (lambda: torch.zeros(3, dtype=torch.complex32), TypeError, ("has dtype torch.complex32", "allowed")),
    "sparse": (lambda: torch.eye(3).to_sparse(), RuntimeError, ("layout torch.sparse_coo", "allowed is torch.strided")),
    "expanded": (lambda: torch.ones(1).expand(5), ValueError, ("shape (5,)", "strides (0,)", "overlaps itself")),
    "windows": (lambda: torch.ones(9).unfold(0, 4, 2), ValueError, ("strides (2, 1)", "overlaps itself")),
    "conjugate": (lambda: torch.ones(3, dtype=torch.complex64).conj(), ValueError, ("lazily conj", "resolve_conj()")),
    "negative": (lambda: torch._neg_view(torch.ones(3)), ValueError, ("lazily conj", "resolve_neg()")),
}


@both
@pytest.mark.parametrize("case", list(PARAMETERS.values()), ids=list(PARAMETERS))
@pytest.mark.parametrize("named", [False, True])
def test_parameters_that_cannot_be_stepped(rule: str, case: Any, named: bool) -> None:
    """An error in the constructor and in add_param_group, which then leaves no group behind."""
    make, error, parts = case
    good, bad = parameters([(3,)])[0], make().requires_grad_()
    params: list[Any] = [("good", good), ("bad", bad)] if named else [good, bad]
    place = "parameter 'bad' (group {}, index 1)" if named else "parameter 1 of group {}"
    with pytest.raises(error, match=mentions(place.format(0), *parts)):
        build(rule, params)
    opt = ready(rule, named)
    with untouched(opt), pytest.raises(error, match=mentions(place.format(2), *parts)):
        opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 2
    checked_step(opt)
    opt.add_param_group({"params": params[:1]})  # what was good of it was not taken
    good.grad = torch.ones(3)
    checked_step(opt)
    assert float(opt.state[good]["step"]) == 1


@both
@pytest.mark.parametrize("case", ["int64", "dispatching", *PARAMETERS])
def test_what_is_not_trained_may_be_anything(rule: str, case: str, walk: str) -> None:
    """Quantised weights beside adapters, say: an error by name once they have a gradient, and not before."""
    others = {
        "int64": (lambda: torch.arange(6), TypeError, ("has dtype torch.int64",)),
        "dispatching": (lambda: Dispatching(torch.ones(3)), TypeError, ("is a Dispatching", "wd_kernels.functional")),
    }
    make, error, parts = {**others, **PARAMETERS}[case]
    (good,), bad = parameters([(3,)]), make()
    opt = build(rule, [("good", good), ("bad", bad)])
    for t in range(2):
        set_gradients([good], t)
        opt.step()
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert len(opt.state) == len(saved["state"]) == 1
    set_gradients([good], 2)
    opt.step()
    if case not in ("sparse", "dispatching"):
        bad.grad = torch.zeros(bad.shape).to(bad.dtype)
        with pytest.raises(error, match=mentions("parameter 'bad' (group 0, index 1)", *parts)):
            opt.step()


@both
@pytest.mark.parametrize("case", ["windows", "conjugate", "negative", "float8"])
def test_parameters_that_become_so_later(rule: str, case: str, walk: str) -> None:
    make, error, parts = PARAMETERS[case]
    opt = ready(rule, named=True)
    p = all_params(opt)[2]
    data, grad = p.data, p.grad
    p.grad = None
    p.data = make()
    p.grad = torch.zeros(p.shape).to(p.dtype)
    with untouched(opt), pytest.raises(error, match=mentions("parameter 'head.bias' (group 1, index 1)", *parts)):
        opt.step()
    p.grad = None
    p.data = data
    p.grad = grad
    checked_step(opt)


@both
def test_parameters_given_twice_or_overlapping(rule: str, walk: str) -> None:
    (p,) = parameters([(6,)])
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match=mentions("parameter 1 of group 0 of shape (6,) is given twice")),
    ):
        build(rule, [p, p])
    with pytest.raises(ValueError, match="is given twice: each parameter has one place"):
        build(rule, [{"params": [p]}, {"params": [p]}])
    base = torch.zeros(5, 5)
    pairs = [(base[0], base[0, 2:]), (base[0, 2:], base[0]), (base[:, 1], base[2]), (base[:, 1:3], base[:, 2:4])]
    for a, b in pairs:
        pattern = r"parameter \d of group \d and parameter \d of group \d overlap in memory.*belong to one of them"
        with pytest.raises(ValueError, match=pattern):
            build(rule, [{"params": [nn.Parameter(a)]}, {"params": [nn.Parameter(b)]}])
    apart = [nn.Parameter(base[:, 0]), nn.Parameter(base[:, 1]), nn.Parameter(base[:2, 2:]), nn.Parameter(base[2:, 2:])]
    opt = build(rule, apart)  # their spans cross, their elements do not
    for t in range(2):
        set_gradients(apart, t)
        checked_step(opt)


@both
def test_parameters_without_memory(rule: str, walk: str) -> None:
    """On the meta device, or with a storage that was emptied, as sharding wrappers do."""
    meta = nn.Parameter(torch.empty(3, device="meta"))
    opt = build(rule, [*parameters([(3,)]), meta])
    set_gradients(all_params(opt)[:1], 0)
    meta.grad = torch.empty(3, device="meta")
    with (
        untouched(build(rule, all_params(opt)[:1])),
        pytest.raises(ValueError, match=mentions("parameter 1 of group 0", "meta device")),
    ):
        opt.step()
    assert not opt.state
    opt = ready(rule, named=True)
    p = all_params(opt)[1]
    data = p.data.clone()
    p.untyped_storage().resize_(0)
    before = [raw(q) for q in all_params(opt) if q is not p]
    with pytest.raises(ValueError, match=mentions("parameter 'head.weight'", "(7,)", "no memory (address 0)")):
        opt.step()
    assert all(torch.equal(a, raw(q)) for a, q in zip(before, [all_params(opt)[0], all_params(opt)[2]], strict=True))
    p.data = data
    checked_step(opt)


@both
def test_a_parameter_of_a_dispatching_subclass(rule: str) -> None:
    opt = ready(rule, named=True)
    p = all_params(opt)[1]
    wrapped = Dispatching(torch.zeros(7))
    opt.param_groups[1]["params"][0] = wrapped
    wrapped.grad = torch.zeros(7)
    with pytest.raises((TypeError, ValueError), match=mentions("parameter 'head.weight'", "Dispatching")):
        opt.step()
    opt.param_groups[1]["params"][0] = p
    checked_step(opt)


# Gradients ------------------------------------------------------------------------------------------------------------


def emptied(grad: Tensor) -> Tensor:
    grad = grad.clone()
    grad.untyped_storage().resize_(0)
    return grad


GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], tuple[str, ...]]] = {
    "shape": (lambda g: torch.zeros(3, 2), ValueError, ("has shape (3, 2)", "parameter, (2, 3)")),
    "more dimensions": (lambda g: torch.zeros(1, 2, 3), ValueError, ("has shape (1, 2, 3)", "parameter, (2, 3)")),
    "fewer rows": (lambda g: torch.zeros(1, 3), ValueError, ("has shape (1, 3)", "parameter, (2, 3)")),
    "more rows": (lambda g: torch.zeros(4, 3), ValueError, ("has shape (4, 3)", "parameter, (2, 3)")),
    "a dimension behind": (lambda g: torch.zeros(2, 3, 1), ValueError, ("has shape (2, 3, 1)", "parameter, (2, 3)")),
    "float64": (lambda g: g.double(), TypeError, ("torch.float64", "torch.float32", "bfloat16", "float16", "float32")),
    "int32": (lambda g: g.int(), TypeError, ("has dtype torch.int32", "allowed for a parameter of torch.float32")),
    "complex64": (lambda g: g + 0j, TypeError, ("has dtype torch.complex64", "allowed for a parameter of")),
    "no memory": (emptied, ValueError, ("no memory (address 0)",)),
}


@both
@pytest.mark.parametrize("case", list(GRADIENTS.values()), ids=list(GRADIENTS))
@pytest.mark.parametrize("steps", [0, 2])
def test_gradients(rule: str, case: Any, steps: int, walk: str) -> None:
    make, error, parts = case
    opt = ready(rule, named=True, steps=steps)
    p = all_params(opt)[2]
    assert p.grad is not None
    good = p.grad.clone()
    p.grad.data = make(p.grad)
    pattern = mentions("the gradient of parameter 'head.bias' (group 1, index 1)", *parts)
    for _ in range(2):
        with untouched(opt), pytest.raises(error, match=pattern):
            opt.step()
    p.grad = None
    p.grad = good
    checked_step(opt)


@both
@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [
        (torch.bfloat16, "torch.bfloat16, torch.float32"),
        (torch.float16, "torch.float16, torch.float32"),
        (torch.float64, "torch.float64"),
        (torch.complex64, "torch.complex64"),
    ],
    ids=str,
)
def test_gradient_dtypes_of_other_parameters(rule: str, dtype: torch.dtype, allowed: str, walk: str) -> None:
    """Beside 16-bit parameters float32 gradients are allowed, nothing else is."""
    wrong = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}.get(dtype, torch.float32)
    p = nn.Parameter(torch.ones(5).to(dtype))
    opt = build(rule, [p])
    p.grad = torch.ones_like(p)
    opt.step()
    p.grad.data = torch.ones(5).to(wrong)
    pattern = mentions(f"has dtype {wrong}; allowed for a parameter of {dtype} are {allowed}") + "$"
    with untouched(opt), pytest.raises(TypeError, match=pattern):
        opt.step()
    if not dtype.is_complex and dtype != torch.float64:
        p.grad.data = torch.full((5,), 0.3)
        checked_step(opt)


@both
def test_sparse_and_dispatching_gradients(rule: str, walk: str) -> None:
    opt = ready(rule, named=True)
    p = all_params(opt)[2]
    good = p.grad
    p.grad = torch.ones(2, 3).to_sparse()
    pattern = mentions("the gradient of parameter 'head.bias'", "torch.sparse_coo", "sparse tensors are not supported")
    with untouched(opt), pytest.raises(RuntimeError, match=pattern):
        opt.step()
    p.grad = None
    p.grad = Dispatching(torch.ones(2, 3))
    pattern = mentions("the gradient of parameter 'head.bias'", "Dispatching", "plain subclasses")
    with untouched(opt), pytest.raises(TypeError, match=pattern):
        opt.step()
    p.grad = good
    checked_step(opt)
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = build(rule, embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with untouched(opt), pytest.raises(RuntimeError, match="sparse tensors are not supported"):
        opt.step()


# States ---------------------------------------------------------------------------------------------------------------

STATE_ERRORS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "shape": (torch.zeros(6), ValueError, ("has shape (6,)", "parameter, (2, 3)")),
    "fewer rows": (torch.zeros(1, 3), ValueError, ("has shape (1, 3)", "parameter, (2, 3)")),
    "a dimension behind": (torch.zeros(2, 3, 1), ValueError, ("has shape (2, 3, 1)", "parameter, (2, 3)")),
    "float64": (torch.zeros(2, 3, dtype=torch.float64), TypeError, ("torch.float64", "does not fit", "torch.float32")),
    "complex64": (torch.zeros(2, 3, dtype=torch.complex64), TypeError, ("torch.complex64", "does not fit")),
    "int64": (torch.zeros(2, 3, dtype=torch.int64), TypeError, ("torch.int64", "does not fit")),
    "number": (0.5, TypeError, ("is a float", "expected a tensor")),
    "list": ([0.5], TypeError, ("is a list", "expected a tensor")),
    "meta": (torch.zeros(2, 3, device="meta"), ValueError, ("is on meta", "parameter's device, cpu")),
    "sparse": (torch.eye(2, 3).to_sparse(), RuntimeError, ("layout torch.sparse_coo", "torch.strided")),
    "no memory": (emptied(torch.zeros(2, 3)), ValueError, ("no memory (address 0)",)),
}


@both
@pytest.mark.parametrize("case", list(STATE_ERRORS.values()), ids=list(STATE_ERRORS))
def test_states(rule: str, case: Any, walk: str) -> None:
    value, error, parts = case
    for name in STATES[rule]:
        opt = ready(rule, named=True)
        own = opt.state[all_params(opt)[2]]
        good, own[name] = own[name], value
        before = [raw(p) for p in all_params(opt)]
        pattern = mentions(f"the state '{name}' of parameter 'head.bias' (group 1, index 1)", *parts)
        with pytest.raises(error, match=pattern):
            opt.step()
        assert own[name] is value
        assert all(torch.equal(a, raw(p)) for a, p in zip(before, all_params(opt), strict=True))
        assert {float(s["step"]) for s in opt.state.values()} == {2.0}
        own[name] = good
        checked_step(opt)


def test_incomplete_states(walk: str) -> None:
    opt = ready("adamw", named=True)
    p = all_params(opt)[2]
    own = opt.state[p]
    for key in ("exp_avg", "exp_avg_sq"):
        kept = own.pop(key)
        pattern = mentions("the state of parameter 'head.bias'", f"has no ['{key}']", "['exp_avg', 'exp_avg_sq']")
        with untouched(opt), pytest.raises(ValueError, match=pattern):
            opt.step()
        own[key] = kept
    for nothing in ("delete", None):
        step = own.pop("step")
        if nothing is None:
            own["step"] = None
        pattern = mentions("the state of parameter 'head.bias'", "has ['exp_avg', 'exp_avg_sq'] but no 'step'")
        with untouched(opt), pytest.raises(ValueError, match=pattern):
            opt.step()
        own["step"] = step
    checked_step(opt)


@both
@pytest.mark.parametrize(
    ("value", "error", "parts"),
    [
        (-1, ValueError, ("is -1", "whole numbers >= 0")),
        (0.5, ValueError, ("is 0.5", "whole numbers >= 0")),
        (torch.nan, ValueError, ("is nan", "whole numbers >= 0")),
        (torch.inf, ValueError, ("is inf", "whole numbers >= 0")),
        (1e30, ValueError, ("is 1", "e+30", "whole numbers >= 0 and < 2**53")),
        ("3", TypeError, ("is '3'", "expected a whole number >= 0")),
        ([3], TypeError, ("is [3]", "expected a whole number >= 0")),
        (torch.ones(2), ValueError, ("has shape (2,)", "expected one number")),
    ],
    ids=str,
)
def test_step_counts(rule: str, value: Any, error: type[Exception], parts: tuple[str, ...], walk: str) -> None:
    """Put into the state, and where it is a number, written in place into the table's own vector."""
    pattern = mentions("the step count of parameter 'head.bias' (group 1, index 1)", *parts)
    opt = ready(rule, named=True)
    own = opt.state[all_params(opt)[2]]
    kept, own["step"] = own["step"], value
    with untouched(opt), pytest.raises(error, match=pattern):
        opt.step()
    own["step"] = kept
    checked_step(opt)
    if isinstance(value, (int, float)):
        own["step"].fill_(value)
        with untouched(opt), pytest.raises(error, match=pattern):
            opt.step()
        own["step"].fill_(6)
        checked_step(opt)


@both
@pytest.mark.parametrize("value", [5, [1], "x", torch.zeros(2)], ids=str)
def test_states_that_are_no_dict(rule: str, value: Any, walk: str) -> None:
    opt = ready(rule, named=True)
    p = all_params(opt)[2]
    kept, opt.state[p] = opt.state[p], value
    pattern = mentions("the state of parameter 'head.bias'", f"is a {type(value).__name__}", "expected a dict")
    with untouched(opt), pytest.raises(TypeError, match=pattern):
        opt.step()
    opt.state[p] = kept
    checked_step(opt)
    whole = opt.state
    opt.state = UserDict(whole)
    with pytest.raises(TypeError, match=mentions("the optimizer's state is a UserDict", "expected a dict")):
        opt.step()
    opt.state = whole
    checked_step(opt)
