"""Backends: what steps a bucket. `resolve` chooses one, or says why it cannot."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from . import cpu, reference

if TYPE_CHECKING:
    from ..slots import Bucket, Spec
    from ..table import TensorTable

__all__ = ["BACKENDS", "NAMES", "Backend", "FallbackWarning", "resolve"]


class FallbackWarning(UserWarning):
    """`backend="auto"` uses the slow reference because the native extension is missing."""


class Backend(Protocol):
    """One implementation of the step. All give the same bits."""

    name: str

    def why_not(self) -> str | None:
        """Why this backend cannot be used on this machine; None where it can."""

    def refuses(self, spec: Spec) -> str | None:
        """Why it cannot step such a bucket; None where it can."""

    def step(self, table: TensorTable, bucket: Bucket, rows: Tensor) -> None:
        """Steps one bucket in place. `rows` is float64 [r, width]; segments name theirs."""


BACKENDS: dict[str, Backend] = {"cpu": cpu.CPU(), "reference": reference.Reference()}
NAMES = ("auto", *BACKENDS)
_warned = False


def resolve(name: str, spec: Spec) -> Backend:
    """The backend of that name for a bucket; "auto" takes the fastest that is there.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: an explicit backend is missing, or cannot step such tensors; the message says why.
    """
    global _warned
    if name not in NAMES:
        raise ValueError(f"backend={name!r}: allowed are {', '.join(map(repr, NAMES))}")
    if name != "auto":
        backend = BACKENDS[name]
        why_not = backend.why_not() or backend.refuses(spec)
        if why_not:
            raise RuntimeError(f"backend={name!r} cannot be used: {why_not}")
        return backend
    native = BACKENDS["cpu"]
    if native.why_not() is None and native.refuses(spec) is None:
        return native
    if not _warned:
        _warned = True
        why = native.why_not() or native.refuses(spec)
        warnings.warn(
            f"backend='auto' uses the slow reference for tensors on {spec.device}: {why}. "
            "backend='reference' chooses it without this warning",
            FallbackWarning,
            stacklevel=2,
        )
    return BACKENDS["reference"]
