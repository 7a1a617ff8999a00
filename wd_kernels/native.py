"""Loads the native libraries, once; the only module that does.

`C` is the extension module or None, `WHY_NOT` says why it is None. `CHECKS` is True where `C.refresh` may be used:
torch then offers DLPack's exchange API, and tensors are read without a Python call each. `NAMESPACE` is that of the
operators in torch.ops, which a build may choose (WD_KERNELS_NAMESPACE), and `OPS` are they. `load_cuda` adds the CUDA
library's, where they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["CHECKS", "NAMESPACE", "OPS", "WHY_NOT", "C", "load_cuda"]

C: Any = None
WHY_NOT: str | None = None
CHECKS = False
AGAIN = "mend that and build the package again, in its source folder: "
PIP = "pip install --no-cache-dir --force-reinstall --no-deps ."


def _reason(name: str, otherwise: object) -> str:
    """Why the build left a library out, as it noted beside it."""
    note = Path(__file__).with_name(f"{name}.txt")
    return note.read_text(encoding="utf-8").strip() if note.exists() else str(otherwise)


try:
    C = importlib.import_module("._C", __package__)
except ImportError as error:
    WHY_NOT = f"the native extension is not there ({_reason('_C', error)}); {AGAIN}{PIP}"
else:
    _capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    try:
        CHECKS = _capsule is not None and C.connect(_capsule, torch.Tensor, torch.nn.Parameter)
    except ValueError:  # a capsule of another name: an API that is not known here
        CHECKS = False

NAMESPACE: str = C.NAMESPACE if C is not None else (__package__ or "wd_kernels").replace(".", "_")
OPS = getattr(torch.ops, NAMESPACE)


@cache
def load_cuda() -> str | None:
    """Loads the CUDA library; why it cannot be, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if importlib.util.find_spec("._cuda", __package__) is None:
        why = _reason("_cuda", "the package was built without it")
        return f"the CUDA library is not there ({why}); {AGAIN}WD_KERNELS_CUDA=1 {PIP}"
    try:
        importlib.import_module("._cuda", __package__)
    except ImportError as error:
        return f"the CUDA library does not load ({error})"
    return None if hasattr(OPS, "cuda_load") else f"the CUDA library has no operators in torch.ops.{NAMESPACE}"
