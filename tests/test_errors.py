"""Every error of options and backends: its type, the name of what is wrong, what was found and what is allowed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bits import assert_same_optimizers
from refusals import SHAPES, mentions, ready
from semantics import all_params, build, checked_step, parameters, set_gradients, untouched

import wd_kernels
from wd_kernels import SGDW, AdamW, backends, native
from wd_kernels.layout import Spec

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


# Hyperparameters ------------------------------------------------------------------------------------------------------

HYPER: list[Any] = [
    # rule, option, value, error, parts of the message after "name="
    ("both", "lr", -1.0, ValueError, ("-1.0", ">= 0")),
    ("both", "lr", torch.inf, ValueError, ("inf", "finite")),
    ("both", "lr", torch.nan, ValueError, ("nan", "finite")),
    ("both", "lr", "0.1", TypeError, ("'0.1'", "expected a number or a tensor of one element")),
    ("both", "lr", None, TypeError, ("None", "expected a number")),
    ("both", "lr", 1j, TypeError, ("1j", "expected a number")),
    ("both", "lr", torch.ones(2), ValueError, ("(2,)", "float32", "expected one real number")),
    ("both", "lr", torch.ones((), dtype=torch.complex64), ValueError, ("complex64", "expected one real number")),
    ("both", "lr", torch.tensor(-0.5), ValueError, ("-0.5", ">= 0")),
    ("both", "eta", -1.0, ValueError, ("-1.0", ">= 0")),
    ("both", "eta", torch.tensor(torch.nan), ValueError, ("nan", "finite")),
    ("both", "eta", [1.0], TypeError, ("[1.0]", "expected a number")),
    ("both", "weight_decay", -0.1, ValueError, ("-0.1", ">= 0")),
    ("both", "weight_decay", torch.nan, ValueError, ("nan", "finite")),
    ("both", "weight_decay", torch.ones(3), ValueError, ("(3,)", "expected one real number")),
    (
        "both",
        "decay",
        "decoupled",
        ValueError,
        ("'decoupled'", "'l2', 'lr_scaled', 'independent'", "'metric_proximal'"),
    ),
    ("both", "decay", None, ValueError, ("None", "'l2'")),
    ("both", "maximize", "yes", TypeError, ("'yes'", "True or False")),
    ("both", "maximize", 2, TypeError, ("2", "True or False")),
    ("adamw", "betas", 0.9, TypeError, ("0.9", "pair (beta1, beta2)")),
    ("adamw", "betas", (0.9,), TypeError, ("(0.9,)", "pair (beta1, beta2)")),
    ("adamw", "betas", (0.9, 0.99, 0.999), TypeError, ("0.999", "pair (beta1, beta2)")),
    ("adamw", "betas", (1.0, 0.9), ValueError, ("[0]=1.0", "0 <= beta < 1")),
    ("adamw", "betas", (0.9, -0.1), ValueError, ("[1]=-0.1", "0 <= beta < 1")),
    ("adamw", "betas", (0.9, torch.nan), ValueError, ("[1]=nan", "0 <= beta < 1")),
    ("adamw", "betas", (0.9, "0.99"), TypeError, ("[1]='0.99'", "expected a number")),
    ("adamw", "eps", -1e-8, ValueError, ("-1e-08", ">= 0")),
    ("adamw", "amsgrad", "no", TypeError, ("'no'", "True or False")),
    ("sgdw", "momentum", -0.9, ValueError, ("-0.9", ">= 0")),
    ("sgdw", "dampening", torch.inf, ValueError, ("inf", "finite numbers")),
    ("sgdw", "form", "nesterov", ValueError, ("'nesterov'", "'torch', 'paper'")),
    ("sgdw", "nesterov", "x", TypeError, ("'x'", "True or False")),
]
HYPERS = [
    pytest.param(r, *case[1:], id=f"{r}-{case[1]}={case[2]}")
    for case in HYPER
    for r in (("adamw", "sgdw") if case[0] == "both" else (case[0],))
]


@pytest.mark.parametrize(("rule", "name", "value", "error", "parts"), HYPERS)
def test_hyperparameters(rule: str, name: str, value: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    """In the constructor, in a group, in an added group, in a loaded group, and in a live group at the step."""
    params = parameters(SHAPES)
    pattern = mentions(name, *parts)

    def where(index: int) -> str:
        return rf"^{name}.* in param group {index}(| of the saved state): .*"

    def raises(index: int) -> Any:
        return pytest.raises(error, match=f"(?s)(?=.*{pattern})(?={where(index)})")

    with pytest.raises(error, match=f"(?s)(?=.*{pattern})(?=^{name}.* in the arguments: )"):
        build(rule, params, **{name: value})
    with pytest.raises(error, match=f"(?s){pattern}"):
        build(rule, [{"params": params[:1]}, {"params": params[1:], name: value}])
    opt = ready(rule, named=False)
    with untouched(opt), pytest.raises(error, match=f"(?s){pattern}"):
        opt.add_param_group({"params": parameters([(3,)]), name: value})
    assert len(opt.param_groups) == 2
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][1][name] = value
    with untouched(opt), raises(1):
        opt.load_state_dict(saved)
    good = dict(opt.param_groups[1])
    opt.param_groups[1][name] = value
    with untouched(opt), raises(1):
        opt.step()
    opt.param_groups[1].clear()
    opt.param_groups[1].update(good)
    checked_step(opt)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"nesterov": True, "momentum": 0.0}, ("nesterov=True", "momentum=0.0", "momentum > 0 and dampening 0")),
        ({"nesterov": True, "dampening": 0.5}, ("nesterov=True", "dampening=0.5", "momentum > 0 and dampening 0")),
        ({"form": "paper", "nesterov": True}, ("nesterov=True", "form='paper'", "nesterov=False, dampening=0")),
        ({"form": "paper", "dampening": 0.5}, ("dampening=0.5", "form='paper'", "nesterov=False, dampening=0")),
    ],
)
def test_sgdw_combinations(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(*parts)):
        build("sgdw", parameters(), **options)
    opt = ready("sgdw", named=False)
    opt.param_groups[1].update(options)
    with untouched(opt), pytest.raises(ValueError, match="in param group 1: "):
        opt.step()


@both
def test_a_missing_key(rule: str) -> None:
    """Groups that somebody made by hand: the error names the key and the group."""
    for key in ("lr", "maximize", "weight_decay"):
        opt = ready(rule, named=False)
        del opt.param_groups[1][key]
        with untouched(opt), pytest.raises(KeyError, match=mentions("param group 1 has no", key)):
            opt.step()


@both
def test_flags_of_what_is_not_supported(rule: str) -> None:
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        build(rule, parameters(), differentiable=True)


# Backends -------------------------------------------------------------------------------------------------------------


@both
def test_unknown_backend(rule: str) -> None:
    with pytest.raises(ValueError, match=mentions("backend='gpu'", "'auto', 'cpu', 'triton', 'cuda', 'reference'")):
        build(rule, parameters(), backend="gpu")
    with pytest.raises(ValueError, match=mentions("backend='gpu'", "'auto', 'cpu', 'triton', 'cuda', 'reference'")):
        backends.resolve("gpu", Spec(torch.device("cpu"), (), ()))


@both
def test_a_backend_that_is_missing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, it is an error that says why; "auto" warns once that it is slow, and computes the same."""
    opts = {name: build(rule, parameters(), backend=name) for name in ("auto", "cpu", "reference")}
    for opt in opts.values():
        set_gradients(all_params(opt), 0)
    for name, value in (("C", None), ("CHECKS", False), ("WHY_NOT", "it was not built (a test)")):
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(backends, "_warned", False)
    pattern = mentions("backend='cpu' cannot be used", "it was not built (a test)")
    with untouched(opts["cpu"]), pytest.raises(RuntimeError, match=pattern):
        opts["cpu"].step()
    with pytest.warns(wd_kernels.FallbackWarning, match=mentions("on cpu", "not built", "backend='reference'")) as seen:
        opts["auto"].step()
    assert len(seen) == 1
    opts["reference"].step()
    for name in ("auto", "reference"):
        set_gradients(all_params(opts[name]), 1)
        opts[name].step()
    assert_same_optimizers(opts["auto"], opts["reference"])


