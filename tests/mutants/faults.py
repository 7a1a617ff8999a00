"""Faults that the tests must find: small, realistic bugs of the product, each a text of a source file and another.

A fault changes what the package does: numbers, what is written, what is refused, what is sent or kept. Nothing is here
that a reader of the result could not tell from the right program. `sees` hints at the test files that are likely to
find it, by how their names go on after "test_"; files of these names that are not there are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["FAULTS", "Fault"]


@dataclass(frozen=True)
class Fault:
    """One wrong change of one file.

    Attributes:
        name: how it is called.
        file: the file, from the root of the repository.
        old, new: a text that stands in the file, and what takes its place.
        sees: beginnings of the names of test files (without "test_") that should find it, the likeliest first.
        nth: which of several places is meant, from 0; None where the text stands there once.
    """

    name: str
    file: str
    old: str
    new: str
    sees: tuple[str, ...]
    nth: int | None = None

    @property
    def of_nvcc(self) -> bool:
        """May its tests need the CUDA library? It takes a minute to build, and is left out for all other faults."""
        return self.file in ("setup.py", "csrc/cuda/kernels.cu")

    def applied(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError if the place is not there, or not one."""
        count = text.count(self.old)
        if count == 0 or (self.nth is None and count > 1) or (self.nth or 0) >= count:
            which = "once" if self.nth is None else f"{self.nth + 1} times or more"
            raise ValueError(f"fault {self.name}: {self.old!r} stands {count} times in {self.file}: expected {which}")
        pieces, at = text.split(self.old), (self.nth or 0) + 1
        return self.old.join(pieces[:at]) + self.new + self.old.join(pieces[at:])

    def check(self, root: Path) -> None:
        """Raises ValueError if it does not fit the files below `root`."""
        self.applied((root / self.file).read_text(encoding="utf-8"))


def _of(file: str, sees: str, *faults: tuple[str, str, str] | tuple[str, str, str, int]) -> list[Fault]:
    """Faults (name, old, new[, nth]) of one file."""
    return [Fault(name, file, old, new, tuple(sees.split()), *nth) for name, old, new, *nth in faults]


RULES_H = _of(
    "csrc/rules.h",
    "kernels backends reference movers",
    ("c++: a weight of one half is lerped from the far end", "near = w < T(0.5);", "near = w <= T(0.5);"),
    ("c++: lerp always from the old value", "near = w < T(0.5);", "near = w <= T(1);"),
    ("c++: lerp always from the new value", "near = w < T(0.5);", "near = w < T(0);"),
    (
        "c++: the gradient's factor also scales the l2 term",
        "const T u = rule(theta, g + rule.l2 * theta, state);",
        "const T u = rule(theta, g + rule.grad_scale * (rule.l2 * theta), state);",
    ),
    (
        "c++: the second moment as a weighted sum, which rounds otherwise",
        "v = lerp(v, g * g, beta2, one_minus_beta2);",
        "v = beta2 * v + one_minus_beta2 * (g * g);",
    ),
    ("c++: amsgrad loses a NaN", "(v > v_max || v != v) ? v : v_max", "v > v_max ? v : v_max"),
    ("c++: amsgrad keeps its maximum and does not use it", "second = v_max;", "second = v;"),
    (
        "c++: eps inside the bias correction",
        "root(second) * inv_sqrt_bias2 + eps",
        "(root(second) + eps) * inv_sqrt_bias2",
    ),
    (
        "c++: the bias correction inside the root, which rounds otherwise",
        "root(second) * inv_sqrt_bias2",
        "root(second * inv_sqrt_bias2 * inv_sqrt_bias2)",
    ),
    (
        "c++: the quotient taken apart, which rounds otherwise",
        "(step_size * m + metric * theta) / (d + metric)",
        "step_size * (m / (d + metric)) + metric * theta / (d + metric)",
    ),
    (
        "c++: the decay is rounded into the weight before the update",
        "theta = theta - (rule.decay * theta + u);",
        "theta = (theta - rule.decay * theta) - u;",
    ),
    ("c++: 1 - beta2 is taken in the arithmetic type", "beta2, one_minus_beta2);", "beta2, T(1) - beta2);"),
    ("c++: AdamW reads metric where decay stands", "l2, decay, metric, beta1", "l2, metric, decay, beta1"),
    ("c++: the buffer's part is scaled by the momentum", "+ update_buf * b)", "+ momentum * b)"),
    (
        "c++: the step size is multiplied in first, which rounds otherwise",
        "return step_size * (update_grad * g + update_buf * b);",
        "return step_size * update_grad * g + step_size * update_buf * b;",
    ),
    ("c++: AdagradW's eps inside the root", "root(sum) + eps", "root(sum + eps)"),
)

FORMATS_H = _of(
    "csrc/formats.h",
    "storage kernels backends movers",
    ("c++: bfloat16 ties are rounded up", "bits + 0x7fffu + ((bits >> 16) & 1u)", "bits + 0x8000u"),
    (
        "c++: a bfloat16 NaN keeps sign and payload",
        "value != value ? 0x7fc00000u : nearest",
        "value != value ? bits | 0x400000u : nearest",
    ),
    ("c++: float16 ties are rounded up", "0xfffu + ((magnitude >> 13) & 1u)", "0x1000u"),
    (
        "c++: float16 subnormals are rounded to half their precision",
        "+ 0.5f) - bits_to<uint32_t>(0.5f)",
        "+ 1.0f) - bits_to<uint32_t>(1.0f)",
    ),
    (
        "c++: the largest float16 subnormals are taken as normal",
        "magnitude < (113u << 23) ?",
        "magnitude < (112u << 23) ?",
    ),
    ("c++: 65504 overflows in float16", "magnitude >= 0x477ff000u", "magnitude >= 0x477fe000u"),
    (
        "c++: a float16 NaN keeps its sign",
        "magnitude > 0x7f800000u ? 0x7e00u : (sign | half)",
        "sign | (magnitude > 0x7f800000u ? 0x7e00u : half)",
    ),
    (
        "c++: float16 infinity is read as 65536",
        "magnitude >= 0x7c00u ? 0x7f800000u",
        "magnitude > 0x7c00u ? 0x7f800000u",
    ),
)

CPU_MOVER = _of(
    "csrc/cpu/mover.inc",
    "backends kernels optim native",
    ("cpu: frozen weights move", "return rule.frozen != 0;", "return rule.frozen < 0;"),
    ("cpu: a thread goes on to the end of its segment", "rest < most ? rest : most", "most > 0 ? rest : most"),
    (
        "cpu: a later thread takes a whole segment's length",
        "rest = own.moving.numel - own.begin,",
        "rest = own.moving.numel,",
    ),
    ("cpu: the gradients' factor is ignored", "rule.read(row, launch.control->grad_factor,", "rule.read(row, 1.0,"),
    ("cpu: all segments use the first row", "launch.rows + own.moving.row * launch.row_width", "launch.rows"),
)

CLIPPING = [
    *_of(
        "csrc/cpu/rounding.h",
        "backends kernels optim native",
        ("cpu: subnormals are flushed as the caller has set", "_mm_setcsr(0x1f80)", "_mm_setcsr(saved_)"),
        ("cpu: the caller's flushing of subnormals is not put back", "{ _mm_setcsr(saved_); }", "{ (void)saved_; }"),
    ),
    *_of(
        "csrc/sums.h",
        "clipping sums",
        ("sums: a carry is lost", "carry = word >> 32;", "carry = 0;"),
        ("sums: what is below is not seen", "(rest != 0 ? 1 : 0)", "0"),
        ("sums: a NaN is an infinity", "x != x ? kNaNs : kInfinities", "kInfinities"),
        ("sums: digits begin one binade higher", "exponent != 0 ? exponent - 1 : 0", "exponent"),
        ("clip: a larger norm than gradients have enlarges them", "return clip > 1 ? 1 : clip;", "return clip;"),
        ("clip: an infinite limit divides", "if (max_norm == __builtin_inf()) return 1;", ""),
    ),
    *_of(
        "csrc/cpu/squares.inc",
        "clipping",
        ("squares: a rest of neighbours is not added", "i < count; ++i) last", "i < 0; ++i) last"),
        ("squares: sums of the segment before", "if (sum != sum_) flush();", ""),
        ("squares: a chunk begins where its segment does", "moving.grad) + begin * format.size", "moving.grad)"),
        ("squares: what was added stays", "      words_[k] = 0;\n", ""),
    ),
    *_of(
        "csrc/python/clipping.cpp",
        "clipping sharded",
        ("clipping: sums of the step before stay", "std::memset(sums_, 0,", "std::memset(sums_, 0, 0 *"),
        ("clipping: groups with limits count for the others", "(std::isnan(own_limits_[group]) ?", "(true ?"),
        (
            "clipping: the norm is that of scaled gradients",
            "found_[0] = std::sqrt(sum_of(all.words)) / scale_;",
            "found_[0] = std::sqrt(sum_of(all.words));",
        ),
        ("clipping: what is scaled stays so", "*view_.control = {1 / scale_,", "*view_.control = {1,"),
        ("clipping: what somebody has found is ignored", "found_inf_ || (skip", "(skip"),
        ("clipping: a NaN skips without being asked to", "(skip_nonfinite_ && !finite)", "!finite"),
        ("clipping: others' sums are not asked for", "if (between_ == nullptr) return true;", "return true;"),
    ),
    *_of(
        "wd_kernels/clipping.py",
        "clipping",
        ("python clipping: a NaN is no reason to skip", "asked.skip_nonfinite and nonfinite", "False"),
        ("clipping: a scale of 0 is taken", "if not 0.0 < scale < math.inf:", "if not 0.0 <= scale < math.inf:"),
        ("clipping: limits of groups alone are not seen", "limited = own.count(None) != len(own)", "limited = False"),
    ),
    *_of(
        "wd_kernels/table/table.py",
        "clipping sharded",
        (
            "clipping: the control of the last step stays",
            "if self.controlled and (limits is None or self.counting is not None):",
            "if False:",
        ),
        (
            "counts: another history has the same row",
            "[numbers[pair] for pair in pairs]",
            "[pair[0] for pair in pairs]",
        ),
        ("counts: a fresh state is not told of", "bank.fresh[i].fill_(float(f.fresh))", "bank.fresh[i].fill_(0.0)"),
        ("counts: a loaded count is lost on a device", "view.fill_(f.count)", "view.fill_(0.0)"),
        (
            "sums: of a flat buffer as a whole",
            "return self.own_segments\n\n    def tensors",
            "return self.segments\n\n    def tensors",
        ),
    ),
    *_of(
        "wd_kernels/norms.py",
        "clipping sharded",
        (
            "sums: of all groups in one place",
            "kinds = [(group, tuple(map(id, sharded_over(p))))",
            "kinds = [(0, tuple(map(id, sharded_over(p))))",
        ),
        (
            "norms: what others have found without gradients is unknown",
            "        self.reduce(bank)\n        total",
            "        total",
        ),
    ),
    *_of(
        "wd_kernels/sharding.py",
        "sharded",
        ("sharding: what is replicated counts for every rank", "if not own.is_replicate() and spec", "if spec"),
        (
            "sharding: each process has its own norm",
            "    torch.distributed.all_reduce(there, operation, group=group)\n",
            "",
        ),
    ),
    *_of(
        "wd_kernels/backends/device.py",
        "clipping",
        ("bank: sums of a step that failed stay", "if not bank.clean or capturing(bank.device):", "if False:"),
    ),
    *_of(
        "csrc/cuda/begin.h",
        "clipping",
        (
            "cuda: a skipped step is counted",
            "if (skip || of.active[i] == 0) continue;",
            "if (of.active[i] == 0) continue;",
        ),
        ("cuda: a state stays fresh", "      of.fresh[i] = 0;\n", ""),
        ("cuda: copies of a sum are not emptied", "              *at = 0;\n", ""),
        ("cuda: rows are not clipped", "row.grad_scale = row.grad_scale * of.clips[group];", ""),
        ("cuda: squares beyond the end", "begin + e < count ? T(G", "begin + e <= count ? T(G"),
        ("cuda: steps are counted from 0", "t = int64_t(of.steps[param]) + 1;", "t = int64_t(of.steps[param]);"),
    ),
    *_of(
        "wd_kernels/backends/triton_begin.py",
        "clipping",
        ("triton: a skipped step is counted", "counted = tl.where(skip == 0, of_params, 0)", "counted = of_params"),
        (
            "triton: a state stays fresh",
            "0.0, tl.float32), mask=there & stepped)",
            "1.0, tl.float32), mask=there & stepped)",
        ),
        ("triton: rows are not clipped", "if i == grad_scale_at:", "if i == -1:"),
        ("triton: squares beyond the end", "else tl.where(lanes < count, x * x, 0.0)", "else x * x"),
        ("triton: a sum's carry is lost", "carry = word >> 32", "carry = word * 0"),
    ),
]

