"""What the Triton kernels compile to, read back without a GPU: registers, stack, widths, bytes and instructions.

    python bench/codegen.py [--json FILE] [--save] [--ptx FOLDER]
    python bench/codegen_cuda.py [--json FILE] [--save]     # the same of the CUDA library's kernels, as it was built

Every specialisation that users reach is compiled for NVIDIA's sm_80, sm_90 and sm_100 and AMD's gfx942 and gfx1100 by
the Triton that is imported, and disassembled. tests/test_codegen.py holds the numbers against the budgets;
bench/results/codegen-<compiler>-<version>.txt keeps them, so that a change shows as a difference. Triton must not be
interpreting, so this is a process of its own.

In the table: `regs` are registers of a thread (VGPRs on AMD); `stack` bytes of a thread; `access` the widths in bytes
of the loads of parameter, gradient and states in the loop over full blocks; `B/el` the bytes that this loop moves per
element (a scale counts for every thread that reads it; of what a block has, numbers and marks, its share);
`instr/el` its instructions per element (NVIDIA: on the longest way that calls nothing, as root and division do for rare
numbers; AMD: all, but the scalar unit's); `of` is half of what an H200 could issue while its memory moves those bytes;
`KiB` the bytes of loads that one processor has on their way when every resident program is at the first instruction
that waits for one (AMD: has issued all of a round).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import disassembly
import torch
from byte_model import step_bytes
from internals import KINDS, aligned

from wd_kernels.epilogues import AVERAGE, CHANGES, STATISTICS
from wd_kernels.formats import (
    BFLOAT16,
    BFLOAT16_COPY,
    BFLOAT16_STOCHASTIC,
    FLOAT16,
    FLOAT16_COPY,
    FLOAT32,
    FLOAT64,
    INT8,
    INT8_STOCHASTIC,
    SPLIT24,
    SPLIT24_STOCHASTIC,
    SPLIT32,
    UINT8,
    UINT8_STOCHASTIC,
    Format,
    arithmetic_dtype,
    format_of,
)
from wd_kernels.layout import BLOCK, Place
from wd_kernels.rules import RULES

RESULTS = Path(__file__).parent / "results"
#: (backend, architecture, width of a warp) of every target.
TARGETS: dict[str, tuple[str, Any, int]] = {
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64), "gfx1100": ("hip", "gfx1100", 32),
}  # fmt: skip
#: KiB that a processor should have on their way: A100, H200, B200 (CUB's tuning). None is claimed for AMD.
IN_FLIGHT = {"sm_80": 16, "sm_90": 48, "sm_100": 64}
#: Thread instructions that an H200 issues in the time that its memory takes for a byte: 132 multiprocessors, 128 lanes,
#: 1.98 GHz, 4.3 TB/s.
INSTRUCTIONS_PER_BYTE = 132 * 128 * 1.98e9 / 4.3e12
#: Formats of parameter, gradient and states: those of every rule, and others that are compiled of the first two.
FORMATS = (
    (FLOAT64, FLOAT64, FLOAT64), (FLOAT32, FLOAT32, FLOAT32), (FLOAT32, BFLOAT16, FLOAT32), (FLOAT32, FLOAT16, FLOAT32),
    (BFLOAT16, BFLOAT16, FLOAT32), (BFLOAT16, FLOAT32, FLOAT32), (FLOAT16, FLOAT16, FLOAT32),
    (FLOAT16, FLOAT32, FLOAT32), (FLOAT32, FLOAT32, BFLOAT16_STOCHASTIC),
    (BFLOAT16_STOCHASTIC, BFLOAT16, BFLOAT16_STOCHASTIC),
)  # fmt: skip
MORE_FORMATS = (
    (FLOAT32, BFLOAT16, BFLOAT16_STOCHASTIC), (BFLOAT16, BFLOAT16, BFLOAT16), (BFLOAT16, BFLOAT16, BFLOAT16_STOCHASTIC),
    (BFLOAT16_STOCHASTIC, BFLOAT16, FLOAT32),
    (SPLIT32, BFLOAT16, FLOAT32), (SPLIT24_STOCHASTIC, BFLOAT16, BFLOAT16_STOCHASTIC),
    (BFLOAT16_COPY, BFLOAT16, FLOAT32), (FLOAT16_COPY, FLOAT16, FLOAT32),
    (FLOAT32, FLOAT32, INT8_STOCHASTIC), (BFLOAT16_STOCHASTIC, BFLOAT16, INT8_STOCHASTIC),
    (SPLIT24, BFLOAT16, INT8_STOCHASTIC),
)  # fmt: skip
#: The targets of these, and what else the CUDA library has kernels of.
MORE_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Of the formats, those that the CUDA library has kernels for which run an epilogue, and which are compiled with one.
EPILOGUE_FORMATS = (
    (FLOAT64, FLOAT64, FLOAT64), (FLOAT32, FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16, FLOAT32),
    (BFLOAT16_COPY, BFLOAT16, FLOAT32),
)  # fmt: skip
EPILOGUES = {own.name: own for own in (AVERAGE, STATISTICS, CHANGES)}
TOGETHER = ("average", "statistics", "changes")  # of which Triton alone has kernels
#: Of the formats, those that the CUDA library has kernels for whose decay pulls; and kernels that are compiled so.
PULLED_FORMATS = ((FLOAT32, FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16, FLOAT32))
PULLED = (("adamw", 1, 0), ("adamw", 2, 0), ("sgdw", 1, 1), ("adagradw", 2, 0))
LIBRARY_FORMATS = (
    (SPLIT32, BFLOAT16, BFLOAT16_STOCHASTIC), (SPLIT24, BFLOAT16, FLOAT32), (SPLIT24_STOCHASTIC, BFLOAT16, FLOAT32),
    (BFLOAT16_COPY, FLOAT32, FLOAT32),
    (BFLOAT16_COPY, BFLOAT16, BFLOAT16_STOCHASTIC),
    (BFLOAT16, BFLOAT16, INT8_STOCHASTIC), (BFLOAT16_COPY, BFLOAT16, INT8_STOCHASTIC),
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One specialisation: a key of internals.KINDS, the formats of parameter, gradient and states, and epilogues.

    States in 8 bits are uint8 where they are never negative, and called int8 all the same. What epilogues write has the
    arithmetic type. `pull`: what the decay pulls to, 1 a center, 2 a reference (`Spec.pull`).
    """

    rule: str
    param: Format
    grad: Format
    state: Format
    epilogues: tuple[str, ...] = ()
    pull: int = 0

    @property
    def formats(self) -> tuple[Format, ...]:
        """Of every role."""
        rule, names = KINDS[self.rule]
        signed = {state.name: state.signed for state in rule.states}
        states = [self.state if signed[name] else unsigned(self.state) for name in names]
        return self.param, self.grad, *states, *self.outputs, *self.references

    @property
    def outputs(self) -> tuple[Format, ...]:
        """Of what epilogues write."""
        full = format_of(arithmetic_dtype(self.param.dtype))
        return tuple(full for own in self.epilogues for _ in EPILOGUES[own].outputs)

    @property
    def references(self) -> tuple[Format, ...]:
        """Of what parameters decay to, which is only read."""
        return (format_of(self.param.dtype),) if self.pull == 2 else ()

    @property
    def numbers(self) -> int:
        """How many an epilogue has of a block."""
        return sum(len(EPILOGUES[own].numbers) for own in self.epilogues)

    @property
    def marks(self) -> bool:
        """Does an epilogue mark what has changed?"""
        return any(EPILOGUES[own].marks for own in self.epilogues)

    @property
    def of_blocks(self) -> float:
        """Bytes of an element's share in what blocks have: their numbers, and words of marks."""
        size = arithmetic_dtype(self.param.dtype).itemsize
        return self.numbers * size / BLOCK + self.marks * 4 / Place.MARKED

    @property
    def moved(self) -> tuple[int, ...]:
        """Bytes of an element of each role and part that is loaded: the parameter's copy only where it is compared."""
        parts = [] if self.param.part is None else [self.param.part.dtype.itemsize]
        copied = parts == [4] and not self.marks
        return (*([] if copied else [self.param.dtype.itemsize]), *(f.dtype.itemsize for f in self.formats[1:]), *parts)

    @property
    def plain(self) -> bool:
        """Are its states in the arithmetic type, and parameters without a part, as they are by default?"""
        return self.state.dtype == arithmetic_dtype(self.param.dtype) and self.param.part is None

    @property
    def scaled(self) -> bool:
        """Are its states in 8 bits?"""
        return self.state.binades > 0 and len(self.formats) > 2 + len(self.outputs) + len(self.references)

    @property
    def common(self) -> bool:
        """Are its formats those that are compiled for all targets?"""
        return (self.param, self.grad, self.state) in FORMATS and not (self.epilogues or self.pull)

    @property
    def model(self) -> int:
        """Bytes of a step of one element, but for scales."""
        part = None if self.param.part is None else self.param.part.dtype
        own = int(step_bytes(self.rule, self.param.dtype, self.grad.dtype, self.state.dtype, part))
        if self.marks and part == torch.float32:  # the copy is compared with what it was
            own += self.param.dtype.itemsize
        own += sum(2 * fmt.dtype.itemsize for fmt in self.outputs)
        return own + sum(fmt.dtype.itemsize for fmt in self.references)

    def __str__(self) -> str:
        names, full = dict.fromkeys((self.param.name, self.grad.name)), arithmetic_dtype(self.param.dtype)
        more = "".join(f" + {name}" for name in self.epilogues) + ("", ", pulled", ", to a reference")[self.pull]
        states = "" if self.state.dtype == full else f"; {self.state.name} states"
        return f"{self.rule} ({', '.join(names)}{states}){more}"


