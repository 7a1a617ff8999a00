// What the operators ask of a device: kernels.cu answers for GPUs, on_cpu.cpp with plain loops for tests.
#pragma once

#include "../layout.h"

namespace wd {
namespace cuda {

struct Kernel {
  const void* entry;
  int roles, width;  // scalars in a row
  int states;
  int64_t formats[3];  // of the states
};

// The kernel for a rule with its states, an epilogue, and the formats of its roles (parameter, gradient, states,
// outputs of the epilogue, then the parts of these), or null where there is none.
const Kernel* find(int64_t rule, int64_t variant, int64_t epilogue, const int64_t* formats, int roles);

// Both act on the current device and say what went wrong, null if nothing did. `load` brings a kernel there; `launch`
// steps `blocks` chunks, and does not wait.
const char* load(const Kernel* kernel);
const char* launch(const Kernel* kernel, int64_t blocks, const Launch& what, void* stream);

}  // namespace cuda
}  // namespace wd
