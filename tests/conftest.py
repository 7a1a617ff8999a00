"""Fixtures that the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import wd_kernels.backends

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def absent(name: str) -> bool:
    """Does this processor (or this build) lack an instruction set?"""
    before = os.environ.get("WD_KERNELS_ISA")
    os.environ["WD_KERNELS_ISA"] = name
    try:
        return bool(torch.ops.wd_kernels.instruction_set() != name)
    except (AttributeError, RuntimeError) as error:  # no extension at all is another test's failure
        return "does not have" in str(error) or "unknown here" in str(error)
    finally:
        if before is None:
            del os.environ["WD_KERNELS_ISA"]
        else:
            os.environ["WD_KERNELS_ISA"] = before


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this processor has, forced."""
    name = str(request.param)
    if absent(name):
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setenv("WD_KERNELS_ISA", name)
    return name


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    """Puts back what is global: thread count, flushing of subnormals, the one-time warning of the fallback."""
    threads, warned = torch.get_num_threads(), wd_kernels.backends._warned
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    wd_kernels.backends._warned = warned
