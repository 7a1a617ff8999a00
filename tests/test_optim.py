"""The optimizer classes as a user of torch.optim sees them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_optimizers, assert_untouched
from semantics import DEFAULTS, MODES, assert_close, build, parameters, plain, set_gradients
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from wd_kernels import SGDW, AdagradW, AdamW

walk = semantics.walk
every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])

# Ours and torch's differ in the order of roundings only: a few units in the last place a step, summed over the steps.
ULPS = 24

LIKE_TORCH: list[Any] = [
    pytest.param(AdamW, {}, torch.optim.AdamW, id="AdamW"),
    pytest.param(AdamW, {"amsgrad": True}, torch.optim.AdamW, id="AdamW-amsgrad"),
    pytest.param(AdamW, {"maximize": True}, torch.optim.AdamW, id="AdamW-maximize"),
    pytest.param(AdamW, {"decay": "l2"}, torch.optim.Adam, id="Adam"),
    pytest.param(AdamW, {"decay": "l2", "amsgrad": True, "maximize": True}, torch.optim.Adam, id="Adam-all"),
    pytest.param(SGDW, {"decay": "l2", "momentum": 0.0}, torch.optim.SGD, id="SGD-plain"),
    pytest.param(SGDW, {"decay": "l2"}, torch.optim.SGD, id="SGD-momentum"),
    pytest.param(SGDW, {"decay": "l2", "nesterov": True}, torch.optim.SGD, id="SGD-nesterov"),
    pytest.param(SGDW, {"decay": "l2", "dampening": 0.4}, torch.optim.SGD, id="SGD-dampening"),
    pytest.param(SGDW, {"decay": "l2", "dampening": -0.5, "maximize": True}, torch.optim.SGD, id="SGD-maximize"),
]


def options_of(ours: type, extra: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our options, torch's)."""
    own = {**DEFAULTS["adamw" if ours is AdamW else "sgdw"], **extra}
    theirs = {k: v for k, v in own.items() if k != "decay"}
    return own, theirs


def assert_tracks(ours: Any, theirs: Any, ulps: float = ULPS) -> None:
    """Parameters, states and counts agree with torch's."""
    for p, q in zip(semantics.all_params(ours), semantics.all_params(theirs), strict=True):
        assert_close(p, q, ulps, "parameter")
        for name, value in theirs.state[q].items():
            if name == "step":
                assert float(ours.state[p]["step"]) == float(value)
            elif value is not None:
                assert_close(ours.state[p][name], value, ulps, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize(("ours", "extra", "theirs"), LIKE_TORCH)
def test_tracks_torch(ours: type, extra: dict[str, Any], theirs: type, dtype: torch.dtype, walk: str) -> None:
    if dtype.is_complex and extra.get("amsgrad"):
        extra = {**extra, "betas": (0.8, 0.9)}
    mine, others = parameters(dtype=dtype), parameters(dtype=dtype)
    own, their = options_of(ours, extra)
    a, b = ours(mine, **own), theirs(others, **their)
    for t in range(12):
        for opt, params in ((a, mine), (b, others)):
            opt.param_groups[0]["lr"] = 0.05 / (1 + t)
            set_gradients(params, t, skip=[i for i in range(len(params)) if (t + i) % 4 == 0])
            opt.step()
        assert_tracks(a, b)
    assert [float(a.state[p]["step"]) for p in mine] == [9.0] * len(mine)


def test_positional_arguments_are_torchs() -> None:
    pairs = ((AdamW, torch.optim.AdamW), (SGDW, torch.optim.SGD), (AdagradW, torch.optim.Adagrad))
    for ours, theirs in pairs:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
        names = [[n for n, p in inspect.signature(c).parameters.items() if p.kind in kinds] for c in (ours, theirs)]
        assert names[0] == names[1]
        known = set(inspect.signature(ours).parameters)
        assert set(inspect.signature(theirs).parameters) <= known
    a = AdamW(parameters(), 0.3, (0.5, 0.6), 1e-5, 0.7, True).param_groups[0]
    assert (a["lr"], a["betas"], a["eps"], a["weight_decay"], a["amsgrad"]) == (0.3, (0.5, 0.6), 1e-5, 0.7, True)
    s = SGDW(parameters(), 0.3, 0.9, 0.0, 0.7, True).param_groups[0]
    assert (s["lr"], s["momentum"], s["dampening"], s["weight_decay"], s["nesterov"]) == (0.3, 0.9, 0.0, 0.7, True)
    names = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")
    g = AdagradW(parameters(), 0.3, 0.2, 0.7, 0.4, 1e-5).param_groups[0]
    assert [g[name] for name in names] == [0.3, 0.2, 0.7, 0.4, 1e-5]


def test_defaults_are_torchs() -> None:
    pairs = ((AdamW, torch.optim.AdamW), (SGDW, torch.optim.SGD), (AdagradW, torch.optim.Adagrad))
    for ours, theirs in pairs:
        own, other = ours(parameters()).defaults, theirs(parameters()).defaults
        said = "decoupled_weight_decay"  # said by decay=
        assert {k: own[k] for k in other if k != said} == {k: v for k, v in other.items() if k != said}


@every
@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}, {"foreach": False, "fused": False}])
def test_fused_and_foreach_are_kept_and_change_nothing(rule: str, flags: dict[str, bool]) -> None:
    a, b = build(rule, parameters(), **flags), build(rule, parameters())
    assert {k: a.param_groups[0][k] for k in flags} == flags
    for t in range(3):
        for opt in (a, b):
            set_gradients(opt.param_groups[0]["params"], t)
            opt.step()
    assert_same_optimizers(a, b)


