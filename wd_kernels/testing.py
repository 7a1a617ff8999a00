"""A conformance kit: does an optimizer compute what it claims, and is it what torch.optim.Optimizer promises?

    from wd_kernels import testing
    report = testing.check(torch.optim.AdamW, testing.AdamW(decay="lr_scaled"), fused=True)
    print(report)
    report.raise_if_failed(allow=("decay-bfloat16", "decay-float16"))

    @pytest.mark.parametrize("check", testing.checks(MyAdamW, testing.AdamW()), ids=str)
    def test_my_optimizer(check):
        check()  # raises testing.Fault, or testing.NotOffered, which pytest shows as skipped

A claim (`AdamW`, `SGD`, `Adagrad`) has an equation in float64, written here in a few lines of plain torch and used by
nothing else of this library. Checks that need no equation compare the optimizer with itself: grouped with alone,
resumed with uninterrupted. So a fault is found by the check that is named after it, and by few others.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import math
import pickle
import unittest
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "CHECKS",
    "SGD",
    "Adagrad",
    "AdamW",
    "Check",
    "Claim",
    "Fault",
    "Finding",
    "NotOffered",
    "Report",
    "check",
    "checks",
]

Decay: TypeAlias = Literal["lr_scaled", "independent", "l2", "proximal"]
State: TypeAlias = dict[str, Any]
DECAYS: tuple[Decay, ...] = ("lr_scaled", "independent", "l2", "proximal")
Make: TypeAlias = Callable[..., Any]  # of parameters or groups, and options
LR, RATE = 0.01, 0.002  # what most checks step with; RATE is the share of a weight that decays in a step
SHAPES = ((7, 5), (33,), (1,))


class Fault(AssertionError):
    """What a check was made to find; the message says what was found and what is right."""


class NotOffered(unittest.SkipTest):
    """The optimizer refuses what a check asks for, with an error of its own, or the claim has no such thing."""


# Claims ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim(ABC):
    """A rule that an optimizer claims: its options by torch's names, and its step in float64.

    With α_t the learning rate, u the update of the rule, λ the weight decay::

        lr_scaled    θ ← θ − α_t λ θ − α_t u
        independent  θ ← θ − λ θ − α_t u
        l2           θ ← θ − α_t u, of the gradient g + λ θ
        proximal     θ ← (θ − α_t u) / (1 + λ)
    """

    decay: Decay = "lr_scaled"
    #: The learning rate with which 500 steps of L2 alone move weights of about 1 by some percent.
    l2_lr: ClassVar[float] = LR

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {self.decay!r}")

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What the constructor is given beside lr and weight_decay."""

    @property
    def wrong_options(self) -> list[dict[str, Any]]:
        """Options that no step is defined for."""
        return [{"lr": -1.0}, {"lr": math.nan}, {"weight_decay": -1.0}]

    @abstractmethod
    def update(self, g: Tensor, state: State) -> Tensor:
        """u, of a gradient and the state, which it changes; both float64."""

    def rate(self, lr: float, state: State) -> float:
        return lr

    def forgetful(self) -> Claim:
        """The same rule, of which 60 steps leave nothing of the first."""
        return self

    def torchs(self) -> Make | None:
        """The class of torch with this rule."""
        return None

    def weight_decay(self, rate: float, lr: float = LR) -> float:
        """The λ by which a step takes `rate` of a weight (of L2, which has no such thing: as if it were lr-scaled)."""
        return rate if self.decay in ("independent", "proximal") else rate / lr

    def step(self, theta: Tensor, g: Tensor, state: State, lr: float, weight_decay: float) -> Tensor:
        """θ after a step, of float64 tensors; counts in `state`."""
        state["step"] = state.get("step", 0) + 1
        u = self.update(g + weight_decay * theta if self.decay == "l2" else g, state)
        rate = self.rate(lr, state)
        if self.decay == "proximal":
            return (theta - rate * u) / (1 + weight_decay)
        shrinks = {"lr_scaled": rate * weight_decay, "independent": weight_decay, "l2": 0.0}[self.decay]
        return theta - shrinks * theta - rate * u

    def __str__(self) -> str:
        return f"{type(self).__name__}, {self.decay}"


@dataclass(frozen=True)
class AdamW(Claim):
    """Adam's update and any form of decay: u = m̂ / (√v̂ + ε); with `decay="l2"` it is torch.optim.Adam.

    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019; `amsgrad`, Reddi et al. 2018, as torch computes it.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    l2_lr: ClassVar[float] = 1e-4

    @property
    def options(self) -> dict[str, Any]:
        return {"betas": self.betas, "eps": self.eps, **({"amsgrad": True} if self.amsgrad else {})}

    @property
    def wrong_options(self) -> list[dict[str, Any]]:
        return [*super().wrong_options, {"eps": -1.0}, {"betas": (1.0, 0.999)}, {"betas": (0.9, -0.1)}]

    def update(self, g: Tensor, state: State) -> Tensor:
        (beta1, beta2), t = self.betas, state["step"]
        state["m"] = m = beta1 * state.get("m", 0.0) + (1 - beta1) * g
        state["v"] = v = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
        if self.amsgrad:
            state["max"] = v = torch.maximum(v, state.get("max", torch.zeros_like(v)))
        u: Tensor = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + self.eps)
        return u

    def forgetful(self) -> Claim:
        return replace(self, betas=(0.5, 0.5))

    def torchs(self) -> Make | None:
        return {"lr_scaled": torch.optim.AdamW, "l2": torch.optim.Adam}.get(self.decay)


@dataclass(frozen=True)
class SGD(Claim):
    """SGD with torch's momentum: b = μ b + (1 − d) g, from b = g; u = b, or g + μ b with `nesterov`.

    Source: torch.optim.SGD; Sutskever et al. 2013.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    @property
    def options(self) -> dict[str, Any]:
        own = {"momentum": self.momentum, "dampening": self.dampening, "nesterov": self.nesterov}
        return {name: value for name, value in own.items() if value or name == "momentum"}

    @property
    def wrong_options(self) -> list[dict[str, Any]]:
        return [*super().wrong_options, {"momentum": -1.0}]

    def update(self, g: Tensor, state: State) -> Tensor:
        if not self.momentum:
            return g
        state["b"] = b = self.momentum * state["b"] + (1 - self.dampening) * g if "b" in state else g
        return g + self.momentum * b if self.nesterov else b

    def forgetful(self) -> Claim:
        return replace(self, momentum=0.5) if self.momentum else self

    def torchs(self) -> Make | None:
        return torch.optim.SGD if self.decay == "l2" else None


