// A launch on the CPU: prepared once, run with the rows of each step.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace wd {
namespace cpu {

struct Plan {
  Kernel kernel;
  Launch launch;  // but for its rows, and how far apart they are
  int64_t chunks, segments;
};

// The kernel for a rule with its states, epilogues and formats. Throws where there is none.
Kernel find(int64_t rule, int64_t variant, int64_t epilogues, const std::vector<int64_t>& formats);

// The elements that a plan steps with so many rows. Throws where a chunk names no segment, or a segment no row.
int64_t count_elements(const Plan& plan, int64_t rows);

// Steps them, with rows that have so many scalars, or more than the kernel wants. Nothing here fails.
void run(const Plan& plan, const double* rows, int64_t row_width, int64_t elements);

// Throws unless what every segment's squares are added to is one of so many rows of exact sums.
void check_sums(const Plan& plan, const int64_t* sums, int64_t rows);

// Adds the squares of the gradients to them; or the gradients to what lies in the place of parameters, and its squares.
// Nothing here fails.
void sum_squares(const Plan& plan, int64_t elements);
void accumulate(const Plan& plan, int64_t elements);

// From now on in this process no second thread takes part: those of OpenMP did not come along in a fork.
void be_serial();

std::string instruction_set();
std::string rules();

}  // namespace cpu
}  // namespace wd
