"""The benchmarks' byte model, cases, peers, contenders, ceiling and turns, the suite as it is run, and the demo."""

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
import contenders
import numpy as np
import peers
import pytest
import torch
import turns
import workloads
from peers import FLAT
from workloads import Case

import wd_kernels

ROOT = Path(__file__).parent.parent
F32, BF16, F16, F64, CPU = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.device("cpu")
HERE = ["wd_kernels", "torch fused", "torch foreach", "torch for-loop"]
FLOORS = (workloads.BARE_LOOP, workloads.CEILING, workloads.REFERENCE)


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


def who(case: Case, names: list[str] = HERE) -> list[tuple[str, int]]:
    return case.stepping([peer for peer in peers.on("cpu") if peer.name in names])


def built(case: Case) -> list[contenders.Contender]:
    them, skipped = contenders.build(case, loaded(), who(case), CPU)
    assert not skipped
    return them


def measured(case: Case, names: list[Any], seconds: float, there: Any = None, **more: Any) -> Any:
    return turns.measure(case, loaded() if there is None else there, names, seconds, turns.Timer(CPU), **more)


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
        ("float32", BF16, 10, 8),
        ("own dtype", F64, 10, 16),
        ("float32 or wider", F16, 10, 8),
        ("float32 or wider", F64, 10, 16),
        ("compensated", BF16, 10, 6),
        ("compensated", F32, 10, 8),
        ("8 bits or own dtype", F32, 4096, 2 * (1 + 4 / 256)),
        ("8 bits or own dtype", F32, 4095, 8),
        ("8 bits or own dtype", BF16, 4097, 4),
        ("8 bits or float32", BF16, 4095, 8),
        ("8 bits or float32", F32, 5000, 2 * (1 + 4 * 20 / 5000)),
    ],
)
def test_bytes_of_the_states_of_a_parameter(states, param, numel, expected):
    assert byte_model.STATE_FORMATS[states](2, param.itemsize, numel) == pytest.approx(expected)


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


def test_a_case_is_what_its_text_says():
    assert len(set(workloads.CASES)) == len(workloads.CASES) == 44
    assert [str(Case(text)) for text in workloads.CASES] == list(workloads.CASES)
    case = Case("1000x10-float16-new-sgdw-1thread-10groups-changing-by-groups")
    assert (case.shapes, case.elements, case.dtype, case.grad) == (((10,),) * 1000, 10_000, F16, F16)
    assert (case.gradients, case.rule, case.threads, case.groups) == ("new", "sgdw", 1, 10)
    assert (case.lr, case.sweep, case.mixed) == ("changing", "groups", False)
    assert Case("1x64Mi-bfloat16-kept").elements == 64 << 20
    case = Case("llama3_8b:2-float32+bfloat16-kept")
    assert (case.model, case.shapes, case.dtype, case.grad) == ("llama3_8b", workloads.llama(2), F32, BF16)
    assert (case.rule, case.threads, case.groups, case.lr, case.sweep, case.mixed) == (
        "adamw",
        0,
        1,
        "constant",
        "",
        True,
    )
    for text in (
        "1x64Mi",
        "1x64Mi-float33-kept",
        "1x4-float32-old",
        "ax4-float32-kept",
        "2x2-load-kept",
        "gpt-float32-kept",
    ):
        with pytest.raises(ValueError, match="expected TENSORSxELEMENTS"):
            Case(text)


