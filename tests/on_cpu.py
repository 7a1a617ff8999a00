"""backend="cuda" on CPU tensors: the kernels' source in a test build, whose grid is loops (csrc/cuda/on_cpu.cpp)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from filelock import FileLock

from wd_kernels.backends.cuda import CUDA

BUILD = Path(__file__).parent.parent / "build" / "native"


def built(name: str) -> Path:
    """A test build (setup.py names them), which ninja makes where it is out of date."""
    library = BUILD / f"{name}.so"
    command = [sys.executable, "-m", "ninja", "-C", str(BUILD), str(library)]
    with FileLock(BUILD / f"{name}.lock"):  # tests run in several processes at once
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"the test build {name} failed:\n{done.stdout}{done.stderr}"
    return library


def loaded(library: Path) -> Any:
    """The operators of a test build, with the token that its step wants to see."""
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None
    token = importlib.util.module_from_spec(spec).TOKEN  # loading it registers its operators
    found = getattr(torch.ops, f"wd_kernels_{library.stem}")
    names = ("step_", "squares_", "begin_", "load", "load_squares", "load_begin", "built")
    return SimpleNamespace(TOKEN=token, **{f"cuda_{name}": getattr(found, f"cuda_{name}") for name in names})


@cache
def operators() -> Any:
    """Of the test build of the CUDA kernels."""
    return loaded(built("on_cpu"))


class OnCPU(CUDA):
    """The backend as it is, but for where its tensors lie."""

    device_type = "cpu"

    @property
    def ops(self) -> Any:
        return operators()

    @property
    def token(self) -> int:
        return int(self.ops.TOKEN)

    def why_not(self) -> str | None:
        return None
