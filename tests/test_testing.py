"""The conformance kit: what is right passes, a planted fault is found by the check meant for it and by few others."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import conformance
import pytest
import torch
from torch import Tensor

import wd_kernels
from wd_kernels import testing

pytest_plugins = ["pytester"]
HISTORY: list[Tensor] = []  # what a planted fault keeps


class Planted(torch.optim.Optimizer):
    """AdamW in plain torch, with masters of 16-bit parameters, and the fault that it is asked for."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fault: str = "",
    ) -> None:
        if fault != "any option" and not (
            lr >= 0 and weight_decay >= 0 and eps >= 0 and all(0 <= b < 1 for b in betas)
        ):
            raise ValueError("an option is out of its range")
        lr = float(lr) if fault == "tensor read once" else lr
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fault": fault}
        super().__init__(params, options)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        fault = self.defaults["fault"]
        indices = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(indices, params, strict=True):
            if i in saved["state"] and fault != "states cast":
                self.state[p] = {name: x.clone() for name, x in saved["state"][i].items()}
                if fault == "moment not loaded":
                    self.state[p]["exp_avg"].zero_()
        for group in self.param_groups:
            if fault == "keys dropped":
                group.pop("layer", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Planted:
        if self.defaults["fault"] == "copies share":
            return self
        own = Planted.__new__(Planted)
        memo[id(self)] = own
        own.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return own

    def __getstate__(self) -> dict[str, Any]:
        own = super().__getstate__()
        return own | {"state": type(self.state)(dict)} if self.defaults["fault"] == "pickled empty" else own

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=self.defaults["fault"] != "gradients kept" and set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        fault, loss = self.defaults["fault"], None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            loss = None if fault == "loss not returned" else loss
        everything = [p for group in self.param_groups for p in group["params"]]
        sparse = any(p.grad is not None and p.grad.is_sparse for p in everything)
        if sparse and fault not in ("refuses late", "sparse negated"):
            raise RuntimeError("sparse gradients are not taken")
        spoilt = fault == "NaN spreads" and any(p.grad is not None and p.grad.isnan().any() for p in everything)
        counts = [s["step"] for s in self.state.values() if "step" in s]
        shared = max(counts, default=0) if fault == "one count for all" else 0
        for group in self.param_groups:
            mine = [self.state[p]["step"] for p in group["params"] if p in self.state]
            count = shared or (max(mine, default=0) if fault == "a count of a group" else 0)
            for p in group["params"]:
                if p.grad is None:
                    if fault == "missing gradients decay":
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                elif p.grad.is_sparse and fault == "refuses late":
                    raise RuntimeError("sparse gradients are not taken")
                elif not (
                    (fault == "scalars skipped" and p.dim() == 0)
                    or (fault == "one dtype" and p.dtype != everything[0].dtype)
                ):
                    self.step_one(p, group, count, math.nan if spoilt else 1.0)
        return loss

    def step_one(self, p: Tensor, group: dict[str, Any], count: int, factor: float) -> None:
        fault, state = self.defaults["fault"], self.state[p]
        wide = torch.float64 if p.dtype == torch.float64 and fault != "float32 inside" else torch.float32
        assert p.grad is not None
        g = -p.grad.to_dense() if p.grad.is_sparse else p.grad
        g = g.to(wide)
        if not state or (fault == "states made anew" and state["exp_avg"].shape != p.shape):
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g))
            if p.dtype in (torch.float16, torch.bfloat16) and fault != "no masters":
                state["master"] = p.to(wide)
            if fault == "decay read once":
                state["decay"] = torch.tensor(float(group["weight_decay"]), dtype=torch.float64)
            if fault in ("lr read once", "decay of the first lr"):
                state["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64)
        theta = state["master"] if "master" in state else p.to(wide)
        state["step"] = torch.as_tensor(float(max(state["step"], count)) + 1) if count else state["step"] + 1
        first = self.param_groups[0]
        lr = float((first if fault == "lr of the first group" else group)["lr"])
        first_lr = float(state.get("lr", lr))
        lr = {"lr read once": first_lr, "lr has a floor": max(lr, 1e-4)}.get(fault, lr)
        decay = float((first if fault == "decay of the first group" else group)["weight_decay"])
        decay = float(state["decay"]) if "decay" in state else decay
        if fault == "L2":
            g = g + decay * theta
        (beta1, beta2), t, eps = group["betas"], float(state["step"]), group["eps"]
        t = min(t, 256.0) if fault == "count in bfloat16" else t
        m = state["exp_avg"].mul_(beta1).add_((1 - beta1) * g)
        before = state["exp_avg_sq"].square() if fault == "root kept" else state["exp_avg_sq"]
        v = beta2 * before + (1 - beta2) * g * g
        state["exp_avg_sq"].copy_(v.sqrt() if fault == "root kept" else v)
        corrected = 1 if fault == "no bias correction" else 1 - beta1**t
        second = 1 - torch.tensor(beta2, dtype=torch.float32) ** t if fault == "correction in float32" else 1 - beta2**t
        v = v / second
        root = (v + eps**2).sqrt() if fault == "eps in the root" else v.sqrt() + eps
        u = factor * m / corrected / root
        if fault == "update in bfloat16":
            u = u.bfloat16().to(wide)
        shrinks = {"lr left out": decay, "L2": 0.0, "decay of the first lr": first_lr * decay}.get(fault, lr * decay)
        theta = theta - shrinks * theta - lr * u
        if "master" in state:
            state["master"] = theta
        if fault == "memory replaced":
            p.data = theta.to(p.dtype)
        elif fault == "strides ignored":
            torch.as_strided(p, (p.numel(),), (1,)).copy_(theta.flatten())
        else:
            p.copy_(theta)
        if fault == "gradient written":
            p.grad.mul_(0.5)
        if fault == "history":
            HISTORY.append(u)


class Ignores(Planted):
    """Takes options, and does nothing with them."""

    def __init__(self, params: Any, maximize: bool = False, amsgrad: bool = False, **options: Any) -> None:
        super().__init__(params, **options)


class Unhooked(Planted):
    """Takes hooks, and forgets them."""

    def register_step_post_hook(self, hook: Any) -> Any:
        return super().register_step_post_hook(lambda *_: None)


class Scaling(Planted):
    """Tells GradScaler that it unscales and skips by itself, and does not."""

    _step_supports_amp_scaling = True


#: Which checks find a fault: these, and of the quick ones no other (beside `equation`, which sees all of a rule).
FOUND: dict[str, set[str]] = {
    "no masters": {"decay-bfloat16", "decay-float16", "drift-bfloat16", "drift-float16"},
    "lr left out": {"decay", "decay-form", "decay-at-lr-0", "decay-is-read", "lr-scheduler", "torch-state"},
    "L2": {"decay", "decay-form", "decay-is-read", "lr-scheduler", "torch-state"},
    "decay of the first lr": {"lr-scheduler"},
    "decay of the first group": {"decay-of-groups"},
    "decay read once": {"decay-is-read"},
    "lr read once": {"lr-scheduler"},
    "lr of the first group": {"groups"},
    "lr has a floor": {"decay-at-lr-0"},
    "tensor read once": {"tensor-lr"},
    "one count for all": {"late-group", "late-gradient"},
    "a count of a group": {"late-gradient"},
    "missing gradients decay": {"missing-gradient", "late-gradient"},
    "no bias correction": {"first-steps", "decay-is-read", "lr-scheduler", "torch-state"},
    "count in bfloat16": {"drift", "drift-bfloat16", "drift-float16"},
    "eps in the root": {"eps"},
    "update in bfloat16": {"update", "update-float64", "first-steps", "eps"},
    "float32 inside": {"update-float64"},
    "moment not loaded": {"resume", "resume-bfloat16", "resume-float16", "resume-float64", "torch-state"},
    "states cast": {"resume-bfloat16", "resume-float16"},
    "keys dropped": {"group-keys"},
    "copies share": {"deepcopy"},
    "pickled empty": {"pickled", "deepcopy"},
    "root kept": {"torch-state"},
    "states made anew": {"other-order"},
    "loss not returned": {"closure"},
    "gradients kept": {"zero-grad"},
    "gradient written": {"in-place"},
    "memory replaced": {"in-place", "other-order"},
    "strides ignored": {"layouts", "gradient-strides"},
    "scalars skipped": {"shapes"},
    "one dtype": {"mixed-dtypes"},
    "any option": {"bad-options"},
    "sparse negated": {"sparse-gradient"},
    "refuses late": {"nothing-on-error"},
    "NaN spreads": {"nan-gradient"},
    "history": {"growth"},
}
CLASSES: dict[type[Planted], set[str]] = {
    Ignores: {"maximize", "amsgrad"}, Unhooked: {"hooks"}, Scaling: {"grad-scaler"},
}  # fmt: skip
SLOW = {"decay", "drift", "growth"}


def failing(make: Any, expected: set[str], **options: Any) -> set[str]:
    """The names of what does not hold, of all that is quick and of what is expected."""
    own = testing.checks(make, testing.AdamW(), **options)
    run = [c for c in own if c.name not in SLOW or str(c) in expected]
    return {str(c) for c in run if c.name != "equation" and c.finding().verdict == "does not"}


def test_what_is_right_passes() -> None:
    report = testing.check(Planted, testing.AdamW())
    report.raise_if_failed()
    others = {f.check: f.found for f in report.findings if f.verdict != "holds"}
    assert set(others) == {"maximize", "amsgrad"}
    assert all("TypeError: " in found and "unexpected keyword" in found for found in others.values())


@pytest.mark.parametrize("fault", FOUND)
def test_a_fault_is_found(fault: str) -> None:
    assert failing(Planted, FOUND[fault], fault=fault) == FOUND[fault]


@pytest.mark.parametrize("make", CLASSES, ids=lambda make: make.__name__)
def test_a_class_with_a_fault_is_found(make: type[Planted]) -> None:
    assert failing(make, CLASSES[make]) == CLASSES[make]


# What is ours, and torch's --------------------------------------------------------------------------------------------

QUICK = [name for name in testing.CHECKS if name not in SLOW]
LOST = ("drift-bfloat16", "drift-float16", "decay-bfloat16", "decay-float16")  # in 16 bits, rounded to nearest


@pytest.mark.parametrize("decay", ["lr_scaled", "independent", "l2", "proximal"])
@pytest.mark.parametrize(
    ("make", "claim"),
    [(wd_kernels.AdamW, testing.AdamW), (wd_kernels.SGDW, testing.SGD), (wd_kernels.AdagradW, testing.Adagrad)],
    ids=lambda value: value.__name__,
)
def test_ours_in_every_form(make: Any, claim: Any, decay: Any) -> None:
    own = {"AdamW": {}, "SGD": {"momentum": 0.9, "nesterov": True}, "Adagrad": {"lr_decay": 0.01}}[claim.__name__]
    testing.check(make, claim(decay=decay, **own), only=QUICK, decay=decay).raise_if_failed()


def test_ours_by_the_reference() -> None:
    only = [name for name in QUICK if testing.CHECKS[name][1] == (torch.float32,)]
    testing.check(wd_kernels.AdamW, testing.AdamW(), only=only, backend="reference").raise_if_failed()


def test_ours_in_every_dtype() -> None:
    testing.check(wd_kernels.AdamW, testing.AdamW(), master_weights=True).raise_if_failed()
    testing.check(wd_kernels.AdamW, testing.AdamW(), only=["drift", "decay"]).raise_if_failed(allow=LOST)


TORCHS = [
    (torch.optim.AdamW, testing.AdamW(), {"foreach": True}),
    (torch.optim.Adam, testing.AdamW(decay="l2"), {"foreach": False}),
    (torch.optim.Adagrad, testing.Adagrad(decay="l2"), {}),
]


@pytest.mark.parametrize(("make", "claim", "options"), TORCHS, ids=lambda value: getattr(value, "__name__", None))
def test_torchs_are_what_they_claim(make: Any, claim: testing.Claim, options: dict[str, Any]) -> None:
    """All in float32 but one thing: they step the groups before the one that they refuse."""
    only = [name for name in QUICK if testing.CHECKS[name][1] == (torch.float32,)]
    testing.check(make, claim, only=only, **options).raise_if_failed(allow=("nothing-on-error",))


# The kit itself -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", testing.checks(wd_kernels.AdamW, testing.AdamW(), only=["eps", "resume"]), ids=str)
def test_as_tests_of_pytest(check: testing.Check) -> None:
    check()


def test_what_pytest_sees(pytester: pytest.Pytester) -> None:
    """A check that holds passes, a fault fails with its words, what is not offered is skipped."""
    pytester.makepyfile(
        """
        import pytest, torch
        from wd_kernels import testing

        only = ["eps", "amsgrad", "decay-bfloat16"]
        ALL = testing.checks(torch.optim.SGD, testing.SGD(decay="l2"), only=only)
        ALL += testing.checks(torch.optim.Adam, testing.AdamW(decay="l2"), only=only)

        @pytest.mark.parametrize("check", ALL, ids=str)
        def test_it(check):
            check()
        """
    )
    found = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    found.assert_outcomes(passed=2, failed=2, skipped=2)
    found.stdout.fnmatch_lines(["*Fault: lost: norm times 1.0000, right is 0.9512"])


def test_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    report = testing.check(torch.optim.SGD, testing.SGD(decay="l2"), only=["eps", "bad-options", "closure"])
    assert str(report).splitlines() == [
        "torch.SGD as SGD, l2: 1 holds, 1 does not, 1 not offered",
        "",
        "check        dtype    verdict      found",
        "eps          float32  not offered  the rule has no eps",
        "closure      float32  holds",
        "bad-options  float32  does not     takes lr=nan",
    ]
    report.raise_if_failed(allow=["bad-options"])
    with pytest.raises(testing.Fault, match=r"^torch.SGD as SGD, l2:\nbad-options: takes lr=nan$"):
        report.raise_if_failed()
    with pytest.raises(testing.Fault, match="closure: is allowed to fail, and does not"):
        report.raise_if_failed(allow=["bad-options", "closure"])
    report.raise_if_failed(allow=(name for name in ["bad-options"]))  # of any iterable, once
    with pytest.raises(testing.Fault, match="decay: is allowed to fail, and was not run"):
        report.raise_if_failed(allow=["bad-options", "decay"])


def test_overflow_is_no_fault_of_a_checkpoint() -> None:
    """torch.optim.Adam in float16 divides 0 by 0, in the uninterrupted run as in the resumed one."""
    claim = testing.AdamW(decay="l2")
    report = testing.check(torch.optim.Adam, claim, only=["resume-float16", "decay-float16"])
    assert report.failed == ("decay-float16",)
    nan, zero = torch.tensor([math.nan]), torch.tensor(0.0)
    testing.same([nan, zero], [nan.clone(), zero.clone()], "as they are")
    for other in (-zero, torch.tensor(1.0), nan[0]):
        with pytest.raises(testing.Fault):
            testing.same([zero], [other], "another")


class Rounds32(Planted):
    """Its bias correction in float32, as of steps that a graph captures: no wrong one."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fault="correction in float32", **options)


def test_a_bias_correction_in_float32_is_one() -> None:
    (check,) = testing.checks(Rounds32, testing.AdamW(), only=["first-steps"])
    assert 64 < float(check().split()[0]) <= 320


def test_a_refused_state_is_not_offered() -> None:
    only = ["torch-state"]
    report = testing.check(wd_kernels.AdamW, testing.AdamW(), only=only, state_dtype="int8")
    assert report.findings[0].verdict == "not offered"
    assert "has dtype torch.float32" in report.findings[0].found


def test_an_adapter() -> None:
    """Options by other names, and a class that has none for eps: it is found out."""

    def make(params: Any, lr: Any, weight_decay: float, betas: tuple[float, float], eps: float) -> Any:
        return torch.optim.Adam(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=1e-6)

    found = testing.check(make, testing.AdamW(decay="l2", eps=1e-8), only=["eps", "update", "groups"])
    assert found.failed == ("eps",)
    testing.check(make, testing.AdamW(decay="l2", eps=1e-6), only=["eps", "update", "groups"]).raise_if_failed()


def test_nothing_is_left_of_a_check() -> None:
    """Neither the state of the generator nor the number of threads."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    testing.check(wd_kernels.AdamW, testing.AdamW(), only=["resume"])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_claims_by_hand() -> None:
    """One step from θ = 1, g = 0.5, lr 0.1, λ = 0.3, and a second one of momentum."""
    one, half = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    for decay, right in {"lr_scaled": 0.92, "independent": 0.65, "l2": 0.92, "proximal": 0.95 / 1.3}.items():
        assert testing.SGD(decay=decay).step(one, half, {}, 0.1, 0.3).item() == pytest.approx(right, rel=1e-14)
    state: dict[str, Any] = {}
    first = testing.SGD(momentum=0.9, dampening=0.5).step(one, half, state, 0.1, 0.3)  # b = 0.5
    second = testing.SGD(momentum=0.9, dampening=0.5).step(first, half, state, 0.1, 0.3)  # b = 0.45 + 0.25
    assert second.item() == pytest.approx(0.92 * 0.97 - 0.07, rel=1e-14)
    adam = testing.AdamW(eps=0.5).step(one, half, {}, 0.1, 0.3)  # u = 0.5 / (0.5 + 0.5)
    assert adam.item() == pytest.approx(0.97 - 0.05, rel=1e-14)
    state = {}
    first = testing.Adagrad(lr_decay=1.0, eps=0.5).step(one, half, state, 0.1, 0.3)  # u = 0.5 / (0.5 + 0.5)
    assert first.item() == pytest.approx(0.92, rel=1e-14)
    second = testing.Adagrad(lr_decay=1.0, eps=0.5).step(first, half, state, 0.1, 0.3)  # half the rate, s = 0.5
    assert second.item() == pytest.approx(0.92 * 0.985 - 0.05 * 0.5 / (0.5**0.5 + 0.5), rel=1e-14)


def test_errors() -> None:
    with pytest.raises(ValueError, match="decay must be one of lr_scaled, independent, l2, proximal, got 'decoupled'"):
        testing.AdamW(decay="decoupled")
    with pytest.raises(TypeError, match=r"claim must be one of testing\.AdamW, SGD, Adagrad, got 'AdamW'"):
        testing.checks(torch.optim.AdamW, "AdamW")
    with pytest.raises(ValueError, match="only has no check decay-int8, there are equation, "):
        testing.checks(torch.optim.AdamW, testing.AdamW(), only=["decay-int8"])


def test_every_check_says_what_why_and_how() -> None:
    assert len(testing.CHECKS) > 30
    for name, (function, dtypes) in testing.CHECKS.items():
        text = function.__doc__ or ""
        assert "Why: " in text, name
        assert "Judged " in text or "Nothing can fail" in text, name
        assert dtypes, name


# Its page -------------------------------------------------------------------------------------------------------------


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Every block runs, and prints what a comment says; the tables are those of the checks and of the kept results."""
    text = conformance.DOCS.read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert "lost: norm times 1.0000, right is 0.9512" in capsys.readouterr().out.splitlines()
    kept = conformance.KEPT.read_text().splitlines()
    assert conformance.shown(text, "conformance", conformance.summary(kept)) == text
    assert conformance.shown(text, "checks", conformance.checks()) == text


@pytest.mark.parametrize("name", ["wd_kernels.AdamW, stochastic", "torch.SGD, fused"])
def test_the_kept_table(name: str) -> None:
    kept = conformance.verdicts(conformance.KEPT.read_text().splitlines())
    assert conformance.verdicts(conformance.lines_of(name, [])) == {name: kept[name]}


def test_a_part_of_the_table_is_made_anew() -> None:
    """--only with --save: the lines of the others stay."""
    kept = conformance.KEPT.read_text().splitlines()
    assert conformance.merged(kept, []) == [*kept[2:], ""]
    new = ["torch.SGD as SGD, l2: 1 holds, 0 does not, 0 not offered", ""]
    found = conformance.verdicts(conformance.merged(kept, new))
    assert found == conformance.verdicts(kept) | {"torch.SGD": {}}
