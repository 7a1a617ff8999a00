"""The step in Triton: rules, formats and movers (numerics, sections 3 to 8), for CUDA and ROCm devices.

A program takes one chunk of one segment: chunk -> segment -> row, by the records of `layout.py` (`device_copy.py`
brings them to the device). Blocks of an aligned segment take the vector path; the rest of it, and all of any other
segment, the masked path, which promises nothing of addresses.

The rules are transcriptions of the reference: same names, same order, every operation rounded on its own. Launch with
`enable_fp_fusion=False`. What is `constexpr` comes from what is there (formats, amsgrad, a momentum buffer), never from
a hyperparameter. Only `triton.py` beside this imports this module, and only when it is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout import Moving, Place

# Codes of formats.py.
FLOAT64 = tl.constexpr(1)
FLOAT32 = tl.constexpr(2)
BFLOAT16 = tl.constexpr(3)
FLOAT16 = tl.constexpr(4)
BFLOAT16_STOCHASTIC = tl.constexpr(5)
SPLIT24_STOCHASTIC = tl.constexpr(8)
BFLOAT16_COPY = tl.constexpr(9)
# For functions of the compiler alone: those in 8 bits, those that are rounded by random bits.
EIGHT_BITS = (11, 12, 13, 14)
STOCHASTIC = (5, 8, 12, 14)

TILE = tl.constexpr(32)  # neighbours that share a scale, where states are in 8 bits
LOST = tl.constexpr(20)  # bits of a float32 that these do not have

MOVING_WORDS = tl.constexpr(Moving.WORDS)
ORIGIN = tl.constexpr(Place.ORIGIN)
OUTPUT = tl.constexpr(Place.OUTPUT)
MARKS = tl.constexpr(Place.MARKS)
MARKED = tl.constexpr(Place.MARKED)
ADDRESSES = tl.constexpr(Place.ADDRESSES)


@triton.constexpr_function
def has(names, name):
    """Is there a state of that name?"""
    return name in names


@triton.constexpr_function
def position(names, name):
    """Of a scalar in a row."""
    return list(names).index(name)


@triton.constexpr_function
def arithmetic(formats):
    """The format of the arithmetic type."""
    return 1 if formats[0] == 1 else 2


@triton.constexpr_function
def is_split(format):
    """A bfloat16 with a remainder."""
    return format in (6, 7, 8)


@triton.constexpr_function
def is_copy(format):
    """Of a float32 master."""
    return format in (9, 10)


@triton.constexpr_function
def is_tiled(format):
    """In 8 bits, with a scale for 32 elements."""
    return format in EIGHT_BITS


@triton.constexpr_function
def is_signed(format):
    """Of these: may an element be negative?"""
    return format in (11, 12)


@triton.constexpr_function
def per_element(format):
    """How many elements have one of a format's part."""
    return 32 if format in EIGHT_BITS else 1


@triton.constexpr_function
def tiled(formats):
    """Has some role scales?"""
    return any(format in EIGHT_BITS for format in formats)


@triton.constexpr_function
def lost(format):
    """Bits of a float32 that a split format does not store."""
    return 0 if format == 6 else 8


@triton.constexpr_function
def part_of(formats, role):
    """Where among the addresses that of a role's part is: they follow those of all roles. Its own, if it has none."""
    parted = [own for own in range(len(formats)) if formats[own] >= 6]
    return len(formats) + parted.index(role) if role in parted else role


@triton.constexpr_function
def parts(formats):
    """How many roles have a part."""
    return sum(1 for format in formats if format >= 6)


@triton.constexpr_function
def is_scale(formats, at):
    """Is what lies there the scales of a role?"""
    return at >= len(formats) and [own for own in formats if own >= 6][at - len(formats)] in EIGHT_BITS


