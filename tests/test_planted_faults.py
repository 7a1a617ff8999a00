"""Faults planted into compiled kernels and into what they are given: the executor, or the bits, must find each.

Each test first shows that nothing is found without the fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import codegen
import compiled
import ptx
import pytest
import torch
from bits import assert_same
from cases import Case, Piece, f32, gradient, make_params, optimizer, snapshot
from engines import COMPILED, Engine
from on_ptx import Launch

from wd_kernels.formats import FLOAT32
from wd_kernels.layout import Place

CASE = Case("adamw", "independent", {"betas": (0.9, 0.95), "decay": "independent"})
#: Together they make every operation matter: both ends of lerp, every scalar.
CASES = (
    CASE,
    Case("adamw", "l2", {"betas": (0.4, 0.9), "decay": "l2"}),
    Case("adamw", "metric", {"betas": (0.9, 0.4), "decay": "metric_proximal"}),
)
#: On vectors, on the masked path, and off alignment.
PIECES = (Piece((1500,)), Piece((2048,)), Piece((1100,), "offset"))
KERNEL = codegen.Kernel("adamw", FLOAT32, FLOAT32, FLOAT32)
#: One form of each compiler, and the one with packed arithmetic.
ENGINES = [e for e in COMPILED if e.target in ("sm_90", "sm_100", "library") and e.form != "oldest"]
pytestmark = pytest.mark.parametrize("engine", ENGINES, ids=str)


def stepped(
    backend: str, plant: Callable[[Launch], None] | None, own: Any, case: Case = CASE
) -> dict[str, torch.Tensor]:
    """Two steps, the second with a missing gradient; `plant` changes every launch before it is made."""
    if own is not None:
        own.before = plant or (lambda launch: None)
    params = make_params(PIECES, f32, f32)
    opt = optimizer(case, params, backend, weight_decay=0.1)
    for step in range(2):
        for k, p in enumerate(params):
            p.grad = None if (k, step) == (0, 1) else gradient(Piece(tuple(p.shape)), f32, 10 * step + k)
        opt.step()
    return snapshot(params, opt)


def right(found: dict[str, torch.Tensor], case: Case = CASE) -> None:
    assert_same(found, stepped("reference", None, None, case))


@pytest.fixture
def own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend, which was right before anything is planted."""
    backend = engine.provide(monkeypatch)
    right(stepped(engine.backend, None, backend))
    return backend


def text_of(engine: Engine) -> str:
    """The PTX of the kernel that these steps launch."""
    return compiled.triton_ptx(engine.form, engine.target, KERNEL) if engine.backend == "triton" else (
        compiled.cuda_ptx(engine.target, KERNEL)
    )  # fmt: skip


