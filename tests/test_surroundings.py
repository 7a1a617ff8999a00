"""What stands around an optimizer: tensor modes, lazy modules, state_dict hooks, threads, DDP."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.nn.parallel import DistributedDataParallel

import wd_kernels
from wd_kernels.flat import place_of

BOTH = pytest.mark.parametrize("build", [wd_kernels.AdamW, wd_kernels.SGDW])


def parameter(*shape: int) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))
    p.grad = torch.full_like(p, 0.25)
    return p


def shapes_of_a_step(build: Any) -> list[dict[str, Any]]:
    """What two steps of a model without memory leave in its states."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    optimizer = build(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [
        {name: (t.shape, t.dtype, t.device.type, float(t) if name == "step" and not is_fake(t) else 2.0)
         for name, t in own.items()} for own in optimizer.state.values()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(wd_kernels.AdamW, torch.optim.AdamW), (wd_kernels.AdagradW, torch.optim.Adagrad)],
)
def test_steps_without_memory(ours: Any, theirs: Any) -> None:
    """On the meta device and under FakeTensorMode: the states of torch's class, of its shapes, dtypes and devices."""
    meta = [lambda: torch.device("meta")] if ours is wd_kernels.AdamW else []  # where torch's Adagrad counts on meta
    for mode in (FakeTensorMode, *meta):
        with mode():
            found = shapes_of_a_step(ours)
        with mode():
            assert found == shapes_of_a_step(theirs)
        assert len(found) == 4
    with FakeTensorMode():
        (w,) = made = [torch.nn.Parameter(torch.ones(3, 2))]
        w.grad = torch.ones(3, 2)
        optimizer = ours(made)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert {t.shape for t in optimizer.state[w].values()} == {torch.Size([]), torch.Size([3, 2])}
        of_sgd = shapes_of_a_step(partial(wd_kernels.SGDW, momentum=0.9))
    assert [set(own) for own in of_sgd] == [{"step", "momentum_buffer"}] * 4


@BOTH
def test_a_model_that_was_made_on_meta(build: Any) -> None:
    """to_empty and assign=True give the model other parameters: the optimizer's own would never be stepped."""
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    optimizer = build(model.parameters(), lr=0.1, weight_decay=0.1)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"2 of 2 parameters are on the meta device.*before model.to_empty\(\)"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.step()
    frozen = torch.nn.Parameter(torch.zeros(3, device="meta"), requires_grad=False)  # offloaded, say
    idle = torch.nn.Parameter(torch.ones(2))
    build([frozen, idle], weight_decay=0.1).step()
    assert all(float(p.detach().max()) < 1 for p in model.parameters())


@BOTH
def test_fake_mode_around_real_parameters(build: Any) -> None:
    """The table itself would be fake: an error, not a read of address 0. So would one half without memory."""
    real = parameter(4)
    optimizer = build([real], weight_decay=0.1)
    before = real.detach().clone()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="FakeTensor"):
        optimizer.step()
    assert torch.equal(real, before)
    optimizer.step()
    assert not torch.equal(real, before)
    bare = torch.nn.Parameter(torch.ones(3, device="meta"))
    bare.grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="parameter 1 of group 0 is on the meta device: it has no memory to step"):
        build([parameter(4), bare], weight_decay=0.1).step()


@BOTH
def test_a_step_that_torch_does_not_allow_writes_nothing(build: Any) -> None:
    """Inside a torch.func transform torch refuses to count the step: then nothing else was written either."""
    p = parameter(40)
    optimizer = build([p], lr=0.1, weight_decay=0.1)
    optimizer.step()
    before = {name: t.clone() for name, t in {"theta": p.detach(), **optimizer.state[p]}.items()}

    def loss(x: torch.Tensor) -> torch.Tensor:
        optimizer.step()
        return x.sum()

    with pytest.raises(RuntimeError):
        torch.func.grad(loss)(torch.ones(3))
    for name, t in {"theta": p.detach(), **optimizer.state[p]}.items():
        assert torch.equal(t, before[name]), name
    optimizer.step()
    assert optimizer.state[p]["step"] == 2
    assert not torch.equal(p, before["theta"])


