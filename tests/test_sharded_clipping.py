"""The norm of sharded gradients is that of the whole, on every rank; what one rank finds skips the step on all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from bits import assert_same_bits
from sharded import KINDS, Whole, full, make, mesh_of, shard, train
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from wd_kernels import AdamW
from wd_kernels.functional import accumulate_

OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "skip_nonfinite": True}


def local_of(t: Any) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def measures(kind: str) -> float:
    """Norms of the sharded model and of the whole, whose steps are compared to float32's accuracy."""
    model = make()
    whole = make()
    shard(model, kind)
    opt = AdamW(model.parameters(), max_grad_norm=0.5, **OPTIONS)
    other = AdamW(whole.parameters(), max_grad_norm=0.5, **OPTIONS)
    for step in range(4):
        grads = []
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            generator = torch.Generator().manual_seed(1000 * step + q.numel())
            grads.append(torch.randn(q.shape, generator=generator))
            q.grad = grads[-1]
            give(p, grads[-1])
        if step % 2 == 1:  # in halves, whose sum is exact
            for _ in range(2):
                for p, grad in zip(model.parameters(), grads, strict=True):
                    give(p, grad / 2)
                opt.accumulate()
        opt.step()
        other.step()
        assert opt.grad_norm is not None
        assert other.grad_norm is not None
        assert opt.grad_norm.item() == pytest.approx(other.grad_norm.item(), rel=1e-6)
        exact = math.sqrt(math.fsum(x * x for grad in grads for x in grad.double().flatten().tolist()))
        assert opt.grad_norm.item() == pytest.approx(exact, rel=1e-6)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(p), q.detach(), rtol=1e-5, atol=1e-6)
    return opt.grad_norm.item()


def give(p: Any, grad: Tensor) -> None:
    """The gradient, sharded as its parameter."""
    if isinstance(p, DTensor):
        from torch.distributed.tensor import distribute_tensor

        p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
    else:
        p.grad = grad.clone()


@pytest.mark.parametrize(
    ("world", "kind"), [(world, kind) for world in (1, 2, 4) for kind, least in KINDS.items() if least <= world]
)
def test_the_norm_is_that_of_the_whole(world: int, kind: str) -> None:
    """One and the same number on every rank."""
    assert len(set(ranks.run(world, measures, kind))) == 1


def adds_up() -> float:
    """Of shards and of what every rank has whole: the norm is that of all of them, each counted once."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, n = mesh_of("dp"), 4096
    wholes = [torch.linspace(-1, 2, n), torch.linspace(-2, 1, 50)]
    placements = ([Shard(0)], [Replicate()])
    totals = [distribute_tensor(torch.zeros_like(t), mesh, p) for t, p in zip(wholes, placements, strict=True)]
    grads = [distribute_tensor(t, mesh, p) for t, p in zip(wholes, placements, strict=True)]
    others = [torch.zeros_like(t) for t in wholes]
    for _ in range(2):
        norm = accumulate_(totals, grads)
        expected = accumulate_(others, wholes)
        assert_same_bits(norm, expected)
    for a, b in zip(totals, others, strict=True):
        assert_same_bits(a.full_tensor(), b)
    return norm.item()


def test_the_norm_of_what_a_caller_adds_up() -> None:
    assert len(set(ranks.run(2, adds_up))) == 1


def even() -> float:
    """Shards that end between blocks of 1024."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 8, bias=False), nn.Linear(8, 512, bias=False))
    whole = [p.detach().clone() for p in model.parameters()]
    fully_shard(model, mesh=mesh_of("dp"))
    opt = AdamW(model.parameters(), max_grad_norm=0.5, **OPTIONS)
    grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) for k, p in enumerate(whole)]
    for p, grad in zip(model.parameters(), grads, strict=True):
        give(p, grad)
    opt.step()
    others = [nn.Parameter(p) for p in whole]
    other = AdamW(others, max_grad_norm=0.5, **OPTIONS)
    for q, grad in zip(others, grads, strict=True):
        q.grad = grad
    other.step()
    for p, q in zip(model.parameters(), others, strict=True):
        assert_same_bits(full(p), q.detach())
    assert opt.grad_norm is not None
    assert other.grad_norm is not None
    assert_same_bits(opt.grad_norm, other.grad_norm)
    return opt.grad_norm.item()


def test_even_shards_have_the_bits_of_the_whole() -> None:
    assert len({norm for world in (1, 2, 4) for norm in ranks.run(world, even)}) == 1


def skips(kind: str) -> None:
    """An infinity in the last element of a sharded gradient, then a NaN in the first: each is on some ranks alone."""
    model = make()
    shard(model, kind)
    opt = AdamW(model.parameters(), **OPTIONS)
    whole = Whole(model, lambda p: AdamW(p, **OPTIONS))
    train(model, opt, range(2), whole)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor) and any(x.is_shard() for x in p.placements)]
    for element, value in ((-1, math.inf), (0, math.nan)):
        before = [local_of(p.detach()).clone() for p in model.parameters()]
        states = [{k: local_of(v).clone() for k, v in opt.state[p].items()} for p in model.parameters()]
        for p in model.parameters():
            grad = torch.ones(p.shape)
            if p is sharded[0]:
                grad.view(-1)[element] = value
            give(p, grad)
        mine = [bool(local_of(p.grad).isfinite().all()) for p in model.parameters()]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, all(mine))
        assert sorted({*found}) == [False, True]
        opt.step()
        assert opt.skipped.item()
        for p, old, state in zip(model.parameters(), before, states, strict=True):
            assert_same_bits(local_of(p.detach()), old)
            for key, value_ in state.items():
                assert_same_bits(local_of(opt.state[p][key]), value_, key)
    train(model, opt, range(2, 4), whole)
    assert not opt.skipped.item()
    whole.compare(model, opt)


@pytest.mark.parametrize(("world", "kind"), [(2, "fsdp"), (2, "tp"), (4, "hsdp"), (4, "fsdp-tp")])
def test_one_rank_skips_the_step_on_all(world: int, kind: str) -> None:
    ranks.run(world, skips, kind)


def fails_in_between() -> None:
    """The reduction raises: nothing was written, and the next step is whole."""
    model = make()
    shard(model, "fsdp")
    opt = AdamW(model.parameters(), max_grad_norm=0.5, **OPTIONS)
    for p in model.parameters():
        give(p, torch.ones(p.shape))
    before = [local_of(p.detach()).clone() for p in model.parameters()]
    reduce = dist.all_reduce

    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("a rank is gone")

    dist.all_reduce = broken
    try:
        with pytest.raises(RuntimeError, match="a rank is gone"):
            opt.step()
    finally:
        dist.all_reduce = reduce
    assert not opt.state
    for p, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(local_of(p.detach()), old)
    opt.step()
    assert {float(own["step"]) for own in opt.state.values()} == {1.0}


def test_a_reduction_that_fails() -> None:
    ranks.run(2, fails_in_between)