@triton.constexpr_function
def vector(formats, at):
    """Bytes of a role or a part in one vector access, where the widest has 16: more would want another layout."""
    size = {1: 8, 2: 4, 3: 2, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2, 9: 2, 10: 2, 11: 1, 12: 1, 13: 1, 14: 1}
    of_part = {6: 2, 7: 1, 8: 1, 9: 4, 10: 4, 11: 0, 12: 0, 13: 0, 14: 0}  # scales are read one by one
    sizes = [size[format] for format in formats] + [of_part[format] for format in formats if format in of_part]
    return max(16 * sizes[at] // max(sizes), 1)


@triton.constexpr_function
def total(sizes, which):
    """How many scalars (0), outputs (1), numbers (2), sums among these (3) all epilogues have; which ones mark (4)."""
    return sum(own[which] for own in sizes)


@triton.constexpr_function
def place(sizes, e, which, first):
    """Where those of one begin, if those of the first one do at `first`."""
    return first + sum(own[which] for own in sizes[:e])


@triton.constexpr_function
def size(sizes, e, which):
    """How many of these one epilogue has."""
    return sizes[e][which]


@triton.constexpr_function
def is_bfloat16(format):
    return format in (3, 5)


@triton.constexpr_function
def stochastic(formats):
    """Is some role rounded by random bits?"""
    return any(format in STOCHASTIC for format in formats)


@triton.constexpr_function
def is_stochastic(format):
    return format in STOCHASTIC


# Random bits ----------------------------------------------------------------------------------------------------------


@triton.jit
def mix(x):
    """A bijection of 64-bit numbers that leaves no bit of its argument recognisable."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def whole(row, position: tl.constexpr):
    """A scalar of a row that is a whole number below 2^53, as uint64: by halves, since targets convert 32 bits."""
    number = tl.load(row + position)
    high = (number * 2.3283064365386963e-10).to(tl.uint32)  # 2^-32
    low = (number - high.to(tl.float64) * 65536.0 * 65536.0).to(tl.uint32)
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def keys_of_roles(row, scalar_names: tl.constexpr, formats: tl.constexpr):
    """The key of each role's random bits in this step; of roles that want none, 0."""
    keys = ()
    if stochastic(formats):
        of_step = mix(mix(whole(row, position(scalar_names, "seed"))) + whole(row, position(scalar_names, "t")))
        for role in tl.static_range(len(formats)):
            keys += (mix(of_step + role // 2),)
    else:
        for _ in tl.static_range(len(formats)):
            keys += (0,)
    return keys


@triton.jit
def draw(key, places, role: tl.constexpr):
    """16 bits for every element: a half of the word of two roles. `places`: uint32, by their numbers."""
    x = places + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D + (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * 0x846CA68B
    if role % 2 == 0:
        return (x >> 16).to(tl.int32)
    else:
        return ((x ^ (x >> 16)) & 0xFFFF).to(tl.int32)


# Formats --------------------------------------------------------------------------------------------------------------


@triton.jit
def pointer(address, format: tl.constexpr):
    """An address as a pointer to elements; 16-bit ones are read and written as their bits."""
    if format == FLOAT64:
        return address.to(tl.pointer_type(tl.float64))
    elif format == FLOAT32:
        return address.to(tl.pointer_type(tl.float32))
    elif is_tiled(format):
        return address.to(tl.pointer_type(tl.int8 if is_signed(format) else tl.uint8))
    else:
        return address.to(tl.pointer_type(tl.int16))


@triton.jit
def part_pointer(address, format: tl.constexpr):
    """The same of the part of a format: a float32 master, a remainder, or scales."""
    if is_copy(format):
        return address.to(tl.pointer_type(tl.float32))
    elif is_tiled(format):
        return address.to(tl.pointer_type(tl.uint8))
    elif lost(format) == 8:
        return address.to(tl.pointer_type(tl.int8))
    else:
        return address.to(tl.pointer_type(tl.int16))


@triton.jit
def widen(stored, format: tl.constexpr):
    """What was read, in the arithmetic type: exact."""
    if is_bfloat16(format):  # on the bits: the interpreter's conversions lose subnormals and round wrongly
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif format == FLOAT16:
        return stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return stored


@triton.jit
def narrow(value, format: tl.constexpr, key=0, places=0, role: tl.constexpr = 0):
    """What is to be written: rounded once, to nearest even or by random bits; a 16-bit NaN is the canonical one."""
    if format == BFLOAT16_STOCHASTIC:
        bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True) + draw(key, places, role))
        return (bits >> 16).to(tl.int16)
    elif format == BFLOAT16:
        bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    elif format == FLOAT16:
        return tl.where(value != value, 0x7E00, value.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16)
    else:
        return value


@triton.jit
def kept(value, format: tl.constexpr, key, places, role: tl.constexpr):
    """The bits of a float32 that a split format stores of it, in its upper 24 or 32."""
    bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))
    if format == SPLIT24_STOCHASTIC:
        bits = (bits + (draw(key, places, role) >> 8)) & -256
    elif lost(format) == 8:
        bits = (bits + 0x7F + ((bits >> 8) & 1)) & -256
    return bits