@dataclass(frozen=True)
class Adagrad(Claim):
    """Adagrad: s = s + g²; u = g / (√s + ε), at the rate α / (1 + (t − 1) γ), γ being `lr_decay`.

    Source: Duchi, Hazan & Singer 2011; torch.optim.Adagrad.
    """

    lr_decay: float = 0.0
    eps: float = 1e-10
    l2_lr: ClassVar[float] = 1e-3

    @property
    def options(self) -> dict[str, Any]:
        return {"eps": self.eps, **({"lr_decay": self.lr_decay} if self.lr_decay else {})}

    @property
    def wrong_options(self) -> list[dict[str, Any]]:
        return [*super().wrong_options, {"eps": -1.0}]

    def update(self, g: Tensor, state: State) -> Tensor:
        state["s"] = s = state.get("s", 0.0) + g * g
        u: Tensor = g / (s.sqrt() + self.eps)
        return u

    def rate(self, lr: float, state: State) -> float:
        return lr / (1 + (int(state["step"]) - 1) * self.lr_decay)

    def torchs(self) -> Make | None:
        return torch.optim.Adagrad if self.decay == "l2" else None


class Oracle:
    """A run of a claim in float64, beside an optimizer's: starts where the parameters are."""

    def __init__(self, claim: Claim, params: Sequence[Tensor]) -> None:
        self.claim, self.states = claim, [State() for _ in params]
        self.before = [p.detach().double().clone() for p in params]
        self.values = list(self.before)

    def step(self, gradients: Sequence[Tensor | None], lr: float, weight_decay: float) -> None:
        for i, g in enumerate(gradients):
            if g is not None:
                self.values[i] = self.claim.step(self.values[i], g.double(), self.states[i], lr, weight_decay)


# What checks are made of ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What is checked: how it is made, what it claims, and in which dtype and where its parameters are."""

    make: Make
    claim: Claim
    options: dict[str, Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def optimizer(self, params: Any, **changed: Any) -> Any:
        defaults = {"lr": LR, "weight_decay": self.claim.weight_decay(RATE), **self.claim.options}
        return self.make(params, **{**defaults, **self.options, **changed})

    def random(self, shape: Sequence[int], seed: int) -> Tensor:
        """Signed, of magnitudes from 0.5 to 1.5."""
        return signed(tuple(shape), seed).to(self.device, self.dtype, copy=True)

    def params(self, *shapes: Sequence[int]) -> list[Any]:
        return [torch.nn.Parameter(self.random(shape, 100 + 2 * i)) for i, shape in enumerate(shapes or SHAPES)]

    def gradient(self, p: Tensor, t: int, i: int = 0) -> Tensor:
        """That of parameter `i` in step `t`: its mean keeps a sign, most steps have it."""
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * t + i), dtype=torch.float64)
        return (signed(tuple(p.shape), 7 + 2 * i) + 0.5 * noise).to(self.device, self.dtype)

    def gradients(self, params: Sequence[Tensor], t: int) -> list[Tensor]:
        return [self.gradient(p, t, i) for i, p in enumerate(params)]

    def give(self, params: Sequence[Any], t: int) -> None:
        for p, g in zip(params, self.gradients(params, t), strict=True):
            p.grad = g

    def train(self, optimizer: Any, params: Sequence[Any], first: int, last: int) -> None:
        """Steps `first` to `last` − 1. What is random in a step is the same in every run."""
        for t in range(first, last):
            self.give(params, t)
            torch.manual_seed(t)
            optimizer.step()

    def train_both(
        self,
        optimizer: Any,
        oracle: Oracle,
        params: Sequence[Any],
        steps: Iterable[int],
        lr: float,
        weight_decay: float,
    ) -> None:
        """An optimizer, and the equation on the same gradients, which has lr and decay from here."""
        for t in steps:
            self.train(optimizer, params, t, t + 1)
            oracle.step(self.gradients(params, t), lr, weight_decay)

    def alone(self, p: Tensor, i: int, steps: Iterable[int], **changed: Any) -> Tensor:
        """Parameter `i` after these steps in an optimizer of its own, from the values of `p`."""
        own = torch.nn.Parameter(p.detach().clone())
        optimizer = self.optimizer([own], **changed)
        for t in steps:
            own.grad = self.gradient(own, t, i)
            torch.manual_seed(t)
            optimizer.step()
        return own.detach()


@cache
def signed(shape: tuple[int, ...], seed: int) -> Tensor:
    """Signed numbers of magnitudes from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return x + 0.5 * torch.where(x < 0, -1, 1)


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def said(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:87] + '...' if len(text) > 90 else text}"


@contextmanager
def offered() -> Iterator[None]:
    """An error in here is a refusal, and no fault."""
    try:
        yield
    except Exception as error:
        raise NotOffered(said(error)) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors are small here, and threads that wait for each other on a busy machine are not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def must(holds: object, otherwise: str) -> None:
    if not holds:
        raise Fault(otherwise)


def largest(x: Tensor) -> float:
    """NaN is larger than anything."""
    return x.nan_to_num(math.inf, math.inf).max().item()


def away(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest difference, in units of eps of the dtype and the largest value."""
    worst = 0.0
    for a, b in zip(found, right, strict=True):
        if b.numel():
            unit = torch.finfo(a.dtype).eps * b.detach().double().abs().max().clamp_min(1e-300)
            worst = max(worst, largest((a.detach().double() - b.detach().double()).abs() / unit))
    return worst


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def same(found: Sequence[Tensor], right: Sequence[Tensor], what: str) -> None:
    """To the bit: NaN is like NaN, so that states which overflow are no fault of what keeps them."""
    if not all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        for a, b in zip(found, right, strict=True)
    ):
        raise Fault(f"{what}: differs by {away(found, right):.3g} eps")


