"""Hugging Face's `kernels` loads the folder that `make kernels` makes, and it steps as the package does."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import kernels
import pytest
import torch
from kernels._rust import Build

import wd_kernels

ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "bench")]
NAMES = [f"torch-stable-abi210-cpu-{platform.machine()}-linux", "torch-universal"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from building import ENVIRONMENT, compilers

    out = tmp_path_factory.mktemp("kernels") / "here"
    command = [sys.executable, str(ROOT / "bench" / "kernels_folder.py"), "--out", str(out), "--backends", "cpu"]
    done = subprocess.run(command, env=ENVIRONMENT | compilers(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def steps(library: Any, backend: str) -> list[torch.Tensor]:
    """Three steps of two tensors, with every kind of number that there is."""
    numbers = torch.tensor([0.0, -0.0, 1e-40, 3.4e38, torch.inf, torch.nan, -1.0, 0.3])
    params = [torch.nn.Parameter(torch.linspace(-2, 3, 1031)), torch.nn.Parameter(numbers.clone())]
    cosine = library.schedules.Cosine(10)
    opt = library.AdamW(params, lr=0.1, weight_decay=0.3, decay="independent", schedule=cosine, backend=backend)
    for t in range(3):
        for p in params:
            p.grad = torch.linspace(1, -t - 1, p.numel())
        opt.step()
    return [p.detach() for p in params] + [opt.state[p]["exp_avg_sq"] for p in params]


def alike(library: ModuleType, backend: str) -> None:
    for found, expected in zip(steps(library, backend), steps(wd_kernels, backend), strict=True):
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert not torch.equal(steps(library, backend)[0], torch.linspace(-2, 3, 1031))


@pytest.mark.works("kernels", "get_local_kernel: CPU and universal variants, loaded from a local folder")
def test_loaded_from_a_local_folder(folder: Path) -> None:
    """The variant of the CPU is chosen, its operators have a namespace of their own, and its bits are the package's."""
    assert sorted(path.name for path in (folder / "build").iterdir()) == sorted(NAMES)
    library = kernels.get_local_kernel(folder)
    assert library is not wd_kernels
    assert library.native.C is not None, library.native.WHY_NOT
    assert Path(library.__file__).parent.name == NAMES[0]
    assert library.native.NAMESPACE == library.__name__ == f"wd_kernels_{wd_kernels.__version__.replace('.', '_')}_cpu"
    assert library.native.C.__file__ != wd_kernels.native.C.__file__
    alike(library, "cpu")
    assert library.AdamW is not wd_kernels.AdamW


@pytest.mark.works("kernels", "get_local_kernel: without native code, where no variant fits")
def test_loaded_without_native_code(folder: Path) -> None:
    library = kernels.get_local_kernel(folder / "build" / NAMES[1])
    assert library.native.C is None
    assert library.native.NAMESPACE.endswith("_universal")
    alike(library, "reference")


@pytest.mark.works("kernels", "get_local_kernel: named by build.toml")
def test_the_declaration_is_read() -> None:
    """By the library's own parser, which knows every field."""
    assert [str(own).lower() for own in Build.open(ROOT).general.backends] == ["cpu", "cuda"]
