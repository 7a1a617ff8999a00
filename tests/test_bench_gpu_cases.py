"""What the GPU benchmark measures: shapes, cases, peers, and contenders in turn."""

from __future__ import annotations

import json
from typing import Any

import byte_model
import gpu_cases
import gpu_measure
import peers
import pytest
import torch

import wd_kernels

F32, BF16, CPU = torch.float32, torch.bfloat16, torch.device("cpu")
HERE = {"wd_kernels", "torch fused", "torch foreach"}


# Shapes and cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [
        (gpu_cases.gpt2(), 148, 124_439_808),
        (gpu_cases.gpt2(24, 1024), 292, 354_823_168),  # GPT-2 medium
        (gpu_cases.vit(), 296, 304_326_632),
        (gpu_cases.vit(12, 768), 152, 86_567_656),  # ViT-B/16
        (gpu_cases.llama(), 291, 8_030_261_248),
        (gpu_cases.llama(80, 8192, 28672, 64), 723, 70_553_706_496),  # Llama 3 70B
        (gpu_cases.lora(), 448, 39_976_960),
    ],
)
def test_shapes_have_the_published_totals(shapes, tensors, elements):
    assert len(shapes) == tensors
    assert gpu_cases.elements(shapes) == elements


def test_llama_is_cut_to_what_fits():
    whole = gpu_cases.elements(gpu_cases.llama())
    assert gpu_cases.fitting_layers(16 * whole, 16) == 32
    assert gpu_cases.fitting_layers(16 * whole - 1, 16) == 31
    assert gpu_cases.fitting_layers(10**6, 16) == 0
    (case,) = (c for c in gpu_cases.cases("full", 40 << 30) if c.contenders)
    layers = int(case.name.split(", ")[1].split()[0])
    assert 1 <= layers < 32
    assert case.elements * 16 <= 0.92 * (40 << 30) < gpu_cases.elements(gpu_cases.llama(layers + 1)) * 16
    assert f"{layers} of 32 layers" in case.note


def test_the_cases_are_those_that_matter():
    full = gpu_cases.cases("full", 138 << 30)
    assert len({c.name for c in full}) == len(full) == len(gpu_cases.cases("small", 0))
    by_name = {c.name: c for c in full}
    assert list(by_name)[:5] == list(gpu_cases.TARGETS)
    assert all(by_name[name].shapes == ((10**9,),) for name in gpu_cases.TARGETS)
    formats = {(c.rule, c.param, c.grad) for c in full if c.name in gpu_cases.TARGETS}
    half = {("adamw", BF16, BF16), ("sgdw", BF16, BF16), ("adamw", F32, BF16)}
    assert formats == half | {("adamw", F32, F32), ("sgdw", F32, F32)}
    assert {name for name, least in gpu_cases.TARGETS.items() if least == 88} == {
        c.name for c in full if (c.rule, c.param, c.grad) in half and c.name in gpu_cases.TARGETS
    }
    for name, tensors in (("10000 x 1000", 10_000), ("GPT-2 125M", 148), ("ViT-L/16", 296), ("LoRA 7B", 448)):
        for gradients in ("kept", "new"):
            case = by_name[f"{name}, {gradients} gradients"]
            assert (len(case.shapes), case.gradients) == (tensors, gradients)
    (groups,) = (c for c in full if c.groups > 1)
    assert (groups.groups, groups.shapes) == (465, ((256,),) * 465)
    assert full[-1].elements == 8_030_261_248  # all of it fits into the largest memory


# Peers ----------------------------------------------------------------------------------------------------------------


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
            if peer.name == "wd_kernels":
                assert peer.bytes_per_parameter(dtype, dtype) == byte_model.step_bytes(peer.rule, dtype, dtype, F32)
            elif peer.name.startswith("torch f"):
                assert peer.bytes_per_parameter(dtype, dtype) == byte_model.step_bytes(peer.rule, dtype, dtype, dtype)