@BOTH
def test_compiled_step_gives_the_same_bits(build: Any) -> None:
    """torch.compile leaves the step alone."""
    plain, compiled = parameter(40), parameter(40)
    one, other = build([plain], lr=0.1, weight_decay=0.1), build([compiled], lr=0.1, weight_decay=0.1)
    step = torch.compile(other.step, backend="eager")
    for _ in range(3):
        one.step()
        step()
    assert torch.equal(plain, compiled)
    assert other.state[compiled]["step"] == 3


@BOTH
def test_flushed_subnormals_change_no_bits(build: Any) -> None:
    """The reference, too, computes with subnormals where the thread flushes them."""
    params = [torch.nn.Parameter(torch.full((40,), 1e-39)) for _ in range(2)]
    pairs = [
        build([p], lr=0.1, weight_decay=0.5, backend=name) for p, name in zip(params, ("cpu", "reference"), strict=True)
    ]
    torch.set_flush_denormal(True)
    try:
        for _ in range(3):
            for p, optimizer in zip(params, pairs, strict=True):
                p.grad = torch.full_like(p, 1e-39 if build is wd_kernels.SGDW else 1e-20)
                optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(params[0], params[1])
    assert params[0][0] != 1e-39
    states = [list(optimizer.state[p].values()) for p, optimizer in zip(params, pairs, strict=True)]
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


@BOTH
def test_lazy_parameters_wait_until_they_are_made(build: Any) -> None:
    layer = torch.nn.LazyLinear(3)
    optimizer = build(layer.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert not optimizer.state
    layer(torch.ones(2, 5)).sum().backward()
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer.step()
    for p, old in zip(layer.parameters(), before, strict=True):
        assert not torch.equal(p, old)
        assert optimizer.state[p]["step"] == 1


@BOTH
def test_state_dict_hooks_see_what_is_exported(build: Any) -> None:
    """Counts of their own; and what a hook returns is what the caller gets, whatever its structure."""
    optimizer = build([parameter(3)], weight_decay=0.1, decay="l2")
    optimizer.step()
    seen: list[dict[str, Any]] = []
    optimizer.register_state_dict_post_hook(lambda _, packed: seen.append(packed))
    optimizer.register_state_dict_post_hook(lambda _, packed: {"mine": packed["state"]})
    packed = optimizer.state_dict()
    optimizer.step()
    assert packed.keys() == {"mine"}
    assert "decay" not in seen[0]["param_groups"][0]
    assert packed["mine"] is seen[0]["state"]
    assert seen[0]["state"].get(0, {}).get("step", 1) == 1


@BOTH
def test_threads_with_optimizers_of_their_own(build: Any) -> None:
    """One thread drops and renews gradients while another's optimizer steps the same parameters: no crash."""
    params = [parameter(1 << 14) for _ in range(8)]
    stop = threading.Event()

    def renew() -> None:
        while not stop.is_set():
            for p in params:
                p.grad = torch.full_like(p, 0.5)

    other = threading.Thread(target=renew)
    other.start()
    try:
        optimizer = build(params, lr=1e-3, weight_decay=0.1)
        for _ in range(200):
            optimizer.step()
    finally:
        stop.set()
        other.join()
    for p in params:
        assert p.isfinite().all()
        assert optimizer.state[p]["step"] == 200


@BOTH
def test_threads_that_share_an_optimizer_take_turns(build: Any) -> None:
    params = [parameter(n) for n in (5, 1000, 40_000)]
    alone = [parameter(n) for n in (5, 1000, 40_000)]
    optimizer = build(params, lr=1e-2, weight_decay=0.1)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reference = build(alone, lr=1e-2, weight_decay=0.1)
    for _ in range(100):
        reference.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p]["step"] == 100


