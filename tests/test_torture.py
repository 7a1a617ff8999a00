"""A little of each torture (`torture.py`), and what it found, one by one. At length: `make torture`."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torture
from bits import assert_same_bits, assert_same_optimizers
from torch import Tensor, nn

import wd_kernels
from wd_kernels import AdamW, functional, native
from wd_kernels.table import table as tables

# Exceptions ----------------------------------------------------------------------------------------------------------

PLACES: list[tuple[str, str, bool, bool, int, tuple[int, ...], int]] = [
    ("step", "adamw", True, False, 2, (), 2), ("step", "sgdw", False, True, 2, (1,), 1),
    ("step", "adagradw", True, False, 0, (), 13), ("step", "sgdw", True, False, 0, (1,), 13),
    ("load_state_dict", "adamw", True, False, 2, (), 5), ("flatten_", "adamw", False, False, 1, (), 3),
    ("add_param_group", "sgdw", False, False, 1, (), 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("action", "rule", "mixed", "flat", "steps", "skip", "stride"),
    PLACES,
    ids=[f"{p[0]}-{p[1]}-{p[4]}" for p in PLACES],
)
def test_an_exception_at_any_line(
    action: str, rule: str, mixed: bool, flat: bool, steps: int, skip: tuple[int, ...], stride: int
) -> None:
    """Nothing was done, or all; done again, it is what it would have been."""
    prepare = torture.after_steps(rule, mixed, flat, steps, skip)
    tried, bad = torture.try_everywhere(prepare, torture.ACTIONS[action], torture.injected_at_line, stride=stride)
    assert not bad
    assert tried > 50


@pytest.mark.parametrize("action", ["step", "load_state_dict", "flatten_"])
@pytest.mark.parametrize("rule", ["sgdw", "adamw"])
def test_no_memory_at_any_allocation(action: str, rule: str) -> None:
    prepare = torture.after_steps(rule, action == "load_state_dict", False, 0, ())
    tried, bad = torture.try_everywhere(prepare, torture.ACTIONS[action], torture.injected_at_allocation)
    assert not bad
    assert tried > 1


@pytest.mark.parametrize(("rule", "mixed", "steps"), [("sgdw", True, 0), ("adamw", False, 2)])
def test_no_memory_in_native_code(rule: str, mixed: bool, steps: int) -> None:
    pytest.importorskip("_testcapi")  # some distributions leave Python's own tests out
    prepare = torture.after_steps(rule, mixed, False, steps, ())
    tried, bad = torture.try_everywhere(prepare, torture.step, torture.injected_in_native_code)
    assert not bad
    assert tried > 1


def test_memory_does_not_grow() -> None:
    """Whatever is done over and over."""
    assert torture.apart("all_leaks", "sgdw", 1500) == {"lives": len(torture.LIVES), "bad": 0, "errors": {}}


def test_memory_that_grows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []

    def keeps(subject: torture.Subject, t: int) -> None:
        kept.append([subject, t])
        subject.optimizer.step()

    threads = torch.get_num_threads()
    monkeypatch.setitem(torture.LIVES, "one that keeps lists", keeps)
    try:
        found = torture.leaks("sgdw", "one that keeps lists", 1500)
    finally:
        torch.set_num_threads(threads)
    assert found["bad"] == 1
    assert found["errors"]["objects"] > 1000


def test_under_the_address_sanitizer() -> None:
    """Native code, built anew: steps, exceptions and exchanges; at length, and the thread sanitizer: `make torture`."""
    compiler = os.environ.get("CXX", "c++")
    if (
        shutil.which(compiler) is None
        or "/" not in subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    ):
        pytest.skip("no compiler that comes with the address sanitizer as a library")
    found = torture.sanitized("address,undefined", ("libasan.so", "libubsan.so"), 100)
    assert found == {"steps": 100, "bad": 0}


def test_threads_that_step_at_once() -> None:
    assert torture.together("ours", 2, 9 << 20, 3) == {"steps": 3, "bad": 0}


def test_the_torture_finds_what_is_half_done() -> None:
    """Where the parameters of a step were written and its counts were not, it says so."""

    def half(subject: torture.Subject) -> None:
        kept = {p: float(own["step"]) for p, own in subject.optimizer.state.items()}
        subject.optimizer.step()
        for p, count in kept.items():
            subject.optimizer.state[p]["step"].fill_(count)
        wd_kernels.decay_groups(nn.Linear(1, 1))  # lines of the package to be interrupted at
        for p, count in kept.items():
            subject.optimizer.state[p]["step"].fill_(count + 1)

    _, bad = torture.try_everywhere(
        torture.after_steps("adamw", False, False, 2, ()), half, torture.injected_at_line, stride=5
    )
    assert any("half done: param_groups.py" in where for where in bad)


# Storms --------------------------------------------------------------------------------------------------------------

EVERYTHING = torture.EXCHANGES + " flatten"


@pytest.mark.parametrize(
    ("how", "kinds", "tensors", "elements", "steps"),
    [
        ("signal", EVERYTHING, 20, 300, 300), ("gc", EVERYTHING, 20, 300, 60), ("thread", EVERYTHING, 20, 300, 300),
        ("signal", "data", 20, 300, 800), ("thread", EVERYTHING, 220, 40_000, 12), ("thread", "data", 220, 40_000, 12),
    ],
)  # fmt: skip
def test_what_is_exchanged_during_a_step(how: str, kinds: str, tensors: int, elements: int, steps: int) -> None:
    """Parameters' memory, gradients, states: by a handler, a callback of the collector, another thread."""
    found = torture.apart("storm", "ours", how, kinds, tensors, elements, steps)
    assert found["bad"] == 0, found
    assert found["exchanges"] > 0


