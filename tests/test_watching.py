"""Statistics of steps and marks of what they change: every engine's numbers, and what torch says of the same."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from bits import assert_same_bits, bits
from cases import CLASSES, Piece, bf16, c64, f16, f32, f64, gradient, make_params, snapshot
from covering import covering
from engines import CPU, ENGINES, Engine
from graphs import graphs_of
from torch import Tensor, nn

import wd_kernels
from wd_kernels import reference, sums
from wd_kernels.statistics import Measured

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow

PIECES = (
    Piece((5,)), Piece((1500,)), Piece((0,)), Piece((2049,)), Piece((13, 7), "transposed", "transposed"),
    Piece((4096,)), Piece((33,), "offset"), Piece((9, 11), "gaps"),
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"max_grad_value": 1.5}, "adamw amsgrad": {"amsgrad": True, "maximize": True}, "sgdw": {"momentum": 0.9},
    "sgdw without momentum": {"decay": "l2"}, "adagradw": {"lr_decay": 0.1},
}  # fmt: skip
#: What is stored how: parameter, gradient, options of the optimizer.
STORED: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "float32": (f32, f32, {}),
    "float64": (f64, f64, {}),
    "bfloat16": (bf16, bf16, {}),
    "bfloat16 copy": (bf16, bf16, {"master_weights": "float32"}),
    "float16 copy": (f16, f16, {"master_weights": "float32"}),
    "split32": (bf16, bf16, {"master_weights": "split32"}),
    "split24, states in 8 bits": (bf16, bf16, {"master_weights": "split24", "state_dtype": "int8"}),
    "stochastic": (bf16, f32, {"stochastic_rounding": "params"}),
    "all of it stochastic": (bf16, bf16, {"stochastic_rounding": True, "state_dtype": "param", "seed": 3}),
    "averaged": (f32, f32, {"ema_decay": 0.75}),
}
COMPILED = ("float32", "float64", "bfloat16", "bfloat16 copy")
WATCHES = ("statistics", "changes", "both")


def life(
    kind: str, stored: str, watch: str, backend: str, pieces: tuple[Piece, ...] = PIECES, device: Any = None,
    steps: int = 4,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """All there is after each step, and what was measured and marked; the second and fourth step measure nothing.

    The third is frozen for one group; one parameter has no gradient once; gradients have infinities and a NaN once.
    """
    dtype, grad_dtype, options = STORED[stored]
    params = make_params(pieces, dtype, grad_dtype, device=device or "cpu")
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.02}]
    opt = CLASSES[kind.split(" ")[0]](
        groups, lr=0.05, weight_decay=0.2, backend=backend, track_changes=watch != "statistics",
        **{**OPTIONS[kind], **options},
    )  # fmt: skip
    stats = opt.statistics(every=2) if watch != "changes" else None
    found = []
    for t in range(1, steps + 1):
        opt.param_groups[1]["lr"] = 0.0 if t == 3 else 0.02
        for k, (p, piece) in enumerate(zip(params, pieces, strict=True)):
            grad = gradient(piece, grad_dtype, 10 * t + k)
            if t == 3 and k == 1:
                grad[3], grad[1400:1402] = math.nan, math.inf
            p.grad = None if (t, k) == (3, 3) else grad.to(p.device)
        opt.step()
        own = snapshot(params, opt)
        if stats is not None:
            assert stats.fresh == (t % 2 == 1)
            own |= {f"of {part} {name}": value.cpu() for part in ("tensors", "groups", "total")
                    for name, value in getattr(stats, part)._asdict().items()}  # fmt: skip
        if watch != "statistics" and t != 2:  # the third step's come to those of the second
            own |= {f"{name} {what}": getattr(change, what).cpu() for name, change in opt.changes().items()
                    for what in ("index", "values")}  # fmt: skip
        found.append(own)
    return found


def same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for t, (a, b) in enumerate(zip(found, expected, strict=True), 1):
        assert a.keys() == b.keys()
        for name in b:
            assert_same_bits(a[name], b[name], f"step {t}: {name}")


ANY = [e for e in ENGINES if e in CPU or str(e) in ("triton-interpreted", "triton-gpu")]  # these run all formats
OF_CUDA = [e for e in ENGINES if e.backend == "cuda"]
OF_TRITON = [e for e in ENGINES if e.backend == "triton" and e not in ANY]
ROWS = [
    of
    for engines, kinds, stored, watches in (
        (ANY, list(OPTIONS), list(STORED), WATCHES),
        (OF_CUDA, list(OPTIONS), COMPILED, WATCHES[:2]),
        (OF_TRITON, ("adamw", "sgdw"), COMPILED, WATCHES[:2]),
    )
    for of in covering({"engine": engines, "kind": list(kinds), "stored": list(stored), "watch": list(watches)})
]


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(of, id="-".join(map(str, of.values())), marks=[pytest.mark.gpu] * (of["engine"].form == "gpu"))
        for of in ROWS
    ],
)
def test_every_engine_gives_the_references_bits(of: dict[str, Any], engine: Engine) -> None:
    expected = life(of["kind"], of["stored"], of["watch"], "reference")
    same(life(of["kind"], of["stored"], of["watch"], engine.backend, device=engine.device), expected)


def test_threads_and_fused_loops() -> None:
    """Large ones: threads take parts of them, and the loops of bfloat16 leave their tiles to what watches."""
    pieces = tuple(Piece((n,)) for n in (70_001, 1500, 0, 5, 40_000, 33))
    for stored in ("float32", "bfloat16", "all of it stochastic", "split24, states in 8 bits"):
        same(life("adamw", stored, "both", "cpu", pieces), life("adamw", stored, "both", "reference", pieces))


@pytest.mark.parametrize("stored", STORED)
def test_steps_are_what_they_were(stored: str) -> None:
    """Watched or not: parameters and states have the same bits."""
    watched, plain = (life("adamw", stored, watch, "cpu") for watch in ("both", "statistics"))
    dtype, grad_dtype, options = STORED[stored]
    params = make_params(PIECES, dtype, grad_dtype)
    opt = wd_kernels.AdamW(
        [{"params": params[:4]}, {"params": params[4:], "lr": 0.02}], lr=0.05, weight_decay=0.2, backend="cpu",
        **{**OPTIONS["adamw"], **options},
    )  # fmt: skip
    for t in range(1, 5):
        opt.param_groups[1]["lr"] = 0.0 if t == 3 else 0.02
        for k, (p, piece) in enumerate(zip(params, PIECES, strict=True)):
            grad = gradient(piece, grad_dtype, 10 * t + k)
            if t == 3 and k == 1:
                grad[3], grad[1400:1402] = math.nan, math.inf
            p.grad = None if (t, k) == (3, 3) else grad
        opt.step()
        for name, value in snapshot(params, opt).items():
            assert_same_bits(watched[t - 1][name], value, f"step {t}: {name}")
            assert_same_bits(plain[t - 1][name], value, f"step {t}: {name}")


# Statistics, by other hands ------------------------------------------------------------------------------------------


def trained(**options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 3))
    groups = [{"params": list(layer.named_parameters(prefix=str(k)))} for k, layer in enumerate(model)]
    return model, wd_kernels.AdamW(groups, lr=0.03, weight_decay=0.2, **options)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def check(
    own: Measured, which: list[list[int]], grads: list[Tensor], clip: float, before: list[Tensor], after: list[Tensor]
) -> None:
    """By torch, in float64; `which`: the tensors of each."""

    def of(tensors: list[Tensor]) -> Tensor:
        return torch.stack([torch.cat([tensors[i].flatten() for i in each]).norm() for each in which])

    moved = [a - b for a, b in zip(after, before, strict=True)]
    torch.testing.assert_close(own.grad_norm, of(grads) * clip, rtol=1e-6, atol=0)
    torch.testing.assert_close(own.param_norm, of(after), rtol=1e-6, atol=0)
    torch.testing.assert_close(own.update_norm, of(moved), rtol=1e-6, atol=0)
    torch.testing.assert_close(own.update_ratio, of(moved) / of(after), rtol=1e-6, atol=0)
    largest = torch.stack([torch.cat([moved[i].flatten() for i in each]).abs().max() for each in which])
    assert torch.equal(own.max_update.float(), largest.float())
    assert own.nonfinite.tolist() == [0.0] * len(which)


@pytest.mark.parametrize("clipped", [False, True])
def test_what_torch_says_of_it(clipped: bool) -> None:
    model, opt = trained(**({"max_grad_norm": 2.0} if clipped else {}))
    stats = opt.statistics()
    for seed in (1, 2):
        before = [p.detach().double() for p in model.parameters()]
        give_gradients(model, seed)
        grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
        opt.step()
        clip = min(1.0, 2.0 / float(torch.cat([g.flatten() for g in grads]).norm())) if clipped else 1.0
        after = [p.detach().double() for p in model.parameters()]

        check(stats.tensors, [[0], [1], [2], [3]], grads, clip, before, after)
        check(stats.groups, [[0, 1], [2, 3]], grads, clip, before, after)
        check(stats.total, [[0, 1, 2, 3]], grads, clip, before, after)
    assert stats.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert stats.step == 2


def test_sums_over_blocks_are_exact() -> None:
    """Of the blocks' sums, as the reference has them: added up exactly, rounded once, in whatever order."""
    torch.manual_seed(3)
    p = nn.Parameter(torch.randn(5000) * torch.logspace(-12, 12, 5000))
    opt = wd_kernels.SGDW([p], lr=0.5, weight_decay=0.1)
    stats = opt.statistics()
    p.grad = torch.randn(5000) * torch.logspace(15, -15, 5000)
    opt.step()
    expected = [math.fsum(reference.block_sums(x.detach() * x.detach()).tolist()) for x in (p.grad, p)]
    assert [stats.tensors.grad_norm.item(), stats.tensors.param_norm.item()] == [math.sqrt(x) for x in expected]


