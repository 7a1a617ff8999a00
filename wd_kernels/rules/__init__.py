"""Rules: hyperparameters to scalar rows, states, and the equation; one page each (numerics, sections 2 to 4)."""

from .adagradw import ADAGRADW
from .adamw import ADAMW
from .rule import AVERAGE, EMA, FLAG, LIMIT, MASTER, VALUE, Hyper, Hyperparameter, Rule, Settings, State, TorchTwin
from .scalars import (
    DECAY_MODES,
    TORCHS_DECAY,
    DecayMode,
    at_least_zero,
    check_chosen,
    flag,
    ipow,
    norm_limit,
    pair,
    scalar,
)
from .sgdw import FORMS, SGDW, Form
from .storage import STORAGE, MasterWeights, StateDtype, StochasticRounding, state_dtype_word

__all__ = [
    "ADAGRADW",
    "ADAMW",
    "AVERAGE",
    "DECAY_MODES",
    "EMA",
    "FLAG",
    "FORMS",
    "LIMIT",
    "MASTER",
    "RULES",
    "SGDW",
    "STORAGE",
    "TORCHS_DECAY",
    "VALUE",
    "DecayMode",
    "Form",
    "Hyper",
    "Hyperparameter",
    "MasterWeights",
    "Rule",
    "Settings",
    "State",
    "StateDtype",
    "StochasticRounding",
    "TorchTwin",
    "at_least_zero",
    "check_chosen",
    "code_of",
    "flag",
    "ipow",
    "norm_limit",
    "pair",
    "scalar",
    "state_dtype_word",
]

#: Every rule by its name, in the order of the list in csrc/kernels.h: the place in it is its number there.
RULES: dict[str, Rule] = {rule.name: rule for rule in (ADAMW, SGDW, ADAGRADW)}


def code_of(rule: Rule) -> int:
    """The number of a rule in native code."""
    return list(RULES).index(rule.name)
