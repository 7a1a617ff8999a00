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

const Kernel* known(int64_t rule, int64_t variant, int64_t epilogues, const std::vector<int64_t>& formats) {
  check_roles("cuda_step_", formats.size());
  const Kernel* kernel = find(rule, variant, epilogues, formats.data(), int(formats.size()));
  STD_TORCH_CHECK(
      kernel != nullptr,
      "there is no CUDA kernel for this rule, these epilogues and these storage formats, with what its decay "
      "pulls to: backend='triton' is compiled for any");
  return kernel;
}

// Steps the chunks of one bucket, on torch's current stream of their device, without waiting; `check_launch` has the
// shapes. rule and variant: rows of kernels.h; epilogues: bits of theirs; formats: the FormatCode of parameter,
// gradient, each state and each output of the epilogues.
void step_(int64_t given, const Tensor chunks, const Tensor places, const Tensor moving, const Tensor control,
           int64_t chunk_size, int64_t rule, int64_t variant, int64_t epilogues, std::vector<int64_t> formats,
           const Tensor rows) {
  STD_TORCH_CHECK(given == token(),
                  "cuda_step_ is for this package alone: it steps whatever its addresses name. Call "
                  "an optimizer, or a function of wd_kernels.functional");
  const int32_t device = chunks.get_device_index();
  const Kernel* kernel = known(rule, variant, epilogues, formats);
  const Launch what =
      check_launch("cuda_step_", chunks, places, moving, rows, control, chunk_size, formats.size(), kernel->width,
                   [&](const Tensor& tensor) { return is_here(tensor) && tensor.get_device_index() == device; });
  const int64_t blocks = chunks.numel();
  if (blocks == 0) return;
  const Device current(device);
  const char* wrong = launch(kernel, blocks, what, current.stream());
  STD_TORCH_CHECK(wrong == nullptr, "a step on cuda:", device, " could not be launched: ", wrong);
}

const void* squares_of(int64_t param, int64_t grad, bool accumulates) {
  const void* entry = find_squares(param, grad, accumulates);
  STD_TORCH_CHECK(entry != nullptr, "there is no CUDA kernel that adds up squares of these storage formats");
  return entry;
}

const BeginKernel& begin_of(int64_t rule) {
  const BeginKernel* found = find_begin(rule);
  STD_TORCH_CHECK(found != nullptr, "there is no CUDA kernel that begins steps of this rule");
  return *found;
}

// Adds the squares of the gradients of one bucket to the exact sums that its places name; `copies` of these, `stride`
// words apart, are added to by turns. param, grad: their FormatCode. If it `accumulates`, gradients are added to what
// lies in the place of parameters, and the squares are of that.
void squares_(int64_t given, const Tensor chunks, const Tensor places, const Tensor moving, int64_t chunk_size,
              int64_t param, int64_t grad, bool accumulates, int64_t copies, int64_t stride) {
  STD_TORCH_CHECK(given == token(), "cuda_squares_ is for this package alone: it reads whatever its addresses name");
  const int32_t device = chunks.get_device_index();
  const void* entry = squares_of(param, grad, accumulates);
  const Launch what =
      check_table("cuda_squares_", chunks, places, moving, chunk_size, kState,
                  [&](const Tensor& tensor) { return is_here(tensor) && tensor.get_device_index() == device; });
  STD_TORCH_CHECK(copies > 0 && stride >= kSumWords, "cuda_squares_: copies and stride");
  if (chunks.numel() == 0) return;
  const Device current(device);
  const char* wrong = launch_squares(entry, chunks.numel(), what, copies, stride, current.stream());
  STD_TORCH_CHECK(wrong == nullptr, "squares on cuda:", device, " could not be added up: ", wrong);
}