BY_VALUE = [
    *_of(
        "csrc/rules.h",
        "clipping_by_value kernels",
        ("by value, c++: a NaN becomes the limit", "return limit < g ? limit : g;", "return g < limit ? g : limit;"),
        (
            "by value, c++: what is negative is not clipped",
            "  return at_least(-rule.grad_limit, g);\n",
            "  return g;\n",
        ),
        (
            "by value, c++: gradients are clipped before their factor",
            "  g = g * rule.grad_scale;\n  g = at_most(rule.grad_limit, g);\n  return at_least(-rule.grad_limit, g);\n",
            "  g = at_most(rule.grad_limit, g);\n  return at_least(-rule.grad_limit, g) * rule.grad_scale;\n",
        ),
        ("by value, nvcc: a NaN becomes the limit", "min.NaN.f32", "min.f32"),
    ),
    *_of(
        "wd_kernels/backends/triton_kernels.py",
        "clipping_by_value kernels",
        (
            "by value, triton: a NaN becomes the limit",
            "return tl.where(tl.abs(g) > limit, bits.to(g.dtype, bitcast=True), g)",
            "return tl.where(tl.abs(g) <= limit, g, bits.to(g.dtype, bitcast=True))",
        ),
    ),
    *_of(
        "wd_kernels/backends/triton_begin.py",
        "clipping_by_value clipping",
        (
            "by value, triton: a device makes the limit of the momentum",
            "own[3], own[4], own[5]",
            "own[3], own[5], own[4]",
        ),
    ),
    *_of(
        "wd_kernels/state_dict.py",
        "clipping_by_value",
        ("by value: a saved limit is loaded", "LIMIT, VALUE, AVERAGE, *PULLS)", "LIMIT, AVERAGE, *PULLS)"),
    ),
    *_of(
        "wd_kernels/functional.py",
        "clipping_by_value functional",
        ("by value: flat buffers are not clipped", "eta, grad_factor, max_grad_value)", "eta, grad_factor, None)", 1),
    ),
]

CAPTURE = [
    *_of(
        "csrc/cuda/begin.h",
        "capture spikes",
        ("cuda: a tensor of float64 is read as float32", "% 2 == 0) return double", "% 2 >= 0) return double"),
        ("cuda: a schedule past its table goes on", "!= 0 && steps >= length) found", "!= 0 && false) found"),
        ("cuda: the weight decay of a schedule stays", "group.weight_decay * table[length + at]", "group.weight_decay"),
        ("cuda: eta that follows lr multiplies it", "own[kBaseLr] != 0 ? group.lr : group.eta", "group.eta"),
        (
            "cuda: a skipped step is counted by schedules",
            "== 0 || !moves || skip) continue;",
            "== 0 || !moves) continue;",
        ),
        ("cuda: a step that freezes all is counted", "== 0 || !moves || skip) continue;", "== 0 || skip) continue;"),
        ("cuda: a spike is not skipped", "(all & kPast) != 0 || spike;", "(all & kPast) != 0;"),
        ("cuda: a spike is told by too few", "n >= (window < 4 ? 2 : window / 2) && !(x", "!(x"),
        ("cuda: what is not finite is remembered", "          if (x - x == 0) {\n", "          {\n"),
    ),
    *_of(
        "csrc/rules.h",
        "capture",
        ("rows: proximal steps are not scaled", "scale = 1 / (1 + eta * lambda);", "scale = 1;"),
        ("rows: the identity is a metric like any other", "of.mode == 4 ? of.a : of.eta", "of.eta"),
        (
            "rows: the lr sits outside the buffer",
            "const bool inside = paper && momentum != 0;",
            "const bool inside = false;",
        ),
        ("rows: eta 0 freezes nothing", "return lr == 0 || eta == 0 ? 1 : 0;", "return lr == 0 ? 1 : 0;"),
        (
            "rows: all decay is slowed",
            "fixed_decay = DecayScalars(of.mode, of.weight_decay, of.eta, 0).decay;",
            "fixed_decay = 0;",
        ),
    ),
    *_of(
        "csrc/python/clipping.cpp",
        "spikes",
        ("spikes: the deviation is that of all", "sum_of_block(off) / double(n - 1)", "sum_of_block(off) / double(n)"),
        ("spikes: half a window is not waited for", "n >= std::max<int64_t>(2, window / 2) && !(x", "n >= 2 && !(x"),
        ("spikes: a loss is not looked at", "if (has_loss_) skip |=", "if (false) skip |="),
        ("spikes: of a NaN nothing is told", "!(x - mean <= sigma * deviation)", "x - mean > sigma * deviation"),
    ),
    *_of(
        "wd_kernels/backends/triton_begin.py",
        "capture spikes",
        ("triton: a tensor of float64 is not read", "tl.where(double, from_double,", "tl.where(double, number,"),
        (
            "triton: the weight decay of a schedule stays",
            "lam = tl.where(tabled, lam * tl.load",
            "lam = tl.where(tabled, lam + 0 * tl.load",
        ),
        ("triton: eta that follows lr multiplies it", "a = tl.where(follows, lr, eta * lr)", "a = eta * lr"),
        (
            "triton: a skipped step is counted by schedules",
            "counted = tl.where((skip == 0) & (moves",
            "counted = tl.where((moves",
        ),
        (
            "triton: a schedule past its table goes on",
            "tabled & (endless != 0) & (t >= length)",
            "tabled & (endless != 0) & (t < 0)",
        ),
        ("triton: a spike is not skipped", "| (past != 0) | spike", "| (past != 0)"),
        (
            "triton: a nesterov step without momentum",
            "tl.where(nesterov, momentum, 1.0)",
            "tl.where(nesterov, 1.0, 1.0)",
        ),
    ),
    *_of(
        "wd_kernels/live.py",
        "capture",
        ("live: a tensor elsewhere is read", "    if t.device != device:", "    if False:"),
        ("live: float64 is not told", " + (tensor.dtype == torch.float64)", ""),
        ("live: any schedule is a table", "if not can_be_tabled(schedule):", "if False:"),
    ),
    *_of(
        "wd_kernels/schedules/tables.py",
        "capture",
        ("tables: a schedule never settles", "longest if settles is None else settles + 1", "longest"),
        ("tables: the last value is missing", "settles + 1)", "settles or 1)"),
        ("tables: parts may be any function", "return all(map(can_be_tabled, schedule.parts))", "return True"),
    ),
    *_of(
        "wd_kernels/table/table.py",
        "capture",
        (
            "capture: a first step is captured",
            "        if self.puts:\n            raise",
            "        if False:\n            raise",
        ),
        (
            "capture: a copied gradient is captured",
            "found.gapped is not None or found.known.grad_copy",
            "False and found.known.grad_copy",
        ),
        ("capture: graphs are forgotten", "        goes_on = bool(self.norms.captured)\n", "        goes_on = False\n"),
        ("capture: histories begin anew", "            steps.copy_(self.counts.steps)\n", "            pass\n"),
        ("capture: other memory is stepped", "if sorted(now) != sorted(captured) or watch", "if watch"),
        ("capture: counts part", "if pairs[one][1] != pairs[i][1]:", "if False:"),
        (
            "capture: a schedule_step that was set is not taken",
            'self.norms.counts.append((steps, stepping.check(group, f"param group {g}")))',
            "pass",
        ),
    ),
    *_of(
        "wd_kernels/table/table.py",
        "capture",
        (
            "rows: of who had the count before",
            'from now on."""\n        self._known_row_keys = None\n',
            'from now on."""\n',
        ),
        (
            "schedules: eta that somebody sets stands",
            "(group, key, view) for key, view in shown.items() if group.get(key) is not view]",
            '(group, "schedule_step", steps)] if group.get("schedule_step") is not steps else []',
        ),
        ("capture: a new schedule's table is made in it", "if ticks or new:", "if ticks:"),
    ),
    *_of(
        "wd_kernels/norms.py",
        "capture",
        ("schedules: a step without gradients is not counted", "bank.schedule_steps[g] += counts", "pass"),
    ),
    *_of(
        "wd_kernels/backends/device_copy.py",
        "capture",
        (
            "capture: memory is written again",
            "(here, there), self._reserved = self._reserved, None",
            "here, there = self._reserved",
        ),
    ),
    *_of(
        "wd_kernels/backends/device.py",
        "capture",
        (
            "capture: of the host's counts",
            "    if norms is None or norms.bank is None or not norms.capturable:\n",
            "    if False:\n",
        ),
        (
            "capture: of a norm that others have a part in",
            "    if norms.measures and norms.reductions:\n",
            "    if False:\n",
        ),
    ),
    *_of(
        "wd_kernels/optimizer.py",
        "capture spikes",
        ("capture: a state is loaded", '        self._refuse_captured("a state is loaded")\n', ""),
        ("spikes: a loss is told twice", "            self.latest_loss = None\n", "            pass\n"),
    ),
    *_of(
        "wd_kernels/state_dict.py",
        "capture",
        (
            "capture: a saved schedule_step is the device's",
            'if stepping.counted(own) and isinstance(own.get("schedule_step"), Tensor):',
            "if False:",
        ),
    ),
]

ACCUMULATE = [
    *_of(
        "csrc/cpu/squares.inc",
        "accumulation",
        (
            "accumulate: what is new is added to",
            "add_block(total, block, n, moving.row != 0);",
            "add_block(total, block, n, false);",
        ),
        ("accumulate: the squares are the gradient's", "        block = total;\n", ""),
    ),
    *_of(
        "csrc/cuda/begin.h",
        "accumulation",
        ("cuda: what is new is added to", "count - begin, moving.row != 0, whole)", "count - begin, false, whole)"),
        ("cuda: sums past the end are written", "      if (e < count) at[e]", "      at[e]"),
    ),
    *_of(
        "csrc/python/changes.cpp",
        "accumulation",
        ("accumulate: gradients are stepped, not sums", "if (view.gradients == nullptr) return", "if (true) return"),
    ),
    *_of(
        "wd_kernels/backends/triton_begin.py",
        "accumulation",
        (
            "triton: what is new is added to",
            "tl.broadcast_to(new, lanes.shape) == 0",
            "tl.broadcast_to(new, lanes.shape) >= 0",
        ),
    ),
    *_of(
        "wd_kernels/accumulation.py",
        "accumulation",
        (
            "accumulate: sums are those of the last pass",
            "self._complete = len(params) == len(self.full)",
            "self._complete = True",
        ),
        (
            "accumulate: who was lent them writes nothing",
            "known = self._complete and not self.lent",
            "known = self._complete",
        ),
        (
            "accumulate: the sums of what left stay",
            "        self._complete = False\n        known = set(params)\n",
            "        known = set(params)\n",
        ),
        ("accumulate: flat gradients are dropped", "p.grad is not None and attached(p):", "False:"),
    ),
    *_of(
        "csrc/python/step.cpp",
        "accumulation",
        ("accumulate: a step that was interrupted is forgotten", "  gradients.taken();\n", ""),
    ),
    *_of(
        "wd_kernels/norms.py",
        "accumulation",
        ("accumulate: sums are not taken", "self.measured = accumulated.sums.sum(0)", "self.measured = None"),
        (
            "accumulate: sums of other groups",
            "if same_objects(params, accumulated.params) and accumulated.slot_of",
            "if accumulated.slot_of",
        ),
    ),
    *_of(
        "wd_kernels/optimizer.py",
        "accumulation",
        (
            "accumulate: an infinity that a scaler has not seen",
            "limits._replace(measures=True, skip_nonfinite=True)",
            "limits",
        ),
        (
            "accumulate: what is left is not stepped",
            "        self._accumulators.add(groups, self.backend, self._flat_gradients)\n        self._table",
            "        self._table",
        ),
        (
            "accumulate: a step leaves the sums",
            "            self._accumulators.clear()\n",
            "            pass\n",
        ),
    ),
]

CPU_EPILOGUES = _of(
    "csrc/cpu/mover.inc",
    "epilogues",
    (
        "cpu: groups of a block add up neighbours, not halves",
        "sums[k] = sums[k] + sums[k + half];",
        "sums[k] = sums[2 * k] + sums[2 * k + 1];",
    ),
    (
        "cpu: what a last block lacks is the block before",
        "i = (count + kNeighbours - 1) / kNeighbours; i < kGroups;",
        "i = (count + kNeighbours - 1) / kNeighbours; i < 0;",
    ),
    (
        "cpu: an epilogue sees the parameter as it was not yet rounded",
        "if (!in_place[kParam] && kernel.reads_after)  // as",
        "if (in_place[kParam] && frozen)  // as",
    ),
    (
        "cpu: a later thread's sums go where the first one's do",
        "(own.begin + done) / kBlock * kernel.numbers;",
        "done / kBlock * kernel.numbers;",
    ),
    ("cpu: the largest of a block is of the block before, too", "numbers.largest[k] = Vector<T>{};\n  }", "}"),
    ("cpu: what is not there has numbers", "if (i + lanes > count)", "if (i > count)"),
)

