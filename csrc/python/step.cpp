// The step: one call that checks, launches and counts. No Python code runs between the check and the end of the
// launches of plans, and what was begun is finished: an exception of a signal's handler comes before all, or after.
#include "changes.h"
#include "clipping.h"
#include "launches.h"
#include "memory.h"
#include "uninterrupted.h"

#include <cstring>
#include <stdexcept>

namespace wd {
namespace {

// What a step is to do when all is as expected, a tuple.
struct Work {
  PyObject* increment;  // torch's function that counts versions
  PyObject* written;    // what it is called with: the parameters of this step
  PyObject* launches;   // a list: plans
  PyObject* ready;      // None, or a function of the rows to more launches
  PyObject* rows;
  PyObject* copies;     // a list of (to, from): after the launches
  PyObject* puts;       // a list of (position, parameter, its state or None, its state to be, what is new of it)
  PyObject* ticks;      // a list of (dict, key, value): what a finished step writes
  int others;           // are there other threads of Python?
  PyObject* clipping;   // None, or what is asked of the norm of the gradients
  int counts;           // does the host count the steps?
  PyObject* gradients;  // None, or a list of what is stepped in the place of gradients

  explicit Work(PyObject* tuple) {
    if (!PyArg_ParseTuple(tuple, "OO!O!OOO!O!O!pOpO", &increment, &PyList_Type, &written, &PyList_Type, &launches,
                          &ready, &rows, &PyList_Type, &copies, &PyList_Type, &puts, &PyList_Type, &ticks, &others,
                          &clipping, &counts, &gradients))
      throw std::runtime_error("a Python error is set");
  }
};

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

// Writes the states that this step has made into the optimizer's, unless somebody put others there meanwhile.
PyObject* put_state(View& view, PyObject* state, PyObject* put) {
  PyObject *const param = PyTuple_GetItem(put, 1), *const found = PyTuple_GetItem(put, 2),
                  *const own = PyTuple_GetItem(put, 3), *const made = PyTuple_GetItem(put, 4);
  PyObject* const now = PyDict_GetItemWithError(state, param);  // hashes a tensor, in Python
  if (now == nullptr && PyErr_Occurred()) return nullptr;
  if (now != own && (now == nullptr ? Py_None : now) != found) return none();
  if (PyDict_Update(own, made) < 0) return nullptr;
  if (now != own) {
    if (PyDict_SetItem(state, param, own) < 0) return nullptr;
    if (now == nullptr) view.order.push_back(PyLong_AsLongLong(PyTuple_GetItem(put, 0)));  // it is the last
  }
  return none();
}

// All that a finished step leaves behind, but for what it has stepped. `state`: the optimizer's.
bool finish(View& view, PyObject* state, const Changes& found, const Work& work, Insist& insist) {
  if (found.inspected)
    for (int64_t i = 0; i < view.parameters; ++i) view.expected[i].inspected = kNotYet;
  if (view.control->skip != 0) return true;
  bool fresh = false;
  for (int64_t i = 0; i < view.parameters; ++i) {
    if (work.counts) view.steps[i] += view.active[i];
    fresh |= view.fresh[i] != 0;
    view.fresh[i] = 0;
  }
  if (fresh)
    view.keys.clear();
  else
    for (Key& key : view.keys) key.count += work.counts;
  for (Py_ssize_t i = 0; i < PyList_Size(work.copies); ++i)
    if (!insist([&] { return copy_pair(PyList_GetItem(work.copies, i)); })) return false;
  for (Py_ssize_t i = 0; i < PyList_Size(work.puts); ++i)
    if (!insist([&] { return put_state(view, state, PyList_GetItem(work.puts, i)); })) return false;
  for (Py_ssize_t i = 0; i < PyList_Size(work.ticks); ++i) {
    PyObject* const tick = PyList_GetItem(work.ticks, i);
    const auto write = [&]() -> PyObject* {
      if (PyObject_SetItem(PyTuple_GetItem(tick, 0), PyTuple_GetItem(tick, 1), PyTuple_GetItem(tick, 2)) < 0)
        return nullptr;
      return none();
    };
    if (!insist(write)) return false;
  }
  return true;
}

// The memory of everything that the step reads or writes.
class HeldMemory {
 public:
  // `keep`: what the check has put there. Whoever is waiting may run meanwhile: `is_there` afterwards.
  void take(const View& view, PyObject* keep) {
    const Reference all(PyList_New(0));
    Py_ssize_t kept = 0;
    const auto add = [&](PyObject* tensor, const void* at) {
      if (tensor == nullptr || PyList_Append(all.get(), tensor) < 0) throw std::runtime_error("a Python error is set");
      addresses_.push_back(at);
    };
    for (int64_t i = 0; i < view.parameters; ++i) {
      const Expected& e = view.expected[i];
      if (view.active[i] == 0 || e.inspected != kNotYet) continue;  // Python holds what it has inspected
      Local param;
      if (!local(view.params[size_t(i)], &param)) throw std::runtime_error("a parameter is of another type by now");
      for (int64_t role = 0; role < e.roles; ++role) {
        PyObject* const tensor = e.kind == kFlat  ? view.handles[e.held + role].object
                                 : role == kParam ? param.tensor
                                                  : PyList_GetItem(keep, kept++);
        if (role == kGrad)
          add(tensor, &view.moving[e.segment].grad);
        else
          add(tensor, &view.roles[e.first_role + role].address);
      }
    }
    views_ = views_of(tensors_of(view.hold, all.get()));
  }

