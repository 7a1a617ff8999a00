// Rows, runs and chunks: the part of a step's preparation that looks at no Python object but its result.
#include <cstring>

#include "changes.h"

namespace wd {
namespace {

// Writes the runs of the segments [first, last) from run `at` on: neighbours in flat buffers that share a row, are one.
// Returns how many there are.
int64_t merge(const View& view, int64_t first, int64_t last, int64_t at) {
  int64_t run = at - 1, offset = 0;   // of the run that is being written
  const FlatRange* before = nullptr;  // the last segment of it, if another may follow
  for (int64_t s = first; s < last; ++s) {
    const Moving& moving = view.moving[s];
    const FlatRange& range = view.ranges[s];
    const int64_t* const place = view.places + s * view.place_words;
    const bool attached =
        range.buffer != 0 && moving.numel != 0 && reinterpret_cast<int64_t>(moving.grad) == range.grad;
    if (attached && before != nullptr && before->buffer == range.buffer && before->end == range.offset &&
        view.run_moving[run].row == moving.row) {
      view.run_moving[run].numel = view.run_capacities[run] = range.offset - offset + moving.numel;
    } else {
      ++run;
      view.run_moving[run] = moving;
      std::memcpy(view.run_places + run * view.place_words, place, size_t(view.place_words) * sizeof(int64_t));
      view.run_capacities[run] = range.numel;
      offset = range.offset;
    }
    before = attached ? &range : nullptr;
  }
  return run + 1;
}

}  // namespace

PyObject* assign_rows(const View& view) {
  PyObject* const keys = PyList_New(0);
  if (keys == nullptr) return nullptr;
  const int64_t n = view.parameters;
  auto* leaders = static_cast<int64_t*>(PyMem_Malloc(sizeof(int64_t) * size_t(n > 0 ? n : 1)));
  if (leaders == nullptr) {
    Py_DECREF(keys);
    return PyErr_NoMemory();
  }
  int64_t count = 0, of_group = 0, group = -1;  // rows so far, and the first of the current group
  for (int64_t i = 0; i < n; ++i) {
    if (view.active[i] == 0) continue;
    const bool fresh = view.fresh[i] != 0;
    if (view.expected[i].group != group) {
      group = view.expected[i].group;
      of_group = count;
    }
    int64_t row = count;
    for (int64_t r = count; r-- > of_group;) {
      const int64_t leader = leaders[r];
      if (view.steps[leader] == view.steps[i] && (view.fresh[leader] != 0) == fresh) {
        row = r;
        break;
      }
    }
    if (row == count) {
      leaders[count++] = i;
      PyObject* const key = Py_BuildValue("(LLi)", (long long)group, (long long)view.steps[i] + 1, int(fresh));
      if (key == nullptr || PyList_Append(keys, key) < 0) {
        Py_XDECREF(key);
        PyMem_Free(leaders);
        Py_DECREF(keys);
        return nullptr;
      }
      Py_DECREF(key);
    }
    view.moving[view.expected[i].segment].row = row;
  }
  PyMem_Free(leaders);
  for (int64_t b = 0; b < view.buckets; ++b) {
    for (int64_t s = view.firsts[b]; s < view.firsts[b + 1]; ++s)
      if (view.moving[s].numel == 0) view.moving[s].row = 0;
    if (view.ranges != nullptr)
      view.run_firsts[b + 1] = merge(view, view.firsts[b], view.firsts[b + 1], view.run_firsts[b]);
  }
  return keys;
}

PyObject* assign_rows_of(PyObject*, PyObject* address) {
  const unsigned long long at = PyLong_AsUnsignedLongLong(address);
  if (PyErr_Occurred()) return nullptr;
  return assign_rows(*reinterpret_cast<const View*>(at));
}

PyObject* cut(PyObject*, PyObject* args) {
  unsigned long long at_numels, at_words;
  long long n, first, size;
  if (!PyArg_ParseTuple(args, "KLLLK", &at_numels, &n, &first, &size, &at_words)) return nullptr;
  const auto* numels = reinterpret_cast<const int64_t*>(at_numels);
  auto* words = reinterpret_cast<int64_t*>(at_words);
  int64_t count = 0;
  for (long long s = 0; s < n; ++s) {
    const int64_t chunks = (numels[s] + size - 1) / size;
    for (int64_t ordinal = 0; words != nullptr && ordinal < chunks; ++ordinal)
      words[count + ordinal] = (first + s) | ordinal << 32;
    count += chunks;
  }
  return PyLong_FromLongLong(count);
}

}  // namespace wd