def sizes(cases: list[Case]) -> set[tuple[int, int]]:
    """(tensors, elements of each)."""
    return {(len(c.shapes), c.elements // len(c.shapes)) for c in cases}


def test_the_suite_has_the_shapes_that_matter():
    every = list(map(Case, workloads.CASES))
    main = [c for c in every if not c.sweep and c.groups == 1]
    expected = {(1, 64 << 20), (300, 100_000), (1000, 1000)}
    assert sizes([c for c in main if c.rule == "sgdw"]) == expected
    assert sizes(main) == expected | {(2000, 4096), (2000, 256), (100, 1000)}
    assert sizes([c for c in main if c.threads == 1]) == expected
    assert {c.dtype for c in main} == {F32, BF16, F16, F64}
    assert {c.rule for c in main if c.gradients == "new"} == set(peers.RULES)
    assert {c.lr for c in every if c.groups == 465} == {"constant", "changing"}
    sweeps = {name: [c for c in every if c.sweep == name] for name in workloads.SWEEPS}
    assert [(len(c.shapes), c.elements) for c in sweeps["tensors"]] == [(10**k, 10**6) for k in range(5)]
    assert [(len(c.shapes), c.elements) for c in sweeps["elements"]] == [(1, 10**k) for k in range(3, 10)]
    assert [(c.groups, c.size) for c in sweeps["groups"]] == [(10**k, "1000x1000") for k in range(4)]
    assert set(workloads.LEAD) < set(workloads.CASES)


def test_who_steps_a_case():
    def names(text: str, **more: Any) -> list[str]:
        return [name for name, _ in who(Case(text, **more), ["wd_kernels", "torch fused", "torch foreach"])]

    ends, three = ["bare loop", "ceiling"], ["wd_kernels", "torch fused", "torch foreach"]
    assert names("2x200000-float32-new") == [*three, *ends]
    assert names("2x200000-float32-kept") == ["wd_kernels", FLAT, *three[1:], *ends]
    assert workloads.REFERENCE in names("2x50000-float32-new")
    assert workloads.REFERENCE not in names("2x50001-float32-new")
    timed = "wd_kernels, launches timed"
    assert names("1x1000-float32-kept-by-elements") == ["wd_kernels", timed, "torch fused", *ends]
    assert who(Case("4x3-float32-kept-2groups-changing"), ["wd_kernels", "torch foreach"]) == [
        *((name, groups) for groups in (1, 2) for name in ("wd_kernels", FLAT, "torch foreach")),
        ("ceiling", 1),
    ]
    assert names("gpt2-float32-kept", only=("wd_kernels",)) == ["wd_kernels", *ends]
    with_deepspeed = [*HERE, "DeepSpeed CPU"]
    assert ("DeepSpeed CPU", 1) in who(Case("4x3-bfloat16-kept"), with_deepspeed)
    assert ("DeepSpeed CPU", 1) not in who(Case("4x3-float64-kept"), with_deepspeed)
    assert ("DeepSpeed CPU", 1) not in who(Case("4x3-float32-kept-sgdw"), with_deepspeed)


def test_flat_takes_part_where_gradients_stay():
    assert (FLAT, 1) in who(Case("2x3-float32-kept"))
    assert (FLAT, 1) not in who(Case("1x3-float32-kept"))  # one tensor is flat
    assert (FLAT, 1) not in who(Case("2x3-float32-new"))
    assert (FLAT, 1) not in who(Case("2x3-float32+bfloat16-kept"))


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [
        (workloads.gpt2(), 148, 124_439_808),
        (workloads.gpt2(24, 1024), 292, 354_823_168),  # GPT-2 medium
        (workloads.vit(), 296, 304_326_632),
        (workloads.vit(12, 768), 152, 86_567_656),  # ViT-B/16
        (workloads.llama(), 291, 8_030_261_248),
        (workloads.llama(80, 8192, 28672, 64), 723, 70_553_706_496),  # Llama 3 70B
        (workloads.lora(), 448, 39_976_960),
    ],
)
def test_shapes_have_the_published_totals(shapes, tensors, elements):
    assert len(shapes) == tensors
    assert workloads.elements(shapes) == elements


def test_llama_is_cut_to_what_fits():
    whole = workloads.elements(workloads.llama())
    assert workloads.fitting_layers(16 * whole, 16) == 32
    assert workloads.fitting_layers(16 * whole - 1, 16) == 31
    assert workloads.fitting_layers(10**6, 16) == 0
    case = workloads.gpu_cases(40 << 30)[-1]
    layers = int(case.size.removeprefix("llama3_8b:"))
    assert 1 <= layers < 32
    assert case.elements * 16 <= 0.92 * (40 << 30) < workloads.elements(workloads.llama(layers + 1)) * 16
    assert case.only == ("wd_kernels", "torch fused")


def test_the_cases_of_a_gpu_are_those_that_matter():
    full = workloads.gpu_cases(138 << 30)
    assert len(set(map(str, full))) == len(full)
    assert max(Case(text).elements for text in workloads.SMALL) == 10**5
    named = full[: len(workloads.TARGETS)]
    assert list(map(str, named)) == list(workloads.TARGETS)
    assert all(case.shapes == ((10**9,),) for case in named)
    half = {("adamw", BF16, BF16), ("sgdw", BF16, BF16), ("adamw", F32, BF16)}
    least = {(c.rule, c.dtype, c.grad): workloads.TARGETS[str(c)] for c in named}
    assert least == dict.fromkeys(half, 88) | {("adamw", F32, F32): 92, ("sgdw", F32, F32): 92}
    for size, tensors in (("10000x1000", 10_000), ("gpt2", 148), ("vit_l16", 296), ("lora_7b", 448)):
        own = [case for case in full if case.size == size]
        assert [(len(case.shapes), case.gradients) for case in own] == [(tensors, "kept"), (tensors, "new")]
    (groups,) = (case for case in full if case.groups > 1)
    assert (groups.groups, groups.shapes) == (465, ((256,),) * 465)
    assert full[-1].elements == 8_030_261_248  # all of it fits into the largest memory
    assert set(workloads.MANY) < set(map(str, full))


@pytest.mark.parametrize(
    ("name", "rule", "param", "grad", "expected"),
    [
        ("wd_kernels", "adamw", F32, F32, 28),
        ("wd_kernels", "adamw", BF16, BF16, 22),
        ("wd_kernels", "adamw", F32, BF16, 26),
        ("wd_kernels", "sgdw", F32, F32, 20),
        ("wd_kernels", "sgdw", BF16, BF16, 14),
        ("torch fused", "adamw", F32, BF16, 28),  # takes no such gradients: has float32 ones
        ("torch fused", "adamw", BF16, BF16, 14),
        ("torch foreach", "sgdw", BF16, BF16, 10),
        ("apex", "adamw", BF16, BF16, 22),
        ("torch-optimi", "adamw", BF16, BF16, 18),
        ("bitsandbytes 8-bit", "adamw", F32, F32, 12 + 4 * (1 + 1 / 64)),
        ("flashoptim", "adamw", BF16, BF16, 12.25),
        ("flashoptim", "adamw", F32, F32, 16.25),
    ],
)
def test_bytes_of_the_peers(name, rule, param, grad, expected):
    (peer,) = (p for p in peers.PEERS if (p.name, p.rule) == (name, rule))
    assert peer.bytes_per_parameter(param, grad) == expected


def test_bytes_agree_with_the_byte_model():
    for peer in peers.PEERS:
        for dtype in (F32, BF16):
            if peer.name.startswith("wd_kernels"):
                assert peer.bytes_per_parameter(dtype, dtype) == byte_model.step_bytes(peer.rule, dtype, dtype, F32)
            elif peer.name.startswith("torch f"):
                assert peer.bytes_per_parameter(dtype, dtype) == byte_model.step_bytes(peer.rule, dtype, dtype, dtype)


def test_missing_peers_are_named_with_their_error():
    absent = peers.Peer("someone", "adamw", "no_such_package.optim:FusedAdam", "float32")
    changed = peers.Peer("other", "adamw", "torch.optim:NoSuchAdam", "float32")
    there, missing = peers.load([absent, changed, peers.PEERS[0]])
    assert there == {peers.PEERS[0]: wd_kernels.AdamW}
    assert missing["someone FusedAdam"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert "NoSuchAdam" in missing["other NoSuchAdam"]


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
    case = Case(text)
    them = [c for c in built(case) if c.name not in (*FLOORS, FLAT)]
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
        prepare = contender.prepare or (lambda: None)
        prepare()
        before = [p.grad.data_ptr() for p in params]
        contender.step()
        prepare()
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
    them = [c for c in built(Case("2x64-float32-kept")) if c.name in HERE]
    states = []
    for contender in them:
        (p, _) = contender.step.__self__.param_groups[0]["params"]
        own = contender.step.__self__.state[p]
        states.append((own["exp_avg"].data_ptr(), own["exp_avg_sq"].data_ptr()))
        assert float(own["step"]) == 2
    assert len(set(states)) == 1
    half = [c for c in built(Case("1x64-bfloat16-kept")) if c.name in HERE]
    kept = {c.step.__self__.state[parameters(c)[0]]["exp_avg"].dtype for c in half}
    assert kept == {F32, BF16}  # ours and torch's: each rule's own


@pytest.mark.parametrize("rule", list(peers.RULES))
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float32+bfloat16"])
def test_contenders_of_a_model_share_tensors_and_move_what_the_byte_model_says(rule, dtypes, monkeypatch):
    """Those that take no gradients of another dtype have a set with the parameters' dtype."""
    monkeypatch.setitem(workloads.MODELS, "gpt2", lambda: ((64,), (3, 32)))
    case = Case(f"gpt2-{dtypes}-kept-{rule}")
    shared: dict[torch.dtype, set[tuple[int, ...]]] = {}
    for contender in (c for c in built(case) if c.name not in FLOORS):
        optimizer: Any = contender.step.__self__
        params = optimizer.param_groups[0]["params"]
        of_grad = case.grad if contender.name in ("wd_kernels", FLAT) else case.dtype
        assert {p.grad.dtype for p in params} == {of_grad}
        places = tuple(p.data_ptr() for p in params)
        if contender.name == FLAT:  # on tensors of its own
            assert places not in shared[of_grad]
        else:
            shared.setdefault(of_grad, set()).add(places)
        states = [s for p in params for s in optimizer.state[p].values() if torch.is_tensor(s) and s.dim()]
        moved = sum(2 * p.nbytes + p.grad.nbytes for p in params) + 2 * sum(s.nbytes for s in states)
        assert moved == contender.bytes_per_parameter * 160, contender.name
    assert all(len(places) == 1 for places in shared.values())
    assert len(shared) == (2 if case.mixed else 1)


@pytest.mark.parametrize("text", ["3x32-float32-kept", "4x32-float32-kept-2groups-changing", "4x32-float32-kept-sgdw"])
def test_flat_parameters_are_stepped_alike(text):
    case = Case(text)
    assert (FLAT, case.groups) in who(case)
    (flat,), skipped = contenders.build(case, loaded(), [(FLAT, case.groups)], CPU)  # after a step
    assert not skipped
    params = parameters(flat)
    places = sorted(p.data_ptr() for p in params)
    assert [b - a for a, b in itertools.pairwise(places)] == [32 * 4] * (len(params) - 1)
    grads = [p.grad for p in params]
    turns.Timer(CPU).wall(flat, 1)
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))

    ordinary = contenders.Tensors.of(case, case.dtype, CPU)
    peer, cls = next((peer, cls) for peer, cls in loaded(["wd_kernels"]).items() if peer.rule == case.rule)
    optimizer = peer.make(cls, [{"params": ordinary.params[i :: case.groups]} for i in range(case.groups)])
    prepare = ordinary.between(case, optimizer) or (lambda: None)
    for _ in range(2):
        prepare()
        optimizer.step()
    for p, q in zip(params, ordinary.params, strict=True):
        assert torch.equal(p.grad, q.grad)
        assert torch.equal(p, q)


