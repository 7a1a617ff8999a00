// The CUDA mover: what a block of threads does for one chunk of one segment: chunk -> segment -> row, by the records of
// ../layout.h. Full rounds of an aligned segment take 16-byte accesses; the rest of it, and all of any other segment,
// goes element by element, which promises nothing of addresses.
//
// It is written in phases over the lanes of a block (load, step, store; what combines lanes goes between two phases),
// with what a lane keeps from phase to phase in `Lanes`. On a GPU a lane is a thread; on_cpu.cpp compiles this file
// too, and a phase is a loop there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

namespace wd {
namespace cuda {

#include "../formats.h"
#include "../rules.h"

#include "../epilogues.h"
#include "../kernels.h"

constexpr int kThreads = 128;  // lanes of a block
// Accesses of a thread to each role that are on their way at once: of 16 bytes of the widest role, or of one element.
constexpr int kVectors = 2, kSingles = 4;

// A phase: `WD_EACH_LANE(lane) { ... }`; what lanes share is `WD_SHARED`, and between two phases that use it is
// WD_SYNC.
#ifdef __CUDA_ARCH__
#define WD_SHARED __shared__
#define WD_SYNC() __syncthreads()
#define WD_EACH_LANE(lane) for (int lane = int(threadIdx.x), once = 1; once != 0; once = 0)
template <class Registers>
struct Lanes {
  Registers own;
  WD_HOST_DEVICE Registers& operator[](int) { return own; }
};
#else
#define WD_SHARED
#define WD_SYNC()
#define WD_EACH_LANE(lane) for (int lane = kThreads - 1; lane >= 0; --lane)  // in an order that no device takes
template <class Registers>
struct Lanes {
  Registers of_lane[kThreads];
  Registers& operator[](int lane) { return of_lane[lane]; }
};
#endif

// `width` neighbouring elements of a role or of a part, read or written at once.
template <class Memory, int width>
struct alignas(sizeof(Memory) * width) Vector {
  Memory element[width];
};
template <class Format, int width>
using VectorOf = Vector<typename Format::Memory, width>;
template <class Format, int width>
using VectorOfPart = Vector<typename Format::Part, width>;

// Accesses of 4, 8 and 16 bytes are spelled out: nvcc does not make vectors of all by itself (for sm_100, of hardly
// any).
template <class V>
WD_HOST_DEVICE inline V read(const void* at) {
#ifdef __CUDA_ARCH__
  V value;
  uint64_t words[2];
  [[maybe_unused]] uint32_t word;
  if constexpr (sizeof(V) == 16)
    asm volatile("ld.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(words[0]), "=l"(words[1])
                 : "l"(__cvta_generic_to_global(at)));
  else if constexpr (sizeof(V) == 8)
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(words[0]) : "l"(__cvta_generic_to_global(at)));
  else if constexpr (sizeof(V) == 4 && sizeof(value.element[0]) < 4)
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(word) : "l"(__cvta_generic_to_global(at)));
  else
    return *static_cast<const V*>(at);
  if constexpr (sizeof(V) == 4)
    __builtin_memcpy(&value, &word, sizeof(V));
  else
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
  else if constexpr (sizeof(V) == 4 && sizeof(value.element[0]) < 4) {
    uint32_t word;
    __builtin_memcpy(&word, &value, sizeof(V));
    asm volatile("st.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(at)), "r"(word));
  } else
    *static_cast<V*>(at) = value;
#else
  *static_cast<V*>(at) = value;
#endif
}

// The roles of a segment, from the chunk's first element on.
template <class Rule, class P, class G, class S, class E>
struct Roles {
  using O = typename E::Output;
  static constexpr int kWidest = larger(
      larger(Rule::kStates > 0 ? sizeof(typename S::Memory) : 0, E::kOutputs > 0 ? sizeof(typename O::Memory) : 0),
      larger(P::kParted ? sizeof(typename P::Part) : 0,
             larger(sizeof(typename P::Memory), sizeof(typename G::Memory))));
  static constexpr int kWidth = 16 / kWidest;  // elements of a vector access: 16 bytes of the widest role