@triton.jit
def as_stored(value, format: tl.constexpr, key, places, role: tl.constexpr):
    """What the next step loads of it."""
    if is_split(format):
        return kept(value, format, key, places, role).to(tl.float32, bitcast=True)
    elif is_copy(format):
        return value
    else:
        return widen(narrow(value, format, key, places, role), format)


@triton.jit
def larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def decode(code, scale, format: tl.constexpr):
    """What a code of 8 bits stands for, with the scale of its tile."""
    own, c = code.to(tl.int32), scale.to(tl.int32) << 23
    x = ((tl.abs(own) << LOST) + c).to(tl.float32, bitcast=True) - c.to(tl.float32, bitcast=True)
    if is_signed(format):
        x = (bits_of(x) | (own & -2147483648)).to(tl.float32, bitcast=True)
    return x


@triton.jit
def encode(x, mask, format: tl.constexpr, key, places, role: tl.constexpr):
    """(codes, scales) of tiles in rows."""
    a = bits_of(x) & 0x7FFFFFFF
    within = a if mask is None else tl.where(mask, a, 0)
    scale = tl.maximum((tl.reduce(within, 1, larger, keep_dims=True) >> 23) - (14 if is_signed(format) else 30), 1)
    c = scale << 23
    y = a.to(tl.float32, bitcast=True) + c.to(tl.float32, bitcast=True)
    bits = tl.minimum(bits_of(y), 0x7FC00000) - c  # a NaN is the canonical one
    if is_stochastic(format):
        bits += draw(key, places, role) << (LOST - 16)
    else:
        bits += ((1 << (LOST - 1)) - 1) + ((bits >> LOST) & 1)
    code = bits >> LOST
    if is_signed(format):
        return tl.where(x < 0, -code, code), scale
    else:  # what is not 0 never becomes 0
        return tl.maximum(code, tl.minimum(a, 1)), scale


@triton.jit
def load(at, part, lanes, mask, tiles, tile_mask, format: tl.constexpr):
    if is_tiled(format):
        return decode(tl.load(at + lanes, mask=mask), tl.load(part + tiles, mask=tile_mask), format)
    elif is_copy(format):
        return tl.load(part + lanes, mask=mask)
    elif is_split(format):
        high = tl.load(at + lanes, mask=mask).to(tl.int32) << 16
        return (high + (tl.load(part + lanes, mask=mask).to(tl.int32) << lost(format))).to(tl.float32, bitcast=True)
    else:
        return widen(tl.load(at + lanes, mask=mask), format)


@triton.jit
def store(at, part, lanes, value, mask, tiles, tile_mask, format: tl.constexpr, key, places, role: tl.constexpr):
    if is_tiled(format):
        code, scale = encode(value, mask, format, key, places, role)
        tl.store(at + lanes, code.to(at.dtype.element_ty), mask=mask)
        tl.store(part + tiles, scale.to(tl.uint8), mask=tile_mask)
    elif is_copy(format):
        tl.store(part + lanes, value, mask=mask)
        tl.store(at + lanes, narrow(value, BFLOAT16 if format == BFLOAT16_COPY else FLOAT16), mask=mask)
    elif is_split(format):
        bits = kept(value, format, key, places, role)
        high = (bits + 0x8000) >> 16
        tl.store(at + lanes, high.to(tl.int16), mask=mask)
        tl.store(part + lanes, ((bits - (high << 16)) >> lost(format)).to(part.dtype.element_ty), mask=mask)
    else:
        tl.store(at + lanes, narrow(value, format, key, places, role), mask=mask)


# Rules ----------------------------------------------------------------------------------------------------------------


