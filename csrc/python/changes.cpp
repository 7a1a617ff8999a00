// The check of every step: compares what the table was built from with what is there now, object by object and address
// by address, and writes the addresses of this step's gradients into the table. It decides nothing: whatever is not
// exactly as expected goes back to Python as a list of positions. It reads ordinary tensors as DLPack lends them
// (tensors.h) and flat ones, and step counts, through handles (handles.h).
#include "changes.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "memory.h"

namespace wd {
namespace {

constexpr const char* kView = "wd_kernels.view";
constexpr Py_ssize_t kAhead = 12;

PyObject* params_key() {
  static PyObject* const key = PyUnicode_InternFromString("params");
  return key;
}

// A step count's tensor; their storage is one.
__attribute__((always_inline)) inline void fetch_count(const Held& held) {
  __builtin_prefetch(held.handle);
  __builtin_prefetch(held.near - 64);
  __builtin_prefetch(held.near);
  __builtin_prefetch(held.near + 64);
}

__attribute__((always_inline)) inline void fetch_ordinary(const View& view, int64_t i, const Expected& e) {
  __builtin_prefetch(view.params[size_t(i)]);
  __builtin_prefetch(view.seen[size_t(i)].grad);
  __builtin_prefetch(view.seen[size_t(i)].own);
  fetch_count(view.handles[e.view]);
  const SeenRole* const roles = view.seen_roles.data() + e.first_role;
  for (int64_t role = 0; role < e.roles; ++role) {
    __builtin_prefetch(roles[role].whole);
    __builtin_prefetch(roles[role].object);
    if (roles[role].near != nullptr) fetch(roles[role].near, roles[role].storage);
  }
}

void fetch_flat(const View& view, int64_t i, const Expected& e) {
  __builtin_prefetch(view.params[size_t(i)]);
  __builtin_prefetch(view.seen[size_t(i)].own);
  __builtin_prefetch(view.handles[e.held + kGrad].object);
  fetch_count(view.handles[e.view]);
  for (int64_t role = 0; role < e.roles; ++role) {
    const Held& held = view.handles[e.held + role];
    __builtin_prefetch(held.handle);
    fetch(held.near, view.seen_roles[size_t(e.first_role + role)].storage);
  }
}

// Do the groups hold these parameters, in this order?
bool same_params(PyObject* groups, const View& view) {
  const Py_ssize_t n_groups = PyList_Size(groups), total = view.parameters;
  Py_ssize_t i = 0;
  for (Py_ssize_t g = 0; g < n_groups; ++g) {
    PyObject* group = PyList_GetItem(groups, g);
    PyObject* own = PyDict_Check(group) ? PyDict_GetItemWithError(group, params_key()) : nullptr;
    if (own == nullptr) return false;
    const bool list = PyList_Check(own);
    if (!list && !PyTuple_Check(own)) return false;
    const Py_ssize_t size = list ? PyList_Size(own) : PyTuple_Size(own);
    for (Py_ssize_t k = 0; k < size; ++k, ++i) {
      if (i >= total || view.expected[i].group != g) return false;
      if ((list ? PyList_GetItem(own, k) : PyTuple_GetItem(own, k)) != view.params[size_t(i)]) return false;
    }
  }
  return i == total;
}

// Do the entries of `state` belong to these parameters, in this order? By identity, so that no tensor is hashed.
bool same_state(PyObject* state, View& view) {
  if (PyDict_Size(state) != Py_ssize_t(view.order.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(state, &position, &key, &value); ++i) {
    const int64_t of = view.order[size_t(i)];
    if (of < 0) continue;
    if (key != view.params[size_t(of)]) return false;
    view.seen[size_t(of)].own = value;  // looked at when it has been fetched
  }
  return true;
}

// Dtype, device, shape, and strides wherever they matter; and address.
bool agrees(const DLTensor& t, const Expected& e, const ExpectedRole& role, const int64_t* dims) {
  if (dtype_of(t) != role.dtype || t.ndim != role.ndim || device_of(t) != e.device) return false;
  const int64_t *shape = dims + role.dims, *strides = shape + role.ndim;
  for (int64_t d = 0; d < role.ndim; ++d) {
    if (t.shape[d] != shape[d]) return false;
    if (t.strides[d] != strides[d] && shape[d] > 1 && e.numel > 0) return false;
  }
  if (e.numel > 0 && t.data == nullptr) return false;
  return role.address == 0 || reinterpret_cast<int64_t>(address(t)) == role.address;
}

bool is_as_held(const Held& held, const ExpectedRole& role, const int64_t* dims) {
  int64_t ndim = 0, *shape = nullptr, *strides = nullptr;
  if (dtype_code_of(held.handle) != held.dtype) return false;
  if (aoti_torch_get_dim(held.handle, &ndim) != AOTI_TORCH_SUCCESS || ndim != role.ndim) return false;
  if (aoti_torch_get_sizes(held.handle, &shape) != AOTI_TORCH_SUCCESS) return false;
  if (aoti_torch_get_strides(held.handle, &strides) != AOTI_TORCH_SUCCESS) return false;
  for (int64_t d = 0; d < ndim; ++d)
    if (shape[d] != dims[role.dims + d] || (strides[d] != dims[role.dims + ndim + d] && shape[d] > 1)) return false;
  return true;
}

// The value that a state dictionary has under a name, most often its `position`-th; null where it has none.
PyObject* item(PyObject* own, Py_ssize_t* position, PyObject* name) {
  PyObject *key = nullptr, *value = nullptr;
  if (PyDict_Next(own, position, &key, &value) && key == name) return value;
  value = PyDict_GetItemWithError(own, name);
  if (value == nullptr) PyErr_Clear();
  return value;
}

// The step count of a state must be the table's own, and lie in its vector. Sets where the states follow.
bool counts_here(PyObject* own, Py_ssize_t* position, const View& view, int64_t i, const Expected& e) {
  if (own == nullptr || !PyDict_Check(own)) return false;
  const Held& count = view.handles[e.view];
  return item(own, position, view.names[0]) == count.object && lies_at(count, view.steps + i) &&
         dtype_code_of(count.handle) == count.dtype;
}

// One parameter that lies in no flat buffer, with a gradient: is it as expected? Its segment is written.
bool check_ordinary(PyObject* param, PyObject* grad, PyObject* keep, View& view, int64_t i, const Expected& e) {
  Seen& seen = view.seen[size_t(i)];
  Py_ssize_t position = 0;
  if (!counts_here(seen.own, &position, view, i, e)) return false;
  const ExpectedRole* const roles = view.roles + e.first_role;
  SeenRole* const noted = view.seen_roles.data() + e.first_role;
  void* grad_address = nullptr;
  for (int64_t role = 0; role < e.roles; ++role) {
    PyObject* tensor = role == kParam ? param : grad;
    if (role >= kState) {
      tensor = item(seen.own, &position, view.names[roles[role].name]);
      if (tensor == nullptr) return false;
    }
    Local here;
    if (!local(tensor, &here) || reinterpret_cast<int64_t>(here.spec) != roles[role].spec) return false;
    DLTensor t;
    if (!read(here.tensor, &t) || !agrees(t, e, roles[role], view.dims)) return false;
    if (lazy(t)) return false;
    noted[role].whole = tensor;
    noted[role].object = here.tensor;
    noted[role].near = t.shape;
    if (role == kGrad) {
      grad_address = address(t);
      if (e.flat_grad != 0 && reinterpret_cast<int64_t>(grad_address) == e.flat_grad) return false;  // flat again
    }
    if (keep != nullptr && role != kParam && PyList_Append(keep, here.tensor) < 0) {
      PyErr_Clear();
      return false;
    }
  }
  seen.grad = grad;
  seen.grad_address = grad_address;
  Moving& moving = view.moving[e.segment];
  moving.grad = grad_address;
  moving.numel = e.numel;
  moving.aligned = e.aligned && reinterpret_cast<uintptr_t>(grad_address) % 16 == 0;
  return true;
}

// The same of one that lies in flat buffers.
bool check_flat(PyObject* param, PyObject* grad, View& view, int64_t i, const Expected& e) {
  const ExpectedRole* const roles = view.roles + e.first_role;
  const std::vector<Held>& held = view.handles;
  PyObject* const own = view.seen[size_t(i)].own;
  Py_ssize_t position = 0;
  if (param != held[e.held + kParam].object || grad != held[e.held + kGrad].object) return false;
  if (!counts_here(own, &position, view, i, e)) return false;
  for (int64_t role = kState; role < e.roles; ++role)
    if (item(own, &position, view.names[roles[role].name]) != held[e.held + role].object) return false;
  for (int64_t role = 0; role < e.roles; ++role) {
    const int64_t at = role == kGrad ? e.flat_grad : roles[role].address;
    if (!lies_at(held[e.held + role], reinterpret_cast<void*>(at))) return false;
    if (lazy(held[e.held + role])) return false;
  }
  // A state is written where it lies, whatever is done to its shape: identity and address are enough.
  for (const Role role : {kParam, kGrad})
    if (!is_as_held(held[e.held + role], roles[role], view.dims)) return false;
  view.moving[e.segment] = {reinterpret_cast<void*>(e.flat_grad), e.numel, view.moving[e.segment].row, e.aligned};
  return true;
}

// What a parameter is stepped with, a new reference: its gradient, or what the step was given in the place of these.
PyObject* gradient_of(const View& view, PyObject* param, int64_t i) {
  if (view.gradients == nullptr) return grad_of(param);
  PyObject* const given = PyList_GetItem(view.gradients, Py_ssize_t(i));
  Py_XINCREF(given);
  return given;
}

}  // namespace

bool check(View& view, PyObject* groups, PyObject* state, PyObject* keep, Changes* found) {
  if (!same_params(groups, view) || !same_state(state, view)) {
    PyErr_Clear();
    found->other = true;
    return true;
  }
  const int64_t n = view.parameters;
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) {
      const Expected& ahead = view.expected[i + kAhead];
      if (ahead.kind == kOrdinary)
        fetch_ordinary(view, i + kAhead, ahead);
      else if (ahead.kind == kFlat)
        fetch_flat(view, i + kAhead, ahead);
    }
    const Expected& e = view.expected[i];
    PyObject* const param = view.params[size_t(i)];
    bool now = e.inspected != kWithoutGradient, fine = e.inspected != kNotYet;
    if (e.inspected == kNotYet && e.kind != kSpecial && compared(param)) {
      PyObject* const grad = gradient_of(view, param, i);
      if (grad == nullptr) return false;
      now = grad != Py_None;
      if (!now)
        fine = true;
      else if (e.kind == kFlat)
        fine = check_flat(param, grad, view, i, e);
      else if (e.kind == kOrdinary)
        fine = check_ordinary(param, grad, keep, view, i, e);
      Py_DECREF(grad);
    }
    found->inspected |= e.inspected != kNotYet;
    const float steps = view.steps[i];
    if (now && !(steps >= 0 && steps < 0x1p53f && steps == float(int64_t(steps)))) fine = false;
    if (!now && e.kind != kUnseen) view.moving[e.segment].numel = 0;
    if (!fine) found->odd.push_back(i);
    found->changed |= now != (view.active[i] != 0);
    view.active[i] = now ? 1 : 0;
  }
  return true;
}