_UNSIGNED = {INT8: UINT8, INT8_STOCHASTIC: UINT8_STOCHASTIC}


def unsigned(fmt: Format) -> Format:
    """What a state has that is never negative, where others have `fmt`."""
    return _UNSIGNED.get(fmt, fmt)


def signed(fmt: Format) -> Format:
    """The other way."""
    return next((own for own, other in _UNSIGNED.items() if other == fmt), fmt)


def kernels(every: bool = False) -> list[Kernel]:
    """The specialisations that are compiled here; `every`: all that the CUDA library has."""
    found: dict[str, Kernel] = {}
    asked: list[tuple[Format, Format, Format]] = [*FORMATS, *MORE_FORMATS]
    asked += LIBRARY_FORMATS if every else ()
    for rule, formats in product(KINDS, asked):
        own = Kernel(rule, *formats)
        if len(own.formats) == 2:  # it has no states
            own = Kernel(rule, *formats[:2], format_of(arithmetic_dtype(own.param.dtype)))
        if every or formats in FORMATS or rule in ("adamw", "sgdw"):
            found.setdefault(str(own), own)
    for rule, formats, epilogue in product(KINDS, EPILOGUE_FORMATS, EPILOGUES):
        own = Kernel(rule, *formats, (epilogue,))
        if every or rule in ("adamw", "sgdw") or (formats[0] == FLOAT32 and own.outputs):
            found.setdefault(str(own), own)
    pulled = product(KINDS, (1, 2), range(len(PULLED_FORMATS))) if every else PULLED
    for rule, pull, which in pulled:
        own = Kernel(rule, *PULLED_FORMATS[which], (), pull)
        found.setdefault(str(own), own)
    if not every:
        own = Kernel("adamw", FLOAT32, FLOAT32, FLOAT32, TOGETHER)
        found[str(own)] = own
    return list(found.values())


