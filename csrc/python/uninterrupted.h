// What keeps other code from running between a check and a launch.
#pragma once

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstdint>

namespace wd {

// As many elements take as long as a thread of Python may keep the others waiting anyway, 5 ms. More of them are
// stepped without the lock of the interpreter, and then the memory of all tensors is held.
constexpr int64_t kLong = int64_t(1) << 23;

// Meanwhile no garbage is collected: its callbacks and finalizers are Python code.
class NoCollection {
 public:
  NoCollection() : was_(PyGC_Disable()) {}
  NoCollection(const NoCollection&) = delete;
  NoCollection& operator=(const NoCollection&) = delete;
  ~NoCollection() { end(); }
  void end() {
    if (was_ != 0) PyGC_Enable();
    was_ = 0;
  }

 private:
  int was_;
};

class Reference {
 public:
  explicit Reference(PyObject* object = nullptr) : object_(object) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// The lock of the interpreter, given up while it lives, if it is to be.
class Unlocked {
 public:
  explicit Unlocked(bool really) : saved_(really ? PyEval_SaveThread() : nullptr) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() {
    if (saved_ != nullptr) PyEval_RestoreThread(saved_);
  }

 private:
  PyThreadState* saved_;
};

}  // namespace wd