def test_the_bare_loop_and_the_ceiling_move_every_element():
    *_, bare, stream = built(Case("3x11-float32-kept"))
    assert (bare.name, stream.name) == (workloads.BARE_LOOP, workloads.CEILING)
    (optimizer,) = bare.step.__defaults__
    (p,) = optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    stream.step()
    assert torch.equal(p, before)
    turns.Timer(CPU).wall(bare, 1)
    assert p.numel() == 33
    assert (p != before).all()
    assert stream.step.__defaults__[0][0].data_ptr() == p.data_ptr()


def test_launches_are_timed_apart():
    case = Case("40x50-float32-kept-by-tensors")
    them = {c.name: c for c in built(case)}
    assert {"wd_kernels", "wd_kernels, launches timed", "torch fused", "bare loop", "ceiling"} <= them.keys()
    plain, timed = them["wd_kernels"], them["wd_kernels, launches timed"]
    assert plain.inside is None
    turn = turns.Timer(CPU).turn(timed, 20)
    assert 0 < turn["launches"] < turn["wall"]
    assert turns.Timer(CPU).turn(plain, 1).keys() == {"wall"}


class Broken(torch.optim.SGD):
    """Fails in the step of this number."""

    fails_in = 1

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == self.fails_in:
            raise torch.OutOfMemoryError("no memory\nis left")
        return super().step(closure)


