"""The native extension: its objects, its operator, and the package without it."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BIG, f32, f64, make_params
from torch import Tensor

import wd_kernels
from wd_kernels import native

ROOT = Path(wd_kernels.__file__).resolve().parent.parent
SETS = ("baseline", "avx2", "avx512")
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")


# The objects ----------------------------------------------------------------------------------------------------------


def object_of(name: str) -> Path:
    """The object file of one instruction set, where setup.py leaves it."""
    return ROOT / "build" / "native" / f"{name}.o"


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(name: str) -> dict[str, str]:
    """The symbols that an object defines for the linker, and their kinds (nm's letters)."""
    lines = tool("nm", "-C", "--defined-only", str(object_of(name))).splitlines()
    found = {}
    for line in lines:
        _, kind, symbol = line.split(maxsplit=2)
        if kind not in "rtdb" and not symbol.startswith("DW.ref."):  # local to the object; the unwinder's pointer
            found[symbol] = kind
    return found


@x86
@pytest.mark.parametrize("name", SETS)
def test_symbols_lie_in_the_namespace_of_their_set(name: str) -> None:
    """The linker keeps one copy of a shared template, and it may be the AVX-512 one."""
    found = symbols(name)
    assert len(found) > 30
    strangers = [s for s in found if not re.match(rf"(void |decltype \(.*\) )?wd::{name}::", s)]
    assert not strangers
    assert not [s for s in found if "std::" in s or "torch::" in s or "c10::" in s]
    undefined = tool("nm", "-C", "--undefined-only", str(object_of(name)))
    assert not re.search(r"std::|torch|c10|at::", undefined)


@x86
def test_no_symbol_is_in_two_sets() -> None:
    names = [set(symbols(name)) for name in SETS]
    assert not (names[0] & names[1] | names[0] & names[2] | names[1] & names[2])


@x86
@pytest.mark.parametrize("name", SETS)
def test_instructions(name: str) -> None:
    """No fused multiply-add and no approximate division or root; the widest registers of the set, and no wider."""
    lines = tool("objdump", "-d", "--no-show-raw-insn", str(object_of(name))).splitlines()
    mnemonics = {match[1] for line in lines if (match := re.match(r"\s+[0-9a-f]+:\s+(\S+)", line))}
    assert len(mnemonics) > 20
    assert not {m for m in mnemonics if re.match(r"vf(n?m)(add|sub)", m) or re.match(r"v?(rcp|rsqrt)", m)}
    text = "\n".join(lines)
    widest = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
    for kind in ("div", "sqrt", "mul", "sub", "add"):
        assert re.search(rf"\bv?{kind}ps\b[^\n]*%{widest[name]}", text), f"{kind} is not vectorised"
        assert re.search(rf"\bv?{kind}pd\b[^\n]*%{widest[name]}", text), f"{kind} is not vectorised in float64"
    for other in SETS[SETS.index(name) + 1 :]:
        assert f"%{widest[other]}" not in text


# The operator ---------------------------------------------------------------------------------------------------------


def arguments(**changed: Any) -> list[Any]:
    """A call of step_ on no elements, which is fine, but for what is changed."""
    plain = {
        "segments": torch.zeros(3, 12, dtype=torch.int64),
        "rows": torch.zeros(2, 13, dtype=f64),
        "control": torch.tensor([1.0, 0.0], dtype=f64),
        "rule": 0,
        "formats": [2, 2, 2, 2],
        "first": 0,
        "count": 3,
    }
    assert plain.keys() >= changed.keys()
    return list({**plain, **changed}.values())


def naming_row(row: int) -> Tensor:
    segments = torch.zeros(3, 12, dtype=torch.int64)
    segments[1, 10] = row
    return segments


def test_operator_accepts_no_elements() -> None:
    step_ = torch.ops.wd_kernels.step_
    assert step_(*arguments()) is None
    step_(*arguments(rule=1, formats=[2, 2], rows=torch.zeros(2, 10, dtype=f64)))
    step_(*arguments(first=3, count=0))
    step_(*arguments(count=0, rows=torch.zeros(0, 13, dtype=f64)))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"segments": torch.zeros(3, 12, dtype=torch.int32)}, "segments must be a contiguous CPU tensor"),
    ({"segments": torch.zeros(3, 12, dtype=f64)}, "segments must be a contiguous CPU tensor"),
    ({"segments": torch.zeros(3, 11, dtype=torch.int64)}, r"segments must have shape \[n, 12\]"),
    ({"segments": torch.zeros(36, dtype=torch.int64)}, r"segments must have shape \[n, 12\]"),
    ({"segments": torch.zeros(12, 3, dtype=torch.int64).t()}, "segments must be a contiguous CPU tensor"),
    ({"rows": torch.zeros(2, 13)}, "rows must be a contiguous CPU tensor"),
    ({"rows": torch.zeros(26, dtype=f64)}, "rows must have shape"),
    ({"rows": torch.zeros(13, 2, dtype=f64).t()}, "rows must be a contiguous CPU tensor"),
    ({"rows": torch.zeros(0, 13, dtype=f64)}, "segment 0 names row 0 of 0"),
    ({"rows": torch.zeros(2, 12, dtype=f64)}, "rows must have"),
    ({"rows": torch.zeros(2, 10, dtype=f64)}, "rows must have"),
    ({"rows": torch.zeros(2, 9, dtype=f64), "rule": 1, "formats": [2, 2]}, "rows must have"),
    ({"control": torch.zeros(2)}, "control must be a contiguous CPU tensor"),
    ({"control": torch.zeros(1, dtype=f64)}, "control must hold grad_factor and skip"),
    ({"control": torch.zeros(3, dtype=f64)}, "control must hold grad_factor and skip"),
    ({"segments": naming_row(2)}, "segment 1 names row 2 of 2"),
    ({"segments": naming_row(-1)}, "segment 1 names row -1 of 2"),
    ({"first": 1, "count": 3}, "3 segments from 1 of 3 do not exist"),
    ({"first": -1, "count": 1}, "1 segments from -1 of 3 do not exist"),
    ({"first": 0, "count": -1}, "-1 segments from 0 of 3 do not exist"),
    ({"first": 4, "count": 0}, "0 segments from 4 of 3 do not exist"),
    ({"formats": [2]}, "formats must name 2 to 5 roles"),
    ({"formats": [2] * 6}, "formats must name 2 to 5 roles"),
    ({"formats": [2, 2]}, "no CPU kernel for this rule and these storage formats"),  # AdamW without states
    ({"formats": [2, 1, 2, 2]}, "no CPU kernel"),
    ({"formats": [3, 3, 3, 3]}, "no CPU kernel"),  # states of bfloat16
    ({"formats": [1, 1, 2, 2]}, "no CPU kernel"),
    ({"formats": [3, 4, 2, 2]}, "no CPU kernel"),
    ({"formats": [0, 0, 0, 0]}, "no CPU kernel"),
    ({"formats": [9, 9, 9, 9]}, "no CPU kernel"),
    ({"rule": 2}, "no CPU kernel"),
    ({"rule": -1}, "no CPU kernel"),
    ({"rule": 1}, "no CPU kernel"),  # SGDW with two states
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSED)])
def test_operator_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.wd_kernels.step_(*arguments(**changed))


