// The update rules on one element: docs/numerics.md, sections 3, 3a and 4, line for line. A rule maps (theta, g,
// states) to (update, states) in registers and knows nothing of memory, learning rates or decay modes: those are
// scalars of its row; `is_signed` says which states may be negative. T is the arithmetic type. Compile without
// contraction (-ffp-contract=off, -fmad=false).
//
// Include inside the namespace of one instruction set (see cpu/mover.inc), after formats.h; it needs layout.h.

WD_HOST_DEVICE inline float magnitude(float x) { return __builtin_fabsf(x); }
WD_HOST_DEVICE inline double magnitude(double x) { return __builtin_fabs(x); }
WD_HOST_DEVICE inline float root(float x) { return __builtin_sqrtf(x); }
WD_HOST_DEVICE inline double root(double x) { return __builtin_sqrt(x); }

// Starts from the nearer end, as torch.lerp does.
template <class V, class T>
WD_HOST_DEVICE inline V lerp(V x, V y, T beta, T w) {
  const bool near = w < T(0.5);
  return (near ? x : y) + (near ? w : -beta) * (y - x);
}

// x to the power t, by squaring: docs/numerics.md, section 2.
WD_HOST_DEVICE inline double power(double x, int64_t t) {
  double r = 1;
  for (; t != 0; t /= 2) {
    if (t % 2 != 0) r = r * x;
    x = x * x;
  }
  return r;
}

// What a group part is made of: a = eta * lr but where eta follows lr, the decay mode by its number, and what the
// rule has of its own, in the order of its page.
struct Group {
  double lr, eta, a, weight_decay;
  int mode;
  const double* own;

  WD_HOST_DEVICE double frozen() const { return lr == 0 || eta == 0 ? 1 : 0; }
};

// Where lambda enters, by mode: the table of docs/numerics.md, section 2.
struct DecayScalars {
  double l2 = 0, decay = 0, scale = 1, metric = 0;

  WD_HOST_DEVICE DecayScalars(int mode, double lambda, double eta, double a) {
    if (mode == 0) l2 = lambda;
    if (mode == 1) decay = a * lambda;
    if (mode == 2) decay = eta * lambda;
    if (mode == 3) {
      decay = (eta * lambda) / (1 + eta * lambda);
      scale = 1 / (1 + eta * lambda);
    }
    if (mode == 4) metric = a * lambda;
    if (mode == 5) decay = a * eta * lambda;
  }
};

