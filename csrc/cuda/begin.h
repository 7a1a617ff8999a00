// What comes before the steps of a device's buckets: the norm of their gradients, and the begin of the step, which
// decides on it, counts, and completes the rows (docs/numerics.md, sections 2 and 7). Written in phases, as chunk.h.
#pragma once

#include "chunk.h"

namespace wd {
namespace cuda {

#include "../sums.h"

WD_HOST_DEVICE inline void add_to(int64_t* at, int64_t digit) {
#ifdef __CUDA_ARCH__
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(digit));
#else
  *at += digit;
#endif
}

// The sum of what all lanes have in `sums`, which sums[0] is then: of all lanes, together.
template <class T>
WD_HOST_DEVICE inline void add_halves(T* sums) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    WD_SYNC();
    WD_EACH_LANE(lane) {
      if (lane < half) sums[lane] = sums[lane] + sums[lane + half];
    }
  }
  WD_SYNC();
}

// Neighbours of a lane, added to those that lie there, unless these are nothing yet; `x` is the sum.
template <class T>
WD_HOST_DEVICE inline void add_neighbours(T* at, T* x, int count, bool nothing_yet, bool whole) {
  constexpr int width = 16 / sizeof(T);
  if (whole) {
    WD_UNROLL
    for (int k = 0; k < kNeighbours; k += width) {
      Vector<T, width> total = {};
      if (!nothing_yet) total = read<Vector<T, width>>(at + k);
      WD_UNROLL
      for (int e = 0; e < width; ++e)
        total.element[e] = x[k + e] = nothing_yet ? x[k + e] : total.element[e] + x[k + e];
      write(at + k, total);
    }
  } else {
    WD_UNROLL
    for (int e = 0; e < kNeighbours; ++e)
      if (e < count) at[e] = x[e] = nothing_yet ? x[e] : at[e] + x[e];
  }
}

// Adds the squares of the gradients of one chunk to the sum that its place names, or the gradients to what lies in the
// place of the parameter, where the segment's row is 0, and the squares of that; `copies` of the sums, `stride` words
// apart, are added to by turns.
template <class T, class G, bool kAccumulates>
WD_HOST_DEVICE inline void sum_gradients(const Launch& launch, int64_t block, int64_t copies, int64_t stride) {
  const int64_t chunk = launch.chunks[block];
  void* const* place = reinterpret_cast<void* const*>(launch.places) + (chunk & 0xffffffff) * launch.place_words;
  const Moving& moving = launch.moving[chunk & 0xffffffff];
  const int64_t begin = (chunk >> 32) * launch.chunk_size;
  const int64_t rest = moving.numel - begin;  // numel is 0 without a gradient
  if (rest <= 0) return;
  const int count = rest < launch.chunk_size ? int(rest) : launch.chunk_size;
  const auto* const grad = memory<typename G::Memory>(moving.grad, begin);
  int64_t* const sum = memory<int64_t>(place[kOutput], block % copies * stride);
  T* const total = kAccumulates ? memory<T>(place[address_word(kParam)], begin) : nullptr;

  WD_SHARED T sums[kThreads];
  constexpr int width = 16 / sizeof(typename G::Memory), accesses = larger(kNeighbours / width, 1);
  static_assert(kBlock == kNeighbours * kThreads && kNeighbours == 8, "a lane has its neighbours");
  for (int from = 0; from < count; from += kBlock) {
    WD_EACH_LANE(lane) {
      const int begin = from + lane * kNeighbours;
      T x[kNeighbours];
      const bool whole = moving.aligned && from + kBlock <= count;
      if (whole) {
        WD_UNROLL
        for (int k = 0; k < accesses; ++k) {
          const auto g = read<VectorOf<G, width>>(grad + begin + k * width);
          WD_UNROLL
          for (int e = 0; e < width; ++e) x[k * width + e] = G::load(g.element + e);
        }
      } else {
        WD_UNROLL
        for (int e = 0; e < kNeighbours; ++e) x[e] = begin + e < count ? T(G::load(grad + begin + e)) : T(0);
      }
      if constexpr (kAccumulates) add_neighbours(total + begin, x, count - begin, moving.row != 0, whole);
      WD_UNROLL
      for (int e = 0; e < kNeighbours; ++e) x[e] = x[e] * x[e];
      sums[lane] = sum_neighbours(x);
    }
    add_halves(sums);
    WD_EACH_LANE(lane) {
      const Summand summand = summand_of(double(sums[0]));
      const int64_t digit = lane == 0 ? summand.digits[0] : lane == 1 ? summand.digits[1] : summand.digits[2];
      if (lane < summand.words) add_to(sum + summand.word + lane, digit);
    }
    WD_SYNC();
  }
}

