"""Reads back what was compiled: SASS and PTX of NVIDIA's targets, AMDGCN and LLVM IR of AMD's."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REGISTERS = 65536  # of an NVIDIA multiprocessor


@dataclass(frozen=True)
class Reading:
    """What a kernel takes, and its loop over full blocks: bytes of each load and store, number of instructions."""

    registers: int
    stack: int  # bytes of a thread, spills included
    shared: int  # bytes of a program
    inexact: int  # operations that are fused, approximate or flush subnormals
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    issued: int  # instructions
    threads: int  # that one processor can run at once
    ahead: float  # bytes of a thread's loads before something waits for one of them

    @property
    def moved(self) -> int:
        """Bytes of all of them."""
        return sum(self.loads) + sum(self.stores)


def loops(code: Sequence[str], label: str, branch: str) -> list[list[str]]:
    """The bodies of all loops, labels too: from a label to the last branch back to it; what overlaps is one loop."""
    at: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for i, line in enumerate(code):
        if found := re.match(label, line):
            at[found[1]] = i
        if (back := re.search(branch, line)) and back[1] in at:
            begin = at[back[1]]
            while spans and spans[-1][1] > begin:
                begin = min(begin, spans.pop()[0])
            spans.append((begin, i + 1))
    return [list(code[begin:end]) for begin, end in spans]


def full_blocks(bodies: Sequence[list[str]], width: Callable[[str], int]) -> list[str]:
    """The loop over full blocks: that of the widest loads, beside one at least for the rest; the longest of several.

    Where weights are frozen, a compiler may have made a loop of its own, which stores less.
    """
    widest = [max(map(width, body), default=0) for body in bodies]
    if sum(map(bool, widest)) < 2:
        raise ValueError(f"loops whose widest loads have {widest} bytes: expected two or more that load")
    return max((body for body, w in zip(bodies, widest, strict=True) if w == max(widest)), key=len)


# NVIDIA ---------------------------------------------------------------------------------------------------------------

_LABEL = r"(\.L_\w+):"
_BRANCH = r"BRA.*?\(?`\((\.L_\w+)\)"


def longest_way(body: Sequence[str]) -> list[str]:
    """The longest way through a loop's SASS that calls nothing: root and division call for rare numbers alone."""
    blocks: list[list[str]] = [[]]
    begins: dict[str, int] = {}
    for line in body:
        label = re.match(_LABEL, line)
        if label or (blocks[-1] and re.search(r"\b(?:BRA|EXIT|RET)\b", blocks[-1][-1])):
            blocks.append([])
        if label:
            begins[label[1]] = len(blocks) - 1
        else:
            blocks[-1].append(line)
    best: dict[int, list[str]] = {}  # from a block to the loop's next round, where there is a way
    for i, block in reversed([*enumerate(blocks)]):
        last = block[-1] if block else ""
        jump = re.search(_BRANCH, last)
        conditional = re.search(r"@|BRA\S*\s+!?U?P\d", last)
        ends = re.search(r"\b(?:EXIT|RET)\b", last)
        following = [i + 1] if conditional or not (jump or ends) else []
        following += [begins[jump[1]]] if jump and jump[1] in begins else []
        ways = [best[k] if k > i else [] for k in following if k <= i or k in best]
        if ways and not any("CALL" in line and "@" not in line for line in block):
            best[i] = block + max(ways, key=len)
    if 0 not in best:
        raise ValueError("no way through the loop is without a call")
    return best[0]


