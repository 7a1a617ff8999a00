"""Gradients of several backward passes: added up in float32, stepped as one, with a norm that needs no other pass."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import DTYPES, SMALL, bf16, f16, f32, f64, gradient, make_params, snapshot
from engines import CPU, ENGINES, GPU, SOURCES, Engine, engine_params
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import wd_kernels
from wd_kernels import SGDW, AdamW, accumulation, reference, release_gradients, sums
from wd_kernels.backends import BACKENDS
from wd_kernels.functional import accumulate_, sgdw_

ROUNDS = 3
#: Of the 2nd round on, these have no gradient in the first pass, and these in the second.
LATE, EARLY = (4, 7), (5,)


def dtype_of(p: Tensor) -> torch.dtype:
    return p.dtype if p.dtype in (f64, torch.complex64, torch.complex128) else f32


def exact_norm(tensors: list[Tensor], dtype: torch.dtype) -> float:
    words = torch.zeros(sums.WORDS, dtype=torch.int64)
    for t in tensors:
        sums.add(words, reference.squares(t.cpu(), dtype))
    return math.sqrt(sums.value(words))


# Lists ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "dtypes"),
    [
        pytest.param(e, pair, id=f"{e}-{pair[1]}", marks=[pytest.mark.gpu] * (e in GPU))
        for k, e in enumerate(ENGINES)
        for pair in (((f32, bf16), (f32, f32), (f32, f16), (f64, f64))[k % 4 :: 4] if e.is_ptx else DTYPES)
        if pair[0] not in (bf16, f16)
    ],
    indirect=["engine"],
)
def test_every_engine_has_the_references_bits(engine: Engine, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Against torch's additions; new ones among others; tensors that lie in any way."""
    dtype, grad_dtype = dtypes
    pieces = [piece for piece in SMALL if piece.layout != "gaps"]
    totals = [torch.empty_like(p.detach()).fill_(math.nan) for p in make_params(pieces, dtype, dtype)]
    totals = [t.to(engine.device) for t in totals]
    expected = [t.cpu() for t in totals]
    for step in range(ROUNDS):
        grads = [gradient(piece, grad_dtype, 10 * step + k, engine.device) for k, piece in enumerate(pieces)]
        new = [step == 0 or (step == 2 and k % 4 == 1) for k in range(len(pieces))]
        before = [g.clone() for g in grads]
        norm = accumulate_(totals, grads, new=True if step == 0 else new, backend=engine.backend)
        expected = [
            g.cpu().to(dtype) if first else t + g.cpu() for t, g, first in zip(expected, grads, new, strict=True)
        ]
        for total, wanted, grad, held in zip(totals, expected, grads, before, strict=True):
            assert_same_bits(total.cpu(), wanted)
            assert torch.equal(grad, held)
        arithmetic = f64 if dtype in (f64, torch.complex128) else f32
        assert norm.dtype == f64
        assert norm.device == engine.device
        assert norm.item() == exact_norm(totals, arithmetic)
        parts = [torch.view_as_real(t.cpu().to(torch.complex128).resolve_conj().resolve_neg()) for t in totals]
        whole = math.sqrt(math.fsum(x * x for t in parts for x in t.flatten().tolist()))
        assert norm.item() == pytest.approx(whole, rel=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("engine", engine_params((*CPU, *SOURCES, Engine("reference", ""))), indirect=True)
def test_what_is_no_number_stays_that(engine: Engine) -> None:
    """An infinity less another is a NaN, of a new one every bit stays; the norm says so. Complex parts are apart."""
    name: Any = engine.backend
    total = torch.tensor([1 + 1j, complex(math.inf, 1)] * 9)
    accumulate_([total], [torch.tensor([complex(math.inf, 1), 1 + 1j] * 9)], backend=name)
    assert_same_bits(total, torch.tensor([complex(math.inf, 2), complex(math.inf, 2)] * 9))
    special = torch.tensor([-0.0, math.inf, -math.inf, math.nan, 1e-45, 1.0] * 300)
    memory = torch.full((2 * len(special),), 7.0)
    total = memory[: len(special)]
    norm = accumulate_([total], [special], new=True, backend=name)
    assert_same_bits(total, special)
    assert bool((memory[len(special) :] == 7).all())
    assert norm.isnan()
    norm = accumulate_([total], [torch.full_like(special, -math.inf)], backend=name)
    assert_same_bits(total, special + -math.inf)
    total = torch.ones(2000)
    assert accumulate_([total], [torch.full((2000,), math.inf)], backend=name).item() == math.inf
    assert accumulate_([], [], backend=name).item() == 0


def test_one_flat_buffer_is_a_list_of_one() -> None:
    """And what clips a functional step follows from the norm."""
    w, total = torch.linspace(-1, 1, 5000), torch.empty(5000)
    grads = [torch.linspace(-k, 3, 5000).bfloat16() for k in (1, 2)]
    accumulate_([total], [grads[0]], new=True)
    norm = accumulate_([total], [grads[1]])
    exact = (grads[0].float() + grads[1].float()).double().norm().item()
    assert norm.item() == pytest.approx(exact, rel=1e-7)
    expected = w.double() * (1 - 0.1 * 0.2) - 0.1 * total.double() * (2.0 / exact)
    sgdw_([w], [total], [], step=1, lr=0.1, weight_decay=0.2, decay="lr_scaled", grad_factor=2.0 / norm)
    torch.testing.assert_close(w.double(), expected, rtol=1e-6, atol=1e-7)


def tensor(n: int = 2, **how: Any) -> Tensor:
    return torch.ones(n, **how)


def overlapping() -> Tensor:
    t = tensor(4)
    return accumulate_([t, t[2:]], [tensor(4), tensor()])


def itself() -> Tensor:
    t = tensor()
    return accumulate_([t], [t])


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no list": (lambda: accumulate_(tensor(), [tensor()]), TypeError, "accumulators in accumulate_ is a Tensor"),
    "lengths": (lambda: accumulate_([tensor()], []), ValueError, "grads in accumulate_ has 0 entries: accumulators"),
    "new": (lambda: accumulate_([tensor()], [tensor()], new=[]), ValueError, "new in accumulate_ has 0"),
    "no truth": (lambda: accumulate_([tensor()], [tensor()], new=1), TypeError, "new=1 in accumulate_: allowed"),  # type: ignore[arg-type]
    "narrow": (
        lambda: accumulate_([tensor(dtype=f16)], [tensor(dtype=f16)]), TypeError,
        r"accumulators\[0\] has dtype torch.float16: gradients are added up in torch.float32",
    ),
    "integers": (
        lambda: accumulate_([tensor(dtype=torch.int32)], [tensor()]), TypeError, r"accumulators\[0\] has dtype",
    ),
    "dtype": (lambda: accumulate_([tensor()], [tensor(dtype=f64)]), TypeError, r"grads\[0\] has dtype"),
    "shape": (lambda: accumulate_([tensor()], [tensor(3)]), ValueError, r"grads\[0\] has shape \(3,\)"),
    "no tensor": (lambda: accumulate_([tensor()], [None]), TypeError, r"grads\[0\] is a NoneType"),  # type: ignore[list-item]
    "sparse": (lambda: accumulate_([tensor()], [tensor().to_sparse()]), RuntimeError, r"grads\[0\] has layout"),
    "twice": (overlapping, ValueError, r"accumulators\[\d\] .*accumulators\[\d\]"),
    "itself": (itself, ValueError, r"accumulators\[0\].* grads\[0\]|grads\[0\].* accumulators\[0\]"),
    "gaps": (lambda: accumulate_([tensor(4)[::2]], [tensor()]), ValueError, r"accumulators\[0\] .* gaps"),
    "backend": (lambda: accumulate_([tensor()], [tensor()], backend="fast"), ValueError, "backend='fast'"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_lists_are_errors_by_name(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_version_is_counted() -> None:
    totals = [torch.ones(3), torch.ones(3, dtype=f64)]
    before = [t._version for t in totals]
    accumulate_(totals[:1], [torch.ones(3)])
    accumulate_(totals, [torch.ones(3), torch.ones(3, dtype=f64)])
    assert [t._version for t in totals] == [before[0] + 2, before[1] + 1]


def test_long_ones_while_other_threads_run() -> None:
    """These are added without the interpreter's lock, and their memory is held."""
    total, grad, ended = torch.zeros(1 << 23), torch.full((1 << 23,), 0.5, dtype=bf16), threading.Event()

    def spin() -> None:
        while not ended.is_set():
            pass

    other = threading.Thread(target=spin)
    other.start()
    try:
        norm = [accumulate_([total], [grad]) for _ in range(2)][1]
    finally:
        ended.set()
        other.join()
    assert bool((total == 1).all())
    assert norm.item() == math.sqrt(1 << 23)


def test_within_torch_compile() -> None:
    """A clean break; the numbers are those of the call."""
    grads = [torch.linspace(-1, 2, 40)]

    def step(totals: list[Tensor], factor: Tensor) -> Tensor:
        scaled = [g * factor for g in grads]
        return accumulate_(totals, scaled) + 1

    totals, others = [torch.ones(40)], [torch.ones(40)]
    assert_same_bits(torch.compile(step, backend="eager")(totals, torch.tensor(2.0)), step(others, torch.tensor(2.0)))
    assert_same_bits(totals[0], others[0])


# The optimizer --------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.7)}
LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "clip": ({"max_grad_norm": 0.9}, {}),
    "own": ({"max_grad_norm": 3.0, "skip_nonfinite": True}, {"max_grad_norm": 0.4}),
}


def groups_of(params: list[Tensor], own: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.3, **own}]


def run(dtype: torch.dtype, limits: str, backend: str, device: Any = "cpu", by_hand: bool = False) -> list[Any]:
    """All there is after each step of three backward passes; `by_hand`: torch adds them, and the sums are gradients."""
    options, own = LIMITS[limits]
    params = make_params(SMALL, dtype, f32 if by_hand and dtype != f64 else dtype, device=device)
    opt = AdamW(groups_of(params, own), **OPTIONS, **options, backend=backend)
    found = []
    for step in range(4):
        totals: dict[int, Tensor] = {}
        for micro in range(3):
            for k, (p, piece) in enumerate(zip(params, SMALL, strict=True)):
                missing = step > 0 and ((micro == 0 and k in LATE) or (micro == 1 and k in EARLY) or k == 6 == 5 + step)
                if missing:
                    continue
                grad = gradient(piece, dtype, 1000 * step + 100 * micro + k, device)
                if step == 2 and micro == 1 and k == 4 and limits == "own":
                    grad = torch.full_like(grad, math.nan)
                if by_hand:
                    totals[k] = grad.to(dtype_of(p)) if k not in totals else totals[k] + grad
                else:
                    p.grad = grad
            if not by_hand and (micro < 2 or step % 2):  # else the step adds the last one
                opt.accumulate()
                assert all(p.grad is None for p in params)
        for k, total in totals.items():
            params[k].grad = total
        opt.step()
        found.append(snapshot(params, opt) | {"skipped": opt.skipped.cpu()})
        if opt.grad_norm is not None:
            found[-1] |= {"norm": opt.grad_norm.cpu(), "norms": opt.group_grad_norms.cpu()}
        if by_hand:
            opt.zero_grad()
        else:
            assert all(p.grad is None for p in params)
            assert opt.accumulated_grads == {}
            opt._accumulators.lent = False  # nobody has any
    return found


ROWS = [
    (e, dtypes, limits)
    for k, e in enumerate(ENGINES)
    for j, dtypes in enumerate((bf16, f32, f64, f16))
    for i, limits in enumerate(LIMITS)
    if (j, i) in ([(0, 2)] if e.is_ptx else [(0, 2), (0, 0), (1 + k % 3, 1)])
]


@pytest.mark.parametrize(
    ("engine", "dtype", "limits"),
    [pytest.param(*r, id="-".join(map(str, r)), marks=[pytest.mark.gpu] * (r[0] in GPU)) for r in ROWS],
    indirect=["engine"],
)
def test_a_step_is_that_of_the_sums(engine: Engine, dtype: torch.dtype, limits: str) -> None:
    """Its bits and norms are those of an optimizer that is given torch's sums as gradients."""
    found = run(dtype, limits, engine.backend, engine.device)
    expected = run(dtype, limits, "reference", by_hand=True)
    assert [bool(own["skipped"]) for own in expected] == [False, False, limits == "own", False]
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert set(b) <= set(a)
        for name in b:
            assert_same_bits(a[name], b[name], f"step {step}: {name}")


class Counting:
    """How often each of a backend's methods was called."""

    def __init__(self, patch: pytest.MonkeyPatch, backend: type, *names: str) -> None:
        self.calls = dict.fromkeys(names, 0)
        for name in names:
            patch.setattr(backend, name, self._counted(name, getattr(backend, name)))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **how: Any) -> Any:
            self.calls[name] += 1
            return method(*given, **how)

        return counted


