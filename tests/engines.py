"""Everything that executes the kernels, by name: the subjects of the kernel matrix.

| engine | what it is |
|---|---|
| cpu-avx512, -avx2, -baseline | the native CPU backend, one instruction set forced |
| triton-interpreted | the Triton kernels' source, in Triton's interpreter |
| cuda-on_cpu | the CUDA kernels' source, compiled for the CPU with a grid of plain loops (on_cpu.py) |
| triton-newest-sm_90, ... | Triton's PTX, of the newest and the oldest version, for three targets (on_ptx.py) |
| cuda-nvcc-sm_80, ..., cuda-nvcc-library | nvcc's PTX; "library": what the CUDA library carries |
| triton-gpu, cuda-gpu | on a GPU (`pytest -m gpu`) |
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import codegen_cuda
import on_ptx
import pytest
import torch
from on_cpu import OnCPU

from wd_kernels import backends, native
from wd_kernels.backends import BACKENDS
from wd_kernels.layout import Spec
from wd_kernels.table import lists

__all__ = ["COMPILED", "CPU", "ENGINES", "GPU", "MIRRORED", "TEST_DEVICE", "Engine", "absent", "engine_params"]

#: Where the tests marked gpu run. "cpu" rehearses them in the interpreter, on a machine without a GPU.
TEST_DEVICE = os.environ.get("WD_KERNELS_TEST_DEVICE", "cuda")


@dataclass(frozen=True)
class Engine:
    """One of them: the backend's name, and which form of it."""

    backend: str
    form: str
    target: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.form, self.target)))

    @property
    def device(self) -> torch.device:
        on_gpu = self.form == "gpu" and TEST_DEVICE != "cpu"
        return torch.device(TEST_DEVICE, 0) if on_gpu else torch.device("cpu")

    @property
    def is_ptx(self) -> bool:
        return self in COMPILED

    def provide(self, patch: pytest.MonkeyPatch) -> Any:
        """Makes `self.backend` this engine; skips where this machine has nothing of it. The backend object."""
        if self.backend == "cpu":
            if absent(self.form):
                pytest.skip(f"this processor has no {self.form}")
            patch.setenv("WD_KERNELS_ISA", self.form)
        elif self.is_ptx:
            if self.backend == "cuda" and (why_not := codegen_cuda.no_toolkit()):
                pytest.skip(why_not)
            kind = {"triton": on_ptx.TritonOnPTX, "cuda": on_ptx.CUDAOnPTX}[self.backend]
            patch.setitem(BACKENDS, self.backend, kind(self.form, self.target))
        elif self.backend == "cuda" and (self.form == "on_cpu" or TEST_DEVICE == "cpu"):
            patch.setitem(BACKENDS, "cuda", OnCPU())
        patch.setattr(lists, "_resolve", backends.resolve)  # remembers no other engine
        backend = BACKENDS[self.backend]
        if (why_not := backend.why_not()) is not None:
            pytest.skip(why_not)
        if self.form == "gpu" and TEST_DEVICE != "cpu":  # what was built for this machine must run there
            assert backend.refuses(Spec(self.device, (), ())) is None
        return backend


CPU = tuple(Engine("cpu", name) for name in ("avx512", "avx2", "baseline"))
SOURCES = (Engine("triton", "interpreted"), Engine("cuda", "on_cpu"))
COMPILED = tuple(Engine(*names) for names in on_ptx.ENGINES)
GPU = (Engine("triton", "gpu"), Engine("cuda", "gpu"))
ENGINES = (*CPU, *SOURCES, *COMPILED, *GPU)
#: For what the backends of GPUs do around their kernels: the sources, and one compiled form of each.
MIRRORED = (*SOURCES, Engine("triton", "newest", "sm_100"), Engine("cuda", "nvcc", "sm_90"))


def engine_params(engines: tuple[Engine, ...]) -> list[Any]:
    """For pytest.mark.parametrize: each with its name, those of a GPU marked."""
    return [pytest.param(e, id=str(e), marks=[pytest.mark.gpu] * (e.form == "gpu")) for e in engines]


def absent(name: str) -> bool:
    """Does this processor (or this build) lack an instruction set?"""
    before = os.environ.get("WD_KERNELS_ISA")
    os.environ["WD_KERNELS_ISA"] = name
    try:
        return bool(native.C.instruction_set() != name)
    except (AttributeError, RuntimeError) as error:  # no extension at all is another test's failure
        return "does not have" in str(error) or "unknown here" in str(error)
    finally:
        if before is None:
            del os.environ["WD_KERNELS_ISA"]
        else:
            os.environ["WD_KERNELS_ISA"] = before
