"""What each instruction does, after NVIDIA's PTX ISA: `translate` makes it a function over many threads.

The function takes the launch and which threads execute it (`at`: a slice or an array of their numbers).
A builder below takes an instruction and claims its modifiers; one that nobody claims is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from . import numbers
from .errors import PtxError
from .program import WIDTHS, Address, Immediate, Instruction, Kernel, Operand, Pair, Register, Special, Symbol, Vector

__all__ = ["UNSIGNED", "translate"]

Run = Callable[[Any, Any], None]
Read = Callable[[Any, Any], Any]
Write = Callable[[Any, Any, Any], None]

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
SPECIAL = {
    "%tid.x": lambda s, ids: ids % s.threads,
    "%ctaid.x": lambda s, ids: ids // s.threads,
    "%ntid.x": lambda s, ids: np.full_like(ids, s.threads),
    "%nctaid.x": lambda s, ids: np.full_like(ids, s.blocks),
    "%laneid": lambda s, ids: ids % s.threads % 32,
    "%warpid": lambda s, ids: ids % s.threads // 32,
    **{f"%{name}.{axis}": lambda s, ids: np.zeros_like(ids) for name in ("tid", "ctaid") for axis in "yz"},
    **{f"%{name}.{axis}": lambda s, ids: np.ones_like(ids) for name in ("ntid", "nctaid") for axis in "yz"},
}


#: Where parameters lie whose addresses are taken: each begins at a multiple of this.
_PARAMETERS = 1 << 40


class Own:
    """An instruction while it is translated: its modifiers are claimed, its operands become readers and writers."""

    def __init__(self, instruction: Instruction, kernel: Kernel, known: Collection[int] = ()) -> None:
        self.instruction, self.kernel = instruction, kernel
        self.known = known  # registers of which every thread that comes here has written its own
        self.touched: set[int] = set()  # those that are known when it is executed
        self.left = list(instruction.modifiers)
        self.line = instruction.line

    def wrong(self, message: str) -> PtxError:
        return PtxError(f"{self.instruction.name}: {message}", self.line)

    def quotient(self, a: Any, b: Any) -> Any:
        """Of integers, towards zero."""
        a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
        if bool((b == 0).any()):
            raise self.wrong("a division by zero, whose result is not specified")
        q = a // b
        return (q + ((a % b != 0) & ((a < 0) != (b < 0))).astype(q.dtype) if a.dtype.kind == "i" else q).astype(a.dtype)

    def take(self, *allowed: str) -> str | None:
        """The next modifier, if it is one of these."""
        if self.left and self.left[0] in allowed:
            return self.left.pop(0)
        return None

    def need(self, *allowed: str) -> str:
        found = self.take(*allowed)
        if found is None:
            raise self.wrong(f"{self.left[0] if self.left else 'nothing'!r} where one of {', '.join(allowed)} is known")
        return found

    def done(self, operands: int) -> tuple[Operand, ...]:
        """All operands, when every modifier is claimed."""
        if self.left:
            raise self.wrong(f"the modifier .{self.left[0]} is not known here")
        if len(self.instruction.operands) != operands:
            raise self.wrong(f"{len(self.instruction.operands)} operands, {operands} are known")
        return self.instruction.operands

    def read(self, operand: Operand, width: int, wider: bool = False, unwritten: bool = False) -> Read:
        """Reads `width` bits as unsigned integers; `wider`: of a register that may have more.

        `unwritten`: of one that may never have been written, too. Compilers pack such a one beside another where half
        of a register is not used; what it holds (machine.POISON) is copied.
        """
        dtype: Any = UNSIGNED[width]
        if isinstance(operand, Register):
            index, own = operand.index, operand.width
            name, line = operand.name, self.line
            if own == width and (unwritten or index in self.known):
                return lambda s, at: s.registers[index][at]
            if own == width:
                self.touched.add(index)

                def read(s: Any, at: Any) -> Any:
                    if not s.whole[index]:
                        s.check(index, at, name, line)
                    return s.registers[index][at]

                return read
            if wider and own > width:
                whole = self.read(operand, own)
                return lambda s, at: whole(s, at).astype(dtype)
            raise self.wrong(f"{operand.name} has {own} bits, {width} are wanted")
        if isinstance(operand, Immediate):
            if operand.kind != "int" and width != {"f32": 32, "f64": 64}.get(operand.kind):
                raise self.wrong(f"a number of {operand.kind} where {width} bits are wanted")
            number = dtype(operand.value & ((1 << width) - 1)) if width > 1 else np.bool_(operand.value)
            return lambda s, at: number
        if isinstance(operand, Special):
            if operand.name not in SPECIAL:
                raise self.wrong(f"the register {operand.name} is not known here")
            value = SPECIAL[operand.name]
            return lambda s, at: value(s, s.ids[at]).astype(dtype)
        names = [parameter.name for parameter in self.kernel.parameters]
        if isinstance(operand, Symbol) and operand.name in names and width == 64:
            begin = dtype((names.index(operand.name) + 1) * _PARAMETERS)  # an address in a space of their own
            return lambda s, at: begin
        if isinstance(operand, Symbol) and operand.name in self.kernel.shared:
            place = dtype(self.kernel.shared[operand.name][0])
            return lambda s, at: place
        name = getattr(operand, "name", operand)
        raise self.wrong(f"{name} is not declared, or is no operand that is known here")

    def write(self, operand: Operand | None, width: int, wider: bool = False, signed: bool = False) -> Write:
        """Writes unsigned integers of `width` bits; `wider`: to a register that may have more, extended."""
        if not isinstance(operand, Register):
            raise self.wrong(f"the destination {operand} is not known here")
        index, own = operand.index, operand.width
        self.touched.add(index)
        if own == width:

            def write(s: Any, at: Any, value: Any) -> None:
                s.registers[index][at] = value
                if not s.whole[index]:
                    s.wrote(index, at)

            return write
        if wider and own > width:
            to, narrow = UNSIGNED[own], SIGNED[width] if signed else UNSIGNED[width]

            def extend(s: Any, at: Any, value: Any) -> None:
                s.registers[index][at] = np.asarray(value).view(narrow).astype(to)
                if not s.whole[index]:
                    s.wrote(index, at)

            return extend
        raise self.wrong(f"{operand.name} has {own} bits, {width} are written")


def typed(value: Any, kind: str) -> Any:
    """Unsigned integers seen as a type of PTX."""
    if kind[0] == "s":
        return value.view(SIGNED[WIDTHS[kind]])
    if kind in ("f16", "f32", "f64"):
        return value.view(numbers.FLOATS[kind])
    return value


INTEGERS = tuple(f"{sign}{bits}" for bits in (16, 32, 64) for sign in "us")
BITS = ("b16", "b32", "b64")
REAL = ("f32", "f64")
HALF = ("f16", "bf16")
PACKED = {"f32x2": ("f32", 64), "f16x2": ("f16", 32), "bf16x2": ("bf16", 32)}
_BUILDERS: dict[str, Callable[[Own], Run]] = {}


def builds(*opcodes: str) -> Callable[[Callable[[Own], Run]], Callable[[Own], Run]]:
    def register(builder: Callable[[Own], Run]) -> Callable[[Own], Run]:
        for opcode in opcodes:
            _BUILDERS[opcode] = builder
        return builder

    return register


def translate(instruction: Instruction, kernel: Kernel, known: set[int] | None = None) -> Run:
    """An instruction as a function of the launch and of the threads that execute it.

    `known` are registers that the instructions before it in a block have read or written: the threads are the same, so
    they need not be looked at again. Those of this one are added.

    Raises:
        PtxError: it is not known here.
    """
    if instruction.opcode not in _BUILDERS:
        raise PtxError(f"the instruction {instruction.name} is not known here", instruction.line)
    known = set() if known is None else known
    own = Own(instruction, kernel, known)
    run = _BUILDERS[instruction.opcode](own)
    if instruction.predicate is None:
        known |= own.touched
        return run
    read, wanted = Own(instruction, kernel, known).read(instruction.predicate, 1), not instruction.negated

    def predicated(s: Any, at: Any) -> None:
        true = read(s, at) == wanted
        if true.all():
            run(s, at)
        elif true.any():
            run(s, s.ids[at][true])

    return predicated


def elementwise(own: Own, kinds: Sequence[str], result: str, compute: Callable[..., Any]) -> Run:
    """d = compute(a, b, ...), of sources of these types; what it gives is of type `result`, or its bits."""
    d, *sources = own.done(1 + len(kinds))
    reads = [own.read(source, WIDTHS.get(kind, 16)) for source, kind in zip(sources, kinds, strict=True)]
    width = WIDTHS.get(result, 16)
    write, unsigned = own.write(d, width), UNSIGNED[width]

    def run(s: Any, at: Any) -> None:
        values = [typed(read(s, at), kind) for read, kind in zip(reads, kinds, strict=True)]
        write(s, at, np.asarray(compute(*values)).view(unsigned))

    return run


# Integers and bits ----------------------------------------------------------------------------------------------------

_FLOAT: dict[str, Callable[..., Any]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


@builds("add", "sub", "mul", "div", "fma", "mad")
def _arithmetic(own: Own) -> Run:
    opcode = own.instruction.opcode
    kind = own.instruction.modifiers[-1] if own.instruction.modifiers else ""
    if kind in INTEGERS:
        return _integer(own, opcode)
    rounding = own.take("rn", "rz", "rm", "rp", "full", "approx")
    if rounding in ("full", "approx") or "ftz" in own.left or "sat" in own.left:
        raise own.wrong("its result is not one that is rounded once, to nearest, with subnormals")
    if rounding not in (None, "rn") or (rounding is None and opcode in ("div", "fma", "mad")):
        raise own.wrong(f"rounding {rounding} is not known here")
    if rounding is None and opcode in _FLOAT and kind in (*REAL, *HALF, *PACKED):
        raise own.wrong("without .rn it may be fused with its neighbours")
    kind = own.need(*REAL, *HALF, *PACKED)
    if opcode == "div" and kind not in REAL:
        raise own.wrong("only f32 and f64 are divided")
    element, width = PACKED.get(kind, (kind, 0))
    count = 3 if opcode in ("fma", "mad") else 2
    if not width:
        return elementwise(own, [element] * count, element, lambda *values: _float(opcode, element, values))
    d, *sources = own.done(1 + count)
    reads, write = [own.read(source, width) for source in sources], own.write(d, width)
    part: Any = numbers.BITS[element]

    def run(s: Any, at: Any) -> None:
        packed = [np.ascontiguousarray(np.atleast_1d(read(s, at))).view(part) for read in reads]
        packed = list(np.broadcast_arrays(*packed)) if len({p.size for p in packed}) == 1 else _aligned(packed)
        found = _float(opcode, element, [typed(p, element) for p in packed])
        write(s, at, np.ascontiguousarray(found).view(UNSIGNED[width]))

    return run


def _aligned(packed: list[Any]) -> list[Any]:
    """Halves of registers beside the two halves of a number that is the same for all threads."""
    most = max(p.size for p in packed)
    return [p if p.size == most else np.tile(p, most // p.size) for p in packed]


def _float(opcode: str, kind: str, values: Sequence[Any]) -> Any:
    """The bits of an operation on values as `typed` gives them."""
    if kind in HALF:  # in float32, which has more than twice the bits: rounding twice rounds as once
        values = [numbers.widen(np.asarray(v).view(np.uint16), kind) for v in values]
    if opcode in ("fma", "mad"):
        return numbers.fma(*values, kind)
    found = _FLOAT[opcode](*values)
    return numbers.narrow(found, kind) if kind in HALF else numbers.canonical(found, kind)


def _integer(own: Own, opcode: str) -> Run:
    part = own.take("lo", "hi", "wide") if opcode in ("mul", "mad") else None
    kind = own.need(*INTEGERS)
    width = WIDTHS[kind]
    if opcode in ("mul", "mad"):
        if part is None:
            raise own.wrong("lo, hi or wide is missing")
        to = kind if part != "wide" else f"{kind[0]}{2 * width}"
        if part == "wide" and width == 64:
            raise own.wrong("there is no product of 128 bits")
        kinds = [kind, kind] + ([to] if opcode == "mad" else [])
        return elementwise(own, kinds, to, lambda a, b, c=0: _product(a, b, kind, part) + c)
    if opcode == "fma":
        raise own.wrong("integers are not fused")
    compute = {"add": np.add, "sub": np.subtract, "div": own.quotient}[opcode]
    return elementwise(own, [kind, kind], kind, compute)


def _product(a: Any, b: Any, kind: str, part: str) -> Any:
    width = WIDTHS[kind]
    if part == "lo":
        return a * b
    if width < 64:
        wide: Any = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * width]
        product = np.asarray(a).astype(wide) * np.asarray(b).astype(wide)
        return product if part == "wide" else (product >> wide(width)).astype(np.asarray(a).dtype)
    exact = np.asarray(a).astype(object) * np.asarray(b).astype(object)
    return np.asarray((exact >> 64) & (2**64 - 1), dtype=np.uint64).view(np.asarray(a).dtype)


@builds("rem")
def _remainder(own: Own) -> Run:
    kind = own.need(*INTEGERS)
    return elementwise(own, [kind, kind], kind, lambda a, b: a - own.quotient(a, b) * b)


@builds("min", "max")
def _extreme(own: Own) -> Run:
    nan = own.take("NaN")
    kind = own.need(*INTEGERS, *REAL)
    least = own.instruction.opcode == "min"
    if kind in INTEGERS:
        if nan:
            raise own.wrong("integers have no NaN")
        return elementwise(own, [kind, kind], kind, np.minimum if least else np.maximum)

    def compute(a: Any, b: Any) -> Any:
        a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
        negative = np.signbit(a)
        first = np.where(a == b, negative == least, a < b if least else a > b)  # -0 is less than 0
        found = np.where(first | (b != b), a, b)
        missing = (a != a) | (b != b) if nan else (a != a) & (b != b)
        return numbers.canonical(np.where(missing, np.nan, np.where(a != a, b, found)).astype(a.dtype), kind)

    return elementwise(own, [kind, kind], kind, compute)


@builds("neg", "abs")
def _sign(own: Own) -> Run:
    kind = own.need("s16", "s32", "s64", *REAL, *HALF)
    negate = own.instruction.opcode == "neg"
    if kind[0] == "s":
        return elementwise(own, [kind], kind, np.negative if negate else np.abs)
    unsigned: Any = numbers.BITS[kind]
    top = unsigned(1 << (WIDTHS.get(kind, 16) - 1))

    def compute(a: Any) -> Any:
        bits = np.asarray(a).view(unsigned)
        return bits ^ top if negate else bits & ~top

    return elementwise(own, [kind], kind, compute)


@builds("and", "or", "xor")
def _logic(own: Own) -> Run:
    kind = own.need("pred", *BITS)
    compute = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[own.instruction.opcode]
    return elementwise(own, [kind, kind], kind, compute)


@builds("not")
def _not(own: Own) -> Run:
    kind = own.need("pred", *BITS)
    return elementwise(own, [kind], kind, np.bitwise_not)


@builds("lop3")
def _any_logic(own: Own) -> Run:
    kind = own.need("b32")
    d, a, b, c, table = own.done(5)
    if not isinstance(table, Immediate) or not 0 <= table.value < 256:
        raise own.wrong(f"the table {table} is not known here")
    reads, write, number = [own.read(x, WIDTHS[kind]) for x in (a, b, c)], own.write(d, WIDTHS[kind]), table.value

    def run(s: Any, at: Any) -> None:
        values, found = [np.asarray(read(s, at)) for read in reads], np.uint32(0)
        for row in range(8):
            if number >> row & 1:
                x, y, z = (v if row >> bit & 1 else ~v for v, bit in zip(values, (2, 1, 0), strict=True))
                found = found | (x & y & z)
        write(s, at, found)

    return run


@builds("shl", "shr")
def _shift(own: Own) -> Run:
    left = own.instruction.opcode == "shl"
    kind = own.need(*BITS) if left else own.need(*BITS, *INTEGERS)
    width = WIDTHS[kind]
    most = np.uint32(width - 1)

    def compute(a: Any, amount: Any) -> Any:
        a, few = np.asarray(a), np.minimum(amount, most)
        found = np.left_shift(a, few.astype(a.dtype)) if left else np.right_shift(a, few.astype(a.dtype))
        if a.dtype.kind == "i":
            return found  # an amount of all bits or more leaves the sign
        return np.where(amount > most, a.dtype.type(0), found)

    return elementwise(own, [kind, "b32"], kind, compute)


@builds("shf")
def _funnel(own: Own) -> Run:
    left = own.need("l", "r") == "l"
    clamp = own.need("clamp", "wrap") == "clamp"
    own.need("b32")

    def compute(a: Any, b: Any, amount: Any) -> Any:
        n = (np.minimum(amount, np.uint32(32)) if clamp else amount & np.uint32(31)).astype(np.uint64)
        both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    def wide(a: Any, b: Any, amount: Any) -> Any:  # 64 - 0 bits of a shift to the left by 32 are those of a
        found = compute(a, b, amount)
        return np.where(amount >= 32, a, found).astype(np.uint32) if left and clamp else found

    return elementwise(own, ["b32", "b32", "b32"], "b32", wide)


@builds("bfe")
def _extract(own: Own) -> Run:
    kind = own.need("u32", "s32", "u64", "s64")
    width = WIDTHS[kind]

    def compute(a: Any, begin: Any, count: Any) -> Any:
        a, begin, count = np.broadcast_arrays(np.asarray(a), np.asarray(begin) & 255, np.asarray(count) & 255)
        found = np.zeros(a.shape, dtype=UNSIGNED[width])
        bits = a.view(UNSIGNED[width]) if a.flags.c_contiguous else np.ascontiguousarray(a).view(UNSIGNED[width])
        last = np.minimum(begin.astype(np.int64) + count - 1, width - 1)
        sign = (bits >> np.maximum(last, 0).astype(bits.dtype)) & bits.dtype.type(1)
        if kind[0] == "u":
            sign = np.zeros_like(sign)
        sign = np.where(count == 0, 0, sign).astype(bits.dtype)
        for i in range(width):
            from_a = (i < count) & (begin.astype(np.int64) + i < width)
            place = np.minimum(begin.astype(np.int64) + i, width - 1).astype(bits.dtype)
            bit = np.where(from_a, (bits >> place) & bits.dtype.type(1), sign).astype(bits.dtype)
            found |= bit << bits.dtype.type(i)
        return found

    return elementwise(own, [kind, "u32", "u32"], kind, compute)


@builds("bfi")
def _insert(own: Own) -> Run:
    kind = own.need("b32", "b64")
    width = WIDTHS[kind]

    def compute(a: Any, b: Any, begin: Any, count: Any) -> Any:
        a, found, begin, count = np.broadcast_arrays(a, b, np.asarray(begin) & 255, np.asarray(count) & 255)
        one = a.dtype.type(1)
        for i in range(width):
            place = begin.astype(np.int64) + i
            inside = (i < count) & (place < width)
            at = np.minimum(place, width - 1).astype(a.dtype)
            bit = ((a >> a.dtype.type(i)) & one) << at
            found = np.where(inside, (found & ~(one << at)) | bit, found)
        return found

    return elementwise(own, [kind, kind, "u32", "u32"], kind, compute)


@builds("clz", "popc")
def _count(own: Own) -> Run:
    kind = own.need("b32", "b64")
    width = WIDTHS[kind]

    def compute(a: Any) -> Any:
        bits = (np.asarray(a)[..., None] >> np.arange(width).astype(a.dtype)) & a.dtype.type(1)
        if own.instruction.opcode == "popc":
            return bits.sum(-1).astype(np.uint32)
        return np.where(bits.any(-1), bits[..., ::-1].argmax(-1), width).astype(np.uint32)

    return elementwise(own, [kind], "b32", compute)


@builds("brev")
def _reverse(own: Own) -> Run:
    kind = own.need("b32", "b64")
    width = WIDTHS[kind]

    def compute(a: Any) -> Any:
        one = a.dtype.type(1)
        return sum(
            (((a >> a.dtype.type(i)) & one) << a.dtype.type(width - 1 - i) for i in range(width)), np.zeros_like(a)
        )

    return elementwise(own, [kind], kind, compute)


@builds("prmt")
def _permute(own: Own) -> Run:
    own.need("b32")

    def compute(a: Any, b: Any, selector: Any) -> Any:
        both = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
        found = np.uint32(0)
        for i in range(4):
            choice = (np.asarray(selector) >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((choice & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
            spread = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(choice & np.uint32(8), spread, byte)
            found = found | byte.astype(np.uint32) << np.uint32(8 * i)
        return found

    return elementwise(own, ["b32", "b32", "b32"], "b32", compute)


# Floating point -------------------------------------------------------------------------------------------------------


@builds("sqrt", "rcp")
def _root(own: Own) -> Run:
    if own.take("rn") is None or "ftz" in own.left:
        raise own.wrong("its result is not one that is rounded once, to nearest, with subnormals")
    kind = own.need(*REAL)
    if own.instruction.opcode == "sqrt":
        return elementwise(own, [kind], kind, lambda a: numbers.canonical(np.sqrt(a), kind))
    return elementwise(own, [kind], kind, lambda a: numbers.canonical(np.asarray(a).dtype.type(1) / a, kind))


@builds("copysign")
def _copysign(own: Own) -> Run:
    kind = own.need(*REAL)
    return elementwise(own, [kind, kind], kind, lambda a, b: np.copysign(b, a))  # the sign of a, the size of b


_ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
            "ge": operator.ge}  # fmt: skip
_SAME_AS_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@builds("setp")
def _compare(own: Own) -> Run:
    names = [*_ORDERED, *_SAME_AS_UNSIGNED, *(f"{name}u" for name in _ORDERED), "num", "nan"]
    name = own.need(*names)
    combine = own.take("and", "or", "xor")
    kind = own.need(*BITS, *INTEGERS, *REAL, *HALF)
    of_float = kind in REAL or kind in HALF
    if not of_float and (name in ("num", "nan") or (name.endswith("u") and name[:-1] in _ORDERED)):
        raise own.wrong("integers are always ordered")
    if name in _SAME_AS_UNSIGNED and kind[0] != "u":
        raise own.wrong("only unsigned integers are lower or higher")
    if kind in BITS and name not in ("eq", "ne"):
        raise own.wrong("bits are equal or not")
    d, a, b, *more = own.done(4 if combine else 3)
    width = WIDTHS.get(kind, 16)
    reads = [own.read(x, width) for x in (a, b)]
    other = own.read(more[0], 1) if combine else None
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    writes = own.write(first, 1), own.write(second, 1) if second is not None else None
    plain = _SAME_AS_UNSIGNED.get(name, name)
    unordered_too = plain not in _ORDERED

    def compare(x: Any, y: Any) -> Any:
        if not of_float:
            return _ORDERED[plain](x, y)
        missing = (x != x) | (y != y)
        if name in ("num", "nan"):
            return missing == (name == "nan")
        if unordered_too:
            return _ORDERED[plain[:-1]](x, y) | missing
        return _ORDERED[plain](x, y) & ~missing

    def run(s: Any, at: Any) -> None:
        x, y = (typed(read(s, at), kind) for read in reads)
        if kind == "bf16":
            x, y = numbers.widen(np.asarray(x), kind), numbers.widen(np.asarray(y), kind)
        found = compare(x, y)
        opposite = ~found
        if combine and other is not None:
            gate = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]
            c = other(s, at)
            found, opposite = gate(found, c), gate(opposite, c)
        writes[0](s, at, found)
        if writes[1] is not None:
            writes[1](s, at, opposite)

    return run


@builds("selp")
def _select(own: Own) -> Run:
    kind = own.need(*BITS, *INTEGERS, *REAL)
    d, a, b, p = own.done(4)
    width = WIDTHS[kind]
    reads, write, gate = [own.read(x, width) for x in (a, b)], own.write(d, width), own.read(p, 1)

    def run(s: Any, at: Any) -> None:
        write(s, at, np.where(gate(s, at), reads[0](s, at), reads[1](s, at)))

    return run


# Moves and conversions ------------------------------------------------------------------------------------------------


@builds("mov")
def _move(own: Own) -> Run:
    kind = own.need("pred", *BITS, *INTEGERS, *REAL)
    d, a = own.done(2)
    width = WIDTHS[kind]
    if isinstance(d, Vector):
        part = width // len(d.parts)
        writes = [own.write(x, part) if x is not None else None for x in d.parts]
        read = own.read(a, width, unwritten=True)

        def unpack(s: Any, at: Any) -> None:
            value = np.asarray(read(s, at))
            for i, write in enumerate(writes):
                if write is not None:
                    write(s, at, (value >> value.dtype.type(part * i)).astype(UNSIGNED[part]))

        return unpack
    if isinstance(a, Vector):
        part = width // len(a.parts)
        if None in a.parts:
            raise own.wrong("a source cannot be _")
        reads = [own.read(x, part, unwritten=True) for x in a.parts if x is not None]
        write, to = own.write(d, width), UNSIGNED[width]

        def pack(s: Any, at: Any) -> None:
            found = to(0)
            for i, read in enumerate(reads):
                found = found | np.asarray(read(s, at)).astype(to) << to(part * i)
            write(s, at, found)

        return pack
    return _copy(own, d, a, width)


def _copy(own: Own, d: Operand, a: Operand, width: int) -> Run:
    read, write = own.read(a, width, unwritten=True), own.write(d, width)
    return lambda s, at: write(s, at, read(s, at))


@builds("cvta")
def _generic(own: Own) -> Run:
    """Global addresses are generic ones here; others are not known as such."""
    own.take("to")
    own.need("global")
    own.need("u64")
    d, a = own.done(2)
    return _copy(own, d, a, 64)


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@builds("cvt")
def _convert(own: Own) -> Run:
    rounding = own.take("rn", "rz", "rm", "rp", *_TO_INTEGER)
    if "ftz" in own.left:
        raise own.wrong("flushing of subnormals is not known here")
    saturate = own.take("sat")
    small = tuple(f"{sign}8" for sign in "us")
    kinds = (*small, *INTEGERS, *REAL, *HALF)
    to = own.need(*kinds, "f16x2", "bf16x2")
    source = own.need(*kinds)
    if to in PACKED:
        if rounding != "rn" or source != "f32" or saturate:
            raise own.wrong("only float32 is rounded to two halves, to nearest")
        half = PACKED[to][0]

        def pack(high: Any, low: Any) -> Any:
            top, bottom = (numbers.narrow(np.asarray(v), half).astype(np.uint32) for v in (high, low))
            return top << np.uint32(16) | bottom

        return elementwise(own, ["f32", "f32"], "b32", pack)
    d, a = own.done(2)
    before, after = WIDTHS.get(source, 16), WIDTHS.get(to, 16)
    read, write = own.read(a, before, wider=True), own.write(d, after, wider=True, signed=to[0] == "s")
    convert = _conversion(own, to, source, rounding, saturate is not None)
    return lambda s, at: write(s, at, convert(typed(np.asarray(read(s, at)), source)))


def _conversion(own: Own, to: str, source: str, rounding: str | None, saturate: bool) -> Callable[[Any], Any]:
    integral, from_integer = to[0] in "us", source[0] in "us"
    after: Any = UNSIGNED[WIDTHS.get(to, 16)]
    if integral and from_integer:
        if rounding:
            raise own.wrong("integers are not rounded")
        if not saturate:
            return lambda x: x.astype(after)
        info = np.iinfo((SIGNED if to[0] == "s" else UNSIGNED)[WIDTHS[to]])
        return lambda x: np.clip(x.astype(object), info.min, info.max).astype(info.dtype).view(after)
    if saturate:
        raise own.wrong("saturation to a floating-point type is not known here")
    if from_integer:
        if rounding != "rn" or to in HALF:
            raise own.wrong("an integer is rounded to f32 or f64, to nearest")
        return lambda x: x.astype(numbers.FLOATS[to]).view(after)

    def floating(x: Any) -> Any:
        return numbers.widen(x.view(np.uint16), source) if source in HALF else x

    if integral:
        if rounding not in _TO_INTEGER:
            raise own.wrong("which integer is meant must be said (.rni, .rzi, .rmi, .rpi)")
        info = np.iinfo((SIGNED if to[0] == "s" else UNSIGNED)[WIDTHS[to]])
        whole = _TO_INTEGER[rounding]

        # Out of range: the nearest end. NaN: 0, but the highest bit alone where f64 or 64 bits are on either side.
        missing = after(1 << (WIDTHS[to] - 1) if "64" in source or "64" in to else 0)

        def to_integer(x: Any) -> Any:
            value = whole(floating(x).astype(np.float64))
            inside = (value > float(info.min) - 1) & (value < float(info.max) + 1)
            found = np.where(inside, value, 0).astype(info.dtype)
            found = np.where(value >= float(info.max), info.max, np.where(value <= float(info.min), info.min, found))
            return np.where(value != value, missing, found.astype(info.dtype).view(after))

        return to_integer
    sizes = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
    if rounding in _TO_INTEGER:
        if to != source or to not in REAL:
            raise own.wrong("a whole number is of the same type, f32 or f64")
        return lambda x: numbers.canonical(_TO_INTEGER[rounding](x), to)
    exact = sizes[to] > sizes[source] or to == source
    if (rounding is None) != exact or rounding not in (None, "rn"):
        raise own.wrong(f"rounding {rounding} from {source} to {to} is not known here")
    if to in HALF:
        return lambda x: x.view(after) if to == source else numbers.narrow(floating(x), to)
    return lambda x: numbers.canonical(floating(x).astype(numbers.FLOATS[to]), to)


# Memory ---------------------------------------------------------------------------------------------------------------

_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", *(f"L1::{how}" for how in (
    "evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")),
    *(f"L2::{how}" for how in ("64B", "128B", "256B", "evict_last", "evict_normal", "evict_first")))  # fmt: skip
_IN_MEMORY = (*(f"{kind}{bits}" for bits in (8, 16, 32, 64) for kind in "bus"), *REAL)


@builds("ld", "st")
def _access(own: Own) -> Run:
    loads = own.instruction.opcode == "ld"
    own.take("weak", "volatile")
    space = own.need(*(("param", "global", "shared") if loads else ("global", "shared")))
    own.take("relaxed") or own.take("weak")
    cached = set()
    while own.left and (own.left[0] in _CACHE or own.left[0] == "nc"):
        cached.add(own.left.pop(0))
    count = {"v2": 2, "v4": 4, "v8": 8, None: 1}[own.take("v2", "v4", "v8")]
    kind = own.need(*_IN_MEMORY)
    width = WIDTHS[kind]
    register, place = own.done(2) if loads else tuple(reversed(own.done(2)))
    if not isinstance(place, Address):
        raise own.wrong(f"{place} is no address")
    parts = register.parts if isinstance(register, Vector) else (register,)
    if len(parts) != count:
        raise own.wrong(f"{len(parts)} registers for {count} elements")
    if space == "param":
        return _parameter(own, place, parts, kind)
    address = _address(own, place, space)
    line, size = own.line, width // 8
    if loads:
        signed = kind[0] == "s"
        writes = [own.write(p, width, wider=True, signed=signed) if p is not None else None for p in parts]
        readonly = "nc" in cached

        def load(s: Any, at: Any) -> None:
            ids = s.ids[at]
            memory = s.memory if space == "global" else s.shared
            found = memory.load(address(s, at, ids), size, count, ids, line, readonly)
            for write, value in zip(writes, found, strict=True):
                if write is not None:
                    write(s, at, value)

        return load
    if None in parts:
        raise own.wrong("_ cannot be stored")
    reads = [own.read(p, width, wider=True) for p in parts if p is not None]

    def store(s: Any, at: Any) -> None:
        ids = s.ids[at]
        memory = s.memory if space == "global" else s.shared
        memory.store(address(s, at, ids), [read(s, at) for read in reads], size, ids, line)

    return store


@builds("red", "atom")
def _atomic(own: Own) -> Run:
    """An addition to global memory, or bits that are set there; `atom` gives what was there before."""
    own.need("global")
    own.take("gpu")
    own.take("relaxed")
    own.take("gpu")
    how = own.need("add", "or")
    width = WIDTHS[own.need(*(("u64", "s64") if how == "add" else ("b32",)))]
    with_result = own.instruction.opcode == "atom"
    *result, place, operand = own.done(3 if with_result else 2)
    write = own.write(result[0], width) if with_result and result[0] is not None else None
    if not isinstance(place, Address):
        raise own.wrong(f"{place} is no address")
    address, read, line = _address(own, place, "global"), own.read(operand, width), own.line

    def change(s: Any, at: Any) -> None:
        ids = s.ids[at]
        values = np.broadcast_to(read(s, at), ids.shape)
        before = s.memory.change(how, address(s, at, ids), values, width // 8, ids, line)
        if write is not None:
            write(s, at, before)

    return change


def _address(own: Own, place: Address, space: str) -> Callable[[Any, Any, Any], Any]:
    """uint64 for every thread. Of shared memory: from the begin of the block's own on."""
    if isinstance(place.base, Symbol) and space == "shared":
        if place.base.name not in own.kernel.shared:
            raise own.wrong(f"{place.base.name} does not lie in shared memory")
        first = own.kernel.shared[place.base.name][0] + place.offset
        return lambda s, at, ids: np.full(len(ids), first, dtype=np.uint64)
    if not isinstance(place.base, Register):
        raise own.wrong(f"the address {place} is not known here")
    read = own.read(place.base, place.base.width if space == "shared" else 64)
    offset = np.uint64(place.offset & (2**64 - 1))
    return lambda s, at, ids: read(s, at).astype(np.uint64) + offset