class BrokenLater(Broken):
    fails_in = 5


def test_who_cannot_step_is_left_out_with_the_reason():
    there = loaded(["wd_kernels"])
    for cls in (Broken, BrokenLater):
        there[peers.Peer(cls.__name__, "adamw", "", "compensated", devices=("cpu",))] = cls
    case = Case("2x8-float32-kept")
    entries, skipped = measured(case, case.stepping(list(there)), 0.01, there)
    assert skipped == dict.fromkeys(("Broken", "BrokenLater"), "OutOfMemoryError: no memory")
    them = {e["extra_info"]["contender"]: e for e in entries}
    assert not skipped.keys() & them.keys()
    assert {"wd_kernels", FLAT, *FLOORS} == them.keys()
    json.dumps(entries)


# The ceiling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("widths", "states"), [((4, 4, 4), 2), ((2, 2, 4), 1), ((2, 2, 2), 3), ((8, 8, 8), 0)])
def test_the_stream_reads_and_writes_what_it_says(widths, states):
    """With another constant than 0, as numpy computes it."""
    function = contenders.library()
    assert not isinstance(function, str), function
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
    monkeypatch.setattr(contenders, "library", contenders.library.__wrapped__)
    assert "/no/such/compiler" in str(contenders.library())
    case = Case("2x8-float32-kept")
    entries, skipped = measured(case, who(case), 0.01)
    assert skipped.keys() == {workloads.CEILING}
    assert len(entries) == len(who(case)) - 1