def sass_reading(code: Sequence[str], used: tuple[int, int, int], inexact: int, threads: int) -> Reading:
    """Of a kernel's SASS and what `usage` says of it; programs have `threads` threads."""
    registers, stack, shared = used
    code = [line for line in code if re.match(r"\.L_|\s+/\*[0-9a-f]{4,}\*/\s+[^/\s]", line)]
    code = _together(code)
    way = longest_way(full_blocks(loops(code, _LABEL, _BRANCH), _sass_load))
    spilled = sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in code)
    programs = min(REGISTERS // (-(-registers // 8) * 8 * threads), 2048 // threads)  # 2048 at most
    loads = tuple(filter(None, map(_sass_load, way)))
    stores = tuple(_sass_width(line) for line in way if "STG" in line)
    stack = max(stack, 4 * spilled)
    return Reading(registers, stack, shared, inexact, loads, stores, len(way), programs * threads, _ahead(way))


def _together(code: Sequence[str]) -> list[str]:
    """Without what a warp does whose threads have parted, which come together before a shuffle, as they are."""
    parted = {found[1] for line in code if (found := re.search(r"BRA\.DIV.*?`\((\.L_\w+)\)", line))}
    kept, left = [], False
    for line in code:
        label = re.match(_LABEL, line)
        left = left or bool(label and label[1] in parted)
        if not left and "BRA.DIV" not in line:
            kept.append(line)
        left = left and not re.search(r"/\s+BRA\s", line)
    return kept


def _ahead(way: Sequence[str]) -> int:
    """Bytes of the loads that come before the first instruction with a register that one of them fills."""
    waiting: set[int] = set()
    found = 0
    for line in way:
        first, _, others = re.sub(r"/\*.*?\*/", "", line).partition(",")
        loads = re.search(r"\bLDG\S*\s+R(\d+)$", first.strip())
        used = {int(r) for r in re.findall(r"\bR(\d+)", others if loads else first + others)}
        used |= {int(r) + 1 for r in re.findall(r"\bR(\d+)\.64", others)}
        if used & waiting:
            break
        if loads:
            size = _sass_width(line)
            waiting |= set(range(int(loads[1]), int(loads[1]) + max(size // 4, 1)))
            found += size
    return found


def sass_inexact(code: Sequence[str]) -> int:
    """Of a kernel without root and division, which are made of such: what fuses or flushes, or approximates."""
    return sum(bool(re.search(r"\b[FD]FMA\b|\.FTZ\b|\bMUFU\b", line)) for line in code)


def ptx_inexact(ptx: str) -> int:
    """Operations that are fused, approximate or flush subnormals."""
    return len(re.findall(r"\bfma\.|\bmad\.(?:rn\.)?f|\.ftz|\.approx|\bdiv\.full", ptx))


def usage(text: str) -> tuple[int, int, int]:
    """(registers, bytes of stack, bytes of shared memory) of the one kernel that `cuobjdump -res-usage` tells of."""
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    registers, stack, shared, local = map(int, found)
    return registers, stack + local, shared


def nvidia(asm: Mapping[str, Any], threads: int) -> Reading:
    """Of a cubin and its PTX; programs have `threads` threads."""
    used, sass = _cubin(asm)
    return sass_reading(sass, used, ptx_inexact(asm["ptx"]), threads)


def usage_of(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """What `usage` says of a cubin."""
    return _cubin(asm)[0]


def _cubin(asm: Mapping[str, Any]) -> tuple[tuple[int, int, int], list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        used = usage(tool("cuobjdump", "-res-usage", cubin.name))
        return used, tool("nvdisasm", "-c", "-ndf", cubin.name).splitlines()


def tool(name: str, *arguments: str, cwd: str | None = None) -> str:
    """What a tool of Triton's wheel prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True, cwd=cwd).stdout


def _sass_width(line: str) -> int:
    found = re.search(r"(?:LDG|STG)\S*?\.(\d+|[US]\d+)\b", line)
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
    return sizes[found[1]] if found else 4


def _sass_load(line: str) -> int:
    return _sass_width(line) if "LDG" in line else 0


# AMD ------------------------------------------------------------------------------------------------------------------


def amd(asm: Mapping[str, Any], target: str, warp: int, divides: bool, moved: int) -> Reading:
    """Of AMDGCN and its LLVM IR; `divides`: roots and divisions are in the code; `moved`: bytes of one round."""
    text: str = asm["amdgcn"]
    known = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    code = [line.split(";")[0] for line in text.splitlines() if re.match(r"\.LBB\w+:|\t[a-z]\w+", line)]
    label = r"(\.LBB\w+):"
    body = full_blocks(loops(code, label, r"s_c?branch\w*\s+(\.LBB\w+)"), _amd_load)
    body = [line for line in body if not re.match(label, line)]
    # Vector registers of a lane and their granule, waves at most, and how many such units there are.
    lanes, granule, most, units = (512, 8, 8, 4) if target == "gfx942" else (1536, 24, 16, 2)
    loads = tuple(filter(None, map(_amd_load, body)))
    stores = tuple(_amd_width(line) for line in body if "_store_" in line)
    return Reading(
        known["vgpr_count"],
        known["private_segment_fixed_size"] + 4 * (known["vgpr_spill_count"] + known["sgpr_spill_count"]),
        known["group_segment_fixed_size"],
        _amd_inexact(asm["llir"], text, divides),
        loads,
        stores,
        sum(not line.startswith("\ts_") for line in body),  # the scalar unit has issue slots of its own
        min(lanes // (-(-known["vgpr_count"] // granule) * granule), most) * units * warp,
        sum(loads) / max(round((sum(loads) + sum(stores)) / moved), 1),  # of one round, where the loop is unrolled
    )


def _amd_inexact(llir: str, code: str, divides: bool) -> int:
    """Operations that fuse or may be fused by what comes after, of low precision, or in a mode without subnormals.

    Root and division, which are exact, are made of fused operations: so those are counted where there is neither. A
    `v_fma_mix` that adds -0 or multiplies by 1 is a product or a sum, rounded once, of a number that it widens.
    """
    flags = r"\bf(?:add|mul|sub|div) (?:[a-z]+ )*(?:fast|contract|reassoc|arcp|afn)\b"
    found: int = len(re.findall(rf"@llvm\.fmuladd|{flags}|!fpmath", llir))
    if "0x41F0000000000000" not in llir:  # 2^32: small numbers are scaled before these see them
        found += len(re.findall(r"call .*@llvm\.amdgcn\.(?:rsq|sqrt)\.f32", llir))
    found += sum(mode != "3" for mode in re.findall(r"amdhsa_float_denorm_mode\w+ (\d)", code))
    if not divides:
        lines = re.findall(r"\tv_\w*(?:fma|fmac|mac|mad)_(?![ui]\d).*", code)  # those of whole numbers are exact
        exact = [line for line in lines if re.search(r"v_fma_mix.*(?:neg\(0\)| 1\.0,)", line)]
        found += llir.count("@llvm.fma.") + len(lines) - len(exact)
    return found


def _amd_width(line: str) -> int:
    what = line.split()[0].rsplit("_load_")[-1].rsplit("_store_")[-1]
    widths = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4}
    return widths[what] if what in widths else 2 if re.search(r"short|16", what) else 1


def _amd_load(line: str) -> int:
    return _amd_width(line) if re.search(r"\t(?!s_)\w+_load_", line) else 0  # the scalar unit's are the table's
