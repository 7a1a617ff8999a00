// What the check of every step and Python share, by position.
#pragma once

#include "table.h"
#include "tensors.h"

namespace wd {

enum Kind : int64_t { kOrdinary = 0, kSpecial = 1, kUnseen = 2, kFlat = 3 };

// What table.py expects of one parameter.
struct Expected {
  int64_t kind, segment, numel, dims, ndim, param_dtype, grad_dtype, state_dtype, device, aligned, group, states;
  int64_t flat_grad;  // parameter and states lie in flat buffers, and the gradient might here; 0: they do not
  int64_t held;       // of a flat one: the first of its tensors in the Holding
  int64_t view;       // the object that its state must have as step count
};
static_assert(sizeof(Expected) == 15 * sizeof(int64_t), "table.py writes 15 words a parameter");

// Where a segment lies in flat buffers: `buffer` tells sets of buffers apart (0: in none), `offset` and `end` are
// elements, padding included, `grad` is where its gradient lies while it is attached. `numel` is said of every segment.
struct Lie {
  int64_t buffer, offset, end, grad, numel;
};
static_assert(sizeof(Lie) == 5 * sizeof(int64_t), "table.py writes 5 words a segment");

// assign.cpp
PyObject* assign(PyObject* module, PyObject* args);

// gather.cpp
PyObject* gather(PyObject* module, PyObject* args);

}  // namespace wd
