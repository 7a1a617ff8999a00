"""Positions in the records that Python and the native code share (csrc/table.h, csrc/walk.h): int64 words."""

from __future__ import annotations

__all__ = ["WORDS", "Chunk", "Expected", "Kind", "Lie", "Moving", "Place", "Seen", "Segment"]

WORDS = 12  # of a Segment


class Segment:
    """One parameter for the movers. Words 0 to 7 are the addresses of its roles: parameter, gradient, states."""

    PARAM, GRAD, STATE = 0, 1, 2
    START, NUMEL, ROW, ALIGNED = 8, 9, 10, 11


class Place:
    """What a device has of a segment for many steps: the addresses of parameter and states."""

    OF_SEGMENT = (Segment.PARAM, Segment.STATE, Segment.STATE + 1, Segment.STATE + 2)


class Moving:
    """What a step may change of a segment: the address of its gradient, how many elements it has, row, alignment."""

    OF_SEGMENT = (Segment.GRAD, Segment.NUMEL, Segment.ROW, Segment.ALIGNED)


class Chunk:
    """What one program of a device steps, in one word: the segment below, above it which of the segment's chunks."""

    ORDINAL_SHIFT = 32


class Expected:
    """What walk must find of one parameter to leave it alone."""

    KIND, SEGMENT, NUMEL, DIMS, NDIM = 0, 1, 2, 3, 4
    PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, DEVICE, ALIGNED, GROUP, STATES = 5, 6, 7, 8, 9, 10, 11
    FLAT_GRAD, HELD, VIEW = 12, 13, 14
    WORDS = 15


class Seen:
    """Walk's notes about one parameter: its own, then where torch's storage objects lie, to be fetched ahead."""

    STORAGES, WORDS = 11, 16


class Kind:
    """ORDINARY parameters are only compared, SPECIAL ones inspected every step, UNSEEN ones had no gradient yet.

    FLAT ones lie in flat buffers with gradient and states, and are compared through handles.
    """

    ORDINARY, SPECIAL, UNSEEN, FLAT = 0, 1, 2, 3


class Lie:
    """Where a segment lies in flat buffers: which (0: in none), its elements with padding, its gradient's address."""

    BUFFER, OFFSET, END, GRAD, NUMEL = 0, 1, 2, 3, 4
    NOWHERE = (0, 0, 0, 0)
