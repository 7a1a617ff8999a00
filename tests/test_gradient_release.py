"""Gradient release: the bits of ordinary steps, with the gradients of one block at a time."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from bits import assert_same_optimizers
from sharded import BUILD, WIDTH, backward, make, mesh_of, shard
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parallel import DistributedDataParallel

import wd_kernels
from wd_kernels import AdamW, decay_groups, release_gradients
from wd_kernels.schedules import Cosine
from wd_kernels.table import TensorTable

STEPS = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": True, "weight_decay": 0.1},
    "sgdw": {"momentum": 0.9, "weight_decay": 0.01, "decay": "independent", "form": "paper"},
    "adagradw": {"weight_decay": 0.1},
}


def pair(rule: str = "adamw", **more: Any) -> list[tuple[nn.Sequential, Any]]:
    """A model with its optimizer, twice: two groups, a schedule, and momentum."""
    made = []
    for _ in range(2):
        model = make()
        groups = decay_groups(model, more.get("weight_decay", OPTIONS[rule]["weight_decay"]))
        made.append((model, BUILD[rule](groups, **{"lr": 0.01, "schedule": Cosine(9), **OPTIONS[rule], **more})))
    return made


def same(a: Any, b: Any) -> None:
    """Parameters, states, counts, groups."""
    assert_same_optimizers(a, b)
    assert a.param_groups[0]["schedule_step"] == b.param_groups[0]["schedule_step"] > 0


def clip_blocks(model: nn.Sequential, clip_value: float | None = None, clip_block_norm: float | None = None) -> None:
    """torch's functions, on the gradients of every layer."""
    for layer in (layer for layer in model if list(layer.parameters())):
        if clip_value is not None:
            nn.utils.clip_grad_value_(layer.parameters(), clip_value)
        if clip_block_norm is not None:
            nn.utils.clip_grad_norm_(layer.parameters(), clip_block_norm)


