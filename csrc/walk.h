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

constexpr int kMaxStates = 3;
constexpr int kNoted = kState + kMaxStates;  // parameter, gradient, states

// Notes about one parameter, in memory of the table. `near` are addresses inside torch's tensor objects (DLPack lends
// the shape from there), `storages` those of its storage objects, which mending.py writes. Both are prefetched and
// never read, so an old one is none the worse: between two steps the model's own work has pushed these objects out of
// the caches, and fetching them one by one costs more than the rest of the walk.
struct Seen {
  PyObject* grad;
  void* grad_address;
  PyObject* own;  // the parameter's state dictionary, borrowed within one walk
  const void* near[kNoted];
  const void* states[kMaxStates];
  const void* storages[kNoted];
};
static_assert(sizeof(Seen) == 16 * sizeof(int64_t), "table.py gives 16 words a parameter");

// The objects of torch's behind one tensor, wherever they begin in a line of the cache. Inlined by force: to the
// compiler a function that only prefetches has no effect, and it drops the calls.
__attribute__((always_inline)) inline void fetch(const void* near, const void* storage) {
  constexpr int of_tensor[] = {-64, 0, 64, 104}, of_storage[] = {0, 48};
  for (const int at : of_tensor) __builtin_prefetch(static_cast<const char*>(near) + at);
  for (const int at : of_storage) __builtin_prefetch(static_cast<const char*>(storage) + at);
}

// assign.cpp
PyObject* assign(PyObject* module, PyObject* args);

// gather.cpp
PyObject* gather(PyObject* module, PyObject* args);

}  // namespace wd