def _parameter(own: Own, place: Address, parts: Sequence[Any], kind: str) -> Run:
    known = {p.name: p for p in own.kernel.parameters}
    if isinstance(place.base, Register):
        return _parameter_at(own, place, parts, kind)
    if not isinstance(place.base, Symbol) or place.base.name not in known:
        raise own.wrong(f"{place.base} is no parameter of the kernel")
    parameter, size = known[place.base.name], WIDTHS[kind] // 8
    if place.offset < 0 or place.offset % size or place.offset + size * len(parts) > parameter.size:
        raise own.wrong(f"bytes {place.offset} to {place.offset + size * len(parts)} of {parameter.size}")
    writes = [own.write(p, WIDTHS[kind], wider=True, signed=kind[0] == "s") for p in parts]
    unsigned = np.dtype(UNSIGNED[WIDTHS[kind]])

    def load(s: Any, at: Any) -> None:
        values = np.frombuffer(s.arguments[parameter.name], unsigned, len(parts), place.offset)
        for write, value in zip(writes, values, strict=True):
            write(s, at, value)

    return load


def _parameter_at(own: Own, place: Address, parts: Sequence[Any], kind: str) -> Run:
    """Of an address that the kernel has taken."""
    size = WIDTHS[kind] // 8
    address = _address(own, place, "global")
    writes = [own.write(p, WIDTHS[kind], wider=True, signed=kind[0] == "s") for p in parts]
    unsigned = np.dtype(UNSIGNED[WIDTHS[kind]])

    def load(s: Any, at: Any) -> None:
        (where,) = np.unique(address(s, at, s.ids[at])).tolist()  # all threads read the same
        which, offset = where // _PARAMETERS - 1, where % _PARAMETERS
        parameters = own.kernel.parameters
        if not 0 <= which < len(parameters) or offset % size or offset + size * len(parts) > parameters[which].size:
            raise PtxError(f"a load of a parameter at {where:#x}, where none is", own.line)
        values = np.frombuffer(s.arguments[parameters[which].name], unsigned, len(parts), offset)
        for write, value in zip(writes, values, strict=True):
            write(s, at, value)

    return load


