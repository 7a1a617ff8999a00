"""States of other libraries' optimizers, as this package has them, and the other way (numerics, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .formats import MASTER_NAME
from .master_weights import imported
from .reference import load
from .rules import RULES
from .scales import widened
from .sharding import local, sharded_like

__all__ = ["Library", "convert_state"]

Library: TypeAlias = Literal["torch", "transformer_engine", "bitsandbytes", "torchao", "flashoptim"]

State: TypeAlias = dict[str, Any]
#: Elements that share a scale of theirs.
BITSANDBYTES, FLASHOPTIM = 256, 32
#: Where bitsandbytes hides from FSDP what is not of a parameter's shape.
WRAPPED = "__bnb_optimizer_quant_state__"
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "lr_decay", "amsgrad")
NAMES = tuple(state.name for rule in RULES.values() for state in rule.states)


def convert_state(
    state_dict: Mapping[str, Any],
    *,
    source: Library | None = None,
    target: Library | None = None,
    params: Sequence[Tensor] | None = None,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    r"""An optimizer's state as another library has it: from `source` to this package, or from this package to `target`.

    =====================  ==========================================  ==========================================
    library                read                                        written
    =====================  ==========================================  ==========================================
    "torch"                as it is                                    master weights left out
    "transformer_engine"   counts of groups; masters, float32 or a     the same: exact
                           remainder (int16): exact
    "bitsandbytes"         32 and 8 bits, :math:`q(c)\cdot s`,         in float32: exact; theirs goes on with it;
                           exact in float32 but for a rounding         master weights left out
    "torchao"              8 bits, as theirs dequantises them          the same
    "flashoptim"           companded, :math:`s\cdot y/(2-|y|)` and     moments in float32: exact, theirs quantises
                           :math:`(s\cdot y)^2`, to a few ulp; error   them; of a master, error bits: to 1/254 of a
                           bits as a float32 master                    last place of the parameter (8), or less
    =====================  ==========================================  ==========================================

    Megatron-LM's layer of TransformerEngine's optimizer saves what that does. Fewer bits are not written: load the
    result, which asks for nothing but float32, into an optimizer of any format with `convert_states=True`.

    Args:
        state_dict: an optimizer's, with "state" and "param_groups". It is not changed; tensors may be shared.
        source, target: one of them.
        params: the parameters, in order of the groups, where flashoptim's error bits are read or written: these say
            what a parameter lacks.
        groups: the target optimizer's `param_groups`: the result has their keys, with the hyperparameters of
            `state_dict`. By default the groups are those of `state_dict`.

    Returns:
        What `load_state_dict` takes: that of this package's optimizer, or of the target.

    Raises:
        TypeError, ValueError: naming what was found and what is allowed.

    Example:
        >>> import torch, wd_kernels
        >>> saved = {"state": {0: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}},
        ...          "param_groups": [{"lr": 1e-3, "step": 7, "params": [0]}]}
        >>> wd_kernels.convert_state(saved, source="transformer_engine")["state"][0]["step"]
        tensor(7.)

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, for the 8-bit codes.
    """
    if (source is None) == (target is None):
        raise ValueError(f"source={source!r}, target={target!r}: one of them must be given, {_allowed()}")
    name = source if source is not None else target
    if name not in LIBRARIES:
        raise ValueError(f"{'source' if source is not None else 'target'}={name!r}: allowed are {_allowed()}")
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}: expected one of an optimizer, with param_groups")
    saved = state_dict["param_groups"]
    for i, group in enumerate(saved):
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"param group {i} of state_dict is no dict with 'params'")
    params = None if params is None else list(params)
    keys = list(chain.from_iterable(group["params"] for group in saved))
    if params is not None and len(params) != len(keys):
        raise ValueError(f"{len(params)} params are given, and the state is one of {len(keys)}: one for each is needed")
    given: Sequence[Tensor | None] = [None] * len(keys) if params is None else params
    library = LIBRARIES[name]
    found = dict[Any, State]()
    for key, group, p in zip(keys, _of_each(saved), given, strict=True):
        own = state_dict["state"].get(key)
        if own:
            what = f"the state of parameter {key!r}"
            if not isinstance(own, Mapping):
                raise TypeError(f"{what} is a {type(own).__name__}: expected a dict")
            if target is not None:
                own = widened(imported(own, group, what), what)
            found[key] = (library.read if source is not None else library.write)(own, group, p, what)
    made = [dict(group) for group in saved]
    if source is not None:
        for group in made:
            library.read_group(group)
    elif groups is not None:
        if [len(own["params"]) for own in groups] != [len(own["params"]) for own in saved]:
            raise ValueError("groups have other numbers of parameters than those of state_dict")
        shared = [{key: own[key] for key in HYPERPARAMETERS if key in own and key in like}
                  for own, like in zip(saved, groups, strict=True)]  # fmt: skip
        made = [
            {**like, **own, "params": group["params"]} for like, own, group in zip(groups, shared, saved, strict=True)
        ]
    if target is not None:
        for group in made:
            library.write_group(group, [found[key] for key in group["params"] if key in found])
    return {**state_dict, "state": found, "param_groups": made}


def _allowed() -> str:
    return ", ".join(map(repr, get_args(Library)))


def _of_each(groups: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The group of each parameter."""
    for group in groups:
        yield from [group] * len(group["params"])


