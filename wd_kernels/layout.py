"""How a table lies in memory: the records that Python, native code and kernels share by position, and buckets.

csrc/layout.h and csrc/python/changes.h have the same records. All are int64 words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import native
from .epilogues import AVERAGE, Epilogue
from .formats import (
    SCALE,
    Format,
    arithmetic_dtype,
    format_of,
    gradient_dtypes,
    has_scales,
    is_steppable,
    master_dtypes,
    scale_name,
    state_dtypes,
)
from .norms import Norms
from .reference import BLOCK  # chunks are multiples of it, and begin where their segment's alignment holds
from .rules import EMA, MASTER, REFERENCE, Rule, State, code_of

__all__ = [
    "BLOCK",
    "PADDING",
    "Bucket",
    "Chunk",
    "Chunks",
    "Moving",
    "Place",
    "Segments",
    "Spec",
    "Table",
    "Tensors",
    "address_word",
    "cut",
    "cut_whole",
    "native_kernel",
    "numel_of",
    "origins",
    "padded",
    "spec_of",
    "write_segment",
]

CPU = torch.device("cpu")  # a table's own memory, whatever the default device


class Moving:
    """What a step may change of a segment: the address of its gradient, how many elements it has, row, alignment.

    Where gradients are added up, a row of 1 says that nothing is there yet.
    """

    GRAD, NUMEL, ROW, ALIGNED = 0, 1, 2, 3
    WORDS = 4


class Place:
    """What stays of a segment for many steps: origin, where its sums and marks go, the addresses of all other roles.

    The origin is the number of its first element among all of the optimizer's, where something is rounded by it; else,
    in a flat buffer, among those that lie there.
    """

    ORIGIN, OUTPUT, MARKS, ADDRESSES = 0, 1, 2, 3
    MARKED = 32  # elements of a word of marks


class Chunk:
    """What one program of a device steps, in one word: the segment below, above it which of the segment's chunks."""

    ORDINAL_SHIFT = 32


#: Every tensor begins at a multiple of this many elements: in a flat buffer, of 64 bytes or more, whatever the dtype.
PADDING = 32

#: The roles that every bucket has, before its states.
PARAM, GRAD, STATE = 0, 1, 2


def address_word(role: int) -> int:
    """The word of a place that has the address of a role: parameter, states, ... (the gradient's moves)."""
    return Place.ADDRESSES + (0 if role == PARAM else role - 1)


@dataclass(frozen=True)
class Segments:
    """Segments, in order: `moving` int64 [n, 4], `places` int64 [n, words], `capacities` int64 [n].

    A capacity is the most elements that a segment may have until they are laid out anew.
    """

    moving: Tensor
    places: Tensor
    capacities: Tensor

    @classmethod
    def empty(cls, n: int, states: int) -> Segments:
        """Room for `n` segments with so many states and parts."""
        words = Place.ADDRESSES + 1 + states
        moving, places, capacities = (
            torch.zeros(shape, dtype=torch.int64, device=CPU) for shape in ((n, Moving.WORDS), (n, words), (n,))
        )
        return cls(moving, places, capacities)


def numel_of(p: Tensor) -> int:
    """Elements that a step writes: a complex one is two."""
    return p.numel() * (2 if p.is_complex() else 1)


