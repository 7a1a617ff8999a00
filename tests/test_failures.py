"""Silent failures that were found in other optimizers: each must stay absent here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_bits, assert_same_optimizers, assert_same_state, assert_untouched
from semantics import MODES, STATES, all_params, build, parameters, plain, set_gradients
from torch import nn

from wd_kernels import AdamW

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_overflow_on_the_first_step_leaves_no_uninitialised_buffer(dampening: float, walk: str) -> None:
    """torch's fused SGD under a GradScaler: an overflow on step 1 leaves a momentum buffer of uninitialised memory.

    Here the overflowed step makes no state, and the first good gradient is the buffer, undampened, to the bit.
    """
    params = parameters()
    opt = build("sgdw", params, dampening=dampening)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [plain(p) for p in params]
    for t, bad in enumerate((torch.inf, torch.nan, None)):
        set_gradients(params, t)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(scaler.scale(torch.ones(())))
        expected = [plain(p.grad) / scaler.get_scale() for p in params]
        if bad is not None:
            params[0].grad[0, 0] = bad
        scaler.step(opt)
        scaler.update()
        assert bool(opt.state) == (bad is None)
        for p, old, grad in zip(params, before, expected, strict=True):
            if bad is not None:
                assert_untouched(p, old)
            else:
                assert_same_bits(opt.state[p]["momentum_buffer"], grad)
                assert not torch.equal(p, old)


@both
def test_a_gradient_that_arrives_late(rule: str, walk: str) -> None:
    """torch's fused SGD: a parameter whose first gradient comes after the others' is a TypeError.

    Here it begins then, with a count and a buffer of its own, beside others that are under way.
    """
    params = parameters()
    opt = build(rule, params)
    for t in range(6):
        set_gradients(params, t, skip=[i for i in range(5) if i > t])
        opt.step()
    assert [float(opt.state[p]["step"]) for p in params] == [6.0, 5.0, 4.0, 3.0, 2.0]
    late = build(rule, [parameters()[4]])
    for t in (4, 5):
        set_gradients(params, t)
        all_params(late)[0].grad = plain(params[4].grad)
        late.step()
    assert_same_bits(params[4], all_params(late)[0])
    assert_same_state(opt.state[params[4]], late.state[all_params(late)[0]])


@both
def test_a_new_last_parameter_resets_nobody(rule: str, walk: str) -> None:
    """apex and TransformerEngine SGD: "first run" is read off the last parameter, so a new one resets all momenta.

    Here each parameter has its own beginning: b = mu*b + (1 - tau)*g for the old ones, b = g for the new one.
    """
    options: dict[str, Any] = {"dampening": 0.5, "momentum": 0.5} if rule == "sgdw" else {"betas": (0.5, 0.5)}
    params = parameters()
    opt = build(rule, params, **options)
    for t in range(3):
        set_gradients(params, t)
        opt.step()
    name = STATES[rule][0]
    for way in ("add_param_group", "append"):
        new = nn.Parameter(torch.randn(6))
        if way == "append":
            opt.param_groups[0]["params"].append(new)
        else:
            opt.add_param_group({"params": [new]})
        before = {p: plain(opt.state[p][name]) for p in params}
        set_gradients([*params, new], 7)
        opt.step()
        for p in params:
            assert p.grad is not None
            assert_same_bits(opt.state[p][name], 0.5 * before[p] + 0.5 * p.grad if rule == "sgdw" else
                        before[p].lerp(p.grad, 0.5))  # fmt: skip
            assert before[p].abs().max() > 0
        assert new.grad is not None
        assert_same_bits(opt.state[new][name], new.grad if rule == "sgdw" else 0.5 * new.grad)
        assert float(opt.state[new]["step"]) == 1
        params.append(new)


@both
def test_every_parameter_counts_its_steps(rule: str, walk: str) -> None:
    """DeepSpeed's FusedAdam advances only the last parameter's count, and once for every dtype.

    Here each count is the number of gradients that its parameter has had, in every dtype and group.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32, torch.bfloat16)
    params = [nn.Parameter(torch.randn(5).to(dtype)) for dtype in dtypes]
    opt = build(rule, [{"params": params[:4]}, {"params": params[4:], "lr": 0.1}])
    seen = [0] * 6
    for t in range(7):
        skip = [i for i in range(6) if (i + t) % 3 == 0 or (i == 5 and t < 4)]
        set_gradients(params, t, skip)
        opt.step()
        seen = [n + (i not in skip) for i, n in enumerate(seen)]
        assert [float(opt.state[p]["step"]) if p in opt.state else 0 for p in params] == seen
        saved = opt.state_dict()["state"]
        if rule != "sgdw":  # torch's SGD has no counts to save
            assert [float(saved[i]["step"]) if i in saved else 0 for i in range(6)] == seen
    assert len(set(seen)) > 1


