// The CUDA mover: what a block of threads does for one chunk of one segment: chunk -> segment -> row, by the records of
// ../layout.h. Full rounds of an aligned segment take 16-byte accesses; the rest of it, and all of any other segment,
// goes element by element, which promises nothing of addresses.
//
// It is written in phases over the lanes of a block (load, step, store; what combines lanes goes between two phases),
// with what a lane keeps from phase to phase in `Lanes`. On a GPU a lane is a thread; on_cpu.cpp compiles this file
// too, and a phase is a loop there.
#pragma once

#include <cstdint>

#include "device.h"

namespace wd {
namespace cuda {

#include "../formats.h"
#include "../rules.h"

#include "../kernels.h"

constexpr int kThreads = 128;  // lanes of a block
// Accesses of a thread to each role that are on their way at once: of 16 bytes of the widest role, or of one element.
constexpr int kVectors = 2, kSingles = 4;

// A phase: `WD_EACH_LANE(lane) { ... }`.
#ifdef __CUDA_ARCH__
#define WD_EACH_LANE(lane) for (int lane = int(threadIdx.x), once = 1; once != 0; once = 0)
template <class Registers>
struct Lanes {
  Registers own;
  WD_HOST_DEVICE Registers& operator[](int) { return own; }
};
#else
#define WD_EACH_LANE(lane) for (int lane = kThreads - 1; lane >= 0; --lane)  // in an order that no device takes
template <class Registers>
struct Lanes {
  Registers of_lane[kThreads];
  Registers& operator[](int lane) { return of_lane[lane]; }
};
#endif

constexpr int larger(int a, int b) { return a > b ? a : b; }

// `width` neighbouring elements of a role, read or written at once.
template <class Format, int width>
struct alignas(sizeof(typename Format::Memory) * width) Vector {
  typename Format::Memory element[width];
};

// Accesses of 8 and 16 bytes are spelled out: nvcc does not make vectors of all by itself (for sm_100, of hardly any).
template <class V>
WD_HOST_DEVICE inline V read(const void* at) {
#ifdef __CUDA_ARCH__
  V value;
  uint64_t words[2];
  if constexpr (sizeof(V) == 16)
    asm volatile("ld.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(words[0]), "=l"(words[1])
                 : "l"(__cvta_generic_to_global(at)));
  else if constexpr (sizeof(V) == 8)
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(words[0]) : "l"(__cvta_generic_to_global(at)));
  else
    return *static_cast<const V*>(at);
  __builtin_memcpy(&value, words, sizeof(V));
  return value;
#else
  return *static_cast<const V*>(at);
#endif
}

template <class V>
WD_HOST_DEVICE inline void write(void* at, const V& value) {
#ifdef __CUDA_ARCH__
  uint64_t words[2];
  if constexpr (sizeof(V) >= 8) __builtin_memcpy(words, &value, sizeof(V));
  if constexpr (sizeof(V) == 16)
    asm volatile("st.global.v2.u64 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(at)), "l"(words[0]), "l"(words[1]));
  else if constexpr (sizeof(V) == 8)
    asm volatile("st.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(at)), "l"(words[0]));
  else
    *static_cast<V*>(at) = value;
#else
  *static_cast<V*>(at) = value;
#endif
}

// The roles of a segment, from the chunk's first element on.
template <class Rule, class P, class G, class S>
struct Roles {
  static constexpr int kWidest = larger(Rule::kStates > 0 ? sizeof(typename S::Memory) : 0,
                                        larger(sizeof(typename P::Memory), sizeof(typename G::Memory)));
  static constexpr int kWidth = 16 / kWidest;  // elements of a vector access: 16 bytes of the widest role

  typename P::Memory* theta;
  const typename G::Memory* grad;
  typename S::Memory* state[Rule::kStates + 1];
};

// What a lane has of one round, which begins at `from`: `accesses` of `width` neighbours of every role. If `masked`, of
// that only what lies below `end`.
template <class Rule, class P, class G, class S, int width, int accesses, bool masked>
struct Round {
  using T = typename Rule::Arithmetic;
  static constexpr int kStates = Rule::kStates;

  Vector<P, width> p[accesses];
  Vector<G, width> g[accesses];
  Vector<S, width> s[accesses][kStates + 1];

  WD_HOST_DEVICE static int at(int from, int lane, int k) { return from + (k * kThreads + lane) * width; }

  WD_HOST_DEVICE void load(const Roles<Rule, P, G, S>& roles, int from, int end, int lane) {
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      const int i = at(from, lane, k);
      if (masked && i >= end) continue;
      p[k] = read<Vector<P, width>>(roles.theta + i);
      g[k] = read<Vector<G, width>>(roles.grad + i);
      WD_UNROLL
      for (int n = 0; n < kStates; ++n) s[k][n] = read<Vector<S, width>>(roles.state[n] + i);
    }
  }

  WD_HOST_DEVICE void step_and_store(const Roles<Rule, P, G, S>& roles, const Rule& rule, int from, int end, int lane) {
    const bool frozen = rule.frozen != 0;
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      const int i = at(from, lane, k);
      if (masked && i >= end) continue;
      WD_UNROLL
      for (int e = 0; e < width; ++e) {
        T x = P::load(p[k].element + e), own[kStates + 1];
        WD_UNROLL
        for (int n = 0; n < kStates; ++n) own[n] = S::load(s[k][n].element + e);
        step(rule, x, T(G::load(g[k].element + e)), own);
        P::store(p[k].element + e, x);
        WD_UNROLL
        for (int n = 0; n < kStates; ++n) S::store(s[k][n].element + e, own[n]);
      }
      if (!frozen) write(roles.theta + i, p[k]);
      WD_UNROLL
      for (int n = 0; n < kStates; ++n) write(roles.state[n] + i, s[k][n]);
    }
  }
};

template <class Format>
WD_HOST_DEVICE inline typename Format::Memory* memory(void* at, int64_t offset) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(at));  // so that its accesses are those of global memory
#endif
  return static_cast<typename Format::Memory*>(at) + offset;
}

