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

// Adds the squares of the gradients of one chunk to the sum that its place names; `copies` of the sums, `stride` words
// apart, are added to by turns.
template <class T, class G>
WD_HOST_DEVICE inline void sum_squares(const Launch& launch, int64_t block, int64_t copies, int64_t stride) {
  const int64_t chunk = launch.chunks[block];
  void* const* place = reinterpret_cast<void* const*>(launch.places) + (chunk & 0xffffffff) * launch.place_words;
  const Moving& moving = launch.moving[chunk & 0xffffffff];
  const int64_t begin = (chunk >> 32) * launch.chunk_size;
  const int64_t rest = moving.numel - begin;  // numel is 0 without a gradient
  if (rest <= 0) return;
  const int count = rest < launch.chunk_size ? int(rest) : launch.chunk_size;
  const auto* const grad = memory<typename G::Memory>(moving.grad, begin);
  int64_t* const sum = memory<int64_t>(place[kOutput], block % copies * stride);

  WD_SHARED T sums[kThreads];
  constexpr int width = 16 / sizeof(typename G::Memory), accesses = larger(kNeighbours / width, 1);
  static_assert(kBlock == kNeighbours * kThreads && kNeighbours == 8, "a lane has its neighbours");
  for (int from = 0; from < count; from += kBlock) {
    WD_EACH_LANE(lane) {
      const int begin = from + lane * kNeighbours;
      T x[kNeighbours];
      if (moving.aligned && from + kBlock <= count) {
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
      WD_UNROLL
      for (int e = 0; e < kNeighbours; ++e) x[e] = x[e] * x[e];
      sums[lane] = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    }
    for (int half = kThreads / 2; half > 0; half /= 2) {
      WD_SYNC();
      WD_EACH_LANE(lane) {
        if (lane < half) sums[lane] = sums[lane] + sums[lane + half];
      }
    }
    WD_SYNC();
    WD_EACH_LANE(lane) {
      const Summand summand = summand_of(double(sums[0]));
      const int64_t digit = lane == 0 ? summand.digits[0] : lane == 1 ? summand.digits[1] : summand.digits[2];
      if (lane < summand.words) add_to(sum + summand.word + lane, digit);
    }
    WD_SYNC();
  }
}

// One block of lanes.
template <class Rule>
WD_HOST_DEVICE inline void begin_step(const Begin& of) {
  WD_SHARED double clip;
  WD_SHARED bool skip;
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
      const double norm = measures ? norm_of(of.of_groups) : double(__builtin_nan(""));
      clip = measures ? clip_of(norm_of(of.of_groups + 1), of.limits[kMaxNorm]) : 1;
      const bool finite = norm - norm == 0;
      skip = *of.found_inf != 0 || (measures && of.limits[kSkipNonfinite] != 0 && !finite);
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
      const double* const known = of.groups + group * of.group_width;
      WD_UNROLL
      for (int k = 0; k < width_of<Rule>(); ++k) scalars[k] = k + 1 < of.group_width ? known[k] : 0;
      __builtin_memcpy(&row, scalars, sizeof(Rule));
      row.seed = known[of.group_width - 1];
      row.grad_scale = row.grad_scale * of.clips[group];
      row.count(int64_t(of.steps[param]) + 1, of.fresh[param] != 0);
      __builtin_memcpy(scalars, &row, sizeof(Rule));
      WD_UNROLL
      for (int k = 0; k < width_of<Rule>(); ++k) of.rows[r * width_of<Rule>() + k] = scalars[k];
    }
  }
  WD_SYNC();
  WD_EACH_LANE(lane) {
    for (int i = lane; i < of.of_params; i += kThreads) {
      if (skip || of.active[i] == 0) continue;
      of.steps[i] = of.steps[i] + 1;
      of.fresh[i] = 0;
    }
  }
}

// `Of<T, G>::entry()` for the format of a gradient beside a parameter that is stepped in T; null where there is none.
template <template <class, class> class Of>
const void* find_squares(int64_t param, int64_t grad) {
  if (param == kFloat64) return grad == kFloat64 ? Of<double, Float64>::entry() : nullptr;
  if (grad == kFloat32) return Of<float, Float32>::entry();
  if (grad == kBFloat16) return Of<float, BFloat16>::entry();
  if (grad == kFloat16) return Of<float, Float16>::entry();
  return nullptr;
}

// `Of<Rule>::entry()` for a rule by its number: rows are the same whatever its states.
template <template <class> class Of>
const void* find_begin(int64_t rule) {
  using T = double;
#define WD_ROW(number, bits, ...) WD_ROW_##bits(number, __VA_ARGS__)
#define WD_ROW_0(number, ...) \
  if (rule == number) return Of<__VA_ARGS__>::entry();
#define WD_ROW_1(number, ...)
  WD_EACH_RULE(WD_ROW)
#undef WD_ROW
#undef WD_ROW_0
#undef WD_ROW_1
  return nullptr;
}

}  // namespace cuda
}  // namespace wd
