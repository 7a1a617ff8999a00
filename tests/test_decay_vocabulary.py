"""Corrected decay, centers, references, cautious decay, schedules of the weight decay: by hand, and everywhere."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import ranks
import torch
from bits import assert_same_bits
from cases import CLASSES, PULLS, SUBTRACTED, Piece, bf16, c64, f16, f32, f64, gradient, make_params, snapshot
from covering import covering
from engines import MIRRORED, Engine, engine_params
from graphs import graphs_of
from on_cpu import OnCPU
from torch import Tensor, nn

import wd_kernels
from wd_kernels import backends
from wd_kernels.rules import DECAY_MODES, RULES
from wd_kernels.schedules import Cosine, NormalizedDecay, Schedule, WarmRestarts, Warmup

LR, DECAY = 0.05, 0.3
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.8, 0.9)}, "adamw amsgrad": {"amsgrad": True, "betas": (0.8, 0.6)},
    "sgdw": {"momentum": 0.9}, "sgdw nesterov": {"momentum": 0.8, "nesterov": True}, "sgdw plain": {},
    "adagradw": {"lr_decay": 0.25},
}  # fmt: skip
BACKENDS = ("cpu", "reference")


def build(kind: str, params: Any, **options: Any) -> Any:
    return CLASSES[kind.split()[0]](params, **{"lr": LR, "weight_decay": DECAY, **OPTIONS[kind], **options})


def train(opt: Any, params: list[Any], steps: int, first: int = 0, etas: bool = False) -> list[dict[str, Tensor]]:
    """All there is after each step; every third step but the first freezes nothing, and lr and eta may move."""
    found = []
    for t in range(first, first + steps):
        for k, p in enumerate(params):
            p.grad = gradient(Piece(tuple(p.shape)), p.dtype, 100 * t + k).to(p.device)
        if etas:
            for group in opt.param_groups:
                group["eta"] = 1 / (1 + t)
        opt.step()
        found.append(snapshot(params, opt))
    return found


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> None:
    assert len(a) == len(b)
    for t, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.keys() == y.keys()
        for name in y:
            assert_same_bits(x[name], y[name], f"step {t}: {name}")


# By other hands -------------------------------------------------------------------------------------------------------


def by_hand(kind: str, decay: str, pull: str, x: float, grads: list[float]) -> float:
    """A weight, as papers write it: every decay acts on x - c, or is left out where it works against the step."""
    own, lam = OPTIONS[kind], DECAY
    options = PULLS[pull]
    c = x if "decay_to" in options else options.get("decay_center", 0.0)
    m = v = top = b = s = 0.0
    for t, gradient_ in enumerate(grads):
        eta, g, y = 1 / (1 + t), gradient_, x - c
        a = eta * LR / (1 + t * own.get("lr_decay", 0.0))
        g += lam * y if decay == "l2" else 0.0
        d, move = 1.0, a * g
        if kind.startswith("adamw"):
            beta1, beta2 = own["betas"]
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            top = max(top, v)
            d = math.sqrt((top if own.get("amsgrad") else v) / (1 - beta2 ** (t + 1))) + 1e-8
            move = a * m / (1 - beta1 ** (t + 1))
        elif kind == "adagradw":
            s += g * g
            d = math.sqrt(s) + 1e-10
        elif "momentum" in own:
            b = g if t == 0 else own["momentum"] * b + g
            move = a * (g + own["momentum"] * b if own.get("nesterov") else b)
        if decay == "proximal":  # argmin of lam / 2 (y - c)^2 with the step before it
            x = c + (y - move / d) / (1 + eta * lam)
        elif decay == "metric_proximal":
            x = c + (d * y - move) / (d + a * lam)
        else:
            shrink = {"lr_scaled": a, "independent": eta, "corrected": a * eta, "l2": 0.0}[decay] * lam
            agrees = move / d * y >= 0
            x = x - move / d - (shrink * y if agrees or not options.get("cautious") else 0.0)
    return x


ROWS = covering(
    {"kind": list(OPTIONS), "decay": list(DECAY_MODES), "pull": list(PULLS), "backend": BACKENDS},
    lambda of: of["decay"] in SUBTRACTED or "cautious" not in PULLS[of["pull"]],
)


@pytest.mark.parametrize("of", ROWS, ids=lambda of: "-".join(of.values()))
def test_by_hand(of: dict[str, str]) -> None:
    values = [1.5, -0.75, 0.5, -2.0, 0.8, 3.0, -0.4, 0.1]
    grads = [[((-1) ** (k // 2 + t)) * (0.3 + 0.2 * k + 0.1 * t) for k in range(len(values))] for t in range(4)]
    p = nn.Parameter(torch.tensor(values, dtype=f64))
    opt = build(of["kind"], [p], decay=of["decay"], backend=of["backend"], **PULLS[of["pull"]])
    for t, own in enumerate(grads):
        p.grad = torch.tensor(own, dtype=f64)
        opt.param_groups[0]["eta"] = 1 / (1 + t)
        opt.step()
    expected = [
        by_hand(of["kind"], of["decay"], of["pull"], x, [own[k] for own in grads]) for k, x in enumerate(values)
    ]
    assert p.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    plain = nn.Parameter(torch.tensor(values, dtype=f64))
    opt = build(of["kind"], [plain], decay=of["decay"], backend=of["backend"])
    for t, own in enumerate(grads):
        plain.grad = torch.tensor(own, dtype=f64)
        opt.param_groups[0]["eta"] = 1 / (1 + t)
        opt.step()
    assert not torch.allclose(p, plain, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked(backend: Any) -> None:
    """SGDW, lr 0.5, weight decay 0.5: a quarter of what is pulled, and half the gradient."""
    for options, expected in (
        ({"decay_center": 1.0}, [2 - 0.25 - 0.5, 2 - 0.25 + 0.5, -2 + 0.75 - 0.5, 1 - 0.5]),
        ({"cautious": True}, [2 - 0.5 - 0.5, 2 + 0.5, -2 - 0.5, 1 - 0.25 - 0.5]),
        ({"decay_to": [torch.tensor([1.0, 3.0, -2.0, 0.0])]}, [2 - 0.25 - 0.5, 2 + 0.25 + 0.5, -2.5, 1 - 0.25 - 0.5]),
        ({"decay": "corrected", "eta": 0.5}, [2 * 0.9375 - 0.25, 2 * 0.9375 + 0.25, -2 * 0.9375 - 0.25, 0.6875]),
    ):  # fmt: skip
        p = nn.Parameter(torch.tensor([2.0, 2.0, -2.0, 1.0]))
        p.grad = torch.tensor([1.0, -1.0, 1.0, 1.0])
        options = {"lr": 0.5, "weight_decay": 0.5, **options}
        wd_kernels.SGDW([p], backend=backend, **options).step()
        assert p.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_u_times_theta_of_zero_decays_and_so_does_nan(backend: Any) -> None:
    p = nn.Parameter(torch.tensor([2.0, 2.0, math.nan, 1e-30]))
    p.grad = torch.tensor([0.0, -0.0, -1.0, -1e-30])  # the last product is below the least number
    wd_kernels.SGDW([p], lr=0.5, weight_decay=0.5, cautious=True, backend=backend).step()
    assert p.tolist()[:2] == [1.5, 1.5]
    assert math.isnan(p[2].item())
    assert p[3].item() == pytest.approx(1e-30 - 0.25e-30 + 0.5e-30, rel=1e-6)


def test_a_reference_is_the_penalty_of_l2_sp() -> None:
    """torch's SGD of loss + lambda/2 |theta - theta_0|^2, and its AdamW of what the weights are beside theta_0."""
    start = torch.linspace(-1, 1, 40, dtype=f64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = wd_kernels.SGDW([ours], lr=0.1, momentum=0.9, weight_decay=DECAY, decay="l2", decay_to="initial")
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    moved, off = nn.Parameter(start.clone()), nn.Parameter(torch.zeros_like(start))
    c = wd_kernels.AdamW([moved], lr=0.1, weight_decay=DECAY, decay_to=[start.clone()])
    d = torch.optim.AdamW([off], lr=0.1, weight_decay=DECAY)
    for t in range(6):
        g = gradient(Piece((40,)), f64, t)
        ours.grad, moved.grad, off.grad = g.clone(), g.clone(), g.clone()
        theirs.grad = g + DECAY * (theirs.detach() - start)
        for opt in (a, b, c, d):
            opt.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(moved.detach(), start + off.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_center_of_zero_changes_no_bit(kind: str, backend: str) -> None:
    """Nor does a reference of zeros, nor caution where every decay agrees; and none of them takes another kernel."""
    found = []
    for options in ({}, {"decay_center": 0.0, "cautious": False, "decay_to": None}, {"zeros": True}):
        params = make_params((Piece((700,)),), f32, f32)
        if options.pop("zeros", False):
            options = {"decay_to": [torch.zeros(700)]}
        opt = build(kind, params, backend=backend, **options)
        found.append([{"0": own["0"]} for own in train(opt, params, 4)])
        assert opt._table.buckets[0].spec.pull == 2 * bool(options.get("decay_to"))
        assert ("decay_center" in opt.param_groups[0]) is False
    same(found[1], found[0])
    same(found[2], found[0])


def test_corrected_is_adamc_under_a_scheduler() -> None:
    """Defazio's: gamma_t^2 / gamma_max of lambda, with gamma torch's scheduled lr; without a schedule, lr_scaled."""
    p = nn.Parameter(torch.linspace(-1, 1, 9, dtype=f64))
    x = p.detach().clone()
    opt = wd_kernels.SGDW([p], lr=0.4, weight_decay=DECAY, decay="corrected", schedule="from_lr")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8)
    for t in range(6):
        gamma = opt.param_groups[0]["lr"]
        p.grad = gradient(Piece((9,)), f64, t)
        x = x - gamma * p.grad - gamma**2 / 0.4 * DECAY * x
        opt.step()
        scheduler.step()
    torch.testing.assert_close(p.detach(), x, rtol=1e-13, atol=1e-14)
    for kind in OPTIONS:
        found = []
        for decay in ("corrected", "lr_scaled"):
            params = make_params((Piece((70,)),), f32, f32)
            found.append(train(build(kind, params, decay=decay), params, 3))
        same(*found)


# Stored, laid out, counted, captured ----------------------------------------------------------------------------------

STORED: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "bfloat16": (bf16, bf16, {}),
    "split24, 8 bits": (bf16, bf16, {"master_weights": "split24", "state_dtype": "int8", "seed": 7}),
    "split32": (bf16, bf16, {"master_weights": "split32"}),
    "copy": (f16, f16, {"master_weights": "float32"}),
    "stochastic": (bf16, f32, {"stochastic_rounding": True, "state_dtype": "bfloat16", "ema_decay": 0.5}),
    "averaged": (f32, f32, {"ema_decay": 0.75, "ema_dtype": "bfloat16"}),
    "complex": (c64, c64, {}),
}
LAYOUTS = (Piece((5,)), Piece((1500,)), Piece((0,)), Piece((13, 7), "transposed"), Piece((9, 11), "gaps"))


