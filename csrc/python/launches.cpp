#include "launches.h"

#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "uninterrupted.h"

namespace wd {
namespace {

constexpr const char* kPlan = "wd_kernels.plan";

// A plan, and the tensors that it reads.
struct Planned {
  cpu::Plan plan;
  PyObject* tensors;
};

void destroy(PyObject* capsule) {
  auto* const own = static_cast<Planned*>(PyCapsule_GetPointer(capsule, kPlan));
  if (own == nullptr) return;
  Py_XDECREF(own->tensors);
  delete own;
}

const cpu::Plan* plan_of(PyObject* object) {
  if (!PyCapsule_IsValid(object, kPlan)) return nullptr;
  return &static_cast<Planned*>(PyCapsule_GetPointer(object, kPlan))->plan;
}

void require(bool fine, const std::string& otherwise) {
  if (!fine) throw std::runtime_error(otherwise);
}

}  // namespace

PyObject* plan(PyObject*, PyObject* args) {
  PyObject *chunks, *places, *moving, *control, *formats;
  long long chunk_size, rule, variant, epilogues;
  if (!PyArg_ParseTuple(args, "OOOOLLLLO!", &chunks, &places, &moving, &control, &chunk_size, &rule, &variant,
                        &epilogues, &PyList_Type, &formats))
    return nullptr;
  return guarded([&]() -> PyObject* {
    std::vector<int64_t> codes;
    for (Py_ssize_t i = 0; i < PyList_Size(formats); ++i) codes.push_back(number_of(PyList_GetItem(formats, i)));
    auto made = std::make_unique<Planned>();
    made->plan.kernel = cpu::find(rule, variant, epilogues, codes);
    const Memory words = memory_of(chunks, "chunks", "int64", 0), segments = memory_of(moving, "moving", "int64", 4),
                 own = memory_of(places, "places", "int64", -1), pair = memory_of(control, "control", "float64", 0);
    require(own.columns >= int64_t(kAddresses + codes.size() - 1), "places must have a word for every role");
    require(own.rows == segments.rows,
            std::to_string(own.rows) + " places beside " + std::to_string(segments.rows) + " segments");
    require(pair.rows == 2, "control must hold grad_factor and skip");
    require(chunk_size > 0 && chunk_size % kBlock == 0 && chunk_size <= std::numeric_limits<int32_t>::max() / 2,
            "chunk_size=" + std::to_string(chunk_size) + ": expected a multiple of " + std::to_string(kBlock));
    made->plan.launch = {words.as<const int64_t>(),
                         own.as<const int64_t>(),
                         segments.as<const Moving>(),
                         nullptr,
                         pair.as<const Control>(),
                         int32_t(own.columns),
                         0,
                         int32_t(chunk_size)};
    made->plan.chunks = words.rows;
    made->plan.segments = segments.rows;
    made->tensors = PyTuple_Pack(4, chunks, places, moving, control);
    PyObject* const capsule = made->tensors == nullptr ? nullptr : PyCapsule_New(made.get(), kPlan, destroy);
    if (capsule == nullptr)
      Py_XDECREF(made->tensors);
    else
      made.release();
    return capsule;
  });
}

// Insist --------------------------------------------------------------------------------------------------------------

Insist::~Insist() {
  Py_XDECREF(type_);
  Py_XDECREF(value_);
  Py_XDECREF(trace_);
}

void Insist::keep() {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  if (type_ == nullptr) {
    type_ = type;
    value_ = value;
    trace_ = trace;
    return;
  }
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(trace);
}

bool Insist::restore() {
  if (type_ == nullptr) return true;
  PyErr_Restore(type_, value_, trace_);
  type_ = value_ = trace_ = nullptr;
  return false;
}

PyObject* insist_on(PyObject*, PyObject* functions) {
  if (!PyList_Check(functions)) {
    PyErr_SetString(PyExc_TypeError, "insist takes a list of functions");
    return nullptr;
  }
  Insist insist;
  for (Py_ssize_t i = 0; i < PyList_Size(functions); ++i)
    if (!insist([&] { return PyObject_CallNoArgs(PyList_GetItem(functions, i)); })) return nullptr;
  if (!insist.restore()) return nullptr;
  Py_RETURN_NONE;
}

// Launches ------------------------------------------------------------------------------------------------------------

Launches::Launches(PyObject* launches, PyObject* rows) : launches_(launches) {
  for (Py_ssize_t i = 0; i < PyList_Size(launches); ++i) {
    const cpu::Plan* const own = plan_of(PyList_GetItem(launches, i));
    if (own == nullptr) continue;
    const Memory memory = memory_of(rows, "rows", "float64", -1);
    require(memory.columns >= own->kernel.width, "rows must have " + std::to_string(own->kernel.width) + " columns");
    rows_ = memory.as<const double>(), row_width_ = memory.columns;
    plans_.push_back({own, cpu::count_elements(*own, memory.rows)});
    elements_ += plans_.back().elements;
  }
}

void Launches::check_sums(const int64_t* sums, int64_t rows, bool accumulates) const {
  for (const Counted& own : plans_) {
    cpu::check_sums(*own.plan, sums, rows);
    require(!accumulates || own.plan->kernel.sizes[kParam] >= kScaled * int64_t(sizeof(float)),
            "gradients are added to float32 or float64");
  }
}

void Launches::sum_squares() const {
  for (const Counted& own : plans_) cpu::sum_squares(*own.plan, own.elements);
}

void Launches::accumulate() const {
  for (const Counted& own : plans_) cpu::accumulate(*own.plan, own.elements);
}

void Launches::run_plans() const {
  for (const Counted& own : plans_) cpu::run(*own.plan, rows_, row_width_, own.elements);
}

bool Launches::run_others(Insist& insist, bool begun) const {
  for (Py_ssize_t i = 0; i < PyList_Size(launches_); ++i) {
    PyObject* const own = PyList_GetItem(launches_, i);
    if (plan_of(own) != nullptr) continue;
    if (PyList_Check(own)) {
      for (Py_ssize_t k = 0; k < PyList_Size(own); ++k)
        if (!insist([&] { return copy_pair(PyList_GetItem(own, k)); })) return false;
    } else if (begun) {
      if (!insist([&] { return PyObject_CallNoArgs(own); })) return false;
    } else {
      PyObject* const done = PyObject_CallNoArgs(own);
      if (done == nullptr) return false;
      Py_DECREF(done);
    }
    begun = true;
  }
  return true;
}

PyObject* copy_pair(PyObject* pair) {
  return PyObject_CallMethod(PyTuple_GetItem(pair, 0), "copy_", "O", PyTuple_GetItem(pair, 1));
}

PyObject* launch(PyObject*, PyObject* args) {
  PyObject *launches, *rows;
  if (!PyArg_ParseTuple(args, "O!O", &PyList_Type, &launches, &rows)) return nullptr;
  return guarded([&]() -> PyObject* {
    const Launches all(launches, rows);
    Insist insist;
    all.run_plans();
    if (!all.run_others(insist, all.elements() > 0) || !insist.restore()) return nullptr;
    Py_RETURN_NONE;
  });
}

PyObject* accumulate(PyObject*, PyObject* args) {
  PyObject *plans, *rows, *sums;
  int others;
  if (!PyArg_ParseTuple(args, "O!OOp", &PyList_Type, &plans, &rows, &sums, &others)) return nullptr;
  return guarded([&]() -> PyObject* {
    const Launches all(plans, rows);
    const Memory words = memory_of(sums, "sums", "int64", kSumWords);
    all.check_sums(words.as<const int64_t>(), words.rows, true);
    {
      const Unlocked meanwhile_others_run(others != 0 && all.elements() >= kLong);
      all.accumulate();
    }
    Py_RETURN_NONE;
  });
}

PyObject* instruction_set(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(cpu::instruction_set().c_str()); });
}

PyObject* be_serial(PyObject*, PyObject*) {
  cpu::be_serial();
  Py_RETURN_NONE;
}

PyObject* rules(PyObject*, PyObject*) {
  return guarded([] { return PyUnicode_FromString(cpu::rules().c_str()); });
}

}  // namespace wd
