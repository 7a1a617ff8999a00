"""decay_groups: what decays and what does not, by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import wd_kernels
from wd_kernels import decay_groups


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


class OwnNorm(nn.Module):
    """A normalisation that torch does not know, as models bring their own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = OwnNorm()
        self.relative_bias = nn.Parameter(torch.zeros(3, 3))
        self.temperature = nn.Parameter(torch.ones(()))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3, 3))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.ones(2, 2)])
        self.biases = nn.ParameterList([torch.ones(2, 2)])
        self.deep = nn.ParameterDict({"bias_k": torch.ones(2, 2)})


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def doubled(module: nn.Module, name: str) -> nn.Module:
    nn.utils.parametrize.register_parametrization(module, name, Twice())
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    ("model", "decaying", "others"),
    [
        (nn.Linear(3, 2), ["weight"], ["bias"]),
        (nn.Conv2d(1, 2, 3, bias=False), ["weight"], []),
        (nn.Embedding(5, 3), ["weight"], []),
        (nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2)), ["0.weight"], ["0.bias", "1.weight", "1.bias"]),
        (nn.LayerNorm((3, 4, 5)), [], ["weight", "bias"]),  # three dimensions, and yet no weight
        (nn.RMSNorm((3, 4)), [], ["weight"]),
        (nn.GroupNorm(2, 4), [], ["weight", "bias"]),
        (nn.InstanceNorm2d(3, affine=True), [], ["weight", "bias"]),
        (nn.BatchNorm1d(3, affine=False), [], []),
        (nn.GRUCell(3, 2), ["weight_ih", "weight_hh"], ["bias_ih", "bias_hh"]),
        (nn.Bilinear(2, 3, 4), ["weight"], ["bias"]),
        (nn.Linear(4, 1), ["weight"], ["bias"]),
        (nn.ParameterDict({"debias": torch.ones(2, 2), "bias_table": torch.ones(2, 2)}), ["debias"], ["bias_table"]),
        (nn.ParameterDict({"bias_k": torch.ones(1, 1, 2), "a_bias": torch.ones(2, 2)}), [], ["a_bias", "bias_k"]),
        # What is parametrised, or kept in a list, is judged as what it stands for.
        (doubled(nn.LayerNorm((3, 4)), "weight"), [], ["bias", "parametrizations.weight.original"]),
        (doubled(nn.Linear(3, 2), "weight"), ["parametrizations.weight.original"], ["bias"]),
        (
            doubled(Attention().get_submodule("attention"), "in_proj_weight"),
            ["out_proj.weight", "parametrizations.in_proj_weight.original"],
            ["in_proj_bias", "out_proj.bias"],
        ),
        (
            doubled(Table(), "relative_position_bias_table"),
            [],
            ["parametrizations.relative_position_bias_table.original"],
        ),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)),
            ["parametrizations.weight.original1"],
            ["bias", "parametrizations.weight.original0"],
        ),
        (nn.utils.weight_norm(nn.Linear(3, 2)), ["weight_v"], ["bias", "weight_g"]),
        (nn.utils.parametrizations.orthogonal(nn.Linear(3, 2)), ["parametrizations.weight.original"], ["bias"]),
        (nn.ModuleDict({"a": Lists()}), ["a.weights.0"], ["a.biases.0", "a.deep.bias_k"]),
        (
            Attention(),
            ["pos_embed", "attention.in_proj_weight", "attention.out_proj.weight"],
            ["relative_bias", "temperature", "attention.in_proj_bias", "attention.out_proj.bias", "norm.scale"],
        ),
    ],
)
def test_what_decays(model: nn.Module, decaying: list[str], others: list[str]) -> None:
    groups = decay_groups(model, 0.3)
    assert names(groups) == [decaying, others]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_every_parameter_has_one_place() -> None:
    """Tied weights once, frozen ones too, in the model's order; patterns take more out."""
    model = nn.Sequential(nn.Embedding(6, 4), Attention(), nn.Linear(4, 6))
    model[2].weight = model[0].weight
    model[1].pos_embed.requires_grad_(False)
    both = names(decay_groups(model))
    own = [name for name, _ in model.named_parameters()]
    assert sorted(both[0] + both[1]) == sorted(own)
    assert both[0] == [name for name in own if name in both[0]]
    less = names(decay_groups(model, exclude=["*.pos_embed", "0.*"]))
    assert set(both[0]) - set(less[0]) == {"1.pos_embed", "0.weight"}
    assert names(decay_groups(model, exclude=iter(["2.weight", "1.pos*"]))) == less  # by another name of a tied weight
    odd = nn.ParameterDict({"a[0]": torch.ones(2, 2)})
    assert names(decay_groups(odd, exclude=["a[0]"])) == [[], ["a[0]"]]