@pytest.mark.parametrize(
    "of",
    covering({"stored": list(STORED), "kind": list(OPTIONS), "flat": (False, True), "to": ("initial", "given")}),
    ids=lambda of: "-".join(map(str, of.values())),
)
def test_references_of_every_storage_and_layout(of: dict[str, Any]) -> None:
    dtype, grad_dtype, options = STORED[of["stored"]]
    grad_dtype = dtype if of["flat"] else grad_dtype
    pieces, found, starts = LAYOUTS[:-2] if of["flat"] else LAYOUTS, [], []
    for backend in BACKENDS:
        params: list[Any] = make_params(pieces, dtype, grad_dtype)
        starts = [p.detach().clone() for p in params]
        master = "master_weights" in options
        given = [t.float() if master else t for t in starts] if of["to"] == "given" else "initial"
        if of["flat"]:
            wd_kernels.flatten_(params)
        opt = build(of["kind"], [{"params": params[:2]}, {"params": params[2:]}] if given == "initial" else params,
                    decay_to=given, backend=backend, **options)  # fmt: skip
        own = []
        for t in range(3):
            for k, (p, piece) in enumerate(zip(params, pieces, strict=True)):
                p.grad = gradient(piece, grad_dtype, 10 * t + k)
            opt.step()
            own.append(snapshot(params, opt))
        found.append(own)
        for p, start in zip(params, starts, strict=True):
            reference = opt.state[p]["decay_reference"]
            assert reference.dtype == (f32 if master else dtype)
            assert torch.equal(reference, start.to(reference.dtype))
    same(*found)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", engine_params(MIRRORED), indirect=True)