def test_the_count_enters_the_bias_correction() -> None:
    """The same gradient at every step: with right counts Adam's step is lr*sign(g), whenever a parameter began."""
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(3)]
    opt = AdamW(params, lr=0.125, weight_decay=0.0, eps=0.0, betas=(0.9, 0.99))
    for t in range(8):
        for i, p in enumerate(params):
            p.grad = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64) if t >= 2 * i else None
        opt.step()
    for i, p in enumerate(params):
        expected = -0.125 * (8 - 2 * i) * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
        assert float((p.detach() - expected).abs().max()) < 1e-12


@both
def test_groups_added_later_are_stepped(rule: str, walk: str) -> None:
    """apex: the kernel's tables are made once, and groups added later never move.

    Here every group moves at the first step after it was added, and as an optimizer of its own would.
    """
    opt = build(rule, parameters([(4,)]))
    alone = []
    for t in range(5):
        fresh = parameters([(3, 2), (5,)], seed=t)
        opt.add_param_group({"params": fresh, "lr": 0.1 / (t + 1)})
        alone.append(build(rule, copy.deepcopy(fresh), lr=0.1 / (t + 1)))
        set_gradients(all_params(opt), t)
        before = [plain(p) for p in all_params(opt)]
        opt.step()
        for p, old in zip(all_params(opt), before, strict=True):
            assert not bool((p == old).any())
        for group, single in zip(opt.param_groups[1:], alone, strict=True):
            for p, q in zip(group["params"], all_params(single), strict=True):
                q.grad = plain(p.grad)
            single.step()
            for p, q in zip(group["params"], all_params(single), strict=True):
                assert_same_bits(p, q)


@pytest.mark.parametrize("decay", MODES)
@pytest.mark.parametrize("where", ["class", "group", "later"])
def test_amsgrad_is_not_ignored(decay: str, where: str, walk: str) -> None:
    """bitsandbytes' 32-bit Adam accepts amsgrad and ignores it.

    Here a large gradient followed by small ones holds the steps back, and the largest second moment is kept.
    """
    moved = []
    for amsgrad in (False, True):
        (p,) = parameters([(50,)])
        group: dict[str, Any] = {"params": [p], **({"amsgrad": amsgrad} if where == "group" else {})}
        flag = {"amsgrad": amsgrad} if where == "class" else {}
        opt = build("adamw", [group], decay=decay, weight_decay=1e-5, betas=(0.5, 0.5), **flag)
        if where == "later":
            opt.param_groups[0]["amsgrad"] = amsgrad
        largest = torch.zeros(50)
        for t in range(8):
            p.grad = torch.full((50,), 1e3 if t == 0 else 1.0)
            before = plain(p)
            opt.step()
            largest = torch.maximum(largest, opt.state[p]["exp_avg_sq"])
            if amsgrad:
                assert_same_bits(opt.state[p]["max_exp_avg_sq"], largest)
        moved.append((p.detach() - before).abs())
        assert ("max_exp_avg_sq" in opt.state[p]) == amsgrad
    assert bool((moved[1] < 0.2 * moved[0]).all())


@both
@pytest.mark.parametrize("decay", MODES)
def test_a_loaders_step_with_lr_0_moves_nothing(rule: str, decay: str, walk: str) -> None:
    """A separate eta under a checkpoint loader, which makes state by a step with lr 0, moved weights 1.0 -> 0.99.

    Here lr 0 freezes the weights whatever eta and decay say, and the loaded state goes on to the bit.
    """
    source, target = (build(rule, parameters(), decay=decay, eta=0.5) for _ in range(2))
    for t in range(3):
        set_gradients(all_params(source), t)
        source.step()
    for p, q in zip(all_params(source), all_params(target), strict=True):
        q.data.copy_(p.detach())
    for zero in (0.0, torch.tensor(0.0)):  # as torch.distributed.checkpoint does it
        lrs = [group["lr"] for group in target.param_groups]
        for group in target.param_groups:
            group["lr"] = zero
        for p in all_params(target):
            p.grad = torch.zeros_like(p)
        target.step()
        target.zero_grad()
        for group, lr in zip(target.param_groups, lrs, strict=True):
            group["lr"] = lr
        assert len(target.state) == 5
        for p, q in zip(all_params(source), all_params(target), strict=True):
            assert_same_bits(p, q)
    target.load_state_dict(source.state_dict())
    for t in range(3, 5):
        for opt in (source, target):
            set_gradients(all_params(opt), t)
            opt.step()
    assert_same_optimizers(source, target, loaded=True)
