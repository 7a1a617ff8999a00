"""The functional API as operators of torch.ops: schemas, their implementation on CPU and GPU, and on fake tensors.

Each has two overloads: scalars as numbers (`default`) and as CPU tensors of one element (`tensor`). The namespace is
the native extension's, which a build may choose (WD_KERNELS_NAMESPACE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from . import backends, native
from .layout import CPU, Moving
from .rules import MASTER, RULES, STORAGE, VALUE, Rule, State, scalar
from .table.lists import ONE, Lists, examine, step_alike

__all__ = ["OPERATORS", "Operator", "Role", "step"]

#: Of one role: the tensors, one of which may be missing in a schema of flat buffers.
Role = list[Tensor]


@dataclass(frozen=True)
class Operator:
    """One operator of a rule; all but its name follows from the rule's declaration.

    Attributes:
        flat: one flat buffer a role, or a list of tensors.
        states: of the rule, master weights, and the scales of states in 8 bits.
        roles: parameters, gradients and states.
        numbers: scalars, "step" first; the parts of a hyperparameter are numbers of their own.
        options: names and types of what is neither tensor nor number.
    """

    rule: Rule
    flat: bool

    @cached_property
    def name(self) -> str:
        return f"{self.rule.name}_flat_" if self.flat else f"{self.rule.name}_"

    @cached_property
    def states(self) -> tuple[State, ...]:
        return (*self.rule.states, MASTER, *(state.scale for state in self.rule.states))

    @cached_property
    def roles(self) -> tuple[str, ...]:
        if self.flat:
            return ("param", "grad", *(state.name for state in self.states))
        return ("params", "grads", *(state.plural for state in self.states))

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        own = [h.parts or (h.name,) for h in self.rule.hyperparameters if h.kind == "float" and not h.of_states]
        return ("step", "lr", *chain(*own), "eta", "grad_factor", VALUE)

    @cached_property
    def options(self) -> dict[str, str]:
        own = {h.name: h.kind for h in self.rule.hyperparameters if h.kind != "float" and not h.of_states}
        return {**own, "backend": "str", "stochastic_rounding": "str", "seed": "int"}

    def schema(self, overload: str) -> str:
        """The schema; states and parameters are written, each under an alias of its own."""
        arguments = []
        for k, role in enumerate(self.roles):
            alias = "" if k == 1 else f"({ascii_lowercase[k]}!)"
            absent = "?" if self.flat and self.may_lack(k) else ""
            arguments.append(f"Tensor{alias}{absent if self.flat else '[]'} {role}")
        kinds = ("SymInt", "float") if overload == "default" else ("Tensor", "Tensor")
        arguments += [f"{kinds[number != 'step']} {number}" for number in self.numbers]
        arguments += [f"{kind} {option}" for option, kind in self.options.items()]
        name = self.name if overload == "default" else f"{self.name}.{overload}"
        return f"{name}({', '.join(arguments)}) -> ()"

    def may_lack(self, role: int) -> bool:
        """Is it something that some groups lack?"""
        return role >= 2 and (self._is_part(role) or self.states[role - 2].asked_by is not None)

    def _is_part(self, role: int) -> bool:
        return self.states[role - 2] is MASTER or self.states[role - 2].of is not None

    def label(self, role: int, index: int) -> str:
        """How errors call a tensor."""
        return self.roles[role] if self.flat else f"{self.roles[role]}[{index}]"

    @cached_property
    def _pairs(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(own.name, own.parts) for own in self.rule.hyperparameters if own.parts]

    @cached_property
    def _asking(self) -> list[tuple[str, int | None]]:
        """Hyperparameters that the lists of states tell: which list of `roles` each asks for, if one."""
        roles = {state.asked_by: role for role, state in enumerate(self.rule.states, 2)}
        return [(own.name, roles.get(own.name)) for own in self.rule.hyperparameters if own.of_states]

    def group(self, numbers: dict[str, Any], options: dict[str, Any], roles: Sequence[Role]) -> dict[str, Any]:
        """What a rule checks: the group that an optimizer with these states would have."""
        group = {**STORAGE, **numbers, **options}
        for name, parts in self._pairs:
            group[name] = tuple([numbers[part] for part in parts])
        for name, role in self._asking:
            group[name] = role is not None and bool(roles[role])
        return group


OPERATORS = {own.name: own for rule in RULES.values() for own in (Operator(rule, False), Operator(rule, True))}


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
    (hyper,) = operator.rule.hypers([operator.group(given, settings, roles)], where=operator.name)
    states = _check_lengths(operator, roles, hyper[0].states)
    if not roles[0]:
        return
    kept, roles = _present(operator, roles)
    control = ONE if factor == 1 else torch.tensor([factor, 0.0], dtype=torch.float64, device=CPU)
    starts = any(state.fresh for state in states)
    rows_of = {t: row for row, t in enumerate(dict.fromkeys(counts))}
    rows = operator.rule.rows([hyper], [(0, t, starts and t == 1) for t in rows_of])
    row_of = [rows_of[t] for t in counts]
    stochastic = (hyper[0].storage.stochastic_params, hyper[0].storage.stochastic_states)
    backend = settings["backend"]
    if step_alike(operator.rule, states, stochastic, roles, backend, control, rows, row_of):
        return
    table = Lists(
        operator.rule, states, stochastic, lambda role, i: operator.label(kept[role], i), roles, backend, control
    )
    if len(rows_of) > 1:
        table.segments.moving[:, Moving.ROW] = torch.tensor([row_of[i] for i in table.order], device=CPU)
    plans, ready, *_ = backends.prepare(table)
    launches = plans if ready is None else [*plans, *ready(table, rows)]
    torch.autograd.graph.increment_version([t for role, own in enumerate(roles) if role != 1 for t in own])
    backends.launch(launches, rows)


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


def _check_lengths(operator: Operator, roles: Sequence[Role], needed: Sequence[State] | None) -> tuple[State, ...]:
    """The states that are there. Raises unless they are those that are needed; None: any that a rule may have."""
    n = len(roles[0])
    for k, own in enumerate(roles):
        state = operator.states[k - 2] if k >= 2 else None
        if state is MASTER or needed is None or (state is not None and state.of is not None):
            wanted = bool(own) or not operator.may_lack(k)
        else:
            wanted = state is None or state in needed
        if len(own) == (n if wanted else 0):
            continue
        name = operator.roles[k]
        asked_by = state.asked_by if state else None
        if state is not None and asked_by in operator.numbers and needed is not None:
            says = f"{asked_by} is not 0" if wanted else f"{asked_by} is 0, which keeps no {state.name}"
            allowed = "None" if operator.flat else "an empty list"
            raise ValueError(
                f"{name} in {operator.name} has {len(own)} tensors, and {says}: allowed are "
                f"{f'{n} tensors, zeros before the first step' if wanted else allowed}"
            )
        raise ValueError(f"{name} in {operator.name} has {len(own)} tensors: params has {n}, and each needs one")
    return tuple(state for state, own in zip(operator.states, roles[2:], strict=True) if own)


def _present(operator: Operator, roles: Sequence[Role]) -> tuple[list[int], list[Role]]:
    """The roles that are there: which, and their tensors. Raises if flat buffers are not flat."""
    kept = [k for k, own in enumerate(roles) if own]
    for k in kept if operator.flat else ():
        (t,) = roles[k]
        if isinstance(t, Tensor) and (t.dim() != 1 or not t.is_contiguous()):
            raise ValueError(
                f"{operator.roles[k]} in {operator.name} has shape {tuple(t.shape)} and strides {t.stride()}: allowed "
                "are contiguous tensors of one dimension"
            )
    return kept, [roles[k] for k in kept]


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
    states = _check_lengths(operator, roles, None)
    devices = dict.fromkeys(t.device for t in roles[0])
    if len(devices) > 1 and torch.device("meta") in devices:
        raise ValueError(
            f"{operator.roles[0]} in {operator.name} are on {[*map(str, devices)]}: on meta are all or none"
        )
    kept, roles = _present(operator, roles)
    examine(lambda role, i: operator.label(kept[role], i), states, roles, memory=False)


_library: Any = torch.library.Library(native.NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
for _operator in OPERATORS.values():
    for _overload in ("default", "tensor"):
        _library.define(_operator.schema(_overload), tags=(torch.Tag.pt2_compliant_tag,))
        _name = _operator.name if _overload == "default" else f"{_operator.name}.{_overload}"
        for _key in ("CPU", "CUDA", "XPU"):
            _library.impl(_name, partial(_real, _operator), _key)
        torch.library.register_fake(f"{native.NAMESPACE}::{_name}", partial(_fake, _operator), lib=_library)
