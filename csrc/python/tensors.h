// How native code reads a tensor without a call into Python for each property: DLPack's exchange API, a C table that
// torch's Tensor class carries.
#pragma once

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdint>

namespace wd {

// The parts of DLPack's ABI (version 1) that are used here, in its layout.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

constexpr uint8_t kComplexCode = 5;
constexpr int32_t kInlineDims = 5;  // as many sizes lie in torch's tensor object itself

// Fills `out` with what lies behind a tensor, borrowed; false where torch does not lend it.
bool read(PyObject* tensor, DLTensor* out);

inline void* address(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }
inline int64_t dtype_of(const DLTensor& t) { return (int64_t(t.code) << 8) | t.bits; }
inline int64_t device_of(const DLTensor& t) { return (int64_t(t.device_type) << 32) | t.device_id; }

// Is the object's type one of torch's own, Tensor or Parameter?
bool known(PyObject* object);

// Is it that, or torch's DTensor?
bool compared(PyObject* object);

// What of a tensor lies in this process, borrowed.
struct Local {
  PyObject* tensor;  // the object itself, or a DTensor's local tensor
  PyObject* spec;    // of a DTensor, what says how it is sharded; else null
};
// False where what lies here is no tensor of torch's own types.
bool local(PyObject* object, Local* out);

// The gradient of such an object, a new reference. Runs no Python code while no torch function mode is on.
PyObject* grad_of(PyObject* param);

// Has the tensor the negative or the conjugate bit, or so many dimensions that it might have?
bool lazy(const DLTensor& tensor);
// The same by where the shape of a tensor of few dimensions lies.
bool lazy(const void* shape);

// Does torch lend its tensors?
bool lends();

// Where an object of one of torch's types keeps its at::Tensor: what torch's C API calls a handle. It owns nothing, so
// that the garbage collector sees all there is, and follows whatever is done to the object. Null unless torch lends.
void* handle_of(PyObject* tensor);

// connect(capsule, Parameter, (tensor, plain, negative), (tensor, plain, conjugate)) -> bool: takes torch's DLPack
// exchange API and its two types of tensors; False where they are others than is known here.
PyObject* connect(PyObject* module, PyObject* args);
// learn(dtensor, local, spec) -> bool: takes torch's DTensor, of which an example is given with what its two slots
// have; False where they are not found in it.
PyObject* learn(PyObject* module, PyObject* args);

}  // namespace wd