def micro_step(opt: Any, params: list[Tensor], k: int) -> None:
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 0.25 * (k + 1) - i)


@pytest.mark.parametrize("engine", engine_params(SOURCES), indirect=True)
def test_the_squares_of_what_was_added_up_last_are_known(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for each backward pass, none for the norm: but where a parameter took no part, or others may write."""
    name: Any = engine.backend
    params = [nn.Parameter(torch.ones(40 + k, dtype=bf16)) for k in range(3)]
    opt = AdamW(params, max_grad_norm=0.5, backend=name)
    counted = Counting(monkeypatch, type(BACKENDS[name]), "squares")

    def launches(act: Callable[[], Any]) -> int:
        before = counted.calls["squares"]
        act()
        return counted.calls["squares"] - before

    for k in range(2):
        micro_step(opt, params, k)
        assert launches(opt.accumulate) == 1
    assert launches(opt.step) == 0
    exact = [0.25 + 0.5 - 2 * i for i in range(3)]
    norm = math.sqrt(sum((40 + i) * x * x for i, x in enumerate(exact)))
    assert opt.grad_norm.item() == pytest.approx(norm, rel=1e-7)
    for k in range(2):
        micro_step(opt, params, k)
        if k == 1:
            params[0].grad = None
        opt.accumulate()
    assert launches(opt.step) == 1
    exact[0] = 0.25
    norm = math.sqrt(sum((40 + i) * x * x for i, x in enumerate(exact)))
    assert opt.grad_norm.item() == pytest.approx(norm, rel=1e-7)
    micro_step(opt, params, 0)
    opt.accumulate()
    for t in opt.accumulated_grads.values():
        t.mul_(2.0)
    assert launches(opt.step) == 1
    assert opt.grad_norm.item() == pytest.approx(
        2 * math.sqrt(sum((40 + i) * (0.25 - i) ** 2 for i in range(3))), rel=1e-7
    )


def test_sums_are_not_taken_for_those_of_other_groups() -> None:
    """Parameters that change places after their squares were added up: limits of groups follow them."""
    params = [nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))]
    opt = SGDW(
        [{"params": [params[0]], "max_grad_norm": 1e-3}, {"params": [params[1]]}], lr=1.0, max_grad_norm=math.inf
    )
    micro_step(opt, params, 3)  # gradients of 1 and 0
    opt.accumulate()
    for group, p in zip(opt.param_groups, reversed(params), strict=True):
        group["params"] = [p]
    opt.step()
    assert opt.group_grad_norms.tolist() == [0.0, math.sqrt(8)]


def test_flat_gradients_stay_where_they_are() -> None:
    """They are zeroed, and added whoever has written them; beside parameters that are not flat, too."""
    torch.manual_seed(0)
    flat, plain = (nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 7)) for _ in range(2))
    plain.load_state_dict(flat.state_dict())
    (buffer,) = wd_kernels.flatten_(flat[0].parameters())
    opts = [AdamW(model.parameters(), **OPTIONS, max_grad_norm=0.3) for model in (flat, plain)]
    for step in range(3):
        for micro in range(3):
            for model, opt in zip((flat, plain), opts, strict=True):
                x = torch.randn(5, 40, generator=torch.Generator().manual_seed(10 * step + micro))
                model(x).square().sum().backward()
                if micro < 2:
                    opt.accumulate()
        for opt in opts:
            opt.step()
        assert buffer.grad is not None
        assert not buffer.grad.any()
        for p, q in zip(flat.parameters(), plain.parameters(), strict=True):
            assert (p.grad is not None) == (p.shape in ((30, 40), (30,)))
            assert_same_bits(p.detach(), q.detach())
        assert_same_bits(opts[0].grad_norm, opts[1].grad_norm)
    before = flat[0].weight.detach().clone()
    for k in range(3):  # as a graph's replays do it: no version is counted
        buffer.grad.numpy()[:] = k + 1.0
        opts[0].accumulate()
    assert bool((opts[0].accumulated_grads[flat[0].weight] == 6).all())
    opts[0].step()
    assert not torch.equal(before, flat[0].weight)


def test_what_interrupts_adds_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of a signal's handler, as soon as the gradients are added, and as soon as the step is taken."""
    p, opt = one(f32)
    own = opt._accumulators

    class Interrupted(Exception):
        pass

    def interrupted(method: Callable[..., Any]) -> Callable[..., Any]:
        calls = []

        def once(*given: Any) -> Any:
            if not calls:
                calls.append(None)
                raise Interrupted
            return method(*given)

        return once

    monkeypatch.setattr(own, "_note", interrupted(own._note))
    monkeypatch.setattr(accumulation, "_drop_gradients", interrupted(accumulation._drop_gradients))
    with pytest.raises(Interrupted):
        opt.accumulate()
    assert p.grad is None
    opt.accumulate()
    assert opt.accumulated_grads[p].tolist() == [0.5] * 4
    step = opt._table.step

    def after(*given: Any) -> None:
        step(*given)
        raise Interrupted

    monkeypatch.setattr(opt._table, "step", after)
    with pytest.raises(Interrupted):
        opt.step()
    monkeypatch.undo()
    before = p.detach().clone()
    assert float(opt.state[p]["step"]) == 1
    opt.step()
    assert_same_bits(p.detach(), before)
    opt.zero_grad()


def test_a_schedule_that_moves_parameters() -> None:
    """Their sums follow them: what calls user code comes after the groups were looked at."""
    found = []
    for accumulates in (False, True):
        params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))]
        opts: list[Any] = []

        def moving(t: int, params: list[Tensor] = params, opts: list[Any] = opts) -> float:
            opts[0].param_groups[0]["params"] = [params[1], params[0]]
            return 1.0

        opt = SGDW(params, lr=1.0, schedule=moving)
        opts.append(opt)
        for k, p in enumerate(params):
            p.grad = torch.full_like(p, 10.0**k)
        if accumulates:
            opt.accumulate()
        opt.step()
        found.append([p.tolist() for p in params])
    assert found[0] == found[1] == [[-1.0] * 3, [-10.0] * 3]


