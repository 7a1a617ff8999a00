// Epilogues: what else a pass produces (docs/numerics.md, section 8). One sees every element after its parameter is
// stored, may read and write an element of outputs of its own, and gives numbers that are summed over blocks.
//
// Include inside the namespace of one instruction set, after rules.h and formats.h; it needs layout.h.

template <class T>
struct Element {
  T before, after;  // the parameter as it was, and as it is now stored
  T g, u;           // the gradient with its factor, and the update
  const T* state;   // so many as the rule made them
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

// An aggregate of its scalars (WD_SCALARS), which follow the rule's in a row; `Output` is the format that CUDA C++ has
// for its outputs (the CPU takes any). Called with an element, its outputs, and where its summands go. If it
// `kSeesStepped` it reads more of an element than `after`.
template <class T>
struct NoEpilogue {
  using Arithmetic = T;
  using Output = Float32;
  static constexpr int kOutputs = 0, kSums = 0;
  static constexpr bool kSeesStepped = false;
  WD_HOST_DEVICE void operator()(const Element<T>&, T*, T*) const {}
};

// The average of a parameter over its steps.
template <class T>
struct Average {
  using Arithmetic = T;
  using Output = typename Exact<T>::Format;
  static constexpr int kOutputs = 1, kSums = 0;
  static constexpr bool kSeesStepped = false;
  WD_SCALARS(ema_decay, one_minus_ema_decay)

  WD_HOST_DEVICE void operator()(const Element<T>& of, T* output, T*) const {
    const T mixed = lerp(output[0], of.after, ema_decay, one_minus_ema_decay);
    output[0] = ema_decay == 0 ? of.after : mixed;
  }
};

// One that tests bring.
#ifdef WD_TEST_EPILOGUE
#include WD_TEST_EPILOGUE
#endif