@triton.jit
def scalar(row, position: tl.constexpr, formats: tl.constexpr):
    """A scalar of a row, rounded to the arithmetic type."""
    if formats[0] == FLOAT64:
        return tl.load(row + position)
    else:
        return tl.load(row + position).to(tl.float32)


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def scaled_root(x):
    """For AMD: Triton 3.6's root there is inexact, or worse, below 2^-96; 2^32 and 2^-16 scale exactly."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        small = x < 1.262177448353619e-29  # 2^-96
        found = tl.sqrt_rn(tl.where(small, x * 4294967296.0, x))
        return tl.where(small, found * 1.52587890625e-05, found)


@triton.jit
def divide(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def lerp(x, y, beta, w):
    """From the nearer end, as torch.lerp."""
    near = w < 0.5
    return tl.where(near, x, y) + tl.where(near, w, -beta) * (y - x)


@triton.jit
def adamw(theta, g, states, names: tl.constexpr, scalars, root: tl.constexpr):
    """Section 3 on a block: (update, states); `names` are those of the states."""
    (
        frozen, grad_scale, grad_limit, l2, decay, metric, beta1, one_minus_beta1, beta2, one_minus_beta2, eps,
        scaled_lr, t, step_size, inv_sqrt_bias2, seed, decay_center, decay_threshold,
    ) = scalars  # fmt: skip
    m, v = states[0], states[1]
    m = lerp(m, g, beta1, one_minus_beta1)
    v = lerp(v, g * g, beta2, one_minus_beta2)
    new = (m, v)
    second = v
    if has(names, "max_exp_avg_sq"):
        v_max = states[2]
        second = tl.where((v > v_max) | (v != v), v, v_max)
        new = (m, v, second)
    d = root(second) * inv_sqrt_bias2 + eps
    return divide(step_size * m + metric * theta, d + metric), new


@triton.jit
def sgdw(theta, g, states, names: tl.constexpr, scalars, root: tl.constexpr):
    """Section 4 on a block: (update, states)."""
    (
        frozen, grad_scale, grad_limit, l2, decay, momentum, update_grad, update_buf, step_size, first_grad_coef,
        later_grad_coef, t, grad_coef, seed, decay_center, decay_threshold,
    ) = scalars  # fmt: skip
    if has(names, "momentum_buffer"):
        b = momentum * states[0] + grad_coef * g
        u = step_size * (update_grad * g + update_buf * b)
        new = (b,)
    else:
        u = step_size * g
        new = ()
    return u, new


@triton.jit
def adagradw(theta, g, states, names: tl.constexpr, scalars, root: tl.constexpr):
    """Section 3a on a block: (update, states)."""
    (
        frozen, grad_scale, grad_limit, l2, eps, lr_decay, scaled_lr, fixed_decay, scaled_decay, scaled_metric,
        t, step_size, decay, metric, seed, decay_center, decay_threshold,
    ) = scalars  # fmt: skip
    total = states[0] + g * g
    d = root(total) + eps
    return divide(step_size * g + metric * theta, d + metric), (total,)


@triton.jit
def of_one(values, first: tl.constexpr, sizes: tl.constexpr, e: tl.constexpr, which: tl.constexpr):
    """Of these, which begin at `first`, the ones that an epilogue has."""
    own = ()
    for k in tl.static_range(place(sizes, e, which, first), place(sizes, e + 1, which, first)):
        own += (values[k],)
    return own


@triton.jit
def average(before, after, g, u, states, outputs, scalars):
    """Section 8's average of a parameter: (outputs, summands)."""
    ema_decay, one_minus_ema_decay = scalars
    mixed = lerp(outputs[0], after, ema_decay, one_minus_ema_decay)
    return (tl.where(ema_decay == 0.0, after, mixed),), ()


@triton.jit
def statistics(before, after, g, u, states, outputs, scalars):
    """Section 8's statistics: the numbers that are summed, then the one whose largest is kept."""
    moved = after - before
    nonfinite = tl.where(g - g == 0.0, 0.0, 1.0).to(g.dtype)
    return (), (g * g, after * after, moved * moved, nonfinite, tl.abs(moved))


@triton.jit
def nothing(before, after, g, u, states, outputs, scalars):
    """Of an epilogue that marks alone."""
    return (), ()


