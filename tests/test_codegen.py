"""What the Triton kernels compile to, against the budgets; no GPU is needed (bench/codegen.py reads it back).

What is compiled is compiled once for all tests (compiled.py).
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from typing import Any

import codegen
import compiled
import disassembly
import pytest
from budgets import assert_in_budget
from compiled import ROOT, environment

VERSIONS = ["newest", "oldest"]


@pytest.fixture
def report(version: str) -> dict[str, Any]:
    """All costs with one version, compiled once."""
    return compiled.report(version)


@pytest.mark.parametrize("target", codegen.TARGETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_budgets(report: dict[str, Any], target: str) -> None:
    own = {c["kernel"]: codegen.Cost(**c) for c in report["costs"] if c["target"] == target}
    squares = [str(kernel) for kernel in codegen.before() if kernel.what != "begin" and target != "gfx1100"]
    assert list(own) == [*map(str, codegen.kernels_of(target)), *squares]
    for kernel in codegen.kernels_of(target):
        assert_in_budget(kernel, own[str(kernel)])
    for name in squares:  # vector loads, nothing inexact or spilled; of 16 bits they are bound by instructions
        cost = own[name]
        assert (cost.inexact, cost.stack, set(cost.loads), cost.bytes_per_element) == (0, 0, {16}, cost.model)
        assert cost.instructions <= cost.budget * (1.7 if cost.model == 2 else 1)
        assert cost.in_flight >= codegen.IN_FLIGHT.get(target, 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_kept_table_is_this_one(report: dict[str, Any]) -> None:
    """`make codegen` writes it: what changed is then to be seen in the diff."""
    assert codegen.kept(report["compiler"]).read_text() == report["text"]


def test_both_ends_of_what_is_supported_are_kept() -> None:
    from wd_kernels.backends.triton import OLDEST as oldest

    kept = sorted(path.name for path in codegen.RESULTS.glob("codegen-triton-*.txt"))
    assert kept[0].startswith(f"codegen-triton-{oldest[0]}.{oldest[1]}.")
    assert len(kept) == 2


PROBE = """
import sys, codegen
kernel = next(k for k in codegen.kernels() if str(k) == sys.argv[1])
found = codegen.cost(kernel, sys.argv[2], **eval(sys.argv[3]))
print(found.inexact, found.stack, found.in_flight)
"""


@pytest.mark.parametrize(
    ("kernel", "target", "change", "inexact", "stack"),
    [
        ("adamw (float32)", "sm_90", "{}", False, False),
        ("adamw (float32)", "sm_90", "{'enable_fp_fusion': True}", True, False),
        ("sgdw (bfloat16)", "gfx942", "{'enable_fp_fusion': True}", True, False),
        ("sgdw (float32)", "gfx1100", "{'enable_fp_fusion': True}", True, False),
        ("adamw (float64)", "sm_100", "{'maxnreg': 48}", False, True),
    ],
)
def test_what_is_wrong_is_seen(kernel: str, target: str, change: str, inexact: bool, stack: bool) -> None:
    """The numbers of `test_budgets` are zero because the code is right, not because the reading misses them."""
    command = [sys.executable, "-c", PROBE, kernel, target, change]
    done = subprocess.run(command, env=environment("newest"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert (int(found[0]) > 0, int(found[1]) > 0) == (inexact, stack)


LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Utils:
    def load_binary(self, *arguments):
        raise RuntimeError("no device to load it on")
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

class Driver:  # enough of one to compile for a device that is not there
    utils = Utils()
    launcher_cls = lambda self, *arguments: None
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
from wd_kernels.backends import triton
from wd_kernels.formats import format_of
from wd_kernels.rules import ADAMW
kernels = triton._kernels()
def known():
    return len(kernels.step_kernel.device_caches[0][0])
words, numbers = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.float64)
for dtype in (torch.float32, torch.bfloat16):
    formats = tuple(format_of(d) for d in (dtype, dtype, torch.float32, torch.float32))
    for size, offset in ((1024, 0), (2048, 16), (16384, 32)):
        arguments = (words[offset:], words, words[16:], numbers, numbers[16:], 6 + offset, 20 + offset, size,
                     kernels.adamw, kernels.root, ADAMW.scalars, ("exp_avg", "exp_avg_sq"),
                     tuple(f.code for f in formats), (), (), triton.block(formats), 0)
        how = triton.options(formats, 32, 90)
        compiled = kernels.step_kernel.warmup(*arguments, grid=(1,), **how)
        print(known(), compiled.metadata.num_warps, compiled.metadata.enable_fp_fusion)
        for use in (lambda: triton._load(compiled), lambda: kernels.step_kernel[3,](*arguments, **how)):
            try:
                use()
            except RuntimeError as error:
                print(known(), error)
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_launch_is_compiled_before_it_and_once(version: str) -> None:
    """Triton's own way of a launch, to where it needs a device: `warmup` compiles what a launch will look for, `_load`
    brings it there, and neither sizes nor places make another kernel."""
    done = subprocess.run([sys.executable, "-c", LAUNCH], env=environment(version), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [
        line for known in (1, 2) for line in 3 * [f"{known} 4 False", *2 * [f"{known} no device to load it on"]]
    ]
    assert done.stdout.splitlines() == expected


def test_loops_are_found() -> None:
    """Nested branches back to one stretch of code are one loop; a label that nothing goes back to is none."""
    code = ["A:", "a 4", "B:", "b 16", "go A", "c", "go B", "C:", "d 4", "D:", "e 2", "go D", "go E", "E:"]
    bodies = disassembly.loops(code, r"(\w):", r"go (\w)")
    assert bodies == [["A:", "a 4", "B:", "b 16", "go A", "c", "go B"], ["D:", "e 2", "go D"]]

    def width(line: str) -> int:
        number = line.split()[-1]
        return int(number) if number.isdigit() else 0

    assert disassembly.full_blocks(bodies, width) == bodies[0]
    assert disassembly.full_blocks([["a 16"], *bodies], width) == bodies[0]  # the longest of the widest
    with pytest.raises(ValueError, match="expected two or more that load"):
        disassembly.full_blocks(bodies[:1], width)


WAYS = """
.L_0:
 LDG.E.128 R4
 @!P0 BRA `(.L_2)
 CALL.REL.NOINC `($root)
 BRA `(.L_3)
.L_2:
 FFMA R5
.L_3:
 @P1 BRA `(.L_5)
 FADD R6
 FADD R7
 BRA `(.L_6)
.L_5:
 FMUL R6
.L_6:
 @P2 CALL.REL.NOINC `($divide)
 STG.E.128 R6
 BRA.U !UP0, `(.L_0)
"""


def test_the_longest_way_is_found() -> None:
    """Through the longer of two arms, around what always calls, over a call that is rarely made."""
    code = WAYS.strip().splitlines()
    assert [line.split()[-1] for line in disassembly.longest_way(code)] == [
        "R4", "`(.L_2)", "R5", "`(.L_5)", "R6", "R7", "`(.L_6)", "`($divide)", "R6", "`(.L_0)",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="without a call"):
        disassembly.longest_way([".L_0:", " LDG R4", " CALL.REL.NOINC `($root)", " BRA `(.L_0)"])


