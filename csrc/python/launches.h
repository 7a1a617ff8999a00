// What a backend gives to be launched: plans of the CPU, functions of Python, and tensors to be copied.
#pragma once

#include <vector>

#include "../cpu/plan.h"
#include "memory.h"

namespace wd {

// What must be done whatever a signal's handler raises meanwhile: it is done again until it returns, and the first
// exception is kept.
class Insist {
 public:
  Insist() = default;
  Insist(const Insist&) = delete;
  Insist& operator=(const Insist&) = delete;
  ~Insist();

  // Calls `f` (a new reference or null) until it is no error; false, and an error is set, after so many in a row that
  // it is none that passes.
  template <class F>
  bool operator()(const F& f) {
    for (int again = 0; again < kTries; ++again) {
      PyObject* const done = f();
      if (done != nullptr) {
        Py_DECREF(done);
        return true;
      }
      keep();
    }
    restore();
    return false;
  }

  // True if nothing was raised; else it is set again.
  bool restore();

 private:
  static constexpr int kTries = 1000;
  PyObject *type_ = nullptr, *value_ = nullptr, *trace_ = nullptr;

  void keep();
};

// The launches of one step. What is wrong with plans is said before anything is done.
class Launches {
 public:
  // `launches`: a list of plans, functions without arguments, and lists of (to, from); `rows`: float64 [r, scalars].
  // Throws where a plan and the rows do not belong together.
  Launches(PyObject* launches, PyObject* rows);

  // Elements that plans step.
  int64_t elements() const { return elements_; }

  // Throws unless what plans add squares to are so many exact sums, and what they add gradients to can take these.
  void check_sums(const int64_t* sums, int64_t rows, bool accumulates = false) const;

  // Adds the squares of all gradients to them. Needs no lock of the interpreter's, and does not fail.
  void sum_squares() const;

  // Adds the gradients to what lies in the place of parameters, and the squares of that to the sums; likewise.
  void accumulate() const;

  // Runs the plans. Needs no lock of the interpreter's, and does not fail.
  void run_plans() const;

  // Then the others, in order. Where nothing has `begun`, a first function that fails is an error, and nothing was
  // written; what was begun is finished.
  bool run_others(Insist& insist, bool begun) const;

 private:
  struct Counted {
    const cpu::Plan* plan;
    int64_t elements;
  };
  PyObject* launches_;
  const double* rows_ = nullptr;
  int64_t row_width_ = 0;
  int64_t elements_ = 0;
  std::vector<Counted> plans_;
};

// Copies a tensor to another: a pair (to, from).
PyObject* copy_pair(PyObject* pair);

// insist(functions): calls each until it returns, and raises then what was raised first.
PyObject* insist_on(PyObject* module, PyObject* functions);
// plan(chunks, places, moving, control, chunk_size, rule, variant, epilogues, formats) -> capsule
PyObject* plan(PyObject* module, PyObject* args);
// launch(launches, rows): all of them.
PyObject* launch(PyObject* module, PyObject* args);
// accumulate(plans, rows, sums, others): gradients are added up; `others`: other threads may run meanwhile, as long as
// somebody holds the memory of all tensors.
PyObject* accumulate(PyObject* module, PyObject* args);
PyObject* instruction_set(PyObject* module, PyObject* none);
PyObject* rules(PyObject* module, PyObject* none);
PyObject* be_serial(PyObject* module, PyObject* none);

}  // namespace wd
