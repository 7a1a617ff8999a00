"""Master weights: what lies beside 16-bit parameters, how it is written, saved, loaded, and what it is for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import (
    CLASSES,
    Case,
    Piece,
    assert_same,
    bf16,
    f16,
    f32,
    f64,
    gradient,
    make_params,
    masters_of,
    peculiar_run,
    snapshot,
)
from torch import Tensor, nn

import wd_kernels
from wd_kernels import functional, reference
from wd_kernels.formats import MASTER_NAME
from wd_kernels.reference import Draws

ROOT = Path(__file__).parent.parent
PARTS = {"float32": f32, "split32": torch.int16, "split24": torch.int8}
MORE: dict[str, dict[str, Any]] = {"adamw": {"amsgrad": True}, "sgdw": {"momentum": 0.9}, "adagradw": {}}


# How they are stored --------------------------------------------------------------------------------------------------


def numbers() -> Tensor:
    """Float32 numbers by their bits: all upper halves with lower ones at and about every rounding, and any."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    ends = (0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x180, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFF80, 0xFFFF)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (2**20,), generator=generator)
    return torch.cat([(high[:, None] | torch.tensor(ends, dtype=torch.int32)).flatten(), drawn.int()]).view(f32)


def stored(values: Tensor, part: torch.dtype, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
    memory, beside = torch.empty_like(values, dtype=bf16), torch.empty_like(values, dtype=part)
    reference.store(memory, values, draws, beside)
    return memory, beside


def test_split32_is_a_float32() -> None:
    values = numbers()
    memory, remainder = stored(values, torch.int16)
    assert_same_bits(reference.load(memory, f32, remainder), values)  # any NaN equals any
    # The parameter is the nearest bfloat16; half-way, the one that is further from 0.
    ties = (values.view(torch.int32) & 0xFFFF) == 0x8000
    near = ~ties & ~values.isnan()
    assert_same_bits(memory[near], values[near].bfloat16())
    below = (values.view(torch.int32) >> 16).short().view(bf16)
    finite = ties & ~values.isnan()
    assert_same_bits(memory[finite], (below.view(torch.int16) + 1).view(bf16)[finite])
    # The layout of TransformerEngine and Megatron: the master's lower 16 bits, and the upper ones, rounded by them.
    whole = ~values.isnan()
    assert torch.equal(remainder[whole], values.view(torch.int32)[whole].short())


def test_split24_is_the_nearest_of_24_bits() -> None:
    values = numbers()
    memory, remainder = stored(values, torch.int8)
    found = reference.load(memory, f32, remainder)
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    lower, lost = bits & ~0xFF, bits & 0xFF
    up = (lost > 0x80) | ((lost == 0x80) & ((bits >> 8) & 1 == 1))
    expected = torch.where(up, lower + 0x100, lower)
    expected = torch.where(expected >= 2**31, expected - 2**32, expected).int().view(f32)
    expected = torch.where(values.isnan(), torch.nan, expected)
    assert_same_bits(found, expected)
    again = stored(found, torch.int8)
    assert_same_bits(reference.load(*[again[0], f32, again[1]]), found)


def test_split24_is_rounded_without_bias() -> None:
    values = torch.randn(10**6, generator=torch.Generator().manual_seed(1))
    exact = values.view(torch.int32) & 0xFF == 0
    found = reference.load((pair := stored(values, torch.int8, Draws(3, 1, 0)))[0], f32, pair[1])
    ulp = torch.ldexp(torch.ones(values.shape, dtype=f64), torch.frexp(values).exponent - 16)
    error = (found.double() - values.double()) / ulp * values.double().sign()
    lost = (values.view(torch.int32) & 0xFF).double() / 256
    assert float(error.abs().max()) < 1
    assert bool((error[exact] == 0).all())
    assert abs(float(error.sum() / (lost * (1 - lost)).sum().sqrt())) < 3
    assert not torch.equal(found, reference.load(*[(near := stored(values, torch.int8))[0], f32, near[1]]))


@pytest.mark.parametrize("word", PARTS)
@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_peculiar_numbers(states: str, rule: str, dtype: torch.dtype, word: str) -> None:
    """In all of the CPU's loops: those of two elements in a word, where all roles have 16 bits, too."""
    if dtype == f16 and word != "float32":
        return
    options = {**MORE[rule], "master_weights": word, "stochastic_rounding": dtype == bf16}
    case = Case(rule, word, options | ({"state_dtype": bf16} if states == "bfloat16" else {}), dtype, dtype)
    found = peculiar_run(case, "cpu")
    assert_same(found, peculiar_run(case, "reference"))
    assert found[f"0 {MASTER_NAME}"].dtype == masters_of(case)[MASTER_NAME]
    nans = found["0"][found["0"].isnan()].view(torch.int16)
    assert nans.numel() > 0
    assert bool((nans == (0x7FC0 if dtype == bf16 else 0x7E00)).all())


# They are float32 parameters ------------------------------------------------------------------------------------------

SHAPES = ((40, 50), (7,), (33, 3), (0,), (1025,), ())


def fresh(dtype: torch.dtype) -> list[Tensor]:
    return make_params([Piece(shape) for shape in SHAPES], dtype, dtype)


def trained(opt: Any, params: Sequence[Tensor], steps: Sequence[int], dtype: torch.dtype) -> None:
    for t in steps:
        for k, p in enumerate(params):
            p.grad_dtype = dtype
            p.grad = gradient(Piece(tuple(p.shape)), dtype, 100 * t + k) if (k + t) % 4 else None
        opt.param_groups[0]["lr"] = 0.03 / (t + 1)
        opt.step()


def as_float32(rule: str, dtype: torch.dtype) -> list[Tensor]:
    """The weights of a run that has float32 parameters, the same gradients, and begins with the same numbers."""
    params = [nn.Parameter(p.detach().float()) for p in fresh(dtype)]
    trained(CLASSES[rule](params, lr=0.03, weight_decay=0.1, **MORE[rule]), params, range(6), dtype)
    return [p.detach() for p in params]


@pytest.mark.parametrize(("dtype", "word"), [(bf16, "float32"), (bf16, "split32"), (f16, "float32")])
@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("way", ["plain", "flat", "resumed"])
def test_a_master_is_stepped_as_a_float32_parameter(rule: str, dtype: torch.dtype, word: str, way: str) -> None:
    """To the bit; the parameter is its rounding."""
    params = fresh(dtype)
    if way == "flat":
        wd_kernels.flatten_(params)
        for p in params:
            p.grad = None

    def make() -> Any:
        return CLASSES[rule](params, lr=0.03, weight_decay=0.1, master_weights=word, **MORE[rule])

    opt = make()
    trained(opt, params, range(3), dtype)
    if way == "resumed":
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        opt = make()
        opt.load_state_dict(torch.load(file, weights_only=True))
    trained(opt, params, range(3, 6), dtype)
    found, exact = opt.get_master_weights(), as_float32(rule, dtype)
    for k, (p, own) in enumerate(zip(params, exact, strict=True)):
        assert_same_bits(found[k], own)
        if word == "float32":
            assert_same_bits(p.detach(), own.to(dtype))
        assert opt.state[p][MASTER_NAME].dtype == PARTS[word] if own.numel() else True
    assert any(not torch.equal(p.detach().float(), own) for p, own in zip(params, exact, strict=True))


@pytest.mark.parametrize("part", [f32, torch.int16, torch.int8])
def test_functional(part: torch.dtype) -> None:
    """Lists natively, lists of two kinds, and flat buffers, as the class; a copy may lie anywhere."""
    word = {own: name for name, own in PARTS.items()}[part]
    params = [p for p in fresh(bf16) if p.numel()]
    opt = wd_kernels.AdamW(params, lr=1e-3, weight_decay=0.1, master_weights=word)
    room = torch.full((9000,), 7.0, dtype=bf16)  # the all-gather's input, say
    begin, copies = 3, []
    for p in params:
        copies.append(room[begin : begin + p.numel()].view(p.shape).copy_(p.detach()))
        begin += p.numel()
    masters = [c.to(f32) if part == f32 else torch.zeros_like(c, dtype=part) for c in copies]
    if part == f32:
        room.fill_(7.0)  # it is written, and never read
    states = [[torch.zeros(p.shape) for p in params] for _ in range(2)]
    other = [torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)]
    for t in range(4):
        grads = [gradient(Piece(tuple(p.shape)), bf16, 100 * t + k) for k, p in enumerate(params)]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        opt.step()
        how: dict[str, Any] = {"step": t + 1, "lr": 1e-3, "weight_decay": 0.1}
        if t == 3:
            for own in zip(copies, grads, *states, masters, strict=True):
                param, grad, m, v, master = (x.view(-1) for x in own)
                functional.adamw_flat_(param, grad, m, v, master_param=master, **how)
        else:
            roles = [copies, grads, *states]
            if t == 2:  # one without a first element's alignment of its own, and of another layout
                roles = [[*own] for own in roles]
            functional.adamw_(*roles, master_params=masters, **how)
    for k, p in enumerate(params):
        assert_same_bits(copies[k], p.detach())
        assert_same_bits(masters[k], opt.state[p][MASTER_NAME])
        assert_same_bits(states[1][k], opt.state[p]["exp_avg_sq"])
    assert bool((room[:3] == 7).all())
    assert bool((room[begin:] == 7).all())
    with pytest.raises(TypeError, match=r"master_params\[0\] is given for params\[0\], which has dtype torch.float32"):
        functional.adamw_(*[[own] for own in other], master_params=[torch.ones(3)], step=1)


