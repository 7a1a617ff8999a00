// An epilogue that only tests have (probe.py): it uses all that one may.

template <class T>
struct ProbeOutput {
  using Format = BFloat16;
};
template <>
struct ProbeOutput<double> {
  using Format = Float64;
};

template <class T>
struct TestEpilogue : NoEpilogue<T> {
  using Output = typename ProbeOutput<T>::Format;
  static constexpr int kOutputs = 2, kSums = 2, kMaxima = 1;
  static constexpr Sees kSees = kSeesStepped;
  static constexpr bool kMarks = true;
  WD_SCALARS(fade, weight)

  template <class V>
  WD_HOST_DEVICE void operator()(const Element<V>& of, V* output, V* summand) const {
    V &trace = output[0], &copy = output[1];
    const V moved = of.after - of.before;
    trace = fade * trace + weight * moved;
    if (of.states > 0) trace = trace + of.state[of.states - 1];
    copy = weight * of.after;
    summand[0] = moved * moved;
    summand[1] = of.g * of.u;
    summand[2] = magnitude(of.u);
  }
};