  typename P::Memory* theta;
  typename P::Part* part;  // of the parameter, if it has one
  const typename G::Memory* grad;
  typename S::Memory* state[Rule::kStates + 1];
  typename S::Part* scale[Rule::kStates + 1];  // of the states, if they have them
  typename O::Memory* output[E::kOutputs + 1];
  uint32_t* marks;               // if the epilogue marks what has changed
  const typename P::Memory* to;  // of a rule that refers, the references: as the parameter is stored
};

// The larger of two numbers >= 0, by their bits: NaN is the largest.
WD_HOST_DEVICE inline float larger_number(float x, float y) {
  return bits_to<float>(larger(bits_to<int32_t>(x), bits_to<int32_t>(y)));
}
WD_HOST_DEVICE inline double larger_number(double x, double y) {
  const auto a = bits_to<int64_t>(x), b = bits_to<int64_t>(y);
  return bits_to<double>(a > b ? a : b);
}

// The numbers of blocks of kBlock elements: of 8 neighbours, then of pairs half of them apart, until one is left.
// `sums` are added up; of those after them the largest is kept. A lane brings what `width` neighbours have together.
// Two blocks have room, in turn, so that one barrier a block is enough.
template <class T, int numbers, int sums, int width>
struct BlockNumbers {
  static constexpr int kWarp = 32, kApart = kBlock / 4;
  static_assert(kApart == kWarp * kNeighbours && kThreads % kWarp == 0, "a lane of a warp takes 8 elements four times");
  T part[numbers][2 * kBlock / width];

  WD_HOST_DEVICE static T together(bool adds, T x, T y) { return adds ? x + y : larger_number(x, y); }

  // Of so many neighbours; `of` is not what it was.
  template <int count>
  WD_HOST_DEVICE static T of_neighbours(bool adds, T* of) {
    WD_UNROLL
    for (int apart = 1; apart < count; apart *= 2) {
      WD_UNROLL
      for (int i = 0; i < count; i += 2 * apart) of[i] = together(adds, of[i], of[i + apart]);
    }
    return of[0];
  }

  // Element i of a chunk and its neighbours have this.
  WD_HOST_DEVICE void put(int n, uint32_t i, T found) { part[n][i % (2 * kBlock) / width] = found; }

  // Ends the block that begins at an element of its chunk, of which `count` elements were put.
  WD_HOST_DEVICE void end(uint32_t first, int count, T* to) {
    first = first % (2 * kBlock) / width;
    WD_EACH_LANE(lane) {
      WD_ROLLED
      for (int i = (count + width - 1) / width + lane; i < kBlock / width; i += kThreads)
        for (int n = 0; n < numbers; ++n) part[n][first + i] = 0;
    }
    WD_SYNC();
    WD_EACH_LANE(lane) {  // a warp has a number, and one four after it
      for (int n = lane / kWarp; n < numbers; n += kThreads / kWarp) {
        const T found = n < sums ? of_block(true, part[n] + first, lane) : of_block(false, part[n] + first, lane);
        if (lane % kWarp == 0) to[n] = found;
      }
    }
  }

  // Of all of a block, by the lanes of a warp.
  WD_HOST_DEVICE static T of_block(bool adds, const T* x, int lane) {
#ifdef __CUDA_ARCH__
    T found = of_four(adds, x + lane % kWarp * (kNeighbours / width));
    WD_UNROLL
    for (int half = kWarp / 2; half > 0; half /= 2)
      found = together(adds, found, __shfl_xor_sync(0xffffffffu, found, half));
    return found;
#else
    T of[kWarp];
    for (int i = 0; i < kWarp; ++i) of[i] = of_four(adds, x + i * (kNeighbours / width));
    for (int half = kWarp / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) of[i] = together(adds, of[i], of[i + half]);
    return of[0];
#endif
  }

