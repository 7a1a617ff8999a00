"""The functional API as operators of torch.ops: schemas, their implementation on CPU and GPU, and on fake tensors.

Each has two overloads: scalars as numbers (`default`) and as CPU tensors of one element (`tensor`). The namespace is
the native extension's, which a build may choose (WD_KERNELS_NAMESPACE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backends, native
from .lists import Lists, examine
from .records import Segment
from .rules import ADAMW, SGDW, Hyper, Rule, scalar

__all__ = ["OPERATORS", "Operator", "Role", "step"]

#: Of one role: the tensors, one of which may be missing in a schema of flat buffers.
Role = list[Tensor]


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        roles: parameters, gradients and states; the last states may be absent.
        flat: one flat buffer a role, or a list of tensors.
        numbers: scalars, "step" first; "eps" names itself in errors, "beta1" is betas[0].
        options: names and types of what is neither tensor nor number.
        hyper: the group that a rule checks, from numbers, options and whether the last states are there.
    """

    name: str
    rule: Rule
    roles: tuple[str, ...]
    flat: bool
    numbers: tuple[str, ...]
    options: dict[str, str]

    def schema(self, overload: str) -> str:
        """The schema; states and parameters are written, each under an alias of its own."""
        arguments = []
        for k, role in enumerate(self.roles):
            alias = "" if k == 1 else f"({'abcde'[k]}!)"
            absent = "?" if self.flat and self.may_lack(k) else ""
            arguments.append(f"Tensor{alias}{absent if self.flat else '[]'} {role}")
        kinds = ("SymInt", "float") if overload == "default" else ("Tensor", "Tensor")
        arguments += [f"{kinds[number != 'step']} {number}" for number in self.numbers]
        arguments += [f"{kind} {option}" for option, kind in self.options.items()]
        name = self.name if overload == "default" else f"{self.name}.{overload}"
        return f"{name}({', '.join(arguments)}) -> ()"

    def may_lack(self, role: int) -> bool:
        """Do some rules lack this state? AMSGrad's, and the momentum buffer."""
        return role == len(self.roles) - 1

    def label(self, role: int, index: int) -> str:
        """How errors call a tensor."""
        return self.roles[role] if self.flat else f"{self.roles[role]}[{index}]"


_ADAMW_NUMBERS = ("step", "lr", "beta1", "beta2", "eps", "weight_decay", "eta", "grad_factor")
_SGDW_NUMBERS = ("step", "lr", "momentum", "dampening", "weight_decay", "eta", "grad_factor")
_ADAMW_OPTIONS = {"decay": "str", "maximize": "bool", "backend": "str"}
_SGDW_OPTIONS = {"decay": "str", "form": "str", "nesterov": "bool", "maximize": "bool", "backend": "str"}
OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "adamw_", ADAMW, ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"), False,
            _ADAMW_NUMBERS, _ADAMW_OPTIONS,
        ),
        Operator(
            "adamw_flat_", ADAMW, ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), True,
            _ADAMW_NUMBERS, _ADAMW_OPTIONS,
        ),
        Operator("sgdw_", SGDW, ("params", "grads", "momentum_buffers"), False, _SGDW_NUMBERS, _SGDW_OPTIONS),
        Operator("sgdw_flat_", SGDW, ("param", "grad", "momentum_buffer"), True, _SGDW_NUMBERS, _SGDW_OPTIONS),
    )
}  # fmt: skip


# The step ------------------------------------------------------------------------------------------------------------


def step(operator: Operator, roles: Sequence[Role], numbers: Sequence[Any], options: Sequence[Any]) -> None:
    """One step on real tensors: every check, then the launches."""
    given: dict[str, float] = {}
    for name, value in zip(operator.numbers[1:], numbers[1:], strict=True):
        given[name] = value if type(value) is float else _number(operator, name, value)
    settings = dict(zip(operator.options, options, strict=True))
    counts = _counts(operator, numbers[0], len(roles[0]))
    factor = given.pop("grad_factor")
    if not math.isfinite(factor):
        raise ValueError(f"grad_factor={factor} in {operator.name}: allowed are finite numbers")
    present = bool(roles[-1])
    hyper = _hyper(operator, given, settings, present)
    _check_lengths(operator, roles, len(hyper[0][-1]))
    if not roles[0]:
        return
    if not present:
        roles = roles[:-1]
    if operator.flat:
        _check_flat(operator, roles)
    table = Lists(operator.rule, operator.label, roles, settings["backend"])
    if factor != 1:
        table.control = torch.tensor([factor, 0.0], dtype=torch.float64, device="cpu")
    starts = operator.rule is SGDW and present
    distinct = list(dict.fromkeys(counts))
    rows = operator.rule.rows([hyper], [(0, t, starts and t == 1) for t in distinct])
    if len(distinct) > 1:
        row_of = {t: row for row, t in enumerate(distinct)}
        table.runs[:, Segment.ROW] = torch.tensor([row_of[counts[i]] for i in table.order], device="cpu")
    launches = backends.prepare(table, rows)
    torch.autograd.graph.increment_version([t for role, own in enumerate(roles) if role != 1 for t in own])
    for go in launches:
        go()


