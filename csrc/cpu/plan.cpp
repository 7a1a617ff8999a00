// The CPU backend: choice of instruction set and kernel, checks, threads.
#include "plan.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace wd {
namespace cpu {
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
  bool (*find)(int64_t rule, int64_t variant, int64_t epilogues, const int64_t* formats, int roles, Kernel* found);
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

bool serial = false;

}  // namespace

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

Kernel find(int64_t rule, int64_t variant, int64_t epilogues, const std::vector<int64_t>& formats) {
  STD_TORCH_CHECK(formats.size() >= kState && formats.size() <= size_t(kMaxRoles), "formats must name 2 to ", kMaxRoles,
                  " roles");
  Kernel kernel;
  STD_TORCH_CHECK(chosen_set().find(rule, variant, epilogues, formats.data(), int(formats.size()), &kernel),
                  "there is no CPU kernel for this rule, these epilogues and these storage formats");
  return kernel;
}

int64_t count_elements(const Plan& plan, int64_t rows) {
  const Launch& launch = plan.launch;
  int64_t elements = 0;
  for (int64_t i = 0; i < plan.chunks; ++i) {
    const int64_t segment = launch.chunks[i] & 0xffffffff, ordinal = launch.chunks[i] >> 32;
    STD_TORCH_CHECK(segment < plan.segments && ordinal >= 0, "chunk ", i, " is of segment ", segment, " of ",
                    plan.segments);
    const Moving& moving = launch.moving[segment];
    STD_TORCH_CHECK(moving.row >= 0 && moving.row < rows, "segment ", segment, " names row ", moving.row, " of ", rows);
    const int64_t rest = moving.numel - ordinal * launch.chunk_size;
    elements += std::max<int64_t>(0, std::min<int64_t>(rest, launch.chunk_size));
  }
  return elements;
}

namespace {

using Chunks = void (*)(const Kernel& kernel, const Launch& launch, int64_t first, int64_t last);

void on_threads(Chunks work, const Plan& plan, const Launch& launch, int64_t elements) {
  const Kernel& kernel = plan.kernel;
  const int64_t chunks = plan.chunks;
  const int64_t threads = serial || elements < kSerialBelow ? 1 : int64_t(torch::stable::get_num_threads());
  if (threads == 1) {
    work(kernel, launch, 0, chunks);
    return;
  }
  // Whichever thread is free takes of the chunks that are left, many at first, then fewer: one that other processes
  // hold up holds up nobody.
  const int64_t fewest = std::max<int64_t>(1, kTaken * chunks / elements);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first = next.load(); first < chunks;) {
      const int64_t last = std::min(chunks, first + std::max(fewest, (chunks - first) / (2 * threads)));
      if (!next.compare_exchange_weak(first, last)) continue;
      work(kernel, launch, first, last);
      first = next.load();
    }
  });
}

}  // namespace

void run(const Plan& plan, const double* rows, int64_t row_width, int64_t elements) {
  Launch launch = plan.launch;
  launch.rows = rows, launch.row_width = int32_t(row_width);
  if (launch.control->skip == 0 && elements != 0) on_threads(plan.kernel.step_chunks, plan, launch, elements);
}

void check_sums(const Plan& plan, const int64_t* sums, int64_t rows) {
  const Launch& launch = plan.launch;
  for (int64_t i = 0; i < plan.chunks; ++i) {
    const int64_t segment = launch.chunks[i] & 0xffffffff;
    const int64_t offset = launch.places[segment * launch.place_words + kOutput] - reinterpret_cast<int64_t>(sums);
    constexpr int64_t row = kSumWords * int64_t(sizeof(int64_t));
    STD_TORCH_CHECK(offset >= 0 && offset % row == 0 && offset / row < rows, "segment ", segment,
                    " names no sum of its squares");
  }
}

void sum_squares(const Plan& plan, int64_t elements) {
  if (elements != 0) on_threads(plan.kernel.sum_squares, plan, plan.launch, elements);
}

void accumulate(const Plan& plan, int64_t elements) {
  if (elements != 0) on_threads(plan.kernel.accumulate, plan, plan.launch, elements);
}

void be_serial() { serial = true; }

}  // namespace cpu
}  // namespace wd
