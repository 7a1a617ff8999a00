"""Hyperparameters to rows, against docs/numerics.md by hand, and every error that a hyperparameter can be."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wd_kernels import rules
from wd_kernels.rules import ADAGRADW, ADAMW, SGDW, Rule, ipow

ADAMW_GROUP: dict[str, Any] = {
    "lr": 0.1, "betas": (0.5, 0.75), "eps": 1e-6, "weight_decay": 0.2, "amsgrad": False, "maximize": False,
    "decay": "lr_scaled", "eta": 0.5,
}  # fmt: skip
SGDW_GROUP: dict[str, Any] = {
    "lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.2, "nesterov": False, "maximize": False,
    "decay": "lr_scaled", "form": "torch", "eta": 0.5,
}  # fmt: skip
ADAGRADW_GROUP: dict[str, Any] = {
    "lr": 0.1, "lr_decay": 0.25, "weight_decay": 0.2, "initial_accumulator_value": 0.5, "eps": 1e-6, "maximize": False,
    "decay": "lr_scaled", "eta": 0.5,
}  # fmt: skip
GROUPS = {"adamw": ADAMW_GROUP, "sgdw": SGDW_GROUP, "adagradw": ADAGRADW_GROUP}
RULES = {"adamw": ADAMW, "sgdw": SGDW, "adagradw": ADAGRADW}

#: What makes a count part of a row, or ends it, and no equation reads.
FOR_COUNTS = {
    "adamw": ("scaled_lr", "seed"), "sgdw": ("first_grad_coef", "later_grad_coef", "seed"),
    "adagradw": ("lr_decay", "scaled_lr", "fixed_decay", "scaled_decay", "scaled_metric", "seed"),
}  # fmt: skip


def named(rule: str, values: Tensor) -> dict[str, float]:
    """A row by the names of its scalars, but those that equations do not read."""
    found = dict(zip(RULES[rule].scalars, values.tolist(), strict=True))
    return {name: value for name, value in found.items() if name not in (*FOR_COUNTS[rule], *rules.LAST)}


def unused(rule: Rule) -> Rule:
    """The same rule, which has memorised nothing."""
    return dataclasses.replace(rule, _memo={})


def row(rule: str, t: int = 2, fresh: bool = False, **changed: Any) -> dict[str, float]:
    """One row by the names of its scalars."""
    own = RULES[rule]
    rows = own.rows(own.hypers([{**GROUPS[rule], **changed}]), [(0, t, fresh)])
    assert rows.dtype == torch.float64
    assert rows.shape == (1, len(own.scalars))
    return named(rule, rows[0])


def same_bits(a: float, b: float) -> bool:
    return struct.pack("d", a) == struct.pack("d", b)


# Powers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [0.9, 0.999, 0.95, 0.5, 0.1, 1 - 2.0**-30, 0.0])
def test_ipow_is_a_power(x: float) -> None:
    for t in [*range(20), 31, 32, 33, 100, 999, 1000, 2**16 + 1]:
        exact = float(Fraction(x) ** t) if t < 1001 else math.pow(x, t)
        assert ipow(x, t) == pytest.approx(exact, rel=1e-11, abs=1e-300)


def test_ipow_multiplies_in_the_stated_order() -> None:
    x = 0.9
    x2 = x * x
    x4 = x2 * x2
    x8 = x4 * x4
    assert ipow(x, 0) == 1.0
    assert ipow(x, 1) == x
    assert ipow(x, 13) == (x * x4) * x8
    assert ipow(x, 10) == x2 * x8
    assert ipow(x, 7) == (x * x2) * x4
    assert (x * x4) * x8 != x**13  # so another order would show
    assert ipow(0.999, 10**7) == 0.0


# AdamW ----------------------------------------------------------------------------------------------------------------

# lr 0.1, eta 0.5, weight_decay 0.2, step 2: a = 0.05, bias1 = 1 - 0.25, bias2 = 1 - 0.5625.
ADAMW_DECAY = {
    "l2": {"l2": 0.2, "decay": 0.0, "step_size": (1.0 * (0.5 * 0.1)) / 0.75, "metric": 0.0},
    "lr_scaled": {"l2": 0.0, "decay": (0.5 * 0.1) * 0.2, "step_size": (0.5 * 0.1) / 0.75, "metric": 0.0},
    "independent": {"l2": 0.0, "decay": 0.5 * 0.2, "step_size": (0.5 * 0.1) / 0.75, "metric": 0.0},
    "proximal": {"l2": 0.0, "decay": 0.1 / 1.1, "step_size": ((1 / 1.1) * 0.05) / 0.75, "metric": 0.0},
    "metric_proximal": {"l2": 0.0, "decay": 0.0, "step_size": 0.05 / 0.75, "metric": (0.5 * 0.1) * 0.2},
    "corrected": {"l2": 0.0, "decay": ((0.5 * 0.1) * 0.5) * 0.2, "step_size": 0.05 / 0.75, "metric": 0.0},
}


@pytest.mark.parametrize("decay", ADAMW_DECAY)
def test_adamw_row(decay: str) -> None:
    found = row("adamw", decay=decay)
    shared = {
        "t": 2.0, "frozen": 0.0, "grad_scale": 1.0, "grad_limit": math.inf, "beta1": 0.5, "one_minus_beta1": 0.5,
        "beta2": 0.75, "one_minus_beta2": 0.25, "inv_sqrt_bias2": 1.0 / math.sqrt(0.4375), "eps": 1e-6,
    }  # fmt: skip
    assert found == {**shared, **ADAMW_DECAY[decay]}


@pytest.mark.parametrize(
    ("decay", "decimals"),
    [
        ("l2", {"l2": 0.2, "decay": 0, "step_size": 0.0666666666666666667, "metric": 0}),
        ("lr_scaled", {"l2": 0, "decay": 0.01, "step_size": 0.0666666666666666667, "metric": 0}),
        ("independent", {"l2": 0, "decay": 0.1, "step_size": 0.0666666666666666667, "metric": 0}),
        ("proximal", {"l2": 0, "decay": 0.0909090909090909091, "step_size": 0.0606060606060606061, "metric": 0}),
        ("metric_proximal", {"l2": 0, "decay": 0, "step_size": 0.0666666666666666667, "metric": 0.01}),
        ("corrected", {"l2": 0, "decay": 0.005, "step_size": 0.0666666666666666667, "metric": 0}),
    ],
)
def test_adamw_row_in_decimals(decay: str, decimals: dict[str, float]) -> None:
    found = row("adamw", decay=decay)
    assert {k: found[k] for k in decimals} == pytest.approx(decimals, rel=1e-14)
    assert found["inv_sqrt_bias2"] == pytest.approx(1.5118578920369088, rel=1e-15)  # sqrt(16 / 7)


def test_adamw_first_step_and_far_steps() -> None:
    first = row("adamw", t=1)
    assert first["step_size"] == (0.5 * 0.1) / 0.5
    assert first["inv_sqrt_bias2"] == 1 / math.sqrt(0.25)
    far = row("adamw", t=100_000)
    assert far["t"] == 100_000
    assert far["step_size"] == 0.5 * 0.1
    assert far["inv_sqrt_bias2"] == 1.0


def test_complements_are_taken_in_float64() -> None:
    found = row("adamw", betas=(0.9, 0.999))
    assert found["one_minus_beta1"] == 1 - 0.9 != 0.1
    assert found["one_minus_beta2"] == 1 - 0.999 != 0.001


def test_maximize_turns_only_the_sign() -> None:
    for rule in RULES:
        up, down = row(rule, maximize=True), row(rule)
        assert up.pop("grad_scale") == -1.0
        assert down.pop("grad_scale") == 1.0
        assert up == down


# SGDW -----------------------------------------------------------------------------------------------------------------

SGDW_DECAY = {
    "l2": {"l2": 0.2, "decay": 0.0, "scale": 1.0},
    "lr_scaled": {"l2": 0.0, "decay": (0.5 * 0.1) * 0.2, "scale": 1.0},
    "independent": {"l2": 0.0, "decay": 0.5 * 0.2, "scale": 1.0},
    "proximal": {"l2": 0.0, "decay": (0.5 * 0.2) / (1 + 0.5 * 0.2), "scale": 1 / (1 + 0.5 * 0.2)},
    "metric_proximal": {"l2": 0.0, "decay": (0.05 * 0.2) / (1 + 0.05 * 0.2), "scale": 1 / (1 + 0.05 * 0.2)},
    "corrected": {"l2": 0.0, "decay": ((0.5 * 0.1) * 0.5) * 0.2, "scale": 1.0},
}


@pytest.mark.parametrize("decay", SGDW_DECAY)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"grad_coef": 1.0, "update_grad": 0.0, "update_buf": 1.0, "lr_outside": True}),
        ({"dampening": 0.25}, {"grad_coef": 0.75, "update_grad": 0.0, "update_buf": 1.0, "lr_outside": True}),
        ({"dampening": -0.5}, {"grad_coef": 1.5, "update_grad": 0.0, "update_buf": 1.0, "lr_outside": True}),
        ({"nesterov": True}, {"grad_coef": 1.0, "update_grad": 1.0, "update_buf": 0.9, "lr_outside": True}),
        ({"form": "paper"}, {"grad_coef": 0.05, "update_grad": 0.0, "update_buf": 1.0, "lr_outside": False}),
        ({"momentum": 0.0}, {"momentum": 0.0, "lr_outside": True}),
        ({"momentum": 0.0, "form": "paper"}, {"momentum": 0.0, "lr_outside": True}),
    ],
    ids=str,
)
def test_sgdw_row(decay: str, options: dict[str, Any], expected: dict[str, Any]) -> None:
    found = row("sgdw", decay=decay, **options)
    where = SGDW_DECAY[decay]
    wanted = {
        "t": 2.0, "frozen": 0.0, "grad_scale": 1.0, "grad_limit": math.inf, "momentum": 0.9, "l2": where["l2"],
        "decay": where["decay"], "step_size": where["scale"] * 0.05 if expected["lr_outside"] else where["scale"],
        **{k: v for k, v in expected.items() if k != "lr_outside"},
    }  # fmt: skip
    assert {k: found[k] for k in wanted} == wanted


def test_fresh_buffer() -> None:
    """The step that makes the buffer is not dampened; the paper's lr multiplies it all the same."""
    assert row("sgdw", t=1, fresh=True, dampening=0.25)["grad_coef"] == 1.0
    assert row("sgdw", t=7, fresh=True, dampening=0.25)["grad_coef"] == 1.0
    assert row("sgdw", t=7, fresh=False, dampening=0.25)["grad_coef"] == 0.75
    assert row("sgdw", t=1, fresh=True, form="paper")["grad_coef"] == 0.05
    assert row("adamw", t=3, fresh=True) == row("adamw", t=3, fresh=False)


