"""Flat parameters as tensors: zeroing, memory, files, copies, modules, errors, training. Steps: test_flat.py."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_optimizers, assert_untouched
from semantics import STATES, all_params, build, checked_step, parameters, plain, set_gradients, untouched
from test_flat import ALIKE, SHAPES, Pair, attached, count_runs, fill, swap_states
from torch import Tensor, nn

import wd_kernels
from wd_kernels import flat, flatten_, unflatten_
from wd_kernels.flat import place_of

walk = semantics.walk
pytestmark = pytest.mark.filterwarnings("ignore:this state has")
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


# Gradients that are zeroed --------------------------------------------------------------------------------------------


def test_zero_grad_keeps_gradients() -> None:
    """As torch's, to the letter: gradients stay the tensors that they are, those elsewhere too; None stays None."""
    params = [*parameters(SHAPES), *parameters(ALIKE, torch.bfloat16)]
    opt = build("adamw", params)
    flatten_(params)
    for t, change in enumerate((lambda p: None, lambda p: p.grad, lambda p: torch.ones_like(p))):
        for p in params[2:4]:
            p.grad = change(p)
        fill(params, t)
        grads = [p.grad for p in params]
        opt.zero_grad(set_to_none=False)
        assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
        assert not any(bool(grad.any()) for grad in grads if grad is not None)
        opt.zero_grad()
        assert all(p.grad is None for p in params)
        flatten_(params)


def test_zero_grad_is_one_memset_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [*parameters(SHAPES), *parameters(ALIKE, torch.bfloat16)]
    flatten_(params)
    opt = build("adamw", [{"params": params[1::2]}, {"params": params[::2]}])
    fell_back: list[bool] = []
    ordinary = torch.optim.Optimizer.zero_grad
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda *args: (fell_back.append(True), ordinary(*args))[0])
    for missing in ((), (3,), (0, 1, 2)):
        for i in missing:
            params[i].grad = None
        fill(params, 1)
        opt.zero_grad(set_to_none=False)
        assert not any(bool(p.grad.any()) for p in params if p.grad is not None)
        assert [p.grad is None for p in params] == [i in (3, 0, 1, 2)[: 4 * len(missing)] and p.grad is None
                                                    for i, p in enumerate(params)]  # fmt: skip
    assert not fell_back


def test_zero_grad_of_one_of_two_optimizers() -> None:
    """A generator and its critic in one buffer: neither zeroes what is the other's, nor steps it."""
    params = parameters(SHAPES)
    flatten_(params)
    opts = [build("adamw", params[:3]), build("sgdw", params[3:])]
    for t in range(4):
        fill(params, t)
        grads = [plain(p.grad) for p in params]
        checked_step(opts[t % 2])
        checked_step(opts[t % 2])
        assert count_runs(opts[t % 2]) == 1
        opts[t % 2].zero_grad(set_to_none=False)
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            assert p.grad is not None
            assert_untouched(p.grad, torch.zeros_like(p) if (i >= 3) == (t % 2) else grad)


def test_zero_grad_spares_what_somebody_holds() -> None:
    """A gradient that its parameter no longer has is not zeroed: torch's zero_grad cannot know it either."""
    params = parameters(SHAPES)
    flatten_(params)
    opt = build("adamw", params)
    fill(params, 0)
    held, params[1].grad = params[1].grad, None
    assert held is not None
    copied = plain(held)
    opt.zero_grad(set_to_none=False)
    assert_untouched(held, copied)
    assert not any(bool(p.grad.any()) for p in params if p.grad is not None)
    flatten_(params)
    assert_untouched(held, copied)
    assert params[1].grad is not None
    assert not params[1].grad.any()
    assert all(map(attached, params))


