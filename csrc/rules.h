// The update rules on one element: NUMERICS sections 3 and 4, line for line. A rule maps (theta, g, states) to
// (theta, states) in registers and knows nothing of memory, learning rates or decay modes: those are scalars of its
// row. T is the arithmetic type. Compile without contraction (-ffp-contract=off, -fmad=false).
//
// Include inside the namespace of one instruction set (see cpu/mover.inc); it needs no other header.

#ifndef WD_HOST_DEVICE
#define WD_HOST_DEVICE
#endif

// Positions of a row's float64 scalars, as rules.py writes them. Every row begins with its step count and `frozen`.
enum RowPosition : int { kStep = 0, kFrozen = 1, kGradSign = 2, kL2 = 3, kFirstOfRule = 4 };

WD_HOST_DEVICE inline float root(float x) { return __builtin_sqrtf(x); }
WD_HOST_DEVICE inline double root(double x) { return __builtin_sqrt(x); }

// Starts from the nearer end, as torch.lerp does.
template <class T>
WD_HOST_DEVICE inline T lerp(T x, T y, T beta, T w) {
  return w < T(0.5) ? x + w * (y - x) : y + beta * (x - y);
}

template <class T, bool amsgrad>
struct AdamW {
  using Arithmetic = T;
  static constexpr int kStates = amsgrad ? 3 : 2;

  T grad_scale, l2, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, decay, metric;

  WD_HOST_DEVICE AdamW(const double* row, double grad_factor)
      : grad_scale(T(row[kGradSign]) * T(grad_factor)),
        l2(T(row[kL2])),
        beta1(T(row[4])),
        one_minus_beta1(T(row[5])),
        beta2(T(row[6])),
        one_minus_beta2(T(row[7])),
        step_size(T(row[8])),
        inv_sqrt_bias2(T(row[9])),
        eps(T(row[10])),
        decay(T(row[11])),
        metric(T(row[12])) {}

  WD_HOST_DEVICE void operator()(T& theta, T g, T* state) const {
    T &m = state[0], &v = state[1];
    g = g * grad_scale;
    g = g + l2 * theta;
    m = lerp(m, g, beta1, one_minus_beta1);
    v = lerp(v, g * g, beta2, one_minus_beta2);
    T second = v;
    if constexpr (amsgrad) {
      T& v_max = state[2];
      v_max = (v > v_max || v != v) ? v : v_max;
      second = v_max;
    }
    const T d = root(second) * inv_sqrt_bias2 + eps;
    const T u = (step_size * m + metric * theta) / (d + metric);
    theta = theta - (decay * theta + u);
  }
};

template <class T, bool momentum_buffer>
struct SGDW {
  using Arithmetic = T;
  static constexpr int kStates = momentum_buffer ? 1 : 0;

  T grad_scale, l2, momentum, grad_coef, update_grad, update_buf, step_size, decay;

  WD_HOST_DEVICE SGDW(const double* row, double grad_factor)
      : grad_scale(T(row[kGradSign]) * T(grad_factor)),
        l2(T(row[kL2])),
        momentum(T(row[4])),
        grad_coef(T(row[5])),
        update_grad(T(row[6])),
        update_buf(T(row[7])),
        step_size(T(row[8])),
        decay(T(row[9])) {}

  WD_HOST_DEVICE void operator()(T& theta, T g, T* state) const {
    g = g * grad_scale;
    g = g + l2 * theta;
    T u;
    if constexpr (momentum_buffer) {
      T& b = state[0];
      b = momentum * b + grad_coef * g;
      u = step_size * (update_grad * g + update_buf * b);
    } else {
      u = step_size * g;
    }
    theta = theta - (decay * theta + u);
  }
};
