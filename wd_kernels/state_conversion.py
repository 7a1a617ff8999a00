"""States of other libraries' optimizers, as this package has them, and the other way (numerics, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .caller import warn
from .formats import EMA_NAME, MASTER_NAME, REFERENCE_NAME
from .master_weights import imported
from .reference import load
from .rules import FLAG, PULLS, RULES, DecayMode, Rule, ipow
from .scales import widened
from .sharding import local, sharded_like
from .validation import step_count

__all__ = ["Library", "convert_state", "identified", "saved_decay"]

Library: TypeAlias = Literal[
    "torch", "transformer_engine", "apex", "deepspeed", "optimi", "bitsandbytes", "torchao", "flashoptim"
]

State: TypeAlias = dict[str, Any]
#: Elements that share a scale of theirs.
BITSANDBYTES, FLASHOPTIM = 256, 32
#: Where bitsandbytes hides from FSDP what is not of a parameter's shape.
WRAPPED = "__bnb_optimizer_quant_state__"
#: What lies beside a parameter that no other library has; a master weight some have.
OWN = (EMA_NAME, REFERENCE_NAME)
#: Whose states are of another rule than ours, by a key that no other has.
FOREIGN = {
    "exp_avg_sq_row": "Adafactor", "exp_avg_sq_col": "Adafactor", "RMS": "Adafactor", "row_var": "Adafactor",
    "variance": "Adafactor", "exp_avg_diff": "Adan", "eps_sq": "StableAdamW", "la_param": "Ranger",
    "mu_product": "NAdam", "exp_inf": "Adamax", "acc_delta": "Adadelta", "square_avg": "RMSprop", "ax": "ASGD",
    "prev": "Rprop", "unorm_vec": "LARS or LAMB",
}  # fmt: skip
#: The same of its groups, where the states are called as those of ours.
FOREIGN_GROUPS = {"ns_steps": "Muon", "momentum_decay": "NAdam"}
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "lr_decay", "amsgrad")
NAMES = tuple(state.name for rule in RULES.values() for state in rule.states)


def convert_state(
    state_dict: Mapping[str, Any],
    *,
    source: Library | Literal["auto"] | None = None,
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
    "apex"                 counts of groups: exact                     the same; master weights left out
    "deepspeed"            FusedAdam's counts, DeepSpeedCPUAdam's:     the same; master weights left out
                           exact
    "optimi"               moments that are corrected for their bias,  the same, to a rounding; of a master, a
                           :math:`(1-\beta^t)\hat m`, to a rounding;   compensation, to 1/256 of itself
                           Kahan's compensation as a float32 master,
                           :math:`\theta + c`, to a rounding
    "bitsandbytes"         32 and 8 bits, :math:`q(c)\cdot s`,         in float32: exact; theirs goes on with it;
                           exact in float32 but for a rounding         master weights left out
    "torchao"              8 bits, as theirs dequantises them          the same
    "flashoptim"           companded, :math:`s\cdot y/(2-|y|)` and     moments in float32: exact, theirs quantises
                           :math:`(s\cdot y)^2`, to a few ulp; error   them; of a master, error bits: to 1/254 of a
                           bits as a float32 master                    last place of the parameter (8), or less
    =====================  ==========================================  ==========================================

    Weight decay keeps its number, and so its mode: where the other library says it ("optimi", torch's Adam and AdamW,
    "bitsandbytes") the result does; the others save no mode, and the live optimizer's is taken. What the target cannot
    do (a decay mode that it lacks, form="paper", a decay to other weights) is an error; what it has no place for
    (averages, master weights, schedules) is left behind, with a warning.

    Megatron-LM's layer of TransformerEngine's optimizer saves what that does. Fewer bits are not written: load the
    result, which asks for nothing but float32, into an optimizer of any format with `convert_states=True`.

    Args:
        state_dict: an optimizer's, with "state" and "param_groups". It is not changed; tensors may be shared.
        source, target: one of them. source="auto" is what the state looks like, an error where that is not sure.
        params: the parameters, in order of the groups, where flashoptim's error bits or optimi's compensations are
            read or written: these say what a parameter lacks.
        groups: the target optimizer's `param_groups`: the result has their keys, with the hyperparameters of
            `state_dict`. By default the groups are those of `state_dict`.

    Returns:
        What `load_state_dict` takes: that of this package's optimizer, or of the target.

    Raises:
        TypeError, ValueError: naming what was found and what is allowed.

    Warns:
        UserWarning: what has no place in the target, and is left behind.

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
    _check_shape(state_dict)
    if source == "auto":
        source = identified(state_dict)
    name = source if source is not None else target
    if name not in LIBRARIES:
        or_auto = ", 'auto'" if source is not None else ""
        raise ValueError(f"{'source' if source is not None else 'target'}={name!r}: allowed are {_allowed()}{or_auto}")
    saved = state_dict["param_groups"]
    params = None if params is None else list(params)
    keys = list(chain.from_iterable(group["params"] for group in saved))
    if params is not None and len(params) != len(keys):
        raise ValueError(f"{len(params)} params are given, and the state is one of {len(keys)}: one for each is needed")
    given: Sequence[Tensor | None] = [None] * len(keys) if params is None else params
    library = LIBRARIES[name]
    if target is not None:
        for i, group in enumerate(saved):
            _check_equal(group, library, f"param group {i}", name)
    found = dict[Any, State]()
    for key, group, p in zip(keys, _of_each(saved), given, strict=True):
        own = state_dict["state"].get(key)
        if own:
            what = f"the state of parameter {key!r}"
            if not isinstance(own, Mapping):
                raise TypeError(f"{what} is a {type(own).__name__}: expected a dict")
            _check_known(own, what)
            for holder, where in ((own, what), (group, f"the group of {what}")):
                if holder.get("step") is not None:
                    step_count(holder["step"], f"'step' of {where}")
            if target is not None:
                own = {k: v for k, v in widened(imported(own, group, what), what).items() if k not in OWN}
            try:
                found[key] = (library.read if source is not None else library.write)(own, group, p, what)
            except KeyError as missing:
                has = f"the state has {sorted(own)}, its group {sorted(set(group) - {'params'})}"
                raise ValueError(f"{what} is none of {name!r}: it has no {missing}; {has}") from None
            _check_known(found[key], what)
    made = [dict(group) for group in saved]
    if source is not None:
        for group in made:
            library.read_group(group, [found[key] for key in group["params"] if key in found])
        return {**state_dict, "state": found, "param_groups": made}
    if groups is not None:
        if [len(own["params"]) for own in groups] != [len(own["params"]) for own in saved]:
            raise ValueError("groups have other numbers of parameters than those of state_dict")
        shared = [{key: own[key] for key in HYPERPARAMETERS if key in own and key in like}
                  for own, like in zip(saved, groups, strict=True)]  # fmt: skip
        made = [
            {**like, **own, "params": group["params"]} for like, own, group in zip(groups, shared, saved, strict=True)
        ]
    for group, own in zip(made, saved, strict=True):
        library.write_group(group, own, [found[key] for key in group["params"] if key in found])
    left = _left_behind(state_dict, library)
    if left:
        warn(f"{name} has no place for {', '.join(left)}: left behind")
    return {**state_dict, "state": found, "param_groups": made}


def _allowed() -> str:
    return ", ".join(map(repr, get_args(Library)))


def _check_shape(state_dict: Any) -> None:
    """Raises where it is none of an optimizer, and says what it is."""
    if isinstance(state_dict, Mapping) and "base_optimizer_state" in state_dict:
        stage = int(state_dict.get("zero_stage", 0))
        raise ValueError(
            f"state_dict is one rank's part of DeepSpeed's ZeRO {stage}, with all parameters of a group in one flat "
            "tensor, which is not read. Read is the state_dict() of DeepSpeedCPUAdam and FusedAdam"
        )
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}: expected one of an optimizer, with param_groups")
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict[key], kind):
            found = type(state_dict[key]).__name__
            raise TypeError(f"{key!r} of state_dict is a {found}: expected that of an optimizer")
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"param group {i} of state_dict is no dict with 'params'")
        where = f"param group {i} of state_dict"
        for key, rule in FOREIGN_GROUPS.items():
            if key in group:
                raise _foreign(where, key, rule)
        if FLAG in group and "capturable" in group and "amsgrad" not in group:  # which torch's Adam always has
            raise ValueError(
                f"{where} has {FLAG!r} and no 'amsgrad': it is RAdam's, and nothing here goes on with that"
            )


def _check_known(own: Mapping[str, Any], what: str) -> None:
    """Raises ValueError where a state is that of a rule which this package has not."""
    for key, rule in FOREIGN.items():
        if key in own:
            raise _foreign(what, key, rule)
    alone = {"exp_avg_sq", "exp_avg_sq::quantized", "kahan_comp"}.isdisjoint(own)
    if isinstance(own.get("exp_avg"), Tensor) and alone:
        raise ValueError(f"{what} has 'exp_avg' and no 'exp_avg_sq', as Lion's: it is of none of AdamW, SGD, Adagrad")


def _foreign(what: str, key: str, rule: str) -> ValueError:
    return ValueError(
        f"{what} has {key!r}: it is {rule}'s, and nothing here goes on with that. Read are AdamW's, SGD's and Adagrad's"
    )


def identified(state_dict: Mapping[str, Any]) -> Library:
    """Whose layout a state has, by keys that no other library's has.

    Raises ValueError, naming the candidates, where several have them or none.

    Example:
        >>> identified({"state": {0: {"step": 3, "state1": 1}}, "param_groups": [{"params": [0]}]})
        'bitsandbytes'
    """
    _check_shape(state_dict)
    states = [own for own in state_dict["state"].values() if isinstance(own, Mapping) and own]
    keys = set[str]().union(*states)
    in_groups = set[str]().union(*state_dict["param_groups"])
    for own in states:
        _check_known({**own, "kahan_comp": None}, "a state of state_dict")
    quantised = any(_dequantises(value) for own in states for value in own.values())
    signs: dict[Library, bool] = {
        "bitsandbytes": bool(keys & {"state1", WRAPPED}),
        "flashoptim": "error_bits" in keys or any("::" in key for key in keys),
        "torchao": quantised,
        "optimi": {"kahan_sum", "decouple_lr"} <= in_groups,
        "deepspeed": "bias_correction" in in_groups and "step" in keys,
    }
    found = [name for name, sign in signs.items() if sign]
    if not found and {"foreach", "maximize"} <= in_groups:
        found = ["torch"]
    if not found and "step" in in_groups and "exp_avg" in keys:
        found = ["transformer_engine"] if MASTER_NAME in keys else ["transformer_engine", "apex"]
    if len(found) != 1:
        looks = f"may be of {' or '.join(map(repr, found))}" if found else "has no key by which a library is known"
        raise ValueError(
            f"source='auto': the state {looks}; states have {sorted(keys)[:6]}, groups {sorted(in_groups)[:8]}. Say "
            f"which it is: {_allowed()}"
        )
    return found[0]


# What has an equal ----------------------------------------------------------------------------------------------------


def saved_decay(group: Mapping[str, Any]) -> tuple[Rule, DecayMode, float] | None:
    """(rule, decay mode, weight decay) of a group that this package has saved; None where it says no rule."""
    name = "adamw" if "betas" in group else "sgdw" if "momentum" in group else "adagradw"
    rule = RULES[name]
    if name == "adagradw" and "lr_decay" not in group:
        return None
    return rule, rule.mode_of(group, rule.torch.decays[0]), float(group.get("weight_decay", 0.0))


def _check_equal(group: Mapping[str, Any], library: _Layout, where: str, name: str) -> None:
    """Raises ValueError where a step of the target would do something else than one of the group."""
    found = saved_decay(group)
    if found is None:
        return
    rule, mode, decay = found
    modes = library.decays.get(rule.name, ())
    if not modes:
        raise ValueError(f"{where} is one of {rule.title}, which {name!r} has no layout for")
    if decay and mode not in modes:
        lr, mu = float(group.get("base_lr", group.get("lr", 0.0))), group.get("momentum", 0)
        raise ValueError(
            f"{where} has decay={mode!r}, weight_decay={decay:g}: of {name!r} {rule.title} does {' and '.join(modes)}. "
            f"Carry it over first, and put both into the group: decay={modes[0]!r}, weight_decay="
            f"convert_weight_decay({decay:g}, {mode!r}, {modes[0]!r}, lr={lr:g}, rule={rule.name!r}"
            f"{f', momentum={mu:g}' if mu else ''}).weight_decay; python -m wd_kernels convert does it with --decay"
        )
    wrong = {key: group[key] for key, plain in PULLS.items() if decay and group.get(key, plain) != plain}
    wrong |= {key: group[key] for key in library.lacks if group.get(key)}
    if group.get("form", "torch") != "torch" and group.get("momentum"):
        wrong["form"] = group["form"]
    if decay and str(group.get("schedule")).startswith("NormalizedDecay("):
        wrong["schedule"] = group["schedule"]  # its weight decay is not the lambda of a step
    if wrong:
        shown = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise ValueError(f"{where} has {shown}, which {rule.title} of {name!r} has not: it would train otherwise")


def _left_behind(state_dict: Mapping[str, Any], library: _Layout) -> list[str]:
    """What of a state of ours has no place in a library's."""
    names = (*OWN, *(() if library.masters else (MASTER_NAME,)))
    held = {key for own in state_dict["state"].values() if isinstance(own, Mapping) for key in own}
    left = [f"{name!r} of its parameters" for name in names if name in held or f"{name}_code" in held]
    for key in ("schedule", "weight_decay_schedule"):
        said = {str(group.get(key)) for group in state_dict["param_groups"]} - {"None", "from_lr"}
        left += [f"{key}={value}" for value in sorted(said)]
    shown = [group for group in state_dict["param_groups"] if group.get("schedule") != "from_lr"]
    etas = {float(group.get("eta", 1.0)) for group in shown if not group.get("show_lr")} - {1.0}
    return left + [f"eta={eta:g}, by which lr is multiplied" for eta in sorted(etas)]


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
    #: Of a group that was theirs, and its states as ours.
    read_group: Callable[[dict[str, Any], Sequence[State]], object] = lambda group, states: None
    #: Of a group that is to be theirs, and the saved one of ours.
    write_group: Callable[[dict[str, Any], Mapping[str, Any], Sequence[State]], object] = lambda made, own, states: None
    #: Decay modes that it has, by rules.
    decays: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Hyperparameters of ours that it has not, where they are set.
    lacks: tuple[str, ...] = ()
    masters: bool = False