CPU_AVERAGES = _of(
    "csrc/cpu/mover.inc",
    "averages",
    (
        "cpu: what follows a loop of its own begins late",
        "done % piece == 0) step",
        "done % piece == 0 && done > 0) step",
    ),
    (
        "cpu: the loop of formats takes outputs for parts",
        "if (role < outputs || role >= kernel.roles)",
        "if (role < kernel.roles + kernel.parts)",
    ),
    (
        "cpu: a loop of its own leaves the last piece",
        "count - done < piece ? count : done + piece",
        "done + piece < count ? done + piece : done",
    ),
    (
        "cpu: rows lie as far apart as this kernel reads",
        "launch.rows + own.moving.row * launch.row_width",
        "launch.rows + own.moving.row * kernel.width",
    ),
)

WATCHING = (
    _of(
        "csrc/cpu/mover.inc",
        "watching",
        ("watching, cpu: marks are of the stretch", "+ (own.begin + done) / kMarked", "+ done / kMarked"),
        ("watching, cpu: a loop of its own hides what was before", "compares ? kTile : kPiece", "kPiece"),
        (
            "watching, cpu: marks of the last tile alone",
            "marks[done / kMarked] |= marks_of",
            "marks[done / kMarked] = marks_of",
        ),
    )
    + _of(
        "csrc/formats.h",
        "watching",
        ("watching, native: a NaN that stays has changed", "return (a != b) & (", "return (a != b) | (0 & "),
    )
    + _of(
        "csrc/epilogues.h",
        "watching",
        ("watching, native: the change is squared once", "number[2] = moved * moved;", "number[2] = moved;"),
        (
            "watching, native: weights as they were",
            "number[1] = of.after * of.after;",
            "number[1] = of.before * of.before;",
        ),
    )
    + _of(
        "wd_kernels/backends/triton_kernels.py",
        "watching",
        ("watching, triton: infinities are finite", "g - g == 0.0, 0.0, 1.0)", "g == g, 0.0, 1.0)"),
        ("watching, triton: marks of what is not there", "y if full else tl.where(mask, y, x)", "y"),
        ("watching, triton: marks of what is frozen", "y = tl.where(frozen, x, in_memory(", "y = (in_memory("),
        ("watching, triton: a copy is what its master is", "+ 0x8000) & -65536)", ") & -1)"),
    )
    + _of(
        "wd_kernels/statistics.py",
        "watching",
        ("watching: every step is measured", "return self._taken % self.every == 0", "return True"),
        (
            "watching: a graph's numbers are found once",
            "if self._found is None or self._blocks.live:",
            "if self._found is None:",
        ),
        ("watching: what had no gradient counts", "rows *= stepped[:, None]", "pass"),
        ("watching: shards are measured apart", "        sum_over(process_group, rows, which)\n", ""),
        ("watching: the largest of a shard", "        largest_over(process_group, largest, which)\n", ""),
        (
            "watching: a step is measured though it was skipped",
            "& (each[:, wide + 1] == 0)",
            "& (each[:, wide + 1] >= 0)",
        ),
    )
    + _of(
        "wd_kernels/changes.py",
        "watching",
        ("watching: what is read stays marked", "            self._put(p, _lies(p), 0)\n", "            pass\n"),
        ("watching: memory that was exchanged has not changed", "known is None else -1", "known is None else 0"),
        ("watching: a bit of padding is an element", "        index = index[index < here.numel()]\n", "        pass\n"),
        (
            "watching: elements in the order of memory",
            "    if here.is_contiguous():\n        return index",
            "    return index",
        ),
        (
            "watching: changes are written before all are checked",
            "        writes.append((t, index, values.to(t.device)))",
            "        t.view(-1)[index] = values",
        ),
    )
    + _of(
        "wd_kernels/optimizer.py",
        "watching",
        (
            "watching: masters that were loaded have not changed",
            "            self._written(p for p, *_ in planned)\n",
            "",
        ),
        (
            "watching: a copy tracks nothing",
            'packed["track_changes"] = self.track_changes',
            'packed["track_changes"] = False',
        ),
    )
    + _of(
        "wd_kernels/table/watched.py",
        "watching",
        ("watching: numbers of a step that was skipped", "numbers.fill_(math.nan)", "pass"),
    )
    + _of(
        "wd_kernels/table/table.py",
        "watching",
        ("watching: marks that nobody reads any more", "key = (self.watches, own_marks)", "key = (self.watches, None)"),
    )
    + _of(
        "wd_kernels/sums.py",
        "watching",
        (
            "watching: digits that carry are cut",
            "digits = (low & MASK, middle & MASK, (high >> 32) + (middle >> 32))",
            "digits = (low & MASK, middle & MASK, high >> 32)",
        ),
    )
)

AVERAGES_NATIVE = _of(
    "csrc/epilogues.h",
    "averages",
    (
        "native: an average is of the weight alone",
        "lerp(output[0], of.after, ema_decay, one_minus_ema_decay)",
        "lerp(of.after, of.after, ema_decay, one_minus_ema_decay)",
    ),
) + _of(
    "csrc/cuda/begin.h",
    "averages",
    ("cuda: an average is looked up a step late", "table[place_in(t - 1, length)]", "table[place_in(t, length)]"),
    (
        "cuda: a mean begins a step late",
        "t > length ? 1 - 1 / double(t - length + 1) : 0",
        "t > length + 1 ? 1 - 1 / double(t - length + 1) : 0",
    ),
)

AVERAGES_TRITON = _of(
    "wd_kernels/backends/triton_begin.py",
    "averages",
    ("triton: an average is looked up a step late", "tl.minimum(t - 1, length - 1)", "tl.minimum(t, length - 1)"),
    ("triton: a mean has one weight more", "1.0 / (past + 1).to(tl.float64)", "1.0 / (past + 2).to(tl.float64)"),
) + _of(
    "wd_kernels/backends/triton_kernels.py",
    "averages",
    (
        "triton: what is averaged is not rounded",
        "lerp(outputs[0], after, ema_decay",
        "lerp(outputs[0], before, ema_decay",
    ),
)

AVERAGES = (
    _of(
        "wd_kernels/averages.py",
        "averages",
        ("averages: they begin a step early", "past = t - self.after - 1", "past = t - self.after"),
        ("averages: they settle a step late", "return self.after + 1 + first", "return self.after + 2 + first"),
        ("averages: a number begins with the first step", "return EMA(number, after=-1)", "return EMA(number)"),
    )
    + _of(
        "wd_kernels/averaging.py",
        "averages",
        ("averages: a swap keeps no copy", "(p, local(p).detach().clone())", "(p, local(p).detach())"),
        (
            "averages: names that are missing are not missed",
            "if not given.keys() & set(each)]",
            "if not names.keys() & set(each)]",
        ),
        (
            "averages: scales are not read",
            "return load(here, torch.float32, local(own[EMA.scale.name]).detach())",
            "return here.float()",
        ),
    )
    + _of(
        "wd_kernels/optimizer.py",
        "averages",
        ("averages: a swap may be taken back twice", "if self.opt._swapped is self.swapped:", "if True:"),
        ("averages: a step while swapped", """        self._refuse_swapped("step()")\n""", ""),
    )
    + _of(
        "wd_kernels/table/inspection.py",
        "averages",
        (
            "averages: they begin as zeros",
            "store(now, load(theta, arithmetic_dtype(theta.dtype), kept_master), None, scale)",
            "pass",
        ),
        ("averages: a mean begins anywhere", "count > average.after:", "count < 0:"),
    )
)

VOCABULARY = [
    *_of(
        "csrc/rules.h",
        "decay_vocabulary kernels",
        ("pull, c++: corrected is lr_scaled", "decay = a * eta * lambda;", "decay = a * lambda;"),
        ("pull, c++: caution looks at the weight", "u * pulled < rule.decay", "u * theta < rule.decay"),
        ("pull, c++: l2 pulls to 0", "rule(pulled, g + rule.l2 * pulled", "rule(pulled, g + rule.l2 * theta"),
        ("pull, c++: the metric pulls to 0", "rule(pulled, g", "rule(theta, g"),
    ),
    *_of(
        "csrc/cpu/mover.inc",
        "decay_vocabulary kernels",
        ("pull, cpu: a reference is another role", "tiles[kernel.roles - 1]", "tiles[kernel.roles - 2]"),
    ),
    *_of(
        "csrc/cuda/begin.h",
        "decay_vocabulary",
        (
            "pull, cuda: a threshold is the center",
            "row.decay_threshold = known[of_group + 2]",
            "row.decay_threshold = known[of_group + 1]",
        ),
    ),
    *_of(
        "csrc/cuda/chunk.h",
        "kernels decay_vocabulary",
        ("pull, cuda: a reference is the round's first", "P::load(to[k].element", "P::load(to[0].element"),
    ),
    *_of(
        "wd_kernels/backends/triton_begin.py",
        "decay_vocabulary",
        ("pull, triton: corrected is lr_scaled", "a * eta * lam, decay)", "a * lam, decay)"),
        (
            "pull, triton: all that ends rows is the seed",
            "of_settings, there)\n            tl.store(groups + g * group_width + group_scalars + i",
            "of_settings, there) * (i == 0)\n            tl.store(groups + g * group_width + group_scalars + i",
        ),
    ),
    *_of(
        "wd_kernels/backends/triton_kernels.py",
        "kernels decay_vocabulary",
        ("pull, triton: caution looks at the weight", "u * pulled <", "u * theta <"),
        ("pull, triton: a reference is a state", "values[len(formats) - 1]", "values[2]"),
    ),
    *_of(
        "wd_kernels/reference.py",
        "decay_vocabulary",
        ("pull, reference: caution looks at the weight", "u * pulled <", "u * theta <"),
        ("pull, reference: l2 pulls to 0", "g + s.l2 * pulled", "g + s.l2 * theta"),
    ),
    *_of(
        "wd_kernels/rules/scalars.py",
        "decay_vocabulary rules reference",
        ("pull: corrected is lr_scaled", "return 0.0, a * eta * lam, 1.0, 0.0", "return 0.0, a * lam, 1.0, 0.0"),
    ),
    *_of(
        "wd_kernels/rules/pull.py",
        "decay_vocabulary",
        ("pull: all are cautious", "0.0 if self.cautious else -math.inf", "0.0"),
        ("pull: a cautious l2 is taken", "if cautious and decay in WHOLE:", "if False:"),
        ("pull: a center beside references is taken", "if to is not None and center != 0.0:", "if False:"),
    ),
    *_of(
        "wd_kernels/table/inspection.py",
        "decay_vocabulary",
        ("pull: references begin as zeros", "if state in (EMA, REFERENCE):", "if state is EMA:"),
        ("pull: both parts of complex weights have the center", "if pull.center and p.is_complex():", "if False:"),
    ),
    *_of(
        "wd_kernels/table/table.py",
        "decay_vocabulary",
        ("pull: two may not have one reference", "written=name != REFERENCE.name", "written=True"),
    ),
    *_of(
        "wd_kernels/references.py",
        "decay_vocabulary",
        (
            "pull: a parameter may be its own reference",
            "if to is p or (p.numel() and there.data_ptr() == theta.data_ptr()):",
            "if False:",
        ),
        ("pull: a loaded state takes what was given", "if kept is not None and REF", "if kept is None and REF"),
    ),
    *_of(
        "wd_kernels/formats.py",
        "decay_vocabulary",
        (
            "pull: first weights are rounded beside a master",
            "return torch.float32 if self.master_dtype(dtype) is not None else dtype",
            "return dtype",
        ),
    ),
    *_of(
        "wd_kernels/schedules/stepping.py",
        "decay_vocabulary",
        ("pull: two schedules are one", "found[0], found[1] * decayed", "found[0], found[1]"),
        ("pull: a schedule alone does not count", 'ticks.append((group, "schedule_step", t + 1))', "pass"),
    ),
    *_of(
        "wd_kernels/schedules/tables.py",
        "decay_vocabulary",
        ("pull: a device has no schedule of the decay", "own(t)) * self.decays(t)", "own(t))"),
    ),
    *_of(
        "wd_kernels/state_dict.py",
        "decay_vocabulary",
        ("pull: a loaded group has what was saved", "LIMIT, VALUE, AVERAGE, *PULLS)", "LIMIT, VALUE, AVERAGE)"),
    ),
    *_of(
        "wd_kernels/decay_conversion.py",
        "conversion",
        ("pull: corrected is converted as lr_scaled", '(2 if mode == "corrected" else 1)', "1"),
    ),
]

CPU_PLAN = _of(
    "csrc/cpu/plan.cpp",
    "native backends",
    ("cpu: skip is ignored", "if (launch.control->skip == 0 && elements != 0) on", "if (elements != 0) on"),
    ("cpu: a row just past the end is accepted", "moving.row < rows,", "moving.row <= rows,"),
    ("cpu: a chunk past the last segment is accepted", "segment < plan.segments &&", "segment <= plan.segments &&"),
    ("cpu: elements are those of the last chunk alone", "elements += std::max", "elements = std::max"),
    (
        "cpu: the instruction set is chosen once for all",
        "  const char* forced = std::getenv",
        "  static const char* const forced = std::getenv",
    ),
)

