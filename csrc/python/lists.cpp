// Segments of tensors that somebody else holds: the functional API's counterpart of `check`, which sees them once.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../cpu/plan.h"
#include "changes.h"
#include "memory.h"
#include "uninterrupted.h"

namespace wd {
namespace {

constexpr int kMaxDims = 16;

// Do the elements fill a stretch of memory, in any order of dimensions?
bool dense(const DLTensor& t) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int32_t d = t.ndim; d-- > 0; expected *= t.shape[d])
    contiguous = contiguous && (t.shape[d] == 1 || t.strides[d] == expected);
  if (contiguous) return true;
  if (t.ndim > kMaxDims) return false;
  int64_t dims[kMaxDims];
  for (int32_t d = 0; d < t.ndim; ++d) dims[d] = d;
  std::sort(dims, dims + t.ndim, [&](int64_t a, int64_t b) { return t.strides[a] < t.strides[b]; });
  expected = 1;
  for (int32_t d = 0; d < t.ndim; ++d) {
    if (t.shape[dims[d]] == 1) continue;
    if (t.strides[dims[d]] != expected) return false;
    expected *= t.shape[dims[d]];
  }
  return true;
}

bool same_layout(const DLTensor& t, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  if (size_t(t.ndim) != shape.size()) return false;
  for (size_t d = 0; d < shape.size(); ++d)
    if (t.shape[d] != shape[d] || (t.strides[d] != strides[d] && shape[d] > 1)) return false;
  return true;
}

struct Span {
  uintptr_t begin, end;
  bool written;
};

bool earlier(const Span& a, const Span& b) { return a.begin < b.begin; }

// Does a tensor that is written share memory with another? Spans are in order.
bool overlap(const std::vector<Span>& spans) {
  uintptr_t any = 0, written = 0;  // the furthest ends so far
  for (const Span& span : spans) {
    if (span.begin < (span.written ? any : written)) return true;
    any = std::max(any, span.end);
    if (span.written) written = std::max(written, span.end);
  }
  return false;
}

// Are they one for every tile of so many elements, in order?
bool are_scales(const DLTensor& t, int64_t elements) {
  int64_t expected = 1;
  for (int32_t d = t.ndim; d-- > 0; expected *= t.shape[d])
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
  return expected == (elements + kPadding - 1) / kPadding;
}

// The i-th tensor of every role, into its segment; false if they are not as expected. Those from `scales` on are that.
bool gather_one(PyObject* const* roles, int n_roles, int scales, Py_ssize_t i, const int64_t* dtypes, int64_t device,
                Moving& moving, int64_t* place, std::vector<Span>* spans) {
  static thread_local std::vector<int64_t> shape, strides;
  moving = {nullptr, 0, moving.row, 1};
  for (int role = 0; role < n_roles; ++role) {
    PyObject* const tensor = PyList_GetItem(roles[role], i);
    DLTensor t;
    if (!known(tensor) || !read(tensor, &t) || dtype_of(t) != dtypes[role] || device_of(t) != device) return false;
    if (role == kParam) {
      shape.assign(t.shape, t.shape + t.ndim);
      strides.assign(t.strides, t.strides + t.ndim);
      int64_t numel = 1;
      for (const int64_t size : shape) numel *= size;
      moving.numel = numel * (t.code == kComplexCode ? 2 : 1);
      if (numel > 0 && !dense(t)) return false;
    } else if (role < scales ? !same_layout(t, shape, strides) : !are_scales(t, moving.numel)) {
      return false;
    }
    if (lazy(t)) return false;
    const auto begin = reinterpret_cast<uintptr_t>(address(t));
    if (role == kGrad)
      moving.grad = address(t);
    else
      place[address_word(role)] = int64_t(begin);
    if (moving.numel == 0) continue;
    if (t.data == nullptr) return false;
    moving.aligned &= role >= scales || begin % 16 == 0;
    const int64_t elements = role < scales ? moving.numel : (moving.numel + kPadding - 1) / kPadding;
    const int64_t size = t.bits / 8 * elements / (t.code == kComplexCode ? 2 : 1);
    spans[role].push_back({begin, begin + uintptr_t(size), role != kGrad});
  }
  return true;
}

// Lists of tensors for every role, and the segments that they fill.
struct Lists {
  PyObject* roles[kMaxRoles] = {};
  int64_t dtypes[kMaxRoles] = {};
  int n_roles = 0, scales = 0;  // the first of the roles that are scales
  int64_t device = 0;
  Py_ssize_t length = 0;
  Moving* moving = nullptr;
  int64_t *places = nullptr, *capacities = nullptr, place_words = 0;

