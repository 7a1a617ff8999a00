"""Builds of the package that tests make, each in a folder of its own and by its own variables alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["ENVIRONMENT", "ROOT", "built_in", "sources"]

ROOT = Path(__file__).resolve().parent.parent
CHOICES = re.compile("PYTHONPATH|TRITON_INTERPRET|WD_KERNELS_.*|TORCH_CUDA_ARCH_LIST|CXX|CUDA_HOME|CUDA_PATH")
#: Without what a developer may have chosen.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not CHOICES.fullmatch(name)}


def sources(folder: Path) -> Path:
    """A copy of what a build needs, in a folder whose name is none of the simplest."""
    folder = folder / "a b, c"
    built_or_cached = shutil.ignore_patterns("*.so", "__pycache__", "_C.txt", "_cuda.txt")
    for name in ("csrc", "wd_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=built_or_cached)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def built_in(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A build in place."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**ENVIRONMENT, "PYTHONWARNINGS": "ignore", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
