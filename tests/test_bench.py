"""The benchmark's byte model, cases, peers, contenders, ceiling and turns, the suite as it is run, and the demo."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import byte_model
import ceiling
import contenders
import cpu_cases
import numpy as np
import peers
import pytest
import torch
import turns

import wd_kernels

ROOT = Path(__file__).parent.parent
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HERE = ["wd_kernels", "torch fused", "torch foreach", "torch for-loop"]
FLAT = [cpu_cases.FLAT] if hasattr(wd_kernels, "flatten_") else []


def run(*arguments: str) -> str:
    """Runs Python in the root folder, as a user would; returns stdout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def loaded(names: list[str] = HERE) -> dict[peers.Peer, Any]:
    there, missing = peers.load([peer for peer in peers.on("cpu") if peer.name in names])
    assert not missing
    return there


def built(case: cpu_cases.Case, names: list[str] = HERE) -> list[contenders.Contender]:
    them, skipped = contenders.build(case, loaded(names), case.contenders(names))
    assert not skipped
    return them


# The byte model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "param", "grad", "state", "expected"),
    [
        ("adamw", F32, F32, F32, 28),
        ("adamw", BF16, BF16, F32, 22),
        ("adamw", F32, F32, BF16, 20),
        ("adamw", BF16, BF16, BF16, 14),
        ("sgdw", F32, F32, F32, 20),
        ("sgdw", BF16, BF16, BF16, 10),
        ("adamw amsgrad", F32, F32, F32, 36),
        ("sgdw without momentum", F32, F32, F32, 12),
    ],
)
def test_bytes_per_parameter(rule, param, grad, state, expected):
    assert byte_model.step_bytes(rule, param, grad, state) == expected


@pytest.mark.parametrize(
    ("states", "param", "numel", "expected"),
    [
        ("float32_states", BF16, 10, 8),
        ("own_dtype_states", F64, 10, 16),
        ("our_states", F16, 10, 8),
        ("our_states", F64, 10, 16),
        ("kahan_states", BF16, 10, 6),
        ("kahan_states", F32, 10, 8),
        ("blockwise_states", F32, 4096, 2 * (1 + 4 / 256)),
        ("blockwise_states", F32, 4095, 8),
        ("blockwise_states", BF16, 4097, 4),
        ("blockwise_states_or_float32", BF16, 4095, 8),
        ("blockwise_states_or_float32", F32, 5000, 2 * (1 + 4 * 20 / 5000)),
    ],
)
def test_bytes_of_the_states_of_a_parameter(states, param, numel, expected):
    assert getattr(byte_model, states)("adamw", param, numel) == pytest.approx(expected)