  // Of 8 neighbours, and of those a quarter of a block further each.
  WD_HOST_DEVICE static T of_four(bool adds, const T* x) {
    T of[4];
    WD_UNROLL
    for (int k = 0; k < 4; ++k) {
      T own[kNeighbours / width];
      WD_UNROLL
      for (int i = 0; i < kNeighbours / width; ++i) own[i] = x[k * kApart / width + i];
      of[k] = of_neighbours<kNeighbours / width>(adds, own);
    }
    return together(adds, together(adds, of[0], of[2]), together(adds, of[1], of[3]));
  }
};

template <class T, int width>
struct BlockNumbers<T, 0, 0, width> {
  WD_HOST_DEVICE void end(int, int, T*) {}
};
template <class T, class E, int width>
using NumbersOf = BlockNumbers<T, numbers_of<E>(), E::kSums, width>;

// What a lane has of one round, which begins at `from`: `accesses` of `width` neighbours of every role. If `masked`, of
// that only what lies below `end`.
template <class Rule, class P, class G, class S, class E, int width, int accesses, bool masked>
struct Round {
  using T = typename Rule::Arithmetic;
  using O = typename E::Output;
  using Own = Roles<Rule, P, G, S, E>;
  static constexpr int kStates = Rule::kStates, kOutputs = E::kOutputs;
  static_assert(kOutputs == 0 || sizeof(typename O::Arithmetic) == sizeof(T), "outputs are rounded once");

  VectorOf<P, width> p[accesses];
  VectorOfPart<P, width> part[P::kParted ? accesses : 1];
  VectorOf<G, width> g[accesses];
  VectorOf<S, width> s[accesses][kStates + 1];
  VectorOf<O, width> o[accesses][kOutputs + 1];
  VectorOf<P, width> to[Rule::kRefers ? accesses : 1];
  // Of states that have scales: these, the states until the largest of a tile is known, and the largest of them.
  static constexpr int kScales = S::kTiled ? kStates : 0, kTileLanes = kScaled / width;
  int32_t scale[accesses][kScales + 1], largest[accesses][kScales + 1];
  T fresh[accesses][kScales + 1][width];
  uint32_t marks[accesses];  // of its neighbours, where these stand in their word
  static constexpr int kNumbers = numbers_of<E>();
  using Numbers = NumbersOf<T, E, Own::kWidth>;
  T number[accesses][kNumbers + 1];  // that its neighbours have together

  WD_HOST_DEVICE static int at(int from, int lane, int k) { return from + (k * kThreads + lane) * width; }

  WD_HOST_DEVICE void load(const Own& roles, int from, int end, int lane) {
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      const int i = at(from, lane, k);
      if (masked && i >= end) continue;
      if constexpr (P::kRead || E::kMarks) p[k] = read<VectorOf<P, width>>(roles.theta + i);
      if constexpr (P::kParted) part[k] = read<VectorOfPart<P, width>>(roles.part + i);
      g[k] = read<VectorOf<G, width>>(roles.grad + i);
      WD_UNROLL
      for (int n = 0; n < kStates; ++n) s[k][n] = read<VectorOf<S, width>>(roles.state[n] + i);
      WD_UNROLL
      for (int n = 0; n < kScales; ++n) scale[k][n] = roles.scale[n][i / kScaled];
      WD_UNROLL
      for (int n = 0; n < kOutputs; ++n) o[k][n] = read<VectorOf<O, width>>(roles.output[n] + i);
      if constexpr (Rule::kRefers) to[k] = read<VectorOf<P, width>>(roles.to + i);
    }
  }

