"""Cases, runs and comparisons that the tests share.

A case is a rule, its options and its dtypes. A run steps many parameters (sizes, layouts, gradients that lie oddly,
are missing or arrive late) under a schedule that moves lr and eta, and reloads the state half-way. What it returns is
compared by the bits: `torch.equal` takes -0 for 0. What takes a `device` builds the same numbers, lying in memory in
the same way, on any device, and returns copies on the CPU.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bits import assert_same as assert_same
from bits import assert_same_bits as assert_same_bits
from bits import bits as bits
from covering import covering
from torch import Tensor
from torch.optim import Optimizer

import wd_kernels
from wd_kernels import reference
from wd_kernels.formats import MASTER_NAME
from wd_kernels.layout import Moving
from wd_kernels.rules import DECAY_MODES
from wd_kernels.scales import STATES as STATE_OF

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
c64, c128 = torch.complex64, torch.complex128

Device = torch.device | str
CLASSES: dict[str, Callable[..., Any]] = {
    "adamw": wd_kernels.AdamW, "sgdw": wd_kernels.SGDW, "adagradw": wd_kernels.AdagradW,
}  # fmt: skip
LR = {"adamw": 0.02, "sgdw": 0.1, "adagradw": 0.1}

#: (parameter, gradient), every pair that is allowed.
DTYPES = (
    (f64, f64), (f32, f32), (bf16, bf16), (f16, f16), (c64, c64), (c128, c128),
    (f32, bf16), (f32, f16), (bf16, f32), (f16, f32),
)  # fmt: skip

#: (parameter, gradient, how they are stored): what is stored otherwise than by default.
STORED = (
    (f32, f32, "bf16-states"), (f32, f32, "int8"), (bf16, bf16, "split24-int8"), (f32, bf16, "bf16-states"),
    (bf16, bf16, "nearest"), (bf16, bf16, "bf16-states"),
    (bf16, bf16, "random-params"), (bf16, bf16, "split32"), (bf16, bf16, "copy"), (f16, f16, "copy"),
    (bf16, bf16, "split24-random"), (bf16, bf16, "random"),
)  # fmt: skip
STORAGE: dict[str, dict[str, Any]] = {
    "bf16-states": {"state_dtype": "bfloat16", "seed": 3},
    "nearest": {"state_dtype": "param", "stochastic_rounding": False},
    "random-params": {"stochastic_rounding": True, "seed": 2**53 - 1},
    "split32": {"master_weights": "split32"},
    "split24-random": {"master_weights": "split24", "state_dtype": "param", "stochastic_rounding": True, "seed": 8},
    "copy": {"master_weights": "float32"},
    "int8": {"state_dtype": "int8", "seed": 5},
    "split24-int8": {"master_weights": "split24", "state_dtype": "int8", "seed": 2**40},
    "random": {"state_dtype": "param", "stochastic_rounding": True, "seed": 2**32 + 5},
}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {
        "plain": {"betas": (0.9, 0.95)},
        "amsgrad": {"amsgrad": True, "betas": (0.7, 0.6)},
        "far-end": {"betas": (0.4, 0.2), "eps": 1e-3},  # 1 - beta >= 1/2: lerp starts from y
        "half": {"betas": (0.5, 0.5), "amsgrad": True, "maximize": True, "max_grad_value": 0.75},
    },
    "sgdw": {
        "no-momentum": {"dampening": 0.4},
        "momentum": {"momentum": 0.9, "maximize": True},
        "dampening": {"momentum": 0.8, "dampening": 0.3, "max_grad_value": 0.6},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "paper": {"momentum": 0.9, "form": "paper"},
        "paper-no-momentum": {"form": "paper", "maximize": True, "max_grad_value": 0.9},
    },
    "adagradw": {
        "plain": {"maximize": True},
        "slowed": {"lr_decay": 0.3, "max_grad_value": 1.1},
        "begun": {"initial_accumulator_value": 0.7, "eps": 1e-3, "lr_decay": 0.1},
    },
}

#: What a decay pulls to, and where: options of any rule.
PULLS: dict[str, dict[str, Any]] = {
    "center": {"decay_center": 0.75},
    "cautious": {"cautious": True},
    "cautious-center": {"decay_center": -0.5, "cautious": True},
    "to": {"decay_to": "initial"},
    "cautious-to": {"decay_to": "initial", "cautious": True},
}
#: The decay modes that may be cautious.
SUBTRACTED = ("lr_scaled", "independent", "corrected")


def snapshot(params: Iterable[Tensor], opt: Optimizer) -> dict[str, Tensor]:
    """Copies of all parameters and states, on the CPU."""
    result = {}
    for i, p in enumerate(params):
        result[f"{i}"] = p.detach().to("cpu", copy=True)
        for name, value in sorted(opt.state.get(p, {}).items()):
            result[f"{i} {name}"] = value.detach().to("cpu", copy=True)
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
#: Fewer and smaller ones, for Triton's interpreter: sizes about its blocks (512, 1024) and chunks (1024).
SMALL = (
    Piece((31,)), Piece((0,)), Piece((1,)), Piece(()), Piece((513,)), Piece((1025,)), Piece((2051,)),
    Piece((2, 3, 4, 5), "channels_last", "channels_last"), Piece((31, 7), "transposed"),
    Piece((12, 9), grad="expanded"), Piece((1030,), grad="offset"), Piece((9, 11), "gaps", "sliced"),
    Piece((29,), grad="conjugate"), Piece((5, 6), "transposed", "negative"),
)  # fmt: skip
#: At, before and after the ends of blocks and chunks, aligned and not.
EDGES = tuple(
    Piece((n,), layout)
    for n, layout in itertools.product((511, 512, 1023, 1024, 1025, 2048, 2049, 3584), ("contiguous", "offset"))
)
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
        shape = (*values.shape[:-1], 2 * values.shape[-1])
        room = torch.full(shape, math.nan, dtype=values.dtype, device=values.device)
        return room[..., ::2].copy_(values)
    if layout == "offset":
        return values.new_empty(values.numel() + 1)[1:].view(values.shape).copy_(values)
    if layout == "expanded":
        return values[..., :1].contiguous().expand(values.shape)
    if layout == "conjugate" and values.is_complex():
        return values.conj()
    return torch._neg_view(values)


def make_params(
    pieces: Sequence[Piece], dtype: torch.dtype, grad_dtype: torch.dtype, seed: int = 0, device: Device = "cpu"
) -> list[Tensor]:
    """A leaf for each piece, with values of its own; gradients of `grad_dtype` may be assigned."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for piece in pieces:
        values = torch.randn(piece.shape, generator=generator, dtype=_drawn(dtype)).to(dtype)
        p = torch.nn.Parameter(arrange(values.to(device), piece.layout))
        p.grad_dtype = grad_dtype
        params.append(p)
    return params