CUDA_CHUNK = _of(
    "csrc/cuda/chunk.h",
    "movers kernels cuda",
    (
        "cuda: the last round writes one element too many",
        "if (masked && i >= end) continue;",
        "if (masked && i > end) continue;",
        1,
    ),
    (
        "cuda: offsets have 32 bits",
        "const int64_t begin = (chunk >> 32) * launch.chunk_size;",
        "const int64_t begin = int32_t((chunk >> 32) * launch.chunk_size);",
    ),
    ("cuda: alignment is not asked for", "moving.aligned ? count - count % of_round : 0", "count - count % of_round"),
    (
        "cuda: 16-bit rounds are counted twice as long",
        "kThreads * vectors * Own::kWidth",
        "kThreads * kVectors * Own::kWidth",
    ),
    (
        "cuda: the rest begins one element late",
        "for (int from = done; from < count;",
        "for (int from = done + (done > 0); from < count;",
    ),
    ("cuda: frozen weights move", "rule.frozen != 0", "rule.frozen < 0"),
    ("cuda: skip is ignored", "if (rest <= 0 || launch.control->skip != 0) return;", "if (rest <= 0) return;"),
    (
        "cuda: a chunk goes on to the end of its segment",
        "rest < launch.chunk_size ? int(rest) : launch.chunk_size",
        "int(rest)",
    ),
    ("cuda: a step has 65536 segments at most", "launch.moving[chunk & 0xffffffff]", "launch.moving[chunk & 0xffff]"),
    (
        "cuda: states are not moved on to the chunk",
        "(place[address_word(kState + n)], begin)",
        "(place[address_word(kState + n)], 0)",
    ),
    (
        "cuda: the gradients' factor is ignored",
        "rule_of_row<Rule>(row, launch.control->grad_factor)",
        "rule_of_row<Rule>(row, 1.0)",
    ),
)

CUDA_EPILOGUES = _of(
    "csrc/cuda/chunk.h",
    "epilogues",
    (
        "cuda: a block adds up what mirrors itself, not halves",
        "together(adds, of[i], of[i + half]);",
        "together(adds, of[i], of[2 * half - 1 - i]);",
    ),
    (
        "cuda: what a last block lacks is the block before",
        "+ lane; i < kBlock / width;",
        "+ lane; i < 0;",
    ),
    (
        "cuda: an epilogue sees the parameter as it was not yet rounded",
        "frozen ? before : T(P::load(p[k].element + e, also))",
        "frozen ? before : x",
    ),
    (
        "cuda: a later chunk's sums go where the first one's do",
        "memory<T>(place[kOutput], begin / kBlock * kNumbers)",
        "memory<T>(place[kOutput], 0)",
    ),
)

CHECK_LAUNCH = _of(
    "csrc/cuda/check_launch.h",
    "cuda native movers",
    ("launch: chunks of any size are accepted", "chunk_size > 0 && chunk_size % kBlock == 0", "chunk_size > 0"),
    ("launch: rows of another rule are accepted", "rows.size(1) >= width", "rows.size(1) >= 0"),
)

WALK = _of(
    "csrc/python/changes.cpp",
    "table properties native flat kernels",
    (
        "walk: strides are not compared",
        "shape[d] > 1 && e.numel > 0) return false;",
        "shape[d] > 1 && e.numel < 0) return false;",
    ),
    ("walk: shapes are not compared", "if (t.shape[d] != shape[d]) return false;", ""),
    ("walk: dtypes are not compared", "dtype_of(t) != role.dtype || ", ""),
    (
        "walk: addresses are kept unchecked",
        "return role.address == 0 || reinterpret_cast<int64_t>(address(t)) == role.address;",
        "return true;",
    ),
    (
        "walk: another step count is not seen",
        "return item(own, position, view.names[0]) == count.object &&",
        "return item(own, position, view.names[0]) != nullptr &&",
    ),
    (
        "walk: a step count that lies elsewhere is taken",
        "lies_at(count, view.steps + i) &&",
        "view.steps + i != nullptr &&",
    ),
    (
        "walk: addresses are aligned by 8 bytes",
        "reinterpret_cast<uintptr_t>(grad_address) % 16 == 0",
        "reinterpret_cast<uintptr_t>(grad_address) % 8 == 0",
    ),
    (
        "walk: a parameter without a gradient is stepped with its last",
        "if (!now && e.kind != kUnseen) view.moving[e.segment].numel = 0;",
        "",
    ),
    ("walk: it says nothing of gradients that came or went", "changed |= now != (view.active[i] != 0);", ""),
    ("walk: the border between groups is not seen", "i >= total || view.expected[i].group != g", "i >= total"),
    (
        "walk: states in another order are taken for those before",
        "if (key != view.params[size_t(of)]) return false;",
        "",
    ),
    ("walk: a lazy bit is not seen", "    if (lazy(t)) return false;\n", ""),
    ("walk: a count below 0 is taken", "steps >= 0 && steps < 0x1p53f", "steps < 0x1p53f"),
)

LAZY = _of(
    "csrc/python/tensors.cpp",
    "table properties functional kernels",
    ("tensors: a conjugate is not seen", "lazy_flags = negative | conjugate;", "lazy_flags = negative;"),
    ("tensors: a negative bit is not seen", "lazy_flags = negative | conjugate;", "lazy_flags = conjugate;"),
)

HELD = _of(
    "csrc/python/changes.cpp",
    "flat_tensors flat native table torture",
    ("walk: a gradient is never let go", "      Py_DECREF(grad);\n", ""),
    (
        "flat walk: the states' addresses are kept unchecked",
        "role < e.roles; ++role) {\n    const int64_t at",
        "role < kState; ++role) {\n    const int64_t at",
    ),
    (
        "flat walk: the gradient's shape is not compared",
        "for (const Role role : {kParam, kGrad})",
        "for (const Role role : {kParam})",
    ),
    ("flat walk: dtypes are not compared", "if (dtype_code_of(held.handle) != held.dtype) return false;", ""),
    (
        "flat walk: strides are not compared",
        "(strides[d] != dims[role.dims + ndim + d] && shape[d] > 1)",
        "(strides[d] != dims[role.dims + ndim + d] && shape[d] < 0)",
    ),
    (
        "flat walk: any gradient object will do",
        "|| grad != held[e.held + kGrad].object) return false;",
        "|| grad == Py_None) return false;",
    ),
    (
        "flat walk: any state under the name will do",
        "view.names[roles[role].name]) != held[e.held + role].object) return false;",
        "view.names[roles[role].name]) == nullptr) return false;",
    ),
    (
        "flat walk: a lazy bit is not seen",
        "    if (lazy(held[e.held + role])) return false;\n",
        "",
    ),
)

ROWS = _of(
    "csrc/python/rows.cpp",
    "table flat properties",
    ("rows: groups of the same count share a row", "key = {view.expected[i].group,", "key = {0,"),
    (
        "rows: counts that differ by 4096 share a row",
        "int64_t(view.steps[i]) + 1,",
        "int64_t(view.steps[i]) % 4096 + 1,",
    ),
    (
        "runs: chunks of runs of other sizes stay",
        " ||\n         std::memcmp(view.run_plan.data() + firsts, view.run_capacities, runs * sizeof(int64_t)) != 0;",
        ";",
    ),
    ("runs: neighbours of different rows are one", " &&\n        view.run_moving[run].row == moving.row", ""),
    (
        "runs: neighbours in memory alone are one",
        " &&\n        place[kOrigin] - view.run_places[run * view.place_words + kOrigin] == range.offset - offset",
        "",
    ),
    ("runs: parameters with others between them are one", " && before->end == range.offset", ""),
    ("runs: neighbours of different buffers are one", "before->buffer == range.buffer && ", ""),
    (
        "runs: gradients elsewhere are taken for flat ones",
        " && reinterpret_cast<int64_t>(moving.grad) == range.grad;",
        ";",
    ),
    (
        "runs: the padding is not stepped over",
        "range.offset - offset + moving.numel",
        "view.run_moving[run].numel + moving.numel",
    ),
)

KEYS = _of(
    "csrc/python/changes.h",
    "table flat properties",
    ("rows: a fresh buffer shares the row of others", " && a.fresh == b.fresh", ""),
    ("rows: other counts have the rows of those before", "a.count == b.count && ", ""),
)

STEP = _of(
    "csrc/python/step.cpp",
    "table_failures schedules table optim flat failures surroundings torture properties",
    ("step: what is held is not what is there", "now != there && there != nullptr && views", "now == &there && views"),
    (
        "step: autograd is not told",
        "counted(PyObject_CallFunctionObjArgs(work.increment, work.written, nullptr));",
        "counted(none());",
    ),
    (
        "step: a launch that failed is counted",
        "if (outcome == Outcome::failed) return nullptr;",
        "for (int64_t i = 0; outcome == Outcome::failed && i < view.parameters; ++i) view.steps[i] += view.active[i];\n"
        "    if (outcome == Outcome::failed) return nullptr;",
    ),
    (
        "step: a skipped step is counted",
        "if (view.control->skip != 0) return true;",
        "for (int64_t i = 0; view.control->skip != 0 && i < view.parameters; ++i) view.steps[i] += view.active[i];\n"
        "  if (view.control->skip != 0) return true;",
    ),
    (
        "step: a skipped step advances its schedule",
        "if (view.control->skip != 0) return true;",
        "for (Py_ssize_t i = 0; view.control->skip != 0 && i < PyList_Size(work.ticks); ++i) {\n"
        "    PyObject* const tick = PyList_GetItem(work.ticks, i);\n"
        "    PyObject_SetItem(PyTuple_GetItem(tick, 0), PyTuple_GetItem(tick, 1), PyTuple_GetItem(tick, 2));\n"
        "  }\n"
        "  if (view.control->skip != 0) return true;",
    ),
    ("step: a stand-in is not copied back", "i < PyList_Size(work.copies);", "i < 0;"),
    ("step: buffers stay fresh", "    view.fresh[i] = 0;\n", ""),
    ("step: states that were made are not put into the optimizer", "i < PyList_Size(work.puts);", "i < 0;"),
    ("step: counts that were changed keep their row", "if (!same_rows || runs ||", "if (runs ||"),
    (
        "step: states that a hook has put there are overwritten",
        "if (now != own && (now == nullptr ? Py_None : now) != found) return none();",
        "",
    ),
)

LAUNCHES = _of(
    "csrc/python/launches.cpp",
    "native table failures torture",
    ("plan: chunks of any size are accepted", "chunk_size > 0 && chunk_size % kBlock == 0 &&", "chunk_size > 0 &&"),
    ("plan: rows of another rule are accepted", "memory.columns >= own->kernel.width", "memory.columns >= 0"),
    (
        "plan: its tensors may die",
        "made->tensors = PyTuple_Pack(4, chunks, places, moving, control);",
        "made->tensors = PyTuple_Pack(0);",
    ),
    ("launches: what was begun is left half done", "} else if (begun) {", "} else if (plans_.size() > 99) {"),
    ("launches: what failed first is done again", "} else if (begun) {", "} else if (plans_.size() < 99) {"),
    ("launches: the last exception is raised, not the first", "  if (type_ == nullptr) {", "  if (kTries > 1) {", 0),
)

MEMORY = _of(
    "csrc/python/memory.cpp",
    "native functional",
    ("memory: any strides are taken", "expected == 0 || lent.strides[d] == expected", "expected >= 0"),
    ("memory: any dtype is taken", " && dtype_of(lent) == code_of(dtype);", ";"),
)

CUT = _of(
    "csrc/python/rows.cpp",
    "device_copy movers",
    ("chunks: one too many for whole multiples", "(numels[s] + size - 1) / size", "numels[s] / size + 1"),
)

GATHER = _of(
    "csrc/python/lists.cpp",
    "functional operators compile",
    (
        "lists: a gradient that shares a parameter's memory is taken",
        "span.begin < (span.written ? any : written)",
        "span.begin < written",
    ),
    ("lists: dtypes are not compared", " || dtype_of(t) != dtypes[role]", ""),
    ("lists: all have the first row", "moving[i].row = number_of(", "moving[i].row = 0 * number_of("),
    (
        "lists: strides are not compared",
        "(t.strides[d] != strides[d] && shape[d] > 1)",
        "(t.strides[d] != strides[d] && shape[d] < 0)",
    ),
    ("lists: a lazy bit is not seen", "    if (lazy(t)) return false;\n", ""),
    (
        "lists: alignment is that of the last role",
        "moving.aligned &= role >= scales || begin % 16 == 0;",
        "moving.aligned = role >= scales || begin % 16 == 0;",
    ),
    ("lists: parameters with gaps are stepped as dense", "if (numel > 0 && !dense(t)) return false;", ""),
    (
        "lists: a complex element counts as one",
        "moving.numel = numel * (t.code == kComplexCode ? 2 : 1);",
        "moving.numel = numel;",
    ),
)

