// Handles of tensors: a step reads an address through one in a few nanoseconds, where DLPack takes forty.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "tensors.h"

namespace wd {

using torch::stable::Tensor;

// The tensors of a list of Python's, through the operator `hold`. Throws; or the Python error that is set.
std::vector<Tensor> tensors_of(PyObject* hold, PyObject* list);

// What keeps the memory of tensors where it is, whatever is done to them: a view of each.
std::vector<Tensor> views_of(const std::vector<Tensor>& tensors);

struct Held {
  PyObject* object;  // alive as long as the list is
  AtenTensorHandle handle;
  const char* near;  // an address inside torch's tensor, to be prefetched
  int32_t dtype;     // torch's code of it
};

// A list of tensors with their handles. It keeps the tensors, not their memory.
class Handles {
 public:
  // Throws, as `tensors_of` does.
  Handles(PyObject* hold, PyObject* list);
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  ~Handles();

  const Held& operator[](int64_t i) const { return held_[size_t(i)]; }
  int64_t size() const { return int64_t(held_.size()); }

 private:
  PyObject* list_;
  std::vector<Tensor> tensors_;
  std::vector<Held> held_;
};

int32_t dtype_code_of(AtenTensorHandle tensor);

// Does the tensor's memory begin there? Read through the handle, so whatever was done to the tensor shows.
inline bool lies_at(const Held& held, const void* address) {
  void* now = nullptr;
  return aoti_torch_get_data_ptr(held.handle, &now) == AOTI_TORCH_SUCCESS && now == address;
}

}  // namespace wd