  // roles: a tuple of lists of equal length; codes: a tuple of a dtype for each; the last `n_scales` are scales of
  // tiles. Throws. `use` or `make_segments` next.
  Lists(PyObject* tuple, PyObject* codes, int64_t on_device, long long n_scales) : device(on_device) {
    if (PyTuple_Size(tuple) > kMaxRoles || PyTuple_Size(tuple) < kState || PyTuple_Size(codes) != PyTuple_Size(tuple))
      throw std::runtime_error("lists must be of 2 to 16 roles, each with a dtype");
    n_roles = int(PyTuple_Size(tuple));
    if (n_scales < 0 || n_scales > n_roles - kState) throw std::runtime_error("states have scales");
    scales = n_roles - int(n_scales);
    for (int role = 0; role < n_roles; ++role) {
      roles[role] = PyTuple_GetItem(tuple, role);
      dtypes[role] = number_of(PyTuple_GetItem(codes, role));
      if (!PyList_Check(roles[role])) throw std::runtime_error("a role must be a list");
    }
    length = PyList_Size(roles[0]);
    place_words = int64_t(address_word(n_roles - 1)) + 1;
  }
  Lists(const Lists&) = delete;
  Lists& operator=(const Lists&) = delete;

  // The segments are Python's.
  void use(PyObject* own_moving, PyObject* own_places, PyObject* own_capacities) {
    const Memory segments = memory_of(own_moving, "moving", "int64", kMovingWords),
                 words = memory_of(own_places, "places", "int64", -1),
                 most = memory_of(own_capacities, "capacities", "int64", 0);
    if (segments.rows != length || words.rows != length || most.rows != length || words.columns < place_words)
      throw std::runtime_error("lists and segments do not belong together");
    moving = segments.as<Moving>();
    places = words.as<int64_t>();
    capacities = most.as<int64_t>();
    place_words = words.columns;
  }

  // The segments are its own; `rows`: those of the parameters, a list, or None: the first.
  void make_segments(PyObject* rows) {
    own_moving_.resize(size_t(length));
    own_places_.resize(size_t(length * place_words));
    own_capacities_.resize(size_t(length));
    moving = own_moving_.data();
    places = own_places_.data();
    capacities = own_capacities_.data();
    if (rows == Py_None) return;
    if (!PyList_Check(rows) || PyList_Size(rows) != length) throw std::runtime_error("each parameter needs a row");
    for (Py_ssize_t i = 0; i < length; ++i) moving[i].row = number_of(PyList_GetItem(rows, i));
  }

  // Fills the segments, but for their rows. -1, or the position of the first tensors that are not as expected, or their
  // number if some overlap: Python finds out what it is.
  Py_ssize_t gather() const {
    std::vector<Span> spans[kMaxRoles], all;
    int64_t origin = 0;
    for (int role = 0; role < n_roles; ++role)
      if (PyList_Size(roles[role]) != length) return 0;
    for (Py_ssize_t i = 0; i < length; ++i) {
      int64_t* const place = places + i * place_words;
      if (!gather_one(roles, n_roles, scales, i, dtypes, device, moving[i], place, spans)) return i;
      place[kOrigin] = origin;
      place[kOutput] = place[kMarks] = 0;
      capacities[i] = moving[i].numel;
      origin += (moving[i].numel + kPadding - 1) / kPadding * kPadding;
    }
    for (std::vector<Span>& own : spans) {  // most often each is in order already
      const auto middle = all.insert(all.end(), own.begin(), own.end());
      if (!std::is_sorted(middle, all.end(), earlier)) std::sort(middle, all.end(), earlier);
      std::inplace_merge(all.begin(), middle, all.end(), earlier);
    }
    return overlap(all) ? length : -1;
  }

 private:
  std::vector<Moving> own_moving_;
  std::vector<int64_t> own_places_, own_capacities_;
};

}  // namespace

// gather(roles, dtypes, device, moving, places, capacities, scales) -> int: writes the segments of tensors that all
// have these dtypes and that device, and says what `Lists::gather` does.
PyObject* gather(PyObject*, PyObject* args) {
  PyObject *tuple, *codes, *moving, *places, *capacities;
  long long device, scales;
  if (!PyArg_ParseTuple(args, "O!O!LOOOL", &PyTuple_Type, &tuple, &PyTuple_Type, &codes, &device, &moving, &places,
                        &capacities, &scales))
    return nullptr;
  return guarded([&] {
    Lists lists(tuple, codes, device, scales);
    lists.use(moving, places, capacities);
    return PyLong_FromSsize_t(lists.gather());
  });
}