@every
def test_closure(rule: str) -> None:
    """Called once, with gradients enabled, positionally or by name; its loss is returned; the step follows it."""
    (p,), (q,) = parameters([(5,)]), parameters([(5,)])
    opt, other = build(rule, [p]), build(rule, [q])
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    for t in range(3):
        q.grad = plain(2 * q)
        expected = (q.detach() ** 2).sum().item()
        with torch.no_grad():
            loss = opt.step(closure) if t % 2 else opt.step(closure=closure)
        other.step()
        assert loss.item() == expected
    assert calls == 3
    assert_same_optimizers(opt, other)
    assert opt.step() is None


@every
def test_step_hooks(rule: str) -> None:
    """Pre hooks see the weights before, post hooks after; global ones too; a pre hook may set gradients."""
    (p,) = parameters([(5,)])
    opt = build(rule, [p])
    seen: list[tuple[str, list[float]]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append((name, p.tolist()))

    def double(*_: Any) -> None:
        assert p.grad is not None
        p.grad = p.grad * 2

    handles = [
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_pre_hook(double),
        opt.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        (q,) = parameters([(5,)])
        other = build(rule, [q])
        for t in range(2):
            before = p.tolist()
            set_gradients([p], t)
            opt.step()
            assert seen == [
                (n, before if "pre" in n else p.tolist()) for n in ("global pre", "pre", "post", "global post")
            ]
            assert before != p.tolist()
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for t in range(2):
        set_gradients([q], t)
        assert q.grad is not None
        q.grad.mul_(2)
        other.step()
    assert_same_optimizers(opt, other)


def one_cycle(opt: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=12, base_momentum=0.7, max_momentum=0.9)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3, 0.3),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: t / 4),
        one_cycle,
    ],
    ids=["step", "cosine", "warmup from 0", "one cycle"],
)
@pytest.mark.parametrize(("ours", "extra", "theirs"), [LIKE_TORCH[0], LIKE_TORCH[3], LIKE_TORCH[6], LIKE_TORCH[7]])
def test_schedulers(schedule: Callable[[Any], Any], ours: type, extra: dict[str, Any], theirs: type) -> None:
    """torch's schedulers, momentum cycling with them, move ours as they move torch's."""
    mine, others = parameters(), parameters()
    own, their = options_of(ours, extra)
    a, b = ours(mine, **own), theirs(others, **their)
    schedulers = schedule(a), schedule(b)
    lrs = set()
    for t in range(11):
        for opt, params, scheduler in ((a, mine, schedulers[0]), (b, others, schedulers[1])):
            set_gradients(params, t)
            opt.step()
            scheduler.step()
        for key in {"lr", "momentum", "betas"} & set(b.param_groups[0]):
            assert a.param_groups[0][key] == b.param_groups[0][key]
        lrs.add(a.param_groups[0]["lr"])
        assert_tracks(a, b)
    assert len(lrs) > 2


