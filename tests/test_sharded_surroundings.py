"""Where optimizers live in distributed training: DDP, FSDP1, ZeRO, steps in the backward pass, parts, pipelines."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bits import assert_same_bits
from semantics import assert_close
from sharded import WIDTH, Whole, full, make, mesh_of, shard
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import hook_with_zero_step
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.optim import (
    ZeroRedundancyOptimizer,
    _apply_optimizer_in_backward,
    _get_in_backward_optimizers,
)
from torch.distributed.optim.utils import as_functional_optim, functional_optim_map
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torch.optim import lr_scheduler

import wd_kernels
from wd_kernels.flat import place_of
from wd_kernels.schedules import Cosine

#: Of each rule: our class and torch's.
RULES: dict[str, tuple[Any, Any]] = {
    "AdamW": (
        partial(wd_kernels.AdamW, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    "SGDW": (
        partial(wd_kernels.SGDW, lr=0.01, momentum=0.9, dampening=0.1, weight_decay=0.1, decay="l2"),
        partial(torch.optim.SGD, lr=0.01, momentum=0.9, dampening=0.1, weight_decay=0.1),
    ),
}
OURS, THEIRS = RULES["AdamW"]
SCHEDULED = partial(wd_kernels.AdamW, lr=0.01, weight_decay=0.01, decay="independent", schedule=Cosine(9))
BUILDS = {"AdamW": OURS, "SGDW": RULES["SGDW"][0], "scheduled": SCHEDULED}
SAVED, AFTER = range(3), range(3, 6)


def batch(t: int) -> Tensor:
    """What this rank trains with, other than the others."""
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * t + dist.get_rank()))


def train(model: nn.Module, opt: Any, steps: range = range(4), whole: Whole | None = None) -> None:
    for t in steps:
        opt.zero_grad()
        model(batch(t)).square().sum().backward()
        if whole is not None:
            whole.step(model)
        opt.step()


def everything(model: nn.Module, opt: Any) -> list[Tensor]:
    """Parameters and states, copied; of what is in no DTensor, those of this rank."""
    found = [full(p).clone() for p in model.parameters()]
    for p in model.parameters():
        found += [full(t).clone() for name, t in sorted(opt.state.get(p, {}).items()) if name != "step"]
    return found


def assert_alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """But for a few roundings."""
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_close(x, y, 64, f"tensor {k}")


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        assert_same_bits(x, y, f"tensor {k}")


# DistributedDataParallel ----------------------------------------------------------------------------------------------


class Skipping(nn.Module):
    """A layer that takes no part in the second step, and in the third on one rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make(dist.get_rank())
        self.t = -1

    def forward(self, x: Tensor) -> Tensor:
        self.t += 1
        used = self.t != 1 and (self.t, dist.get_rank()) != (2, 1)
        for k, layer in enumerate(self.layers):
            x = layer(x) if k != 1 or used else x
        return x


DDP_WAYS: dict[str, dict[str, Any]] = {
    "static": {"gradient_as_bucket_view": True, "static_graph": True},
    "unused": {"find_unused_parameters": True},
    "unused, views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "flat": {},
}


def data_parallel(way: str, rule: str) -> list[Tensor]:
    """DDP sends the first rank's parameters."""
    ours, theirs = RULES[rule]
    model = Skipping() if "unused" in way else make(dist.get_rank())
    twin = copy.deepcopy(model)
    if way == "flat":
        wd_kernels.flatten_(model.parameters())
    parallel, other = (DistributedDataParallel(m, **DDP_WAYS[way]) for m in (model, twin))
    opt, truth = ours(parallel.parameters()), theirs(other.parameters())
    whole = Whole(model, ours)
    train(parallel, opt, range(5), whole)
    whole.compare(model, opt)
    assert all((place_of(p) is not None) == (way == "flat") for p in model.parameters())
    train(other, truth, range(5))
    assert_alike(everything(model, opt), everything(twin, truth))
    return everything(model, opt)


@pytest.mark.parametrize("way", DDP_WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_data_parallel(way: str, rule: str) -> None:
    """The bits of a step with the same gradients, on every rank."""
    assert_same(*ranks.run(2, data_parallel, way, rule))


# FullyShardedDataParallel, the first ----------------------------------------------------------------------------------

#: offload_to_cpu, the default, gives all states of an original parameter one memory where they are on the CPU already.
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "full": (StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False)),
    "sharded": (StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()),
}


