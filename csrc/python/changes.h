// What the native check of every step and Python share, by position (wd_kernels/table/changes.py).
#pragma once

#include "../layout.h"
#include "tensors.h"

namespace wd {

// Ordinary parameters are only compared, special ones inspected every step; unseen ones had no gradient yet. Flat ones
// lie in flat buffers with gradient and states, and are compared through handles.
enum Kind : int64_t { kOrdinary = 0, kSpecial = 1, kUnseen = 2, kFlat = 3 };

// What is expected of one parameter.
struct Expected {
  int64_t kind, segment, numel, device, aligned, group;
  int64_t first_role, roles;  // in the array of `ExpectedRole`: parameter, gradient, states
  int64_t flat_grad;          // parameter and states lie in flat buffers, and the gradient might here; 0: they do not
  int64_t held;               // of a flat one: the first of its tensors in the Holding
  int64_t view;               // the object that its state must have as step count
};
constexpr int kExpectedWords = 11;
static_assert(sizeof(Expected) == kExpectedWords * sizeof(int64_t), "changes.py writes these words");

// What is expected of one of its tensors.
struct ExpectedRole {
  int64_t name;         // which of the names of a state dictionary has it
  int64_t dtype, ndim;  // as DLPack has it
  int64_t dims;         // where shape and strides begin in the array of dims
  int64_t address;      // 0: anywhere, as a gradient may lie
};
constexpr int kExpectedRoleWords = 5;
static_assert(sizeof(ExpectedRole) == kExpectedRoleWords * sizeof(int64_t), "changes.py writes these words");

// Where a segment lies in flat buffers: `buffer` tells sets of buffers apart (0: in none), `offset` and `end` are
// elements, padding included, `grad` is where its gradient lies while it is attached. `numel` is said of every segment.
struct FlatRange {
  int64_t buffer, offset, end, grad, numel;
};
constexpr int kFlatRangeWords = 5;
static_assert(sizeof(FlatRange) == kFlatRangeWords * sizeof(int64_t), "changes.py writes these words");

// Notes about one parameter and about each of its tensors, in memory of the table. `near` is an address inside torch's
// tensor object (DLPack lends the shape from there), `storage` that of its storage object, which Python writes. Both
// are prefetched and never read, so an old one is none the worse: between two steps the model's own work has pushed
// these objects out of the caches, and fetching them one by one costs more than the rest of the check.
struct Seen {
  PyObject* grad;
  void* grad_address;
  PyObject* own;  // the parameter's state dictionary, borrowed within one check
};
struct SeenRole {
  const void *object, *near, *storage;
};
constexpr int kSeenWords = 3, kSeenRoleWords = 3;

// All that the check reads and writes of a table, as changes.py lists it: counts, and where arrays lie.
struct View {
  int64_t parameters, ordered, buckets, place_words;
  PyObject* const* params;
  const int64_t* order;  // which parameter each entry of the state belongs to, -1: to none
  const Expected* expected;
  const ExpectedRole* roles;
  const int64_t* dims;
  Seen* seen;
  SeenRole* seen_roles;
  const float* steps;
  float* active;
  const uint8_t* fresh;
  const int64_t* firsts;  // of the buckets' segments, and their end
  Moving* moving;
  const int64_t* places;
  const FlatRange* ranges;  // null: no segment lies in a flat buffer, and the segments are what launches step; else
  Moving* run_moving;       // these are
  int64_t* run_places;
  int64_t* run_capacities;
  int64_t* run_firsts;
};
constexpr int kViewWords = 22;
static_assert(sizeof(View) == kViewWords * sizeof(int64_t), "changes.py writes these words");

// The objects of torch's behind one tensor, wherever they begin in a line of the cache. Inlined by force: to the
// compiler a function that only prefetches has no effect, and it drops the calls.
__attribute__((always_inline)) inline void fetch(const void* near, const void* storage) {
  constexpr int of_tensor[] = {-64, 0, 64, 104}, of_storage[] = {0, 48};
  for (const int at : of_tensor) __builtin_prefetch(static_cast<const char*>(near) + at);
  for (const int at : of_storage) __builtin_prefetch(static_cast<const char*>(storage) + at);
}

// rows.cpp: names the row of every segment (one per distinct group, step count and freshness) and, where some lie in
// flat buffers, writes the runs. A new list of (group, step, fresh), or null and an error is set.
PyObject* assign_rows(const View& view);
// The same for Python: assign_rows(view).
PyObject* assign_rows_of(PyObject* module, PyObject* view);
// cut(numels, n, first, size, words) -> int: the number of chunks of so many segments; written to `words` but for 0.
PyObject* cut(PyObject* module, PyObject* args);

// lists.cpp
PyObject* gather(PyObject* module, PyObject* args);

}  // namespace wd
