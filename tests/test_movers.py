"""What the backends for GPUs do around their kernels (chunks, buckets, launches, failures), to the reference's bits.

On the CPU: Triton's interpreter, CUDA's test build, and one compiled form of each (engines.py). What every kernel
computes is in test_kernels.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import (
    BODIES,
    DTYPES,
    EDGES,
    REAL,
    SMALL,
    Case,
    Piece,
    assert_canaries,
    assert_same,
    assert_same_bits,
    bf16,
    bits,
    cases,
    f16,
    f32,
    f64,
    gradient,
    guarded,
    has_gradient,
    ids,
    make_params,
    optimizer,
    run,
    snapshot,
    states_of,
    with_dtypes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wd_kernels
from wd_kernels.backends import BACKENDS, cpu, device, device_copy
from wd_kernels.backends.device_copy import DeviceCopy

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of overflow and NaN
    pytest.mark.usefixtures("promises"),
]

#: A dtype pair for each path of the formats.
SOME = [(f32, f32), (bf16, f32), (f16, f16), (f64, f64)]


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", with_dtypes([BODIES[1], BODIES[2]], [(f32, f32), (bf16, bf16)]), ids=ids)
def test_split_tensor(backend: str, case: Case) -> None:
    """A tensor stepped whole or as neighbours of odd sizes in one memory has the same bits."""
    sizes = (1, 15, 17, 1000, 33, 1090)
    total, results = sum(sizes), []
    for parts in ((total,), sizes):
        whole = make_params([Piece((total,))], case.dtype, case.grad_dtype)[0].detach()
        params = [nn.Parameter(part) for part in whole.split(parts)]
        opt = optimizer(case, params, backend, weight_decay=0.1)
        for step in range(3):
            for p, g in zip(params, gradient(Piece((total,)), case.grad_dtype, step).split(parts), strict=True):
                p.grad = g
            opt.step()
        results.append([whole, *(torch.cat([opt.state[p][name] for p in params]) for name in states_of(case))])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    assert not torch.equal(results[0][0], make_params([Piece((total,))], case.dtype, case.grad_dtype)[0])


# Chunks ---------------------------------------------------------------------------------------------------------------


def of_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "chunk_size", lambda elements, processors: size)
    monkeypatch.setattr(cpu, "CHUNK", size)


@pytest.mark.parametrize("size", [1024, 2048, 4096])
@pytest.mark.parametrize("case", with_dtypes([BODIES[1]], [(f32, f32), (bf16, f32), (f64, f64)]), ids=ids)
def test_several_chunks_a_segment(
    backend: str, case: Case, size: int, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_size(size, monkeypatch)
    pieces = (*EDGES, Piece((5000,)), Piece((5000,), "offset"))
    found = run(case, backend, pieces=pieces, steps=2)
    came = [min(step for step in range(9) if has_gradient(k, step)) for k in range(len(pieces))]
    chunks = [-(-piece.shape[0] // size) for piece in pieces]
    assert launches == [sum(n for n, c in zip(chunks, came, strict=True) if c <= step) for step in range(2)]
    assert_same(found, run(case, "reference", pieces=pieces, steps=2))


@pytest.mark.parametrize("dtype", [f32, f64])
def test_the_longest_chunks(
    backend: str, dtype: torch.dtype, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_size(device_copy.LONGEST, monkeypatch)
    case = with_dtypes([BODIES[3]], [(dtype, dtype)])[0]
    pieces = (Piece((5,)), Piece((2 * device_copy.LONGEST + 1700,)))
    assert_same(run(case, backend, pieces=pieces, steps=2), run(case, "reference", pieces=pieces, steps=2))
    assert launches == [4, 4]


def test_chunks_are_taken_by_the_models_size(backend: str, launches: list[int]) -> None:
    """64Ki elements on one processor: chunks of 2048."""
    case = BODIES[2]
    pieces = (Piece((2**16,)), Piece((5,)))
    assert_same(run(case, backend, pieces=pieces, steps=2), run(case, "reference", pieces=pieces, steps=2))
    assert launches == [33, 33]


@pytest.mark.parametrize("case", [BODIES[1], BODIES[3]], ids=ids)
def test_missing_gradients_and_other_sizes(backend: str, case: Case, launches: list[int]) -> None:
    """Without a gradient a segment keeps its chunks, and nothing is written; with another size it is cut anew."""
    results = []
    for which in (backend, "reference"):
        (p, q) = make_params([Piece((2050,)), Piece((40,))], f32, f32)
        opt = optimizer(case, [p, q], which, weight_decay=0.1)
        found = {}
        for step in range(8):
            if step in (4, 6):
                p.grad = None
                p.data = gradient(Piece(({4: 3100, 6: 700}[step],)), f32, 99)
                opt.state[p] = {}
            p.grad = None if step in (1, 2) else gradient(Piece(tuple(p.shape)), f32, step)
            q.grad = None if step == 2 else gradient(Piece((40,)), f32, 50 + step)
            before = snapshot([p], opt)
            opt.step()
            if p.grad is None:
                assert_same(snapshot([p], opt), before)
            found.update({f"{step} {name}": value for name, value in snapshot([p, q], opt).items()})
        results.append(found)
    assert_same(*results)
    assert launches == [4, 4, 4, 5, 5, 2, 2]  # none where no gradient is there


# Buckets --------------------------------------------------------------------------------------------------------------


def mixed(backend: str, device: str = "cpu") -> tuple[Any, list[nn.Parameter]]:
    """An optimizer over all pairs of dtypes, two parameters of each, in two groups."""
    params: list[Any] = []
    for k, (dtype, grad_dtype) in enumerate(DTYPES):
        params += make_params([Piece((33,)), Piece((7, 5), "transposed")], dtype, grad_dtype, k, device)
    groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.03, "lr": 0.2}]
    return wd_kernels.AdamW(groups, lr=0.1, amsgrad=True, backend=backend), params


def test_one_launch_a_bucket(backend: str, launches: list[int]) -> None:
    """Complex parameters share the buckets of their real parts: ten pairs of dtypes are eight buckets."""
    results = []
    for which in (backend, "reference"):
        opt, params = mixed(which)
        found = {}
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = gradient(Piece(tuple(p.shape)), DTYPES[k // 2][1], 100 * step + k)
            opt.step()
            found.update({f"{step} {name}": value for name, value in snapshot(params, opt).items()})
        results.append(found)
    assert_same(*results)
    assert len(launches) == 3 * len(opt._table.buckets) == 24
    assert sorted(launches[:8]) == [2] * 6 + [4] * 2


def test_a_bucket_without_elements_is_not_launched(backend: str, launches: list[int]) -> None:
    params = [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(3, dtype=bf16)), nn.Parameter(torch.ones(0, 4))]
    opt = wd_kernels.SGDW(params, lr=0.5, momentum=0.5, weight_decay=0.5, backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert launches == [1, 1]
    assert [float(opt.state[p]["step"]) for p in params] == [2, 2, 2]
    assert params[1].tolist() == [-0.5625] * 3  # 1 - (0.25 + 0.5) = 0.25; 0.25 - (0.0625 + 0.5 * 1.5)


def test_a_parameter_moves_from_one_bucket_to_another(backend: str) -> None:
    """Two of float32 and one of bfloat16, then one and two: all runs are as long as before."""
    results = []
    for which in (backend, "reference"):
        (p, q), (r,) = make_params([Piece((40,))] * 2, f32, f32), make_params([Piece((40,))], bf16, bf16, 1)
        opt = wd_kernels.SGDW([p, q, r], lr=0.1, momentum=0.9, weight_decay=0.1, backend=which)
        found = {}
        for step in range(4):
            if step == 2:
                q.grad = None
                q.data = q.data.to(bf16)
                opt.state[q] = {}
            for k, t in enumerate((p, q, r)):
                t.grad_dtype = t.dtype
                t.grad = gradient(Piece((40,)), t.dtype, 10 * step + k)
            opt.step()
            found.update({f"{step} {name}": value for name, value in snapshot([p, q, r], opt).items()})
        results.append(found)
    assert_same(*results)


def test_465_groups_in_one_launch(backend: str, launches: list[int]) -> None:
    results = []
    for which in (backend, "reference"):
        params = make_params([Piece((1 + k % 3,)) for k in range(465)], f32, f32)
        groups = [{"params": [p], "lr": 1e-3 * (k % 50), "weight_decay": 0.01 * k} for k, p in enumerate(params)]
        opt = wd_kernels.AdamW(groups, backend=which)
        for step in range(2):
            for k, p in enumerate(params):
                p.grad = gradient(Piece((1 + k % 3,)), f32, 1000 * step + k)
            opt.step()
        results.append(snapshot(params, opt))
    assert_same(*results)
    assert launches == [465, 465]


# Anything else --------------------------------------------------------------------------------------------------------


@st.composite
def lives(draw: Any) -> dict[str, Any]:
    """Parameters with dtypes, sizes and offsets, their groups, the steps they miss, and the size of a chunk."""
    one = st.fixed_dictionaries(
        {
            "dtypes": st.sampled_from(REAL),
            "n": st.sampled_from((0, 1, 31, 130, 512, 1023, 1025, 1600)) | st.integers(0, 1300),
            "offsets": st.tuples(st.integers(0, 4), st.integers(0, 4)),
            "group": st.integers(0, 2),
            "misses": st.sets(st.integers(0, 2)),
        }
    )
    return {
        "params": draw(st.lists(one, min_size=1, max_size=5)),
        "case": draw(st.sampled_from(cases())),
        "rates": draw(st.lists(st.sampled_from((0.0, 0.01, 0.3)), min_size=9, max_size=9)),
        "size": draw(st.sampled_from((1024, 2048))),
        "clip": draw(st.sampled_from((1.0, 0.3))),
    }


def live(life: dict[str, Any], backend: str) -> Iterator[dict[str, Tensor]]:
    case, params, buffers = life["case"], [], []
    for k, one in enumerate(life["params"]):
        (start,) = make_params([Piece((one["n"],))], *one["dtypes"], seed=k)
        buffers.append(guarded(start.detach(), one["offsets"][0]))
        params.append(nn.Parameter(buffers[-1][1]))
        params[-1].grad_dtype = one["dtypes"][1]
    groups = [
        {"params": [p for p, one in zip(params, life["params"], strict=True) if one["group"] == g], "weight_decay": d}
        for g, d in enumerate((0.1, 0.02, 0.3))
    ]
    opt = optimizer(case, groups, backend)
    opt._table.control[0] = life["clip"]
    for step in range(3):
        for g, group in enumerate(opt.param_groups):
            group["lr"] = life["rates"][3 * step + g]
        for k, (p, one) in enumerate(zip(params, life["params"], strict=True)):
            values = gradient(Piece((one["n"],)), one["dtypes"][1], 10 * step + k)
            p.grad = None if step in one["misses"] else guarded(values, one["offsets"][1])[1]
        opt.step()
        for buffer, view in buffers:
            assert_canaries(buffer, view, f"{view.numel()} elements")
        yield snapshot(params, opt)


@settings(
    max_examples=60, deadline=None, derandomize=bool(os.environ.get("CI")), suppress_health_check=list(HealthCheck)
)
@given(life=lives())
def test_any_life_equals_the_reference(backend: str, life: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        of_size(life["size"], patch)
        found = list(live(life, backend))
    for a, b in zip(found, live(life, "reference"), strict=True):
        assert_same(a, b)


# Failures -------------------------------------------------------------------------------------------------------------


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no such luck")


def upload_fails(patch: pytest.MonkeyPatch, kind: Any) -> None:
    patch.setattr(DeviceCopy, "_send", fail)


def second_kernel_fails(patch: pytest.MonkeyPatch, kind: Any) -> None:
    """The first bucket is ready to go then."""
    calls, launch = [], kind.launch

    def prepared(*args: Any) -> Any:
        calls.append(1)
        return launch(*args) if len(calls) % 2 else fail()

    patch.setattr(kind, "launch", prepared)


def first_launch_fails(patch: pytest.MonkeyPatch, kind: Any) -> None:
    patch.setattr(kind, "launch", lambda *args: fail)


@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("spoil", [upload_fails, second_kernel_fails, first_launch_fails])
def test_a_failure_leaves_everything(backend: str, spoil: Callable[..., None], steps: int, rule: str) -> None:
    """Parameters, states and counts are as they were; the steps after it are as if it had not been tried."""
    case = Case(rule, "any", {"amsgrad": True} if rule == "adamw" else {"momentum": 0.9, "dampening": 0.5})
    twins = []
    for _ in range(2):
        params = [*make_params(SMALL[:6], f32, f32), *make_params(SMALL[:6], bf16, bf16)]
        twins.append((params, optimizer(case, params, backend, weight_decay=0.1)))

    def gradients(step: int) -> None:
        for params, _ in twins:
            for k, p in enumerate(params):
                missing = (k + step) % 5 == 4
                p.grad = None if missing else gradient(Piece(tuple(p.shape)), p.dtype, 100 * step + k)

    for step in range(steps):
        gradients(step)
        for _, opt in twins:
            opt.step()
    (params, opt), (others, twin) = twins
    gradients(7)
    before = snapshot(params, opt)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, type(BACKENDS[backend]))
            with pytest.raises(RuntimeError, match="no such luck"):
                opt.step()
    after = snapshot(params, opt)
    assert_same({name: after[name] for name in before}, before)
    assert all(
        not bool(bits(after[name]).any()) for name in after.keys() - before.keys()
    )  # states that are yet to begin
    for step in (7, 8):
        gradients(step)
        opt.step()
        twin.step()
        assert_same(snapshot(params, opt), snapshot(others, twin))
    assert not torch.equal(before["0"], params[0])