  // `draws`: of the words; `first`: the number of the chunk's first element.
  WD_HOST_DEVICE void step_and_store(const Own& roles, const Rule& rule, const E& epilogue, const Draws* draws,
                                     int64_t first, int from, int end, int lane) {
    const bool frozen = rule.frozen != 0;
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      const int i = at(from, lane, k);
      WD_UNROLL
      for (int n = 0; n < kScales; ++n) largest[k][n] = 0;
      if constexpr (E::kMarks) marks[k] = 0;
      WD_UNROLL
      for (int n = 0; n < kNumbers; ++n) number[k][n] = 0;
      if (masked && i >= end) continue;
      const uint32_t place = Draws::place(first + i);  // neighbours pass no multiple of 2^32
      T given[kNumbers + 1][width];
      WD_UNROLL
      for (int e = 0; e < width; ++e) {
        typename P::Part* const also = part[P::kParted ? k : 0].element + e;
        T x = P::load(p[k].element + e, also), own[kStates + 1];
        WD_UNROLL
        for (int n = 0; n < kStates; ++n) {
          if constexpr (S::kTiled)
            own[n] = S::load(S::widened(s[k][n].element[e], Rule::is_signed(n)), scale[k][n], Rule::is_signed(n));
          else
            own[n] = S::load(s[k][n].element + e);
        }
        const T before = x;
        T gradient = G::load(g[k].element + e);
        const T u = step(rule, x, gradient, own, Rule::kRefers ? T(P::load(to[k].element + e, also)) : T(0));
        const uint32_t here = place + e * Draws::kNext;
        [[maybe_unused]] const typename P::Memory was = p[k].element[e];
        P::store(p[k].element + e, x, P::kStochastic ? draw_of(kParam, draws[0](here)) : 0, also);
        if constexpr (E::kMarks)
          if (is_changed<P>(was, p[k].element[e])) marks[k] |= uint32_t(1) << e;
        uint32_t word = 0;
        WD_UNROLL
        for (int n = 0; n < kStates; ++n) {
          if constexpr (S::kTiled) {
            fresh[k][n][e] = own[n];
            largest[k][n] = larger(largest[k][n], S::size(own[n]));
          } else {
            if (S::kStochastic && n % 2 == 0) word = draws[word_of(kState + n)](here);
            S::store(s[k][n].element + e, own[n], S::kStochastic ? draw_of(kState + n, word) : 0);
          }
        }
        if constexpr (kOutputs + kNumbers > 0) {
          T output[kOutputs + 1], of_element[kNumbers + 1];
          WD_UNROLL
          for (int n = 0; n < kOutputs; ++n) output[n] = O::load(o[k][n].element + e);
          const T after = frozen ? before : T(P::load(p[k].element + e, also));
          if constexpr (E::kSees == kSeesStepped)
            epilogue(Element<T>{before, after, gradient, u, own, kStates}, output, of_element);
          else  // `own` has no address
            epilogue(Element<T>{before, after, gradient, u, nullptr, 0}, output, of_element);
          WD_UNROLL
          for (int n = 0; n < kOutputs; ++n) O::store(o[k][n].element + e, output[n], 0);
          WD_UNROLL
          for (int n = 0; n < kNumbers; ++n) given[n][e] = of_element[n];
        }
      }
      if constexpr (kNumbers > 0) {
        WD_UNROLL
        for (int n = 0; n < kNumbers; ++n)
          number[k][n] = Numbers::template of_neighbours<width>(n < E::kSums, given[n]);
      }
      if constexpr (E::kMarks) marks[k] = frozen ? 0 : marks[k] << i % kMarked;
      if (!frozen) write(roles.theta + i, p[k]);
      if constexpr (P::kParted)
        if (!frozen) write(roles.part + i, part[k]);
      WD_UNROLL
      for (int n = kScales; n < kStates; ++n) write(roles.state[n] + i, s[k][n]);
      WD_UNROLL
      for (int n = 0; n < kOutputs; ++n) write(roles.output[n] + i, o[k][n]);
    }
  }

  // The scales of the tiles that a lane has part in, which so many neighbouring lanes share; all of them come here.
  WD_HOST_DEVICE static void find_scales(Lanes<Round>& lanes, int lane) {
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      WD_UNROLL
      for (int n = 0; n < kScales; ++n) {
        int32_t found = lanes[lane].largest[k][n];
#ifdef __CUDA_ARCH__
        WD_UNROLL
        for (int other = 1; other < kTileLanes; other *= 2)
          found = larger(found, __shfl_xor_sync(0xffffffffu, found, other));
#else
        const int begin = lane / kTileLanes * kTileLanes;
        for (int other = begin; other < begin + kTileLanes; ++other) found = larger(found, lanes[other].largest[k][n]);
#endif
        lanes[lane].scale[k][n] = S::scale(found, Rule::is_signed(n));
      }
    }
  }

  // Sets the marks of the words that a lane has part in, which so many neighbouring lanes share; all of them come here.
  WD_HOST_DEVICE static void set_marks(Lanes<Round>& lanes, const Own& roles, int from, int lane) {
    constexpr int sharing = kMarked / width;
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      uint32_t found = lanes[lane].marks[k];
#ifdef __CUDA_ARCH__
      WD_UNROLL
      for (int other = 1; other < sharing; other *= 2) found |= __shfl_xor_sync(0xffffffffu, found, other);
#else
      const int begin = lane / sharing * sharing;
      for (int other = begin; other < begin + sharing; ++other) found |= lanes[other].marks[k];
#endif
      if (lane % sharing == 0 && found != 0) roles.marks[at(from, lane, k) / kMarked] |= found;
    }
  }

  // Puts numbers of as many elements as a vector has, which so many neighbouring lanes share; all of them come here.
  WD_HOST_DEVICE static void put_numbers(Lanes<Round>& lanes, Numbers& numbers, int from, int end, int lane) {
    constexpr int sharing = Own::kWidth / width;
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      const int i = at(from, lane, k);
      WD_UNROLL
      for (int n = 0; n < kNumbers; ++n) {
#ifdef __CUDA_ARCH__
        T found = lanes[lane].number[k][n];
        WD_UNROLL
        for (int other = 1; other < sharing; other *= 2)
          found = Numbers::together(n < E::kSums, found, __shfl_xor_sync(0xffffffffu, found, other));
#else
        T of[sharing];
        for (int other = 0; other < sharing; ++other) of[other] = lanes[lane / sharing * sharing + other].number[k][n];
        const T found = Numbers::template of_neighbours<sharing>(n < E::kSums, of);
#endif
        if (lane % sharing == 0 && (!masked || i < end)) numbers.put(n, i, found);
      }
    }
  }

  WD_HOST_DEVICE void store_scaled(const Own& roles, const Draws* draws, int64_t first, int from, int end, int lane) {
    WD_UNROLL
    for (int k = 0; k < accesses; ++k) {
      const int i = at(from, lane, k);
      if (masked && i >= end) continue;
      const uint32_t place = Draws::place(first + i);
      WD_UNROLL
      for (int e = 0; e < width; ++e) {
        uint32_t word = 0;
        WD_UNROLL
        for (int n = 0; n < kScales; ++n) {
          if (S::kStochastic && n % 2 == 0) word = draws[word_of(kState + n)](place + e * Draws::kNext);
          const uint32_t draw = S::kStochastic ? draw_of(kState + n, word) : 0;
          s[k][n].element[e] = uint8_t(S::store(fresh[k][n][e], draw, scale[k][n], Rule::is_signed(n)));
        }
      }
      WD_UNROLL
      for (int n = 0; n < kScales; ++n) {
        write(roles.state[n] + i, s[k][n]);
        if (lane % kTileLanes == 0) roles.scale[n][i / kScaled] = uint8_t(scale[k][n]);
      }
    }
  }
};