def kernels_of(target: str) -> list[Kernel]:
    """Those of them that are compiled for a target."""
    return [own for own in kernels() if own.common or target in MORE_TARGETS]


@dataclass(frozen=True)
class Cost(disassembly.Reading):
    """What a kernel costs on a target."""

    kernel: str
    target: str
    elements: int  # of a thread, in one round of the loop over full blocks
    model: int  # bytes that a step of one element loads and stores: by the types in Triton's IR, or the byte model
    layouts: int = 0  # conversions of a layout in the TTGIR
    of_blocks: float = 0  # of an element: its share in what its block has

    @property
    def bytes_per_element(self) -> float:
        return self.moved / self.elements + self.of_blocks

    @property
    def instructions(self) -> float:
        """Per element."""
        return self.issued / self.elements

    @property
    def in_flight(self) -> float:
        """KiB per processor."""
        return self.threads * self.ahead / 1024

    @property
    def budget(self) -> float:
        return INSTRUCTIONS_PER_BYTE * self.bytes_per_element / 2


FORMATS_OF_GRADIENTS = (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)


@dataclass(frozen=True)
class Before:
    """A kernel that is run before a step: "squares", "accumulate", of gradients in a format, or "begin", of a rule."""

    what: str
    name: str

    @property
    def of(self) -> Any:
        """The format or the rule."""
        return (
            RULES[self.name] if self.what == "begin" else next(f for f in FORMATS_OF_GRADIENTS if f.name == self.name)
        )

    def __str__(self) -> str:
        return f"{self.what} ({self.name})"