# Turns ----------------------------------------------------------------------------------------------------------------


def test_turns_are_measured_in_rounds(monkeypatch):
    case = Case("2x8-float32-kept-1thread")
    had, seen = torch.get_num_threads(), set()
    turn = turns.Timer.turn
    monkeypatch.setattr(turns.Timer, "turn", lambda *args: seen.add(torch.get_num_threads()) or turn(*args))
    names = who(case)
    entries, skipped = measured(case, names, 0.02)
    assert not skipped
    assert seen == {1}
    assert torch.get_num_threads() == had
    assert [(e["extra_info"]["contender"], e["extra_info"]["groups"]) for e in entries] == names
    for one in entries:
        assert one["group"] == str(case)
        assert turns.LEAST_ROUNDS <= len(one["stats"]["data"]) <= turns.ROUNDS
        assert one["extra_info"]["steps_per_round"] >= 1
        assert all(s > 0 for s in one["stats"]["data"])


def test_every_way_has_the_same_rounds():
    timer = turns.Timer(CPU, ("device", "wall", "host"))
    entries, _ = turns.measure(Case("2x8-float32-kept"), loaded(), [("wd_kernels", 1), ("torch fused", 1)], 0.02, timer)
    for one in entries:
        counts = {len(own) for own in (one["stats"]["data"], one["extra_info"]["device"], one["extra_info"]["host"])}
        assert len(counts) == 1
        assert min(one["extra_info"]["device"]) > 0


