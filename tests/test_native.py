"""The native extension: its objects, its plans, and the package without it."""

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
from bits import assert_same_bits
from cases import BIG, bf16, f16, f32, f64, make_params
from torch import Tensor

import wd_kernels
from wd_kernels import native, reference
from wd_kernels.rules import ADAMW, RULES, SGDW, code_of

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
    strangers = [s for s in found if not re.match(rf"(void |float |double |decltype \(.*\) )?wd::{name}::", s)]
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


# Plans ----------------------------------------------------------------------------------------------------------------


W = len(ADAMW.scalars)


def arguments(**changed: Any) -> dict[str, Any]:
    """Of a plan and its rows: a launch of no elements, which is fine, but for what is changed."""
    plain = {
        "chunks": torch.arange(3),
        "places": torch.zeros(3, 6, dtype=torch.int64),
        "moving": torch.zeros(3, 4, dtype=torch.int64),
        "control": torch.tensor([1.0, 0.0], dtype=f64),
        "chunk_size": 1024,
        "rule": 0,
        "variant": 0,
        "epilogues": 0,
        "formats": [2, 2, 2, 2],
        "rows": torch.zeros(2, W, dtype=f64),
    }
    assert plain.keys() >= changed.keys()
    return {**plain, **changed}


def planned(**changed: Any) -> Any:
    *given, _ = arguments(**changed).values()
    return native.C.plan(*given)


def launched(**changed: Any) -> Any:
    return native.C.launch([planned(**changed)], arguments(**changed)["rows"])


def naming_row(row: int) -> Tensor:
    moving = torch.zeros(3, 4, dtype=torch.int64)
    moving[1, 2] = row
    return moving


def test_plans_of_no_elements() -> None:
    assert launched() is None
    launched(rule=1, formats=[2, 2], rows=torch.zeros(2, len(SGDW.scalars), dtype=f64))
    launched(chunks=torch.zeros(0, dtype=torch.int64))
    launched(chunks=torch.zeros(0, dtype=torch.int64), rows=torch.zeros(0, W, dtype=f64))
    launched(places=torch.zeros(3, 9, dtype=torch.int64))  # of a table with more roles
    assert native.C.launch([], torch.zeros(0)) is None


