// The check of every step, and the Python module that holds it. `walk` compares what the table was built from with
// what is there now, object by object and address by address, and writes the addresses of this step's gradients into
// the table. It decides nothing: whatever is not exactly as expected goes back to table.py as a list of positions.
// It reads ordinary tensors as DLPack lends them (tensors.h) and flat ones through handles (held.h).
#include "walk.h"

#include "held.h"

namespace {

using wd::DLTensor;
using wd::Expected;

PyObject* kw_params = nullptr;

constexpr Py_ssize_t kAhead = 12;

__attribute__((always_inline)) inline void fetch(PyObject* param, const wd::Seen& seen) {
  __builtin_prefetch(param);
  __builtin_prefetch(seen.grad);
  __builtin_prefetch(seen.own);
  for (const void* state : seen.states) __builtin_prefetch(state);
  for (int role = 0; role < wd::kNoted; ++role)
    if (seen.near[role] != nullptr) wd::fetch(seen.near[role], seen.storages[role]);
}

// Dtype, device, shape, and strides wherever they matter.
bool agrees(const DLTensor& t, const Expected& e, const int64_t* dims, int64_t dtype, int64_t device) {
  if (wd::dtype_of(t) != dtype || t.ndim != e.ndim || wd::device_of(t) != device) return false;
  const int64_t *shape = dims + e.dims, *strides = shape + e.ndim;
  for (int64_t d = 0; d < e.ndim; ++d) {
    if (t.shape[d] != shape[d]) return false;
    if (t.strides[d] != strides[d] && shape[d] > 1 && e.numel > 0) return false;
  }
  return e.numel == 0 || t.data != nullptr;
}

// Do the groups hold these parameters, in this order?
int same_params(PyObject* groups, PyObject* const* params, Py_ssize_t total, const Expected* expected) {
  const Py_ssize_t n_groups = PyList_Size(groups);
  if (n_groups < 0) return -1;
  Py_ssize_t i = 0;
  for (Py_ssize_t g = 0; g < n_groups; ++g) {
    PyObject* group = PyList_GetItem(groups, g);
    PyObject* own = PyDict_Check(group) ? PyDict_GetItemWithError(group, kw_params) : nullptr;
    if (own == nullptr) return PyErr_Occurred() ? -1 : 0;
    const bool list = PyList_Check(own);
    if (!list && !PyTuple_Check(own)) return 0;
    const Py_ssize_t size = list ? PyList_Size(own) : PyTuple_Size(own);
    for (Py_ssize_t k = 0; k < size; ++k, ++i) {
      if (i >= total || expected[i].group != g) return 0;
      if ((list ? PyList_GetItem(own, k) : PyTuple_GetItem(own, k)) != params[i]) return 0;
    }
  }
  return i == total;
}

// Do the entries of `state` belong to these parameters, in this order? By identity, so that no tensor is hashed.
int same_state(PyObject* state, PyObject* const* params, const int64_t* order, Py_ssize_t n_order, wd::Seen* seen) {
  if (PyDict_Size(state) != n_order) return 0;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(state, &position, &key, &value); ++i) {
    if (order[i] < 0) continue;
    if (key != params[order[i]]) return 0;
    seen[order[i]].own = value;  // looked at in `check`, when it has been fetched
  }
  return 1;
}

// One parameter with a gradient: 1 as expected (its segment is written), 0 not, -1 an error is set.
int check(PyObject* param, PyObject* grad, PyObject* own, PyObject* view, PyObject* keep, PyObject* const* names,
          const Expected& e, const int64_t* dims, wd::Segment& segment, wd::Seen& seen) {
  if (!wd::known(grad)) return 0;
  if (own == nullptr || !PyDict_Check(own)) return 0;

  DLTensor t;
  if (!wd::read(param, &t) || !agrees(t, e, dims, e.param_dtype, e.device)) return 0;
  if (wd::address(t) != segment.address[wd::kParam]) return 0;
  seen.near[0] = t.shape;
  if (!wd::read(grad, &t) || !agrees(t, e, dims, e.grad_dtype, e.device)) return 0;
  void* const grad_address = wd::address(t);
  if (e.flat_grad != 0 && reinterpret_cast<int64_t>(grad_address) == e.flat_grad) return 0;  // it is flat again
  seen.near[1] = t.shape;
  // The lazy bits. A complex tensor may be a conjugate at any time. A real one with the negative bit is the imaginary
  // part of a conjugate: a strided view, which never agrees unless it has one element. So elsewhere a look at a
  // gradient that is a new object, or lies elsewhere, is enough.
  const bool always = t.code == wd::kComplexCode || e.numel == 1;
  if (always || grad != seen.grad || grad_address != seen.grad_address) {
    seen.grad = nullptr;
    const int found = wd::lazy(grad, t.code == wd::kComplexCode);
    if (found != 0) return found < 0 ? -1 : 0;
    seen.grad = grad;
    seen.grad_address = grad_address;
  }
  if (always) {
    const int found = wd::lazy(param, t.code == wd::kComplexCode);
    if (found != 0) return found < 0 ? -1 : 0;
  }

  for (int64_t s = 0; s <= e.states; ++s) {
    PyObject* const value = PyDict_GetItemWithError(own, names[s]);
    if (value == nullptr) return PyErr_Occurred() ? -1 : 0;
    if (s == 0) {  // the step count must be the table's own
      if (value != view) return 0;
      continue;
    }
    if (!wd::known(value) || !wd::read(value, &t) || !agrees(t, e, dims, e.state_dtype, e.device)) return 0;
    if (wd::address(t) != segment.address[wd::kState + s - 1]) return 0;
    seen.near[1 + s] = t.shape;
    seen.states[s - 1] = value;
    const int found = always ? wd::lazy(value, t.code == wd::kComplexCode) : 0;
    if (found != 0) return found < 0 ? -1 : 0;
  }

  if (PyList_Append(keep, grad) < 0) return -1;
  segment.address[wd::kGrad] = grad_address;
  segment.numel = e.numel;
  segment.aligned = e.aligned && reinterpret_cast<uintptr_t>(grad_address) % 16 == 0;
  return 1;
}