// A setting of a group: the number, or what lies where its source says.
WD_HOST_DEVICE inline double setting(double number, void* source) {
  if (source == nullptr) return number;
  if (reinterpret_cast<uintptr_t>(source) % 2 == 0) return double(*memory<float>(source, 0));
  return *memory<double>(static_cast<char*>(source) - 1, 0);
}

// Where a schedule's table has so many completed steps.
WD_HOST_DEVICE inline int64_t place_in(int64_t steps, int64_t length) {
  return steps < 0 ? 0 : steps < length ? steps : length - 1;
}

// What step t keeps of an average, by its words of the sources; 1 where there is none.
WD_HOST_DEVICE inline double kept_of_average(const int64_t* words, int64_t t) {
  const int64_t length = words[kAverageLength];
  if (words[kAverageTable] == 0) return 1;
  if (words[kAverageTable] == 1) return t > length ? 1 - 1 / double(t - length + 1) : 0;
  const double* const table = memory<double>(reinterpret_cast<void* const*>(words)[kAverageTable], 0);
  return table[place_in(t - 1, length)];
}

// Settings that end a row as they are: the seed, the center and the threshold of the decay.
constexpr int kLast = kOwnSettings - kSeed;

// Scalars of a row that is made here: those of the rule, then the average's.
template <class Rule>
WD_HOST_DEVICE constexpr int row_width() {
  return width_of<Rule>() + width_of<Average<double>>();
}