def padded(numel: int) -> int:
    """Elements that a parameter takes in the index space, and in a flat buffer."""
    return -(-numel // PADDING) * PADDING


def origins(params: Sequence[Tensor]) -> list[int]:
    """The number of each parameter's first element among all of an optimizer's; a complex element counts as two."""
    sizes = (0 if is_lazy(p) else padded(p.numel()) * (2 if p.is_complex() else 1) for p in params)
    return [0, *accumulate(sizes)][:-1]


def write_segment(segments: Segments, k: int, roles: Sequence[Tensor], scales: int = 0) -> None:
    """Writes segment `k`: the addresses of parameter, gradient and states, how many elements, and their alignment.

    The last `scales` of the roles are that: they are read one by one, wherever they lie.
    """
    addresses = [t.data_ptr() for t in roles]
    aligned = int(all(address % 16 == 0 for address in addresses[: len(addresses) - scales]))
    segments.moving[k] = torch.tensor([addresses[GRAD], numel_of(roles[PARAM]), 0, aligned], device=CPU)
    del addresses[GRAD]
    segments.places[k, Place.ADDRESSES : Place.ADDRESSES + len(addresses)] = torch.tensor(addresses, device=CPU)


# Buckets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What the segments of a bucket share: the device, the states, and the format of every role.

    Attributes:
        states: by name, in the rule's order.
        formats: of parameter, gradient, each state, each output of the epilogues, and the reference.
        epilogues: what is run with the rule, in the order of their codes.
        parts: by name, what lies elsewhere of these roles, in their order.
        pull: 0, or what the decay pulls to: a center (1), a reference beside each parameter (2); `Pull.level`.
    """

    device: torch.device
    states: tuple[str, ...]
    formats: tuple[Format, ...]
    epilogues: tuple[Epilogue, ...] = ()
    parts: tuple[str, ...] = ()
    pull: int = 0

    @property
    def refers(self) -> bool:
        """Has each parameter a reference?"""
        return self.pull == 2

    @property
    def outputs(self) -> tuple[str, ...]:
        """By name, what the epilogues write."""
        return tuple(name for own in self.epilogues for name in own.outputs)

    @property
    def arithmetic(self) -> torch.dtype:
        """The arithmetic type."""
        return arithmetic_dtype(self.formats[PARAM].dtype)

    @property
    def numbers(self) -> int:
        """How many numbers the epilogues have of a block."""
        return sum(len(own.numbers) for own in self.epilogues)

    @property
    def marks(self) -> bool:
        """Does one of the epilogues mark what has changed?"""
        return any(own.marks for own in self.epilogues)

    @property
    def beside(self) -> tuple[str, ...]:
        """By name, all that lies beside a parameter and its gradient, in the order of a place's addresses."""
        return (*self.states, *self.outputs, *([REFERENCE.name] if self.refers else []), *self.parts)

    @property
    def scales(self) -> int:
        """How many of the parts are scales: the last ones."""
        return sum(fmt.part is SCALE for fmt in self.formats)


#: The bit of a variant from which on it says what a decay pulls to (csrc/kernels.h, `kPulled`).
PULLED = 4


def native_kernel(rule: Rule, spec: Spec) -> tuple[int, int, int, list[int]]:
    """(rule, variant, epilogues, formats), by which native code finds the kernel of a bucket."""
    epilogues = sum(own.code for own in spec.epilogues)
    formats = [*spec.formats, *(fmt.part for fmt in spec.formats if fmt.part is not None)]
    variant = rule.variant(spec.states) + (spec.pull << PULLED)
    return code_of(rule), variant, epilogues, [fmt.code for fmt in formats]


@lru_cache
def spec_of(
    device: torch.device, dtypes: tuple[torch.dtype, ...], states: tuple[State, ...], stochastic: tuple[bool, bool],
    pull: int = 0,
) -> Spec | None:  # fmt: skip
    """The bucket of a parameter, a gradient and states of these dtypes; None where there is none.

    Args:
        states: of the rule; then `EMA`, `REFERENCE` and `MASTER`, where they are there, and the scales of what is in 8
            bits.
        stochastic: are parameters, are states rounded stochastically, where their dtype can be?
        pull: as of `Spec`.
    """
    param, grad = dtypes[:2]
    kinds = dict(zip(states, dtypes[2:], strict=True))
    own = {state: dtype for state, dtype in kinds.items() if state is not MASTER and state.of is None}
    master, scales = kinds.get(MASTER), {state.of: dtype for state, dtype in kinds.items() if state.of is not None}
    if not is_steppable(param) or grad not in gradient_dtypes(param):
        return None
    if any(dtype not in state_dtypes(param, state.signed) for state, dtype in own.items()):
        return None
    if master is not None and master not in master_dtypes(param):
        return None
    if scales != {state.name: SCALE.dtype for state, dtype in own.items() if has_scales(dtype)}:
        return None
    formats = [format_of(param, stochastic[0], master), format_of(grad)]
    formats += [
        format_of(dtype, stochastic[1] and state is not REFERENCE, scales.get(state.name))
        for state, dtype in own.items()
    ]
    names = tuple(state.name for state in states)
    epilogues = (AVERAGE,) if EMA in own else ()
    of_rule = names[: len(own) - len(epilogues) - (REFERENCE in own)]
    return Spec(device, of_rule, tuple(formats), epilogues, names[len(own) :], pull)


@dataclass
class Bucket:
    """What one launch steps: the segments from `first` on are those of the parameters `members`, in order."""

    spec: Spec
    backend: Any
    index: int
    first: int
    members: Sequence[int]


class Tensors(NamedTuple):
    """What is stepped of one parameter: its roles, its row, what epilogues write, origin (`Place`), and parts.

    `numbers`: [blocks, numbers of the epilogues]; `marks`: int32 words of `Place.MARKED` bits.
    """

    theta: Tensor
    grad: Tensor
    states: Mapping[str, Tensor]
    row: int
    outputs: Mapping[str, Tensor] = MappingProxyType({})
    numbers: Tensor | None = None
    marks: Tensor | None = None
    origin: int = 0
    master: Tensor | None = None
    scales: Mapping[str, Tensor] = MappingProxyType({})  # by the names of states and outputs
    reference: Tensor | None = None  # what it decays to

    @classmethod
    def of(cls, theta: Tensor, grad: Tensor, beside: Mapping[str, Tensor], row: int, origin: int) -> Tensors:
        """Of a parameter with all that lies beside it, by name."""
        scales = {name: beside[scale_name(name)] for name in beside if scale_name(name) in beside}
        others = {MASTER.name, EMA.name, REFERENCE.name, *map(scale_name, scales)}
        states = {name: t for name, t in beside.items() if name not in others}
        outputs = {EMA.name: beside[EMA.name]} if EMA.name in beside else {}
        master, reference = beside.get(MASTER.name), beside.get(REFERENCE.name)
        return cls(theta, grad, states, row, outputs, None, None, origin, master, scales, reference)


class Table(Protocol):
    """What a backend reads: of a TensorTable, of one as watched steps see it, and of the lists of a caller."""

    buckets: list[Bucket]

    @property
    def rule(self) -> Rule:
        """What is stepped."""

    @property
    def control(self) -> Tensor:
        """float64 [2], the gradient factor and the skip flag that every launch reads."""

    @property
    def norms(self) -> Norms | None:
        """Where squares of gradients are added up, and what counts steps on a device; None where there is none."""

    @property
    def segments(self) -> Segments:
        """What launches step: a segment a parameter, or one for neighbours in flat buffers."""

    @property
    def device_copies(self) -> dict[torch.device, Any]:
        """What other devices have of the table."""

    @property
    def active(self) -> Tensor:
        """1 for a parameter that is stepped."""

    @property
    def whole(self) -> Segments:
        """A segment a parameter: blocks of sums are counted in each."""

    def span(self, bucket: Bucket) -> tuple[int, int]:
        """(first, count) of the segments of a bucket."""

    def tensors(self, i: int) -> Tensors:
        """Those of parameter `i`, for a backend that works on tensors."""


# Chunks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunks:
    """The chunks of a bucket: int64 [c], and the elements of one. They hold in a step that lacks gradients too."""

    words: Tensor
    size: int


def cut(table: Table, bucket: Bucket, size: int | Callable[[int], int]) -> Chunks:
    """The chunks of a bucket, of `size` elements, or of what it gives for the bucket's elements."""
    first, count = table.span(bucket)
    numels = table.segments.capacities[first : first + count]
    if not isinstance(size, int):
        size = size(int(numels.sum()))
    return Chunks(chunk_words(first, numels, size), size)


def cut_whole(table: Table, bucket: Bucket, size: int) -> Tensor:
    """The same of a segment for every parameter: int64 [c]."""
    numels = table.whole.capacities[bucket.first : bucket.first + len(bucket.members)]
    return chunk_words(bucket.first, numels, size)


def chunk_words(first: int, numels: Tensor, size: int) -> Tensor:
    """The Chunk records of segments `first`, `first + 1`, ... of `numels` elements: int64 [chunks].

    >>> [(c & 0xFFFFFFFF, c >> 32) for c in chunk_words(7, torch.tensor([5, 0, 9]), 4).tolist()]
    [(7, 0), (7, 1), (9, 0), (9, 1), (9, 2)]
    """
    if native.C is not None:
        at, n = numels.data_ptr(), numels.numel()
        words = torch.empty(native.C.cut(at, n, first, size, 0), dtype=torch.int64, device=CPU)
        native.C.cut(at, n, first, size, words.data_ptr())
        return words
    counts = (numels + (size - 1)) // size
    segment = torch.arange(numels.numel(), device=CPU).repeat_interleave(counts)
    ordinal = torch.arange(segment.numel(), device=CPU) - (counts.cumsum(0) - counts)[segment]
    return segment + first + (ordinal << Chunk.ORDINAL_SHIFT)
