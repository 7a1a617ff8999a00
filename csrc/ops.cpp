// The operators: schema, checks, choice of instruction set, registration. LibTorch stable ABI only.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "table.h"

namespace wd {

// One per file of cpu/.
namespace baseline {
Mover find(int64_t rule, const int64_t* formats, int roles);
}
#if defined(__x86_64__)
namespace avx2 {
Mover find(int64_t rule, const int64_t* formats, int roles);
}
namespace avx512 {
Mover find(int64_t rule, const int64_t* formats, int roles);
}
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements a step is done before a second thread would have woken.
constexpr int64_t kSerialBelow = 32768;

struct InstructionSet {
  const char* name;
  Mover (*find)(int64_t rule, const int64_t* formats, int roles);
  bool present;
};

const std::vector<InstructionSet>& instruction_sets() {  // best first
  static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
      {"avx512", avx512::find,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
      {"avx2", avx2::find, bool(__builtin_cpu_supports("avx2"))},
#endif
      {"baseline", baseline::find, true},
  };
  return sets;
}

const InstructionSet& chosen_set() {
  const char* forced = std::getenv("WD_KERNELS_ISA");
  const bool free_choice = forced == nullptr || *forced == '\0';
  for (const InstructionSet& set : instruction_sets()) {
    if (free_choice ? !set.present : std::strcmp(forced, set.name) != 0) continue;
    STD_TORCH_CHECK(set.present, "WD_KERNELS_ISA=", forced, ": this processor does not have that instruction set");
    return set;
  }
  STD_TORCH_CHECK(false, "WD_KERNELS_ISA=", forced, ": unknown here; allowed: avx512, avx2 (x86-64 only), baseline");
}

std::string instruction_set() { return chosen_set().name; }

void check_host(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype, "step_: ", name,
                  " must be a contiguous CPU tensor of the dtype that the schema's documentation names");
}

// Steps the segments [first, first + count) of a table.
//   segments  int64 [n, 12], a row is a `Segment`
//   rows      float64 [r, width], the scalars; segments name their row
//   control   float64 [2], grad_factor and skip
//   rule      RuleCode;  formats: FormatCode of parameter, gradient and each state
void step_(const Tensor segments, const Tensor rows, const Tensor control, int64_t rule, std::vector<int64_t> formats,
           int64_t first, int64_t count) {
  check_host(segments, "segments", ScalarType::Long);
  check_host(rows, "rows", ScalarType::Double);
  check_host(control, "control", ScalarType::Double);
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) * int64_t(sizeof(int64_t)) == int64_t(sizeof(Segment)),
                  "step_: segments must have shape [n, 12]");
  STD_TORCH_CHECK(formats.size() >= kState && formats.size() <= kState + 3, "step_: formats must name 2 to 5 roles");
  const Mover mover = chosen_set().find(rule, formats.data(), int(formats.size()));
  STD_TORCH_CHECK(mover != nullptr, "step_: no CPU kernel for this rule and these storage formats");
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == (rule == kAdamW ? kAdamWRow : kSGDWRow),
                  "step_: rows must have shape [r, 13] for AdamW, [r, 10] for SGDW");
  STD_TORCH_CHECK(control.numel() == 2, "step_: control must hold grad_factor and skip");
  STD_TORCH_CHECK(first >= 0 && first <= segments.size(0) && count >= 0 && count <= segments.size(0) - first,
                  "step_: ", count, " segments from ", first, " of ", segments.size(0), " do not exist");
  if (count == 0) return;

  const auto* table = static_cast<const Segment*>(segments.const_data_ptr()) + first;
  const auto* switches = static_cast<const Control*>(control.const_data_ptr());
  const Plan plan{table, count, static_cast<const double*>(rows.const_data_ptr()), rows.size(1), switches->grad_factor};
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(table[i].row >= 0 && table[i].row < rows.size(0), "step_: segment ", first + i, " names row ",
                    table[i].row, " of ", rows.size(0));
  const int64_t total = table[count - 1].start + table[count - 1].numel;

  if (switches->skip != 0 || total == 0) return;
  if (total < kSerialBelow)
    mover(plan, 0, total);
  else
    torch::stable::parallel_for(0, total, kSerialBelow / 2,
                                [&](int64_t begin, int64_t end) { mover(plan, begin, end); });
}

}  // namespace
}  // namespace wd

WD_EXPANDED(STABLE_TORCH_LIBRARY, WD_NAMESPACE, m) {
  m.def("step_(Tensor segments, Tensor rows, Tensor control, int rule, int[] formats, int first, int count) -> ()");
  m.def("instruction_set() -> str");
}

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, CPU, m) { m.impl("step_", TORCH_BOX(&wd::step_)); }

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&wd::instruction_set));
}
