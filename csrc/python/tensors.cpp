#include "tensors.h"

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
PyObject *name_of_grad = nullptr, *is_neg = nullptr, *is_conj = nullptr;
// The descriptor of Tensor.grad, and what it calls: no look-up by name for each tensor.
PyObject* grad_descriptor = nullptr;
descrgetfunc get_grad = nullptr;

}  // namespace

bool read(PyObject* tensor, DLTensor* out) {
  if (exchange->tensor_from_object(tensor, out) == 0) return true;
  PyErr_Clear();
  return false;
}

bool known(PyObject* object) {
  const void* const type = Py_TYPE(object);
  return type == tensor_type || type == parameter_type;
}

PyObject* grad_of(PyObject* param) {
  return known(param) ? get_grad(grad_descriptor, param, tensor_type) : PyObject_GetAttr(param, name_of_grad);
}

int lazy(PyObject* tensor, bool complex) {
  PyObject* const methods[] = {is_neg, is_conj};
  for (int i = 0; i < (complex ? 2 : 1); ++i) {
    PyObject* const answer = PyObject_CallMethodObjArgs(tensor, methods[i], nullptr);
    if (answer == nullptr) return -1;
    const int truth = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (truth != 0) return truth;
  }
  return 0;
}

PyObject* connect(PyObject*, PyObject* args) {
  PyObject *capsule, *tensor, *parameter;
  if (!PyArg_ParseTuple(args, "OOO", &capsule, &tensor, &parameter)) return nullptr;
  auto* api = static_cast<const DLExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  if (api->major != 1 || api->tensor_from_object == nullptr) Py_RETURN_FALSE;
  name_of_grad = PyUnicode_InternFromString("grad");
  is_neg = PyUnicode_InternFromString("is_neg");
  is_conj = PyUnicode_InternFromString("is_conj");
  if (!name_of_grad || !is_neg || !is_conj) return nullptr;
  grad_descriptor = PyObject_GetAttr(tensor, name_of_grad);
  if (grad_descriptor == nullptr) return nullptr;
  get_grad = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(grad_descriptor), Py_tp_descr_get));
  if (get_grad == nullptr) Py_RETURN_FALSE;
  exchange = api;
  Py_INCREF(tensor);
  Py_INCREF(parameter);
  tensor_type = tensor;
  parameter_type = parameter;
  Py_RETURN_TRUE;
}

}  // namespace wd
