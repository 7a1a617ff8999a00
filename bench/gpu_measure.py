"""Times the steps of a case: all contenders on the same parameters and gradients, in turns, each with its own states.

A round gives every contender a turn, in three ways:
    device  from the step's first kernel to its last, by events, on a cold L2 where the case could stay in it. The
            device is held back until the host has queued the step: gaps that the host leaves do not count, as far
            as a queue of about a thousand launches reaches.
    wall    of steps one after another, the device awaited at the end of the turn; where something happens between
            steps (new gradients, another lr), that is not timed, and the device is awaited after each step.
    host    until step() returns, beginning on an idle device.
On the CPU, in a rehearsal, all three are wall clock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_cases import Case
from peers import FLAT, LR, OURS, Peer, change_lr, first_line
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import wd_kernels

__all__ = ["WAYS", "Contender", "Timer", "copy_bandwidth", "launches", "measure"]

WAYS = ("device", "wall", "host")
ROUNDS, LEAST_ROUNDS, MOST_STEPS = 9, 3, 30
FLUSHED_UNDER = 1 << 30  # cases of more bytes do not stay in any L2
CLOCK = 2e9  # cycles of a second, about: for how long the device is held back
LONGEST_HOLD = 0.25


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(eq=False)
class Contender:
    """One optimizer on a case: `prepare`, if anything happens between steps, comes before each `step`, untimed."""

    name: str
    groups: int
    bytes_per_parameter: float
    grad: torch.dtype
    prepare: Callable[[], None] | None
    step: Callable[[], object]
    host: float = 0.0  # seconds of step() on the host, about
    seconds: dict[str, list[float]] = field(default_factory=dict)  # per step, of each way, a value per round

    def report(self) -> dict[str, Any]:
        return {
            "contender": self.name,
            "groups": self.groups,
            "bytes_per_parameter": self.bytes_per_parameter,
            "gradient": name_of(self.grad),
            **self.seconds,
        }


class Timer:
    """Takes turns on a device: each way gives seconds per step."""

    def __init__(self, device: torch.device, flush: int = 256 << 20) -> None:
        self.device_there = device.type != "cpu"
        self.buffer = torch.zeros(flush if self.device_there else 0, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.device_there:
            torch.cuda.synchronize()

    def _ready(self, contender: Contender) -> None:
        if contender.prepare is not None:
            contender.prepare()
        self.wait()

    def device(self, contender: Contender, steps: int, cold: bool) -> float:
        if not self.device_there:
            return self.wall(contender, steps, cold)
        event = partial(torch.cuda.Event, enable_timing=True)
        pairs = [(event(), event()) for _ in range(steps)]
        for start, end in pairs:
            self._ready(contender)
            if cold:
                self.buffer.zero_()
            hold = min(1.5 * contender.host + 1e-4, LONGEST_HOLD)
            torch.cuda._sleep(int(CLOCK * hold))  # type: ignore[no-untyped-call]
            start.record()
            contender.step()
            end.record()
        self.wait()
        return sum(float(start.elapsed_time(end)) for start, end in pairs) / steps / 1e3

    def wall(self, contender: Contender, steps: int, cold: bool = False) -> float:
        together = steps if contender.prepare is None else 1
        total = 0.0
        for _ in range(0, steps, together):
            self._ready(contender)
            started = time.perf_counter()
            for _ in range(together):
                contender.step()
            self.wait()
            total += time.perf_counter() - started
        return total / steps

    def host(self, contender: Contender, steps: int, cold: bool = False) -> float:
        total = 0.0
        for _ in range(steps):
            self._ready(contender)
            started = time.perf_counter()
            contender.step()
            total += time.perf_counter() - started
        self.wait()
        return total / steps

    def free(self) -> None:
        """Gives back the device's memory that nothing holds any more."""
        if self.device_there:
            gc.collect()
            torch.cuda.empty_cache()


@dataclass
class Tensors:
    """The parameters and gradients that the contenders of a case share; another set for each dtype of gradients."""

    params: list[torch.nn.Parameter]
    slopes: list[Tensor]

    @classmethod
    def of(cls, case: Case, grad: torch.dtype, device: torch.device) -> Tensors:
        params = [torch.nn.Parameter(torch.randn(s, dtype=case.param, device=device)) for s in case.shapes]
        slopes = [torch.randn(s, dtype=grad, device=device) for s in case.shapes]
        for p, slope in zip(params, slopes, strict=True):
            if grad != case.param:
                p.grad_dtype = grad
            p.grad = slope
        return cls(params, slopes)

    def renew(self) -> None:
        """New gradients: all are made before the old are freed, so that no address stays."""
        fresh = torch._foreach_mul(self.slopes, 1.0)
        for p, grad in zip(self.params, fresh, strict=True):
            p.grad = grad


def _between(case: Case, tensors: Tensors, optimizer: torch.optim.Optimizer) -> Callable[[], None] | None:
    """What happens before each step of an optimizer."""
    if case.gradients == "kept" and case.groups == 1:
        return None
    steps = 0

    def prepare() -> None:
        nonlocal steps
        steps += 1
        if case.gradients == "new":
            tensors.renew()
        if case.groups > 1:
            change_lr(optimizer, steps)

    return prepare