@every
def test_tensor_hyperparameters(rule: str) -> None:
    """Tensors of one element count as their value at the step, also when changed in place."""
    lr, decay, eta = (torch.tensor(v, dtype=torch.float64) for v in (0.05, 0.1, 0.5))
    a = build(rule, parameters(), lr=lr, weight_decay=decay, eta=eta.reshape(1))
    b = build(rule, parameters(), lr=0.05, weight_decay=0.1, eta=0.5)
    for t in range(4):
        if t == 2:
            lr.fill_(0.01)
            decay.fill_(0.3)
            b.param_groups[0].update(lr=0.01, weight_decay=0.3)
        for opt in (a, b):
            set_gradients(opt.param_groups[0]["params"], t)
            opt.step()
        assert_same_optimizers(a, b, f"step {t}")
    assert a.param_groups[0]["lr"] is lr


def test_tensor_betas() -> None:
    pair = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64))
    a, b = build("adamw", parameters(), betas=pair), build("adamw", parameters(), betas=[0.8, 0.95])
    for t in range(4):
        if t == 2:
            pair[0].fill_(0.5)
            b.param_groups[0]["betas"] = (0.5, 0.95)
        for opt in (a, b):
            set_gradients(opt.param_groups[0]["params"], t)
            opt.step()
    assert_same_optimizers(a, b)


@every
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_lr_0_freezes_weights_while_moments_advance(rule: str, mode: str, zero: Any) -> None:
    """As if the weights had been put back after a step with lr > 0."""
    a, b = (build(rule, parameters(), decay=mode, eta=0.5) for _ in range(2))
    for t in range(6):
        frozen = t in (0, 3, 4)
        for opt in (a, b):
            set_gradients(semantics.all_params(opt), t)
        before = [plain(p) for p in semantics.all_params(a)]
        a.param_groups[0]["lr"] = zero if frozen else 0.05
        a.step()
        b.step()
        if frozen:
            for p, q, old in zip(semantics.all_params(a), semantics.all_params(b), before, strict=True):
                assert_untouched(p, old, "frozen weights")
                assert not torch.equal(q, old)
                q.data.copy_(old)
        assert_same_optimizers(a, b, f"step {t}")
    assert float(a.state[semantics.all_params(a)[0]]["step"]) == 6


@every
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", ["lr", "eta"])
def test_what_freezes_keeps_gradients_out(rule: str, mode: str, key: str, walk: str) -> None:
    """At lr 0 and at eta 0, where a schedule ends say, no NaN and no infinity of a gradient reaches a weight."""
    opt = build(rule, parameters(), decay=mode)
    params = semantics.all_params(opt)
    for t in range(4):
        set_gradients(params, t)
        before = [plain(p) for p in params]
        frozen = t >= 2
        opt.param_groups[0][key] = 0.0 if frozen else 0.05
        if frozen:
            for p in params:
                p.grad.fill_(float("nan") if t == 2 else float("inf"))
        opt.step()
        for p, old in zip(params, before, strict=True):
            if frozen:
                assert_untouched(p, old, "frozen weights")
            else:
                assert not torch.equal(p, old)


@pytest.mark.parametrize("mode", MODES)
def test_lr_0_freezes_weights_in_the_papers_form(mode: str) -> None:
    """There the lr sits inside the buffer: with lr 0 it decays by the momentum, and takes nothing in."""
    params = parameters()
    opt = build("sgdw", params, form="paper", decay=mode)
    for t in range(5):
        set_gradients(params, t)
        before = [(plain(p), plain(opt.state[p]["momentum_buffer"]) if t else torch.zeros_like(p)) for p in params]
        opt.param_groups[0]["lr"] = 0.0 if t in (2, 3) else 0.1
        opt.step()
        for p, (old, buffer) in zip(params, before, strict=True):
            assert torch.equal(p, old) == (t in (2, 3))
            if t in (2, 3):
                assert torch.equal(opt.state[p]["momentum_buffer"], 0.8 * buffer)
                assert buffer.abs().max() > 0
        assert float(opt.state[params[0]]["step"]) == t + 1


