"""Positions in the records that Python and the native code share (csrc/table.h, csrc/walk.h): int64 words."""

from __future__ import annotations

__all__ = ["WORDS", "Expected", "Kind", "Segment"]

WORDS = 12  # of every record


class Segment:
    """One parameter for the movers. Words 0 to 7 are the addresses of its roles: parameter, gradient, states."""

    PARAM, GRAD, STATE = 0, 1, 2
    START, NUMEL, ROW, ALIGNED = 8, 9, 10, 11


class Expected:
    """What walk must find of one parameter to leave it alone."""

    KIND, SEGMENT, NUMEL, DIMS, NDIM = 0, 1, 2, 3, 4
    PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, DEVICE, ALIGNED, GROUP, STATES = 5, 6, 7, 8, 9, 10, 11


class Kind:
    """ORDINARY parameters are only compared, SPECIAL ones inspected every step, UNSEEN ones had no gradient yet."""

    ORDINARY, SPECIAL, UNSEEN = 0, 1, 2
