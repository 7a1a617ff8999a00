"""What cannot be flat, and steps of flat parameters that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_untouched
from flat_pairs import ALIKE, SHAPES, Pair, fill
from semantics import STATES, parameters, plain, set_gradients, untouched
from torch import Tensor, nn

from wd_kernels import backends, flatten_, unflatten_
from wd_kernels.flat import buffers as flat
from wd_kernels.flat import place_of

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


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
    "float8": (
        lambda: nn.Parameter(torch.ones(4).to(torch.float8_e5m2)), TypeError, "has dtype torch.float8_e5m2: allowed",
    ),
    "sparse": (lambda: nn.Parameter(torch.eye(3).to_sparse()), RuntimeError, "has layout torch.sparse_coo"),
    "dispatching": (
        lambda: Dispatching(torch.ones(4)).requires_grad_(), TypeError, "is a Dispatching: subclasses",
    ),
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
        with pytest.raises(TypeError, match="params is a Tensor; expected an iterable of parameters"):
            call(torch.ones(3))
        with pytest.raises(TypeError, match=r"params is a Linear: give its \.parameters\(\); expected"):
            call(nn.Linear(2, 2))


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

    def fail() -> None:
        raise RuntimeError("no launch (a test)")

    pair.opt._table.watch = None
    with monkeypatch.context() as patch:
        patch.setattr(backends, "prepare", lambda table: backends.Prepared([], lambda *given: [fail]))
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"no launch \(a test\)"):
                pair.opt.step()
    assert all(map(torch.equal, before, pair.params))
    assert [float(own["step"]) for own in pair.opt.state.values()] == counts
    pair.step(1, runs=1)