def test_a_momentum_buffer_that_is_there_is_dampened_as_in_torch() -> None:
    """Only the step that makes the buffer takes the gradient undampened, whatever the count says."""
    ours, theirs = parameter(5), parameter(5)
    buffer = torch.linspace(-1, 1, 5)
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
    one, other = wd_kernels.SGDW([ours], **settings, decay="l2"), torch.optim.SGD([theirs], **settings)
    one.state[ours] = {"step": 0, "momentum_buffer": buffer.clone()}
    other.state[theirs] = {"momentum_buffer": buffer.clone()}
    for _ in range(3):
        one.step()
        other.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert torch.allclose(one.state[ours]["momentum_buffer"], other.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_of_a_group_are_refused_and_not_loaded(flag: str) -> None:
    p = parameter(5)
    with pytest.raises(ValueError, match=f"{flag}=True in param group 0"):
        wd_kernels.AdamW([{"params": [p], flag: True}])
    theirs = torch.optim.AdamW([p], foreach=False, **{flag: flag == "differentiable"})
    optimizer = wd_kernels.AdamW([p], weight_decay=0.1)
    saved = theirs.state_dict()
    saved["param_groups"][0][flag] = True
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][flag] is False
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_a_bad_hyperparameter_of_a_later_group_names_that_group() -> None:
    optimizer = wd_kernels.AdamW([parameter(3)], weight_decay=0.1)
    for settings, wrong in (({"lr": -1.0}, "lr"), ({"betas": (0.9, 1.5)}, "betas")):
        with pytest.raises(ValueError, match=rf"{wrong}.* in param group 1: allowed"):
            optimizer.add_param_group({"params": [parameter(4)], **settings})
    with pytest.raises(ValueError, match="in param group 2: allowed"):
        wd_kernels.AdamW([{"params": [parameter(n)]} for n in (3, 4)] + [{"params": [parameter(5)], "eps": -1.0}])
    assert len(optimizer.param_groups) == 1


# DistributedDataParallel ----------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("as_bucket_view", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_data_parallel(as_bucket_view: bool, set_to_none: bool, flat: bool, one_process: None) -> None:
    """Gradients in DDP's buckets lie anywhere; flat parameters and states beside them stay flat."""

    def network() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    model, twin = network(), network()
    if flat:
        wd_kernels.flatten_(model.parameters())
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=as_bucket_view)
    opt = wd_kernels.AdamW(parallel.parameters(), lr=0.02, weight_decay=0.1)
    truth = wd_kernels.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1, backend="reference")
    for step in range(4):
        batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((parallel, opt), (twin, truth)):
            optimizer.zero_grad(set_to_none=set_to_none)
            net(batch).square().sum().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(opt.state[p][name], truth.state[q][name]) for name in truth.state[q])
    whole = flat and not as_bucket_view and not set_to_none
    assert len(opt._table.segments.moving) == (1 if whole else 4)
    assert all((place_of(p) is not None) == flat for p in model.parameters())


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
@BOTH
@pytest.mark.usefixtures("own_garbage")
def test_what_is_dropped_is_freed_at_once(build: Any, flat: bool) -> None:
    """As torch's: no circle of references waits for the garbage collector with a model's memory."""
    gc.collect()
    gc.disable()
    try:
        params = [parameter(4), parameter(3, 2)]
        if flat:
            wd_kernels.flatten_(params)
        optimizer = build(params, weight_decay=0.1)
        for _ in range(3):
            optimizer.step()
        dropped = [
            weakref.ref(optimizer),
            *map(weakref.ref, params),
            *map(weakref.ref, optimizer.state[params[0]].values()),
        ]
        del params, optimizer
        assert [ref() for ref in dropped] == [None] * len(dropped)
    finally:
        gc.enable()


@pytest.mark.usefixtures("own_garbage")
def test_a_parameter_that_refers_to_its_optimizer_is_collected() -> None:
    params = [parameter(4), parameter(3)]
    wd_kernels.flatten_(params)
    optimizer: Any = wd_kernels.AdamW(params, weight_decay=0.1)
    params[0].owner = optimizer
    for _ in range(3):
        optimizer.step()
    assert len(optimizer._table.segments.moving) == 1  # it is stepped as one all the same
    dropped = [weakref.ref(optimizer), *map(weakref.ref, params)]
    del params, optimizer
    gc.collect()
    assert [ref() for ref in dropped] == [None] * 3