def test_missing_peers_are_named_with_their_error():
    absent = peers.Peer("someone", "adamw", "no_such_package.optim:FusedAdam", byte_model.float32_states)
    changed = peers.Peer("other", "adamw", "torch.optim:NoSuchAdam", byte_model.float32_states)
    there, missing = peers.load([absent, changed, peers.PEERS[0]])
    assert there == {peers.PEERS[0]: wd_kernels.AdamW}
    assert missing["someone FusedAdam"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert "NoSuchAdam" in missing["other NoSuchAdam"]
    assert {name for name in HERE for peer in peers.load(peers.always_there())[0] if peer.name == name} == HERE


# Turns ----------------------------------------------------------------------------------------------------------------


def contenders(case: gpu_cases.Case) -> list[gpu_measure.Contender]:
    them, _ = gpu_measure.build(case, peers.load(peers.always_there())[0], gpu_measure.Timer(CPU), CPU)
    return them


@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
@pytest.mark.parametrize(("param", "grad"), [(F32, F32), (BF16, BF16), (F32, BF16)])
def test_contenders_share_tensors_and_move_what_the_byte_model_says(rule, param, grad):
    them = contenders(gpu_cases.Case("case", ((64,), (3, 32)), rule, param, grad))
    assert {c.name for c in them} == HERE | ({"wd_kernels flat"} if param == grad else set())
    shared: dict[torch.dtype, set[tuple[int, ...]]] = {}
    for contender in them:
        optimizer: Any = contender.step.__self__
        params = optimizer.param_groups[0]["params"]
        assert {p.grad.dtype for p in params} == {contender.grad}
        places = tuple(p.data_ptr() for p in params)
        if contender.name == "wd_kernels flat":  # on tensors of its own
            assert len(optimizer._table.segments.moving) == 1
            assert places not in shared[contender.grad]
        else:
            shared.setdefault(contender.grad, set()).add(places)
        states = [s for p in params for s in optimizer.state[p].values() if torch.is_tensor(s) and s.dim()]
        moved = sum(2 * p.nbytes + p.grad.nbytes for p in params) + 2 * sum(s.nbytes for s in states)
        assert moved == contender.bytes_per_parameter * 160, contender.name
    assert all(len(places) == 1 for places in shared.values())
    assert len(shared) == (2 if param != grad else 1)


def test_between_steps_gradients_and_lr_change_as_the_case_says():
    assert {c.prepare for c in contenders(gpu_cases.Case("case", ((8,),)))} == {None}
    for contender in contenders(gpu_cases.Case("case", ((8,),) * 3, gradients="new")):
        params = contender.step.__self__.param_groups[0]["params"]
        before = [(p.grad.data_ptr(), p.grad.clone()) for p in params]
        contender.prepare()
        assert all(p.grad.data_ptr() != address for p, (address, _) in zip(params, before, strict=True))
        assert all(torch.equal(p.grad, old) for p, (_, old) in zip(params, before, strict=True))
    them = contenders(gpu_cases.Case("case", ((8,),) * 6, groups=3))
    assert [c.groups for c in them] == [1, 1, 1, 3, 3, 3]
    for contender in them:
        groups = contender.step.__self__.param_groups
        contender.prepare()
        before = [group["lr"] for group in groups]
        contender.prepare()
        assert len(groups) == len(set(before)) == contender.groups
        assert sum(len(group["params"]) for group in groups) == 6
        assert all(group["lr"] != lr for group, lr in zip(groups, before, strict=True))


class OutOfSteps(torch.optim.SGD):
    """Runs out of memory in its fifth step."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 5:
            raise torch.OutOfMemoryError("no memory\nis left")
        return super().step(closure)


class OutOfMemory(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise torch.OutOfMemoryError("no memory")


def test_who_fails_is_left_out_and_said_to_be():
    them = peers.load(peers.always_there())[0]
    for cls in (OutOfSteps, OutOfMemory):
        them[peers.Peer(cls.__name__, "adamw", "", byte_model.float32_states, devices=("cpu",))] = cls
    them[peers.Peer("on GPUs", "adamw", "", byte_model.float32_states)] = OutOfMemory
    done = gpu_measure.measure(gpu_cases.Case("case", ((8,),)), them, gpu_measure.Timer(CPU), CPU, 0.05)
    assert {r["contender"] for r in done["results"]} == HERE
    assert done["skipped"]["OutOfSteps"] == "OutOfMemoryError: no memory"
    assert done["skipped"]["OutOfMemory"] == "OutOfMemoryError: no memory"
    assert done["skipped"]["on GPUs"] == "does not take float32 on cpu"
    for result in done["results"]:
        counts = {len(result[way]) for way in gpu_measure.WAYS}
        assert len(counts) == 1
        assert gpu_measure.LEAST_ROUNDS <= counts.pop() <= gpu_measure.ROUNDS
        assert all(s > 0 for way in gpu_measure.WAYS for s in result[way])
    json.dumps(done)


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
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"hold {cycles / gpu_measure.CLOCK:.4f}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    timer = gpu_measure.Timer(CPU, 0)
    timer.device_there = True
    timer.buffer = torch.ones(4)
    contender = gpu_measure.Contender("one", 1, 28, F32, lambda: log.append("new"), lambda: log.append("step"), 0.002)
    assert timer.device(contender, 3, cold=True) == pytest.approx((1 + 2 + 3) / 3 * 1e-3)
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


def test_launches_name_the_buckets():
    found = gpu_measure.launches(wd_kernels.AdamW, CPU, ((4,), (5,)))
    assert (found["tensors"], found["buckets"], found["step_kernels"]) == (4, 2, None)
