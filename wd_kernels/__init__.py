"""Fused AdamW, SGDW and AdagradW steps for PyTorch: every form of decoupled weight decay, one launch, exact to the bit.

    import wd_kernels
    optimizer = wd_kernels.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)  # was torch.optim.AdamW

`python -m wd_kernels` tells what is installed and checks that it computes right.
"""

from . import functional, schedules
from .backends import BackendName, FallbackWarning
from .changes import Change, apply_changes
from .decay_conversion import Conversion, convert_weight_decay
from .flat import FlatBuffer, flatten_, unflatten_
from .gradient_release import GradientRelease, release_gradients
from .optim import SGDW, AdagradW, AdamW
from .param_groups import decay_groups
from .rules import DecayMode, Form
from .schedules import NormalizedDecay, normalized_weight_decay
from .sharding import redistribute_gradients
from .state_conversion import convert_state
from .version import __version__
from .weight_decay_rules import scaled_weight_decay, timescale_of, weight_decay_for

__all__ = [
    "SGDW",
    "AdagradW",
    "AdamW",
    "BackendName",
    "Change",
    "Conversion",
    "DecayMode",
    "FallbackWarning",
    "FlatBuffer",
    "Form",
    "GradientRelease",
    "NormalizedDecay",
    "__version__",
    "apply_changes",
    "convert_state",
    "convert_weight_decay",
    "decay_groups",
    "flatten_",
    "functional",
    "normalized_weight_decay",
    "redistribute_gradients",
    "release_gradients",
    "scaled_weight_decay",
    "schedules",
    "timescale_of",
    "unflatten_",
    "weight_decay_for",
]
