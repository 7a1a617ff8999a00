"""Builds of the package that tests make, each in a folder of its own and by its own variables alone."""

from __future__ import annotations

import atexit
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import codegen_cuda
import objects

__all__ = ["ENVIRONMENT", "ROOT", "built_in", "compilers", "sources"]

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


@cache
def compilers() -> dict[str, str]:
    """Variables of builds that compile nothing twice (objects.py): CXX, and CUDA_HOME where there is nvcc."""
    objects.take_over()
    folder = Path(tempfile.mkdtemp(prefix="compilers"))
    atexit.register(shutil.rmtree, folder)
    (folder / "bin").mkdir()
    found = {"CXX": str(folder / "bin" / "c++")}
    names = {"c++": "c++"}
    if codegen_cuda.no_toolkit() is None:
        names["nvcc"] = codegen_cuda.setup()["nvcc"]()
        found["CUDA_HOME"] = str(folder)
    for name, program in names.items():
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, objects.__file__, program])} "$@"\n')
        script.chmod(0o755)
    return found
