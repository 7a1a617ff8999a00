// The kernels for GPUs: chunk.h as one block's threads, and how they are launched.

#include <cuda_runtime_api.h>

#include "begin.h"

namespace wd {
namespace cuda {
namespace {

// Blocks that a multiprocessor is to hold at once, which bounds a thread's registers: so many that enough bytes are on
// their way, so few that none is spilled (`make codegen`). First by the roles.
template <class Rule, class P, class G, class S, class E>
constexpr int resident_by_roles() {
  constexpr int size = sizeof(typename P::Memory);
  constexpr int held = Rule::kStates > 1 ? Rule::kStates : Rule::kStates + E::kOutputs;
  if (held > 1) return size == 8 ? 4 : 8 - held - (P::kStochastic || S::kStochastic);
#if __CUDA_ARCH__ >= 1000
  if (held == 1 && S::kStochastic && size == 4) return 7;
#endif
  if (held == 1) return size == 8 ? 6 : 8;
#if __CUDA_ARCH__ >= 1000  // more bytes, and a compiler that needs fewer registers
  if (sizeof(typename P::Memory) + sizeof(typename G::Memory) == 4) return 16;
#endif
  return size == 8 ? 8 : 12;
}

// What an epilogue makes of a block takes registers of every rule, however few are its roles: marks leave 8 blocks at
// most, numbers one fewer; of float64 5, numbers 3.
template <class Rule, class P, class G, class S, class E>
constexpr int resident() {
  constexpr bool has_numbers = numbers_of<E>() > 0;
  constexpr int by_roles = resident_by_roles<Rule, P, G, S, E>();
  if (!has_numbers && !E::kMarks) return by_roles;
  if (sizeof(typename P::Memory) == 8) return has_numbers ? 3 : by_roles < 5 ? by_roles : 5;
  return (by_roles < 8 ? by_roles : 8) - has_numbers;
}

template <class Rule, class P, class G, class S, class E>
__global__ void __launch_bounds__(kThreads, (resident<Rule, P, G, S, E>())) step_kernel(const Launch launch) {
  step_chunk<Rule, P, G, S, E>(launch, blockIdx.x);
}

template <class Rule, class P, class G, class S, class E>
struct Step {
  static const void* entry() { return reinterpret_cast<const void*>(&step_kernel<Rule, P, G, S, E>); }
};

template <class T, class G, bool kAccumulates>
__global__ void __launch_bounds__(kThreads) squares_kernel(const Launch launch, int64_t copies, int64_t stride) {
  sum_gradients<T, G, kAccumulates>(launch, blockIdx.x, copies, stride);
}

template <class T, class G, bool kAccumulates>
struct Squares {
  static const void* entry() { return reinterpret_cast<const void*>(&squares_kernel<T, G, kAccumulates>); }
};

template <class Rule>
__global__ void __launch_bounds__(kThreads) begin_kernel(const Begin begin) {
  begin_step<Rule>(begin);
}

template <class Rule>
struct BeginStep {
  static const void* entry() { return reinterpret_cast<const void*>(&begin_kernel<Rule>); }
};

const char* wrong(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const Kernel* find(int64_t rule, int64_t variant, int64_t epilogues, const int64_t* formats, int roles) {
  return find_kernel<Step>(rule, variant, epilogues, formats, roles);
}

const void* find_squares(int64_t param, int64_t grad, bool accumulates) {
  return find_sum<Squares>(param, grad, accumulates);
}

const BeginKernel* find_begin(int64_t rule) { return find_begin_with<BeginStep>(rule); }

const char* load(const void* entry) {
  cudaFuncAttributes attributes;
  return wrong(cudaFuncGetAttributes(&attributes, entry));
}

const char* launch_squares(const void* entry, int64_t blocks, const Launch& what, int64_t copies, int64_t stride,
                           void* stream) {
  void* arguments[] = {const_cast<Launch*>(&what), &copies, &stride};
  const dim3 grid{static_cast<unsigned>(blocks)}, block{kThreads};
  return wrong(cudaLaunchKernel(entry, grid, block, arguments, 0, static_cast<cudaStream_t>(stream)));
}

const char* launch_begin(const void* entry, const Begin& what, void* stream) {
  void* arguments[] = {const_cast<Begin*>(&what)};
  const dim3 grid{1}, block{kThreads};
  return wrong(cudaLaunchKernel(entry, grid, block, arguments, 0, static_cast<cudaStream_t>(stream)));
}

const char* launch(const Kernel* kernel, int64_t blocks, const Launch& what, void* stream) {
  void* arguments[] = {const_cast<Launch*>(&what)};
  const dim3 grid{static_cast<unsigned>(blocks)}, block{kThreads};
  return wrong(cudaLaunchKernel(kernel->entry, grid, block, arguments, 0, static_cast<cudaStream_t>(stream)));
}

}  // namespace cuda
}  // namespace wd
