"""All that the benchmarks know of the inside of wd_kernels: elsewhere they use its public names alone.

What code generation knows beside it: codegen.compiled, of the Triton backend; codegen_cuda, of names in csrc/cuda.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

from wd_kernels import native
from wd_kernels.backends import Prepared, device_copy
from wd_kernels.backends import launch as launch_all
from wd_kernels.backends import triton as backend
from wd_kernels.commands.check import choices, versions
from wd_kernels.formats import format_of, has_scales
from wd_kernels.printing import aligned
from wd_kernels.rules import RULES, Rule

__all__ = [
    "KINDS", "aligned", "bare_launch", "format_of", "has_scales", "launch_parameters", "time_launches", "versions_here",
]  # fmt: skip


#: What is measured and compiled, as tables call it: a rule with its states.
KINDS: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "adamw": (RULES["adamw"], ("exp_avg", "exp_avg_sq")),
    "adamw amsgrad": (RULES["adamw"], ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "sgdw": (RULES["sgdw"], ("momentum_buffer",)),
    "sgdw without momentum": (RULES["sgdw"], ()),
    "adagradw": (RULES["adagradw"], ("sum",)),
}


def versions_here() -> dict[str, str]:
    """Versions of what takes part, and what was chosen on this machine."""
    return dict([*versions(), *choices()])


def bare_launch(optimizer: Any) -> Callable[[], None]:
    """The launch alone of an optimizer that is one bucket and has taken a step; nothing is checked."""
    table = optimizer._table
    (bucket,) = table.buckets
    rows = optimizer.rule.rows(optimizer.rule.hypers(optimizer.param_groups), [(0, 2, False)])
    plans, ready, *_ = bucket.backend.prepare(table, [bucket])
    (launch,) = [partial(native.C.launch, plans, rows)] if ready is None else ready(table, rows)

    def go(held: Any = optimizer) -> None:  # of which the launch has only addresses
        launch()

    return go


def time_launches(optimizer: Any) -> Callable[[], float]:
    """Times the launches of an optimizer that has taken no step yet; returns what tells their seconds so far.

    Native code runs plans by itself; to be timed, they are launched as functions are, for which the check of a step
    also notes each tensor. That is the host's, and some tenths of a microsecond a parameter.
    """
    resolve, seconds = optimizer._table.resolve, [0.0]

    def timed(launch: Callable[[], object]) -> None:
        started = time.perf_counter()
        launch()
        seconds[0] += time.perf_counter() - started

    def all_timed(plans: list[Any], ready: Any, *_: Any) -> Prepared:
        """The same launches, as functions."""

        def those(table: Any, rows: Any) -> list[Callable[[], None]]:
            own = [partial(native.C.launch, [plan], rows) for plan in plans]
            others = ready(table, rows) if ready is not None else []
            own += [launch if callable(launch) else partial(launch_all, [launch], rows) for launch in others]
            return [partial(timed, launch) for launch in own]

        return Prepared([], those)

    def resolve_timed(spec: Any) -> Any:
        own = copy.copy(resolve(spec))
        prepare = own.prepare
        own.prepare = lambda *arguments: all_timed(*prepare(*arguments))
        return own

    optimizer._table.resolve = cache(resolve_timed)
    return lambda: seconds[0]


@contextmanager
def launch_parameters(optimizer: Any) -> Iterator[Callable[..., None]]:
    """Within it, what sets other launch parameters of the Triton backend for an optimizer (none: the package's own).

    They are `warps`, `block`, `registers` (the most that a thread may have; 0: no limit), and of chunks `longest`, in
    elements, and `per_processor`, how many are wanted.
    """
    own_block, own_options, chunks = backend.block, backend.options, (device_copy.LONGEST, device_copy.PER_PROCESSOR)

    def use(
        warps: int = 0, block: int = 0, registers: int | None = None, longest: int = 0, per_processor: int = 0
    ) -> None:
        def options(*arguments: Any, **keywords: Any) -> dict[str, Any]:
            how = own_options(*arguments, **keywords)
            how["num_warps"] = warps or how["num_warps"]
            how["maxnreg"] = how.get("maxnreg") if registers is None else registers
            return {name: value for name, value in how.items() if name != "maxnreg" or value}

        backend.block, backend.options = lambda formats, numbers=0: block or own_block(formats, numbers), options
        device_copy.LONGEST, device_copy.PER_PROCESSOR = longest or chunks[0], per_processor or chunks[1]
        optimizer._table.launches = None  # they hold chunks

    as_before = patch.multiple(device_copy, LONGEST=chunks[0], PER_PROCESSOR=chunks[1])
    with patch.multiple(backend, block=own_block, options=own_options), as_before:
        yield use