def test_the_sums_of_what_left_are_not_taken() -> None:
    a, b = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    opt = SGDW([a, b], lr=1.0, max_grad_norm=100.0)
    a.grad, b.grad = torch.full((4,), 100.0), torch.full((4,), 0.1)
    opt.accumulate()
    opt.param_groups[0]["params"] = [b]
    b.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.accumulate()
    b.grad = None
    opt.step()
    assert opt.grad_norm.item() == pytest.approx(0.2)
    assert b.tolist() == pytest.approx([-0.1] * 4)


def test_a_step_that_fails_adds_nothing_twice() -> None:
    params, others = ([nn.Parameter(torch.ones(9, dtype=bf16))] for _ in range(2))
    opts = [SGDW(own, lr=0.5, momentum=0.9, weight_decay=0.1) for own in (params, others)]
    for opt, own in zip(opts, (params, others), strict=True):
        for k in range(2):
            micro_step(opt, own, k)
            if k == 0:
                opt.accumulate()
    opts[0].param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        opts[0].step()
    opts[0].param_groups[0]["lr"] = 0.5
    for opt in opts:
        opt.step()
    for name, t in snapshot(others, opts[1]).items():
        assert_same_bits(snapshot(params, opts[0])[name], t, name)


def one(dtype: torch.dtype = bf16, **options: Any) -> tuple[Tensor, Any]:
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    opt = AdamW([("w", p)], **OPTIONS, **options)
    p.grad = torch.full_like(p, 0.5)
    return p, opt