def test_traced() -> None:
    runs = []
    for compiled in (False, True):
        p, g = torch.linspace(-1, 1, 50).to(bf16), torch.linspace(1, 3, 50).to(bf16)
        m, v, r = torch.zeros(50), torch.zeros(50), torch.zeros(50, dtype=torch.int16)

        def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, r: Tensor) -> None:
            functional.adamw_([p], [g], [m], [v], master_params=[r], step=1, lr=0.01, weight_decay=0.1)

        (torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step)(p, g, m, v, r)
        runs.append([p, m, v, r])
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)
    assert bool(runs[0][3].any())


def test_groups_of_their_own_and_parameters_that_need_none() -> None:
    params = [nn.Parameter(torch.linspace(0.5, 1, 40).to(dtype)) for dtype in (bf16, f32, f16, f64, bf16, bf16)]
    groups = [{"params": params[:5], "master_weights": True}, {"params": params[5:], "master_weights": "split24"}]
    opt = wd_kernels.AdamW(groups, lr=0.01)
    for _ in range(3):
        for p in params:
            p.grad = torch.linspace(-1, 1, 40).to(p.dtype)
        opt.step()
    kept = [opt.state[p].get(MASTER_NAME) for p in params]
    assert [None if t is None else t.dtype for t in kept] == [f32, None, f32, None, f32, torch.int8]
    assert [group["master_weights"] for group in opt.param_groups] == ["float32", "split24"]
    assert "master_weights" not in wd_kernels.AdamW(params).param_groups[0]


