// Storage formats: how one element of one role lies in memory. `load` widens to the arithmetic type, `store` rounds
// once, to nearest even or stochastically, and writes every NaN as the canonical one. Conversions are integer and
// float32 operations on bits, so that every compiler can vectorise them and every machine gives the same result. A
// format may have a part (`Part`), which lies at an address of its own; of one that has none the address is not read.
// The part of a tiled format is a scale for every kScaled neighbours, which is known before one of them is stored.
//
// Include inside the namespace of one instruction set (see cpu/mover.inc); it needs layout.h.

template <class To, class From>
WD_HOST_DEVICE inline To bits_to(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_to changes the type, not the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// A bijection of 64-bit numbers that leaves no bit of its argument recognisable.
WD_HOST_DEVICE inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Random bits: those of a step, then of one word in it, which two roles share.
struct Draws {
  uint64_t key;

  WD_HOST_DEVICE static Draws of(uint64_t seed, uint64_t step) { return {mix(mix(seed) + step)}; }
  WD_HOST_DEVICE Draws of_word(int word) const { return {mix(key + uint64_t(word))}; }
  // What tells an element from others, by its number; that of the next one is kNext more, up to a multiple of 2^32.
  static constexpr uint32_t kNext = 0x9e3779b1u;
  WD_HOST_DEVICE static uint32_t place(int64_t index) {
    return uint32_t(index) * kNext + uint32_t(index >> 32) * 0x85ebca77u;
  }
  // The word of the element of that place.
  WD_HOST_DEVICE uint32_t operator()(uint32_t place) const {
    uint32_t x = place + uint32_t(key);
    x = (x ^ (x >> 16)) * 0x7feb352du + uint32_t(key >> 32);
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
  }
};

// Which word has a role's 16 bits, and these.
WD_HOST_DEVICE inline int word_of(int role) { return role / 2; }
WD_HOST_DEVICE inline uint32_t draw_of(int role, uint32_t word) { return role % 2 == 0 ? word >> 16 : word & 0xffffu; }

// A format without a part.
struct Whole {
  static constexpr bool kStochastic = false, kParted = false, kRead = true, kTiled = false;
  using Part = char;
};

struct Float64 : Whole {
  static constexpr int64_t kCode = kFloat64;
  using Bits = uint64_t;
  static constexpr Bits kInfinity = 0x7ff0000000000000u;
  using Arithmetic = double;
  using Memory = double;
  WD_HOST_DEVICE static double load(const Memory* at, const Part* = nullptr) { return *at; }
  WD_HOST_DEVICE static void store(Memory* at, double value, uint32_t = 0, Part* = nullptr) { *at = value; }
};

struct Float32 : Whole {
  static constexpr int64_t kCode = kFloat32;
  using Bits = uint32_t;
  static constexpr Bits kInfinity = 0x7f800000u;
  using Arithmetic = float;
  using Memory = float;
  WD_HOST_DEVICE static float load(const Memory* at, const Part* = nullptr) { return *at; }
  WD_HOST_DEVICE static void store(Memory* at, float value, uint32_t = 0, Part* = nullptr) { *at = value; }
};

struct BFloat16 : Whole {
  static constexpr int64_t kCode = kBFloat16;
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7f80u;
  using Arithmetic = float;
  using Memory = uint16_t;
  WD_HOST_DEVICE static float load(const Memory* at, const Part* = nullptr) {
    return bits_to<float>(uint32_t(*at) << 16);
  }
  WD_HOST_DEVICE static void store(Memory* at, float value, uint32_t = 0, Part* = nullptr) {
    const uint32_t bits = bits_to<uint32_t>(value);
    const uint32_t nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    *at = uint16_t((value != value ? 0x7fc00000u : nearest) >> 16);
  }
};

struct BFloat16Stochastic : BFloat16 {
  static constexpr bool kStochastic = true;
  static constexpr int64_t kCode = kBFloat16Stochastic;
  // Up as often as what is lost says: of 16 random bits, so many carry.
  WD_HOST_DEVICE static void store(Memory* at, float value, uint32_t draw, Part* = nullptr) {
    const uint32_t bits = bits_to<uint32_t>(value);
    *at = uint16_t((value != value ? 0x7fc00000u : bits + draw) >> 16);
  }
};

struct Float16 : Whole {
  static constexpr int64_t kCode = kFloat16;
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7c00u;
  using Arithmetic = float;
  using Memory = uint16_t;
#ifdef __CUDA_ARCH__  // the same in one instruction each
  WD_HOST_DEVICE static float load(const Memory* at, const Part* = nullptr) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(*at));
    return value;
  }
  WD_HOST_DEVICE static void store(Memory* at, float value, uint32_t = 0, Part* = nullptr) {
    Memory nearest;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(nearest) : "f"(value));
    *at = value != value ? Memory(0x7e00u) : nearest;
  }
