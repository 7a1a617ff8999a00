"""Positions in the records that Python and the native code share (csrc/table.h, csrc/walk.h): int64 words."""

from __future__ import annotations

__all__ = ["WORDS", "Chunk", "Expected", "Kind", "Moving", "Place", "Segment"]

WORDS = 12  # of a Segment or an Expected


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


class Kind:
    """ORDINARY parameters are only compared, SPECIAL ones inspected every step, UNSEEN ones had no gradient yet."""

    ORDINARY, SPECIAL, UNSEEN = 0, 1, 2