def test_zero_grad_loses_nothing() -> None:
    _, opt = one()
    opt.accumulate()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) while gradients are accumulated .* discard_accumulated\(\)"):
        opt.zero_grad()
    (row,) = [row for row in opt.memory_report().rows if row.role == "accumulators"]
    assert (row.stored, row.bytes, row.torch) == (("float32",), 16, 0)
    opt.discard_accumulated()
    assert "accumulators" not in str(opt.memory_report())
    opt.zero_grad()
    opt.step()
    assert opt.state == {}


def test_what_is_released_is_not_accumulated() -> None:
    model = nn.Linear(3, 2)
    opt = AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    opt.accumulate()
    with pytest.raises(RuntimeError, match=r"accumulated that no step has taken: call step"):
        release_gradients(model, opt)
    opt.step()
    release = release_gradients(model, opt)
    with pytest.raises(RuntimeError, match=r"accumulate\(\) while gradients are released"):
        opt.accumulate()
    release.remove()
    opt.accumulate()


def test_bad_gradients_are_errors_by_name() -> None:
    p, opt = one()
    p.grad = torch.ones(4, dtype=bf16).to_sparse()
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 'w' .* has layout torch.sparse_coo"):
        opt.accumulate()
    assert p.grad is not None
    p.grad = torch.ones(4, dtype=bf16)
    opt.accumulate()
    p.data = torch.ones(5, dtype=bf16)
    p.grad = torch.ones(5, dtype=bf16)
    with pytest.raises(ValueError, match=r"the gradient of parameter 'w' .* has shape \(5,\)"):
        opt.accumulate()
    opt.discard_accumulated()
    opt.accumulate()
    opt.step()
    assert opt.state[p]["exp_avg"].shape == (5,)
    q = nn.Parameter(torch.ones(3, device="meta"))
    other = AdamW([q])
    q.grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="parameter 0 of group 0 is on the meta device"):
        other.accumulate()


