// The records that the native code and Python share, by position.
//
// `Segment` is one tensor of the table: an address per role, the tensor's place in the bucket's virtual flat index
// space, and the row that holds its scalars. `wd_kernels/table.py` writes it as 12 int64 words; a change here is a
// change there. Addresses 5 to 7 are kept for the companions of a role (remainders, scales).
#pragma once

#include <cstdint>

// The operators' namespace in torch.ops: a build that vendors this package chooses another.
#ifndef WD_NAMESPACE
#define WD_NAMESPACE wd_kernels
#endif
// Expands it before torch's macros see it: those of torch 2.10 take a name as it is written.
#define WD_EXPANDED(macro, ...) macro(__VA_ARGS__)
#define WD_LITERAL(x) #x
#define WD_TEXT(x) WD_LITERAL(x)

namespace wd {

enum Role : int { kParam = 0, kGrad = 1, kState = 2, kRoles = 8 };

struct Segment {
  void* address[kRoles];
  int64_t start;    // first index in the bucket's flat space
  int64_t numel;    // elements in this step: 0 without a gradient
  int64_t row;      // index into the matrix of scalar rows
  int64_t aligned;  // 1: every address is a multiple of 16 bytes
};
static_assert(sizeof(Segment) == 12 * sizeof(int64_t), "table.py writes 12 words a segment");

// What a device has of a segment: for many steps, and what a step may change. `records.py` picks the same words.
struct Place {
  void* param;
  void* state[3];
};
struct Moving {
  void* grad;
  int64_t numel;
  int64_t row;
  int64_t aligned;
};
static_assert(sizeof(Place) == 4 * sizeof(int64_t) && sizeof(Moving) == 4 * sizeof(int64_t), "mirror.py sends 4 words");

// What every launch reads from memory besides its table and rows.
struct Control {
  double grad_factor;
  double skip;
};

enum RuleCode : int64_t { kAdamW = 0, kSGDW = 1 };
constexpr int64_t kAdamWRow = 13, kSGDWRow = 10;  // scalars in a row, as rules.py writes them

// The storage format of one role. `storage.py` holds the same codes.
enum FormatCode : int64_t { kAbsent = 0, kFloat64 = 1, kFloat32 = 2, kBFloat16 = 3, kFloat16 = 4 };

// What a mover is given: a range of segments, and the scalars.
struct Plan {
  const Segment* segments;
  int64_t count;
  const double* rows;
  int64_t row_width;
  double grad_factor;
};

// Steps the elements [begin, end) of the plan's flat index space.
using Mover = void (*)(const Plan& plan, int64_t begin, int64_t end);

}  // namespace wd
