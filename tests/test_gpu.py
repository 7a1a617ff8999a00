"""backend="triton" and "cuda" on a GPU against backend="cpu" on the CPU: parameters and states equal to the bit.

`pytest -m gpu` runs these where torch finds a GPU. WD_KERNELS_TEST_DEVICE=cpu rehearses those that need no stream of a
GPU, with less of everything: in Triton's interpreter, and as the test build of the CUDA kernels.
"""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pytest
import torch
from cases import (
    BIG,
    BODIES,
    DTYPES,
    EDGES,
    PIECES,
    REAL,
    SMALL,
    Case,
    Piece,
    assert_same,
    assert_same_bits,
    bf16,
    f16,
    f32,
    f64,
    gradient,
    has_gradient,
    ids,
    make_params,
    optimizer,
    run,
    snapshot,
    states_of,
    with_dtypes,
)
from engines import TEST_DEVICE
from torch import Tensor, nn

import wd_kernels
from wd_kernels.backends import BACKENDS
from wd_kernels.backends import device as device_backends

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

REHEARSAL = TEST_DEVICE == "cpu"
DEVICE = torch.device("cpu") if REHEARSAL else torch.device(TEST_DEVICE, 0)
#: Beside the CPU's pieces: blocks of both paths, several chunks.
MATRIX = SMALL if REHEARSAL else (*PIECES, Piece((2048,)), Piece((5000,)), Piece((4099,), grad="offset"))
SOME = [(f32, f32), (bf16, f32), (f16, f16), (f64, f64)]

T = TypeVar("T")


def some(found: Sequence[T], every: int) -> Sequence[T]:
    """All of them; in a rehearsal, one of `every`."""
    return found[::every] if REHEARSAL else found


@pytest.fixture
def gpu() -> None:
    """For tests of what the interpreter has nothing of."""
    if REHEARSAL:
        pytest.skip("this rehearsal in Triton's interpreter has no GPU")


def assert_equal_runs(of: Callable[..., Any], backend: str, case: Case, *args: Any, **more: Any) -> Any:
    """The same run on the GPU and on the CPU."""
    found = of(case, backend, *args, device=DEVICE, **more)
    assert_same(found, of(case, "cpu", *args, **more))
    return found


# The matrix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", some(with_dtypes(BODIES, REAL), 99), ids=ids)
def test_large(backend: str, case: Case) -> None:
    assert_equal_runs(run, backend, case, pieces=(Piece((5,)), Piece((70_000,))) if REHEARSAL else BIG, steps=3)


@pytest.mark.parametrize("case", some(with_dtypes(BODIES, SOME), 5), ids=ids)
def test_the_reference_on_the_device(case: Case) -> None:
    """What users fall back to: the same bits too."""
    assert_same(run(case, "reference", pieces=MATRIX, device=DEVICE), run(case, "cpu", pieces=MATRIX))


@pytest.mark.parametrize("case", some(with_dtypes(BODIES, REAL), 5), ids=ids)
def test_triton_and_cuda_give_the_same_bits(case: Case, both_backends: tuple[str, str]) -> None:
    """Compared where they ran, on more than the CPU would step in time: the second opinion on each."""
    sizes = (5000, 1030, 1) if REHEARSAL else (30_000_001, 1_000_000, 4099, 1)
    generator = torch.Generator(DEVICE).manual_seed(3)
    starts = [torch.randn(n + 1, generator=generator, device=DEVICE).to(case.dtype) for n in sizes]
    results = []
    for backend in both_backends:
        params = [nn.Parameter(t.clone()[k % 2 :]) for k, t in enumerate(starts)]  # every other one is not aligned
        opt = optimizer(case, params, backend, weight_decay=0.1)
        for step in range(4):
            generator.manual_seed(100 + step)
            opt.param_groups[0]["lr"] = 0.05 / (step + 1)
            for p in params:
                p.grad_dtype = case.grad_dtype
                p.grad = torch.randn(p.shape, generator=generator, device=DEVICE).to(case.grad_dtype)
            opt.step()
        assert {bucket.backend.name for bucket in opt._table.buckets} == {backend}
        results.append([t for p in params for t in (p.detach(), *(opt.state[p][name] for name in states_of(case)))])
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        assert_same_bits(a, b, f"tensor {k}")
    for p, start in zip(params, starts, strict=True):
        assert p.numel() < 20 or not torch.equal(p, start[-p.numel() :])