# Saved and loaded -----------------------------------------------------------------------------------------------------


def begun(word: Any, dtype: torch.dtype = bf16, steps: int = 3, **more: Any) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(torch.linspace(-1, 1, 1000).to(dtype))
    opt = wd_kernels.AdamW([("w", p)], lr=0.003, weight_decay=0.1, master_weights=word, **more)
    for t in range(steps):
        p.grad = torch.linspace(-2, 1, 1000).roll(t).to(dtype)
        opt.step()
    return p, opt


@pytest.mark.parametrize("saved", PARTS)
@pytest.mark.parametrize("live", [*PARTS, "none"])
def test_converted_when_asked(saved: str, live: str) -> None:
    p, theirs = begun(saved)
    exact = theirs.get_master_weights()["w"]
    q = nn.Parameter(p.detach().clone())
    ours = wd_kernels.AdamW([("w", q)], lr=0.003, weight_decay=0.1, master_weights=live)
    if live != saved:
        with pytest.raises(
            TypeError, match=rf"'master_param' of parameter 'w' .*master_weights='{live}'.*convert_states"
        ):
            ours.load_state_dict(theirs.state_dict())
        assert not ours.state
        assert_same_bits(q.detach(), p.detach())
    ours.load_state_dict(theirs.state_dict(), convert_states=True)
    found = ours.get_master_weights()["w"]
    if live == "split24":
        assert float(((found - exact) / exact.abs().clamp(min=1e-6)).abs().max()) <= 2**-16
    elif live == "none":
        assert_same_bits(found, exact.bfloat16().float())
    else:
        assert_same_bits(found, exact)
    assert MASTER_NAME in ours.state[q] or live == "none"
    q.grad = torch.ones_like(q)
    ours.step()