class Launches:
    """Counts the steps of a release's blocks."""

    def __init__(self, release: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: list[int] = []
        step = release._step

        def counted(block: Any) -> None:
            self.blocks.append(len(block.params))
            step(block)

        monkeypatch.setattr(release, "_step", counted)


@pytest.mark.filterwarnings("ignore:an LR scheduler moves lr")
@pytest.mark.parametrize("rule", OPTIONS)
def test_bits(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry of a Sequential is a block: one launch for its weight and bias. An LR scheduler goes on beside it."""
    (a, released), (b, ordinary) = pair(rule)
    release = release_gradients(a, released)
    assert [len(block) for block in release.blocks] == [2, 2, 2, 2, 2]
    launches = Launches(release, monkeypatch)
    schedulers = [torch.optim.lr_scheduler.StepLR(opt, 2) for opt in (released, ordinary)]
    for t in range(STEPS):
        for model, opt, scheduler in ((a, released, schedulers[0]), (b, ordinary, schedulers[1])):
            opt.zero_grad()
            backward(model, t)
            opt.step()
            scheduler.step()
        assert launches.blocks == [2] * 5 * (t + 1)
        assert all(p.grad is None for p in a.parameters())
    same(released, ordinary)


def test_live_gradients() -> None:
    """There is never a gradient of more than one block, whatever order the backward pass has."""
    (model, opt), _ = pair()
    release_gradients(model, opt)
    most = []

    def look(p: Tensor) -> None:
        most.append({id(q) for q in model.parameters() if q.grad is not None})

    blocks = [{id(p) for p in layer.parameters()} for layer in model]
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    backward(model, 0)
    assert len(most) == 10
    assert all(any(found <= block for block in blocks) for found in most)


@pytest.mark.parametrize("way", ["every parameter", "one block", "modules"])
def test_blocks(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (a, released), (b, ordinary) = pair()
    blocks: Any = {
        "every parameter": [[p] for p in a.parameters()],
        "one block": [a.parameters()],
        "modules": [a[0], nn.Sequential(a[1], a[2])],  # the rest are blocks of their own
    }[way]
    release = release_gradients(a, released, blocks=blocks)
    launches = Launches(release, monkeypatch)
    for t in range(3):
        for model, opt in ((a, released), (b, ordinary)):
            opt.zero_grad()
            backward(model, t)
            opt.step()
    same(released, ordinary)
    expected = {"every parameter": [1] * 10, "one block": [10], "modules": [1, 1, 1, 1, 4, 2]}[way]
    assert sorted(launches.blocks) == sorted(expected * 3)


def test_default_blocks() -> None:
    """Entries of the outermost lists, and every other module that has parameters of its own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.embed = nn.Embedding(3, 2)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(2))
            self.head = nn.Linear(2, 3)
            self.head.weight = self.embed.weight  # tied

    model = Model()
    names = {id(p): name for name, p in model.named_parameters()}
    found = release_gradients(model, AdamW(model.parameters())).blocks
    assert [[names[id(p)] for p in block] for block in found] == [
        ["scale"],
        ["embed.weight"],
        [f"layers.0.{k}.{name}" for k in (0, 1) for name in ("weight", "bias")],
        [f"layers.1.{k}.{name}" for k in (0, 1) for name in ("weight", "bias")],
        ["head.bias"],
    ]


def test_missing_gradients_and_frozen_parameters() -> None:
    """A block that is not whole when the backward pass ends is stepped by step(); what is frozen is not waited for."""
    (a, released), (b, ordinary) = pair()
    a[2].bias.requires_grad_(False)
    b[2].bias.requires_grad_(False)
    release_gradients(a, released)
    for t in range(STEPS):
        for model, opt in ((a, released), (b, ordinary)):
            opt.zero_grad()
            if t == 2:
                model[0](torch.ones(2, 6)).sum().backward()
                (model[3].weight * 3).sum().backward()  # not its bias
                assert model is b or model[3].weight.grad is not None
            else:
                backward(model, t)
            if model is a and t != 2:
                assert model[2].weight.grad is None  # its block did not wait for the frozen one
            if t == 3:
                model[2].bias.requires_grad_(True)
            opt.step()
        assert all(p.grad is None for p in a.parameters())
    same(released, ordinary)


def test_accumulation() -> None:
    (a, released), (b, ordinary) = pair()
    release = release_gradients(a, released)
    for t in range(3):
        with release.accumulating():
            backward(a, 10 * t)
            assert all(p.grad is not None for p in a.parameters())
        backward(a, 10 * t + 1)
        released.step()
        ordinary.zero_grad()
        for k in range(2):
            backward(b, 10 * t + k)
        ordinary.step()
    same(released, ordinary)


def test_a_second_gradient_is_an_error() -> None:
    """By name, and nothing of it is written; step() ends what was begun, and the next pass is fine."""
    (model, opt), _ = pair()
    release = release_gradients(model, opt)
    backward(model, 0)
    before = copy.deepcopy(opt.state_dict())
    message = r"second gradient of parameter '5\.\w+' \(group \d, index \d\) has come after it was stepped"
    with pytest.raises(RuntimeError, match=message):
        backward(model, 1)
    with release.accumulating(), pytest.raises(RuntimeError, match=message):
        backward(model, 1)
    for saved, own in zip(before["state"].values(), opt.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(saved[name], own[name]) for name in saved)
    opt.step()
    backward(model, 1)
    opt.step()
    assert {float(own["step"]) for own in opt.state.values()} == {2.0}
    release.remove()
    backward(model, 2)
    assert all(p.grad is not None for p in model.parameters())
    opt.step()
    assert {float(own["step"]) for own in opt.state.values()} == {3.0}


class Stopped(Exception):
    """Of a pass that does not end."""


def stop(p: Tensor) -> None:
    raise Stopped


@pytest.mark.parametrize("way", ["bad lr", "half a pass", "half a block"])
def test_a_pass_that_fails(way: str) -> None:
    """zero_grad() drops what was left of it, a warning says that it was not counted, and the next pass is whole."""
    (a, released), (b, ordinary) = pair()
    release_gradients(a, released)
    if way == "bad lr":
        for group in released.param_groups:
            group["lr"] = float("nan")
        with pytest.raises(ValueError, match="lr=nan"):
            backward(a, 0)
        for group in released.param_groups:
            group["lr"] = 0.01
    elif way == "half a block":
        (a[3].weight * 3).sum().backward()
    else:
        hook = a[1].weight.register_post_accumulate_grad_hook(stop)
        with pytest.raises(Stopped):
            backward(a, 0)
        hook.remove()
        assert released.state[a[5].weight]["step"] == 1
        assert a[0].weight not in released.state
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            q.data.copy_(p.data)
        ordinary.load_state_dict(copy.deepcopy(released.state_dict()))
        with pytest.warns(UserWarning, match=r"zero_grad\(\) comes after a backward pass that has stepped blocks"):
            released.zero_grad()
    for t in range(3):
        for model, opt in ((a, released), (b, ordinary)):
            opt.zero_grad()
            backward(model, t)
            opt.step()
        assert all(p.grad is None for p in a.parameters())
    same(released, ordinary)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_half_a_block_that_the_model_drops(name: str) -> None:
    """After model.zero_grad() what had arrived is waited for again, or the block is clipped in two."""
    (a, released), (b, ordinary) = pair()
    release_gradients(a, released, clip_block_norm=0.05)
    for t in range(3):
        (getattr(a[2], name) * 3).sum().backward()
        a.zero_grad()
        backward(a, t)
        released.step()
        b.zero_grad()
        backward(b, t)
        clip_blocks(b, clip_block_norm=0.05)
        ordinary.step()
    same(released, ordinary)


@pytest.mark.parametrize("when", ["before step", "after step"])
@pytest.mark.parametrize("what", ["a bias", "a block"])
def test_unfreezing(what: str, when: str) -> None:
    """Frozen at first or for one pass, at any moment: no gradient is lost, none is stepped twice."""
    (a, released), (b, ordinary) = pair()
    frozen = [[m[2].bias] if what == "a bias" else [*m[2].parameters()] for m in (a, b)]
    for p in frozen[0] + frozen[1]:
        p.requires_grad_(False)
    release_gradients(a, released)
    for t in range(6):
        for model, opt, own in ((a, released, frozen[0]), (b, ordinary, frozen[1])):
            opt.zero_grad()
            backward(model, t)
            for p in own if when == "before step" else ():
                p.requires_grad_(t in (1, 3, 4))
            opt.step()
            for p in own if when == "after step" else ():
                p.requires_grad_(t in (1, 3, 4))
        assert all(p.grad is None for p in a.parameters())
    same(released, ordinary)


def test_unfreezing_between_two_passes_of_a_round() -> None:
    """Of a block that was stepped without it, a parameter still has its first gradient to come."""
    (a, released), (b, ordinary) = pair()
    release_gradients(a, released)
    for t in range(3):
        for model, opt in ((a, released), (b, ordinary)):
            opt.zero_grad()
            model[2].bias.requires_grad_(False)
            backward(model, t)
            model[2].bias.requires_grad_(True)
            (model[2].bias * 3).sum().backward()
            opt.step()
    same(released, ordinary)


def test_an_interrupt_in_a_block_s_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that was stepped when a handler raised is not stepped again."""
    (a, released), (b, ordinary) = pair(schedule=None)
    release = release_gradients(a, released)
    take = TensorTable.step
    times: list[int] = []

    def interrupted(table: TensorTable, *args: Any) -> None:
        take(table, *args)
        times.append(table is not ordinary._table)
        if sum(times) == 8 and times[-1]:  # in the second pass
            raise KeyboardInterrupt

    monkeypatch.setattr(TensorTable, "step", interrupted)
    for t in range(4):
        for model, opt in ((a, released), (b, ordinary)):
            opt.zero_grad()
            try:
                backward(model, t)
            except KeyboardInterrupt:  # in the middle layer: those before it have no gradient in this pass
                reached = [id(p) for p in release._params() if id(p) in release._stepped]
                assert reached
                missed = [k for k, p in enumerate(a.parameters()) if id(p) not in reached]
            opt.step() if model is a or t != 1 else None
            if model is b and t == 1:
                for k, p in enumerate(b.parameters()):
                    p.grad = None if k in missed else p.grad
                opt.step()
    assert sum(times) == 18  # 2 of 20 were never reached
    assert_same_optimizers(released, ordinary)


@pytest.mark.parametrize("clip", [{"clip_value": 0.02}, {"clip_block_norm": 0.05}])
def test_clipping(clip: dict[str, float]) -> None:
    """As torch's functions do it, block by block."""
    (a, released), (b, ordinary) = pair()
    release_gradients(a, released, **clip)
    for t in range(3):
        backward(a, t)
        released.step()
        ordinary.zero_grad()
        backward(b, t)
        before = [p.grad.clone() for p in b.parameters()]
        clip_blocks(b, **clip)
        assert not all(torch.equal(p.grad, was) for p, was in zip(b.parameters(), before, strict=True))
        ordinary.step()
    same(released, ordinary)


def test_limits_of_groups() -> None:
    """A group's own limit is in its rows: as in ordinary steps."""
    (a, released), (b, ordinary) = pair()
    for opt in (released, ordinary):
        opt.param_groups[0]["max_grad_value"] = 0.02
    release_gradients(a, released)
    for t in range(3):
        for model, opt in ((a, released), (b, ordinary)):
            opt.zero_grad()
            backward(model, t)
            assert model is a or max(float(p.grad.abs().max()) for p in b.parameters()) > 0.02
            opt.step()
    same(released, ordinary)


def test_checkpoints_and_copies() -> None:
    """States, groups and counts are the optimizer's: saved and loaded in the middle, copied, kept when it ends."""
    (a, released), (b, ordinary) = pair()
    release = release_gradients(a, released)
    for t in range(STEPS):
        for model, opt in ((a, released), (b, ordinary)):
            opt.zero_grad()
            backward(model, t)
            opt.step()
        if t == 2:
            released.load_state_dict(copy.deepcopy(released.state_dict()))
    same(released, ordinary)
    copied = copy.deepcopy(released)
    assert copied.release is None
    same(copied, ordinary)
    release.remove()
    for model, opt in ((a, released), (b, ordinary)):
        opt.zero_grad()
        backward(model, STEPS)
        assert all(p.grad is not None for p in model.parameters())
        opt.step()
    same(released, ordinary)


@pytest.mark.usefixtures("own_garbage")
def test_nothing_is_kept_alive() -> None:
    (model, opt), _ = pair()
    seen = [weakref.ref(opt), weakref.ref(release_gradients(model, opt)), weakref.ref(model[0].weight)]
    backward(model, 0)
    opt.step()
    del model, opt
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


def test_bad_arguments() -> None:
    (model, opt), _ = pair()
    with pytest.raises(TypeError, match=r"optimizer is a SGD: allowed are those of wd_kernels"):
        release_gradients(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 with gradient release: .*clip_value=, .*clip_block_norm"):
        release_gradients(model, opt, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"clip_value=-1: allowed are numbers > 0"):
        release_gradients(model, opt, clip_value=-1)
    flat = make()
    wd_kernels.flatten_(flat.parameters())
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 is flat: its gradient is part of a buffer"):
        release_gradients(flat, AdamW(flat.parameters()))
    release_gradients(model, opt)
    with pytest.raises(RuntimeError, match="released already"):
        release_gradients(model, opt)
    with pytest.raises(RuntimeError, match="a group is added while gradients are released"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "param_names": ["new"]})
    opt.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="has other parameters, or has them in other places, than when"):
        opt.step()


