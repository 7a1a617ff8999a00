"""Rules: hyperparameters to scalar rows, states, and the equation; one page each (numerics, sections 2 to 4)."""

from .adagradw import ADAGRADW
from .adamw import ADAMW
from .pull import CAUTIOUS, CENTER, GIVEN, INITIAL, PULLS, TO, DecayTo, Pull
from .rule import (
    AVERAGE,
    EMA,
    FLAG,
    LAST,
    LIMIT,
    MASTER,
    REFERENCE,
    VALUE,
    Hyper,
    Hyperparameter,
    Rule,
    Settings,
    State,
    TorchTwin,
)
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
    "CAUTIOUS",
    "CENTER",
    "DECAY_MODES",
    "EMA",
    "FLAG",
    "FORMS",
    "GIVEN",
    "INITIAL",
    "LAST",
    "LIMIT",
    "MASTER",
    "PULLS",
    "REFERENCE",
    "RULES",
    "SGDW",
    "STORAGE",
    "TO",
    "TORCHS_DECAY",
    "VALUE",
    "DecayMode",
    "DecayTo",
    "Form",
    "Hyper",
    "Hyperparameter",
    "MasterWeights",
    "Pull",
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
