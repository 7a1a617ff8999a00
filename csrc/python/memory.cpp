#include "memory.h"

#include "tensors.h"

#include <stdexcept>
#include <string>

namespace wd {
namespace {

// A reference that is dropped at the end.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (object == nullptr) throw std::runtime_error("a Python error is set");
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_DECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

Owned attribute(PyObject* object, const char* name) { return Owned(PyObject_GetAttrString(object, name)); }

Owned called(PyObject* object, const char* method) {
  return Owned(PyObject_CallNoArgs(attribute(object, method).get()));
}

// torch.int64, say.
PyObject* dtype_named(const char* name) {
  static PyObject* const torch = PyImport_ImportModule("torch");
  return Owned(PyObject_GetAttrString(torch, name)).get();  // torch keeps it
}

// The same as DLPack has it: its type code, and bits.
int64_t code_of(const char* name) {
  const std::string dtype = name;
  const int64_t type = dtype[0] == 'f' ? 2 : dtype[0] == 'u' ? 1 : 0;
  return type << 8 | std::stoi(dtype.substr(dtype.find_first_of("0123456789")));
}

}  // namespace

int64_t number_of(PyObject* object) {
  const long long number = PyLong_AsLongLong(object);
  if (number == -1 && PyErr_Occurred()) throw std::runtime_error("a Python error is set");
  return number;
}

Memory memory_of(PyObject* tensor, const char* name, const char* dtype, int64_t columns) {
  Memory found{};
  int64_t dims = 0, sizes[2] = {};
  bool fine = false;
  DLTensor lent;
  if (read(tensor, &lent)) {
    constexpr int32_t kCPU = 1;
    dims = lent.ndim;
    fine = lent.device_type == kCPU && dtype_of(lent) == code_of(dtype);
    int64_t expected = 1;
    for (int64_t d = dims; d-- > 0; expected *= lent.shape[d]) {
      fine = fine && (lent.shape[d] == 1 || expected == 0 || lent.strides[d] == expected);
      if (d < 2) sizes[d] = lent.shape[d];
    }
    found.at = address(lent);
  } else {
    fine = called(tensor, "is_contiguous").get() == Py_True && attribute(tensor, "is_cpu").get() == Py_True &&
           attribute(tensor, "dtype").get() == dtype_named(dtype);
    const Owned shape = attribute(tensor, "shape"), at = called(tensor, "data_ptr");
    dims = PyTuple_Size(shape.get());
    for (Py_ssize_t d = 0; d < 2 && d < dims; ++d) sizes[d] = number_of(PyTuple_GetItem(shape.get(), d));
    found.at = PyLong_AsVoidPtr(at.get());
  }
  if (!fine) throw std::runtime_error(std::string(name) + " must be a contiguous CPU tensor of " + dtype);
  if (columns == 0 ? dims != 1 : dims != 2 || (columns > 0 && sizes[1] != columns))
    throw std::runtime_error(std::string(name) + " must have " +
                             (columns == 0  ? "one dimension"
                              : columns < 0 ? "two dimensions"
                                            : std::to_string(columns) + " columns"));
  found.rows = sizes[0];
  found.columns = columns == 0 ? 0 : sizes[1];
  return found;
}

}  // namespace wd