@pytest.mark.parametrize("rule", RULES)
def test_eta_multiplies_alpha_and_lambda_where_the_table_says(rule: str) -> None:
    for decay, power in {"l2": 0, "lr_scaled": 1, "independent": 1}.items():
        one, four = (row(rule, decay=decay, eta=eta) for eta in (0.25, 1.0))
        assert four["step_size"] == 4 * one["step_size"]
        assert four["decay"] == (4 * one["decay"] if power else 0)
        assert four["l2"] == one["l2"]
    # lr and eta differ in what they do to independent decay
    assert row(rule, decay="independent", lr=0.2)["decay"] == row(rule, decay="independent")["decay"]
    assert row(rule, decay="lr_scaled", lr=0.2)["decay"] == 2 * row(rule, decay="lr_scaled")["decay"]
    assert row(rule, decay="proximal", lr=0.2)["decay"] == row(rule, decay="proximal")["decay"]
    assert row(rule, decay="proximal", lr=0.2)["step_size"] == 2 * row(rule, decay="proximal")["step_size"]


# AdagradW -------------------------------------------------------------------------------------------------------------

# lr 0.1, eta 0.5, weight_decay 0.2, step 3 at lr_decay 0.25: a is 0.05 over 1.5.
ADAGRADW_DECAY = {
    "l2": {"l2": 0.2, "decay": 0.0, "step_size": 0.05 / 1.5, "metric": 0.0},
    "lr_scaled": {"l2": 0.0, "decay": (0.05 * 0.2) / 1.5, "step_size": 0.05 / 1.5, "metric": 0.0},
    "independent": {"l2": 0.0, "decay": 0.5 * 0.2, "step_size": 0.05 / 1.5, "metric": 0.0},
    "proximal": {"l2": 0.0, "decay": 0.1 / 1.1, "step_size": ((1 / 1.1) * 0.05) / 1.5, "metric": 0.0},
    "metric_proximal": {"l2": 0.0, "decay": 0.0, "step_size": 0.05 / 1.5, "metric": (0.05 * 0.2) / 1.5},
    "corrected": {"l2": 0.0, "decay": ((0.05 * 0.5) * 0.2) / 1.5, "step_size": 0.05 / 1.5, "metric": 0.0},
}