def test_what_cannot_be_released() -> None:
    model = make()
    opt = AdamW(decay_groups(model, 0.1))
    for blocks, name in (([model[0].weight], "Parameter"), (nn.ModuleDict({"a": model[0]}), "str"), ([[1]], "int")):
        with pytest.raises(TypeError, match=f"blocks holds a {name}: expected modules, or lists of parameters"):
            release_gradients(model, opt, blocks=blocks)
    release = release_gradients(model, opt)
    other = AdamW([model[0].weight])
    with pytest.raises(ValueError, match="parameter 0 of group 0 is released by another optimizer"):
        release_gradients(model, other)
    p = opt.param_groups[0]["params"].pop()
    opt.param_groups[1]["params"].append(p)
    with pytest.raises(RuntimeError, match="has other parameters, or has them in other places"):
        backward(model, 0)
    release.remove()
    release_gradients(model, other)


def test_on_meta() -> None:
    with torch.device("meta"):
        model = make()
        opt = AdamW(model.parameters())
        release_gradients(model, opt)
        for _ in range(2):
            model(torch.ones(4, WIDTH)).sum().backward()
            assert all(p.grad is None for p in model.parameters())
            opt.step()
    assert {t.device.type for own in opt.state.values() for name, t in own.items() if name != "step"} == {"meta"}
    assert {float(own["step"]) for own in opt.state.values()} == {2.0}