template <class Element>
WD_HOST_DEVICE inline Element* memory(void* at, int64_t offset) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(at));  // so that its accesses are those of global memory
#endif
  return static_cast<Element*>(at) + offset;
}

template <class Rule, class P, class G, class S, class E>
WD_HOST_DEVICE inline void step_chunk(const Launch& launch, int64_t block) {
  const int64_t chunk = launch.chunks[block];
  // Words of addresses are read as pointers: the compiler believes nothing of what was a number.
  void* const* place = reinterpret_cast<void* const*>(launch.places) + (chunk & 0xffffffff) * launch.place_words;
  const Moving& moving = launch.moving[chunk & 0xffffffff];
  const int64_t begin = (chunk >> 32) * launch.chunk_size;
  const int64_t rest = moving.numel - begin;  // numel is 0 without a gradient
  if (rest <= 0 || launch.control->skip != 0) return;
  const int count = rest < launch.chunk_size ? int(rest) : launch.chunk_size;

  const double* const row = launch.rows + moving.row * launch.row_width;
  const Rule rule = rule_of_row<Rule>(row, launch.control->grad_factor);
  const E epilogue = of_row<E>(row + width_of<Rule>());
  using T = typename Rule::Arithmetic;
  using Own = Roles<Rule, P, G, S, E>;
  Own roles = {memory<typename P::Memory>(place[address_word(kParam)], begin),
               nullptr,
               memory<typename G::Memory>(moving.grad, begin),
               {},
               {},
               {},
               nullptr};
  WD_UNROLL
  for (int n = 0; n < Rule::kStates; ++n)
    roles.state[n] = memory<typename S::Memory>(place[address_word(kState + n)], begin);
  WD_UNROLL
  for (int n = 0; n < E::kOutputs; ++n)
    roles.output[n] = memory<typename E::Output::Memory>(place[address_word(kState + Rule::kStates + n)], begin);
  if constexpr (Rule::kRefers)
    roles.to = memory<typename P::Memory>(place[address_word(kState + Rule::kStates + E::kOutputs)], begin);
  if constexpr (P::kParted)
    roles.part = memory<typename P::Part>(place[address_word(kState + Rule::kStates + E::kOutputs)], begin);
  if constexpr (S::kTiled) {
    constexpr int scales = kState + Rule::kStates + E::kOutputs + P::kParted;
    WD_UNROLL
    for (int n = 0; n < Rule::kStates; ++n)
      roles.scale[n] = memory<typename S::Part>(place[address_word(scales + n)], begin / kScaled);
  }
  Draws draws[(kState + Rule::kStates + 1) / 2] = {};
  if constexpr (P::kStochastic || S::kStochastic) {
    const Draws of_step = draws_of_row<Rule>(row);
    WD_UNROLL
    for (int word = 0; word < (kState + Rule::kStates + 1) / 2; ++word) draws[word] = of_step.of_word(word);
  }
  if constexpr (E::kMarks) roles.marks = memory<uint32_t>(place[kMarks], begin / kMarked);
  const int64_t first = launch.places[(chunk & 0xffffffff) * launch.place_words + kOrigin] + begin;
  WD_SHARED NumbersOf<T, E, Own::kWidth> numbers;
  constexpr int kNumbers = numbers_of<E>();
  T* to_numbers = nullptr;
  if constexpr (kNumbers > 0) to_numbers = memory<T>(place[kOutput], begin / kBlock * kNumbers);
  // Ends the blocks that end where a round does, which is at a multiple of half a block, or with the chunk.
  const auto end_block = [&](int from, int to) {
    if (kNumbers == 0 || (to % kBlock != 0 && to < count)) return;
    const int last = (to < count ? to : count) - 1, first = last / kBlock * kBlock;
    numbers.end(first, last + 1 - first, to_numbers + first / kBlock * kNumbers);
  };

  constexpr int vectors = Own::kWidth == 8 ? kVectors / 2 : kVectors;  // 8 elements a lane are enough
  constexpr int of_round = kThreads * vectors * Own::kWidth;
  const int done = moving.aligned ? count - count % of_round : 0;
  for (int from = 0; from < done; from += of_round) {
    using Whole = Round<Rule, P, G, S, E, Own::kWidth, vectors, false>;
    Lanes<Whole> lanes;
    WD_EACH_LANE(lane) lanes[lane].load(roles, from, done, lane);
    WD_EACH_LANE(lane) lanes[lane].step_and_store(roles, rule, epilogue, draws, first, from, done, lane);
    if constexpr (E::kMarks) {
      WD_EACH_LANE(lane) Whole::set_marks(lanes, roles, from, lane);
    }
    if constexpr (kNumbers > 0) {
      WD_EACH_LANE(lane) Whole::put_numbers(lanes, numbers, from, done, lane);
    }
    if constexpr (S::kTiled) {
      WD_EACH_LANE(lane) Whole::find_scales(lanes, lane);
      WD_EACH_LANE(lane) lanes[lane].store_scaled(roles, draws, first, from, done, lane);
    }
    end_block(from, from + of_round);
  }
  constexpr int singles = kNumbers > 0 ? kSingles / 2 : kSingles;  // numbers of each take code and registers
  for (int from = done; from < count; from += kThreads * singles) {
    using Part = Round<Rule, P, G, S, E, 1, singles, true>;
    Lanes<Part> lanes;
    WD_EACH_LANE(lane) lanes[lane].load(roles, from, count, lane);
    WD_EACH_LANE(lane) lanes[lane].step_and_store(roles, rule, epilogue, draws, first, from, count, lane);
    if constexpr (E::kMarks) {
      WD_EACH_LANE(lane) Part::set_marks(lanes, roles, from, lane);
    }
    if constexpr (kNumbers > 0) {
      WD_EACH_LANE(lane) Part::put_numbers(lanes, numbers, from, count, lane);
    }
    if constexpr (S::kTiled) {
      WD_EACH_LANE(lane) Part::find_scales(lanes, lane);
      WD_EACH_LANE(lane) lanes[lane].store_scaled(roles, draws, first, from, count, lane);
    }
    end_block(from, from + kThreads * singles);
  }
}