# Between threads ------------------------------------------------------------------------------------------------------


def _members(own: Own, s: Any, ids: Any, mask: Any) -> Any:
    """The threads of `ids` in rows of a warp each [w, 32]; all that the mask names must be there."""
    warps = np.unique(ids // 32)
    if s.threads % 32:
        raise own.wrong("blocks of no whole number of warps are not known here")
    there = np.zeros(s.blocks * s.threads, dtype=bool)
    there[ids] = True
    lanes = warps[:, None] * 32 + np.arange(32)
    masks = np.broadcast_to(np.asarray(mask), ids.shape)
    if (masks != masks[0]).any():
        raise own.wrong("threads name different masks")
    named = (int(masks[0]) >> np.arange(32) & 1).astype(bool)
    if bool((there[lanes] != named[None, :]).any()):
        raise own.wrong("the mask does not name exactly the threads of the warp that come here")
    return lanes, there


@builds("shfl")
def _shuffle(own: Own) -> Run:
    own.need("sync")
    mode = own.need("up", "down", "bfly", "idx")
    own.need("b32")
    d, a, b, c, mask = own.done(5)
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    reads = [own.read(x, 32) for x in (a, b, c, mask)]
    write = own.write(first, 32) if first is not None else None
    valid = own.write(second, 1) if second is not None else None

    def run(s: Any, at: Any) -> None:
        ids = s.ids[at]
        value, by, clamp, names = (np.broadcast_to(np.asarray(read(s, at)), ids.shape) for read in reads)
        _, there = _members(own, s, ids, names)
        lane = (ids % 32).astype(np.int64)
        by, bound, segment = by & 31, (clamp & 31).astype(np.int64), (clamp >> 8 & 31).astype(np.int64)
        most, least, by = (lane & segment) | (bound & ~segment), lane & segment, by.astype(np.int64)
        j = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": least | (by & ~segment)}[mode]
        good = j >= most if mode == "up" else j <= most
        source = ids - lane + np.where(good, j, lane)
        if not bool(there[source].all()):
            raise own.wrong("reads a register of a thread that does not come here")
        whole = np.zeros(s.blocks * s.threads, dtype=np.uint32)
        whole[ids] = value
        if write is not None:
            write(s, at, whole[source])
        if valid is not None:
            valid(s, at, good)

    return run


@builds("vote")
def _vote(own: Own) -> Run:
    own.need("sync")
    mode = own.need("all", "any", "uni", "ballot")
    own.need("b32" if mode == "ballot" else "pred")
    d, a, mask = own.done(3)
    read, names = own.read(a, 1), own.read(mask, 32)
    write = own.write(d, 32 if mode == "ballot" else 1)

    def run(s: Any, at: Any) -> None:
        ids = s.ids[at]
        lanes, there = _members(own, s, ids, names(s, at))
        votes = np.zeros(s.blocks * s.threads, dtype=bool)
        votes[ids] = read(s, at)
        yes, here = votes[lanes], there[lanes]
        every, some = (yes | ~here).all(1), (yes & here).any(1)
        found = {
            "all": every, "any": some, "uni": every | ~some,
            "ballot": ((yes & here).astype(np.uint64) << np.arange(32).astype(np.uint64)).sum(1).astype(np.uint32),
        }[mode]  # fmt: skip
        write(s, at, found[np.searchsorted(lanes[:, 0], ids // 32 * 32)])

    return run


@builds("redux")
def _reduce(own: Own) -> Run:
    own.need("sync")
    how = own.need("add", "min", "max", "and", "or", "xor")
    kind = own.need(*(("b32",) if how in ("and", "or", "xor") else ("u32", "s32")))
    d, a, mask = own.done(3)
    read, names, write = own.read(a, 32), own.read(mask, 32), own.write(d, 32)
    gate: Any = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                 "xor": np.bitwise_xor}[how]  # fmt: skip

    def run(s: Any, at: Any) -> None:
        ids = s.ids[at]
        lanes, there = _members(own, s, ids, names(s, at))
        whole = np.zeros(s.blocks * s.threads, dtype=np.uint32)
        whole[ids] = read(s, at)
        values = typed(whole, kind)
        found = np.array(
            [gate.reduce(values[w][there[w]], dtype=values.dtype) for w in lanes], dtype=values.dtype
        ).view(np.uint32)
        write(s, at, found[np.searchsorted(lanes[:, 0], ids // 32 * 32)])

    return run