// walk(groups, state, n, params, names, n_order, order, expected, dims, seen, segments, steps, active, held)
//   -> None where groups or state are not what the table was built from, else (odd, changed, keep): positions that
//      table.py has to look at; whether another set of parameters has gradients than in the last step; and the
//      gradients, to be kept alive while their addresses are used: another thread may drop them.
PyObject* walk(PyObject*, PyObject* args) {
  PyObject *groups, *state, *all_names, *capsule;
  Py_ssize_t n, n_order;
  unsigned long long at_params, at_order, at_expected, at_dims, at_seen, at_segments, at_steps, at_active;
  if (!PyArg_ParseTuple(args, "O!O!nKO!nKKKKKKKO", &PyList_Type, &groups, &PyDict_Type, &state, &n, &at_params,
                        &PyTuple_Type, &all_names, &n_order, &at_order, &at_expected, &at_dims, &at_seen, &at_segments,
                        &at_steps, &at_active, &capsule))
    return nullptr;
  auto* const params = reinterpret_cast<PyObject* const*>(at_params);
  PyObject* names[1 + wd::kMaxStates] = {};
  for (Py_ssize_t i = 0; i < PyTuple_Size(all_names) && i <= wd::kMaxStates; ++i)
    names[i] = PyTuple_GetItem(all_names, i);
  const auto* order = reinterpret_cast<const int64_t*>(at_order);
  const auto* expected = reinterpret_cast<const Expected*>(at_expected);
  const auto* dims = reinterpret_cast<const int64_t*>(at_dims);
  auto* seen = reinterpret_cast<wd::Seen*>(at_seen);
  auto* segments = reinterpret_cast<wd::Segment*>(at_segments);
  const auto* steps = reinterpret_cast<const float*>(at_steps);
  auto* active = reinterpret_cast<float*>(at_active);

  const wd::Held* const all_held = wd::held_of(capsule);
  if (PyErr_Occurred()) return nullptr;

  int same = same_params(groups, params, n, expected);
  if (same > 0) same = same_state(state, params, order, n_order, seen);
  if (same < 0) return nullptr;
  if (same == 0) Py_RETURN_NONE;

  PyObject *const odd = PyList_New(0), *const keep = PyList_New(0);
  const auto release = [&] {
    Py_XDECREF(odd);
    Py_XDECREF(keep);
    return nullptr;
  };
  if (odd == nullptr || keep == nullptr) return release();
  bool changed = false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (i + kAhead < n && expected[i + kAhead].kind == wd::kOrdinary)
      fetch(params[i + kAhead], seen[i + kAhead]);
    else if (i + kAhead < n && expected[i + kAhead].kind == wd::kFlat)
      wd::fetch_flat(params[i + kAhead], seen[i + kAhead], expected[i + kAhead], all_held + expected[i + kAhead].held);
    const Expected& e = expected[i];
    PyObject* const param = params[i];
    PyObject* const grad = wd::grad_of(param);
    if (grad == nullptr) return release();
    const bool now = grad != Py_None;
    changed |= now != (active[i] != 0);
    active[i] = now ? 1 : 0;
    int fine = 1;
    const bool counts = steps[i] >= 0 && steps[i] < 0x1p53f && steps[i] == float(int64_t(steps[i]));
    if (now && e.kind == wd::kFlat) {
      fine = counts ? wd::check_flat(grad, seen[i].own, reinterpret_cast<PyObject*>(e.view), names, e, dims,
                                     all_held + e.held, segments[e.segment])
                    : 0;
    } else if (now && e.kind == wd::kOrdinary) {
      // Looking at a subclass may have run anybody's code: its state is looked up again.
      PyObject* const own = wd::known(param) ? seen[i].own : PyDict_GetItemWithError(state, param);
      Py_XINCREF(own);
      fine = counts ? check(param, grad, own, reinterpret_cast<PyObject*>(e.view), keep, names, e, dims,
                            segments[e.segment], seen[i])
                    : 0;
      Py_XDECREF(own);
    } else if (now)
      fine = 0;
    else if (e.kind != wd::kUnseen)
      segments[e.segment].numel = 0;
    Py_DECREF(grad);
    if (fine == 0) {
      PyObject* const position = PyLong_FromSsize_t(i);
      if (position == nullptr || PyList_Append(odd, position) < 0) fine = -1;
      Py_XDECREF(position);
    }
    if (fine < 0) return release();
  }
  PyObject* const result = Py_BuildValue("(OiO)", odd, int(changed), keep);
  release();
  return result;
}

PyMethodDef methods[] = {
    {"connect", wd::connect, METH_VARARGS, "connect(capsule, Tensor, Parameter) -> bool"},
    {"walk", walk, METH_VARARGS, "The check of every step."},
    {"gather", wd::gather, METH_VARARGS, "The segments of lists of tensors."},
    {"holding", wd::holding, METH_VARARGS, "holding(tensors, address) -> capsule"},
    {"assign", wd::assign, METH_VARARGS, "Rows and flat positions of the segments."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Native part of wd_kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  kw_params = PyUnicode_InternFromString("params");
  if (kw_params == nullptr) return nullptr;
  PyObject* const made = PyModule_Create(&module);
  if (made != nullptr && PyModule_AddStringConstant(made, "NAMESPACE", WD_TEXT(WD_NAMESPACE)) < 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