def test_within_modes() -> None:
    """What is made in inference mode is used outside of it; tensors without memory are errors."""
    p, opt = one(f32)
    with torch.inference_mode():
        opt.accumulate()
    p.grad = torch.full((4,), 0.25)
    opt.accumulate()
    assert opt.accumulated_grads[p].tolist() == [0.75] * 4
    p.grad = torch.ones(4)
    lists = [torch.zeros(3)], [torch.ones(3)]
    calls: tuple[Callable[[], Any], ...] = (opt.accumulate, lambda: accumulate_(*lists))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for call in calls:
            with pytest.raises(RuntimeError, match=r"cannot be under FakeTensorMode"):
                call()


def test_zeros_without_memory_are_gradients() -> None:
    p, opt = one(f32)
    opt.accumulate()
    p.grad = torch._efficientzerotensor((4,))
    opt.accumulate()
    assert opt.accumulated_grads[p].tolist() == [0.5] * 4


def test_parameters_of_another_dtype_get_other_accumulators() -> None:
    """Where nothing is in them; what is no parameter any more has none."""
    p, opt = one(f32)
    opt.accumulate()
    opt.step()
    p.data = p.data.double()
    p.grad = torch.full((4,), 1e-9, dtype=f64)
    opt.state.clear()
    opt.accumulate()
    ((known, total),) = opt.accumulated_grads.items()
    assert known is p
    assert_same_bits(total, torch.full((4,), 1e-9, dtype=f64))
    q = nn.Parameter(torch.ones(2))
    opt.param_groups[0]["params"] = [q]
    q.grad = torch.ones(2)
    opt.accumulate()
    assert list(opt.accumulated_grads) == [q]