// One block of lanes.
template <class Rule>
WD_HOST_DEVICE inline void begin_step(const Begin& of) {
  WD_SHARED double norm, clip, mean, sums[kThreads];
  WD_SHARED bool skip, moves, spike;
  WD_SHARED int found[kThreads];  // what a lane has seen: an lr that is not 0, a schedule beyond its table
  constexpr int width = kOwnSettings + Rule::kOwn, kMoves = 1, kPast = 2;
  constexpr int of_group = offsetof(Rule, t) / sizeof(double), group_width = of_group + kLast;
  WD_EACH_LANE(lane) {
    found[lane] = 0;
    for (int g = lane; g < of.of_groups; g += kThreads) {
      const int64_t* const sources = of.sources + int64_t(g) * (width + kSourceWords);
      void* const* const addresses = reinterpret_cast<void* const*>(sources);
      double own[width];
      WD_UNROLL
      for (int k = 0; k < width; ++k) own[k] = setting(of.settings[int64_t(g) * width + k], addresses[k]);
      Group group = {own[kLr], own[kEta], 0, own[kWeightDecay], int(own[kDecayMode]), own + kOwnSettings};
      if (sources[width + kTable] != 0) {
        const int64_t steps = of.schedule_steps[g], length = sources[width + kTableLength];
        const int64_t at = place_in(steps, length);
        const double* const table = memory<double>(addresses[width + kTable], 0);
        group.eta = table[at];
        group.weight_decay = group.weight_decay * table[length + at];
        if (sources[width + kEndless] != 0 && steps >= length) found[lane] |= kPast;
      }
      if (own[kBaseLr] != 0) group.eta = group.lr / own[kBaseLr];
      group.a = own[kBaseLr] != 0 ? group.lr : group.eta * group.lr;
      if (group.lr != 0) found[lane] |= kMoves;
      Rule row = {};
      row.group(group);
      double scalars[width_of<Rule>()];
      __builtin_memcpy(scalars, &row, sizeof(Rule));
      WD_UNROLL
      for (int k = 0; k < of_group; ++k) of.groups[int64_t(g) * group_width + k] = scalars[k];
      WD_UNROLL
      for (int k = 0; k < kLast; ++k) of.groups[int64_t(g) * group_width + of_group + k] = own[kSeed + k];
    }
  }
  const double scale = double(*of.grad_scale);
  const bool measures = of.limits[kMeasures] != 0;
  const auto norm_of = [&](int row) { return root(sum_of(of.totals + int64_t(row) * kSumWords)) / scale; };
  if (measures) {
    WD_EACH_LANE(lane) {
      for (int k = lane; k < kSumWords; k += kThreads) {
        int64_t all = 0, limited = 0;
        for (int g = 0; g < of.of_groups; ++g) {
          int64_t word = 0;
          for (int64_t slot = of.slots_of[g]; slot < of.slots_of[g + 1]; ++slot) {
            for (int copy = 0; copy < of.copies; ++copy) {
              int64_t* const at = of.sums + (int64_t(copy) * of.slots + slot) * kSumWords + k;
              word += *at;
              *at = 0;
            }
          }
          of.totals[int64_t(g) * kSumWords + k] = word;
          all += word;
          if (of.limits[kOwnLimits + g] != of.limits[kOwnLimits + g]) limited += word;
        }
        of.totals[int64_t(of.of_groups) * kSumWords + k] = all;
        of.totals[int64_t(of.of_groups + 1) * kSumWords + k] = limited;
      }
    }
  }
  WD_SYNC();
  WD_EACH_LANE(lane) {
    if (lane == 0) {
      norm = measures ? norm_of(of.of_groups) : double(__builtin_nan(""));
      spike = false, mean = 0;
    }
  }
  WD_SYNC();
  // Is the norm, or the loss, more than sigma deviations above the mean of the last ones?
  const double sigma = of.limits[kSigma];
  const auto window = int64_t(of.limits[kWindow]);
  const int given = sigma == __builtin_inf() ? 0 : of.limits[kHasLoss] != 0 ? 2 : 1;
  for (int which = 0; which < given; ++which) {
    const double* const ring = of.last + which * kBlock;
    const int64_t seen = of.seen[which], n = seen < window ? seen : window;
    for (int pass = 0; pass < 2; ++pass) {
      WD_EACH_LANE(lane) {
        double x[kNeighbours];
        WD_UNROLL
        for (int k = 0; k < kNeighbours; ++k) {
          const int i = lane * kNeighbours + k;
          const double value = i < n ? ring[i] : 0, off = i < n ? value - mean : 0;
          x[k] = pass == 0 ? value : off * off;
        }
        sums[lane] = sum_neighbours(x);
      }
      add_halves(sums);
      WD_EACH_LANE(lane) {
        if (lane == 0 && pass == 0) mean = sums[0] / double(n);
        if (lane == 0 && pass == 1) {
          const double x = which == 0 ? norm : double(*of.loss), deviation = root(sums[0] / double(n - 1));
          if (n >= (window < 4 ? 2 : window / 2) && !(x - mean <= sigma * deviation)) spike = true;
          if (x - x == 0) {
            of.last[which * kBlock + seen % window] = x;
            of.seen[which] = seen + 1;
          }
        }
      }
      WD_SYNC();
    }
  }
  WD_EACH_LANE(lane) {
    if (lane == 0) {
      clip = measures ? clip_of(norm_of(of.of_groups + 1), of.limits[kMaxNorm]) : 1;
      const bool finite = norm - norm == 0;
      int all = 0;
      for (int k = 0; k < kThreads; ++k) all |= found[k];
      moves = (all & kMoves) != 0;
      skip =
          *of.found_inf != 0 || (measures && of.limits[kSkipNonfinite] != 0 && !finite) || (all & kPast) != 0 || spike;
      *of.control = {1 / scale, double(skip)};
      of.found[0] = norm;
      of.found[1] = double(skip);
    }
  }
  WD_SYNC();
  WD_EACH_LANE(lane) {
    for (int g = lane; g < of.of_groups; g += kThreads) {
      const double own = of.limits[kOwnLimits + g];
      of.clips[g] = measures && own == own ? clip_of(norm_of(g), own) : clip;
    }
  }
  WD_SYNC();
  WD_EACH_LANE(lane) {
    for (int r = lane; r < of.of_rows; r += kThreads) {
      const int64_t group = of.keys[2 * r], param = of.keys[2 * r + 1];
      Rule row = {};
      double scalars[width_of<Rule>()];
      const double* const known = of.groups + group * group_width;
      WD_UNROLL
      for (int k = 0; k < width_of<Rule>(); ++k) scalars[k] = k < of_group ? known[k] : 0;
      __builtin_memcpy(&row, scalars, sizeof(Rule));
      row.seed = known[of_group], row.decay_center = known[of_group + 1], row.decay_threshold = known[of_group + 2];
      row.grad_scale = row.grad_scale * of.clips[group];
      const int64_t t = int64_t(of.steps[param]) + 1;
      row.count(t, of.fresh[param] != 0);
      __builtin_memcpy(scalars, &row, sizeof(Rule));
      double* const to = of.rows + int64_t(r) * row_width<Rule>();
      WD_UNROLL
      for (int k = 0; k < width_of<Rule>(); ++k) to[k] = scalars[k];
      const double kept = kept_of_average(of.sources + group * (width + kSourceWords) + width, t);
      to[width_of<Rule>()] = kept, to[width_of<Rule>() + 1] = 1 - kept;
    }
  }
  WD_SYNC();
  WD_EACH_LANE(lane) {
    for (int i = lane; i < of.of_params; i += kThreads) {
      if (skip || of.active[i] == 0) continue;
      of.steps[i] = of.steps[i] + 1;
      of.fresh[i] = 0;
    }
    for (int g = lane; g < of.of_groups; g += kThreads) {
      const int64_t* const of_schedule = of.sources + int64_t(g) * (width + kSourceWords) + width;
      if (of_schedule[kTable] == 0 || !moves || skip) continue;
      const int64_t steps = of.schedule_steps[g], length = of_schedule[kTableLength];
      const double* const table = memory<double>(reinterpret_cast<void* const*>(of_schedule)[kTable], 0);
      of.etas[g] = table[place_in(steps, length)];
      of.schedule_steps[g] = steps + 1;
    }
  }
}