def test_scattered_sums() -> None:
    values = torch.tensor([0.0, 5e-324, 1e308, 1e308, math.inf, 3.0, math.nan, 2.0**-1022, 0.1, 1e16, 1.0, 1.0, 7e-310])
    values = torch.cat([values.double(), torch.rand(500, dtype=f64, generator=torch.Generator().manual_seed(1)) * 1e-5])
    slots = torch.arange(len(values)) % 4
    words = sums.scattered(values, slots, 5)
    for slot in range(5):
        own = torch.zeros(sums.WORDS, dtype=torch.int64)
        sums.add(own, values[slots == slot].tolist())
        assert_same_bits(torch.tensor(sums.value(words[slot]), dtype=f64), torch.tensor(sums.value(own), dtype=f64))
    assert_same_bits(sums.values(words), torch.tensor([sums.value(own) for own in words], dtype=f64))


def test_what_is_not_finite_and_what_is_not_there() -> None:
    model, opt = trained()
    stats = opt.statistics()
    give_gradients(model, 0)  # all of them are known to the table
    opt.step()
    give_gradients(model, 1)
    grads = [p.grad for p in model.parameters()]
    assert grads[0] is not None
    grads[0][3, 4], grads[0][5, :2] = math.nan, -math.inf
    list(model.parameters())[1].grad = None
    opt.step()
    own = stats.tensors
    assert own.nonfinite.tolist()[0] == 3
    assert all(math.isnan(field[1]) for field in own)
    assert math.isnan(own.grad_norm[0])
    assert stats.groups.nonfinite.tolist() == [3, 0]
    assert math.isnan(stats.groups.grad_norm[0])
    assert math.isfinite(stats.groups.grad_norm[1])
    scalars = stats.scalars()
    assert scalars["nonfinite/0.weight"] == 3
    assert not any(key.endswith("/0.bias") for key in scalars)
    assert "-" in str(stats).splitlines()[3].split()