EIGHT_BITS = [
    *_of(
        "csrc/formats.h",
        "kernels",
        ("c++: a sum of squares may become 0", "return larger(code, smaller(a, 1));", "return code;"),
        ("c++: 8 bits are rounded up half-way", "(1 << (kLost - 1)) - 1 + (bits >> kLost & 1)", "1 << (kLost - 1)"),
        (
            "c++: a NaN in 8 bits is an infinity",
            "smaller(bits_to<int32_t>(y), 0x7fc00000)",
            "smaller(bits_to<int32_t>(y), 0x7f800000)",
        ),
        ("c++: a scale of 0", "return larger(below, 1);", "return larger(below, 0);"),
        ("c++: negative numbers in 8 bits are decoded as positive", "| (code & INT32_MIN)) : x", ") : x"),
        ("c++: squares have the range of their roots", "(is_signed ? 14 : 30)", "14"),
    ),
    *_of(
        "csrc/cpu/mover.inc",
        "kernels int8",
        (
            "cpu: a tile's scale is that of the last one",
            "scales[first / kScaled] = uint8_t(scale);",
            "scales[0] = uint8_t(scale);",
        ),
        (
            "cpu: the last, short tile is not stored",
            "if (done < count) encode(done, int(count - done));",
            "",
        ),
        (
            "cpu: in its own loop the last, short tile is not stepped",
            "if (begin < size) step_one(begin, int(size - begin));",
            "",
        ),
        (
            "cpu: every 256 elements begin the scales anew",
            "reinterpret_cast<uint8_t*>(memory[scales + k]) + first / kScaled",
            "reinterpret_cast<uint8_t*>(memory[scales + k])",
        ),
    ),
    *_of(
        "csrc/cuda/chunk.h",
        "kernels",
        ("cuda: a tile has the scale of its first lane", "other < kTileLanes; other *= 2", "other < 1; other *= 2"),
        (
            "cuda: on the masked path a scale is that of a tile ago",
            "scale[k][n] = roles.scale[n][i / kScaled];",
            "scale[k][n] = roles.scale[n][i / kScaled / (masked ? 2 : 1)];",
        ),
    ),
    *_of(
        "wd_kernels/backends/triton_kernels.py",
        "kernels",
        (
            "triton: a sum of squares may become 0",
            "return tl.maximum(code, tl.minimum(a, 1)), scale",
            "return code, scale",
        ),
        (
            "triton: what is beyond a tensor counts in its last tile",
            "within = a if mask is None else tl.where(mask, a, 0)",
            "within = a",
        ),
        (
            "triton: scales lie as far on as elements",
            "further += (at[role] + offset // TILE,)",
            "further += (at[role] + offset,)",
        ),
    ),
    *_of(
        "wd_kernels/reference.py",
        "int8",
        (
            "reference: a sum of squares may become 0",
            "code = torch.where((a > 0) & (code == 0), 1, code)",
            "code = code + 0",
        ),
        ("reference: 8 bits are drawn from too few bits", "<< LOST - 16", "<< LOST - 17"),
        (
            "reference: a tile of 64 elements",
            ".view(-1, TILE).amax(1, keepdim=True)",
            ".view(-1, TILE).amax(1, keepdim=True).cummax(0)[0]",
        ),
    ),
    *_of(
        "wd_kernels/scales.py",
        "int8",
        ("scales: shards end within a tile", "fits = chunk % TILE == 0 and", "fits = True or"),
        ("scales: codes leave as moments", "names = {name: code_name(name) for name in _in_8_bits(own)}", "names = {}"),
        ("scales: what was cast is taken", "isinstance(value, Tensor) and value.dtype != dtype:", "False:"),
        (
            "scales: tiles that lie otherwise are taken",
            "if value.dtype == live and not alike and not convert:",
            "if False:",
        ),
        (
            "scales: a buffer of another form is not carried",
            "store(codes, carried(here, factor, of_state), None, scale)",
            "store(codes, here, None, scale)",
        ),
        ("scales: rounded unasked", "if has_scales(live) and (saved_so or convert):", "if has_scales(live):"),
    ),
    *_of(
        "wd_kernels/table/inspection.py",
        "int8",
        (
            "inspection: a state in 8 bits without scales begins anew",
            "if state.of is not None and value is None:",
            "if False:",
        ),
        (
            "inspection: the first value of a state in 8 bits is 0",
            "now = state.begin(now, settings, scale)",
            "now = state.begin(now, settings, scale) if scale is None else now",
        ),
    ),
    *_of(
        "csrc/python/lists.cpp",
        "int8",
        ("lists: too few scales are taken", "return expected == (elements + kPadding - 1) / kPadding;", "return true;"),
    ),
]

REFERENCE = _of(
    "wd_kernels/reference.py",
    "reference kernels backends storage",
    ("reference: lerp always from the old value", "if bool(w < 0.5) else", "if bool(w <= 1) else"),
    ("reference: a weight of one half is lerped from the far end", "if bool(w < 0.5) else", "if bool(w <= 0.5) else"),
    (
        "reference: torch's inexact root",
        "return torch.from_numpy(np.asarray(np.sqrt(x.contiguous().numpy()))).view_as(x)",
        "return x.sqrt() if np else x",
    ),
    (
        "reference: frozen weights move",
        'if not float(row[rule.scalars.index("frozen")]):',
        'if float(row[rule.scalars.index("frozen")]) >= 0:',
    ),
    ("reference: bfloat16 ties are rounded up", "0x7FFF + ((bits >> 16) & 1) if", "0x8000 if"),
    (
        "reference: a float16 NaN is left as it comes",
        "memory.view(torch.int16).masked_fill_(value.isnan(), 0x7E00)",
        "pass",
    ),
    (
        "reference: subnormals are flushed as the caller has set",
        "@torch.no_grad()\n@subnormals()\n",
        "@torch.no_grad()\n",
    ),
    (
        "reference: the gradients' factor is multiplied in after the l2 term",
        "u, new = rule.equation(s, theta, g + s.l2 * theta, states)",
        "u, new = rule.equation(s, theta, g + s.l2 * theta * (s.grad_scale * factor), states)",
    ),
    (
        "reference: the decay is rounded into the weight before the update",
        "theta = theta - (s.decay * theta + u)",
        "theta = (theta - s.decay * theta) - u",
    ),
)

REFERENCE_EPILOGUES = _of(
    "wd_kernels/reference.py",
    "epilogues",
    (
        "reference: a block adds up neighbours, not halves",
        "padded[:, :half] + padded[:, half:]",
        "padded[:, ::2] + padded[:, 1::2]",
    ),
    ("reference: blocks are summed up in order of indices", "flat = _in_order(x)", "flat = x.flatten()"),
    (
        "reference: an epilogue sees the parameter as it was not yet rounded",
        "Element(before, load(theta, dtype, master), g, u, new)",
        "Element(before, after, g, u, new)",
    ),
    (
        "reference: an epilogue sees the gradient with its share of an l2 decay",
        "    u, new = rule.equation(s, theta, g + s.l2 * theta, states)",
        "    g = g + s.l2 * theta\n    u, new = rule.equation(s, theta, g, states)",
    ),
)

TRITON_ROUNDING = _of(
    "wd_kernels/backends/triton_kernels.py",
    "codegen triton movers kernels",
    ("triton: an inexact quotient", "return tl.div_rn(x, y)", "return x / y"),
    ("triton: an inexact root", "return tl.sqrt_rn(x)", "return tl.sqrt(x)"),
)

TRITON_KERNELS = _of(
    "wd_kernels/backends/triton_kernels.py",
    "movers kernels triton interpreter codegen",
    (
        "triton: lerp always from the new value",
        "near = w < 0.5",
        "near = w < 0.0",
    ),
    ("triton: a weight of one half is lerped from the far end", "near = w < 0.5", "near = w <= 0.5"),
    ("triton: amsgrad loses a NaN", "(v > v_max) | (v != v)", "v > v_max"),
    (
        "triton: AMD's root scales small numbers wrongly",
        "tl.where(small, x * 4294967296.0, x)",
        "tl.where(small, x * 2147483648.0, x)",
    ),
    (
        "triton: offsets have 32 bits",
        "begin = (chunk >> 32) * chunk_size\n    numel = tl.load(moved + 1)  # 0 without a gradient\n    row",
        "begin = (chunk >> 32).to(tl.int32) * chunk_size\n    numel = tl.load(moved + 1)\n    row",
    ),
    (
        "triton: the last block writes one element too many",
        "        mask = lanes < count",
        "        mask = lanes <= count",
    ),
    ("triton: alignment is not asked for", "!= 0\n    skip = tl.load(control", ">= 0\n    skip = tl.load(control"),
    ("triton: skip is ignored", "ended = skip | (begin >= numel)", "ended = begin >= numel"),
    ("triton: frozen weights move", '(scalar_names, "frozen")) != 0', '(scalar_names, "frozen")) < 0'),
    (
        "triton: a bfloat16 NaN is another",
        "0x7FC00000, value.to(tl.int32, bitcast=True))\n        return ((bits + 0x7FFF",
        "0x7FC10000, value.to(tl.int32, bitcast=True))\n        return ((bits + 0x7FFF",
    ),
    (
        "triton: a float16 NaN is left as it comes",
        "tl.where(value != value, 0x7E00, value.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16)",
        "value.to(tl.float16).to(tl.int16, bitcast=True)",
    ),
    ("triton: bfloat16 is cut off, not rounded", "((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)", "(bits >> 16)"),
    (
        "triton: a chunk goes on to the end of its segment",
        "tl.where(ended, 0, tl.minimum(numel - begin, chunk_size)",
        "tl.where(ended, 0, (numel - begin)",
    ),
    (
        "triton: a rest of one element is not stepped",
        "for offset in range(done, count, rest):",
        "for offset in range(done, count - 1, rest):",
    ),
    (
        "triton: scalars in float32 for float64",
        "        return tl.load(row + position)\n",
        "        return tl.load(row + position).to(tl.float32).to(tl.float64)\n",
    ),
    (
        "triton: the decay is rounded into the weight before the update",
        'return theta - (scalars[position(scalar_names, "decay")] * theta + u), g,',
        'return (theta - scalars[position(scalar_names, "decay")] * theta) - u, g,',
    ),
    ("triton: AdagradW's eps inside the root", "d = root(total) + eps", "d = root(total + eps)"),
    (
        "triton: float32 vectors are promised to be twice as long",
        "size = {1: 8, 2: 4, 3: 2,",
        "size = {1: 8, 2: 8, 3: 2,",
    ),
)

TRITON_EPILOGUES = _of(
    "wd_kernels/backends/triton_kernels.py",
    "epilogues",
    (
        "triton: an epilogue sees the parameter as it was not yet rounded",
        "tl.where(frozen, values[0], as_stored(theta, formats[0], keys[0], places, 0))",
        "tl.where(frozen, values[0], theta)",
    ),
)

TRITON = _of(
    "wd_kernels/backends/triton.py",
    "triton codegen interpreter",
    (
        "triton: products and sums are fused",
        '"enable_fp_fusion": False}\n    if capability is not None and (',
        '"enable_fp_fusion": True}\n    if capability is not None and (',
    ),
    (
        "triton: a kernel of other formats is taken as compiled",
        "key = (table.rule.name, spec)",
        "key = (table.rule.name,)",
    ),
    ("triton: the interpreter takes GPU tensors", 'if device.type != "cpu":', 'if device.type == "meta":'),
    ("triton: a version too old is taken", "< OLDEST:", "< (0, 0):"),
)

BACKENDS = [
    *_of(
        "wd_kernels/backends/__init__.py",
        "cuda interpreter errors",
        ("auto prefers cuda to triton", '("triton", "cuda")', '("cuda", "triton")'),
        ("auto falls back every time with a warning", "        _warned = True\n", ""),
    ),
    *_of(
        "wd_kernels/backends/cuda.py",
        "cuda movers",
        (
            "cuda: a kernel of other formats is taken as loaded",
            "key = (device, str(which))",
            "key = (device, str(which[:3]))",
        ),
        (
            "cuda: a failure to load is remembered as none",
            "        if not wrong:\n            self._fine.add(device)",
            "        self._fine.add(device)\n        if not wrong:",
        ),
    ),
    *_of(
        "wd_kernels/backends/device.py",
        "triton movers",
        ("gpu: one launch for a bucket without elements", " and chunks[b.index].words.numel()]", "]"),
    ),
    *_of(
        "wd_kernels/backends/reference.py",
        "backends functional",
        ("reference: skip is ignored", "bucket.members if not skip else ():", "bucket.members:"),
    ),
]