  // Is what is held what the table has now? A gradient may lie elsewhere than when it was taken.
  bool is_there() const {
    for (size_t k = 0; k < views_.size(); ++k) {
      void *now = nullptr, *there = nullptr;
      if (aoti_torch_get_data_ptr(views_[k].get(), &now) != AOTI_TORCH_SUCCESS) return false;
      std::memcpy(&there, addresses_[k], sizeof there);
      if (now != there && there != nullptr && views_[k].numel() != 0) return false;  // empty ones lie anywhere
    }
    return true;
  }

 private:
  std::vector<Tensor> views_;
  std::vector<const void*> addresses_;  // where the table has the address of each
};

PyObject* answer(const Changes& found, bool done, bool runs, PyObject* keys) {
  PyObject* const odd = PyList_New(Py_ssize_t(found.odd.size()));
  for (size_t k = 0; odd != nullptr && k < found.odd.size(); ++k)
    if (PyList_SetItem(odd, Py_ssize_t(k), PyLong_FromLongLong(found.odd[k])) < 0) return nullptr;
  return Py_BuildValue("(OiNiN)", done ? Py_True : Py_False, int(found.changed), odd, int(runs), keys);
}

enum class Outcome { done, moved, failed };

// `failed`: an error is set, and nothing was stepped, or what insisting could not finish. `moved`: nothing was done,
// and somebody has changed the tensors since they were checked.
Outcome launch_all(View& view, PyObject* groups, PyObject* state, const Work& work, const Clipping& clipping,
                   PyObject* keep, NoCollection& meanwhile, Insist& insist) {
  const Launches plans(work.launches, work.rows);
  const bool calls = work.ready != Py_None, begun = plans.elements() > 0;
  const bool unlocked = work.others != 0 && plans.elements() >= kLong;
  HeldMemory memory;
  if (unlocked || clipping.calls() || (calls && begun)) {
    memory.take(view, keep);
    Changes again;
    if (!check(view, groups, state, nullptr, &again)) return Outcome::failed;
    if (again.other || again.changed || !again.odd.empty() || !assign_rows(view) || runs_differ(view) ||
        !memory.is_there())
      return Outcome::moved;
  }
  if (clipping.calls()) meanwhile.end();  // Python code runs from here on
  if (!clipping.measure(work.rows, unlocked)) return Outcome::failed;
  if (clipping.asked()) clipping.decide(work.rows);
  if (work.rows == Py_None || (clipping.asked() && view.control->skip != 0)) return Outcome::done;
  const Reference counted(PyObject_CallFunctionObjArgs(work.increment, work.written, nullptr));
  if (counted.get() == nullptr) return Outcome::failed;
  if (calls) meanwhile.end();
  const Reference more(calls ? PyObject_CallFunctionObjArgs(work.ready, work.rows, nullptr) : PyList_New(0));
  if (more.get() == nullptr) return Outcome::failed;
  const Launches others(more.get(), work.rows);
  {
    const Unlocked meanwhile_others_run(unlocked);
    plans.run_plans();
  }
  return others.run_others(insist, begun) ? Outcome::done : Outcome::failed;
}

// A view has them for the time of a step.
class Gradients {
 public:
  Gradients(View& view, PyObject* gradients) : view_(view) {
    if (gradients == Py_None) return;
    if (!PyList_Check(gradients)) throw std::runtime_error("gradients are a list");
    view_.gradients = gradients;
  }
  Gradients(const Gradients&) = delete;
  Gradients& operator=(const Gradients&) = delete;
  ~Gradients() { view_.gradients = nullptr; }

