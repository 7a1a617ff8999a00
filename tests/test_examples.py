"""The examples run as their first lines say, and say that all went well."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from building import ROOT

SHARDED = ROOT / "examples" / "fsdp2.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def printed(*command: str) -> str:
    found = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=150)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "options"), [(2, ["--release"]), (4, ["--tensor-parallel", "2"])])
def test_sharded(ranks: int, options: list[str]) -> None:
    said = printed("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(SHARDED), *options)
    assert f"{ranks} ranks on " in said
    assert said.endswith("resumed after 10 steps: the same losses, to the bit\n")
    losses = [float(loss) for loss in re.findall(r"^ +\d+ +(\d+\.\d+)", said, re.MULTILINE)]
    assert len(losses) == 20
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_gradient_release() -> None:
    said = printed(str(ROOT / "examples" / "gradient_release.py"), "--layers", "16")
    for rule in ("AdamW", "SGDW"):
        saved = re.search(rf"^{rule}.* (\d+)%, the same weights to the bit$", said, re.MULTILINE)
        assert saved
        assert int(saved[1]) > 40  # resident memory is no exact measure