@pytest.mark.parametrize("decay", ADAGRADW_DECAY)
def test_adagradw_row(decay: str) -> None:
    """What follows the learning rate falls with it, and nothing else does."""
    found = row("adagradw", t=3, decay=decay)
    shared = {"t": 3.0, "frozen": 0.0, "grad_scale": 1.0, "grad_limit": math.inf, "eps": 1e-6}
    assert found == {**shared, **ADAGRADW_DECAY[decay]}
    first, never = row("adagradw", t=1, decay=decay), row("adagradw", t=9, decay=decay, lr_decay=0.0)
    assert {**never, "t": 1.0} == first
    assert first["step_size"] == pytest.approx(1.5 * found["step_size"], rel=1e-15)


# Frozen ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", rules.DECAY_MODES)
@pytest.mark.parametrize("rule", RULES)
def test_frozen_by_zero_only(rule: str, decay: str) -> None:
    """By lr 0 and by eta 0: no gradient that is not finite reaches weights that are not to move."""
    for zero in (0.0, 0, -0.0, torch.tensor(0.0)):
        assert row(rule, decay=decay, lr=zero)["frozen"] == 1.0
        assert row(rule, decay=decay, eta=zero)["frozen"] == 1.0
    assert row(rule, decay=decay, lr=5e-324)["frozen"] == 0.0
    assert row(rule, decay=decay, eta=5e-324)["frozen"] == 0.0
    assert row(rule, decay=decay, lr=1e-200, eta=1e-200)["frozen"] == 0.0  # though their product is 0