namespace {

// Views of all tensors, if they lie where the segments have them.
bool hold_memory(PyObject* hold, const Lists& lists, std::vector<Tensor>* views) {
  const Reference all(PyList_New(0));
  for (int role = 0; role < lists.n_roles; ++role)
    for (Py_ssize_t i = 0; i < lists.length; ++i)
      if (PyList_Append(all.get(), PyList_GetItem(lists.roles[role], i)) < 0)
        throw std::runtime_error("a Python error is set");
  *views = views_of(tensors_of(hold, all.get()));  // whoever waits for the interpreter may have run
  if (lists.gather() != -1) return false;
  for (size_t k = 0; k < views->size(); ++k) {
    const int role = int(k / size_t(lists.length));
    const Py_ssize_t i = Py_ssize_t(k) % lists.length;
    void* now = nullptr;
    if (aoti_torch_get_data_ptr((*views)[k].get(), &now) != AOTI_TORCH_SUCCESS) return false;
    const void* const there =
        role == kGrad ? lists.moving[i].grad
                      : reinterpret_cast<const void*>(lists.places[i * lists.place_words + address_word(role)]);
    if (now != there) return false;
  }
  return true;
}

}  // namespace

// step_lists(roles, kind, rows_of, control, rows, increment, written, hold, others) -> int
// A step of tensors that all are of one kind, (dtypes, device, chunk_size, rule, variant, epilogues, formats, scales),
// and lie on the CPU; `rows_of`: a list of the row of each, or None: the first. The result is -1 when it is taken, else
// nothing was done, and it says what `Lists::gather` does.
PyObject* step_lists(PyObject*, PyObject* args) {
  PyObject *tuple, *kind, *codes, *rows_of, *control, *formats, *rows, *increment, *written, *hold;
  long long device, chunk_size, rule, variant, epilogues, scales;
  int others;
  if (!PyArg_ParseTuple(args, "O!O!OOOOOOp", &PyTuple_Type, &tuple, &PyTuple_Type, &kind, &rows_of, &control, &rows,
                        &increment, &written, &hold, &others) ||
      !PyArg_ParseTuple(kind, "O!LLLLLO!L", &PyTuple_Type, &codes, &device, &chunk_size, &rule, &variant, &epilogues,
                        &PyList_Type, &formats, &scales))
    return nullptr;
  return guarded([&]() -> PyObject* {
    std::vector<int64_t> known;
    for (Py_ssize_t i = 0; i < PyList_Size(formats); ++i) known.push_back(number_of(PyList_GetItem(formats, i)));
    Lists lists(tuple, codes, device, scales);
    lists.make_segments(rows_of);
    const Memory pair = memory_of(control, "control", "float64", 0);
    if (int(known.size()) != lists.n_roles || pair.rows != 2 || chunk_size <= 0 || chunk_size % kBlock != 0)
      throw std::runtime_error("lists, formats, control and chunks do not belong together");
    cpu::Plan plan = {};
    plan.kernel = cpu::find(rule, variant, epilogues, known);
    const Memory scalars = memory_of(rows, "rows", "float64", plan.kernel.width);
    NoCollection meanwhile;
    const Py_ssize_t wrong = lists.gather();
    if (wrong != -1) return PyLong_FromSsize_t(wrong);
    std::vector<int64_t> chunks;
    for (int64_t s = 0; s < lists.length; ++s)
      for (int64_t ordinal = 0; ordinal * chunk_size < lists.moving[s].numel; ++ordinal)
        chunks.push_back(s | ordinal << 32);
    plan.launch = {chunks.data(),
                   lists.places,
                   lists.moving,
                   nullptr,
                   pair.as<const Control>(),
                   int32_t(lists.place_words),
                   0,
                   int32_t(chunk_size)};
    plan.chunks = int64_t(chunks.size());
    plan.segments = lists.length;
    const int64_t elements = cpu::count_elements(plan, scalars.rows);
    const bool unlocked = others != 0 && elements >= kLong;
    std::vector<Tensor> memory;
    if (unlocked && !hold_memory(hold, lists, &memory)) return PyLong_FromSsize_t(lists.length);
    const Reference counted(PyObject_CallFunctionObjArgs(increment, written, nullptr));
    if (counted.get() == nullptr) return nullptr;
    {
      const Unlocked meanwhile_others_run(unlocked);
      cpu::run(plan, scalars.as<const double>(), scalars.columns, elements);
    }
    return PyLong_FromLong(-1);
  });
}

}  // namespace wd
