// Segments of tensors that somebody else holds: the functional API's counterpart of `refresh`, which sees them once.
#include <algorithm>
#include <vector>

#include "changes.h"

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

// The i-th tensor of every role, into its segment. 1 done, 0 not as expected, -1 an error is set.
int gather_one(PyObject* const* roles, int n_roles, Py_ssize_t i, const int64_t* dtypes, int64_t device, Moving& moving,
               int64_t* place, std::vector<Span>* spans) {
  static thread_local std::vector<int64_t> shape, strides;
  moving = {nullptr, 0, 0, 1};
  for (int role = 0; role < n_roles; ++role) {
    PyObject* const tensor = PyList_GetItem(roles[role], i);
    DLTensor t;
    if (!known(tensor) || !read(tensor, &t) || dtype_of(t) != dtypes[role] || device_of(t) != device) return 0;
    if (role == kParam) {
      shape.assign(t.shape, t.shape + t.ndim);
      strides.assign(t.strides, t.strides + t.ndim);
      int64_t numel = 1;
      for (const int64_t size : shape) numel *= size;
      moving.numel = numel * (t.code == kComplexCode ? 2 : 1);
      if (numel > 0 && !dense(t)) return 0;
    } else if (!same_layout(t, shape, strides)) {
      return 0;
    }
    // A real tensor with the negative bit is the imaginary part of a conjugate: it is not dense, but for one element or
    // where as_strided made it so. Asking costs 50 ns; of gradients, which come from anywhere, it is asked always.
    if (role == kGrad || t.code == kComplexCode || moving.numel == 1) {
      const int found = lazy(tensor, t.code == kComplexCode);
      if (found != 0) return found < 0 ? -1 : 0;
    }
    const auto begin = reinterpret_cast<uintptr_t>(address(t));
    if (role == kGrad)
      moving.grad = address(t);
    else
      place[address_word(role)] = int64_t(begin);
    if (moving.numel == 0) continue;
    if (t.data == nullptr) return 0;
    moving.aligned &= begin % 16 == 0;
    const int64_t size = t.bits / 8 * moving.numel / (t.code == kComplexCode ? 2 : 1);
    spans[role].push_back({begin, begin + uintptr_t(size), role != kGrad});
  }
  return 1;
}

}  // namespace

// gather(roles, dtypes, device, moving, places, capacities, place_words) -> int: writes the segments of tensors that
// all have these dtypes and that device. `roles` is a tuple of lists of equal length. The result is -1, or the position
// of the first tensors that are not as expected, or their number if some overlap: Python finds out what it is.
PyObject* gather(PyObject*, PyObject* args) {
  PyObject *tuple, *codes;
  long long device, place_words;
  unsigned long long at_moving, at_places, at_capacities;
  if (!PyArg_ParseTuple(args, "O!O!LKKKL", &PyTuple_Type, &tuple, &PyTuple_Type, &codes, &device, &at_moving,
                        &at_places, &at_capacities, &place_words))
    return nullptr;
  auto* moving = reinterpret_cast<Moving*>(at_moving);
  auto* places = reinterpret_cast<int64_t*>(at_places);
  auto* capacities = reinterpret_cast<int64_t*>(at_capacities);
  const int n_roles = int(std::min<Py_ssize_t>(PyTuple_Size(tuple), kMaxRoles));
  PyObject* roles[kMaxRoles] = {};
  int64_t dtypes[kMaxRoles] = {};
  std::vector<Span> spans[kMaxRoles], all;
  for (int role = 0; role < n_roles; ++role) {
    roles[role] = PyTuple_GetItem(tuple, role);
    dtypes[role] = PyLong_AsLongLong(PyTuple_GetItem(codes, role));
    if (PyErr_Occurred()) return nullptr;
  }
  const Py_ssize_t n = PyList_Size(roles[0]);
  int64_t origin = 0;
  for (Py_ssize_t i = 0; i < n; ++i) {
    int64_t* const place = places + i * place_words;
    const int found = gather_one(roles, n_roles, i, dtypes, device, moving[i], place, spans);
    if (found < 0) return nullptr;
    if (found == 0) return PyLong_FromSsize_t(i);
    place[kOrigin] = origin;
    place[kOutput] = 0;
    origin += capacities[i] = moving[i].numel;
  }
  for (std::vector<Span>& own : spans) {  // most often each is in order already
    const auto middle = all.insert(all.end(), own.begin(), own.end());
    if (!std::is_sorted(middle, all.end(), earlier)) std::sort(middle, all.end(), earlier);
    std::inplace_merge(all.begin(), middle, all.end(), earlier);
  }
  return PyLong_FromSsize_t(overlap(all) ? n : -1);
}

}  // namespace wd