def test_a_device_makes_rows_that_pull(engine: Engine, rule: str) -> None:
    """Counts on a device: centers, thresholds, references, and two schedules, of which a skipped step sees nothing."""
    plain = engine.form in ("interpreted", "on_cpu")  # the kernels that are compiled for the others are fewer

    def found(backend: str) -> list[dict[str, Tensor]]:
        params = make_params([Piece((5,)), Piece((700,)), Piece((33,)), Piece((9,))], f32, f32)
        groups: list[dict[str, Any]] = [
            {"params": params[:1], "decay_center": 0.5, "cautious": True},
            {"params": params[1:2], "decay_to": "initial"},
            {"params": params[2:3], "schedule": Warmup(3), "weight_decay_schedule": Cosine(4, end=10.0)},
            {"params": params[3:], "eta": 0.5, "weight_decay_schedule": WarmRestarts(2)},
        ]  # fmt: skip
        opt = CLASSES[rule](
            groups if plain else groups[2:], lr=LR, weight_decay=DECAY, decay="corrected", backend=backend,
            skip_nonfinite=True,
        )  # fmt: skip
        each = []
        for t in range(5):
            for k, p in enumerate(params):
                p.grad = gradient(Piece(tuple(p.shape)), f32, 10 * t + k) * (math.inf if t == 2 else 1.0)
            opt.step()
            steps = [torch.tensor(int(group.get("schedule_step", 0))) for group in opt.param_groups[-2:]]
            each.append(snapshot(params, opt) | {"counts": torch.stack(steps)})
        assert opt.param_groups[-1]["eta"] == 0.5
        return each

    a, b = found(engine.backend), found("reference")
    same(a, b)
    assert [own["counts"].tolist() for own in b] == [[1, 1], [2, 2], [2, 2], [3, 3], [4, 4]]
    assert_same_bits(b[1]["2"], b[2]["2"])


def test_captured_steps_follow_the_schedule_of_the_weight_decay() -> None:
    lives = []
    for captures in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            graphs = graphs_of(Engine("triton", "interpreted"), patch) if captures else None
            params = make_params([Piece((70,)), Piece((9,))], f32, f32)
            groups = [{"params": params[:1], "decay_to": "initial"}, {"params": params[1:], "cautious": True}]
            opt = wd_kernels.AdamW(groups, lr=LR, weight_decay=DECAY, weight_decay_schedule=Cosine(5, end=4.0),
                                   capturable=True, backend="triton" if captures else "reference")  # fmt: skip
            found, graph = [], None
            grads = [torch.zeros_like(p) for p in params]
            for t in range(6):
                for k, (p, g) in enumerate(zip(params, grads, strict=True)):
                    p.grad = g.copy_(gradient(Piece(tuple(p.shape)), f32, 10 * t + k))
                if graphs is not None and t == 2:
                    with graphs.capture() as graph:
                        opt.step()
                opt.step() if graph is None else graph.replay()
                found.append({f"{k}": p.detach().clone() for k, p in enumerate(params)})
            lives.append(found)
            assert [int(group["schedule_step"]) for group in opt.param_groups] == [6, 6]
    same(*lives)


def sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, whole = init_device_mesh("cpu", (2,)), [torch.linspace(-1, 1, n) for n in (64, 33)]
    lives = []
    for split in (True, False):
        place = (lambda t: distribute_tensor(t, mesh, [Shard(0)])) if split else (lambda t: t)
        params = [nn.Parameter(place(t.clone())) for t in whole]
        groups = [{"params": params[:1], "decay_to": [place(whole[0] / 2)]}, {"params": params[1:]}]
        opt = wd_kernels.AdamW(groups, lr=LR, weight_decay=DECAY, decay_to="initial", cautious=True)
        for t in range(3):
            for k, p in enumerate(params):
                p.grad = place(gradient(Piece((len(whole[k]),)), f32, 10 * t + k))
            opt.step()
        names = ("exp_avg", "decay_reference")
        lives.append([t.full_tensor() if split else t
                      for p in params for t in (p.detach(), *(opt.state[p][name] for name in names))])  # fmt: skip
        if split:
            with pytest.raises(ValueError, match=r"decay_to\[0\].* is an ordinary tensor; allowed is .* a DTensor"):
                wd_kernels.SGDW([nn.Parameter(place(whole[0]))], decay_to=[whole[0].clone()])
    for a, b in zip(*lives, strict=True):
        assert_same_bits(a, b)


def test_sharded_references() -> None:
    ranks.run(2, sharded)