def test_loads_count_until_one_is_waited_for() -> None:
    code = """
 /*0010*/ LDG.E.128 R4, desc[UR6][R2.64] ;
 /*0020*/ FMUL R20, R21, UR4 ;
 /*0030*/ LDG.E.64 R8, desc[UR6][R2.64+0x800] ;
 /*0040*/ LDG.E R12, desc[UR6][R30.64] ;
 /*0050*/ FADD R20, R9, R20 ;
 /*0060*/ LDG.E.128 R16, desc[UR6][R2.64] ;
""".strip("\n").splitlines()
    assert disassembly._ahead(code) == 16 + 8 + 4
    assert disassembly._ahead([*code[:4], " /*0050*/ LDG.E R40, desc[UR6][R6.64] ;"]) == 28  # its address is waited for
    assert disassembly._ahead([*code[:4], " /*0050*/ STG.E desc[UR6][R2.64], R11 ;", code[5]]) == 44  # nobody loads R11


def test_the_interpreter_compiles_nothing() -> None:
    command = [sys.executable, str(ROOT / "bench" / "codegen.py")]
    done = subprocess.run(
        command, env={**environment("newest"), "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def kept_rows(compiler: str) -> dict[str, list[str]]:
    """Bytes, budget, instructions, registers and KiB in flight of each kernel on sm_90, as they are kept."""
    section = next(
        part for part in codegen.kept(compiler).read_text().split("\n\n") if part.strip().startswith("sm_90 ")
    )
    found = {}
    for line in section.strip().splitlines()[1:]:
        kernel, registers, _, _, size, instructions, budget, in_flight = re.split(r"\s{2,}", line.strip())
        found[kernel] = [size, budget, instructions, registers, in_flight]
    return found


def test_the_page_shows_what_is_kept() -> None:
    """docs/performance.md has rows of the kept tables for sm_90: the newest Triton's, then the CUDA compiler's."""
    triton = kept_rows(f"Triton {importlib.metadata.version('triton')}")
    (nvcc,) = codegen.RESULTS.glob("codegen-nvcc-*.txt")
    cuda = kept_rows(nvcc.stem.removeprefix("codegen-").replace("-", " "))
    page = ROOT / "docs" / "performance.md"
    rows = re.findall(r"^\| ((?:AdamW|SGDW|AdagradW)[^|]*) \| (.*) \|$", page.read_text(), re.MULTILINE)
    rows = [(name, row.split(" | ")) for name, row in rows if row.count("|") == 7]
    assert len(rows) >= 5
    for name, numbers in rows:
        kernel = re.sub(r", (bfloat16 (?:with a 16-bit remainder|copy of a master))$", r" (\1, bfloat16)", name)
        kernel = re.sub(r", (bfloat16 with an 8-bit remainder); (.* states)$", r" (\1, bfloat16; \2)", kernel)
        kernel = re.sub(r", (\w+)(?: with (\w+) gradients)?$", r" (\1, \2)", kernel).replace(", )", ")")
        kernel = re.sub(r"^\w+", lambda found: found[0].lower(), kernel)
        assert numbers == [*triton[kernel], *cuda[kernel][2:]], name
