"""Reads back what Triton compiled: SASS and PTX of NVIDIA's targets, AMDGCN and LLVM IR of AMD's."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wd_kernels.backends.triton import REGISTERS

__all__ = ["Reading", "amd", "full_blocks", "loops", "nvidia"]


@dataclass(frozen=True)
class Reading:
    """What a kernel takes, and its loop over full blocks: bytes of each load and store, number of instructions."""

    registers: int
    stack: int
    shared: int
    inexact: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    instructions: int
    threads: int  # that one processor can run at once


def loops(code: Sequence[str], label: str, branch: str) -> list[list[str]]:
    """The bodies of all loops: from a label to the last branch back to it; what overlaps is one loop."""
    at: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for i, line in enumerate(code):
        found = re.match(label, line)
        if found:
            at[found[1]] = i
        back = re.search(branch, line)
        if back and back[1] in at:
            begin = at[back[1]]
            while spans and spans[-1][1] > begin:
                begin = min(begin, spans.pop()[0])
            spans.append((begin, i + 1))
    return [[line for line in code[begin:end] if not re.match(label, line)] for begin, end in spans]


def full_blocks(bodies: Sequence[list[str]], width: Callable[[str], int]) -> list[str]:
    """The loop over full blocks: of the two loops that load, the one with the wider loads, or else the first."""
    widest = [max(map(width, body), default=0) for body in bodies]
    if sum(map(bool, widest)) != 2:
        raise ValueError(f"loops whose widest loads have {widest} bytes: expected two that load")
    return bodies[widest.index(max(widest))]


# NVIDIA ---------------------------------------------------------------------------------------------------------------


def nvidia(asm: Mapping[str, Any], threads: int) -> Reading:
    """Of a cubin and its PTX; programs have `threads` threads."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name).splitlines()
    registers, stack, shared, local = (
        int(n) for n in re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)[0]
    )
    code = [line for line in sass if re.match(r"\.L_|\s+/\*[0-9a-f]{4,}\*/\s+[^/\s]", line)]
    body = full_blocks(loops(code, r"(\.L_\w+):", r"BRA.*?\(?`\((\.L_\w+)\)"), _sass_load)
    spilled = sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in code)
    programs = min(REGISTERS // (-(-registers // 8) * 8 * threads), 2048 // threads)  # 2048 at most
    return Reading(
        registers,
        max(stack + local, 4 * spilled),
        shared,
        len(re.findall(r"\bfma\.|\.ftz|\.approx|\bdiv\.full", asm["ptx"])),
        tuple(filter(None, map(_sass_load, body))),
        tuple(_sass_width(line) for line in body if "STG" in line),
        len(body),
        programs * threads,
    )


def _tool(name: str, *arguments: str) -> str:
    """What a tool of Triton's wheel prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _sass_width(line: str) -> int:
    found = re.search(r"(?:LDG|STG)\S*?\.(\d+|[US]\d+)\b", line)
    return {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1}[found[1]] if found else 4


def _sass_load(line: str) -> int:
    return _sass_width(line) if "LDG" in line else 0


# AMD ------------------------------------------------------------------------------------------------------------------


def amd(asm: Mapping[str, Any], target: str, warp: int, divides: bool) -> Reading:
    """Of AMDGCN and its LLVM IR; `divides`: roots and divisions are in the code."""
    text: str = asm["amdgcn"]
    known: dict[str, int] = {
        name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)
    }
    code = [line.split(";")[0] for line in text.splitlines() if re.match(r"\.LBB\w+:|\t[a-z]\w+", line)]
    body = full_blocks(loops(code, r"(\.LBB\w+):", r"s_c?branch\w*\s+(\.LBB\w+)"), _amd_load)
    registers = known["vgpr_count"]
    # Vector registers of a lane and their granule, waves at most, and how many such units there are.
    lanes, granule, most, units = (512, 8, 8, 4) if target == "gfx942" else (1536, 24, 16, 2)
    return Reading(
        registers,
        known["private_segment_fixed_size"] + 4 * (known["vgpr_spill_count"] + known["sgpr_spill_count"]),
        known["group_segment_fixed_size"],
        _amd_inexact(asm["llir"], text, divides),
        tuple(filter(None, map(_amd_load, body))),
        tuple(_amd_width(line) for line in body if "_store_" in line),
        sum(not line.startswith("\ts_") for line in body),  # the scalar unit has issue slots of its own
        min(lanes // (-(-registers // granule) * granule), most) * units * warp,
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
        lines = re.findall(r"\tv_\w*(?:fma|fmac|mac|mad)_.*", code)
        exact = [line for line in lines if re.search(r"v_fma_mix.*(?:neg\(0\)| 1\.0,)", line)]
        found += llir.count("@llvm.fma.") + len(lines) - len(exact)
    return found


def _amd_width(line: str) -> int:
    what = line.split()[0].rsplit("_load_")[-1].rsplit("_store_")[-1]
    widths = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4}
    return widths[what] if what in widths else 2 if re.search(r"short|16", what) else 1


def _amd_load(line: str) -> int:
    return _amd_width(line) if re.search(r"\t(?!s_)\w+_load_", line) else 0  # the scalar unit's are the table's