RULES = [
    *_of(
        "wd_kernels/rules/scalars.py",
        "rules reference propositions optim",
        ("rules: lr_scaled decay without lr", "return 0.0, a * lam, 1.0, 0.0", "return 0.0, eta * lam, 1.0, 0.0"),
        (
            "rules: independent decay ignores the schedule",
            "return 0.0, eta * lam, 1.0, 0.0",
            "return 0.0, lam, 1.0, 0.0",
        ),
        ("rules: proximal does not shrink the step", "1.0 / (1.0 + eta * lam), 0.0", "1.0, 0.0"),
        ("rules: metric_proximal without lr", "return 0.0, 0.0, 1.0, a * lam", "return 0.0, 0.0, 1.0, eta * lam"),
        ("rules: l2 decays at the schedule's rate", "return lam, 0.0, 1.0, 0.0", "return eta * lam, 0.0, 1.0, 0.0"),
        (
            "rules: powers as the machine has them, which round otherwise",
            "    r = 1.0\n    while t:",
            "    return x**t\n    r = 1.0\n    while t:",
        ),
        ("rules: -0.0 stays -0.0", "return number + 0.0  # -0.0", "return number  # -0.0"),
    ),
    *_of(
        "wd_kernels/rules/rule.py",
        "rules reference optim checkpoint",
        (
            "rules: what tensors held is remembered",
            "type(v) in PLAIN or isinstance(v, AverageDecay) for",
            "type(v) in (*PLAIN, torch.Tensor) or isinstance(v, AverageDecay) for",
        ),
        (
            "rules: torch's flag does not tell Adam from AdamW",
            "group.get(FLAG) if self.torch.decoupled_flag else None",
            "None",
        ),
        (
            "rules: groups without a mode decay as torch's, not as the optimizer",
            "_Unnamed(self.torch.decays[0] if default is None else default)",
            "_Unnamed(self.torch.decays[0])",
        ),
        (
            "rules: of a complex state the real part alone begins at its first value",
            "(torch.view_as_real(zeros) if zeros.is_complex() else zeros).fill_(",
            "zeros.fill_(",
        ),
    ),
    *_of(
        "wd_kernels/rules/adamw.py",
        "rules reference propositions optim kernels",
        ("rules: the bias correction is a step ahead", "(1.0 - ipow(beta1, t), 1.0", "(1.0 - ipow(beta1, t + 1), 1.0"),
        (
            "rules: the root of the quotient, which rounds otherwise",
            "1.0 / math.sqrt(1.0 - ipow(beta2, t))",
            "math.sqrt(1.0 / (1.0 - ipow(beta2, t)))",
        ),
        (
            "rules: the step size by a reciprocal, which rounds otherwise",
            "scaled_lr / bias1",
            "scaled_lr * (1.0 / bias1)",
        ),
        (
            "rules: bias corrections are remembered by beta2 alone",
            "_biases.get((beta1, beta2, t))",
            "next((found for (_, *key), found in _biases.items() if key == [beta2, t]), None)",
        ),
        ("rules: a beta of 1 is accepted", "if not 0.0 <= beta < 1.0:", "if not 0.0 <= beta <= 1.0:"),
        ("reference: amsgrad loses a NaN", "(v > v_max) | (v != v)", "v > v_max"),
        (
            "reference: eps inside the bias correction",
            "d = sqrt(second) * s.inv_sqrt_bias2 + s.eps",
            "d = (sqrt(second) + s.eps) * s.inv_sqrt_bias2",
        ),
    ),
    *_of(
        "wd_kernels/rules/sgdw.py",
        "rules reference propositions optim",
        ("rules: a buffer is carried by the lr itself", "1.0 / a if a else math.inf", "a"),
        ("rules: a buffer is carried the wrong way", "a if forms[1] ==", "a if forms[0] =="),
        ("rules: a new buffer is dampened", "first_grad_coef if fresh else later_grad_coef", "later_grad_coef"),
        ("rules: nesterov without momentum's factor", "(1.0, momentum) if nesterov", "(1.0, 1.0) if nesterov"),
        ("rules: the paper's form without momentum takes no lr", "if paper and momentum:", "if paper:"),
        ("rules: the paper's form is not scaled by proximal", "step_size = a, a, scale", "step_size = a, a, 1.0"),
        (
            "rules: SGDW's metric_proximal without lr",
            'decay_scalars("proximal", lam, a, a)',
            'decay_scalars("proximal", lam, eta, a)',
        ),
    ),
    *_of(
        "wd_kernels/rules/adagradw.py",
        "rules reference propositions optim",
        ("rules: lr_decay is a step ahead", "slowed = 1.0 + (t - 1) * lr_decay", "slowed = 1.0 + t * lr_decay"),
        (
            "rules: lr_decay slows independent decay too",
            "fixed_decay + scaled_decay / slowed",
            "(fixed_decay + scaled_decay) / slowed",
        ),
        ("reference: AdagradW has no eps", "d = sqrt(total) + s.eps", "d = sqrt(total)"),
    ),
]

DEVICE_COPY = _of(
    "wd_kernels/backends/device_copy.py",
    "device_copy flat movers kernels",
    (
        "device copy: chunks are twice as long",
        "2 * size * processors * PER_PROCESSOR",
        "size * processors * PER_PROCESSOR",
    ),
    ("device copy: what did not change is sent", "if k not in sent or not torch.equal(sent[k], b)", "if b is not None"),
    ("device copy: what has the same shape is not sent", "not torch.equal(sent[k], b)", "sent[k].shape != b.shape"),
    (
        "device copy: another stream trusts what one before it sent",
        "if stream != self._stream:",
        "if self._stream is None:",
    ),
    (
        "device copy: what failed to be sent is noted as sent",
        '        to_device = self.device.type != "cpu"\n',
        "        self._sent.update({k: part.view(torch.int64).clone() for k, part in parts.items()})\n"
        '        to_device = self.device.type != "cpu"\n',
    ),
)

TABLE = _of(
    "wd_kernels/table/table.py",
    "table properties flat failures optim surroundings kernels",
    (
        "table: versions are counted of what had a gradient before",
        "        if found.changed or found.odd:\n",
        "        if found.odd:\n",
    ),
    ("table: memory of dead buffers is trusted", " or any(ref() is None for ref in self.memory)", ""),
    ("table: flattening is not noticed", "self.generation != buffers.generation() or ", ""),
    (
        "table: its counts are made in the caller's inference mode",
        "    @torch.inference_mode(False)  # what is made here outlives the caller's mode\n",
        "",
    ),
    (
        "table: other states than before are not noticed",
        "if watch is None or needs != self.needs or",
        "if watch is None or",
    ),
    (
        "table: it goes on after a failed step",
        "watch, self.watch = self.watch, None",
        "watch = self.watch",
    ),
    (
        "table: its memory follows the default device's dtype",
        "torch.zeros(n, dtype=torch.float32, device=CPU) for",
        "torch.zeros(n, device=CPU) for",
    ),
    (
        "table: chunks of other buckets stay",
        "self.launches, self._watching = None, {}",
        "self._watching = {}",
    ),
    (
        "table: a step count that was exchanged is ignored",
        'counted = lies_here and f.own.get("step") is own',
        "counted = lies_here",
    ),
    ("table: an old view of a count moves on", "own.data = own.clone()  # whoever", "pass  # whoever"),
    (
        "table: states that come to overlap are not seen",
        "return states[: len(f.memory)] != [t.data_ptr() for t in f.memory]",
        "return False",
    ),
    ("table: flat complex elements count as one", "scale = 2 if f.theta.is_complex() else 1", "scale = 1"),
    (
        "table: neighbours in a buffer are not sorted",
        "members.sort(key=lambda i: self.range_of[i][:2])",
        "members.sort(reverse=True)",
    ),
    (
        "table: flat parameters end before their padding",
        "f.place.numel if f.known.spec.scales else padded(f.place.numel)",
        "f.place.numel",
    ),
    (
        "table: runs of states in 8 bits go over padding",
        "f.place.numel if f.known.spec.scales else",
        "f.place.numel if False else",
    ),
    (
        "table: a new state is noted and not put into the optimizer",
        "            if made or f.found is None:\n",
        "            if f.found is None:\n",
    ),
)

LAYOUT = _of(
    "wd_kernels/layout.py",
    "table functional movers kernels",
    (
        "layout: one aligned role makes all aligned",
        "int(all(address % 16 == 0 for address",
        "int(any(address % 16 == 0 for address",
    ),
)

CHANGES = _of(
    "wd_kernels/table/changes.py",
    "table flat native",
    ("changes: the parameter's address is not compared", "address = 0 if role == GRAD", "address = 0 if role <= GRAD"),
    ("changes: the states' addresses are not compared", "address = 0 if role == GRAD", "address = 0 if role >= GRAD"),
    (
        "changes: the parameter's alignment is that of all",
        "for t in (theta, *found.memory[: len(found.memory) - spec.scales])",
        "for t in (theta,)",
    ),
    (
        "changes: complex parameters are compared by handles",
        "(p, found.grad_itself, *found.states)) and not p.is_complex()",
        "(p, found.grad_itself, *found.states))",
    ),
    (
        "changes: nobody keeps what native code looks at",
        "self._specs, self._held, self._view = specs, held, view",
        "self._specs, self._view = specs, view",
    ),
    ("python rows: a buffer is never fresh", "int(steps[i]) + 1, bool(fresh[i])", "int(steps[i]) + 1, False"),
    ("python: autograd is not told", "            work.increment(work.written)\n", ""),
    ("python: a stand-in is not copied back", "            to.copy_(source)\n", "            pass\n"),
    (
        "python: a skipped step is counted",
        "        if skip:\n            return Changes(True, False, [], False, keys)\n",
        "",
    ),
)

INSPECTION = _of(
    "wd_kernels/table/inspection.py",
    "table errors optim surroundings flat",
    ("inspection: a negated gradient is read as it lies", "grad.is_neg() or grad._is", "grad._is"),
    (
        "inspection: a gradient of other strides is read as it lies",
        "if not same_layout(grad, theta) or grad.is_conj()",
        "if grad.is_conj()",
    ),
    ("inspection: a buffer without a count has not been started", "count = 1.0 if present else 0.0", "count = 0.0"),
    ("inspection: a buffer that is there is fresh", "state.fresh and state.name not in started for", "state.fresh for"),
    ("inspection: 16-bit gradients are taken for flat ones", " or grad.dtype != theta.dtype:", ":"),
    (
        "inspection: an old stand-in is stepped as it is",
        "_stand_in(theta, theta.dtype, old.param_copy if old else None).copy_(theta)",
        "(old and old.param_copy) if old and old.param_copy is not None else torch.empty_like(theta).copy_(theta)",
    ),
    (
        "inspection: a stand-in of another dtype is used again",
        " and old.dtype == dtype and same_layout",
        " and same_layout",
    ),
    (
        "inspection: states that are missing are made anew",
        "    if missing and (count or present):",
        "    if missing and count < 0:",
    ),
)

VALIDATION = _of(
    "wd_kernels/validation.py",
    "errors table checkpoint optim",
    (
        "validation: a conjugated state is taken as it lies",
        "same_layout(value, like) and not (value.is_conj() or value.is_neg())",
        "same_layout(value, like)",
    ),
    ("validation: neighbours in memory overlap", "begin + (last + 1) *", "begin + (last + 2) *"),
    (
        "validation: an overlap by one element is not seen",
        "begin + (last + 1) * t.element_size()",
        "begin + last * t.element_size()",
    ),
    ("validation: a count of 2**53 is taken", "0 <= kept < 2**53", "0 <= kept <= 2**53"),
    (
        "validation: interleaved slices overlap",
        " and is_dense(a[3].tensor) and is_dense(b[3].tensor):",
        ":",
    ),
    (
        "validation: a state is laid out as it came",
        "return made.copy_(value)",
        "return value.to(dtype)",
    ),
    (
        "validation: sizes of 1 make a layout another",
        "all(n == 1 or s == t for n, s, t in zip(a.shape",
        "all(s == t for n, s, t in zip(a.shape",
    ),
)

CHECKPOINT = _of(
    "wd_kernels/state_dict.py",
    "checkpoint schedules",
    ("checkpoint: a saved schedule's name replaces the schedule", '*STORED, "schedule", s', "*STORED, s"),
    ("checkpoint: lambda is loaded without its mode", 'loaded.pop("weight_decay", None)', "pass"),
    ("checkpoint: a decay of 0 is not loaded", '_is_zero(decay["weight_decay"])\n', "False\n"),
    (
        "checkpoint: lambda_norm is loaded as lambda",
        'decay["decay"] == live_decay["decay"] and same_norm',
        'decay["decay"] == live_decay["decay"]',
    ),
    (
        "checkpoint: buffers are not carried between forms",
        "loaded = scales.carried(loaded, factors.get(name, 1.0), of_state)",
        "pass",
    ),
    ("checkpoint: an absent eta keeps the live one", 'loaded.setdefault("eta", 1.0)', "pass"),
    ("checkpoint: a count of nothing replaces the live one", 'loaded.pop("schedule_step", None)', "pass"),
    ("checkpoint: a shown lr is taken for the first", '        loaded["lr"] = first\n', "        pass\n"),
    (
        "checkpoint: base_lr does not know initial_lr",
        'saved.get("initial_lr") if first is None and not chosen else first',
        "first",
    ),
    (
        "checkpoint: groups hold what torch's distributed checkpoints lack",
        "            del group[key]\n",
        "            pass\n",
    ),
    (
        "checkpoint: SGDW saves counts",
        "if not counts and isinstance",
        "if found is None and isinstance",
    ),
    (
        "checkpoint: what a distributed checkpoint has not found is loaded",
        "isinstance(value, Mapping) and not value:",
        "value is None:",
    ),
    ("checkpoint: saved counts go on counting", '"step": value["step"].clone()}', '"step": value["step"]}'),
    (
        "checkpoint: loaded states are not copied",
        "loaded.clone(memory_format=torch.preserve_format) if loaded is detached else loaded",
        "loaded",
    ),
    (
        "checkpoint: loaded settings are shared with the saved state",
        "loaded = {key: deepcopy(value) for",
        "loaded = {key: value for",
    ),
    (
        "checkpoint: bad hyperparameters load",
        "    rule.hypers([{**own, **loaded, **decay, CAUTIOUS: False}], where=where, default=default)\n",
        "",
    ),
    (
        "checkpoint: groups of other lengths load",
        '        if len(own["params"]) != len(other["params"]):',
        '        if len(own["params"]) < len(other["params"]):',
    ),
    (
        "checkpoint: loaded states of flat parameters lie anywhere",
        "            if place is not None:\n                own[name] = flat.zeros(place, theta",
        "            if place is not None and not p.numel():\n                own[name] = flat.zeros(place, theta",
    ),
    ("checkpoint: l2 is not told to torch", 'group[FLAG] = mode != "l2"', 'group[FLAG] = mode != ""'),
    ("checkpoint: the eta of a schedule stays where there is none", 'loaded.pop("eta", None)', "pass"),
    (
        "checkpoint: torch's Adagrad gets the states of those alone that were stepped",
        "if rule.torch.all_states and known and not {*(found or ())} - NO_STATES:",
        "if rule.torch.all_states and found is None and not known:",
    ),
    (
        "checkpoint: exported states of what was not stepped are zeros",
        "state.begin(torch.zeros_like(theta, dtype=dtype), group, scale)",
        "torch.zeros_like(theta, dtype=dtype)",
    ),
)

