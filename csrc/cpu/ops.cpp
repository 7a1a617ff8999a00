// The CPU backend's operators: schema, checks, choice of instruction set, threads. LibTorch stable ABI only.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../check_launch.h"
#include "kernel.h"

namespace wd {
namespace {

#include "../formats.h"
#include "../rules.h"

#include "../epilogues.h"
#include "../kernels.h"

// Below this many elements a step is done before a second thread would have woken.
constexpr int64_t kSerialBelow = 32768;
// A thread takes so many at once, or more.
constexpr int64_t kTaken = 8192;

struct InstructionSet {
  const char* name;
  bool (*find)(int64_t rule, int64_t variant, int64_t epilogue, const int64_t* formats, int roles, Kernel* found);
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

// A line for every row of kernels.h: the rule's number, the bits of its states, how many they are, its scalars.
std::string rules() {
  using T = double;
  std::string found;
#define WD_ROW(number, bits, ...)                                                                                    \
  found += std::to_string(number) + " " + std::to_string(bits) + " " + std::to_string(__VA_ARGS__::kStates) + ": " + \
           __VA_ARGS__::scalar_names() + "\n";
  WD_EACH_RULE(WD_ROW)
#undef WD_ROW
  return found;
}

// How many elements the chunks have in this step, each of which must name a segment and, through it, a row.
int64_t count_elements(const Launch& launch, int64_t chunks, int64_t segments, int64_t rows) {
  int64_t elements = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t segment = launch.chunks[i] & 0xffffffff, ordinal = launch.chunks[i] >> 32;
    STD_TORCH_CHECK(segment < segments && ordinal >= 0, "step_: chunk ", i, " is of segment ", segment, " of ",
                    segments);
    const Moving& moving = launch.moving[segment];
    STD_TORCH_CHECK(moving.row >= 0 && moving.row < rows, "step_: segment ", segment, " names row ", moving.row, " of ",
                    rows);
    const int64_t rest = moving.numel - ordinal * launch.chunk_size;
    elements += std::max<int64_t>(0, std::min<int64_t>(rest, launch.chunk_size));
  }
  return elements;
}

// Steps the chunks of one bucket; `check_launch` has the shapes. rule, variant and epilogue: rows of kernels.h;
// formats: the FormatCode of parameter, gradient, each state and each output of the epilogue.
void step_(const Tensor chunks, const Tensor places, const Tensor moving, const Tensor control, int64_t chunk_size,
           int64_t rule, int64_t variant, int64_t epilogue, std::vector<int64_t> formats, const Tensor rows) {
  check_roles("step_", formats.size());
  Kernel kernel;
  STD_TORCH_CHECK(chosen_set().find(rule, variant, epilogue, formats.data(), int(formats.size()), &kernel),
                  "step_: no CPU kernel for this rule, this epilogue and these storage formats");
  const Launch launch = check_launch("step_", chunks, places, moving, rows, control, chunk_size, formats.size(),
                                     kernel.width, [](const Tensor& tensor) { return tensor.is_cpu(); });
  const int64_t blocks = chunks.numel();
  const int64_t elements = count_elements(launch, blocks, moving.size(0), rows.size(0));
  if (launch.control->skip != 0 || elements == 0) return;
  if (elements < kSerialBelow) {
    kernel.step_chunks(kernel, launch, 0, blocks);
    return;
  }
  // Whichever thread is free takes of the chunks that are left, many at first, then fewer: one that other processes
  // hold up holds up nobody.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fewest = std::max<int64_t>(1, kTaken * blocks / elements);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first = next.load(); first < blocks;) {
      const int64_t last = std::min(blocks, first + std::max(fewest, (blocks - first) / (2 * threads)));
      if (!next.compare_exchange_weak(first, last)) continue;
      kernel.step_chunks(kernel, launch, first, last);
      first = next.load();
    }
  });
}

}  // namespace
}  // namespace wd

WD_EXPANDED(STABLE_TORCH_LIBRARY, WD_NAMESPACE, m) {
  m.def(
      "step_(Tensor chunks, Tensor places, Tensor moving, Tensor control, int chunk_size, int rule, int variant, "
      "int epilogue, int[] formats, Tensor rows) -> ()");
  m.def("instruction_set() -> str");
  m.def("rules() -> str");
}

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, CPU, m) { m.impl("step_", TORCH_BOX(&wd::step_)); }

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&wd::instruction_set));
  m.impl("rules", TORCH_BOX(&wd::rules));
}