def build(
    case: Case, peers: dict[Peer, Callable[..., Any]], timer: Timer, device: torch.device
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders, each after its first steps; and why others were left out, by name."""
    torch.manual_seed(0)
    shared: dict[torch.dtype, Tensors] = {}
    them: list[Contender] = []
    skipped: dict[str, str] = {}

    def contender(peer: Peer, cls: Callable[..., Any], groups: int, flat: bool = False) -> Contender:
        grad = peer.grad_dtype(case.param, case.grad)
        if flat:
            tensors = Tensors.of(case, grad, device)
            wd_kernels.flatten_(tensors.params)
        else:
            if grad not in shared:
                shared[grad] = Tensors.of(case, grad, device)
            tensors = shared[grad]
        optimizer = peer.make(cls, [{"params": tensors.params[i::groups]} for i in range(groups)])
        moved = peer.bytes_per_parameter(case.param, case.grad)
        name = FLAT if flat else peer.name
        one = Contender(name, groups, moved, grad, _between(case, tensors, optimizer), optimizer.step)
        timer.host(one, 2)  # makes the states, compiles
        one.host = timer.host(one, 1)
        return one

    for groups in sorted({1, case.groups}):
        for peer, cls in peers.items():
            if peer.rule != case.rule or (case.contenders and peer.name not in case.contenders):
                continue
            if case.param not in peer.dtypes or device.type not in peer.devices:
                skipped[peer.name] = f"does not take {name_of(case.param)} on {device.type}"
                continue
            ways = (False, True) if peer.name == OURS and case.may_be_flat else (False,)
            for flat in ways:
                try:
                    them.append(contender(peer, cls, groups, flat))
                except Exception as error:  # out of memory, or another library's own
                    skipped[FLAT if flat else peer.name] = first_line(error)
                timer.free()
    return them, skipped


def measure(
    case: Case, peers: dict[Peer, Callable[..., Any]], timer: Timer, device: torch.device, seconds: float
) -> dict[str, Any]:
    """One case for about `seconds`, as the report keeps it; nothing of it outlives the call. Who fails is left out."""
    end = time.perf_counter() + seconds
    them, skipped = build(case, peers, timer, device)
    cold = case.elements * max((c.bytes_per_parameter for c in them), default=0) < FLUSHED_UNDER
    gc.disable()
    try:
        before = time.perf_counter()
        _round(them, skipped, timer, 1, cold)
        one = time.perf_counter() - before
        steps = min(max(int((end - time.perf_counter()) / (ROUNDS * one)), 1), MOST_STEPS)
        for contender in them:
            contender.seconds = {way: [] for way in WAYS}
        for done in range(ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            _round(them, skipped, timer, steps, cold)
    finally:
        gc.enable()
    results = [contender.report() for contender in them]
    them.clear()
    timer.free()
    return {
        "case": case.name,
        "rule": case.rule,
        "dtype": name_of(case.param),
        "tensors": len(case.shapes),
        "elements": case.elements,
        "gradients": case.gradients,
        "note": case.note,
        "l2": "cold" if cold else "not flushed",
        "steps": steps,
        "results": results,
        "skipped": skipped,
    }


def _round(them: list[Contender], skipped: dict[str, str], timer: Timer, steps: int, cold: bool) -> None:
    """A turn for everyone; who fails drops out."""
    for contender in list(them):
        try:
            taken = {way: getattr(timer, way)(contender, steps, cold) for way in WAYS}
        except Exception as error:
            skipped[contender.name] = first_line(error)
            them.remove(contender)
            continue
        for way, seconds in taken.items():
            contender.seconds.setdefault(way, []).append(seconds)


def copy_bandwidth(device: torch.device, size: int, rounds: int = 9, copies: int = 5) -> dict[str, Any]:
    """GB/s of device-to-device copies of `size` bytes, read and written bytes both counted, of each round."""
    timer = Timer(device, 0)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)  # not zeros: they can run faster
    target = torch.empty_like(source)
    contender = Contender("copy", 1, 2, torch.uint8, None, lambda: target.copy_(source))
    timer.device(contender, 2, False)
    rates = [2 * size / timer.device(contender, copies, False) / 1e9 for _ in range(rounds)]
    return {"bytes": size, "gb_per_s": rates}


def launches(cls: Callable[..., Any], device: torch.device, shapes: Iterable[tuple[int, ...]]) -> dict[str, Any]:
    """What one step of ours runs on the device, by the profiler: on tensors of two dtypes, so in two buckets."""
    params = []
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        params.append(torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=device)))
        params[-1].grad = torch.randn_like(params[-1])
    optimizer = cls(params, lr=LR)
    for _ in range(3):
        optimizer.step()
    there = device.type != "cpu"
    if there:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if there else [])]) as recorded:
        optimizer.step()
        if there:
            torch.cuda.synchronize()
    on_device: dict[str, int] = {}
    for event in recorded.events() or []:
        if event.device_type.name != "CPU":
            on_device[event.name] = on_device.get(event.name, 0) + 1
    return {
        "contender": OURS,
        "tensors": len(params),
        "buckets": len(optimizer._table.buckets),
        "step_kernels": sum(n for name, n in on_device.items() if "step_kernel" in name) if there else None,
        "on_device": on_device,
    }