@triton.jit
def within(g, limit):
    """g, clipped by value: what is beyond the limit becomes that, with its sign. NaN stays.

    One comparison: a minimum that keeps NaN is three instructions on AMD, and many in float64.
    """
    if g.dtype == tl.float64:
        bits = (g.to(tl.int64, bitcast=True) & (-1 << 63)) | limit.to(tl.int64, bitcast=True)
    else:
        bits = (bits_of(g) & -2147483648) | bits_of(limit)
    return tl.where(tl.abs(g) > limit, bits.to(g.dtype, bitcast=True), g)


@triton.jit
def step(theta, g, states, names: tl.constexpr, scalars, scalar_names: tl.constexpr, rule: tl.constexpr,
         root: tl.constexpr, pull: tl.constexpr, to):  # fmt: skip
    """The step that all rules share: (theta after it, g with its factor, update, states after it).

    `pull`: what decays is theta less the center (1), or less the reference `to` (2).
    """
    g = g * scalars[position(scalar_names, "grad_scale")]
    g = within(g, scalars[position(scalar_names, "grad_limit")])
    if pull == 0:
        u, new = rule(theta, g + scalars[position(scalar_names, "l2")] * theta, states, names, scalars, root)
        return theta - (scalars[position(scalar_names, "decay")] * theta + u), g, u, new
    else:
        pulled = theta - (scalars[position(scalar_names, "decay_center")] if pull == 1 else to)
        u, new = rule(pulled, g + scalars[position(scalar_names, "l2")] * pulled, states, names, scalars, root)
        against = u * pulled < scalars[position(scalar_names, "decay_threshold")]  # NaN decays
        decayed = tl.where(against, 0.0, scalars[position(scalar_names, "decay")] * pulled)
        return theta - (decayed + u), g, u, new


# Mover ----------------------------------------------------------------------------------------------------------------


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def sums_of_blocks(x, rows: tl.constexpr, size: tl.constexpr):
    """The sums of so many blocks (numerics, section 7), a column: of 8 neighbours, then of pairs half of them apart."""
    half: tl.constexpr = size // 2
    if size > 128:
        x = tl.reduce(tl.reshape(x, (rows, half, 2)), 2, add)
    else:
        x = tl.reduce(tl.reshape(x, (rows, 2, half)), 1, add)
    if half == 1:
        return x
    else:
        return sums_of_blocks(x, rows, half)


@triton.jit
def block_sum(x, size: tl.constexpr):
    """Of one block."""
    return tl.reduce(tl.reshape(sums_of_blocks(x, 1, size), (1,)), 0, add)


@triton.jit
def largest(x, size: tl.constexpr):
    """Of one block of numbers >= 0, by their bits: NaN is the largest."""
    whole = tl.reshape(x, (size,))
    bits = whole.to(tl.int64, bitcast=True) if x.dtype == tl.float64 else whole.to(tl.int32, bitcast=True)
    return tl.reduce(bits, 0, larger).to(x.dtype, bitcast=True)


@triton.jit
def either(x, y):
    return x | y


@triton.jit
def in_memory(value, stored, format: tl.constexpr):
    """The number that a parameter's memory holds, by its value, which a part may have the rest of; exact."""
    if is_split(format):
        return ((bits_of(value) + 0x8000) & -65536).to(tl.float32, bitcast=True)
    elif is_copy(format):
        return widen(stored, BFLOAT16 if format == BFLOAT16_COPY else FLOAT16)
    else:
        return value