  // The step is taken, or skipped: whoever gave them sees it, whatever is raised next. Others hold what was in them.
  void taken() const {
    if (view_.gradients != nullptr && PyList_SetSlice(view_.gradients, 0, PY_SSIZE_T_MAX, nullptr) < 0) PyErr_Clear();
  }

 private:
  View& view_;
};

PyObject* checked_step(View& view, PyObject* groups, PyObject* state, PyObject* tuple) {
  const Work work(tuple);
  const Gradients gradients(view, work.gradients);
  const bool held = work.ready != Py_None || work.others != 0 || Clipping::calls(work.clipping);
  const Reference keep(held ? PyList_New(0) : nullptr);
  if (PyErr_Occurred()) return nullptr;
  NoCollection meanwhile;
  Changes found;
  if (!check(view, groups, state, keep.get(), &found)) return nullptr;
  if (found.other) Py_RETURN_NONE;
  if (!found.odd.empty()) return answer(found, false, false, none());
  const bool same_rows = assign_rows(view), runs = runs_differ(view), some = !view.keys.empty();
  if (!same_rows || runs || found.changed || (some && work.rows == Py_None))
    return answer(found, false, runs, list_of_keys(view));

  Insist insist;
  const Clipping clipping(work.clipping, view);
  if (some || clipping.asked()) {
    const Outcome outcome = launch_all(view, groups, state, work, clipping, keep.get(), meanwhile, insist);
    if (outcome == Outcome::failed) return nullptr;
    if (outcome == Outcome::moved) return answer(Changes{}, false, false, list_of_keys(view));
  }
  gradients.taken();
  if (!finish(view, state, found, work, insist) || !insist.restore()) return nullptr;
  meanwhile.end();
  return answer(found, true, false, list_of_keys(view));
}

}  // namespace

// step(view, groups, state, work)
//   -> None where groups or state are not what the table was built from, else (done, changed, odd, runs, keys): whether
//      the step is taken; whether another set of parameters has gradients than in the last one; positions that Python
//      has to look at; whether the runs are others than those that chunks were cut for; and the keys of the rows, of
//      the next step when this one is taken (empty where they are not known yet), None where something is odd.
PyObject* step(PyObject*, PyObject* args) {
  PyObject *capsule, *groups, *state, *work;
  if (!PyArg_ParseTuple(args, "OO!O!O!", &capsule, &PyList_Type, &groups, &PyDict_Type, &state, &PyTuple_Type, &work))
    return nullptr;
  View* const view = view_of(capsule);
  if (view == nullptr) return nullptr;
  return guarded([&] { return checked_step(*view, groups, state, work); });
}

namespace {

PyMethodDef methods[] = {
    {"connect", connect, METH_VARARGS, "connect(capsule, Tensor, Parameter) -> bool"},
    {"learn", learn, METH_VARARGS, "learn(dtensor, local, spec) -> bool"},
    {"view", wd::view, METH_VARARGS, "view(params, tensors, names, hold, held) -> capsule"},
    {"step", wd::step, METH_VARARGS, "step(view, groups, state, work)"},
    {"assign_rows", assign_rows_of, METH_O, "assign_rows(view) -> keys"},
    {"take_runs", take_runs, METH_O, "take_runs(view)"},
    {"cut", cut, METH_VARARGS, "The chunks of segments."},
    {"gather", gather, METH_VARARGS, "The segments of lists of tensors."},
    {"step_lists", step_lists, METH_VARARGS, "A step of lists of tensors."},
    {"plan", plan, METH_VARARGS, "A launch on the CPU."},
    {"launch", launch, METH_VARARGS, "launch(launches, rows)"},
    {"accumulate", accumulate, METH_VARARGS, "accumulate(plans, rows, sums, others)"},
    {"instruction_set", instruction_set, METH_NOARGS, "instruction_set() -> str"},
    {"rules", rules, METH_NOARGS, "rules() -> str"},
    {"insist", insist_on, METH_O,
     "Calls each function of a list until it returns; raises at the end what they raised."},
    {"be_serial", be_serial, METH_NOARGS, "From now on in this process one thread steps."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Native part of wd_kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace wd

PyMODINIT_FUNC PyInit__C(void) {
  PyObject* const made = PyModule_Create(&wd::module);
  if (made != nullptr && PyModule_AddStringConstant(made, "NAMESPACE", WD_TEXT(WD_NAMESPACE)) < 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