def test_a_skipped_step_measures_nothing() -> None:
    model, opt = trained(skip_nonfinite=True)
    stats = opt.statistics()
    give_gradients(model, 1)
    opt.step()
    assert not any(field.isnan().any() for field in stats.tensors)
    give_gradients(model, 2)
    first = next(model.parameters())
    assert first.grad is not None
    first.grad[0, 0] = math.inf
    opt.step()
    assert opt.skipped
    assert stats.step == 2
    assert all(field.isnan().all() for own in (stats.tensors, stats.groups, stats.total) for field in own)
    assert stats.scalars() == {}


def test_names_and_loggers() -> None:
    model, opt = trained()
    stats = opt.statistics(every=3)
    with pytest.raises(RuntimeError, match="no step has been measured yet"):
        _ = stats.tensors
    assert "no step" in str(stats)
    fresh = []
    for seed in range(5):
        give_gradients(model, seed)
        opt.step()
        fresh.append((stats.fresh, stats.step))
    assert fresh == [(True, 1), (False, 1), (False, 1), (True, 4), (False, 4)]
    keys = stats.scalars("optim/", tensors=False)
    assert set(keys) == {f"optim/{f}/{of}" for f in Measured._fields for of in ("all", "groups.0", "groups.1")}
    assert keys["optim/grad_norm/all"] == stats.total.grad_norm.item()
    assert stats.scalars()["update_ratio/1.weight"] == stats.tensors.update_ratio[2].item()
    lines = str(stats).splitlines()
    assert lines[0] == "step 4"
    assert [line.split()[0] for line in lines[2:]] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "group",
        "group",
        "all",
    ]
    assert len({len(line) for line in lines[1:]}) <= 2
    assert opt.statistics(every=None).every == 1
    opt.step()
    assert stats.step == 4
    positions = wd_kernels.SGDW([{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))]}])
    assert positions.statistics().names == ("0.0", "1.0")
    assert wd_kernels.SGDW(list(model.parameters())).statistics(model=model).names[2] == "1.weight"


