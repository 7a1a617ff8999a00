"""What a decay pulls to, and where: "decay_center", "decay_to", "cautious" of a group (numerics, section 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from .scalars import finite, flag

__all__ = ["CAUTIOUS", "CENTER", "GIVEN", "INITIAL", "PULLS", "TO", "DecayTo", "Pull", "check_pull"]

#: What `decay_to` may be given as.
DecayTo: TypeAlias = "Literal['initial'] | list[Tensor] | tuple[Tensor, ...] | Mapping[str, Tensor] | None"

CENTER, TO, CAUTIOUS = "decay_center", "decay_to", "cautious"
#: The words of a group's `decay_to`: the weights as they were first, or tensors that were given.
INITIAL, GIVEN = "initial", "given"
#: Keys that a group of any rule may have, and what one without them means.
PULLS: dict[str, Any] = {CENTER: 0.0, TO: None, CAUTIOUS: False}
#: Why a decay cannot be left out where it would work against the update.
WHOLE = {
    "l2": "its decay is a part of the gradient, and none of the update that it could be compared with",
    "proximal": "its decay divides the whole step, and is no part of it that could be left out",
}
WHOLE["metric_proximal"] = WHOLE["proximal"]


class Pull(NamedTuple):
    """Of a group, checked.

    Attributes:
        center: what weights decay to.
        cautious: only where that agrees with the update.
        refers: to a tensor beside each parameter, in the place of the center.
    """

    center: float = 0.0
    cautious: bool = False
    refers: bool = False

    @property
    def level(self) -> int:
        """Which kernel it takes: 0 the plain one, 1 one that pulls, 2 one that reads a reference."""
        return 2 if self.refers else int(self.cautious or self.center != 0.0)

    @property
    def kind(self) -> Pull:
        """All of it but the center's value."""
        return self if self.center in (0.0, 1.0) else self._replace(center=1.0)

    @property
    def scalars(self) -> tuple[float, float]:
        """Of a row: the center, and below what u times the pulled weight has no decay."""
        return self.center, 0.0 if self.cautious else -math.inf


def check_pull(group: Mapping[str, Any], decay: str, where: str) -> Pull:
    """The pull of a group. Raises TypeError or ValueError, naming the key and the group."""
    center, to = finite(CENTER, group[CENTER], where), group[TO]
    cautious = flag(CAUTIOUS, group[CAUTIOUS], where)
    if not isinstance(to, (str, type(None))):
        raise TypeError(
            f"decay_to of {where} is a {type(to).__name__}: tensors are given to the optimizer when it, or the group, "
            "is made, as a list with one for each parameter, or a dict by name; later, allowed are None, 'initial', "
            "and 'given' with a tensor of each parameter in "
            "opt.state[p]['decay_reference']"
        )
    if to not in (None, INITIAL, GIVEN):
        raise ValueError(
            f"decay_to={to!r} in {where}: allowed are None, 'initial' (the weights before their first step), and one "
            "tensor for each parameter"
        )
    if to is not None and center != 0.0:
        raise ValueError(
            f"decay_center={center} with decay_to={to!r} in {where}: weights decay to one of them; add the center to "
            "the tensors, if both are meant"
        )
    if cautious and decay in WHOLE:
        raise ValueError(
            f"cautious=True with decay={decay!r} in {where}: {WHOLE[decay]}; allowed are 'lr_scaled', 'independent' "
            "and 'corrected'"
        )
    return Pull(center, cautious, to is not None)