# Tensors, numbers of other types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: torch.tensor(x, dtype=torch.float64),
        lambda x: torch.tensor([[x]], dtype=torch.float64),
        lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True),
        np.float64,
        np.array,
        Fraction,
    ],
    ids=["0-dim", "1x1", "requires-grad", "numpy scalar", "numpy array", "fraction"],
)
def test_kinds_of_numbers(rule: str, wrap: Callable[[float], Any]) -> None:
    plain = row(rule)
    for name in ("lr", "eta", "weight_decay"):
        assert row(rule, **{name: wrap(GROUPS[rule][name])}) == plain
    if rule == "adamw":
        assert row(rule, betas=(wrap(0.5), wrap(0.75)), eps=wrap(1e-6)) == plain
        assert row(rule, betas=[0.5, wrap(0.75)]) == plain
    elif rule == "sgdw":
        assert row(rule, momentum=wrap(0.9), dampening=wrap(0.0)) == plain
    else:
        assert row(rule, lr_decay=wrap(0.25), eps=wrap(1e-6), initial_accumulator_value=wrap(0.5)) == plain


def test_float32_tensors_are_widened() -> None:
    assert row("adamw", lr=torch.tensor(0.1))["step_size"] == (0.5 * float(np.float32(0.1))) / 0.75


