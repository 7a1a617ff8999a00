"""What a launch may touch of this process's memory, and which thread touched what."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .errors import PtxError

__all__ = ["Memory", "Races"]

_FIRST = 4096  # no object lies below
_LAST = 1 << 47
_CHANGES = {"add": "addition", "or": "setting of bits"}  # what an error calls them


@cache
def process(size: int) -> Any:
    """All memory of this process from `_FIRST` on, as unsigned integers of `size` bytes."""
    room = (ctypes.c_char * (_LAST - _FIRST)).from_address(_FIRST)
    return np.ndarray(((_LAST - _FIRST) // size,), dtype=f"u{size}", buffer=room)


class Races:
    """Who read and who wrote each granule of memory: two threads of a launch may share what is only read."""

    NOBODY, MANY = -1, -2

    def __init__(self, granules: int) -> None:
        self.writers = np.full(granules, self.NOBODY, dtype=np.int32)
        self.readers = np.full(granules, self.NOBODY, dtype=np.int32)

    def load(self, granules: Any, threads: Any) -> Any:
        """Notes reads; where another thread has written, True."""
        writers, readers = self.writers[granules], self.readers[granules]
        self.readers[granules] = np.where((readers == self.NOBODY) | (readers == threads), threads, self.MANY)
        seen = self.readers[granules]
        self.readers[granules] = np.where(seen == threads, seen, self.MANY)  # two threads of this one access
        return (writers != self.NOBODY) & (writers != threads)

    def store(self, granules: Any, threads: Any) -> Any:
        """Notes writes; where another thread has read or written, True."""
        writers, readers = self.writers[granules], self.readers[granules]
        self.writers[granules] = threads
        return (
            ((writers != self.NOBODY) & (writers != threads))
            | ((readers != self.NOBODY) & (readers != threads))
            | (self.writers[granules] != threads)
        )

    def forget(self, begin: int, end: int) -> None:
        """After a barrier nothing that came before is a race."""
        self.writers[begin:end] = self.readers[begin:end] = self.NOBODY


@dataclass(frozen=True)
class Buffer:
    """A stretch of memory that a launch may touch, in elements of `itemsize` bytes."""

    name: str
    begin: int
    end: int
    itemsize: int
    writable: bool
    noted: bool  # are reads noted though nothing can be written?
    together: int  # neighbouring threads that are one, where it is about races
    shift: int
    atomic: str = ""  # what alone is done to it, at once: "add" or "or"


class Memory:
    """The buffers of a launch. Every access lies within one, is aligned to its width, and is in no race."""

    def __init__(self, ordered: bool = False) -> None:
        """`ordered`: barriers of the one block of a launch order what its threads do in memory."""
        self.ordered = ordered
        self.buffers: list[Buffer] = []
        self._sealed = False

    def add(
        self, name: str, address: int, nbytes: int, itemsize: int = 1, writable: bool = False, noted: bool = False,
        together: int = 1, atomic: str = "",
    ) -> None:  # fmt: skip
        """Lets a launch read `nbytes` from `address` on, and write them if `writable`; `noted`: for `touched`, too.

        So many neighbouring threads, `together`, may read it, and one of them write, after an exchange of theirs.
        `atomic` memory is changed in that one way, "add" or "or", by words of `itemsize` bytes, and neither read nor
        written.

        Raises:
            ValueError: the memory is part of another buffer, or is no memory.
        """
        if nbytes == 0:
            return
        if not _FIRST <= address < address + nbytes <= _LAST:
            raise ValueError(f"{name} of {nbytes} bytes at {address:#x} is no memory of a process")
        if itemsize not in (1, 2, 4, 8):
            raise ValueError(f"itemsize={itemsize} of {name}: allowed are 1, 2, 4, 8")
        shift = itemsize.bit_length() - 1
        self.buffers.append(Buffer(name, address, address + nbytes, itemsize, writable, noted, together, shift, atomic))
        self._sealed = False

    def seal(self) -> None:
        """Prepares for a launch; everything counts from zero."""
        self.buffers.sort(key=lambda b: b.begin)
        for a, b in zip(self.buffers, self.buffers[1:], strict=False):
            if b.begin < a.end:
                raise ValueError(f"{a.name} and {b.name} overlap in memory")
        self._begins = np.array([b.begin for b in self.buffers], dtype=np.uint64)
        self._ends = np.array([b.end for b in self.buffers], dtype=np.uint64)
        self._writable = np.array([b.writable for b in self.buffers], dtype=bool)
        self._noted = np.array([b.writable or b.noted for b in self.buffers], dtype=bool)
        self._together = np.array([b.together for b in self.buffers], dtype=np.int32)
        self._shifts = np.array([b.shift for b in self.buffers], dtype=np.uint64)
        self._plain = np.array([not b.atomic for b in self.buffers], dtype=bool)
        granules = [(b.end - b.begin + b.itemsize - 1) >> b.shift for b in self.buffers]
        self._bases = np.concatenate([[0], np.cumsum(granules)]).astype(np.uint64)
        self.races = Races(int(self._bases[-1]))
        self.loaded = np.zeros(len(self.buffers), dtype=np.int64)  # bytes, of each buffer
        self.stored = np.zeros(len(self.buffers), dtype=np.int64)

    def load(self, address: Any, size: int, count: int, threads: Any, line: int, readonly: bool) -> list[Any]:
        """`count` neighbours of `size` bytes from each thread's address on, as unsigned integers."""
        k = self._found(address, size * count, threads, line, "load")
        if readonly and bool(self._writable[k].any()):
            where = self.buffers[int(k[self._writable[k]][0])].name
            raise PtxError(f"a load of {where} past coherence (.nc), which the launch may write", line)
        self.loaded += np.bincount(k, minlength=len(self.buffers)) * (size * count)
        own = self._noted[k]
        if bool(own.any()):
            self._race(self.races.load, k, address, size * count, threads, line, "loads", own)
        room = process(size)
        at = ((address - np.uint64(_FIRST)) // np.uint64(size)).astype(np.int64)
        return [room[at + i] for i in range(count)]

    def store(self, address: Any, values: list[Any], size: int, threads: Any, line: int) -> None:
        """Writes each thread's values, of `size` bytes, to neighbours from its address on."""
        k = self._found(address, size * len(values), threads, line, "store")
        if not bool(self._writable[k].all()):
            where = self.buffers[int(k[~self._writable[k]][0])].name
            raise PtxError(f"a store to {where}, which is only to be read", line)
        self.stored += np.bincount(k, minlength=len(self.buffers)) * (size * len(values))
        self._race(self.races.store, k, address, size * len(values), threads, line, "stores", None)
        room = process(size)
        at = ((address - np.uint64(_FIRST)) // np.uint64(size)).astype(np.int64)
        for i, value in enumerate(values):
            room[at + i] = value

    def change(self, how: str, address: Any, values: Any, size: int, threads: Any, line: int) -> Any:
        """Adds each thread's value, of `size` bytes, to what lies at its address, or sets its bits; what was there."""
        k = self._found(address, size, threads, line, _CHANGES[how], how)
        self.stored += np.bincount(k, minlength=len(self.buffers)) * size
        at = ((address - np.uint64(_FIRST)) // np.uint64(size)).astype(np.int64)
        room = process(size)
        before = np.zeros(len(at), dtype=room.dtype)
        for k, (i, value) in enumerate(zip(at.tolist(), values.tolist(), strict=True)):
            before[k] = room[i]
            room[i] = (int(room[i]) + value) % 2 ** (8 * size) if how == "add" else int(room[i]) | value
        return before

    def barrier(self) -> None:
        """All threads of a launch have come to one: what they did before is no race with what they do then."""
        self.races = Races(int(self._bases[-1]))

    def touched(self, name: str) -> tuple[int, int]:
        """(elements that were read, elements that were written) of the buffers of a name, writable or noted."""
        read = written = 0
        for k, buffer in enumerate(self.buffers):
            if buffer.name == name:
                own = slice(int(self._bases[k]), int(self._bases[k + 1]))
                read += int((self.races.readers[own] != Races.NOBODY).sum())
                written += int((self.races.writers[own] != Races.NOBODY).sum())
        return read, written

    def moved(self, name: str) -> tuple[int, int]:
        """(bytes loaded, bytes stored) of the buffers of a name."""
        own = np.array([b.name == name for b in self.buffers], dtype=bool)
        return int(self.loaded[own].sum()), int(self.stored[own].sum())

    def _found(self, address: Any, width: int, threads: Any, line: int, what: str, atomic: str = "") -> Any:
        k = np.searchsorted(self._begins, address, side="right") - 1
        if not len(self.buffers):
            raise PtxError(f"a {what} at {int(address[0]):#x}: the launch was given no memory", line)
        bad = (k < 0) | (address > self._ends[k] - np.uint64(width))
        if bool(bad.any()):
            at, thread = int(address[bad][0]), int(threads[bad][0])
            near = self.buffers[max(int(k[bad][0]), 0)]
            raise PtxError(
                f"a {what} of {width} bytes at {at:#x} by thread {thread} is out of bounds: "
                f"the nearest memory, {near.name}, is {near.begin:#x} to {near.end:#x}",
                line,
            )
        askew = address % np.uint64(width) != 0
        if bool(askew.any()):
            at, thread = int(address[askew][0]), int(threads[askew][0])
            name = self.buffers[int(k[askew][0])].name
            raise PtxError(f"a {what} of {width} bytes of {name} at {at:#x} by thread {thread} is not aligned", line)
        if not atomic and bool(self._plain[k].all()):
            return k
        wrong = np.array([b.atomic != atomic or (bool(atomic) and b.itemsize != width) for b in self.buffers])[k]
        if bool(wrong.any()):
            buffer = self.buffers[int(k[wrong][0])]
            only = f"is for that alone: {_CHANGES.get(buffer.atomic)} by words of {buffer.itemsize} bytes"
            allowed = only if buffer.atomic else "is no atomic memory"
            article = "an" if what[0] == "a" else "a"
            raise PtxError(f"{article} {what} at {int(address[wrong][0]):#x} of {buffer.name}, which {allowed}", line)
        return k

    def _race(self, note: Any, k: Any, address: Any, width: int, threads: Any, line: int, what: str, own: Any) -> None:
        if own is not None and not bool(own.all()):
            k, address, threads = k[own], address[own], threads[own]
        shifts = self._shifts[k]
        for shift in np.unique(shifts):
            of = shifts == shift
            whole = bool(of.all())
            kk, aa, tt = (k, address, threads) if whole else (k[of], address[of], threads[of])
            first = (self._bases[kk] + ((aa - self._begins[kk]) >> shift)).astype(np.int64)
            for i in range(max(width >> int(shift), 1)):
                bad = note(first + i, tt // self._together[kk])
                if bool(bad.any()):
                    name = self.buffers[int(kk[bad][0])].name
                    raise PtxError(
                        f"thread {int(tt[bad][0])} {what} {name} at {int(aa[bad][0]):#x}, which another thread of the "
                        "launch touches: one of both writes",
                        line,
                    )