def gradient(piece: Piece, dtype: torch.dtype, seed: int, device: Device = "cpu") -> Tensor:
    """The gradient of a piece, of a magnitude that varies by orders from element to element."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(piece.shape, generator=generator, dtype=_drawn(dtype))
    values = values * torch.randn(piece.shape, generator=generator).abs().square()
    return arrange(values.to(dtype).to(device), piece.grad)


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
    rules: Iterable[str] = tuple(VARIANTS),
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


def covering_cases(
    decays: Sequence[str] = DECAY_MODES,
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]] = ((f32, f32),),
    **others: Sequence[Any],
) -> list[tuple[Any, ...]]:
    """(case, values of the others): of each rule, every two of variants, decay modes, dtypes and others meet."""
    found: list[tuple[Any, ...]] = []
    for rule in VARIANTS:
        for own in covering({"name": list(VARIANTS[rule]), "decay": decays, "dtypes": dtypes, **others}):
            (case,) = cases([own["dtypes"]], [rule], [own["name"]], [own["decay"]])
            found.append((case, *(own[name] for name in others)))
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
    device: Device = "cpu",
) -> dict[str, Tensor]:
    """All parameters and states after `steps` steps; piece k is in group k % groups with decays[k % len(decays)].

    order: the order in which the pieces are given to the optimizer. prepare: called with each new optimizer.
    """
    params = make_params(pieces, case.dtype, case.grad_dtype, seed, device)
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
            p.grad = gradient(piece, case.grad_dtype, 1000 * step + k, device) if has_gradient(k, step) else None
        opt.step()
        if step == steps // 2:
            opt = reload(opt, make)
    return snapshot(params, opt)


# Kernel bodies; runs on chosen addresses, numbers and controls --------------------------------------------------------

REAL = tuple(d for d in DTYPES if not d[0].is_complex)
#: One case for each kernel body: rule with and without its optional state, and a decay mode that uses much of a row.
BODIES = [
    *cases(rules=["adamw"], names=["plain", "amsgrad"], decays=["metric_proximal"]),
    *cases(rules=["sgdw"], names=["no-momentum", "nesterov"], decays=["independent"]),
    *cases(rules=["adagradw"], names=["begun"], decays=["metric_proximal"]),
]
STATES = {
    ("adamw", False): ("exp_avg", "exp_avg_sq"),
    ("adamw", True): ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ("sgdw", False): (),
    ("sgdw", True): ("momentum_buffer",),
    ("adagradw", False): ("sum",),
}
GUARD = 24  # elements before and after
CANARY = {1: 0x5A, 2: 0x5AC3, 4: 0x5AC35AC3, 8: 0x5AC35AC35AC35AC3}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def with_dtypes(found: Iterable[Case], dtypes: Iterable[tuple[torch.dtype, torch.dtype]]) -> list[Case]:
    return [Case(c.rule, c.name, c.options, p, g) for c, (p, g) in itertools.product(found, dtypes)]


def states_of(case: Case) -> tuple[str, ...]:
    return STATES[case.rule, bool(case.options.get("amsgrad") or case.options.get("momentum"))]


def state_dtype(case: Case) -> torch.dtype:
    """What a case has its states in; those in 8 bits that are never negative are uint8."""
    word = case.options.get("state_dtype")
    if word is not None:
        return torch.int8 if word == "int8" else bf16
    return f64 if case.dtype == f64 else f32


def scales_of(case: Case) -> dict[str, str]:
    """The scales of a case's states in 8 bits, by their names: the names of the states."""
    return {f"{name}_scale": name for name in states_of(case)} if state_dtype(case) == torch.int8 else {}