FLAT = [
    *_of(
        "wd_kernels/layout.py",
        "flat flat_tensors",
        ("flat: padding of 16 elements", "PADDING = 32", "PADDING = 16"),
    ),
    *_of(
        "wd_kernels/table/table.py",
        "stochastic sharded_worlds",
        (
            "stochastic: shards are all numbered from the first element",
            "origin += shard_offset(self.params[i])",
            "origin += 0",
        ),
    ),
    *_of(
        "wd_kernels/gradient_release.py",
        "stochastic",
        (
            "stochastic: a block is numbered by itself",
            "self._blocks[key].table.origins = self._origins",
            "pass",
        ),
    ),
    *_of(
        "wd_kernels/flat/buffers.py",
        "flat flat_tensors",
        ("flat: a parameter of another dtype is taken for flat", "            and p.dtype == self.dtype\n", ""),
        (
            "flat: gradients that are not all are given",
            "            elif p.requires_grad:\n",
            "            elif False:\n",
        ),
        ("flat: what was dropped is shown", "return None if stale else base", "return base"),
        ("flat: places outlive their memory", "weakref.ref(data, self._forget)", "weakref.ref(data)"),
        (
            "flat: parameters that lie elsewhere are shown",
            "return self._memory.data if whole else None",
            "return self._memory.data",
        ),
        (
            "flat: tensors are views of the whole buffer",
            "    return dlpack.from_dlpack(dlpack.to_dlpack(view))  # type: ignore[attr-defined]",
            "    return view",
        ),
    ),
    *_of(
        "wd_kernels/flat/states.py",
        "flat_tensors flat",
        ("flat: zeroing spares nobody", "if sum(map(stretches, memory)) != sum(a != 0 for a in lie):", "if not lie:"),
        ("flat: memory of old states is given out again", " or place.offset in base.given:", ":"),
        (
            "flat: what was frozen keeps its gradient",
            "                p.grad = None\n",
            "",
        ),
        (
            "flat: gradients of another optimizer are zeroed too",
            "if any(count != memory.numel for memory, count in taken.items()):",
            "if not taken:",
        ),
    ),
    *_of(
        "wd_kernels/flat/flatten.py",
        "flat_tensors flat",
        ("flatten: gradients are lost", "grad.zero_() if p.grad is None else grad.copy_(p.grad)", "grad"),
        ("flatten: a gradient comes back from the dead", "grad.zero_() if p.grad is None", "grad if p.grad is None"),
        (
            "flatten: views of other memory are moved",
            "if place is None and p.untyped_storage().nbytes() != p.numel() * p.itemsize:",
            "if place is None and p.untyped_storage().nbytes() < p.numel() * p.itemsize:",
        ),
        (
            "flatten: a gradient that somebody else has is taken",
            "stretches(grad) != sum(map(attached, params)):",
            "stretches(grad) < sum(map(attached, params)):",
        ),
        (
            "unflatten: parameters stay neighbours",
            "                p.data = p.data.clone(memory_format=torch.preserve_format)",
            "                p.data = p.data.view_as(p)",
        ),
    ),
]

FUNCTIONAL = [
    *_of(
        "wd_kernels/torch_ops.py",
        "functional operators",
        ("operators: autograd is not told of states", "if role != 1 for t in own]", "if role == 0 for t in own]"),
        ("operators: the buffer is never dampened", "starts and t == 1)", "starts)"),
        (
            "operators: counts follow the arguments and not the buckets",
            "[row_of[i] for i in table.order]",
            "row_of",
        ),
        ("operators: a step of 0 is taken", "if not (1 <= count < 2**53", "if not (0 <= count < 2**53"),
    ),
    *_of(
        "wd_kernels/functional.py",
        "functional",
        ("functional: modes do not see the operator", "torch._C._len_torch_dispatch_stack() > 0 or ", ""),
        (
            "functional: maximize is not handed on in buffers",
            '_run("adamw_flat_", roles, numbers, (decay, maximize, backend, *',
            '_run("adamw_flat_", roles, numbers, (decay, False, backend, *',
        ),
    ),
    *_of(
        "wd_kernels/table/lists.py",
        "functional",
        (
            "lists: a mixed list reads a negated gradient as it lies",
            "if same_layout(grad, p) and not (grad.is_conj() or grad.is_neg() or grad._is_zerotensor()):",
            "if same_layout(grad, p):",
        ),
        (
            "lists: a state of other strides is taken",
            "    if not same_layout(state, p):",
            "    if state.dim() != p.dim():",
        ),
        ("lists: overlaps in a mixed list are not seen", "written=role != GRAD)", "written=False)"),
    ),
]

SCHEDULES = [
    *_of(
        "wd_kernels/schedules/shapes.py",
        "schedules",
        ("schedules: a warm-up begins at 0", "min((t + 1) / self.steps, 1.0)", "min(t / self.steps, 1.0)"),
        ("schedules: a cosine rises again after its end", "(min(t, self.steps) / self.steps)", "(t / self.steps)"),
        ("schedules: a restart comes a step late", "while t >= length:", "while t > length:"),
        ("schedules: lambdas are called alike", 'if value.__name__ == "<lambda>" else ""', 'if value is None else ""'),
        ("schedules: names have addresses", 'return _ADDRESS.sub("", repr(value))', "return repr(value)"),
        ("schedules: another Python's lambda is another", "if _PYTHON not in saved and", "if"),
        ("schedules: a drop comes a step late", "milestone <= t for", "milestone < t for"),
        (
            "schedules: the decay begins a step early",
            "max(t - self.warmup - self.stable, 0)",
            "max(t + 1 - self.warmup - self.stable, 0)",
        ),
    ),
    *_of(
        "wd_kernels/schedules/composed.py",
        "schedules normalized",
        ("schedules: a product ends with its shortest part", "else max(ends))", "else min(ends))"),
        (
            "schedules: the first period of a sequence forgets its lead",
            "if done < t - lead else (t, lead + length)",
            "if done < t - lead else (t, length)",
        ),
        ("schedules: every part counts from the first step", "self.parts[k](t - self.firsts[k])", "self.parts[k](t)"),
    ),
    *_of(
        "wd_kernels/schedules/published.py",
        "schedules",
        (
            "published restarts: no batch comes late",
            "if fraction == 1.0 and",
            "if fraction > 1.0 - 1e-9 and",
        ),
        ("published restarts: the first period begins anew as well", "self.next = 1 + epochs", "self.next = epochs"),
    ),
    *_of(
        "wd_kernels/schedules/normalized.py",
        "normalized schedules",
        (
            "normalised decay: over the number of steps, not its root",
            "return 1.0 / math.sqrt(self.where(t)[1])",
            "return 1.0 / self.where(t)[1]",
        ),
    ),
    *_of(
        "wd_kernels/schedules/stepping.py",
        "schedules",
        (
            "stepping: a group that joins starts its schedule anew",
            'group["schedule_step"] = next(counts, 0)',
            'group["schedule_step"] = 0',
        ),
        (
            "stepping: a shown lr is scheduled again",
            "            lr = _base_of_shown(lr, base_lr, eta, i)\n",
            "            _base_of_shown(lr, base_lr, eta, i)\n",
        ),
        ("stepping: anybody may set a shown lr", "if lr in (base, eta * base):", "if lr:"),
        ("stepping: an LR scheduler beside a schedule is not seen", "not in (0.0, scalar(", "in (0.0, scalar("),
        ("stepping: a first lr is that of the moment", 'group.get("initial_lr", group["lr"])', 'group["lr"]'),
        (
            "stepping: from_lr scales the lr too",
            "eta, a = _ratio(lr, base_lr, eta, i), lr",
            "eta, a = _ratio(lr, base_lr, eta, i), lr * _ratio(lr, base_lr, eta, i)",
        ),
        (
            "stepping: eta is written before the step",
            '        ticks += ((group, "eta", eta),',
            '        group["eta"] = eta\n        ticks += ((group, "eta", eta),',
        ),
        (
            "stepping: groups of other counts share an eta",
            "found = seen.get((id(schedule), t)) if",
            "found = next((v for (k, _), v in seen.items() if k == id(schedule)), None) if",
        ),
    ),
]

AROUND = [
    *_of(
        "wd_kernels/optimizer.py",
        "schedules checkpoint optim surroundings",
        (
            "optimizer: pickles hold the whole vector of counts",
            '        packed["state"] = state_dicts.with_own_counts(packed["state"])\n',
            "",
        ),
        (
            "optimizer: a refused group stays",
            "native.insist([partial(self.param_groups.__delitem__, slice(index, None)), *undo])",
            "native.insist(undo)",
        ),
        ("optimizer: a closure runs without gradients", "with torch.enable_grad():", "with torch.no_grad():"),
        (
            "optimizer: groups added later may overlap",
            '            if "_table" in self.__dict__:',
            '            if "_table" not in self.__dict__:',
        ),
    ),
    *_of(
        "wd_kernels/decay_conversion.py",
        "conversion",
        (
            "conversion: to hyperbolic with the sign of the way back",
            "c / (1.0 - etas[0] * c) if",
            "c / (1.0 + etas[0] * c) if",
        ),
        ("conversion: the buffer's root with the wrong sign", "b = 1.0 - momentum + x", "b = 1.0 - momentum - x"),
        ("conversion: small decays lose digits", "-sum(math.log1p(-taken) for", "-sum(math.log(1 - taken) for"),
        (
            "conversion: steps without decay count as a changing schedule",
            "[pair for pair in zip(*each, strict=True) if all(pair)]",
            "list(zip(*each, strict=True))",
        ),
    ),
    *_of(
        "wd_kernels/weight_decay_rules.py",
        "weight_decay_rules",
        ("rules of decay: a proximal step takes what a linear one does", "(tau - 1.0 if decay", "(tau if decay"),
        ("rules of decay: a schedule's peak may take all of a weight", "max(etas) >= mean * tau", "1 >= tau"),
        ("rules of decay: the way back forgets the schedule", "* sum(etas) / len(etas)\n    return", "\n    return"),
        ("rules of decay: every mode follows the lr", "given if decay in WITH_LR else 1.0", "given"),
        (
            "rules of decay: normalised by epochs, not by steps",
            '"normalized": (0.5, -0.5)',
            '"normalized": (0.0, -0.5)',
        ),
        (
            "rules of decay: a larger batch wants less",
            'where) / _positive("dataset',
            'where) ** -1 / _positive("dataset',
        ),
    ),
    *_of(
        "wd_kernels/param_groups.py",
        "groups",
        (
            "groups: shared parameters are excluded by one name alone",
            "model.named_parameters(remove_duplicate=False)",
            "model.named_parameters()",
        ),
        (
            "groups: a parametrised weight is judged by its stand-in",
            'if word.startswith("original"):',
            'if word.startswith("no original"):',
        ),
        (
            "groups: names that only contain a bias decay",
            'or "bias" in words or "biases" in words',
            'or words[0].startswith("bias")',
        ),
    ),
    *_of(
        "setup.py",
        "native backends",
        ("build: products and sums are fused on the CPU", "-ffp-contract=off", "-ffp-contract=fast"),
    ),
    *_of(
        "setup.py",
        "codegen_cuda dist",
        ("build: nvcc fuses products and sums", "-fmad=false", "-fmad=true"),
        ("build: nvcc takes an inexact quotient", "-prec-div=true", "-prec-div=false"),
    ),
]