@every
def test_grad_scaler_with_an_overflow_on_the_first_step(rule: str) -> None:
    """The overflowed step is skipped whole: no state, no count; then the bits of a run without a scaler."""
    params, others = parameters(), parameters()
    opt, other = build(rule, params), build(rule, others)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for t in range(5):
        set_gradients(params, t)
        set_gradients(others, t)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(scaler.scale(torch.ones(())))  # a power of two: exact
        if t == 0:
            params[2].grad[7] = torch.inf
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        if t == 0:
            assert not opt.state
        else:
            other.step()
        assert_same_optimizers(opt, other, f"step {t}")
    assert scales == [512.0, 512.0, 1024.0, 1024.0, 2048.0]


@every
@pytest.mark.parametrize("layout", ["plain", "gapped"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autograd_sees_the_write(rule: str, layout: str, backend: str) -> None:
    """backward through a parameter saved before the step raises; a parameter that was not stepped stays usable."""
    base = torch.randn(4, 6)
    p = nn.Parameter(base if layout == "plain" else base[:, ::2])
    q = nn.Parameter(torch.randn(3))
    opt = build(rule, [q, p], backend=backend)
    for t in range(3):  # the first builds the table, the others find it
        loss, kept = (p**2).sum(), (q**2).sum()
        versions = p._version, q._version
        set_gradients([q, p], t, skip=[0])
        opt.step()
        assert p._version > versions[0]
        assert q._version == versions[1]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        kept.backward()
        q.grad = None


@every
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_do_not_matter(rule: str, context: Callable[[], Any], walk: str) -> None:
    """Also from one step to the next: the first inside the mode, the second outside, and round again."""
    params, others = parameters(), parameters()
    opt, other = build(rule, params), build(rule, others)
    for t in range(5):
        set_gradients(params, t)
        set_gradients(others, t)
        if t % 2 == 0:
            with context():
                opt.step()
        else:
            opt.step()
        other.step()
        assert_same_optimizers(opt, other, f"step {t}")
    assert all(p.requires_grad and p.is_leaf for p in params)
    assert not any(v.requires_grad for own in opt.state.values() for v in own.values())


@every
def test_default_device_and_dtype_do_not_matter(rule: str, walk: str) -> None:
    """torch.set_default_device moves tensors that name no device: every vector of the table names its own."""
    others = parameters()
    other = build(rule, others)
    sets = [parameters() for _ in range(3)]
    opts = [build(rule, sets[0])]
    for t in range(4):
        for params in (others, *sets):
            set_gradients(params, t)
        other.step()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                if t == 0:
                    opts.append(build(rule, sets[1]))
                    opts.append(copy.deepcopy(opts[0]))
                    opts[2].param_groups[0]["params"] = sets[2]
                if t == 2:
                    opts[1].load_state_dict(opts[1].state_dict())
                for opt in opts:
                    opt.step()
        finally:
            torch.set_default_dtype(torch.float32)
        for opt in opts:
            assert_same_optimizers(opt, other, f"step {t}", loaded=True)


@every
def test_eta_multiplies_the_lr(rule: str) -> None:
    """eta 0.5 is lr/2 where decay is scaled by the lr, and halves both lr and decay where it is not."""
    for mode, halved in (("lr_scaled", {"lr": 0.025}), ("independent", {"lr": 0.025, "weight_decay": 0.05})):
        a, b = build(rule, parameters(), decay=mode), build(rule, parameters(), decay=mode)
        for t in range(4):
            if t == 1:
                a.param_groups[0]["eta"] = 0.5
                b.param_groups[0].update(halved)
            for opt in (a, b):
                set_gradients(semantics.all_params(opt), t)
                opt.step()
            assert_same_optimizers(a, b, f"{mode}, step {t}")
        set_gradients(semantics.all_params(a), 9)
        a.param_groups[0]["eta"] = 0.25
        a.step()
        b.step()
        assert not torch.equal(semantics.all_params(a)[0], semantics.all_params(b)[0])


@every
def test_repr_names_class_and_options(rule: str) -> None:
    text = repr(build(rule, parameters(), decay="independent"))
    assert text.startswith(f"{semantics.CLASSES[rule].__name__} (")
    assert "decay: independent" in text
    assert "weight_decay: 0.1" in text
