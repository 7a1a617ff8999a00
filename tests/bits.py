"""What "the same bits" means: `torch.equal` takes -0 for 0, and no NaN for itself.

Shape and dtype are the same, and so are the bits, read as integers. Any NaN of 4 or 8 bytes is as good as any other:
which one an operation gives is left to the processor. A NaN of 2 bytes is stored by this package, bit by bit. What must
have been copied or left alone, NaN by NaN, is compared by `assert_untouched`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "assert_same",
    "assert_same_bits",
    "assert_same_optimizers",
    "assert_same_state",
    "assert_untouched",
    "bits",
    "raw",
]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def real(t: Tensor) -> Tensor:
    """A copy of the numbers, end to end: without gradient, lazy bits, gaps and imaginary parts."""
    t = t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return torch.view_as_real(t) if t.is_complex() else t


def raw(t: Tensor) -> Tensor:
    """A copy of the elements' bits as integers, as they are."""
    t = real(t)
    return t.view(_INTEGERS[t.element_size()]) if t.is_floating_point() else t


def bits(t: Tensor) -> Tensor:
    """The elements' bits as integers; any NaN of 4 or 8 bytes as the same number, a NaN of 2 bytes as it is."""
    found = raw(t)
    return found if found.element_size() <= 2 else found.masked_fill(real(t).isnan(), -1)


def _compare(a: Tensor, b: Tensor, differ: Tensor, what: str) -> None:
    if bool(differ.any()):
        at = int(differ.flatten().nonzero()[0])
        x, y = (real(t).flatten()[at].item() for t in (a, b))
        raise AssertionError(f"{what}: {int(differ.sum())} of {differ.numel()} differ, first at {at}: {x!r} and {y!r}")


def _assert_alike(a: Tensor, b: Tensor, what: str) -> None:
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"{what}: dtypes {a.dtype} and {b.dtype}"


def assert_same_bits(a: Tensor, b: Tensor, what: str = "") -> None:
    """Fails unless two tensors have one shape, one dtype and the same bits."""
    _assert_alike(a, b, what)
    _compare(a, b, bits(a) != bits(b), what)


def assert_untouched(a: Tensor, b: Tensor, what: str = "") -> None:
    """Fails unless one is a copy of the other, or what it was before: every NaN is the same NaN, too."""
    _assert_alike(a, b, what)
    _compare(a, b, raw(a) != raw(b), what)


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Fails unless two results of `cases.run` or `cases.snapshot` are the same to the bit."""
    assert list(a) == list(b)
    for name in a:
        assert_same_bits(a[name], b[name], name)


def assert_same_state(a: Mapping[str, Any], b: Mapping[str, Any], what: str = "") -> None:
    """Fails unless two states of a parameter have the same names and the same bits; counts are compared as numbers."""
    assert set(a) == set(b), f"{what}: {sorted(a)} against {sorted(b)}"
    for name, value in a.items():
        if name == "step":
            assert float(value) == float(b[name]), f"{what} step: {float(value)} against {float(b[name])}"
        elif isinstance(value, Tensor):
            assert_same_bits(value, b[name], f"{what} {name}")
        else:
            assert value == b[name]


def assert_same_optimizers(a: Any, b: Any, what: str = "", *, loaded: bool = False) -> None:
    """Fails unless two optimizers hold the same parameters and states, to the bit.

    Args:
        loaded: one of them has loaded a state; those of SGDW have no counts, since torch's SGD has none.
    """
    ours, theirs = ([p for group in opt.param_groups for p in group["params"]] for opt in (a, b))
    assert len(ours) == len(theirs)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(p, q, f"{what} parameter {i}")
        states = [opt.state.get(q) or {} for opt, q in ((a, p), (b, q))]
        if loaded and not a.rule.torch.counts_steps:
            states = [{name: value for name, value in own.items() if name != "step"} for own in states]
        assert_same_state(*states, f"{what} parameter {i}")
