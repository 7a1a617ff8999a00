// Which kernels there are: every rule, with and without its optional state, for every pair of parameter's and
// gradient's formats that users reach. States are float32; float64 beside float64.
//
// Include inside the namespace of one instruction set (see cpu/mover.inc), after rules.h and storage.h; it needs
// table.h.

// `Of<Rule, P, G, S>::kernel` for a rule and its number of states, or null where there is none.
template <template <class, class, class, class> class Of, class P, class G, class S, class T = typename S::Memory>
auto of_rule(int64_t rule, int states) -> decltype(Of<SGDW<T, true>, P, G, S>::kernel()) {
  if (rule == kAdamW && states == 2) return Of<AdamW<T, false>, P, G, S>::kernel();
  if (rule == kAdamW && states == 3) return Of<AdamW<T, true>, P, G, S>::kernel();
  if (rule == kSGDW && states == 0) return Of<SGDW<T, false>, P, G, S>::kernel();
  if (rule == kSGDW && states == 1) return Of<SGDW<T, true>, P, G, S>::kernel();
  return nullptr;
}

// The same for a rule and the formats of its roles (parameter, gradient, states).
template <template <class, class, class, class> class Of>
auto kernel_of(int64_t rule, const int64_t* formats, int roles)
    -> decltype(of_rule<Of, Float32, Float32, Float32>(0, 0)) {
  const int states = roles - kState;
  const int64_t p = formats[kParam], g = formats[kGrad];
  for (int i = kState; i < roles; ++i)
    if (formats[i] != (p == kFloat64 ? kFloat64 : kFloat32)) return nullptr;
  if (p == kFloat64 && g == kFloat64) return of_rule<Of, Float64, Float64, Float64>(rule, states);
  if (p == kFloat32 && g == kFloat32) return of_rule<Of, Float32, Float32, Float32>(rule, states);
  if (p == kFloat32 && g == kBFloat16) return of_rule<Of, Float32, BFloat16, Float32>(rule, states);
  if (p == kFloat32 && g == kFloat16) return of_rule<Of, Float32, Float16, Float32>(rule, states);
  if (p == kBFloat16 && g == kBFloat16) return of_rule<Of, BFloat16, BFloat16, Float32>(rule, states);
  if (p == kBFloat16 && g == kFloat32) return of_rule<Of, BFloat16, Float32, Float32>(rule, states);
  if (p == kFloat16 && g == kFloat16) return of_rule<Of, Float16, Float16, Float32>(rule, states);
  if (p == kFloat16 && g == kFloat32) return of_rule<Of, Float16, Float32, Float32>(rule, states);
  return nullptr;
}
