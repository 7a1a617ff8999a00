// What a table was built from, written down for the check of every step (wd_kernels/table/changes.py).
#pragma once

#include <memory>
#include <vector>

#include "../layout.h"
#include "handles.h"

namespace wd {

// Ordinary parameters are compared; flat ones lie in flat buffers with gradient and states, and are compared through
// handles; special ones are inspected by Python in every step; unseen ones had no gradient yet.
enum Kind : int64_t { kOrdinary = 0, kSpecial = 1, kUnseen = 2, kFlat = 3 };

// What Python has found in this step of a parameter that it has inspected, and holds.
enum Inspected : int64_t { kNotYet = 0, kWithGradient = 1, kWithoutGradient = 2 };

// What is expected of one parameter. Here and below: words that Python writes, by position.
struct Expected {
  int64_t kind, segment, numel, device, aligned, group;
  int64_t first_role, roles;  // in the array of `ExpectedRole`: parameter, gradient, states
  int64_t flat_grad;          // parameter and states lie in flat buffers, and the gradient might here; 0: they do not
  int64_t held;               // of a flat one: the first of its tensors among the handles
  int64_t view;               // among the handles: the step count that its state must have
  int64_t inspected;
};
constexpr int kExpectedWords = 12;
static_assert(sizeof(Expected) == kExpectedWords * sizeof(int64_t), "changes.py writes these words");

// What is expected of one of its tensors.
struct ExpectedRole {
  int64_t name;         // which of the names of a state dictionary has it
  int64_t dtype, ndim;  // as DLPack has it
  int64_t dims;         // where shape and strides begin in the array of dims
  int64_t address;      // 0: anywhere, as a gradient may lie
  int64_t spec;         // of a DTensor, the object that says how it is sharded; else 0
};
constexpr int kExpectedRoleWords = 6;
static_assert(sizeof(ExpectedRole) == kExpectedRoleWords * sizeof(int64_t), "changes.py writes these words");

// Where a segment lies in flat buffers: `buffer` tells sets of buffers apart (0: in none), `offset` and `end` are
// elements, padding included, `grad` is where its gradient lies while it is attached. `numel` is said of every segment.
struct FlatRange {
  int64_t buffer, offset, end, grad, numel;
};
constexpr int kFlatRangeWords = 5;
static_assert(sizeof(FlatRange) == kFlatRangeWords * sizeof(int64_t), "changes.py writes these words");

// What tells the rows of a step apart.
struct Key {
  int64_t group, count, fresh;
};
inline bool operator==(const Key& a, const Key& b) {
  return a.group == b.group && a.count == b.count && a.fresh == b.fresh;
}

// Notes about one parameter and about each of its tensors. `near` is an address inside torch's tensor object (DLPack
// lends the shape from there), `storage` that of its storage object, which Python writes. Both are prefetched and never
// read, so an old one is none the worse: between two steps the model's own work has pushed these objects out of the
// caches, and fetching them one by one costs more than the rest of the check.
struct Seen {
  PyObject* grad = nullptr;
  void* grad_address = nullptr;
  PyObject* own = nullptr;  // the parameter's state dictionary, borrowed within one check
};
struct SeenRole {
  const void* whole = nullptr;  // the DTensor that `object` is the local tensor of, or itself
  const void *object = nullptr, *near = nullptr, *storage = nullptr;
};

// All that the check reads and writes of a table. The arrays belong to tensors that it keeps; their lengths, and the
// positions that they hold, were checked when it was made.
struct View {
  int64_t parameters, buckets, segments, place_words;
  Expected* expected;
  const ExpectedRole* roles;
  const int64_t* dims;
  float *steps, *active;
  uint8_t* fresh;
  const int64_t* firsts;  // of the buckets' segments, and their end
  Moving* moving;
  const int64_t* places;
  const FlatRange* ranges;  // null: no segment lies in a flat buffer, and the segments are what launches step; else
  Moving* run_moving;       // these are
  int64_t *run_places, *run_capacities, *run_firsts;
  Control* control;

  std::vector<PyObject*> params;  // borrowed from Python's list: the collector must see who holds them
  std::vector<int64_t> order;     // which parameter each entry of the state belongs to, -1: to none
  std::vector<Seen> seen;
  std::vector<SeenRole> seen_roles;
  std::vector<Key> keys;            // of the rows that Python has
  std::vector<int64_t> run_plan;    // firsts and capacities of the runs that chunks were cut for
  PyObject* names[kMaxRoles] = {};  // of a state dictionary: "step", and the states
  std::vector<Held> handles;
  PyObject *owners = nullptr, *hold = nullptr;
  PyObject* gradients = nullptr;  // borrowed: what the step under way has in the place of gradients; null: nothing

  View() = default;
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View();
};

// The view of a capsule; null and an error is set where it is none.
View* view_of(PyObject* capsule);

// The objects of torch's behind one tensor, wherever they begin in a line of the cache. Inlined by force: to the
// compiler a function that only prefetches has no effect, and it drops the calls.
__attribute__((always_inline)) inline void fetch(const void* near, const void* storage) {
  constexpr int of_tensor[] = {-64, 0, 64, 104}, of_storage[] = {0, 48};
  for (const int at : of_tensor) __builtin_prefetch(static_cast<const char*>(near) + at);
  for (const int at : of_storage) __builtin_prefetch(static_cast<const char*>(storage) + at);
}

// What a check found.
struct Changes {
  bool other = false;      // groups or state are not what the table was built from
  bool changed = false;    // another set of parameters has gradients than in the last step
  bool inspected = false;  // some were inspected in this step
  std::vector<int64_t> odd;
};

// changes.cpp: compares all with what is there now. Runs no Python code, and so nothing moves meanwhile. False: an
// error is set. `keep`, a list or null: is given the gradients and states.
bool check(View& view, PyObject* groups, PyObject* state, PyObject* keep, Changes* found);

// rows.cpp: names the row of every segment (one per distinct group, step count and freshness) and, where some lie in
// flat buffers, writes the runs. True if the rows are those of `view.keys`, which become those that were found.
bool assign_rows(View& view);
// True if the runs are others than those that chunks were cut for.
bool runs_differ(const View& view);
// A new list of (group, step, fresh), or null and an error is set.
PyObject* list_of_keys(const View& view);

// For Python. view(params, tensors, names, hold, held) -> capsule
PyObject* view(PyObject* module, PyObject* args);
// assign_rows(view) -> keys
PyObject* assign_rows_of(PyObject* module, PyObject* view);
// take_runs(view): what chunks are cut for now.
PyObject* take_runs(PyObject* module, PyObject* view);
// cut(numels, n, first, size, words) -> int: the number of chunks of so many segments; written to `words` but for 0.
PyObject* cut(PyObject* module, PyObject* args);
// step.cpp: step(view, groups, state, work)
PyObject* step(PyObject* module, PyObject* args);
// lists.cpp
PyObject* gather(PyObject* module, PyObject* args);
PyObject* step_lists(PyObject* module, PyObject* args);

}  // namespace wd
