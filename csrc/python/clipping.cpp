#include "clipping.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "memory.h"
#include "uninterrupted.h"

namespace wd {
namespace {

#include "../cpu/rounding.h"
#include "../formats.h"
#include "../sums.h"

// The sum of a block of doubles, as it is added up everywhere: 8 neighbours, then halves.
double sum_of_block(const double* x) {
  constexpr int neighbours = 8, groups = kBlock / neighbours;
  double sums[groups];
  for (int k = 0; k < groups; ++k) sums[k] = sum_neighbours(x + k * neighbours);
  for (int half = groups / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] = sums[k] + sums[k + half];
  return sums[0];
}

// Is `x` more than sigma deviations above the mean of the last `window`, of which `seen` were given? With less than
// half of them: no. A finite one is remembered.
bool is_spike(double* ring, int64_t* seen, int64_t window, double sigma, double x) {
  const int64_t n = std::min(*seen, window);
  double values[kBlock] = {}, off[kBlock] = {};
  std::copy(ring, ring + n, values);
  const double mean = sum_of_block(values) / double(n);
  for (int64_t i = 0; i < n; ++i) off[i] = (values[i] - mean) * (values[i] - mean);
  const double deviation = std::sqrt(sum_of_block(off) / double(n - 1));
  const bool found = n >= std::max<int64_t>(2, window / 2) && !(x - mean <= sigma * deviation);
  if (std::isfinite(x)) ring[(*seen)++ % window] = x;
  return found;
}

void require(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(what);
}

// One sum of several, digit by digit.
struct Total {
  int64_t words[kSumWords] = {};
  void add(const int64_t* sum) {
    for (int k = 0; k < kSumWords; ++k) words[k] += sum[k];
  }
};

}  // namespace

bool Clipping::calls(PyObject* tuple) {
  constexpr Py_ssize_t between = 5;  // of `Asked`
  return tuple != Py_None && PyTuple_Size(tuple) > between && PyTuple_GetItem(tuple, between) != Py_None;
}

Clipping::Clipping(PyObject* tuple, View& view) : view_(view), asked_(tuple != Py_None) {
  if (!asked_) return;
  PyObject *sums, *plans, *group_of, *found, *between, *own_limits, *values, *seen;
  long long grad_scale, window;
  int skip_nonfinite, has_loss;
  double found_inf;
  if (!PyArg_ParseTuple(tuple, "OO!OOLOdpddO(OO)dLpd", &sums, &PyList_Type, &plans, &group_of, &found, &grad_scale,
                        &between, &max_norm_, &skip_nonfinite, &scale_, &found_inf, &own_limits, &values, &seen,
                        &sigma_, &window, &has_loss, &loss_))
    throw std::runtime_error("a Python error is set");
  const Memory rings = memory_of(values, "values", "float64", kBlock), counts = memory_of(seen, "seen", "int64", 0);
  require(rings.rows == 2 && counts.rows == 2 && window > 0 && window <= kBlock, "spikes");
  rings_ = rings.as<double>();
  seen_ = counts.as<int64_t>();
  window_ = window;
  has_loss_ = has_loss != 0;
  skip_nonfinite_ = skip_nonfinite != 0;
  found_inf_ = found_inf != 0;
  grad_scale_ = grad_scale;
  const Memory results = memory_of(found, "found", "float64", 0);
  require(results.rows == 2 && grad_scale >= 0, "clipping");
  found_ = results.as<double>();
  if (sums == Py_None) return;
  const Memory rows = memory_of(sums, "sums", "int64", kSumWords), groups = memory_of(group_of, "groups", "int64", 0);
  require(rows.rows == groups.rows, "each sum is of one group");
  sums_ = rows.as<int64_t>();
  slots_ = rows.rows;
  group_of_ = groups.as<const int64_t>();
  between_ = between == Py_None ? nullptr : between;
  plans_ = plans;
  if (own_limits == Py_None) return;
  require(PyTuple_Check(own_limits), "limits of groups are a tuple");
  for (Py_ssize_t g = 0; g < PyTuple_Size(own_limits); ++g)
    own_limits_.push_back(PyFloat_AsDouble(PyTuple_GetItem(own_limits, g)));
  const auto known = int64_t(own_limits_.size());
  for (int64_t k = 0; k < slots_; ++k) require(group_of_[k] >= 0 && group_of_[k] < known, "a sum is of no group");
  for (const Key& key : view.keys) require(key.group < known, "a row is of no group");
}

bool Clipping::measure(PyObject* rows, bool unlocked) const {
  if (sums_ == nullptr) return true;
  const Launches launches(plans_, rows);
  launches.check_sums(sums_, slots_);
  std::memset(sums_, 0, size_t(slots_) * kSumWords * sizeof(int64_t));
  {
    const Unlocked meanwhile_others_run(unlocked);
    launches.sum_squares();
  }
  if (between_ == nullptr) return true;
  const Reference done(PyObject_CallNoArgs(between_));
  return done.get() != nullptr;
}

void Clipping::decide(PyObject* rows) const {
  const DefaultRounding rounding;
  bool finite = true;
  found_[0] = std::nan("");
  std::vector<double> clips(own_limits_.size(), 1.0);
  double clip = 1;
  if (sums_ != nullptr) {
    Total all, limited;  // the latter of groups without a limit of their own
    std::vector<Total> of_groups(own_limits_.size());
    for (int64_t k = 0; k < slots_; ++k) {
      const int64_t* const sum = sums_ + k * kSumWords;
      all.add(sum);
      if (own_limits_.empty()) continue;
      const size_t group = size_t(group_of_[k]);
      (std::isnan(own_limits_[group]) ? limited : of_groups[group]).add(sum);
    }
    found_[0] = std::sqrt(sum_of(all.words)) / scale_;
    finite = std::isfinite(found_[0]);
    clip = clip_of(own_limits_.empty() ? found_[0] : std::sqrt(sum_of(limited.words)) / scale_, max_norm_);
    for (size_t g = 0; g < own_limits_.size(); ++g)
      clips[g] =
          std::isnan(own_limits_[g]) ? clip : clip_of(std::sqrt(sum_of(of_groups[g].words)) / scale_, own_limits_[g]);
  }
  bool skip = found_inf_ || (skip_nonfinite_ && !finite);
  if (!std::isinf(sigma_)) {
    skip |= is_spike(rings_, seen_, window_, sigma_, found_[0]);
    if (has_loss_) skip |= is_spike(rings_ + kBlock, seen_ + 1, window_, sigma_, loss_);
  }
  found_[1] = skip;
  *view_.control = {1 / scale_, double(skip)};
  if (sums_ == nullptr || rows == Py_None) return;
  const Memory of_rows = memory_of(rows, "rows", "float64", -1);
  const int64_t n = grad_scale_ < of_rows.columns ? std::min(of_rows.rows, int64_t(view_.keys.size())) : 0;
  for (int64_t r = 0; r < n; ++r)
    of_rows.as<double>()[r * of_rows.columns + grad_scale_] *=
        own_limits_.empty() ? clip : clips[size_t(view_.keys[size_t(r)].group)];
}

}  // namespace wd