def test_zero_grad_where_a_flat_buffer_was() -> None:
    """A new gradient at the address of the freed buffer is zeroed like any other."""
    for _ in range(1000):  # until the allocator gives that address
        p = nn.Parameter(torch.randn(32))
        flatten_([p])
        opt = build("adamw", [p])
        opt.zero_grad(set_to_none=False)
        assert p.grad is not None
        address, p.grad = p.grad.data_ptr(), None
        p.grad = torch.ones(32)
        again = p.grad.data_ptr() == address
        opt.zero_grad(set_to_none=False)
        assert not p.grad.any()
        if again:
            break
    assert again


def test_flattening_again_keeps_gradients() -> None:
    """Wherever they lie: in each other's stretch, elsewhere, in no place yet."""
    params = parameters(ALIKE)
    (buffer,) = flatten_(params)
    fill(params, 0)
    values = [plain(p.grad) for p in params]
    grads = [p.grad for p in params]
    for i, p in enumerate(params[:4]):
        p.grad = grads[(i + 1) % 4]
    params[4].grad = None
    params[4].grad = torch.full((16,), 7.0)
    assert flatten_(params) == [buffer]
    for i, p in enumerate(params):
        assert attached(p)
        assert p.grad is not None
        assert_untouched(p.grad, values[(i + 1) % 4] if i < 4 else torch.full((16,), 7.0))
    for grad, old in zip(grads, values, strict=True):
        assert grad is not None
        assert_untouched(grad, old)  # whoever holds them
    mine = [p.grad for p in params]
    flatten_(params[1:3])  # a part, all attached: nothing happens
    assert all(p.grad is grad for p, grad in zip(params, mine, strict=True))


# Memory ---------------------------------------------------------------------------------------------------------------


def test_buffers_alias_their_tensors() -> None:
    params = parameters(SHAPES)
    (buffer,) = flatten_(iter(params))
    assert repr(buffer) == "FlatBuffer(448 elements of torch.float32 on cpu, gradients attached)"
    assert (buffer.numel, buffer.dtype, buffer.device) == (448, torch.float32, torch.device("cpu"))
    fill(params, 0)
    for whole, own in (buffer.data, [p.detach() for p in params]), (buffer.grad, [p.grad for p in params]):
        assert whole is not None
        offset = 0
        for t in own:
            assert t is not None
            assert t.data_ptr() == whole.data_ptr() + 4 * offset
            assert t.data_ptr() % 64 == 0
            assert_untouched(whole[offset : offset + t.numel()].view(t.shape), t)
            assert not whole[offset + t.numel() : flat.padded(offset + t.numel())].any()
            offset += flat.padded(t.numel())
        assert offset == whole.numel()
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    assert buffer.grad is not None
    assert torch.allclose(buffer.grad.norm(), norm)
    buffer.grad.mul_(2)
    assert torch.allclose(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]), 2 * norm)


@both
def test_buffers_are_freed(rule: str, walk: str) -> None:
    params = parameters(SHAPES)
    (buffer,) = flatten_(params)
    opt = build(rule, params)
    for t in range(2):
        fill(params, t)
        checked_step(opt)
    opt.zero_grad()
    set_gradients(params, 2)
    checked_step(opt)
    assert buffer.grad is None
    assert buffer.grad_address == 0
    assert "elsewhere" in repr(buffer)
    for t in range(2):
        set_gradients(params, 3 + t)
        checked_step(opt)
    flatten_(params)  # again: the gradients are given new memory
    assert buffer.grad is not None
    fill(params, 5)
    checked_step(opt)
    assert count_runs(opt) == 1
    for p in params[1:]:
        p.data = p.data.clone()
    assert buffer.data is not None
    unflatten_(params)
    assert buffer.data is None
    assert buffer.grad is None or walk == "native"  # the table holds gradients until the next step
    fill(params, 6)
    checked_step(opt)
    assert buffer.grad is None
    bases = [
        weakref.ref(base) for base in (b.tensor() for b in opt._table.flat_states._bases.values()) if base is not None
    ]
    assert bases
    opt.load_state_dict(opt.state_dict())
    assert all(ref() is None for ref in bases)


