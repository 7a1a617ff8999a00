"""What a backend gives to be launched, and how it is where there is no optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .. import native
from ..layout import Table

__all__ = ["Launch", "Prepared", "launch"]

#: A plan of `native.C`, a function that launches, or tensors to be copied, (to, from).
Launch: TypeAlias = Any


class Prepared(NamedTuple):
    """What holds until a table is laid out anew.

    Attributes:
        plans: launches that native code runs by itself, with the rows of the step.
        ready: called with the table and the rows (float64 [r, scalars]; segments name theirs) it does all that
            allocates or may fail, and returns the other launches; None: there are none. It holds no table, which holds
            it.
        measure: adds the squares of the gradients to the exact sums that places name, of what is no plan.
        squares: plans with a segment for each parameter, by which gradients are squared.
    """

    plans: list[Launch]
    ready: Callable[[Table, Tensor], list[Launch]] | None
    measure: Callable[[Table], None] | None = None
    squares: tuple[Launch, ...] = ()


def launch(launches: list[Launch], rows: Tensor) -> None:
    """Launches all."""
    if native.C is not None:
        native.C.launch(launches, rows)
        return
    for own in launches:
        if callable(own):
            own()
        else:
            for to, source in own:
                to.copy_(source)