// `Of<T, G, accumulates>::entry()` for the format of a gradient beside a parameter that is stepped in T, or what it is
// added to; null where there is none.
template <template <class, class, bool> class Of, bool accumulates>
const void* find_sum_of(int64_t param, int64_t grad) {
  if (param == kFloat64) return grad == kFloat64 ? Of<double, Float64, accumulates>::entry() : nullptr;
  if (grad == kFloat32) return Of<float, Float32, accumulates>::entry();
  if (grad == kBFloat16) return Of<float, BFloat16, accumulates>::entry();
  if (grad == kFloat16) return Of<float, Float16, accumulates>::entry();
  return nullptr;
}

template <template <class, class, bool> class Of>
const void* find_sum(int64_t param, int64_t grad, bool accumulates) {
  return accumulates ? find_sum_of<Of, true>(param, grad) : find_sum_of<Of, false>(param, grad);
}

// With the code `Of<Rule>::entry()` for a rule by its number: rows are the same whatever its states.
template <template <class> class Of>
const BeginKernel* find_begin_with(int64_t rule) {
  using T = double;
#define WD_ROW(number, bits, ...) WD_ROW_##bits(number, __VA_ARGS__)
#define WD_ROW_0(number, ...)                                                             \
  if (rule == number) {                                                                   \
    static const BeginKernel found = {Of<__VA_ARGS__>::entry(), row_width<__VA_ARGS__>(), \
                                      kOwnSettings + __VA_ARGS__::kOwn};                  \
    return &found;                                                                        \
  }
#define WD_ROW_1(number, ...)
  WD_EACH_RULE(WD_ROW)
#undef WD_ROW
#undef WD_ROW_0
#undef WD_ROW_1
  return nullptr;
}

}  // namespace cuda
}  // namespace wd