@both
def test_what_is_deleted_is_freed(rule: str, walk: str) -> None:
    """The model with its optimizer, or either alone; without the garbage collector's help where torch needs none."""
    refs: list[weakref.ref[Any]] = []
    for _ in range(2):
        params = parameters(SHAPES)
        (buffer,) = flatten_(params)
        opt = build(rule, params)
        for t in range(3):
            fill(params, t)
            opt.step()
        refs += [weakref.ref(p) for p in params]
        refs += [weakref.ref(p.grad) for p in params if p.grad is not None]
        refs += [weakref.ref(own[name]) for own in opt.state.values() for name in STATES[rule]]
        gone = [weakref.ref(own[name]) for own in opt.state.values() for name in STATES[rule]]
        del opt
        gc.collect()
        assert all(ref() is None for ref in gone)
        del params
        gc.collect()
        assert buffer.data is None
        assert buffer.grad is None
    assert all(ref() is None for ref in refs)


def test_many_steps_keep_nothing(walk: str) -> None:
    """As many tensors live after fifty steps with every kind of exchange as after five."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    pair = Pair("adamw", parameters(ALIKE))
    counts = []
    for t in range(24):
        pair.step(t)
        swap_states(pair.opt, pair.params)
        swap_states(pair.twin, pair.twins)
        if t % 4 == 1:
            pair.opt.zero_grad()
        if t % 4 in (1, 3):
            flatten_(pair.params)
        if t % 4 == 2:
            for opt, _ in pair.both():
                opt.load_state_dict(opt.state_dict())
        if t % 4 == 3:
            unflatten_(pair.params)
            flatten_(pair.params)
            counts.append(alive())
    assert len(set(counts[1:])) == 1
    assert len([p for p in pair.params if p in flat.known_places]) == 5


# Saving and copying ---------------------------------------------------------------------------------------------------


def size(saved: Any, how: str) -> int:
    if how == "pickle":
        return len(pickle.dumps(saved))
    file = io.BytesIO()
    torch.save(saved, file)
    return len(file.getvalue())


@both
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_files_hold_a_tensors_own_bytes(rule: str, how: str) -> None:
    """No larger than those of ordinary tensors: no neighbour travels along."""
    sizes = []
    for is_flat in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(50, 50) for _ in range(10)))
        if is_flat:
            flatten_(model.parameters())
        opt = build(rule, model.parameters())
        for t in range(2):
            if is_flat:
                fill(all_params(opt), t)
            else:
                set_gradients(all_params(opt), t)
            opt.step()
        tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
        tensors += [own[name] for own in opt.state.values() for name in STATES[rule]]
        assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in tensors if t is not None)
        sizes.append(
            [size(x, how) for x in (model[3].weight, model[3].bias, model.state_dict(), opt.state_dict(), opt)]
        )
        loaded = pickle.loads(pickle.dumps((model, opt)))
        assert all(place_of(p) is None for p in loaded[0].parameters())
        assert_same_optimizers(loaded[1], opt)
        set_gradients(all_params(loaded[1]), 5)
        checked_step(loaded[1])
    assert all(abs(a - b) <= 256 for a, b in zip(*sizes, strict=True)), sizes
    assert sizes[0][2] > 100_000 > 20_000 > sizes[0][0]


@both
def test_copies_are_ordinary(rule: str, walk: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    (buffer,) = flatten_(model.parameters())
    opt = build(rule, model.parameters())
    fill(all_params(opt), 0)
    checked_step(opt)
    other = copy.deepcopy(model)
    assert buffer.data is not None
    begin, end = buffer.data.data_ptr(), buffer.data.data_ptr() + 4 * buffer.numel
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_untouched(p, q)
        assert place_of(p) is not None
        assert place_of(q) is None
        assert not begin <= q.data_ptr() < end
    before = [plain(p) for p in model.parameters()]
    both_copied = copy.deepcopy((other, build(rule, other.parameters())))
    twin = copy.deepcopy(opt)
    for t in range(2):
        set_gradients(all_params(twin), t)
        checked_step(twin)
        set_gradients(all_params(both_copied[1]), t)
        checked_step(both_copied[1])
    assert all(map(torch.equal, before, model.parameters()))
    fill(all_params(opt), 3)
    checked_step(opt)
    assert count_runs(opt) == 1


@both
def test_modules_that_load_and_convert(rule: str, walk: str) -> None:
    """load_state_dict copies in place, and all stays flat; another dtype is other memory, and is stepped right."""
    model, source = (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) for _ in range(2))
    params = list(model.parameters())
    flatten_(params)
    opt = build(rule, params)
    for t in range(2):
        fill(params, t)
        checked_step(opt)
        model.load_state_dict(source.state_dict())
        assert all(map(attached, params))
    fill(params, 3)
    checked_step(opt)
    assert count_runs(opt) == 1
    opt.state.clear()
    for convert in (model.double, model.float, model.bfloat16, lambda: model.to(torch.float32)):
        convert()
        assert all(place_of(p) is None for p in params)
        for t in range(2):
            fill(params, t)
            checked_step(opt)
            assert count_runs(opt) == 4
        opt.state.clear()
    flatten_(params)
    fill(params, 4)
    checked_step(opt)
    assert count_runs(opt) == 1


@both
def test_shared_memory(rule: str, walk: str) -> None:
    """share_memory_ moves each tensor to memory of its own, in place."""
    pair = Pair(rule)
    pair.step(0, runs=1)
    for p in pair.params:
        p.share_memory_()
        assert p.is_shared()
        assert place_of(p) is None
    pair.step(1, runs=len(SHAPES))
    for p in pair.params:
        assert p.grad is not None
        p.grad.share_memory_()
    pair.step(2, runs=len(SHAPES))


def test_tied_weights() -> None:
    """A parameter that comes twice, in a list or as a part of two modules, has one place."""
    model = nn.ModuleDict({"embed": nn.Embedding(9, 5), "head": nn.Linear(5, 9)})
    model["head"].weight = model["embed"].weight
    weight = model["embed"].weight
    entries = [*model["embed"].parameters(), *model["head"].parameters()]
    assert len(entries) == 3
    (buffer,) = flatten_(entries)
    assert buffer.numel == 64 + 32
    assert model["head"].weight is weight
    opt = build("adamw", model.parameters())
    twin = copy.deepcopy(model)
    other = build("adamw", twin.parameters(), backend="reference")
    for t in range(3):
        for m, o in ((model, opt), (twin, other)):
            m["head"](m["embed"](torch.tensor([1, 2, t]))).square().sum().backward()
            o.step()
            o.zero_grad(set_to_none=False)
        assert_same_optimizers(opt, other)
        assert count_runs(opt) == 1


def test_forms_of_input() -> None:
    """Names, groups, names in groups, generators; errors use the names."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    groups = [{"params": model[1].parameters()}, {"params": [model[0].weight]}, {"params": model[0].bias}]
    forms: dict[str, Callable[[], Any]] = {
        "parameters": model.parameters,
        "names": model.named_parameters,
        "groups": lambda: [{**g, "params": list(model[1].parameters()) if i == 0 else g["params"]}
                           for i, g in enumerate(groups)],
        "named groups": lambda: [{"params": model.named_parameters()}],
    }  # fmt: skip
    for name, form in forms.items():
        (buffer,) = flatten_(form())
        assert buffer.numel == 64 + 32 + 32 + 32
        order = (
            [model[1].weight, model[1].bias, model[0].weight, model[0].bias]
            if name == "groups"
            else [*model.parameters()]
        )
        assert [place_of(p).offset for p in order] == sorted(place_of(p).offset for p in order)
        opt = build("adamw", form())
        fill(all_params(opt), 0)
        checked_step(opt)
        assert count_runs(opt) == (3 if name == "groups" else 1)
        unflatten_(form())
        assert all(place_of(p) is None for p in model.parameters())
        checked_step(opt)
    assert flatten_([]) == []
    assert flatten_([nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(3, 0))]) == []
    unflatten_([])