// Have the roles from `first` to `last` this format?
inline bool all_are(int64_t code, const int64_t* formats, int first, int last) {
  for (int role = first; role < last; ++role)
    if (formats[role] != code) return false;
  return true;
}

// A kernel whose code is `Of<Rule, P, G, S, E>::entry()`.
template <template <class, class, class, class, class> class Of, class P, class G, class S, class E>
struct WithFormats {
  template <class Rule>
  struct Found {
    static const Kernel* found() {
      if constexpr (Rule::kStates == 0 && sizeof(typename S::Memory) != sizeof(typename P::Arithmetic)) {
        return nullptr;  // its rows are those that have no format of states to tell
      } else if constexpr (Rule::kPulls && (!pulls_in<P, G, S>() || E::kOutputs + numbers_of<E>() > 0 || E::kMarks)) {
        return nullptr;
      } else {
        constexpr int n = Rule::kStates, scales = S::kTiled ? n : 0;
        static const Kernel kernel = {
            Of<Rule, P, G, S, E>::entry(),
            kState + n + E::kOutputs + Rule::kRefers + P::kParted + scales,
            width_of<Rule>() + width_of<E>(),
            n,
            Rule::kRefers,
            {code_of<S>(Rule::is_signed(0)), code_of<S>(Rule::is_signed(1)), code_of<S>(Rule::is_signed(2))}};
        return &kernel;
      }
    }
  };
};

