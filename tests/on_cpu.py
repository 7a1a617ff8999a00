"""backend="cuda" on CPU tensors: the kernels' source in a test build, whose grid is loops (csrc/cuda/on_cpu.cpp)."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from wd_kernels.backends.cuda import CUDA

BUILD = Path(__file__).parent.parent / "build" / "native"


@cache
def operators() -> Any:
    """Of the test build, which ninja makes where it is out of date."""
    command = [sys.executable, "-m", "ninja", "-C", str(BUILD), str(BUILD / "on_cpu.so")]
    with FileLock(BUILD / "on_cpu.lock"):  # tests run in several processes at once
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"the test build of the CUDA kernels failed:\n{done.stdout}{done.stderr}"
    torch.ops.load_library(BUILD / "on_cpu.so")
    return torch.ops.wd_kernels_on_cpu


class OnCPU(CUDA):
    """The backend as it is, but for where its tensors lie."""

    device_type = "cpu"

    @property
    def ops(self) -> Any:
        return operators()

    def why_not(self) -> str | None:
        return None
