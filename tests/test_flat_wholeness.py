"""What a flat buffer shows is whole or not given; flat tensors are collected, swapped and zeroed as ordinary ones."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_bits
from semantics import all_params, build, checked_step
from torch import Tensor, nn

import wd_kernels
from wd_kernels import flatten_, unflatten_
from wd_kernels.flat import place_of

walk = semantics.walk


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 2))


def backward(model: nn.Module, scale: float = 1.0) -> None:
    (model(torch.linspace(-1, 1, 12).view(3, 4)) * scale).sum().backward()


def norm_of(model: nn.Module) -> float:
    """Of all gradients, by torch."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def flat_network() -> tuple[nn.Sequential, Any]:
    model = network()
    (buffer,) = flatten_(model.parameters())
    backward(model)
    return model, buffer


# buffer.grad ----------------------------------------------------------------------------------------------------------


def replace(model: nn.Sequential) -> None:
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)


def set_to_none(model: nn.Sequential) -> None:
    model[1].bias.grad = None


def by_torch(model: nn.Sequential) -> None:
    model.zero_grad()
    backward(model)


def exchange(model: nn.Sequential) -> None:
    a, b = model[0].bias, nn.Parameter(torch.ones(40))
    b.grad = torch.ones(40)
    a.grad.data, b.grad.data = b.grad.data, a.grad.data


def drop_a_frozen_one(model: nn.Sequential) -> None:
    """Its stretch still holds what was its gradient."""
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = None


def move_the_parameter(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data.clone()


@pytest.mark.parametrize(
    "change",
    [replace, set_to_none, by_torch, exchange, drop_a_frozen_one, move_the_parameter],
    ids=lambda f: f.__name__,
)
def test_gradients_are_whole_or_not_given(change: Callable[[nn.Sequential], None]) -> None:
    model, buffer = flat_network()
    assert buffer.grad is not None
    assert float(buffer.grad.norm()) == pytest.approx(norm_of(model), rel=1e-6)
    buffer.grad.mul_(0.5)
    assert float(buffer.grad.norm()) == pytest.approx(norm_of(model), rel=1e-6)
    change(model)
    assert buffer.grad is None
    assert "elsewhere" in repr(buffer)
    assert (buffer.data is None) == (change is move_the_parameter)
    if change is not move_the_parameter:
        (again,) = flatten_(model.parameters())
        assert again.grad is not None
        assert float(again.grad.norm()) == pytest.approx(norm_of(model), rel=1e-6)


def test_a_layer_that_is_unfrozen() -> None:
    """Frozen when it was flattened it has no gradient, and zeros; unfrozen it gets one elsewhere."""
    model = network()
    model[0].requires_grad_(False)
    (buffer,) = flatten_(model.parameters())
    backward(model)
    assert buffer.grad is not None
    assert float(buffer.grad.norm()) == pytest.approx(norm_of(model), rel=1e-6)
    model[0].requires_grad_(True)
    assert buffer.grad is None
    backward(model)
    assert buffer.grad is None
    (again,) = flatten_(model.parameters())
    assert float(again.grad.norm()) == pytest.approx(norm_of(model), rel=1e-6)


def test_a_part_of_the_parameters_does_not_speak_for_all() -> None:
    model, buffer = flat_network()
    (part,) = flatten_(model[0].parameters())
    assert buffer.grad is not None
    assert part.grad is None
    assert part.data is buffer.data


# zero_grad ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
@pytest.mark.parametrize("whole", [True, False])
def test_what_was_frozen_since_is_dropped(rule: str, whole: bool, walk: str) -> None:
    """Else it would go on by its momentum, with a kept gradient of zeros. The others' stay where they are."""
    model, buffer = flat_network()
    opt = build(rule, list(model.parameters()))
    checked_step(opt)
    model[0].requires_grad_(False)
    if not whole:
        model[1].bias.grad = torch.ones(2)
    opt.zero_grad(set_to_none=False)
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    assert all(not p.grad.any() for p in model[1].parameters() if p.grad is not None)
    before = [p.detach().clone() for p in model[0].parameters()]
    backward(model)
    checked_step(opt)
    for p, old in zip(model[0].parameters(), before, strict=True):
        assert_same_bits(p, old)
    if whole:
        assert buffer.grad is not None  # zeros where frozen
        assert float(buffer.grad.norm()) == pytest.approx(norm_of(model), rel=1e-6)


# The garbage collector ------------------------------------------------------------------------------------------------

# Not among them: a post-accumulate hook, of which torch itself keeps a circle alive.
WAYS: dict[str, Callable[[Any, nn.Module, Tensor], object]] = {
    "hook": lambda opt, model, p: p.register_hook(lambda grad: (opt, grad)[1]),
    "attribute": lambda opt, model, p: setattr(p, "optimizer", opt),
    "bound method": lambda opt, model, p: setattr(p, "step", opt.step),
    "attribute of a state": lambda opt, model, p: setattr(
        next(v for k, v in opt.state[p].items() if k != "step"), "o", opt
    ),
    "attribute of a count": lambda opt, model, p: setattr(opt.state[p]["step"], "optimizer", opt),
    "hook of a module": lambda opt, model, p: model.register_forward_hook(lambda *_: opt and None),
    "hook of the step": lambda opt, model, p: opt.register_step_post_hook(lambda *_: model and None),
    "LR scheduler": lambda opt, model, p: setattr(p, "s", torch.optim.lr_scheduler.StepLR(opt, 1)),
    "schedule": lambda opt, model, p: opt.param_groups[0].update(schedule=lambda t: float(opt is not None)),
    "buffer": lambda opt, model, p: setattr(p, "buffers", (opt, flatten_(model.parameters()))),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "plain"])