def test_checkpoints_and_copies() -> None:
    """What is accumulated stays when a state is loaded; neither checkpoints nor copies have it."""
    p, opt = one()
    opt.accumulate()
    assert "accumul" not in str(opt.state_dict())
    opt.load_state_dict(opt.state_dict())
    assert len(opt.accumulated_grads) == 1
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other.accumulated_grads == {}
        other.step()
        assert not other.state
    opt.step()
    assert float(opt.state[p]["exp_avg"][0]) == pytest.approx(0.1, rel=1e-6)


# With a GradScaler ----------------------------------------------------------------------------------------------------


def scaled(opt: Any, p: Tensor, scaler: Any, value: float, last: bool) -> None:
    scaler.scale((p * value).sum()).backward()
    if not last:
        opt.accumulate()


@pytest.mark.parametrize("value", [1.5, math.inf])
def test_a_scaler_unscales_the_sum(value: float) -> None:
    """The last gradients are left to the step, which sees an infinity in the others."""
    p = nn.Parameter(torch.ones(4, dtype=f16))
    opt = SGDW([p], lr=0.5, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaled(opt, p, scaler, value, last=False)
    scaled(opt, p, scaler, 0.25, last=True)
    scaler.step(opt)
    scaler.update()
    assert bool(opt.skipped) == (value == math.inf)
    expected = 1.0 if value == math.inf else 1 - 0.5 * 0.1 - 0.5 * 1.75
    assert p.tolist() == [pytest.approx(expected, abs=1e-3)] * 4
    assert opt.accumulated_grads == {}


def test_what_a_scaler_does_not_know_of_is_an_error() -> None:
    p = nn.Parameter(torch.ones(4))
    for unscale, last, message in (
        (True, True, r"GradScaler's unscale_\(\) has not unscaled"),
        (False, False, "leave the last micro-batch's to step"),
    ):
        opt = SGDW([p], lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaled(opt, p, scaler, 1.0, last=False)
        scaled(opt, p, scaler, 1.0, last=last)
        if unscale:
            scaler.unscale_(opt)
        with pytest.raises(RuntimeError, match=message):
            scaler.step(opt)
        assert bool((p == 1).all())
        p.grad = None


# Lives ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["pass", "step", "discard", "write", "load", "group"]), min_size=3, max_size=14),
    st.sampled_from(["cpu", "reference"]),
    st.integers(0, 1000),
)
def test_lives(acts: list[str], backend: str, seed: int) -> None:
    """Against sums that torch makes, given to another optimizer: whatever comes in whatever order."""
    random = torch.Generator().manual_seed(seed)
    ours, others = (
        [nn.Parameter(torch.ones(n, dtype=d)) for n, d in ((5, bf16), (33, f32), (2, f16))] for _ in range(2)
    )
    opt, other = (SGDW([own[0], own[1]], lr=0.1, momentum=0.5, weight_decay=0.1, max_grad_norm=1.0, backend=b)
                  for own, b in ((ours, backend), (others, "reference")))  # fmt: skip
    totals: dict[int, Tensor] = {}
    used = 2
    for act in acts:
        if act == "pass":
            if any(p.grad is not None for p in ours):
                opt.accumulate()
            for k in range(used):
                if torch.rand((), generator=random) < 0.7:
                    grad = torch.randn(ours[k].shape, generator=random).to(ours[k].dtype)
                    ours[k].grad = grad
                    totals[k] = totals[k] + grad if k in totals else grad.float()
            if not opt._accumulators.full or torch.rand((), generator=random) < 0.8:  # else the next act adds them
                opt.accumulate()
        elif act == "discard":
            opt.discard_accumulated()
            opt.zero_grad()
            totals.clear()
        elif act == "write":
            if any(p.grad is not None for p in ours):
                opt.accumulate()
            for t in opt.accumulated_grads.values():
                t.mul_(0.5)
            totals = {k: t * 0.5 for k, t in totals.items()}
        elif act == "load":
            for own in (opt, other):
                own.load_state_dict(own.state_dict())
        elif act == "group" and used == 2:
            used = 3
            opt.add_param_group({"params": [ours[2]], "weight_decay": 0.2})
            other.add_param_group({"params": [others[2]], "weight_decay": 0.2})
        elif act == "step":
            for k, total in totals.items():
                others[k].grad_dtype = f32
                others[k].grad = total
            opt.step()
            other.step()
            if totals:
                assert_same_bits(opt.grad_norm, other.grad_norm)
            other.zero_grad()
            totals.clear()
        for k in range(used):
            assert_same_bits(ours[k].detach(), others[k].detach(), f"{act}: {k}")
        for a, b in zip(snapshot(ours[:used], opt).items(), snapshot(others[:used], other).items(), strict=True):
            assert_same_bits(a[1], b[1], a[0])
