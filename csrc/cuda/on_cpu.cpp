// A test build of the CUDA kernels for the CPU: the grid as plain loops. It executes the source that the GPU does,
// indexing, tails, table and formats (but the two conversions of float16, an instruction each there), and nobody
// installs it.

#include "chunk.h"

namespace wd {
namespace cuda {

struct Kernel {
  void (*step_chunk)(const Launch& launch, int64_t block, int thread);
};

namespace {

template <class Rule, class P, class G, class S>
struct Step {
  static const Kernel* kernel() {
    static constexpr Kernel found = {step_chunk<Rule, P, G, S>};
    return &found;
  }
};

}  // namespace

const Kernel* find(int64_t rule, const int64_t* formats, int roles) { return kernel_of<Step>(rule, formats, roles); }

const char* load(const Kernel*) { return nullptr; }

const char* launch(const Kernel* kernel, int64_t blocks, const Launch& what, void*) {
  if (blocks <= 0 || blocks > 0x7fffffff) return "invalid configuration argument";  // as CUDA says
  for (int64_t block = blocks - 1; block >= 0; --block)  // in an order that no device takes: none is promised
    for (int thread = kThreads - 1; thread >= 0; --thread) kernel->step_chunk(what, block, thread);
  return nullptr;
}

}  // namespace cuda
}  // namespace wd
