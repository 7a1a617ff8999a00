// The CUDA mover: what one thread does for one chunk. A block of threads takes a chunk of one segment: chunk -> segment
// -> row, by the records of ../table.h. Full rounds of an aligned segment take 16-byte accesses; the rest of it, and
// all of any other segment, goes element by element, which promises nothing of addresses.
//
// Threads share nothing, so plain loops over blocks and threads give the same bits: on_cpu.cpp compiles this file too.
#pragma once

#include <cstdint>

#include "../table.h"
#include "device.h"

#ifdef __CUDACC__
#define WD_HOST_DEVICE __host__ __device__
#define WD_UNROLL _Pragma("unroll")
#else
#define WD_UNROLL
#endif

namespace wd {
namespace cuda {

#include "../rules.h"
#include "../storage.h"

#include "../kernels.h"

constexpr int kThreads = 128;  // of a block
// Accesses of a thread to each role that are on their way at once: of 16 bytes of the widest role, or of one element.
constexpr int kVectors = 2, kSingles = 4;

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
  using T = typename Rule::Arithmetic;
  static constexpr int kStates = Rule::kStates;
  static constexpr int kWidest = larger(kStates > 0 ? sizeof(typename S::Memory) : 0,
                                        larger(sizeof(typename P::Memory), sizeof(typename G::Memory)));
  static constexpr int kWidth = 16 / kWidest;  // elements of a vector access: 16 bytes of the widest role

  typename P::Memory* theta;
  const typename G::Memory* grad;
  typename S::Memory* state[3];

  // Steps what a thread has of the round that begins at `from`; if `masked`, of that only what lies below `end`.
  template <int width, int accesses, bool masked>
  WD_HOST_DEVICE inline void round(const Rule& rule, bool frozen, int from, int end, int thread) const {
    Vector<P, width> p[accesses];
    Vector<G, width> g[accesses];
    Vector<S, width> s[accesses][3];
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      const int at = from + (k * kThreads + thread) * width;
      if (masked && at >= end) continue;
      p[k] = read<Vector<P, width>>(theta + at);
      g[k] = read<Vector<G, width>>(grad + at);
      WD_UNROLL
      for (int i = 0; i < kStates; ++i) s[k][i] = read<Vector<S, width>>(state[i] + at);
    }
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      const int at = from + (k * kThreads + thread) * width;
      if (masked && at >= end) continue;
      WD_UNROLL
      for (int e = 0; e < width; ++e) {
        T x = P::load(p[k].element + e), values[3];
        WD_UNROLL
        for (int i = 0; i < kStates; ++i) values[i] = S::load(s[k][i].element + e);
        rule(x, G::load(g[k].element + e), values);
        P::store(p[k].element + e, x);
        WD_UNROLL
        for (int i = 0; i < kStates; ++i) S::store(s[k][i].element + e, values[i]);
      }
      if (!frozen) write(theta + at, p[k]);
      WD_UNROLL
      for (int i = 0; i < kStates; ++i) write(state[i] + at, s[k][i]);
    }
  }
};

template <class Format>
WD_HOST_DEVICE inline typename Format::Memory* memory(void* address, int64_t offset) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(address));  // so that its accesses are those of global memory
#endif
  return static_cast<typename Format::Memory*>(address) + offset;
}

template <class Rule, class P, class G, class S>
WD_HOST_DEVICE inline void step_chunk(const Launch& launch, int64_t block, int thread) {
  const int64_t chunk = launch.chunks[block];
  const Place& place = launch.places[chunk & 0xffffffff];
  const Moving& moving = launch.moving[chunk & 0xffffffff];
  const int64_t begin = (chunk >> 32) * launch.chunk_size;
  const int64_t rest = moving.numel - begin;  // numel is 0 without a gradient
  if (rest <= 0 || launch.control->skip != 0) return;
  const int count = rest < launch.chunk_size ? int(rest) : launch.chunk_size;

  const double* row = launch.rows + moving.row * launch.row_width;
  const Rule rule(row, launch.control->grad_factor);
  const bool frozen = row[kFrozen] != 0;
  using Own = Roles<Rule, P, G, S>;
  Own roles = {memory<P>(place.param, begin), memory<G>(moving.grad, begin), {}};
  WD_UNROLL
  for (int i = 0; i < Own::kStates; ++i) roles.state[i] = memory<S>(place.state[i], begin);

  constexpr int vectors = Own::kWidth == 8 ? kVectors / 2 : kVectors;  // 8 elements a thread are enough
  constexpr int of_round = kThreads * vectors * Own::kWidth;
  const int done = moving.aligned ? count - count % of_round : 0;
  for (int from = 0; from < done; from += of_round)
    roles.template round<Own::kWidth, vectors, false>(rule, frozen, from, done, thread);
  for (int from = done; from < count; from += kThreads * kSingles)
    roles.template round<1, kSingles, true>(rule, frozen, from, count, thread);
}

}  // namespace cuda
}  // namespace wd
