"""capturable=True: a step that is captured, and replayed, has the bits of one that is taken."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import CLASSES, Case, Piece, bf16, cases, f32, f64, gradient, make_params, optimizer, snapshot
from covering import covering
from engines import ENGINES, GPU, MIRRORED, Engine, engine_params
from graphs import graphs_of
from refusals import mentions
from torch import Tensor, nn

import wd_kernels
from wd_kernels.schedules import (
    Constant,
    Cosine,
    NormalizedDecay,
    Product,
    PublishedRestarts,
    Schedule,
    Sequential,
    StepDrop,
    WarmRestarts,
    Warmup,
    WarmupStableDecay,
    tables,
)
from wd_kernels.schedules.tables import can_be_tabled, tabled

PIECES = (Piece((5,)), Piece((1500,)), Piece((2049,)), Piece((31,)), Piece((7,)))
BODIES = [
    *cases(rules=["adamw"], names=["amsgrad"], decays=["lr_scaled", "proximal"]),
    *cases(rules=["adamw"], names=["far-end"], decays=["metric_proximal", "independent", "l2"]),
    *cases(rules=["sgdw"], names=["dampening"], decays=["independent", "l2"]),
    *cases(rules=["sgdw"], names=["nesterov", "paper", "no-momentum"], decays=["metric_proximal"]),
    *cases(rules=["adagradw"], names=["slowed"], decays=["proximal", "lr_scaled", "metric_proximal"]),
]
#: What groups are given, and what the optimizer is.
SCHEDULES: dict[str, Any] = {
    "none": None,
    "warmup": Warmup(5),
    "restarts": NormalizedDecay(WarmRestarts(2, mult=2)),
    "from_lr": "from_lr",
}
LIMITS: dict[str, dict[str, Any]] = {
    "free": {},
    "clipped": {"max_grad_norm": 0.5, "skip_nonfinite": True},
    "scaled": {"max_grad_norm": 1.0},
}
BEFORE, STEPS = 2, 9
NAN, FOUND, FROZEN = 4, 5, 6  # the steps that have a NaN, that a scaler has found something in, that have an lr of 0


def live(case: Case, schedule: str, limits: str, device: Any) -> tuple[list[Tensor], Any, list[Tensor], list[Tensor]]:
    """Parameters, an optimizer, static gradients, and the tensors of hyperparameters: lr twice, weight_decay."""
    params = make_params(PIECES, case.dtype, case.grad_dtype, device=device)
    grads = [torch.zeros_like(p, dtype=case.grad_dtype) for p in params]
    lrs = [torch.tensor(0.03, device=device), torch.tensor(0.07, device=device, dtype=f64)]
    weight_decay = torch.tensor(0.2, device=device)
    own: dict[str, Any] = {"schedule": SCHEDULES[schedule]} if schedule != "none" else {"eta": 0.5}
    groups = [
        {"params": params[:2], "lr": lrs[0], "weight_decay": 0.1, **own},
        {"params": params[2:4], "lr": lrs[1], "weight_decay": weight_decay},
        {"params": params[4:], "lr": 0.05, "weight_decay": 0.3, **own},
    ]
    opt = optimizer(case, groups, "auto", capturable=True, **LIMITS[limits])
    return params, opt, grads, [*lrs, weight_decay]


def steps(
    case: Case, schedule: str, limits: str, backend: str, device: Any, graphs: Any
) -> tuple[list[dict[str, Tensor]], Any]:
    """All that there is after each step: those from `BEFORE` on are replays, where there is a graph."""
    params, opt, grads, tensors = live(case, schedule, limits, device)
    opt.backend = backend
    opt._new_table()
    scale, found_inf = torch.tensor(8.0, device=device), torch.tensor(0.0, device=device)
    if limits == "scaled":
        opt.grad_scale, opt.found_inf = scale, found_inf
    found = []
    for step in range(STEPS):
        for k, (p, grad, piece) in enumerate(zip(params, grads, PIECES, strict=True)):
            grad.copy_(gradient(piece, case.grad_dtype, 100 * step + k, device))
            p.grad = grad if k != 3 else None  # one that is never stepped
        if step == NAN and limits != "free":
            grads[2][7] = math.nan if limits == "clipped" else 1e3
        found_inf.fill_(float(step == FOUND))
        if graphs is not None and step == BEFORE:
            with graphs.capture() as graph:
                opt.step()
        for t in tensors[:2]:
            t.fill_(0.0 if step == FROZEN else 0.05 / (step + 1))
        tensors[2].fill_(0.1 * step)
        if graphs is None or step < BEFORE:
            if step == FROZEN:
                opt.param_groups[2]["lr"] = 0.05
            opt.step()
        else:
            graph.replay()
        own = {"skipped": opt.skipped.cpu()}
        if opt.grad_norm is not None:
            own |= {"norm": opt.grad_norm.cpu(), "norms": opt.group_grad_norms.cpu()}
        for g, group in enumerate(opt.param_groups):
            own[f"{g} step"] = torch.tensor(int(group.get("schedule_step", 0)))
        found.append(snapshot(params, opt) | own)
    return found, opt


ROWS = covering(
    {
        "engine": [e for e in ENGINES if e.form not in ("gpu", "avx512", "avx2", "baseline")],
        "case": BODIES,
        "schedule": list(SCHEDULES),
        "limits": list(LIMITS),
    }
)
ROWS += [
    {"engine": e, "case": BODIES[3 * k + 1], "schedule": schedule, "limits": list(LIMITS)[k % 3]}
    for e in GPU for k, schedule in enumerate(SCHEDULES)
]  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "case", "schedule", "limits"),
    [
        pytest.param(*r.values(), id="-".join(map(str, r.values())), marks=[pytest.mark.gpu] * (r["engine"] in GPU))
        for r in ROWS
    ],
    indirect=["engine"],
)  # fmt: skip
def test_replays_have_the_bits_of_steps(
    engine: Engine, case: Case, schedule: str, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graphs_of(engine, monkeypatch)
    found, opt = steps(case, schedule, limits, engine.backend, engine.device, graphs)
    expected, other = steps(case, schedule, limits, "reference", "cpu", None)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            assert_same_bits(a[name], b[name], f"step {step}: {name}")
    skipped = {"free": [], "clipped": [NAN], "scaled": [FOUND]}[limits]
    assert [bool(own["skipped"]) for own in found] == [step in skipped for step in range(STEPS)]
    assert int(found[-1]["0 step"]) == (STEPS - len(skipped) if schedule in ("warmup", "restarts") else 0)
    assert not torch.equal(found[-1]["2"], found[BEFORE]["2"])
    etas = [[own.get("eta") for own in saved.state_dict()["param_groups"]] for saved in (opt, other)]
    assert etas[0] == etas[1]


# Around captures ------------------------------------------------------------------------------------------------------


def simple(engine: Engine, graphs: Any) -> tuple[list[Tensor], Any, Any]:
    """Two parameters with gradients of ones, one step taken and one captured."""
    params = make_params([Piece((5,)), Piece((1500,))], f32, f32, device=engine.device)
    lr = torch.tensor(0.1, device=engine.device)
    opt = wd_kernels.AdamW(params, lr=lr, weight_decay=0.1, capturable=True, backend=engine.backend)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    with graphs.capture() as graph:
        opt.step()
    return params, opt, graph


def expected_after(number: int) -> dict[str, Tensor]:
    """After as many steps of the same, taken by the reference."""
    params = make_params([Piece((5,)), Piece((1500,))], f32, f32)
    opt = wd_kernels.AdamW(params, lr=torch.tensor(0.1), weight_decay=0.1, backend="reference")
    for _ in range(number):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    return snapshot(params, opt)


def assert_same_snapshots(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert_same_bits(found[name], expected[name], name)


OWN = [e for e in (*MIRRORED, *GPU) if e.form in ("interpreted", "on_cpu", "gpu")]


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
def test_steps_between_replays(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some that fail, some of parameters that come late, and a second graph, which has these."""
    graphs = graphs_of(engine, monkeypatch)
    params = make_params([Piece((5,)), Piece((1500,)), Piece((3,))], f32, f32, device=engine.device)
    opt = wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1, capturable=True, backend=engine.backend)
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    opt.step()
    with graphs.capture() as first:
        opt.step()
    assert float(opt.state[params[0]]["step"]) == 1  # captured is not taken
    first.replay()
    kept, params[0].grad = params[0].grad, None
    with pytest.raises(RuntimeError, match=mentions("parameter 0 of", "parameter 1 of", "one count", "end_captures()")):
        opt.step()
    params[0].grad = kept
    first.replay()
    static = [p.grad for p in params]  # a graph has the addresses of these, as of all its inputs
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    params[2].grad = torch.ones_like(params[2])
    opt.step()  # step 4, the first of the last one
    first.replay()
    opt.step()
    with graphs.capture() as second:
        opt.step()
    second.replay()
    first.replay()
    kept, params[1].grad = params[1].grad, torch.ones_like(params[1]).to_sparse()
    with pytest.raises(RuntimeError, match=mentions("parameter 1 of", "sparse")):
        opt.step()  # the next one starts anew, and knows who has which count
    params[1].grad = kept
    opt.step()

    expected = make_params([Piece((5,)), Piece((1500,)), Piece((3,))], f32, f32)
    other = wd_kernels.AdamW(expected, lr=0.1, weight_decay=0.1, backend="reference")
    for step in range(9):
        for k, p in enumerate(expected):
            p.grad = torch.ones_like(p) if k < 2 or step in (3, 5, 6, 8) else None
        other.step()
    assert_same_snapshots(snapshot(params, opt), snapshot(expected, other))
    assert [float(own["step"]) for own in opt.state.values()] == [9, 9, 4]
    assert len(static) == 3


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
def test_other_memory_than_a_graph_has_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    params, opt, graph = simple(engine, graphs_of(engine, monkeypatch))
    refused = mentions("parameter 1 of group 0, a state of it or its step count is another tensor", "end_captures()")
    own = opt.state[params[1]]
    for name in ("exp_avg", "step"):
        kept, own[name] = own[name], own[name].clone()
        with pytest.raises(RuntimeError, match=refused):
            opt.step()
        own[name] = kept
    data = params[1].data
    params[1].data = data.clone()
    with pytest.raises(RuntimeError, match=refused):
        opt.step()
    params[1].data = data
    graph.replay()
    opt.step()
    assert_same_snapshots(snapshot(params, opt), expected_after(3))


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
def test_torchs_schedulers_move_a_tensor(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the decay with it, where eta follows. A tensor for each group: torch writes into what it finds."""

    def train(backend: str, device: Any, graphs: Any) -> dict[str, Tensor]:
        params = make_params([Piece((5,)), Piece((1500,))], f32, f32, device=device)
        groups = [{"params": [p], "lr": torch.tensor(0.1, device=device)} for p in params]
        opt = wd_kernels.AdamW(
            groups, weight_decay=0.1, decay="independent", schedule="from_lr", capturable=True, backend=backend
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        scheduler.step()
        if graphs is not None:
            with graphs.capture() as graph:
                opt.step()
        for _ in range(6):
            opt.step() if graphs is None else graph.replay()
            scheduler.step()
        return snapshot(params, opt)

    found = train(engine.backend, engine.device, graphs_of(engine, monkeypatch))
    assert_same_snapshots(found, train("reference", "cpu", None))


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
def test_what_would_leave_a_graph_behind_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    params, opt, graph = simple(engine, graphs_of(engine, monkeypatch))
    saved, before = opt.state_dict(), snapshot(params, opt)
    with pytest.raises(RuntimeError, match=mentions("a state is loaded", "captured", "end_captures()")):
        opt.load_state_dict(saved)
    more = nn.Parameter(torch.ones(3, device=engine.device))
    with pytest.raises(RuntimeError, match=mentions("a group is added", "captured", "end_captures()")):
        opt.add_param_group({"params": [more]})
    opt.param_groups[0]["params"].append(more)
    with pytest.raises(
        RuntimeError, match=mentions("groups, parameters or their device were changed", "end_captures()")
    ):
        opt.step()
    del opt.param_groups[0]["params"][-1]
    assert_same_snapshots(snapshot(params, opt), before)
    graph.replay()
    opt.step()
    assert_same_snapshots(snapshot(params, opt), expected_after(3))
    opt.end_captures()
    opt.load_state_dict(saved)
    assert float(opt.state[params[0]]["step"]) == 1
    opt.step()
    assert float(opt.state[params[0]]["step"]) == 2
    assert opt.state_dict()["param_groups"][0]["capturable"] is True


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
def test_what_cannot_be_captured(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of(engine, monkeypatch)
    a, b = make_params([Piece((5,)), Piece((4, 6))], f32, f32, device=engine.device)
    a.grad = torch.ones_like(a)

    def refused(opt: Any, *parts: str) -> None:
        before = snapshot([a, b], opt)
        with pytest.raises(RuntimeError, match=mentions(*parts)), graphs.capture():
            opt.step()
        assert_same_snapshots(snapshot([a, b], opt), before)

    given: dict[str, Any] = {"lr": 0.1, "backend": engine.backend}
    plain = wd_kernels.AdamW([a, b], **given)
    plain.step()
    refused(plain, "captured in a CUDA graph", "Allowed is an optimizer with capturable=True")
    opt = wd_kernels.AdamW([a, b], capturable=True, **given)
    refused(opt, "the optimizer is new", "take one outside of the graph first")
    opt.step()
    b.grad = torch.ones_like(b)
    refused(opt, "parameter 1 of group 0 takes its first step", "take one outside")
    opt.step()
    b.grad = torch.ones(6, 4, device=engine.device).t()
    refused(opt, "parameter 1 of group 0 or its gradient lies otherwise in memory", "pass contiguous tensors")
    b.grad = torch.ones_like(b)
    opt.step()
    opt.param_groups[0]["schedule"] = Warmup(4)
    refused(opt, "a schedule, or its schedule_step, is another one", "take one outside")
    opt.step()
    opt.param_groups[0]["schedule_step"] = 3
    refused(opt, "a schedule, or its schedule_step, is another one", "take one outside")
    opt.step()
    with graphs.capture():
        opt.step()
    refused(opt, "no memory is ready", "another one before each graph")


def test_bad_settings() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    meta = torch.device("meta")

    def wrong(kind: type[Exception], *parts: str, **options: Any) -> None:
        cls = options.pop("cls", wd_kernels.AdamW)
        opt = cls([p], capturable=True, backend="triton", **{"lr": 0.1, **options})
        before = snapshot([p], opt)
        with pytest.raises(kind, match=mentions(*parts)):
            opt.step()
        assert_same_snapshots(snapshot([p], opt), before)

    def later(key: str, value: Any, kind: type[Exception], *parts: str, **options: Any) -> None:
        opt = wd_kernels.AdamW([p], capturable=True, backend="triton", lr=0.1, **options)
        opt.param_groups[0][key] = value
        with pytest.raises(kind, match=mentions(*parts)):
            opt.step()
        assert not opt.state

    later("lr", torch.tensor(0.1, device=meta), ValueError, "lr of param group 0", "a tensor on meta", "are on cpu")
    later("lr", torch.tensor(0.1, dtype=bf16), ValueError, "lr of param group 0", "torch.bfloat16", "one float32 or")
    later("weight_decay", torch.ones(2), ValueError, "weight_decay of param group 0", "shape (2,)")
    betas = (0.9, torch.tensor(0.9, device=meta))
    later("betas", betas, ValueError, "betas[1] of param group 0", "a tensor on meta")
    later("betas", (0.9, 0.9, torch.tensor(0.9)), TypeError, "betas=", "param group 0", "expected a pair")
    later("capturable", False, ValueError, "capturable=False in param group 0", "all groups have")
    later("max_grad_norm", torch.tensor(1.0), TypeError, "max_grad_norm of param group 0 is a tensor", "a number")
    later("eta", 0.5, ValueError, "eta=0.5 in param group 0 with schedule='from_lr'", schedule="from_lr")
    wrong(
        ValueError, "schedule=", "param group 0 is Python code, with capturable=True", "from_lr", schedule=lambda t: 1.0
    )
    wrong(ValueError, "is Python code", schedule=Sequential(Warmup(3), lambda t: 1.0))
    wrong(ValueError, "show_lr=True in param group 0 with capturable=True", schedule=Warmup(3), show_lr=True)
    momentum = torch.tensor(0.9)
    wrong(
        TypeError, "momentum of param group 0 is a tensor", "Tensors may be lr, eta, weight_decay",
        cls=wd_kernels.SGDW, momentum=momentum,
    )  # fmt: skip
    with pytest.raises(ValueError, match=mentions("capturable=False in param group 0", "what all groups have")):
        wd_kernels.AdamW([{"params": [p], "capturable": False}], capturable=True)
    with pytest.raises(TypeError, match=mentions("capturable='yes'", "True or False")):
        wd_kernels.SGDW([p], capturable="yes")  # type: ignore[arg-type]
    model = nn.Linear(2, 2)
    opt = wd_kernels.AdamW(model.parameters(), capturable=True)
    with pytest.raises(ValueError, match=mentions("capturable=True", "gradient release", "allowed is one of them")):
        wd_kernels.release_gradients(model, opt)


@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_it_changes_nothing_where_nothing_is_captured(rule: str, backend: str) -> None:
    """Also of what is saved, but for torch's own key."""

    def run(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        params = make_params([Piece((5,)), Piece((1500,))], bf16, f32)
        opt = CLASSES[rule](params, lr=0.1, weight_decay=0.1, backend=backend, schedule=Cosine(5), **options)
        for step in range(4):
            for k, p in enumerate(params):
                p.grad = gradient(Piece(tuple(p.shape)), f32, 10 * step + k)
            opt.step()
        again = copy.deepcopy(opt)
        again.step()
        assert again.param_groups[0]["schedule_step"] == 5
        loaded = CLASSES[rule](params, lr=0.1, weight_decay=0.1, backend=backend, schedule=Cosine(5), **options)
        loaded.load_state_dict(opt.state_dict())
        assert loaded.state_dict()["param_groups"] == opt.state_dict()["param_groups"]
        return snapshot(params, opt), opt.state_dict()["param_groups"][0]

    (found, group), (expected, other) = run(capturable=True), run()
    assert_same_snapshots(found, expected)
    assert group.pop("capturable", None) is (True if rule == "adamw" else None)
    assert other.pop("capturable", None) is (False if rule == "adamw" else None)
    assert group == other


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
def test_a_step_that_freezes_all_is_not_counted(engine: Engine) -> None:
    """As torch's distributed checkpoints take one: schedules begin after it, on a device too."""
    p = nn.Parameter(torch.ones(3, device=engine.device))
    p.grad = torch.ones_like(p)
    lr = torch.tensor(0.0, device=engine.device)
    own: dict[str, Any] = {"capturable": True, "backend": engine.backend, "weight_decay": 0.0}
    opt = wd_kernels.AdamW([p], lr=lr, schedule=Warmup(4), **own)
    opt.step()
    assert (int(opt.param_groups[0]["schedule_step"]), p.tolist()) == (0, [1.0] * 3)
    lr.fill_(0.4)
    opt.step()
    assert (int(opt.param_groups[0]["schedule_step"]), float(opt.param_groups[0]["eta"])) == (1, 0.25)
    assert p.tolist() == pytest.approx([0.9] * 3)  # by 0.25 * 0.4


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
@pytest.mark.parametrize("name", ["lr", "eta"])
def test_lr_0_and_eta_0_freeze_whatever_the_gradients(name: str, engine: Engine) -> None:
    p = nn.Parameter(torch.ones(3, device=engine.device))
    p.grad = torch.full_like(p, math.inf)
    own: dict[str, Any] = {"capturable": True, "backend": engine.backend, "weight_decay": 0.1, "decay": "independent"}
    opt = wd_kernels.AdamW([p], **{"lr": 0.1, **own, name: torch.tensor(0.0, device=engine.device)})
    opt.step()
    assert p.tolist() == [1.0] * 3
    assert not opt.state[p]["exp_avg"].isfinite().any()


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
def test_schedules_are_counted_where_steps_are_skipped(engine: Engine) -> None:
    """Without capturable, too; and the host goes on where the device was."""
    p = nn.Parameter(torch.ones(3, device=engine.device))
    own: dict[str, Any] = {"skip_nonfinite": True, "backend": engine.backend, "weight_decay": 0.0}
    opt = wd_kernels.AdamW([p], lr=0.4, schedule=Warmup(4), **own)
    for value in (1.0, math.nan, 1.0):
        p.grad = torch.full_like(p, value)
        opt.step()
    assert int(opt.param_groups[0]["schedule_step"]) == 2
    assert float(opt.param_groups[0]["eta"]) == 0.5
    opt.skip_nonfinite = False
    opt.step()
    assert (opt.param_groups[0]["schedule_step"], opt.param_groups[0]["eta"]) == (3, 0.75)
    opt.skip_nonfinite = True
    opt.step()
    assert int(opt.param_groups[0]["schedule_step"]) == 4
    assert opt.state_dict()["param_groups"][0]["schedule_step"] == 4


# Lives of groups and schedules on a device, beside the reference ------------------------------------------------------


def same_lives(live: Callable[[str], tuple[list[Tensor], Any]], *backends: str) -> Any:
    """What `live` does with a backend has the reference's bits, also in what is saved of groups. The last optimizer."""
    params, opt = live("reference")
    expected, groups = snapshot(params, opt), opt.state_dict()["param_groups"]
    for backend in backends or ("cpu", "triton"):
        params, opt = live(backend)
        assert_same_snapshots(snapshot(params, opt), expected)
        assert opt.state_dict()["param_groups"] == groups
    return opt


def made(backend: str, number: int = 3, **options: Any) -> tuple[list[Tensor], Any]:
    params = make_params([Piece((5,)), Piece((7,)), Piece((3,))][:number], f32, f32)
    return params, wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1, backend=backend, **options)


def give(params: list[Tensor], on: tuple[int, ...], value: float = 1.0) -> None:
    for k, p in enumerate(params):
        p.grad = torch.full_like(p, value * (k + 1)) if on[k] else None


def test_a_row_follows_who_has_its_count() -> None:
    """Of two with one count, one is left alone in the next steps: it is its own count that goes on."""

    def life(backend: str) -> tuple[list[Tensor], Any]:
        params, opt = made(backend, skip_nonfinite=True)
        for on in ((0, 1, 1), (0, 1, 0), (0, 1, 0), (0, 1, 0)):
            give(params, on)
            opt.step()
        return params, opt

    def fewer(backend: str) -> tuple[list[Tensor], Any]:
        params, opt = made(backend, skip_nonfinite=True)
        for _ in range(2):
            give(params, (1, 1, 1))
            opt.step()
            opt.param_groups[0]["params"] = params[:1]
            for p in params[1:]:
                opt.state.pop(p, None)
        return params[:1], opt

    same_lives(life)
    same_lives(fewer)


def test_steps_without_gradients_count_for_schedules() -> None:
    def life(backend: str) -> tuple[list[Tensor], Any]:
        params, opt = made(backend, 1, schedule=Warmup(8), skip_nonfinite=True)
        for on in (1, 0, 0, 1, 0):
            give(params, (on,))
            opt.step()
        return params, opt

    assert int(same_lives(life).param_groups[0]["schedule_step"]) == 5


def test_a_schedule_that_comes_and_goes() -> None:
    """Its count stays while it is away, eta stays what it was, and what somebody has set stands."""
    warmup = Warmup(8)

    def away(backend: str) -> tuple[list[Tensor], Any]:
        params = make_params([Piece((5,)), Piece((7,))], f32, f32)
        groups = [{"params": [p]} for p in params]
        opt = wd_kernels.AdamW(groups, lr=0.1, schedule=warmup, skip_nonfinite=True, backend=backend)
        for step in range(6):
            give(params, (1, 1))
            opt.param_groups[1]["schedule"] = None if step in (1, 2, 3) else warmup
            if step == 4:
                opt.param_groups[0]["schedule_step"] = 1
            opt.step()
        return params, opt

    def by_hand(backend: str) -> tuple[list[Tensor], Any]:
        params, opt = made(backend, 1, schedule=Warmup(10), skip_nonfinite=True)
        for step in range(4):
            give(params, (1,))
            if step == 1:
                opt.param_groups[0]["eta"] = 0.9  # a schedule sets it
            if step == 2:
                opt.param_groups[0]["schedule"] = None
            opt.step()
        return params, opt

    def from_lr(backend: str) -> tuple[list[Tensor], Any]:
        params, opt = made(backend, 1, schedule=Warmup(2), skip_nonfinite=True)
        for step in range(6):
            give(params, (1,))
            if step == 3:
                opt.param_groups[0].update(schedule="from_lr", base_lr=0.1)
            if step > 3:
                opt.param_groups[0]["lr"] = 0.1 / step
            opt.step()
        return params, opt

    def not_counted(backend: str) -> tuple[list[Tensor], Any]:
        params, opt = made(backend, 1, schedule=Warmup(8), skip_nonfinite=True)
        for value in (1.0, math.nan):
            give(params, (1,), value)
            opt.step()
        return params, opt

    same_lives(away)
    same_lives(by_hand)
    same_lives(from_lr)
    assert same_lives(not_counted).state_dict()["param_groups"][0]["eta"] == 0.125


def test_what_is_saved_of_a_schedule_is_a_number() -> None:
    params, opt = made("triton", 1, schedule=Warmup(8), skip_nonfinite=True)
    give(params, (1,))
    opt.step()
    group = opt.param_groups[0]
    assert isinstance(group["schedule_step"], Tensor)
    again = pickle.loads(pickle.dumps(opt)).param_groups[0]
    assert (again["schedule_step"], again["eta"]) == (1, 0.125)
    shown, group["schedule_step"] = group["schedule_step"], 5
    saved = opt.state_dict()["param_groups"][0]
    assert (saved["schedule_step"], saved["eta"]) == (5, 0.125)
    params[0].grad = torch.ones(5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert int(shown) == 1  # of a step that fails nothing is written
    give(params, (1,))
    opt.step()
    assert int(group["schedule_step"]) == 6
    for _ in range(5):
        group["schedule"] = Cosine(20)
        opt.step()
    assert len(opt._table.norms.bank.tables) == 1


def test_what_was_found_is_of_the_last_step() -> None:
    for backend in ("reference", "triton"):
        params, opt = made(backend, 1, skip_nonfinite=True)
        give(params, (1,), math.nan)
        opt.step()
        assert bool(opt.skipped)
        opt.skip_nonfinite = False
        params[0].grad = None
        opt.step()
        assert not bool(opt.skipped)


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
def test_what_a_graph_would_not_follow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of(engine, monkeypatch)
    (p,) = make_params([Piece((1500,))], f32, f32, device=engine.device)
    p.grad = torch.ones_like(p)
    own: dict[str, Any] = {"lr": 0.1, "capturable": True, "backend": engine.backend}
    opt = wd_kernels.SGDW([p], schedule=Warmup(50), skip_spikes=3.0, **own)

    def refused(*parts: str) -> None:
        before = snapshot([p], opt)
        with pytest.raises(RuntimeError, match=mentions(*parts)), graphs.capture():
            opt.step()
        assert_same_snapshots(snapshot([p], opt), before)

    for value in (1.0, torch.tensor(1.0, device="meta")):
        opt.latest_loss = torch.tensor(1.0, device=engine.device)
        opt.step()
        opt.latest_loss = value
        refused("latest_loss=", "captured", f"allowed are tensors on {engine.device}")
    opt.latest_loss = None
    opt.step()
    opt.grad_scale = 2.0
    refused("grad_scale=2.0", "captured", "allowed are tensors")
    del opt.grad_scale
    opt.step()
    opt.param_groups[0]["schedule"] = Cosine(100)
    refused("a schedule, or its schedule_step, is another one", "take one outside")
    opt.step()
    opt.state[p]["step"] = torch.tensor(7.0, device=engine.device)
    if engine.device.type != "cpu":
        refused("the step count of parameter 0 of group 0 is another tensor", "take one outside")
    opt.step()
    opt.param_groups[0]["params"].append(nn.Parameter(torch.ones(3, device=engine.device)))
    refused("groups or parameters are others", "take one outside")
    del opt.param_groups[0]["params"][-1]
    opt.step()
    opt.param_groups[0]["schedule"] = None
    refused("a schedule, or its schedule_step, is another one", "take one outside")
    opt.step()
    with graphs.capture():
        opt.step()
    for name, value in (("max_grad_norm", 2.0), ("skip_spikes", 2.0), ("spike_window", 8), ("skip_nonfinite", True)):
        with pytest.raises(RuntimeError, match=mentions(f"{name} is set", "captured", "end_captures()")):
            setattr(opt, name, value)
    assert opt.spike_window == 128
    opt.end_captures()
    opt.spike_window = 8


def test_a_kernel_is_there_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bringing one to the device is no affair of a capture."""
    engine = next(e for e in MIRRORED if e.form == "on_cpu")
    engine.provide(monkeypatch)
    graphs = graphs_of(engine, monkeypatch)
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    opt = wd_kernels.AdamW([p], capturable=True, backend="cuda")
    opt.step()
    opt.max_grad_norm = 1.0
    with (
        pytest.raises(RuntimeError, match=mentions("a kernel of it is not on cpu yet", "take one outside")),
        graphs.capture(),
    ):
        opt.step()
    assert float(opt.state[p]["step"]) == 1
    opt.step()
    with graphs.capture() as graph:
        opt.step()
    graph.replay()
    assert float(opt.state[p]["step"]) == 3


# Schedules as tables --------------------------------------------------------------------------------------------------

TABLED: list[Schedule] = [
    Constant(0.5), StepDrop((3, 7), 0.1), StepDrop(()), Warmup(4, 0.2), Cosine(6, 0.1),
    WarmupStableDecay(2, 3, 4, "1-sqrt"), Sequential(Warmup(3), Cosine(5)), Product(Warmup(3), StepDrop((9,))),
    NormalizedDecay(Cosine(6)), Sequential(Warmup(2), StepDrop((4,))), Product(Warmup(4), Constant(2.0)),
]  # fmt: skip
ENDLESS: list[Schedule] = [
    WarmRestarts(3, mult=2), PublishedRestarts(2, 3), Sequential(Warmup(2), WarmRestarts(4)),
    Product(WarmRestarts(3), Warmup(4)), NormalizedDecay(WarmRestarts(3, mult=2)),
]  # fmt: skip


@pytest.mark.parametrize("schedule", [*TABLED, *ENDLESS], ids=repr)
def test_tables_are_what_schedules_give(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LONGEST", 50)
    tables._known.cache_clear()
    assert can_be_tabled(schedule)
    values, endless = tabled(schedule)
    steps = values.shape[1]
    assert endless == (schedule in ENDLESS)
    assert steps == 50 if endless else steps < 20
    factor = getattr(schedule, "decay_factor", lambda t: 1.0)
    for t in range(steps if endless else 40):
        assert values[:, min(t, steps - 1)].tolist() == [schedule(t), factor(t)]


@pytest.mark.parametrize("engine", engine_params(tuple(OWN)), indirect=True)
def test_a_step_past_an_endless_table_is_skipped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LONGEST", 3)
    p = nn.Parameter(torch.ones(3, device=engine.device))
    p.grad = torch.ones_like(p)
    opt = wd_kernels.SGDW([p], lr=0.1, schedule=WarmRestarts(2), capturable=True, backend=engine.backend)
    skipped = []
    for _ in range(5):
        opt.step()
        skipped.append(bool(opt.skipped))
    assert skipped == [False] * 3 + [True] * 2
    assert float(opt.state[p]["step"]) == 3


class Falling(Schedule):
    """Somebody's own, which says that it has an end, and goes on."""

    steps = 3

    def __call__(self, t: int) -> float:
        return 1 / (1 + t)


def test_a_schedule_that_does_not_keep_its_value_is_no_table() -> None:
    with pytest.raises(ValueError, match=mentions("settles at step 3", "0.25 there and 0.2 at 4", "keep its value")):
        tabled(Falling())


class Scaled(Warmup):
    """Equal, by the fields that Warmup has, to one that is another."""

    factor = 1.0

    def __call__(self, t: int) -> float:
        return self.factor * super().__call__(t)


def test_tables_of_what_derives_from_ours() -> None:
    one, other = Scaled(2), Scaled(2)
    object.__setattr__(other, "factor", 3.0)
    assert one == other
    assert [tabled(own).values[0].tolist() for own in (one, other)] == [[0.5, 1.0, 1.0], [1.5, 3.0, 3.0]]
    with pytest.raises(ValueError, match=mentions("settles at step 1000000000", "allowed is one below")):
        tabled(Cosine(10**9))
    long = tabled(Warmup(2**20 + 5))
    assert (long.values.shape[1], long.endless) == (2**20 + 6, False)


class Rising(Schedule):
    """Somebody's own, which is not finite for ever."""

    steps = 4

    def __call__(self, t: int) -> float:
        return 1.0 if t < 3 else math.inf


def test_a_table_of_what_is_no_multiplier() -> None:
    with pytest.raises(ValueError, match=re.escape("schedule(3)=inf of ")):
        tabled(Rising())
