"""Runs a kernel over all threads of a launch.

Threads that stand at the same place go on together; of the places where threads stand, the first in the text is next.
A branch parts threads, and they meet again where their ways do, whatever the program does.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import PtxError
from .instructions import UNSIGNED, translate
from .memory import Memory, Races
from .program import JUMPS, Instruction, Kernel, Symbol

__all__ = ["Report", "launch", "translated"]

#: What a register holds before it is written; reading it is an error.
POISON = 0xA5C3_5A3C_DEAD_BEEF
#: Which threads execute an instruction, where all do.
EVERY = slice(None)
#: Blocks of instructions that a launch may execute: more is taken for a loop without an end.
MOST = 1_000_000


@dataclass
class Report:
    """What a launch did: how often threads executed each instruction (predicates aside)."""

    blocks: int
    threads: int
    instructions: Counter[str] = field(default_factory=Counter)


class _Shared:
    """The shared memory of all blocks; a barrier ends what can be a race."""

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size, self.threads = size, threads
        room = -(-size // 16) * 16
        self.room = room
        self.bytes = np.frombuffer(np.resize(np.array([0xA5], np.uint8), blocks * room).tobytes(), np.uint8).copy()
        self.races = Races(blocks * room)

    def _places(self, address: Any, width: int, ids: Any, line: int, what: str) -> Any:
        if self.size < width or bool((address > np.uint64(self.size - width)).any()):
            raise PtxError(f"a {what} of {width} bytes of shared memory beyond its {self.size}", line)
        if bool((address % np.uint64(width)).any()):
            raise PtxError(f"a {what} of {width} bytes of shared memory is not aligned", line)
        return (ids // self.threads * self.room).astype(np.int64) + address.astype(np.int64)

    def _note(self, note: Any, at: Any, width: int, ids: Any, line: int) -> None:
        for i in range(width):
            if bool(note(at + i, ids).any()):
                raise PtxError("a race in shared memory: two threads, one of which writes, without a barrier", line)

    def load(self, address: Any, size: int, count: int, ids: Any, line: int, readonly: bool) -> list[Any]:
        at = self._places(address, size * count, ids, line, "load")
        self._note(self.races.load, at, size * count, ids, line)
        room = self.bytes.view(f"u{size}")
        return [room[at // size + i] for i in range(count)]

    def store(self, address: Any, values: Sequence[Any], size: int, ids: Any, line: int) -> None:
        at = self._places(address, size * len(values), ids, line, "store")
        # Threads that hold the same may all store it: compilers do so with what a reduction has left in several.
        _, first, which = np.unique(at, return_index=True, return_inverse=True)
        if len(first) < len(at) and all(bool((value == value[first][which]).all()) for value in values):
            at, ids, values = at[first], ids[first], [value[first] for value in values]
        self._note(self.races.store, at, size * len(values), ids, line)
        room = self.bytes.view(f"u{size}")
        for i, value in enumerate(values):
            room[at // size + i] = value

    def barrier(self, block: int) -> None:
        self.races.forget(block * self.room, (block + 1) * self.room)


class _State:
    """What instructions work on: registers by index, each an array over all threads."""

    def __init__(self, kernel: Kernel, blocks: int, threads: int, shared: int, memory: Memory) -> None:
        count = blocks * threads
        self.kernel, self.blocks, self.threads, self.memory = kernel, blocks, threads, memory
        self.ids = np.arange(count, dtype=np.int32)
        of_width = Counter(kernel.registers)  # one array for all registers of a width
        rows = {w: iter(np.full((n, count), POISON & ((1 << w) - 1), UNSIGNED[w])) for w, n in of_width.items()}
        self.registers = [next(rows[width]) for width in kernel.registers]
        self.shared = _Shared(blocks, shared, threads)
        self.whole = [False] * len(kernel.registers)  # has every thread written it?
        self.written = list(np.zeros((len(kernel.registers), count), dtype=bool))  # which threads have, until then
        self.arguments: dict[str, bytes] = {}

    def wrote(self, index: int, at: Any) -> None:
        """Notes that threads have written a register."""
        if at is EVERY:
            self.whole[index] = True
        else:
            self.written[index][at] = True

    def check(self, index: int, at: Any, name: str, line: int) -> None:
        """An error where a thread reads what it has not written."""
        if self.whole[index]:
            return
        known = self.written[index][at]
        if not known.all():
            missing = self.ids[at][~known]
            raise PtxError(f"thread {int(missing[0])} reads the register {name}, which it has never written", line)


def launch(
    kernel: Kernel,
    blocks: int,
    arguments: Sequence[int | float | bytes],
    memory: Memory,
    threads: int | None = None,
    shared: int = 0,
    unwritten: bool = False,
) -> Report:
    """Executes all threads of a launch.

    Args:
        kernel: from `parse`.
        blocks: of the grid, in one dimension.
        arguments: one for each parameter: an int for integers and pointers, a float, bytes for what is passed by value.
        memory: what the launch may touch.
        threads: of a block; may be left out where the kernel names them (.reqntid).
        shared: bytes of dynamic shared memory of a block.
        unwritten: let threads read registers that they have not written, and find poison there: what compilers make of
            reductions does so in threads whose result nobody wants. Where somebody does, poison is what comes out.

    Raises:
        PtxError: an instruction that is not known, wrong arguments, or an access that is not allowed.
    """
    if threads is None:
        if kernel.threads is None:
            raise PtxError(f"{kernel.name} has no .reqntid: the launch must say how many threads a block has")
        threads = kernel.threads
    if kernel.threads not in (None, threads):
        raise PtxError(f"{kernel.name} is made for blocks of {kernel.threads} threads, not of {threads}")
    if not 0 < threads <= (kernel.most_threads or 1024):
        raise PtxError(f"blocks of {threads} threads: {kernel.name} allows 1 to {kernel.most_threads or 1024}")
    if not 0 < blocks < 2**31:
        raise PtxError(f"a launch of {blocks} blocks: 1 to {2**31 - 1} are allowed")
    state = _State(kernel, blocks, threads, kernel.shared_size + shared, memory)
    state.arguments = _arguments(kernel, arguments)
    if unwritten:
        state.whole = [True] * len(state.whole)
    memory.seal()
    report = Report(blocks, threads)
    try:
        with np.errstate(all="ignore"):
            _run(kernel, translated(kernel), state, report)
    except PtxError as error:
        error.add_note(f"in {kernel.name}, launched with {blocks} blocks of {threads} threads")
        raise
    return report


def translated(kernel: Kernel) -> list[list[Any]]:
    """The kernel's blocks as functions.

    Raises:
        PtxError: an instruction, one that is never executed too, is not known here.
    """
    if not kernel.code:
        for block in kernel.blocks:
            known: set[int] = set()
            kernel.code.append([translate(i, kernel, known) for i in block.instructions if i.opcode not in JUMPS])
    return kernel.code


def _arguments(kernel: Kernel, arguments: Sequence[int | float | bytes]) -> dict[str, bytes]:
    if len(arguments) != len(kernel.parameters):
        raise PtxError(f"{kernel.name} has {len(kernel.parameters)} parameters, {len(arguments)} arguments were given")
    found = {}
    for k, (parameter, value) in enumerate(zip(kernel.parameters, arguments, strict=True)):
        what = f"argument {k} of {kernel.name}, of type {parameter.kind}"
        if parameter.kind == "bytes":
            if not isinstance(value, bytes) or len(value) != parameter.size:
                raise PtxError(f"{what}: {value!r} where {parameter.size} bytes are wanted")
            found[parameter.name] = value
        elif parameter.kind in ("f32", "f64"):
            if not isinstance(value, float):
                raise PtxError(f"{what}: {value!r} where a float is wanted")
            found[parameter.name] = np.array(value, dtype=f"f{parameter.size}").tobytes()
        else:
            bits = 8 * parameter.size
            if not isinstance(value, int) or not -(2 ** (bits - 1)) <= value < 2**bits:
                raise PtxError(f"{what}: {value!r} where an integer of {bits} bits is wanted")
            found[parameter.name] = (value % 2**bits).to_bytes(parameter.size, "little")
    return found


def _run(kernel: Kernel, code: Sequence[Sequence[Any]], state: _State, report: Report) -> None:
    count = len(state.ids)
    standing: dict[int, list[Any]] = {0: [state.ids]}  # which threads stand at the begin of which block
    places = [0]
    waiting: list[tuple[int, int, Any]] = []  # at a barrier: which, where they go on, which threads
    alive = np.full(state.blocks, state.threads)
    executed, passed = 0, [0] * len(kernel.blocks)  # how many threads have passed each block

    def go(place: int, ids: Any, line: int) -> None:
        if not len(ids):
            return
        if place >= len(kernel.blocks):
            raise PtxError("a thread runs beyond the end of the kernel", line)
        if place not in standing:
            standing[place] = []
            heapq.heappush(places, place)
        standing[place].append(ids)

    while places or waiting:
        if not places:
            _release(waiting, alive, state, go)
        place = heapq.heappop(places)
        groups = standing.pop(place)
        ids = groups[0] if len(groups) == 1 else np.concatenate(groups)
        at: Any = ids
        if len(ids) == count:
            at, ids = EVERY, state.ids
        elif ids[-1] - ids[0] == len(ids) - 1 and bool((ids[1:] > ids[:-1]).all()):
            at = slice(int(ids[0]), int(ids[-1]) + 1)  # neighbours: numpy need not gather them
        for run in code[place]:
            run(state, at)
        instructions = kernel.blocks[place].instructions
        passed[place] += len(ids)
        executed += 1
        if executed > MOST:
            raise PtxError("the launch does not end", instructions[0].line if instructions else 0)
        last = instructions[-1] if instructions else None
        if last is None or last.opcode not in JUMPS:
            go(place + 1, ids, last.line if last else 0)
            continue
        if last.predicate is not None:
            state.check(last.predicate.index, ids, last.predicate.name, last.line)
        taken = ids if last.predicate is None else ids[state.registers[last.predicate.index][ids] != last.negated]
        if last.modifiers == ("uni",) or last.opcode in ("bar", "barrier"):
            _together(taken, ids, state, last)
        if last.predicate is not None:
            left = ids[state.registers[last.predicate.index][ids] == last.negated]
            go(place + 1, left, last.line)
        if last.opcode == "bra":
            if last.modifiers not in ((), ("uni",)):
                raise PtxError(f"{last.name} is not known here", last.line)
            (target,) = last.operands
            assert isinstance(target, Symbol)
            go(kernel.labels[target.name], taken, last.line)
        elif last.opcode in ("ret", "exit"):
            alive -= np.bincount(taken // state.threads, minlength=state.blocks)
        elif len(taken):
            waiting.append((_barrier(last), place + 1, taken))
    for block, threads in zip(kernel.blocks, passed, strict=True):
        for instruction in block.instructions if threads else ():
            report.instructions[instruction.name] += threads


def _together(taken: Any, ids: Any, state: _State, instruction: Instruction) -> None:
    """An error where not all threads of a warp that stand here do the same: these instructions promise it."""
    warps = np.bincount(ids // 32, minlength=len(state.ids) // 32 + 1)
    own = np.bincount(taken // 32, minlength=len(warps))
    if bool(((own != 0) & (own != warps)).any()):
        raise PtxError(f"{instruction.name}: some threads of a warp take it and others do not", instruction.line)


def _barrier(instruction: Instruction) -> int:
    """The number of a barrier of the whole block."""
    known = (("sync",), ("sync", "aligned"), ("cta", "sync"), ("cta", "sync", "aligned"))
    number = instruction.operands[0] if len(instruction.operands) == 1 else None
    value = getattr(number, "value", None)
    if instruction.modifiers not in known or not isinstance(value, int) or not 0 <= value < 16:
        raise PtxError(
            f"{instruction.name} of {len(instruction.operands)} operands is not known here", instruction.line
        )
    return value


def _release(waiting: list[tuple[int, int, Any]], alive: Any, state: _State, go: Any) -> None:
    """Lets blocks go on of which every thread has come to the same barrier."""
    arrived: dict[int, Any] = {}
    for number, _, ids in waiting:
        own = arrived.setdefault(number, np.zeros(state.blocks, dtype=np.int64))
        own += np.bincount(ids // state.threads, minlength=state.blocks)
    full = {number: (own == alive) & (own > 0) for number, own in arrived.items()}
    if not any(bool(own.any()) for own in full.values()):
        number, place, ids = waiting[0]
        line = state.kernel.blocks[place - 1].instructions[-1].line
        raise PtxError(f"{len(ids)} threads wait at barrier {number} for others, which never come", line)
    kept = []
    for number, place, ids in waiting:
        free = full[number][ids // state.threads]
        go(place, ids[free], 0)
        if not free.all():
            kept.append((number, place, ids[~free]))
    waiting[:] = kept
    for own in full.values():
        for block in np.flatnonzero(own):
            state.shared.barrier(int(block))
            if state.blocks == 1 and state.memory.ordered:
                state.memory.barrier()