@pytest.mark.usefixtures("own_garbage")
def test_circles_are_collected(way: str, flat: bool, walk: str) -> None:
    """Whatever of a parameter leads back to its optimizer, and whenever it comes: before the last step or after it."""
    for late in (True, False):
        model = network()
        if flat:
            flatten_(model.parameters())
        opt = build("adamw", list(model.parameters()))
        for t in range(3):
            opt.zero_grad(set_to_none=False)
            backward(model)
            opt.step()
            if t == 1 + late:
                WAYS[way](opt, model, model[0].weight)
        refs = [weakref.ref(thing) for thing in (opt, model, model[0].weight, *opt.state[model[0].weight].values())]
        del opt, model
        gc.collect()
        gc.collect()
        assert [ref() is None for ref in refs] == [True] * len(refs)


# Swapping -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def swapping() -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("unflatten", [False, True])
def test_swapped_parameters(unflatten: bool, swapping: Any, walk: str) -> None:
    """model.double(), load_state_dict(assign=True) and swap_tensors do with flat parameters as with others."""
    model, buffer = flat_network()
    opt = build("adamw", list(model.parameters()))
    checked_step(opt)
    if unflatten:
        unflatten_(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    ids = [id(p) for p in model.parameters()]
    model.double()
    assert buffer.data is None
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.dtype == torch.float64
        assert torch.equal(p.float(), old)
    model.float()
    other = network()
    model.load_state_dict({name: 2 * value for name, value in other.state_dict().items()}, assign=True)
    assert ids == [id(p) for p in model.parameters()]
    fresh = nn.Parameter(torch.full((40, 4), 3.0))
    torch.utils.swap_tensors(model[0].weight, fresh)
    assert bool((model[0].weight == 3).all())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    checked_step(opt)
    (again,) = flatten_(model.parameters())
    assert again.grad is not None
    checked_step(opt)


def test_what_lies_at_a_place_is_there(walk: str) -> None:
    """A place belongs to an address: whose memory is exchanged is stepped where it lies."""
    params = [nn.Parameter(torch.randn(32)) for _ in range(3)]
    flatten_(params)
    opt = build("adamw", params)
    for p in params:
        p.grad.copy_(torch.randn(32))
    checked_step(opt)
    a, b = params[:2]
    torch.utils.swap_tensors(a, b)
    assert place_of(a) is not None
    assert place_of(a).offset == 32
    for p in params:
        p.grad = torch.randn(32)
    checked_step(opt)
    unflatten_(all_params(opt))
    assert not any(map(place_of, params))


def test_storages_of_flat_tensors_are_not_resized() -> None:
    """As offloading does it: an error of torch's, until they are unflattened."""
    model, _ = flat_network()
    with pytest.raises(RuntimeError, match="resiz"):
        model[0].weight.untyped_storage().resize_(0)
    unflatten_(model.parameters())
    model[0].weight.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"params is a Sequential: give its \.parameters\(\)"):
        wd_kernels.flatten_(model)