def test_a_plot(tmp_path: Path) -> None:
    model, opt = trained()
    stats = opt.statistics()
    give_gradients(model, 1)
    opt.step()
    figure = stats.plot(tmp_path / "statistics.png")
    assert (tmp_path / "statistics.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == list(stats.names)
    assert list(right.lines[0].get_xdata()) == stats.tensors.update_ratio.tolist()


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_a_number_of_steps(every: Any) -> None:
    _, opt = trained()
    with pytest.raises((TypeError, ValueError), match=r"every=.*None"):
        opt.statistics(every)


# Marks, by comparing with a snapshot ---------------------------------------------------------------------------------


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Where two tensors differ in memory, in the order of `flatten()`; any NaN is any NaN."""
    if before.is_complex():
        return changed(torch.view_as_real(before), torch.view_as_real(after)).div(2, rounding_mode="floor").unique()
    a, b = before.contiguous().flatten(), after.contiguous().flatten()
    return ((bits(a) != bits(b)) & ~(a.isnan() & b.isnan())).nonzero()[:, 0]


@pytest.mark.parametrize("stored", [*STORED, "complex"])
def test_marks_are_what_a_snapshot_says(stored: str) -> None:
    """Over lives with small steps: many elements of 16 bits stay as they are."""
    dtype, grad_dtype, options = STORED.get(stored, (c64, c64, {}))
    params = make_params(PIECES, dtype, grad_dtype)
    with torch.no_grad():
        params[1][5] = math.nan
        params[1][6] = -0.0
    opt = wd_kernels.AdamW(params, lr=2e-4, weight_decay=0.1, track_changes=True, **options)
    copies = {k: p.detach().clone() for k, p in enumerate(params)}
    kept = 0
    for t in range(6):
        before = [p.detach().clone() for p in params]
        for k, (p, piece) in enumerate(zip(params, PIECES, strict=True)):
            p.grad = None if (t, k) == (2, 3) else gradient(piece, grad_dtype, 10 * t + k) * (t != 4)
        opt.param_groups[0]["lr"] = 0.0 if t == 3 else 2e-4
        opt.step()
        found = opt.changes()
        for k, p in enumerate(params):
            expected = changed(before[k], p.detach())
            index = found[k].index if k in found else torch.empty(0)
            assert index.tolist() == expected.tolist(), (t, k)
            if k in found:
                assert index.dtype == torch.int32
                assert_same_bits(found[k].values, p.detach().flatten()[expected])
                assert int(found[k].counts().sum()) == len(expected)
                assert found[k].counts(100).tolist() == [
                    int(((expected >= b) & (expected < b + 100)).sum()) for b in range(0, p.numel(), 100)
                ]
            kept += p.numel() - len(expected)
        assert (t == 3) == (not found)
        wd_kernels.apply_changes(copies, found)
        for k, p in enumerate(params):
            assert_same_bits(copies[k], p.detach(), f"copy {k}")
    assert kept > 6 * 1500


def test_changes_add_up_until_they_are_read() -> None:
    p = nn.Parameter(torch.zeros(100))
    opt = wd_kernels.SGDW([("w", p)], lr=1.0, track_changes=True)
    for k in (3, 40, 99):
        p.grad = torch.zeros(100)
        p.grad[k] = 1.0
        opt.step()
    assert opt.changes()["w"].index.tolist() == [3, 40, 99]
    assert opt.changes() == {}
    opt.track_changes = False
    with pytest.raises(RuntimeError, match="track_changes=True"):
        opt.changes()
    opt.step()
    opt.track_changes = True
    opt.step()
    assert opt.changes()["w"].index.tolist() == [99]
    opt.track_changes = False
    opt.step()
    opt.track_changes = True  # of what was before nothing is left
    assert opt.changes() == {}
    opt.step()
    assert opt.changes()["w"].index.tolist() == [99]


def test_what_others_write_may_all_have_changed() -> None:
    p = nn.Parameter(torch.ones(70, dtype=bf16))
    opt = wd_kernels.AdamW([("w", p)], lr=1e-3, master_weights="split32", track_changes=True)

    def step() -> list[int]:
        p.grad = torch.zeros_like(p)
        p.grad[7] = 5.0
        opt.step()
        found = opt.changes()
        return found["w"].index.tolist() if "w" in found else []

    assert len(step()) <= 1
    opt.load_master_weights({"w": torch.full((70,), 3.0)})
    assert step() == list(range(70))
    p.data = torch.full((70,), 2.0, dtype=bf16)
    opt.load_master_weights()
    assert opt.changes()["w"].index.tolist() == list(range(70))
    assert len(step()) <= 1
    p.data = torch.full((40,), 2.0, dtype=bf16)
    opt.state.clear()
    assert step() == list(range(40))
    assert len(step()) <= 1
    p.data = torch.full((40,), 4.0, dtype=bf16)
    assert opt.changes()["w"].values.tolist() == [4.0] * 40


def test_copies_track_anew() -> None:
    model, opt = trained(track_changes=True)
    give_gradients(model, 1)
    opt.step()
    again = pickle.loads(pickle.dumps(opt))
    both = copy.deepcopy((model, opt))
    for other in (again, both[1]):
        assert other.track_changes
        assert other.changes() == {}
    give_gradients(both[0], 2)
    both[1].step()
    assert set(both[1].changes()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert len(opt.changes()) == 4
    del again.__dict__["_marks"]
    assert not again.track_changes


def test_a_model_names_them() -> None:
    model, _ = trained()
    opt = wd_kernels.SGDW(list(model.parameters()), lr=0.1, track_changes=True)
    give_gradients(model, 1)
    opt.step()
    with pytest.raises(KeyError, match="none of the model's"):
        opt.changes(nn.Linear(2, 2))
    assert set(opt.changes(model)) == set(dict(model.named_parameters()))
    opt.step()
    assert set(opt.changes()) == {0, 1, 2, 3}


def test_marks_stay_those_that_launches_write() -> None:
    """Memory that is exchanged and comes back, groups that go and come: nothing that a step changes is lost."""
    p, q = nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(70))
    opt = wd_kernels.SGDW([{"params": [p]}, {"params": [q]}], lr=0.5, track_changes=True)
    p.grad, q.grad = torch.ones(40), torch.ones(70)
    opt.step()
    assert set(opt.changes()) == {0, 1}
    old = p.data
    p.data = old.clone()
    assert set(opt.changes()) == {0}
    p.data = old
    opt.step()
    assert opt.changes()[0].index.tolist() == list(range(40))
    p.data = torch.full((90,), 2.0)  # of another size, and back
    opt.changes()
    p.data = old
    for _ in range(3):
        opt.step()
        assert set(opt.changes()) == {0, 1}
    group = opt.param_groups.pop()
    assert opt.changes() == {}
    opt.param_groups.append(group)
    opt.step()
    assert set(opt.changes()) == {0, 1}


def test_memory_at_an_address_that_came_back_is_another() -> None:
    for n in (100, 10**5):
        p = nn.Parameter(torch.ones(n))
        opt = wd_kernels.SGDW([p], lr=0.5, track_changes=True)
        p.grad = torch.zeros(n)
        opt.step()
        opt.changes()
        for value in (2.0, 3.0, 4.0):
            p.data = torch.full((n,), value)
        assert opt.changes()[0].values.tolist() == [4.0] * n


def test_masters_that_are_loaded_before_the_first_step_are_changes() -> None:
    p = nn.Parameter(torch.ones(40, dtype=bf16))
    opt = wd_kernels.AdamW([("w", p)], lr=1e-5, weight_decay=0.01, master_weights="split32", track_changes=True)
    opt.load_master_weights({"w": torch.full((40,), 7.0)})
    assert opt.changes()["w"].values.tolist() == [7.0] * 40
    other = nn.Parameter(torch.ones(40, dtype=bf16))
    again = wd_kernels.AdamW([("w", other)], lr=1e-5, master_weights="split24", track_changes=True)
    p.grad = torch.ones_like(p)
    opt.step()
    again.load_state_dict(opt.state_dict(), convert_states=True)
    assert again.changes()["w"].index.numel() == 40


def test_names_that_repeat_lose_nothing() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    opt = wd_kernels.SGDW(
        [{"params": list(a.named_parameters())}, {"params": list(b.named_parameters())}], lr=0.5, track_changes=True
    )
    stats = opt.statistics()
    assert len(set(stats.names)) == 4
    for p in (*a.parameters(), *b.parameters()):
        p.grad = torch.ones_like(p)
    opt.step()
    with pytest.raises(ValueError, match=r"two parameters .* 'weight'.*changes\(model\)"):
        opt.changes()
    assert set(opt.changes(nn.Sequential(a, b), clear=False)) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert len(opt.changes(torch.compile(nn.Sequential(a, b)))) == 4
    assert opt.changes(nn.Sequential(a, b)) == {}


def test_changes_are_saved_and_reach_shared_weights(tmp_path: Path) -> None:
    model, opt = trained(track_changes=True)
    give_gradients(model, 1)
    opt.step()
    torch.save(opt.changes(), tmp_path / "changes.pt")
    loaded = torch.load(tmp_path / "changes.pt")
    served = copy.deepcopy(model)
    with torch.no_grad():
        for p in served.parameters():
            p.zero_()
    wd_kernels.apply_changes(served, loaded)
    for p, q in zip(model.parameters(), served.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(TypeError, match="changes is a list"):
        wd_kernels.apply_changes(served, [])
    with pytest.raises(ValueError, match="expanded"):
        wd_kernels.apply_changes({"0.bias": torch.zeros(1).expand(70)}, {"0.bias": loaded["0.bias"]})
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module"):
        opt.changes([model])


def test_a_dimension_of_one_may_have_any_stride() -> None:
    p = nn.Parameter(torch.randn(2, 3).t().as_strided((3, 1, 2), (1, 0, 3)))
    opt = wd_kernels.SGDW([p], lr=0.1, track_changes=True)
    p.grad = torch.zeros(3, 1, 2)
    p.grad[1, 0, 1] = p.grad[2, 0, 0] = 1.0
    opt.step()
    assert opt.changes()[0].index.tolist() == [3, 4]


def test_bad_changes_write_nothing() -> None:
    Change = wd_kernels.Change
    w, v = torch.zeros(4), torch.zeros(2, 2)
    good = Change(torch.tensor([1]), torch.tensor([5.0]), torch.Size([4]))
    shape = torch.Size([2, 2])
    bad: dict[str, tuple[Any, type, str]] = {
        "no such name": ({"w": good, "x": good}, KeyError, "'x'"),
        "shape": ({"w": good, "v": good}, ValueError, r"\(4,\).*\(2, 2\)"),
        "dtype": ({"w": good, "v": Change(torch.tensor([0]), torch.ones(1).half(), shape)}, TypeError, "float16"),
        "index": ({"w": good, "v": Change(torch.tensor([4]), torch.ones(1), shape)}, ValueError, "from 4 to 4"),
        "negative": ({"w": good, "v": Change(torch.tensor([-1]), torch.ones(1), shape)}, ValueError, "-1"),
        "lengths": ({"w": good, "v": Change(torch.tensor([0, 1]), torch.ones(1), shape)}, ValueError, "an index of"),
        "a tuple": ({"w": good, "v": (torch.tensor([0]), torch.ones(1))}, TypeError, "expected a Change"),
    }
    for what, (given, error, message) in bad.items():
        with pytest.raises(error, match=message):
            wd_kernels.apply_changes({"w": w, "v": v}, given)
        assert not w.any(), what
        assert not v.any(), what
    wd_kernels.apply_changes({"w": w, "v": v}, {"w": good})
    assert w.tolist() == [0, 5, 0, 0]


# Both, and other features --------------------------------------------------------------------------------------------


def numbers_of(opt: Any, stats: Any) -> dict[str, Tensor]:
    found = {f"{part} {name}": value for part in ("tensors", "groups", "total")
             for name, value in getattr(stats, part)._asdict().items()}  # fmt: skip
    return found | {f"{name} {what}": getattr(change, what) for name, change in opt.changes().items()
                    for what in ("index", "values")}  # fmt: skip


def test_flat_buffers() -> None:
    """Neighbours are stepped as one, but counted and marked one by one; plain steps in between are runs again."""

    def life(flat: bool) -> list[dict[str, Tensor]]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n)) for n in (1500, 33, 0, 2048, 7)]
        if flat:
            wd_kernels.flatten_(params)
        opt = wd_kernels.AdamW(params, lr=1e-2, track_changes=True)
        stats = opt.statistics(every=2)
        found = []
        for t in range(4):
            for k, p in enumerate(params):
                if p.grad is None:
                    p.grad = torch.empty_like(p)
                p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + k)))
            opt.step()
            found.append(numbers_of(opt, stats) | snapshot(params, opt))
        return found

    same(life(flat=True), life(flat=False))


def test_captured_steps_are_watched_in_every_replay() -> None:
    params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (64, 1536)]
    others = [nn.Parameter(p.detach().clone()) for p in params]

    def take(opt: Any, own: list[nn.Parameter], t: int, step: Any) -> None:
        for k, p in enumerate(own):
            grad = torch.linspace(-1, 1, p.numel()).roll(t + k)
            if p.grad is None:
                p.grad = grad
            else:
                p.grad.copy_(grad)
        step()

    with pytest.MonkeyPatch.context() as patch:
        engine = Engine("triton", "interpreted")
        engine.provide(patch)
        graphs = graphs_of(engine, patch)
        opt = wd_kernels.AdamW(params, lr=0.01, capturable=True, track_changes=True, backend="triton")
        stats = opt.statistics()
        expected_opt = wd_kernels.AdamW(others, lr=0.01, track_changes=True, backend="reference")
        expected_stats = expected_opt.statistics()
        graph: Any = None

        def captured() -> None:
            nonlocal graph
            with graphs.capture() as graph:
                opt.step()
            graph.replay()

        for t in range(4):
            take(opt, params, t, opt.step if t == 0 else captured if t == 1 else lambda: graph.replay())
            take(expected_opt, others, t, expected_opt.step)
            found, expected = numbers_of(opt, stats), numbers_of(expected_opt, expected_stats)
            assert found.keys() == expected.keys()
            for name in expected:
                assert_same_bits(found[name], expected[name], f"step {t}: {name}")
        opt.end_captures()
        plain = wd_kernels.AdamW([nn.Parameter(torch.ones(64))], capturable=True, backend="triton")
        plain.param_groups[0]["params"][0].grad = torch.ones(64)
        plain.step()
        plain.statistics()
        with pytest.raises(RuntimeError, match="watched"), graphs.capture():
            plain.step()


def sharded() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape)) for shape in ((4096,), (6, 5), (1, 3), (2050,))]
    params: list[Any] = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole[:3]]
    params.append(nn.Parameter(whole[3].detach().clone()))
    opts = [wd_kernels.AdamW(own, lr=0.1, weight_decay=0.2, track_changes=True) for own in (params, whole)]
    stats = [opt.statistics() for opt in opts]
    for t in range(2):
        for k, (p, w) in enumerate(zip(params, whole, strict=True)):
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(10 * t + k))
            p.grad = distribute_tensor(w.grad, mesh, [Shard(0)]) if k < 3 else w.grad.clone()
        for opt in opts:
            opt.step()
        a, b = (own.tensors for own in stats)
        for name, x, y in zip(Measured._fields, a, b, strict=True):
            assert_same_bits(x[0], y[0], name)  # borders are multiples of 1024
            assert_same_bits(x[3], y[3], name)
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.stack(stats[0].total), torch.stack(stats[1].total), rtol=1e-6, atol=0)
        assert torch.equal(a.max_update, b.max_update)
        found = opts[0].changes()
        opts[1].changes()
        for k, p in enumerate(params):
            here = p.to_local() if isinstance(p, DTensor) else p
            assert (k in found) == (here.numel() > 0)
            if k in found:
                assert found[k].index.tolist() == list(range(here.numel()))
                assert torch.equal(found[k].values, here.detach().flatten())
    assert dist.get_world_size() == 2


def test_sharded_parameters() -> None:
    ranks.run(2, sharded)


def test_accumulated_and_scaled_gradients() -> None:
    model, opt = trained()
    stats = opt.statistics()
    give_gradients(model, 1)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    opt.accumulate()
    give_gradients(model, 2)
    both = [a + p.grad for a, p in zip(first, model.parameters(), strict=True) if p.grad is not None]
    opt.step()
    torch.testing.assert_close(
        stats.tensors.grad_norm, torch.stack([g.double().norm() for g in both]), rtol=1e-6, atol=0
    )
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    give_gradients(model, 3)
    opt.step()
    expected = torch.stack([p.grad.double().norm() / 8 for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(stats.tensors.grad_norm, expected, rtol=1e-6, atol=0)


def test_released_gradients_are_not_watched() -> None:
    for options, watch in (({"track_changes": True}, False), ({}, True)):
        model, opt = trained(**options)
        if watch:
            opt.statistics()
        with pytest.raises(ValueError, match="with gradient release"):
            wd_kernels.release_gradients(model, opt)
    model, opt = trained()
    wd_kernels.release_gradients(model, opt)
    with pytest.raises(RuntimeError, match="gradients are released"):
        opt.statistics()
    with pytest.raises(RuntimeError, match="gradients are released"):
        opt.track_changes = True
    assert not opt.track_changes


def test_a_failed_step_is_not_measured() -> None:
    model, opt = trained(track_changes=True)
    stats = opt.statistics(every=2)
    give_gradients(model, 1)
    opt.step()
    opt.changes()
    give_gradients(model, 2)
    opt.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        opt.step()
    opt.param_groups[1]["lr"] = 0.01
    opt.step()
    assert not stats.fresh
    opt.step()
    assert (stats.fresh, stats.step) == (True, 3)


def test_numbers_stay_those_of_their_step() -> None:
    """Of an object that measures no more, of steps that fail, of steps without gradients, of what was loaded since."""
    p = nn.Parameter(torch.ones(4))
    opt = wd_kernels.AdamW([p], lr=0.5)
    first = opt.statistics()
    p.grad = torch.ones(4)
    opt.step()
    second = opt.statistics()
    assert not first.fresh
    p.grad = torch.full((4,), 100.0)
    opt.step()
    assert (first.step, first.tensors.grad_norm.item(), second.tensors.grad_norm.item()) == (1, 2.0, 200.0)
    state, opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"], torch.ones(3)
    with pytest.raises(ValueError, match="exp_avg"):
        opt.step()
    assert (second.fresh, second.step, second.tensors.grad_norm.item()) == (False, 1, 200.0)
    opt.state[p]["exp_avg"] = state
    p.grad = None
    opt.step()
    assert (second.fresh, second.step, second.tensors.grad_norm.item()) == (False, 1, 200.0)
    held = weakref.ref(opt.state[p]["exp_avg"])
    del state
    opt.load_state_dict(opt.state_dict())
    p.grad = torch.ones(4)
    opt.statistics(every=None)
    opt.step()
    assert held() is None
    assert pickle.loads(pickle.dumps(second)).tensors.grad_norm.item() == 200.0
    with pytest.raises(AttributeError):
        second.every = 0


def test_toggling_keeps_no_launches() -> None:
    p = nn.Parameter(torch.ones(100))
    opt = wd_kernels.SGDW([p], lr=0.5)
    p.grad = torch.ones(100)
    for _ in range(6):
        opt.track_changes = True
        opt.step()
        opt.track_changes = False
    opt.statistics()
    opt.step()
    assert len(opt._table._watching) <= 2


@pytest.mark.usefixtures("own_garbage")
def test_what_is_dropped_is_freed_at_once() -> None:
    """Not when the garbage collector comes: a table and its watched launches are no circle."""
    p = nn.Parameter(torch.ones(100))
    opt = wd_kernels.AdamW([p], lr=0.5, track_changes=True)
    opt.statistics()
    p.grad = torch.ones(100)
    gc.collect()
    gc.disable()
    try:
        opt.step()
        table, state = weakref.ref(opt._table), weakref.ref(opt.state[p]["exp_avg"])
        opt.load_state_dict(opt.state_dict())
        assert table() is None
        assert state() is None
    finally:
        gc.enable()


def test_names_follow_groups() -> None:
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    opt = wd_kernels.SGDW([p, q], lr=0.5)
    stats = opt.statistics()
    p.grad = q.grad = torch.ones(4)
    opt.step()
    opt.param_groups[0]["params"] = [p]
    opt.add_param_group({"params": [q], "name": "all of it"})
    opt.step()
    assert stats.groups.grad_norm.tolist() == [2.0, 2.0]
    assert stats.group_names == ("0", "all of it")
    opt.param_groups[0]["name"] = "all of it"
    opt.step()
    assert len({key for key in stats.scalars() if key.startswith("grad_norm/groups.")}) == 2
    names = wd_kernels.SGDW([("all", p), ("groups.0", q)], lr=0.5)
    of = names.statistics()
    names.step()
    assert len({key for key in of.scalars() if key.startswith("grad_norm/")}) == 4
    short = wd_kernels.SGDW([("p", p)], lr=0.5, track_changes=True)
    short.statistics()
    short.param_groups[0]["params"].append(q)
    short.step()
    assert set(short.changes()) == {"p", 1}


def test_groups_come_and_go() -> None:
    model, opt = trained(track_changes=True)
    stats = opt.statistics()
    give_gradients(model, 1)
    opt.step()
    opt.changes()
    extra = nn.Parameter(torch.ones(2100))
    opt.add_param_group({"params": [("extra", extra)]})
    give_gradients(model, 2)
    extra.grad = torch.ones(2100)
    opt.step()
    assert stats.names[-1] == "extra"
    assert stats.groups.grad_norm[2].item() == pytest.approx(math.sqrt(2100))
    assert opt.changes()["extra"].index.numel() == 2100
    opt.param_groups.pop(0)
    opt.step()
    assert len(stats.names) == 3
    assert set(opt.changes()) == {"1.weight", "1.bias", "extra"}


def test_no_option_is_a_word() -> None:
    with pytest.raises(TypeError, match=re.escape("track_changes='yes'")):
        wd_kernels.SGDW([nn.Parameter(torch.ones(2))], track_changes="yes")
    opt = wd_kernels.SGDW([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="track_changes=3"):
        opt.track_changes = 3
