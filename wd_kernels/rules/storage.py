"""How a group stores its tensors, checked: "state_dtype", "ema_dtype", "stochastic_rounding", "master_weights"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

from ..formats import Storage
from .scalars import scalar

__all__ = ["STORAGE", "MasterWeights", "StateDtype", "StochasticRounding", "check_storage", "state_dtype_word"]

#: One for all states, or by name; "param" is the parameter's own.
StateDtype: TypeAlias = torch.dtype | str | Mapping[str, torch.dtype | str]
StochasticRounding: TypeAlias = bool | Literal["none", "params", "states", "both"]
MasterWeights: TypeAlias = bool | Literal["none", "float32", "split32", "split24"]

#: The keys of a group that say it, and what a group without them means.
STORAGE: dict[str, Any] = {
    "state_dtype": "float32", "stochastic_rounding": "states", "master_weights": "none", "seed": 0,
    "ema_dtype": "float32",
}  # fmt: skip
_WORDS = {word: word for word in ("float32", "bfloat16", "int8", "param")} | {"uint8": "int8"}
_STOCHASTIC: dict[Any, tuple[bool, bool]] = {
    "none": (False, False), "params": (True, False), "states": (False, True), "both": (True, True),
}  # fmt: skip
_STOCHASTIC |= {False: _STOCHASTIC["none"], True: _STOCHASTIC["both"]}
_MASTERS: dict[Any, str] = {word: word for word in ("none", "float32", "split32", "split24")}
_MASTERS |= {False: "none", True: "float32"}


def state_dtype_word(value: Any, names: Sequence[str], where: str) -> str:
    """A group's "state_dtype" as a plain word, which checkpoints hold: "bfloat16", or "exp_avg=bfloat16,...".

    Args:
        value: a dtype, a word, a mapping of states' names to these, or what this has returned.
        names: of the rule's states.

    Raises:
        TypeError, ValueError: naming what was found and what is allowed.

    Example:
        >>> state_dtype_word(torch.bfloat16, ["exp_avg"], "param group 0")
        'bfloat16'
        >>> state_dtype_word({"exp_avg": torch.bfloat16}, ["exp_avg", "exp_avg_sq"], "param group 0")
        'exp_avg=bfloat16'
    """
    if isinstance(value, str) and "=" in value:
        value = dict(part.split("=", 1) for part in value.split(","))
    if not isinstance(value, Mapping):
        return _word(value, "state_dtype", where)
    unknown = [name for name in value if name not in names]
    if unknown:
        raise ValueError(f"state_dtype in {where} names {unknown}: the states here are {list(names)}")
    words = {name: _word(value[name], f"state_dtype[{name!r}]", where) for name in names if name in value}
    whole = {words.get(name, "float32") for name in names}
    return whole.pop() if len(whole) == 1 else ",".join(f"{name}={word}" for name, word in words.items())


def _word(value: Any, name: str, where: str) -> str:
    word = str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else None
    if word not in _WORDS:
        allowed = "torch.float32, torch.bfloat16, torch.int8, 'param' (the parameter's own dtype)"
        kind = ValueError if isinstance(value, (str, torch.dtype)) else TypeError
        also = ", or a dict of these by the states' names" if name.startswith("state_dtype") else ""
        raise kind(f"{name}={value!r} in {where}: allowed are {allowed}{also}")
    return _WORDS[word]


def check_storage(group: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[Storage, int]:
    """(storage, seed) of a group. Raises TypeError or ValueError, naming the key and the group."""
    word = state_dtype_word(group["state_dtype"], names, where)
    pairs = tuple((name, own) for name, _, own in (part.partition("=") for part in word.split(",")))
    stochastic = group["stochastic_rounding"]
    if not isinstance(stochastic, (int, str)) or stochastic not in _STOCHASTIC:
        raise ValueError(
            f"stochastic_rounding={stochastic!r} in {where}: allowed are False or 'none', 'params', 'states', True "
            "or 'both': what in bfloat16 or 8 bits is rounded stochastically"
        )
    masters = group["master_weights"]
    if not isinstance(masters, (int, str)) or masters not in _MASTERS:
        raise ValueError(
            f"master_weights={masters!r} in {where}: allowed are False or 'none', True or 'float32' (one beside "
            "each 16-bit parameter), 'split32' (16 more bits beside a bfloat16: a float32 in all), 'split24' (8 more)"
        )
    seed = group["seed"]
    if not 0 <= (number := scalar("seed", seed, where)) < 2**53 or not number.is_integer():
        raise ValueError(f"seed={seed!r} in {where}: allowed are whole numbers from 0 on, < 2**53")
    average = _word(group["ema_dtype"], "ema_dtype", where)
    return Storage(pairs if "=" in word else word, *_STOCHASTIC[stochastic], _MASTERS[masters], average), int(number)
