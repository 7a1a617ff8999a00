"""Who brings their own state: the optimizers' cases through the functional API and its operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bits import assert_same_bits
from cases import (
    PIECES,
    SMALL,
    Case,
    Piece,
    f32,
    f64,
    gradient,
    has_gradient,
    make_params,
    optimizer,
    schedule,
    snapshot,
    states_of,
)
from torch import Tensor

from wd_kernels import functional, native
from wd_kernels.formats import full_state_dtype
from wd_kernels.torch_ops import OPERATORS

LISTS: dict[str, Callable[..., None]] = {
    "adamw": functional.adamw_, "sgdw": functional.sgdw_, "adagradw": functional.adagradw_,
}  # fmt: skip
FLAT: dict[str, Callable[..., None]] = {
    "adamw": functional.adamw_flat_, "sgdw": functional.sgdw_flat_, "adagradw": functional.adagradw_flat_,
}  # fmt: skip
DENSE = tuple(piece for piece in PIECES if piece.layout != "gaps")
FEW = tuple(piece for piece in SMALL if piece.layout != "gaps")


def options_of(case: Case) -> dict[str, Any]:
    """The case's options as a function takes them: what is of the states is where they are."""
    return {k: value for k, value in case.options.items() if k not in ("amsgrad", "initial_accumulator_value")}


def first_state(p: Tensor, case: Case) -> Tensor:
    """A state as it begins: of a complex parameter, both parts of it."""
    value = case.options.get("initial_accumulator_value", 0.0)
    return torch.full_like(p, complex(value, value) if p.is_complex() else value, dtype=full_state_dtype(p.dtype))


@dataclass
class Caller:
    """Who keeps the parameters, the states and the counts."""

    case: Case
    params: list[Tensor]
    counts: list[int] = field(init=False)
    states: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.params)
        self.states = [[first_state(p.detach(), self.case) for p in self.params] for _ in states_of(self.case)]

    def step(self, grads: Sequence[Tensor | None], backend: str, apart: bool = False, **more: Any) -> None:
        """Steps what has a gradient: in one call, or apart: in one for each pair of dtypes."""
        which: dict[Any, list[int]] = {}
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is not None:
                which.setdefault((p.dtype, g.dtype) if apart else None, []).append(i)
                self.counts[i] += 1
        for own in which.values():
            roles = [[role[i] for i in own] for role in (self.params, grads, *self.states)]
            counts = [self.counts[i] for i in own]
            same = len(set(counts)) == 1
            step = counts[0] if same else torch.tensor(counts, dtype=(torch.int64, f32)[counts[0] % 2])
            LISTS[self.case.rule](*roles, step=step, backend=backend, **{**options_of(self.case), **more})

    def result(self) -> dict[str, Tensor]:
        """As `snapshot` gives it."""
        found = {}
        for i, p in enumerate(self.params):
            found[f"{i}"] = p.detach().clone()
            own = {name: role[i].clone() for name, role in zip(states_of(self.case), self.states, strict=True)}
            own["step"] = torch.tensor(float(self.counts[i]))
            found.update({f"{i} {name}": own[name] for name in sorted(own)} if self.counts[i] else {})
        return found


def make(case: Case, pieces: Sequence[Piece], dtypes: Sequence[Any], seed: int = 0) -> list[Tensor]:
    """Parameters of every piece in every pair of dtypes, mixed."""
    by_dtype = [make_params(pieces, p, g, seed + k) for k, (p, g) in enumerate(dtypes)]
    return list(itertools.chain(*zip(*by_dtype, strict=True)))


def gradients(pieces: Sequence[Piece], dtypes: Sequence[Any], step: int) -> list[Tensor | None]:
    return [
        gradient(piece, g, 1000 * step + 10 * k + i) if has_gradient(k + i, step) else None
        for k, piece in enumerate(pieces)
        for i, (_, g) in enumerate(dtypes)
    ]


def expected_run(case: Case, pieces: Sequence[Piece], dtypes: Sequence[Any], steps: int) -> dict[str, Tensor]:
    """What the optimizer class gives, on the reference."""
    params = make(case, pieces, dtypes)
    opt = optimizer(case, params, "reference", weight_decay=0.1)
    for step in range(steps):
        opt.param_groups[0]["lr"], opt.param_groups[0]["eta"] = schedule(case.rule, step)
        for p, g in zip(params, gradients(pieces, dtypes, step), strict=True):
            p.grad = g
        opt.step()
    return snapshot(params, opt)


def functional_run(
    case: Case, backend: str, pieces: Sequence[Piece], dtypes: Sequence[Any], steps: int, apart: bool = False
) -> dict[str, Tensor]:
    caller = Caller(case, make(case, pieces, dtypes))
    for step in range(steps):
        lr, eta = schedule(case.rule, step)
        grads = gradients(pieces, dtypes, step)
        copies = [g if g is None else g.clone() for g in grads]
        caller.step(grads, backend, apart, lr=lr, eta=eta, weight_decay=0.1)
        for g, copy in zip(grads, copies, strict=True):
            if g is not None and copy is not None:
                assert_same_bits(g, copy, "a gradient")
    return caller.result()


def operator(rule: str, overload: str, flat: bool = False) -> Any:
    return getattr(getattr(native.OPS, f"{rule}_flat_" if flat else f"{rule}_"), overload)


def call_of(case: Case, roles: Sequence[Any], step: Any, overload: str = "default", flat: bool = False,
            **changed: Any) -> list[Any]:  # fmt: skip
    """The arguments of an operator, from the roles that are there and from options by name."""
    known = OPERATORS[f"{case.rule}_flat_" if flat else f"{case.rule}_"]
    tensors = [role[0] for role in roles] if flat else [list(role) for role in roles]
    tensors += [None if flat else []] * (len(known.roles) - len(tensors))
    given = {"eps": 1e-8, "lr_decay": 0.0, "weight_decay": 0.1, "lr": 0.05, "eta": 1.0, "grad_factor": 1.0,
             "max_grad_value": math.inf,
             "momentum": 0.0, "dampening": 0.0, "nesterov": False, "form": "torch", "backend": "auto",
            "stochastic_rounding": "states", "seed": 0,
             "step": step}  # fmt: skip
    given |= {**options_of(case), **changed}
    if case.rule == "adamw":
        given["beta1"], given["beta2"] = given["betas"]
    numbers = [given[name] for name in known.numbers]
    if overload == "tensor":
        numbers = [torch.as_tensor(number, dtype=f64) for number in numbers]
    return [*tensors, *numbers, *(given[name] for name in known.options)]


def small(case: Case, n: int = 3) -> Caller:
    return Caller(case, [p.detach() for p in make_params([Piece((7 + k, 3)) for k in range(n)], f32, f32)])
