// What the operators ask of a device: kernels.cu answers for GPUs, on_cpu.cpp with plain loops for tests.
#pragma once

#include "../layout.h"

namespace wd {
namespace cuda {

struct Kernel {
  const void* entry;
  int roles, width;  // scalars in a row
  int states, refers;
  int64_t formats[3];  // of the states
};

// What begins steps: its code, the scalars of the rows that it makes, the settings of a group that it reads.
struct BeginKernel {
  const void* entry;
  int64_t width, settings;
};

// The kernel for a rule with its states, epilogues, and the formats of its roles (parameter, gradient, states,
// outputs of the epilogues, then the parts of these), or null where there is none.
const Kernel* find(int64_t rule, int64_t variant, int64_t epilogues, const int64_t* formats, int roles);

// The code that adds up the squares of gradients of a format, beside parameters of another, or of what these are added
// to, and what begins the steps of a rule; null where there is none.
const void* find_squares(int64_t param, int64_t grad, bool accumulates);
const BeginKernel* find_begin(int64_t rule);
// `copies` of the sums, `stride` words apart, are added to by turns.
const char* launch_squares(const void* entry, int64_t blocks, const Launch& what, int64_t copies, int64_t stride,
                           void* stream);
const char* launch_begin(const void* entry, const Begin& what, void* stream);

// Both act on the current device and say what went wrong, null if nothing did. `load` brings a kernel there; `launch`
// steps `blocks` chunks, and does not wait.
const char* load(const void* entry);
const char* launch(const Kernel* kernel, int64_t blocks, const Launch& what, void* stream);

}  // namespace cuda
}  // namespace wd