def test_errors_name_the_parameter() -> None:
    """A block is a part of the groups: its parameters are called by their places in the whole."""
    model = make()
    opt = AdamW(decay_groups(model, 0.1))
    release_gradients(model, opt)
    backward(model, 0)
    opt.step()
    opt.state[model[5].bias]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter '5\.bias' \(group 1, index 5\) has shape \(7,\)"):
        backward(model, 1)


# On several ranks -----------------------------------------------------------------------------------------------------


def wrapped(kind: str, release: bool) -> tuple[nn.Module, Any]:
    model: nn.Module = make()
    if kind == "ddp":
        model = DistributedDataParallel(model, bucket_cap_mb=0.00005)
    elif kind == "ddp-views":
        model = DistributedDataParallel(model, bucket_cap_mb=0.00005, gradient_as_bucket_view=True)
    else:
        shard(model, kind)
    opt = AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1, schedule=Cosine(9))
    if release:
        release_gradients(model, opt)
    return model, opt


def sync(model: nn.Module, on: bool) -> Any:
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    else:
        model.set_requires_gradient_sync(on)


def distributed(kind: str) -> None:
    (a, released), (b, ordinary) = wrapped(kind, True), wrapped(kind, False)
    steps = []
    step = released.release._step
    released.release._step = lambda block: (steps.append(len(block.params)), step(block))
    own = 1000 * dist.get_rank() * ("tp" not in kind)  # other data on every rank that has the whole model
    for t in range(4):
        for model, opt in ((a, released), (b, ordinary)):
            opt.zero_grad()
            if kind != "tp" and t == 2:  # two micro-steps
                sync(model, False)
                backward(model, own + 100)
                sync(model, True)
            backward(model, own + t)
            if model is a:
                assert sum(steps) == 10 * (t + 1)  # all within the backward pass
            opt.step()
        assert all(p.grad is None for p in a.parameters())
    assert len(steps) > 4 * 2  # of several blocks; DDP cuts its buckets in the second pass
    same(released, ordinary)


