// What the check of every step and Python share, by position.
#pragma once

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdint>

#include "table.h"

namespace wd {

enum Kind : int64_t { kOrdinary = 0, kSpecial = 1, kUnseen = 2 };

// What table.py expects of one parameter: 12 int64 words.
struct Expected {
  int64_t kind, segment, numel, dims, ndim, param_dtype, grad_dtype, state_dtype, device, aligned, group, states;
};
static_assert(sizeof(Expected) == 12 * sizeof(int64_t), "table.py writes 12 words a parameter");

// assign.cpp
PyObject* assign(PyObject* module, PyObject* args);

}  // namespace wd
