// A plain stream with a step's mix of reads and writes: the ceiling that the benchmark holds optimizers against.
//
// Every role is an array of unsigned integers of its format's width. A gradient is read; a parameter and the states are
// read and written. `zero` is 0, which the compiler does not know: values stay as they are, and all of them are moved.

#include <cstdint>

namespace {

template <class P, class G, class S, int STATES>
void stream(P* __restrict__ p, const G* __restrict__ g, S* __restrict__ a, S* __restrict__ b, S* __restrict__ c,
            int64_t n, unsigned zero, int threads) {
  const P zero_p = static_cast<P>(zero);
  const S zero_s = static_cast<S>(zero);
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    p[i] = static_cast<P>(p[i] ^ (static_cast<P>(g[i]) & zero_p));
    if (STATES > 0) a[i] = static_cast<S>(a[i] ^ zero_s);
    if (STATES > 1) b[i] = static_cast<S>(b[i] ^ zero_s);
    if (STATES > 2) c[i] = static_cast<S>(c[i] ^ zero_s);
  }
}

// Runs the stream of these widths where they are what is asked for; returns whether it did.
template <class P, class G, class S>
bool run(int param, int grad, int state, int states, void* p, const void* g, void* const* s, int64_t n, unsigned zero,
         int threads) {
  constexpr decltype(&stream<P, G, S, 0>) by_states[] = {stream<P, G, S, 0>, stream<P, G, S, 1>, stream<P, G, S, 2>,
                                                         stream<P, G, S, 3>};
  if (param != sizeof(P) || grad != sizeof(G) || state != sizeof(S) || states < 0 || states > 3) return false;
  by_states[states](static_cast<P*>(p), static_cast<const G*>(g), static_cast<S*>(s[0]), static_cast<S*>(s[1]),
                    static_cast<S*>(s[2]), n, zero, threads);
  return true;
}

}  // namespace

// Widths in bytes of parameter, gradient and state; returns 0, or 1 where such a mix is not here.
extern "C" int wd_bench_stream(int param, int grad, int state, int states, void* p, const void* g, void* const* s,
                               int64_t n, unsigned zero, int threads) {
  const auto one = [&](auto* run) { return run(param, grad, state, states, p, g, s, n, zero, threads); };
  const bool done = one(run<uint16_t, uint16_t, uint16_t>) || one(run<uint16_t, uint16_t, uint32_t>) ||
                    one(run<uint32_t, uint16_t, uint32_t>) || one(run<uint32_t, uint32_t, uint32_t>) ||
                    one(run<uint64_t, uint64_t, uint64_t>);
  return done ? 0 : 1;
}