def flat_sharded(use_orig_params: bool, build: Any, kind: str = "full", seed: int = 0, **change: Any) -> Any:
    wrap = partial(FullyShardedDataParallel, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    layers = make(seed)
    for k in (0, 3):
        layers[k] = wrap(layers[k])
    model = wrap(layers)
    FullyShardedDataParallel.set_state_dict_type(model, *KINDS[kind])
    return model, build(model.parameters(), **change)


def trains_fsdp1(use_orig_params: bool, rule: str) -> None:
    found = []
    for build in RULES[rule]:
        model, opt = flat_sharded(use_orig_params, build)
        whole = Whole(model, build)  # of this rank's shards
        train(model, opt, range(4), whole)
        assert_same(everything(model, opt)[: len(whole.params)], whole.params)
        found.append(everything(model, opt))
    assert_alike(*found)


def measures_fsdp1(use_orig_params: bool) -> None:
    each: list[dict[str, Any]] = [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {"skip_spikes": 6.0}]
    for limits in each:
        model, opt = flat_sharded(use_orig_params, wd_kernels.AdamW, **limits)
        model(torch.ones(2, WIDTH)).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(
            ValueError, match=r"is a part that FullyShardedDataParallel has left .*\.clip_grad_norm_\(\)"
        ):
            opt.step()
        assert all(map(torch.equal, model.parameters(), before))
        model.clip_grad_norm_(1.0)
        opt.max_grad_norm, opt.skip_nonfinite, opt.skip_spikes = None, False, None
        opt.step()


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_has_no_norm_of_the_whole(use_orig_params: bool) -> None:
    ranks.run(2, measures_fsdp1, use_orig_params)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1(use_orig_params: bool, rule: str) -> None:
    ranks.run(2, trains_fsdp1, use_orig_params, rule)


def resumes_fsdp1(use_orig_params: bool, kind: str, builds: tuple[Any, Any], exact: bool) -> None:
    """Trained, saved by the one class and loaded by the other."""
    model, opt = flat_sharded(use_orig_params, builds[0], kind)
    train(model, opt, SAVED)
    saved = copy.deepcopy((model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, opt)))
    train(model, opt, AFTER)
    other, new = flat_sharded(use_orig_params, builds[1], kind, seed=1, lr=0.5)
    other.load_state_dict(saved[0])
    new.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, new, saved[1]))
    assert new.param_groups[0]["lr"] == 0.01
    train(other, new, AFTER)
    (assert_same if exact else assert_alike)(everything(other, new), everything(model, opt))


