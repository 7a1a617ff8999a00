// The CUDA backend's operators: schema, checks, launch. LibTorch stable ABI only. on_cpu.cpp's build has them too, for
// CPU tensors (WD_ON_CPU).

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <string>
#include <vector>

#include "device.h"

#ifndef WD_ON_CPU  // in libtorch_cuda.so; a torch without CUDA lacks it, and its tensors never come here
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace wd {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef WD_ON_CPU
#define WD_DEVICE CPU
bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }
class Device {
 public:
  explicit Device(int64_t) {}
  void* stream() const { return nullptr; }
};
#else
#define WD_DEVICE CUDA
bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }
// Makes a device the current one meanwhile.
class Device {
 public:
  explicit Device(int64_t index) : index_(int32_t(index)), guard_(index_) {}
  void* stream() const {  // torch's current one there
    void* found = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is built without CUDA");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &found) == AOTI_TORCH_SUCCESS,
                    "torch has no current stream on cuda:", index_);
    return found;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t columns, int32_t device) {
  STD_TORCH_CHECK(
      is_here(tensor) && tensor.get_device_index() == device && tensor.is_contiguous() && tensor.scalar_type() == dtype,
      "cuda_step_: ", name,
      " must be a contiguous tensor on the device of chunks, int64 or, for rows and control, float64");
  STD_TORCH_CHECK(columns == 0 ? tensor.dim() == 1 : tensor.dim() == 2 && tensor.size(1) == columns,
                  "cuda_step_: ", name, " must have ",
                  columns == 0 ? std::string("one dimension") : std::to_string(columns) + " columns");
}

const Kernel* known(int64_t rule, const std::vector<int64_t>& formats) {
  STD_TORCH_CHECK(formats.size() >= kState && formats.size() <= kState + 3, "formats must name 2 to 5 roles");
  const Kernel* kernel = find(rule, formats.data(), int(formats.size()));
  STD_TORCH_CHECK(kernel != nullptr, "there is no CUDA kernel for this rule and these storage formats");
  return kernel;
}

// Steps the chunks of one bucket, on torch's current stream of their device, without waiting.
//   chunks    int64 [c], `Chunk` of records.py;  places, moving: int64 [n, 4], `Place` and `Moving` by segment
//   rows      float64 [r, width], the scalars;  control: float64 [2], grad_factor and skip
//   rule      RuleCode;  formats: FormatCode of parameter, gradient and each state
void step_(const Tensor chunks, const Tensor places, const Tensor moving, const Tensor rows, const Tensor control,
           int64_t chunk_size, int64_t rule, std::vector<int64_t> formats) {
  const int32_t device = chunks.get_device_index();
  const int64_t width = rule == kAdamW ? kAdamWRow : kSGDWRow;
  check(chunks, "chunks", ScalarType::Long, 0, device);
  check(places, "places", ScalarType::Long, sizeof(Place) / sizeof(int64_t), device);
  check(moving, "moving", ScalarType::Long, sizeof(Moving) / sizeof(int64_t), device);
  check(rows, "rows", ScalarType::Double, width, device);
  check(control, "control", ScalarType::Double, 0, device);
  STD_TORCH_CHECK(control.numel() == 2, "cuda_step_: control must hold grad_factor and skip");
  STD_TORCH_CHECK(chunk_size > 0 && chunk_size % 1024 == 0 && chunk_size <= std::numeric_limits<int32_t>::max() / 2,
                  "cuda_step_: chunk_size=", chunk_size, ": expected a multiple of 1024");
  const int64_t blocks = chunks.numel();
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "cuda_step_: ", blocks, " chunks are too many");
  const Kernel* kernel = known(rule, formats);
  if (blocks == 0) return;

  const Launch what{static_cast<const int64_t*>(chunks.const_data_ptr()),
                    static_cast<const Place*>(places.const_data_ptr()),
                    static_cast<const Moving*>(moving.const_data_ptr()),
                    static_cast<const double*>(rows.const_data_ptr()),
                    static_cast<const Control*>(control.const_data_ptr()),
                    int32_t(width),
                    int32_t(chunk_size)};
  const Device current(device);
  const char* wrong = launch(kernel, blocks, what, current.stream());
  STD_TORCH_CHECK(wrong == nullptr, "a step on cuda:", device, " could not be launched: ", wrong);
}

// Brings a kernel to a device, where that fails before a step is begun; says why it cannot be, or "".
std::string load_on(int64_t device, int64_t rule, std::vector<int64_t> formats) {
  const Kernel* kernel = known(rule, formats);
  const Device current(device);
  const char* wrong = load(kernel);
  return wrong == nullptr ? "" : wrong;
}

std::string built() { return WD_BUILT; }

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", "CUDA kernels of wd_kernels.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace cuda
}  // namespace wd

WD_EXPANDED(STABLE_TORCH_LIBRARY_FRAGMENT, WD_NAMESPACE, m) {
  m.def(
      "cuda_step_(Tensor chunks, Tensor places, Tensor moving, Tensor rows, Tensor control, int chunk_size, int rule, "
      "int[] formats) -> ()");
  m.def("cuda_load(int device, int rule, int[] formats) -> str");
  m.def("cuda_built() -> str");
}

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, WD_DEVICE, m) {
  m.impl("cuda_step_", TORCH_BOX(&wd::cuda::step_));
}

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_load", TORCH_BOX(&wd::cuda::load_on));
  m.impl("cuda_built", TORCH_BOX(&wd::cuda::built));
}

// The operators are registered when the library is loaded: there is nothing else in the module.
PyMODINIT_FUNC PyInit__cuda(void) { return PyModule_Create(&wd::cuda::module); }
