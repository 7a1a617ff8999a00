// Handles of tensors: a step reads an address through one in a few nanoseconds, where DLPack takes forty. And how
// tensors are kept, or their memory.
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

// A tensor that is looked at in every step. It is not kept: whoever has the list does that, where the garbage collector
// sees it.
struct Held {
  PyObject* object;
  AtenTensorHandle handle;  // the object's own (`handle_of`): what is read is what it is now
  const char* near;         // an address inside torch's tensor, to be prefetched
  int32_t dtype;            // torch's code of it
};

// Of a list of tensors. Throws where one is of another type.
std::vector<Held> held_of(PyObject* list);

// Has it the negative or the conjugate bit, or so many dimensions that it might have?
bool lazy(const Held& held);

int32_t dtype_code_of(AtenTensorHandle tensor);

// Does the tensor's memory begin there? Read through the handle, so whatever was done to the tensor shows.
inline bool lies_at(const Held& held, const void* address) {
  void* now = nullptr;
  return aoti_torch_get_data_ptr(held.handle, &now) == AOTI_TORCH_SUCCESS && now == address;
}

}  // namespace wd