def test_a_float32_parameter_takes_a_saved_master() -> None:
    _, theirs = begun("split32")
    q = nn.Parameter(torch.linspace(-1, 1, 1000))
    ours = wd_kernels.AdamW([("w", q)], lr=0.003, master_weights="split32")
    with pytest.raises(TypeError, match="a remainder is what a bfloat16 parameter of its shape lacks"):
        ours.load_state_dict(theirs.state_dict(), convert_states=True)
    _, theirs = begun("float32")
    ours.load_state_dict(theirs.state_dict(), convert_states=True)
    assert_same_bits(q.detach(), theirs.get_master_weights()["w"])
    assert MASTER_NAME not in ours.state[q]


def test_a_run_without_goes_on_with_masters() -> None:
    """A checkpoint that has none: they begin as the parameters."""
    p, theirs = begun("none")
    ours = wd_kernels.AdamW([("w", p)], lr=0.003, weight_decay=0.1, master_weights="split32")
    ours.load_state_dict(theirs.state_dict())
    before = p.detach().float()
    p.grad = torch.ones_like(p)
    ours.step()
    q = nn.Parameter(before)
    alone = wd_kernels.AdamW([("w", q)], lr=0.003, weight_decay=0.1)
    alone.load_state_dict(theirs.state_dict())
    q.grad = torch.ones_like(q)
    alone.step()
    assert_same_bits(ours.get_master_weights()["w"], q.detach())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("word", [*PARTS, "none"])
def test_written_by_name(word: str, flat: bool) -> None:
    params = fresh(bf16)
    if flat:
        wd_kernels.flatten_(params)
    names = [f"p{k}" for k in range(len(params))]
    opt = wd_kernels.AdamW(list(zip(names, params, strict=True)), lr=0.01, master_weights=word)
    for stepped in (False, True):
        drawn = [torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) for p in params]
        wanted = dict(zip(names, drawn, strict=True))
        opt.load_master_weights(wanted)
        for name, p in zip(names, params, strict=True):
            own, found = wanted[name], opt.get_master_weights()[name]
            ties = found.view(torch.int32) & 0xFFFF == 0x8000
            rounded = (found if word == "split24" else own).bfloat16()
            assert_same_bits(p.detach()[~ties], rounded[~ties])
            if word in ("float32", "split32"):
                assert_same_bits(found, own)
            else:
                assert float((found - own).abs().max() if own.numel() else 0) < (2**-6 if word == "none" else 2**-14)
        for p in params:
            p.grad = torch.ones_like(p)
        if not stepped:
            opt.step()
    with torch.no_grad():
        params[0].mul_(2)
    opt.load_master_weights()
    assert_same_bits(opt.get_master_weights()["p0"], params[0].detach().float())
    before = snapshot(params, opt)
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({**wanted, "q": wanted["p0"]}, KeyError, r"1 names of master weights are unknown: \['q'\]"),
        ({"p0": wanted["p0"]}, KeyError, r"5 names of master weights are missing: \['p1', 'p2', 'p3'\]"),
        ({**wanted, "p1": wanted["p1"][:2]}, ValueError, r"of parameter 'p1' .*shape \(2,\); allowed .*\(7,\)"),
        ({**wanted, "p1": wanted["p1"].double()}, TypeError, "of parameter 'p1' .*float64: allowed are torch.float32"),
        ({**wanted, "p1": 3.0}, TypeError, "of parameter 'p1' .* is a float: expected a tensor"),
    ]
    for weights, kind, message in wrong:
        with pytest.raises(kind, match=message):
            opt.load_master_weights(weights)
    assert_same(snapshot(params, opt), before)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(("rule", "more"), [("sgdw", {}), ("sgdw", MORE["sgdw"]), ("adagradw", {}), ("adamw", {})])
