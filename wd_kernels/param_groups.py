"""Parameter groups: weights decay, norms and biases do not."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from .rules import at_least_zero

__all__ = ["decay_groups"]

_NORMS: tuple[type[nn.Module], ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def decay_groups(model: nn.Module, weight_decay: float = 1e-2, *, exclude: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Two param groups with names: what decays, and what does not.

    Without decay are parameters of torch's normalisation layers, those with "bias" or "biases" among the words of their
    name (``bias_hh``, ``relative_position_bias_table``), those with fewer than two dimensions (most other scales and
    shifts), the lengths of weight normalisation, and those that `exclude` names. Everything else decays, embeddings
    too. What ``torch.nn.utils.parametrize`` has parametrised, and the members of a ``ParameterList`` or
    ``ParameterDict``, are judged by the name and the module of the parameter that they stand for. Shared parameters are
    taken once; frozen ones have their place. Call it before parameters are flattened or sharded into vectors.

    Args:
        model: whose parameters.
        weight_decay: of the first group, at least 0.
        exclude: names of parameters, or patterns such as ``"*.pos_embed"``, that do not decay either.

    Returns:
        ``[{"params": [(name, parameter), ...], "weight_decay": weight_decay}, {..., "weight_decay": 0.0}]``, in the
        order of ``model.named_parameters()``. A group may be empty; it has names all the same ("param_names").

    Raises:
        TypeError: `model` is no module, `exclude` no list of names.
        ValueError: a pattern matches no parameter; a lazy parameter, whose shape is not known yet; a bad weight_decay.

    Example:
        >>> import wd_kernels
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        >>> [[name for name, _ in group["params"]] for group in decay_groups(model)]
        [['0.weight'], ['0.bias', '1.weight', '1.bias']]
        >>> optimizer = wd_kernels.AdamW(decay_groups(model, 0.1), lr=1e-3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} in decay_groups: expected a torch.nn.Module")
    patterns = (exclude,) if isinstance(exclude, str) or exclude is None else tuple(exclude)
    if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"exclude={exclude!r} in decay_groups: expected a list of patterns, such as ['*.pos_embed']")
    at_least_zero("weight_decay", weight_decay, "decay_groups")
    every = list(model.named_parameters(remove_duplicate=False))  # shared ones by each of their names
    matching = {
        pattern: {id(p) for name, p in every if name == pattern or fnmatchcase(name, pattern)} for pattern in patterns
    }
    unused = sorted(pattern for pattern, found in matching.items() if not found)
    if unused:
        known = ", ".join(name for name, _ in every[:5]) or "none"
        raise ValueError(f"exclude={unused} in decay_groups matches no parameter of the model; it has {known}, ...")
    excluded = set[int]().union(*matching.values())
    decaying: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"parameter {name!r} in decay_groups is lazy: run the model once, so that it has a shape")
        plain = p.dim() < 2 or id(p) in excluded or _is_plain(model, name)
        (others if plain else decaying).append((name, p))
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0},
    ]  # fmt: skip
    for group in groups:
        if not group["params"]:
            group["param_names"] = []  # torch wants names of all groups or of none
    return groups


def _is_plain(model: nn.Module, name: str) -> bool:
    """Is it a bias, of a normalisation layer, or a length of weight normalisation, by what it stands for?"""
    *path, word = name.split(".")
    owner = model.get_submodule(".".join(path))
    if path[-2:-1] == ["parametrizations"]:  # <module>.parametrizations.<name>.original, or original0, original1, ...
        first = owner[0] if isinstance(owner, ParametrizationList) else None
        if word == "original0" and isinstance(first, _WeightNorm):
            return True
        if word.startswith("original"):
            *path, _, word = path
            owner = model.get_submodule(".".join(path))
    elif word.endswith("_g") and any(isinstance(hook, WeightNorm) for hook in owner._forward_pre_hooks.values()):
        return True
    words = word.split("_")
    while path and isinstance(owner, (nn.ParameterList, nn.ParameterDict)):
        *path, word = path
        words += word.split("_")
        owner = model.get_submodule(".".join(path))
    return isinstance(owner, _NORMS) or "bias" in words or "biases" in words
