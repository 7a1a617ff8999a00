// Rows and flat positions: the part of a step's preparation that looks at no Python object but its result.
#include "walk.h"

namespace wd {

// Lays the segments [first, last) end to end.
void lay(Segment* segments, int64_t first, int64_t last) {
  int64_t start = 0;
  for (int64_t s = first; s < last; ++s) {
    segments[s].start = start;
    start += segments[s].numel;
  }
}

// Writes the runs of the segments [first, last) from `runs` on: neighbours in flat buffers that share a row are one.
// Returns how many there are.
int64_t merge(const Segment* segments, const Lie* lies, int64_t first, int64_t last, Segment* runs,
              int64_t* capacities) {
  int64_t count = 0, offset = 0;  // of the run that is being written
  const Lie* before = nullptr;    // the last segment of it, if another may follow
  for (int64_t s = first; s < last; ++s) {
    const Segment& segment = segments[s];
    const Lie& lie = lies[s];
    const bool attached =
        lie.buffer != 0 && segment.numel != 0 && reinterpret_cast<int64_t>(segment.address[kGrad]) == lie.grad;
    if (attached && before != nullptr && before->buffer == lie.buffer && before->end == lie.offset &&
        runs[count - 1].row == segment.row) {
      runs[count - 1].numel = capacities[count - 1] = lie.offset - offset + segment.numel;
    } else {
      runs[count] = segment;
      capacities[count++] = lie.numel;
      offset = lie.offset;
    }
    before = attached ? &lie : nullptr;
  }
  lay(runs, 0, count);
  return count;
}

// assign(expected, segments, steps, active, fresh, n, firsts, n_buckets, lies, runs, run_firsts, capacities)
//   -> [(group, step, fresh), ...]
// Names the row of every segment (one per distinct group, step count and freshness) and lays the segments of each
// bucket end to end; or, where some lie in flat buffers (else `lies` is 0), writes the runs that a launch reads.
PyObject* assign(PyObject*, PyObject* args) {
  unsigned long long at_expected, at_segments, at_steps, at_active, at_fresh, at_firsts;
  unsigned long long at_lies, at_runs, at_run_firsts, at_capacities;
  Py_ssize_t n, n_buckets;
  if (!PyArg_ParseTuple(args, "KKKKKnKnKKKK", &at_expected, &at_segments, &at_steps, &at_active, &at_fresh, &n,
                        &at_firsts, &n_buckets, &at_lies, &at_runs, &at_run_firsts, &at_capacities))
    return nullptr;
  const auto* expected = reinterpret_cast<const Expected*>(at_expected);
  auto* segments = reinterpret_cast<Segment*>(at_segments);
  const auto* steps = reinterpret_cast<const float*>(at_steps);
  const auto* active = reinterpret_cast<const float*>(at_active);
  const auto* made = reinterpret_cast<const uint8_t*>(at_fresh);
  const auto* firsts = reinterpret_cast<const int64_t*>(at_firsts);
  const auto* lies = reinterpret_cast<const Lie*>(at_lies);
  auto* runs = reinterpret_cast<Segment*>(at_runs);
  auto* run_firsts = reinterpret_cast<int64_t*>(at_run_firsts);
  auto* capacities = reinterpret_cast<int64_t*>(at_capacities);

  PyObject* const keys = PyList_New(0);
  if (keys == nullptr) return nullptr;
  auto* leaders = static_cast<Py_ssize_t*>(PyMem_Malloc(sizeof(Py_ssize_t) * size_t(n > 0 ? n : 1)));
  if (leaders == nullptr) {
    Py_DECREF(keys);
    return PyErr_NoMemory();
  }
  Py_ssize_t count = 0, of_group = 0;  // rows so far, and the first of the current group
  int64_t group = -1;
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (active[i] == 0) continue;
    const bool fresh = made[i] != 0;
    if (expected[i].group != group) {
      group = expected[i].group;
      of_group = count;
    }
    Py_ssize_t row = count;
    for (Py_ssize_t r = count; r-- > of_group;) {
      const Py_ssize_t leader = leaders[r];
      if (steps[leader] == steps[i] && (made[leader] != 0) == fresh) {
        row = r;
        break;
      }
    }
    if (row == count) {
      leaders[count++] = i;
      PyObject* const key = Py_BuildValue("(LLi)", (long long)group, (long long)steps[i] + 1, int(fresh));
      if (key == nullptr || PyList_Append(keys, key) < 0) {
        Py_XDECREF(key);
        PyMem_Free(leaders);
        Py_DECREF(keys);
        return nullptr;
      }
      Py_DECREF(key);
    }
    segments[expected[i].segment].row = row;
  }
  PyMem_Free(leaders);
  for (Py_ssize_t b = 0; b < n_buckets; ++b) {
    for (int64_t s = firsts[b]; s < firsts[b + 1]; ++s)
      if (segments[s].numel == 0) segments[s].row = 0;
    if (lies == nullptr) {
      lay(segments, firsts[b], firsts[b + 1]);
    } else {
      const int64_t at = run_firsts[b];
      run_firsts[b + 1] = at + merge(segments, lies, firsts[b], firsts[b + 1], runs + at, capacities + at);
    }
  }
  return keys;
}

}  // namespace wd
