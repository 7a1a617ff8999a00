"""A step that fails changes nothing, and repaired, the next one is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_optimizers
from semantics import STATES, TWO_ALIKE, all_params, checked_step, go_on, parameters, running, set_gradients, untouched
from torch import Tensor, nn

from wd_kernels import backends

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


def last(opt: Any) -> Tensor:
    return all_params(opt)[-1]


def set_last_grad(make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def spoil(opt: Any) -> None:
        grad = last(opt).grad
        assert grad is not None
        grad.data = make(grad)

    return spoil


def sparse_gradient(opt: Any) -> None:
    last(opt).grad = torch.randn(last(opt).shape).to_sparse()


def emptied_gradient(opt: Any) -> None:
    grad = last(opt).grad
    assert grad is not None
    grad.untyped_storage().resize_(0)


def set_state(name: str, value: Any) -> Callable[[Any], None]:
    def spoil(opt: Any) -> None:
        p = last(opt)
        opt.state[p] = {k: v.clone() for k, v in opt.state[p].items()} if p in opt.state else {"step": 4.0}
        for key in semantics.STATES["adamw" if "betas" in opt.defaults else "sgdw"]:
            opt.state[p].setdefault(key, torch.ones_like(p))
            if name == "state":
                opt.state[p][key] = value
        if name != "state":
            opt.state[p][name] = value

    return spoil


def set_group(**options: Any) -> Callable[[Any], None]:
    return lambda opt: opt.param_groups[-1].update(options)


def overlapping(opt: Any) -> None:
    last(opt).data = all_params(opt)[0].data.view(-1)[: last(opt).numel()].view(last(opt).shape)


def twice(opt: Any) -> None:
    opt.param_groups[-1]["params"] = [*opt.param_groups[-1]["params"], all_params(opt)[0]]


def no_backend(opt: Any) -> None:
    opt.backend = "nothing"
    opt._new_table()


SPOILED: dict[str, Callable[[Any], None]] = {
    "gradient of another shape": set_last_grad(lambda g: torch.randn(99)),
    "gradient of another dtype": set_last_grad(lambda g: g.double()),
    "sparse gradient": sparse_gradient,
    "gradient without memory": emptied_gradient,
    "state of another shape": set_state("state", torch.zeros(99)),
    "state of a wider dtype": set_state("state", torch.zeros(2, 3, dtype=torch.float64)),
    "state that is no tensor": set_state("state", "mine"),
    "state that is no dict": lambda opt: opt.state.__setitem__(last(opt), [1]),
    "step -1": set_state("step", -1),
    "step 1.5": set_state("step", torch.tensor(1.5)),
    "step nan": set_state("step", torch.tensor(torch.nan)),
    "step 1e30": set_state("step", torch.tensor(1e30)),
    "step of two": set_state("step", torch.ones(2)),
    "step text": set_state("step", "1"),
    "lr nan": set_group(lr=torch.nan),
    "lr of two": set_group(lr=torch.ones(2)),
    "weight_decay -1": set_group(weight_decay=-1.0),
    "decay unknown": set_group(decay="decoupled"),
    "eta inf": set_group(eta=torch.inf),
    "overlapping data": overlapping,
    "given twice": twice,
    "unknown backend": no_backend,
}


@both
@pytest.mark.parametrize("spoil", list(SPOILED.values()), ids=list(SPOILED))
@pytest.mark.parametrize("steps", [0, 3])
def test_a_failed_step_changes_nothing(rule: str, spoil: Callable[[Any], None], steps: int, walk: str) -> None:
    """The last parameter is bad: the others keep bits, counts and keys; repaired, the next steps are right."""
    params = parameters()
    opt = running(rule, [*params], steps, dampening=0.5) if rule == "sgdw" else running(rule, [*params], steps)
    opt.add_param_group({"params": parameters([(8,), (2, 3)], seed=9)})
    set_gradients(all_params(opt), 20)
    p = last(opt)
    good = p.data, dict(opt.param_groups[-1]), opt.backend
    state = opt.state.get(p)
    spoil(opt)
    for _ in range(2):
        with untouched(opt), pytest.raises((TypeError, ValueError, RuntimeError)):
            opt.step()
    p.data, opt.backend = good[0], good[2]
    opt.param_groups[-1].clear()
    opt.param_groups[-1].update(good[1])
    if spoil is no_backend:
        opt._new_table()
    if state is None:
        opt.state.pop(p, None)
    else:
        opt.state[p] = state
    assert len(opt.state) == (len(params) if steps else 0)
    go_on(opt)


@both
def test_a_failed_step_in_the_midst(rule: str, walk: str) -> None:
    """Failing and good steps in turn, with the spoiled value in the table's own step vector."""
    opt = running(rule)
    params = all_params(opt)
    for t in range(3):
        opt.state[params[3]]["step"].fill_(0.5)
        set_gradients(params, t, skip=[1])
        with untouched(opt), pytest.raises(ValueError, match=r"step count of parameter 3 of group 0 is 0\.5"):
            opt.step()
        opt.state[params[3]]["step"].fill_(7)
        checked_step(opt)
        assert float(opt.state[params[3]]["step"]) == 8
        assert float(opt.state[params[1]]["step"]) == 3


