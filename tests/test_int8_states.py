"""States in 8 bits: what they stand for, checkpoints, flat and sharded parameters, and the errors on the way."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from bits import assert_same_bits
from cases import CLASSES, assert_same, bf16, f32, f64, snapshot
from sharded import full
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import wd_kernels
from wd_kernels import functional, reference
from wd_kernels.formats import scale_name
from wd_kernels.reference import Draws
from wd_kernels.scales import STATES

i8, u8 = torch.int8, torch.uint8
MORE: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": True}, "sgdw": {"momentum": 0.9}, "adagradw": {"initial_accumulator_value": 0.3},
}  # fmt: skip


# What they stand for --------------------------------------------------------------------------------------------------


def stored(values: Tensor, dtype: torch.dtype, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty_like(values, dtype=dtype), torch.empty(-(-values.numel() // 32), dtype=u8)
    reference.store(codes, values, draws, scale)
    return codes, scale


def back(codes: Tensor, scale: Tensor) -> Tensor:
    return reference.load(codes, f32, scale)


def standard_errors(error: Tensor) -> float:
    """How far the mean of what should be 0 is from it."""
    return float(error.mean() / error.std() * math.sqrt(error.numel()))


def test_a_tile_by_hand() -> None:
    """The largest is 1 = 2**(127 - 127): c of a first moment is 2**-14, of exponent 113, and of a second one 2**-30."""
    values = torch.zeros(40)
    # y = x + c has the bits of c, plus 8 for each binade, and eighths: 1 + 2**-14 is next to 14 binades above.
    values[:9] = torch.tensor([1.0, -0.5, 1.125, 2**-17, 3 * 2**-19, 2**-18, 3 * 2**-18, -(2**-14), 1e-30])
    values[32:34] = torch.tensor([-3.0, 2.0])  # a short tile of its own
    codes, scale = stored(values, i8)
    assert codes[:10].tolist() == [112, -104, 113, 1, 1, 0, 2, -8, 0, 0]
    assert codes[32:34].tolist() == [-116, 112]
    assert scale.tolist() == [113, 114]
    c = 2**-14
    expected = [1 - c, -(0.5 - c), 1.125 - c, 2**-17, 2**-17, 0, 2**-16, -c, 0, 0]
    assert back(codes, scale)[:10].tolist() == expected
    assert back(codes, scale)[32:34].tolist() == [-(3 - 2 * c), 2 - 2 * c]
    codes, scale = stored(values.abs(), u8)
    assert codes[:10].tolist() == [240, 232, 241, 104, 100, 96, 108, 128, 1, 0]
    assert scale.tolist() == [97, 98]


@pytest.mark.parametrize("dtype", [i8, u8])
def test_how_far_they_are_off(dtype: torch.dtype) -> None:
    """To nearest: a sixteenth of |x| + c; at random: an eighth. Signs stay, and so does what may not become 0."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2**16, generator=generator) * torch.randn(2**16, generator=generator).mul(6).exp()
    values[::37] = 0
    values = values if dtype == i8 else values.square()
    tops = values.view(-1, 32).abs().amax(1, keepdim=True)
    c = torch.ldexp(torch.ones_like(tops), (torch.frexp(tops).exponent - 1 - (14 if dtype == i8 else 30)).clamp(-126))
    for draws, part in ((None, 16), (Draws(3, 5, 0, 2), 8)):
        codes, scale = stored(values, dtype, draws)
        found = back(codes, scale)
        error = (found - values).view(-1, 32).abs()
        smallest = c / 8 if dtype == u8 else 0 * c  # which what is not 0 is at least
        bound = torch.maximum((values.view(-1, 32).abs() + c) / part * (1 + 1e-6), smallest)
        assert bool((error <= bound).all())
        assert bool(((values > 0) >= (found > 0)).all())
        assert bool(((values < 0) >= (found < 0)).all())
        if dtype == u8:
            assert torch.equal(found > 0, values > 0)
        assert bool((found.view(-1, 32).abs().amax(1, keepdim=True) >= tops * (1 - 1 / 8)).all())
        assert int(codes.to(torch.int16).abs().max()) <= (121 if dtype == i8 else 249)


