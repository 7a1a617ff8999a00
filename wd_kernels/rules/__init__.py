"""Rules: hyperparameters to scalar rows, states, and the equation; one page each (numerics, sections 2 to 4)."""

from .adagradw import ADAGRADW
from .adamw import ADAMW
from .rule import Hyper, Hyperparameter, Rule, Settings, State, TorchTwin
from .scalars import DECAY_MODES, at_least_zero, ipow, scalar
from .sgdw import FORMS, SGDW

__all__ = [
    "ADAGRADW",
    "ADAMW",
    "DECAY_MODES",
    "FORMS",
    "RULES",
    "SGDW",
    "Hyper",
    "Hyperparameter",
    "Rule",
    "Settings",
    "State",
    "TorchTwin",
    "at_least_zero",
    "code_of",
    "ipow",
    "scalar",
]

#: Every rule by its name, in the order of the list in csrc/kernels.h: the place in it is its number there.
RULES: dict[str, Rule] = {rule.name: rule for rule in (ADAMW, SGDW, ADAGRADW)}


def code_of(rule: Rule) -> int:
    """The number of a rule in native code."""
    return list(RULES).index(rule.name)
