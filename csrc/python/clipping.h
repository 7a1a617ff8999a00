// Clipping: the norm of the gradients, and what a step makes of it (docs/numerics.md, section 7).
#pragma once

#include "changes.h"
#include "launches.h"

namespace wd {

class Clipping {
 public:
  // `tuple`: None, or what wd_kernels/clipping.py has as `Asked`. Throws where it does not belong to the table.
  Clipping(PyObject* tuple, View& view);

  // Does Python code take part, of what such a tuple asks for?
  static bool calls(PyObject* tuple);

  // Is anything to be done before a step?
  bool asked() const { return asked_; }
  bool calls() const { return between_ != nullptr; }

  // Adds up the squares of all gradients, and lets Python add those of others. Writes nothing of the optimizer; false:
  // an error is set. `unlocked`: other threads may run meanwhile.
  bool measure(PyObject* rows, bool unlocked) const;

  // Writes the control, and what was found; scales the rows of a group by its clip. Nothing here fails.
  void decide(PyObject* rows) const;

 private:
  View& view_;
  bool asked_ = false;
  PyObject *between_ = nullptr, *plans_ = nullptr;
  int64_t *sums_ = nullptr, slots_ = 0, grad_scale_ = 0;
  const int64_t* group_of_ = nullptr;
  double* found_ = nullptr;
  double max_norm_ = 0, scale_ = 1;
  bool skip_nonfinite_ = false, found_inf_ = false, has_loss_ = false;
  double *rings_ = nullptr, sigma_ = 0, loss_ = 0;
  int64_t *seen_ = nullptr, window_ = 1;
  std::vector<double> own_limits_;  // of each group; NaN: it has none
};

}  // namespace wd
