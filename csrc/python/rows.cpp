// Rows, runs and chunks: the part of a step's preparation that looks at no Python object but its result.
#include <cstring>
#include <utility>

#include "changes.h"

namespace wd {
namespace {

// Writes the runs of the segments [first, last) from run `at` on: neighbours in flat buffers that share a row, and
// whose origins follow each other likewise, are one. Returns how many there are.
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
        view.run_moving[run].row == moving.row && place[kOutput] == view.run_places[run * view.place_words + kOutput] &&
        place[kOrigin] - view.run_places[run * view.place_words + kOrigin] == range.offset - offset) {
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

bool assign_rows(View& view) {
  std::vector<Key> keys;
  keys.reserve(view.keys.size() + 1);
  int64_t of_group = 0, group = -1;  // the first row of the current group
  for (int64_t i = 0; i < view.parameters; ++i) {
    if (view.active[i] == 0) continue;
    const Key key = {view.expected[i].group, int64_t(view.steps[i]) + 1, view.fresh[i] != 0};
    if (key.group != group) {
      group = key.group;
      of_group = int64_t(keys.size());
    }
    int64_t row = int64_t(keys.size());
    for (int64_t r = row; r-- > of_group;)
      if (keys[size_t(r)] == key) {
        row = r;
        break;
      }
    if (row == int64_t(keys.size())) keys.push_back(key);
    view.moving[view.expected[i].segment].row = row;
  }
  for (int64_t b = 0; b < view.buckets; ++b) {
    for (int64_t s = view.firsts[b]; s < view.firsts[b + 1]; ++s)
      if (view.moving[s].numel == 0) view.moving[s].row = 0;
    if (view.ranges != nullptr)
      view.run_firsts[b + 1] = merge(view, view.firsts[b], view.firsts[b + 1], view.run_firsts[b]);
  }
  const bool same = keys == view.keys;
  if (!same) view.keys = std::move(keys);
  return same;
}

bool runs_differ(const View& view) {
  if (view.ranges == nullptr) return false;
  const size_t firsts = size_t(view.buckets) + 1, runs = size_t(view.run_firsts[view.buckets]);
  return view.run_plan.size() != firsts + runs ||
         std::memcmp(view.run_plan.data(), view.run_firsts, firsts * sizeof(int64_t)) != 0 ||
         std::memcmp(view.run_plan.data() + firsts, view.run_capacities, runs * sizeof(int64_t)) != 0;
}

PyObject* list_of_keys(const View& view) {
  PyObject* const list = PyList_New(Py_ssize_t(view.keys.size()));
  for (size_t k = 0; list != nullptr && k < view.keys.size(); ++k) {
    const Key& key = view.keys[k];
    PyObject* const tuple = Py_BuildValue("(LLi)", (long long)key.group, (long long)key.count, int(key.fresh));
    if (tuple == nullptr || PyList_SetItem(list, Py_ssize_t(k), tuple) < 0) {
      Py_DECREF(list);
      return nullptr;
    }
  }
  return list;
}

PyObject* assign_rows_of(PyObject*, PyObject* capsule) {
  View* const view = view_of(capsule);
  if (view == nullptr) return nullptr;
  assign_rows(*view);
  return list_of_keys(*view);
}

PyObject* take_runs(PyObject*, PyObject* capsule) {
  View* const view = view_of(capsule);
  if (view == nullptr) return nullptr;
  if (view->ranges == nullptr) Py_RETURN_NONE;
  const int64_t runs = view->run_firsts[view->buckets];
  view->run_plan.assign(view->run_firsts, view->run_firsts + view->buckets + 1);
  view->run_plan.insert(view->run_plan.end(), view->run_capacities, view->run_capacities + runs);
  Py_RETURN_NONE;
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
