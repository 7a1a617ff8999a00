// A test build of the CUDA kernels for the CPU: the grid as plain loops. It executes the source that the GPU does,
// indexing, tails, table and formats (but the two conversions of float16, an instruction each there), and nobody
// installs it.

#include "chunk.h"

namespace wd {
namespace cuda {

namespace {

using StepChunk = void (*)(const Launch& launch, int64_t block);

template <class Rule, class P, class G, class S, class E>
struct Step {
  static const void* entry() { return reinterpret_cast<const void*>(&step_chunk<Rule, P, G, S, E>); }
};

}  // namespace

const Kernel* find(int64_t rule, int64_t variant, int64_t epilogue, const int64_t* formats, int roles) {
  return find_kernel<Step>(rule, variant, epilogue, formats, roles);
}

const char* load(const Kernel*) { return nullptr; }

const char* launch(const Kernel* kernel, int64_t blocks, const Launch& what, void*) {
  if (blocks <= 0 || blocks > 0x7fffffff) return "invalid configuration argument";  // as CUDA says
  for (int64_t block = blocks - 1; block >= 0; --block)  // in an order that no device takes: none is promised
    reinterpret_cast<StepChunk>(kernel->entry)(what, block);
  return nullptr;
}

}  // namespace cuda
}  // namespace wd
