"""What the CUDA library's kernels cost, against the budgets; and that the library links. No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import codegen
import codegen_cuda
import pytest
from budgets import assert_in_budget

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100")
OTHERS = {"TRITON_INTERPRET", "WD_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"}
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in OTHERS},
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")]),
}


NO_TOOLKIT = codegen_cuda.no_toolkit()
pytestmark = pytest.mark.skipif(NO_TOOLKIT is not None, reason=str(NO_TOOLKIT))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All costs, and the table as it is printed."""
    path = tmp_path_factory.mktemp("codegen") / "cuda.json"
    command = [sys.executable, str(ROOT / "bench" / "codegen_cuda.py"), "--json", str(path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {**json.loads(path.read_text()), "text": done.stdout}


def test_what_it_is_built_for(report: dict[str, Any]) -> None:
    """The architectures of the default, and PTX of the last for those to come."""
    assert list(dict.fromkeys(c["target"] for c in report["costs"])) == list(TARGETS)
    listed = codegen_cuda.disassembly.tool("cuobjdump", "-lptx", str(codegen_cuda.LIBRARY))
    assert re.findall(r"sm_\d+", listed) == ["sm_100"]


@pytest.mark.parametrize("target", TARGETS)
def test_budgets(report: dict[str, Any], target: str) -> None:
    own = {c["kernel"]: codegen.Cost(**c) for c in report["costs"] if c["target"] == target}
    assert list(own) == [str(kernel) for kernel in codegen.kernels(every=True)]
    for kernel in codegen.kernels(every=True):
        assert_in_budget(kernel, own[str(kernel)])


def test_the_kept_table_is_this_one(report: dict[str, Any]) -> None:
    """`make codegen` writes it: what changed is then to be seen in the diff."""
    kept = codegen.kept(report["compiler"])
    if not kept.exists():
        pytest.skip(f"another compiler's table is kept, not one of {report['compiler']}")
    assert kept.read_text() == report["text"]


def test_roots_and_divisions_are_exact() -> None:
    """Each kernel of AdamW and AdagradW has some, all of them rounded, and the SGDW kernels have none."""
    kernels = codegen_cuda.parts(codegen_cuda.carried_ptx(), r"\.entry ")
    assert len(kernels) == len(codegen.kernels(every=True))
    for name, code in kernels.items():
        found = set(re.findall(r"\b(?:sqrt|rsqrt|div|rcp)\.[\w.]+", code))
        number = "f64" if "double" in name else "f32"
        assert found == ({f"sqrt.rn.{number}", f"div.rn.{number}"} if "SGDW" not in name else set()), name


WRONG = """
import sys, codegen_cuda, pathlib
for cost in codegen_cuda.costs(pathlib.Path(sys.argv[1])):
    print(cost.kernel, cost.inexact > 0, sep=": ")
"""


@pytest.mark.parametrize("flag", ["-fmad=true", "-ftz=true"])
def test_what_is_inexact_is_seen(flag: str, tmp_path: Path) -> None:
    """In a library of other flags: the counts of `test_budgets` are zero because the code is right."""
    setup = codegen_cuda.setup()
    exact = [own for own in setup["NVCC_FLAGS"].split() if not own.startswith(flag.partition("=")[0])]
    codes = ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90"]
    command = [setup["nvcc"](), *exact, flag, *codes, "-c", str(ROOT / "csrc" / "cuda" / "kernels.cu")]
    subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], check=True)
    command = [sys.executable, "-c", WRONG, str(tmp_path / "kernels.o")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(": ") for line in done.stdout.splitlines())
    assert list(found) == [str(kernel) for kernel in codegen.kernels(every=True)]
    of_float64 = {name for name in found if "float64" in name}
    assert {name for name, wrong in found.items() if wrong == "False"} == (of_float64 if flag == "-ftz=true" else set())


# The library itself ---------------------------------------------------------------------------------------------------

LOAD = """
import torch
import wd_kernels._cuda as module
print(module.__file__)
ops = torch.ops.wd_kernels
print(ops.cuda_built())
print(ops.cuda_step_.default._schema)
for call in (
    lambda: ops.cuda_load(0, 0, 0, 0, [2, 4, 3, 2]),
    lambda: ops.cuda_load(0, 0, 0, 0, [2]),
    lambda: ops.cuda_step_(module.TOKEN, *[torch.zeros(2)] * 4, 1024, 0, 0, 0, [2, 2, 2, 2], torch.zeros(2)),
):
    try:
        print(call())
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""


def test_the_library_loads_and_says_what_it_is() -> None:
    """Beside a torch without CUDA too, though the package does not load it there: every symbol is found."""
    done = subprocess.run([sys.executable, "-c", LOAD], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, built, schema, formats, roles, device = done.stdout.splitlines()
    assert Path(path).resolve() == codegen_cuda.LIBRARY.resolve()
    assert re.fullmatch(r"CUDA \d+\.\d+ for 8\.0, 9\.0, 10\.0 and its PTX", built)
    assert schema.startswith("wd_kernels::cuda_step_(int token, Tensor chunks, Tensor places, Tensor moving, ")
    assert "there is no CUDA kernel for this rule, these epilogues and these storage formats" in formats
    assert "formats must name 2 to 16 roles" in roles
    assert "Could not run 'wd_kernels::cuda_step_' with arguments from the 'CPU' backend" in device


def test_the_library_needs_no_torch_with_cuda_to_link_and_no_cuda_runtime_beside_it() -> None:
    """libtorch.so brings libtorch_cuda.so where torch has it; the CUDA runtime is inside."""
    listed = subprocess.run(["readelf", "-d", str(codegen_cuda.LIBRARY)], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listed.stdout)
    assert {name.split(".so")[0] for name in needed if "torch" in name or "cuda" in name} == {
        "libtorch",
        "libtorch_cpu",
    }


def test_sizes() -> None:
    """CUDA 13 compresses it; a wheel, in which it lies compressed, is below 5 MiB anyway (test_dist.py)."""
    compresses = int(codegen_cuda.compiler().split()[1].split(".")[0]) >= 13
    assert codegen_cuda.LIBRARY.stat().st_size < (4.5 if compresses else 16) * 2**20
