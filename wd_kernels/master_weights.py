"""Master weights in float32, by name, whatever they are stored as.

A remainder of 16 bits leaves an optimizer as a bfloat16 tensor of the same bits: no process group sends int16, and
torch's classes cast what they load to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .flat.buffers import place_of
from .flat.states import FlatStates
from .formats import MASTER_NAME, Storage, arithmetic_dtype, exact_in, full_state_dtype, is_steppable, master_dtypes
from .reference import load, store
from .rules import Rule
from .sharding import check_sharding, local, sharded_like
from .validation import check_storage, check_type, label, without_memory

__all__ = ["Written", "checked", "exported", "get", "imported", "named", "planned", "put"]

#: A parameter's name, or its position where it has none.
Name = str | int


class Written(NamedTuple):
    """A parameter, its group and place in that, and the weight that is to be written; None: itself."""

    p: Tensor
    group: int
    place: int
    value: Tensor | None


def named(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Name, Tensor, int, int]]:
    """(name, parameter, group, index in the group) of all that can be stepped; its position, where it has no name."""
    position = 0
    for g, group in enumerate(groups):
        names = group.get("param_names")
        for k, p in enumerate(group["params"]):
            if not is_lazy(p) and is_steppable(p.dtype):
                yield position if names is None or k >= len(names) else names[k], p, g, k
            position += 1


def get(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> dict[Name, Tensor]:
    """Copies of the master weights of all parameters; a parameter that has none is its own."""
    found: dict[Name, Tensor] = {}
    for name, p, _, _ in named(groups):
        master = state[p].get(MASTER_NAME) if p in state else None
        theta = local(p).detach()
        if not isinstance(master, Tensor) or master.dtype not in master_dtypes(theta.dtype):
            value = theta.to(theta.dtype if theta.is_complex() else arithmetic_dtype(theta.dtype), copy=True)
        else:
            value = load(theta, torch.float32, local(master).detach()).clone()
        found[name] = sharded_like(p, value)
    return found


def chosen(groups: Sequence[Mapping[str, Any]], weights: Mapping[Name, Any] | None) -> list[Written]:
    """What is to be written of all parameters: from `weights`, by name, or as they are.

    Raises KeyError, TypeError or ValueError, naming the parameter.
    """
    own = {name: (p, g, k) for name, p, g, k in named(groups)}
    if weights is None:
        return [Written(p, g, k, None) for p, g, k in own.values()]
    wrong = {"unknown": [n for n in weights if n not in own], "missing": [n for n in own if n not in weights]}
    for what, names in wrong.items():
        if names:
            raise KeyError(
                f"{len(names)} names of master weights are {what}: {names[:3]}; this optimizer has {[*own][:3]}, ..."
            )
    found = []
    for name, (p, g, k) in own.items():
        value = checked(p, weights[name], f"the master weight of {label(groups[g], g, k)}")
        found.append(Written(p, g, k, value))
    return found


def checked(p: Tensor, value: Any, what: str) -> Tensor:
    """`value`, where it can be a weight of `p` in the arithmetic type, exactly.

    Raises TypeError or ValueError, naming `what`.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}: expected a tensor")
    check_type(value, what)
    check_sharding(p, value, what)
    if value.shape != p.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}; allowed is that of the parameter, {tuple(p.shape)}")
    widest = full_state_dtype(p.dtype)
    if not exact_in(value.dtype, widest):
        raise TypeError(f"{what} has dtype {value.dtype}: allowed are {widest} and what is exact in it")
    if without_memory(local(value)) and not without_memory(local(p)):
        raise ValueError(f"{what} has no memory: it is on {value.device}, or fake")
    return value


def planned(
    rule: Rule, groups: Sequence[Mapping[str, Any]], masters: Sequence[Written]
) -> list[tuple[Tensor, Tensor | None, torch.dtype | None]]:
    """(parameter, copy of its weight, dtype of what lies beside it): all that can fail of writing them.

    A frozen parameter is given no master.
    """
    storages = [rule.storage(group, f"param group {g}") for g, group in enumerate(groups)]
    found = []
    for p, g, k, value in masters:
        theta, dtype = local(p).detach(), None
        if p.requires_grad:
            check_storage(theta, storages[g], (), label(groups[g], g, k))
            dtype = storages[g].master_dtype(theta.dtype)
        if value is not None:
            wide = theta.dtype if theta.is_complex() else arithmetic_dtype(theta.dtype)
            value = local(value).detach().to(theta.device, wide, copy=True)
        found.append((p, value, dtype))
    return found


@torch.no_grad()
def put(state: Any, flat: FlatStates, masters: Sequence[tuple[Tensor, Tensor | None, torch.dtype | None]]) -> None:
    """Writes what is planned: the parameter, to nearest even, and what lies beside it."""
    for p, value, dtype in masters:
        theta, part = local(p).detach(), None
        own = state[p] if dtype is not None or p in state else {}
        if dtype is None:
            own.pop(MASTER_NAME, None)
        else:
            master = own.get(MASTER_NAME)
            if not isinstance(master, Tensor) or master.dtype != dtype or master.shape != p.shape:
                place = place_of(theta)
                if place is None:
                    made = torch.zeros_like(theta, dtype=dtype)
                else:
                    made = flat.zeros(place, theta, MASTER_NAME, dtype)
                master = own[MASTER_NAME] = sharded_like(p, made)
            part = local(master)
        if value is None and part is None:
            continue
        if value is not None and value.dtype != torch.float32:
            theta.copy_(value)  # in float64 or complex
        else:
            store(theta, theta.float() if value is None else value, None, part)
    torch.autograd.graph.increment_version([p for p, *_ in masters])


# On their way into a checkpoint and out of one ------------------------------------------------------------------------


def exported(own: Any, p: Tensor) -> Any:
    """A state as it leaves an optimizer."""
    master = own.get(MASTER_NAME) if isinstance(own, Mapping) else None
    if not isinstance(master, Tensor) or master.dtype != torch.int16:
        return own
    return {**own, MASTER_NAME: sharded_like(p, local(master).view(torch.bfloat16))}


def imported(own: Any, group: Mapping[str, Any], what: str) -> Any:
    """A saved state with its master as it was before it left.

    Raises TypeError where it is no master, or another than its group says: who has cast it has lost the numbers.
    """
    master = own.get(MASTER_NAME) if isinstance(own, Mapping) else None
    if not isinstance(master, Tensor):
        return own
    word = group.get("master_weights", "none")
    word = {True: "float32", False: "none"}.get(word, word)
    known = Storage(masters=str(word)).master_dtype(torch.bfloat16)
    if known == torch.int16 and master.dtype == torch.bfloat16:
        return {**own, MASTER_NAME: sharded_like(master, local(master).view(torch.int16))}
    if master.dtype not in (torch.float32, torch.int16, torch.int8) or known not in (None, master.dtype):
        raise TypeError(
            f"the saved state {MASTER_NAME!r} of {what} has dtype {master.dtype}, and its group says "
            f"master_weights={word!r}: it has been cast, or loaded into an optimizer of another kind, and is lost. "
            "Load it into an optimizer that has the master_weights that it was saved with"
        )
    return own