@pytest.mark.parametrize("name", ["lr", "eta", "weight_decay", "eps"])
def test_tensors_may_change_in_place(name: str) -> None:
    value = torch.tensor(0.25, dtype=torch.float64)
    group = {**ADAMW_GROUP, name: value}
    before = ADAMW.rows(ADAMW.hypers([group]), [(0, 2, False)])
    value.fill_(0.5)
    after = ADAMW.rows(ADAMW.hypers([group]), [(0, 2, False)])
    assert not torch.equal(before, after)
    assert named("adamw", after[0]) == row("adamw", **{name: 0.5})


def test_tensor_betas_may_change_in_place() -> None:
    beta = torch.tensor(0.5, dtype=torch.float64)
    group = {**ADAMW_GROUP, "betas": (beta, 0.75)}
    ADAMW.hypers([group])
    beta.fill_(0.25)
    found = ADAMW.rows(ADAMW.hypers([group]), [(0, 2, False)])[0].tolist()
    assert found[ADAMW.scalars.index("beta1")] == 0.25
    assert found[ADAMW.scalars.index("step_size")] == (0.5 * 0.1) / (1 - 0.0625)


# The memo -------------------------------------------------------------------------------------------------------------

CHANGES: dict[str, list[tuple[str, Any]]] = {
    "adamw": [
        ("weight_decay", 0.7), ("betas", (0.25, 0.75)), ("betas", [0.25, 0.5]), ("eps", 1e-3), ("maximize", True),
        ("decay", "independent"), ("amsgrad", True), ("lr", 0.3), ("eta", 0.125), ("weight_decay", 1),
        ("decay", "l2"), ("maximize", False), ("betas", (0.5, 0.5)), ("amsgrad", False),
    ],
    "sgdw": [
        ("weight_decay", 0.7), ("momentum", 0.5), ("dampening", 0.25), ("dampening", 0.0), ("nesterov", True),
        ("maximize", True), ("decay", "proximal"), ("nesterov", False), ("form", "paper"), ("lr", 0.3),
        ("momentum", 0.0), ("form", "torch"), ("eta", 0.125), ("momentum", 1), ("decay", "metric_proximal"),
    ],
    "adagradw": [
        ("weight_decay", 0.7), ("lr_decay", 0.5), ("eps", 1e-3), ("maximize", True), ("decay", "l2"), ("lr", 0.3),
        ("decay", "metric_proximal"), ("eta", 0.125), ("lr_decay", 0.0), ("decay", "proximal"), ("maximize", False),
    ],
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_values_that_change_between_calls(rule: str) -> None:
    """A live group, changed key by key: always what a rule without a memory says."""
    own, group = unused(RULES[rule]), dict(GROUPS[rule])
    seen = set()
    for name, value in CHANGES[rule]:
        group[name] = value
        for _ in range(2):
            found = own.rows(own.hypers([group]), [(0, 3, False)])
            clean = unused(RULES[rule])
            assert torch.equal(found, clean.rows(clean.hypers([dict(group)]), [(0, 3, False)]))
        seen.add((*found[0].tolist(), own.hypers([group])[0][0].states))
    assert len(seen) >= len(CHANGES[rule]) - 2  # the changes do change something


def outcome(rule: Rule, group: dict[str, Any]) -> Any:
    """Rows by their bits, or the error."""
    try:
        found = rule.rows(rule.hypers([group]), [(0, 3, False)])
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    return found.view(torch.int64).tolist()


@pytest.mark.parametrize(
    ("rule", "name", "first", "second"),
    [
        ("adamw", "maximize", True, 1.0),
        ("adamw", "maximize", False, 0.0),
        ("adamw", "amsgrad", True, 1.0),
        ("adamw", "weight_decay", 1.0, True),
        ("adamw", "weight_decay", 0.0, -0.0),
        ("adamw", "eps", 0.0, -0.0),
        ("adamw", "betas", (0.5, 0.75), [0.5, 0.75]),
        ("adamw", "betas", (0.0, 0.75), (False, 0.75)),
        ("sgdw", "nesterov", True, 1.0),
        ("sgdw", "nesterov", False, 0),
        ("sgdw", "maximize", True, 1.0),
        ("sgdw", "momentum", 1.0, True),
        ("sgdw", "dampening", 0.0, False),
    ],
)
def test_equal_keys_of_another_type(rule: str, name: str, first: Any, second: Any) -> None:
    """What a rule says of a group does not depend on the groups that it has seen before."""
    own = unused(RULES[rule])
    for value in (first, second, first):
        group = {**GROUPS[rule], name: value}
        assert outcome(own, group) == outcome(unused(RULES[rule]), group)


def test_many_groups_and_many_values() -> None:
    """465 groups in one call, and more values than the memo holds."""
    groups = [{**ADAMW_GROUP, "weight_decay": i / 64, "lr": (i + 1) / 1024} for i in range(465)]
    found = ADAMW.rows(ADAMW.hypers(groups), [(i, 2, False) for i in range(465)])
    assert found.shape == (465, len(ADAMW.scalars))
    for i in range(465):
        assert found[i, ADAMW.scalars.index("decay")] == (0.5 * ((i + 1) / 1024)) * (i / 64)
        assert found[i, ADAMW.scalars.index("step_size")] == (0.5 * ((i + 1) / 1024)) / 0.75
    own = unused(ADAMW)
    for i in range(5000):
        settings, *_ = own.hypers([{**ADAMW_GROUP, "weight_decay": float(i)}])[0]
        assert settings.weight_decay == i
    assert len(own._memo) < 5000


def test_rows_follow_their_keys() -> None:
    hypers = ADAMW.hypers([ADAMW_GROUP, {**ADAMW_GROUP, "lr": 0.2}])
    found = ADAMW.rows(hypers, [(1, 5, False), (0, 1, True), (1, 2, False), (0, 5, False)])
    assert found[:, ADAMW.scalars.index("t")].tolist() == [5, 1, 2, 5]
    assert found[2, ADAMW.scalars.index("step_size")] == 2 * row("adamw", t=2)["step_size"]
    assert found[1, ADAMW.scalars.index("step_size")] == row("adamw", t=1)["step_size"]
    assert ADAMW.rows([], []).shape == (0, len(ADAMW.scalars))
    assert SGDW.rows(SGDW.hypers([SGDW_GROUP]), []).shape == (0, len(SGDW.scalars))


def test_states_needed() -> None:
    def needs(rule: str, **changed: Any) -> Any:
        states = RULES[rule].hypers([{**GROUPS[rule], **changed}])[0][0].states
        return tuple(state.name for state in states)

    assert needs("adamw") == ("exp_avg", "exp_avg_sq")
    assert needs("adamw", amsgrad=True) == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert needs("sgdw") == ("momentum_buffer",)
    assert needs("sgdw", momentum=0) == ()


# Errors ---------------------------------------------------------------------------------------------------------------

ZERO_UP = "allowed are finite numbers >= 0"
NUMBER = "expected a number or a tensor of one element"
MODES = "allowed are 'l2', 'lr_scaled', 'independent', 'proximal', 'metric_proximal', 'corrected'"
PAIR = r"expected a pair \(beta1, beta2\)"
BETA = "allowed are 0 <= beta < 1"
BOTH: list[tuple[str, Any, type[Exception], str, str]] = [
    *((name, bad, ValueError, shown, ZERO_UP) for name in ("lr", "eta", "weight_decay") for bad, shown in
      ((-0.5, "-0.5"), (math.inf, "inf"), (math.nan, "nan"), (torch.tensor(-1.0), "-1.0"), (-1, "-1.0"))),
    *((name, bad, TypeError, shown, NUMBER) for name in ("lr", "eta", "weight_decay") for bad, shown in
      (("0.1", "'0.1'"), (None, "None"), ([0.1], r"\[0.1\]"), (1j, "1j"))),
    *((name, torch.ones(2), ValueError, r"\(2,\)-shaped torch.float32 tensor", "one real number")
      for name in ("lr", "eta", "weight_decay")),
    ("lr", torch.ones((), dtype=torch.complex64), ValueError, r"\(\)-shaped torch.complex64", "one real number"),
    ("lr", torch.ones(0), ValueError, r"\(0,\)-shaped", "one real number"),
    ("maximize", "yes", TypeError, "'yes'", "expected True or False"),
    ("maximize", 2, TypeError, "2", "expected True or False"),
    ("maximize", None, TypeError, "None", "expected True or False"),
    ("maximize", 0.5, TypeError, "0.5", "expected True or False"),
    ("decay", "decoupled", ValueError, "'decoupled'", MODES),
    ("decay", None, ValueError, "None", MODES),
    ("decay", ["l2"], ValueError, r"\['l2'\]", MODES),
]  # fmt: skip
ADAMW_ONLY: list[tuple[str, Any, type[Exception], str, str]] = [
    ("eps", -1e-8, ValueError, "-1e-08", ZERO_UP),
    ("eps", math.inf, ValueError, "inf", ZERO_UP),
    ("eps", "small", TypeError, "'small'", NUMBER),
    ("amsgrad", "no", TypeError, "'no'", "expected True or False"),
    ("betas", 0.9, TypeError, "0.9", PAIR),
    ("betas", (0.9,), TypeError, r"\(0.9,\)", PAIR),
    ("betas", (0.9, 0.99, 0.999), TypeError, r"\(0.9, 0.99, 0.999\)", PAIR),
    ("betas", None, TypeError, "None", PAIR),
]
BETAS: list[tuple[tuple[Any, Any], int, type[Exception], str, str]] = [
    ((1.0, 0.9), 0, ValueError, "1.0", BETA),
    ((0.9, 1.0), 1, ValueError, "1.0", BETA),
    ((-0.1, 0.9), 0, ValueError, "-0.1", BETA),
    ((0.9, math.nan), 1, ValueError, "nan", BETA),
    ((0.9, torch.tensor(2.0)), 1, ValueError, "2.0", BETA),
    ((0.9, "0.9"), 1, TypeError, "'0.9'", NUMBER),
]
SGDW_ONLY: list[tuple[str, Any, type[Exception], str, str]] = [
    ("momentum", -0.9, ValueError, "-0.9", ZERO_UP),
    ("momentum", math.nan, ValueError, "nan", ZERO_UP),
    ("momentum", "m", TypeError, "'m'", NUMBER),
    ("dampening", math.inf, ValueError, "inf", "allowed are finite numbers"),
    ("dampening", math.nan, ValueError, "nan", "allowed are finite numbers"),
    ("dampening", None, TypeError, "None", NUMBER),
    ("nesterov", "no", TypeError, "'no'", "expected True or False"),
    ("form", "article", ValueError, "'article'", "allowed are 'torch', 'paper'"),
    ("form", None, ValueError, "None", "allowed are 'torch', 'paper'"),
]
ADAGRADW_ONLY: list[tuple[str, Any, type[Exception], str, str]] = [
    *((name, -0.5, ValueError, "-0.5", ZERO_UP) for name in ("lr_decay", "eps", "initial_accumulator_value")),
    *((name, math.nan, ValueError, "nan", ZERO_UP) for name in ("lr_decay", "initial_accumulator_value")),
    ("initial_accumulator_value", "x", TypeError, "'x'", NUMBER),
]


@pytest.mark.parametrize(
    ("rule", "name", "value", "kind", "shown", "allowed"),
    [
        *(("adamw", *each) for each in [*BOTH, *ADAMW_ONLY]),
        *(("sgdw", *each) for each in [*BOTH, *SGDW_ONLY]),
        *(("adagradw", *each) for each in [*BOTH[-4:], *ADAGRADW_ONLY]),
    ],
)
@pytest.mark.parametrize("index", [0, 2])
def test_errors(rule: str, name: str, value: Any, kind: type[Exception], shown: str, allowed: str, index: int) -> None:
    """Each names the hyperparameter, what was found, the group, and what is allowed."""
    groups = [dict(GROUPS[rule]) for _ in range(4)]
    groups[index][name] = value
    pattern = f"^{name}={shown}.* in param group {index}: .*{allowed}$"
    for _ in range(2):  # an error is not remembered as fine
        with pytest.raises(kind, match=pattern):
            RULES[rule].hypers(groups)


@pytest.mark.parametrize(("betas", "which", "kind", "shown", "allowed"), BETAS)
def test_errors_of_betas(betas: tuple[Any, Any], which: int, kind: type[Exception], shown: str, allowed: str) -> None:
    for given in (betas, list(betas)):
        with pytest.raises(kind, match=rf"^betas\[{which}\]={shown} in param group 1: .*{allowed}$"):
            ADAMW.hypers([ADAMW_GROUP, {**ADAMW_GROUP, "betas": given}])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("nesterov", "dampening"), [(True, 0.0), (False, 0.1), (True, 0.1)])
