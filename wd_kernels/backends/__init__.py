"""Backends: what steps a bucket. `resolve` chooses one, or says why it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from ..layout import Bucket, Spec, Table
from . import cpu, cuda, reference, triton
from .device import ACCUMULATED, capturing
from .prepared import Launch, Prepared, launch

__all__ = [
    "ACCUMULATED",
    "BACKENDS",
    "NAMES",
    "Backend",
    "BackendName",
    "FallbackWarning",
    "Launch",
    "Prepared",
    "add_up",
    "capturing",
    "check",
    "launch",
    "prepare",
    "resolve",
]


class FallbackWarning(UserWarning):
    """`backend="auto"` uses the slow reference because what is fast on the tensors' device is missing."""


class Backend(Protocol):
    """One implementation of the step. All give the same bits."""

    name: str
    #: It works on tensors (`Table.tensors`), not on addresses.
    needs_tensors: bool
    #: Steps are counted, and may be skipped, where the tensors are (`norms.Bank`).
    counts_there: bool

    def why_not(self) -> str | None:
        """Why this backend cannot be used on this machine; None where it can."""

    def refuses(self, spec: Spec) -> str | None:
        """Why it cannot step such a bucket; None where it can."""

    def prepare(self, table: Table, buckets: list[Bucket]) -> Prepared:
        """The launches that step the buckets in place."""

    def add_up(self, table: Table, buckets: list[Bucket], sums: Tensor, rows: Tensor) -> list[Launch]:
        """The launches that add gradients to the parameters of the table, or bring them there, and square the sums.

        They are added where a segment's row is 0, brought where it is 1, in the arithmetic dtype. The squares are added
        to the exact sums that places name, [copies, slots, sums.WORDS]. `rows`: so many, of any numbers.
        """


BACKENDS: dict[str, Backend] = {
    "cpu": cpu.CPU(), "triton": triton.Triton(), "cuda": cuda.CUDA(), "reference": reference.Reference(),
}  # fmt: skip
BackendName: TypeAlias = Literal["auto", "cpu", "triton", "cuda", "reference"]
NAMES: tuple[str, ...] = get_args(BackendName)
#: What "auto" takes for tensors of a device type ("cuda" is ROCm's too): the first that can.
FASTEST = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
_warned = False


def check(name: str) -> None:
    """Raises ValueError for an unknown name, RuntimeError for a backend that is not on this machine."""
    if name not in NAMES:
        raise ValueError(f"backend={name!r}: allowed are {', '.join(map(repr, NAMES))}")
    why_not = None if name == "auto" else BACKENDS[name].why_not()
    if why_not:
        there = [own for own, backend in BACKENDS.items() if own != name and backend.why_not() is None]
        raise RuntimeError(
            f"backend={name!r} cannot be used: {why_not}. Here are {', '.join(map(repr, there))}; 'auto' takes the "
            "fastest that is there"
        )


def resolve(name: str, spec: Spec) -> Backend:
    """The backend of that name for a bucket; "auto" takes the fastest that is there.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: an explicit backend is missing, or cannot step such tensors; the message says why.
    """
    global _warned
    check(name)
    if name != "auto":
        backend = BACKENDS[name]
        why_not = backend.refuses(spec)
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


def prepare(table: Table) -> Prepared:
    """The launches of every bucket, to be given the rows of a step."""
    of_backend = [
        backend.prepare(table, [bucket for bucket in table.buckets if bucket.backend is backend])
        for backend in dict.fromkeys(bucket.backend for bucket in table.buckets)
    ]
    plans = [plan for own in of_backend for plan in own.plans]
    others = [own.ready for own in of_backend if own.ready is not None]
    measures = [own.measure for own in of_backend if own.measure is not None]
    squares = tuple(plan for own in of_backend for plan in own.squares)
    return Prepared(plans, _ready(others), _measure(measures), squares)


def add_up(table: Table, sums: Tensor) -> tuple[list[Launch], Tensor]:
    """The same of all buckets, each through its backend, and the rows to launch them with."""
    rows = torch.zeros(2, len(table.rule.scalars), dtype=torch.float64, device="cpu")
    launches = []
    for backend in dict.fromkeys(bucket.backend for bucket in table.buckets):
        own = [bucket for bucket in table.buckets if bucket.backend is backend]
        launches += backend.add_up(table, own, sums, rows)
    return launches, rows


def _ready(each: list[Callable[[Table, Tensor], list[Launch]]]) -> Callable[[Table, Tensor], list[Launch]] | None:
    if len(each) <= 1:
        return each[0] if each else None
    return lambda table, rows: [launch for ready in each for launch in ready(table, rows)]


def _measure(each: list[Callable[[Table], None]]) -> Callable[[Table], None] | None:
    def all_of_them(table: Table) -> None:
        for measure in each:
            measure(table)

    return all_of_them if each else None