def test_released_gradients() -> None:
    lives = []
    for released in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        opt = wd_kernels.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, decay_to="initial", cautious=True,
                               weight_decay_schedule=Cosine(4, end=3.0))  # fmt: skip
        if released:
            wd_kernels.release_gradients(model, opt)
        for t in range(3):
            model(torch.linspace(-1, 1, 8).view(2, 4) * (t + 1)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        assert opt.param_groups[0]["schedule_step"] == 3
        lives.append([p.detach() for p in model.parameters()])
    for a, b in zip(*lives, strict=True):
        assert_same_bits(a, b)


# References -----------------------------------------------------------------------------------------------------------


def test_what_is_given_is_referred_to() -> None:
    """By place or by name; what has another dtype or layout is copied; what its holder writes is seen."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    a, b = torch.zeros(3), torch.zeros(2, 2).t()
    for given in ([a, b], (a, b), {"p": a, "q": b, "other": a}):
        opt = wd_kernels.SGDW([("p", p), ("q", q)], lr=1.0, weight_decay=0.5, decay_to=given)  # type: ignore[arg-type]
        assert not opt.state  # which would have begun, to torch's distributed checkpoints
        assert opt.param_groups[0]["decay_to"] == opt.defaults["decay_to"] == "given"
    p.grad, q.grad = torch.zeros(3), torch.zeros(2, 2)
    opt.step()
    assert p.tolist() == [0.5] * 3
    assert opt.state[p]["decay_reference"] is a
    a.fill_(1.5)
    opt.step()
    assert p.tolist() == [1.0] * 3
    a.data = torch.full((3,), 3.0)
    opt.step()
    assert p.tolist() == [2.0] * 3
    half = nn.Parameter(torch.ones(3, dtype=bf16))
    opt = wd_kernels.SGDW([half], decay_to=[torch.zeros(3, dtype=bf16)], master_weights="split32")
    half.grad = torch.ones_like(half)
    opt.step()
    assert opt.state[half]["decay_reference"].dtype == f32


def test_references_of_groups() -> None:
    """A group may have its own; one that is added asks for some, and names its parameter where there are none."""
    p, q, r = (nn.Parameter(torch.ones(n)) for n in (3, 4, 5))
    to = [torch.zeros(3), torch.zeros(4)]
    opt = wd_kernels.SGDW([{"params": [p], "decay_to": to[:1]}, {"params": [q]}], lr=1.0, weight_decay=0.5)
    assert "decay_to" not in opt.param_groups[1]
    opt.add_param_group({"params": [r], "decay_to": [torch.full((5,), 2.0)]})
    for own in (p, q, r):
        own.grad = torch.zeros_like(own)
    opt.step()
    assert [own[0].item() for own in (p, q, r)] == [0.5, 0.5, 1.5]
    given = wd_kernels.SGDW([p], decay_to=to[:1])
    with pytest.raises(ValueError, match=r"decay_to='given' in param group 1, and parameter 0.* has no tensor"):
        given.add_param_group({"params": [q]})
    assert len(given.param_groups) == 1
    assert q not in given.state
    given.add_param_group({"params": [q], "decay_to": None})
    first = wd_kernels.SGDW([p], decay_to="initial")
    first.add_param_group({"params": [q]})
    assert first.param_groups[1]["decay_to"] == "initial"


def test_toggled() -> None:
    """None to "initial" begins with the weights as they are then; a reference that is there stays."""
    p = nn.Parameter(torch.ones(3))
    opt = wd_kernels.SGDW([p], lr=1.0, weight_decay=0.5)
    p.grad = torch.ones(3)
    opt.step()
    opt.param_groups[0]["decay_to"] = "initial"
    opt.step()
    assert opt.state[p]["decay_reference"].tolist() == [-0.5] * 3
    assert p.tolist() == [-1.5] * 3
    opt.param_groups[0]["decay_to"] = None
    opt.step()
    opt.param_groups[0]["decay_to"] = "given"
    opt.step()
    assert opt.state[p]["decay_reference"].tolist() == [-0.5] * 3
    opt.param_groups[0] |= {"decay_to": None, "decay_center": 1.0}
    before = p.item() if p.numel() == 1 else p[0].item()
    opt.step()
    assert p[0].item() == pytest.approx(before - 1.0 - 0.5 * (before - 1.0))
    del opt.state[p]["decay_reference"]
    opt.param_groups[0] |= {"decay_to": "given", "decay_center": 0.0}
    with pytest.raises(ValueError, match=r"parameter 0.* has no 'decay_reference', and decay_to='given'"):
        opt.step()


def test_frozen_weights_have_one_too() -> None:
    """By lr 0, as loaders of checkpoints take a step; and of a master weight it is all bits."""
    p = nn.Parameter(torch.ones(3))
    opt = wd_kernels.AdamW([p], lr=0.0, decay_to="initial")
    p.grad = torch.ones(3)
    opt.step()
    assert opt.state[p]["decay_reference"].tolist() == [1.0] * 3
    q = nn.Parameter(torch.ones(3, dtype=bf16))
    opt = wd_kernels.AdamW([q], lr=1e-4, master_weights="split32")
    for _ in range(3):
        q.grad = torch.ones(3, dtype=bf16)
        opt.step()
    opt.param_groups[0]["decay_to"] = "initial"
    weights = opt.get_master_weights()[0]
    opt.step()
    assert torch.equal(opt.state[q]["decay_reference"], weights)
    assert not torch.equal(weights, weights.to(bf16).float())


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ([torch.ones(3)], ValueError, "decay_to of param group 0 has 1 tensors for 2 parameters"),
        ([torch.ones(3), torch.ones(3)], ValueError, r"decay_to\[1\], for parameter 'q'.* has shape \(3,\)"),
        ([torch.ones(3), 1.0], TypeError, r"decay_to\[1\], for parameter 'q'.* is a float: expected a tensor"),
        ([torch.ones(3), torch.ones(4, dtype=f64)], TypeError, r"decay_to\[1\].* has dtype torch\.float64"),
        ([torch.ones(3), torch.ones(4, device="meta")], ValueError, r"decay_to\[1\].* is on meta"),
        ({"p": torch.ones(3)}, KeyError, r"decay_to of param group 0 lacks \['q'\]"),
        ("first", ValueError, "decay_to='first' in .*: allowed are None, 'initial'"),
        (3, TypeError, "decay_to of .* is a int"),
    ],
)
def test_bad_references(given: Any, error: type[Exception], says: str) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    with pytest.raises(error, match=says):
        wd_kernels.AdamW([("p", p), ("q", q)], decay_to=given)


def test_references_that_move() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"decay_to\[0\].* is the parameter itself"):
        wd_kernels.SGDW([p], decay_to=[p])
    opt = wd_kernels.SGDW([{"params": [p], "decay_to": [q]}, {"params": [q]}], lr=1.0, weight_decay=0.5)
    p.grad = q.grad = torch.ones(3)
    with pytest.raises(ValueError, match="overlap in memory"):
        opt.step()
    assert p.tolist() == [1.0] * 3
    shared = torch.zeros(3)
    opt = wd_kernels.SGDW([p, q], lr=1.0, weight_decay=0.5, decay_to=[shared, shared])
    opt.step()  # two may decay to one, which nobody writes
    assert p.tolist() == [-0.5] * 3
    assert shared.tolist() == [0.0] * 3
    z = nn.Parameter(torch.ones(2, dtype=c64))
    z.grad = torch.ones(2, dtype=c64)
    centered = wd_kernels.SGDW([z], decay_center=1.0)
    with pytest.raises(TypeError, match=r"dtype torch\.complex64, with decay_center=1.0: .* both decay to that"):
        centered.step()
    opt.param_groups[0]["decay_to"] = [shared, shared]
    with pytest.raises(TypeError, match="decay_to of param group 0 is a list: tensors are given to the optimizer when"):
        opt.step()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"decay_center": math.inf}, ValueError, "decay_center=inf in the arguments: allowed are finite numbers"),
        ({"decay_center": "1"}, TypeError, "decay_center='1' in the arguments"),
        ({"cautious": "yes"}, TypeError, "cautious='yes' in the arguments: expected True or False"),
        ({"decay_center": 1.0, "decay_to": "initial"}, ValueError, "decay_center=1.0 with decay_to='initial'"),
        ({"cautious": True, "decay": "l2"}, ValueError, "cautious=True with decay='l2' in .*a part of the gradient"),
        ({"cautious": True, "decay": "proximal"}, ValueError, "with decay='proximal' in .*divides the whole step"),
        ({"cautious": True, "decay": "metric_proximal"}, ValueError, "'metric_proximal' in .*divides the whole step"),
        ({"weight_decay_schedule": 0.5}, TypeError, "weight_decay_schedule=0.5 in the arguments cannot be called"),
        ({"weight_decay_schedule": Cosine}, TypeError, "weight_decay_schedule=Cosine in the arguments is a class"),
        (
            {"weight_decay_schedule": NormalizedDecay(Cosine(9))}, ValueError,
            "has a weight decay of its own beside eta: allowed is schedule=",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", RULES)
def test_bad_options(rule: str, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        CLASSES[rule]([nn.Parameter(torch.ones(1))], **{"weight_decay": 0.1, **options})


# Schedules of the weight decay ----------------------------------------------------------------------------------------


def test_dinos_rise() -> None:
    """From 0.04 to 0.4 by a cosine, whatever the learning rate does: DINO's cosine_scheduler(0.04, 0.4, ...)."""
    p = nn.Parameter(torch.ones(1, dtype=f64))
    opt = wd_kernels.SGDW([p], lr=0.5, weight_decay=0.04, decay="independent", weight_decay_schedule=Cosine(10, end=10))
    expected = 1.0
    for t in range(12):
        p.grad = torch.zeros(1, dtype=f64)
        opt.step()
        expected *= 1 - (0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * min(t, 10) / 10)))
        assert p.item() == pytest.approx(expected, rel=1e-12)
    assert opt.param_groups[0]["schedule_step"] == 12
    assert opt.param_groups[0]["weight_decay"] == 0.04
    assert "eta" not in opt.param_groups[0]