@pytest.mark.parametrize("dtype", [i8, u8])
def test_what_was_stored_is_stored_again(dtype: torch.dtype) -> None:
    """A tile that is decoded and stored again, in whatever way, keeps its codes: nothing wanders."""
    values = torch.randn(3200, generator=torch.Generator().manual_seed(1)).mul(3).exp()
    codes, scale = stored(values, dtype)
    for draws in (None, Draws(1, 2, 0, 3)):
        again, scale_again = stored(back(codes, scale), dtype, draws)
        alike = (scale == scale_again).repeat_interleave(32)  # else the largest has come down to a power of 2
        assert float(alike.float().mean()) > 0.8
        assert torch.equal(again[alike], codes[alike])


def test_infinities_and_nan_stay() -> None:
    values = torch.linspace(-1, 1, 96)
    values[3], values[40], values[41], values[70] = math.inf, -math.inf, 5.0, math.nan
    found = back(*stored(values, i8))
    assert found[3] == math.inf
    assert found[40] == -math.inf
    assert bool(found[70].isnan())
    assert int(found.isnan().sum()) == 1
    assert int(found.isinf().sum()) == 2
    squares = back(*stored(values.square(), u8))
    assert squares[40] == math.inf
    assert bool(squares[70].isnan())
    largest = torch.full((32,), torch.finfo(f32).max)
    assert bool(back(*stored(largest, i8)).isinf().all())  # rounded up, as any number beyond the last one
    tiny = torch.full((32,), 2.0**-149)
    assert bool((back(*stored(tiny, i8)) == 0).all())
    assert bool((back(*stored(tiny, u8)) > 0).all())


@pytest.mark.parametrize("dtype", [i8, u8])
def test_random_rounding_has_the_right_mean(dtype: torch.dtype) -> None:
    """10**7 draws in all binades of a tile: no mean is further off than 4 standard errors, few than 3."""
    binades = 16 if dtype == i8 else 32
    found = []
    for k in range(binades + 2):
        x = 1.37 * 2.0**-k
        values = torch.full((2**14, 32), x)
        values[:, 0] = 1.9
        signs = 1 if dtype == u8 else torch.where(torch.arange(32) % 2 == 1, -1, 1)
        values *= signs
        restored = back(*stored(values.flatten(), dtype, Draws(17, 1 + k, 32 * k, 2 + (dtype == u8)))).view(-1, 32)
        own = (restored * signs)[:, 1:].flatten().double()
        assert len(own.unique()) == 2
        if dtype == i8 or k < 30:  # below, what is not 0 is made at least the smallest
            found.append(standard_errors(own - x))
    assert max(map(abs, found)) < 4
    assert sum(abs(e) > 3 for e in found) <= 1


# A step ---------------------------------------------------------------------------------------------------------------


def params_of(dtype: torch.dtype = f32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 64), (77,), (), (2, 3, 4, 5), (1100,)]
    found = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    found[3].data = found[3].data.to(memory_format=torch.channels_last)
    return found


def take(opt: Any, params: list[nn.Parameter], steps: range) -> None:
    for t in steps:
        for k, p in enumerate(params):
            values = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + k))
            p.grad = values.to(p.dtype) if (t + k) % 4 else None
        opt.step()


@pytest.mark.parametrize("rule", CLASSES)
def test_shapes_and_sizes(rule: str) -> None:
    """Scales keep the dimensions before those that are whole tiles; the report is of what is held."""
    params = params_of()
    opt = CLASSES[rule](params, lr=0.01, weight_decay=0.1, state_dtype="int8", **MORE[rule])
    take(opt, params, range(4))
    shapes = [(5, 2), (3,), (1,), (4,), (35,)]
    for p, shape in zip(params, shapes, strict=True):
        names = [name for name in opt.state[p] if name in STATES]
        assert names
        for name in names:
            assert opt.state[p][name].dtype == (i8 if STATES[name].signed else u8)
            assert opt.state[p][name].shape == p.shape
            assert opt.state[p][scale_name(name)].shape == shape
            assert opt.state[p][scale_name(name)].dtype == u8
    rows = {row.role: row for row in opt.memory_report().rows}
    for name in names:
        held = [sum(opt.state[p][key].nbytes for p in params) for key in (name, scale_name(name))]
        assert [rows[key].bytes for key in (name, scale_name(name))] == held