@pytest.mark.parametrize("rule", BUILDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_resumes(use_orig_params: bool, kind: str, rule: str) -> None:
    ranks.run(2, resumes_fsdp1, use_orig_params, kind, (BUILDS[rule], BUILDS[rule]), True)


@pytest.mark.parametrize("rule", RULES)
def test_fsdp1_of_torch_and_back(rule: str) -> None:
    for builds in (RULES[rule], RULES[rule][::-1]):
        ranks.run(2, resumes_fsdp1, True, "full", builds, False)


# ZeroRedundancyOptimizer ----------------------------------------------------------------------------------------------


def sharing(build: Any, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A model on all ranks, each of which has the states of some of its parameters."""
    parallel = DistributedDataParallel(make(seed))
    return parallel, ZeroRedundancyOptimizer(parallel.parameters(), optimizer_class=build, **options)


def consolidated(opt: Any) -> Any:
    """The states of all ranks, on all of them."""
    opt.consolidate_state_dict()
    box = [copy.deepcopy(opt.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def shares(rule: str, views: bool) -> list[Tensor]:
    build = BUILDS[rule]
    model, opt = sharing(build, parameters_as_bucket_view=views)
    whole = Whole(model, build)
    train(model, opt, SAVED, whole)
    saved, weights = consolidated(opt), copy.deepcopy(model.state_dict())
    train(model, opt, AFTER, whole)
    assert_same([*model.parameters()], whole.params)

    other, new = sharing(build, seed=1, parameters_as_bucket_view=views, lr=0.5)
    other.load_state_dict(weights)
    new.load_state_dict(copy.deepcopy(saved))
    train(other, new, AFTER)
    assert_same([*other.parameters()], whole.params)

    alone = DistributedDataParallel(make(1))  # what is consolidated is a state of the whole model's optimizer
    alone.load_state_dict(weights)
    plain = build(alone.parameters(), lr=0.5)
    plain.load_state_dict(saved)
    train(alone, plain, AFTER)
    assert_same([*alone.parameters()], whole.params)
    return [*model.parameters()]


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("rule", BUILDS)
def test_zero(rule: str, views: bool) -> None:
    """Trained, consolidated and loaded, by ZeRO and without it: the bits of the optimizer of the whole model."""
    assert_same(*ranks.run(2, shares, rule, views))


def uneven(rule: str) -> list[Tensor]:
    """The second rank has fewer batches, and goes on with what the other one sends."""
    found = []
    for build in RULES[rule]:
        model, opt = sharing(build)
        scheduler = lr_scheduler.ExponentialLR(opt, 0.9)
        with Join([model, opt]):
            for t in range(5 - 2 * dist.get_rank()):
                opt.zero_grad()
                model(batch(t)).square().sum().backward()
                opt.step()
                scheduler.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert_alike(*found)
    return found[0]


@pytest.mark.parametrize("rule", RULES)
def test_zero_of_uneven_inputs(rule: str) -> None:
    """Ours and torch's under `Join`, with an LR scheduler of ZeRO's groups."""
    assert_same(*ranks.run(2, uneven, rule))


class Functional:
    """A prototype of what torch's overlapped optimizers want of a class: gradients are given to its steps.

    ZeroRedundancyOptimizer(overlap_with_ddp=True) makes it with the parameters of this rank, calls `step(gradients=)`
    for every bucket, and writes `param_groups` before and reads them after. DDP's `_register_fused_optim` makes it
    without parameters, and calls `step_param` for each.
    """

    def __init__(
        self, params: list[Tensor], *args: Any, build: Any, _allow_empty_param_list: bool = False, **options: Any
    ) -> None:
        if options.get("schedule") is not None:
            raise ValueError("a schedule with an overlapped optimizer: it would count every bucket")
        self.make = lambda own: build([{"params": own}], *args, **options)
        self.optimizer = self.make(params)
        self.alone: dict[Tensor, Any] = {}
        self.state_dict = self.optimizer.state_dict

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self, gradients: list[Tensor | None]) -> None:
        """None: the parameter is not stepped."""
        _step(self.optimizer, self.param_groups[0]["params"], gradients)

    def step_param(self, param: Tensor, grad: Tensor | None) -> None:
        if param not in self.alone:
            self.alone[param] = self.make([param])
        _step(self.alone[param], [param], [grad])


def _step(opt: Any, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """DDP looks at the gradients that parameters have: they get them back."""
    before = [p.grad for p in params]
    try:
        for p, grad in zip(params, gradients, strict=True):
            p.grad = grad
        opt.step()
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


def registered() -> Any:
    """As `register_functional_optim` would, for a while."""
    adapter = partial(Functional, build=wd_kernels.AdamW)
    return mock.patch.dict(functional_optim_map, {wd_kernels.AdamW: adapter})


def overlaps(shard_buckets: bool) -> list[Tensor]:
    """DDP's first two backward passes step nothing. torch's functional class never looks at the groups again."""
    found = []
    for build in (OURS, THEIRS):
        model = make()
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=1e-4)
        with registered():
            opt = ZeroRedundancyOptimizer(
                parallel.parameters(), optimizer_class=build.func, overlap_with_ddp=True, **build.keywords
            )
        with mock.patch.object(dist, "get_backend", return_value="nccl"):  # gloo may hang, if hooks run in any order
            parallel.register_comm_hook(None, hook_with_zero_step(allreduce_hook, parallel, opt, shard_buckets))
        whole = Whole(model, build)
        for t in range(7):
            parallel.zero_grad()
            parallel(batch(t)).square().sum().backward()
            if t > 1:
                whole.step(model)
        assert len(opt._overlap_info.params_per_bucket) > 1
        found.append([p.detach().clone() for p in model.parameters()])
        if build is OURS:
            assert_same(found[0], whole.params)
            saved = consolidated(opt)
            states = whole.opt.state_dict()["state"]
            assert saved["state"].keys() == states.keys()
            for k, own in states.items():
                assert_same([*saved["state"][k].values()], [*own.values()])
            opt.param_groups[0]["lr"] = whole.opt.param_groups[0]["lr"] = 0.5
            parallel.zero_grad()
            parallel(batch(7)).square().sum().backward()
            whole.step(model)
            assert_same([*model.parameters()], whole.params)
    assert_alike(*found)
    return found[0]


@pytest.mark.parametrize("shard_buckets", [False, True])
def test_zero_that_overlaps_with_ddp(shard_buckets: bool) -> None:
    assert_same(*ranks.run(2, overlaps, shard_buckets))


def fuses() -> list[Tensor]:
    found = []
    for build in (OURS, THEIRS):
        model = make()
        parallel = DistributedDataParallel(model, bucket_cap_mb=1e-4)
        with registered():
            parallel._register_fused_optim(build.func, **build.keywords)
        whole = Whole(model, build)
        for t in range(4):
            parallel.zero_grad()
            parallel(batch(t)).square().sum().backward()
            whole.step(model)
        found.append([p.detach().clone() for p in model.parameters()])
        if build is OURS:
            assert_same(found[0], whole.params)
    assert_alike(*found)
    return found[0]


def test_fused_with_ddp() -> None:
    assert_same(*ranks.run(2, fuses))


def test_overlapped_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="would count every bucket"), registered():
        as_functional_optim(wd_kernels.AdamW, lr=0.1, weight_decay=0.1, schedule=Cosine(9))


# Steps in the backward pass -------------------------------------------------------------------------------------------


def trained_in_backward(build: Any, way: str) -> list[Tensor]:
    model = make()
    net: nn.Module = model
    if way == "fsdp":  # torch's function hooks an AccumulateGrad that sharded parameters do not have, and never steps
        shard(model, "fsdp")
        opts = {p: build([p]) for p in model.parameters()}

        def hook(p: Tensor) -> None:
            opts[p].step()
            opts[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
    else:
        _apply_optimizer_in_backward(build.func, model.parameters(), build.keywords)
        opts = dict(zip(model.parameters(), _get_in_backward_optimizers(model), strict=True))
        net = DistributedDataParallel(model, gradient_as_bucket_view="views" in way) if "ddp" in way else model
    for t in range(4):
        with mock.patch.object(torch.accelerator, "current_stream"):  # torch asks for that of a CPU, too
            net(batch(t)).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    return [t for p, opt in opts.items() for t in (full(p).clone(), *map(full, opt.state[p].values()))]


def in_backward(way: str, rule: str) -> None:
    ours, theirs = RULES[rule]
    found = trained_in_backward(ours, way)
    if rule == "AdamW":
        assert_alike(found, trained_in_backward(theirs, way))
    model = make()
    if way == "fsdp":
        shard(model, "fsdp")
    opt = ours(model.parameters())
    train(DistributedDataParallel(model) if "ddp" in way else model, opt)
    assert_same(found, [t for p in model.parameters() for t in (full(p), *map(full, opt.state[p].values()))])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", ["alone", "ddp", "ddp, views", "fsdp"])
def test_in_backward(way: str, rule: str) -> None:
    """An optimizer of every parameter, that steps when the gradient is there: the bits of one after the pass."""
    ranks.run(2, in_backward, way, rule)


# Several parts of a model, and pipelines ------------------------------------------------------------------------------


class Container(torch.optim.Optimizer):
    """The optimizers of several parts of a model, as torchtitan has them; `in_backward`, one of every parameter."""

    def __init__(self, parts: Sequence[nn.Module], build: Any, in_backward: bool = False, **change: Any) -> None:
        self.parts, self.optimizers = parts, list[Any]()
        params = [p for part in parts for p in part.parameters()]
        for part in parts:
            if in_backward:
                own = {p: build([p], **change) for p in part.parameters()}
                self.optimizers.append([*own.values()])
                for p in part.parameters():
                    p.register_post_accumulate_grad_hook(partial(self._arrived, own))
            else:
                self.optimizers.append(build(part.parameters(), **change))
        self.in_backward = in_backward
        super().__init__(params, build.keywords)

    @staticmethod
    def _arrived(own: dict[Tensor, Any], p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    def step(self, closure: Any = None) -> None:
        for opt in () if self.in_backward else self.optimizers:
            opt.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for opt in () if self.in_backward else self.optimizers:
            opt.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        found = [
            get_optimizer_state_dict(part, opt, options=options)
            for part, opt in zip(self.parts, self.optimizers, strict=True)
        ]
        return dict(chain.from_iterable(own.items() for own in found))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for part, opt in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, opt, state_dict, options=options)


def save(parts: Sequence[nn.Module], opt: Container, folder: Path) -> None:
    weights = {k: v for part in parts for k, v in get_model_state_dict(part).items()}
    dcp.save({"model": weights, "optimizer": opt.state_dict()}, checkpoint_id=folder)


def load(parts: Sequence[nn.Module], opt: Container, folder: Path) -> None:
    state: Any = {"model": {k: v for part in parts for k, v in get_model_state_dict(part).items()}}
    state["optimizer"] = opt.state_dict()
    dcp.load(state, checkpoint_id=folder)
    for part in parts:
        names = get_model_state_dict(part)
        set_model_state_dict(part, {k: v for k, v in state["model"].items() if k in names})
    opt.load_state_dict(state["optimizer"])


def part_of(layers: nn.Sequential, places: range) -> nn.Sequential:
    """Some layers, with the names that they have in the whole."""
    part = nn.Sequential()
    for k in places:
        part.add_module(str(k), layers[k])
    return part


def in_parts(seed: int = 0) -> list[nn.Sequential]:
    """Two parts of a model, both sharded."""
    parts = [part_of(make(seed), places) for places in (range(3), range(3, 6))]
    for part in parts:
        fully_shard(part, mesh=mesh_of("dp"))
    return parts


def contains(rule: str, folder: Path) -> None:
    """Saved by optimizers of parts, loaded by the same and by those in the backward pass: all go on alike."""
    parts = in_parts()
    model = nn.Sequential(*parts)
    opt, whole, steps = Container(parts, BUILDS[rule]), Whole(model, BUILDS[rule]), list[int]()
    opt.register_step_post_hook(lambda *_: steps.append(1))
    train(model, opt, SAVED, whole)
    save(parts, opt, folder)
    train(model, opt, AFTER, whole)
    assert len(steps) == len(SAVED) + len(AFTER)
    assert_same([full(p) for p in model.parameters()], whole.params)
    for in_backward in (False, True):
        others = in_parts(1)
        new = Container(others, BUILDS[rule], in_backward, lr=0.5)
        load(others, new, folder)
        train(nn.Sequential(*others), new, AFTER)
        assert_same([full(p) for part in others for p in part.parameters()], whole.params)


@pytest.mark.parametrize("rule", BUILDS)
def test_containers(rule: str, tmp_path: Path) -> None:
    ranks.run(2, contains, rule, tmp_path)


SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B,
}  # fmt: skip
MICROBATCHES = 4


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def blocks(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(Block() for _ in range(4)))


def example(t: int) -> Tensor:
    """Inputs and targets, of the pipeline's two ends."""
    return torch.randn(2, 2 * MICROBATCHES, WIDTH, generator=torch.Generator().manual_seed(t))


def error(found: Tensor, target: Tensor) -> Tensor:
    return (found - target).square().mean()


def pipe(kind: str, seed: int) -> tuple[list[nn.Sequential], Any]:
    """The stages of this rank, and how they run: two stages, or four of which this rank has every other one."""
    rank, layers = dist.get_rank(), blocks(seed)
    places = [range(k, k + 1) for k in (rank, rank + 2)] if kind == "interleaved" else [range(2 * rank, 2 * rank + 2)]
    parts = [part_of(layers, own) for own in places]
    stages = [
        PipelineStage(part, own[0] // len(own), 4 // len(own), torch.device("cpu"))
        for part, own in zip(parts, places, strict=True)
    ]
    return parts, SCHEDULES[kind](stages if len(stages) > 1 else stages[0], MICROBATCHES, loss_fn=error)


def pipelines(kind: str, rule: str, folder: Path) -> dict[str, Tensor]:
    """Trained, saved, trained; then loaded and trained once more."""
    found = []
    for again in (False, True):
        parts, schedule = pipe(kind, seed=int(again))
        opt = Container(parts, BUILDS[rule], **({"lr": 0.5} if again else {}))
        if again:
            load(parts, opt, folder)
        for t in AFTER if again else (*SAVED, *AFTER):
            if t == AFTER[0] and not again:
                save(parts, opt, folder)
            x, y = example(t)
            opt.zero_grad()
            if dist.get_rank() == 0:
                schedule.step(x)
            else:
                schedule.step(target=y, losses=[])
            opt.step()
        found.append({name: p.detach().clone() for part in parts for name, p in part.named_parameters()})
    for name, p in found[0].items():
        assert_same_bits(p, found[1][name], name)
    return found[0]


def unpiped(build: Any) -> dict[str, Tensor]:
    model = blocks()
    opt = build(model.parameters())
    for t in (*SAVED, *AFTER):
        opt.zero_grad()
        for x, y in zip(*(own.chunk(MICROBATCHES) for own in example(t)), strict=True):
            (error(model(x), y) / MICROBATCHES).backward()
        opt.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "rule"), [("gpipe", "AdamW"), ("1f1b", "SGDW"), *(("interleaved", rule) for rule in BUILDS)]
)
def test_pipelines(kind: str, rule: str, tmp_path: Path) -> None:
    """Every stage has an optimizer; together they train as one does without a pipeline, also once loaded."""
    found: dict[str, Tensor] = {}
    for own in ranks.run(2, pipelines, kind, rule, tmp_path):
        found |= own
    truth = unpiped(BUILDS[rule])
    assert found.keys() == truth.keys()
    assert_same([found[name] for name in truth], [*truth.values()])
    if rule in RULES:
        assert_alike([found[name] for name in truth], [*unpiped(RULES[rule][1]).values()])


# Around sharded steps -------------------------------------------------------------------------------------------------


def clips(way: str, rule: str) -> None:
    found = []
    for build in RULES[rule]:
        model = make()
        shard(model, "fsdp")
        opt, whole = build(model.parameters()), Whole(model, build)
        for t in range(4):
            opt.zero_grad()
            model(batch(t)).square().sum().backward()
            params = [*model.parameters()]
            norm = torch.stack([full(p.grad).square().sum() for p in params]).sum().sqrt()
            if way == "in one":
                total = clip_grad_norm_(params, 0.5, foreach=False)
            else:
                total = get_total_norm([p.grad for p in params])
                clip_grads_with_norm_(params, 0.5, total)
            assert_close(full(total), norm, 64)
            assert norm > 0.5
            clipped = torch.stack([full(p.grad).square().sum() for p in params]).sum().sqrt()
            assert abs(float(clipped) - 0.5) < 1e-5
            whole.step(model)
            opt.step()
        if build is RULES[rule][0]:
            whole.compare(model, opt)
        found.append(everything(model, opt))
    assert_alike(*found)


@pytest.mark.parametrize(("way", "rule"), [("in one", "AdamW"), ("in two", "AdamW"), ("in two", "SGDW")])
def test_clipping(way: str, rule: str) -> None:
    ranks.run(2, clips, way, rule)


LR_SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, 8),
    "chained": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(opt, 5)], [2]
    ),
}


