#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

namespace wd {
namespace {

struct DLExchangeAPI {
  uint32_t major, minor;
  void *previous, *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

const DLExchangeAPI* exchange = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr;
PyObject* name_of_grad = nullptr;
Py_ssize_t flags_at = 0, handle_at = 0;
uint64_t lazy_flags = 0;
// The descriptor of Tensor.grad, and what it calls: no look-up by name for each tensor.
PyObject* grad_descriptor = nullptr;
descrgetfunc get_grad = nullptr;
PyObject* dtensor_type = nullptr;
Py_ssize_t local_at = 0, spec_at = 0;

// What the object has in a slot.
PyObject* slot(PyObject* object, Py_ssize_t at) {
  PyObject* value;
  std::memcpy(&value, reinterpret_cast<char*>(object) + at, sizeof value);
  return value;
}

}  // namespace

bool read(PyObject* tensor, DLTensor* out) {
  if (exchange != nullptr && exchange->tensor_from_object(tensor, out) == 0) return true;
  PyErr_Clear();
  return false;
}

bool known(PyObject* object) {
  const void* const type = Py_TYPE(object);
  return type == tensor_type || type == parameter_type;
}

bool compared(PyObject* object) { return known(object) || (PyObject*)Py_TYPE(object) == dtensor_type; }

bool local(PyObject* object, Local* out) {
  *out = {object, nullptr};
  if (known(object)) return true;
  if ((PyObject*)Py_TYPE(object) != dtensor_type) return false;
  *out = {slot(object, local_at), slot(object, spec_at)};
  return out->tensor != nullptr && out->spec != nullptr && known(out->tensor);
}

PyObject* grad_of(PyObject* param) { return get_grad(grad_descriptor, param, tensor_type); }

bool lends() { return exchange != nullptr; }

void* handle_of(PyObject* tensor) { return lends() ? reinterpret_cast<char*>(tensor) + handle_at : nullptr; }

// The bits are flags of torch's tensor object. Its methods tell them too, but give up the interpreter's lock, and take
// a quarter of a microsecond. So where they lie, seen from the shape that DLPack lends, is found once, by setting each
// (`find_flag`).
bool lazy(const void* shape) {
  uint64_t flags;
  std::memcpy(&flags, static_cast<const char*>(shape) + flags_at, sizeof flags);
  return (flags & lazy_flags) != 0;
}

bool lazy(const DLTensor& t) { return t.ndim > kInlineDims || lazy(t.shape); }

namespace {

// Finds the word and the bit by which a tensor differs when its data is that of `lazy` and not of `plain`: the first
// word behind the shape. No word further on is looked at.
bool find_flag(PyObject* tensor, PyObject* plain, PyObject* lazy, Py_ssize_t* at, uint64_t* bit) {
  constexpr Py_ssize_t kFurthest = 256, kWord = sizeof(uint64_t);
  DLTensor t;
  if (exchange->tensor_from_object(tensor, &t) != 0) return false;
  for (Py_ssize_t offset = 0; offset < kFurthest; offset += kWord) {
    uint64_t words[3];
    PyObject* const data[] = {plain, lazy, plain};
    for (int k = 0; k < 3; ++k) {
      if (PyObject_SetAttrString(tensor, "data", data[k]) < 0) return false;
      std::memcpy(&words[k], reinterpret_cast<const char*>(t.shape) + offset, sizeof words[k]);
    }
    if (words[0] == words[1]) continue;
    *at = offset;
    *bit = words[0] ^ words[1];
    return words[0] == words[2] && (*bit & (*bit - 1)) == 0 && (words[1] & *bit) != 0;
  }
  return false;
}

// Of an object of the type; -1 where it is not known.
Py_ssize_t size_of(PyTypeObject* type) {
  PyObject* const size = PyObject_GetAttrString((PyObject*)type, "__basicsize__");
  const Py_ssize_t bytes = size == nullptr ? -1 : PyLong_AsSsize_t(size);
  Py_XDECREF(size);
  PyErr_Clear();
  return bytes;
}

// Finds the word of torch's object that is its at::Tensor, which is one pointer: to where the sizes lie a little
// further on, and by which torch's C API finds the same sizes and the same data as DLPack does.
bool find_handle(PyObject* tensor, Py_ssize_t* at) {
  constexpr intptr_t kFurthest = 512;
  DLTensor t;
  if (exchange->tensor_from_object(tensor, &t) != 0) return false;
  const Py_ssize_t bytes = size_of(Py_TYPE(tensor));
  for (Py_ssize_t offset = sizeof(PyObject); offset + Py_ssize_t(sizeof(void*)) <= bytes; offset += sizeof(void*)) {
    char* const place = reinterpret_cast<char*>(tensor) + offset;
    intptr_t word;
    std::memcpy(&word, place, sizeof word);
    const intptr_t further = reinterpret_cast<intptr_t>(t.shape) - word;
    if (word == 0 || further <= 0 || further > kFurthest) continue;
    const auto handle = reinterpret_cast<AtenTensorHandle>(place);
    int64_t* sizes = nullptr;
    void* data = nullptr;
    *at = offset;
    return aoti_torch_get_sizes(handle, &sizes) == AOTI_TORCH_SUCCESS && sizes == t.shape &&
           aoti_torch_get_data_ptr(handle, &data) == AOTI_TORCH_SUCCESS && data == address(t);
  }
  return false;
}

}  // namespace

PyObject* connect(PyObject*, PyObject* args) {
  PyObject *capsule, *parameter, *real[3], *complex[3];
  if (!PyArg_ParseTuple(args, "OO(OOO)(OOO)", &capsule, &parameter, &real[0], &real[1], &real[2], &complex[0],
                        &complex[1], &complex[2]))
    return nullptr;
  PyObject* const tensor = real[0];
  auto* api = static_cast<const DLExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->major != 1 || api->tensor_from_object == nullptr) Py_RETURN_FALSE;
  name_of_grad = PyUnicode_InternFromString("grad");
  if (name_of_grad == nullptr) return nullptr;
  grad_descriptor = PyObject_GetAttr((PyObject*)Py_TYPE(tensor), name_of_grad);
  if (grad_descriptor == nullptr) return nullptr;
  get_grad = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(grad_descriptor), Py_tp_descr_get));
  if (get_grad == nullptr) Py_RETURN_FALSE;
  exchange = api;
  Py_ssize_t negative_at = 0, conjugate_at = 0;
  uint64_t negative = 0, conjugate = 0;
  bool found = find_handle(tensor, &handle_at);
  for (PyObject* const other : {real[1], real[2], complex[0], complex[1], complex[2]}) {
    Py_ssize_t at = 0;
    found = found && find_handle(other, &at) && at == handle_at;
  }
  if (!found || !find_flag(real[0], real[1], real[2], &negative_at, &negative) ||
      !find_flag(complex[0], complex[1], complex[2], &conjugate_at, &conjugate) || negative_at != conjugate_at) {
    PyErr_Clear();
    exchange = nullptr;
    Py_RETURN_FALSE;
  }
  flags_at = negative_at;
  lazy_flags = negative | conjugate;
  Py_INCREF(tensor_type = (PyObject*)Py_TYPE(tensor));
  Py_INCREF(parameter_type = parameter);
  Py_RETURN_TRUE;
}

PyObject* learn(PyObject*, PyObject* args) {
  PyObject *example, *tensor, *spec;
  if (!PyArg_ParseTuple(args, "OOO", &example, &tensor, &spec)) return nullptr;
  const Py_ssize_t bytes = size_of(Py_TYPE(example));
  local_at = spec_at = 0;
  for (Py_ssize_t at = sizeof(PyObject); at + Py_ssize_t(sizeof(PyObject*)) <= bytes; at += sizeof(PyObject*)) {
    if (slot(example, at) == tensor) local_at = at;
    if (slot(example, at) == spec) spec_at = at;
  }
  if (local_at == 0 || spec_at == 0) Py_RETURN_FALSE;
  Py_INCREF(dtensor_type = (PyObject*)Py_TYPE(example));
  Py_RETURN_TRUE;
}

}  // namespace wd