def test_it_follows_a_float32_run() -> None:
    """300 noisy steps of a quadratic: in 8 bits, at random, as near to the minimum as in float32."""
    distances = []
    for states in (f32, i8):
        generator = torch.Generator().manual_seed(3)
        goal = torch.randn(4096, generator=generator)
        p = nn.Parameter(torch.zeros(4096))
        opt = wd_kernels.AdamW([p], lr=0.03, weight_decay=0.02, betas=(0.9, 0.99), state_dtype=states)
        for step in range(300):
            opt.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
            p.grad = p.detach() - goal + 0.1 * torch.randn(4096, generator=generator)
            opt.step()
        distances.append(float((p.detach() - goal).square().mean().sqrt()))
    assert distances[1] < 1.1 * distances[0]


@pytest.mark.parametrize("rule", CLASSES)
def test_flat_steps_are_the_same(rule: str) -> None:
    """Scales lie flat, too, and a run of neighbours is one tensor whose padding is nobody's."""
    found = []
    for flat in (False, True):
        params = params_of()[:2] + params_of()[4:]
        if flat:
            wd_kernels.flatten_(params)
        opt = CLASSES[rule](params, lr=0.01, weight_decay=0.1, state_dtype="int8", seed=2, **MORE[rule])
        for step in range(4):
            for k, p in enumerate(params):
                if (step, k) == (2, 1):
                    p.grad = None
                else:
                    values = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k))
                    p.grad = values if p.grad is None else p.grad.copy_(values)
            opt.step()
            if flat and step == 1:
                assert len(opt._table.segments.capacities) == 2  # no run goes over the padding behind 77 elements
        found.append(snapshot(params, opt))
    assert_same(*found)