@pytest.mark.parametrize("cls", [wd_kernels.AdamW, wd_kernels.SGDW, torch.optim.AdamW])
@pytest.mark.parametrize("model", [nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False), nn.Linear(3, 2)])
def test_one_of_the_groups_may_be_empty(cls: Any, model: nn.Module) -> None:
    """Torch wants names of all groups or of none: an empty one has them too."""
    opt = cls(decay_groups(model, 0.5), lr=0.1)
    assert [len(group["params"]) == len(group["param_names"]) for group in opt.param_groups] == [True, True]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    hand_made = [{"params": []}, {"params": list(model.named_parameters())}, {"params": ()}]
    if cls is not torch.optim.AdamW:
        opt = cls(hand_made, lr=0.1)
        opt.step()
        assert [len(group["param_names"]) for group in opt.param_groups] == [0, len(list(model.parameters())), 0]


def test_quantised_weights_beside_what_is_trained() -> None:
    """A frozen uint8 weight has its place, in the model's order; flat, it stays as it is."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    packed = nn.Parameter(torch.arange(12, dtype=torch.uint8).view(4, 3), requires_grad=False)
    model[0].weight = packed
    wd_kernels.flatten_(model.parameters())
    opt = wd_kernels.AdamW(decay_groups(model, 0.5), lr=0.1)
    for _ in range(2):
        model[1](torch.ones(1, 4)).sum().backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
    opt.load_state_dict(opt.state_dict())
    assert model[0].weight is packed
    assert packed.flatten().tolist() == list(range(12))
    assert packed not in opt.state
    assert len(opt.state) == 2 + 1  # and the first bias, whose flat gradient is kept


@pytest.mark.parametrize("rule", ["AdamW", "SGDW"])
def test_through_an_optimizer(rule: str) -> None:
    """Names reach its errors; biases keep their value where no gradient comes, weights shrink."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    opt = getattr(wd_kernels, rule)(decay_groups(model, 0.5), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    for name, p in model.named_parameters():
        expected = before[name] * 0.95**3 if name == "0.weight" else before[name]
        assert torch.allclose(p, expected, rtol=1e-6), name
    model[1].bias.grad = torch.zeros(4).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter '1.bias'"):
        opt.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([nn.Linear(2, 2)],), TypeError, "model=list in decay_groups: expected a torch.nn.Module"),
        ((nn.Linear(2, 2), -0.1), ValueError, "weight_decay=-0.1 in decay_groups"),
        ((nn.LazyLinear(2),), ValueError, "parameter 'weight' in decay_groups is lazy"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        decay_groups(*arguments)


def test_bad_patterns() -> None:
    model = nn.Linear(2, 2)
    message = "exclude=['*.pos'] in decay_groups matches no parameter of the model; it has weight"
    with pytest.raises(ValueError, match=re.escape(message)):
        decay_groups(model, exclude=["weight", "*.pos"])
    for exclude in ("weight", None, [0]):
        with pytest.raises(
            TypeError, match=re.escape(f"exclude={exclude!r} in decay_groups: expected a list of patterns")
        ):
            decay_groups(model, exclude=exclude)
    with pytest.raises(ValueError, match="it has none"):
        decay_groups(nn.Tanh(), exclude=["x"])
