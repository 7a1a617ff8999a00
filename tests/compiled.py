"""What the kernels compile to, once for all workers of a test run: PTX of both compilers, costs of Triton's.

Triton compiles in a process of its own: this one interprets, and holds one version. The oldest that is supported lies
where the Makefile puts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import codegen
import codegen_cuda
import ptx
from filelock import FileLock

__all__ = [
    "OLDEST",
    "ROOT",
    "cuda_before",
    "cuda_kernel",
    "cuda_ptx",
    "environment",
    "report",
    "triton_kernel",
    "triton_ptx",
]

ROOT = Path(__file__).parent.parent
OLDEST = Path(sys.prefix) / "triton-oldest"
#: Where all workers of one run find what the first one made; tests/conftest.py names it.
folder: Path | None = None


def environment(version: str) -> dict[str, str]:
    """Of a process that compiles with the "newest" Triton or the "oldest"."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    if version == "oldest":
        assert OLDEST.is_dir(), f"{OLDEST} is not there: `make test` installs the oldest supported Triton in it"
        found["PYTHONPATH"] = os.pathsep.join([str(OLDEST), found["PYTHONPATH"]])
    return found


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, in the first process that asks."""
    assert folder is not None
    path = folder / "compiled" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not (path / "done").exists():
            path.mkdir(exist_ok=True)
            make(path)
            (path / "done").touch()
    return path


@cache
def _triton(version: str) -> Path:
    def make(path: Path) -> None:
        program = [sys.executable, str(ROOT / "bench" / "codegen.py")]
        command = [*program, "--json", str(path / "costs.json"), "--ptx", str(path)]
        done = subprocess.run(command, env=environment(version), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        (path / "text").write_text(done.stdout)

    return _once(f"triton-{version}", make)


def report(version: str) -> dict[str, Any]:
    """All costs with one version of Triton, and the table as text."""
    path = _triton(version)
    return {**json.loads((path / "costs.json").read_text()), "text": (path / "text").read_text()}


def triton_ptx(version: str, target: str, kernel: codegen.Kernel | codegen.Before) -> str:
    """Triton's PTX of a kernel for "sm_80", "sm_90" or "sm_100"."""
    return (_triton(version) / target / f"{kernel}.ptx").read_text()


@cache
def triton_kernel(version: str, target: str, kernel: codegen.Kernel | codegen.Before) -> ptx.Kernel:
    """The same, to be executed."""
    found = ptx.parse(triton_ptx(version, target, kernel))
    found.shared_size += int((_triton(version) / target / f"{kernel}.shared").read_text())
    return found


PROBES = """
import sys, pathlib, codegen, probe_triton
wanted, folder = sys.argv[2:-1], pathlib.Path(sys.argv[-1])
for kernel in (own for own in codegen.kernels() if str(own) in wanted):
    formats = tuple(fmt.code for fmt in kernel.formats)
    outputs = (1 if formats[0] == 1 else 3,) * 2
    sizes = ((2, 2, 3, 2, 1, probe_triton.probe.cache_key),)
    more = {"epilogues": (probe_triton.probe,), "sizes": sizes, "block": 1024, "formats": formats + outputs}
    made = codegen.compiled(kernel, sys.argv[1], more)
    (folder / f"{kernel}.ptx").write_text(made.asm["ptx"])
    (folder / f"{kernel}.shared").write_text(str(made.metadata.shared))
"""
#: Of a version and a target ("oldest/sm_90"), the kernels that tests want with the epilogue of probe.py. One process
#: compiles them all: its start takes six times as long as a kernel.
probes: dict[str, set[str]] = {}


@cache
def triton_probe(version: str, target: str, kernel: codegen.Kernel) -> ptx.Kernel:
    """A kernel with the epilogue of probe.py, to be executed: one of `probes`."""
    wanted = sorted(probes[f"{version}/{target}"])
    assert str(kernel) in wanted

    def make(path: Path) -> None:
        own = environment(version)
        own["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
        command = [sys.executable, "-c", PROBES, target, *wanted, str(path)]
        done = subprocess.run(command, env=own, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr

    path = _once(f"probes-{version}-{target}", make)
    found = ptx.parse((path / f"{kernel}.ptx").read_text())
    found.shared_size += int((path / f"{kernel}.shared").read_text())  # what a launch would ask for
    return found


def _nvcc(target: str, path: Path, *more: str) -> None:
    """The PTX of all kernels for a target ("sm_90"), compiled as the library's are."""
    setup = codegen_cuda.setup()
    what = (f"-arch=compute_{target.removeprefix('sm_')}", *more, "-ptx", str(ROOT / "csrc" / "cuda" / "kernels.cu"))
    command = [setup["nvcc"](), *setup["NVCC_FLAGS"].split(), *what, "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)


@cache
def _cuda(target: str) -> dict[str, str]:
    def make(path: Path) -> None:
        if target == "library":
            (path / "kernels.ptx").write_text(codegen_cuda.carried_ptx())
        elif target.startswith("probe"):
            _nvcc(target.removeprefix("probe-"), path / "kernels.ptx", '-DWD_TEST_EPILOGUE="../tests/probe.h"')
        else:
            _nvcc(target, path / "kernels.ptx")

    path = _once(f"cuda-{target}", make) / "kernels.ptx"
    # What ptx.parse takes of a part begins with `.entry`.
    found = {
        **codegen_cuda.parts(path.read_text(), r"\.entry "),
        **codegen_cuda.parts(path.read_text(), r"\.entry ", "squares_kernel"),
        **codegen_cuda.parts(path.read_text(), r"\.entry ", "begin_kernel"),
    }
    return {key: f".entry {part}" for key, part in found.items()}


def cuda_ptx(target: str, kernel: codegen.Kernel) -> str:
    """nvcc's PTX of a kernel for "sm_80" or "sm_90", or what the library carries ("library")."""
    return _cuda(target)[codegen_cuda.name(kernel)]


@cache
def cuda_before(target: str, kernel: codegen.Before) -> ptx.Kernel:
    """nvcc's PTX of a kernel that is run before a step, to be executed."""
    return ptx.parse(_cuda(target)[codegen_cuda.name_before(kernel)])


@cache
def cuda_kernel(target: str, kernel: codegen.Kernel) -> ptx.Kernel:
    """The same, to be executed."""
    return ptx.parse(cuda_ptx(target, kernel))


@cache
def cuda_probe(target: str, kernel: codegen.Kernel) -> ptx.Kernel:
    """A kernel with the epilogue of probe.h, to be executed."""
    return ptx.parse(_cuda(f"probe-{target}")[codegen_cuda.name(kernel).replace("NoEpilogue", "TestEpilogue")])
