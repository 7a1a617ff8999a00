"""Each instruction that the executor knows, against its definition in the PTX ISA, in exact Python numbers."""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import ptx
import pytest
from ptx.instructions import _BUILDERS as KNOWN
from ptx.program import WIDTHS

HEAD = ".version 9.0\n.target sm_100\n.address_size 64\n"
SIZES = {"pred": 1, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32x2": 8} | {
    f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)
}


# A kernel of one instruction ------------------------------------------------------------------------------------------


def evaluate(instruction: str, result: str, kinds: Sequence[str], columns: Sequence[Sequence[int]]) -> list[int]:
    """The bits that one instruction gives for each row of its sources, each row in a thread of its own.

    The instruction names its destination D and its sources A, B, C; predicates are read and written as 0 and 1.
    """
    count = len(columns[0])
    blocks = -(-count // 64)
    threads = 64 * blocks
    lines, declared, types = [], [], dict(zip("DABC", (result, *kinds), strict=False))
    for name, kind in types.items():
        width = {"pred": "pred"}.get(kind, f"b{max(8 * SIZES[kind], 16)}")
        declared.append(f".reg .{width} {name};")
    memory, arrays = ptx.Memory(), []
    parameters = []
    for k, (kind, values) in enumerate(zip(kinds, columns, strict=True)):
        size = SIZES[kind] if kind != "pred" else 4
        arrays.append(np.zeros(threads, dtype=f"u{size}"))
        arrays[-1][:count] = values
        arrays[-1][count:] = values[-1]
        memory.add(f"source {k}", arrays[-1].ctypes.data, arrays[-1].nbytes, size)
        parameters.append(f".param .u64 p{k}")
        place = f"ld.param.u64 %rd1, [p{k}]; mul.wide.u32 %rd2, %r1, {size}; add.s64 %rd1, %rd1, %rd2;"
        name = "ABC"[k]
        if kind == "pred":
            lines.append(f"{place} ld.global.b32 %r2, [%rd1]; setp.ne.b32 {name}, %r2, 0;")
        else:
            lines.append(f"{place} ld.global.b{8 * size} {name}, [%rd1];")
    size = SIZES[result] if result != "pred" else 4
    found = np.zeros(threads, dtype=f"u{size}")
    memory.add("result", found.ctypes.data, found.nbytes, size, writable=True)
    lines.append(f"{instruction};")
    lines.append(f"ld.param.u64 %rd1, [out]; mul.wide.u32 %rd2, %r1, {size}; add.s64 %rd1, %rd1, %rd2;")
    if result == "pred":
        lines.append("selp.b32 %r2, 1, 0, D; st.global.b32 [%rd1], %r2;")
    else:
        lines.append(f"st.global.b{8 * size} [%rd1], D;")
    body = "\n".join(
        [
            ".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<9>;",
            *declared,
            "mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.s32 %r1, %r2, 64, %r1;",
            *lines,
        ]
    )
    text = (
        f"{HEAD}.visible .entry one({', '.join([*parameters, '.param .u64 out'])})\n.reqntid 64\n{{\n{body}\nret;\n}}\n"
    )
    ptx.launch(ptx.parse(text), blocks, [*(a.ctypes.data for a in arrays), found.ctypes.data], memory)
    return [int(v) for v in found[:count]]


# Numbers, exactly -----------------------------------------------------------------------------------------------------

#: Bits of the significand with the hidden one, least and greatest exponent.
SHAPES = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}


def decoded(bits: int, kind: str) -> Fraction | float:
    """A floating-point number: a fraction, or an infinity, NaN or -0 as a float."""
    precision, least, most = SHAPES[kind]
    exponent_bits = (most - least + 2).bit_length()
    fraction = bits & ((1 << (precision - 1)) - 1)
    exponent = bits >> (precision - 1) & ((1 << exponent_bits) - 1)
    sign = -1 if bits >> (precision - 1 + exponent_bits) else 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * Fraction(fraction) * Fraction(2) ** (least - precision + 1) if fraction else sign * 0.0
    return sign * Fraction(fraction + (1 << (precision - 1))) * Fraction(2) ** (exponent - 1 + least - precision + 1)


def encoded(value: Fraction | float, kind: str) -> int:
    """Rounded once, to nearest even."""
    precision, least, most = SHAPES[kind]
    exponent_bits = (most - least + 2).bit_length()
    top = 1 << (precision - 1 + exponent_bits)
    if isinstance(value, float):
        if math.isnan(value):
            return NAN[kind]
        infinity = ((1 << exponent_bits) - 1) << (precision - 1)
        return (top if math.copysign(1, value) < 0 else 0) | (infinity if math.isinf(value) else 0)
    sign = top if value < 0 else 0
    value = abs(value)
    if value == 0:
        return sign
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= value < Fraction(2) ** exponent
    exponent = max(exponent, least)
    scaled = value / Fraction(2) ** (exponent - precision + 1)
    whole, rest = divmod(scaled.numerator, scaled.denominator)
    twice = 2 * rest - scaled.denominator
    whole += twice > 0 or (twice == 0 and whole % 2 == 1)
    if whole >= 1 << precision:
        whole, exponent = whole // 2, exponent + 1
    if exponent > most:
        return sign | ((1 << exponent_bits) - 1) << (precision - 1)
    biased = 0 if whole < 1 << (precision - 1) else exponent - least + 1
    return sign | biased << (precision - 1) | (whole & ((1 << (precision - 1)) - 1))


def plain(value: Fraction | float) -> float:
    """For the cases in which infinities and zeros decide: their like."""
    if isinstance(value, float):
        return value
    return 1.0 if value > 0 else -1.0