SCHEDULES: dict[str, dict[str, Any]] = {
    "alone": {}, "eta": {"eta": 0.5}, "beside": {"schedule": Warmup(3)}, "from_lr": {"schedule": "from_lr"},
    "normalized": {"schedule": NormalizedDecay(WarmRestarts(2, mult=2))},
    "shown": {"schedule": Warmup(3), "show_lr": True},
}  # fmt: skip


def rises(t: int) -> float:
    return 0.5 + 0.25 * t


@pytest.mark.parametrize("kind", ["adamw", "sgdw", "adagradw"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_is_a_weight_decay_that_is_set_before_every_step(schedule: str, kind: str) -> None:
    """And resumes exactly, by a state; counted once, however many schedules there are."""
    mode, lives = DECAY_MODES[(len(kind) + len(schedule)) % len(DECAY_MODES)], []
    for how in ("scheduled", "by hand", "resumed"):
        params = make_params((Piece((50,)), Piece((4,))), f32, f32)
        own = {**SCHEDULES[schedule], "decay": mode}
        own |= {} if how == "by hand" else {"weight_decay_schedule": rises}
        opt = build(kind, params, **own)
        found = []
        for t in range(6):
            if schedule == "from_lr":
                opt.param_groups[0]["lr"] = LR / (1 + t)
            if how == "by hand":
                opt.param_groups[0]["weight_decay"] = DECAY * rises(t)
            if how == "resumed" and t == 3:
                saved = pickle.loads(pickle.dumps(opt.state_dict()))
                assert saved["param_groups"][0]["weight_decay_schedule"] == "rises"
                opt = build(kind, params, **own)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    opt.load_state_dict(saved)
            for k, p in enumerate(params):
                p.grad = gradient(Piece(tuple(p.shape)), f32, 10 * t + k)
            opt.step()
            found.append({f"{k}": p.detach().clone() for k, p in enumerate(params)})
        assert opt.param_groups[0].get("schedule_step", 0) == (
            6 if how != "by hand" or callable(own.get("schedule")) else 0
        )
        lives.append(found)
    same(lives[2], lives[0])
    if schedule != "normalized":
        same(lives[1], lives[0])
    else:
        for a, b in zip(lives[1], lives[0], strict=True):
            torch.testing.assert_close(a["0"], b["0"])


def test_what_is_loaded_goes_on() -> None:
    """A count is loaded where there was one, and one remark says what was another schedule, or none."""
    p = nn.Parameter(torch.ones(3))

    def make(**options: Any) -> Any:
        return wd_kernels.AdamW([p], lr=LR, weight_decay=DECAY, **options)

    opt = make(weight_decay_schedule=rises)
    train(opt, [p], 4)
    saved = opt.state_dict()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make().load_state_dict(saved)
    assert len(seen) == 1
    assert "it has weight_decay_schedule=rises, this optimizer goes on with None" in str(seen[0].message)
    other, says = make(weight_decay_schedule=Cosine(9)), r"has weight_decay_schedule=rises, .* goes on with Cosine\("
    with pytest.warns(UserWarning, match=says) as one:
        other.load_state_dict(saved)
    assert len(one) == 1
    assert other.param_groups[0]["schedule_step"] == 4
    plain = make()
    train(plain, [p], 2)
    begun = make(weight_decay_schedule=rises)
    with pytest.warns(UserWarning, match="weight_decay_schedule=rises begins at its first step") as one:
        begun.load_state_dict(plain.state_dict())
    assert len(one) == 1
    assert begun.param_groups[0].get("schedule_step", 0) == 0
    begun.param_groups[0]["schedule_step"] = 7
    with warnings.catch_warnings():  # what was set stays
        warnings.simplefilter("error")
        begun.load_state_dict(plain.state_dict())
    assert begun.param_groups[0]["schedule_step"] == 7
    shared = make(weight_decay_schedule=rises)
    train(shared, [p], 3)
    shared.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert shared.param_groups[1]["schedule_step"] == 3


@pytest.mark.parametrize("engine", engine_params(MIRRORED[:1]), indirect=True)
def test_a_device_calls_no_python(engine: Engine) -> None:
    p = nn.Parameter(torch.ones(3, device=engine.device))
    p.grad = torch.ones_like(p)
    opt = wd_kernels.SGDW([p], weight_decay_schedule=rises, skip_nonfinite=True, backend=engine.backend)
    with pytest.raises(ValueError, match="weight_decay_schedule=rises in param group 0 is Python code"):
        opt.step()
    for eta in (torch.tensor(0.5), 0.5):
        opt = wd_kernels.SGDW(
            [p], eta=eta, weight_decay_schedule=Cosine(5, end=2.0), capturable=True, backend=engine.backend
        )
        if isinstance(eta, Tensor):
            with pytest.raises(TypeError, match="eta of param group 0 is a tensor, with weight_decay_schedule=Cosine"):
                opt.step()
        else:
            opt.step()


# Saved and loaded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("kind", ["adamw", "sgdw", "sgdw plain", "adagradw"])
def test_a_resumed_run_has_the_same_bits(how: str, kind: str) -> None:
    def make(params: list[Any]) -> Any:
        groups = [{"params": params[:1], "decay_to": "initial"}, {"params": params[1:2], "decay_center": 1.0},
                  {"params": params[2:], "decay_to": [torch.full((9,), 0.25)], "cautious": True}]  # fmt: skip
        return build(kind, groups)

    lives = []
    for resumed in (False, True):
        params: list[Any] = make_params((Piece((50,)), Piece((4,)), Piece((9,))), f32, f32)
        opt = make(params)
        found = train(opt, params, 3)
        if resumed and how == "state_dict":
            saved = pickle.loads(pickle.dumps(opt.state_dict()))
            assert [group.get("decay_to") for group in saved["param_groups"]] == ["initial", None, "given"]
            opt = make(params)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                opt.load_state_dict(saved)
        elif resumed:
            model = nn.ParameterList(params)
            model, opt = copy.deepcopy((model, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
            params = list(model)
        lives.append(found + train(opt, params, 3, 3))
    counted = RULES[kind.split()[0]].torch.counts_steps  # else the reload has begun the counts anew
    same(*([{k: t for k, t in own.items() if counted or "step" not in k} for own in life] for life in lives))


def test_old_states_and_others() -> None:
    """What lacks the keys has none of it; the live group's options stay, and what is given stays with its group."""
    p = nn.Parameter(torch.ones(3))
    plain = wd_kernels.AdamW([p], lr=LR, weight_decay=DECAY)
    train(plain, [p], 2)
    saved = plain.state_dict()
    assert not {"decay_to", "decay_center", "cautious", "weight_decay_schedule"} & set(saved["param_groups"][0])
    to = torch.zeros(3)
    given = wd_kernels.AdamW([p], lr=LR, weight_decay=DECAY, decay_to=[to], cautious=True)
    given.load_state_dict(saved)
    assert given.param_groups[0]["decay_to"] == "given"
    assert given.param_groups[0]["cautious"] is True
    train(given, [p], 1, 2)
    assert given.state[p]["decay_reference"] is to
    given.load_state_dict(saved)
    assert given.state[p]["decay_reference"] is to
    train(given, [p], 1, 2)
    with pytest.warns(UserWarning, match="this optimizer goes on with") as seen:
        plain.load_state_dict(given.state_dict())
    assert {"it has decay_to='given', this optimizer goes on with None" in str(w.message) for w in seen} == {
        True,
        False,
    }
    assert "decay_reference" not in plain.state[p]
    theirs = torch.optim.AdamW([p], lr=LR)
    theirs.load_state_dict(given.state_dict())  # torch's class steps it, and leaves what it does not know
    p.grad = torch.ones(3)
    theirs.step()
    l2 = wd_kernels.AdamW([p], lr=LR, weight_decay=DECAY, decay="l2")
    train(l2, [p], 1)
    with pytest.warns(UserWarning, match="decay='l2'"):
        given.load_state_dict(l2.state_dict())


def test_memory_and_typos() -> None:
    p = nn.Parameter(torch.ones(1000, dtype=bf16))
    opt = wd_kernels.AdamW([p], decay_to="initial", master_weights="split24")
    rows = {row.role: row for row in opt.memory_report().rows}
    assert (rows["decay_reference"].bytes, rows["decay_reference"].torch) == (4000, 0)
    with pytest.warns(UserWarning, match="'decay_centre' that nothing here reads: is 'decay_center' meant"):
        wd_kernels.AdamW([{"params": [p], "decay_centre": 1.0}])


def test_cuda_kernels_that_are_not_there_name_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    Engine("cuda", "on_cpu").provide(monkeypatch)
    for options in ({"ema_decay": 0.5}, {"state_dtype": "bfloat16"}):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = wd_kernels.AdamW([p], cautious=True, backend="cuda", **options)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=r"there is no CUDA kernel .* backend='triton' is compiled for any"):
            opt.step()
        assert p.tolist() == [1.0] * 3


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_before_the_first_step_have_what_was_given(how: str) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = wd_kernels.SGDW([p], lr=1.0, weight_decay=0.5, decay_to=[torch.full((3,), 2.0)])
    model, opt = copy.deepcopy((p, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((p, opt)))
    model.grad = torch.zeros(3)
    opt.step()
    assert model.tolist() == [1.5] * 3
    assert p.tolist() == [1.0] * 3


@pytest.mark.parametrize("to", ["initial", "given"])
def test_torchs_distributed_checkpoints(to: str) -> None:
    """They take a step of lr 0 where there is no state, and ask for what that makes."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    lives = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        given = [p.detach() / 2 for p in model.parameters()] if to == "given" else to
        opt = wd_kernels.AdamW(model.parameters(), lr=LR, decay_to=given)  # type: ignore[arg-type]
        if seed == 0:
            train(opt, list(model.parameters()), 2)
        else:
            asked = get_optimizer_state_dict(model, opt)
            assert {name.split(".")[-1] for name in asked["state"]["weight"]} == {
                "step", "exp_avg", "exp_avg_sq", "decay_reference",
            }  # fmt: skip
            model.load_state_dict(lives[0][0].state_dict())
            set_optimizer_state_dict(model, opt, get_optimizer_state_dict(*lives[0]))
        lives.append((model, opt))
    same(*(train(opt, list(model.parameters()), 2, 2) for model, opt in lives))


# What a fresh reader found ------------------------------------------------------------------------------------------


def test_a_reference_outlives_a_load_while_nothing_asks_for_it() -> None:
    found = []
    for resumed in (False, True):
        p = nn.Parameter(torch.ones(1))
        opt = wd_kernels.SGDW([p], lr=1.0, weight_decay=0.5, decay_to="initial")
        for decay_to in ("initial", None, "initial"):
            opt.param_groups[0]["decay_to"] = decay_to
            p.grad = torch.full((1,), 0.25)
            opt.step()
            if resumed and decay_to is None:
                opt.load_state_dict(opt.state_dict())
        found.append((p.item(), opt.state[p]["decay_reference"].item()))
    assert found[0] == found[1] == (0.3125, 1.0)


def test_references_are_taken_as_they_come() -> None:
    pretrained = nn.Linear(3, 2)
    for given in (pretrained.parameters(), nn.ParameterList(pretrained.parameters())):
        model = nn.Linear(3, 2)
        opt = wd_kernels.SGDW(model.parameters(), lr=0.1, weight_decay=0.5, decay_to=given)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        before = model.weight.detach().clone()
        opt.step()
        expected = before - 0.05 * (before - pretrained.weight.detach())
        torch.testing.assert_close(model.weight.detach(), expected)


def test_a_failed_constructor_leaves_the_callers_tensors() -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    to = torch.zeros(3)
    groups = [{"params": [p], "decay_to": [to]}, {"params": [q], "lr": -1}]
    with pytest.raises(ValueError, match="lr=-1"):
        wd_kernels.AdamW(groups)
    groups[1]["lr"] = 0.1
    for _ in range(2):
        opt = wd_kernels.AdamW(groups)
        assert opt.param_groups[0]["decay_to"] == "given"
        assert groups[0]["decay_to"] == [to]


def test_references_of_other_dtypes_and_aliases_are_refused_when_they_are_given() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"float32: allowed is torch.bfloat16, .*master_weights="):
        wd_kernels.AdamW([p], decay_to=[torch.ones(3)])
    wd_kernels.AdamW([p], decay_to=[torch.ones(3)], master_weights="split32")
    with pytest.raises(ValueError, match="is the parameter itself"):
        wd_kernels.AdamW([("p", p)], decay_to={"p": p.detach()})


def test_corrected_beside_an_lr_scheduler_asks_for_from_lr() -> None:
    for options, says in (({}, True), ({"schedule": "from_lr"}, False)):
        p = nn.Parameter(torch.ones(3))
        opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.5, decay="corrected", **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(4):
                p.grad = torch.ones(3)
                opt.step()
                scheduler.step()
        assert sum("schedule='from_lr' makes it follow" in str(w.message) for w in seen) == says


def test_a_users_schedule_of_the_decay_is_read_anew_by_a_device() -> None:
    class Mine(Schedule):
        k = 1.0
        settles = 2

        def __call__(self, t: int) -> float:
            return self.k

    own = Mine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "cuda", OnCPU())
        for k in (1.0, 3.0):
            own.k = k
            p = nn.Parameter(torch.ones(3))
            p.grad = torch.zeros(3)
            opt = wd_kernels.SGDW(
                [p], lr=1.0, weight_decay=0.25, weight_decay_schedule=own, skip_nonfinite=True, backend="cuda"
            )
            opt.step()
            assert p.tolist() == [1 - 0.25 * k] * 3