INT64, FLOAT64 = (f"must be a contiguous CPU tensor of {dtype}" for dtype in ("int64", "float64"))
#: What a plan is made of.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"chunks": torch.zeros(3, dtype=torch.int32)}, f"chunks {INT64}"),
    ({"chunks": torch.zeros(3, 1, dtype=torch.int64)}, "chunks must have one dimension"),
    ({"chunks": torch.arange(6)[::2]}, f"chunks {INT64}"),
    ({"places": torch.zeros(3, 6, dtype=f64)}, f"places {INT64}"),
    ({"places": torch.zeros(3, 5, dtype=torch.int64)}, "places must have a word for every role"),
    ({"places": torch.zeros(18, dtype=torch.int64)}, "places must have two dimensions"),
    ({"places": torch.zeros(6, 3, dtype=torch.int64).t()}, f"places {INT64}"),
    ({"places": torch.zeros(2, 6, dtype=torch.int64)}, "2 places beside 3 segments"),
    ({"moving": torch.zeros(3, 4, dtype=f64)}, f"moving {INT64}"),
    ({"moving": torch.zeros(3, 3, dtype=torch.int64)}, "moving must have 4 columns"),
    ({"moving": torch.zeros(12, dtype=torch.int64)}, "moving must have 4 columns"),
    ({"control": torch.zeros(2)}, f"control {FLOAT64}"),
    ({"control": torch.zeros(1, dtype=f64)}, "control must hold grad_factor and skip"),
    ({"control": torch.zeros(3, dtype=f64)}, "control must hold grad_factor and skip"),
    ({"control": torch.zeros(1, 2, dtype=f64)}, "control must have one dimension"),
    ({"chunk_size": 1000}, "chunk_size=1000: expected a multiple of 1024"),
    ({"chunk_size": 0}, "chunk_size=0: expected a multiple of 1024"),
    ({"chunk_size": -1024}, "chunk_size=-1024: expected a multiple of 1024"),
    ({"chunk_size": 2**31}, "expected a multiple of 1024"),
    ({"formats": [2]}, "formats must name 2 to 16 roles"),
    ({"formats": [2] * 17}, "formats must name 2 to 16 roles"),
    (
        {"formats": [2, 2]},
        "no CPU kernel for this rule, these epilogues and these storage formats",
    ),  # AdamW without states
    ({"formats": [2, 2, 2, 2, 2]}, "no CPU kernel"),  # AMSGrad's formats, AdamW's variant
    ({"variant": 1}, "no CPU kernel"),
    ({"variant": 2}, "no CPU kernel"),
    ({"formats": [2, 1, 2, 2]}, "no CPU kernel"),
    ({"formats": [1, 1, 2, 2]}, "no CPU kernel"),
    ({"formats": [0, 0, 0, 0]}, "no CPU kernel"),
    ({"formats": [9, 9, 9, 9]}, "no CPU kernel"),
    ({"rule": 99}, "no CPU kernel"),
    ({"epilogues": 1 << 3}, "no CPU kernel"),  # tests have one of that number
    ({"rule": -1}, "no CPU kernel"),
    ({"rule": 1}, "no CPU kernel"),  # SGDW with two states
    *(({name: arguments()[name].to("meta")}, f"{name} must be a contiguous CPU tensor of")
      for name in ("chunks", "places", "moving", "control")),
]  # fmt: skip
#: What a plan is launched with, or what its tensors hold then.
REFUSED_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"chunks": torch.tensor([0, 3])}, "chunk 1 is of segment 3 of 3"),
    ({"chunks": torch.tensor([0, -(2**32)])}, "chunk 1 is of segment 0 of 3"),
    ({"chunks": torch.tensor([2**32 - 1])}, "chunk 0 is of segment 4294967295 of 3"),
    ({"moving": naming_row(2)}, "segment 1 names row 2 of 2"),
    ({"moving": naming_row(-1)}, "segment 1 names row -1 of 2"),
    ({"rows": torch.zeros(2, W)}, f"rows {FLOAT64}"),
    ({"rows": torch.zeros(2 * W, dtype=f64)}, "rows must have two dimensions"),
    ({"rows": torch.zeros(W, 2, dtype=f64).t()}, f"rows {FLOAT64}"),
    ({"rows": torch.zeros(0, W, dtype=f64)}, "segment 0 names row 0 of 0"),
    ({"rows": torch.zeros(2, W - 1, dtype=f64)}, f"rows must have {W} columns"),
    ({"rows": torch.zeros(2, len(SGDW.scalars), dtype=f64)}, f"rows must have {W} columns"),
    ({"rows": torch.zeros(2, W, dtype=f64, device="meta")}, f"rows {FLOAT64}"),
    ({"rule": 1, "formats": [2, 2], "rows": torch.zeros(2, 13, dtype=f64)}, "rows must have 16 columns"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSED)])
def test_a_plan_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        planned(**changed)


@pytest.mark.parametrize(
    ("changed", "message"), REFUSED_ROWS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSED_ROWS)]
)
def test_a_launch_is_refused(changed: dict[str, Any], message: str) -> None:
    plan = planned(**changed)
    with pytest.raises(RuntimeError, match=message):
        native.C.launch([plan], arguments(**changed)["rows"])


@pytest.mark.parametrize("name", ["chunks", "places", "moving", "control"])
def test_a_plan_of_no_tensor(name: str) -> None:
    with pytest.raises(AttributeError, match="is_contiguous"):
        planned(**{name: [0, 0]})


def test_formats_are_a_list_of_numbers() -> None:
    with pytest.raises(TypeError):
        planned(formats=(2, 2, 2, 2))
    with pytest.raises(TypeError, match="str"):
        planned(formats=[2, 2, 2, "2"])