@pytest.mark.parametrize(("world", "kind"), [(2, "fsdp"), (2, "tp"), (2, "ddp"), (2, "ddp-views"), (4, "fsdp-tp")])
def test_distributed(world: int, kind: str) -> None:
    ranks.run(world, distributed, kind)


def unwrapped() -> None:
    with pytest.warns(UserWarning, match="gradients of this process alone, of 2: .* DistributedDataParallel first"):
        release_gradients(model := make(), AdamW(model.parameters()))
    for name in ("find_unused_parameters", "static_graph"):
        parallel = DistributedDataParallel(make(), **{name: True})
        with pytest.raises(
            ValueError, match=rf"{name}=True\) with gradient release: which parameters no rank has used"
        ):
            release_gradients(parallel, AdamW(parallel.parameters()))
    parallel = DistributedDataParallel(make())
    with pytest.raises(ValueError, match="blocks with a model in DDP: its buckets are the blocks"):
        release_gradients(parallel, AdamW(parallel.parameters()), blocks=[])


def wrapped_otherwise() -> None:
    """DDP within another module, and compiled; a second release; Join, FSDP1; gradients that are partial."""
    model = DistributedDataParallel(make())
    compiled: Any = torch.compile(model, backend="eager")
    opt = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        release = release_gradients(compiled, opt)
        for t in range(2):
            backward(compiled, 1000 * dist.get_rank() + t)
            opt.step()
        release.remove()
    found = [torch.empty_like(model.module[0].weight) for _ in range(dist.get_world_size())]
    dist.all_gather(found, model.module[0].weight.detach())
    assert torch.equal(*found)
    assert {float(own["step"]) for own in opt.state.values()} == {4.0}
    release_gradients(model, opt)
    with pytest.raises(RuntimeError, match="Join with gradient release"), Join([model]):
        backward(model, 0)

    whole = FullyShardedDataParallel(make(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match="FullyShardedDataParallel with gradient release: its gradients are there bef"):
        release_gradients(whole, AdamW(whole.parameters()))

    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh_of("tp"), [Replicate()], run_check=False))
    of_partial = AdamW([p], lr=0.01, weight_decay=0.1)
    of_partial.register_step_pre_hook(wd_kernels.redistribute_gradients)
    release_gradients(nn.Module(), of_partial)
    for _ in range(2):
        local = p.to_local(grad_placements=[Partial()])
        (local * torch.arange(3.0)).sum().backward()
        assert p.grad is None
        of_partial.step()
    assert of_partial.state[p]["step"] == 2


def test_wrapped_otherwise() -> None:
    ranks.run(2, wrapped_otherwise)


def test_a_model_that_nothing_sums() -> None:
    ranks.run(2, unwrapped)
