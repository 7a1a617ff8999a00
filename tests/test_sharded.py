"""DTensor parameters: every way of sharding has the bits of the whole model, at the price of ordinary tensors."""

from __future__ import annotations

import copy
import gc
from functools import partial
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from bits import assert_same_bits
from sharded import BUILD, KINDS, WIDTH, Whole, backward, full, make, mesh_of, shard, train
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import wd_kernels
from wd_kernels import AdamW

OPTIONS = {
    "adamw": {"amsgrad": True, "weight_decay": 0.1},
    "sgdw": {"momentum": 0.9, "weight_decay": 0.1},
    "adagradw": {"weight_decay": 0.1},
}


def trains(kind: str, rule: str) -> None:
    model = make()
    options = {"lr": 0.01, **OPTIONS[rule]}
    shard(model, kind)
    opt, whole = BUILD[rule](model.parameters(), **options), Whole(model, lambda p: BUILD[rule](p, **options))
    train(model, opt, range(4), whole)
    whole.compare(model, opt)


@pytest.mark.parametrize(
    ("world", "kind"), [(world, kind) for world in (1, 2, 4) for kind, least in KINDS.items() if least <= world]
)
def test_bits(world: int, kind: str) -> None:
    for rule in OPTIONS:
        ranks.run(world, trains, kind, rule)


def owns_nothing() -> None:
    """One row: three of four ranks have nothing but empty shards, and count all the same."""
    model = nn.Sequential(nn.Linear(WIDTH, 1))
    shard(model, "fsdp")
    mine = sum(p.to_local().numel() for p in model.parameters())
    assert (mine == 0) == (dist.get_rank() > 0)
    opt, whole = AdamW(model.parameters(), weight_decay=0.1), Whole(model, lambda p: AdamW(p, weight_decay=0.1))
    train(model, opt, range(3), whole)
    whole.compare(model, opt)


def test_a_rank_that_owns_nothing() -> None:
    ranks.run(4, owns_nothing)


class Operators(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators_of(opt: Any) -> list[str]:
    """Those of one step."""
    with Operators() as operators:
        opt.step()
    return operators.names


def steady(kind: str) -> None:
    ordinary = AdamW(make().parameters(), lr=1e-4, weight_decay=0.1)
    model = make()
    shard(model, kind)
    opt = AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    for p in ordinary.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        ordinary.step()
    train(model, opt, range(3))
    seen = []
    inspect = opt._table._inspect
    opt._table._inspect = lambda watch, odd: (seen.append(odd), inspect(watch, odd))
    versions = [p._version for p in model.parameters()]
    for t in range(3, 5):  # new gradients at new addresses
        opt.zero_grad()
        backward(model, t)
        assert operators_of(opt) == operators_of(ordinary)
    assert seen == []
    assert [p._version for p in model.parameters()] == [version + 2 for version in versions]
    p = next(model.parameters())
    for _ in range(2):
        equal = copy.copy(p._spec)  # another object: inspected, once
        for _ in range(3):
            p.grad = DTensor(p.grad.to_local(), equal, requires_grad=False)
            opt.step()
    assert seen == [[0], [0]]
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        opt.step()
    gc.collect()
    assert len(gc.get_objects()) - before < 20  # of this loop's own


@pytest.mark.parametrize("kind", ["fsdp", "mixed"])
def test_nothing_is_dispatched_and_nothing_grows(kind: str) -> None:
    """A steady step is one native call: no operator, no inspection, no object that outlives it."""
    ranks.run(2, steady, kind)


def sequence_parallel(hook: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "1": SequenceParallel(),
        "2": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh_of("tp"), plan)
    opt = AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1)
    whole = Whole(model, lambda p: AdamW(p, lr=0.01, weight_decay=0.1))
    if hook:
        opt.register_step_pre_hook(wd_kernels.redistribute_gradients)
    before = [full(p).clone() for p in model.parameters()]
    for t in range(3):
        opt.zero_grad()
        model(torch.arange(t, t + 8).view(2, 4)).square().sum().backward()
        placements = [p.grad.placements for p in model.parameters()]
        assert placements[:2] == [(Replicate(),), (Partial(),)]
        whole.step(model)
        if hook:
            opt.step()
            continue
        with pytest.raises(
            ValueError,
            match=r"the gradient of parameter '0\.weight' \(group 0, index 0\) is a DTensor with placements "
            r"\(Replicate\(\),\) over .*; allowed is what its parameter is, .*\(Shard\(dim=0\),\).*: gradients are not "
            r"sent within a step: .*register_step_pre_hook\(wd_kernels\.redistribute_gradients\)",
        ):
            opt.step()
        for p, was in zip(model.parameters(), before, strict=True):
            assert torch.equal(full(p), was)
        assert not opt.state
        return
    whole.compare(model, opt)


@pytest.mark.parametrize("hook", [True, False])
def test_sequence_parallelism(hook: bool) -> None:
    """Its gradients have other placements: an error on every rank, or redistributed before the step."""
    ranks.run(2, sequence_parallel, hook)


# Mixed precision ------------------------------------------------------------------------------------------------------


def low_precision(way: str) -> None:
    options, dtype = {}, torch.float32
    if way == "policy":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    elif way == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    elif way == "bfloat16":
        dtype = torch.bfloat16
    model = make(dtype=dtype)
    shard(model, "fsdp", **options)
    if way == "gradients":
        for p in model.parameters():
            p.grad_dtype = None  # fully_shard gives gradients of the parameter's dtype: they are cast below
    build = partial(AdamW, lr=0.01, weight_decay=0.1)
    opt, whole = build(model.parameters()), Whole(model, build)
    for p in whole.params if way == "gradients" else ():
        p.grad_dtype = torch.bfloat16
    for t in range(3):
        opt.zero_grad()
        backward(model, t, dtype)
        for p in model.parameters() if way == "gradients" else ():
            p.grad = p.grad.to(torch.bfloat16)
        whole.step(model)
        opt.step()
    whole.compare(model, opt)
    states = {own["exp_avg"].dtype for own in opt.state.values()}
    assert states == {torch.float32}


@pytest.mark.parametrize("way", ["policy", "bfloat16", "gradients", "offload"])
def test_mixed_precision(way: str) -> None:
    ranks.run(2, low_precision, way)


def arriving() -> None:
    """A gradient that is still being summed, as sequence parallelism leaves them: it is waited for."""
    mesh = mesh_of("dp")
    local = torch.randn(3, 2, generator=torch.Generator().manual_seed(dist.get_rank()))
    p, q = (nn.Parameter(DTensor.from_local(local.clone(), mesh, [Shard(0)], run_check=False)) for _ in range(2))
    a, b = AdamW([p], weight_decay=0.1), AdamW([q], weight_decay=0.1)
    for t in range(3):
        total = all_reduce(local + t, "sum", mesh.get_group())
        assert type(total) is AsyncCollectiveTensor
        p.grad = DTensor(total, p._spec, requires_grad=False)
        dist.all_reduce(summed := local + t)
        q.grad = DTensor(summed, q._spec, requires_grad=False)
        a.step()
        b.step()
    assert_same_bits(full(p), full(q))


def test_gradients_that_arrive() -> None:
    ranks.run(2, arriving)
