"""Cases, runs and comparisons that the tests share.

A case is a rule, its options and its dtypes. A run steps many parameters (sizes, layouts, gradients that lie oddly,
are missing or arrive late) under a schedule that moves lr and eta, and reloads the state half-way. What it returns is
compared by the bits: `torch.equal` takes -0 for 0.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import wd_kernels
from wd_kernels.rules import DECAY_MODES

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
c64, c128 = torch.complex64, torch.complex128

CLASSES: dict[str, Callable[..., Any]] = {"adamw": wd_kernels.AdamW, "sgdw": wd_kernels.SGDW}
LR = {"adamw": 0.02, "sgdw": 0.1}

#: (parameter, gradient), every pair that is allowed.
DTYPES = (
    (f64, f64), (f32, f32), (bf16, bf16), (f16, f16), (c64, c64), (c128, c128),
    (f32, bf16), (f32, f16), (bf16, f32), (f16, f32),
)  # fmt: skip

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {
        "plain": {"betas": (0.9, 0.95)},
        "amsgrad": {"amsgrad": True, "betas": (0.7, 0.6)},
        "far-end": {"betas": (0.4, 0.2), "eps": 1e-3},  # 1 - beta >= 1/2: lerp starts from y
        "half": {"betas": (0.5, 0.5), "amsgrad": True, "maximize": True},
    },
    "sgdw": {
        "no-momentum": {"dampening": 0.4},
        "momentum": {"momentum": 0.9, "maximize": True},
        "dampening": {"momentum": 0.8, "dampening": 0.3},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "paper": {"momentum": 0.9, "form": "paper"},
        "paper-no-momentum": {"form": "paper", "maximize": True},
    },
}


# The bits -------------------------------------------------------------------------------------------------------------


def bits(t: Tensor) -> Tensor:
    """The elements' bits as integers; any NaN of 4 or 8 bytes as the same number, a NaN of 2 bytes as it is."""
    t = t.detach()
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    t = t.resolve_neg().contiguous()
    raw = t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
    return raw if t.element_size() == 2 else raw.masked_fill(t.isnan(), -1)


def assert_same_bits(a: Tensor, b: Tensor, what: str = "") -> None:
    """Fails unless two tensors have one shape, one dtype and the same bits."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"{what}: dtypes {a.dtype} and {b.dtype}"
    differ = (bits(a) != bits(b)).flatten()
    if bool(differ.any()):
        real = [(torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach()) for t in (a, b)]
        at = int(differ.nonzero()[0])
        x, y = (t.resolve_neg().flatten()[at].item() for t in real)
        raise AssertionError(f"{what}: {int(differ.sum())} of {differ.numel()} differ, first at {at}: {x!r} and {y!r}")


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Fails unless two results of `run` or `snapshot` are the same to the bit."""
    assert list(a) == list(b)
    for name in a:
        assert_same_bits(a[name], b[name], name)


def snapshot(params: Iterable[Tensor], opt: Optimizer) -> dict[str, Tensor]:
    """Copies of all parameters and states."""
    result = {}
    for i, p in enumerate(params):
        result[f"{i}"] = p.detach().clone()
        for name, value in sorted(opt.state.get(p, {}).items()):
            result[f"{i} {name}"] = value.detach().clone()
    return result


# Parameters and how they lie ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One parameter of a run: its shape, how it lies in memory, and how its gradient does."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    grad: str = "contiguous"


PIECES = (
    Piece((31,)), Piece((0,)), Piece((1,)), Piece(()), Piece((33,)), Piece((1023,)), Piece((1025,)),
    Piece((2, 3, 4, 5), "channels_last", "channels_last"), Piece((2, 5, 3, 3), "channels_last"),
    Piece((13, 7), "transposed", "transposed"), Piece((13, 7), "transposed"), Piece((17, 5), grad="transposed"),
    Piece((12, 9), grad="expanded"), Piece((40, 3), grad="sliced"), Piece((31,), grad="offset"),
    Piece((33,), "offset"), Piece((33,), "offset", "offset"), Piece((3, 0, 2), "transposed"),
    Piece((9, 11), "gaps"), Piece((9, 11), "gaps", "transposed"), Piece((65,), "gaps", "expanded"),
    Piece((29,), grad="conjugate"), Piece((1,), grad="negative"), Piece((5, 6), "transposed", "negative"),
)  # fmt: skip
BIG = (Piece((5,)), Piece((2**20 + 3,)), Piece((0,)), Piece((1023,)))


def arrange(values: Tensor, layout: str) -> Tensor:
    """The values of a fresh tensor, lying in memory as `layout` says. "expanded" repeats the first of the last row."""
    if layout == "contiguous":
        return values
    if layout == "channels_last":
        return values.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout in ("gaps", "sliced"):
        room = torch.full((*values.shape[:-1], 2 * values.shape[-1]), math.nan, dtype=values.dtype)
        return room[..., ::2].copy_(values)
    if layout == "offset":
        return torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(values.shape).copy_(values)
    if layout == "expanded":
        return values[..., :1].contiguous().expand(values.shape)
    if layout == "conjugate" and values.is_complex():
        return values.conj()
    return torch._neg_view(values)