def nbytes(tensor: Any) -> int:
    """Of a tensor, or of what a quantised one is made of, but for its table of values."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0] if name != "qmap")


@pytest.mark.parametrize("numel", [64, 4096])
@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
def test_bytes_are_those_of_the_tensors_that_optimizers_really_keep(rule, numel):
    there, _ = peers.load(peers.on("cpu"))
    for peer, cls in there.items():
        for dtype in peer.dtypes:
            if peer.rule != rule or (peer.name not in HERE and dtype not in (F32, BF16)):
                continue
            p = torch.nn.Parameter(torch.ones(numel, dtype=dtype))
            p.grad = torch.ones_like(p)
            optimizer = peer.make(cls, [{"params": [p]}])
            optimizer.step()
            kept = {n: s for n, s in optimizer.state[p].items() if isinstance(s, torch.Tensor) and s.dim()}
            moved = 2 * p.nbytes + p.grad.nbytes + 2 * sum(nbytes(s) for n, s in kept.items() if n[:4] != "qmap")
            assert peer.bytes_per_parameter(dtype, dtype, numel) * numel == moved, (peer.name, dtype)


# Cases and peers ------------------------------------------------------------------------------------------------------


def test_every_case_prints_as_what_it_parses_from():
    assert len(set(map(str, cpu_cases.CASES))) == len(set(cpu_cases.CASES)) == len(cpu_cases.CASES)
    for case in cpu_cases.CASES:
        assert cpu_cases.Case.parse(str(case)) == case
    assert cpu_cases.Case.parse("1x64Mi-bfloat16-kept").elements == 64 << 20
    whole = "1000x10-float16-new-sgdw-1thread-10groups-changing-by-groups"
    expected = cpu_cases.Case(1000, 10, F16, "new", "sgdw", 1, 10, "changing", "groups")
    assert cpu_cases.Case.parse(whole) == expected
    assert str(expected) == whole
    for text in ("1x64Mi", "1x64Mi-float33-kept", "1x4-float32-old", "ax4-float32-kept", "2x2-load-kept"):
        with pytest.raises(ValueError, match="expected TENSORSxELEMENTS"):
            cpu_cases.Case.parse(text)


def test_the_suite_has_the_shapes_that_matter():
    main = [c for c in cpu_cases.CASES if not c.sweep and c.groups == 1]
    sizes = {(1, 64 << 20), (300, 100_000), (1000, 1000)}
    assert {(c.tensors, c.elements) for c in main if c.rule == "sgdw"} == sizes
    assert {(c.tensors, c.elements) for c in main} == sizes | {(2000, 4096), (2000, 256), (100, 1000)}
    assert {(c.tensors, c.elements) for c in main if c.threads == 1} == sizes
    assert {c.dtype for c in main} == {F32, BF16, F16, F64}
    assert {c.rule for c in main if c.gradients == "new"} == {"adamw", "sgdw"}
    assert {c.lr for c in cpu_cases.CASES if c.groups == 465} == {"constant", "changing"}
    sweeps = {name: [c for c in cpu_cases.CASES if c.sweep == name] for name in cpu_cases.SWEEPS}
    assert [(c.tensors, c.tensors * c.elements) for c in sweeps["tensors"]] == [(10**k, 10**6) for k in range(5)]
    assert [(c.tensors, c.elements) for c in sweeps["elements"]] == [(1, 10**k) for k in range(3, 10)]
    assert [(c.groups, c.tensors, c.elements) for c in sweeps["groups"]] == [(10**k, 1000, 1000) for k in range(4)]


def test_who_steps_a_case():
    def names(text: str) -> list[str]:
        return [name for name, _ in cpu_cases.Case.parse(text).contenders(["wd_kernels", "torch fused", "slow"])]

    ends = ["bare loop", "ceiling"]
    assert names("2x200000-float32-new") == ["wd_kernels", "torch fused", "slow", *ends]
    assert names("2x200000-float32-kept") == ["wd_kernels", *FLAT, "torch fused", "slow", *ends]
    assert cpu_cases.REFERENCE in names("2x50000-float32-new")
    assert cpu_cases.REFERENCE not in names("2x50001-float32-new")
    timed = "wd_kernels, launches timed"
    assert names("1x1000-float32-kept-by-elements") == ["wd_kernels", timed, "torch fused", *ends]
    many = cpu_cases.Case(4, 3, groups=2, lr="changing").contenders(["wd_kernels", "slow"])
    assert [pair for pair in many if pair[0] != cpu_cases.FLAT] == [
        *(("wd_kernels", 1), ("slow", 1), ("wd_kernels", 2), ("slow", 2), ("ceiling", 1))
    ]


def test_flat_takes_part_where_gradients_stay(monkeypatch):
    monkeypatch.setattr(wd_kernels, "flatten_", lambda params: params, raising=False)
    assert (cpu_cases.FLAT, 1) in cpu_cases.Case(2, 3).contenders(["wd_kernels"])
    assert (cpu_cases.FLAT, 1) not in cpu_cases.Case(1, 3).contenders(["wd_kernels"])  # one tensor is flat
    assert (cpu_cases.FLAT, 1) not in cpu_cases.Case(2, 3, gradients="new").contenders(["wd_kernels"])
    monkeypatch.delattr(wd_kernels, "flatten_")
    assert (cpu_cases.FLAT, 1) not in cpu_cases.Case(2, 3).contenders(["wd_kernels"])


# Contenders -----------------------------------------------------------------------------------------------------------


def parameters(contender: contenders.Contender) -> list[Any]:
    """In the order in which they were made."""
    groups = contender.step.__self__.param_groups
    rows = [group["params"] for group in groups]
    return [rows[i % len(rows)][i // len(rows)] for i in range(sum(map(len, rows)))]


@pytest.mark.parametrize(
    "text",
    [
        "5x17-float32-kept",
        "5x17-bfloat16-new",
        "5x17-float64-kept-1thread",
        "5x17-float32-new-sgdw",
        "6x9-float32-kept-3groups-changing",
    ],
)
def test_contenders_step_the_same_memory_and_agree(text):
    case = cpu_cases.Case.parse(text)
    them = [
        c
        for c in built(case)
        if c.name not in (cpu_cases.BARE_LOOP, cpu_cases.CEILING, cpu_cases.REFERENCE, cpu_cases.FLAT)
    ]
    assert {c.name for c in them} == set(HERE)
    start = [p.detach().clone() for p in parameters(them[0])]
    addresses = [p.data_ptr() for p in parameters(them[0])]
    after = []
    for contender in them:
        optimizer = contender.step.__self__
        params = parameters(contender)
        assert [p.data_ptr() for p in params] == addresses
        with torch.no_grad():
            for p, value in zip(params, start, strict=True):
                p.copy_(value)
                for state in optimizer.state[p].values():
                    if isinstance(state, torch.Tensor) and state.shape == p.shape:
                        state.zero_()
        contender.prepare()
        before = [p.grad.data_ptr() for p in params]
        contender.step()
        contender.prepare()
        assert all((p.grad.data_ptr() != a) == (case.gradients == "new") for p, a in zip(params, before, strict=True))
        contender.step()
        assert all((p != value).any() for p, value in zip(params, start, strict=True))
        assert len(optimizer.param_groups) == contender.groups
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        assert len(rates) == (contender.groups if case.lr == "changing" else 1)
        after.append(torch.stack([p.detach().clone() for p in params]))
    for contender, other in zip(them[1:], after[1:], strict=True):
        coupled = case.rule == "sgdw"  # torch's SGD decays through its momentum
        tolerance = 2e-2 if case.dtype == BF16 else 1e-3 if coupled else 1e-4
        torch.testing.assert_close(other, after[0], rtol=tolerance, atol=2e-5, msg=contender.name)


def test_plain_states_are_shared_and_other_peers_have_their_own():
    them = [c for c in built(cpu_cases.Case(2, 64)) if c.name in HERE]
    states = []
    for contender in them:
        (p, _) = contender.step.__self__.param_groups[0]["params"]
        own = contender.step.__self__.state[p]
        states.append((own["exp_avg"].data_ptr(), own["exp_avg_sq"].data_ptr()))
        assert float(own["step"]) == 2
    assert len(set(states)) == 1
    half = [c for c in built(cpu_cases.Case(1, 64, BF16)) if c.name in HERE]
    kept = {c.step.__self__.state[parameters(c)[0]]["exp_avg"].dtype for c in half}
    assert kept == {F32, BF16}  # ours and torch's: each rule's own


def end_to_end(params: list[Any]) -> None:
    """Parameters and zero gradients in one buffer each, in the place of a `flatten_` that is not there yet."""
    every = [p for one in params for p in (one["params"] if isinstance(one, dict) else [one])]
    data = torch.cat([p.detach().flatten() for p in every])
    for p, values, grad in zip(
        every, data.split(len(every[0])), torch.zeros_like(data).split(len(every[0])), strict=True
    ):
        p.data, p.grad = values, grad


@pytest.mark.parametrize("text", ["3x32-float32-kept", "4x32-float32-kept-2groups-changing", "4x32-float32-kept-sgdw"])
def test_flat_parameters_are_stepped_alike(text, monkeypatch):
    if not FLAT:
        monkeypatch.setattr(wd_kernels, "flatten_", end_to_end, raising=False)
    case = cpu_cases.Case.parse(text)
    assert (cpu_cases.FLAT, case.groups) in case.contenders(HERE)
    (flat,), skipped = contenders.build(case, loaded(), [(cpu_cases.FLAT, case.groups)])  # after a step
    assert not skipped
    params = parameters(flat)
    places = sorted(p.data_ptr() for p in params)
    assert [b - a for a, b in itertools.pairwise(places)] == [32 * 4] * (len(params) - 1)
    grads = [p.grad for p in params]
    turns.turn(flat, 1)
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))

    ordinary = contenders.Tensors.of(case)
    peer, cls = next((peer, cls) for peer, cls in loaded(["wd_kernels"]).items() if peer.rule == case.rule)
    optimizer = peer.make(cls, [{"params": ordinary.params[i :: case.groups]} for i in range(case.groups)])
    prepare = ordinary.between(case, optimizer)
    for _ in range(2):
        prepare()
        optimizer.step()
    for p, q in zip(params, ordinary.params, strict=True):
        assert torch.equal(p.grad, q.grad)
        assert torch.equal(p, q)


def test_the_bare_loop_and_the_ceiling_move_every_element():
    *_, bare, stream = built(cpu_cases.Case(3, 11))
    assert (bare.name, stream.name) == (cpu_cases.BARE_LOOP, cpu_cases.CEILING)
    (optimizer,) = bare.step.__defaults__
    (p,) = optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    stream.step()
    assert torch.equal(p, before)
    turns.turn(bare, 1)
    assert p.numel() == 33
    assert (p != before).all()
    assert stream.step.__defaults__[0][0].data_ptr() == p.data_ptr()


def test_launches_are_timed_apart():
    case = cpu_cases.Case(40, 50, sweep="tensors")
    them = {c.name: c for c in built(case)}
    assert {"wd_kernels", "wd_kernels, launches timed", "torch fused", "bare loop", "ceiling"} <= them.keys()
    plain, timed = them["wd_kernels"], them["wd_kernels, launches timed"]
    assert plain.inside is None
    total, inside = turns.turn(timed, 20)
    assert 0 < inside < total
    assert turns.turn(plain, 1)[1] == 0


def test_who_cannot_step_is_left_out_with_the_reason():
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise NotImplementedError("a GPU is needed\nat least")

    peer = peers.Peer("broken", "adamw", "", byte_model.kahan_states, devices=("cpu",))
    case = cpu_cases.Case(2, 8)
    names = case.contenders(["wd_kernels", "broken"])
    measured, skipped = turns.measure(case, loaded(["wd_kernels"]) | {peer: Broken}, names, 0.01)
    assert skipped == {"broken": "NotImplementedError: a GPU is needed"}
    assert "broken" not in {m.contender for m in measured}


# The ceiling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "states"), [((4, 4, 4), 2), ((2, 2, 4), 1), ((2, 2, 2), 3), ((8, 8, 8), 0)])
def test_the_stream_reads_and_writes_what_it_says(widths, states):
    """With another constant than 0, as numpy computes it."""
    assert ceiling.why_not() is None
    function, _ = ceiling._library()
    generator = np.random.default_rng(0)
    types = [np.dtype(f"u{width}") for width in widths]
    n, mask = 1001, 0x5A5A
    p, g = (generator.integers(0, 2**16, n).astype(t) for t in types[:2])
    own = [generator.integers(0, 2**16, n).astype(types[2]) for _ in range(states)]
    expected = [p ^ (g & p.dtype.type(mask)), *(s ^ s.dtype.type(mask) for s in own)]
    unread = g.copy()
    addresses = (ctypes.c_void_p * 3)(*(s.ctypes.data for s in own), *([None] * (3 - states)))
    at = ctypes.c_void_p(p.ctypes.data), ctypes.c_void_p(g.ctypes.data)
    assert function(*widths, states, *at, addresses, ctypes.c_int64(n), mask, 2) == 0
    for found, right in zip([p, *own], expected, strict=True):
        np.testing.assert_array_equal(found, right)
    np.testing.assert_array_equal(g, unread)
    assert function(4, 8, 2, states, *at, addresses, ctypes.c_int64(n), 0, 1) == 1  # no such mix


def test_without_a_compiler_there_is_no_ceiling_and_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr(ceiling, "_library", ceiling._library.__wrapped__)
    assert "/no/such/compiler" in str(ceiling.why_not())
    case = cpu_cases.Case(2, 8)
    measured, skipped = turns.measure(case, loaded(), case.contenders(HERE), 0.01)
    assert skipped.keys() == {cpu_cases.CEILING}
    assert len(measured) == len(case.contenders(HERE)) - 1


# Turns ----------------------------------------------------------------------------------------------------------------


def test_turns_are_measured_in_rounds():
    case = cpu_cases.Case(2, 8, threads=1)
    had = torch.get_num_threads()
    ticks = []
    names = case.contenders(HERE)
    measured, skipped = turns.measure(case, loaded(), names, 0.02, lambda: ticks.append(torch.get_num_threads()))
    assert not skipped
    assert turns.LEAST_ROUNDS <= len(ticks) <= turns.ROUNDS
    assert set(ticks) == {1}
    assert torch.get_num_threads() == had
    assert [(m.contender, m.groups) for m in measured] == names
    for one in measured:
        assert turns.LEAST_ROUNDS <= len(one.seconds) <= len(ticks)
        assert one.steps >= 1
        assert all(s > 0 for s in one.seconds)


def test_long_steps_have_fewer_rounds():
    assert turns.plan(0.001, 1.0) == (15, 50)
    assert turns.plan(0.01, 1.0) == (15, 7)
    assert turns.plan(0.2, 1.0) == (5, 1)
    assert turns.plan(9.0, 1.0) == (turns.LEAST_ROUNDS, 1)


def test_a_first_step_that_is_slow_does_not_make_turns_short(monkeypatch):
    """Making the others may have put a contender's table out of date: one slow step, and no more."""
    durations = itertools.chain([0.05], itertools.repeat(1e-5))
    one = contenders.Contender("one", 1, 28, lambda: None, lambda: time.sleep(next(durations)))
    monkeypatch.setattr(turns, "build", lambda *args: ([one], {}))
    (measured,), _ = turns.measure(cpu_cases.Case(1, 8), {}, [("one", 1)], 0.02)
    assert len(measured.seconds) == turns.ROUNDS
    assert measured.steps > 1