// Begins a step on a device: `Begin` of layout.h, where `tensors` are its pointers, in order.
void begin_(int64_t given, int64_t rule, std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(given == token(), "cuda_begin_ is for this package alone");
  STD_TORCH_CHECK(tensors.size() == 22, "cuda_begin_: 22 tensors");
  const BeginKernel& kernel = begin_of(rule);
  const int32_t device = tensors[0].get_device_index();
  size_t at = 0;
  const auto next = [&](const char* name, ScalarType dtype, int64_t dimensions) {
    const Tensor& tensor = tensors[at++];
    STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == device && tensor.is_contiguous() &&
                        tensor.scalar_type() == dtype && tensor.dim() == dimensions,
                    "cuda_begin_: ", name, " must be a contiguous tensor of ", dimensions,
                    " dimensions on the device that steps, of the dtype that layout.h has");
    return tensor;
  };
  const auto sums = next("sums", ScalarType::Long, 3), totals = next("totals", ScalarType::Long, 2),
             slots_of = next("slots_of", ScalarType::Long, 1), limits = next("limits", ScalarType::Double, 1),
             grad_scale = next("grad_scale", ScalarType::Float, 1), found_inf = next("found_inf", ScalarType::Float, 1),
             settings = next("settings", ScalarType::Double, 2), sources = next("sources", ScalarType::Long, 2),
             keys = next("keys", ScalarType::Long, 2), active = next("active", ScalarType::Long, 1),
             steps = next("steps", ScalarType::Float, 1), fresh = next("fresh", ScalarType::Float, 1),
             schedule_steps = next("schedule_steps", ScalarType::Long, 1), etas = next("etas", ScalarType::Double, 1),
             groups = next("groups", ScalarType::Double, 2), rows = next("rows", ScalarType::Double, 2),
             clips = next("clips", ScalarType::Double, 1), control = next("control", ScalarType::Double, 1),
             found = next("found", ScalarType::Double, 1), last = next("last", ScalarType::Double, 2),
             seen = next("seen", ScalarType::Long, 1), loss = next("loss", ScalarType::Float, 1);
  const int64_t n = settings.size(0), width = settings.size(1);
  STD_TORCH_CHECK(sources.size(0) == n && sources.size(1) == width + kSourceWords && schedule_steps.numel() == n &&
                      etas.numel() == n && groups.size(0) == n && width > kOwnSettings,
                  "cuda_begin_: the tensors of groups do not belong together");
  STD_TORCH_CHECK(sums.size(2) == kSumWords && totals.size(0) == n + 2 && totals.size(1) == kSumWords &&
                      slots_of.numel() == n + 1 && limits.numel() == kOwnLimits + n && clips.numel() == n &&
                      keys.size(0) == rows.size(0) && keys.size(1) == 2 && steps.numel() == active.numel() &&
                      fresh.numel() == active.numel() && grad_scale.numel() == 1 && found_inf.numel() == 1 &&
                      control.numel() == 2 && found.numel() == 2 && groups.size(1) <= rows.size(1),
                  "cuda_begin_: the tensors do not belong together");
  STD_TORCH_CHECK(last.size(0) == 2 && last.size(1) == kBlock && seen.numel() == 2 && loss.numel() == 1,
                  "cuda_begin_: what spikes are told by");
  STD_TORCH_CHECK(rows.size(1) == kernel.width && width == kernel.settings,
                  "cuda_begin_: the rows of this rule and of averages have ", kernel.width, " scalars, its groups ",
                  kernel.settings, " settings");
  const auto pointer = [](const Tensor& tensor) { return tensor.mutable_data_ptr(); };
  const Begin what = {static_cast<int64_t*>(pointer(sums)),
                      static_cast<int64_t*>(pointer(totals)),
                      static_cast<const int64_t*>(pointer(slots_of)),
                      static_cast<const double*>(pointer(limits)),
                      static_cast<const float*>(pointer(grad_scale)),
                      static_cast<const float*>(pointer(found_inf)),
                      static_cast<const double*>(pointer(settings)),
                      static_cast<const int64_t*>(pointer(sources)),
                      static_cast<const int64_t*>(pointer(keys)),
                      static_cast<const int64_t*>(pointer(active)),
                      static_cast<float*>(pointer(steps)),
                      static_cast<float*>(pointer(fresh)),
                      static_cast<int64_t*>(pointer(schedule_steps)),
                      static_cast<double*>(pointer(etas)),
                      static_cast<double*>(pointer(groups)),
                      static_cast<double*>(pointer(rows)),
                      static_cast<double*>(pointer(clips)),
                      static_cast<Control*>(pointer(control)),
                      static_cast<double*>(pointer(found)),
                      static_cast<double*>(pointer(last)),
                      static_cast<int64_t*>(pointer(seen)),
                      static_cast<const float*>(pointer(loss)),
                      int32_t(sums.size(0)),
                      int32_t(sums.size(1)),
                      int32_t(n),
                      int32_t(rows.size(0)),
                      int32_t(active.numel())};
  const Device current(device);
  const char* wrong = launch_begin(kernel.entry, what, current.stream());
  STD_TORCH_CHECK(wrong == nullptr, "a step on cuda:", device, " could not be begun: ", wrong);
}

std::string load_entry(int64_t device, const void* entry) {
  const Device current(device);
  const char* wrong = load(entry);
  return wrong == nullptr ? "" : wrong;
}

// Brings a kernel to a device, where that fails before a step is begun; says why it cannot be, or "".
std::string load_on(int64_t device, int64_t rule, int64_t variant, int64_t epilogues, std::vector<int64_t> formats) {
  return load_entry(device, known(rule, variant, epilogues, formats)->entry);
}

std::string load_squares_on(int64_t device, int64_t param, int64_t grad, bool accumulates) {
  return load_entry(device, squares_of(param, grad, accumulates));
}

std::string load_begin_on(int64_t device, int64_t rule) { return load_entry(device, begin_of(rule).entry); }

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
      "int epilogues, int[] formats, Tensor rows) -> ()");
  m.def("cuda_load(int device, int rule, int variant, int epilogues, int[] formats) -> str");
  m.def(
      "cuda_squares_(int token, Tensor chunks, Tensor places, Tensor moving, int chunk_size, int param, int grad, bool "
      "accumulates, int copies, int stride) -> ()");
  m.def("cuda_begin_(int token, int rule, Tensor[] tensors) -> ()");
  m.def("cuda_load_squares(int device, int param, int grad, bool accumulates) -> str");
  m.def("cuda_load_begin(int device, int rule) -> str");
  m.def("cuda_built() -> str");
}

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, WD_DEVICE, m) {
  m.impl("cuda_step_", TORCH_BOX(&wd::cuda::step_));
  m.impl("cuda_squares_", TORCH_BOX(&wd::cuda::squares_));
  m.impl("cuda_begin_", TORCH_BOX(&wd::cuda::begin_));
}

WD_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, WD_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_load", TORCH_BOX(&wd::cuda::load_on));
  m.impl("cuda_load_squares", TORCH_BOX(&wd::cuda::load_squares_on));
  m.impl("cuda_load_begin", TORCH_BOX(&wd::cuda::load_begin_on));
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
