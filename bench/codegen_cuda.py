"""What the CUDA library's kernels cost, by the SASS and the PTX that it carries: see bench/codegen.py.

python bench/codegen_cuda.py [--json FILE] [--save]
"""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import disassembly
from codegen import Before, Cost, Kernel, kernels, of_elements, program
from internals import KINDS

from wd_kernels import formats

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "wd_kernels" / "_cuda.abi3.so"
THREADS = 128  # kThreads of csrc/cuda/chunk.h
_FORMATS = {
    formats.FLOAT64: "Float64", formats.FLOAT32: "Float32", formats.BFLOAT16: "BFloat16", formats.FLOAT16: "Float16",
    formats.BFLOAT16_STOCHASTIC: "BFloat16Stochastic", formats.SPLIT32: "Split<short, false>",
    formats.SPLIT24: "Split<signed char, false>", formats.SPLIT24_STOCHASTIC: "Split<signed char, true>",
    formats.INT8_STOCHASTIC: "Eight<true>",
    formats.BFLOAT16_COPY: "Copy<wd::cuda::BFloat16, 9l>", formats.FLOAT16_COPY: "Copy<wd::cuda::Float16, 10l>",
}  # fmt: skip


@cache
def setup() -> dict[str, Any]:
    """The names of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"))


def no_toolkit() -> str | None:
    """Why there is no CUDA compiler, None where there is one."""
    try:
        setup()["nvcc"]()
    except setup()["CannotBuild"] as why:
        return str(why)
    return None


def compiler() -> str:
    """The CUDA compiler and its version: "nvcc 13.0.88"."""
    said: str = setup()["asked"](setup()["nvcc"](), "--version")
    return f"nvcc {re.findall(r'V([0-9.]+)', said)[0]}"


def name(kernel: Kernel) -> str:
    """How the C++ compiler calls the kernel's template arguments."""
    rule, states = KINDS[kernel.rule]
    arithmetic = "double" if kernel.param == formats.FLOAT64 else "float"
    asked = [str(state.name in states).lower() for state in rule.states if state.asked_by]
    names = (_FORMATS[own] for own in (kernel.param, kernel.grad, kernel.state))
    epilogue = "".join(own.capitalize() for own in kernel.epilogues) or "NoEpilogue"
    own = f"{rule.title}<{', '.join([arithmetic, *asked])}>"
    if kernel.pull:
        own = f"Pulled<wd::cuda::{own}, {str(kernel.pull == 2).lower()}>"
    parts = (own, *names, f"{epilogue}<{arithmetic}>")
    return ", ".join(f"wd::cuda::{part}" for part in parts)


def name_before(kernel: Before) -> str:
    """The same of a kernel that is run before a step."""
    if kernel.what == "begin":
        rule = kernel.of
        asked = "".join(", false" for state in rule.states if state.asked_by)
        return f"wd::cuda::{rule.title}<double{asked}>"
    accumulates = str(kernel.what == "accumulate").lower()
    return f"{'double' if kernel.of == formats.FLOAT64 else 'float'}, wd::cuda::{_FORMATS[kernel.of]}, {accumulates}"


def parts(text: str, begin: str, kernel: str = "step_kernel") -> dict[str, str]:
    """The parts of a listing that begin with a kernel's mangled name after `begin`, by its template arguments."""
    found = {}
    for part in re.split(begin, text)[1:]:
        mangled = re.match(r"[\w$]+", part)
        if mangled and kernel in mangled[0]:
            readable = subprocess.run(["c++filt", mangled[0]], check=True, capture_output=True, text=True).stdout
            arguments = re.search(rf"{kernel}<(.*)>\(", readable)
            assert arguments, readable
            found[arguments[1].strip()] = part
    return found


def carried_ptx(library: Path = LIBRARY) -> str:
    """The PTX that a library carries, whole, for the last of its architectures."""
    return disassembly.tool("cuobjdump", "-ptx", str(library))


def costs(library: Path = LIBRARY) -> Iterator[Cost]:
    """Of every kernel of the library, on every architecture that it was built for.

    What is inexact is read from the library too: in the PTX that it carries, compiled with all the rest by one command,
    and, for kernels without root and division, in the SASS.
    """
    carried = parts(carried_ptx(library), r"\.entry ")
    with tempfile.TemporaryDirectory() as folder:
        disassembly.tool("cuobjdump", "-xelf", "all", str(library.resolve()), cwd=folder)
        for cubin in sorted(map(str, Path(folder).glob("*.cubin"))):
            target = re.findall(r"sm_\d+", cubin)[-1]
            sass = parts(disassembly.tool("nvdisasm", "-c", cubin), r"\n\t\.section\t\.text\.")
            usages = parts(disassembly.tool("cuobjdump", "-res-usage", cubin), r"\bFunction ")
            for kernel in kernels(every=True):
                key = name(kernel)
                code, inexact = sass[key].splitlines(), disassembly.ptx_inexact(carried[key])
                if not KINDS[kernel.rule][0].metric:
                    inexact += disassembly.sass_inexact(code)
                found = disassembly.sass_reading(code, disassembly.usage(usages[key]), inexact, THREADS)
                found = of_elements(kernel, found)
                elements = found.moved // kernel.model
                yield Cost(
                    **vars(found), kernel=str(kernel), target=target, elements=elements, model=kernel.model,
                    of_blocks=kernel.of_blocks,
                )  # fmt: skip


if __name__ == "__main__":
    program(argparse.ArgumentParser(description=__doc__.split(":", 1)[0]), lambda _: (compiler(), list(costs())))