// The view, made
// -------------------------------------------------------------------------------------------------------

View::~View() {
  for (PyObject* name : names) Py_XDECREF(name);
  Py_XDECREF(hold);
  Py_XDECREF(owners);
}

View* view_of(PyObject* capsule) { return static_cast<View*>(PyCapsule_GetPointer(capsule, kView)); }

namespace {

void destroy(PyObject* capsule) { delete view_of(capsule); }

void require(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(std::string("a table's ") + what + " do not belong together");
}

// Positions that are read in every step, and lengths.
void check_positions(const View& view, int64_t roles, int64_t dims, int64_t names) {
  const int64_t n = view.parameters;
  for (const int64_t of : view.order) require(of < n, "entries of state");
  for (int64_t i = 0; i < n; ++i) {
    const Expected& e = view.expected[i];
    require(e.segment >= 0 && e.segment < view.segments && e.inspected >= 0 && e.inspected <= 2, "parameters");
    require(e.first_role >= 0 && e.roles >= 0 && e.roles <= kMaxRoles && e.first_role + e.roles <= roles, "roles");
    const int64_t held = e.kind == kFlat ? e.roles : 0;
    require(e.held >= 0 && e.held + held <= int64_t(view.handles.size()), "handles");
    require(e.view >= 0 && (e.view < int64_t(view.handles.size()) || e.roles == 0), "step counts");
  }
  for (int64_t i = 0; i < roles; ++i) {
    const ExpectedRole& role = view.roles[i];
    require(role.name >= 0 && role.name < names, "names");
    require(role.ndim >= 0 && role.dims >= 0 && role.dims + 2 * role.ndim <= dims, "shapes");
  }
  require(view.firsts[0] == 0 && view.firsts[view.buckets] <= view.segments, "buckets");
  for (int64_t b = 0; b < view.buckets; ++b) require(view.firsts[b] <= view.firsts[b + 1], "buckets");
}

}  // namespace

