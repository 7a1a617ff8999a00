"""Loads the native libraries, once; the only module that does.

`C` is the extension module or None, `WHY_NOT` says why it is None. `CHECKS` is True where `C.step` can compare tensors:
torch then offers DLPack's exchange API, and they are read without a Python call each. `NAMESPACE` is that of the
operators in torch.ops, which a build may choose (WD_KERNELS_NAMESPACE), and `OPS` are they. `load_cuda` adds the CUDA
library's, where they are asked for, whose step wants `cuda_token()`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import MemberDescriptorType
from typing import Any

import torch

__all__ = ["CHECKS", "NAMESPACE", "OPS", "WHY_NOT", "C", "cuda_token", "insist", "load_cuda", "looks_into"]

C: Any = None
WHY_NOT: str | None = None
CHECKS = False
_DTENSORS: dict[type, bool] = {}  # torch's own alone
AGAIN = "mend that and build the package again, in its source folder: "
PIP = "pip install --no-cache-dir --force-reinstall --no-deps ."


def _reason(name: str, otherwise: object) -> str:
    """Why the build left a library out, as it noted beside it."""
    note = Path(__file__).with_name(f"{name}.txt")
    return note.read_text(encoding="utf-8").strip() if note.exists() else str(otherwise)


def _without(error: ImportError) -> str:
    """Why the native extension is not there, and what to do."""
    package = Path(__file__).parent
    sources = (package.parent / "csrc").is_dir() and not (package / "_C.txt").exists()
    if sources and isinstance(error, ModuleNotFoundError):
        # Python started in their folder imports them, whatever is installed.
        return (
            f"the native extension is not there (Python imports the sources in {package}, where nothing was built); "
            "start it in another folder, where it finds the installed package, or build here: "
            "pip install --no-deps --editable ."
        )
    return f"the native extension is not there ({_reason('_C', error)}); {AGAIN}{PIP}"


def _connect() -> bool:
    """Gives native code what it reads tensors with, and an example of each lazy bit; False where torch lacks it."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    examples = []
    for dtype, of in ((torch.float32, torch._neg_view), (torch.complex64, torch.conj)):
        plain = torch.empty(2, dtype=dtype, device="cpu")
        examples.append((plain.detach(), plain, of(plain)))
    try:
        return capsule is not None and bool(C.connect(capsule, torch.nn.Parameter, *examples))
    except ValueError:  # a capsule of another name: an API that is not known here
        return False


try:
    C = importlib.import_module("._C", __package__)
except ImportError as error:
    WHY_NOT = _without(error)
else:
    CHECKS = _connect()

NAMESPACE: str = C.NAMESPACE if C is not None else (__package__ or "wd_kernels").replace(".", "_")
OPS = getattr(torch.ops, NAMESPACE)


def insist(functions: list[Callable[[], object]]) -> None:
    """Calls all, each until it returns, whatever a signal's handler raises meanwhile; that is raised at the end.

    They may be called again, and do then what they did. Without native code an exception may come between two of them.
    """
    if C is not None:
        C.insist(functions)
        return
    for function in functions:
        function()


def looks_into(dtensor: Any) -> bool:
    """Can native code read what a DTensor has, which lies in two slots, and its gradient, without Python code?"""
    kind = type(dtensor)
    if kind not in _DTENSORS:
        slots = [kind.__dict__.get(name) for name in ("_local_tensor", "_spec")]
        no_code = kind.__torch_function__ is torch._C._disabled_torch_function_impl
        if not (CHECKS and no_code and all(isinstance(own, MemberDescriptorType) for own in slots)):
            return False
        _DTENSORS[kind] = bool(C.learn(dtensor, dtensor._local_tensor, dtensor._spec))
    return _DTENSORS[kind]


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


def cuda_token() -> int:
    """What the CUDA library's step wants to see."""
    return int(importlib.import_module("._cuda", __package__).TOKEN)
