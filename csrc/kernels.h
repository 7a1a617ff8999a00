// Which kernels there are.
//
// Include inside the namespace of one instruction set (see cpu/mover.inc), after epilogues.h; it needs layout.h.

// Every rule with every set of its states: its number (the order of RULES in wd_kernels/rules), the bits of the states
// that were asked for, its type.
#define WD_EACH_RULE(ROW)    \
  ROW(0, 0, AdamW<T, false>) \
  ROW(0, 1, AdamW<T, true>)  \
  ROW(1, 0, SGDW<T, false>)  \
  ROW(1, 1, SGDW<T, true>)   \
  ROW(2, 0, AdagradW<T>)

// The formats (parameter, gradient, states) that CUDA C++ has kernels for. The CPU takes any, tile by tile.
#define WD_EACH_FORMATS(ROW)                             \
  ROW(Float64, Float64, Float64)                         \
  ROW(Float32, Float32, Float32)                         \
  ROW(Float32, BFloat16, Float32)                        \
  ROW(Float32, Float16, Float32)                         \
  ROW(BFloat16, BFloat16, Float32)                       \
  ROW(BFloat16, Float32, Float32)                        \
  ROW(Float16, Float16, Float32)                         \
  ROW(Float16, Float32, Float32)                         \
  ROW(Float32, Float32, BFloat16Stochastic)              \
  ROW(Float32, BFloat16, BFloat16Stochastic)             \
  ROW(BFloat16, BFloat16, BFloat16)                      \
  ROW(BFloat16, BFloat16, BFloat16Stochastic)            \
  ROW(BFloat16Stochastic, BFloat16, Float32)             \
  ROW(BFloat16Stochastic, BFloat16, BFloat16Stochastic)  \
  ROW(Split32, BFloat16, Float32)                        \
  ROW(Split32, BFloat16, BFloat16Stochastic)             \
  ROW(Split24, BFloat16, Float32)                        \
  ROW(Split24Stochastic, BFloat16, Float32)              \
  ROW(Split24Stochastic, BFloat16, BFloat16Stochastic)   \
  ROW(BFloat16Copy, BFloat16, Float32)                   \
  ROW(BFloat16Copy, Float32, Float32)                    \
  ROW(BFloat16Copy, BFloat16, BFloat16Stochastic)        \
  ROW(Float16Copy, Float16, Float32)                     \
  ROW(Float32, Float32, EightBitsStochastic)             \
  ROW(BFloat16, BFloat16, EightBitsStochastic)           \
  ROW(BFloat16Stochastic, BFloat16, EightBitsStochastic) \
  ROW(Split24, BFloat16, EightBitsStochastic)            \
  ROW(BFloat16Copy, BFloat16, EightBitsStochastic)

// The formats that have a loop of their own on the CPU, in float32 arithmetic: the common ones that are converted.
#define WD_EACH_FUSED(ROW)                              \
  ROW(Float32, Float32, BFloat16Stochastic)             \
  ROW(BFloat16, BFloat16, Float32)                      \
  ROW(BFloat16Stochastic, BFloat16, Float32)            \
  ROW(BFloat16, BFloat16, BFloat16)                     \
  ROW(BFloat16, BFloat16, BFloat16Stochastic)           \
  ROW(BFloat16Stochastic, BFloat16, BFloat16Stochastic) \
  ROW(Float32, BFloat16, Float32)                       \
  ROW(Split32, BFloat16, Float32)                       \
  ROW(Split32, BFloat16, BFloat16Stochastic)            \
  ROW(BFloat16Copy, BFloat16, Float32)                  \
  ROW(Float32, Float32, EightBitsStochastic)            \
  ROW(Split24, BFloat16, EightBitsStochastic)           \
  ROW(BFloat16Stochastic, BFloat16, EightBitsStochastic)

// Of these, the ones that CUDA C++ has kernels for which run an epilogue.
#ifdef WD_TEST_EPILOGUE
#define WD_EACH_FORMATS_WITH_EPILOGUE WD_EACH_FORMATS
#else
#define WD_EACH_FORMATS_WITH_EPILOGUE(ROW) \
  ROW(Float64, Float64, Float64)           \
  ROW(Float32, Float32, Float32)           \
  ROW(BFloat16, BFloat16, Float32)         \
  ROW(BFloat16Copy, BFloat16, Float32)
#endif

// Every epilogue: its code (wd_kernels/epilogues.py), a bit of its own, and its type. A build for tests has theirs
// alone.
#ifdef WD_TEST_EPILOGUE
#define WD_EACH_EPILOGUE(ROW) ROW(1 << 3, TestEpilogue<T>)
#else
#define WD_EACH_EPILOGUE(ROW) \
  ROW(1 << 0, Average<T>)     \
  ROW(1 << 1, Statistics<T>)  \
  ROW(1 << 2, Changes<T>)
#endif

// Beside the bits of states, a variant has these of a rule whose decay pulls to a center, or to a reference beside each
// parameter (wd_kernels/layout.py, `native_kernel`).
constexpr int64_t kPulled = 1 << 4, kReferring = 2 << 4;

// Does CUDA C++ have kernels of these formats that pull?
template <class P, class G, class S>
constexpr bool pulls_in() {
  return P::kCode == G::kCode && code_of<S>(true) == kFloat32 && (P::kCode == kFloat32 || P::kCode == kBFloat16);
}

// `Of<Rule>::found()` for a rule with its states, or null where there is none.
template <class T, template <class> class Of>
auto find_rule(int64_t rule, int64_t variant) -> decltype(Of<SGDW<T, true>>::found()) {
#define WD_ROW(number, bits, ...)                                                                    \
  if (rule == number && variant == bits) return Of<__VA_ARGS__>::found();                            \
  if (rule == number && variant == (bits | kPulled)) return Of<Pulled<__VA_ARGS__, false>>::found(); \
  if (rule == number && variant == (bits | kReferring)) return Of<Pulled<__VA_ARGS__, true>>::found();
  WD_EACH_RULE(WD_ROW)
#undef WD_ROW
  return nullptr;
}