@pytest.mark.parametrize(("tensors", "elements"), [(3, 50), (2, 1_000_000)])
def test_a_handler_that_raises(tensors: int, elements: int) -> None:
    found = torture.apart("interrupted", "ours", tensors, elements, 60)
    assert found["bad"] == 0, found
    assert found["raised"] > 20


def test_children_forked_during_a_step() -> None:
    assert torture.apart("forks", "ours", 12) == {"children": 12, "bad": 0}


@pytest.mark.parametrize(("method", "sharing"), [("forkserver", "file_descriptor"), ("spawn", "file_system")])
def test_processes_that_are_given_an_optimizer_with_its_state(method: str, sharing: str) -> None:
    assert torture.apart("started", "ours", method, 2, sharing) == {"children": 2, "bad": 0}


def test_random_lives_between_canaries() -> None:
    """Against float64, with memory around every tensor that nobody may write."""
    found = torture.fuzz(2000)
    assert found["bad"] == 0, found


# One by one ----------------------------------------------------------------------------------------------------------


def stepped(*params: Tensor, **options: Any) -> AdamW:
    opt = AdamW(list(params), **{"lr": 0.1, "weight_decay": 0.1, **options})
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    return opt


def test_the_step_after_an_interrupted_one_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a handler interrupts, no table that is half built is believed."""
    p, q = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))
    opt = stepped(p, q)
    twin = copy.deepcopy(opt)
    q.data = q.data.clone()  # something to inspect

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tables, "expect", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                opt.step()
            assert opt._table.watch is None
    for own, other in zip((p, q), twin.param_groups[0]["params"], strict=True):
        assert own.grad is not None
        other.grad = own.grad.clone()
    for o in (opt, twin):
        o.step()
        o.step()
    assert_same_optimizers(opt, twin)


def test_a_step_within_a_step_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    again: list[Exception] = []

    def schedule(t: int) -> float:
        if t == 1:
            with pytest.raises(RuntimeError) as error:
                opt.step()
            again.append(error.value)
        return 1.0

    opt = stepped(p, schedule=schedule)
    opt.step()
    assert "step() was called within a step of the same optimizer" in str(again[0])
    assert float(opt.state[p]["step"]) == 2


def test_native_code_checks_what_a_table_says() -> None:
    opt = stepped(nn.Parameter(torch.ones(3)))
    watch = opt._table.watch
    assert watch is not None
    watch.expected[0][tables.Expected.FIRST_ROLE], watch.roles[0] = 0, watch.roles[0][:1]
    with pytest.raises(RuntimeError, match="a table's roles do not belong together"):
        opt._table._publish(watch)


@pytest.mark.parametrize("of", ["step", "exp_avg", "parameter"])
@pytest.mark.parametrize("way", ["data", "set_"])
def test_memory_exchanged_under_the_same_tensor(of: str, way: str) -> None:
    """`.data =` and `set_` on a parameter, a state or a step count are seen by the next step."""
    p = nn.Parameter(torch.linspace(-1, 1, 6))
    opt = stepped(p)
    t = p if of == "parameter" else opt.state[p][of]
    value = t.detach().clone() + (5 if of == "step" else 0.25)
    with torch.no_grad():
        if way == "data":
            t.data = value
        else:
            t.set_(value)
    twin = copy.deepcopy(opt)
    q = twin.param_groups[0]["params"][0]
    assert_same_bits(p, q)
    for o, own in ((opt, p), (twin, q)):
        own.grad = torch.full_like(own, 0.5)
        o.step()
    assert_same_optimizers(opt, twin)
    assert float(opt.state[p]["step"]) == (7 if of == "step" else 2)


@pytest.mark.parametrize("of", ["parameter", "gradient", "exp_avg"])
@pytest.mark.parametrize("flat", [False, True])
def test_the_negative_bit_after_a_step(of: str, flat: bool) -> None:
    """A tensor that becomes a negated view of its memory, at the same address: its sign is heeded, or an error."""
    p = nn.Parameter(torch.linspace(-1, 1, 6))
    if flat:
        wd_kernels.flatten_([p])
    opt = stepped(p)
    opt.step()
    assert p.grad is not None
    t = {"parameter": p, "gradient": p.grad, "exp_avg": opt.state[p]["exp_avg"]}[of]
    t.data = torch._neg_view(t.data)
    assert t.is_neg()
    if of == "parameter":
        with pytest.raises(ValueError, match="negated view"):
            opt.step()
        return
    twin = AdamW([nn.Parameter(p.detach().clone())], lr=0.1, weight_decay=0.1)
    q = twin.param_groups[0]["params"][0]
    twin.state[q] = {name: value.resolve_neg().clone() for name, value in opt.state[p].items()}
    q.grad = p.grad.resolve_neg().clone()
    for o in (opt, twin):
        o.step()
    assert_same_optimizers(opt, twin)


def test_the_negative_bit_in_a_functional_call() -> None:
    for k in range(3):
        own = [torch.ones(4), torch.zeros(4), torch.zeros(4)]
        own[k] = torch._neg_view(own[k])
        with pytest.raises(ValueError, match="negated view"):
            functional.adamw_([own[0]], [torch.ones(4)], [own[1]], [own[2]], step=1)


def test_a_gradient_of_torchs_zeros() -> None:
    """An efficient zero tensor has no memory: it is zeros, as for torch."""
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    opt, twin = AdamW([p], lr=0.1, weight_decay=0.5), AdamW([q], lr=0.1, weight_decay=0.5)
    for _ in range(2):
        p.grad, q.grad = torch._efficientzerotensor(4), torch.zeros(4)
        opt.step()
        twin.step()
    assert_same_optimizers(opt, twin)


def test_operators_that_take_addresses_are_nobodys() -> None:
    """Those of torch.ops take tensors; what takes addresses is no operator, or wants a token."""
    found = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("wd_kernels::")]
    assert found
    assert not [name for name in found if "places" in torch._C._dispatch_dump(name) and "token" not in
                torch._C._dispatch_dump(name)]  # fmt: skip
    assert native.OPS.hold.default([torch.ones(3)]) is None


def test_what_is_loaded_is_a_leaf() -> None:
    opt = stepped(nn.Parameter(torch.ones(3)))
    saved = opt.state_dict()
    w = torch.ones(3, requires_grad=True)
    saved["state"][0].update(exp_avg=w * 2, exp_avg_sq=w)
    opt.load_state_dict(saved)
    (own,) = opt.state.values()
    assert not any(t.requires_grad for t in own.values())
    copy.deepcopy(opt).step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": []}, "'state' of the saved state is a list: expected a dict"),
        ({"param_groups": "abc"}, "'param_groups' of the saved state is a str: expected a list of dicts"),
        (
            {"param_groups": ["abc"]},
            "param group 0 of the saved state is a str: expected a dict with a list of 'params'",
        ),
        ({"param_groups": [{"lr": 1.0}]}, "param group 0 of the saved state is a dict without a list of 'params'"),
    ],
)
def test_a_saved_state_of_another_build(change: dict[str, Any], message: str) -> None:
    opt = stepped(nn.Parameter(torch.ones(3)))
    with pytest.raises(TypeError, match=message):
        opt.load_state_dict({**opt.state_dict(), **change})
    with pytest.raises(ValueError, match="the saved state has no 'state'"):
        opt.load_state_dict({"param_groups": opt.state_dict()["param_groups"]})
    opt.step()


def test_a_count_that_float32_does_not_go_on_from() -> None:
    """2**53 - 1 is 2**53 in float32, which every step would refuse: so does loading it."""
    opt = stepped(nn.Parameter(torch.ones(3)))
    saved = opt.state_dict()
    saved["state"][0]["step"] = torch.tensor(2.0**53 - 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the saved step count .* allowed are whole numbers"):
        opt.load_state_dict(saved)
    opt.step()


def test_columns_of_one_matrix() -> None:
    """Parameters in each other's gaps are told apart in one pass over their memory, and an overlap is still found."""
    matrix = torch.randn(30, 1500)
    params = [nn.Parameter(matrix[:, i]) for i in range(1500)]
    opt = stepped(*params)
    assert float(opt.state[params[-1]]["step"]) == 1
    with pytest.raises(ValueError, match=r"parameter 700 of group 0 and parameter 0 of group 1 overlap in memory"):
        opt.add_param_group({"params": [nn.Parameter(matrix[::2, 700])]})
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match=r"group 1 and parameter 0 of group 2 overlap"):
        opt.add_param_group({"params": [nn.Parameter(opt.param_groups[1]["params"][0].data[1:])]})