def test_why_a_backend_refuses() -> None:
    spec = Spec(torch.device("meta"), (), ())
    with pytest.raises(RuntimeError, match=mentions("backend='cpu' cannot be used", "on meta", "CPU tensors")):
        backends.resolve("cpu", spec)


@both
def test_the_reference_says_that_it_needs_numpy(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = build(rule, parameters(), backend="reference")
    set_gradients(all_params(opt), 0)
    reference = backends.BACKENDS["reference"]
    if reference.why_not() is None:
        why = "it needs numpy"
        monkeypatch.setattr(type(reference), "why_not", lambda self: why)
    with untouched(opt), pytest.raises(RuntimeError, match="backend='reference' cannot be used: it needs numpy"):
        opt.step()


# Names ----------------------------------------------------------------------------------------------------------------


@both
def test_the_first_of_several_wrongs_is_named(rule: str) -> None:
    """By name where the group has names, by place where it has none, also where only some groups have."""
    for named, first in ((True, "parameter 'embed.weight' (group 0, index 0)"), (False, "parameter 0 of group 0")):
        opt = ready(rule, named)
        for p in all_params(opt):
            assert p.grad is not None
            p.grad.data = torch.zeros(9)
        with untouched(opt), pytest.raises(ValueError, match=mentions("the gradient of " + first)):
            opt.step()
    params = parameters(SHAPES)
    opt = build(rule, params)
    del opt.param_groups[0]["params"][0]
    opt.param_groups[0]["param_names"] = ["only one"]  # fewer names than parameters
    set_gradients(params, 0)
    params[2].grad.data = torch.zeros(9)
    with pytest.raises(ValueError, match=mentions("the gradient of parameter 1 of group 0")):
        opt.step()


def test_positional_mistakes_are_seen() -> None:
    """Arguments in the order of another class."""
    with pytest.raises(TypeError, match=r"betas=0\.9 in the arguments"):
        AdamW(parameters(), 0.1, 0.9)
    with pytest.raises(TypeError, match=r"momentum=\(0\.9, 0\.99\) in the arguments"):
        SGDW(parameters(), 0.1, (0.9, 0.99))
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        AdamW(parameters(), momentum=0.9)