template <class Rule, class P, class G, class S>
WD_HOST_DEVICE inline void step_chunk(const Launch& launch, int64_t block) {
  const int64_t chunk = launch.chunks[block];
  // Words of addresses are read as pointers: the compiler believes nothing of what was a number.
  void* const* place = reinterpret_cast<void* const*>(launch.places) + (chunk & 0xffffffff) * launch.place_words;
  const Moving& moving = launch.moving[chunk & 0xffffffff];
  const int64_t begin = (chunk >> 32) * launch.chunk_size;
  const int64_t rest = moving.numel - begin;  // numel is 0 without a gradient
  if (rest <= 0 || launch.control->skip != 0) return;
  const int count = rest < launch.chunk_size ? int(rest) : launch.chunk_size;

  const Rule rule = rule_of_row<Rule>(launch.rows + moving.row * launch.row_width, launch.control->grad_factor);
  using Own = Roles<Rule, P, G, S>;
  Own roles = {memory<P>(place[address_word(kParam)], begin), memory<G>(moving.grad, begin), {}};
  WD_UNROLL
  for (int n = 0; n < Rule::kStates; ++n) roles.state[n] = memory<S>(place[address_word(kState + n)], begin);

  constexpr int vectors = Own::kWidth == 8 ? kVectors / 2 : kVectors;  // 8 elements a lane are enough
  constexpr int of_round = kThreads * vectors * Own::kWidth;
  const int done = moving.aligned ? count - count % of_round : 0;
  for (int from = 0; from < done; from += of_round) {
    Lanes<Round<Rule, P, G, S, Own::kWidth, vectors, false>> lanes;
    WD_EACH_LANE(lane) lanes[lane].load(roles, from, done, lane);
    WD_EACH_LANE(lane) lanes[lane].step_and_store(roles, rule, from, done, lane);
  }
  for (int from = done; from < count; from += kThreads * kSingles) {
    Lanes<Round<Rule, P, G, S, 1, kSingles, true>> lanes;
    WD_EACH_LANE(lane) lanes[lane].load(roles, from, count, lane);
    WD_EACH_LANE(lane) lanes[lane].step_and_store(roles, rule, from, count, lane);
  }
}

// Have all states this format?
inline bool all_are(int64_t code, const int64_t* formats, int roles) {
  for (int role = kState; role < roles; ++role)
    if (formats[role] != code) return false;
  return true;
}

// A kernel whose code is `Of<Rule, P, G, S>::entry()`.
template <template <class, class, class, class> class Of, class P, class G, class S>
struct WithFormats {
  template <class Rule>
  struct Found {
    static const Kernel* found() {
      static const Kernel kernel = {Of<Rule, P, G, S>::entry(), Rule::kStates,
                                    int(sizeof(Rule) / sizeof(typename Rule::Arithmetic))};
      return &kernel;
    }
  };
};

// The kernel for a row of WD_EACH_RULE and a row of WD_EACH_FORMATS, or null where there is none.
template <template <class, class, class, class> class Of>
const Kernel* find_kernel(int64_t rule, int64_t variant, const int64_t* formats, int roles) {
  const Kernel* kernel = nullptr;
#define WD_ROW(P, G, S)                                                                               \
  if (formats[kParam] == P::kCode && formats[kGrad] == G::kCode && all_are(S::kCode, formats, roles)) \
    kernel = find_rule<typename P::Arithmetic, WithFormats<Of, P, G, S>::template Found>(rule, variant);
  WD_EACH_FORMATS(WD_ROW)
#undef WD_ROW
  return kernel != nullptr && roles == kState + kernel->states ? kernel : nullptr;
}

}  // namespace cuda
}  // namespace wd
