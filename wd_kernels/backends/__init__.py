"""Backends: what steps a bucket. `resolve` chooses one, or says why it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from . import cpu, cuda, reference, triton

if TYPE_CHECKING:
    from ..slots import Bucket, Spec, Table

__all__ = ["BACKENDS", "NAMES", "Backend", "FallbackWarning", "prepare", "resolve"]


class FallbackWarning(UserWarning):
    """`backend="auto"` uses the slow reference because what is fast on the tensors' device is missing."""


class Backend(Protocol):
    """One implementation of the step. All give the same bits."""

    name: str

    def why_not(self) -> str | None:
        """Why this backend cannot be used on this machine; None where it can."""

    def refuses(self, spec: Spec) -> str | None:
        """Why it cannot step such a bucket; None where it can."""

    def prepare(self, table: Table, buckets: list[Bucket], rows: Tensor) -> list[Callable[[], None]]:
        """The launches that step the buckets in place: everything that allocates or may fail is done here.

        `rows` is float64 [r, width]; segments name theirs.
        """


BACKENDS: dict[str, Backend] = {
    "cpu": cpu.CPU(), "triton": triton.Triton(), "cuda": cuda.CUDA(), "reference": reference.Reference(),
}  # fmt: skip
NAMES = ("auto", *BACKENDS)
#: What "auto" takes for tensors of a device type ("cuda" is ROCm's too): the first that can.
FASTEST = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
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
    missing = []
    for candidate in FASTEST.get(spec.device.type, ()):
        backend = BACKENDS[candidate]
        why_not = backend.why_not() or backend.refuses(spec)
        if why_not is None:
            return backend
        missing.append(f"{candidate!r} cannot be used: {why_not}")
    why_not = "; ".join(missing) or "no fast backend is chosen for such a device unless it is named"
    if not _warned:
        _warned = True
        warnings.warn(
            f"backend='auto' uses the slow reference for tensors on {spec.device}: {why_not}. "
            "backend='reference' chooses it without this warning",
            FallbackWarning,
            stacklevel=2,
        )
    return BACKENDS["reference"]


def prepare(table: Table, rows: Tensor) -> list[Callable[[], None]]:
    """The launches of a step, every bucket's: whatever allocates or may fail has been done."""
    if len(table.buckets) == 1:
        (bucket,) = table.buckets
        return bucket.backend.prepare(table, table.buckets, rows)  # type: ignore[no-any-return]
    launches: list[Callable[[], None]] = []
    for backend in dict.fromkeys(bucket.backend for bucket in table.buckets):
        launches += backend.prepare(table, [b for b in table.buckets if b.backend is backend], rows)
    return launches