def before() -> list[Before]:
    """All of them."""
    sums = [Before(what, fmt.name) for what in ("squares", "accumulate") for fmt in FORMATS_OF_GRADIENTS]
    return [*sums, *(Before("begin", rule) for rule in RULES)]


def compiled_before(kernel: Before, target: str) -> Any:
    """Triton's compiled kernel, as the package would launch it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wd_kernels.backends import triton as own
    from wd_kernels.backends import triton_begin

    backend, architecture, warp = TARGETS[target]
    constants: dict[str, Any]
    numbers: tuple[str, ...]
    if kernel.what != "begin":
        constants = {"format": kernel.of.code, "accumulates": kernel.what == "accumulate", "rows": own.SQUARED}
        function = triton_begin.squares_kernel
        pointers: dict[str, str] = dict.fromkeys(("chunks", "places", "moving"), "*i64")
        numbers = ("place_words", "chunk_size", "copies", "stride")
    else:
        function, rule = triton_begin.begin_kernel, kernel.of
        constants = {
            "group": getattr(triton_begin, f"group_{rule.name}"), "count": getattr(triton_begin, f"count_{rule.name}"),
            "of_rule": len(rule.own), "group_scalars": len(rule.group_scalars),
            "count_scalars": len(rule.count_scalars), "grad_scale_at": rule.scalars.index("grad_scale"),
        }  # fmt: skip
        floats = dict.fromkeys(("grad_scale", "found_inf", "steps", "fresh", "loss"), "*fp32")
        words = dict.fromkeys(
            ("sums", "totals", "slots_of", "sources", "keys", "active", "schedule_steps", "spikes_seen"), "*i64"
        )
        names = function.arg_names[:22]
        pointers = {name: {**floats, **words}.get(name, "*fp64") for name in names}
        numbers = ("copies", "slots", "of_groups", "of_rows", "of_params")
    signature = {**pointers, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr")}
    names = function.arg_names
    assert list(signature) == names, names
    values = {(names.index(name),): value for name, value in constants.items()}
    lines = [*pointers, "chunk_size"] if kernel.what != "begin" else []
    aligned_by_16 = {(names.index(name),): [["tt.divisibility", 16]] for name in lines}
    return triton.compile(
        ASTSource(function, signature, values, aligned_by_16),
        target=GPUTarget(backend, architecture, warp),
        options=own.options_before(kernel.what, warp, architecture if backend == "cuda" else None),
    )  # fmt: skip


def compiled(kernel: Kernel, target: str, constants: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """Triton's compiled kernel, as the package would launch it but for other constants and changes to its options.

    All that this program knows of the package's Triton backend is here.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wd_kernels.backends import triton as own
    from wd_kernels.backends import triton_kernels

    backend, architecture, warp = TARGETS[target]
    rule, states = KINDS[kernel.rule]
    asked = [EPILOGUES[name] for name in kernel.epilogues]
    epilogues, sizes = own.with_sizes(asked)
    constants = {
        "rule": getattr(triton_kernels, rule.name),
        "root": triton_kernels.root if backend == "cuda" else triton_kernels.scaled_root,
        "scalar_names": rule.scalars,
        "states": states,
        "formats": tuple(fmt.code for fmt in kernel.formats),
        "epilogues": epilogues,
        "sizes": sizes,
        "block": own.block(kernel.formats, sum(of_one[2] for of_one in sizes)),
        "pull": kernel.pull,
        **(constants or {}),
    }
    types = {"chunks": "*i64", "places": "*i64", "moving": "*i64", "rows": "*fp64", "control": "*fp64"}
    numbers = dict.fromkeys(("place_words", "row_words", "chunk_size"), "i32")
    signature = {**types, **numbers, **dict.fromkeys(constants, "constexpr")}
    names = triton_kernels.step_kernel.arg_names
    assert list(signature) == names, names
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned_by_16 = {(names.index(name),): [["tt.divisibility", 16]] for name in (*types, "chunk_size")}
    source = ASTSource(triton_kernels.step_kernel, signature, values, aligned_by_16)
    capability = architecture if backend == "cuda" else None
    options = {**own.options(kernel.formats, warp, capability, asked, kernel.pull), **changes}
    return triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)


