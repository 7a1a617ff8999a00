"""What the Triton kernels compile to, against the budgets; no GPU is needed (bench/codegen.py reads it back).

Each Triton compiles in a process of its own: this one interprets, and holds one version. The oldest that is supported
lies where the Makefile puts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import codegen  # noqa: E402
import disassembly  # noqa: E402
from byte_model import step_bytes  # noqa: E402

from wd_kernels.storage import state_dtype  # noqa: E402

OLDEST = Path(sys.prefix) / "triton-oldest"
VERSIONS = [pytest.param("newest"), pytest.param("oldest", marks=pytest.mark.slow)]


def environment(version: str) -> dict[str, str]:
    """Of a process that compiles with that Triton."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    if version == "oldest":
        assert OLDEST.is_dir(), f"{OLDEST} is not there: `make test-slow` installs the oldest supported Triton in it"
        found["PYTHONPATH"] = os.pathsep.join([str(OLDEST), found["PYTHONPATH"]])
    return found


_reports: dict[str, dict[str, Any]] = {}


@pytest.fixture
def report(version: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All costs with one version, compiled once."""
    if version not in _reports:
        path = tmp_path_factory.mktemp("codegen") / f"{version}.json"
        command = [sys.executable, str(ROOT / "bench" / "codegen.py"), "--json", str(path)]
        done = subprocess.run(command, env=environment(version), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        _reports[version] = {**json.loads(path.read_text()), "text": done.stdout}
    return _reports[version]


@pytest.mark.parametrize("target", codegen.TARGETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_budgets(report: dict[str, Any], target: str) -> None:
    own = {c["kernel"]: codegen.Cost(**c) for c in report["costs"] if c["target"] == target}
    assert list(own) == [str(kernel) for kernel in codegen.kernels()]
    nvidia = target.startswith("sm_")
    for kernel in codegen.kernels():
        cost = own[str(kernel)]
        assert cost.stack == 0, f"{cost.kernel}: {cost.stack} bytes of stack"
        assert cost.shared == 0, f"{cost.kernel}: {cost.shared} bytes of shared memory"
        assert cost.layouts == 0, f"{cost.kernel}: values change their layout {cost.layouts} times"
        assert cost.inexact == 0, f"{cost.kernel}: {cost.inexact} operations are not rounded on their own"
        # The widest format is moved 16 bytes at a time, and a 2-byte one beside a 4-byte one 8.
        sizes = [fmt.dtype.itemsize for fmt in kernel.formats]
        widths = {16 * size // max(sizes) for size in sizes}
        assert set(cost.loads) == widths, f"{cost.kernel}: loads of {sorted(set(cost.loads))} bytes"
        written = {16 * size // max(sizes) for size in (sizes[0], *sizes[2:])}
        assert set(cost.stores) == written, f"{cost.kernel}: stores of {sorted(set(cost.stores))} bytes"
        model = step_bytes(kernel.rule, kernel.param, kernel.grad, state_dtype(kernel.param))
        assert cost.bytes_per_element == cost.model == model, f"{cost.kernel}: {cost.bytes_per_element} B an element"
        assert cost.instructions <= cost.budget, f"{cost.kernel}: {cost.instructions} instructions an element"
        if nvidia:
            assert cost.in_flight >= codegen.IN_FLIGHT[target], f"{cost.kernel}: {cost.in_flight} KiB in flight"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_kept_table_is_this_one(report: dict[str, Any]) -> None:
    """`make codegen` writes it: what changed is then to be seen in the diff."""
    assert codegen.kept(report["triton"]).read_text() == report["text"]


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


def test_loops_are_found() -> None:
    """Nested branches back to one stretch of code are one loop; a label that nothing goes back to is none."""
    code = ["A:", "a 4", "B:", "b 16", "go A", "c", "go B", "C:", "d 4", "D:", "e 2", "go D", "go E", "E:"]
    bodies = disassembly.loops(code, r"(\w):", r"go (\w)")
    assert bodies == [["a 4", "b 16", "go A", "c", "go B"], ["e 2", "go D"]]
    width = lambda line: int(line.split()[1]) if line.split()[1:] and line.split()[1].isdigit() else 0  # noqa: E731
    assert disassembly.full_blocks(bodies, width) == bodies[0]
    with pytest.raises(ValueError, match="expected two that load"):
        disassembly.full_blocks(bodies[:1], width)


def test_the_interpreter_compiles_nothing() -> None:
    command = [sys.executable, str(ROOT / "bench" / "codegen.py")]
    done = subprocess.run(
        command, env={**environment("newest"), "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
