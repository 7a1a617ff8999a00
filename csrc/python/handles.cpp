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
    int64_t ndim = 0, *shape = nullptr, *strides = nullptr, offset = 0;
    AtenTensorHandle const own = tensor.get();
    AtenTensorHandle view = nullptr;
    if (aoti_torch_get_dim(own, &ndim) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_sizes(own, &shape) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_strides(own, &strides) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_storage_offset(own, &offset) != AOTI_TORCH_SUCCESS ||
        aoti_torch__reinterpret_tensor(own, ndim, shape, strides, offset, &view) != AOTI_TORCH_SUCCESS)
      throw std::runtime_error("torch makes no view of a tensor of this step");
    views.emplace_back(view);
  }
  return views;
}

Handles::Handles(PyObject* hold, PyObject* list) : list_(list), tensors_(tensors_of(hold, list)) {
  held_.reserve(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    AtenTensorHandle const handle = tensors_[i].get();
    int64_t* shape = nullptr;
    aoti_torch_get_sizes(handle, &shape);
    held_.push_back(
        {PyList_GetItem(list, Py_ssize_t(i)), handle, reinterpret_cast<const char*>(shape), dtype_code_of(handle)});
  }
  Py_INCREF(list_);
}

Handles::~Handles() {
  tensors_.clear();
  Py_DECREF(list_);
}

}  // namespace wd

WD_EXPANDED(STABLE_TORCH_LIBRARY_FRAGMENT, WD_NAMESPACE, m) { m.def("hold(Tensor[] tensors) -> ()"); }

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("hold", TORCH_BOX(&wd::hold));
}
