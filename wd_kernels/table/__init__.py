"""Tables: every tensor of a step end to end in one virtual flat index space, checked in every step."""

from .lists import Lists
from .table import TensorTable
from .watched import Watched

__all__ = ["Lists", "TensorTable", "Watched"]
