// A step on the CPU as its operator sees it: chosen once, given chunks to step.
#pragma once

#include "../layout.h"

namespace wd {

constexpr int kMaxEpilogues = 4;

struct Kernel {
  const void* rule;  // of the instruction set's own types, as are epilogues and formats
  const void* epilogues[kMaxEpilogues];
  const void* formats[kMaxRoles];
  int64_t sizes[kMaxRoles];  // bytes of kScaled elements of each role, and of each part
  int part_of[kMaxRoles];    // where among these the part of a role is; of a role without, its own place
  int of_epilogues;          // how many there are
  int roles, parts;
  int width;         // scalars in a row, at least
  int numbers;       // that epilogues have of a block
  int sees;          // what they read of an element (epilogues.h)
  bool reads_after;  // one of them reads the parameter as it is now stored
  bool marks;        // one of them marks what has changed
  bool random;       // some role is rounded by random bits
  void (*fused)();   // the loop of these formats, if they have one of their own
  // Steps the chunks [first, last) of a launch.
  void (*step_chunks)(const Kernel& kernel, const Launch& launch, int64_t first, int64_t last);
  // Adds the squares of their gradients to the exact sums at their places' kOutput.
  void (*sum_squares)(const Kernel& kernel, const Launch& launch, int64_t first, int64_t last);
  // Adds the gradients to what lies in the place of parameters, in the arithmetic type, and the squares of that
  // likewise. Where a segment's row is not 0, nothing is there yet.
  void (*accumulate)(const Kernel& kernel, const Launch& launch, int64_t first, int64_t last);
};

// The kernel for a rule with its states, epilogues (the bits of their codes), and the format of every role (parameter,
// gradient, states, outputs of the epilogues, then the parts of these); false where there is none. One for each file of
// this directory.
namespace baseline {
bool find(int64_t rule, int64_t variant, int64_t epilogues, const int64_t* formats, int roles, Kernel* found);
}
#if defined(__x86_64__)
namespace avx2 {
bool find(int64_t rule, int64_t variant, int64_t epilogues, const int64_t* formats, int roles, Kernel* found);
}
namespace avx512 {
bool find(int64_t rule, int64_t variant, int64_t epilogues, const int64_t* formats, int roles, Kernel* found);
}
#endif

}  // namespace wd
