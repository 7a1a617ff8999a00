// A test build of the CUDA kernels for the CPU: the grid as plain loops. It executes the source that the GPU does,
// indexing, tails, table and formats (but the two conversions of float16, an instruction each there), and nobody
// installs it.

#include "begin.h"

namespace wd {
namespace cuda {

namespace {

using StepChunk = void (*)(const Launch& launch, int64_t block);

template <class Rule, class P, class G, class S, class E>
struct Step {
  static const void* entry() { return reinterpret_cast<const void*>(&step_chunk<Rule, P, G, S, E>); }
};

using SumSquares = void (*)(const Launch& launch, int64_t block, int64_t copies, int64_t stride);
using BeginStep = void (*)(const Begin& begin);

template <class T, class G, bool kAccumulates>
struct Squares {
  static const void* entry() { return reinterpret_cast<const void*>(&sum_gradients<T, G, kAccumulates>); }
};

template <class Rule>
struct BeginOf {
  static const void* entry() { return reinterpret_cast<const void*>(&begin_step<Rule>); }
};

}  // namespace

const void* find_squares(int64_t param, int64_t grad, bool accumulates) {
  return find_sum<Squares>(param, grad, accumulates);
}

const BeginKernel* find_begin(int64_t rule) { return find_begin_with<BeginOf>(rule); }

const char* launch_squares(const void* entry, int64_t blocks, const Launch& what, int64_t copies, int64_t stride,
                           void*) {
  if (blocks <= 0 || blocks > 0x7fffffff) return "invalid configuration argument";
  for (int64_t block = blocks - 1; block >= 0; --block)
    reinterpret_cast<SumSquares>(entry)(what, block, copies, stride);
  return nullptr;
}

const char* launch_begin(const void* entry, const Begin& what, void*) {
  reinterpret_cast<BeginStep>(entry)(what);
  return nullptr;
}

const Kernel* find(int64_t rule, int64_t variant, int64_t epilogues, const int64_t* formats, int roles) {
  return find_kernel<Step>(rule, variant, epilogues, formats, roles);
}

const char* load(const void*) { return nullptr; }

const char* launch(const Kernel* kernel, int64_t blocks, const Launch& what, void*) {
  if (blocks <= 0 || blocks > 0x7fffffff) return "invalid configuration argument";  // as CUDA says
  for (int64_t block = blocks - 1; block >= 0; --block)  // in an order that no device takes: none is promised
    reinterpret_cast<StepChunk>(kernel->entry)(what, block);
  return nullptr;
}

}  // namespace cuda
}  // namespace wd