def adamw_row(step: int = 3) -> Tensor:
    """A row of scalars of AdamW."""
    group = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "decay": "metric_proximal",
             "maximize": False, "amsgrad": False, "eta": 1.0}  # fmt: skip
    return ADAMW.rows(ADAMW.hypers([group]), [(0, step, False)])


def of_tensors(theta: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> dict[str, Any]:
    """What describes them to a plan."""
    return {
        "chunks": torch.arange(-(-theta.numel() // 1024)) << 32,
        "places": torch.tensor([[0, 0, 0, theta.data_ptr(), m.data_ptr(), v.data_ptr()]]),
        "moving": torch.tensor([[grad.data_ptr(), theta.numel(), 0, 0]]),
        "rows": adamw_row(),
    }


def test_nothing_is_launched_where_one_plan_is_refused() -> None:
    tensors = [torch.rand(3000) for _ in range(4)]
    before = [t.clone() for t in tensors]
    called: list[int] = []
    good, bad = planned(**of_tensors(*tensors)), planned(chunks=torch.tensor([0, 3]))
    for launches in ([good, bad], [bad, good], [lambda: called.append(1), good, bad]):
        with pytest.raises(RuntimeError, match="chunk 1 is of segment 3 of 3"):
            native.C.launch(launches, adamw_row())
    assert not called
    assert all(map(torch.equal, tensors, before))
    native.C.launch([good], adamw_row())
    assert not torch.equal(tensors[0], before[0])


def test_launches_of_every_kind() -> None:
    """Plans first, then functions and copies in order."""
    tensors, twins = ([torch.rand(3000, generator=torch.Generator().manual_seed(k)) for k in range(4)] for _ in "ab")
    plan = planned(**of_tensors(*tensors))
    seen: list[Tensor] = []
    copies = torch.zeros(2, 3000)
    pairs = [(copies[0], tensors[0]), (copies[1], tensors[2])]
    native.C.launch(
        [lambda: seen.append(tensors[0].clone()), pairs, lambda: seen.append(copies.clone()), plan], adamw_row()
    )
    native.C.launch([planned(**of_tensors(*twins))], adamw_row())
    assert all(map(torch.equal, tensors, twins))
    assert torch.equal(seen[0], tensors[0])
    assert torch.equal(seen[1], torch.stack([tensors[0], tensors[2]]))


def test_a_plan_keeps_its_tensors_and_reads_them_when_it_is_launched() -> None:
    tensors = [torch.rand(3000) for _ in range(4)]
    given = arguments(**of_tensors(*tensors))
    rows = given.pop("rows")
    start, control, moving = tensors[0].clone(), given["control"], given["moving"]
    plan = native.C.plan(*given.values())
    del given
    control[1] = 1.0
    native.C.launch([plan], rows)
    assert torch.equal(tensors[0], start)
    control[1] = 0.0
    moving[0, 1] = 1500
    native.C.launch([plan], rows)
    assert torch.equal(tensors[0][1500:], start[1500:])
    assert not bool((tensors[0][:1500] == start[:1500]).any())


def test_a_function_that_fails_is_an_error_before_anything_is_begun() -> None:
    """Afterwards it is called again until it returns: what was begun is finished, and the error raised then."""
    tensors = [torch.rand(3000) for _ in range(4)]
    before, calls = tensors[0].clone(), list[int]()

    def failing(times: int) -> Any:
        def go() -> None:
            calls.append(1)
            if len(calls) <= times:
                raise ValueError(f"call {len(calls)}")

        return go

    with pytest.raises(ValueError, match="call 1"):
        native.C.launch([failing(1), failing(0)], adamw_row())
    assert len(calls) == 1
    calls.clear()
    with pytest.raises(ValueError, match="call 1"):  # the first of them
        native.C.launch([planned(**of_tensors(*tensors)), failing(3), failing(0)], adamw_row())
    assert len(calls) == 5
    assert not torch.equal(tensors[0], before)


def test_rules_are_those_of_their_pages() -> None:
    """Numbers, variants, states and scalars of the list in csrc/kernels.h, against the declarations."""
    found = native.C.rules().splitlines()
    expected = [
        f"{code_of(rule)} {rule.variant(s.name for s in states)} {len(states)}: {', '.join(rule.scalars)}"
        for rule in RULES.values()
        for states in rule.sets_of_states()
    ]
    assert found == expected


STORED = {bf16: 3, f16: 4, f32: 2}


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000, 5000])
@pytest.mark.parametrize("dtypes", [(bf16, f16, bf16, f16), (f32, f32, bf16, bf16), (f16, bf16, f32, f16)], ids=str)
@pytest.mark.parametrize("frozen", [0.0, 1.0])
def test_any_formats_go_tile_by_tile(dtypes: tuple[torch.dtype, ...], n: int, frozen: float, isa: str) -> None:
    """A format for each role, also those that no optimizer has yet: the bits of the reference."""
    generator = torch.Generator().manual_seed(n)
    tensors = [torch.randn(n, generator=generator).to(dtypes[0]), torch.randn(n, generator=generator).to(dtypes[1])]
    tensors += [torch.rand(n, generator=generator).to(d) for d in dtypes[2:]]
    twins = [t.clone() for t in tensors]
    rows = adamw_row()
    rows[0, ADAMW.scalars.index("frozen")] = frozen
    for _ in range(3):
        launched(**{**of_tensors(*tensors), "formats": [STORED[d] for d in dtypes], "rows": rows})
        reference.step_(ADAMW, rows[0], 1.0, twins[0], twins[1], {"exp_avg": twins[2], "exp_avg_sq": twins[3]})
        for a, b in zip(tensors, twins, strict=True):
            assert_same_bits(a, b)
    assert torch.equal(tensors[0], twins[0])


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


SOURCES = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
from wd_kernels import native
print(native.__file__, native.WHY_NOT, sep="\\n")
"""


@pytest.mark.parametrize("note", [None, "no C++ compiler was found"])
def test_sources_in_which_nothing_was_built_are_named(tmp_path: Path, note: str | None) -> None:
    """As Python sees them that is started in a checkout after `pip install .`: building again there would not help."""
    own = tmp_path / "wd_kernels"
    shutil.copytree(ROOT / "wd_kernels", own, ignore=shutil.ignore_patterns("*.so", "_*.txt", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    if note:
        (own / "_C.txt").write_text(note)
    done = subprocess.run([sys.executable, "-c", SOURCES], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, why = done.stdout.splitlines()
    assert Path(where) == own / "native.py"
    if note:
        assert why.startswith(f"the native extension is not there ({note}); mend that and build")
    else:
        assert f"Python imports the sources in {own}, where nothing was built" in why
        assert "start it in another folder" in why


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
    opt = wd_kernels.AdamW([p])
    opt.backend = "cpu"
    opt._new_table()
    pattern = "backend='cpu' cannot be used: it is not there. Here are .*'reference'; 'auto' takes the fastest"
    with pytest.raises(RuntimeError, match=pattern):
        opt.step()
    with pytest.raises(RuntimeError, match=pattern):
        wd_kernels.AdamW([p], backend="cpu")
    assert torch.equal(p, start)
    assert not opt.state.get(p)
    with pytest.raises(ValueError, match="backend='gpu': allowed are 'auto', 'cpu', 'triton', 'cuda', 'reference'"):
        wd_kernels.AdamW([p], backend="gpu")


TORCH_OF_2_10 = """
#define STABLE_TORCH_LIBRARY(ns, m) registers #ns;
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) registers #ns;
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) registers #ns #k;
"""


@pytest.mark.parametrize(("source", "expected"), [("python/handles.cpp", 2), ("cuda/ops.cpp", 3)])
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