def test_errors_of_the_paper_form(momentum: float, nesterov: bool, dampening: float) -> None:
    bad = {**SGDW_GROUP, "form": "paper", "momentum": momentum, "nesterov": nesterov, "dampening": dampening}
    pattern = f"^nesterov={nesterov}, dampening={dampening} in param group 1: .*'paper'.*nesterov=False, dampening=0"
    with pytest.raises(ValueError, match=pattern):
        SGDW.hypers([SGDW_GROUP, bad])


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.1)])
def test_errors_of_nesterov(momentum: float, dampening: float) -> None:
    bad = {**SGDW_GROUP, "nesterov": True, "momentum": momentum, "dampening": dampening}
    pattern = f"nesterov=True with momentum={momentum}, dampening={dampening} in param group 1: .*momentum > 0"
    with pytest.raises(ValueError, match=pattern):
        SGDW.hypers([SGDW_GROUP, bad])


@pytest.mark.parametrize("rule", RULES)
def test_a_missing_hyperparameter_is_named(rule: str) -> None:
    for name in set(GROUPS[rule]) - {"eta", "decay", "form"}:  # which mean what torch does
        group = {k: v for k, v in GROUPS[rule].items() if k != name}
        with pytest.raises(KeyError, match=f"param group 1 has no '{name}'"):
            RULES[rule].hypers([GROUPS[rule], group])


def test_allowed_ends() -> None:
    ADAMW.hypers([{**ADAMW_GROUP, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0, "lr": 0.0, "eta": 0.0}])
    found = row("adamw", betas=(0.0, 0.0), t=1)
    assert found["inv_sqrt_bias2"] == 1.0
    assert found["one_minus_beta1"] == 1.0
    SGDW.hypers([{**SGDW_GROUP, "momentum": 1.5, "dampening": -3.0}])
    value: Tensor = torch.tensor(1, dtype=torch.int64)
    assert row("sgdw", lr=value) == row("sgdw", lr=1.0)
    assert same_bits(row("sgdw", lr=1)["step_size"], 0.5)