@both
def test_a_failed_step_with_other_gradients_than_the_last(rule: str, walk: str) -> None:
    """The set of parameters that autograd is told of is the next step's own, not what the failed one found."""
    opt = running(rule)
    params = all_params(opt)
    for skips in ([0, 2], []), ([], [1]), ([3], [0]):
        set_gradients(params, 1, skips[0])
        checked_step(opt)
        set_gradients(params, 2, skips[1])
        assert params[4].grad is not None
        good = params[4].grad.clone()
        params[4].grad.data = torch.zeros(5)
        with untouched(opt), pytest.raises(ValueError, match="the gradient of parameter 4"):
            opt.step()
        params[4].grad = None
        params[4].grad = good
        checked_step(opt)
        checked_step(opt)


@both
@pytest.mark.parametrize(("steps", "anew"), [(0, True), (3, True), (3, False)])
def test_a_launch_that_fails_moves_and_counts_nothing(
    rule: str, steps: int, anew: bool, walk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails when it is launched: the next step is as if this one had not been tried.

    Of a table that is built anew, and of one that goes on, whose counts are those that the states show.
    """
    opt, twin = running(rule, steps=steps), running(rule, steps=steps)
    for o in (opt, twin):
        set_gradients(all_params(o), 7)

    def fail() -> None:
        raise RuntimeError("no launch (a test)")

    failing = backends.Prepared([], lambda *given: [fail])
    if anew:
        opt._table.watch = None
    else:
        opt._table.launches = failing
    with monkeypatch.context() as patch:
        patch.setattr(backends, "prepare", lambda table: failing)
        for _ in range(2):
            with untouched(opt), pytest.raises(RuntimeError, match=r"no launch \(a test\)"):
                opt.step()
    for t in range(2):
        opt.step()
        twin.step()
        assert_same_optimizers(opt, twin, f"step {t}")


@both
@pytest.mark.parametrize("steps", [0, 3])
def test_a_skipped_step_moves_and_counts_nothing(rule: str, steps: int, walk: str) -> None:
    """Whether its gradients are those of the last step, others, or some are missing."""
    opt, twin = running(rule, steps=steps), running(rule, steps=steps)
    opt._table.control[1] = 1.0
    for seed, skip in ((steps - 1, []), (9, []), (9, [1, 2]), (7, [])):
        set_gradients(all_params(opt), seed, skip)
        with untouched(opt):
            opt.step()
    opt._table.control[1] = 0.0
    set_gradients(all_params(twin), 7)
    for t in range(2):
        opt.step()
        twin.step()
        assert_same_optimizers(opt, twin, f"step {t}")


@both
def test_a_state_that_is_put_there_during_a_step_stays(rule: str, walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, say: the one that this step has made is not put in its place."""
    opt = running(rule, steps=0)
    params = all_params(opt)
    set_gradients(params, 1)
    theirs = {name: torch.full_like(params[1], 0.25) for name in STATES[rule]}
    theirs["step"] = torch.tensor(5.0)
    prepare = backends.prepare

    def prepared(table: Any) -> backends.Prepared:
        plans, ready, *_ = prepare(table)

        def others(table: Any, rows: Tensor) -> list[backends.Launch]:
            opt.state[params[1]] = theirs
            return [] if ready is None else ready(table, rows)

        return backends.Prepared(plans, others)

    with monkeypatch.context() as patch:
        patch.setattr(backends, "prepare", prepared)
        opt.step()
    assert opt.state[params[1]] is theirs
    assert float(theirs["step"]) == 5
    assert all(bool((theirs[name] == 0.25).all()) for name in STATES[rule])
    assert [float(opt.state[p]["step"]) for p in (params[0], *params[2:])] == [1.0] * (len(params) - 1)
    checked_step(opt)
    assert float(opt.state[params[1]]["step"]) == 6


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_overlaps_that_come_later(momentum: float, walk: str) -> None:
    """A parameter that grows or spreads over another one at the same address, or a gapped one that moves over it."""

    def grow(p: Tensor, memory: Tensor) -> None:
        p.data = memory[:32]

    def spread(p: Tensor, memory: Tensor) -> None:
        p.data = memory.as_strided((4, 2), (8, 1))

    def move(p: Tensor, memory: Tensor) -> None:
        p.data = memory.as_strided((4, 2), (4, 1), 8)

    for start, change in (
        (lambda m: m[:8], grow),
        (lambda m: m.as_strided((4, 2), (4, 1)), spread),
        (lambda m: m.as_strided((4, 2), (4, 1)), move),
    ):
        memory = torch.randn(64)
        p, q = nn.Parameter(start(memory.data)), nn.Parameter(memory.data[16:24])  # each with its own version counter
        opt = running("sgdw", [p, q], momentum=momentum)
        p.grad = None
        change(p, memory)
        opt.state[p] = {}
        set_gradients([p, q], 9)
        with untouched(opt), pytest.raises(ValueError, match=r"parameter 0 of group 0 and .* overlap in memory"):
            opt.step()
        q.data = torch.randn(8)
        go_on(opt)


@both
def test_states_may_not_overlap(rule: str, walk: str) -> None:
    opt = running(rule, parameters(TWO_ALIKE))
    p, q = (all_params(opt)[i] for i in (1, 3))
    name = STATES[rule][0]
    for value in (opt.state[q][name], opt.state[q][name].view(4, 4), p.data, q.data):
        kept = opt.state[p][name]
        opt.state[p][name] = value
        with untouched(opt), pytest.raises(ValueError, match="overlap in memory"):
            opt.step()
        opt.state[p][name] = kept
        go_on(opt, 1)
