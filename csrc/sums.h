// Sums that are exact, and so the same in any order: docs/numerics.md, section 7. A sum of doubles >= 0 is a row of
// kSumWords integers: digits of 32 bits, the lowest of which is worth 2^-1074, each in a word that takes 2^31 summands
// before it overflows; then how many summands were infinite, and how many were NaN. Rows are added word by word.
//
// Include inside the namespace of one instruction set (see cpu/mover.inc), after formats.h; it needs layout.h.

// Of a block's 1024 elements neighbours are added up first: 8 at once.
template <class T>
WD_HOST_DEVICE inline T sum_neighbours(const T* x) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Where a summand is added: three digits from one on, or one to a count.
struct Summand {
  int word, words;
  int64_t digits[3];
};

WD_HOST_DEVICE inline Summand summand_of(double x) {
  const auto bits = bits_to<uint64_t>(x);
  const int exponent = int(bits >> 52 & 0x7ff);
  if (exponent == 0x7ff) return {x != x ? kNaNs : kInfinities, 1, {1, 0, 0}};
  const uint64_t significand = (bits & 0xfffffffffffffu) | (exponent != 0 ? uint64_t(1) << 52 : 0);
  const int place = exponent != 0 ? exponent - 1 : 0, shift = place % 32;
  const uint64_t low = (significand & 0xffffffffu) << shift, high = (significand >> 32) << shift;
  const uint64_t middle = (low >> 32) + (high & 0xffffffffu);  // below 2^33: the next digit takes what it has too much
  return {place / 32,
          3,
          {int64_t(low & 0xffffffffu), int64_t(middle & 0xffffffffu), int64_t((high >> 32) + (middle >> 32))}};
}

// The sum, rounded once to nearest even.
WD_HOST_DEVICE inline double sum_of(const int64_t* words) {
  if (words[kNaNs] != 0) return __builtin_nan("");
  if (words[kInfinities] != 0) return __builtin_inf();
  // Of the highest digit that is not 0: itself, the two below it, whether anything is below these, and its place.
  uint64_t top = 0, next = 0, third = 0, rest = 0;
  int place = 0;
  uint64_t one_below = 0, two_below = 0, below = 0;
  int64_t carry = 0;
  for (int k = 0; k < kDigits; ++k) {
    const int64_t word = words[k] + carry;
    const uint64_t digit = uint64_t(word) & 0xffffffffu;
    carry = word >> 32;
    if (digit != 0) top = digit, next = one_below, third = two_below, rest = below, place = k;
    below |= two_below, two_below = one_below, one_below = digit;
  }
  // 53 bits and 44, the last of which stands for all that is below: their sum is rounded as the whole is.
  const auto upper = double(int64_t(top << 21 | next >> 11));
  const auto lower = double(int64_t((next & 0x7ff) << 33 | third << 1 | (rest != 0 ? 1 : 0)));
  const double value = upper * 0x1p44 + lower;
  // Times 2^(32 place - 1139), in two steps that are exact where the result is subnormal too.
  const int exponent = 32 * place - 1139, first = exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
  const auto power = [](int n) { return bits_to<double>(uint64_t(n + 1023) << 52); };
  return value * power(first) * power(exponent - first);
}

// What scales gradients of that norm down to the largest that is allowed, which may be infinite.
WD_HOST_DEVICE inline double clip_of(double norm, double max_norm) {
  if (max_norm == __builtin_inf()) return 1;
  const double clip = max_norm / (norm + 1e-6);
  return clip > 1 ? 1 : clip;
}