def test_a_master_alone_is_a_state(rule: str, more: dict[str, Any], stepped: bool) -> None:
    """Of SGDW without momentum, or before the first step."""
    p = nn.Parameter(torch.linspace(-1, 1, 40).to(bf16))
    opt = CLASSES[rule]([p], lr=0.1, master_weights="split32", **more)
    opt.load_master_weights({0: torch.linspace(-1, 1, 40)})
    if stepped:
        p.grad = torch.ones_like(p)
        opt.step()
    q = nn.Parameter(p.detach().clone())
    again = CLASSES[rule]([q], lr=0.1, master_weights="split32", **more)
    again.load_state_dict(opt.state_dict())
    assert_same_bits(again.get_master_weights()[0], opt.get_master_weights()[0])
    for own in (p, q):
        own.grad = torch.ones_like(own)
    opt.step()
    again.step()
    found, exact = snapshot([q], again), snapshot([p], opt)
    assert ("step" in opt.state_dict()["state"][0]) == (rule != "sgdw")
    if rule == "sgdw":  # nothing of it is rounded by its counts here: they are not saved, as torch's has none
        del found["0 step"], exact["0 step"]
    assert_same(found, exact)
    if rule == "adagradw":  # torch's steps no parameter without
        assert set(opt.state_dict()["state"][0]) == {"step", "sum", MASTER_NAME}


def test_a_remainder_travels_in_the_parameters_dtype() -> None:
    """No process group sends int16, and torch's classes cast what they load: they leave the bits of a bfloat16."""
    p, opt = begun("split32")
    saved = opt.state_dict()["state"][0][MASTER_NAME]
    assert saved.dtype == bf16
    assert_same_bits(saved.view(torch.int16), opt.state[p][MASTER_NAME])
    theirs = torch.optim.AdamW([("w", p)])
    theirs.load_state_dict(opt.state_dict())
    q = nn.Parameter(p.detach().clone())
    again = wd_kernels.AdamW([("w", q)], master_weights="split32")
    again.load_state_dict(theirs.state_dict())
    assert_same_bits(again.get_master_weights()["w"], opt.get_master_weights()["w"])
    assert again.state[q][MASTER_NAME].dtype == torch.int16


@pytest.mark.parametrize(("word", "cast"), [("float32", bf16), ("split24", bf16), ("split32", f32), ("split24", f32)])
def test_a_master_that_was_cast_is_lost(word: str, cast: torch.dtype) -> None:
    """By torch's class, or by a distributed checkpoint that is loaded into another kind."""
    p, opt = begun(word)
    saved = opt.state_dict()
    saved["state"][0][MASTER_NAME] = opt.state[p][MASTER_NAME].to(cast)
    before = p.detach().clone()
    for live in PARTS:
        ours = wd_kernels.AdamW([("w", p)], master_weights=live)
        for convert in (False, True):
            words = rf"'w' .*has dtype {cast}, and its group says .*'{word}': it has been cast"
            with pytest.raises(TypeError, match=words):
                ours.load_state_dict(saved, convert_states=convert)
        assert not ours.state
    assert torch.equal(p, before)


@pytest.mark.parametrize("word", PARTS)
def test_another_kind_in_the_midst_of_a_run(word: str) -> None:
    p, opt = begun("split32")
    group = opt.param_groups[0]
    for other in (word, "none", word, "split32"):
        weights = opt.get_master_weights()
        had, group["master_weights"] = group.get("master_weights", "none"), other
        p.grad = torch.ones_like(p)
        if had not in (other, "none"):
            before = snapshot([p], opt)
            with pytest.raises(TypeError, match=r"'master_param' of parameter 'w'.* To change it, take weights = "):
                opt.step()
            assert_same(snapshot([p], opt), before)
        opt.load_master_weights(weights)
        assert (MASTER_NAME in opt.state[p]) == (other != "none")
        found = opt.get_master_weights()["w"]
        least = {"none": 2**-8, "split24": 2**-16}.get(other, 0.0)
        assert bool(((found - weights["w"]).abs() <= least * weights["w"].abs()).all())
        opt.step()