def stored_states(case: Case, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """States of a case and their scales, from what they are to be."""
    dtype, found = state_dtype(case), dict[str, Tensor]()
    for name, value in values.items():
        if dtype == torch.int8:
            own = torch.int8 if STATE_OF[name].signed else torch.uint8
            found[name], found[f"{name}_scale"] = torch.empty(value.shape, dtype=own), empty_scale(value)
            reference.store(found[name], value.to(f32), None, found[f"{name}_scale"])
        else:
            found[name] = value.to(dtype)
    return found


def empty_scale(value: Tensor) -> Tensor:
    return torch.empty(-(-value.numel() // 32), dtype=torch.uint8)


def masters_of(case: Case) -> dict[str, torch.dtype]:
    """What a case has beside its parameters as master weights, by name."""
    word = case.options.get("master_weights")
    return {} if word is None else {MASTER_NAME: {"float32": f32, "split32": torch.int16, "split24": torch.int8}[word]}


def guarded(values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """(a buffer of canaries, a view in it that holds `values`, `offset` elements off a 64-byte boundary)."""
    size, n = values.element_size(), values.numel()
    buffer = torch.full((n + 2 * GUARD + 64,), CANARY[size], dtype=INTEGERS[size], device=values.device)
    first = GUARD + (-(buffer.data_ptr() // size + GUARD)) % (64 // size) + offset
    view = buffer.view(values.dtype)[first : first + n]
    assert n == 0 or view.data_ptr() % 64 == offset * size
    return buffer, view.copy_(values)


def assert_canaries(buffer: Tensor, view: Tensor, what: str) -> None:
    first = (view.data_ptr() - buffer.data_ptr()) // buffer.element_size() if view.numel() else 0
    outside = torch.cat([buffer[:first], buffer[first + view.numel() :]])
    assert bool((outside == CANARY[buffer.element_size()]).all()), f"{what}: written outside of it"


def placed_run(
    case: Case, backend: str, offset: int, sizes: Sequence[int], device: Device = "cpu"
) -> tuple[dict[str, Tensor], set[int]]:
    """(result, the alignment flags of the segments) of tensors of which none, each role in turn, or all lie `offset`
    elements off a 64-byte boundary. Nothing outside of a tensor is written, nor a gradient, and no tensor is replaced.
    """
    masters = masters_of(case)
    names = (*states_of(case), *masters, *scales_of(case))
    roles = ("param", "grad", *names)
    params, placed, unchanged = [], [], []
    for k, (moved, n) in enumerate(itertools.product(("none", *roles, "all"), sizes)):
        generator = torch.Generator().manual_seed(n + 1000 * k)
        values = {
            "param": torch.randn(n, generator=generator).to(case.dtype),
            **stored_states(case, {name: torch.rand(n, generator=generator) for name in states_of(case)}),
            **{name: (torch.randn(n, generator=generator) * 40).to(dtype) for name, dtype in masters.items()},
            "grad": gradient(Piece((n,)), case.grad_dtype, n + k),
        }
        own = {role: guarded(v.to(device), offset if moved in (role, "all") else 0) for role, v in values.items()}
        p = torch.nn.Parameter(own["param"][1])
        p.grad_dtype = case.grad_dtype
        p.grad = own["grad"][1]
        params.append(p)
        placed.append((f"{n} elements, {moved} at {offset}", own))
        unchanged.append(own["grad"][0].clone())
    groups = [{"params": params[::2], "weight_decay": 0.2}, {"params": params[1::2], "weight_decay": 0.05}]
    opt = optimizer(case, groups, backend)
    for p, (_, own) in zip(params, placed, strict=True):
        opt.state[p] = {"step": torch.tensor(3.0), **{name: own[name][1] for name in names}}
    for step in range(3):
        for g, group in enumerate(opt.param_groups):
            group["lr"] = 0.03 / (step + g + 1)
        opt.step()
    for p, (what, own), grad in zip(params, placed, unchanged, strict=True):
        assert p.data_ptr() == own["param"][1].data_ptr()
        assert all(opt.state[p][name] is own[name][1] for name in names)
        assert torch.equal(own["grad"][0], grad)
        for role, (buffer, view) in own.items():
            assert_canaries(buffer, view, f"{role}, {what}, {backend}")
        assert float(opt.state[p]["step"]) == 6
    flags = set(opt._table.segments.moving[:, Moving.ALIGNED].tolist())
    return snapshot(params, opt), flags


def peculiar(dtype: torch.dtype) -> Tensor:
    """Zeros of both signs, subnormals, the ends of the range, infinities, NaN, and ordinary numbers between them."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    found = [0.0, 1.0, 1.5, info.eps, least, 3 * least, info.tiny - least, info.tiny, info.max, info.max / 2]
    found += [math.sqrt(info.max), math.sqrt(info.tiny), 1e-3, 7.0, math.inf]
    values = torch.tensor(found, dtype=f64)
    return torch.cat([values, -values, torch.tensor([math.nan], dtype=f64)]).to(dtype)


def peculiar_run(case: Case, backend: str, flush: bool = False, device: Device = "cpu") -> dict[str, Tensor]:
    """Every peculiar parameter with every peculiar gradient, from states that are peculiar too."""
    theta, grad = peculiar(case.dtype), peculiar(case.grad_dtype)
    p = torch.nn.Parameter(theta.repeat_interleave(grad.numel()).to(device))
    grad = grad.repeat(theta.numel()).to(device)
    p.grad_dtype = case.grad_dtype
    n = p.numel()
    opt = optimizer(case, [p], backend, weight_decay=0.3, lr=0.5)
    states = {}
    for k, name in enumerate(states_of(case)):
        drawn = peculiar(f32 if scales_of(case) else state_dtype(case)).repeat(n)[k : n * (k + 3) : k + 3]
        states[name] = (drawn if STATE_OF[name].signed else drawn.abs()).clone()
        assert states[name].numel() == n
    stored = {name: value.to(device) for name, value in stored_states(case, states).items()}
    opt.state[p] = {"step": torch.tensor(1.0), **stored}
    grads = [grad, (grad / 2).roll(5)]
    torch.set_flush_denormal(flush)
    for step in range(3):
        opt.param_groups[0]["lr"] = 0.5 / (step + 1)
        p.grad = grads[step % 2]
        opt.step()
    torch.set_flush_denormal(False)
    return snapshot([p], opt)


def controlled(
    case: Case, backend: str, control: Sequence[tuple[float, float]], scale: float = 1.0,
    pieces: Sequence[Piece] = (Piece((33,)), Piece((5, 7), "transposed"), Piece((40_000,))), device: Device = "cpu",
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Snapshots after every step of a run with the given (grad_factor, skip) of each step."""
    params = make_params(pieces, case.dtype, case.grad_dtype, device=device)
    opt = optimizer(case, params, backend, weight_decay=0.1)
    found = []
    for step, pair in enumerate(control):
        opt.param_groups[0]["lr"] = 0.02 * (step + 1)
        opt._table.control.copy_(torch.tensor(pair, dtype=f64))
        for k, (p, piece) in enumerate(zip(params, pieces, strict=True)):
            p.grad = gradient(piece, case.grad_dtype, 10 * step + k, device) * scale
        opt.step()
        found.append(snapshot(params, opt))
    return found


def frozen_run(case: Case, backend: str, device: Device = "cpu") -> dict[str, Tensor]:
    """A group of lr 0 beside one that moves. Its weights keep even the payload of a NaN; its moments advance."""
    payload = {2: 0x7FC5, 4: 0x7FC12345, 8: 0x7FF8000000012345}
    params = make_params([Piece((1100,)), Piece((1100,))], case.dtype, case.grad_dtype, device=device)
    raw = [p.detach().view(INTEGERS[p.element_size()]) for p in params]
    raw[0][5] = payload[params[0].element_size()]
    start = raw[0].clone()
    opt = optimizer(case, [{"params": [params[0]], "lr": 0.0}, {"params": [params[1]]}], backend, weight_decay=0.2)
    for step in range(3):
        for k, p in enumerate(params):
            p.grad = gradient(Piece((1100,)), case.grad_dtype, 10 * step + k, device)
        before = raw[1].clone()
        opt.step()
        assert torch.equal(raw[0], start)
        assert not torch.equal(raw[1], before)
    if case.options.get("form") != "paper":  # whose buffer has the lr inside
        others = slice(32, None) if scales_of(case) else slice(5)  # a NaN spoils the tile that it is in
        assert all(bool(opt.state[params[0]][name][others].any()) for name in states_of(case))
    return snapshot(params, opt)


def rounding_run(dtype: torch.dtype, backend: str, device: Device = "cpu") -> dict[str, Tensor]:
    """Every number of a 16-bit dtype, moved by less than, just and more than half of its last place; then decayed."""
    theta = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    magnitude = theta.view(torch.int16) & 0x7FFF
    ulp = ((magnitude + 1).view(dtype).float() - magnitude.view(dtype).float()).nan_to_num(0, 0, 0)
    part = torch.tensor([0.5, 0.5 - 2**-10, 0.5 + 2**-10, 1.5, -0.5, -1.5, 0.0]).repeat(2**16 // 7 + 1)[: 2**16]
    p = torch.nn.Parameter(theta.to(device, copy=True))
    p.grad_dtype = f32
    opt = CLASSES["sgdw"]([p], lr=1.0, backend=backend)
    found = {}
    for decay in (0.0, 2**-9):
        opt.param_groups[0]["weight_decay"] = decay
        p.grad = (ulp * part).to(device)
        opt.step()
        found[f"{decay}"] = p.detach().to("cpu", copy=True)
    moved = (found["0.0"] != theta) & ~theta.isnan()
    assert 0.3 < float(moved.float().mean()) < 0.9
    return found


def ids(value: Any) -> str:
    """For pytest.mark.parametrize(..., ids=ids)."""
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def covered(indirect: Sequence[str] = (), **options: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by options, of which every two values meet; those in `indirect` are fixtures."""
    rows = [tuple(case.values()) for case in covering(options)]
    return pytest.mark.parametrize(tuple(options), rows, indirect=list(indirect), ids=ids)