def way_off(found: Sequence[Tensor], right: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """The distance from where parameters should be, over the length of the way there; of several, the worst."""
    worst = 0.0
    for a, b, c in zip(found, right, before, strict=True):
        if b.numel():
            a, b, c = (x.detach().double() for x in (a, b, c))
            worst = max(worst, largest((a - b).norm() / (b - c).norm()))
    return worst


def near(
    found: Sequence[Tensor], right: Sequence[Tensor], before: Sequence[Tensor], what: str, most: float = 0.05
) -> str:
    """Up to what other orders of operations and states in few bits round off: 5% of the way."""
    off = way_off(found, right, before)
    must(math.isfinite(off), f"{what}: NaN or infinite")
    must(off <= most, f"{what}: {off:.3g} of the way off, at most {most:g} is allowed")
    return f"{off:.1g} of the way off"


def tensors_of(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    """The states of a parameter that are tensors, those in lists or dicts too."""
    found: dict[str, Tensor] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                look(f"{name}.{key}", inner)

    for key, value in optimizer.state.get(p, {}).items():
        look(str(key), value)
    return found


#: Every check by its name: the function, whose docstring says what it is about, and the dtypes that it is made in.
CHECKS: dict[str, tuple[Callable[[Subject], str], tuple[torch.dtype, ...]]] = {}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Function: TypeAlias = Callable[[Subject], str]


def _check(*dtypes: torch.dtype) -> Callable[[Function], Function]:
    """Enters a check: a function that returns what was found, and raises Fault or NotOffered."""

    def enter(function: Function) -> Function:
        CHECKS[function.__name__.replace("_", "-")] = function, dtypes
        return function

    return enter


# Numerics -------------------------------------------------------------------------------------------------------------


@_check(F32, BF16, F16, F64)
def equation(s: Subject) -> str:
    """Ten steps are those of the claimed rule, decay included.

    Why: everything else rests on it. Judged by the float64 equation, from the gradients as they were stored: at most
    2 units of eps·max|θ| a step, which leaves room for two roundings of a parameter.
    """
    params = s.params()
    strength = s.claim.weight_decay(0.02, 0.05)
    oracle, optimizer = Oracle(s.claim, params), s.optimizer(params, lr=0.05, weight_decay=strength)
    s.train_both(optimizer, oracle, params, range(10), 0.05, strength)
    off = away(params, oracle.values)
    must(off <= 20, f"{off:.3g} eps off after 10 steps, at most 20 are allowed")
    return f"{off:.2g} eps off after 10 steps"


def updates(s: Subject, skip: int, steps: int, magnitudes: tuple[float, float]) -> tuple[float, int]:
    """The largest error of single updates, in eps of the update itself, and where. Parameters are set to 0 before each
    step, so that all bits of the update are in them; gradients keep their sign, so that nothing cancels."""
    (p,), low, high = s.params((257,)), *(math.log(m) for m in magnitudes)
    spread = torch.linspace(low, high, 257, dtype=torch.float64).exp().to(s.device)
    optimizer, oracle, worst = s.optimizer([p]), Oracle(s.claim, [p]), (0.0, 0)
    for t in range(skip + steps):
        p.grad = (spread * signed((257,), 9).to(s.device) * (1 + 0.25 * (t % 3))).to(s.dtype)
        with torch.no_grad():
            p.zero_()
        oracle.values = [torch.zeros_like(spread)]
        oracle.step([p.grad], LR, s.claim.weight_decay(RATE))
        optimizer.step()
        if t >= skip:
            right = oracle.values[0]
            off = (p.detach().double() - right).abs() / (right.abs() * torch.finfo(s.dtype).eps)
            worst = max(worst, (largest(off), t + 1))
    return worst


@_check(F32, F64)
def update(s: Subject) -> str:
    """One update in the long run, with large gradients (1e10 to 1e15), is exact to 32 eps of the update itself.

    Why: beside a parameter an update is small, and so is what is wrong with it. Judged by the float64 equation, with
    parameters at 0, betas or momentum at 0.5 and after 60 steps, so that neither ε nor the first steps matter.
    """
    worst, t = updates(replace(s, claim=s.claim.forgetful()), 60, 5, (1e10, 1e15))
    must(worst <= 32, f"step {t} is {worst:.3g} eps of the update off")
    return f"{worst:.2g} eps of the update off"


@_check(F32)
def first_steps(s: Subject) -> str:
    """The first three updates: Adam's bias correction, the first momentum buffer of SGD.

    Why: without it the first steps are too long or too short by factors. Judged as `update` is, from the first step
    on, to 64 eps of the update and 256 more: a root of 1 - 0.999^t in float32, as captured steps take it, is up to
    125 (1 + 1/t) eps off.
    """
    worst, t = updates(s, 0, 3, (1e10, 1e15))
    must(worst <= 64 + 256, f"step {t} is {worst:.3g} eps of the update off")
    return f"{worst:.2g} eps of the update off"


@_check(F32)
def eps(s: Subject) -> str:
    """ε is added where the claim says: to the corrected root, √v̂ + ε.

    Why: √(v̂ + ε) or √v + ε are other optimizers where gradients are small. Judged as `update` is, with gradients
    from ε/1000 to 1000 ε.
    """
    if not hasattr(s.claim, "eps"):
        raise NotOffered("the rule has no eps")
    worst, _ = updates(replace(s, claim=s.claim.forgetful()), 60, 3, (s.claim.eps / 1000, s.claim.eps * 1000))
    must(worst <= 64, f"with gradients near eps {worst:.3g} eps of the update off")
    return f"{worst:.2g} eps of the update off"


@_check(F32, BF16, F16)
def drift(s: Subject) -> str:
    """A thousand small steps, lr 0.001, arrive where float64 does.

    Why: what each step rounds off adds up, and in 16 bits a step below half a unit is lost altogether. Judged by the
    distance to the float64 equation over the length of its way: at most 1e-4, in 16 bits 0.1.
    """
    params = s.params((512,))
    decay = s.claim.weight_decay(RATE / 10, 1e-3)
    oracle, optimizer = Oracle(s.claim, params), s.optimizer(params, lr=1e-3, weight_decay=decay)
    s.train_both(optimizer, oracle, params, range(1000), 1e-3, decay)
    return near(params, oracle.values, oracle.before, "after 1000 steps", 1e-4 if s.dtype == F32 else 0.1)


@_check(F32)
def amsgrad(s: Subject) -> str:
    """`amsgrad=True`, where it is taken, is honoured.

    Why: an option that is accepted and ignored. Judged by the float64 equation, with gradients that shrink a
    thousandfold.
    """
    if not isinstance(s.claim, AdamW):
        raise NotOffered("the rule has no amsgrad")
    claim, params = replace(s.claim, amsgrad=True, betas=(0.5, 0.5)), s.params()
    runs = [Oracle(claim, params), Oracle(replace(claim, amsgrad=False), params)]
    with offered():
        optimizer = replace(s, claim=claim).optimizer(params)
    for t in range(6):
        for i, p in enumerate(params):
            p.grad = s.gradient(p, t, i) * (1.0 if t < 2 else 1e-3)
        for run in runs:
            run.step([p.grad for p in params], LR, claim.weight_decay(RATE))
        with offered():
            optimizer.step()
    must(away(params, runs[0].values) < away(params, runs[1].values), "is taken and ignored: steps as without it")
    return near(params, runs[0].values, runs[0].before, "with amsgrad")


@_check(F32)
def maximize(s: Subject) -> str:
    """`maximize=True`, where it is taken, ascends.

    Why: an option that is accepted and ignored. Judged by the same optimizer with gradients of the other sign.
    """
    params, others = s.params(), s.params()
    with offered():
        optimizer = s.optimizer(params, maximize=True)
        s.train(optimizer, params, 0, 3)
    plain = s.optimizer(others)
    for t in range(3):
        s.give(others, t)
        for p in others:
            p.grad.neg_()
        torch.manual_seed(t)
        plain.step()
    return near(params, others, s.params(), "maximize against the gradients' other sign")


# Decay ----------------------------------------------------------------------------------------------------------------


@_check(F32, BF16, F16, F64)
def decay(s: Subject) -> str:
    """500 steps of decay alone, 1e-4 each, leave what they should: a norm times 0.9512.

    Why: in bfloat16 a parameter that is rounded to nearest does not move, and weight decay is switched off unnoticed.
    Judged by the float64 equation with gradients of 0 (of L2, which its rule scales, at another lr): at least 0.9 and
    at most 1.1 of the decay.
    """
    (p,) = s.params((4096,))
    lr = s.claim.l2_lr if s.claim.decay == "l2" else LR
    strength = s.claim.weight_decay(1e-4, lr) if s.claim.decay != "l2" else 0.01
    oracle, optimizer = Oracle(s.claim, [p]), s.optimizer([p], lr=lr, weight_decay=strength)
    for t in range(500):
        p.grad = torch.zeros_like(p)
        oracle.step([p.grad], lr, strength)
        torch.manual_seed(t)
        optimizer.step()
    before = oracle.before[0].norm()
    norm, right = ((x.detach().double().norm() / before).item() for x in (p, oracle.values[0]))
    share = (1 - norm) / (1 - right)
    text = f"norm times {norm:.4f}"
    must(abs(share - 1) <= 0.1, f"{'lost: ' if abs(share) < 0.05 else ''}{text}, right is {right:.4f}")
    return text


@_check(F32)
def decay_form(s: Subject) -> str:
    """The decay is of the claimed form: times lr or not, decoupled or in the gradient.

    Why: forms differ by factors of lr, and a λ tuned for one is wrong for another. Judged by what three steps with a
    λ and without one differ by, at lr 0.1 and with gradients, beside the same of the float64 equations of all forms:
    the nearest must be the claimed one, to a tenth of its distance from the next.
    """
    strength, effects = 0.3, []
    for own in (strength, 0.0):
        params = s.params()
        s.train(s.optimizer(params, lr=0.1, weight_decay=own), params, 0, 3)
        effects.append(torch.cat([p.detach().double().flatten() for p in params]))
    found, off, right = effects[0] - effects[1], dict[str, float](), dict[str, Tensor]()
    for form in DECAYS:
        runs = [Oracle(replace(s.claim, decay=form), s.params()) for _ in effects]
        for t in range(3):
            for run, own in zip(runs, (strength, 0.0), strict=True):
                run.step(s.gradients(params, t), 0.1, own)
        right[form] = torch.cat([(a - b).flatten() for a, b in zip(runs[0].values, runs[1].values, strict=True)])
        off[form] = largest((found - right[form]).norm())
    claimed = s.claim.decay
    # SGD's l2 is lr_scaled where it has no momentum.
    far = {form: d for form in DECAYS if (d := (right[form] - right[claimed]).norm().item()) > 1e-6}
    own_form = min((claimed, *far), key=lambda form: off[form])
    must(own_form == claimed, f"is nearest to {own_form}, claims {claimed}")
    must(off[claimed] <= 0.1 * min(far.values()), f"is of no known form; {claimed} is nearest")
    return claimed


@_check(F32)
def decay_at_lr_0(s: Subject) -> str:
    """With lr 0 weights stay as they are, to the bit; independent forms say which of two conventions they follow.

    Why: warm-ups that begin at 0, groups that are frozen. Judged by the bits; a decay that does not know the lr may
    freeze, or take λ of the weights.
    """
    params = s.params()
    before, optimizer = values(params), s.optimizer(params, lr=0.0, weight_decay=0.01)
    s.train(optimizer, params, 0, 5)
    if s.claim.decay in ("lr_scaled", "l2") or all(map(torch.equal, values(params), before)):
        same(values(params), before, "weights after steps with lr 0")
        return "stays"
    right = 1 / 1.01**5 if s.claim.decay == "proximal" else 0.99**5
    near(params, [right * b for b in before], before, "decay at lr 0")
    return "decays all the same"


@_check(F32)
def decay_of_groups(s: Subject) -> str:
    """A group's own weight_decay is its own: 0 for biases and norms, as in most recipes.

    Why: a decay that is read from the defaults. Judged by the same optimizer on one parameter alone.
    """
    a, b = s.params((33,), (33,))
    strengths = 0.0, s.claim.weight_decay(10 * RATE)
    right = [s.alone(p, i, range(5), weight_decay=w) for i, (p, w) in enumerate(zip((a, b), strengths, strict=True))]
    groups = [{"params": [p], "weight_decay": w} for p, w in zip((a, b), strengths, strict=True)]
    s.train(s.optimizer(groups), (a, b), 0, 5)
    return near((a, b), right, s.params((33,), (33,)), "a group with its own weight_decay, against it alone")


@_check(F32)
def decay_is_read(s: Subject) -> str:
    """group["weight_decay"] is read in every step.

    Why: schedules of weight decay write it there. Judged by the float64 equation: within 5% of the way.
    """
    params = s.params()
    oracle, optimizer = Oracle(s.claim, params), s.optimizer(params)
    for t in range(5):
        strength = s.claim.weight_decay(10 * RATE * t)
        for group in optimizer.param_groups:
            group["weight_decay"] = strength
        s.train_both(optimizer, oracle, params, [t], LR, strength)
    return near(params, oracle.values, oracle.before, "with a weight_decay that changes")


# A drop-in for torch.optim.Optimizer ----------------------------------------------------------------------------------


@_check(F32)
def lr_scheduler(s: Subject) -> str:
    """A LambdaLR moves the step, and the decay as the claim says.

    Why: an lr that is read once, or kept elsewhere. Judged by the float64 equation with lr/(t+1): within 5% of the
    way.
    """
    params = s.params()
    oracle, optimizer = Oracle(s.claim, params), s.optimizer(params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for t in range(5):
        s.train_both(optimizer, oracle, params, [t], LR / (1 + t), s.claim.weight_decay(RATE))
        scheduler.step()
    return near(params, oracle.values, oracle.before, "under a schedule")


@_check(F32)
def tensor_lr(s: Subject) -> str:
    """lr may be a tensor, where it is taken, and one that changes in place is followed.

    Why: captured graphs and compiled steps need it. Judged by the same optimizer with numbers.
    """
    params, others, lr = s.params(), s.params(), torch.tensor(LR, device=s.device)
    with offered():
        optimizer = s.optimizer(params, lr=lr)
        s.train(optimizer, params, 0, 1)
    plain = s.optimizer(others)
    s.train(plain, others, 0, 1)
    lr.mul_(0.25)
    for group in (*optimizer.param_groups, *plain.param_groups):
        if isinstance(group["lr"], Tensor):  # its own, or the caller's
            group["lr"].fill_(LR / 4)
    for group in plain.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = LR / 4
    s.train(optimizer, params, 1, 3)
    s.train(plain, others, 1, 3)
    return near(params, others, s.params(), "lr as a tensor against a number")


@_check(F32)
def groups(s: Subject) -> str:
    """Each group has its own lr.

    Why: layer-wise rates, muP, frozen towers. Judged by the same optimizer on one parameter alone.
    """
    a, b = s.params((7, 5), (33,))
    right = [s.alone(p, i, range(5), lr=lr) for i, (p, lr) in enumerate(zip((a, b), (LR, 5 * LR), strict=True))]
    s.train(s.optimizer([{"params": [a]}, {"params": [b], "lr": 5 * LR}]), (a, b), 0, 5)
    return near((a, b), right, s.params((7, 5), (33,)), "groups of two rates against each alone")


@_check(F32)
def late_group(s: Subject) -> str:
    """A group that is added later begins at its own first step; the others go on.

    Why: layers that are unfrozen. Judged by the same optimizer on one parameter alone.
    """
    a, b = s.params((7, 5), (33,))
    right = [s.alone(a, 0, range(6)), s.alone(b, 1, range(3, 6))]
    optimizer = s.optimizer([a])
    s.train(optimizer, [a], 0, 3)
    optimizer.add_param_group({"params": [b]})
    s.train(optimizer, [a, b], 3, 6)
    return near((a, b), right, s.params((7, 5), (33,)), "a group added after 3 steps, against one alone")


@_check(F32)
def group_keys(s: Subject) -> str:
    """Keys that the optimizer does not know stay in groups: made, stepped, saved and loaded.

    Why: names, initial_lr, layer numbers of schedulers lie there. Judged by looking.
    """
    params = s.params()
    optimizer = s.optimizer([{"params": params, "layer": 3}])
    s.train(optimizer, params, 0, 2)
    must(optimizer.param_groups[0].get("layer") == 3, "a key of the caller is gone after steps")
    optimizer.param_groups[0]["lr"] = LR / 2
    other = s.optimizer(s.params())
    other.load_state_dict(optimizer.state_dict())
    must(other.param_groups[0].get("layer") == 3, "a key of the caller is not saved or not loaded")
    must(math.isclose(float(other.param_groups[0]["lr"]), LR / 2, rel_tol=1e-6), "lr is not saved or not loaded")
    return ""


@_check(F32)
def missing_gradient(s: Subject) -> str:
    """A parameter whose gradient is None stays as it is, undecayed, whether it had gradients or never had one.

    Why: experts that saw no token, frozen layers. Judged by the bits.
    """
    a, b, c = params = s.params((7, 5), (33,), (33,))
    optimizer = s.optimizer(params)
    never = values([c])
    s.train(optimizer, [a, b], 0, 2)
    kept = values([b])
    b.grad = None
    s.train(optimizer, [a], 2, 5)
    same(values([b]), kept, "a parameter whose gradients have stopped")
    same(values([c]), never, "a parameter that never had a gradient")
    return ""


@_check(F32)
def late_gradient(s: Subject) -> str:
    """A parameter counts its own steps: one whose first gradient comes late starts then, one that pauses goes on later.

    Why: a step count that all share spoils the bias correction. Judged by the same optimizer on one parameter alone.
    """
    a, b, c = params = s.params((7, 5), (33,), (33,))
    right = [s.alone(a, 0, range(6)), s.alone(b, 1, range(3, 6)), s.alone(c, 2, (0, 4, 5))]
    optimizer = s.optimizer(params)
    for t in range(6):
        s.give(params, t)
        b.grad = b.grad if t >= 3 else None
        c.grad = c.grad if t in (0, 4, 5) else None
        torch.manual_seed(t)
        optimizer.step()
    return near(params, right, s.params((7, 5), (33,), (33,)), "gradients that come late, against one parameter alone")


@_check(F32)
def closure(s: Subject) -> str:
    """step(closure) calls it once, with gradients enabled, and returns its loss; step() returns None.

    Why: LBFGS-style loops, Lightning. Judged by the same steps without one.
    """
    params, others = s.params(), s.params()
    optimizer, plain = s.optimizer(params), s.optimizer(others)
    calls: list[bool] = []

    def compute(t: int) -> Tensor:
        calls.append(torch.is_grad_enabled())
        s.give(params, t)
        return torch.tensor(5.0 + t)

    for t in range(3):
        torch.manual_seed(t)
        loss = optimizer.step(lambda t=t: compute(t))
        must(loss is not None and float(loss) == 5 + t, f"returns {loss}, not the closure's loss")
    must(calls == [True] * 3, f"calls in 3 steps, with gradients enabled: {calls}")
    s.train(plain, others, 0, 3)
    same(values(params), values(others), "steps with a closure against those without")
    must(plain.step() is None, "step() without a closure returns something")
    return ""


@_check(F32)
def hooks(s: Subject) -> str:
    """Hooks before and after a step are called once each, around the writing.

    Why: clipping, logging and FSDP hang there. Judged by what they see of the parameters.
    """
    params = s.params()
    before, seen, optimizer = values(params), [], s.optimizer(params)

    def look(*_: object) -> None:
        seen.append(all(map(torch.equal, params, before)))

    handles = [optimizer.register_step_pre_hook(look), optimizer.register_step_post_hook(look)]
    s.train(optimizer, params, 0, 1)
    for handle in handles:
        handle.remove()
    s.train(optimizer, params, 1, 2)
    must(seen == [True, False], f"hooks saw parameters unchanged: {seen}, right is [True, False]")
    return ""


@_check(F32)
def zero_grad(s: Subject) -> str:
    """zero_grad() sets gradients to None, zero_grad(set_to_none=False) to 0.

    Why: None is left out of the next step, 0 is not. Judged by looking.
    """
    params = s.params()
    optimizer = s.optimizer(params)
    s.train(optimizer, params, 0, 1)
    optimizer.zero_grad(set_to_none=False)
    must(all(p.grad is not None and not p.grad.any() for p in params), "set_to_none=False leaves no zeros")
    optimizer.zero_grad()
    must(all(p.grad is None for p in params), "zero_grad() leaves gradients")
    return ""


@_check(F32)
def in_place(s: Subject) -> str:
    """A step writes into the parameters where they lie, and writes no gradient.

    Why: views, compiled graphs and other optimizers hold the same memory; gradients are logged and accumulated.
    Judged by addresses and bits.
    """
    params = s.params()
    optimizer, places = s.optimizer(params), [p.data_ptr() for p in params]
    for t in range(3):
        s.give(params, t)
        before = values([p.grad for p in params])
        optimizer.step()
        same([p.grad for p in params], before, "gradients after a step")
    must([p.data_ptr() for p in params] == places, "parameters have moved in memory")
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    must(all(a is b for a, b in zip(owned, params, strict=True)), "param_groups has other tensors")
    must(all(p.is_leaf and p.requires_grad for p in params), "parameters are no leaves any more")
    return ""


@_check(F32)
def shapes(s: Subject) -> str:
    """Empty tensors and those of no dimension are stepped as others are.

    Why: scalars of a loss, shards that got nothing. Judged by a vector of one element.
    """
    scalar, empty, other = torch.nn.Parameter(s.random((), 4)), *s.params((0, 3)), torch.nn.Parameter(s.random((1,), 4))
    a, b = s.optimizer([scalar, empty]), s.optimizer([other])
    for t in range(3):
        other.grad = s.gradient(other, t)
        scalar.grad, empty.grad = other.grad[0].clone(), torch.zeros_like(empty)
        for optimizer in (a, b):
            torch.manual_seed(t)
            optimizer.step()
    return near([scalar.detach().reshape(1)], [other], [s.random((1,), 4)], "a tensor of no dimension")


def strided(s: Subject, gradients: Callable[[Any, Any, int], None], what: str) -> str:
    """Parameters of all layouts beside contiguous copies; `gradients(p, copy, i)` gives both their gradients."""
    shapes = {"contiguous": (6, 8), "transposed": (5, 7), "gapped": (9, 4), "channels last": (2, 3, 4, 4)}
    plain = [s.random(shape, 2 * i) for i, shape in enumerate(shapes.values())]
    gapped = torch.stack([plain[2]] * 2, -1)[..., 0]
    laid = [plain[0].clone(), plain[1].t().contiguous().t(), gapped, plain[3].to(memory_format=torch.channels_last)]
    wrong = []
    for i, name in enumerate(shapes):
        p, q = torch.nn.Parameter(laid[i]), torch.nn.Parameter(plain[i].clone())
        a, b = s.optimizer([p]), s.optimizer([q])
        for t in range(3):
            gradients(p, q, t)
            torch.manual_seed(t)
            with offered():
                a.step()
            torch.manual_seed(t)
            b.step()
        if way_off([p], [q], [plain[i]]) > 0.05:
            wrong.append(name)
    must(not wrong, f"{what}: wrong of {', '.join(wrong)} parameters")
    return ""


@_check(F32)
def layouts(s: Subject) -> str:
    """Transposed, gapped and channels-last parameters are stepped as contiguous ones, with gradients of autograd.

    Why: tied, sliced and convolutional weights. Judged by contiguous copies; a refusal is no fault.
    """

    def backward(p: Any, q: Any, t: int) -> None:
        q.grad, p.grad = s.gradient(q, t), None
        torch.autograd.backward((p * q.grad).sum())

    return strided(s, backward, "gradients as autograd lays them")


@_check(F32)
def gradient_strides(s: Subject) -> str:
    """Gradients that were assigned, of other strides than the parameter, are read by their own.

    Why: gradients from elsewhere, expanded or transposed. Judged by contiguous copies; a refusal is no fault.
    """

    def assign(p: Any, q: Any, t: int) -> None:
        p.grad = s.gradient(q, t)
        if t:  # one row for all; its storage is as large as any reader's that goes on behind it
            p.grad = p.grad[:1].expand_as(q)
        q.grad = p.grad.contiguous().clone()

    return strided(s, assign, "gradients of other strides")


@_check(F32)
def mixed_dtypes(s: Subject) -> str:
    """bfloat16 and float32 parameters in one group are each stepped as alone.

    Why: norms in float32 beside weights in bfloat16. Judged by the same optimizer on one parameter alone.
    """
    half = replace(s, dtype=BF16)
    a, b = s.params((33,)) + half.params((7, 5))
    before = values((a, b))
    with offered():
        right = [s.alone(a, 0, range(4), lr=10 * LR), half.alone(b, 1, range(4), lr=10 * LR)]
        optimizer = s.optimizer([a, b], lr=10 * LR)
    for t in range(4):
        a.grad, b.grad = s.gradient(a, t, 0), half.gradient(b, t, 1)
        torch.manual_seed(t)
        with offered():
            optimizer.step()
    return near((a, b), right, before, "dtypes in one group, against each alone")


@_check(F32)
def grad_scaler(s: Subject) -> str:
    """torch.amp.GradScaler unscales, and skips a step whose gradients are not finite.

    Why: training in float16. Judged by the same steps without a scaler, the scale being a power of two.
    """
    params, others = s.params(), s.params()
    optimizer, plain = s.optimizer(params), s.optimizer(others)
    scaler = torch.amp.GradScaler(s.device.type, init_scale=1024.0)
    for t in range(4):
        torch.manual_seed(t)
        gradients = [s.gradient(p, t, i) for i, p in enumerate(params)]
        loss = torch.stack([(p * g).sum() for p, g in zip(params, gradients, strict=True)]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(loss))
        if t == 3:
            kept = values(params)
            params[0].grad.view(-1)[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    same(values(params), kept, "parameters after a step with an infinite gradient")
    s.train(plain, others, 0, 3)
    return near(params, others, s.params(), "scaled steps against plain ones")


# Copies and checkpoints -----------------------------------------------------------------------------------------------


def goes_on(s: Subject, copied: Callable[[Any], Any]) -> str:
    """A copy of (params, optimizer) goes on to the bit, and neither writes into the other."""
    params = s.params()
    optimizer = s.optimizer(params)
    s.train(optimizer, params, 0, 3)
    kept = values(params)
    others, twin = copied((params, optimizer))
    s.train(twin, others, 3, 6)
    same(values(params), kept, "the original, after the copy was stepped")
    s.train(optimizer, params, 3, 6)
    same(values(others), values(params), "the copy against the original")
    return ""


@_check(F32)
def deepcopy(s: Subject) -> str:
    """copy.deepcopy of parameters and optimizer goes on to the bit, and shares nothing.

    Why: averaged and forked trainings. Judged by the bits of both after three more steps.
    """
    return goes_on(s, copy.deepcopy)


@_check(F32)
def pickled(s: Subject) -> str:
    """A pickle of parameters and optimizer goes on to the bit.

    Why: multiprocessing, Ray, torch.save of whole objects. Judged by the bits after three more steps.
    """
    return goes_on(s, lambda both: pickle.loads(pickle.dumps(both)))


@_check(F32, BF16, F16, F64)
def resume(s: Subject) -> str:
    """Saved, loaded with weights_only=True into a new optimizer, it goes on as the uninterrupted run, to the bit.

    Why: a resumed run that differs hides every other bug. Judged by the bits of parameters after five more steps, and
    of states right after loading: of a bfloat16 parameter, torch's load_state_dict casts float32 states unless a
    class takes care.
    """
    params = s.params((8192,), *SHAPES)  # states of 8 bits are often kept from 4096 elements on, in blocks
    optimizer = s.optimizer(params)
    s.train(optimizer, params, 0, 5)
    file = io.BytesIO()
    torch.save({"params": values(params), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [torch.nn.Parameter(p.to(s.device)) for p in saved["params"]]
    again = s.optimizer(others)
    again.load_state_dict(saved["optimizer"])
    for p, q in zip(params, others, strict=True):
        ours, theirs = tensors_of(optimizer, p), tensors_of(again, q)
        for name, state in ours.items():
            if name in theirs:
                now = theirs[name].dtype
                must(now == state.dtype, f"{name} was {plain(state.dtype)} and is {plain(now)} after loading")
    for t in range(5, 10):
        s.train(optimizer, params, t, t + 1)
        s.train(again, others, t, t + 1)
    same(values(others), values(params), "resumed against uninterrupted")
    return ""


@_check(F32)
def torch_state(s: Subject) -> str:
    """States load from torch's class of the same rule, and into it, if they have its names.

    Why: going over to another optimizer, or back, in the middle of a run. Judged by three more steps of torch's
    class; a refusal is no fault.
    """
    other = s.claim.torchs()
    if other is None:
        raise NotOffered("torch has no class of this rule")
    params, theirs = s.params(), s.params()
    optimizer = s.optimizer(params)
    torchs = other(theirs, lr=LR, weight_decay=s.claim.weight_decay(RATE), **s.claim.options)
    s.train(optimizer, params, 0, 1)
    s.train(torchs, theirs, 0, 3)
    ours = sorted(map(str, optimizer.state.get(params[0], {})))
    if not set(torchs.state[theirs[0]]) <= set(ours):
        raise NotOffered(f"states of its own: {', '.join(ours) or 'none'}")
    for into, own in ((s.optimizer, "from torch"), (lambda p: other(p, lr=LR, **s.claim.options), "into torch")):
        source, begin = (torchs, theirs) if own == "from torch" else (optimizer, params)
        moved = [torch.nn.Parameter(p.detach().clone()) for p in begin]
        loaded, before = into(moved), values(begin)
        with offered():
            loaded.load_state_dict(copy.deepcopy(source.state_dict()))
            s.train(loaded, moved, 3, 6)
        s.train(source, begin, 3, 6)
        near(moved, begin, before, own)
    return "both ways"


@_check(F32)
def other_order(s: Subject) -> str:
    """States of larger parameters, as of another order, are an error, in loading or in the step.

    Why: states are kept by position, and a broadcast one steps without a word. Judged by an error. (Smaller states
    are not tried: there are kernels that would write behind them.)
    """
    params, others = s.params((4, 3), (8, 4)), s.params((3,), (4,))
    optimizer, other = s.optimizer(params), s.optimizer(others)
    s.train(optimizer, params, 0, 2)
    if not any(state.numel() > 1 for p in params for state in tensors_of(optimizer, p).values()):
        raise NotOffered("it has no states")
    where = "in loading"
    try:
        other.load_state_dict(optimizer.state_dict())
        where = "in the step"
        s.train(other, others, 2, 3)
    except Exception:
        return f"an error {where}"
    raise Fault("steps with states of other shapes")


# Errors ---------------------------------------------------------------------------------------------------------------


@_check(F32)
def bad_options(s: Subject) -> str:
    """Options that no step is defined for are errors: a negative or NaN lr; negative decay, eps, momentum; betas of 1.

    Why: a slip in a configuration trains for a day. Judged by an error of the constructor.
    """
    taken = []
    for wrong in s.claim.wrong_options:
        try:
            s.optimizer(s.params(), **wrong)
        except Exception:
            continue
        taken.append(", ".join(f"{name}={value}" for name, value in wrong.items()))
    must(not taken, f"takes {'; '.join(taken)}")
    return ""


def sparse(g: Tensor) -> Tensor:
    """A dense gradient as a sparse one, of its first and last row."""
    rows = torch.tensor([[0, g.shape[0] - 1]], device=g.device)
    return torch.sparse_coo_tensor(rows, g[rows[0]], g.shape, check_invariants=True)


@_check(F32)
def sparse_gradient(s: Subject) -> str:
    """A sparse gradient is stepped as the dense one with its zeros, or refused.

    Why: embeddings with sparse=True. Judged by the float64 equation of the dense gradient, without decay, within 5%
    of the way; an error is right too.
    """
    (p,) = s.params((6, 4))
    oracle, optimizer = Oracle(s.claim, [p]), s.optimizer([p], weight_decay=0.0)
    for t in range(3):
        p.grad = sparse(s.gradient(p, t))
        dense = p.grad.to_dense()
        try:
            optimizer.step()
        except Exception as error:
            return f"refused: {said(error)}"
        oracle.step([dense], LR, 0.0)
    near([p], oracle.values, oracle.before, "with sparse gradients")
    return "stepped as the dense one"


@_check(F32)
def nothing_on_error(s: Subject) -> str:
    """A step that raises has written nothing: the group before the one that it refuses is as it was.

    Why: who catches an error and goes on has half a step taken. Judged by the bits of parameters and states, with a
    sparse gradient in the second group.
    """
    a, b = params = s.params((6, 4), (6, 4))
    optimizer = s.optimizer([{"params": [a]}, {"params": [b]}])
    s.train(optimizer, params, 0, 2)
    s.give(params, 2)
    b.grad = sparse(b.grad)
    before = values([a, *tensors_of(optimizer, a).values()])
    try:
        optimizer.step()
    except Exception:
        after = values([a, *tensors_of(optimizer, a).values()])
        must(all(map(torch.equal, after, before)), "the group before the error was stepped")
        return ""
    raise NotOffered("sparse gradients are stepped")


@_check(F32)
def nan_gradient(s: Subject) -> str:
    """NaN in the gradient of one parameter reaches no other.

    Why: sums and buffers over many tensors may mix them. Judged by the same optimizer on one parameter alone.
    """
    a, b = params = s.params((7, 5), (33,))
    right = s.alone(b, 1, range(4))
    optimizer = s.optimizer(params)
    for t in range(4):
        s.give(params, t)
        a.grad.fill_(math.nan)
        torch.manual_seed(t)
        optimizer.step()
    return near([b], [right], s.params((7, 5), (33,))[1:], "a parameter beside one with NaN")


# Memory ---------------------------------------------------------------------------------------------------------------


def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@_check(F32)
def growth(s: Subject) -> str:
    """Steps leave nothing behind: as many bytes of state and as many living tensors after 23 steps as after 3.

    Why: a list that grows by a tensor a step ends a long run. Judged by counting both.
    """
    params = s.params()
    optimizer = s.optimizer(params)

    def alive() -> tuple[int, int]:
        gc.collect()
        states = [t for p in params for t in tensors_of(optimizer, p).values()]
        size = sum(t.numel() * t.element_size() for t in states)
        return size, sum(type(o) in (Tensor, torch.nn.Parameter) for o in gc.get_objects())

    s.train(optimizer, params, 0, 3)
    before = alive()
    s.train(optimizer, params, 3, 23)
    after = alive()
    must(before[0] == after[0], f"states had {before[0]} bytes and have {after[0]}")
    must(before[1] == after[1], f"{after[1] - before[1]} tensors more in 20 steps")
    return ""


@_check(F32, BF16)
def states(s: Subject) -> str:
    """Says which states an element has, of which dtype, and how many bytes. Nothing can fail here.

    Why: float32 states of bfloat16 parameters are exact, and cost twice the memory.
    """
    (p,) = params = s.params((65536,))
    optimizer = s.optimizer(params)
    s.train(optimizer, params, 0, 2)
    found = {name: t for name, t in tensors_of(optimizer, p).items() if t.numel() > 1}
    size = sum(t.numel() * t.element_size() for t in found.values()) / p.numel()
    names = ", ".join(f"{name} {plain(t.dtype)}" for name, t in found.items())
    return f"{names or 'none'}: {size:.4g} bytes an element"


# The kit --------------------------------------------------------------------------------------------------------------

Verdict: TypeAlias = Literal["holds", "does not", "not offered"]


@dataclass(frozen=True)
class Finding:
    """What a check found: its name, the dtype, the verdict, and a line on what was seen."""

    check: str
    dtype: str
    verdict: Verdict
    found: str


@dataclass(frozen=True)
class Check:
    """One check of one optimizer; str() is its name, such as "decay-bfloat16", and calling it raises what it finds."""

    name: str
    subject: Subject
    function: Callable[[Subject], str]

    def __call__(self) -> str:
        """What was found.

        Raises:
            Fault: it does not hold; an error that the optimizer raised where it should not is one.
            NotOffered: the optimizer refuses what the check asks for; pytest shows it as skipped.
        """
        with torch.random.fork_rng(), one_thread():
            torch.manual_seed(0)  # what is random in a step is the same in every run
            if self.subject.dtype != F32:
                with offered():
                    params = self.subject.params((4,))
                    self.subject.train(self.subject.optimizer(params), params, 0, 1)
            try:
                return self.function(self.subject)
            except (Fault, NotOffered):
                raise
            except Exception as error:
                raise Fault(f"raises {said(error)}") from error

    def finding(self) -> Finding:
        """The same as a row of a report."""
        verdict: Verdict = "holds"
        try:
            found = self()
        except Fault as fault:
            verdict, found = "does not", str(fault)
        except NotOffered as refusal:
            verdict, found = "not offered", str(refusal)
        return Finding(str(self), plain(self.subject.dtype), verdict, found)

    def __str__(self) -> str:
        return self.name if self.subject.dtype == F32 else f"{self.name}-{plain(self.subject.dtype)}"


@dataclass(frozen=True)
class Report:
    """What all checks found; print it for an aligned table."""

    name: str
    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that do not hold."""
        return tuple(f.check for f in self.findings if f.verdict == "does not")

    def raise_if_failed(self, allow: Iterable[str] = ()) -> None:
        """Raises Fault if a check does not hold that `allow` does not name, or if one that it names holds by now."""
        allowed, run = tuple(allow), {f.check for f in self.findings}
        lines = [f"{f.check}: {f.found}" for f in self.findings if f.verdict == "does not" and f.check not in allowed]
        for name in allowed:
            if name not in self.failed:
                lines.append(f"{name}: is allowed to fail, and {'does not' if name in run else 'was not run'}")
        if lines:
            raise Fault("\n".join([f"{self.name} as {self.claim}:", *lines]))

    def __str__(self) -> str:
        rows = [("check", "dtype", "verdict", "found")]
        rows += [(f.check.removesuffix(f"-{f.dtype}"), f.dtype, f.verdict, f.found) for f in self.findings]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        counts = [f"{sum(f.verdict == v for f in self.findings)} {v}" for v in ("holds", "does not", "not offered")]
        return "\n".join([f"{self.name} as {self.claim}: {', '.join(counts)}", "", *lines])


def checks(
    make: Make,
    claim: Claim,
    *,
    only: Iterable[str] = (),
    device: torch.device | str = "cpu",
    **options: Any,
) -> list[Check]:
    """The checks of an optimizer, for a loop of one's own or pytest's parametrize.

    Args:
        make: the class, or a function of `(params, **options)` that makes it; options have torch's names: `lr`,
            `weight_decay`, and of AdamW `betas`, `eps`, `amsgrad`, of SGD `momentum`, `dampening`, `nesterov`, of
            Adagrad `eps`, `lr_decay`; `maximize` where a check asks whether it is taken. Groups may have `lr` and
            `weight_decay` of their own.
        claim: the rule that it claims, as `AdamW(decay="l2")`.
        only: names of checks, such as "decay" (in all its dtypes) or "decay-bfloat16"; all if empty.
        device: where parameters are.
        **options: more for `make`, such as `fused=True`.

    Raises:
        TypeError, ValueError: a claim or a name of a check that is none.
    """
    if not isinstance(claim, Claim):
        raise TypeError(f"claim must be one of testing.AdamW, SGD, Adagrad, got {claim!r}")
    subject, wanted, found = Subject(make, claim, options, torch.device(device)), set(only), []
    for name, (function, dtypes) in CHECKS.items():
        found += [Check(name, replace(subject, dtype=dtype), function) for dtype in dtypes]
    if unknown := wanted - {c.name for c in found} - set(map(str, found)):
        raise ValueError(f"only has no check {', '.join(sorted(unknown))}, there are {', '.join(CHECKS)}")
    return [c for c in found if not wanted or c.name in wanted or str(c) in wanted]


def check(
    make: Make,
    claim: Claim,
    *,
    only: Iterable[str] = (),
    device: torch.device | str = "cpu",
    **options: Any,
) -> Report:
    """Runs the checks of an optimizer (some seconds) and says what holds; arguments as of :func:`checks`."""
    name = (
        f"{make.__module__.split('.')[0]}.{make.__qualname__}"
        if inspect.isclass(make)
        else getattr(make, "__name__", str(make))
    )
    own = ", ".join(f"{key}={value}" for key, value in options.items())
    found = tuple(c.finding() for c in checks(make, claim, only=only, device=device, **options))
    return Report(name + (f"({own})" if own else ""), claim, found)
