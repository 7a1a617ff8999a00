"""Averages of weights by name, and in the place of the weights (`ema_decay`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import native
from .averages import Mean, decay_of
from .averages import checked as average_of
from .flat.buffers import place_of
from .flat.states import FlatStates
from .formats import SCALE, TILE, arithmetic_dtype, full_state_dtype, has_scales
from .master_weights import checked
from .reference import load, store
from .rules import AVERAGE, EMA, Rule
from .scales import like_scale, scale_of
from .sharding import is_sharded, local, sharded_like
from .state_dict import unwrapped
from .validation import label, step_count

__all__ = ["Swapped", "by_name", "chosen", "put"]


class Averaged(NamedTuple):
    """A parameter that is averaged, and what errors call it."""

    p: Tensor
    group: int
    what: str


def averaged(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> Iterator[Averaged]:
    """All parameters of groups with an `ema_decay` that are trained, or have been."""
    for g, group in enumerate(groups):
        if group.get(AVERAGE) is not None:
            for k, p in enumerate(group["params"]):
                if p.requires_grad or EMA.name in state.get(p, ()):
                    yield Averaged(p, g, label(group, g, k))


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


def _write(memory: Tensor, value: Tensor, scale: Tensor | None = None) -> None:
    store(memory, torch.view_as_real(value) if value.is_complex() else value, None, scale)


def _require(own: Sequence[Averaged]) -> None:
    if not own:
        raise RuntimeError("no group of this optimizer has an ema_decay, so that there are no averages")


def _forget_copies(model: nn.Module | None) -> None:
    """What else may hold a parameter as it was: autocast's casts, and what `fully_shard` has gathered."""
    torch.clear_autocast_cache()
    for module in model.modules() if model is not None else ():
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None and hasattr(module, "unshard"):
            reshard()


class Swapped:
    """Parameters that hold their averages, and what they held before."""

    @torch.no_grad()
    def __init__(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], model: nn.Module | None) -> None:
        own, self.model = list(averaged(groups, state)), model
        _require(own)
        sharded = [what for p, _, what in own if is_sharded(p)]
        if sharded and model is None:
            raise TypeError(
                f"{sharded[0]} is a DTensor, of which fully_shard may hold a gathered copy: expected its model, "
                "swap_ema(model)"
            )
        _forget_copies(model)
        values = [(p, value) for p, *_ in own if (value := _average(p, state)) is not None]
        self.kept = [(p, local(p).detach().clone()) for p, _ in values]
        try:
            for p, value in values:
                _write(local(p), value)
        except BaseException:  # a signal's handler
            native.insist([self.back])
            raise

    @torch.no_grad()
    def back(self) -> None:
        """Writes what they held."""
        _forget_copies(self.model)
        for p, weight in self.kept:
            local(p).detach().copy_(weight)


def by_name(model: nn.Module, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """`model.state_dict()` with averages in the place of parameters that have one."""
    each = list(averaged(groups, state))
    _require(each)
    own = {id(p): p for p, *_ in each}
    found, known = model.state_dict(keep_vars=True), False
    for name, t in found.items():
        known = known or id(t) in own
        value = _average(own[id(t)], state) if id(t) in own else None
        found[name] = sharded_like(t, value) if value is not None else t.detach() if isinstance(t, Tensor) else t
    if not known:
        raise ValueError(
            "none of the tensors in the model's state_dict() is a parameter that this optimizer averages. Where that "
            "gathers them (FullyShardedDataParallel), `with opt.swap_ema(): model.state_dict()`"
        )
    return found


def chosen(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], averages: Mapping[str, Any]
) -> list[tuple[Averaged, Tensor]]:
    """(parameter, average) of all that are to be written. Raises KeyError, TypeError or ValueError, naming one."""
    if not isinstance(averages, Mapping):
        raise TypeError(f"the averages are a {type(averages).__name__}: expected a dict of tensors by name")
    count = averages.get("n_averaged")  # of torch's AveragedModel
    given = {unwrapped(str(name)): t for name, t in averages.items() if name != "n_averaged"}
    own = {id(of.p): of for of in averaged(groups, state)}
    _require(list(own.values()))
    names = {unwrapped(name): own.get(id(t)) for name, t in model.state_dict(keep_vars=True).items()}
    names_of: dict[int, list[str]] = {}  # a parameter that is shared has several
    for name, of in names.items():
        if of is not None:
            names_of.setdefault(id(of.p), []).append(name)
    unknown = [name for name in given if name not in names]
    missing = [each[0] for each in names_of.values() if not given.keys() & set(each)]
    for what, which in (("unknown", unknown), ("missing", missing)):
        if which:
            raise KeyError(f"{len(which)} names of averages are {what}: {which[:3]}; the model has {[*names][:3]}, ...")
    found = []
    for key, each in names_of.items():
        of, (first, *others) = own[key], [name for name in each if name in given]
        value = _copied(of.p, given[first], f"the average of {of.what}, {first!r},")
        for name in others:
            if not torch.equal(_copied(of.p, given[name], f"the average of {of.what}, {name!r},"), value):
                raise ValueError(f"{first!r} and {name!r} are one parameter of the model, and their averages differ")
        _check_kept(of, groups[of.group], state, None if count is None else int(count))
        found.append((of, value))
    return found


def _check_kept(of: Averaged, group: Mapping[str, Any], state: Mapping[Any, Any], count: int | None) -> None:
    """Raises ValueError where the next step would keep nothing of an average, or take a mean for another one."""
    steps = int(step_count(state.get(of.p, {}).get("step", 0), f"the step count of {of.what}"))
    average = average_of(group[AVERAGE], f"param group {of.group}")
    if isinstance(average, Mean) and count is not None and steps - average.after != count:
        raise ValueError(
            f"the averages are means of {count} weights, and by ema_decay={average!r} of param group {of.group}, after "
            f"{steps} steps, it would be {max(steps - average.after, 0)}: allowed is averages.Mean(after="
            f"{steps - count})"
        )
    if decay_of(average, steps + 1) == 0.0:
        raise ValueError(
            f"by ema_decay={group[AVERAGE]!r} of param group {of.group} the average of {of.what} begins with step "
            f"{steps + 1}, which would keep nothing of what is loaded: allowed is one that has begun, a number or "
            "after=-1, say"
        )


def _copied(p: Tensor, value: Any, what: str) -> Tensor:
    """What is to be written, as a local tensor of its own."""
    return local(checked(p, value, what)).detach().to(local(p).device, full_state_dtype(p.dtype), copy=True)


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
        _write(local(ema), value, local(own[EMA.scale.name]) if has_scales(dtype) else None)


def _zeros(theta: Tensor, like: Tensor, name: str, dtype: torch.dtype, per: int, flat: FlatStates) -> Tensor:
    """Of the shape of `like`, beside a parameter in a flat buffer, where that is flat."""
    place = place_of(theta)
    if place is not None:
        return flat.zeros(place, like, name, dtype, per)
    return torch.zeros_like(like, dtype=dtype, device=theta.device, memory_format=torch.preserve_format)
