"""What the literature proves of weight decay, executed in float64 (Loshchilov & Hutter 2019; Zhuang et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import wd_kernels

f64 = torch.float64
ALPHA, LAMBDA = 0.05, 0.02
amsgrads = pytest.mark.parametrize("amsgrad", [False, True])
Loss = Callable[[Tensor], Tensor]


def start(n: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, dtype=f64, generator=torch.Generator().manual_seed(seed)) + 0.5


def bumpy(theta: Tensor) -> Tensor:
    """A loss that is neither quadratic nor separable."""
    slopes = torch.linspace(-1, 2, theta.numel(), dtype=f64)
    return (theta.sin() * slopes).sum() + 0.3 * (theta * theta.roll(1)).sum() + (theta - slopes).square().sum()


def walk(
    build: Any, loss: Loss, theta: Tensor, steps: int = 12, state: dict[str, Tensor] | None = None, **options: Any
) -> Tensor:
    """The path [steps, n] of an optimizer from `theta`, with the state it starts from."""
    p = torch.nn.Parameter(theta.clone())
    opt = build([p], **options)
    if state is not None:
        opt.state[p] = {name: value.clone() for name, value in state.items()}
    path = []
    for _ in range(steps):
        opt.zero_grad()
        loss(p).backward()
        opt.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-13) -> bool:
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance))


# Loshchilov & Hutter --------------------------------------------------------------------------------------------------


def test_proposition_1_l2_is_decay_for_sgd() -> None:
    """SGD with the penalty (lambda/alpha)/2 |theta|^2 takes the steps of SGD with decay lambda. Momentum ends that."""
    l2 = walk(wd_kernels.SGDW, bumpy, start(), lr=ALPHA, weight_decay=LAMBDA / ALPHA, decay="l2")
    decayed = walk(wd_kernels.SGDW, bumpy, start(), lr=ALPHA, weight_decay=LAMBDA, decay="independent")
    by_torch = walk(torch.optim.SGD, bumpy, start(), lr=ALPHA, weight_decay=LAMBDA / ALPHA)
    assert same(l2, decayed)
    assert same(l2, by_torch)
    assert not same(l2, walk(wd_kernels.SGDW, bumpy, start(), lr=ALPHA, weight_decay=LAMBDA, decay="l2"), 1e-3)
    for decay, weight_decay in (("l2", LAMBDA / ALPHA), ("independent", LAMBDA)):
        heavy = {"lr": ALPHA, "momentum": 0.9, "weight_decay": weight_decay, "decay": decay}
        if decay == "l2":
            l2 = walk(wd_kernels.SGDW, bumpy, start(), **heavy)
        else:
            assert not same(l2, walk(wd_kernels.SGDW, bumpy, start(), **heavy), 1e-3)


@amsgrads
def test_proposition_2_no_l2_is_decay_for_adam(amsgrad: bool) -> None:
    """Of two coordinates, each allows one l2 coefficient at most, and not the same.

    With beta1 = 0 the step in a coordinate is alpha h(g + c theta), h(x) = x / sqrt(beta2 v + (1 - beta2) x^2) (the
    second moment being much larger than its bias correction), which rises strictly with c for theta > 0. So one c alone
    gives AdamW's step alpha h(g) + lambda theta, and it can be worked out. AMSGrad's h is x / sqrt(v_max).
    """
    beta2, t = 0.75, 10**6  # beta2^t is 0: no bias
    theta, g, v = torch.ones(2, dtype=f64), torch.tensor([0.5, 0.5], dtype=f64), torch.tensor([1.0, 25.0], dtype=f64)
    names = ("exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg_sq",)
    state = {"step": torch.tensor(float(t)), "exp_avg": torch.zeros(2, dtype=f64), **dict.fromkeys(names, v)}

    def step(decay: str, weight_decay: float) -> Tensor:
        options = {"lr": ALPHA, "betas": (0.0, beta2), "eps": 0.0, "weight_decay": weight_decay, "decay": decay}
        return walk(wd_kernels.AdamW, lambda p: (g * p).sum(), theta, 1, state, amsgrad=amsgrad, **options)[0]

    wanted = step("independent", LAMBDA)
    if amsgrad:
        only = (g + (LAMBDA / ALPHA) * theta * v.sqrt() - g) / theta
    else:
        y = g / (beta2 * v + (1 - beta2) * g * g).sqrt() + LAMBDA * theta / ALPHA
        only = (y * (beta2 * v / (1 - (1 - beta2) * y * y)).sqrt() - g) / theta
    assert abs(only[0] - only[1]) > 1
    for k in range(2):
        found = step("l2", float(only[k]))
        assert same(found[k], wanted[k])
        assert not same(found[1 - k], wanted[1 - k], 1e-4)
    coefficients = [0.0, *torch.logspace(-6, 6, 400, dtype=f64).tolist()]
    steps = torch.stack([step("l2", c) for c in coefficients])
    assert (steps.diff(dim=0) < 0).all()  # strictly, so that no other coefficient gives a coordinate its step
    assert ((steps - wanted).abs().amax(1) > 1e-4).all()


def test_proposition_3_decay_is_scale_adjusted_l2_for_a_fixed_preconditioner() -> None:
    """With steps alpha g / s, decay lambda is the penalty (lambda/alpha)/2 |theta sqrt(s)|^2, and not a plain one."""
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 16.0], dtype=f64)
    state = {
        "step": torch.tensor(1e6),
        "exp_avg": torch.zeros(6, dtype=f64),
        "exp_avg_sq": torch.zeros(6, dtype=f64),
        "max_exp_avg_sq": (100 * scale).square(),  # never exceeded: AMSGrad divides by 100 s in every step
    }
    options = {"lr": 100 * ALPHA, "betas": (0.0, 0.9), "eps": 0.0, "amsgrad": True}

    def path(penalty: Tensor, weight_decay: float) -> Tensor:
        def loss(p: Tensor) -> Tensor:
            return bumpy(p) + (penalty / 2 * p.square()).sum()

        return walk(
            wd_kernels.AdamW, loss, start(), 12, state, weight_decay=weight_decay, decay="independent", **options
        )

    decayed = path(torch.zeros(6, dtype=f64), LAMBDA)
    by_hand = start()
    for row in decayed:
        p = by_hand.clone().requires_grad_()
        (g,) = torch.autograd.grad(bumpy(p), p)
        by_hand = by_hand - LAMBDA * by_hand - ALPHA * g / scale
        assert same(row, by_hand)
    assert same(decayed, path(LAMBDA / ALPHA * scale, 0.0))
    assert not same(decayed, path(torch.full((6,), LAMBDA / ALPHA, dtype=f64), 0.0), 1e-2)


# Zhuang et al. --------------------------------------------------------------------------------------------------------


def adam_terms(opt: Any, p: Tensor, amsgrad: bool) -> tuple[Tensor, Tensor]:
    """(m-hat, D) after a step, from its states."""
    own, group = opt.state[p], opt.param_groups[0]
    t, (beta1, beta2) = float(own["step"]), group["betas"]
    second = own["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
    return own["exp_avg"] / (1 - beta1**t), (second / (1 - beta2**t)).sqrt() + group["eps"]


def steps_of(build: Any, **options: Any) -> Any:
    """(theta before, theta after, optimizer, parameter) of every step, under an eta that moves."""
    p = torch.nn.Parameter(start())
    opt = build([p], lr=ALPHA, schedule=lambda t: 1 - 0.05 * t, **options)
    for _ in range(10):
        opt.zero_grad()
        bumpy(p).backward()
        before = p.detach().clone()
        opt.step()
        yield before, p.detach(), opt, p


@amsgrads
def test_metric_proximal_minimises_what_it_should(amsgrad: bool) -> None:
    """theta+ = argmin <m-hat, x> + |x - theta|_D^2 / (2a) + lambda/2 |x|^2, whose gradient is 0 there."""
    for before, after, opt, p in steps_of(wd_kernels.AdamW, weight_decay=0.7, decay="metric_proximal", amsgrad=amsgrad):
        a = opt.param_groups[0]["eta"] * ALPHA
        m, d = adam_terms(opt, p, amsgrad)
        terms = m, d * (after - before) / a, 0.7 * after
        assert same(sum(terms), torch.zeros_like(after), 1e-12)
        assert min(float(term.abs().max()) for term in terms) > 1e-3


@amsgrads
def test_proxadam_minimises_what_it_should(amsgrad: bool) -> None:
    """theta+ = argmin |x - (theta - a m-hat/D)|^2 / 2 + eta lambda/2 |x|^2."""
    for before, after, opt, p in steps_of(wd_kernels.AdamW, weight_decay=0.7, decay="proximal", amsgrad=amsgrad):
        eta = opt.param_groups[0]["eta"]
        m, d = adam_terms(opt, p, amsgrad)
        assert same(after - (before - eta * ALPHA * m / d) + eta * 0.7 * after, torch.zeros_like(after))


@pytest.mark.parametrize("decay", ["proximal", "metric_proximal"])
def test_proximal_sgdw_minimises_what_it_should(decay: str) -> None:
    """The metric is the identity: <b, x> + |x - theta|^2 / (2a) + lambda/2 |x|^2; "proximal" has lambda/alpha there."""
    for before, after, opt, p in steps_of(wd_kernels.SGDW, weight_decay=0.7, decay=decay, momentum=0.9):
        eta = opt.param_groups[0]["eta"]
        a, b = eta * ALPHA, opt.state[p]["momentum_buffer"]
        strength = 0.7 if decay == "metric_proximal" else 0.7 / ALPHA
        assert same(b + (after - before) / a + strength * after, torch.zeros_like(after), 1e-12)


@amsgrads
def test_adamw_is_proxadam_to_first_order(amsgrad: bool) -> None:
    """Their difference after a step is x (a u + x theta) / (1 + x), x = eta lambda: it falls with eta squared."""
    gaps = []
    for eta in (1.0, 0.5, 0.25, 0.125):
        options = {"lr": ALPHA, "eta": eta, "weight_decay": 0.1, "amsgrad": amsgrad}
        paths = [walk(wd_kernels.AdamW, bumpy, start(), 1, decay=d, **options)[0] for d in ("independent", "proximal")]
        gap, x = paths[1] - paths[0], eta * 0.1
        au = start() * (1 - x) - paths[0]
        assert same(gap, x * (au + x * start()) / (1 + x), 1e-12)
        gaps.append(float(gap.norm()))
    ratios = [a / b for a, b in pairwise(gaps)]
    assert ratios == pytest.approx([4, 4, 4], rel=0.1)
    assert abs(ratios[-1] - 4) < abs(ratios[0] - 4)


@amsgrads
def test_adamw_is_scale_free_and_adam_with_l2_is_not(amsgrad: bool) -> None:
    """Multiplying the loss by any factor changes no step of AdamW (eps 0), and every one of Adam with l2."""
    for decay, free in (("independent", True), ("proximal", True), ("l2", False)):
        options = {"lr": ALPHA, "eps": 0.0, "weight_decay": LAMBDA, "decay": decay, "amsgrad": amsgrad}
        one, other = (walk(wd_kernels.AdamW, lambda p, s=s: s * bumpy(p), start(), **options) for s in (1.0, 1000.0))
        assert same(one, other, 1e-10 if free else 1e-3) is free


# Where no weight's scale matters, as under Batch Norm -----------------------------------------------------------------


def scale_free(theta: Tensor) -> Tensor:
    return bumpy(3 * theta / theta.norm())


def test_normalisation_makes_gradients_orthogonal_and_inverse_to_the_norm() -> None:
    layer, norm = torch.nn.Linear(5, 3, bias=False, dtype=f64), torch.nn.BatchNorm1d(3, eps=1e-30, dtype=f64)
    x = torch.randn(16, 5, dtype=f64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for scale in (1.0, 4.0):
        w = (scale * layer.weight.detach()).requires_grad_()
        (g,) = torch.autograd.grad(norm(x @ w.T).sin().sum(), w)
        assert same((g * w.detach()).sum(1), torch.zeros(3, dtype=f64), 1e-12)
        gradients.append(g)
    assert same(gradients[0], 4 * gradients[1], 1e-12)
    assert gradients[0].norm() > 1e-2


SYMMETRIES = [
    # build, options, decay, how the weights scale and how the weight decay does when lr is c times as large
    (wd_kernels.SGDW, {"momentum": 0.9}, "l2", 0.5, -1),
    (wd_kernels.SGDW, {"momentum": 0.9}, "lr_scaled", 0.5, -1),
    (wd_kernels.SGDW, {"momentum": 0.9, "form": "paper"}, "independent", 0.5, 0),
    (wd_kernels.SGDW, {"momentum": 0.9}, "proximal", 0.5, 0),
    (wd_kernels.AdamW, {"eps": 0.0}, "l2", 1, -2),
    (wd_kernels.AdamW, {"eps": 0.0}, "lr_scaled", 1, -1),
    (wd_kernels.AdamW, {"eps": 0.0, "amsgrad": True}, "lr_scaled", 1, -1),
    (wd_kernels.AdamW, {"eps": 0.0}, "independent", 1, 0),
    (wd_kernels.AdamW, {"eps": 0.0, "amsgrad": True}, "independent", 1, 0),
    (wd_kernels.AdamW, {"eps": 0.0}, "proximal", 1, 0),
    (wd_kernels.AdamW, {"eps": 0.0}, "metric_proximal", 1, -2),
]


@pytest.mark.parametrize(("build", "options", "decay", "weights", "slope"), SYMMETRIES)
def test_the_ridge_under_normalisation(
    build: Any, options: dict[str, Any], decay: str, weights: float, slope: int
) -> None:
    """lr c times as large is the same training of larger weights, if the weight decay moves as c^slope.

    So the best weight decay falls as 1/lr for SGD with l2 and AdamW lr_scaled, as 1/lr^2 for Adam with l2 and the
    metric-proximal form, and stays for the decoupled ones: exactly, but for the scale of the initial weights.
    """
    c = 3.0

    def path(lr: float, scale: float, weight_decay: float) -> Tensor:
        more = {"lr": lr, "weight_decay": weight_decay, "decay": decay, **options}
        return walk(build, scale_free, scale * start(), **more)

    one = c**weights * path(ALPHA, 1.0, 0.1)
    assert same(one, path(c * ALPHA, c**weights, 0.1 * c**slope), 1e-9)
    assert not same(one, path(c * ALPHA, c**weights, 0.1 * c ** (slope + 1)), 1e-3)


def test_the_ridge_without_normalisation() -> None:
    """Where SGD comes to rest does not depend on lr with l2 and lr_scaled; with independent decay, on lambda/lr."""
    hessian = torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0, 4.0], dtype=f64)

    def bowl(theta: Tensor) -> Tensor:
        return (hessian / 2 * (theta - 1).square()).sum()

    for decay in ("l2", "lr_scaled", "metric_proximal"):
        for lr in (0.05, 0.1):
            end = walk(wd_kernels.SGDW, bowl, start(), 1500, lr=lr, weight_decay=0.5, decay=decay)[-1]
            assert same(end, hessian / (hessian + 0.5), 1e-10)
    for lr in (0.05, 0.1):
        end = walk(wd_kernels.SGDW, bowl, start(), 1500, lr=lr, weight_decay=0.5 * lr, decay="independent")[-1]
        assert same(end, hessian / (hessian + 0.5), 1e-10)
    assert math.isclose(float(end[0]), 2 / 3, rel_tol=1e-10)