// The kernel for a row of WD_EACH_RULE with an epilogue, if these are the formats of all roles; else null.
template <template <class, class, class, class, class> class Of, class P, class G, class S, class E>
const Kernel* find_with(int64_t rule, int64_t variant, const int64_t* formats, int roles) {
  using T = typename P::Arithmetic;
  if (formats[kParam] != P::kCode || formats[kGrad] != G::kCode) return nullptr;
  const Kernel* const kernel = find_rule<T, WithFormats<Of, P, G, S, E>::template Found>(rule, variant);
  if (kernel == nullptr || kernel->roles != roles) return nullptr;
  const int outputs = kState + kernel->states, to = outputs + E::kOutputs, parts = to + kernel->refers;
  for (int n = 0; n < kernel->states; ++n)
    if (formats[kState + n] != kernel->formats[n]) return nullptr;
  const bool same = all_are(E::Output::kCode, formats, outputs, to) && all_are(P::kCode, formats, to, parts) &&
                    all_are(kPart, formats, parts, roles);
  return same ? kernel : nullptr;
}

// The same with one of WD_EACH_EPILOGUE, by the bit that is set.
template <template <class, class, class, class, class> class Of, class P, class G, class S>
const Kernel* find_with_epilogue(int64_t rule, int64_t variant, int64_t epilogues, const int64_t* formats, int roles) {
  using T = typename P::Arithmetic;
#define WD_ROW(code, ...) \
  if (epilogues == (code)) return find_with<Of, P, G, S, __VA_ARGS__>(rule, variant, formats, roles);
  WD_EACH_EPILOGUE(WD_ROW)
#undef WD_ROW
  return nullptr;
}

// The kernel for rows of WD_EACH_RULE, WD_EACH_EPILOGUE and WD_EACH_FORMATS, or null where there is none.
template <template <class, class, class, class, class> class Of>
const Kernel* find_kernel(int64_t rule, int64_t variant, int64_t epilogues, const int64_t* formats, int roles) {
  const Kernel* kernel = nullptr;
#ifndef WD_TEST_EPILOGUE
  if (epilogues == 0) {
#define WD_ROW(P, G, S) \
  if (kernel == nullptr) kernel = find_with<Of, P, G, S, NoEpilogue<P::Arithmetic>>(rule, variant, formats, roles);
    WD_EACH_FORMATS(WD_ROW)
#undef WD_ROW
    return kernel;
  }
#endif
#define WD_ROW(P, G, S) \
  if (kernel == nullptr) kernel = find_with_epilogue<Of, P, G, S>(rule, variant, epilogues, formats, roles);
  WD_EACH_FORMATS_WITH_EPILOGUE(WD_ROW)
#undef WD_ROW
  return kernel;
}

}  // namespace cuda
}  // namespace wd