// view(params, tensors, names, hold, held) -> capsule. `params`: a tuple; `tensors`: a tuple, in the order below;
// `held`: the tensors that are compared through handles, kept by the caller as long as the view.
PyObject* view(PyObject*, PyObject* args) {
  PyObject *params, *tensors, *names, *hold, *held;
  if (!PyArg_ParseTuple(args, "O!O!O!OO!", &PyTuple_Type, &params, &PyTuple_Type, &tensors, &PyTuple_Type, &names,
                        &hold, &PyList_Type, &held))
    return nullptr;
  return guarded([&]() -> PyObject* {
    auto made = std::make_unique<View>();
    View& v = *made;
    require(PyTuple_Size(tensors) == 17 && PyTuple_Size(names) >= 1 && PyTuple_Size(names) <= kMaxRoles, "arrays");
    Py_ssize_t at = 0;
    const auto next = [&](const char* name, const char* dtype, int64_t columns) {
      return memory_of(PyTuple_GetItem(tensors, at++), name, dtype, columns);
    };
    const int64_t n = v.parameters = PyTuple_Size(params);
    const Memory order = next("order", "int64", 0), expected = next("expected", "int64", kExpectedWords),
                 roles = next("roles", "int64", kExpectedRoleWords), dims = next("dims", "int64", 0),
                 storages = next("storages", "int64", 0), steps = next("steps", "float32", 0),
                 active = next("active", "float32", 0), fresh = next("fresh", "uint8", 0),
                 firsts = next("firsts", "int64", 0), moving = next("moving", "int64", kMovingWords),
                 places = next("places", "int64", -1), control = next("control", "float64", 0);
    const bool flat = PyTuple_GetItem(tensors, at) != Py_None;
    require(expected.rows == n && steps.rows == n && active.rows == n && fresh.rows == n, "parameters");
    require(storages.rows == roles.rows && control.rows == 2 && firsts.rows >= 1, "arrays");
    require(moving.rows == places.rows && places.columns >= kAddresses + 1, "segments");
    v.buckets = firsts.rows - 1;
    v.segments = moving.rows;
    v.place_words = places.columns;
    v.order.assign(order.as<const int64_t>(), order.as<const int64_t>() + order.rows);
    v.expected = expected.as<Expected>();
    v.roles = roles.as<const ExpectedRole>();
    v.dims = dims.as<const int64_t>();
    v.steps = steps.as<float>();
    v.active = active.as<float>();
    v.fresh = fresh.as<uint8_t>();
    v.firsts = firsts.as<const int64_t>();
    v.moving = moving.as<Moving>();
    v.places = places.as<const int64_t>();
    v.control = control.as<Control>();
    v.ranges = nullptr;
    if (flat) {
      const Memory ranges = next("ranges", "int64", kFlatRangeWords), moving = next("runs", "int64", kMovingWords),
                   places = next("places of runs", "int64", v.place_words),
                   capacities = next("capacities of runs", "int64", 0), firsts = next("firsts of runs", "int64", 0);
      require(ranges.rows == v.segments && moving.rows == v.segments && places.rows == v.segments &&
                  capacities.rows == v.segments && firsts.rows == v.buckets + 1,
              "runs");
      v.ranges = ranges.as<const FlatRange>();
      v.run_moving = moving.as<Moving>();
      v.run_places = places.as<int64_t>();
      v.run_capacities = capacities.as<int64_t>();
      v.run_firsts = firsts.as<int64_t>();
      v.run_firsts[0] = 0;
    }
    v.handles = held_of(held);
    check_positions(v, roles.rows, dims.rows, PyTuple_Size(names));
    for (int64_t i = 0; i < roles.rows; ++i)
      v.seen_roles.push_back({nullptr, nullptr, nullptr, reinterpret_cast<const void*>(storages.as<int64_t>()[i])});
    v.seen.resize(size_t(n));
    for (int64_t i = 0; i < n; ++i) v.params.push_back(PyTuple_GetItem(params, i));
    for (Py_ssize_t i = 0; i < PyTuple_Size(names); ++i) Py_INCREF(v.names[i] = PyTuple_GetItem(names, i));
    Py_INCREF(v.hold = hold);
    Py_INCREF(v.owners = tensors);
    PyObject* const capsule = PyCapsule_New(made.get(), kView, destroy);
    if (capsule != nullptr) made.release();
    return capsule;
  });
}

}  // namespace wd
