"""Training with flat parameters: accumulation, graphs, threads, modes; and unflattening."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_optimizers, assert_untouched
from flat_pairs import ALIKE, assert_runs, fill
from semantics import all_params, build, checked_step, parameters, plain
from torch import nn

import wd_kernels
from wd_kernels import flatten_, unflatten_

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


@both
def test_training(rule: str, walk: str) -> None:
    """Autograd accumulates into the views; scaling and clipping are in place. An ordinary twin has the same bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 1))
    twin = copy.deepcopy(model)
    flatten_(model.named_parameters())

    def decayed(m: nn.Module) -> list[dict[str, Any]]:
        vectors = [p for p in m.parameters() if p.dim() <= 1]
        return [{"params": [p for p in m.parameters() if p.dim() > 1]}, {"params": vectors, "weight_decay": 0.0}]

    opts = [build(rule, decayed(model)), build(rule, decayed(twin), backend="reference")]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12) for opt in opts]
    views = [p.grad for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for t in range(12):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t))
        for m, opt, scheduler in zip((model, twin), opts, schedulers, strict=True):
            for part in x.split(8):  # accumulated
                scaler.scale((m(part) - part.sum(1, keepdim=True)).square().mean()).backward()
            for p in m.parameters():
                assert p.grad is not None
                p.grad.div_(scaler.get_scale())
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            opt.step()
            scheduler.step()
            opt.zero_grad(set_to_none=False)
        assert_same_optimizers(*opts, f"step {t}")
        assert all(p.grad is view for p, view in zip(model.parameters(), views, strict=True))
        assert_runs(opts[0], 6)
    assert all(float(own["step"]) == 12 for own in opts[0].state.values())


def test_a_stale_graph_is_refused() -> None:
    """A flat step is a write that autograd knows of."""
    p = nn.Parameter(torch.randn(4))
    flatten_([p])
    opt = build("adamw", [p])
    loss = p.square().sum()
    fill([p], 0)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads(walk: str) -> None:
    """Optimizers over parts of one buffer, each on a thread of its own, while others flatten."""
    params = parameters([(33,)] * 8)
    flatten_(params)
    opts = [build("adamw", params[2 * k : 2 * k + 2]) for k in range(4)]
    twins = [copy.deepcopy(opt) for opt in opts]
    failures: list[BaseException] = []

    def work(opt: Any, twin: Any) -> None:
        try:
            for t in range(30):
                fill(all_params(opt), t)
                for p, q in zip(all_params(opt), all_params(twin), strict=True):
                    q.grad = plain(p.grad)
                opt.step()
                twin.step()
                opt.zero_grad(set_to_none=False)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(opts, twins, strict=True)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        flatten_(parameters([(5,)]))
    for thread in threads:
        thread.join()
    assert not failures
    for opt, twin in zip(opts, twins, strict=True):
        assert_same_optimizers(opt, twin)
        assert_runs(opt, 1)


def test_flat_within_other_modes(walk: str) -> None:
    """In inference mode, without gradients, with another default device: what is made outlives it."""
    params = parameters(ALIKE)
    with torch.inference_mode():
        flatten_(params)
    assert not any(t.is_inference() for p in params for t in (p.data, p.grad) if t is not None)
    opt = build("adamw", params)
    with torch.inference_mode():
        fill(params, 0)
        opt.step()
    assert not any(v.is_inference() for own in opt.state.values() for v in own.values())
    fill(params, 1)
    checked_step(opt)
    params = parameters(ALIKE)
    opt = build("adamw", params)
    with torch.device("meta"):
        flatten_(params)
    fill(params, 0)
    with torch.device("meta"):
        opt.step()
        opt.zero_grad(set_to_none=False)
    fill(params, 1)
    checked_step(opt)
    assert_runs(opt, 1)
    model = nn.Linear(16, 1)
    flatten_(model.parameters())
    model(torch.ones(3, 16)).sum().backward()
    assert model.weight.requires_grad


def test_public_names() -> None:
    assert wd_kernels.flatten_ is flatten_
    assert {"flatten_", "unflatten_", "FlatBuffer"} <= set(wd_kernels.__all__)


def test_unflattening_leaves_what_is_not_flat() -> None:
    """Gradients in a framework's buckets stay there; flat ones leave, whoever's stretch they are in."""
    params = parameters(ALIKE)
    (buffer,) = flatten_(params)
    bucket = torch.randn(32)
    params[0].grad, params[1].grad = bucket[:16], bucket[16:]
    params[2].grad, params[3].grad = params[3].grad, params[2].grad
    params[4].data = params[4].data.clone()
    fill(params, 0)
    values = [(plain(p), plain(p.grad)) for p in params]
    other = nn.Parameter(torch.ones(3))
    address = other.data_ptr()
    unflatten_([*params, other])
    unflatten_(params)
    assert buffer.data is None
    assert buffer.grad is None
    assert other.data_ptr() == address
    for k, (p, (data, grad)) in enumerate(zip(params, values, strict=True)):
        assert_untouched(p, data)
        assert p.grad is not None
        assert_untouched(p.grad, grad)
        assert (p.grad.data_ptr() == bucket.data_ptr() + 64 * k) == (k < 2)