@pytest.mark.parametrize("rule", ["adamw", "adagradw"])
def test_padding_is_in_no_tile(rule: str) -> None:
    """With eps 0 the padding of flat parameters is 0/0."""
    found = []
    for flat in (False, True):
        params = [nn.Parameter(torch.ones(n)) for n in (40, 70, 64, 32)]
        if flat:
            wd_kernels.flatten_(params)
        opt = CLASSES[rule](params, lr=0.1, eps=0.0, state_dtype="int8")
        for _ in range(4):
            for p in params:
                grad = torch.full_like(p, 0.5)
                p.grad = grad if p.grad is None else p.grad.copy_(grad)
            opt.step()
        found.append(snapshot(params, opt))
    assert_same(*found)
    assert all(bool(t.isfinite().all()) for t in found[1].values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_parameter_that_is_laid_out_anew(backend: str) -> None:
    """Codes have other neighbours then: an error that names the way, and that is one."""
    p = nn.Parameter(torch.randn(8, 8, 4, 4))
    opt = wd_kernels.AdamW([p], lr=0.01, state_dtype="int8", backend=backend)
    p.grad = torch.randn(8, 8, 4, 4)
    opt.step()
    before = back(opt.state[p]["exp_avg"], opt.state[p]["exp_avg_scale"])
    p.data = p.data.to(memory_format=torch.channels_last)
    p.grad = torch.zeros_like(p)
    start = p.detach().clone()
    with pytest.raises(
        ValueError, match=r"the state 'exp_avg' of parameter 0 of group 0 has strides \(128, 16, 4, 1\)"
    ):
        opt.step()
    assert torch.equal(p.detach(), start)
    opt.load_state_dict(opt.state_dict(), convert_states=True)
    found = back(opt.state[p]["exp_avg"], opt.state[p]["exp_avg_scale"])
    assert torch.allclose(found, before, rtol=0.07, atol=float(before.abs().max()) * 2**-14)
    opt.step()
    assert not torch.equal(p.detach(), start)


def test_first_states_of_a_parameter_with_gaps() -> None:
    """AdagradW saves states of what took no step, too."""
    p = nn.Parameter(torch.randn(4, 128)[:, :64])
    opt = wd_kernels.AdagradW([p], state_dtype="int8", initial_accumulator_value=0.3)
    other = wd_kernels.AdagradW([p], state_dtype="int8")
    other.load_state_dict(opt.state_dict())
    assert other.state[p]["sum_scale"].shape == (4, 2)
    assert 0.25 < float(back(other.state[p]["sum"], other.state[p]["sum_scale"]).mean()) < 0.35
    p.grad = torch.ones(4, 64)
    other.step()


LISTS = {"adamw": functional.adamw_, "sgdw": functional.sgdw_, "adagradw": functional.adagradw_}


@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("n", [1, 31, 32, 1000])
def test_lists_are_the_class(rule: str, n: int) -> None:
    start = torch.randn(n, generator=torch.Generator().manual_seed(n))
    p, q = nn.Parameter(start.clone()), start.clone()
    opt = CLASSES[rule]([p], lr=0.01, weight_decay=0.1, state_dtype="int8", **MORE[rule])
    names = [state.name for state in opt.rule.states]
    codes = [torch.zeros(n, dtype=i8 if STATES[name].signed else u8) for name in names]
    scales = [torch.zeros(-(-n // 32), dtype=u8) for _ in names]
    if rule == "adagradw":
        reference.store(codes[0], torch.full((n,), 0.3), None, scales[0])
    of_scales = {STATES[name].scale.plural: [scale] for name, scale in zip(names, scales, strict=True)}
    own = {"momentum": 0.9} if rule == "sgdw" else {}
    for step in range(1, 4):
        grad = torch.randn(n, generator=torch.Generator().manual_seed(100 * n + step))
        p.grad = grad.clone()
        opt.step()
        lists = ([t] for t in codes)
        LISTS[rule]([q], [grad], *lists, step=step, lr=0.01, weight_decay=0.1, **of_scales, **own)
        assert_same_bits(p.detach(), q)
        for name, code, scale in zip(names, codes, scales, strict=True):
            assert torch.equal(opt.state[p][name], code)
            assert torch.equal(opt.state[p][scale_name(name)], scale)


def test_no_memory_no_numbers() -> None:
    with torch.device("meta"):
        p = nn.Parameter(torch.empty(5, 64, dtype=bf16))
    p.grad = torch.empty_like(p)
    opt = wd_kernels.AdamW([p], state_dtype="int8", master_weights="split24")
    opt.step()
    shapes = {name: tuple(t.shape) for name, t in opt.state[p].items() if name != "step"}
    assert shapes == {
        "exp_avg": (5, 64), "exp_avg_scale": (5, 2), "exp_avg_sq": (5, 64), "exp_avg_sq_scale": (5, 2),
        "master_param": (5, 64),
    }  # fmt: skip


# Checkpoints ----------------------------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("rule", CLASSES)
def test_a_run_goes_on(rule: str, flat: bool) -> None:
    """What was saved is loaded to the bit, and nothing else is needed, the seed included."""
    params = params_of(bf16)
    if flat:
        wd_kernels.flatten_(params)
    options = {"lr": 0.01, "weight_decay": 0.1, "state_dtype": "int8", "master_weights": "split24", **MORE[rule]}
    opt = CLASSES[rule](params, seed=7, **options)
    take(opt, params, range(4))
    saved = through_a_file(opt.state_dict())
    again = params_of(bf16)
    with torch.no_grad():
        for p, q in zip(again, params, strict=True):
            p.copy_(q)
    other = CLASSES[rule](again, **options)
    other.load_state_dict(saved)
    take(opt, params, range(4, 8))
    take(other, again, range(4, 8))
    assert_same(snapshot(params, opt), snapshot(again, other))


@pytest.mark.parametrize("rule", CLASSES)
def test_other_formats(rule: str) -> None:
    """8 bits are widened exactly; more bits are rounded where that is asked for."""
    params = params_of()
    opt = CLASSES[rule](params, lr=0.01, state_dtype="int8", **MORE[rule])
    take(opt, params, range(3))
    saved = opt.state_dict()
    wide = CLASSES[rule](params_of(), lr=0.01, **MORE[rule])
    wide.load_state_dict(saved)
    for p, q in zip(params, wide.param_groups[0]["params"], strict=True):
        for name in (name for name in opt.state[p] if name in STATES):
            assert_same_bits(back(opt.state[p][name], opt.state[p][scale_name(name)]), wide.state[q][name])
            assert scale_name(name) not in wide.state[q]
    narrow = CLASSES[rule](params_of(), lr=0.01, state_dtype="int8", **MORE[rule])
    with pytest.raises(TypeError, match=r"dtype torch.float32, which does not fit the torch.u?int8 .*convert_states"):
        narrow.load_state_dict(wide.state_dict())
    narrow.load_state_dict(wide.state_dict(), convert_states=True)
    for p, q in zip(params, narrow.param_groups[0]["params"], strict=True):
        for name in (name for name in opt.state[p] if name in STATES):
            found = back(narrow.state[q][name], narrow.state[q][scale_name(name)])
            exact = back(opt.state[p][name], opt.state[p][scale_name(name)])
            assert torch.allclose(found, exact, rtol=0.14, atol=0)  # a power of 2 may have become the largest
    half = CLASSES[rule](params_of(), lr=0.01, state_dtype=bf16, **MORE[rule])
    with pytest.raises(TypeError, match=r"which does not fit the torch\.bfloat16"):
        half.load_state_dict(saved)
    half.load_state_dict(saved, convert_states=True)
    take(half, half.param_groups[0]["params"], range(3, 4))


def test_a_buffer_of_another_form() -> None:
    """torch's buffer is the paper's times lr, in 8 bits too: carried over, it is rounded once more."""
    (p,) = params_of()[:1]
    opt = wd_kernels.SGDW([p], lr=0.1, momentum=0.9, state_dtype="int8")
    take(opt, [p], range(1, 3))
    other = wd_kernels.SGDW(params_of()[:1], lr=0.1, momentum=0.9, form="paper", state_dtype="int8")
    with pytest.warns(UserWarning, match="form"):
        other.load_state_dict({**opt.state_dict(), "param_groups": [{**opt.state_dict()["param_groups"][0],
                                                                     "weight_decay": 0.1}]})  # fmt: skip
    own, q = opt.state[p], other.param_groups[0]["params"][0]
    carried = back(other.state[q]["momentum_buffer"], other.state[q]["momentum_buffer_scale"])
    assert torch.allclose(
        carried, 0.1 * back(own["momentum_buffer"], own["momentum_buffer_scale"]), rtol=0.14, atol=1e-5
    )


def test_torchs_class_does_not_take_codes_for_numbers() -> None:
    """It casts what it loads to the parameter's dtype: under their own name, codes would be moments."""
    params = params_of()[:2]
    opt = wd_kernels.AdamW(params, lr=0.01, state_dtype="int8")
    take(opt, params, range(1, 3))
    saved = opt.state_dict()
    assert [*saved["state"][0]] == [
        "step", "exp_avg_code", "exp_avg_sq_code", "exp_avg_scale", "exp_avg_sq_scale"
    ]  # fmt: skip
    theirs = torch.optim.AdamW(params_of()[:2], lr=0.01)
    theirs.load_state_dict(saved)
    for p in theirs.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(KeyError, match="exp_avg"):
        theirs.step()
    with pytest.raises(TypeError, match=r"'exp_avg_code' of parameter 0 has dtype torch.float32, which was torch.int8"):
        wd_kernels.AdamW(params_of()[:2], state_dtype="int8").load_state_dict(theirs.state_dict())
    converted = wd_kernels.convert_state(saved, target="torch")
    assert_same_bits(
        converted["state"][1]["exp_avg"], back(opt.state[params[1]]["exp_avg"], opt.state[params[1]]["exp_avg_scale"])
    )
    theirs.load_state_dict(converted)
    theirs.step()


def test_tiles_are_cut_as_they_lie() -> None:
    """Codes that were laid out anew have other neighbours: an error, or decoded by what they were."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(2, 3, 8, 4).to(memory_format=torch.channels_last))
    opt = wd_kernels.SGDW([p], lr=0.1, momentum=0.9, state_dtype="int8")
    p.grad = torch.randn(2, 3, 8, 4).to(memory_format=torch.channels_last)
    opt.step()
    saved = opt.state_dict()
    q = nn.Parameter(p.detach().contiguous())
    other = wd_kernels.SGDW([q], lr=0.1, momentum=0.9, state_dtype="int8")
    with pytest.raises(ValueError, match=r"'momentum_buffer' of parameter 0 of group 0 has strides .*as they lie"):
        other.load_state_dict(saved)
    other.load_state_dict(saved, convert_states=True)
    exact = back(opt.state[p]["momentum_buffer"], opt.state[p]["momentum_buffer_scale"])
    found = back(other.state[q]["momentum_buffer"], other.state[q]["momentum_buffer_scale"])
    assert torch.allclose(found, exact, rtol=0.07, atol=1e-4)
    assert float((found - exact).abs().max()) > 0
    saved["state"][0]["momentum_buffer_code"] = saved["state"][0]["momentum_buffer_code"].contiguous()
    with pytest.raises(ValueError, match=r"'momentum_buffer_scale' .* has shape \(6,\); allowed is \(2, 3, 1\)"):
        other.load_state_dict(saved)


# Shards ---------------------------------------------------------------------------------------------------------------


def sharded_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 12), nn.Linear(12, 128), nn.Linear(128, 64, bias=False)).to(bf16)


def sharded_run(kind: str) -> tuple[list[Tensor], Any]:
    model = sharded_model()
    if kind == "fsdp":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    options = {"state_dtype": "int8", "master_weights": "split24", "seed": 4}
    groups = [
        {"params": [p for p in model.parameters() if p.numel() != 12], **options},
        {"params": [p for p in model.parameters() if p.numel() == 12]},
    ]
    opt = wd_kernels.AdamW(groups, lr=0.01, weight_decay=0.1)
    for t in range(3):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(t)).to(bf16)
        opt.zero_grad()
        model(x).float().square().sum().backward()
        opt.step()
    found = [full(t) for p in groups[0]["params"] for t in (p, *opt.state[p].values())]
    state = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
    again = sharded_model()
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(full(q))
    own = [{"params": [p for p in again.parameters() if p.numel() != 12], **options},
           {"params": [p for p in again.parameters() if p.numel() == 12]}]  # fmt: skip
    alone = wd_kernels.AdamW(own, lr=0.01, weight_decay=0.1)
    if dist.get_rank() == 0:
        set_optimizer_state_dict(again, alone, state)
    return found, [t for p in own[0]["params"] for t in alone.state[p].values()] if dist.get_rank() == 0 else None


def test_shards_have_the_bits_of_the_whole() -> None:
    """On 1, 2 and 4 ranks, rows of one tile, of four, and a bias: the same codes and scales, and a whole state."""
    ((alone, whole),) = ranks.run(1, sharded_run, "none")
    for world in (2, 4):
        for rank, (found, state) in enumerate(ranks.run(world, sharded_run, "fsdp")):
            for a, b in zip(found, alone, strict=True):
                assert_same_bits(a, b)
            for a, b in zip(state if rank == 0 else (), whole, strict=rank == 0):
                assert_same_bits(a, b)


def within_a_tile(how: str) -> str:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 64)) if how == "rows" else nn.Sequential(nn.Linear(96, 3))
    if how == "rows":
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh, {"0": torch.distributed.tensor.parallel.RowwiseParallel()})
    opt = wd_kernels.AdamW(model.named_parameters(), state_dtype="int8")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    try:
        opt.step()
    except ValueError as error:
        assert not opt.state
        return str(error)
    return ""


@pytest.mark.parametrize(("how", "said"), [
    ("rows", "parameter '0.weight' (group 0, index 0) of shape (12, 8) is sharded along dimension 0 over 2 processes"),
    ("columns", "parameter '0.weight' (group 0, index 0) of shape (3, 96) is sharded along dimension 1 over 2 "),
])  # fmt: skip
def test_a_border_within_a_tile(how: str, said: str) -> None:
    for found in ranks.run(2, within_a_tile, how):
        assert found.startswith(said)
        assert "states in 8 bits have a scale for every 32 neighbours" in found


def in_columns() -> list[Tensor]:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    opt = wd_kernels.SGDW(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, state_dtype="int8")
    for _ in range(3):
        for p in model.parameters():
            p.grad = p.detach().clone()
        opt.step()
    return [full(t) for p in model.parameters() for t in (p, *opt.state[p].values())]


def test_columns_of_whole_tiles() -> None:
    (alone,) = ranks.run(1, in_columns)
    for found in ranks.run(2, in_columns):
        for a, b in zip(found, alone, strict=True):
            assert_same_bits(a, b)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "dtype", "said"), [
    ({"state_dtype": "int8"}, f64, r"='int8' for the state 'exp_avg' of parameter 0 .* torch.float64: allowed for it"),
    ({"state_dtype": "int8"}, torch.complex64, r"dtype torch.complex64: allowed for it are torch.complex64"),
])  # fmt: skip
def test_what_has_no_8_bits(options: dict[str, Any], dtype: torch.dtype, said: str) -> None:
    p = nn.Parameter(torch.ones(40, dtype=dtype))
    p.grad = torch.ones_like(p)
    opt = wd_kernels.AdamW([p], **options)
    with pytest.raises(TypeError, match=said):
        opt.step()
    assert not opt.state
    assert torch.equal(p.detach(), torch.ones(40, dtype=dtype))


def test_states_that_are_not_whole() -> None:
    p = nn.Parameter(torch.ones(40))
    opt = wd_kernels.AdamW([p], state_dtype={"exp_avg": torch.int8, "exp_avg_sq": torch.uint8})
    assert opt.param_groups[0]["state_dtype"] == "exp_avg=int8,exp_avg_sq=int8"
    p.grad = torch.ones(40)
    opt.step()
    kept = dict(opt.state[p])
    start = p.detach().clone()
    for name, value, kind, said in (
        ("exp_avg_scale", None, ValueError, "has 'exp_avg' in 8 bits, but no 'exp_avg_scale': give it both"),
        (
            "exp_avg_scale",
            torch.ones(2),
            TypeError,
            "'exp_avg_scale' of parameter 0 of group 0 has dtype torch.float32",
        ),
        (
            "exp_avg_scale",
            torch.ones(3, dtype=u8),
            ValueError,
            r"has shape \(3,\); allowed is \(2,\), one for every 32",
        ),
        ("exp_avg_sq_scale", 3, TypeError, "is a int: expected a tensor"),
        ("exp_avg", torch.ones(40), TypeError, "has dtype torch.float32, which does not fit the torch.int8"),
        ("exp_avg_sq", torch.ones(40, dtype=i8), TypeError, "dtype torch.int8, which does not fit the torch.uint8"),
    ):
        opt.state[p].update({**kept, name: value})
        with pytest.raises(kind, match=said):
            opt.step()
        assert torch.equal(p.detach(), start)
    opt.state[p].update(kept)
    opt.param_groups[0]["state_dtype"] = "float32"
    with pytest.raises(TypeError, match=r"dtype torch.int8, which does not fit the torch.float32"):
        opt.step()
    opt.param_groups[0]["state_dtype"] = "int8"
    opt.step()
    assert not torch.equal(p.detach(), start)


def test_lists_that_are_not_whole() -> None:
    w, g, m, v = torch.ones(70), torch.ones(70), torch.zeros(70, dtype=i8), torch.zeros(70, dtype=u8)
    s = torch.zeros(3, dtype=u8)
    for tensors, scales, kind, said in (
        ((m, v), {}, ValueError, r"exp_avgs\[0\] has dtype torch.int8, and no exp_avg_scales are given: it needs one"),
        ((m, v), {"exp_avg_scales": [s]}, ValueError, r"exp_avg_sqs\[0\] .* no exp_avg_sq_scales are given"),
        ((m, v), {"exp_avg_scales": [s], "exp_avg_sq_scales": [s[:2].clone()]}, ValueError, r"needs 3 of torch.uint8"),
        ((m, v), {"exp_avg_scales": [s], "exp_avg_sq_scales": [s.clone(), s]}, ValueError, "has 2 tensors"),
        ((m, m), {"exp_avg_scales": [s], "exp_avg_sq_scales": [s.clone()]}, TypeError, "has dtype torch.int8"),
        ((m, v), {"exp_avg_scales": [s], "exp_avg_sq_scales": [s]}, ValueError, r"overlap in memory"),
        ((g.clone(), v), {"exp_avg_scales": [s], "exp_avg_sq_scales": [s.clone()]}, TypeError,
         r"exp_avg_scales\[0\] is given, and exp_avgs\[0\] has dtype torch.float32"),
    ):  # fmt: skip
        own = ([t] for t in tensors)
        with pytest.raises(kind, match=said):
            functional.adamw_([w], [g], *own, step=1, lr=0.1, **scales)
    assert torch.equal(w, torch.ones(70))
    assert not bool(m.any())


@pytest.mark.parametrize("stochastic", [False, True])
def test_steps_differ_from_steps_in_other_formats(stochastic: bool) -> None:
    """What the engines agree on is a step in 8 bits: another format, or rounding, gives other weights."""
    found = []
    for options in ({}, {"state_dtype": bf16}, {"state_dtype": "int8"}, {"state_dtype": {"exp_avg": "int8"}}):
        params = params_of()
        opt = wd_kernels.AdamW(params, lr=0.01, stochastic_rounding=stochastic, **options)
        take(opt, params, range(3))
        found.append(params[4].detach())
    for k, a in enumerate(found):
        assert not any(torch.equal(a, b) for b in found[:k])
