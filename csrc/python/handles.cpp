#include "handles.h"

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <utility>

#include "../layout.h"

namespace wd {
namespace {

// What the operator was given last, on its way to `tensors_of`. No address leaves this file.
thread_local std::vector<Tensor> handed;

void hold(std::vector<Tensor> tensors) { handed = std::move(tensors); }

}  // namespace

int32_t dtype_code_of(AtenTensorHandle tensor) {
  int32_t dtype = -1;
  return aoti_torch_get_dtype(tensor, &dtype) == AOTI_TORCH_SUCCESS ? dtype : -1;
}

std::vector<Tensor> tensors_of(PyObject* hold, PyObject* list) {
  handed.clear();
  PyObject* const done = PyObject_CallFunctionObjArgs(hold, list, nullptr);
  if (done == nullptr) throw std::runtime_error("a Python error is set");
  Py_DECREF(done);
  std::vector<Tensor> tensors = std::move(handed);
  handed.clear();
  bool same = Py_ssize_t(tensors.size()) == PyList_Size(list);
  for (size_t i = 0; same && i < tensors.size(); ++i) {  // a mode of torch's may have changed them
    DLTensor t;
    int64_t* shape = nullptr;
    same = !lends() || (read(PyList_GetItem(list, Py_ssize_t(i)), &t) &&
                        aoti_torch_get_sizes(tensors[i].get(), &shape) == AOTI_TORCH_SUCCESS && shape == t.shape);
  }
  if (!same) throw std::runtime_error("another operator took the tensors of a step: is a mode of torch's active?");
  return tensors;
}

std::vector<Tensor> views_of(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> views;
  views.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    int64_t ndim = 0, *shape = nullptr, *strides = nullptr;
    AtenTensorHandle const own = tensor.get();
    AtenTensorHandle view = nullptr;
    if (aoti_torch_get_dim(own, &ndim) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_sizes(own, &shape) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_strides(own, &strides) != AOTI_TORCH_SUCCESS ||
        // Its storage offset is kept: what is given is added to it.
        aoti_torch__reinterpret_tensor(own, ndim, shape, strides, 0, &view) != AOTI_TORCH_SUCCESS)
      throw std::runtime_error("torch makes no view of a tensor of this step");
    views.emplace_back(view);
  }
  return views;
}

std::vector<Held> held_of(PyObject* list) {
  std::vector<Held> all;
  for (Py_ssize_t i = 0; i < PyList_Size(list); ++i) {
    PyObject* const object = PyList_GetItem(list, i);
    if (!known(object)) throw std::runtime_error("a tensor of a table is not one of torch's own types");
    const auto handle = reinterpret_cast<AtenTensorHandle>(handle_of(object));
    int64_t* shape = nullptr;
    if (handle != nullptr) aoti_torch_get_sizes(handle, &shape);
    all.push_back({object, handle, reinterpret_cast<const char*>(shape), handle ? dtype_code_of(handle) : -1});
  }
  return all;
}

bool lazy(const Held& held) {
  int64_t ndim = 0, *shape = nullptr;
  if (aoti_torch_get_dim(held.handle, &ndim) != AOTI_TORCH_SUCCESS || ndim > kInlineDims) return true;
  return aoti_torch_get_sizes(held.handle, &shape) != AOTI_TORCH_SUCCESS || lazy(static_cast<const void*>(shape));
}

}  // namespace wd

WD_EXPANDED(STABLE_TORCH_LIBRARY_FRAGMENT, WD_NAMESPACE, m) { m.def("hold(Tensor[] tensors) -> ()"); }

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("hold", TORCH_BOX(&wd::hold));
}
