// The CUDA backend's operators: schema, checks, launch. LibTorch stable ABI only. on_cpu.cpp's build has them too, for
// CPU tensors (WD_ON_CPU).

#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <random>

#include "check_launch.h"
#include "device.h"

#ifndef WD_ON_CPU  // in libtorch_cuda.so; a torch without CUDA lacks it, and its tensors never come here
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace wd {
namespace cuda {
namespace {

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

// Who steps has it from the module, and so is this package: a table is addresses, which cannot be checked. Another one
// in every process, so that no program that was written down has it.
int64_t token() {
  static const int64_t made = [] {
    std::random_device random;
    return int64_t(random() & 0x7fffffff) << 32 | int64_t(random());
  }();
  return made;
}

const Kernel* known(int64_t rule, int64_t variant, int64_t epilogue, const std::vector<int64_t>& formats) {
  check_roles("cuda_step_", formats.size());
  const Kernel* kernel = find(rule, variant, epilogue, formats.data(), int(formats.size()));
  STD_TORCH_CHECK(kernel != nullptr, "there is no CUDA kernel for this rule, this epilogue and these storage formats");
  return kernel;
}

// Steps the chunks of one bucket, on torch's current stream of their device, without waiting; `check_launch` has the
// shapes. rule, variant and epilogue: rows of kernels.h; formats: the FormatCode of parameter, gradient, each state and
// each output of the epilogue.
void step_(int64_t given, const Tensor chunks, const Tensor places, const Tensor moving, const Tensor control,
           int64_t chunk_size, int64_t rule, int64_t variant, int64_t epilogue, std::vector<int64_t> formats,
           const Tensor rows) {
  STD_TORCH_CHECK(given == token(),
                  "cuda_step_ is for this package alone: it steps whatever its addresses name. Call "
                  "an optimizer, or a function of wd_kernels.functional");
  const int32_t device = chunks.get_device_index();
  const Kernel* kernel = known(rule, variant, epilogue, formats);
  const Launch what =
      check_launch("cuda_step_", chunks, places, moving, rows, control, chunk_size, formats.size(), kernel->width,
                   [&](const Tensor& tensor) { return is_here(tensor) && tensor.get_device_index() == device; });
  const int64_t blocks = chunks.numel();
  if (blocks == 0) return;
  const Device current(device);
  const char* wrong = launch(kernel, blocks, what, current.stream());
  STD_TORCH_CHECK(wrong == nullptr, "a step on cuda:", device, " could not be launched: ", wrong);
}

// Brings a kernel to a device, where that fails before a step is begun; says why it cannot be, or "".
std::string load_on(int64_t device, int64_t rule, int64_t variant, int64_t epilogue, std::vector<int64_t> formats) {
  const Kernel* kernel = known(rule, variant, epilogue, formats);
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
      "cuda_step_(int token, Tensor chunks, Tensor places, Tensor moving, Tensor control, int chunk_size, int rule, "
      "int variant, "
      "int epilogue, int[] formats, Tensor rows) -> ()");
  m.def("cuda_load(int device, int rule, int variant, int epilogue, int[] formats) -> str");
  m.def("cuda_built() -> str");
}

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, WD_DEVICE, m) {
  m.impl("cuda_step_", TORCH_BOX(&wd::cuda::step_));
}

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_load", TORCH_BOX(&wd::cuda::load_on));
  m.impl("cuda_built", TORCH_BOX(&wd::cuda::built));
}

// The operators are registered when the library is loaded.
PyMODINIT_FUNC PyInit__cuda(void) {
  PyObject* const made = PyModule_Create(&wd::cuda::module);
  PyObject* const token = PyLong_FromLongLong(wd::cuda::token());
  if (made != nullptr && token != nullptr && PyModule_AddObjectRef(made, "TOKEN", token) == 0) {
    Py_DECREF(token);
    return made;
  }
  Py_XDECREF(token);
  Py_XDECREF(made);
  return nullptr;
}
