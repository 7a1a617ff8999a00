// Epilogues: what else a pass produces (docs/numerics.md, section 8). One sees every element after its parameter is
// stored, may read and write an element of outputs of its own, and gives numbers that are summed over blocks.
//
// Include inside the namespace of one instruction set, after rules.h and formats.h; it needs layout.h.

template <class V>
struct Element {
  V before, after;  // the parameter as it was, and as it is now stored
  V g, u;           // the gradient with its factor, and the update
  const V* state;   // so many as the rule made them
  int states;
};

// The format that memory has which holds T itself.
template <class T>
struct Exact {
  using Format = Float32;
};
template <>
struct Exact<double> {
  using Format = Float64;
};

// What one reads of an element: `after`; `before` and `g` too; all.
enum Sees : int { kSeesAfter = 0, kSeesMoved = 1, kSeesStepped = 2 };

// 0 where x is, else 1.
template <class V>
WD_HOST_DEVICE inline V nonzero(V x) {
  return x == V{} ? V{} : V{} + 1;
}

// An aggregate of its scalars (WD_SCALARS), which follow the rule's in a row; `Output` is the format that CUDA C++ has
// for its outputs (the CPU takes any). Called with an element, or on the CPU a vector of them, its outputs, and where
// the numbers go that a block has of it: `kSums` that are added up, then `kMaxima`, >= 0 or NaN, of which the largest
// is kept. If it `kMarks`, there is a bit for each element, which is set where the parameter has changed in memory.
template <class T>
struct NoEpilogue {
  using Arithmetic = T;
  using Output = Float32;
  static constexpr int kOutputs = 0, kSums = 0, kMaxima = 0;
  static constexpr Sees kSees = kSeesAfter;
  static constexpr bool kMarks = false;
  template <class V>
  WD_HOST_DEVICE void operator()(const Element<V>&, V*, V*) const {}
};

template <class E>
WD_HOST_DEVICE constexpr int numbers_of() {
  return E::kSums + E::kMaxima;
}

// The average of a parameter over its steps.
template <class T>
struct Average : NoEpilogue<T> {
  using Output = typename Exact<T>::Format;
  static constexpr int kOutputs = 1;
  WD_SCALARS(ema_decay, one_minus_ema_decay)

  template <class V>
  WD_HOST_DEVICE void operator()(const Element<V>& of, V* output, V*) const {
    const V mixed = lerp(output[0], of.after, ema_decay, one_minus_ema_decay);
    output[0] = ema_decay == 0 ? of.after : mixed;
  }
};

// What a step has made of a tensor: squares of gradient, parameter and change, how many gradients are not finite, and
// the largest change.
template <class T>
struct Statistics : NoEpilogue<T> {
  static constexpr int kSums = 4, kMaxima = 1;
  static constexpr Sees kSees = kSeesMoved;

  template <class V>
  WD_HOST_DEVICE void operator()(const Element<V>& of, V*, V* number) const {
    const V moved = of.after - of.before;
    number[0] = of.g * of.g;
    number[1] = of.after * of.after;
    number[2] = moved * moved;
    number[3] = nonzero(of.g - of.g);
    number[4] = magnitude(moved);
  }
};

// Which elements of a parameter a step has changed in memory.
template <class T>
struct Changes : NoEpilogue<T> {
  static constexpr bool kMarks = true;
};

// One that tests bring.
#ifdef WD_TEST_EPILOGUE
#include WD_TEST_EPILOGUE
#endif