def test_frozen_parameters() -> None:
    """They lie in the buffer, and get no gradient; their neighbours are no run across them."""
    params = parameters(ALIKE)
    params[2].requires_grad_(False)
    flatten_(params)
    assert [p.grad is None for p in params] == [False, False, True, False, False]
    for given_params in (params, [p for p in params if p.requires_grad]):
        opt = build("adamw", given_params)
        before = plain(params[2])
        for t in range(3):
            fill(params, t)
            checked_step(opt)
            assert count_runs(opt) == 2
            opt.zero_grad(set_to_none=False)
            assert not any(bool(p.grad.any()) for p in params if p.grad is not None)
        assert_untouched(params[2], before)


# Errors ---------------------------------------------------------------------------------------------------------------


class Dispatching(Tensor):
    """As DTensor is: a subclass with memory of its own kind."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        made: Tensor = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def with_gradient(p: nn.Parameter, grad: Tensor) -> nn.Parameter:
    p.grad = torch.zeros_like(p)
    if grad.layout != torch.strided:
        p.grad = grad
    else:
        p.grad.data = grad
    return p


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(4)


def flat_already() -> Tensor:
    p = nn.Parameter(torch.ones(4))
    flatten_([p])
    return p


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (lambda: torch.arange(4), TypeError, "has dtype torch.int64: allowed are"),
    "sparse": (lambda: torch.eye(3).to_sparse(), RuntimeError, "has layout torch.sparse_coo"),
    "dispatching": (lambda: Dispatching(torch.ones(4)), TypeError, "is a Dispatching: subclasses"),
    "meta": (lambda: nn.Parameter(torch.ones(4, device="meta")), ValueError, "is on the meta device"),
    "sparse gradient": (
        lambda: with_gradient(nn.Parameter(torch.ones(3, 3)), torch.eye(3).to_sparse()), RuntimeError,
        "has layout torch.sparse_coo",
    ),
    "gradient of another dtype": (
        lambda: with_gradient(nn.Parameter(torch.ones(3)), torch.ones(3).bfloat16()), TypeError,
        "has dtype torch.bfloat16: flat gradients have their parameter's, torch.float32; set it to None first",
    ),
    "gradient of another shape": (
        lambda: with_gradient(nn.Parameter(torch.ones(3)), torch.ones(4)), ValueError, r"has shape \(4,\)",
    ),
    "expanded": (lambda: torch.ones(1).expand(5), ValueError, "overlaps itself"),
    "gaps": (lambda: torch.ones(4, 4)[:, ::2], ValueError, r"of shape \(4, 2\) and strides \(4, 2\) has gaps"),
    "view": (lambda: torch.ones(8)[:4], ValueError, "is a view: its 16 bytes lie in a storage of 32"),
    "not a leaf": (lambda: nn.Parameter(torch.ones(4)) * 2, ValueError, "is not a leaf of the autograd graph"),
    "inference": (inference, ValueError, "is an inference tensor"),
    "conjugate": (lambda: torch.ones(3, dtype=torch.complex64).conj(), ValueError, "lazily conjugated"),
    "flat already": (flat_already, ValueError, "is flat already, and parameter 'first' is not: unflatten_"),
    "number": (lambda: 3.0, TypeError, "is a float: expected a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED), ids=list(REFUSED))
@pytest.mark.parametrize("form", ["plain", "named", "groups"])
def test_what_cannot_be_flat(case: str, form: str) -> None:
    """By name; and nothing was moved."""
    make, error, message = REFUSED[case]
    bad, good = make(), parameters(SHAPES)
    set_gradients(good, 0, skip=[2])
    given_params: Any = [*good, bad]
    what = f"parameter {len(good)}"
    if form == "named" or case == "flat already":
        given_params = [(name, p) for name, p in zip(("first", *"bcdefg", "last"), given_params, strict=True)]
        what = "parameter 'last'"
    elif form == "groups":
        given_params = [{"params": good}, {"params": [bad]}]
        what = "parameter 0 of group 1"
    before = [(p.data_ptr(), plain(p), p.grad, None if p.grad is None else p.grad.data_ptr()) for p in good]
    generation = flat.generation()
    with pytest.raises(error, match=f"{what}.* {message}"):
        flatten_(given_params)
    for p, (address, values, grad, of_grad) in zip(good, before, strict=True):
        assert p.data_ptr() == address
        assert_untouched(p, values)
        assert p.grad is grad
        assert grad is None or grad.data_ptr() == of_grad
        assert place_of(p) is None
    assert flat.generation() == generation
    flatten_(good)


def test_overlapping_parameters() -> None:
    first = nn.Parameter(torch.randn(8))
    second = nn.Parameter(first.data)
    with pytest.raises(ValueError, match="parameter 'a' and parameter 'b' overlap in memory"):
        flatten_([("a", first), ("b", second)])
    assert first.data_ptr() == second.data_ptr()
    assert place_of(first) is None


def test_a_tensor_is_no_list() -> None:
    for call in (flatten_, unflatten_):
        with pytest.raises(TypeError, match="params is a Tensor: expected an iterable of parameters"):
            call(torch.ones(3))


@both
@pytest.mark.parametrize("spoil", ["gradient", "state", "step", "lr"])
def test_a_failed_step_changes_nothing(rule: str, spoil: str, walk: str) -> None:
    """Also the next step of what was well is right, and in one run."""
    pair = Pair(rule, parameters(ALIKE))
    for t in range(2):
        pair.step(t, runs=1)
    opt, p, group = pair.opt, pair.params[3], pair.opt.param_groups[0]
    own, name, grad, lr = opt.state[p], STATES[rule][0], p.grad, group["lr"]
    assert grad is not None
    kept, good = dict(own), grad.data
    step = float(own["step"])
    if spoil == "gradient":
        grad.data = torch.ones(3)
    elif spoil == "state":
        own[name] = torch.zeros(99)
    elif spoil == "step":
        own["step"].fill_(0.5)
    else:
        group["lr"] = torch.nan
    for _ in range(2):
        with untouched(opt), pytest.raises(ValueError, match="parameter 3 of group 0" if spoil != "lr" else "lr=nan"):
            opt.step()
    grad.data, group["lr"] = good, lr
    own.update(kept)
    own["step"].fill_(step)
    for t in range(2, 4):
        pair.step(t, runs=1)


@both
def test_a_launch_that_fails_moves_and_counts_nothing(rule: str, walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(rule)
    pair.step(0, runs=1)
    fill(pair.params, 1)
    counts = [float(own["step"]) for own in pair.opt.state.values()]
    before = [plain(p) for p in pair.params]
    monkeypatch.setenv("WD_KERNELS_ISA", "none of them")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="WD_KERNELS_ISA=none of them"):
            pair.opt.step()
    monkeypatch.delenv("WD_KERNELS_ISA")
    assert all(map(torch.equal, before, pair.params))
    assert [float(own["step"]) for own in pair.opt.state.values()] == counts
    pair.step(1, runs=1)


# Training -------------------------------------------------------------------------------------------------------------


@both
def test_training(rule: str, walk: str) -> None:
    """Autograd accumulates into the views; scaling and clipping are in place. An ordinary twin has the same bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 1))
    twin = copy.deepcopy(model)
    flatten_(model.named_parameters())

    def decayed(m: nn.Module) -> list[dict[str, Any]]:
        vectors = [p for p in m.parameters() if p.dim() <= 1]
        return [{"params": [p for p in m.parameters() if p.dim() > 1]}, {"params": vectors, "weight_decay": 0.0}]

    opts = [build(rule, decayed(model)), build(rule, decayed(twin), backend="reference")]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, 12) for opt in opts]
    views = [p.grad for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for t in range(12):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t))
        for m, opt, scheduler in zip((model, twin), opts, schedulers, strict=True):
            for part in x.split(8):  # accumulated
                scaler.scale((m(part) - part.sum(1, keepdim=True)).square().mean()).backward()
            for p in m.parameters():
                assert p.grad is not None
                p.grad.div_(scaler.get_scale())
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            opt.step()
            scheduler.step()
            opt.zero_grad(set_to_none=False)
        assert_same_optimizers(*opts, f"step {t}")
        assert all(p.grad is view for p, view in zip(model.parameters(), views, strict=True))
        assert count_runs(opts[0]) == 6
    assert all(float(own["step"]) == 12 for own in opts[0].state.values())