def cost_before(kernel: Before, target: str, ptx: Path | None = None) -> Cost | None:
    """The same of a kernel that is run before a step.

    None of "begin", which has no loop over elements, and for gfx1100, whose loop is not found among the others.
    """
    backend, _, warp = TARGETS[target]
    made = compiled_before(kernel, target)
    asm, threads = made.asm, made.metadata.num_warps * warp
    _write(kernel, target, made, ptx)
    if kernel.what == "begin":
        used = disassembly.usage_of(asm) if backend == "cuda" else (0, 0, 0)
        assert used[1] == 0, f"{kernel} on {target} has a stack: {used}"
        return None
    if target == "gfx1100":
        return None
    size = kernel.of.dtype.itemsize
    if kernel.what == "accumulate":  # is read and written too
        size += 2 * arithmetic_dtype(kernel.of.dtype).itemsize
    moved = 4096 // threads * size
    found = disassembly.nvidia(asm, threads) if backend == "cuda" else disassembly.amd(asm, target, warp, False, moved)
    elements = 4096 // threads * max(round(found.moved / moved), 1)
    return Cost(**vars(found), kernel=str(kernel), target=target, elements=elements, model=size)


def _write(kernel: Kernel | Before, target: str, made: Any, ptx: Path | None) -> None:
    if ptx is not None and "ptx" in made.asm:
        (ptx / target).mkdir(parents=True, exist_ok=True)
        (ptx / target / f"{kernel}.ptx").write_text(made.asm["ptx"])
        (ptx / target / f"{kernel}.shared").write_text(str(made.metadata.shared))


