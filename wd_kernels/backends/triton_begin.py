"""What comes before the steps of a device's buckets, in Triton: the norm of their gradients, and the begin of a step.

That decides on the norm, completes the rows and counts (numerics, sections 2 and 7; csrc/cuda/begin.h has the same).
Transcriptions, launched as the kernels of `triton_kernels.py`; only `triton.py` beside this imports this module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import sums
from .triton_kernels import (
    ADDRESSES,
    FLOAT32,
    FLOAT64,
    MOVING_WORDS,
    OUTPUT,
    block_sum,
    larger,
    pointer,
    sums_of_blocks,
    widen,
)

DIGITS = tl.constexpr(sums.DIGITS)
INFINITIES = tl.constexpr(sums.INFINITIES)
NANS = tl.constexpr(sums.NANS)
SUM_WORDS = tl.constexpr(sums.WORDS)
LR, ETA, WEIGHT_DECAY, DECAY, BASE_LR, SEED = (tl.constexpr(k) for k in range(6))
OWN = tl.constexpr(8)
LAST = tl.constexpr(3)  # settings that end a row as they are: the seed, the center and the threshold of the decay
SOURCES = tl.constexpr(5)
OF_AVERAGE = tl.constexpr(2)  # scalars that follow a rule's
OWN_LIMITS = tl.constexpr(7)


@triton.jit
def add_summands(sum, x):
    """Adds float64 >= 0, a column, to an exact sum (numerics, section 7): three digits each, or one to a count."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) & 0x7FF
    finite = exponent != 0x7FF
    significand = (bits & 0xFFFFFFFFFFFFF) | tl.where(exponent != 0, 1 << 52, 0).to(tl.int64)
    place = tl.maximum(exponent - 1, 0)
    shift = place % 32
    low = (significand & 0xFFFFFFFF) << shift
    high = (significand >> 32) << shift
    middle = (low >> 32) + (high & 0xFFFFFFFF)
    word = tl.where(finite, place // 32, tl.where(x != x, NANS, INFINITIES))
    at = tl.arange(0, 4)[None, :]
    digits = tl.where(at == 0, low & 0xFFFFFFFF, tl.where(at == 1, middle & 0xFFFFFFFF, (high >> 32) + (middle >> 32)))
    digits = tl.where(finite, digits, 1)
    tl.atomic_add(sum + word + at, digits, mask=at < tl.where(finite, 3, 1), sem="relaxed")


@triton.jit
def added(at, lanes, mask, x, new):
    """The sum of x and what lies there, if anything does; it is written there."""
    loaded = tl.broadcast_to(new, lanes.shape) == 0  # no branch: gradients and sums are on their way together
    before = tl.load(at + lanes, mask=loaded if mask is None else mask & loaded, other=0.0)
    total = tl.where(loaded, before + x, x)
    tl.store(at + lanes, total, mask=mask)
    return total


@triton.jit
def sum_gradients(grad, total, offset, count, sum, new, format: tl.constexpr, accumulates: tl.constexpr,
                  rows: tl.constexpr, full: tl.constexpr):  # fmt: skip
    """Adds the squares of `count` neighbours, so many blocks at most; `full`: all of them, and aligned."""
    mask = None
    if full:
        at = tl.multiple_of(grad + offset, 16)
        lanes = tl.arange(0, rows * 1024)
    else:
        at = grad + offset
        lanes = tl.arange(0, 8 * rows)[:, None] * 128 + tl.arange(0, 128)[None, :]
        mask = lanes < count
    x = widen(tl.load(at + lanes, mask=mask), format)
    if accumulates:
        to = tl.multiple_of(total + offset, 16) if full else total + offset
        x = added(to, lanes, mask, x, new)
    square = x * x if full else tl.where(lanes < count, x * x, 0.0)
    add_summands(sum, sums_of_blocks(square, rows, 1024).to(tl.float64))


@triton.jit(do_not_specialize=["place_words", "copies", "stride"])
def squares_kernel(chunks, places, moving, place_words, chunk_size, copies, stride, format: tl.constexpr,
                   accumulates: tl.constexpr, rows: tl.constexpr):  # fmt: skip
    """Adds the squares of the gradients of one chunk to the exact sum that its place names.

    If it `accumulates`, the gradients are added to what lies in the place of the parameter, where the segment's row is
    0, and the squares are of that. `copies` of the sums, `stride` words apart, are added to by turns.
    """
    chunk = tl.load(chunks + tl.program_id(0))
    place = places + (chunk & 0xFFFFFFFF) * place_words
    moved = moving + (chunk & 0xFFFFFFFF) * MOVING_WORDS
    begin = (chunk >> 32) * chunk_size
    numel = tl.load(moved + 1)  # 0 without a gradient
    aligned = tl.load(moved + 3) != 0
    count = tl.where(begin >= numel, 0, tl.minimum(numel - begin, chunk_size).to(tl.int32))
    grad = pointer(tl.load(moved), format) + begin
    sum = tl.load(place + OUTPUT).to(tl.pointer_type(tl.int64)) + (tl.program_id(0) % copies).to(tl.int64) * stride
    total, new = grad, numel
    if accumulates:
        total = pointer(tl.load(place + ADDRESSES), FLOAT64 if format == FLOAT64 else FLOAT32) + begin
        new = tl.load(moved + 2)
    done = 0
    if aligned:
        done = count - count % (1024 * rows)
        for offset in range(0, done, 1024 * rows):
            sum_gradients(grad, total, offset, 1024 * rows, sum, new, format, accumulates, rows, True)
    for offset in range(done, count, 1024):
        sum_gradients(grad, total, offset, count - offset, sum, new, format, accumulates, 1, False)


@triton.jit
def power_of_2(n):
    return ((n + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def value_of(sum):
    """An exact sum, rounded once to float64, to nearest even."""
    top, second, third = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    rest, carry, place = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int32)
    one_below, two_below, below = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for k in range(DIGITS):
        word = tl.load(sum + k) + carry
        digit = word & 0xFFFFFFFF
        carry = word >> 32
        there = digit != 0
        top = tl.where(there, digit, top)
        second = tl.where(there, one_below, second)
        third = tl.where(there, two_below, third)
        rest = tl.where(there, below, rest)
        place = tl.where(there, k, place)
        below = below | two_below
        two_below = one_below
        one_below = digit
    upper = ((top << 21) | (second >> 11)).to(tl.float64)
    lower = (((second & 0x7FF) << 33) | (third << 1) | tl.where(rest != 0, 1, 0)).to(tl.float64)
    value = upper * 17592186044416.0 + lower  # 2^44
    exponent = 32 * place - 1139
    first = tl.minimum(tl.maximum(exponent, -1000), 1000)
    value = value * power_of_2(first) * power_of_2(exponent - first)
    value = tl.where(tl.load(sum + INFINITIES) != 0, float("inf"), value)
    return tl.where(tl.load(sum + NANS) != 0, float("nan"), value)


@triton.jit
def clip_of(norm, max_norm):
    clip = max_norm / (norm + 1e-6)
    clip = tl.where(clip > 1.0, 1.0, clip)
    return tl.where(max_norm == float("inf"), 1.0, clip)


@triton.jit
def is_spike(ring, seen, window, sigma, x):
    """Is x more than sigma deviations above the mean of the last ones? A finite one is remembered."""
    given = tl.load(seen)
    n = tl.minimum(given, window)
    i = tl.arange(0, 1024)
    values = tl.load(ring + i, mask=i < n, other=0.0)
    mean = block_sum(values, 1024) / tl.maximum(n, 1).to(tl.float64)
    off = tl.where(i < n, values - mean, 0.0)
    deviation = tl.sqrt(block_sum(off * off, 1024) / tl.maximum(n - 1, 1).to(tl.float64))
    near = x - mean <= sigma * deviation
    tl.debug_barrier()
    at = tl.where(x - x == 0.0, given % window, -1)
    tl.store(ring + at, x, mask=at >= 0)
    tl.store(seen, given + 1, mask=at >= 0)
    return (n >= tl.maximum(window // 2, 2)) & (near == 0)


@triton.jit
def power(x, t):
    """x to the power t, by squaring (numerics, section 2)."""
    r = x * 0.0 + 1.0
    for _ in range(54):  # counts are below 2^53
        r = tl.where(t % 2 != 0, r * x, r)
        x = tl.where(t > 1, x * x, x)
        t = t // 2
    return r


@triton.jit
def decay_scalars(mode, lam, eta, a):
    """Where lambda enters, by the number of the mode: (l2, decay, scale of the step, metric)."""
    shrunk = 1.0 + eta * lam
    l2 = tl.where(mode == 0.0, lam, 0.0)
    decay = tl.where(mode == 1.0, a * lam, tl.where(mode == 2.0, eta * lam, 0.0))
    decay = tl.where(mode == 3.0, (eta * lam) / shrunk, decay)
    decay = tl.where(mode == 5.0, a * eta * lam, decay)
    return l2, decay, tl.where(mode == 3.0, 1.0 / shrunk, 1.0), tl.where(mode == 4.0, a * lam, 0.0)


@triton.jit
def frozen(lr, eta):
    return tl.where((lr == 0.0) | (eta == 0.0), 1.0, 0.0)


@triton.jit
def group_adamw(lr, eta, a, lam, mode, own):
    """The scalars of a row that depend on its group alone: `group_part` of the rule's page."""
    beta1, beta2, eps, sign, limit = own[0], own[1], own[2], own[3], own[4]
    l2, decay, scale, metric = decay_scalars(mode, lam, eta, a)
    return frozen(lr, eta), sign, limit, l2, decay, metric, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, scale * a


@triton.jit
def group_sgdw(lr, eta, a, lam, mode, own):
    paper, dampening, nesterov, sign, limit, momentum = own[0] != 0.0, own[1], own[2] != 0.0, own[3], own[4], own[5]
    metric = mode == 4.0  # the identity: proximal, with a in place of eta
    l2, decay, scale, _ = decay_scalars(tl.where(metric, 3.0, mode), lam, tl.where(metric, a, eta), a)
    inside = paper & (momentum != 0.0)  # the lr sits inside the buffer
    first_grad_coef = tl.where(inside, a, 1.0)
    later_grad_coef = tl.where(inside, a, 1.0 - dampening)
    step_size = tl.where(inside, scale, scale * a)
    update_grad, update_buf = tl.where(nesterov, 1.0, 0.0), tl.where(nesterov, momentum, 1.0)
    return (frozen(lr, eta), sign, limit, l2, decay, momentum, update_grad, update_buf, step_size, first_grad_coef,
            later_grad_coef)  # fmt: skip


@triton.jit
def group_adagradw(lr, eta, a, lam, mode, own):
    lr_decay, eps, sign, limit = own[0], own[1], own[2], own[3]
    l2, decay, scale, metric = decay_scalars(mode, lam, eta, a)
    _, fixed_decay, _, _ = decay_scalars(mode, lam, eta, a * 0.0)
    return frozen(lr, eta), sign, limit, l2, eps, lr_decay, scale * a, fixed_decay, decay - fixed_decay, metric


@triton.jit
def count_adamw(group, t, fresh):
    """The scalars of a row that depend on t, from those that do not: `count_part` of the rule's page."""
    beta1, beta2, scaled_lr = group[6], group[8], group[11]
    return t.to(tl.float64), scaled_lr / (1.0 - power(beta1, t)), 1.0 / tl.sqrt(1.0 - power(beta2, t))


@triton.jit
def count_sgdw(group, t, fresh):
    return t.to(tl.float64), tl.where(fresh, group[9], group[10])


@triton.jit
def count_adagradw(group, t, fresh):
    lr_decay, scaled_lr, fixed_decay, scaled_decay, scaled_metric = group[5], group[6], group[7], group[8], group[9]
    slowed = 1.0 + (t - 1).to(tl.float64) * lr_decay
    return t.to(tl.float64), scaled_lr / slowed, fixed_decay + scaled_decay / slowed, scaled_metric / slowed


@triton.jit
def setting(settings, sources, group, k, width, there):
    """A setting of groups, a column: the number, or what lies where its source says (csrc/layout.h, `SettingWord`)."""
    number = tl.load(settings + group * width + k, mask=there, other=0.0)
    source = tl.load(sources + group * (width + SOURCES) + k, mask=there, other=0)
    double = source % 2 != 0
    single = (source != 0) & (source % 2 == 0)
    at = (source - source % 2).to(tl.pointer_type(tl.float64))
    from_double = tl.load(at, mask=double, other=0.0)
    from_single = tl.load(source.to(tl.pointer_type(tl.float32)), mask=single, other=0.0)
    return tl.where(double, from_double, tl.where(single, from_single.to(tl.float64), number))


@triton.jit
def kept_of_average(words, t, there):
    """What steps t keep of averages, by their words of the sources; 1 where there is none."""
    table = tl.load(words, mask=there, other=0)
    length = tl.load(words + 1, mask=there, other=0)
    at = table.to(tl.pointer_type(tl.float64)) + tl.maximum(tl.minimum(t - 1, length - 1), 0)
    tabled = tl.load(at, mask=table > 1, other=0.0)
    past = tl.maximum(t - length, 0)
    mean = tl.where(past > 0, 1.0 - 1.0 / (past + 1).to(tl.float64), 0.0)
    return tl.where(table > 1, tabled, tl.where(table == 0, 1.0, mean))


@triton.jit
def make_groups(settings, sources, schedule_steps, groups, of_groups, group: tl.constexpr, of_rule: tl.constexpr,
                group_scalars: tl.constexpr):  # fmt: skip
    """What groups give to rows. Returns whether an lr is not 0, and a schedule beyond its table."""
    group_width: tl.constexpr = group_scalars + LAST
    of_settings: tl.constexpr = OWN + of_rule
    lane = tl.arange(0, 128)
    moves = tl.full((), 0, tl.int32)
    past = tl.full((), 0, tl.int32)
    for first in range(0, of_groups, 128):
        g = first + lane
        there = g < of_groups
        lr = setting(settings, sources, g, LR, of_settings, there)
        eta = setting(settings, sources, g, ETA, of_settings, there)
        lam = setting(settings, sources, g, WEIGHT_DECAY, of_settings, there)
        mode = setting(settings, sources, g, DECAY, of_settings, there)
        base_lr = setting(settings, sources, g, BASE_LR, of_settings, there)
        settings_of_rule = ()
        for i in tl.static_range(of_rule):
            settings_of_rule += (setting(settings, sources, g, OWN + i, of_settings, there),)
        of_schedule = sources + g * (of_settings + SOURCES) + of_settings
        table = tl.load(of_schedule, mask=there, other=0)
        length = tl.load(of_schedule + 1, mask=there, other=0)
        endless = tl.load(of_schedule + 2, mask=there, other=0)
        tabled = table != 0
        t = tl.load(schedule_steps + g, mask=there, other=0)
        at = table.to(tl.pointer_type(tl.float64)) + tl.maximum(tl.minimum(t, length - 1), 0)
        eta = tl.where(tabled, tl.load(at, mask=tabled, other=0.0), eta)
        lam = tl.where(tabled, lam * tl.load(at + length, mask=tabled, other=0.0), lam)
        follows = base_lr != 0.0
        eta = tl.where(follows, lr / tl.where(follows, base_lr, 1.0), eta)
        a = tl.where(follows, lr, eta * lr)
        part = group(lr, eta, a, lam, mode, settings_of_rule)
        for i in tl.static_range(group_scalars):
            tl.store(groups + g * group_width + i, part[i], mask=there)
        for i in tl.static_range(LAST):
            ending = setting(settings, sources, g, SEED + i, of_settings, there)
            tl.store(groups + g * group_width + group_scalars + i, ending, mask=there)
        moves = tl.maximum(moves, tl.reduce(tl.where(there & (lr != 0.0), 1, 0), 0, larger))
        past = tl.maximum(past, tl.reduce(tl.where(tabled & (endless != 0) & (t >= length), 1, 0), 0, larger))
    return moves, past


@triton.jit(do_not_specialize=["copies", "slots", "of_groups", "of_rows", "of_params"])
def begin_kernel(sums, totals, slots_of, limits, grad_scale, found_inf, settings, sources, keys, active, steps, fresh,
                 schedule_steps, etas, groups, rows, clips, control, found, last, spikes_seen, loss, copies, slots,
                 of_groups, of_rows, of_params, group: tl.constexpr, count: tl.constexpr,
                 of_rule: tl.constexpr, group_scalars: tl.constexpr, count_scalars: tl.constexpr,
                 grad_scale_at: tl.constexpr):  # fmt: skip
    """Begins a step: decides on the norm of the gradients, makes the rows, counts (csrc/layout.h, `Begin`).

    One program. Compile-time arguments: the rule's functions of groups and of counts, how many settings it has of its
    own, how many scalars a row has that depend on the group and on the count (`LAST` follow), which of them the clip
    of a group multiplies.
    """
    group_width: tl.constexpr = group_scalars + LAST
    width: tl.constexpr = group_scalars + count_scalars + LAST + OF_AVERAGE
    moves, past = make_groups(settings, sources, schedule_steps, groups, of_groups, group, of_rule, group_scalars)
    scale = tl.load(grad_scale).to(tl.float64)
    measures = tl.load(limits) != 0
    max_norm = tl.load(limits + 1)
    own_limits = limits + OWN_LIMITS
    norm = tl.full((), float("nan"), tl.float64)
    clip = tl.full((), 1.0, tl.float64)
    word = tl.arange(0, 128)
    within = word < SUM_WORDS
    if measures:
        # The last two rows of the totals are of all groups, and of those without a limit of their own.
        all_words = tl.full((128,), 0, tl.int64)
        limited = tl.full((128,), 0, tl.int64)
        for g in range(of_groups):
            own = tl.load(own_limits + g)
            of_group = tl.full((128,), 0, tl.int64)
            for slot in range(tl.load(slots_of + g), tl.load(slots_of + g + 1)):
                for copy in range(copies):
                    at = sums + (copy * slots + slot) * SUM_WORDS + word
                    of_group += tl.load(at, mask=within, other=0)
                    tl.store(at, tl.full((128,), 0, tl.int64), mask=within)
            tl.store(totals + g * SUM_WORDS + word, of_group, mask=within)
            all_words += of_group
            limited += tl.where(own != own, of_group, 0)
        tl.store(totals + of_groups * SUM_WORDS + word, all_words, mask=within)
        tl.store(totals + (of_groups + 1) * SUM_WORDS + word, limited, mask=within)
        tl.debug_barrier()
        norm = tl.sqrt(value_of(totals + of_groups * SUM_WORDS)) / scale
        clip = clip_of(tl.sqrt(value_of(totals + (of_groups + 1) * SUM_WORDS)) / scale, max_norm)
    spike = tl.full((), 0, tl.int1)
    sigma = tl.load(limits + 3)
    if sigma < float("inf"):
        window = tl.load(limits + 4).to(tl.int64)
        spike = is_spike(last, spikes_seen, window, sigma, norm)
        if tl.load(limits + 5) != 0.0:
            spike = spike | is_spike(last + 1024, spikes_seen + 1, window, sigma, tl.load(loss).to(tl.float64))
    nonfinite = norm - norm != 0.0
    unwanted = (tl.load(found_inf) != 0.0) | (measures & (tl.load(limits + 2) != 0.0) & nonfinite) | (past != 0) | spike
    skip = tl.where(unwanted, 1, 0)
    tl.store(control, 1.0 / scale)
    tl.store(control + 1, skip.to(tl.float64))
    tl.store(found, norm)
    tl.store(found + 1, skip.to(tl.float64))
    lane = tl.arange(0, 128)
    for first in range(0, of_groups, 128):
        tl.store(clips + first + lane, tl.full((128,), 0.0, tl.float64) + clip, mask=first + lane < of_groups)
    if measures & (tl.load(limits + 6) != 0.0):
        tl.debug_barrier()
        for g in range(of_groups):
            own = tl.load(own_limits + g)
            if own == own:
                tl.store(clips + g, clip_of(tl.sqrt(value_of(totals + g * SUM_WORDS)) / scale, own))
    tl.debug_barrier()
    for first in range(0, of_rows, 128):
        row = first + lane
        there = row < of_rows
        of = tl.load(keys + 2 * row, mask=there, other=0)
        param = tl.load(keys + 2 * row + 1, mask=there, other=0)
        t = tl.load(steps + param, mask=there, other=0.0).to(tl.int64) + 1
        new = tl.load(fresh + param, mask=there, other=0.0) != 0.0
        known = ()
        for i in tl.static_range(group_scalars):
            value = tl.load(groups + of * group_width + i, mask=there, other=0.0)
            if i == grad_scale_at:
                value = value * tl.load(clips + of, mask=there, other=0.0)
            known += (value,)
        of_count = count(known, t, new)
        for i in tl.static_range(group_scalars):
            tl.store(rows + row * width + i, known[i], mask=there)
        for i in tl.static_range(count_scalars):
            tl.store(rows + row * width + group_scalars + i, of_count[i], mask=there)
        for i in tl.static_range(LAST):
            ending = tl.load(groups + of * group_width + group_scalars + i, mask=there, other=0.0)
            tl.store(rows + row * width + (group_scalars + count_scalars) + i, ending, mask=there)
        kept = kept_of_average(sources + of * (OWN + of_rule + SOURCES) + (OWN + of_rule + 3), t, there)
        tl.store(rows + row * width + (width - 2), kept, mask=there)
        tl.store(rows + row * width + (width - 1), 1.0 - kept, mask=there)
    tl.debug_barrier()
    counted = tl.where(skip == 0, of_params, 0)
    for first in range(0, counted, 128):
        param = first + lane
        there = param < counted
        stepped = tl.load(active + param, mask=there, other=0) != 0
        before = tl.load(steps + param, mask=there & stepped, other=0.0)
        tl.store(steps + param, before + 1.0, mask=there & stepped)
        tl.store(fresh + param, tl.full((128,), 0.0, tl.float32), mask=there & stepped)
    counted = tl.where((skip == 0) & (moves != 0), of_groups, 0)
    for first in range(0, counted, 128):
        at = first + lane
        of_schedule = sources + at * (OWN + of_rule + SOURCES) + (OWN + of_rule)
        table = tl.load(of_schedule, mask=at < counted, other=0)
        length = tl.load(of_schedule + 1, mask=at < counted, other=0)
        seen = tl.load(schedule_steps + at, mask=table != 0, other=0)
        value = table.to(tl.pointer_type(tl.float64)) + tl.maximum(tl.minimum(seen, length - 1), 0)
        tl.store(etas + at, tl.load(value, mask=table != 0, other=0.0), mask=table != 0)
        tl.store(schedule_steps + at, seen + 1, mask=table != 0)
