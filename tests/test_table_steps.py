"""Options that change what a step needs, and what a settled step costs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_bits, assert_same_optimizers, assert_untouched
from semantics import all_params, build, checked_step, parameters, plain, plain_copy, running, set_gradients
from torch import nn

import wd_kernels
from wd_kernels.table.changes import Watch

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


# Options that change what is needed -----------------------------------------------------------------------------------


def test_momentum_turned_on_off_and_on(walk: str) -> None:
    """The buffer begins undampened with the first gradient it sees, and is kept while momentum is off, as in torch."""
    mine, theirs = parameters(), parameters()
    opt = build("sgdw", mine, momentum=0.0, dampening=0.5, decay="l2")
    other = torch.optim.SGD(theirs, 0.05, 0.0, 0.5, 0.1, foreach=False)
    for t in range(10):
        momentum = 0.9 if t in (2, 3, 4, 7, 8, 9) else 0.0
        skip = [0] if t == 2 else []
        for o, params in ((opt, mine), (other, theirs)):
            o.param_groups[0]["momentum"] = momentum
            set_gradients(params, t, skip)
        checked_step(opt, f"step {t}")
        other.step()
        for p, q in zip(mine, theirs, strict=True):
            semantics.assert_close(p, q, 24)
        assert ("momentum_buffer" in opt.state[mine[1]]) == (t >= 2)
        assert ("momentum_buffer" in opt.state[mine[0]]) == (t >= 3)


def test_a_buffer_that_begins_beside_others_of_the_same_count(walk: str) -> None:
    """It takes its first gradient whole, in the step in which the others dampen theirs."""
    opt = running("sgdw", momentum=0.5, dampening=0.5)
    params = all_params(opt)
    for missing in ((2,), (0, 4), ()):
        for i in missing:
            del opt.state[params[i]]["momentum_buffer"]
        before = [opt.state[p].get("momentum_buffer", torch.zeros(())).clone() for p in params]
        set_gradients(params, 7)
        opt.step()
        for i, p in enumerate(params):
            assert p.grad is not None
            expected = p.grad if i in missing else 0.5 * before[i] + 0.5 * p.grad
            assert_same_bits(opt.state[p]["momentum_buffer"], expected)
        assert len({float(opt.state[p]["step"]) for p in params}) == 1


def test_amsgrad_turned_on_and_off(walk: str) -> None:
    """Its maximum begins at zero when it is turned on, and is kept while it is off."""
    params = parameters()
    opt = build("adamw", params)
    for t in range(9):
        opt.param_groups[0]["amsgrad"] = t in (3, 4, 7, 8)
        kept = plain(opt.state[params[1]]["max_exp_avg_sq"]) if t > 3 else None
        set_gradients(params, t, skip=[2] if t == 3 else [])
        checked_step(opt, f"step {t}")
        assert ("max_exp_avg_sq" in opt.state[params[1]]) == (t >= 3)
        assert ("max_exp_avg_sq" in opt.state[params[2]]) == (t >= 4)
        if t in (5, 6):
            assert kept is not None
            assert_untouched(opt.state[params[1]]["max_exp_avg_sq"], kept)


@both
def test_options_that_differ_between_groups(rule: str, walk: str) -> None:
    """Groups with and without the optional state, turned round and round."""
    params = parameters()
    opt = build(rule, [{"params": params[:2]}, {"params": params[2:3]}, {"params": params[3:]}])
    for t in range(6):
        for i, group in enumerate(opt.param_groups):
            on = (t + i) % 3 == 0
            group.update({"amsgrad": on} if rule == "adamw" else {"momentum": 0.8 if on else 0.0})
        set_gradients(params, t, skip=[t % 5])
        checked_step(opt, f"step {t}")


# What a step costs ----------------------------------------------------------------------------------------------------


def allocated(step: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator hands out during `step`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        torch.empty(1)  # one event at least: the measurement works
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert sizes
    return sum(size for size in sizes if size > 0)


@both
def test_a_settled_step_allocates_nothing_of_the_models_size(rule: str) -> None:
    """Also with new gradients, another lr, missing gradients, gaps and foreign strides: stand-ins are kept."""
    params = parameters([(300, 100)] * 4)
    params += [nn.Parameter(torch.randn(300, 100).t()), nn.Parameter(torch.randn(300, 200)[:, ::2])]
    opt, other = build(rule, params), torch.optim.AdamW(parameters([(300, 100)] * 4), foreach=False)
    for t in range(5):
        set_gradients(params, t)
        set_gradients(all_params(other), t)
        opt.param_groups[0]["lr"] = 0.05 / (t + 1)
        if t >= 2:
            assert allocated(opt.step) < 20_000
            assert allocated(other.step) > 100_000  # the measurement sees such allocations
        else:
            opt.step()
            other.step()
    set_gradients(params, 9, skip=[0])
    assert allocated(opt.step) < 20_000


@both
def test_counts_are_views_of_one_vector(rule: str, walk: str) -> None:
    """Counting is one add; the counts that parameters show are its elements, and survive a new table."""
    opt = running(rule)
    params = all_params(opt)
    for _ in range(2):
        steps = [opt.state[p]["step"] for p in params]
        assert all(s.shape == () and s.dtype == torch.float32 for s in steps)
        assert len({s.untyped_storage().data_ptr() for s in steps}) == 1
        assert len({s.data_ptr() for s in steps}) == len(params)
        before = [float(s) for s in steps]
        set_gradients(params, 5)
        checked_step(opt)
        assert [float(s) for s in steps] == [b + 1 for b in before]
        opt.add_param_group({"params": parameters([(3,)], seed=4)})
        params = all_params(opt)
        set_gradients(params, 6)
        checked_step(opt)


@both
def test_the_oracle_of_these_tests_sees_a_wrong_step(rule: str) -> None:
    """`checked_step` fails if the optimizer keeps stepping memory that is no longer the parameter's."""
    opt = running(rule)
    other = plain_copy(opt)
    set_gradients(all_params(opt), 1)
    for p, q in zip(all_params(opt), all_params(other), strict=True):
        q.grad = plain(p.grad)
    opt.step = lambda: None
    with pytest.raises(AssertionError):
        checked_step(opt)
    other.step()
    with pytest.raises(AssertionError):
        assert_same_optimizers(opt, other)


def test_long_tensors_that_begin_within_their_memory_are_held_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """While other threads may run, views of all tensors are taken: of a part of a buffer they begin where it does."""
    n = 2**23 + 5
    p = torch.nn.Parameter(torch.ones(n + 40)[40:])
    opt = wd_kernels.SGDW([p], lr=0.5, weight_decay=0.1)
    p.grad = torch.ones(n + 24)[24:]
    opt.step()
    calls: list[bool] = []
    step = Watch.step

    def counted(self: Watch, groups: Any, state: Any, work: Any) -> Any:
        found = step(self, groups, state, work)
        calls.append(work.others and found is not None and found.done)
        return found

    monkeypatch.setattr(Watch, "step", counted)
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        opt.step()
    finally:
        over.set()
        thread.join()
    assert calls == [True]
    assert bool((p == p[0]).all())
    assert p[0].item() == pytest.approx(0.95 * (0.95 - 0.5) - 0.5)
