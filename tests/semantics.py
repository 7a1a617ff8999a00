"""What the tests of semantics share: small optimizers, what a failed step leaves alone, and a checked step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bits import assert_same_optimizers, assert_untouched, raw
from torch import Tensor, nn

import wd_kernels
from wd_kernels import backends, native
from wd_kernels.table import lists
from wd_kernels.validation import is_dense as is_dense

CLASSES = {"adamw": wd_kernels.AdamW, "sgdw": wd_kernels.SGDW, "adagradw": wd_kernels.AdagradW}
DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1},
    "sgdw": {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1},
    "adagradw": {"lr": 0.05, "lr_decay": 0.2, "initial_accumulator_value": 0.3, "weight_decay": 0.1},
}
STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgdw": ("momentum_buffer",), "adagradw": ("sum",)}
MODES = ("l2", "lr_scaled", "independent", "proximal", "metric_proximal")
SHAPES = ((4, 4), (7, 5), (33,), (), (2, 3, 2, 3))
TWO_ALIKE = ((7, 5), (4, 4), (33,), (4, 4), ())


def without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension were not there: the reference steps, and every parameter is inspected in every step."""
    for name, value in (("C", None), ("CHECKS", False), ("WHY_NOT", "it is not there (a test)")):
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(backends, "_warned", True)
    monkeypatch.setattr(lists, "_resolve", backends.resolve)  # remembers nothing


@pytest.fixture(params=["native", "python"])
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once with native code, once as where there is none."""
    if request.param == "python":
        without_native_code(monkeypatch)
    else:
        assert native.CHECKS
    return str(request.param)


def build(rule: str, params: Any, **options: Any) -> Any:
    """An optimizer of that rule whose defaults decay and have momentum."""
    return CLASSES[rule](params, **{**DEFAULTS[rule], **options})


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def set_gradients(params: Sequence[Tensor], seed: int, skip: Sequence[int] = ()) -> None:
    """New random gradients; None for the positions in `skip`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = None if i in skip else grad


def plain(t: Tensor) -> Tensor:
    """A copy without layout, gaps or lazy bits."""
    return t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def all_params(opt: Any) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def plain_copy(opt: Any, backend: str = "reference") -> Any:
    """A new optimizer, with a new table, on plain copies of all that `opt` holds."""
    copies: dict[Tensor, nn.Parameter] = {}
    for p in all_params(opt):
        copies[p] = nn.Parameter(plain(p))
        copies[p].grad = None
        if p.grad is not None:
            copies[p].grad = torch.zeros_like(copies[p])
            copies[p].grad.data = plain(p.grad)
    groups = [{"params": [copies[p] for p in group["params"]], "weight_decay": 0.1} for group in opt.param_groups]
    new = type(opt)(groups, decay=opt.defaults["decay"], backend=backend)
    for own, group in zip(new.param_groups, opt.param_groups, strict=True):
        copied = own["params"]
        own.clear()
        own.update({**group, "params": copied})
    for p, q in copies.items():
        if opt.state.get(p) is not None:
            new.state[q] = {k: plain(v) if isinstance(v, Tensor) else v for k, v in opt.state[p].items()}
    return new


def mode_of(opt: Any, group: dict[str, Any]) -> str:
    """The mode in which a step would decay a group."""
    return str(opt.rule.hypers([group], default=opt.defaults["decay"])[0][0].decay)


def checked_step(opt: Any, what: str = "") -> None:
    """Steps `opt`, and demands the bits that a new optimizer on plain copies gives.

    Autograd is told of the parameters that were written, and of no others; gradients are only read.
    """
    expected = plain_copy(opt)
    versions = [p._version for p in all_params(opt)]
    storages = [p.untyped_storage().data_ptr() for p in all_params(opt)]
    before = [plain(p.grad) if p.grad is not None else None for p in all_params(opt)]
    expected.step()
    opt.step()
    assert_same_optimizers(opt, expected, what)
    for p, grad, version in zip(all_params(opt), before, versions, strict=True):
        alone = storages.count(p.untyped_storage().data_ptr()) == 1  # views of one memory share a counter
        if grad is not None or alone:
            assert (p._version > version) == (grad is not None), f"{what}: version {version}, then {p._version}"
        if grad is not None:
            assert p.grad is not None
            assert_untouched(p.grad, grad, f"{what} gradient")


def contents(opt: Any) -> list[Any]:
    """All that a failed step must leave alone: bits, keys, and the identity of states."""
    found: list[Any] = [[id(key) for key in opt.state]]
    for p in all_params(opt):
        own = opt.state.get(p)
        found.append((raw(p).tolist(), p.dtype, id(own)))
        for name, value in (own or {}).items() if isinstance(own, dict) else ():
            whole = (id(value), value.dtype, raw(value).tolist()) if isinstance(value, Tensor) else repr(value)
            found.append((name, whole))
    return found


@contextmanager
def untouched(opt: Any) -> Iterator[None]:
    """Nothing of the optimizer changes inside."""
    before = contents(opt)
    yield
    assert contents(opt) == before


def assert_close(a: Tensor, b: Tensor, ulps: float, what: str = "") -> None:
    """Within `ulps` units in the last place of the largest element, or of 1."""
    assert a.dtype == b.dtype, f"{what}: {a.dtype} against {b.dtype}"
    assert a.shape == b.shape, what
    if a.numel():
        a, b = a.detach(), b.detach()
        bound = ulps * torch.finfo(a.dtype).eps * max(float(b.abs().max()), 1.0)
        assert float((a - b).abs().max()) <= bound, f"{what}: {float((a - b).abs().max())} over {bound}"


def running(rule: str, params: list[nn.Parameter] | None = None, steps: int = 3, **options: Any) -> Any:
    """An optimizer after some steps: the table is built, and knows its gradients."""
    opt = build(rule, parameters() if params is None else params, **options)
    for t in range(steps):
        set_gradients(all_params(opt), t)
        opt.step()
    return opt


def go_on(opt: Any, steps: int = 3) -> None:
    for t in range(steps):
        set_gradients(all_params(opt), 50 + t, skip=[1] if t == 1 else [])
        checked_step(opt, f"step {t} after")
