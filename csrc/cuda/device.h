// What the operators ask of a device: kernels.cu answers for GPUs, on_cpu.cpp with plain loops for tests.
#pragma once

#include <cstdint>

#include "../table.h"

namespace wd {
namespace cuda {

// What a launch is given; all of it lies on the device.
struct Launch {
  const int64_t* chunks;
  const Place* places;
  const Moving* moving;
  const double* rows;
  const Control* control;
  int32_t row_width;
  int32_t chunk_size;
};

struct Kernel;

// The kernel for a rule and the formats of its roles (parameter, gradient, states), or null where there is none.
const Kernel* find(int64_t rule, const int64_t* formats, int roles);

// Both act on the current device and say what went wrong, null if nothing did. `load` brings a kernel there; `launch`
// steps `blocks` chunks, and does not wait.
const char* load(const Kernel* kernel);
const char* launch(const Kernel* kernel, int64_t blocks, const Launch& what, void* stream);

}  // namespace cuda
}  // namespace wd