def test_long_steps_have_fewer_rounds():
    assert turns.plan(0.001, 1.0) == (15, 50)
    assert turns.plan(0.01, 1.0) == (15, 7)
    assert turns.plan(0.2, 1.0) == (5, 1)
    assert turns.plan(9.0, 1.0) == (turns.LEAST_ROUNDS, 1)


def test_a_first_step_that_is_slow_does_not_make_turns_short(monkeypatch):
    """Making the others may have put a contender's table out of date: one slow step, and no more."""
    durations = itertools.chain([0.05], itertools.repeat(1e-5))
    one = contenders.Contender("one", 1, 28, lambda: time.sleep(next(durations)))
    monkeypatch.setattr(turns, "build", lambda *args: ([one], {}))
    (entry,), _ = measured(Case("1x8-float32-kept"), [("one", 1)], 0.05, {})
    assert len(entry["stats"]["data"]) == turns.ROUNDS
    assert entry["extra_info"]["steps_per_round"] > 1


def test_a_case_that_memory_does_not_hold_is_left_out(monkeypatch):
    case = Case("1x1000000000-float32-kept-by-elements")
    assert case.bytes_needed == 16 * 10**9
    monkeypatch.setattr(turns, "free_memory", lambda: 15 << 30)
    entries, skipped = measured(case, [("wd_kernels", 1), ("torch fused", 1)], 1.0, {})
    assert not entries
    assert skipped == dict.fromkeys(("wd_kernels", "torch fused"), "needs 14.9 GiB, free are 15")


def test_turns_on_a_device_are_timed_by_events_behind_a_hold(monkeypatch):
    """A device that notes what it is given: events of step n lie n ms apart."""
    log: list[str] = []

    class Event:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            Event.made += 1
            self.number = Event.made

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert log[-1] == "wait"
            assert end.number == self.number + 1
            return end.number / 2

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"hold {cycles / turns.CLOCK:.4f}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    timer = turns.Timer(CPU, flush=0)
    timer.on_device = True
    timer.buffer = torch.ones(4)
    contender = contenders.Contender("one", 1, 28, lambda: log.append("step"), lambda: log.append("new"), host=0.002)
    assert timer.device(contender, 3) == pytest.approx((1 + 2 + 3) / 3 * 1e-3)
    assert log == ["new", "wait", "hold 0.0031", "event", "step", "event"] * 3 + ["wait"]
    assert not timer.buffer.any()  # flushed

    log.clear()
    timer.wall(contender, 2)
    assert log == ["new", "wait", "step", "wait"] * 2
    log.clear()
    contender.prepare = None
    timer.wall(contender, 3)
    assert log == ["wait", "step", "step", "step", "wait"]
    log.clear()
    timer.host(contender, 2)
    assert log == ["wait", "step", "wait", "step", "wait"]


# As users run them ----------------------------------------------------------------------------------------------------


def test_one_tiny_case_from_end_to_end(tmp_path):
    path = tmp_path / "bench.json"
    tiny, point = "6x40-float32-new", "10x4-float32-kept-by-tensors"
    options = ("--seconds=0.1", "--case", tiny, "--case", point, "--contender=wd_kernels", "--contender=torch fused")
    run("-m", "pytest", "bench", "-p", "no:cacheprovider", "--benchmark-quiet", f"--benchmark-json={path}", *options)
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


def test_the_demo_trains_both():
    text = run("bench/demo.py", "--epochs", "1")
    rows = [line.split() for line in text.splitlines() if line.startswith(("torch fused ", "wd_kernels "))]
    assert len(rows) == 2
    assert all(float(word) > 0 for row in rows for word in row[-2:-1])
    assert "largest difference of two weights:" in text
