// A table's own tensors as native code sees them: an address and lengths, checked once.
#pragma once

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdint>
#include <exception>

namespace wd {

struct Memory {
  void* at;
  int64_t rows, columns;  // of one dimension: `columns` is 0
  int64_t elements() const { return columns == 0 ? rows : rows * columns; }
  template <class T>
  T* as() const {
    return static_cast<T*>(at);
  }
};

// Reads a CPU tensor of one or two dimensions. Throws, with its name, unless it is contiguous, of that dtype ("int64")
// and has so many columns (0: one dimension; -1: as many as there are).
Memory memory_of(PyObject* tensor, const char* name, const char* dtype, int64_t columns);

// The numbers of a list or tuple. Throws for what is none.
int64_t number_of(PyObject* object);

// Calls `f`; what it throws becomes a RuntimeError, or stays the Python error that is set.
template <class F>
PyObject* guarded(const F& f) {
  try {
    return f();
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace wd
