"""A build that vendors the package: its operators live in a namespace of its own, beside the original's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from building import ENVIRONMENT, ROOT, built_in, compilers, sources

PROGRAM = """
import sys, torch, wd_kernels
from their.vendored import functional, AdamW, native
assert native.C is not None, native.WHY_NOT
assert native.NAMESPACE == "their_kernels" and native.CHECKS
original = [torch.ones(40), torch.ones(40) / 3, torch.zeros(40), torch.zeros(40)]
copies = [t.clone() for t in original]
for t in range(1, 4):
    torch.ops.wd_kernels.adamw_.default(*[[x] for x in original], *(5 * [[]]), t, 0.1, 0.9, 0.99, 1e-8, 0.1, 1.0,
                                        1.0, 0.5, "lr_scaled", False, "auto", "states", 0)
    torch.ops.their_kernels.adamw_.default(*[[x] for x in copies], *(5 * [[]]), t, 0.1, 0.9, 0.99, 1e-8, 0.1, 1.0,
                                           1.0, 0.5, "lr_scaled", False, "auto", "states", 0)
assert all(map(torch.equal, original, copies)) and not torch.equal(original[0], torch.ones(40))

step = torch.compile(lambda: functional.adamw_(*[[x] for x in copies], step=4, lr=0.1), backend="eager", fullgraph=True)
step()
wd_kernels.functional.adamw_(*[[x] for x in original], step=4, lr=0.1)
assert all(map(torch.equal, original, copies))

p, q = (torch.nn.Parameter(torch.ones(40)) for _ in range(2))
for own, opt in ((p, AdamW([p])), (q, wd_kernels.AdamW([q]))):
    for _ in range(3):
        own.grad = torch.full((40,), 0.5)
        opt.step()
assert torch.equal(p, q)
print("both", torch.ops.their_kernels.adamw_flat_.default._schema.name)
"""


@pytest.mark.slow
def test_operators_of_a_vendored_build(tmp_path: Path) -> None:
    source = sources(tmp_path)
    built = built_in(source, WD_KERNELS_NAMESPACE="their_kernels", **compilers() | {"WD_KERNELS_CUDA": "0"})
    assert built.returncode == 0, built.stderr
    (tmp_path / "their").mkdir()
    (tmp_path / "their" / "__init__.py").touch()
    (source / "wd_kernels").rename(tmp_path / "their" / "vendored")
    paths = f"{tmp_path}{os.pathsep}{ROOT}"
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**ENVIRONMENT, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "both their_kernels::adamw_flat_\n"


def test_a_namespace_is_an_identifier(tmp_path: Path) -> None:
    found = built_in(sources(tmp_path), WD_KERNELS_NAMESPACE="not one")
    assert found.returncode != 0
    assert "WD_KERNELS_NAMESPACE='not one': expected an identifier" in found.stderr