def _count(value: Any) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def _unchanged(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    return dict(own)


def _without_master(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    return {name: value for name, value in own.items() if name != MASTER_NAME}


def _write_torch_group(group: dict[str, Any], saved: Mapping[str, Any], states: Sequence[State]) -> None:
    """Tells torch's Adam whether it is to decay weights or gradients, whatever `groups` of it say."""
    described = saved_decay(saved)
    if described is not None and described[0].torch.decoupled_flag:
        group[FLAG] = described[1] != "l2"


# TransformerEngine: groups count; a master is float32, or the int16 that bfloat16 lacks, as "split32" has it.
# apex: groups count; its SGD is torch's. Masters of either's are made anew from the parameters.


def _read_counted(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    if not group.get("bias_correction", True):
        raise ValueError(f"the group of {what} has bias_correction=False: AdamW here corrects the bias of its moments")
    if "exp_avg" not in own:  # SGD, which counts nothing
        return dict(own)
    if "step" not in group and "step" not in own:
        raise ValueError(f"the group of {what} has no 'step', and so no count of it is known")
    return {"step": _count(own.get("step", group.get("step"))), **own}


def _read_counted_group(group: dict[str, Any], states: Sequence[State]) -> None:
    group.pop("step", None)
    group.pop("bias_correction", None)
    if isinstance(group.get("lr"), Tensor):
        group["lr"] = float(group["lr"])


def _write_engine(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    if MASTER_NAME in own and own[MASTER_NAME].dtype == torch.int8:
        raise TypeError(f"{what} has a remainder of 8 bits: allowed are a float32 master and 16 bits ('split32')")
    return dict(own)


def _one_count(states: Sequence[State]) -> int:
    """The count of a group, taken from its states."""
    counts = {int(own.pop("step")) for own in states if "step" in own}
    if len(counts) > 1:
        raise ValueError(f"parameters of one group have taken {sorted(counts)} steps: theirs has one count for a group")
    return counts.pop() if counts else 0


def _write_counted_group(group: dict[str, Any], saved: Mapping[str, Any], states: Sequence[State]) -> None:
    if "betas" not in saved:  # SGD, which counts nothing
        for own in states:
            own.pop("step", None)
        return
    group["step"] = _one_count(states)
    group.setdefault("bias_correction", True)


# DeepSpeed: DeepSpeedCPUAdam counts each parameter; FusedAdam only the last one of a group, for all of it.


def _read_deepspeed(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    if not group.get("bias_correction", True):
        raise ValueError(f"the group of {what} has bias_correction=False: AdamW here corrects the bias of its moments")
    if "step" not in own:
        raise ValueError(f"{what} has no 'step', as DeepSpeedCPUAdam and FusedAdam have")
    found = {**own, "step": _count(own["step"])}
    if "exp_avg" not in own and "exp_avg_sq" in own:
        found["sum"] = found.pop("exp_avg_sq")  # DeepSpeedCPUAdagrad
    return found


def _read_deepspeed_group(group: dict[str, Any], states: Sequence[State]) -> None:
    """Gives parameters that FusedAdam has not counted the count of their group."""
    group.pop("bias_correction", None)
    group.pop("step", None)
    latest = max((own["step"] for own in states if "step" in own), default=None)
    for own in states:
        if latest is not None and not own["step"] and "exp_avg" in own:  # Adagrad's states are there before a step
            own["step"] = latest.clone()


def _write_deepspeed(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    found = _without_master(own, group, p, what)
    if "step" in found:
        found["step"] = int(found["step"])
    if "sum" in found:
        found["exp_avg_sq"] = found.pop("sum")
    return found


def _write_deepspeed_group(group: dict[str, Any], saved: Mapping[str, Any], states: Sequence[State]) -> None:
    counts = {own["step"] for own in states if "step" in own}
    fused = "bias_correction" in group and "amsgrad" not in group
    if fused and len(counts) > 1:
        raise ValueError(f"parameters of one group have taken {sorted(counts)} steps: FusedAdam has one count for all")
    if "betas" in group:
        group.setdefault("bias_correction", True)


# optimi: groups count; moments are kept with their bias corrected; Kahan's compensation is what a 16-bit parameter
# lacks of what it is meant to be.


def _read_optimi(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    found: State = {}
    if "exp_avg_sq" in own:
        t = int(own["step"] if "step" in own else group["step"])
        found["step"] = _count(t)
        for name, beta in (("exp_avg", group["beta1"]), ("exp_avg_sq", group["beta2"])):
            found[name] = _times(own[name], 1.0 - ipow(beta, t))
    elif "momentum" not in group:
        raise ValueError(f"{what} has one moment, and its group no momentum: it is of none of AdamW and SGD")
    elif group["momentum"]:
        found["momentum_buffer"] = own["exp_avg"]
    rest = own.get("kahan_comp")
    if rest is None or not group.get("kahan_sum") or rest.dtype not in (torch.bfloat16, torch.float16):
        return found
    if p is None:
        raise ValueError(f"{what} has a compensation: give the parameters that it belongs to, params=[...]")
    theta, rest = local(p).detach(), local(rest)
    if theta.dtype in (torch.bfloat16, torch.float16):
        if rest.shape != theta.shape:
            shapes = f"{tuple(rest.shape)}, its parameter {tuple(theta.shape)}"
            raise ValueError(f"the compensation of {what} has shape {shapes}: params are in order of the groups")
        found[MASTER_NAME] = sharded_like(p, theta.float() + rest.to(theta.device).float())
    return found


def _times(t: Tensor, factor: float) -> Tensor:
    """Rounded once, to float32 at least."""
    wide = (local(t).double() * factor).to(torch.float64 if t.dtype == torch.float64 else torch.float32)
    return sharded_like(t, wide)


def _read_optimi_group(group: dict[str, Any], states: Sequence[State]) -> None:
    if "decouple_lr" not in group or not {"beta1", "momentum"} & set(group):
        raise ValueError(f"a group is none of optimi's Adam, AdamW and SGD: it has {sorted(group)}")
    if "momentum" in group:
        group["dampening"] = float(group["momentum"]) if group.get("dampening") else 0.0
        group["nesterov"] = False
    else:
        group["betas"] = (group.pop("beta1"), group.pop("beta2"))
    mode = "independent" if group.get("decouple_lr") else "lr_scaled" if group.get("decouple_wd") else "l2"
    group["decay"] = mode
    if mode == "independent":  # times lr / max_lr, which is eta with schedule="from_lr"
        group["base_lr"] = group["lr"] if group.get("max_lr") is None else group["max_lr"]
        if group["base_lr"] != group["lr"] and group.get("weight_decay"):
            warn(
                f"a group has lr={group['lr']:g}, max_lr={group['base_lr']:g}: optimi's decay follows lr / max_lr, and "
                "so does ours with schedule='from_lr'"
            )
    for key in OPTIMI:
        group.pop(key, None)


OPTIMI = (
    "decouple_wd", "decouple_lr", "max_lr", "kahan_sum", "triton", "foreach", "gradient_release", "setup", "torch_init",
    "step",
)  # fmt: skip


def _write_optimi(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    found: State = {"exp_avg": own.get("momentum_buffer"), "kahan_comp": None}
    if "exp_avg_sq" in own:
        t = int(own["step"])
        found["step"] = t
        for name, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True):
            bias = 1.0 - ipow(float(beta), t)
            found[name] = _times(own[name], 1.0 / bias) if bias else own[name].clone()
    if MASTER_NAME in own:
        if p is None:
            raise ValueError(f"{what} has a master weight: give the parameters that it belongs to, params=[...]")
        theta = local(p).detach()
        master = load(theta, torch.float32, local(own[MASTER_NAME]).to(theta.device))
        found["kahan_comp"] = sharded_like(p, (master - theta.float()).to(theta.dtype))
    return found


def _write_optimi_group(group: dict[str, Any], saved: Mapping[str, Any], states: Sequence[State]) -> None:
    if group.get("gradient_release"):
        raise ValueError("a group of groups has gradient_release=True: optimi loads no state into an optimizer of it")
    described = saved_decay(saved)
    if described is None:
        raise ValueError("a group has neither betas nor momentum: optimi's optimizers are AdamW, Adam and SGD")
    rule, mode, decay = described
    made: State = {"weight_decay": decay, "decouple_wd": mode != "l2", "decouple_lr": mode == "independent"}
    made["max_lr"] = saved.get("base_lr", saved["lr"]) if mode == "independent" else None
    if rule.name == "adamw":
        made["beta1"], made["beta2"] = saved["betas"]
        made["step"] = torch.tensor(_one_count(states), dtype=torch.int32)
    else:
        mu, dampening = saved["momentum"], saved.get("dampening", 0)
        if dampening not in (0, mu):
            raise ValueError(f"a group has dampening={dampening}, momentum={mu}: optimi's is 0 or as the momentum")
        made["dampening"] = bool(dampening)
    made["kahan_sum"] = any(own["kahan_comp"] is not None for own in states)
    made["setup"] = True  # else it begins to count anew
    like = dict(group) if "kahan_sum" in group else {}
    kept: State = {key: group[key] for key in ("lr", "eps", "momentum", "params", "param_names") if key in group}
    plain: State = {"foreach": None, "triton": False, "gradient_release": False}
    group.clear()
    group.update({**plain, **like, **kept, **made})
    for own in states if group["triton"] else ():
        own |= {name: torch.zeros(1) for name, value in own.items() if value is None}  # which its kernel does not read


# bitsandbytes: a code for each element, a value for each code, a scale for 256 neighbours; or float32.


def _read_bitsandbytes(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    own = {**own, **own.get(WRAPPED, {})}
    _check_known(own, what)
    beta1, beta2 = group.get("betas", (0, 0))[:2]
    if group.get("alpha"):
        raise ValueError(f"the group of {what} has alpha={group['alpha']}: it is AdEMAMix's, which has a moment more")
    if "state1" in own and "state2" not in own and beta2:
        raise ValueError(f"{what} has one moment and betas={group['betas']}: it is of none of AdamW, SGD and Adagrad")
    if "state1" in own and "state2" not in own and beta1 and group.get("eps"):
        raise ValueError(f"{what} has one moment, and its group eps={group['eps']}, which SGD has not: it is RMSprop's")
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


def _read_bitsandbytes_group(group: dict[str, Any], states: Sequence[State]) -> None:
    betas = group.get("betas", (0, 0))
    if "momentum" not in group and betas[0] and not betas[1]:
        group["momentum"] = betas[0]  # its SGD has it there
    if betas[1]:
        group[FLAG] = True  # its Adam, too, decays weights and not gradients
    else:
        group.pop("betas", None)


def _write_bitsandbytes(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    states = [own[name].float() for name in NAMES if isinstance(own.get(name), Tensor)]
    if len(states) > 2:
        raise ValueError(f"{what} has {len(states)} states: theirs has two at most, and no amsgrad")
    if not states:
        raise ValueError(f"{what} is one of SGD without momentum, which bitsandbytes has not")
    return {"step": int(own.get("step", 1)), WRAPPED: {f"state{k}": t for k, t in enumerate(states, 1)}}


def _write_bitsandbytes_group(group: dict[str, Any], saved: Mapping[str, Any], states: Sequence[State]) -> None:
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


def _dequantises(value: Any) -> bool:
    return isinstance(value, Tensor) and all(hasattr(local(value), part) for part in ("codes", "scale", "dequantize"))


def _read_torchao(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    found: State = {}
    for name, value in own.items():
        if _dequantises(value):
            value = value.dequantize()  # of a DTensor, theirs too
        found[name] = value.float() if name in NAMES and value.dtype != torch.float64 else value
    return found


def _read_torchao_group(group: dict[str, Any], states: Sequence[State]) -> None:
    if isinstance(group.get("lr"), Tensor):
        group["lr"] = float(group["lr"])


def _write_torchao(own: Mapping[str, Any], group: Mapping[str, Any], p: Tensor | None, what: str) -> State:
    return {name: value.float() if name in NAMES else value for name, value in own.items() if name != MASTER_NAME}


def _write_torchao_group(group: dict[str, Any], saved: Mapping[str, Any], states: Sequence[State]) -> None:
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


def _read_flashoptim_group(group: dict[str, Any], states: Sequence[State]) -> None:
    group.pop("master_weights", None)  # as ours had it, and not as the masters are now


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


def _write_flashoptim_group(group: dict[str, Any], saved: Mapping[str, Any], states: Sequence[State]) -> None:
    for width in [own.pop("master_bytewidth") for own in states if "master_bytewidth" in own]:
        group["master_bytewidth"] = width
    described = saved_decay(saved)
    if described is not None and described[1] == "independent":
        group["initial_lr"] = saved.get("base_lr", saved["lr"])  # by which its lr is divided there


#: Of each rule, decay by torch's classes; and what those of others have beside.
BOTH = ("lr_scaled", "l2")
LIBRARIES: dict[str, _Layout] = {
    "torch": _Layout(
        _unchanged, _without_master, write_group=_write_torch_group,
        decays={rule.name: rule.torch.decays for rule in RULES.values()},
    ),
    "transformer_engine": _Layout(
        _read_counted, _write_engine, _read_counted_group, _write_counted_group,
        {"adamw": BOTH, "sgdw": ("l2", "lr_scaled")}, ("amsgrad", "maximize"), masters=True,
    ),
    "apex": _Layout(
        _read_counted, _without_master, _read_counted_group, _write_counted_group,
        {"adamw": BOTH, "sgdw": ("l2", "lr_scaled")}, ("amsgrad", "maximize"),
    ),
    "deepspeed": _Layout(
        _read_deepspeed, _write_deepspeed, _read_deepspeed_group, _write_deepspeed_group,
        {"adamw": BOTH, "adagradw": ("l2",)}, ("amsgrad", "maximize", "lr_decay"),
    ),
    "optimi": _Layout(
        _read_optimi, _write_optimi, _read_optimi_group, _write_optimi_group,
        {"adamw": (*BOTH, "independent"), "sgdw": ("l2", "lr_scaled", "independent")},
        ("amsgrad", "maximize", "nesterov"), masters=True,
    ),
    "bitsandbytes": _Layout(
        _read_bitsandbytes, _write_bitsandbytes, _read_bitsandbytes_group, _write_bitsandbytes_group,
        {"adamw": ("lr_scaled",), "sgdw": ("l2",), "adagradw": ("l2",)},
        ("maximize", "nesterov", "dampening", "lr_decay"),
    ),
    "torchao": _Layout(
        _read_torchao, _write_torchao, _read_torchao_group, _write_torchao_group, {"adamw": BOTH}, ("maximize",)
    ),
    "flashoptim": _Layout(
        _read_flashoptim, _write_flashoptim, _read_flashoptim_group, _write_flashoptim_group,
        decays={"adamw": (*BOTH, "independent"), "sgdw": ("l2", "lr_scaled", "independent")},
        lacks=("amsgrad", "maximize"), masters=True,
    ),
}  # fmt: skip
