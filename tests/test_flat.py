"""flatten_: parameters, gradients and states end to end, and the bits of an ordinary optimizer, whatever is done.

The truth is the reference backend on ordinary copies (`Pair`), or a new optimizer on plain copies (`checked_step`).
"""

from __future__ import annotations

import copy
import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import cases
import pytest
import semantics
import test_properties
import torch
from bits import assert_same_optimizers, assert_same_state, assert_untouched
from covering import covered
from hypothesis import given
from hypothesis import strategies as st
from semantics import STATES, all_params, build, checked_step, parameters, plain, set_gradients
from torch import Tensor, nn

from wd_kernels import flat, flatten_, unflatten_
from wd_kernels.flat import place_of
from wd_kernels.records import Segment

walk = semantics.walk
pytestmark = [
    pytest.mark.filterwarnings("ignore:this state has"),
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])

SHAPES = ((4, 4), (7, 5), (33,), (), (2, 3, 2, 3), (1,), (129,))
ALIKE = ((16,),) * 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


def fill(params: Sequence[Tensor], seed: int) -> None:
    """New values in the gradients that are there, which stay the tensors that they are."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        values = torch.randn(p.shape, generator=generator, dtype=torch.complex64 if p.is_complex() else torch.float32)
        if p.grad is not None:
            p.grad.copy_(values)


class Pair:
    """A flat optimizer, and one of the reference on ordinary copies; both are given the same, and must show the same.

    Args:
        split: which group each parameter is in.
    """

    def __init__(
        self, rule: str, params: Sequence[nn.Parameter] | None = None, split: Sequence[int] = (), backend: str = "auto",
        **options: Any,
    ) -> None:  # fmt: skip
        self.params = list(parameters(SHAPES) if params is None else params)
        self.twins = [nn.Parameter(plain(p)) for p in self.params]
        self.buffers = flatten_(self.params)
        self.rule, split = rule, split or [0] * len(self.params)
        self.opt, self.twin = (
            build(
                rule,
                [{"params": [p for p, g in zip(own, split, strict=True) if g == k]} for k in range(max(split) + 1)],
                backend=chosen,
                **options,
            )
            for own, chosen in ((self.params, backend), (self.twins, "reference"))
        )

    def step(self, seed: int, runs: int | None = None, new: bool = True) -> None:
        """One step of both. Gradients that the flat one has get new values, the other copies of them."""
        if new:
            fill(self.params, seed)
        for p, q in zip(self.params, self.twins, strict=True):
            q.grad = None if p.grad is None else plain(p.grad).to(q.dtype)
        for opt in (self.opt, self.twin):
            for g, group in enumerate(opt.param_groups):
                group["lr"] = 0.05 / (1 + seed % 7 + 2 * g)
        before = [(p._version, p.grad is not None, plain(p)) for p in self.params]
        self.opt.step()
        self.twin.step()
        assert_same_optimizers(self.opt, self.twin, f"step {seed}")
        for p, (version, on, old) in zip(self.params, before, strict=True):
            assert (p._version > version) == on
            if p.numel() > 3 and on:
                assert not torch.equal(p, old)
        if runs is not None:
            assert count_runs(self.opt) == runs

    def both(self) -> tuple[tuple[Any, list[Any]], tuple[Any, list[Any]]]:
        return (self.opt, self.params), (self.twin, self.twins)


def count_runs(opt: Any) -> int:
    """How many pieces the launches of the last step had."""
    return int((opt._table.runs[:, Segment.NUMEL] != 0).sum())


def attached(p: Tensor) -> bool:
    place = place_of(p)
    return place is not None and p.grad is not None and flat.attached(p)


# The bits -------------------------------------------------------------------------------------------------------------


def pieces(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = (*SHAPES, (0,), (2, 3, 4, 5), (3, 0))
    drawn = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    values = [torch.randn(s, generator=generator, dtype=drawn).to(dtype) for s in shapes]
    values[4] = values[4].to(memory_format=torch.channels_last)
    values[1] = values[1].t().contiguous().t()
    return [nn.Parameter(v) for v in values]


def life(case: cases.Case, backend: str, steps: int = 4) -> None:
    """Steps of a case: all attached, some missing, all attached again, over two groups."""
    params = pieces(case.dtype)
    options = {"momentum": 0.0, **case.options} if case.rule == "sgdw" else dict(case.options)
    pair = Pair(case.rule, params, split=[i >= 5 for i in range(len(params))], backend=backend, **options)
    for t in range(steps):
        kept = params[2].grad
        if t == 2:
            params[2].grad = None
        # Channels last, say, is no reason to step a parameter by itself; empty ones are not flat.
        pair.step(t, runs=None if t >= 2 else 2)
        params[2].grad = kept
    assert params[4].is_contiguous(memory_format=torch.channels_last)
    assert not params[1].is_contiguous()


@pytest.mark.parametrize(
    ("case", "walk"),
    cases.covering_cases(dtypes=[(d, d) for d in DTYPES], walk=("native", "python")),
    indirect=["walk"],
    ids=cases.ids,
)
def test_bits(case: cases.Case, walk: str) -> None:
    """Every variant and decay mode, in every dtype."""
    life(case, "cpu", steps=6)


@covered(body=cases.BODIES, dtype=DTYPES, backend=("reference", "triton"))
def test_bits_of_other_backends(body: cases.Case, dtype: torch.dtype, backend: str) -> None:
    (case,) = cases.with_dtypes([body], [(dtype, dtype)])
    life(case, backend)


# Runs -----------------------------------------------------------------------------------------------------------------


@both
def test_one_run_for_one_group(rule: str, walk: str) -> None:
    pair = Pair(rule)
    for t in range(4):
        pair.step(t, runs=1)
        pair.opt.zero_grad(set_to_none=False)
        assert all(map(attached, pair.params))
        assert not any(bool(p.grad.any()) for p in pair.params if p.grad is not None)


@both
def test_runs_of_groups(rule: str, walk: str) -> None:
    """Groups in the order of the buffer are a run each; alternating ones are apart."""
    for split, runs in (((0, 0, 1, 1, 1), 2), ((0, 1, 0, 1, 0), 5), ((1, 1, 0, 0, 1), 3), ((0, 1, 2, 2, 3), 4)):
        pair = Pair(rule, parameters(ALIKE), split)
        for t in range(3):
            pair.step(t, runs=runs)


@both
def test_runs_where_gradients_are_missing(rule: str, walk: str) -> None:
    pair = Pair(rule, parameters(ALIKE))
    grads = [p.grad for p in pair.params]
    for t, (missing, runs) in enumerate((((), 1), ((2,), 2), ((1, 3), 3), ((0, 4), 1), ((0, 1, 2), 1), ((), 1))):
        # Who missed a step has another count for good, so all are given the same one again.
        for opt, params in pair.both():
            if t:
                for p in params:
                    opt.state[p]["step"].fill_(10 * t)
        for i, (p, grad) in enumerate(zip(pair.params, grads, strict=True)):
            p.grad = None if i in missing else grad
        pair.step(t, runs=runs)


@both
def test_runs_of_unlike_counts(rule: str, walk: str) -> None:
    pair = Pair(rule, parameters(ALIKE))
    pair.step(0, runs=1)
    kept, pair.params[2].grad = pair.params[2].grad, None
    pair.step(1, runs=2)
    pair.params[2].grad = kept
    for t in range(2, 4):
        pair.step(t, runs=3)
    for opt, params in pair.both():
        opt.state[params[2]]["step"] += 1
    pair.step(5, runs=1)


@both
@pytest.mark.parametrize("how", ["replaced", "data", "ddp", "other dtype"])
def test_gradients_elsewhere_are_stepped_singly(rule: str, how: str, walk: str) -> None:
    pair = Pair(rule, parameters(ALIKE))
    pair.step(0, runs=1)
    grads = [p.grad for p in pair.params]
    bucket = torch.randn(5 * 16 + 1)
    for i in (1, 2, 3):
        p = pair.params[i]
        assert p.grad is not None
        if how == "replaced":
            p.grad = torch.randn(16)
        elif how == "data":
            p.grad.data = torch.randn(16)
        elif how == "ddp":
            p.grad = bucket[16 * i + 1 : 16 * i + 17]
        else:
            p.grad.data = torch.randn(16).bfloat16()
    for t in range(1, 4):
        if how == "other dtype":  # not what the twins have, but exact in it
            fill(pair.params, t)
            with torch.no_grad():
                for p in pair.params:
                    p.grad.copy_(p.grad.bfloat16())
            pair.step(t, new=False, runs=5)
        else:
            pair.step(t, runs=5)
    for p, grad in zip(pair.params, grads, strict=True):
        p.grad = None if how in ("data", "other dtype") else grad  # these lost their memory: they are given new
    flatten_(pair.params)
    for t in range(5, 7):
        pair.step(t, runs=1)


@both
def test_gradients_of_another_width_at_flat_addresses(rule: str, walk: str) -> None:
    """The first half of each stretch as bfloat16: the same addresses, shapes and strides, and nothing to merge."""
    pair = Pair(rule, parameters(ALIKE))
    pair.step(0, runs=1)
    for p in pair.params[1:4]:
        assert p.grad is not None
        p.grad.data = p.grad.data.view(torch.bfloat16)[:16]
    for t in range(1, 4):
        for k, p in enumerate(pair.params):
            assert p.grad is not None
            p.grad.copy_(torch.randn(16, generator=torch.Generator().manual_seed(10 * t + k)).bfloat16())
        pair.step(t, runs=5, new=False)


@both
def test_parameters_of_another_dtype_at_flat_addresses(rule: str, walk: str) -> None:
    """Bits that are read as another dtype are another parameter, though nothing moved."""
    pair = Pair(rule, parameters(ALIKE, torch.float16))
    pair.step(0, runs=1)
    p = pair.params[2]
    assert p.grad is not None
    p.data, p.grad.data = p.data.view(torch.bfloat16), p.grad.data.view(torch.bfloat16)
    for _ in range(3):
        p.grad.copy_(torch.randn(16).bfloat16())
        checked_step(pair.opt)


@both
def test_one_launch_a_bucket(rule: str, launches: list[int]) -> None:
    """However many runs: one of float32, one of bfloat16."""
    params = parameters(ALIKE) + parameters(ALIKE, torch.bfloat16)
    pair = Pair(rule, params, split=[0, 0, 1, 1, 1] * 2, backend="triton")
    assert [b.numel for b in pair.buffers] == [160, 160]
    for t in range(3):
        launches.clear()
        params[3].grad = params[3].grad if t < 2 else None
        pair.step(t, runs=4 if t < 2 else 5)
        assert len(launches) == 2


@both
def test_chunks_follow_the_runs(rule: str, launches: list[int]) -> None:
    """Runs that merge and part from step to step, of more than one block."""
    pair = Pair(rule, parameters([(1030,), (31,), (2050,)]), backend="triton")
    grads = [p.grad for p in pair.params]
    for t, away in enumerate(((), (0,), (), (1,), (2,), (0, 1, 2), ())):
        for i, p in enumerate(pair.params):
            p.grad = torch.zeros(p.shape) if i in away else grads[i]
        pair.step(t)


def test_programs_of_one_run(launches: list[int]) -> None:
    """Forty small tensors are forty programs, and flat two."""
    for is_flat, programs in ((False, 40), (True, 2)):
        params = parameters([(33,)] * 40)
        if is_flat:
            flatten_(params)
        opt = build("adamw", params, backend="triton")
        if is_flat:
            fill(params, 0)
        else:
            set_gradients(params, 0)
        opt.step()
        assert launches == [-(-40 * 64 // 1024) if is_flat else programs]
        launches.clear()


# Whatever is exchanged ------------------------------------------------------------------------------------------------


def swap_states(opt: Any, params: Sequence[Tensor]) -> None:
    for p in params[1:4]:
        for name, value in opt.state[p].items():
            if name != "step":
                value.data = value.data.clone()


def replace_states(opt: Any, params: Sequence[Tensor]) -> None:
    for p in params[1:4]:
        opt.state[p] = {name: value if name == "step" else value.clone() for name, value in opt.state[p].items()}


def exchange_states(opt: Any, params: Sequence[Tensor]) -> None:
    """The memory of two states: each is still used by one tensor."""
    for name in STATES["adamw" if "betas" in opt.defaults else "sgdw"]:
        a, b = opt.state[params[1]][name], opt.state[params[2]][name]
        a.data, b.data = b.data, a.data


def hold_states(opt: Any, params: Sequence[Tensor]) -> None:
    """As an offloader does that brings states back later: the old memory lives on."""
    opt.held = [value.data for own in opt.state.values() for name, value in own.items() if name != "step"]
    swap_states(opt, params)


def set_states(opt: Any, params: Sequence[Tensor]) -> None:
    for p in params[1:4]:
        for name, value in opt.state[p].items():
            if name != "step":
                value.set_(value.clone())


def clear_states(opt: Any, params: Sequence[Tensor]) -> None:
    opt.state[params[1]].clear()


def exchange_data(opt: Any, params: Sequence[Tensor]) -> None:
    a, b = params[1:3]
    a.data, b.data = b.data, a.data


def exchange_gradients(opt: Any, params: Sequence[Tensor]) -> None:
    a, b = params[1:3]
    a.grad, b.grad = b.grad, a.grad


def exchange_gradient_data(opt: Any, params: Sequence[Tensor]) -> None:
    a, b = params[1].grad, params[2].grad
    assert a is not None
    assert b is not None
    a.data, b.data = b.data, a.data


def swap_data(opt: Any, params: Sequence[Tensor]) -> None:
    for p in params[1:4]:
        p.data = p.data.clone()


def share(opt: Any, params: Sequence[Tensor]) -> None:
    """In place: the storages stay, their memory does not."""
    for p in params[1:4]:
        p.share_memory_()
        for name, value in opt.state[p].items():
            if name != "step":
                value.share_memory_()


def move_group(opt: Any, params: Sequence[Tensor]) -> None:
    own = opt.param_groups[0]["params"]
    group = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    opt.param_groups[0]["params"] = [own[0], *own[2:]]
    opt.param_groups.append({**group, "params": [own[1]]})
    params[:] = all_params(opt)


def reverse(opt: Any, params: Sequence[Tensor]) -> None:
    opt.param_groups[0]["params"].reverse()
    params[:] = all_params(opt)


MUTATIONS: dict[Callable[..., None], tuple[int, int]] = {  # runs, and once all is flattened and loaded again
    swap_states: (5, 1),
    replace_states: (5, 1),
    exchange_states: (4, 1),
    hold_states: (5, 1),
    set_states: (5, 1),
    clear_states: (3, 3),
    exchange_data: (4, 1),
    exchange_gradients: (4, 1),
    exchange_gradient_data: (4, 1),
    swap_data: (5, 1),
    share: (5, 1),
    move_group: (3, 2),
    reverse: (1, 1),
}


@both
@pytest.mark.parametrize("mutate", list(MUTATIONS), ids=lambda m: m.__name__)
def test_whatever_is_exchanged(rule: str, mutate: Callable[..., None], walk: str) -> None:
    """Between two steps; twice. The bits are right, what still lies flat is stepped as one, and all can be again."""
    pair = Pair(rule, parameters(ALIKE))
    states = 2 if rule == "adamw" else 1
    pair.step(0, runs=1)
    pair.step(1, runs=1)
    for opt, params in pair.both():
        mutate(opt, params)
    for t in range(2, 4):
        pair.step(t, runs=MUTATIONS[mutate][0])
    if mutate is not move_group:
        for opt, params in pair.both():
            mutate(opt, params)
        for t in range(4, 6):
            pair.step(t)
    unflatten_(pair.params)
    pair.step(6, runs=5)
    flatten_(pair.params)
    for opt, _ in pair.both():
        opt.load_state_dict(opt.state_dict())
    assert len(pair.opt._table.flat_states._bases) == states
    for t in range(7, 9):
        pair.step(t, runs=MUTATIONS[mutate][1])


@both
def test_states_that_were_begun_anew_and_then_moved(rule: str, walk: str) -> None:
    """Cleared states lie in a new buffer; those of the old one are watched as before."""
    pair = Pair(rule, parameters(ALIKE))
    pair.step(0, runs=1)
    for i in (0, 3, 0):
        for opt, params in pair.both():
            opt.state[params[i]].clear()
        pair.step(1)
    for opt, params in pair.both():
        swap_states(opt, params)
    pair.step(2)
    for opt, params in pair.both():
        exchange_states(opt, params)
    pair.step(3)


@both
def test_old_states_are_not_written(rule: str, walk: str) -> None:
    """Who holds a state dictionary from before keeps its numbers, flat memory or not."""
    pair = Pair(rule)
    pair.step(0, runs=1)
    pair.step(1, runs=1)
    for way in (lambda opt: opt.state.clear(), lambda opt: [own.clear() for own in opt.state.values()]):
        saved = pair.opt.state_dict()["state"]
        copies = copy.deepcopy(saved)
        for opt, _ in pair.both():
            way(opt)
        for t in range(3):
            pair.step(t, runs=1)
        for i, own in saved.items():
            assert_same_state(own, copies[i])


@both
def test_states_from_before_stay(rule: str, walk: str) -> None:
    """An optimizer that is made flat under way goes on to the bit, and in one run once its state was loaded."""
    params = parameters(SHAPES)
    opt = build(rule, params)
    for t in range(2):
        set_gradients(params, t)
        checked_step(opt)
    before = {p: dict(opt.state[p]) for p in params}
    flatten_(params)
    for t in range(2):
        fill(params, t)
        checked_step(opt)
        assert count_runs(opt) == len(SHAPES)
    assert all(opt.state[p][name] is before[p][name] for p in params for name in STATES[rule])
    opt.load_state_dict(opt.state_dict())
    for t in range(2):
        fill(params, 3 + t)
        checked_step(opt)
        assert count_runs(opt) == 1
    flatten_(params)  # again: nothing moves, nothing is lost
    fill(params, 7)
    checked_step(opt)
    assert count_runs(opt) == 1


def test_options_turned_on_later(walk: str) -> None:
    """amsgrad and momentum: the new state is flat as the others are."""
    for rule, off, on in (
        ("adamw", {"amsgrad": False}, {"amsgrad": True}),
        ("sgdw", {"momentum": 0.0}, {"momentum": 0.9}),
    ):
        pair = Pair(rule, dampening=0.25, **off) if rule == "sgdw" else Pair(rule, **off)
        for t in range(6):
            for opt, _ in pair.both():
                opt.param_groups[0].update(on if t in (2, 3, 5) else off)
            pair.step(t, runs=1)


def test_memory_that_is_no_longer_the_buffers(walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that lie where a buffer was, one by one: what is between them is somebody else's."""
    memory = torch.full((1000,), 0x5AC35AC3, dtype=torch.int32)
    zeros, taken = torch.zeros, [memory.data_ptr()]

    def at(address: int, n: int) -> Tensor:
        return torch.frombuffer((ctypes.c_float * n).from_address(address), dtype=torch.float32)

    def placed(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") is not torch.float32 or not isinstance(args[0], int) or args[0] != 160:
            return zeros(*args, **kwargs)
        taken.append(taken[-1] + 4 * 160)
        return at(taken[-2], 160).zero_()

    params = [nn.Parameter(torch.randn(20)) for _ in range(5)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", placed)
        flatten_(params)
        opt = build("adamw", params)
        fill(params, 0)
        checked_step(opt)
        assert count_runs(opt) == 1
    assert len(taken) == 5
    buffer = place_of(params[0]).buffer
    for p in params:  # all moves away, the buffers go
        p.data, p.grad.data = p.data.clone(), p.grad.data.clone()
    assert buffer.data is None
    memory.view(torch.float32)[:320].view(10, 32)[:, 20:] = torch.nan
    canaries = memory.clone()
    for k, p in enumerate(params):  # and back, to the same addresses
        assert p.grad is not None
        p.data = at(taken[0] + 128 * k, 20).copy_(p.data)
        p.grad.data = at(taken[1] + 128 * k, 20).copy_(p.grad.data)
    checked_step(opt)
    checked_step(opt)
    assert count_runs(opt) == 5
    between = memory[:320].view(10, 32)[:, 20:]
    assert torch.equal(between, canaries[:320].view(10, 32)[:, 20:])


# Lives ----------------------------------------------------------------------------------------------------------------


class FlatLife(test_properties.Life):
    """The first optimizer is flat, as far as that is possible; the second, of the reference, never is."""

    def __init__(self, rule: str, data: st.DataObject) -> None:
        super().__init__(rule, data)
        for p in all_params(self.opts[0]):
            p.data = p.data.clone(memory_format=torch.preserve_format)
        self.views: list[tuple[Tensor, Tensor | None]] = []
        self.flatten()

    def step(self) -> None:
        for i in range(len(self.counts)):
            how = self.data.draw(
                st.sampled_from(("in place", "in place", "in place", "kept", "none", "view", "data", "new")),
                label=f"gradient {i}",
            )
            seed = self.data.draw(test_properties.seeds)
            for p in self.each(i):
                values = test_properties.random_values(tuple(p.shape), p.dtype, seed)
                if how == "none":
                    p.grad = None
                elif how == "kept":
                    pass
                elif how == "new" or p.grad is None or p.grad.dtype != p.dtype:
                    p.grad = values
                elif how == "data":
                    p.grad.data = values
                elif how == "in place" and semantics.is_dense(p.grad):
                    p.grad.copy_(values)
                else:
                    view = [v for q, v in self.views if q is p and v is not None and v.shape == p.shape]
                    p.grad = view[-1].copy_(values) if view and view[-1].dtype == p.dtype else values
            self.counts[i] += self.each(i)[0].grad is not None
        checked_step(self.opts[0])
        self.opts[1].step()
        assert_same_optimizers(*self.opts)
        for opt in self.opts:
            shown = [float(opt.state[p]["step"]) if opt.state.get(p) else 0 for p in all_params(opt)]
            assert shown == self.counts

    def flatten(self) -> None:
        """Where it cannot be done, it is an error, and nothing moves."""
        params = all_params(self.opts[0])
        before = [(plain(p), p.grad, None if p.grad is None else plain(p.grad)) for p in params]
        try:
            flatten_([{"params": group["params"]} for group in self.opts[0].param_groups])
        except (TypeError, ValueError):
            assert all(p.grad is grad for p, (_, grad, _) in zip(params, before, strict=True))
        else:
            assert all(map(attached, [p for p in params if p.numel()]))
            self.views += [(p, p.grad) for p in params]
        for p, q, (data, _, grad) in zip(params, all_params(self.opts[1]), before, strict=True):
            assert_untouched(p, data)
            if p.grad is not None:
                assert_untouched(p.grad, torch.zeros_like(p) if grad is None else grad)
                if grad is None:
                    q.grad = torch.zeros_like(q)

    def unflatten(self) -> None:
        unflatten_(all_params(self.opts[0]))

    def flatten_anew(self) -> None:
        for p in all_params(self.opts[0]):
            p.data = p.data.clone(memory_format=torch.preserve_format)
            if p.data_ptr() % 64 or not semantics.is_dense(p):
                p.data = p.data.contiguous()
        self.unflatten()
        self.flatten()

    def flatten_anew_and_merge(self) -> None:
        """All attached, all states loaded: exactly what shares buffer, group and count, in that order, is one run."""
        self.flatten_anew()
        opt = self.opts[0]
        if not all(attached(p) for p in all_params(opt) if p.numel()):
            return
        self.reload()
        for o in self.opts:
            o.zero_grad(set_to_none=False)
        self.counts = [n + (p.grad is not None) for n, p in zip(self.counts, all_params(opt), strict=True)]
        checked_step(opt)
        self.opts[1].step()
        assert_same_optimizers(*self.opts)
        found = [(p, g) for g, group in enumerate(opt.param_groups) for p in group["params"] if p.numel()]
        followers = 0
        for (p, g), (q, h) in itertools.permutations(found, 2):
            a, b = place_of(p), place_of(q)
            assert a is not None
            assert b is not None
            alike = g == h and float(opt.state[p]["step"]) == float(opt.state[q]["step"])
            # Their states lie likewise, and were all there when they were loaded, or none was.
            followers += alike and a.buffer is b.buffer and a.offset + flat.padded(a.numel) == b.offset
        if all(own for own in opt.state.values()) and len({tuple(own) for own in opt.state.values()}) == 1:
            assert count_runs(opt) == len(found) - followers

    def zero_grad(self) -> None:
        to_none = self.data.draw(st.booleans(), label="set_to_none")
        for opt in self.opts:
            opt.zero_grad(set_to_none=to_none)
        grads = [(p.grad, q.grad) for p, q in zip(*map(all_params, self.opts), strict=True)]
        for a, b in grads:
            assert (a is None) == (b is None)
            assert a is None or b is None or not (bool(a.any()) or bool(b.any()))

    def exchange_two(self) -> None:
        """Parameters, gradients or states of two that are alike trade their memory."""
        i, j = self.pick(), self.pick()
        what = self.data.draw(st.sampled_from(("data", "grad", "grad data", "states")))
        pairs = list(zip(self.each(i), self.each(j), strict=True))
        if any((a.shape, a.dtype, a.stride()) != (b.shape, b.dtype, b.stride()) for a, b in pairs):
            return
        for opt, (a, b) in zip(self.opts, pairs, strict=True):
            if what == "data":
                a.data, b.data = b.data, a.data
            elif what == "grad":
                a.grad, b.grad = b.grad, a.grad
            elif what == "grad data" and a.grad is not None and b.grad is not None:
                a.grad.data, b.grad.data = b.grad.data, a.grad.data
            elif what == "states":
                one, other = opt.state.get(a) or {}, opt.state.get(b) or {}
                for name in one.keys() & other.keys() - {"step"}:
                    one[name].data, other[name].data = other[name].data, one[name].data


FLAT_MUTATIONS = (
    *test_properties.MUTATIONS,
    *(name for name, value in vars(FlatLife).items() if callable(value) and name not in ("__init__", "step")),
)


@both
@test_properties.examples(250)
@given(data=st.data())
def test_lives(rule: str, data: st.DataObject) -> None:
    test_properties.live(rule, data, FLAT_MUTATIONS, FlatLife)


@pytest.mark.slow
@both
@test_properties.examples(400)
@given(data=st.data())
def test_long_lives(rule: str, data: st.DataObject) -> None:
    test_properties.live(rule, data, FLAT_MUTATIONS, FlatLife)


def test_flat_mutations_are_known() -> None:
    assert len(FLAT_MUTATIONS) == len(test_properties.MUTATIONS) + 6
