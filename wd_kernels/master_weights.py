"""Master weights in float32, by name, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .flat.buffers import place_of
from .flat.states import FlatStates
from .formats import MASTER_NAME, arithmetic_dtype, exact_in, is_steppable
from .reference import load, store
from .rules import Rule
from .sharding import check_sharding, local, sharded_like
from .validation import check_storage, check_type, label

__all__ = ["get", "named", "put"]

#: A parameter's name, or its position where it has none.
Name = str | int


def named(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Name, Tensor, int, int]]:
    """(name, parameter, group, index in the group) of all that can be stepped; its position, where it has no name."""
    position = 0
    for g, group in enumerate(groups):
        names = group.get("param_names")
        for k, p in enumerate(group["params"]):
            if is_steppable(p.dtype):
                yield position if names is None else names[k], p, g, k
            position += 1


def get(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> dict[Name, Tensor]:
    """Copies of the master weights of all parameters; a parameter that has none is its own."""
    found: dict[Name, Tensor] = {}
    for name, p, _, _ in named(groups):
        master = state[p].get(MASTER_NAME) if p in state else None
        theta = local(p).detach()
        if master is None:
            value = theta.to(theta.dtype if theta.is_complex() else arithmetic_dtype(theta.dtype), copy=True)
        else:
            value = load(theta, torch.float32, local(master).detach()).clone()
        found[name] = sharded_like(p, value)
    return found


def chosen(
    groups: Sequence[Mapping[str, Any]], weights: Mapping[Name, Any] | None
) -> list[tuple[Tensor, int, int, Tensor]]:
    """(parameter, group, index, its master weight): of all, from `weights`, or as parameters are.

    Raises KeyError, TypeError or ValueError, naming the parameter.
    """
    own = {name: (p, g, k) for name, p, g, k in named(groups)}
    if weights is None:
        return [(p, g, k, p) for p, g, k in own.values()]
    for what, names in (
        ("unknown", [n for n in weights if n not in own]),
        ("missing", [n for n in own if n not in weights]),
    ):
        if names:
            raise KeyError(
                f"{len(names)} names of master weights are {what}: {names[:3]}; this optimizer has {[*own][:3]}, ..."
            )
    found = []
    for name, (p, g, k) in own.items():
        value, what = weights[name], f"the master weight of {label(groups[g], g, k)}"
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} is a {type(value).__name__}: expected a tensor")
        check_type(value, what)
        check_sharding(p, value, what)
        if value.shape != p.shape:
            raise ValueError(
                f"{what} has shape {tuple(value.shape)}; allowed is that of the parameter, {tuple(p.shape)}"
            )
        widest = p.dtype if p.dtype.is_complex else arithmetic_dtype(p.dtype)
        if not exact_in(value.dtype, widest):
            raise TypeError(f"{what} has dtype {value.dtype}: allowed are {widest} and what is exact in it")
        found.append((p, g, k, value))
    return found


@torch.no_grad()
def put(
    rule: Rule, groups: Sequence[Mapping[str, Any]], state: Any, flat: FlatStates,
    masters: Iterable[tuple[Tensor, int, int, Tensor]],
) -> None:  # fmt: skip
    """Writes master weights: the parameter, to nearest even, and what lies beside it. Checks before it writes."""
    masters = list(masters)
    storages = [rule.storage(group, f"param group {g}") for g, group in enumerate(groups)]
    for p, g, k, _ in masters:
        check_storage(local(p), storages[g], (), label(groups[g], g, k))
    for p, g, _, value in masters:
        theta = local(p).detach()
        here = local(value).detach().to(theta.device)
        dtype = storages[g].master_dtype(theta.dtype)
        part = None
        if dtype is not None:
            own = state[p]
            if not isinstance(master := own.get(MASTER_NAME), Tensor) or master.dtype != dtype:
                place = place_of(theta)
                made = (
                    torch.zeros_like(theta, dtype=dtype)
                    if place is None
                    else flat.zeros(place, theta, MASTER_NAME, dtype)
                )
                master = own[MASTER_NAME] = sharded_like(p, made)
            part = local(master)
        if p is value and part is None:
            continue
        if theta.is_complex() or arithmetic_dtype(theta.dtype) == torch.float64:
            theta.copy_(here)
        else:
            store(theta, here.float(), None, part)
    torch.autograd.graph.increment_version([p for p, *_ in masters])
