"""What does not fit between sharded parameters, gradients and states: an error by name, on every rank, before all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from bits import assert_same_bits
from sharded import backward, full, make, mesh_of, shard, train
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import wd_kernels
from wd_kernels import AdamW
from wd_kernels.functional import sgdw_

WEIGHT = r"parameter '0\.weight' \(group 0, index 0\)"


def trained() -> tuple[nn.Module, AdamW]:
    model = make()
    shard(model, "fsdp")
    opt = AdamW(model.named_parameters(), weight_decay=0.1)
    train(model, opt, range(2))
    opt.zero_grad()
    backward(model, 2)
    return model, opt


def placed(t: torch.Tensor, *placements: Any, mesh: Any = None) -> DTensor:
    """The local tensor of `t` as if it lay so."""
    mesh = t.device_mesh if mesh is None else mesh
    return DTensor.from_local(t.to_local(), mesh, placements, run_check=False, shape=t.shape, stride=t.stride())


def partial_gradient(p: Any, opt: AdamW) -> None:
    p.grad = placed(p.grad, Partial())


def gradient_of_another_mesh(p: Any, opt: AdamW) -> None:
    p.grad = placed(p.grad, Shard(0), mesh=mesh_of("other"))


def replicated_state(p: Any, opt: AdamW) -> None:
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].redistribute(placements=[Replicate()])


def local_state(p: Any, opt: AdamW) -> None:
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].to_local().clone()


def whole_state(p: Any, opt: AdamW) -> None:
    opt.state[p]["exp_avg"] = full(opt.state[p]["exp_avg"])


def state_of_another_shard(p: Any, opt: AdamW) -> None:
    own = opt.state[p]["exp_avg"]
    cut = torch.zeros(own.to_local().shape[0] + 1, 6)
    opt.state[p]["exp_avg"] = DTensor.from_local(
        cut, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def sharded_state_of_an_ordinary_one(p: Any, opt: AdamW) -> None:
    own = opt.param_groups[0]["params"]
    q = own[0] = nn.Parameter(torch.ones(7, 6))
    q.grad = torch.ones(7, 6)
    opt.state[q] = opt.state.pop(p)


def nothing(p: Any, opt: AdamW) -> None:
    pass


BAD: list[tuple[Callable[[Any, AdamW], None], str]] = [
    (partial_gradient, rf"the gradient of {WEIGHT} is a DTensor with placements \(Partial\(sum\),\) over DeviceMesh\(.*"
     r"\); allowed is what its parameter is, a DTensor with placements \(Shard\(dim=0\),\) over .*: gradients are not"),
    (gradient_of_another_mesh, rf"the gradient of {WEIGHT} is a DTensor .*'?other.*; allowed .*'?dp"),
    (replicated_state, rf"the state 'exp_avg' of {WEIGHT} is a DTensor with placements \(Replicate\(\),\) .*: "
     r"torch\.distributed\.checkpoint\.state_dict\.set_optimizer_state_dict loads states of any sharding"),
    (local_state, rf"the state 'exp_avg' of {WEIGHT} is an ordinary tensor; allowed is what its parameter is, a DTen"),
    (whole_state, rf"the state 'exp_avg' of {WEIGHT} is an ordinary tensor; allowed is what its parameter is, a DTen"),
    (state_of_another_shard, rf"the state 'exp_avg' of {WEIGHT} has shape .*; allowed is that of the parameter, \("),
    (sharded_state_of_an_ordinary_one, rf"the state 'exp_avg' of {WEIGHT} is a DTensor .*; allowed .* an ordinary ten"),
]  # fmt: skip


def refuses(spoil: Callable[[Any, AdamW], None], message: str) -> None:
    _, opt = trained()
    spoil(opt.param_groups[0]["params"][0], opt)
    params = opt.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    counts = [float(own["step"]) for own in opt.state.values()]
    with pytest.raises(ValueError, match=message):
        opt.step()
    for p, was in zip(params, before, strict=True):
        assert_same_bits(full(p), full(was))
    assert [float(own["step"]) for own in opt.state.values()] == counts


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_what_does_not_fit(spoil: Callable[[Any, AdamW], None], message: str) -> None:
    ranks.run(2, refuses, spoil, message)


def loads_other_shardings() -> None:
    model, opt = trained()
    saved = opt.state_dict()
    key = next(iter(saved["state"]))
    for wrong, message in [
        (
            full(saved["state"][key]["exp_avg"]),
            r"the saved state 'exp_avg' of .* is an ordinary tensor; .*set_optimizer",
        ),
        (
            placed(saved["state"][key]["exp_avg"], Replicate()),
            r"the saved state 'exp_avg' of .* \(Replicate\(\),\) over",
        ),
    ]:
        spoilt = {**saved, "state": {**saved["state"], key: {**saved["state"][key], "exp_avg": wrong}}}
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(spoilt)
    opt.load_state_dict(saved)
    with pytest.raises(TypeError, match=r"parameter '0\.weight' is a DTensor: who shards it, .* keeps the address"):
        wd_kernels.flatten_(model.named_parameters())


def test_loading_and_flattening() -> None:
    ranks.run(2, loads_other_shardings)


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, like: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def constructs() -> None:
    """What can be known is an error in the constructor: what a DTensor wraps, and memory that two share."""
    mesh = mesh_of("dp")
    good = nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0)], run_check=False))
    bad: Any = DTensor(Wrapper(torch.ones(3, 2)), good._spec, requires_grad=False).requires_grad_()
    with pytest.raises(TypeError, match=r"parameter 1 of group 0 is a DTensor of a Wrapper: subclasses of Tensor that"):
        AdamW([good, bad])
    again = nn.Parameter(DTensor.from_local(good.to_local().detach(), mesh, [Shard(0)], run_check=False))
    with pytest.raises(ValueError, match="parameter 0 of group 0 and parameter 1 of group 0 overlap in memory"):
        AdamW([good, again])
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot be used: torch .* is built without CUDA"):
        AdamW([good], backend="cuda")
    elsewhere = nn.Parameter(DTensor.from_local(torch.ones(3, 2, device="meta"), mesh, [Shard(0)], run_check=False))
    good.grad, elsewhere.grad = torch.zeros_like(good), torch.zeros_like(elsewhere)
    with pytest.raises(ValueError, match="parameter 1 of group 0 is on the meta device: it has no memory to step"):
        AdamW([good, elsewhere]).step()


def test_constructor() -> None:
    ranks.run(2, constructs)


def functional() -> None:
    """Lists of DTensors: the same bits as their local tensors, the same errors."""
    mesh = mesh_of("dp")

    def lists(wrapped: bool) -> list[list[Any]]:
        made = []
        for k in range(3):
            generator = torch.Generator().manual_seed(10 * k + dist.get_rank())
            local = torch.randn(3, 2, generator=generator)
            made.append([DTensor.from_local(local, mesh, [Shard(0)], run_check=False) if wrapped else local])
        return made

    ours, plain = lists(True), lists(False)
    for own in (ours, plain):
        for step in (1, 2):
            sgdw_(*own, step=step, lr=0.1, momentum=0.9, weight_decay=0.1)
    for (a,), (b,) in zip(ours, plain, strict=True):
        assert_same_bits(a.to_local(), b)
    ours[1][0] = placed(ours[1][0], Partial())
    with pytest.raises(ValueError, match=r"grads\[0\] is a DTensor .* \(6, 2\)|grads\[0\] .*Partial"):
        sgdw_(*ours, step=3, lr=0.1, momentum=0.9, weight_decay=0.1)


def test_functional() -> None:
    ranks.run(2, functional)


def partial_beside_replicated() -> None:
    """No dimension is cut in either, and still only one has the sum."""
    p = nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh_of("tp"), [Replicate()], run_check=False))
    p.grad = placed(p, Partial())
    opt = AdamW([p], weight_decay=0.1)
    with pytest.raises(ValueError, match=r"gradient of .* \(Partial\(sum\),\) over .* is, .* \(Replicate\(\),\) over"):
        opt.step()
    wd_kernels.redistribute_gradients(opt)
    assert torch.equal(full(p.grad), torch.full((3, 2), float(dist.get_world_size())))
    opt.step()
    assert opt.state[p]["step"] == 1


def test_partial_beside_replicated() -> None:
    ranks.run(2, partial_beside_replicated)