def test_a_stale_graph_is_refused() -> None:
    """A flat step is a write that autograd knows of."""
    p = nn.Parameter(torch.randn(4))
    flatten_([p])
    opt = build("adamw", [p])
    loss = p.square().sum()
    fill([p], 0)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads(walk: str) -> None:
    """Optimizers over parts of one buffer, each on a thread of its own, while others flatten."""
    params = parameters([(33,)] * 8)
    flatten_(params)
    opts = [build("adamw", params[2 * k : 2 * k + 2]) for k in range(4)]
    twins = [copy.deepcopy(opt) for opt in opts]
    failures: list[BaseException] = []

    def work(opt: Any, twin: Any) -> None:
        try:
            for t in range(30):
                fill(all_params(opt), t)
                for p, q in zip(all_params(opt), all_params(twin), strict=True):
                    q.grad = plain(p.grad)
                opt.step()
                twin.step()
                opt.zero_grad(set_to_none=False)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(opts, twins, strict=True)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        flatten_(parameters([(5,)]))
    for thread in threads:
        thread.join()
    assert not failures
    for opt, twin in zip(opts, twins, strict=True):
        assert_same_optimizers(opt, twin)
        assert count_runs(opt) == 1


def test_flat_within_other_modes(walk: str) -> None:
    """In inference mode, without gradients, with another default device: what is made outlives it."""
    params = parameters(ALIKE)
    with torch.inference_mode():
        flatten_(params)
    assert not any(t.is_inference() for p in params for t in (p.data, p.grad) if t is not None)
    opt = build("adamw", params)
    with torch.inference_mode():
        fill(params, 0)
        opt.step()
    assert not any(v.is_inference() for own in opt.state.values() for v in own.values())
    fill(params, 1)
    checked_step(opt)
    params = parameters(ALIKE)
    opt = build("adamw", params)
    with torch.device("meta"):
        flatten_(params)
    fill(params, 0)
    with torch.device("meta"):
        opt.step()
        opt.zero_grad(set_to_none=False)
    fill(params, 1)
    checked_step(opt)
    assert count_runs(opt) == 1
    model = nn.Linear(16, 1)
    flatten_(model.parameters())
    model(torch.ones(3, 16)).sum().backward()
    assert model.weight.requires_grad


def test_public_names() -> None:
    assert wd_kernels.flatten_ is flatten_
    assert {"flatten_", "unflatten_", "FlatBuffer"} <= set(wd_kernels.__all__)


def test_unflattening_leaves_what_is_not_flat() -> None:
    """Gradients in a framework's buckets stay there; flat ones leave, whoever's stretch they are in."""
    params = parameters(ALIKE)
    (buffer,) = flatten_(params)
    bucket = torch.randn(32)
    params[0].grad, params[1].grad = bucket[:16], bucket[16:]
    params[2].grad, params[3].grad = params[3].grad, params[2].grad
    params[4].data = params[4].data.clone()
    fill(params, 0)
    values = [(plain(p), plain(p.grad)) for p in params]
    other = nn.Parameter(torch.ones(3))
    address = other.data_ptr()
    unflatten_([*params, other])
    unflatten_(params)
    assert buffer.data is None
    assert buffer.grad is None
    assert other.data_ptr() == address
    for k, (p, (data, grad)) in enumerate(zip(params, values, strict=True)):
        assert_untouched(p, data)
        assert p.grad is not None
        assert_untouched(p.grad, grad)
        assert (p.grad.data_ptr() == bucket.data_ptr() + 64 * k) == (k < 2)