def _number(operator: Operator, name: str, value: Any) -> float:
    name = {"beta1": "betas[0]", "beta2": "betas[1]"}.get(name, name)
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise ValueError(
            f"{name} in {operator.name} is a tensor on {value.device}: reading it would wait for the device; allowed "
            "are numbers and CPU tensors of one element"
        )
    return scalar(name, value, operator.name)


def _counts(operator: Operator, value: Any, n: int) -> list[int]:
    """The number of this step, for every parameter."""
    if type(value) is int and 0 < value < 2**53:
        return [value] * max(n, 1)
    if isinstance(value, Tensor) and value.numel() != 1:
        if value.device.type != "cpu" or value.shape != (n,) or value.is_complex():
            raise ValueError(
                f"step in {operator.name} is a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}: "
                f"allowed are a whole number, or a CPU tensor of one or of {n}"
            )
        counts = value.tolist()
    else:
        counts = [_number(operator, "step", value)] * n or [_number(operator, "step", value)]
    for i, count in enumerate(counts):
        if not (1 <= count < 2**53 and float(count).is_integer()):
            where = f"step[{i}]" if isinstance(value, Tensor) and value.numel() != 1 else "step"
            raise ValueError(f"{where}={count} in {operator.name}: allowed are whole numbers from 1 on, < 2**53")
    return [int(count) for count in counts]


def _hyper(operator: Operator, given: dict[str, float], settings: dict[str, Any], present: bool) -> Hyper:
    group: dict[str, Any] = {**given, **settings}
    if operator.rule is ADAMW:
        group |= {"betas": (given["beta1"], given["beta2"]), "amsgrad": present}
    (hyper,) = operator.rule.hypers([group], where=operator.name)
    return hyper


def _check_lengths(operator: Operator, roles: Sequence[Role], states: int) -> None:
    n = len(roles[0])
    for k, own in enumerate(roles):
        wanted = n if k < 2 + states else 0
        if len(own) == wanted:
            continue
        name = operator.roles[k]
        if operator.rule is SGDW and k == 2:
            state = "momentum is 0, which keeps no buffer" if wanted == 0 else "momentum is not 0"
            allowed = "None" if operator.flat else "an empty list"
            raise ValueError(
                f"{name} in {operator.name} has {len(own)} tensors, and {state}: allowed are "
                f"{allowed if wanted == 0 else f'{n} tensors, zeros before the first step'}"
            )
        raise ValueError(f"{name} in {operator.name} has {len(own)} tensors: params has {n}, and each needs one")


def _check_flat(operator: Operator, roles: Sequence[Role]) -> None:
    for k, (t,) in enumerate(roles):
        if isinstance(t, Tensor) and (t.dim() != 1 or not t.is_contiguous()):
            raise ValueError(
                f"{operator.roles[k]} in {operator.name} has shape {tuple(t.shape)} and strides {t.stride()}: allowed "
                "are contiguous tensors of one dimension"
            )


# Registration --------------------------------------------------------------------------------------------------------


def _split(operator: Operator, arguments: Sequence[Any]) -> tuple[list[Role], Sequence[Any], Sequence[Any]]:
    """Roles, numbers and options of a call."""
    n, k = len(operator.roles), len(operator.numbers)
    tensors = arguments[:n]
    roles = [[t] if t is not None else [] for t in tensors] if operator.flat else [list(own) for own in tensors]
    return roles, arguments[n : n + k], arguments[n + k :]


def _real(operator: Operator, *arguments: Any) -> None:
    step(operator, *_split(operator, arguments))


def _fake(operator: Operator, *arguments: Any) -> None:
    """The checks that need no values. Scalars are CPU tensors even here: one on meta would step nothing later."""
    roles, numbers, _ = _split(operator, arguments)
    for name, value in zip(operator.numbers, numbers, strict=True):
        if isinstance(value, Tensor) and (value.device.type != "cpu" or (name != "step" and value.numel() != 1)):
            raise ValueError(
                f"{name} in {operator.name} is a tensor of shape {tuple(value.shape)} on {value.device}: allowed are "
                "CPU tensors of one element"
            )
    _check_lengths(operator, roles, len(roles) - 2 - (not roles[-1]))
    devices = dict.fromkeys(t.device for t in roles[0])
    if len(devices) > 1 and torch.device("meta") in devices:
        raise ValueError(
            f"{operator.roles[0]} in {operator.name} are on {[*map(str, devices)]}: on meta are all or none"
        )
    roles = [own for own in roles if own]
    if operator.flat:
        _check_flat(operator, roles)
    examine(operator.label, roles, memory=False)


_library: Any = torch.library.Library(native.NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
for _operator in OPERATORS.values():
    for _overload in ("default", "tensor"):
        _library.define(_operator.schema(_overload), tags=(torch.Tag.pt2_compliant_tag,))
        _name = _operator.name if _overload == "default" else f"{_operator.name}.{_overload}"
        for _key in ("CPU", "CUDA", "XPU"):
            _library.impl(_name, partial(_real, _operator), _key)
        torch.library.register_fake(f"{native.NAMESPACE}::{_name}", partial(_fake, _operator), lib=_library)