def ieee(opcode: str, *values: Fraction | float) -> Fraction | float:
    """An operation before rounding; -0 and what is not finite as a float."""
    if opcode == "fma":
        a, b, c = values
        product = ieee("mul", a, b)
        return ieee("add", product, c)
    if opcode == "sqrt":
        (a,) = values
        if isinstance(a, float):
            return a if a >= 0 or a == 0 else math.nan
        if a < 0:
            return math.nan
        shift = 4 * 64 + 2 * max(0, a.denominator.bit_length())  # more digits than any type has, and a sticky one
        root = math.isqrt((a.numerator << shift) // a.denominator)
        exact = Fraction(root, 1) / Fraction(2) ** (shift // 2)
        return exact if exact * exact == a else exact + Fraction(1, 2 ** (shift // 2 + 8))
    a, b = values
    finite = not any(isinstance(v, float) and not math.isfinite(v) for v in values)
    x, y = plain(a), plain(b)
    if opcode == "sub":
        return ieee("add", a, -b)
    if opcode == "add":
        if not finite:
            return x + y
        total = Fraction(a) + Fraction(b)
        return total if total else (x + y if isinstance(a, float) and isinstance(b, float) else 0.0)
    if opcode == "mul":
        if not finite or isinstance(a, float) or isinstance(b, float):
            return x * y
        return Fraction(a) * Fraction(b)
    if not finite or isinstance(a, float) or isinstance(b, float):
        if isinstance(b, float) and b == 0:
            return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x * math.copysign(1.0, y))
        return x / y
    return Fraction(a) / Fraction(b)


def special(kind: str) -> list[int]:
    """Zeros, subnormals, both ends, halfway cases, infinities, NaNs, and a few others, of both signs."""
    precision, least, most = SHAPES[kind]
    numbers = [
        Fraction(0),
        Fraction(1),
        Fraction(3, 2),
        Fraction(1, 3),
        Fraction(10, 7),
        Fraction(1) + Fraction(1, 2 ** (precision - 1)),
    ]
    numbers += [Fraction(2) ** (least - precision + 1) * k for k in (1, 3, 5)]
    numbers += [
        Fraction(2) ** least,
        Fraction(2) ** least * Fraction(3, 2),
        Fraction(2) ** (least // 2),
        Fraction(2) ** (most // 2) * 3,
    ]
    numbers += [
        Fraction(2) ** most * (2 - Fraction(1, 2 ** (precision - 1))),
        Fraction(2) ** most,
        Fraction(2) ** precision + 1,
    ]
    found = [encoded(v, kind) for v in numbers] + [encoded(math.inf, kind), NAN[kind], NAN[kind] - 1]
    sign = 1 << (8 * SIZES[kind] - 1)
    return found + [v | sign for v in found]


def rows(*lists: Sequence[int], most: int = 4000) -> list[list[int]]:
    """Every combination, or an even part of them, as columns."""
    found = list(itertools.product(*lists))
    step = max(1, -(-len(found) // most))
    step += step > 1 and step % 2 == 0  # so that no list is taken in step with another
    return [list(column) for column in zip(*found[::step], strict=True)]


def same(found: Sequence[int], expected: Sequence[int], columns: Sequence[Sequence[int]]) -> None:
    assert len(found) == len(expected)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a == b, f"of {[hex(column[k]) for column in columns]}: {a:#x}, expected {b:#x}"


# Floating point -------------------------------------------------------------------------------------------------------

FLOAT = [
    (f"{opcode}.rn.{kind}", kind) for opcode in ("add", "sub", "mul", "fma") for kind in ("f16", "bf16", "f32", "f64")
] + [(f"{opcode}.rn.{kind}", kind) for opcode in ("div", "sqrt", "rcp") for kind in ("f32", "f64")]


@pytest.mark.parametrize(("name", "kind"), FLOAT)
def test_rounded_once(name: str, kind: str) -> None:
    opcode = name.split(".")[0]
    count = {"fma": 3, "sqrt": 1, "rcp": 1}.get(opcode, 2)
    columns = rows(*[special(kind)] * count, most=3000)
    found = evaluate(f"{name} D, {', '.join('ABC'[:count])}", kind, [kind] * count, columns)
    one = encoded(Fraction(1), kind)
    expected = []
    for row in zip(*columns, strict=True):
        values = [decoded(bits, kind) for bits in ((one, *row) if opcode == "rcp" else row)]
        expected.append(encoded(ieee("div" if opcode == "rcp" else opcode, *values), kind))
    same(found, expected, columns)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fused_differs_from_two_roundings(kind: str) -> None:
    """The executor could not find a contraction otherwise."""
    near = encoded(1 + Fraction(1, 2 ** (SHAPES[kind][0] - 1)), kind)
    minus = encoded(-(1 + Fraction(1, 2 ** (SHAPES[kind][0] - 2))), kind)
    columns = [[near], [near], [minus]]
    fused = evaluate(f"fma.rn.{kind} D, A, B, C", kind, [kind] * 3, columns)
    assert decoded(fused[0], kind) == Fraction(1, 2 ** (2 * SHAPES[kind][0] - 2))
    apart = evaluate(f"mul.rn.{kind} D, A, B; add.rn.{kind} D, D, C", kind, [kind] * 3, columns)
    assert decoded(apart[0], kind) == 0


@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize(("packed", "kind"), [("f32x2", "f32"), ("f16x2", "f16"), ("bf16x2", "bf16")])
def test_packed_pairs_are_two_operations(opcode: str, packed: str, kind: str) -> None:
    bits, count = 8 * SIZES[kind], 3 if opcode == "fma" else 2
    columns = rows(*[special(kind)] * count, most=1500)
    both = [[low | high << bits for low, high in zip(column, reversed(column), strict=True)] for column in columns]
    found = evaluate(f"{opcode}.rn.{packed} D, {', '.join('ABC'[:count])}", packed, [packed] * count, both)
    low = evaluate(f"{opcode}.rn.{kind} D, {', '.join('ABC'[:count])}", kind, [kind] * count, columns)
    same(found, [a | b << bits for a, b in zip(low, reversed(low), strict=True)], both)


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["min", "max", "min.NaN", "max.NaN"])
def test_extremes(name: str, kind: str) -> None:
    columns = rows(special(kind), special(kind))
    expected = []
    for a, b in zip(*columns, strict=True):
        x, y = decoded(a, kind), decoded(b, kind)
        nans = [isinstance(v, float) and math.isnan(v) for v in (x, y)]
        if all(nans) or (any(nans) and name.endswith("NaN")):
            expected.append(NAN[kind])
        elif any(nans):
            expected.append(b if nans[0] else a)
        else:
            key = [(v, math.copysign(1, v)) for v in (x, y)]
            expected.append(a if (key[0] < key[1]) == name.startswith("min") else b)
    same(evaluate(f"{name}.{kind} D, A, B", kind, [kind] * 2, columns), expected, columns)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_signs(kind: str) -> None:
    (column,) = rows(special(kind))
    top = 1 << (8 * SIZES[kind] - 1)
    same(evaluate(f"neg.{kind} D, A", kind, [kind], [column]), [v ^ top for v in column], [column])
    same(evaluate(f"abs.{kind} D, A", kind, [kind], [column]), [v & ~top for v in column], [column])
    if kind in ("f32", "f64"):
        columns = rows(special(kind), special(kind))
        expected = [(a & top) | (b & ~top) for a, b in zip(*columns, strict=True)]
        same(evaluate(f"copysign.{kind} D, A, B", kind, [kind] * 2, columns), expected, columns)


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", [*COMPARE, *(f"{name}u" for name in COMPARE), "num", "nan"])
def test_comparisons_of_floats(name: str, kind: str) -> None:
    columns = rows(special(kind), special(kind), most=1000)
    expected = []
    for a, b in zip(*columns, strict=True):
        x, y = decoded(a, kind), decoded(b, kind)
        nan = any(isinstance(v, float) and math.isnan(v) for v in (x, y))
        if name in ("num", "nan"):
            expected.append(int(nan == (name == "nan")))
        else:
            unordered = name not in COMPARE
            expected.append(int(unordered if nan else COMPARE[name[:2]](x, y)))
    same(evaluate(f"setp.{name}.{kind} D, A, B", "pred", [kind] * 2, columns), expected, columns)


# Integers and bits ----------------------------------------------------------------------------------------------------


def integers(kind: str) -> list[int]:
    width = WIDTHS[kind]
    found = [
        0,
        1,
        2,
        3,
        7,
        1 << (width - 1),
        (1 << (width - 1)) - 1,
        (1 << width) - 1,
        (1 << width) - 2,
        0x5A & ((1 << width) - 1),
    ]
    return [*found, 0xC3A5_96F0_1E2D_4B78 >> (64 - width), 1 << (width // 2), (1 << (width // 2)) - 1]


def signed(value: int, kind: str) -> int:
    width = WIDTHS[kind]
    value &= (1 << width) - 1
    return value - (1 << width) if kind[0] == "s" and value >> (width - 1) else value


def quotient(a: int, b: int) -> int:
    """Towards zero."""
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


INTEGER: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
    "div": quotient, "rem": lambda a, b: a - quotient(a, b) * b, "mad.lo": lambda a, b, c: a * b + c,
    "neg": lambda a: -a, "abs": abs,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", INTEGER)
def test_integers(name: str, kind: str) -> None:
    if name in ("neg", "abs") and kind[0] == "u":
        with pytest.raises(ptx.PtxError, match=rf"line \d+: {name}.{kind}: 'u"):
            evaluate(f"{name}.{kind} D, A", kind, [kind], [[1]])
        return
    count = {"mad.lo": 3, "neg": 1, "abs": 1}.get(name, 2)
    columns = rows(*[integers(kind)] * count)
    if name in ("div", "rem"):
        columns = [list(c) for c in zip(*[row for row in zip(*columns, strict=True) if row[1]], strict=True)]
    mask = (1 << WIDTHS[kind]) - 1
    expected = [INTEGER[name](*(signed(v, kind) for v in row)) & mask for row in zip(*columns, strict=True)]
    same(evaluate(f"{name}.{kind} D, {', '.join('ABC'[:count])}", kind, [kind] * count, columns), expected, columns)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_products(kind: str) -> None:
    width = WIDTHS[kind]
    columns = rows(integers(kind), integers(kind))
    exact = [signed(a, kind) * signed(b, kind) for a, b in zip(*columns, strict=True)]
    high = evaluate(f"mul.hi.{kind} D, A, B", kind, [kind] * 2, columns)
    same(high, [v >> width & ((1 << width) - 1) for v in exact], columns)
    if width < 64:
        wide = f"{kind[0]}{2 * width}"
        found = evaluate(f"mul.wide.{kind} D, A, B", wide, [kind] * 2, columns)
        same(found, [v & ((1 << 2 * width) - 1) for v in exact], columns)
        third = [k * 0x1234567 & ((1 << 2 * width) - 1) for k in range(len(exact))]
        found = evaluate(f"mad.wide.{kind} D, A, B, C", wide, [kind, kind, wide], [*columns, third])
        same(found, [(v + c) & ((1 << 2 * width) - 1) for v, c in zip(exact, third, strict=True)], columns)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_bits(kind: str) -> None:
    width = WIDTHS[kind]
    mask = (1 << width) - 1
    columns = rows(integers(kind), integers(kind))
    for name, of in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        expected = [of(a, b) for a, b in zip(*columns, strict=True)]
        same(evaluate(f"{name}.{kind} D, A, B", kind, [kind] * 2, columns), expected, columns)
    own = integers(kind)
    same(evaluate(f"not.{kind} D, A", kind, [kind], [own]), [~v & mask for v in own], [own])
    amounts = [0, 1, width // 2, width - 1, width, width + 1, 255, 2**32 - 1]
    columns = rows(own, amounts)
    shifts = list(zip(*columns, strict=True))
    left = [a << n & mask if n < width else 0 for a, n in shifts]
    same(evaluate(f"shl.{kind} D, A, B", kind, [kind, "b32"], columns), left, columns)
    for shift in (kind, f"u{width}", f"s{width}"):
        expected = [signed(a, shift) >> min(n, width) & mask for a, n in shifts]
        same(evaluate(f"shr.{shift} D, A, B", kind, [kind, "b32"], columns), expected, columns)
    if width > 16:
        same(evaluate(f"popc.{kind} D, A", "b32", [kind], [own]), [v.bit_count() for v in own], [own])
        same(evaluate(f"clz.{kind} D, A", "b32", [kind], [own]), [width - v.bit_length() for v in own], [own])
        expected = [int(f"{v:0{width}b}"[::-1], 2) for v in own]
        same(evaluate(f"brev.{kind} D, A", kind, [kind], [own]), expected, [own])


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    width = WIDTHS[kind]
    columns = rows(
        integers(kind), [0, 1, 5, width // 2, width - 1, width, 255, 256], [0, 1, 4, 8, width - 1, width, 255]
    )
    expected = []
    for a, begin, count in zip(*columns, strict=True):
        begin, count = begin & 255, count & 255
        last = min(begin + count - 1, width - 1)
        sign = a >> last & 1 if kind[0] == "s" and count else 0
        bits = [(a >> (begin + i) & 1) if i < count and begin + i < width else sign for i in range(width)]
        expected.append(sum(bit << i for i, bit in enumerate(bits)))
    same(evaluate(f"bfe.{kind} D, A, B, C", kind, [kind, "u32", "u32"], columns), expected, columns)
    if kind[0] == "u":
        b, c = 3, width // 2
        columns = rows(integers(kind), integers(kind))
        mask = ((1 << c) - 1) << b & ((1 << width) - 1)
        expected = [(f & ~mask) | (a << b & mask) for a, f in zip(*columns, strict=True)]
        same(evaluate(f"bfi.b{width} D, A, B, {b}, {c}", kind, [kind] * 2, columns), expected, columns)


def test_permutations_funnels_and_tables() -> None:
    own = integers("b32")
    columns = rows(own, own[::2], [0x3210, 0x7654, 0x5410, 0x0123, 0x8F1B, 0xFFFF, 0x1054])
    expected = []
    for a, b, selector in zip(*columns, strict=True):
        both, found = a | b << 32, 0
        for i in range(4):
            choice = selector >> 4 * i & 15
            byte = both >> 8 * (choice & 7) & 255
            found |= (255 * (byte >> 7) if choice & 8 else byte) << 8 * i
        expected.append(found)
    same(evaluate("prmt.b32 D, A, B, C", "b32", ["b32"] * 3, columns), expected, columns)
    columns = rows(own, own, [0, 1, 8, 31, 32, 33, 255])
    for side, how in itertools.product("lr", ("wrap", "clamp")):
        expected = []
        for a, b, c in zip(*columns, strict=True):
            n = c & 31 if how == "wrap" else min(c, 32)
            expected.append(((b << 32 | a) << n >> 32 if side == "l" else (b << 32 | a) >> n) & 0xFFFFFFFF)
        same(evaluate(f"shf.{side}.{how}.b32 D, A, B, C", "b32", ["b32"] * 3, columns), expected, columns)
    columns = rows(own, own, own[::3])
    for table in (0xE8, 0x96, 0x80, 0xFE, 0x1D):
        expected = [
            sum(((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1))) & 1) << i for i in range(32))
            for a, b, c in zip(*columns, strict=True)
        ]
        same(evaluate(f"lop3.b32 D, A, B, C, {table}", "b32", ["b32"] * 3, columns), expected, columns)


@pytest.mark.parametrize("kind", ["u16", "s16", "b32", "u32", "s32", "u64", "s64"])
def test_comparisons_of_integers(kind: str) -> None:
    columns = rows(integers(kind), integers(kind))
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"} if kind[0] == "u" else {}
    for name in ("eq", "ne") if kind[0] == "b" else (*COMPARE, *unsigned):
        of = COMPARE[unsigned.get(name, name)]
        expected = [int(of(signed(a, kind), signed(b, kind))) for a, b in zip(*columns, strict=True)]
        same(evaluate(f"setp.{name}.{kind} D, A, B", "pred", [kind] * 2, columns), expected, columns)


@pytest.mark.parametrize("gate", ["and", "or", "xor"])
def test_predicates(gate: str) -> None:
    columns = [[0, 1, 0, 1, 0, 1, 0, 1], [5, 5, 7, 7, 5, 5, 7, 7], [6] * 8]
    of = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}[gate]
    less = [int(a < b) for a, b in zip(columns[1], columns[2], strict=True)]
    kinds = ["pred", "s32", "s32"]
    found = evaluate(f"setp.lt.{gate}.s32 D, B, C, A", "pred", kinds, columns)
    assert found == [of(a, p) for a, p in zip(less, columns[0], strict=True)]
    second = evaluate(f"setp.lt.{gate}.s32 %p1|D, B, C, A", "pred", kinds, columns)
    assert second == [of(1 - a, p) for a, p in zip(less, columns[0], strict=True)]
    assert evaluate(f"setp.lt.s32 D, B, C; {gate}.pred D, D, A", "pred", kinds, columns) == found
    assert evaluate("not.pred D, A", "pred", ["pred"], [columns[0]]) == [1 - p for p in columns[0]]
    assert evaluate("selp.b32 D, B, C, A", "b32", kinds, columns) == [
        b if p else 6 for p, b in zip(*columns[:2], strict=True)
    ]
    guarded = evaluate("mov.b32 D, 9; @A mov.b32 D, B; @!A add.s32 D, C, 1", "b32", kinds, columns)
    assert guarded == [b if p else 7 for p, b in zip(*columns[:2], strict=True)]


# Moves and conversions ------------------------------------------------------------------------------------------------


def test_moves() -> None:
    own = integers("b64")
    assert evaluate("mov.b64 D, A", "b64", ["b64"], [own]) == own
    assert evaluate("{ .reg .b32 %r1; mov.b32 %r1, 5; } mov.b64 D, A", "b64", ["b64"], [own]) == own
    swapped = "mov.b64 {%r3, %r4}, A; mov.b64 D, {%r4, %r3}"
    assert evaluate(swapped, "b64", ["b64"], [own]) == [(v >> 32) | (v & 0xFFFFFFFF) << 32 for v in own]
    halves = "{ .reg .b16 h<4>; mov.b32 {h0, h1}, A; mov.b32 D, {h1, h0}; }"
    narrow = integers("b32")
    assert evaluate(halves, "b32", ["b32"], [narrow]) == [(v >> 16) | (v & 0xFFFF) << 16 for v in narrow]
    assert evaluate("mov.b64 {_, D}, A", "b32", ["b64"], [own]) == [v >> 32 for v in own]
    assert evaluate("mov.b32 D, 0f3FC00000", "b32", ["b32"], [[0]]) == [0x3FC00000]
    assert evaluate("mov.b64 D, 0d3FF8000000000000", "b64", ["b64"], [[0]]) == [0x3FF8000000000000]
    assert evaluate("mov.u32 D, -2", "b32", ["b32"], [[0]]) == [0xFFFFFFFE]
    assert evaluate("cvta.to.global.u64 D, A", "u64", ["u64"], [own]) == own
    lanes = list(range(40))
    for name, expected in (
        ("%tid.x", lanes), ("%laneid", [k % 32 for k in lanes]), ("%warpid", [k // 32 for k in lanes]),
        ("%ntid.x", [64] * 40), ("%ctaid.x", [0] * 40), ("%nctaid.x", [1] * 40), ("%tid.y", [0] * 40),
        ("%ntid.z", [1] * 40),
    ):  # fmt: skip
        assert evaluate(f"mov.u32 D, {name}", "b32", ["b32"], [lanes]) == expected


FLOAT_TO_FLOAT = [
    ("cvt.f32.f16", "f32", "f16"), ("cvt.f32.bf16", "f32", "bf16"), ("cvt.f64.f32", "f64", "f32"),
    ("cvt.rn.f32.f64", "f32", "f64"), ("cvt.rn.f16.f32", "f16", "f32"), ("cvt.rn.bf16.f32", "bf16", "f32"),
    ("cvt.rn.f16.f64", "f16", "f64"), ("cvt.rn.f16.bf16", "f16", "bf16"), ("cvt.rn.bf16.f16", "bf16", "f16"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "to", "source"), FLOAT_TO_FLOAT)
def test_conversions_of_floats(name: str, to: str, source: str) -> None:
    own = special(source)
    if SHAPES[source][0] > SHAPES[to][0]:  # halfway between two, just above and just below
        for bits in special(to):
            value = decoded(bits, to)
            if isinstance(value, Fraction):
                step = Fraction(2) ** (SHAPES[to][1] - SHAPES[to][0])
                own += [encoded(value + d * step, source) for d in (1, Fraction(255, 256), Fraction(257, 256), -1)]
                half = abs(value) / 2 ** SHAPES[to][0]
                own += [encoded(value + half, source), encoded(value + half * Fraction(513, 512), source)]
    own = sorted(set(own))
    same(evaluate(f"{name} D, A", to, [source], [own]), [encoded(decoded(v, source), to) for v in own], [own])


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_two_are_rounded_into_one_register(half: str) -> None:
    """The first source comes to lie in the upper half."""
    columns = rows(special("f32"), special("f32"))
    expected = [
        encoded(decoded(a, "f32"), half) << 16 | encoded(decoded(b, "f32"), half) for a, b in zip(*columns, strict=True)
    ]
    same(evaluate(f"cvt.rn.{half}x2.f32 D, A, B", "b32", ["f32"] * 2, columns), expected, columns)


@pytest.mark.parametrize(("how", "of"), [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_floats_to_integers(how: str, of: Callable[[Fraction], int], source: str) -> None:
    numbers = [Fraction(k, 4) for k in range(-14, 15)] + [
        Fraction(2) ** 31 - 1,
        Fraction(2) ** 31,
        Fraction(2) ** 40,
        -(Fraction(2) ** 33),
    ]
    own = [encoded(v, source) for v in numbers] + [encoded(v, source) for v in (math.inf, -math.inf, math.nan, -0.0)]
    for to in ("s32", "u32", "s16", "s64", "u64"):
        low, high = (0, 2 ** WIDTHS[to] - 1) if to[0] == "u" else (-(2 ** (WIDTHS[to] - 1)), 2 ** (WIDTHS[to] - 1) - 1)
        expected = []
        for bits in own:
            v = decoded(bits, source)
            if isinstance(v, float):
                highest = 1 << (WIDTHS[to] - 1) if "64" in source + to else 0
                value = highest if math.isnan(v) else 0 if v == 0 else (high if v > 0 else low)
            else:
                value = min(max(of(v), low), high)
            expected.append(value & (2 ** WIDTHS[to] - 1))
        same(evaluate(f"cvt.{how}.{to}.{source} D, A", to, [source], [own]), expected, [own])
    whole = evaluate(f"cvt.{how}.{source}.{source} D, A", source, [source], [own[: len(numbers)]])
    for bits, before in zip(whole, own, strict=False):
        assert (decoded(bits, source) or 0) == of(Fraction(decoded(before, source)))


def test_integers_to_others() -> None:
    for source, to in itertools.product(("u16", "s16", "u32", "s32", "u64", "s64"), ("f32", "f64")):
        own = integers(source)
        expected = [encoded(Fraction(signed(v, source)) or 0.0, to) for v in own]
        same(evaluate(f"cvt.rn.{to}.{source} D, A", to, [source], [own]), expected, [own])
    kinds = ("u16", "s16", "u32", "s32", "u64", "s64")
    for source, to in itertools.product(kinds, kinds):
        own, mask = integers(source), 2 ** WIDTHS[to] - 1
        expected = [signed(v, source) & mask for v in own]
        same(evaluate(f"cvt.{to}.{source} D, A", to, [source], [own]), expected, [own])
        low, high = (0, mask) if to[0] == "u" else (-(2 ** (WIDTHS[to] - 1)), 2 ** (WIDTHS[to] - 1) - 1)
        expected = [min(max(signed(v, source), low), high) & mask for v in own]
        same(evaluate(f"cvt.sat.{to}.{source} D, A", to, [source], [own]), expected, [own])


# Between threads ------------------------------------------------------------------------------------------------------

WARP = list(range(100, 132))
FULL = 0xFFFFFFFF


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    for by, clamp in ((0, 31), (1, 31), (16, 31), (5, 31), (3, 0x1807), (1, 0x1C03), (2, 0), (7, 0x0800 | 31)):
        values, valid = [], []
        for lane in range(32):
            bound, segment = clamp & 31, clamp >> 8 & 31
            most, least = (lane & segment) | (bound & ~segment), lane & segment
            j = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": least | (by & ~segment)}[mode]
            good = j >= most if mode == "up" else j <= most
            values.append(WARP[j if good else lane])
            valid.append(int(good))
        operands = f"A, {by}, {clamp}, {FULL}"
        assert evaluate(f"shfl.sync.{mode}.b32 D, {operands}", "b32", ["b32"], [WARP]) == values
        assert evaluate(f"shfl.sync.{mode}.b32 %r3|D, {operands}", "pred", ["b32"], [WARP]) == valid


def test_votes_and_reductions() -> None:
    for odd in ([k % 2 for k in range(32)], [1] * 32, [0] * 32):
        ballot = sum(v << k for k, v in enumerate(odd))
        assert evaluate(f"vote.sync.ballot.b32 D, A, {FULL}", "b32", ["pred"], [odd]) == [ballot] * 32
        for mode, expected in (("all", all(odd)), ("any", any(odd)), ("uni", len(set(odd)) == 1)):
            assert evaluate(f"vote.sync.{mode}.pred D, A, {FULL}", "pred", ["pred"], [odd]) == [int(expected)] * 32
    own = [(k * 0x9E3779B9) & FULL for k in range(1, 33)]
    lower = "setp.lt.u32 %p1, %r1, 8; "  # eight threads only
    for how, kind in (("add", "u32"), ("min", "s32"), ("max", "u32"), ("and", "b32"), ("or", "b32"), ("xor", "b32")):
        values = [signed(v, kind) for v in own]
        of: Callable[[Sequence[int]], int] = {
            "add": sum, "min": min, "max": max, "and": partial(reduce, int.__and__), "or": partial(reduce, int.__or__),
            "xor": partial(reduce, int.__xor__),
        }[how]  # fmt: skip
        expected = of(values) & FULL
        assert evaluate(f"redux.sync.{how}.{kind} D, A, {FULL}", "b32", ["b32"], [own]) == [expected] * 32
        found = evaluate(f"mov.b32 D, 0; {lower}@%p1 redux.sync.{how}.{kind} D, A, 255", "b32", ["b32"], [own])
        assert found == [of(values[:8]) & FULL] * 8 + [0] * 24


# What is known, and what is not ---------------------------------------------------------------------------------------


def test_every_instruction_that_is_known_is_tested() -> None:
    """By an opcode that is followed by a type, in this file's PTX, or named in its tables."""
    source = Path(__file__).read_text(encoding="utf-8")
    for opcode in KNOWN:
        assert re.search(rf'\b{opcode}\.(?:\w+\.)*(?:[busf]\d+|[busf]?{{|pred|rn)|"{opcode}(?:\.\w+)?"', source), opcode


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("tanh.approx.f32 D, A", "the instruction tanh.approx.f32 is not known here"),
        ("add.rz.f32 D, A, A", "add.rz.f32: rounding rz is not known here"),
        ("add.f32 D, A, A", "add.f32: without .rn it may be fused with its neighbours"),
        ("mul.rn.ftz.f32 D, A, A", "mul.rn.ftz.f32: its result is not one that is rounded once"),
        ("div.full.f32 D, A, A", "div.full.f32: its result is not one that is rounded once"),
        ("div.approx.f32 D, A, A", "div.approx.f32: its result is not one"),
        ("sqrt.approx.f32 D, A", "sqrt.approx.f32: its result is not one"),
        ("sqrt.rn.ftz.f32 D, A", "sqrt.rn.ftz.f32: its result is not one"),
        ("cvt.rn.ftz.f16.f32 D, A", "cvt.rn.ftz.f16.f32: flushing of subnormals is not known here"),
        ("cvt.f16.f32 D, A", "cvt.f16.f32: rounding None from f32 to f16 is not known here"),
        ("add.rn.f32 D, A", "add.rn.f32: 2 operands, 3 are known"),
        ("add.rn.f64 D, A, A", "A has 32 bits, 64 are wanted"),
        ("add.wild.s32 D, A, A", "add.wild.s32: 'wild' where one of"),
        ("mov.b32 D, %clock", "the register %clock is not known here"),
        ("ld.local.b32 D, [%rd1]", "ld.local.b32: 'local' where one of param, global, shared is known"),
        ("ld.global.b32 D, [nobody]", "the address .* is not known here"),
        ("ld.param.b32 D, [nobody]", "is no parameter of the kernel"),
        ("membar.gl", "the instruction membar.gl is not known here"),
        ("atom.global.add.u32 D, [%rd1], A", "where one of u64, s64 is known"),
        ("bra nowhere", "bra to nowhere: no such label"),
        ("L: mov.b32 D, A; L: mov.b32 D, A", "the label L is there twice"),
        ("mul.f16 D, A, A", "mul.f16: without .rn it may be fused"),
        ("setp.lo.s32 %p1, A, A", "setp.lo.s32: only unsigned integers are lower or higher"),
        ("mov.b32 D, 010", "010 is not declared|the operand 010 is not known"),
        ("mov.b32 D, foo", "mov.b32: foo is not declared, or is no operand"),
        ("mov.b32 D, 0; rem.u32 D, A, D", "rem.u32: a division by zero, whose result is not specified"),
        ("setp.ne.s32 %p1, %r1, 3; bar.sync 16", "bar.sync of 1 operands is not known here"),
        ("call foo", "the instruction call is not known here"),
        ("setp.lt.s32 %p1, A, A; bar.red.popc.u32 D, 0, %p1", "is not known here"),
        ("@A mov.b32 D, A", "A is no predicate"),
        (".local .b32 x", ".local is not known here"),
    ],
)
def test_what_is_not_known_is_an_error_with_its_line(instruction: str, message: str) -> None:
    with pytest.raises(ptx.PtxError, match=message) as error:
        evaluate(instruction, "b32", ["b32"], [[1]])
    assert str(error.value).startswith("line ")


def kernel(
    body: str, head: str = ".param .u64 p, .param .f32 x, .param .align 8 .b8 s[12]", more: str = ".reqntid 64"
) -> str:
    declared = ".reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<9>;"
    return f"{HEAD}.visible .entry k({head})\n{more}\n{{\n{declared}\n{body}\nret;\n}}\n"


def changed(body: str, atomic: str, dtype: Any = np.uint64) -> list[int]:
    """What a launch of 64 threads leaves in two words that begin as 7."""
    words = np.full(2, 7, dtype=dtype)
    memory = ptx.Memory()
    memory.add("words", words.ctypes.data, words.nbytes, words.itemsize, writable=True, atomic=atomic)
    head = "ld.param.u64 %rd1, [p]; mov.u32 %r1, %tid.x; cvt.u64.u32 %rd2, %r1; and.b32 %r2, %r1, 31;"
    ptx.launch(ptx.parse(kernel(f"{head} {body}")), 1, [words.ctypes.data, 1.0, bytes(12)], memory)
    return [int(word) for word in words]


def test_additions_to_memory() -> None:
    """All threads to one word; what was there before is another number for each."""
    assert changed("red.global.gpu.relaxed.add.u64 [%rd1], %rd2;", "add") == [7 + sum(range(64)), 7]
    body = "atom.global.gpu.relaxed.add.u64 %rd3, [%rd1], 1; red.global.add.u64 [%rd1+8], %rd3;"
    assert changed(body, "add") == [7 + 64, 7 + sum(range(7, 71))]
    wrapped = changed("not.b64 %rd2, %rd2; red.global.add.u64 [%rd1], %rd2;", "add")
    assert wrapped[0] == (7 - sum(range(1, 65))) % 2**64
    with pytest.raises(ptx.PtxError, match="of words, which is for that alone: addition by words of 8 bytes"):
        changed("ld.global.u64 %rd3, [%rd1];", "add")
    with pytest.raises(ptx.PtxError, match=r"an addition at .* of words, which is no atomic memory"):
        changed("red.global.add.u64 [%rd1], %rd2;", "")


def test_bits_that_are_set_in_memory() -> None:
    """All threads to one word, of which what was there before tells those that came later."""
    each = "shl.b32 %r3, 1, %r2;"
    assert changed(f"{each} red.global.gpu.relaxed.or.b32 [%rd1+4], %r3;", "or", np.uint32) == [7, FULL]
    few = f"{each} setp.lt.u32 %p1, %r2, 5; @%p1 atom.global.or.b32 %r4, [%rd1], %r3;"
    assert changed(f"{few} @%p1 red.global.or.b32 [%rd1+4], %r4;", "or", np.uint32) == [31, 31]
    with pytest.raises(ptx.PtxError, match="of words, which is for that alone: setting of bits by words of 4 bytes"):
        changed("st.global.u32 [%rd1], %r1;", "or", np.uint32)
    with pytest.raises(ptx.PtxError, match=r"a setting of bits at .* of words, which is no atomic memory"):
        changed("red.global.or.b32 [%rd1], %r1;", "", np.uint32)
    with pytest.raises(ptx.PtxError, match="of words, which is for that alone: addition by words of 8 bytes"):
        changed("red.global.or.b32 [%rd1], %r1;", "add")
    with pytest.raises(ptx.PtxError, match="of words, which is for that alone: setting of bits by words of 8 bytes"):
        changed("red.global.or.b32 [%rd1], %r1;", "or")
    with pytest.raises(ptx.PtxError, match="where one of b32 is known"):
        changed("red.global.or.b64 [%rd1], %rd2;", "or")


def test_parameters_by_their_address() -> None:
    """As compilers take it of what is passed by value; and nothing beside them."""
    found = np.zeros(1, dtype=np.uint64)
    for offset, message in ((4, ""), (12, "a load of a parameter at"), (2, "a load of a parameter at")):
        memory = ptx.Memory()
        memory.add("found", found.ctypes.data, found.nbytes, 4, writable=True)
        body = (
            f"ld.param.u64 %rd1, [p]; mov.b64 %rd2, s; ld.param.u32 %r1, [%rd2+{offset}]; "
            "mov.u32 %r2, %tid.x; setp.ne.s32 %p1, %r2, 0; @%p1 bra END; "
            "st.global.u32 [%rd1], %r1; END: mov.u32 %r2, 0;"
        )
        arguments = [found.ctypes.data, 1.0, bytes(range(12))]
        if message:
            with pytest.raises(ptx.PtxError, match=message):
                ptx.launch(ptx.parse(kernel(body)), 1, arguments, memory)
        else:
            ptx.launch(ptx.parse(kernel(body)), 1, arguments, memory)
            assert found[0] == 0x07060504


def test_a_kernel_without_reqntid() -> None:
    with pytest.raises(ptx.PtxError, match=r"k has no \.reqntid: the launch must say how many threads a block has"):
        ptx.launch(ptx.parse(kernel("", more="")), 1, [0, 1.0, bytes(12)], ptx.Memory())
    ptx.launch(ptx.parse(kernel("", more=".maxntid 128, 1, 1")), 1, [0, 1.0, bytes(12)], ptx.Memory(), threads=128)
    with pytest.raises(ptx.PtxError, match="blocks of 256 threads: k allows 1 to 128"):
        ptx.launch(ptx.parse(kernel("", more=".maxntid 128")), 1, [0, 1.0, bytes(12)], ptx.Memory(), threads=256)
    with pytest.raises(ptx.PtxError, match="k is made for blocks of 64 threads, not of 32"):
        ptx.launch(ptx.parse(kernel("")), 1, [0, 1.0, bytes(12)], ptx.Memory(), threads=32)
    with pytest.raises(ptx.PtxError, match=r"\.reqntid 32, 2: only blocks of one dimension"):
        ptx.parse(kernel("", more=".reqntid 32, 2"))


@pytest.mark.parametrize(
    ("blocks", "arguments", "message"),
    [
        (1, [0, 1.0], "k has 3 parameters, 2 arguments were given"),
        (1, [0, 1.0, bytes(11)], "argument 2 of k, of type bytes: .* where 12 bytes are wanted"),
        (1, [0, 1, bytes(12)], "argument 1 of k, of type f32: 1 where a float is wanted"),
        (1, [0.0, 1.0, bytes(12)], "argument 0 of k, of type u64: 0.0 where an integer of 64 bits is wanted"),
        (1, [2**64, 1.0, bytes(12)], "argument 0 of k, of type u64: .* an integer of 64 bits"),
        (0, [0, 1.0, bytes(12)], "a launch of 0 blocks"),
    ],
)
def test_wrong_arguments_are_named(blocks: int, arguments: list[Any], message: str) -> None:
    with pytest.raises(ptx.PtxError, match=message):
        ptx.launch(ptx.parse(kernel("")), blocks, arguments, ptx.Memory())


# Memory and control ---------------------------------------------------------------------------------------------------


def ran(body: str, floats: int = 64, blocks: int = 1, writable: bool = True, skew: int = 0, **more: Any) -> Any:
    """`body` on a buffer of floats, whose address is in %rd1 and the thread's own place in %rd2; what it holds then."""
    room = np.arange(floats + 4, dtype=np.float32)
    first = (-room.ctypes.data // 4) % 4
    memory, address = ptx.Memory(), room[first:].ctypes.data + 4 * skew
    memory.add("x", address, 4 * floats - 4 * skew, 4, writable)
    place = (
        "ld.param.u64 %rd1, [p]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.s32 %r3, %r2, 64, %r1;\n"
        "mad.wide.u32 %rd2, %r3, 4, %rd1;\n"
    )
    report = ptx.launch(
        ptx.parse(kernel(place + body)), blocks, [address, 2.5, struct.pack("<3i", 7, 8, 9)], memory, **more
    )
    return room[first : first + floats], memory, report


def test_parameters_and_vectors() -> None:
    body = (
        "ld.param.f32 %r4, [x]; ld.param.v2.u32 {%r5, %r6}, [s]; ld.param.s32 %r7, [s+8]; cvt.rn.f32.s32 %r8, %r7;"
        "st.global.b32 [%rd2], %r8;"
        "setp.ne.s32 %p1, %r1, 0; @%p1 ret; cvt.rn.f32.u32 %r5, %r5; cvt.rn.f32.u32 %r6, %r6;"
        "st.global.v4.b32 [%rd1+0], {%r4, %r5, %r6, %r4};"
    )
    with pytest.raises(ptx.PtxError, match=r"thread 0 stores x at .*, which another thread of the launch touches"):
        ran(body)
    room, memory, _ = ran(body.replace("st.global.b32 [%rd2]", "setp.lt.s32 %p2, %r1, 4; @!%p2 st.global.b32 [%rd2]"))
    assert room[:5].tolist() == [2.5, 7, 8, 2.5, 9]
    assert memory.moved("x") == (0, 4 * 60 + 16)
    vector = "setp.lt.s32 %p1, %r1, 16; @!%p1 ret; mad.wide.u32 %rd2, %r1, 16, %rd1; "
    room, memory, _ = ran(f"{vector} ld.global.v2.b64 {{%rd4, %rd5}}, [%rd2]; st.global.v2.b64 [%rd2], {{%rd5, %rd4}};")
    assert room[:8].tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert memory.touched("x") == (64, 64)
    room, _, _ = ran(
        f"{vector} ld.global.L1::evict_first.v4.f32 {{%r4, %r5, _, %r7}}, [%rd2]; st.global.f32 [%rd2+8], %r4;"
    )
    assert room[:8].tolist() == [0, 1, 0, 3, 4, 5, 4, 7]


def test_narrow_accesses_extend() -> None:
    body = "ld.global.s8 %r4, [%rd2+3]; cvt.rn.f32.s32 %r4, %r4; st.global.b32 [%rd2], %r4;"
    room, _, _ = ran("mov.b32 %r4, 0x8001FF80; st.global.b32 [%rd2], %r4;" + body)
    assert set(room.tolist()) == {-128.0}
    room, _, _ = ran(
        "mov.b32 %r4, 0x8001FF80; st.global.b32 [%rd2], %r4;" + body.replace("s8", "u8").replace("+3", "+1")
    )
    assert set(room.tolist()) == {255.0}
    room, _, _ = ran("mov.b32 %r4, 0x40490FDB; st.global.b8 [%rd2], %r4; st.global.b8 [%rd2+3], %r4;", floats=64)
    assert room.view(np.uint32)[1] == 0xDB8000DB  # 1.0 is 3F800000


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        ("ld.global.b32 %r4, [%rd2+4];", {}, r"a load of 4 bytes at 0x\w+ by thread 63 is out of bounds: .*, x, is"),
        ("ld.global.b32 %r4, [%rd2+-4];", {}, "by thread 0 is out of bounds"),
        ("mov.b32 %r4, 0; st.global.b32 [%rd2], %r4;", {"writable": False}, "a store to x, which is only to be read"),
        ("ld.global.v2.b32 {%r4, %r5}, [%rd1+4];", {}, "a load of 8 bytes of x at .* by thread 0 is not aligned"),
        ("ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1];", {"skew": 1}, "a load of 16 bytes of x .* is not aligned"),
        ("mov.b32 %r4, 0; st.global.b32 [%rd1], %r4;", {}, "thread 0 stores x at .*, which another thread"),
        ("setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], %r1; ld.global.b32 %r4, [%rd1];", {}, "loads x at"),
        ("ld.global.b32 %r4, [%rd1]; setp.eq.s32 %p1, %r1, 3; @%p1 st.global.b32 [%rd1], %r4;", {}, "stores x at"),
        ("st.global.b32 [%rd2], %r1; ld.global.nc.b32 %r4, [%rd2];", {}, r"a load of x past coherence \(.nc\)"),
        ("mov.b64 %rd3, -2; ld.global.b16 %h1, [%rd3];", {}, "a load of 2 bytes at 0xf+e .* out of bounds"),
        ("LOOP: bra LOOP;", {}, "the launch does not end"),
        ("shfl.sync.bfly.b32 %r4, %r1, 1, 31, 7;", {}, "the mask does not name exactly the threads"),
        ("setp.lt.s32 %p1, %r1, 32; @%p1 bar.sync 0;", {}, "32 threads wait at barrier 0 for others, which never come"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bar.sync 0;", {}, "bar.sync: some threads of a warp take it and others do not"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bra.uni ON; ON:", {}, "bra.uni: some threads of a warp take it"),
    ],
)  # fmt: skip
def test_what_no_kernel_may_do(
    body: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptx.machine.MOST", 1000)
    if "barrier" in message:  # the others wait elsewhere
        body += " setp.ge.s32 %p2, %r1, 32; @%p2 bar.sync 1;"
    with pytest.raises(ptx.PtxError, match=message):
        ran(body, **options)


def test_reads_are_shared() -> None:
    _, memory, _ = ran("ld.global.nc.b32 %r4, [%rd1]; ld.global.b32 %r4, [%rd1+4];", writable=False)
    assert memory.moved("x") == (64 * 8, 0)


def test_threads_part_and_meet() -> None:
    """Each thread takes a loop of its own length; the sums are those of a plain loop, and all meet for the store."""
    body = (
        "mov.b32 %r4, 0; mov.b32 %r5, 0;\n"
        "LOOP: setp.ge.s32 %p1, %r5, %r1; @%p1 bra DONE;\n"
        "and.b32 %r6, %r5, 1; setp.eq.s32 %p2, %r6, 0; @%p2 bra EVEN; add.s32 %r4, %r4, 100; bra.uni NEXT;\n"
        "EVEN: add.s32 %r4, %r4, %r5;\n"
        "NEXT: add.s32 %r5, %r5, 1; bra LOOP;\n"
        "DONE: cvt.rn.f32.s32 %r4, %r4; st.global.f32 [%rd2], %r4;"
    )
    room, _, report = ran(body)
    assert room.tolist() == [sum(100 if k % 2 else k for k in range(n)) for n in range(64)]
    assert report.instructions["st.global.f32"] == 64
    assert report.instructions["bra"] > 64


def test_shared_memory_and_barriers() -> None:
    """The neighbour's number, through shared memory: with a barrier it is there, without it is a race."""
    declared = ".shared .align 16 .b8 room[256];"
    body = (
        f"{declared} mov.u32 %r4, room; shl.b32 %r5, %r1, 2; add.s32 %r4, %r4, %r5; add.s32 %r6, %r3, 1000;\n"
        "st.shared.b32 [%r4], %r6; BARRIER xor.b32 %r5, %r5, 4; mov.u32 %r4, room; add.s32 %r4, %r4, %r5;\n"
        "ld.shared.b32 %r7, [%r4]; cvt.rn.f32.s32 %r7, %r7; st.global.f32 [%rd2], %r7;"
    )
    room, _, _ = ran(body.replace("BARRIER", "bar.sync 0;"), floats=192, blocks=3)
    assert room.tolist() == [1000 + (k ^ 1) for k in range(192)]
    with pytest.raises(ptx.PtxError, match="a race in shared memory"):
        ran(body.replace("BARRIER", ""), floats=192, blocks=3)
    with pytest.raises(ptx.PtxError, match="beyond its 256"):
        ran(body.replace("BARRIER", "bar.sync 0;").replace("st.shared.b32 [%r4]", "st.shared.b32 [%r4+4]"))
    with pytest.raises(ptx.PtxError, match="shared memory is not aligned"):
        ran(
            body.replace("256", "260")
            .replace("BARRIER", "bar.sync 0;")
            .replace("st.shared.b32 [%r4]", "st.shared.b32 [%r4+2]")
        )
    with pytest.raises(ptx.PtxError, match="beyond its 256"):
        ran(body.replace("BARRIER", "bar.sync 0;").replace("st.shared.b32 [%r4]", "st.shared.b32 [%r4+-4]"))


@pytest.mark.parametrize(
    "body",
    ["st.global.b32 [%rd2], %r8;", "@%p3 mov.b32 %r4, 1;", "@%p3 bra ON; ON:", "max.s32 %r4, %r1, %r8;",
     "setp.ne.s32 %p1, %r1, 7; @%p1 mov.b32 %r8, 0; add.s32 %r4, %r8, 1;"],
)  # fmt: skip
def test_a_register_that_was_never_written_is_an_error(body: str) -> None:
    with pytest.raises(ptx.PtxError, match=r"thread \d+ reads the register %[rp]\d, which it has never written"):
        ran(body)
    room, _, _ = ran("mov.b32 %r8, 0; setp.ne.s32 %p3, %r8, 0;" + body)
    assert room[0] == 0


def test_half_of_a_register_may_be_left_unwritten() -> None:
    """As compilers do for the unused half of a packed operation; the half that is used is right, the other no zero."""
    packed = "mov.b64 %rd3, {%r1, %r8}; add.rn.f32x2 %rd4, %rd3, %rd3; mov.b64 {%r4, %r5}, %rd4;"
    assert set(ran(f"{packed} st.global.b32 [%rd2], %r4;")[0].view(np.uint32)) == {2 * k for k in range(64)}
    assert 0 not in ran(f"{packed} st.global.b32 [%rd2], %r5;")[0]


def test_memory_that_is_none() -> None:
    memory = ptx.Memory()
    with pytest.raises(ValueError, match="x of 4 bytes at 0x0 is no memory of a process"):
        memory.add("x", 0, 4)
    with pytest.raises(ValueError, match="itemsize=3 of x"):
        memory.add("x", 1 << 20, 4, 3)
    memory.add("x", 1 << 20, 64)
    memory.add("y", (1 << 20) + 60, 64)
    with pytest.raises(ValueError, match="x and y overlap in memory"):
        memory.seal()
    with pytest.raises(ptx.PtxError, match="one kernel is expected, found are"):
        ptx.parse(HEAD)