#else
  WD_HOST_DEVICE static float load(const Memory* at, const Part* = nullptr) {
    const uint32_t magnitude = *at & 0x7fffu;
    const uint32_t sign = uint32_t(*at & 0x8000u) << 16;
    // Shifted into place the exponent is 112 too small; the product mends it, for subnormals too.
    const float finite = bits_to<float>(magnitude << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    return bits_to<float>(sign | special | bits_to<uint32_t>(finite));
  }
  WD_HOST_DEVICE static void store(Memory* at, float value, uint32_t = 0, Part* = nullptr) {
    const uint32_t bits = bits_to<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: a sum with 0.5 has the last place of a half's subnormal, so the addition rounds as wanted.
    const uint32_t subnormal = bits_to<uint32_t>(bits_to<float>(magnitude) + 0.5f) - bits_to<uint32_t>(0.5f);
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
    *at = uint16_t(magnitude > 0x7f800000u ? 0x7e00u : (sign | half));
  }
#endif
};

// A bfloat16 parameter with a remainder, which are the upper bits of one float32. The parameter is the nearest
// bfloat16, of two the one further from 0: so a remainder has a sign, and as many bits as it has.
template <class Remainder, bool stochastic>
struct Split {
  static constexpr bool kStochastic = stochastic, kParted = true, kRead = true, kTiled = false;
  static constexpr int64_t kCode = sizeof(Remainder) == 2 ? kSplit32 : stochastic ? kSplit24Stochastic : kSplit24;
  static constexpr int kLost = sizeof(Remainder) == 2 ? 0 : 8;  // bits of a float32 that are not stored
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7f80u;
  using Arithmetic = float;
  using Memory = uint16_t;
  using Part = Remainder;
  WD_HOST_DEVICE static float load(const Memory* at, const Part* part) {
    return bits_to<float>((uint32_t(*at) << 16) + (uint32_t(int32_t(*part)) << kLost));
  }
  WD_HOST_DEVICE static void store(Memory* at, float value, uint32_t draw, Part* part) {
    uint32_t bits = value != value ? 0x7fc00000u : bits_to<uint32_t>(value);
    if (kLost != 0) bits += stochastic ? draw >> 8 : 0x7fu + ((bits >> 8) & 1u);
    const uint32_t high = (bits + 0x8000u) >> 16;
    *at = uint16_t(high);
    *part = Part(uint32_t(bits - (high << 16)) >> kLost);
  }
};

using Split32 = Split<int16_t, false>;
using Split24 = Split<int8_t, false>;
using Split24Stochastic = Split<int8_t, true>;

// A 16-bit parameter that is written as the copy of its float32 master, and never read.
template <class Nearest, int64_t code>
struct Copy {
  static constexpr bool kStochastic = false, kParted = true, kRead = false, kTiled = false;
  static constexpr int64_t kCode = code;
  using Bits = uint16_t;
  static constexpr Bits kInfinity = Nearest::kInfinity;
  using Arithmetic = float;
  using Memory = typename Nearest::Memory;
  using Part = float;
  WD_HOST_DEVICE static float load(const Memory*, const Part* part) { return *part; }
  WD_HOST_DEVICE static void store(Memory* at, float value, uint32_t, Part* part) {
    Nearest::store(at, value);
    *part = value;
  }
};

