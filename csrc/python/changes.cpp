// The check of every step, and the Python module that holds it. `refresh` compares what the table was built from with
// what is there now, object by object and address by address, and writes the addresses of this step's gradients into
// the table. It decides nothing: whatever is not exactly as expected goes back to Python as a list of positions.
// It reads ordinary tensors as DLPack lends them (tensors.h) and flat ones through handles (handles.h).
#include "changes.h"

#include "handles.h"

namespace {

using wd::DLTensor;
using wd::Expected;
using wd::ExpectedRole;
using wd::View;

PyObject* kw_params = nullptr;

constexpr Py_ssize_t kAhead = 12;

__attribute__((always_inline)) inline void fetch_ordinary(PyObject* param, const wd::Seen& seen, const Expected& e,
                                                          const wd::SeenRole* roles) {
  __builtin_prefetch(param);
  __builtin_prefetch(seen.grad);
  __builtin_prefetch(seen.own);
  for (int64_t role = 0; role < e.roles; ++role) {
    __builtin_prefetch(roles[role].object);
    if (roles[role].near != nullptr) wd::fetch(roles[role].near, roles[role].storage);
  }
}

// Dtype, device, shape, and strides wherever they matter; and address.
bool agrees(const DLTensor& t, const Expected& e, const ExpectedRole& role, const int64_t* dims) {
  if (wd::dtype_of(t) != role.dtype || t.ndim != role.ndim || wd::device_of(t) != e.device) return false;
  const int64_t *shape = dims + role.dims, *strides = shape + role.ndim;
  for (int64_t d = 0; d < role.ndim; ++d) {
    if (t.shape[d] != shape[d]) return false;
    if (t.strides[d] != strides[d] && shape[d] > 1 && e.numel > 0) return false;
  }
  if (e.numel > 0 && t.data == nullptr) return false;
  return role.address == 0 || reinterpret_cast<int64_t>(wd::address(t)) == role.address;
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
int check(PyObject* param, PyObject* grad, PyObject* own, PyObject* keep, PyObject* const* names, const View& view,
          const Expected& e, wd::Seen& seen) {
  if (!wd::known(grad)) return 0;
  if (own == nullptr || !PyDict_Check(own)) return 0;
  PyObject* const count = PyDict_GetItemWithError(own, names[0]);
  if (count != reinterpret_cast<PyObject*>(e.view)) return PyErr_Occurred() ? -1 : 0;  // it must be the table's own

  const ExpectedRole* const roles = view.roles + e.first_role;
  wd::SeenRole* const noted = view.seen_roles + e.first_role;
  void* grad_address = nullptr;
  for (int64_t role = 0; role < e.roles; ++role) {
    PyObject* tensor = role == wd::kParam ? param : grad;
    if (role >= wd::kState) {
      tensor = PyDict_GetItemWithError(own, names[roles[role].name]);
      if (tensor == nullptr) return PyErr_Occurred() ? -1 : 0;
      if (!wd::known(tensor)) return 0;
    }
    DLTensor t;
    if (!wd::read(tensor, &t) || !agrees(t, e, roles[role], view.dims)) return 0;
    noted[role].object = tensor;
    noted[role].near = t.shape;
    // The lazy bits. A complex tensor may be a conjugate at any time. A real one with the negative bit is the imaginary
    // part of a conjugate: a strided view, which never agrees unless it has one element. So elsewhere a look at a
    // gradient that is a new object, or lies elsewhere, is enough.
    bool look = t.code == wd::kComplexCode || e.numel == 1;
    if (role == wd::kGrad) {
      grad_address = wd::address(t);
      if (e.flat_grad != 0 && reinterpret_cast<int64_t>(grad_address) == e.flat_grad) return 0;  // it is flat again
      look = look || grad != seen.grad || grad_address != seen.grad_address;
      if (look) seen.grad = nullptr;
    }
    const int found = look ? wd::lazy(tensor, t.code == wd::kComplexCode) : 0;
    if (found != 0) return found < 0 ? -1 : 0;
  }
  seen.grad = grad;
  seen.grad_address = grad_address;
  if (PyList_Append(keep, grad) < 0) return -1;
  wd::Moving& moving = view.moving[e.segment];
  moving.grad = grad_address;
  moving.numel = e.numel;
  moving.aligned = e.aligned && reinterpret_cast<uintptr_t>(grad_address) % 16 == 0;
  return 1;
}

// refresh(view, groups, state, names, holding)
//   -> None where groups or state are not what the table was built from, else (odd, changed, keep, keys): positions
//      that Python has to look at; whether another set of parameters has gradients than in the last step; the
//      gradients, to be kept alive while their addresses are used: another thread may drop them; and, if nothing is
//      odd, the keys of this step's rows.
PyObject* refresh(PyObject*, PyObject* args) {
  PyObject *groups, *state, *all_names, *capsule;
  unsigned long long at_view;
  if (!PyArg_ParseTuple(args, "KO!O!O!O", &at_view, &PyList_Type, &groups, &PyDict_Type, &state, &PyTuple_Type,
                        &all_names, &capsule))
    return nullptr;
  const View& view = *reinterpret_cast<const View*>(at_view);
  PyObject* names[wd::kMaxRoles] = {};
  for (Py_ssize_t i = 0; i < PyTuple_Size(all_names) && i < wd::kMaxRoles; ++i)
    names[i] = PyTuple_GetItem(all_names, i);
  const wd::Held* const all_held = wd::held_of(capsule);
  if (PyErr_Occurred()) return nullptr;

  const Py_ssize_t n = view.parameters;
  PyObject* const* const params = view.params;
  int same = same_params(groups, params, n, view.expected);
  if (same > 0) same = same_state(state, params, view.order, view.ordered, view.seen);
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
    if (i + kAhead < n) {
      const Expected& ahead = view.expected[i + kAhead];
      if (ahead.kind == wd::kOrdinary)
        fetch_ordinary(params[i + kAhead], view.seen[i + kAhead], ahead, view.seen_roles + ahead.first_role);
      else if (ahead.kind == wd::kFlat)
        wd::fetch_flat(params[i + kAhead], view, i + kAhead, all_held + ahead.held);
    }
    const Expected& e = view.expected[i];
    PyObject* const param = params[i];
    PyObject* const grad = wd::grad_of(param);
    if (grad == nullptr) return release();
    const bool now = grad != Py_None;
    changed |= now != (view.active[i] != 0);
    view.active[i] = now ? 1 : 0;
    int fine = 1;
    const float steps = view.steps[i];
    const bool counts = steps >= 0 && steps < 0x1p53f && steps == float(int64_t(steps));
    if (now && e.kind == wd::kFlat) {
      fine = counts ? wd::check_flat(grad, names, view, i, all_held + e.held) : 0;
    } else if (now && e.kind == wd::kOrdinary) {
      // Looking at a subclass may have run anybody's code: its state is looked up again.
      PyObject* const own = wd::known(param) ? view.seen[i].own : PyDict_GetItemWithError(state, param);
      Py_XINCREF(own);
      fine = counts ? check(param, grad, own, keep, names, view, e, view.seen[i]) : 0;
      Py_XDECREF(own);
    } else if (now)
      fine = 0;
    else if (e.kind != wd::kUnseen)
      view.moving[e.segment].numel = 0;
    Py_DECREF(grad);
    if (fine == 0) {
      PyObject* const position = PyLong_FromSsize_t(i);
      if (position == nullptr || PyList_Append(odd, position) < 0) fine = -1;
      Py_XDECREF(position);
    }
    if (fine < 0) return release();
  }
  PyObject* keys = Py_None;
  if (PyList_Size(odd) == 0) {
    keys = wd::assign_rows(view);
    if (keys == nullptr) return release();
  } else {
    Py_INCREF(keys);
  }
  PyObject* const result = Py_BuildValue("(OiON)", odd, int(changed), keep, keys);
  release();
  return result;
}

PyMethodDef methods[] = {
    {"connect", wd::connect, METH_VARARGS, "connect(capsule, Tensor, Parameter) -> bool"},
    {"refresh", refresh, METH_VARARGS, "The check of every step."},
    {"assign_rows", wd::assign_rows_of, METH_O, "The rows of the segments, and runs of neighbours."},
    {"cut", wd::cut, METH_VARARGS, "The chunks of segments."},
    {"gather", wd::gather, METH_VARARGS, "The segments of lists of tensors."},
    {"holding", wd::holding, METH_VARARGS, "holding(tensors, address) -> capsule"},
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