@triton.jit
def set_marks(marks, x, y, first, block: tl.constexpr):
    """Sets the bits of those elements of a block that are y after they were x; any NaN is any NaN."""
    if x.dtype == tl.float64:
        differ = x.to(tl.int64, bitcast=True) != y.to(tl.int64, bitcast=True)
    else:
        differ = bits_of(x) != bits_of(y)
    differ = differ & ((x == x) | (y == y))
    each = tl.reshape(differ.to(tl.int32), (block // MARKED, MARKED)) << tl.arange(0, MARKED)[None, :]
    words = tl.reduce(each, 1, either)
    at = marks.to(tl.pointer_type(tl.int32)) + first // MARKED + tl.arange(0, block // MARKED)
    tl.atomic_or(at, words, mask=words != 0, sem="relaxed")


@triton.jit
def move(at, count, scalars, frozen, keys, number, to, marks, first, rule: tl.constexpr, root: tl.constexpr,
         scalar_names: tl.constexpr, states: tl.constexpr, formats: tl.constexpr, epilogues: tl.constexpr,
         sizes: tl.constexpr, block: tl.constexpr, pull: tl.constexpr, full: tl.constexpr):  # fmt: skip
    """Steps `count` elements from `at` on, a block at most; `full`: a whole block, and every address is aligned.

    `keys` are those of the roles' random bits, `number` is that of the first element; `to` is where the numbers of the
    segment's blocks go, `marks` where its marks are, `first` the place of the first element in it.
    """
    tiles, mask, tile_mask = 0, None, None
    if tiled(formats):  # in rows
        tiles = tl.arange(0, block // TILE)[:, None]
        lanes = tiles * TILE + tl.arange(0, TILE)[None, :]
        if not full:
            mask, tile_mask = lanes < count, tiles * TILE < count
    elif full:
        lanes = tl.arange(0, block)
    else:  # two-dimensional, so that its layout (neighbours in neighbouring threads) stays apart from the vectors'
        lanes = tl.arange(0, block // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
        mask = lanes < count
    places = 0
    if stochastic(formats):
        numbers = number + lanes
        places = numbers.to(tl.uint32) * 0x9E3779B1 + (numbers >> 32).to(tl.uint32) * 0x85EBCA77
    values = ()
    for role in tl.static_range(len(formats)):
        values += (load(at[role], at[part_of(formats, role)], lanes, mask, tiles, tile_mask, formats[role]),)
    own = scalars[: len(scalar_names)]
    reference = values[len(formats) - 1]  # where there is one, it is the last
    theta, g, u, new = step(values[0], values[1], values[2:], states, own, scalar_names, rule, root, pull, reference)
    if total(sizes, 4) > 0:
        stored = tl.load(at[0] + lanes, mask=mask) if is_copy(formats[0]) else 0
        x = in_memory(values[0], stored, formats[0])
        y = as_stored(theta, formats[0], keys[0], places, 0)
        if is_copy(formats[0]):
            stored = narrow(theta, BFLOAT16 if formats[0] == BFLOAT16_COPY else FLOAT16)
        y = tl.where(frozen, x, in_memory(y, stored, formats[0]))
        set_marks(marks, x, y if full else tl.where(mask, y, x), first, block)
    if not frozen:
        store(at[0], at[part_of(formats, 0)], lanes, theta, mask, tiles, tile_mask, formats[0], keys[0], places, 0)
    for role in tl.static_range(2, 2 + len(states)):
        part = at[part_of(formats, role)]
        store(at[role], part, lanes, new[role - 2], mask, tiles, tile_mask, formats[role], keys[role], places, role)
    for e in tl.static_range(len(epilogues)):
        after = tl.where(frozen, values[0], as_stored(theta, formats[0], keys[0], places, 0))
        outputs, given = epilogues[e](
            values[0], after, g, u, new, of_one(values, 2 + len(states), sizes, e, 1),
            of_one(scalars, len(scalar_names), sizes, e, 0),
        )  # fmt: skip
        for role in tl.static_range(place(sizes, e, 1, 2 + len(states)), place(sizes, e + 1, 1, 2 + len(states))):
            output = outputs[role - place(sizes, e, 1, 2 + len(states))]
            part = at[part_of(formats, role)]
            store(at[role], part, lanes, output, mask, tiles, tile_mask, formats[role], keys[role], places, role)
        for n in tl.static_range(place(sizes, e, 2, 0), place(sizes, e + 1, 2, 0)):
            own_number = given[n - place(sizes, e, 2, 0)]
            if not full:
                own_number = tl.where(mask, own_number, 0.0)
            if tiled(formats):
                own_number = tl.reshape(own_number, (block,))
            lies = pointer(to, arithmetic(formats)) + (first // block * total(sizes, 2) + n)
            if n - place(sizes, e, 2, 0) < size(sizes, e, 3):
                tl.store(lies, block_sum(own_number, block))
            else:
                tl.store(lies, largest(own_number, block))


@triton.jit
def ahead(at, offset, formats: tl.constexpr, full: tl.constexpr):
    """Pointers that lie `offset` elements further on; if `full`, they are promised to begin vectors."""
    further = ()
    for role in tl.static_range(len(formats) + parts(formats)):
        if is_scale(formats, role):
            further += (at[role] + offset // TILE,)
        elif full:
            further += (tl.multiple_of(at[role] + offset, vector(formats, role)),)
        else:
            further += (at[role] + offset,)
    return further


@triton.jit(do_not_specialize=["place_words", "row_words"])
def step_kernel(chunks, places, moving, rows, control, place_words, row_words, chunk_size,
                rule: tl.constexpr, root: tl.constexpr, scalar_names: tl.constexpr, states: tl.constexpr,
                formats: tl.constexpr, epilogues: tl.constexpr, sizes: tl.constexpr, block: tl.constexpr,
                pull: tl.constexpr = 0):  # fmt: skip
    """Steps one chunk.

    Compile-time arguments: the rule, the root that is exact on the target, the names of the rule's scalars and of the
    states, the formats' codes (parameter, gradient, states, outputs of the epilogues, reference), the epilogues, of
    each how many scalars (which follow the rule's in a row), outputs, numbers of a block and sums among these it has,
    whether it marks, and what Triton's cache is to know it by (of a function within a tuple it sees the name alone),
    the elements of a block, what the decay pulls to (`Spec.pull`).
    """
    n_scalars: tl.constexpr = len(scalar_names) + total(sizes, 0)
    n_numbers: tl.constexpr = total(sizes, 2)
    rest: tl.constexpr = block if n_numbers > 0 else 512  # elements of a block on the masked path
    chunk = tl.load(chunks + tl.program_id(0))
    place = places + (chunk & 0xFFFFFFFF) * place_words + ADDRESSES
    moved = moving + (chunk & 0xFFFFFFFF) * MOVING_WORDS
    begin = (chunk >> 32) * chunk_size
    numel = tl.load(moved + 1)  # 0 without a gradient
    row = rows + tl.load(moved + 2) * row_words
    aligned = tl.load(moved + 3) != 0
    skip = tl.load(control + 1) != 0
    ended = skip | (begin >= numel)
    count = tl.where(ended, 0, tl.minimum(numel - begin, chunk_size).to(tl.int32))

    at = (pointer(tl.load(place), formats[0]) + begin, pointer(tl.load(moved), formats[1]) + begin)
    for role in tl.static_range(2, len(formats)):
        at += (pointer(tl.load(place + role - 1), formats[role]) + begin,)
    for role in tl.static_range(len(formats)):
        if part_of(formats, role) != role:
            further = begin // per_element(formats[role])
            at += (part_pointer(tl.load(place + part_of(formats, role) - 1), formats[role]) + further,)
    frozen = tl.load(row + position(scalar_names, "frozen")) != 0
    scalars = ()
    for i in tl.static_range(n_scalars):
        if i == position(scalar_names, "grad_scale"):
            scalars += (scalar(row, i, formats) * scalar(control, 0, formats),)
        else:
            scalars += (scalar(row, i, formats),)

    keys = keys_of_roles(row, scalar_names, formats)
    number = tl.load(place - ADDRESSES + ORIGIN) + begin
    to = tl.load(place - ADDRESSES + OUTPUT) if n_numbers > 0 else 0
    marks = tl.load(place - ADDRESSES + MARKS) if total(sizes, 4) > 0 else 0
    done = 0
    if aligned:
        done = count - count % block
        for offset in range(0, done, block):
            move(ahead(at, offset, formats, True), block, scalars, frozen,
                 keys, number + offset, to, marks, begin + offset, rule, root, scalar_names, states, formats, epilogues,
                 sizes, block, pull, True)  # fmt: skip
    for offset in range(done, count, rest):
        move(ahead(at, offset, formats, False), count - offset, scalars, frozen,
             keys, number + offset, to, marks, begin + offset, rule, root, scalar_names, states, formats, epilogues,
             sizes, rest, pull, False)  # fmt: skip