def test_operator_refuses_a_range_beyond_64_bits() -> None:
    """In a process of its own: where the sum of first and count wraps around, memory far away is read."""
    code = (
        "import torch, wd_kernels\n"
        "a = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(2, 13, dtype=torch.float64)\n"
        "c = torch.tensor([1.0, 0.0], dtype=torch.float64)\n"
        "try: torch.ops.wd_kernels.step_(*a, c, 0, [2, 2, 2, 2], 2**63 - 1, 1)\n"
        "except RuntimeError as error: assert 'do not exist' in str(error), error\n"
        "else: raise SystemExit('accepted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_operator_is_for_the_cpu_alone() -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta|Meta"):
        torch.ops.wd_kernels.step_(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments()))


# Without the extension ------------------------------------------------------------------------------------------------

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "wd_kernels._C":
            raise ImportError("blocked for a test")
sys.meta_path.insert(0, Blocker())
import warnings
import torch
import wd_kernels
from wd_kernels import native
assert native.C is None and not native.CHECKS and "blocked for a test" in native.WHY_NOT
"""

STEPS = """
def train(cls, backend, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 0, 33)]
    opt = cls(params, lr=0.1, weight_decay=0.1, backend=backend, **options)
    for step in range(4):
        for k, p in enumerate(params):
            p.grad = None if (step + k) % 3 == 2 else torch.randn(p.shape)
        opt.step()
        opt.param_groups[0]["lr"] *= 0.9
    tensors = params + [v for p in params for _, v in sorted(opt.state[p].items())]
    return [t.tolist() for t in tensors]
