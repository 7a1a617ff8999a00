// Flat parameters with their gradients and states, held: the table has handles of these tensors, so that a step reads
// an address in a few nanoseconds where DLPack takes forty.
#pragma once

#include "changes.h"

struct AtenTensorOpaque;  // torch's

namespace wd {

struct Held {
  PyObject* object;  // alive as long as the holding's list
  AtenTensorOpaque* handle;
  const char* near;  // an address inside torch's tensor, to be prefetched
  int32_t dtype;     // torch's code of it
};

// The tensors of a capsule, or null where there is none.
const Held* held_of(PyObject* capsule);

// Parameter `i`, of kind kFlat, with a gradient: is everything where it was? 1 yes (its segment is written), 0 no, -1
// an error is set. `held` are its parameter, gradient and states.
int check_flat(PyObject* grad, PyObject* const* names, const View& view, int64_t i, const Held* held);

// What parameter `i` will need, ahead of time.
void fetch_flat(PyObject* param, const View& view, int64_t i, const Held* held);

// holding(tensors, address) -> capsule: owns what the operator `hold` returned for that list.
PyObject* holding(PyObject* module, PyObject* args);

}  // namespace wd