using BFloat16Copy = Copy<BFloat16, kBFloat16Copy>;
using Float16Copy = Copy<Float16, kFloat16Copy>;

WD_HOST_DEVICE constexpr int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
WD_HOST_DEVICE constexpr int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// States in 8 bits. c, a power of 2, lies so far below the largest of a tile as there are binades, and y is |x| + c:
// below c the bits of y are linear in x, above they are logarithmic. A code is the bits of y above those of c, but for
// the last kLost: with the sign of x, or, of what is never negative, so that what is not 0 never becomes 0.
template <bool stochastic>
struct Eight {
  static constexpr bool kStochastic = stochastic, kParted = true, kRead = true, kTiled = true;
  static constexpr int kLost = 20;
  using Arithmetic = float;
  using Memory = uint8_t;
  using Part = uint8_t;

  static constexpr int64_t code(bool is_signed) {
    return is_signed ? (stochastic ? kInt8Stochastic : kInt8) : (stochastic ? kUint8Stochastic : kUint8);
  }
  // The bits of |x|; a tile's scale, the exponent of c, is made of the largest.
  WD_HOST_DEVICE static int32_t size(float x) { return int32_t(bits_to<uint32_t>(x) & 0x7fffffffu); }
  WD_HOST_DEVICE static int32_t scale(int32_t largest, bool is_signed) {
    const int32_t below = (largest >> 23) - (is_signed ? 14 : 30);
    return larger(below, 1);
  }
  WD_HOST_DEVICE static int32_t widened(Memory code, bool is_signed) { return is_signed ? int8_t(code) : code; }
  WD_HOST_DEVICE static float load(int32_t code, int32_t scale, bool is_signed) {
    const int32_t c = scale << 23;
    const uint32_t magnitude = uint32_t(is_signed && code < 0 ? -code : code) << kLost;
    const float x = bits_to<float>(magnitude + uint32_t(c)) - bits_to<float>(c);
    return is_signed ? bits_to<float>(bits_to<int32_t>(x) | (code & INT32_MIN)) : x;
  }
  WD_HOST_DEVICE static int32_t store(float x, uint32_t draw, int32_t scale, bool is_signed) {
    const int32_t c = scale << 23, a = size(x);
    const float y = bits_to<float>(a) + bits_to<float>(c);
    const int32_t bits = smaller(bits_to<int32_t>(y), 0x7fc00000) - c;  // a NaN is the canonical one
    const int32_t up = stochastic ? int32_t(draw) << (kLost - 16) : (1 << (kLost - 1)) - 1 + (bits >> kLost & 1);
    const int32_t code = (bits + up) >> kLost;
    if (is_signed) return x < 0 ? -code : code;
    return larger(code, smaller(a, 1));
  }
};

// Is what a parameter's memory holds another number than before? Zeros have signs, and any NaN is any NaN.
template <class Format>
WD_HOST_DEVICE inline bool is_changed(const typename Format::Memory& before, const typename Format::Memory& after) {
  using Bits = typename Format::Bits;
  const auto a = bits_to<Bits>(before), b = bits_to<Bits>(after);
  constexpr Bits magnitude = Bits(~Bits(0)) >> 1;
  const Bits x = a & magnitude, y = b & magnitude;
  return (a != b) & ((x < y ? x : y) <= Format::kInfinity);
}

using EightBits = Eight<false>;
using EightBitsStochastic = Eight<true>;

// The code of the format of a state: of 8 bits there are two.
template <class Format>
constexpr int64_t code_of(bool is_signed) {
  if constexpr (Format::kTiled)
    return Format::code(is_signed);
  else
    return Format::kCode;
}
