"""What the kernels compile to, read back without a GPU: registers, stack, widths, bytes and instructions.

    python bench/codegen.py [--json FILE] [--save] [--targets sm_90,gfx942] [--ptx FOLDER]
    python bench/codegen.py --cuda [--json FILE] [--save]

Every specialisation that users reach is compiled for NVIDIA's sm_80, sm_90 and sm_100 and AMD's gfx942 and gfx1100 by
the Triton that is imported, and disassembled; `--cuda` takes the kernels of the built CUDA library instead.
tests/test_codegen.py holds the numbers against the budgets; bench/results/codegen-<compiler>-<version>.txt keeps them,
so that a change shows as a difference. Triton must not be interpreting, so this is a process of its own.

In the table: `regs` are registers of a thread (VGPRs on AMD); `stack` bytes of a thread; `access` the widths in bytes
of the loads of parameter, gradient and states in the loop over full blocks; `B/el` the bytes that this loop moves per
element; `instr/el` its instructions per element (NVIDIA: on the longest way that calls nothing, as root and division do
for rare numbers; AMD: all, but the scalar unit's); `of` the budget, half of what an H200 could issue while its memory
moves those bytes; `KiB` the bytes of loads that one processor has on their way when every resident program is at the
first instruction that waits for one (AMD: has issued all of a round).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import disassembly
import torch

from wd_kernels.__main__ import aligned
from wd_kernels.backends.triton import THREADS, block, options
from wd_kernels.rules import ADAMW, SGDW, Rule
from wd_kernels.formats import Format, parameter_format, state_dtype

__all__ = ["IN_FLIGHT", "TARGETS", "Cost", "Kernel", "cost", "costs", "kept", "kernels", "render"]

RESULTS = Path(__file__).parent / "results"
#: (backend, architecture, width of a warp) of every target.
TARGETS: dict[str, tuple[str, Any, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
#: KiB that a processor should have on their way: A100, H200, B200 (CUB's tuning). None is claimed for AMD.
IN_FLIGHT = {"sm_80": 16, "sm_90": 48, "sm_100": 64}
#: Thread instructions that an H200 issues in the time that its memory takes for a byte: 132 multiprocessors, 128 lanes,
#: 1.98 GHz, 4.3 TB/s.
INSTRUCTIONS_PER_BYTE = 132 * 128 * 1.98e9 / 4.3e12

_PAIRS = (
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16), (torch.float16, torch.float32),
)  # fmt: skip
_RULES: dict[str, tuple[Rule, int]] = {
    "adamw": (ADAMW, 2), "adamw amsgrad": (ADAMW, 3), "sgdw": (SGDW, 1), "sgdw without momentum": (SGDW, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One specialisation: a key of `_RULES` (as in byte_model.STATES), and the dtypes of parameter and gradient."""

    rule: str
    param: torch.dtype
    grad: torch.dtype

    @property
    def formats(self) -> tuple[Format, ...]:
        found = [parameter_format(d) for d in (self.param, self.grad, *[state_dtype(self.param)] * _RULES[self.rule][1])]
        return tuple(fmt for fmt in found if fmt is not None)

    @property
    def dtypes(self) -> str:
        return ", ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in (self.param, self.grad)))

    def __str__(self) -> str:
        return f"{self.rule} ({self.dtypes})"


@dataclass(frozen=True)
class Cost:
    """What a kernel costs on a target; accesses are bytes of each load and store in the loop over full blocks."""

    kernel: str
    target: str
    registers: int
    stack: int  # bytes of a thread, spills included
    shared: int  # bytes of a program
    layouts: int  # conversions of a layout in the TTGIR
    inexact: int  # operations that are fused, approximate or flush subnormals
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    elements: int  # of a thread, in one round of that loop
    model: int  # bytes that a step of one element loads and stores, by the tensors' types in Triton's IR
    instructions: float  # per element
    in_flight: float  # KiB per processor

    @property
    def bytes_per_element(self) -> float:
        return (sum(self.loads) + sum(self.stores)) / self.elements

    @property
    def budget(self) -> float:
        return INSTRUCTIONS_PER_BYTE * self.bytes_per_element / 2


def kernels() -> list[Kernel]:
    """Every specialisation that users reach."""
    return [Kernel(rule, p, g) for rule, (p, g) in product(_RULES, _PAIRS)]