Convert: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any], Tensor | None, str], State]


@dataclass(frozen=True)
class _Layout:
    """One library's: (its state, its group, the parameter, what errors call it) to ours, and the other way."""

    read: Convert
    write: Convert
    read_group: Callable[[dict[str, Any]], object] = lambda group: None
    write_group: Callable[[dict[str, Any], Sequence[State]], object] = lambda group, states: None


def _count(value: Any) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def _unchanged(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    return dict(own)


def _without_master(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    return {name: value for name, value in own.items() if name != MASTER_NAME}


# TransformerEngine: groups count; a master is float32, or the int16 that bfloat16 lacks, as "split32" has it.


def _read_engine(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    if "step" not in group and "step" not in own:
        raise ValueError(f"the group of {what} has no 'step', and so no count of it is known")
    return {"step": _count(own.get("step", group.get("step"))), **own}


def _write_engine(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    if MASTER_NAME in own and own[MASTER_NAME].dtype == torch.int8:
        raise TypeError(f"{what} has a remainder of 8 bits: allowed are a float32 master and 16 bits ('split32')")
    return dict(own)


def _write_engine_group(group: dict[str, Any], states: Sequence[State]) -> None:
    counts = {int(own.pop("step")) for own in states if "step" in own}
    if len(counts) > 1:
        raise ValueError(f"parameters of one group have taken {sorted(counts)} steps: theirs has one count for a group")
    group["step"] = counts.pop() if counts else 0


# bitsandbytes: a code for each element, a value for each code, a scale for 256 neighbours; or float32.


def _read_bitsandbytes(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    own = {**own, **own.get(WRAPPED, {})}
    beta1, beta2 = group.get("betas", (0, 0))[:2]
    if "state2" not in own and beta2:
        raise ValueError(f"{what} has one moment and betas={group['betas']}: it is of none of AdamW, SGD and Adagrad")
    names = ("exp_avg", "exp_avg_sq") if "state2" in own else ("momentum_buffer" if beta1 else "sum",)
    found: State = {"step": _count(own["step"])}
    for k, name in enumerate(names, 1):
        codes = own[f"state{k}"]
        if codes.dtype != torch.uint8:
            found[name] = codes
            continue
        scales, values = own[f"absmax{k}"], own[f"qmap{k}"]
        _check_scales(codes, scales, BITSANDBYTES, f"'state{k}' of {what}")
        found[name] = values[codes.long()] * _spread(scales, codes, BITSANDBYTES)
    return found


def _read_bitsandbytes_group(group: dict[str, Any]) -> None:
    betas = group.get("betas", (0, 0))
    if "momentum" not in group and betas[0] and not betas[1]:
        group["momentum"] = betas[0]  # its SGD has it there
    if not betas[1]:
        group.pop("betas", None)


def _write_bitsandbytes(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    states = [own[name].float() for name in NAMES if isinstance(own.get(name), Tensor)]
    if len(states) > 2:
        raise ValueError(f"{what} has {len(states)} states: theirs has two at most, and no amsgrad")
    return {"step": int(own.get("step", 1)), WRAPPED: {f"state{k}": t for k, t in enumerate(states, 1)}}


def _write_bitsandbytes_group(group: dict[str, Any], states: Sequence[State]) -> None:
    if "betas" not in group:
        raise ValueError(
            "a group has no betas, which bitsandbytes' have: give the optimizer's, groups=its.param_groups"
        )
    if group.get("momentum"):
        group["betas"] = (group["momentum"], group["betas"][1])


def _check_scales(codes: Tensor, scales: Tensor, block: int, what: str) -> None:
    if scales.numel() != -(-codes.numel() // block):
        raise ValueError(f"{what} has {codes.numel()} codes and {scales.numel()} scales: one for {block} is needed")


def _spread(scales: Tensor, codes: Tensor, block: int) -> Tensor:
    """The scale of each element, in the order of its codes in memory."""
    return scales.float().repeat_interleave(block)[: codes.numel()].view(codes.shape)


# torchao: a tensor that has codes, values and scales; of whole blocks.


def _read_torchao(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    found: State = {}
    for name, value in own.items():
        if all(hasattr(local(value), part) for part in ("codes", "scale", "dequantize")) and isinstance(value, Tensor):
            value = value.dequantize()  # of a DTensor, theirs too
        found[name] = value.float() if name in NAMES and value.dtype != torch.float64 else value
    return found


def _read_torchao_group(group: dict[str, Any]) -> None:
    if isinstance(group.get("lr"), Tensor):
        group["lr"] = float(group["lr"])


def _write_torchao(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    return {name: value.float() if name in NAMES else value for name, value in own.items() if name != MASTER_NAME}


def _write_torchao_group(group: dict[str, Any], states: Sequence[State]) -> None:
    group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)


# flashoptim: bytes with a float16 scale for 32 neighbours; what a parameter lacks of its master, as a fraction of half
# of its last place.


def _read_flashoptim(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    found: State = {}
    for name, value in own.items():
        base, _, part = name.partition("::")
        if part == "scales" or base == "error_bits":
            continue
        if part != "quantized":
            found[name] = _count(value) if name == "step" else value
            continue
        scales = own[f"{base}::scales"]
        scales = scales.view(torch.float16) if scales.dtype == torch.bfloat16 else scales
        _check_scales(value, scales, FLASHOPTIM, f"{base!r} of {what}")
        scale = _spread(scales, value, FLASHOPTIM)
        if value.dtype == torch.uint8:
            found[base] = (value.float() / 255 * scale).square()
        else:
            y = value.float() / 127
            found[base] = y / (2 - y.abs()) * scale
    errors = own.get("error_bits")
    if errors is not None:
        if p is None:
            raise ValueError(f"{what} has error bits: give the parameters that lack them, params=[...]")
        theta, errors = local(p).detach(), local(errors)
        if errors.shape != theta.shape:
            shapes = f"{tuple(errors.shape)}, its parameter {tuple(theta.shape)}"
            raise ValueError(f"the error bits of {what} have shape {shapes}: params are in order of the groups")
        wide = errors.dtype == torch.int16 or (errors.is_floating_point() and int(group["master_bytewidth"]) == 4)
        bits = errors.view(torch.int16).float() if wide else errors.float()
        found[MASTER_NAME] = sharded_like(p, theta.float() + bits / (32767 if wide else 127) * _half_ulp(theta))
    return found


def _half_ulp(theta: Tensor) -> Tensor:
    """Half of the last place of 16-bit numbers, in float32; of 0 and subnormals, of the least normal one."""
    mantissa, least = (7, -126) if theta.dtype == torch.bfloat16 else (10, -14)
    exponent = torch.where(theta == 0, least, torch.frexp(theta.float()).exponent - 1).clamp(min=least)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - mantissa - 1)


def _write_flashoptim(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    found = {name: value.float() if name in NAMES else value for name, value in own.items() if name != MASTER_NAME}
    if MASTER_NAME in own:
        if p is None:
            raise ValueError(f"{what} has a master weight: give the parameters that it belongs to, params=[...]")
        theta = local(p).detach()
        part = local(own[MASTER_NAME]).to(theta.device)
        share = ((load(theta, torch.float32, part) - theta.float()) / _half_ulp(theta)).clamp(-1, 1)
        if part.dtype == torch.int8:
            errors = (share * 127).round().to(theta.dtype)
        else:
            errors = (share * 32767).round().to(torch.int16).view(theta.dtype)
        found["error_bits"] = sharded_like(p, errors)
        found["master_bytewidth"] = 3 if part.dtype == torch.int8 else 4
    return found


def _write_flashoptim_group(group: dict[str, Any], states: Sequence[State]) -> None:
    for width in [own.pop("master_bytewidth") for own in states if "master_bytewidth" in own]:
        group["master_bytewidth"] = width


LIBRARIES: dict[str, _Layout] = {
    "torch": _Layout(_unchanged, _without_master),
    "transformer_engine": _Layout(
        _read_engine, _write_engine, lambda group: group.pop("step", None), _write_engine_group
    ),
    "bitsandbytes": _Layout(
        _read_bitsandbytes, _write_bitsandbytes, _read_bitsandbytes_group, _write_bitsandbytes_group
    ),
    "torchao": _Layout(_read_torchao, _write_torchao, _read_torchao_group, _write_torchao_group),
    "flashoptim": _Layout(_read_flashoptim, _write_flashoptim, write_group=_write_flashoptim_group),
}