def make_params(pieces: Sequence[Piece], dtype: torch.dtype, grad_dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """A leaf for each piece, with values of its own; gradients of `grad_dtype` may be assigned."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for piece in pieces:
        values = torch.randn(piece.shape, generator=generator, dtype=_drawn(dtype)).to(dtype)
        p = torch.nn.Parameter(arrange(values, piece.layout))
        p.grad_dtype = grad_dtype
        params.append(p)
    return params


def gradient(piece: Piece, dtype: torch.dtype, seed: int) -> Tensor:
    """The gradient of a piece, of a magnitude that varies by orders from element to element."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(piece.shape, generator=generator, dtype=_drawn(dtype))
    values = values * torch.randn(piece.shape, generator=generator).abs().square()
    return arrange(values.to(dtype), piece.grad)


def _drawn(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (f64, c64, c128) else f32


# Cases and runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A rule, its options, and the dtypes of parameter and gradient."""

    rule: str
    name: str
    options: Mapping[str, Any] = field(hash=False)
    dtype: torch.dtype = f32
    grad_dtype: torch.dtype = f32

    def __str__(self) -> str:
        dtypes = dict.fromkeys([self.dtype, self.grad_dtype])
        return "-".join([self.rule, self.name, *(str(d).removeprefix("torch.") for d in dtypes)])


def cases(
    dtypes: Iterable[tuple[torch.dtype, torch.dtype]] = ((f32, f32),),
    rules: Iterable[str] = ("adamw", "sgdw"),
    names: Iterable[str] | None = None,
    decays: Iterable[str] = DECAY_MODES,
    flip: Iterable[bool] = (False,),
) -> list[Case]:
    """Every variant of the rules (or those of `names`), with every decay mode and dtype; `flip` flips maximize."""
    found = []
    for rule in rules:
        for (name, options), decay, flipped, (p, g) in itertools.product(VARIANTS[rule].items(), decays, flip, dtypes):
            if names is None or name in names:
                maximize = bool(options.get("maximize")) != flipped
                found.append(
                    Case(
                        rule,
                        f"{name}-{decay}" + ("-flipped" if flipped else ""),
                        {**options, "decay": decay, "maximize": maximize},
                        p,
                        g,
                    )
                )
    return found


def schedule(rule: str, step: int) -> tuple[float, float]:
    """(lr, eta) of a step: both move every step, and the seventh step is frozen by lr 0."""
    return (0.0 if step == 6 else LR[rule] * (1 + 0.5 * math.cos(step))), 1 - 0.03 * step


def has_gradient(k: int, step: int) -> bool:
    """Piece k misses some steps; every seventh piece has its first gradient late."""
    return (k + step) % 5 != 4 and not (k % 7 == 4 and step < 3)


def optimizer(case: Case, params: Sequence[Any], backend: str, **more: Any) -> Any:
    """The optimizer of a case."""
    return CLASSES[case.rule](params, **{"lr": LR[case.rule], **case.options, "backend": backend, **more})


def reload(opt: Any, make: Callable[[], Any]) -> Any:
    """A new optimizer that has loaded the state of `opt`."""
    fresh = make()
    with warnings.catch_warnings():  # what torch could not do with this state is not at issue
        warnings.filterwarnings("ignore", message=".*does not know.*")
        fresh.load_state_dict(opt.state_dict())
    return fresh


def run(
    case: Case,
    backend: str,
    *,
    pieces: Sequence[Piece] = PIECES,
    steps: int = 10,
    seed: int = 0,
    order: Sequence[int] | None = None,
    groups: int = 2,
    decays: Sequence[float] = (0.1, 0.03),
    prepare: Callable[[Any], None] = lambda opt: None,
) -> dict[str, Tensor]:
    """All parameters and states after `steps` steps; piece k is in group k % groups with decays[k % len(decays)].

    order: the order in which the pieces are given to the optimizer. prepare: called with each new optimizer.
    """
    params = make_params(pieces, case.dtype, case.grad_dtype, seed)
    members = [[k for k in order or range(len(pieces)) if k % groups == g] for g in range(groups)]

    def make() -> Any:
        own = [{"params": [params[k] for k in ks], "weight_decay": decays[g % len(decays)]} for g, ks in
               enumerate(members)]  # fmt: skip
        opt = optimizer(case, own, backend)
        prepare(opt)
        return opt

    opt = make()
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"], group["eta"] = schedule(case.rule, step)
        for k, (p, piece) in enumerate(zip(params, pieces, strict=True)):
            p.grad = gradient(piece, case.grad_dtype, 1000 * step + k) if has_gradient(k, step) else None
        opt.step()
        if step == steps // 2:
            opt = reload(opt, make)
    return snapshot(params, opt)


def ids(case: Any) -> str:
    """For pytest.mark.parametrize(..., ids=ids)."""
    return str(case)
