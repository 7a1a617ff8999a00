// A step on the CPU as its operator sees it: chosen once, given chunks to step.
#pragma once

#include "../layout.h"

namespace wd {

struct Kernel {
  const void *rule, *epilogue;  // of the instruction set's own types, as are the formats; no epilogue: null
  const void* formats[kMaxRoles];
  int64_t sizes[kMaxRoles];  // bytes of kScaled elements of each role, and of each part
  int part_of[kMaxRoles];    // where among these the part of a role is; of a role without, its own place
  int roles, parts;
  int width;        // scalars in a row
  bool random;      // some role is rounded by random bits
  void (*fused)();  // the loop of these formats, if they have one of their own
  // Steps the chunks [first, last) of a launch.
  void (*step_chunks)(const Kernel& kernel, const Launch& launch, int64_t first, int64_t last);
  // Adds the squares of their gradients to the exact sums at their places' kOutput.
  void (*sum_squares)(const Kernel& kernel, const Launch& launch, int64_t first, int64_t last);
  // Adds the gradients to what lies in the place of parameters, in the arithmetic type, and the squares of that
  // likewise. Where a segment's row is not 0, nothing is there yet.
  void (*accumulate)(const Kernel& kernel, const Launch& launch, int64_t first, int64_t last);
};

// The kernel for a rule with its states, an epilogue, and the format of every role (parameter, gradient, states,
// outputs of the epilogue, then the parts of these); false where there is none. One for each file of this directory.
namespace baseline {
bool find(int64_t rule, int64_t variant, int64_t epilogue, const int64_t* formats, int roles, Kernel* found);
}
#if defined(__x86_64__)
namespace avx2 {
bool find(int64_t rule, int64_t variant, int64_t epilogue, const int64_t* formats, int roles, Kernel* found);
}
namespace avx512 {
bool find(int64_t rule, int64_t variant, int64_t epilogue, const int64_t* formats, int roles, Kernel* found);
}
#endif

}  // namespace wd