def test_auto_takes_triton(gpu: None) -> None:
    results = []
    for device in (DEVICE, "cpu"):
        params = make_params(MATRIX, f32, f32, device=device)
        opt = wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1)
        for step in range(3):
            for k, (p, piece) in enumerate(zip(params, MATRIX, strict=True)):
                p.grad = gradient(piece, f32, 100 * step + k, device)
            opt.step()  # FallbackWarning would be an error
        names = {bucket.backend.name for bucket in opt._table.buckets}
        assert names == {"cpu" if device == "cpu" else "triton"}
        results.append(snapshot(params, opt))
    assert_same(*results)


def test_what_the_backend_refuses(gpu: None) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for backend, device in (("triton", "cpu"), ("cuda", "cpu"), ("cpu", "cuda:0")):
        if BACKENDS[backend].why_not() is not None:
            continue
        q = nn.Parameter(p.detach().to(device))
        q.grad = torch.ones_like(q)
        opt = wd_kernels.AdamW([q], backend=backend)
        with pytest.raises(RuntimeError, match=rf"backend='{backend}' cannot be used: the tensors are on {device}"):
            opt.step()
        assert q.tolist() == [1, 1, 1]
        assert not opt.state.get(q)


# Addresses and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", some([1024, 2048, 4096, 8192, 16384], 2))
@pytest.mark.parametrize("case", some(with_dtypes([BODIES[1], BODIES[3]], SOME), 5), ids=ids)
def test_chunks_of_any_size(backend: str, case: Case, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_backends, "chunk_size", lambda elements, processors: size)
    pieces = (*EDGES, Piece((2 * size + 1700,)), Piece((3 * size - 1,), "offset"))
    assert_equal_runs(run, backend, case, pieces=EDGES if REHEARSAL else pieces, steps=2)


@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
def test_many_tensors(backend: str, rule: str, launches: list[int]) -> None:
    n = 200 if REHEARSAL else 10_000
    case = Case(rule, "any", {"momentum": 0.9} if rule == "sgdw" else {})
    sizes = [1 + 7 * k % 64 for k in range(n)]
    starts = make_params([Piece((sum(sizes),))], f32, f32)[0].detach()
    results = []
    for name, device in ((backend, DEVICE), ("cpu", torch.device("cpu"))):
        params = [nn.Parameter(part.clone()) for part in starts.to(device).split(sizes)]
        opt = optimizer(case, [{"params": params[::2]}, {"params": params[1::2], "lr": 0.3}], name, weight_decay=0.1)
        for step in range(3):
            whole = gradient(Piece((sum(sizes),)), f32, step, device)
            for k, (p, grad) in enumerate(zip(params, whole.split(sizes), strict=True)):
                p.grad = None if (k + step) % 5 == 4 else grad
            opt.step()
        tensors = [torch.cat([p.detach() for p in params])]
        tensors += [torch.cat([opt.state[p][name] for p in params]) for name in states_of(case)]
        results.append({f"{i}": tensor.cpu() for i, tensor in enumerate(tensors)})
    assert_same(*results)
    assert len(launches) == 3
    assert launches[-1] == n


def test_465_groups(backend: str, launches: list[int]) -> None:
    results = []
    for name, device in ((backend, DEVICE), ("cpu", torch.device("cpu"))):
        params = make_params([Piece((1 + k % 3,)) for k in range(465)], f32, f32, device=device)
        groups = [{"params": [p], "lr": 1e-3 * (k % 50), "weight_decay": 0.01 * k} for k, p in enumerate(params)]
        opt = wd_kernels.AdamW(groups, backend=name)
        for step in range(2):
            for k, p in enumerate(params):
                p.grad = gradient(Piece((1 + k % 3,)), f32, 1000 * step + k, device)
            opt.step()
        results.append(snapshot(params, opt))
    assert_same(*results)
    assert launches == [465, 465]


