"""What the CUDA library's kernels cost, by the SASS and the PTX that it carries."""

from __future__ import annotations

import re
import runpy
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import disassembly
import torch
from byte_model import step_bytes
from codegen import Cost, Kernel, kernels

from wd_kernels.formats import state_dtype

__all__ = ["LIBRARY", "carried_ptx", "compiler", "costs", "cubins", "name", "no_toolkit", "ptx", "whole_ptx"]

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "wd_kernels" / "_cuda.abi3.so"
THREADS = 128  # kThreads of csrc/cuda/chunk.h
_FORMATS = {torch.float64: "Float64", torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float16: "Float16"}


@cache
def _setup() -> dict[str, Any]:
    """The names of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"))


def no_toolkit() -> str | None:
    """Why there is no CUDA compiler, None where there is one."""
    try:
        _setup()["nvcc"]()
    except _setup()["NoCuda"] as why:
        return str(why)
    return None


def compiler() -> str:
    """The CUDA compiler and its version: "nvcc 13.0.88"."""
    said: str = _setup()["asked"](_setup()["nvcc"](), "--version")
    return f"nvcc {re.findall(r'V([0-9.]+)', said)[0]}"


def cubins(library: Path, folder: Path) -> dict[str, Path]:
    """The library's code for each architecture ("sm_90"), in files of a folder."""
    command = [str(disassembly.path("cuobjdump")), "-xelf", "all", str(library.resolve())]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return {re.findall(r"sm_\d+", path.name)[-1]: path for path in sorted(folder.glob("*.cubin"))}


def name(kernel: Kernel) -> str:
    """How the C++ compiler calls the kernel's template arguments."""
    number = "double" if kernel.param == torch.float64 else "float"
    optional = "true" if kernel.rule in ("adamw amsgrad", "sgdw") else "false"
    rule = f"{'AdamW' if kernel.rule.startswith('adamw') else 'SGDW'}<{number}, {optional}>"
    own = (kernel.param, kernel.grad, state_dtype(kernel.param))
    return ", ".join([f"wd::cuda::{rule}", *(f"wd::cuda::{_FORMATS[dtype]}" for dtype in own)])


def _parts(text: str, begin: str) -> dict[str, str]:
    """The parts of a listing that begin with a kernel's mangled name after `begin`, by its template arguments."""
    found = {}
    for part in re.split(begin, text)[1:]:
        mangled = re.match(r"\w+", part)
        if mangled and "step_kernel" in mangled[0]:
            readable = subprocess.run(["c++filt", mangled[0]], check=True, capture_output=True, text=True).stdout
            arguments = re.search(r"step_kernel<(.*)>\(", readable)
            assert arguments, readable
            found[arguments[1]] = part
    return found


def ptx(library: Path = LIBRARY) -> dict[str, str]:
    """The PTX that a library carries, for the last of its architectures, by the kernels' template arguments."""
    return _parts(carried_ptx(library), r"\.entry ")


def whole_ptx(target: str) -> str:
    """The PTX of all kernels for a target ("sm_90"), compiled as the library's are."""
    number = target.removeprefix("sm_")
    source = ROOT / "csrc" / "cuda" / "kernels.cu"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.ptx"
        command = [_setup()["nvcc"](), *_setup()["NVCC_FLAGS"].split(), f"-arch=compute_{number}", "-ptx", str(source)]
        subprocess.run([*command, "-o", str(path)], check=True, capture_output=True)
        return path.read_text()


def carried_ptx(library: Path = LIBRARY) -> str:
    """The PTX that a library carries, whole."""
    return disassembly.tool("cuobjdump", "-ptx", str(library))


def costs(library: Path = LIBRARY) -> list[Cost]:
    """Of every kernel of the library, on every architecture that it was built for.

    What is inexact is read from the library too: in the PTX that it carries, compiled with all the rest by one command,
    and, for kernels without root and division, in the SASS.
    """
    carried = ptx(library)
    with tempfile.TemporaryDirectory() as folder:
        own = cubins(library, Path(folder))
        return [cost for target, cubin in own.items() for cost in _of_target(target, cubin, carried)]


def _of_target(target: str, cubin: Path, carried: Mapping[str, str]) -> Iterator[Cost]:
    """Of one architecture, by its code and the library's PTX."""
    sass = _parts(disassembly.tool("nvdisasm", "-c", str(cubin)), r"\n\t\.section\t\.text\.")
    usages = _parts(disassembly.tool("cuobjdump", "-res-usage", str(cubin)), r"\bFunction ")
    for kernel in kernels():
        key = name(kernel)
        code = sass[key].splitlines()
        ((registers, stack, shared),) = disassembly.usage(usages[key])
        inexact = disassembly.ptx_inexact(carried[key])
        if kernel.rule.startswith("sgdw"):
            inexact += disassembly.sass_inexact(code)
        reading = disassembly.sass_reading(code, registers, stack, shared, inexact, THREADS)
        model = int(step_bytes(kernel.rule, kernel.param, kernel.grad, state_dtype(kernel.param)))
        elements = (sum(reading.loads) + sum(reading.stores)) // model
        yield Cost(
            kernel=str(kernel), target=target, registers=registers, stack=reading.stack, shared=shared,
            layouts=0, inexact=inexact, loads=reading.loads, stores=reading.stores, elements=elements,
            model=model, instructions=reading.instructions / elements,
            in_flight=reading.threads * reading.ahead / 1024,
        )  # fmt: skip