def test_a_case_that_memory_does_not_hold_is_left_out(monkeypatch):
    case = cpu_cases.Case(1, 10**9, sweep="elements")
    assert case.bytes_needed == 16 * 10**9
    monkeypatch.setattr(turns, "free_memory", lambda: 15 << 30)
    measured, skipped = turns.measure(case, {}, [("wd_kernels", 1), ("torch fused", 1)], 1.0)
    assert not measured
    assert skipped == dict.fromkeys(("wd_kernels", "torch fused"), "needs 14.9 GiB, free are 15")


# As users run them ----------------------------------------------------------------------------------------------------


def test_one_tiny_case_from_end_to_end(tmp_path):
    path = tmp_path / "bench.json"
    tiny, point = "6x40-float32-new", "10x4-float32-kept-by-tensors"
    options = ("--seconds=0.1", "--case", tiny, "--case", point, "--contender=wd_kernels", "--contender=torch fused")
    run("-m", "pytest", "bench", "-p", "no:cacheprovider", f"--benchmark-json={path}", *options)
    report = json.loads(path.read_text())
    assert [(e["group"], e["extra_info"]["contender"]) for e in report["benchmarks"]] == [
        (case, name) for case in (tiny, point) for name in ("wd_kernels", "torch fused", "ceiling")
    ]
    assert all(len(e["stats"]["data"]) >= turns.LEAST_ROUNDS for e in report["benchmarks"])
    assert report["machine_info"]["node"] == ""
    assert report["missing"]["flashoptim FlashAdamW"] == "it steps GPU tensors only"
    assert report["left_out"] == {}
    text = run("bench/report.py", str(path))
    for part in (f"torch            {torch.__version__}", "6 x 40   AdamW  float32  new", "x ours"):
        assert part in text


def test_the_demo_trains_both_and_draws(tmp_path):
    path = tmp_path / "demo.png"
    text = run("bench/demo.py", "--epochs", "1", "--out", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in text.splitlines() if line.startswith(("torch fused ", "wd_kernels "))]
    assert len(rows) == 2
    assert all(float(word) > 0 for row in rows for word in row[-2:-1])
    assert "largest difference of two weights:" in text