def compiled(kernel: Kernel, target: str, changes: Mapping[str, Any]) -> Any:
    """Triton's compiled kernel, as `backends.triton` would launch it but for the changes to its options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wd_kernels.backends import triton_kernels

    rule = _RULES[kernel.rule][0]
    constants = {
        "rule": getattr(triton_kernels, rule.name),
        "root": triton_kernels.root if TARGETS[target][0] == "cuda" else triton_kernels.scaled_root,
        "width": rule.width,
        "formats": tuple(fmt.code for fmt in kernel.formats),
        "block": block(kernel.formats),
    }
    types = {"chunks": "*i64", "places": "*i64", "moving": "*i64", "rows": "*fp64", "control": "*fp64"}
    signature = {**types, "chunk_size": "i32", **dict.fromkeys(constants, "constexpr")}
    names = triton_kernels.step_kernel.arg_names
    assert list(signature) == names, names
    source = ASTSource(
        triton_kernels.step_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in range(6)},
    )
    backend, architecture, warp = TARGETS[target]
    how = options(kernel.formats, warp, nvidia=backend == "cuda")
    return triton.compile(source, target=GPUTarget(backend, architecture, warp), options={**how, **changes})


# The table ------------------------------------------------------------------------------------------------------------


def cost(kernel: Kernel, target: str, ptx: Path | None = None, **changes: Any) -> Cost:
    """What a kernel costs on a target; `changes` are other options of the compiler than the backend's.

    `ptx` is a folder for what an NVIDIA target's kernel was translated to: FOLDER/TARGET/KERNEL.ptx.
    """
    asm = compiled(kernel, target, changes).asm
    if ptx is not None and "ptx" in asm:
        (ptx / target).mkdir(parents=True, exist_ok=True)
        (ptx / target / f"{kernel}.ptx").write_text(asm["ptx"])
    backend, _, warp = TARGETS[target]
    if backend == "cuda":
        found = disassembly.nvidia(asm, THREADS)
    else:
        found = disassembly.amd(asm, target, warp, divides="adamw" in kernel.rule)
    # The bytes of an element by the types of the tensors that Triton's IR moves in full blocks; the compiler may have
    # unrolled their loop.
    elements = block(kernel.formats) // THREADS
    moves = rf"tt\.(?:load|store) .*?tensor<{block(kernel.formats)}x!tt\.ptr<\w*?(\d+)>"
    model = sum(int(bits) // 8 for bits in re.findall(moves, asm["ttir"]))
    rounds = max(round((sum(found.loads) + sum(found.stores)) / (elements * model)), 1)
    return Cost(
        kernel=str(kernel),
        target=target,
        registers=found.registers,
        stack=found.stack,
        shared=found.shared,
        layouts=asm["ttgir"].count("ttg.convert_layout"),
        inexact=found.inexact,
        loads=found.loads,
        stores=found.stores,
        elements=elements * rounds,
        model=model,
        instructions=found.instructions / (elements * rounds),
        in_flight=found.threads * found.ahead / (1 if backend == "cuda" else rounds) / 1024,
    )


def costs(targets: Sequence[str], workers: int = 2, ptx: Path | None = None) -> list[Cost]:
    """Of every kernel on the targets; with a progress bar where somebody watches. `ptx`: a folder for their PTX."""
    from rich.progress import track

    pairs = list(product(targets, kernels()))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = pool.map(cost, [k for _, k in pairs], [t for t, _ in pairs], [ptx] * len(pairs), chunksize=4)
        return list(track(results, "compiling", total=len(pairs), disable=not sys.stderr.isatty()))


def render(found: Sequence[Cost], compiler: str) -> str:
    """The table as text."""
    parts = [f"{compiler}. What each kernel costs (bench/codegen.py says what the columns are).\n"]
    for target in dict.fromkeys(c.target for c in found):
        rows: list[tuple[object, ...]] = [
            (target, "regs", "stack", "access", "B/el", "instr/el", "of", "KiB"),
        ]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument(
        "--ptx", type=Path, metavar="FOLDER", help="write what NVIDIA's kernels are translated to there"
    )
    parser.add_argument("--save", action="store_true", help="keep the table in bench/results")
    parser.add_argument("--cuda", action="store_true", help="the kernels of the CUDA library, as it was built")
    arguments = parser.parse_args(argv)
    import triton

    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if arguments.cuda:
        import codegen_cuda

        compiler, found = codegen_cuda.compiler(), codegen_cuda.costs()
    else:
        compiler, found = f"Triton {triton.__version__}", costs(arguments.targets.split(","), ptx=arguments.ptx)
    text = render(found, compiler)
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(json.dumps({"compiler": compiler, "costs": [asdict(c) for c in found]}))
    if arguments.save:
        kept(compiler).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
