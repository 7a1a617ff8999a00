"""Averages of weights by name, and in the place of the weights (`ema_decay`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import native
from .flat.buffers import place_of
from .flat.states import FlatStates
from .formats import SCALE, TILE, arithmetic_dtype, exact_in, has_scales
from .reference import load, store
from .rules import AVERAGE, EMA, Rule
from .scales import like_scale, scale_of
from .sharding import check_sharding, local, sharded_like
from .validation import check_type, label, without_memory

__all__ = ["Swapped", "by_name", "chosen", "put"]


class Averaged(NamedTuple):
    """A parameter that is averaged, and what errors call it."""

    p: Tensor
    group: int
    what: str


def averaged(groups: Sequence[Mapping[str, Any]]) -> Iterator[Averaged]:
    """All parameters of groups with an `ema_decay`."""
    for g, group in enumerate(groups):
        if group.get(AVERAGE) is not None:
            yield from (Averaged(p, g, label(group, g, k)) for k, p in enumerate(group["params"]) if p.requires_grad)


def _average(p: Tensor, state: Mapping[Any, Any]) -> Tensor | None:
    """That of a parameter, as its local tensor in the arithmetic type; None: it has taken no step yet."""
    own = state.get(p)
    ema = own.get(EMA.name) if isinstance(own, Mapping) else None
    if not isinstance(ema, Tensor) or own is None:
        return None
    here = local(ema).detach()
    if has_scales(here.dtype):
        return load(here, torch.float32, local(own[EMA.scale.name]).detach())
    return here if here.is_complex() else here.to(arithmetic_dtype(p.dtype))


def _require(own: Sequence[Averaged]) -> None:
    if not own:
        raise RuntimeError("no group of this optimizer has an ema_decay, so that there are no averages")


class Swapped:
    """Parameters that hold their averages, and what they held before."""

    @torch.no_grad()
    def __init__(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
        own = list(averaged(groups))
        _require(own)
        values = [(p, value) for p, *_ in own if (value := _average(p, state)) is not None]
        self.kept = [(p, local(p).detach().clone()) for p, _ in values]
        try:
            for p, value in values:
                store(local(p), value)
        except BaseException:  # a signal's handler
            native.insist([self.back])
            raise

    @torch.no_grad()
    def back(self) -> None:
        """Writes what they held."""
        for p, weight in self.kept:
            local(p).detach().copy_(weight)


def by_name(model: nn.Module, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """`model.state_dict()` with averages in the place of parameters that have one."""
    own = {id(p): p for p, *_ in averaged(groups)}
    found, known = {}, False
    for name, t in model.state_dict(keep_vars=True).items():
        known = known or id(t) in own
        value = _average(own[id(t)], state) if id(t) in own else None
        found[name] = sharded_like(t, value) if value is not None else t.detach() if isinstance(t, Tensor) else t
    if not known:
        raise ValueError("none of the model's parameters is averaged by this optimizer")
    return found


def chosen(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], averages: Mapping[str, Any]
) -> list[tuple[Averaged, Tensor]]:
    """(parameter, average) of all that are to be written. Raises KeyError, TypeError or ValueError, naming one."""
    if not isinstance(averages, Mapping):
        raise TypeError(f"the averages are a {type(averages).__name__}: expected a dict of tensors by name")
    if "n_averaged" in averages:  # of torch's AveragedModel, whose model is its `module`
        averages = {str(n).removeprefix("module."): t for n, t in averages.items() if n != "n_averaged"}
    own = {id(of.p): of for of in averaged(groups)}
    _require(list(own.values()))
    names = {name: own.get(id(t)) for name, t in model.state_dict(keep_vars=True).items()}
    unknown = [name for name in averages if name not in names]
    missing = [name for name, of in names.items() if of is not None and name not in averages]
    for what, which in (("unknown", unknown), ("missing", missing)):
        if which:
            raise KeyError(f"{len(which)} names of averages are {what}: {which[:3]}; the model has {[*names][:3]}, ...")
    found = {}
    for name, of in names.items():
        if of is not None:
            found[id(of.p)] = of, _checked(averages[name], of.p, f"the average of {of.what}, {name!r},")
    return list(found.values())


def _checked(value: Any, p: Tensor, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}: expected a tensor")
    check_type(value, what)
    check_sharding(p, value, what)
    if value.shape != p.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}: allowed is that of the parameter, {tuple(p.shape)}")
    widest = p.dtype if p.dtype.is_complex else arithmetic_dtype(p.dtype)
    if not exact_in(value.dtype, widest):
        raise TypeError(f"{what} has dtype {value.dtype}: allowed are {widest} and what is exact in it")
    if without_memory(local(value)) and not without_memory(local(p)):
        raise ValueError(f"{what} has no memory: it is on {value.device}, or fake")
    return local(value).detach().to(local(p).device, widest, copy=True)


@torch.no_grad()
def put(
    rule: Rule, groups: Sequence[Mapping[str, Any]], state: Any, flat: FlatStates,
    averages: Sequence[tuple[Averaged, Tensor]],
) -> None:  # fmt: skip
    """Writes averages, of parameters that have taken no step yet too; what is stored in fewer bits is rounded."""
    for (p, g, _), value in averages:
        theta, own = local(p).detach(), state[p]
        dtype = rule.storage(groups[g], f"param group {g}").state_dtype(EMA, p.dtype)
        ema = own.get(EMA.name)
        if not isinstance(ema, Tensor) or ema.dtype != dtype:
            ema = own[EMA.name] = sharded_like(p, _zeros(theta, theta, EMA.name, dtype, 1, flat))
            if has_scales(dtype):
                scale = _zeros(theta, like_scale(p, theta), EMA.scale.name, SCALE.dtype, TILE, flat)
                own[EMA.scale.name] = scale_of(p, scale)
        store(local(ema), value, None, local(own[EMA.scale.name]) if has_scales(dtype) else None)


def _zeros(theta: Tensor, like: Tensor, name: str, dtype: torch.dtype, per: int, flat: FlatStates) -> Tensor:
    """Of the shape of `like`, beside a parameter in a flat buffer, where that is flat."""
    place = place_of(theta)
    if place is not None:
        return flat.zeros(place, like, name, dtype, per)
    return torch.zeros_like(like, dtype=dtype, device=theta.device, memory_format=torch.preserve_format)