@pytest.mark.parametrize("what", ["gradient", "gradient.data", "parameter.data", "exp_avg.data"])
def test_what_is_exchanged_while_memory_is_held(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may run while a long step takes hold of memory: what it puts there is held too, and stepped."""
    real, calls = native.OPS.hold.default._op, [2]

    def exchange(p: Tensor, opt: AdamW) -> None:
        assert p.grad is not None
        if what == "gradient":
            p.grad = p.grad + 0.25
            return
        t = {"gradient": p.grad, "parameter": p, "exp_avg": opt.state[p]["exp_avg"]}[what.split(".")[0]]
        t.data = t.data + 0.25

    def hold(tensors: list[Tensor]) -> None:
        real(tensors)
        calls[0] += 1
        if calls[0] == 1:
            exchange(p, opt)

    monkeypatch.setattr(native, "OPS", SimpleNamespace(hold=SimpleNamespace(default=SimpleNamespace(_op=hold))))
    p, q = (nn.Parameter(torch.linspace(-1, 1, 9 << 20)) for _ in range(2))
    opt, twin = stepped(p), stepped(q)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        calls[0] = 0
        opt.step()
        assert calls[0] > 1 or what == "gradient.data"  # the views are of what the tensors have; then all is looked at
    finally:
        stop.set()
        thread.join()
    exchange(q, twin)
    twin.step()
    assert_same_bits(p, q)
    assert_same_optimizers(opt, twin)


def test_a_thread_gets_its_turn_in_long_steps() -> None:
    """And may exchange what is stepped: the old memory is stepped, and the next step sees the new."""
    params = [nn.Parameter(torch.zeros(1 << 20)) for _ in range(9)]
    opt = stepped(*params)
    stop, turns = threading.Event(), 0

    def work() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            for p in params:
                p.data = p.data.clone()

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(5):
        opt.step()
    stop.set()
    thread.join()
    assert turns > 0
    assert float(opt.state[params[0]]["step"]) == 6


def test_a_pending_signal_comes_after_the_step() -> None:
    """A handler that raises when the native call returns finds the step taken and counted."""
    p = nn.Parameter(torch.zeros(3_000_000))
    opt = stepped(p)

    def handle(*_: object) -> None:
        raise torture.Injected

    def now() -> tuple[float, float]:
        return float(p.detach()[0]), float(opt.state[p]["step"])

    before = signal.signal(signal.SIGALRM, handle)
    try:
        for _ in range(8):
            last = now()
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-3)
                for _ in range(200):
                    opt.step()
                    last = now()
            except torture.Injected:
                signal.setitimer(signal.ITIMER_REAL, 0)
                value, count = now()
                assert (value != last[0]) == (count != last[1])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_thousands_of_steps_hold_nothing_more() -> None:
    """Of objects: steps, other gradients, exchanged states and missing gradients leave none behind."""
    params = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    opt = stepped(*params)

    def some(n: int) -> None:
        for t in range(n):
            for p in params:
                p.grad = torch.ones(4)
            if t % 7 == 0:
                opt.state[params[0]]["exp_avg"] = opt.state[params[0]]["exp_avg"].clone()
            if t % 11 == 0:
                params[1].grad = None
            opt.step()

    some(300)
    gc.collect()
    before, blocks = len(gc.get_objects()), sys.getallocatedblocks()
    some(20_000)
    gc.collect()
    assert len(gc.get_objects()) - before < 50
    assert sys.getallocatedblocks() - blocks < 25_000  # a memory of bias corrections fills, and is emptied