def test_frozen_parameters_have_none() -> None:
    made = (torch.ones(100, dtype=dtype) for dtype in (bf16, f16))
    params = [nn.Parameter(t, requires_grad=grad) for t, grad in zip(made, (True, False), strict=True)]
    opt = wd_kernels.AdamW(params, master_weights="split32")
    opt.load_master_weights({0: torch.full((100,), 1.001), 1: torch.full((100,), 3.0)})
    assert [MASTER_NAME in opt.state[p] for p in params if p in opt.state] == [True]
    assert torch.equal(params[1], torch.full((100,), 3.0, dtype=f16))
    rows = {row.role: row.bytes for row in opt.memory_report().rows}
    assert (rows["parameters"], rows["gradients"], rows["exp_avg"], rows["master_param"]) == (400, 200, 400, 200)


def test_weights_that_are_each_others() -> None:
    a, b = (nn.Parameter(torch.full((40,), value, dtype=bf16)) for value in (1.0, 2.0))
    opt = wd_kernels.AdamW([a, b], master_weights=True)
    with pytest.raises(ValueError, match="master weight of parameter 1 of group 0 has no memory"):
        opt.load_master_weights({0: torch.zeros(40), 1: torch.zeros(40, device="meta")})
    assert not opt.state
    assert bool((a == 1).all())
    opt.load_master_weights({0: b.detach(), 1: a.detach()})
    assert bool((a == 2).all())
    assert bool((b == 1).all())
    assert bool((opt.get_master_weights()[1] == 1).all())


def test_what_cannot_be_stored_is_said_before_anything_is_loaded() -> None:
    p, theirs = begun("float32", f16)
    ours = wd_kernels.AdamW([("w", p)], master_weights="split32")
    before = p.detach().clone()
    with pytest.raises(TypeError, match="master_weights='split32' for parameter 'w' "):
        ours.load_state_dict(theirs.state_dict(), convert_states=True)
    assert not ours.state
    assert torch.equal(p, before)


# What is wrong is said ------------------------------------------------------------------------------------------------


def test_words() -> None:
    with pytest.raises(ValueError, match=r"master_weights='fp32' in the arguments: allowed are False or 'none', True"):
        wd_kernels.SGDW([nn.Parameter(torch.ones(3))], lr=0.1, master_weights="fp32")  # type: ignore[arg-type]
    p, opt = begun("none", f16, steps=0)
    opt.param_groups[0]["master_weights"] = "split32"
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(TypeError, match=r"master_weights='split32' for parameter 'w' .*float16.*'float32'"):
        opt.step()
    assert torch.equal(p, before)
    assert not opt.state


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (torch.zeros(1000), TypeError, "has dtype torch.float32: with master_weights='split32', .* is torch.int16"),
        (torch.zeros(999, dtype=torch.int16), ValueError, r"has shape \(999,\)"),
        ([1], TypeError, "is a list"),
    ],
)
def test_a_master_of_another_kind(value: Any, kind: type[Exception], message: str) -> None:
    p, opt = begun("split32")
    opt.state[p][MASTER_NAME] = value
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    with pytest.raises(kind, match=f"the state 'master_param' of parameter 'w' .*{message}"):
        opt.step()
    assert torch.equal(p, before)


def test_masters_that_overlap() -> None:
    p, opt = begun("split32")
    q, other = begun("split32")
    opt.add_param_group({"params": [("q", q)]})
    shared = torch.zeros(1000, dtype=torch.int16)
    for own, state in ((p, opt.state[p]), (q, other.state[q])):
        opt.state[own] = {**state, MASTER_NAME: shared}
        own.grad = torch.ones_like(own)
    with pytest.raises(ValueError, match=r"a state of parameter 'w' .* overlap in memory"):
        opt.step()


# What it is for -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("word", PARTS)
def test_decay_survives(word: str, stochastic: bool) -> None:
    """500 steps of lr * weight_decay = 1e-4 and no gradient."""
    p = nn.Parameter(torch.randn(20_000, generator=torch.Generator().manual_seed(0)).to(bf16))
    before = p.detach().float().norm()
    opt = wd_kernels.AdamW([p], lr=1e-3, weight_decay=0.1, master_weights=word, stochastic_rounding=stochastic)
    p.grad = torch.zeros_like(p)
    for _ in range(500):
        opt.step()
    assert float(p.detach().float().norm() / before) == pytest.approx(0.9512, abs=0.002)
    assert float(opt.get_master_weights()[0].norm() / before) == pytest.approx(0.9512, abs=0.0005)


