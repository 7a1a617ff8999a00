// Vectors of the instruction set, for what loops of single elements do not say: sums of neighbours.
//
// Include inside the namespace of one instruction set (see mover.inc), after rules.h.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float Numbers __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorTypes<double> {
  typedef double Numbers __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorTypes<T>::Numbers;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
inline Vector<T> loaded(const T* from) {
  Vector<T> found;
  __builtin_memcpy(&found, from, sizeof(found));
  return found;
}

// Whole numbers of the same size, each as long.
template <class V>
using BitsOf = decltype(V{} < V{});

template <class V>
inline V magnitude(V x) {
  constexpr int sign = 8 * int(sizeof(x[0])) - 1;
  return (V)((BitsOf<V>)x & ~((BitsOf<V>{} + 1) << sign));
}

// The larger of numbers >= 0, by their bits: NaN is the largest.
template <class V>
inline V larger_numbers(V x, V y) {
  return (BitsOf<V>)x > (BitsOf<V>)y ? x : y;
}

template <class T>
inline T largest_of(const Vector<T>& x) {
  Vector<T> found = x;
  for (int i = 1; i < kLanes<T>; ++i) found = larger_numbers(found, Vector<T>{} + x[i]);
  return found[0];
}

// The places 0, 1, ... of its numbers.
template <class V>
inline BitsOf<V> places_of() {
  BitsOf<V> found;
  for (int i = 0; i < int(sizeof(V) / sizeof(found[0])); ++i) found[i] = i;
  return found;
}

// Of each two neighbours, first those of x.
template <class V>
inline V sums_of_pairs(V x, V y) {
  const BitsOf<V> even = places_of<V>() * 2;
  return __builtin_shuffle(x, y, even) + __builtin_shuffle(x, y, even + 1);
}

// So many of them, and zeros.
template <class V>
inline V first_of(V x, int count) {
  return places_of<V>() < (BitsOf<V>{} + count) ? x : V{};
}