def follows(kind: str) -> None:
    found = []
    for build in (OURS, THEIRS):
        model = make()
        shard(model, "fsdp")
        opt, whole = build(model.parameters()), Whole(model, build)
        schedulers = [LR_SCHEDULERS[kind](own) for own in (opt, whole.opt)]
        for t in range(6):
            train(model, opt, range(t, t + 1), whole)
            for scheduler in schedulers:
                scheduler.step()
        if build is OURS:
            whole.compare(model, opt)
        found.append(everything(model, opt))
    assert_alike(*found)


@pytest.mark.parametrize("kind", LR_SCHEDULERS)
def test_lr_schedulers(kind: str) -> None:
    ranks.run(2, follows, kind)


def saved_and_loaded(opt: Any) -> Any:
    file = io.BytesIO()
    torch.save(opt, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "torch.save": saved_and_loaded,
}


def copies(way: str, rule: str) -> None:
    """The copy has parameters and states of its own. (torch copies no DTensor that has a gradient.)"""
    model = make()
    shard(model, "fsdp")
    opt = BUILDS[rule](model.parameters())
    train(model, opt, SAVED)
    opt.zero_grad()
    new = COPIES[way](opt)
    params = new.param_groups[0]["params"]
    before = [full(p).clone() for p in params]
    gradients = []
    for t in AFTER:
        train(model, opt, range(t, t + 1))
        gradients.append([p.grad for p in model.parameters()])
    assert_same([full(p) for p in params], before)
    for own in gradients:
        for p, grad in zip(params, own, strict=True):
            p.grad = grad.clone()
        new.step()
    assert_same([full(p) for p in params], [full(p) for p in model.parameters()])
    for p, q in zip(params, model.parameters(), strict=True):
        assert_same([full(t) for t in new.state[p].values()], [full(t) for t in opt.state[q].values()])
        assert (p.device_mesh, p.placements) == (q.device_mesh, q.placements)


@pytest.mark.parametrize(
    ("way", "rule"), [*((way, "AdamW") for way in COPIES), ("pickle", "SGDW"), ("deepcopy", "scheduled")]
)
def test_copies(way: str, rule: str) -> None:
    ranks.run(2, copies, way, rule)