@pytest.mark.parametrize("rule", CLASSES)
def test_memory_report(rule: str) -> None:
    """What is allocated in the first step, by the storages that the states hold."""
    params = [nn.Parameter(torch.ones(n, dtype=dtype)) for n, dtype in ((1000, bf16), (24, f32), (7, f64), (100, f16))]
    more = {**MORE[rule], "state_dtype": bf16 if rule == "sgdw" else f32}
    opt = CLASSES[rule](
        [
            {"params": params[:2], "master_weights": "split24"},
            {"params": params[2:], "master_weights": True, "state_dtype": f32},
        ],
        **more,
    )
    before = opt.memory_report()
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    report = opt.memory_report()
    assert report == before
    rows = {row.role: row for row in report.rows}
    for name in {name for own in opt.state.values() for name in own} - {"step"}:
        kept = [own[name] for own in opt.state.values() if name in own]
        assert rows[name].bytes == sum(t.untyped_storage().nbytes() for t in kept)
        assert set(rows[name].stored) == {str(t.dtype).removeprefix("torch.") for t in kept}
    assert rows["master_param"].bytes == 1000 + 4 * 100
    tensors = [t for own in opt.state.values() for t in own.values()]
    tensors += [t for p in params for t in (p, p.grad) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert report.bytes == sum(storages.values())
    classes = {"adamw": torch.optim.AdamW, "sgdw": torch.optim.SGD, "adagradw": torch.optim.Adagrad}
    theirs: Any = classes[rule]
    again = theirs(params, **MORE[rule])
    again.step()
    own = sum(t.nbytes for state in again.state.values() for t in state.values() if isinstance(t, Tensor))
    assert sum(row.torch for row in report.rows) == own + 2 * sum(p.nbytes for p in params)
    assert str(report).splitlines()[-1].split()[:2] == ["total", f"{report.bytes:,}"]


def test_on_meta() -> None:
    p = nn.Parameter(torch.empty(40, dtype=bf16, device="meta"))
    opt = wd_kernels.AdamW([p], master_weights="split24")
    p.grad = torch.empty_like(p)
    opt.step()
    assert opt.state[p][MASTER_NAME].dtype == torch.int8


#: (parameter, gradient, state, master) of the rows of the page's table of storage formats.
ROWS: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None]] = {
    "| float32 | float32 |": (f32, f32, f32, None),
    "| float32 | bfloat16 |": (f32, f32, bf16, None),
    "| float32 | 8 bits |": (f32, f32, torch.int8, None),
    "| bfloat16 | float32 |": (bf16, bf16, f32, None),
    "| bfloat16 | bfloat16 |": (bf16, bf16, bf16, None),
    "| bfloat16 | 8 bits |": (bf16, bf16, torch.int8, None),
    "| bfloat16, 16 bits more | float32 |": (bf16, bf16, f32, torch.int16),
    "| bfloat16, 16 bits more | bfloat16 |": (bf16, bf16, bf16, torch.int16),
    "| bfloat16, 8 bits more | float32 |": (bf16, bf16, f32, torch.int8),
    "| bfloat16, 8 bits more | bfloat16 |": (bf16, bf16, bf16, torch.int8),
    "| bfloat16, 8 bits more | 8 bits |": (bf16, bf16, torch.int8, torch.int8),
    "| bfloat16 or float16, copied from a float32 master | float32 |": (f16, f16, f32, f32),
    "| bfloat16 or float16, copied from a float32 master | bfloat16 |": (bf16, bf16, bf16, f32),
}


@pytest.mark.parametrize("row", ROWS)
def test_bytes_of_the_page(row: str) -> None:
    """By the model, which test_kernels.py holds against what compiled kernels load and store."""
    from byte_model import step_bytes

    page = ROOT / "docs" / "features" / "storage-formats.md"
    (line,) = [own for own in page.read_text().splitlines() if own.startswith(row)]
    expected = [step_bytes(rule, *ROWS[row]) for rule in ("adamw", "sgdw")]
    assert line.split("|")[3].strip() == ", ".join(map(str, expected))
