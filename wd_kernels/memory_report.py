"""What an optimizer keeps, in bytes by role, beside what torch's class would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from .formats import MASTER_NAME, SCALE, has_scales, is_steppable, tiles
from .rules import EMA, REFERENCE, Rule
from .sharding import local

__all__ = ["MemoryReport", "MemoryRow", "report"]


@dataclass(frozen=True)
class MemoryRow:
    """Of one role.

    Attributes:
        role: "parameters", "gradients", a state's name, "step counts".
        stored: the dtypes, by name.
        bytes: of all of them in this process.
        torch: what it would be with torch's class.
    """

    role: str
    stored: tuple[str, ...]
    bytes: int
    torch: int


@dataclass(frozen=True)
class MemoryReport:
    """The bytes that an optimizer and its parameters take once each has been stepped; `str` is a table.

    Frozen parameters have no gradients, states and masters.

    Attributes:
        rows: by role, in order.
        elements: of all parameters, in this process; those of complex ones count once.
        against: torch's class.
    """

    rows: tuple[MemoryRow, ...]
    elements: int
    against: str

    @property
    def bytes(self) -> int:
        """Of all roles."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_per_parameter(self) -> float:
        return self.bytes / max(self.elements, 1)

    def __str__(self) -> str:
        whole = MemoryRow("total", (), self.bytes, sum(row.torch for row in self.rows))
        lines: list[tuple[str, ...]] = [("role", "stored as", "bytes", "a parameter", self.against)]
        for row in (*self.rows, whole):
            each = [f"{number / max(self.elements, 1):.2f}" for number in (row.bytes, row.torch)]
            lines.append((row.role, ", ".join(row.stored), f"{row.bytes:,}", *each))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) if k < 2 else cell.rjust(width) for k, (cell, width) in enumerate(own)).rstrip()
            for own in (zip(line, widths, strict=True) for line in lines)
        )


def report(
    rule: Rule, groups: Sequence[Mapping[str, Any]], default: str, accumulators: Mapping[torch.Tensor, torch.Tensor]
) -> MemoryReport:
    """Of the groups of an optimizer whose own decay mode is `default`, with what it accumulates gradients in."""
    found: dict[str, tuple[dict[str, None], list[int]]] = {}

    def add(role: str, dtype: torch.dtype | None, ours: int, theirs: int) -> None:
        names, sums = found.setdefault(role, ({}, [0, 0]))
        if dtype is not None:
            names[str(dtype).removeprefix("torch.")] = None
        sums[0] += ours
        sums[1] += theirs

    elements = 0
    hypers = rule.hypers(groups, default=default)
    for group, (settings, *_) in zip(groups, hypers, strict=True):
        for p in group["params"]:
            if is_lazy(p) or not is_steppable(p.dtype):
                continue
            here = local(p)
            n, own = here.numel(), here.numel() * here.itemsize
            elements += n
            add("parameters", here.dtype, own, own)
            if not p.requires_grad:
                continue
            grad = here.dtype if p.grad is None else local(p.grad).dtype
            add("gradients", grad, n * grad.itemsize, n * grad.itemsize)
            if p in accumulators:
                total = local(accumulators[p])
                add("accumulators", total.dtype, total.nbytes, 0)
            for state in settings.states:
                dtype = settings.storage.state_dtype(state, here.dtype)
                add(state.name, dtype, n * dtype.itemsize, 0 if state in (EMA, REFERENCE) else own)
                if has_scales(dtype):
                    add(state.scale.name, SCALE.dtype, tiles(n), 0)
            master = settings.storage.master_dtype(here.dtype)
            if master is not None:
                add(MASTER_NAME, master, n * master.itemsize, 0)
            add("step counts", torch.float32, 4, 4 * rule.torch.counts_steps)
    rows = tuple(MemoryRow(role, tuple(names), *sums) for role, (names, sums) in found.items())
    return MemoryReport(tuple(sorted(rows, key=lambda row: row.role == "step counts")), elements, rule.torch.name)