"""


NAMED = """
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
opt = wd_kernels.AdamW([p], backend="reference", weight_decay=0.5)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    opt.step()
try:
    wd_kernels.AdamW([p], backend="cpu").step()
except RuntimeError as error:
    print(error)
print(p.tolist() == torch.full((3,), 1 - 1e-3 * 1.5).tolist(), p.tolist())
"""

AUTO = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = train(wd_kernels.AdamW, "auto"), train(wd_kernels.SGDW, "auto", momentum=0.9)
fallbacks = [w for w in caught if w.category is wd_kernels.FallbackWarning]
assert len(fallbacks) == 1, caught
assert "blocked for a test" in str(fallbacks[0].message)
assert "reference" in str(fallbacks[0].message)
print(found)
"""


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What a process prints, line by line, in which the extension cannot be imported."""
    code = BLOCKED + NAMED + STEPS + AUTO
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_the_extension_cpu_is_an_error_that_says_why(said: list[str]) -> None:
    error, step, _ = said
    assert re.search(r"backend='cpu' cannot be used: the native extension is not there \(blocked for a test\)", error)
    assert "pip install" in error
    assert step.startswith("True"), step


def test_without_the_extension_auto_warns_once_and_steps(said: list[str]) -> None:
    there: dict[str, Any] = {"torch": torch}
    exec(STEPS, there)
    for backend in ("cpu", "reference"):
        train = there["train"]
        found = train(wd_kernels.AdamW, backend), train(wd_kernels.SGDW, backend, momentum=0.9)
        assert said[-1] == str(found)


def test_explicit_cpu_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process; nothing was written, and no state was made."""
    monkeypatch.setattr(native, "WHY_NOT", "it is not there")
    (p,) = make_params(BIG[:1], f32, f32)
    start = p.detach().clone()
    p.grad = torch.ones_like(p)
    opt = wd_kernels.AdamW([p], backend="cpu")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot be used: it is not there"):
        opt.step()
    assert torch.equal(p, start)
    assert not opt.state.get(p)
    with pytest.raises(ValueError, match="backend='gpu': allowed are 'auto', 'cpu', 'triton', 'cuda', 'reference'"):
        wd_kernels.AdamW([p], backend="gpu")


TORCH_OF_2_10 = """
#define STABLE_TORCH_LIBRARY(ns, m) registers #ns;
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) registers #ns;
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) registers #ns #k;
"""


@pytest.mark.parametrize(("source", "expected"), [("ops.cpp", 3), ("cuda/ops.cpp", 3)])
def test_the_namespace_beside_torch_2_10(source: str, expected: int, tmp_path: Path) -> None:
    """Its macros make a literal of a name as it is written: `WD_NAMESPACE` must not come to them."""
    stable = tmp_path / "torch" / "csrc" / "stable"
    stable.mkdir(parents=True)
    for name in ("accelerator", "library", "ops", "tensor"):
        (stable / f"{name}.h").write_text(TORCH_OF_2_10 if name == "library" else "")
    includes = [f"-I{tmp_path}", f"-I{sysconfig.get_paths()['include']}"]
    text = tool("c++", "-E", "-P", "-DWD_NAMESPACE=their_kernels", *includes, str(ROOT / "csrc" / source))
    found = re.findall(r'registers "(\w+)"', text)
    assert found == ["their_kernels"] * expected