SHARDING = _of(
    "wd_kernels/sharding.py",
    "sharded sharded_errors sharded_checkpoint",
    ("placements are not compared", "spec.mesh, tuple(spec.placements), _order(spec)", "spec.mesh, _order(spec)"),
    (
        "meshes are not compared",
        "spec.mesh, tuple(spec.placements), _order(spec)",
        "tuple(spec.placements), _order(spec)",
    ),
    (
        "an ordinary state of a DTensor is taken",
        "if _sharding(p) != _sharding(t):",
        "if _sharding(t) and _sharding(p) != _sharding(t):",
    ),
    (
        "states are local tensors",
        "    if not is_sharded(p):\n        return t\n    dtensor",
        "    return t\n    dtensor",
    ),
    ("states have the parameter's dtype in their spec", "._replace(dtype=t.dtype)", ""),
    (
        "only gradients of parameters that are partial are redistributed",
        "grad.placements != p.placements",
        "grad.placements[0].is_partial()",
    ),
)
SHARDED_ROLES = [
    *_of(
        "csrc/python/changes.cpp",
        "sharded_errors sharded",
        (
            "the sharding is not compared",
            "if (!local(tensor, &here) || reinterpret_cast<int64_t>(here.spec) != roles[role].spec) return false;",
            "if (!local(tensor, &here)) return false;",
        ),
    ),
    *_of(
        "wd_kernels/table/table.py",
        "sharded",
        ("an equal spec is inspected for ever", "not same_specs or roles", "roles"),
    ),
    *_of(
        "wd_kernels/optimizer.py",
        "sharded_errors",
        ("DTensors may share memory", "if has_memory(here := local(p)):", "if has_memory(here := p):"),
    ),
]
RELEASE = _of(
    "wd_kernels/gradient_release.py",
    "gradient_release",
    ("gradients are kept", "                for q in block.params:\n                    q.grad = None\n", ""),
    (
        "a second gradient is stepped too",
        "if id(p) in self._stepped:\n            raise",
        "if False:\n            raise",
    ),
    (
        "each parameter steps its block",
        "if all(id(q) in self._arrived and q.grad is not None",
        "if any(id(q) in self._arrived and q.grad is not None",
    ),
    (
        "what arrived in a pass that failed counts",
        "id(q) in self._arrived and q.grad is not None",
        "id(q) in self._arrived",
    ),
    ("gradients of micro-steps count", "id(q) in self._arrived and q.grad is not None", "q.grad is not None"),
    ("frozen parameters are waited for", "for q in block.params if q.requires_grad", "for q in block.params"),
    ("what is left is not stepped", "            for block in blocks:\n                self._step(block)\n", ""),
    (
        "what was stepped is stepped again",
        "                if id(p) in self._stepped:\n                    p.grad = None  # DDP",
        "                if False:\n                    p.grad = None  # DDP",
    ),
    (
        "all of a block count as stepped",
        "for p in block.params if p.grad is not None]\n        table",
        "for p in block.params]\n        table",
    ),
    ("schedules do not count", "            for own, key, value in ticks:\n                own[key] = value\n", ""),
    (
        "hyperparameters are those of the first round",
        "        self._hypers = None\n        self._arrived.clear()",
        "        self._arrived.clear()",
    ),
    (
        "hyperparameters are those of the first group",
        "[hypers[g] for g in block.of_groups]",
        "[hypers[0] for g in block.of_groups]",
    ),
    ("accumulating steps", "if self._paused or self._of_ddp:", "if self._of_ddp:"),
    (
        "a bucket is stepped with the gradients of one rank",
        "                    p.grad = grad\n                self._step",
        "                    pass\n                self._step",
    ),
    ("blocks are not clipped by their norm", "nn.utils.clip_grad_norm_(block.params, self._clip_block_norm)", "pass"),
    (
        "tied parameters are in two blocks",
        "[left.pop(id(p)) for p in those if id(p) in left]",
        "[p for p in those if left.pop(id(p), None) is not None or id(p) not in left]",
    ),
    (
        "the release lives as long as its parameters",
        "hook = partial(_arrived, weakref.ref(self))",
        "hook = partial(_arrived, lambda: self)",
    ),
    ("what is unfrozen is not released", "            self._listen(params)  # to what was unfrozen, too\n", ""),
    ("zero_grad ends nothing", "                )\n            self._begin()\n", "                )\n"),
    (
        "DDP is looked for at the top alone",
        "for m in model.modules() if isinstance(m, nn.parallel",
        "for m in [model] if isinstance(m, nn.parallel",
    ),
    ("partial gradients are not redistributed", "            redistribute(block.params)\n", "            pass\n"),
)

STOCHASTIC = [
    *_of(
        "wd_kernels/state_dict.py",
        "stochastic",
        (
            "checkpoint: SGDW loses the counts by which it rounds",
            "counts = rule.torch.counts_steps or _counts_for_more(storage, p, found)",
            "counts = rule.torch.counts_steps",
        ),
    ),
    *_of(
        "csrc/formats.h",
        "stochastic kernels",
        *(
            ("c++: all roles have one word of random bits", "return role / 2;", "return role / 16;"),
            ("c++: two roles have one half of a word", "word >> 16 : word & 0xffffu", "word >> 16 : word >> 16"),
            ("c++: random bits repeat after 2^32 elements", "uint32_t(index >> 32) * 0x85ebca77u", "0"),
            ("c++: random bits are those of the step before", "mix(mix(seed) + step)", "mix(mix(seed) + step - 1)"),
            (
                "c++: a stochastic NaN keeps sign and payload",
                "0x7fc00000u : bits + draw",
                "bits | 0x400000u : bits + draw",
            ),
        ),
    ),
    *_of(
        "csrc/cpu/mover.inc",
        "stochastic kernels",
        *(
            (
                "cpu: places go on at multiples of 2^32",
                "last = count - first < left ? count : first + left;",
                "last = count, (void)left;",
            ),
            (
                "cpu: a pair has one draw",
                "const uint32_t here = place + uint32_t(half) * Draws::kNext;",
                "const uint32_t here = place;",
            ),
        ),
    ),
    *_of(
        "wd_kernels/reference.py",
        "stochastic",
        *(
            (
                "reference: rounding is biased",
                "else draws.bits(elements(memory)).to(torch.int32)\n",
                "else (draws.bits(elements(memory)) | 1).to(torch.int32)\n",
            ),
            (
                "reference: every second element has its neighbour's bits",
                "n = elements + self.origin",
                "n = (elements + self.origin) // 2",
            ),
        ),
    ),
]

MASTERS = [
    *_of(
        "csrc/formats.h",
        "master_weights kernels",
        (
            "c++: a remainder has no sign",
            "(uint32_t(int32_t(*part)) << kLost)",
            "((uint32_t(*part) & (kLost != 0 ? 0xffu : 0xffffu)) << kLost)",
        ),
        ("c++: of 24 bits ties are rounded up", "0x7fu + ((bits >> 8) & 1u)", "0x80u"),
        ("c++: 24 bits are rounded by the wrong half of a draw", "stochastic ? draw >> 8", "stochastic ? draw & 0xffu"),
        ("c++: a split NaN is another", "? 0x7fc00000u : bits_to", "? 0x7fc10000u : bits_to"),
        ("c++: a master is rounded with its copy", "    *part = value;\n", "    *part = Nearest::load(at);\n"),
    ),
    *_of(
        "csrc/cpu/mover.inc",
        "master_weights kernels",
        ("cpu: later tiles have the first one's parts", "own.memory[at] + done * kernel.sizes[at]", "own.memory[at]"),
        (
            "cpu: of a pair, a negative remainder reaches into the next",
            "(uint32_t(r) & 0xffffu) << 16 * half",
            "uint32_t(r) << 16 * half",
        ),
        (
            "cpu: a part has the parameter's size",
            "found->sizes[part] = format->part;",
            "found->sizes[part] = format->size;",
        ),
    ),
    *_of(
        "csrc/cuda/chunk.h",
        "kernels",
        (
            "cuda: frozen masters move",
            "if (!frozen) write(roles.part + i, part[k]);",
            "write(roles.part + i, part[k]);",
        ),
        ("cuda: a copy is read", "if constexpr (P::kRead || E::kMarks) p[k]", "p[k]"),
    ),
    *_of(
        "wd_kernels/backends/triton_kernels.py",
        "kernels",
        ("triton: of 24 bits ties are rounded up", "bits + 0x7F + ((bits >> 8) & 1)", "bits + 0x80"),
        ("triton: a split parameter is rounded down", "high = (bits + 0x8000) >> 16", "high = bits >> 16"),
        (
            "triton: 24 bits are rounded by the wrong half of a draw",
            "draw(key, places, role) >> 8",
            "draw(key, places, role) & 255",
        ),
    ),
    *_of(
        "wd_kernels/reference.py",
        "master_weights",
        ("reference: of 24 bits ties are rounded up", "0x7F + ((bits >> 8) & 1) if", "0x80 if"),
        ("reference: a split parameter is rounded down", "high = (bits + 0x8000) >> 16", "high = bits >> 16"),
        (
            "reference: 24 bits have a bias",
            "draws.bits(elements(memory)).to(torch.int32) >> 8",
            "(draws.bits(elements(memory)).to(torch.int32) >> 8) | 1",
        ),
    ),
    *_of(
        "wd_kernels/table/inspection.py",
        "master_weights",
        ("inspection: a master of another kind is stepped", "kept.dtype != master:", "False:"),
        (
            "inspection: a float32 master begins as zeros",
            "now.copy_(theta)",
            "now.copy_(now)",
        ),
    ),
    *_of(
        "wd_kernels/validation.py",
        "master_weights",
        ("validation: float16 has a remainder", "master is not None and master not in master_dtypes(p.dtype)", "False"),
    ),
    *_of(
        "wd_kernels/table/lists.py",
        "master_weights",
        ("lists: a float32 parameter has a master", "    if not allowed:\n", "    if False:\n"),
    ),
    *_of(
        "wd_kernels/state_dict.py",
        "master_weights",
        (
            "loading: masters of another kind are converted unasked",
            "if convert and isinstance(value, Mapping) and MASTER_NAME in value",
            "if isinstance(value, Mapping) and MASTER_NAME in value",
        ),
    ),
    *_of(
        "wd_kernels/master_weights.py",
        "master_weights",
        (
            "masters: what lies beside a parameter is not written",
            "is None else value, None, part)",
            "is None else value)",
        ),
        ("masters: what was cast is taken", "or known not in (None, master.dtype):", "or False:"),
        ("masters: remainders leave as int16", "or master.dtype != torch.int16:", "or True:"),
        ("masters: frozen parameters are given some", "        if p.requires_grad:\n", "        if True:\n"),
        ("masters: names that are missing are passed over", "[n for n in own if n not in weights]", "[]"),
    ),
    *_of(
        "wd_kernels/table/table.py",
        "flat_tensors",
        (
            "table: where nothing is left to inspect, all is published anew",
            "                if special:\n",
            "                if True:\n",
        ),
    ),
    *_of(
        "wd_kernels/memory_report.py",
        "master_weights",
        ("memory report: masters are left out", "add(MASTER_NAME, master, n * master.itemsize, 0)", "pass"),
        (
            "memory report: torch's states are float32",
            "0 if state in (EMA, REFERENCE) else own)",
            "0 if state in (EMA, REFERENCE) else 4 * n)",
        ),
    ),
    *_of(
        "wd_kernels/state_conversion.py",
        "state_conversion",
        (
            "conversion: a scale is one for 128",
            "BITSANDBYTES, FLASHOPTIM = 256, 32",
            "BITSANDBYTES, FLASHOPTIM = 128, 32",
        ),
        ("conversion: companded moments are linear", "y / (2 - y.abs()) * scale", "y * scale"),
        (
            "conversion: hidden scales are read as bfloat16",
            "scales.view(torch.float16) if scales.dtype == torch.bfloat16 else scales",
            "scales",
        ),
        ("conversion: counts of a group may differ", "if len(counts) > 1:", "if len(counts) > 9:"),
    ),
]

FAULTS: tuple[Fault, ...] = (
    *RULES,
    *MASTERS,
    *EIGHT_BITS,
    *REFERENCE,
    *REFERENCE_EPILOGUES,
    *SCHEDULES,
    *AROUND,
    *TABLE,
    *LAYOUT,
    *INSPECTION,
    *VALIDATION,
    *CHECKPOINT,
    *FLAT,
    *FUNCTIONAL,
    *DEVICE_COPY,
    *CHANGES,
    *SHARDING,
    *SHARDED_ROLES,
    *RELEASE,
    *TRITON,
    *BACKENDS,
    *TRITON_ROUNDING,
    *TRITON_KERNELS,
    *TRITON_EPILOGUES,
    *STEP,
    *LAUNCHES,
    *MEMORY,
    *WALK,
    *LAZY,
    *HELD,
    *KEYS,
    *ROWS,
    *CUT,
    *GATHER,
    *CPU_PLAN,
    *CPU_MOVER,
    *CPU_EPILOGUES,
    *CPU_AVERAGES,
    *WATCHING,
    *AVERAGES_NATIVE,
    *AVERAGES_TRITON,
    *AVERAGES,
    *VOCABULARY,
    *CLIPPING,
    *BY_VALUE,
    *CAPTURE,
    *ACCUMULATE,
    *CUDA_CHUNK,
    *CUDA_EPILOGUES,
    *STOCHASTIC,
    *CHECK_LAUNCH,
    *FORMATS_H,
    *RULES_H,
)
