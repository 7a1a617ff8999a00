#include "handles.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace wd {

using torch::stable::Tensor;

namespace {

constexpr const char* kCapsule = "wd_kernels.holding";

struct Holding {
  PyObject* list;
  std::vector<Tensor>* tensors;
  std::vector<Held> held;
};

void destroy(PyObject* capsule) {
  auto* const own = static_cast<Holding*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (own == nullptr) return;
  delete own->tensors;
  Py_XDECREF(own->list);
  delete own;
}

int32_t dtype_of(AtenTensorHandle tensor) {
  int32_t dtype = -1;
  return aoti_torch_get_dtype(tensor, &dtype) == AOTI_TORCH_SUCCESS ? dtype : -1;
}

// Read through the handle, so whatever was done to the tensor shows.
bool lies_at(const Held& held, const void* address) {
  void* now = nullptr;
  return aoti_torch_get_data_ptr(held.handle, &now) == AOTI_TORCH_SUCCESS && now == address;
}

bool is_as_held(const Held& held, const ExpectedRole& role, const int64_t* dims) {
  AtenTensorHandle const tensor = held.handle;
  int64_t ndim = 0, *shape = nullptr, *strides = nullptr;
  if (dtype_of(tensor) != held.dtype) return false;
  if (aoti_torch_get_dim(tensor, &ndim) != AOTI_TORCH_SUCCESS || ndim != role.ndim) return false;
  if (aoti_torch_get_sizes(tensor, &shape) != AOTI_TORCH_SUCCESS) return false;
  if (aoti_torch_get_strides(tensor, &strides) != AOTI_TORCH_SUCCESS) return false;
  for (int64_t d = 0; d < ndim; ++d)
    if (shape[d] != dims[role.dims + d] || (strides[d] != dims[role.dims + ndim + d] && shape[d] > 1)) return false;
  return true;
}

// Is `value` what the state dictionary has under `name`? Its `position`-th entry, most often.
int has(PyObject* own, Py_ssize_t* position, PyObject* name, PyObject* value) {
  PyObject *key = nullptr, *found = nullptr;
  if (PyDict_Next(own, position, &key, &found) && key == name) return found == value;
  found = PyDict_GetItemWithError(own, name);
  if (found == nullptr) return PyErr_Occurred() ? -1 : 0;
  return found == value;
}

}  // namespace

const Held* held_of(PyObject* capsule) {
  if (capsule == Py_None) return nullptr;
  auto* const own = static_cast<Holding*>(PyCapsule_GetPointer(capsule, kCapsule));
  return own == nullptr ? nullptr : own->held.data();
}

int check_flat(PyObject* grad, PyObject* const* names, const View& view, int64_t i, const Held* held) {
  const Expected& e = view.expected[i];
  const ExpectedRole* const roles = view.roles + e.first_role;
  PyObject* const own = view.seen[i].own;
  if (grad != held[kGrad].object || own == nullptr || !PyDict_Check(own)) return 0;
  Py_ssize_t position = 0;
  int found = has(own, &position, names[0], reinterpret_cast<PyObject*>(e.view));
  for (int64_t role = kState; found > 0 && role < e.roles; ++role)
    found = has(own, &position, names[roles[role].name], held[role].object);
  if (found <= 0) return found;
  for (int64_t role = 0; role < e.roles; ++role)
    if (!lies_at(held[role], reinterpret_cast<void*>(role == kGrad ? e.flat_grad : roles[role].address))) return 0;
  // A state is written where it lies, whatever is done to its shape: identity and address are enough.
  for (const Role role : {kParam, kGrad})
    if (!is_as_held(held[role], roles[role], view.dims)) return 0;
  view.moving[e.segment] = {reinterpret_cast<void*>(e.flat_grad), e.numel, view.moving[e.segment].row, e.aligned};
  return 1;
}

void fetch_flat(PyObject* param, const View& view, int64_t i, const Held* held) {
  const Expected& e = view.expected[i];
  __builtin_prefetch(param);
  __builtin_prefetch(view.seen[i].own);
  __builtin_prefetch(held[kGrad].object);
  for (int64_t role = 0; role < e.roles; ++role) {
    __builtin_prefetch(held[role].handle);
    fetch(held[role].near, view.seen_roles[e.first_role + role].storage);
  }
}

PyObject* holding(PyObject*, PyObject* args) {
  PyObject* list;
  unsigned long long address;
  if (!PyArg_ParseTuple(args, "O!K", &PyList_Type, &list, &address)) return nullptr;
  auto* const tensors = reinterpret_cast<std::vector<Tensor>*>(address);
  auto* const own = new Holding{list, tensors, {}};
  Py_INCREF(list);
  own->held.reserve(tensors->size());
  for (size_t i = 0; i < tensors->size(); ++i) {
    int64_t* shape = nullptr;
    aoti_torch_get_sizes((*tensors)[i].get(), &shape);
    AtenTensorHandle const handle = (*tensors)[i].get();
    own->held.push_back(
        {PyList_GetItem(list, Py_ssize_t(i)), handle, reinterpret_cast<const char*>(shape), dtype_of(handle)});
  }
  PyObject* const capsule = PyCapsule_New(own, kCapsule, destroy);
  if (capsule == nullptr) {
    delete tensors;
    Py_DECREF(list);
    delete own;
  }
  return capsule;
}

namespace {

// The address of a list of handles, for `holding`. The tensors are those themselves, not copies of what they hold.
int64_t hold(std::vector<Tensor> tensors) {
  return reinterpret_cast<int64_t>(new std::vector<Tensor>(std::move(tensors)));
}

}  // namespace
}  // namespace wd

STABLE_TORCH_LIBRARY_FRAGMENT(WD_NAMESPACE, m) { m.def("hold(Tensor[] tensors) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(WD_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("hold", TORCH_BOX(&wd::hold)); }
