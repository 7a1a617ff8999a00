"""An epilogue that only tests have: it uses all that one may. And a table whose buckets have it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from on_cpu import built, loaded
from torch import Tensor

from wd_kernels.epilogues import Element, Epilogue
from wd_kernels.formats import format_of, full_state_dtype
from wd_kernels.layout import BLOCK, Bucket, Moving, Place, Segments, Spec, Tensors, write_segment
from wd_kernels.rules import Rule

__all__ = ["PROBE", "ProbeTable", "extension", "operators"]


def equation(s: SimpleNamespace, of: Element, outputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    moved = of.after - of.before
    trace = s.fade * outputs["trace"] + s.weight * moved
    if of.states:
        trace = trace + list(of.states.values())[-1]
    outputs = {"trace": trace, "copy": s.weight * of.after}
    return outputs, {"moved": moved * moved, "worked": of.g * of.u, "largest": of.u.abs()}


PROBE = Epilogue(
    name="probe",
    code=1 << 3,
    scalars=("fade", "weight"),
    outputs=("trace", "copy"),
    sums=("moved", "worked"),
    equation=equation,
    in_triton=lambda: importlib.import_module("probe_triton").probe,
    maxima=("largest",),
    marks=True,
)


@cache
def extension() -> Any:
    """The extension module with it alone."""
    spec = importlib.util.spec_from_file_location("_C", built("probe"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def operators() -> Any:
    """CUDA's, as plain loops, with it alone."""
    return loaded(built("probe_on_cpu"))


@dataclass
class ProbeTable:
    """One bucket (`layout.Table`): lists of parameters, gradients (or None), states, outputs of epilogues."""

    rule: Rule
    states: tuple[str, ...]
    roles: Sequence[Sequence[Any]]
    rows_of: Sequence[int]
    backend: Any = None
    control: Tensor = field(default_factory=lambda: torch.tensor([1.0, 0.0], dtype=torch.float64))
    device_copies: dict[Any, Any] = field(default_factory=dict)
    norms: Any = None
    epilogues: tuple[Epilogue, ...] = (PROBE,)

    def __post_init__(self) -> None:
        params, grads = self.roles[:2]
        dtype = full_state_dtype(params[0].dtype)
        spare = [torch.empty_like(p, dtype=next(g.dtype for g in grads if g is not None)) for p in params]
        own = [params, [g if g is not None else s for g, s in zip(grads, spare, strict=True)], *self.roles[2:]]
        width = sum(len(own.numbers) for own in self.epilogues)
        self.numbers = [torch.full((-(-p.numel() // BLOCK), width), 7.0, dtype=dtype) for p in params]
        self.marks = [torch.zeros(-(-p.numel() // Place.MARKED), dtype=torch.int32) for p in params]
        self.segments = Segments.empty(len(params), len(own) - 2)
        for k, tensors in enumerate(zip(*own, strict=True)):
            write_segment(self.segments, k, tensors)
            self.segments.moving[k, Moving.ROW] = self.rows_of[k]
            self.segments.places[k, Place.OUTPUT] = self.numbers[k].data_ptr()
            self.segments.places[k, Place.MARKS] = self.marks[k].data_ptr()
        self.segments.capacities.copy_(self.segments.moving[:, Moving.NUMEL])
        self.active = torch.tensor([int(g is not None) for g in grads])
        self.segments.moving[:, Moving.NUMEL] *= self.active
        formats = tuple(fmt for fmt in (format_of(role[0].dtype) for role in own) if fmt is not None)
        self.buckets = [
            Bucket(Spec(params[0].device, self.states, formats, self.epilogues), self.backend, 0, 0, range(len(params)))
        ]

    @property
    def whole(self) -> Segments:
        return self.segments

    def span(self, bucket: Bucket) -> tuple[int, int]:
        return 0, len(self.roles[0])

    def tensors(self, i: int) -> Tensors:
        theta, grad, *others = (role[i] for role in self.roles)
        states = dict(zip(self.states, others, strict=False))
        spec = self.buckets[0].spec
        outputs = dict(zip(spec.outputs, others[len(states) :], strict=True))
        numbers, marks = self.numbers[i] if spec.numbers else None, self.marks[i] if spec.marks else None
        return Tensors(theta, grad, states, self.rows_of[i], outputs, numbers, marks)
