"""Parameters, gradients and states that lie end to end in memory."""

from .buffers import FlatBuffer, place_of
from .flatten import flatten_, unflatten_

__all__ = ["FlatBuffer", "flatten_", "place_of", "unflatten_"]