def edited(engine: Engine, pattern: str, new: str | Callable[[re.Match[str]], str], which: int | None = None) -> str:
    """The kernel with its `which`-th match changed, or all; an error where there is none."""
    text, count = text_of(engine), 0

    def change(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return match.expand(new) if isinstance(new, str) else new(match)

    if which is None:
        text = re.sub(pattern, change, text)
    else:
        places = list(re.finditer(pattern, text))
        match = places[which]
        text = text[: match.start()] + change(match) + text[match.end() :]
    assert count, pattern
    return text


def planted(engine: Engine, own: Any, text: str, case: Case = CASE) -> dict[str, torch.Tensor]:
    """Steps with another kernel."""
    kernel = ptx.parse(text)

    def plant(launch: Launch) -> None:
        launch.kernel = kernel

    return stepped(engine.backend, plant, own, case)


def assert_wrong(found: dict[str, torch.Tensor]) -> None:
    with pytest.raises(AssertionError, match="differ, first at"):
        right(found)


def assert_wrong_somewhere(engine: Engine, own: Any, text: str) -> None:
    """In one of the cases at least."""
    for case in CASES:
        try:
            right(planted(engine, own, text, case), case)
        except AssertionError as error:
            if "differ, first at" not in str(error):
                raise
            return
    pytest.fail("the fault was not found")


# The compiler's work --------------------------------------------------------------------------------------------------


def test_one_operation_changed(engine: Engine, own: Any) -> None:
    """The first addition, subtraction and product of the text, the last, and one between."""
    kinds = {"add": "sub", "sub": "add", "mul": "add"}
    for opcode, other in kinds.items():
        places = re.findall(rf"\b{opcode}\.rn\.f32(?:x2)?\b", text_of(engine))
        for which in {0, len(places) // 2, len(places) - 1}:
            pattern = rf"\b{opcode}(\.rn\.f32(?:x2)?)\b"
            assert_wrong_somewhere(engine, own, edited(engine, pattern, rf"{other}\1", which))


def test_contraction(engine: Engine, own: Any) -> None:
    """A product and the sum it goes into, as one: what `enable_fp_fusion` and `-fmad` would do."""
    kind = "f32x2" if "mul.rn.f32x2" in text_of(engine) else "f32"
    pattern = (
        rf"(mul\.rn\.{kind}\s+(%\w+), (%\w+), (%\w+);(?:(?!\n\$).)*?)"
        rf"add\.rn\.{kind}\s+(%\w+), (%\w+), \2;"
    )
    text = re.sub(pattern, rf"\1fma.rn.{kind} \5, \3, \4, \6;", text_of(engine), flags=re.DOTALL)
    assert "fma.rn" in text
    assert_wrong_somewhere(engine, own, text)


@pytest.mark.parametrize(
    ("pattern", "new"),
    [(r"div\.rn\.f32", "div.full.f32"), (r"div\.rn\.f32", "div.approx.f32"), (r"sqrt\.rn\.f32", "sqrt.approx.f32"),
     (r"mul\.rn\.f32\b", "mul.rn.ftz.f32"), (r"add\.rn\.f32\b", "add.f32")],
    ids=["div.full", "div.approx", "sqrt.approx", "ftz", "contractible"],
)  # fmt: skip
def test_what_is_not_exact(engine: Engine, own: Any, pattern: str, new: str) -> None:
    """It is not executed at all: what it gives is not defined to the bit."""
    with pytest.raises(ptx.PtxError, match=rf"line \d+: {re.escape(new)}: "):
        planted(engine, own, edited(engine, pattern, new, 0))


def test_a_mask_off_by_one(engine: Engine, own: Any) -> None:
    """One element too many is out of bounds, or another thread's."""
    if engine.backend == "triton":  # lanes < count: <=, in the masked path
        text = edited(engine, r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+;)", r"setp.le.s32\1")
    else:  # skipped if at >= end: >
        text = edited(engine, r"setp\.ge\.s32(\s+%p\d+, %r\d+, %r\d+;)", r"setp.gt.s32\1")
    with pytest.raises(ptx.PtxError, match=r"out of bounds|another thread of the launch touches"):
        planted(engine, own, text)


def test_a_store_to_a_gradient(engine: Engine, own: Any) -> None:
    """What comes from the address of a gradient is stored to where it came from."""
    loads = list(re.finditer(r"ld\.global(\.v4\.b32|\.v2\.u64)\s+(\{[^}]*\}), \[\s*(%rd\d+)[^\]]*\];", text_of(engine)))
    assert len(loads) >= 4
    outcomes = []
    for load in loads[:8]:  # one of the four roles is the gradient; the others' stores change no bit
        text = edited(engine, re.escape(load[0]), lambda m, load=load: f"{m[0]} {store(load)}")
        try:
            right(planted(engine, own, text))
            outcomes.append("")
        except ptx.PtxError as error:
            outcomes.append(str(error))
    found = ["a store to gradient, which is only to be read" in outcome for outcome in outcomes]
    assert 4 * sum(found) == len(found)
    assert 4 * outcomes.count("") == 3 * len(found)


def store(load: re.Match[str]) -> str:
    return f"st.global{load[1]} [{load[3]}], {load[2]};"


def test_an_offset_of_32_bits(engine: Engine, own: Any) -> None:
    """The chunk's first element, computed in 32 bits: right for small tensors, and beyond 2^31 out of bounds."""
    pattern = r"mul\.lo\.s64\s+(%rd\d+), (%rd\d+), (%rd\d+);"
    narrow = "cvt.u32.u64 n0, \\2; cvt.u32.u64 n1, \\3; mul.lo.s32 n0, n0, n1; cvt.s64.s32 \\1, n0;"
    whole = f"{{ .reg .b32 n0; .reg .b32 n1; {narrow} }}"
    texts = [edited(engine, pattern, whole, which) for which in range(2)]  # of the place of a segment, of the element
    begin, kernels = 2**33, [ptx.parse(text) for text in texts]

    def far(kernel: ptx.Kernel | None) -> Callable[[Launch], None]:
        def plant(launch: Launch) -> None:
            launch.kernel = kernel or launch.kernel
            chunks, places, moving = (tables(launch, name) for name in ("chunks", "places", "moving"))
            size = 1024
            for word in range(Place.ADDRESSES, Place.ADDRESSES + 3):
                places[:, word] -= begin * 4
            moving[:, 0] -= begin * 4
            moving[:, 1] += begin * (moving[:, 1] > 0)
            chunks += begin // size * 2**32

        return plant

    right(stepped(engine.backend, far(None), own))
    found = 0
    for text, kernel in zip(texts, kernels, strict=True):
        right(planted(engine, own, text))
        try:
            right(stepped(engine.backend, far(kernel), own))
        except ptx.PtxError as error:
            found += "out of bounds" in str(error)
    assert found == 1  # the table is not so long


# What a launch is given -----------------------------------------------------------------------------------------------


def tables(launch: Launch, name: str) -> torch.Tensor:
    """What describes the launch, in a copy that a test may change."""
    names = ("chunks", "places", "moving", "rows", "control")
    if not hasattr(launch, "copies"):
        launch.copies = dict(zip(names, (table.clone() for table in launch.tables), strict=True))
        launch.use(list(launch.copies.values()))
    return launch.copies[name]


@pytest.fixture
def changing(engine: Engine, own: Any) -> Callable[[Callable[[Launch], None]], Any]:
    right(stepped(engine.backend, lambda launch: None, own))
    return lambda plant: stepped(engine.backend, plant, own)


def test_a_false_promise_of_alignment(engine: Engine, changing: Any) -> None:
    def plant(launch: Launch) -> None:
        tables(launch, "moving")[:, 3] = 1

    with pytest.raises(ptx.PtxError, match=r"a load of 16 bytes of parameter at 0x\w+ by thread \d+ is not aligned"):
        changing(plant)


def test_alignment_that_is_not_used_is_no_fault(engine: Engine, changing: Any) -> None:
    """The other path gives the same bits."""

    def plant(launch: Launch) -> None:
        tables(launch, "moving")[:, 3] = 0

    right(changing(plant))


def test_a_chunk_twice(engine: Engine, changing: Any) -> None:
    def plant(launch: Launch) -> None:
        tables(launch, "chunks")[-1] = tables(launch, "chunks")[0]

    with pytest.raises(ptx.PtxError, match="which another thread of the launch touches: one of both writes"):
        changing(plant)


def test_a_chunk_missing(engine: Engine, changing: Any) -> None:
    def plant(launch: Launch) -> None:
        launch.blocks -= 1

    assert_wrong(changing(plant))


def test_a_count_too_large(engine: Engine, changing: Any) -> None:
    def plant(launch: Launch) -> None:
        tables(launch, "moving")[0, 1] += 1

    with pytest.raises(ptx.PtxError, match="out of bounds"):
        changing(plant)


def test_a_segment_without_a_gradient_that_is_stepped(engine: Engine, changing: Any) -> None:
    """Its tensors are none of the launch's."""

    def plant(launch: Launch) -> None:
        moving = tables(launch, "moving")
        missing = moving[:, 1] == 0
        moving[missing] = moving[~missing][0].clone()

    with pytest.raises(ptx.PtxError, match="out of bounds"):
        changing(plant)