def cost(kernel: Kernel, target: str, ptx: Path | None = None, **changes: Any) -> Cost:
    """What a kernel costs on a target; `changes` are other options of the compiler than the backend's.

    `ptx` is a folder for what an NVIDIA target's kernel was translated to, FOLDER/TARGET/KERNEL.ptx, and the bytes of
    shared memory that a launch asks for, KERNEL.shared.
    """
    backend, _, warp = TARGETS[target]
    made = compiled(kernel, target, **changes)
    asm, threads = made.asm, made.metadata.num_warps * warp
    _write(kernel, target, made, ptx)
    # The bytes of an element by the types of the tensors that Triton's IR moves in full blocks, which are the largest;
    # the compiler may have unrolled their loop.
    moves = re.findall(r"tt\.(?:load|store) .*?tensor<([\dx]+)x!tt\.ptr<\w*?(\d+)>", asm["ttir"])
    sizes = {shape: math.prod(map(int, shape.split("x"))) for shape, _ in moves}
    full = max(sizes, key=lambda shape: sizes[shape])  # the first of them: the masked path comes later
    block, model = sizes[full], sum(int(bits) // 8 for shape, bits in moves if shape == full)
    moved = block // threads * model
    if backend == "cuda":
        found = disassembly.nvidia(asm, threads)
    else:
        found = disassembly.amd(asm, target, warp, KINDS[kernel.rule][0].metric != "", moved)
    found = of_elements(kernel, found)
    elements, layouts = block // threads * max(round(found.moved / moved), 1), asm["ttgir"].count("ttg.convert_layout")
    return Cost(
        **vars(found), kernel=str(kernel), target=target, elements=elements, model=model, layouts=layouts,
        of_blocks=kernel.of_blocks,
    )  # fmt: skip


def of_elements(kernel: Kernel, found: disassembly.Reading) -> disassembly.Reading:
    """Without the accesses of one thread to what a block has (numbers, marks), which are narrower than all vectors."""
    if not kernel.of_blocks:
        return found
    narrowest = 16 * min(kernel.moved) // max(kernel.moved)
    loads, stores = (tuple(w for w in widths if w >= narrowest) for widths in (found.loads, found.stores))
    return replace(found, loads=loads, stores=stores)


def costs(ptx: Path | None = None) -> list[Cost]:
    """Of every kernel on every target. `ptx`: a folder for their PTX."""
    pairs = [(target, own) for target in TARGETS for own in (*kernels_of(target), *before())]
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(_cost, [k for _, k in pairs], [t for t, _ in pairs], [ptx] * len(pairs), chunksize=4)
        return [own for own in found if own is not None]


def _cost(kernel: Kernel | Before, target: str, ptx: Path | None) -> Cost | None:
    return cost(kernel, target, ptx) if isinstance(kernel, Kernel) else cost_before(kernel, target, ptx)


def render(found: Sequence[Cost], compiler: str) -> str:
    """The table as text."""
    parts = [f"{compiler}. What each kernel costs (bench/codegen.py says what the columns are).\n"]
    for target in dict.fromkeys(c.target for c in found):
        rows: list[tuple[object, ...]] = [(target, "regs", "stack", "access", "B/el", "instr/el", "of", "KiB")]
        for c in (c for c in found if c.target == target):
            widths = "+".join(map(str, sorted(set(c.loads), reverse=True)))
            rows.append(
                (c.kernel, c.registers, c.stack, widths, f"{c.bytes_per_element:g}", f"{c.instructions:.1f}",
                 f"{c.budget:.0f}", f"{c.in_flight:.0f}")
            )  # fmt: skip
        parts.append(aligned(rows, indent=""))
    return "\n\n".join(parts) + "\n"


def kept(compiler: str) -> Path:
    """Where the table of a compiler is kept: "Triton 3.9.0"."""
    return RESULTS / f"codegen-{compiler.lower().replace(' ', '-')}.txt"


def program(parser: argparse.ArgumentParser, read: Callable[[argparse.Namespace], tuple[str, list[Cost]]]) -> None:
    """Prints the table of a compiler's costs, writes what is asked for."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--save", action="store_true", help="keep the table in bench/results")
    arguments = parser.parse_args()
    compiler, found = read(arguments)
    text = render(found, compiler)
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(json.dumps({"compiler": compiler, "costs": [asdict(c) for c in found]}))
    if arguments.save:
        kept(compiler).write_text(text)


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--ptx", type=Path, metavar="FOLDER", help="write the PTX of NVIDIA's targets there")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    program(parser, lambda own: (f"Triton {triton.__version__}", costs(own.ptx)))


if __name__ == "__main__":
    main()
