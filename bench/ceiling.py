"""The measured bandwidth ceiling: a stream over a step's tensors with its mix of reads and writes, and no arithmetic.

It is none of this package's code: bench/stream.cpp, compiled by the machine's compiler when it is first needed, on
torch's own OpenMP threads.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "stream.cpp"


@cache
def library() -> Callable[..., int] | str:
    """The compiled function, or why it is not there."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "no C++ compiler is there"
    # A second OpenMP runtime would have threads of its own, waiting beside torch's: take torch's, if it has one.
    runtimes = sorted((Path(torch.__file__).parent / "lib").glob("lib[gi]*omp*.so*"))
    with tempfile.TemporaryDirectory() as folder:
        half, whole = f"{folder}/stream.o", f"{folder}/stream.so"
        compiling = [compiler, "-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-c", str(SOURCE), "-o", half]
        linking = [compiler, "-shared", half, str(runtimes[0]) if runtimes else "-fopenmp", "-o", whole]
        try:
            for command in (compiling, linking):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            function: Callable[..., int] = ctypes.CDLL(whole).wd_bench_stream
        except subprocess.CalledProcessError as error:
            return f"{compiler} failed: {(error.stderr.strip() or 'it does not say why').splitlines()[0][:160]}"
        except (OSError, subprocess.TimeoutExpired, AttributeError) as error:
            return f"{compiler}: {str(error).splitlines()[0][:160]}"
    return function


def stream(param: Tensor, grad: Tensor, states: Sequence[Tensor], threads: int) -> Callable[[], None]:
    """A call that reads all, and writes all but the gradient, with the values that they have.

    Raises:
        RuntimeError: there is no compiler, or the mix of widths is not in stream.cpp.
    """
    function = library()
    if isinstance(function, str):
        raise RuntimeError(function)
    tensors = (param.detach(), grad, *states)
    if any(t.numel() != param.numel() or not t.is_contiguous() for t in tensors):
        raise RuntimeError("the tensors are not contiguous, or not of one size")
    width = states[0].element_size() if states else param.element_size()
    addresses = (ctypes.c_void_p * 3)(*(s.data_ptr() for s in states), *([None] * (3 - len(states))))
    places = ctypes.c_void_p(param.data_ptr()), ctypes.c_void_p(grad.data_ptr()), addresses
    size = ctypes.c_int64(param.numel())

    def run(held: Sequence[Tensor] = tensors) -> None:  # which are known only by address below
        if function(param.element_size(), grad.element_size(), width, len(states), *places, size, 0, threads):
            raise RuntimeError(f"no stream of {param.dtype}, {grad.dtype} and {[s.dtype for s in states]} is there")

    return run