@pytest.mark.parametrize(("rule", "dtype", "roles"), [("sgdw", bf16, 2), ("adamw", f32, 4)], ids=["sgdw", "adamw"])
def test_more_than_2_to_the_31_elements(backend: str, rule: str, dtype: torch.dtype, roles: int) -> None:
    """Every element: the tensor repeats a prime number of them, so no wrapped offset meets its like.

    The first repetition and the tail are compared with the CPU, all others with the first.
    """
    prime, repeats, tail = (4099, 3, 1500) if REHEARSAL else (65_521, 2**31 // 65_521 + 100, 1500)
    total = prime * repeats + tail
    if not REHEARSAL:
        assert total > 2**31 + 2**20
        needed = total * (roles * dtype.itemsize + 2)  # the comparison makes bytes
        free = torch.cuda.mem_get_info(DEVICE)[0]
        if needed > free:
            pytest.skip(f"{needed / 2**30:.0f} GiB are needed on the device, {free / 2**30:.0f} GiB are free")

    def repeated(values: Tensor) -> Tensor:
        room = torch.empty(total, dtype=dtype, device=DEVICE)
        room[: prime * repeats].view(repeats, prime).copy_(values)
        room[prime * repeats :].copy_(values[:tail])
        return room

    def assert_repeats(tensor: Tensor, expected: Tensor, what: str) -> None:
        expected = expected.detach().to(DEVICE)
        for rows in tensor.detach()[: prime * repeats].view(repeats, prime).split(4096):
            assert bool((rows == expected).all()), what
        assert_same_bits(tensor.detach()[-tail:].cpu(), expected[:tail].cpu(), f"the tail of {what}")

    (q,) = make_params([Piece((prime,))], dtype, dtype)
    p = nn.Parameter(repeated(q.detach().to(DEVICE)))
    case = Case(rule, "any", {"decay": "independent"})
    opt, other = (optimizer(case, [t], b, weight_decay=0.1) for t, b in ((p, backend), (q, "cpu")))
    before = q.detach().clone()
    for step in range(2):
        q.grad = gradient(Piece((prime,)), dtype, step)
        p.grad = None
        p.grad = repeated(q.grad.to(DEVICE))
        opt.step()
        other.step()
    assert float((q.detach() == before).float().mean()) < 0.5
    assert_same_bits(p.detach()[:prime].cpu(), q.detach(), "parameter")
    assert_repeats(p, q, "parameter")
    for name in states_of(case):
        assert_same_bits(opt.state[p][name][:prime].cpu(), other.state[q][name], name)
        assert_repeats(opt.state[p][name], other.state[q][name], name)


# What a step costs ----------------------------------------------------------------------------------------------------


def all_dtypes(backend: str, device: torch.device | str) -> tuple[Any, list[Tensor], list[Piece]]:
    """An optimizer over every pair of dtypes, all in layouts that need no copy."""
    pieces = [Piece((33,)), Piece((7, 5), "transposed", "transposed")] * len(DTYPES)
    params: list[Tensor] = []
    for k, pair in enumerate(DTYPES):
        params += make_params(pieces[:2], *pair, k, device)
    return wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1, backend=backend), params, pieces


