"""PTX as text -> a kernel: its parameters, and its instructions in basic blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .errors import PtxError

__all__ = [
    "JUMPS", "Address", "Block", "Immediate", "Instruction", "Kernel", "Operand", "Pair", "Parameter", "Register",
    "Special", "Symbol", "Vector", "parse",
]  # fmt: skip

#: What ends a block of instructions: the machine executes it.
JUMPS = ("bra", "ret", "exit", "bar", "barrier")

WIDTHS = {"pred": 1, **{f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)}, "f16x2": 32, "f32x2": 64}


@dataclass(frozen=True)
class Register:
    """A thread's register: its place among all, and its bits."""

    name: str
    index: int
    width: int


@dataclass(frozen=True)
class Immediate:
    """A number as it is written; `kind` is "int", "f32" or "f64", whose value is the bits."""

    value: int
    kind: str


@dataclass(frozen=True)
class Special:
    """%tid.x and its like."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A parameter, a variable of shared memory, a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    """{a, b}: elements, the first in the lowest bits; None for a sink (_)."""

    parts: tuple[Register | Immediate | None, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Pair:
    """a|b: a second destination."""

    first: Register | None
    second: Register


Operand = Register | Immediate | Special | Symbol | Vector | Address | Pair


@dataclass(frozen=True)
class Instruction:
    """One instruction: opcode, what follows it between dots, operands, and the predicate that it waits for."""

    line: int
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Register | None = None
    negated: bool = False

    @property
    def name(self) -> str:
        return ".".join([self.opcode, *self.modifiers])


@dataclass(frozen=True)
class Parameter:
    """What a launch is given: `size` bytes; `kind` is "u64" and its like, or "bytes"."""

    name: str
    kind: str
    size: int


@dataclass
class Block:
    """Instructions that are executed one after another; only the last may jump."""

    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Kernel:
    """A kernel: blocks in the order of the text, where each label leads, the threads of a block that it is made for."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[int] = field(default_factory=list)  # their widths
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # where in shared memory, and its bytes
    shared_size: int = 0
    threads: int | None = None  # exactly (.reqntid)
    most_threads: int | None = None  # at most (.maxntid)
    code: list[list[Any]] = field(default_factory=list)  # the blocks as functions, once they are translated


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel of a text of PTX; the one whose name contains `name` where there are several.

    Raises:
        PtxError: no such kernel, or what is not known here, with its line.
    """
    # Comments are blanked out, so that lines keep their numbers.
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*|^[ \t]*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    found = [m for m in re.finditer(r"\.entry\s+([\w$]+)", text) if name is None or name in m[1]]
    if len(found) != 1:
        names = [m[1] for m in re.finditer(r"\.entry\s+([\w$]+)", text)]
        raise PtxError(f"one kernel is expected{f' of a name with {name!r}' if name else ''}, found are {names}")
    kernel = Kernel(found[0][1])
    dynamic = re.findall(r"\.extern\s+\.shared\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)\[\]", text)
    kernel.shared = dict.fromkeys(dynamic, (0, 0))
    _Reader(kernel, text, found[0].end()).read()
    if dynamic and kernel.shared_size:
        raise PtxError(f"shared memory of the kernel's own beside that of the launch ({dynamic[0]}) is not known here")
    return kernel


class _Reader:
    def __init__(self, kernel: Kernel, text: str, begin: int) -> None:
        self.kernel, self.text, self.at = kernel, text, begin
        self.scopes: list[dict[str, Register]] = [{}]
        self.ranges: list[list[tuple[str, int, int, int]]] = [[]]  # prefix, count, first index, width

    def line_of(self, at: int) -> int:
        return self.text.count("\n", 0, at) + 1

    def read(self) -> None:
        """Head, then the body to its closing brace."""
        body = self.text.index("{", self.at)
        self._head(self.text[self.at : body], self.line_of(self.at))
        block = Block()
        self.kernel.blocks.append(block)
        for line, statement in self._statements(body + 1):
            label = re.match(r"([\w$%]+)\s*:(?!:)", statement)
            while label:
                if block.instructions:
                    block = Block()
                    self.kernel.blocks.append(block)
                if label[1] in self.kernel.labels:
                    raise PtxError(f"the label {label[1]} is there twice", line)
                self.kernel.labels[label[1]] = len(self.kernel.blocks) - 1
                statement = statement[label.end() :].strip()
                label = re.match(r"([\w$%]+)\s*:(?!:)", statement)
            if not statement:
                continue
            if statement.startswith("."):
                self._directive(statement, line)
                continue
            instruction = self._instruction(statement, line)
            block.instructions.append(instruction)
            if instruction.opcode in JUMPS:
                block = Block()
                self.kernel.blocks.append(block)
        for own in self.kernel.blocks:
            for instruction in own.instructions:
                if instruction.opcode == "bra":
                    (target,) = instruction.operands
                    if not isinstance(target, Symbol) or target.name not in self.kernel.labels:
                        name = getattr(target, "name", target)
                        raise PtxError(f"{instruction.name} to {name}: no such label", instruction.line)

    def _head(self, head: str, line: int) -> None:
        inside = re.search(r"\((.*?)\)", head, re.DOTALL)
        for declared in filter(None, (part.strip() for part in (inside[1] if inside else "").split(","))):
            words = re.fullmatch(
                r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+"
                r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?",
                declared,
            )
            if not words or words[1] not in WIDTHS:
                raise PtxError(f"the parameter {declared!r} is not known here", line)
            size = WIDTHS[words[1]] // 8 * int(words[3] or 1)
            self.kernel.parameters.append(Parameter(words[2], "bytes" if words[3] else words[1], size))
        for directive, numbers in re.findall(r"\.(\w+)\s*([\d, ]*)", head[inside.end() if inside else 0 :]):
            sizes = [int(n) for n in re.findall(r"\d+", numbers)]
            if directive in ("reqntid", "maxntid"):
                if any(n != 1 for n in sizes[1:]):
                    raise PtxError(f".{directive} {numbers.strip()}: only blocks of one dimension are known here", line)
                if directive == "reqntid":
                    self.kernel.threads = sizes[0]
                else:
                    self.kernel.most_threads = sizes[0]
            elif directive not in ("maxnreg", "minnctapersm", "noreturn"):
                raise PtxError(f"the directive .{directive} of a kernel is not known here", line)

    def _statements(self, begin: int) -> Iterator[tuple[int, str]]:
        """(line, text) of each statement of the body; opens and closes scopes between them."""
        start, depth, line, text = begin, 1, self.line_of(begin), self.text
        for found in re.compile(r"[\n{};]").finditer(text, begin):
            at, c = found.start(), found[0]
            if c == "\n":
                line += 1
                continue
            own = text[start:at].strip()
            if c == "{" and (not own or own.endswith(":")):
                if own:
                    yield line, own
                depth += 1
                self.scopes.append({})
                self.ranges.append([])
                start = at + 1
            elif c == "}" and (not own or own.endswith(":")):
                if own:
                    yield line, own
                depth -= 1
                self.scopes.pop()
                self.ranges.pop()
                start = at + 1
                if depth == 0:
                    return
            elif c == ";":
                yield line, own
                start = at + 1
        raise PtxError("the kernel's body does not end", line)

    def _directive(self, statement: str, line: int) -> None:
        declared = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL)
        if declared:
            if declared[1] not in WIDTHS:
                raise PtxError(f"registers of type .{declared[1]} are not known here", line)
            width = max(WIDTHS[declared[1]], 16) if declared[1] != "pred" else 1
            for name in (part.strip() for part in declared[2].split(",")):
                many = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
                first = len(self.kernel.registers)
                if many:
                    self.ranges[-1].append((many[1], int(many[2]), first, width))
                    self.kernel.registers += [width] * int(many[2])
                else:
                    self.scopes[-1][name] = Register(name, first, width)
                    self.kernel.registers.append(width)
            return
        shared = re.fullmatch(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", statement)
        if shared and shared[2] in WIDTHS:
            align, size = int(shared[1] or 16), WIDTHS[shared[2]] // 8 * int(shared[4] or 1)
            first = -(-self.kernel.shared_size // align) * align
            self.kernel.shared[shared[3]] = (first, size)
            self.kernel.shared_size = first + size
            return
        if statement.startswith(".pragma"):
            return
        raise PtxError(f"{statement.split()[0]} is not known here", line)

    def _register(self, name: str) -> Register | None:
        for scope, ranges in zip(reversed(self.scopes), reversed(self.ranges), strict=True):
            if name in scope:
                return scope[name]
            for prefix, count, first, width in ranges:
                digits = name[len(prefix) :]
                if name.startswith(prefix) and digits.isdigit() and int(digits) < count:
                    return Register(name, first + int(digits), width)
        return None

    def _instruction(self, statement: str, line: int) -> Instruction:
        words = re.fullmatch(
            r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z]\w*)((?:\.\w+(?:::\w+)*)*)(?:\s+(.*))?", statement, re.DOTALL
        )
        if not words:
            raise PtxError(f"{statement!r} is no instruction that is known here", line)
        predicate = None
        if words[2]:
            predicate = self._register(words[2])
            if predicate is None or predicate.width != 1:
                raise PtxError(f"{words[2]} is no predicate", line)
        operands = tuple(self._operand(part, line) for part in _split(words[5] or ""))
        modifiers = tuple(filter(None, words[4].split(".")))
        return Instruction(line, words[3], modifiers, operands, predicate, words[1] == "!")

    def _operand(self, text: str, line: int) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            parts = [part.strip() for part in text[1:-1].split(",")]
            own = tuple(None if part == "_" else self._operand(part, line) for part in parts)
            return Vector(own)
        if text.startswith("["):
            inside = re.fullmatch(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
            if not inside:
                raise PtxError(f"the address {text} is not known here", line)
            base = self._operand(inside[1], line)
            if not isinstance(base, (Register, Symbol, Immediate)):
                raise PtxError(f"the address {text} is not known here", line)
            return Address(base, int(inside[2] or "0", 0))
        if "|" in text:
            first, second = (part.strip() for part in text.split("|"))
            predicate = self._register(second)
            if predicate is None:
                raise PtxError(f"{second} is no register", line)
            return Pair(None if first == "_" else self._register(first), predicate)
        number = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|0|[1-9]\d*)U?", text)
        if number:
            return Immediate(int(number[1] + number[2], 0), "int")
        bits = re.fullmatch(r"0([fFdD])([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", text)
        if bits:
            return Immediate(int(bits[2], 16), "f32" if bits[1] in "fF" else "f64")
        register = self._register(text)
        if register is not None:
            return register
        if text.startswith("%"):
            return Special(text)
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise PtxError(f"the operand {text} is not known here", line)


def _split(operands: str) -> list[str]:
    """At commas that are not in braces or brackets."""
    if "{" not in operands and "[" not in operands:
        return [part for part in operands.split(",") if part.strip()]
    parts, depth, own = [], 0, ""
    for c in operands:
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(own)
            own = ""
        else:
            own += c
    return [part for part in [*parts, own] if part.strip()]