// The scalars of a rule, by the names that its page in wd_kernels/rules has for them, in its order: the members of a
// rule are these and nothing else, so its size is that of a row.
#define WD_SCALARS(...) \
  T __VA_ARGS__;        \
  static const char* scalar_names() { return #__VA_ARGS__; }

// Of a rule by itself: its decay pulls to 0 (`Pulled` is one that pulls elsewhere).
struct Plain {
  static constexpr bool kPulls = false;
  static constexpr int kRefers = 0;
};

template <class T, bool amsgrad>
struct AdamW : Plain {
  using Arithmetic = T;
  static constexpr int kStates = amsgrad ? 3 : 2;
  WD_HOST_DEVICE static constexpr bool is_signed(int state) { return state == 0; }
  WD_SCALARS(frozen, grad_scale, grad_limit, l2, decay, metric, beta1, one_minus_beta1, beta2, one_minus_beta2, eps,
             scaled_lr, t, step_size, inv_sqrt_bias2, seed, decay_center, decay_threshold)

  WD_HOST_DEVICE T operator()(T theta, T g, T* state) const {
    T &m = state[0], &v = state[1];
    m = lerp(m, g, beta1, one_minus_beta1);
    v = lerp(v, g * g, beta2, one_minus_beta2);
    T second = v;
    if constexpr (amsgrad) {
      T& v_max = state[2];
      v_max = (v > v_max || v != v) ? v : v_max;
      second = v_max;
    }
    const T d = root(second) * inv_sqrt_bias2 + eps;
    return (step_size * m + metric * theta) / (d + metric);
  }

  // What of a row in float64 depends on the group: `group_part` of its page. `kOwn`: how many settings it has itself.
  static constexpr int kOwn = 5;
  WD_HOST_DEVICE void group(const Group& of) {
    const DecayScalars found(of.mode, of.weight_decay, of.eta, of.a);
    frozen = of.frozen();
    l2 = found.l2, decay = found.decay, metric = found.metric;
    beta1 = of.own[0], beta2 = of.own[1], eps = of.own[2], grad_scale = of.own[3], grad_limit = of.own[4];
    one_minus_beta1 = 1 - beta1, one_minus_beta2 = 1 - beta2;
    scaled_lr = found.scale * of.a;
  }

  // What of it depends on t, and on whether a buffer is fresh: `count_part`.
  WD_HOST_DEVICE void count(int64_t steps, bool) {
    t = T(steps);
    step_size = scaled_lr / (1 - power(beta1, steps));
    inv_sqrt_bias2 = 1 / root(1 - power(beta2, steps));
  }
};

template <class T, bool momentum_buffer>
struct SGDW : Plain {
  using Arithmetic = T;
  static constexpr int kStates = momentum_buffer ? 1 : 0;
  WD_HOST_DEVICE static constexpr bool is_signed(int) { return true; }
  WD_SCALARS(frozen, grad_scale, grad_limit, l2, decay, momentum, update_grad, update_buf, step_size, first_grad_coef,
             later_grad_coef, t, grad_coef, seed, decay_center, decay_threshold)

  WD_HOST_DEVICE T operator()(T, T g, T* state) const {
    if constexpr (momentum_buffer) {
      T& b = state[0];
      b = momentum * b + grad_coef * g;
      return step_size * (update_grad * g + update_buf * b);
    } else {
      return step_size * g;
    }
  }

  static constexpr int kOwn = 6;
  WD_HOST_DEVICE void group(const Group& of) {
    const bool paper = of.own[0] != 0, nesterov = of.own[2] != 0;
    // The metric is the identity: "metric_proximal" is "proximal", with a in place of eta.
    const DecayScalars found(of.mode == 4 ? 3 : of.mode, of.weight_decay, of.mode == 4 ? of.a : of.eta, of.a);
    frozen = of.frozen();
    l2 = found.l2, decay = found.decay;
    grad_scale = of.own[3], grad_limit = of.own[4], momentum = of.own[5];
    update_grad = nesterov ? 1 : 0, update_buf = nesterov ? momentum : 1;
    const bool inside = paper && momentum != 0;  // the lr sits inside the buffer
    first_grad_coef = inside ? of.a : 1, later_grad_coef = inside ? of.a : 1 - of.own[1];
    step_size = inside ? found.scale : found.scale * of.a;
  }

  WD_HOST_DEVICE void count(int64_t steps, bool fresh) {
    t = T(steps);
    grad_coef = fresh ? first_grad_coef : later_grad_coef;
  }
};

template <class T>
struct AdagradW : Plain {
  using Arithmetic = T;
  static constexpr int kStates = 1;
  WD_HOST_DEVICE static constexpr bool is_signed(int) { return false; }
  WD_SCALARS(frozen, grad_scale, grad_limit, l2, eps, lr_decay, scaled_lr, fixed_decay, scaled_decay, scaled_metric, t,
             step_size, decay, metric, seed, decay_center, decay_threshold)

  WD_HOST_DEVICE T operator()(T theta, T g, T* state) const {
    T& sum = state[0];
    sum = sum + g * g;
    const T d = root(sum) + eps;
    return (step_size * g + metric * theta) / (d + metric);
  }

  static constexpr int kOwn = 4;
  WD_HOST_DEVICE void group(const Group& of) {
    const DecayScalars found(of.mode, of.weight_decay, of.eta, of.a);
    frozen = of.frozen();
    l2 = found.l2;
    lr_decay = of.own[0], eps = of.own[1], grad_scale = of.own[2], grad_limit = of.own[3];
    scaled_lr = found.scale * of.a;
    fixed_decay = DecayScalars(of.mode, of.weight_decay, of.eta, 0).decay;  // what lr_decay does not slow
    scaled_decay = found.decay - fixed_decay, scaled_metric = found.metric;
  }

  WD_HOST_DEVICE void count(int64_t steps, bool) {
    t = T(steps);
    const T slowed = 1 + T(steps - 1) * lr_decay;
    step_size = scaled_lr / slowed;
    decay = fixed_decay + scaled_decay / slowed;
    metric = scaled_metric / slowed;
  }
};

// A rule whose decay pulls to its center, or, if it `refers`, to a reference beside each element.
template <class Rule, bool refers>
struct Pulled : Rule {
  static constexpr bool kPulls = true;
  static constexpr int kRefers = refers;
};

// How many scalars an aggregate of them has: 0 if it is empty, though its size is 1.
template <class Scalars>
WD_HOST_DEVICE constexpr int width_of() {
  return int(sizeof(Scalars) / sizeof(typename Scalars::Arithmetic));
}

// An aggregate of scalars by the row where they lie, each rounded to the arithmetic type.
template <class Scalars>
WD_HOST_DEVICE inline Scalars of_row(const double* row) {
  using T = typename Scalars::Arithmetic;
  Scalars found = {};
  if constexpr (width_of<Scalars>() > 0) {
    T scalars[width_of<Scalars>()];
    WD_UNROLL
    for (int i = 0; i < width_of<Scalars>(); ++i) scalars[i] = T(row[i]);
    __builtin_memcpy(&found, scalars, sizeof(Scalars));
  }
  return found;
}

// What a rule is by its row; the gradient's scale takes its factor in.
template <class Rule>
WD_HOST_DEVICE inline Rule rule_of_row(const double* row, double grad_factor) {
  Rule rule = of_row<Rule>(row);
  rule.grad_scale = rule.grad_scale * typename Rule::Arithmetic(grad_factor);
  return rule;
}

// A row's random bits: its seed and step count, whole numbers that the arithmetic type might not hold.
template <class Rule>
WD_HOST_DEVICE inline Draws draws_of_row(const double* row) {
  using T = typename Rule::Arithmetic;
  return Draws::of(uint64_t(row[offsetof(Rule, seed) / sizeof(T)]), uint64_t(row[offsetof(Rule, t) / sizeof(T)]));
}

// What is beyond a limit becomes it; NaN stays, as x86's min and max give their second operand then.
template <class T>
WD_HOST_DEVICE inline T at_most(T limit, T g) {
  return limit < g ? limit : g;
}

template <class T>
WD_HOST_DEVICE inline T at_least(T limit, T g) {
  return limit > g ? limit : g;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // the same in one instruction each
__device__ inline float at_most(float limit, float g) {
  float found;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(g), "f"(limit));
  return found;
}

__device__ inline float at_least(float limit, float g) {
  float found;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(g), "f"(limit));
  return found;
}
#endif

// A gradient with its factor, clipped by value.
template <class Rule, class T>
WD_HOST_DEVICE inline T with_factor(const Rule& rule, T g) {
  g = g * rule.grad_scale;
  g = at_most(rule.grad_limit, g);
  return at_least(-rule.grad_limit, g);
}

// The step that all rules share: theta, g (which takes its factor) and states become what they are after it; returns
// the update. `to`: of a rule that refers, its reference.
template <class Rule, class T>
WD_HOST_DEVICE inline T step(const Rule& rule, T& theta, T& g, T* state, [[maybe_unused]] T to = 0) {
  g = with_factor(rule, g);
  if constexpr (Rule::kPulls) {
    const T pulled = theta - (Rule::kRefers ? to : rule.decay_center);
    const T u = rule(pulled, g + rule.l2 * pulled, state);
    const T decayed = u * pulled < rule.decay_threshold ? T(0) : rule.decay * pulled;  // NaN decays
    theta = theta - (decayed + u);
    return u;
  } else {
    const T u = rule(theta, g + rule.l2 * theta, state);
    theta = theta - (rule.decay * theta + u);
    return u;
  }
}