def test_one_launch_a_bucket(backend: str, launches: list[int]) -> None:
    """Complex parameters share the buckets of their real parts: ten pairs of dtypes are eight buckets."""
    results = []
    for name, device in ((backend, DEVICE), ("cpu", "cpu")):
        opt, params, pieces = all_dtypes(name, device)
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = gradient(pieces[k], DTYPES[k // 2][1], 100 * step + k, device)
            opt.step()
        results.append(snapshot(params, opt))
    assert_same(*results)
    assert len(launches) == 3 * 8


def test_what_runs_on_the_device_in_a_step(backend: str, gpu: None) -> None:
    """As the profiler sees it: a kernel for each bucket, and one copy."""
    opt, params, pieces = all_dtypes(backend, DEVICE)
    for step in range(3):
        for k, p in enumerate(params):
            p.grad = gradient(pieces[k], DTYPES[k // 2][1], 100 * step + k, DEVICE)
        if step < 2:
            opt.step()
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step()
        synchronize()
    events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [name for name in events if not name.startswith("Optimizer.")]  # torch's own annotation
    if not names:
        pytest.skip("torch's profiler sees nothing of this device")
    known = {"Memcpy HtoD": "copy", "step_kernel": "step"}
    found = [next((kind for part, kind in known.items() if part in name), name) for name in names]
    assert sorted(found) == ["copy"] + ["step"] * 8


@contextmanager
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Twins:
    """The same optimizer on the GPU and on the CPU, with gradients that are there before any step is taken."""

    def __init__(self, backend: str, case: Case, steps: int, pieces: Sequence[Piece] = MATRIX) -> None:
        self.case, self.pieces = case, pieces
        self.devices = (DEVICE, torch.device("cpu"))
        self.params = [make_params(pieces, case.dtype, case.grad_dtype, device=d) for d in self.devices]
        self.opts = [
            optimizer(case, [{"params": p[::2]}, {"params": p[1::2], "weight_decay": 0.3}], b, weight_decay=0.1)
            for p, b in zip(self.params, (backend, "cpu"), strict=True)
        ]
        self.gradients = [
            [
                [gradient(piece, case.grad_dtype, 1000 * step + k, d) if has_gradient(k, step) else None for k, piece in
                 enumerate(pieces)]
                for step in range(steps)
            ]
            for d in self.devices
        ]  # fmt: skip
        synchronize()
        self.kept: list[Any] = []  # what other streams may still read

    def step(self, which: int, step: int) -> None:
        """A step of the GPU's (0) or the CPU's (1) optimizer."""
        for g, group in enumerate(self.opts[which].param_groups):
            group["lr"] = 0.1 / (1 + g + step % 7)
        for p, grad in zip(self.params[which], self.gradients[which][step], strict=True):
            p.grad = grad
        self.opts[which].step()

    def assert_same(self) -> None:
        found, expected = (snapshot(p, o) for p, o in zip(self.params, self.opts, strict=True))
        assert_same(found, expected)


@pytest.mark.parametrize("case", [BODIES[1], BODIES[3]], ids=ids)
def test_no_synchronisation(backend: str, case: Case, gpu: None) -> None:
    """Gradients are new in every step, some are missing, some are copied; parameters with gaps are written back."""
    twins = Twins(backend, case, 8)
    for step in range(4):  # compiles, and makes the states: some gradients come late
        twins.step(0, step)
    with sync_is_an_error():
        with pytest.raises(RuntimeError, match="synchroniz"):  # it works
            twins.params[0][0][0].item()
        for step in range(4, 8):
            twins.step(0, step)
            twins.opts[0].zero_grad()
    for step in range(8):
        twins.step(1, step)
    twins.assert_same()


# Streams --------------------------------------------------------------------------------------------------------------

LONG = 1_000_000_000  # clock ticks: half a second or so


class NoStream:
    """Stands for a stream in a rehearsal."""

    def wait_stream(self, other: Any) -> None: ...

    def query(self) -> bool:
        return False


def new_stream() -> Any:
    return NoStream() if REHEARSAL else torch.cuda.Stream()


def current_stream() -> Any:
    return NoStream() if REHEARSAL else torch.cuda.current_stream()


def on(stream: Any) -> Any:
    return nullcontext() if REHEARSAL else torch.cuda.stream(stream)


def keep_busy(ticks: int) -> None:
    if not REHEARSAL:
        torch.cuda._sleep(ticks)


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


@pytest.mark.parametrize("case", [BODIES[1], BODIES[3]], ids=ids)
def test_steps_far_ahead_of_the_device(backend: str, case: Case) -> None:
    """Copies of many steps wait in the stream while later steps use host memory: none may use what still waits."""
    twins = Twins(backend, case, 65)
    twins.step(0, 0)
    for begin in (1, 33):  # the first time, torch's allocators grow
        synchronize()
        keep_busy(2 * LONG)
        for step in range(begin, begin + 32):
            twins.step(0, step)
        waiting = not current_stream().query()
    assert waiting, "the steps waited for the device, or took longer than it slept: nothing was in flight"
    for step in range(65):
        twins.step(1, step)
    twins.assert_same()


def late_gradients(twins: Twins, step: int) -> None:
    """The step's gradients anew, written on the current stream after a while: a launch elsewhere finds them spoiled."""
    ready = [None if g is None else torch.full_like(g, 1e3) for g in twins.gradients[0][step]]
    keep_busy(LONG // 10)
    for grad, value in zip(ready, twins.gradients[0][step], strict=True):
        if grad is not None:
            grad.copy_(value)
    twins.kept.append(twins.gradients[0][step])
    twins.gradients[0][step] = ready


def plain(pieces: Sequence[Piece]) -> list[Piece]:
    """Without expanded gradients and lazy bits, which `late_gradients` cannot write."""
    return [Piece(p.shape, p.layout) for p in pieces]


@pytest.mark.parametrize("case", [BODIES[1], BODIES[3]], ids=ids)
def test_a_side_stream(backend: str, case: Case) -> None:
    twins = Twins(backend, case, 6, plain(MATRIX))
    stream = new_stream()
    stream.wait_stream(current_stream())
    with on(stream):
        for step in range(6):
            late_gradients(twins, step)
            twins.step(0, step)
        waiting = not stream.query()
    current_stream().wait_stream(stream)
    assert waiting
    for step in range(6):
        twins.step(1, step)
    twins.assert_same()


def test_streams_in_turn(backend: str) -> None:
    """Each waits for the one before it; parameters join meanwhile, once with another stream and once without."""
    twins = Twins(backend, BODIES[1], 12, plain(MATRIX))
    streams = [current_stream(), new_stream(), new_stream()]
    last = streams[0]
    for step in range(12):
        if step in (4, 8):  # another bucket; then one more in the first, so that the other begins elsewhere
            dtype = bf16 if step == 4 else f32
            for which, device in enumerate(twins.devices):
                (more,) = make_params([Piece((70,))], dtype, dtype, step, device)
                twins.params[which].append(more)
                twins.opts[which].add_param_group({"params": [more]})
                for t, grads in enumerate(twins.gradients[which]):
                    grads.append(gradient(Piece((70,)), dtype, t, device) if t >= step else None)
            synchronize()
        stream = streams[(0, 1, 2, 1, 1, 0, 2, 2, 1, 0, 0, 1)[step]]
        if stream is not last:
            stream.wait_stream(last)
        with on(stream):
            late_gradients(twins, step)
            twins.step(0, step)
        last = stream
    current_stream().wait_stream(last)
    for step in range(12):
        twins.step(1, step)
    twins.assert_same()


def test_two_optimizers_on_two_streams_at_once(backend: str) -> None:
    pair = [Twins(backend, case, 10, plain(MATRIX)) for case in (BODIES[0], BODIES[3])]
    streams = [new_stream(), new_stream()]
    for stream in streams:
        stream.wait_stream(current_stream())
    for step in range(10):
        for twins, stream in zip(pair, streams, strict=True):
            with on(stream):
                late_gradients(twins, step)
                twins.step(0, step)
    waiting = [not stream.query() for stream in streams]
    synchronize()
    assert all(waiting)
    for twins in pair:
        for step in range(10):
            twins.step(1, step)
        twins.assert_same()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_is_refused(backend: str, gpu: None) -> None:
    """A graph would repeat one step's scalars. The refused step changes nothing, and the next one is right."""
    twins = Twins(backend, BODIES[1], 4, [Piece((2050,)), Piece((40,))])
    for step in range(2):
        twins.step(0, step)
    before = snapshot(twins.params[0], twins.opts[0])
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        twins.step(0, 2)
    assert_same(snapshot(twins.params[0], twins.opts[0]), before)
    for which, begin in ((0, 2), (1, 0)):
        for step in range(begin, 4):
            twins.step(which, step)
    twins.assert_same()


def test_a_whole_loop_in_a_graph(backend: str, gpu: None) -> None:
    """Loss, backward pass with gradients of the graph's own, scaler, step: its replays are the steps, to the bit."""

    def loop(graphed: bool) -> dict[str, Tensor]:
        params = make_params([Piece((5,)), Piece((70_000,))], f32, f32, device=DEVICE)
        x = [torch.zeros_like(p) for p in params]
        lr = torch.tensor(0.1, device=DEVICE)
        opt = wd_kernels.AdamW(
            params, lr=lr, weight_decay=0.1, capturable=True, max_grad_norm=1.0, skip_spikes=6.0,
            schedule=wd_kernels.schedules.Warmup(6), backend=backend,
        )  # fmt: skip
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=3)

        def step() -> None:
            losses = [(p * own).sum() for p, own in zip(params, x, strict=True)]
            scaler.scale(torch.stack(losses).sum()).backward()
            scaler.step(opt)
            scaler.update()

        found, graph, side = {}, torch.cuda.CUDAGraph(), torch.cuda.Stream()
        for number in range(10):
            for k, own in enumerate(x):
                own.copy_(gradient(Piece(tuple(own.shape)), f32, 10 * number + k, DEVICE))
            if number == 6:
                x[1][7] = float("inf")
            lr.fill_(0.1 / (1 + number))
            if graphed and number == 3:
                opt.zero_grad()
                with torch.cuda.graph(graph):
                    step()
            if graphed and number >= 3:
                graph.replay()
            else:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    opt.zero_grad()
                    step()
                torch.cuda.current_stream().wait_stream(side)
            found |= {f"{number} {name}": t for name, t in snapshot(params, opt).items()}
            found |= {f"{number} norm": opt.grad_norm.cpu(), f"{number} skipped": opt.skipped.cpu()}
            found[f"{number} scale"] = torch.tensor(scaler.get_scale())
        return found

    expected, found = loop(False), loop(True)
    assert_same(found, expected)
    assert [bool(expected[f"{number} skipped"]) for number in range(10)] == [number == 6 for number in range(10)]


# Memory that moves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [BODIES[1], BODIES[3]], ids=ids)
def test_memory_that_moves(backend: str, case: Case) -> None:
    """Gradients freed and made anew elsewhere, parameters whose data is swapped, states that go to the CPU and back."""
    twins = Twins(backend, case, 9)
    for step in range(9):
        for which, (params, opt, device) in enumerate(zip(twins.params, twins.opts, twins.devices, strict=True)):
            taken = [torch.full((k * 37 % 3000 + 1,), 1e9, device=device) for k in range(step * 5)]  # it is reused now
            for k, p in enumerate(params):
                grad = twins.gradients[which][step][k]
                if grad is not None:  # another address, the same layout and values
                    twins.gradients[which][step][k] = copy.deepcopy(grad)
                if (k + step) % 4 == 1:
                    p.data = p.data.clone(memory_format=torch.preserve_format)
                if (k + step) % 3 == 1 and p in opt.state:
                    for name in states_of(case):
                        opt.state[p][name] = opt.state[p][name].cpu().clone().to(device)
            del taken
            twins.step(which, step)
            twins.gradients[which][step] = []
    twins.assert_same()


def test_other_sizes(backend: str) -> None:
    """A parameter that grows and shrinks, with a state that begins anew."""
    twins = Twins(backend, BODIES[1], 8, [Piece((2050,)), Piece((40,))])
    for step in range(8):
        for which, device in enumerate(twins.devices):
            p, opt = twins.params[which][0], twins.opts[which]
            if step in (3, 6):
                p.grad = None
                p.data = gradient(Piece(({3: 9000, 6: 700}[step],)), f32, 99, device)
                opt.state[p] = {}
            twins.gradients[which][step][0] = gradient(Piece(tuple(p.shape)), f32, step, device) if step != 2 else None
            twins.step(which, step)
    twins.assert_same()


# torch's surroundings -------------------------------------------------------------------------------------------------


def test_grad_scaler(backend: str) -> None:
    """Unscaled in place by a power of two, so exactly; a step with an infinite gradient is left out."""
    twins = Twins(backend, BODIES[1], 6)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.ones((), device=DEVICE))  # as a loss would be
    params, opt = twins.params[0], twins.opts[0]
    for step in range(6):
        for g, group in enumerate(opt.param_groups):
            group["lr"] = 0.1 / (1 + g + step % 7)
        for k, p in enumerate(params):
            grad = twins.gradients[0][step][k]
            p.grad = None if grad is None else (grad * scaler.get_scale()).contiguous()
        if step == 3:
            params[5].grad = torch.full_like(params[5], float("inf"))
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if step != 3:
            twins.step(1, step)
    assert scaler.get_scale() == 512
    twins.assert_same()


def test_state_dict_into_torch_and_back(backend: str) -> None:
    twins = Twins(backend, Case("adamw", "any", {"betas": (0.8, 0.95)}), 8, plain(MATRIX))
    for which in (0, 1):
        for step in range(5):
            twins.step(which, step)
    params, opt = twins.params[0], twins.opts[0]
    theirs = torch.optim.AdamW([{"params": [torch.zeros_like(p) for p in g["params"]]} for g in opt.param_groups])
    theirs.load_state_dict(opt.state_dict())
    back = wd_kernels.AdamW([{"params": g["params"]} for g in opt.param_groups], backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not know.*")
        back.load_state_dict(theirs.state_dict())
    for p in params:
        assert back.state[p]["exp_avg"].device == p.device
        assert back.state[p]["exp_avg"] is not opt.state[p]["exp_avg"]
    assert_same(snapshot(params, back), snapshot(params, opt))
    twins.opts[0] = back
    for which in (0, 1):
        for step in range(5, 8):
            twins.step(which, step)
    twins.assert_same()
    for group, own in zip(theirs.param_groups, back.param_groups, strict=True):  # torch steps what it loaded
        for p, q in zip(group["params"], own["params"], strict=True):
            p.grad = torch.ones_like(p)
            assert p.device == q.device
    theirs.step()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
@pytest.mark.parametrize("case", [BODIES[1], BODIES[3]], ids=ids)
def test_copies(backend: str, case: Case, how: Callable[[Any], Any]) -> None:
    """A copy goes on by itself; so does what it was copied from."""
    twins = Twins(backend, case, 7)
    for which in (0, 1):
        for step in range(4):
            twins.step(which, step)
        for p in twins.params[which]:
            p.grad = None
    params, opt = how((twins.params[0], twins.opts[0]))
    assert all(p.device == q.device and p is not q for p, q in zip(params, twins.params[0], strict=True))
    twins.step(0, 4)
    twins.step(1, 4)
    twins.assert_same()
    twins.params[0], twins.opts[0] = params, opt
    for p in twins.params[0]:
        p.grad_dtype = case.grad_dtype
    before = snapshot(twins.params[1], twins.opts[1])
    twins.step(0, 4)
    assert_same(snapshot(params, opt), before)
    for step in (5, 6):
        twins.step(0, step)
        twins.step(1, step)
    twins.assert_same()


# Devices --------------------------------------------------------------------------------------------------------------


def mixed_devices(backend: str, device: torch.device) -> tuple[Any, list[Tensor]]:
    """An optimizer over the pieces, every other one on the device and the rest on the CPU."""
    params: list[Tensor] = []
    for k, piece in enumerate(PIECES):
        params += make_params([piece], f32, f32, k, device if k % 2 else "cpu")
    return wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1, backend=backend), params


def give_gradients(params: Sequence[Tensor], step: int) -> None:
    for k, (p, piece) in enumerate(zip(params, PIECES, strict=True)):
        p.grad = gradient(piece, f32, 100 * step + k, p.device)


def test_cpu_and_gpu_in_one_optimizer(gpu: None) -> None:
    results = []
    for device in (DEVICE, torch.device("cpu")):
        opt, params = mixed_devices("auto", device)
        for step in range(3):
            give_gradients(params, step)
            opt.step()
        names = {(b.spec.device.type, b.backend.name) for b in opt._table.buckets}
        assert names == {("cpu", "cpu")} | ({("cuda", "triton")} if device == DEVICE else set())
        results.append(snapshot(params, opt))
    assert_same(*results)


def test_a_backend_by_name_refuses_tensors_of_the_cpu(backend: str, gpu: None) -> None:
    """Beside tensors of the GPU, which are not written either."""
    opt, params = mixed_devices(backend, DEVICE)
    give_gradients(params, 0)
    before = snapshot(params, opt)
    with pytest.raises(RuntimeError, match="the tensors are on cpu"):
        opt.step()
    assert_same(snapshot(params, opt), before)


def test_several_devices(gpu: None) -> None:
    """Tensors of all devices in one optimizer, in turn; the current device is one of them, and stays it."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"torch finds {count} GPU: two are needed")
    results = []
    for devices in ([torch.device("cuda", i) for i in range(count)], [torch.device("cpu")]):
        params: list[Tensor] = []
        for k, piece in enumerate(MATRIX):
            params += make_params([piece], f32, f32, k, devices[k % len(devices)])
        opt = wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1)
        for step in range(4):
            with torch.cuda.device(step % count):
                for k, (p, piece) in enumerate(zip(params, MATRIX, strict=True)):
                    p.grad = gradient(piece, f32, 100 * step + k, p.device)
                opt.step()
                assert torch.cuda.current_device() == step % count
        assert len(opt._table.buckets) == len(devices)
        results.append(snapshot(params, opt))
    assert_same(*results)


def test_a_device_that_is_not_the_current_one(backend: str, gpu: None) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"torch finds {count} GPU: two are needed")
    last = torch.device("cuda", count - 1)
    for case in with_dtypes([BODIES[1], BODIES[3]], SOME):
        with torch.cuda.device(0):
            assert_same(run(case, backend, device=last, pieces=MATRIX), run(case, "cpu", pieces=MATRIX))


# Out of bounds --------------------------------------------------------------------------------------------------------

MEMCHECK = """
import torch, wd_kernels

def ones(n, begin=0):
    return torch.ones(n + begin, dtype=dtype, device=DEVICE)[begin:]

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for make, more in ((wd_kernels.AdamW, {"amsgrad": True}), (wd_kernels.SGDW, {"momentum": 0.9})):
        sizes = (1, 3, 511, 1023, 1024, 1025, 2047, 5000)
        params = [torch.nn.Parameter(ones(n, begin)) for n in sizes for begin in (0, 3)]
        opt = make(params, lr=0.1, weight_decay=0.1, backend=BACKEND, **more)
        for step in range(2):
            for k, p in enumerate(params):
                p.grad = None if (k, step) == (2, 1) else ones(p.numel(), k % 3)
            opt.step()
        assert all(bool((p.detach() < 0.95).all()) for p in params)
print("stepped")
"""


def test_memcheck(backend: str) -> None:
    """Every tensor is an allocation of its own here, and compute-sanitizer knows where each ends."""
    prelude = "from on_cpu import OnCPU\nfrom wd_kernels.backends import BACKENDS\nBACKENDS['cuda'] = OnCPU()\n"
    names = f"DEVICE, BACKEND = {DEVICE.type!r}, {backend!r}\n"
    command = [sys.executable, "-c", (prelude if REHEARSAL else "") + names + MEMCHECK]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if REHEARSAL:
        env |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    sanitizer = shutil.which("compute-sanitizer")
    if not REHEARSAL:
        if sanitizer is None:
            pytest.skip("compute-sanitizer is not on the PATH (the CUDA toolkit brings it)")
        command = [sanitizer, "--tool", "memcheck", "--leak-check", "no", *command]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stepped" in done.stdout
    assert REHEARSAL or "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
