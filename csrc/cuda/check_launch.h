// What the operator checks of the tensors that it is given. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <string>
#include <vector>

#include "../layout.h"

namespace wd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_memory(const char* operation, const Tensor& tensor, const char* name, bool is_here, ScalarType dtype,
                         int64_t columns) {
  STD_TORCH_CHECK(is_here && tensor.is_contiguous() && tensor.scalar_type() == dtype, operation, ": ", name,
                  " must be a contiguous tensor on the device that steps, int64 or, for rows and control, float64");
  STD_TORCH_CHECK(columns == 0 ? tensor.dim() == 1 : tensor.dim() == 2 && tensor.size(1) == columns, operation, ": ",
                  name, " must have ",
                  columns == 0 ? std::string("one dimension") : std::to_string(columns) + " columns");
}

// What these tensors describe of a launch: chunks, places and moving, the records of layout.h. Addresses of so many
// roles are read, but for the gradient's.
//   chunks   int64 [c];  places int64 [n, place words];  moving int64 [n, 4]
template <class IsHere>
Launch check_table(const char* operation, const Tensor& chunks, const Tensor& places, const Tensor& moving,
                   int64_t chunk_size, size_t roles, const IsHere& is_here) {
  check_memory(operation, chunks, "chunks", is_here(chunks), ScalarType::Long, 0);
  STD_TORCH_CHECK(places.dim() == 2 && places.size(1) >= int64_t(kAddresses + roles - 1), operation,
                  ": places must have a word for every role");
  check_memory(operation, places, "places", is_here(places), ScalarType::Long, places.size(1));
  check_memory(operation, moving, "moving", is_here(moving), ScalarType::Long, kMovingWords);
  STD_TORCH_CHECK(places.size(0) == moving.size(0), operation, ": ", places.size(0), " places beside ", moving.size(0),
                  " segments");
  STD_TORCH_CHECK(chunk_size > 0 && chunk_size % kBlock == 0 && chunk_size <= std::numeric_limits<int32_t>::max() / 2,
                  operation, ": chunk_size=", chunk_size, ": expected a multiple of ", kBlock);
  STD_TORCH_CHECK(chunks.numel() <= std::numeric_limits<int32_t>::max(), operation, ": ", chunks.numel(),
                  " chunks are too many");
  return {static_cast<const int64_t*>(chunks.const_data_ptr()),
          static_cast<const int64_t*>(places.const_data_ptr()),
          static_cast<const Moving*>(moving.const_data_ptr()),
          nullptr,
          nullptr,
          int32_t(places.size(1)),
          0,
          int32_t(chunk_size)};
}

// The launch that these tensors describe, of a kernel that reads `width` scalars of a row.
//   rows     float64 [r, width or more], the scalars;  control: float64 [2], grad_factor and skip
template <class IsHere>
Launch check_launch(const char* operation, const Tensor& chunks, const Tensor& places, const Tensor& moving,
                    const Tensor& rows, const Tensor& control, int64_t chunk_size, size_t roles, int64_t width,
                    const IsHere& is_here) {
  Launch found = check_table(operation, chunks, places, moving, chunk_size, roles, is_here);
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) >= width, operation, ": rows must have ", width, " columns");
  check_memory(operation, rows, "rows", is_here(rows), ScalarType::Double, rows.size(1));
  check_memory(operation, control, "control", is_here(control), ScalarType::Double, 0);
  STD_TORCH_CHECK(control.numel() == 2, operation, ": control must hold grad_factor and skip");
  found.rows = static_cast<const double*>(rows.const_data_ptr());
  found.control = static_cast<const Control*>(control.const_data_ptr());
  found.row_width = int32_t(rows.size(1));
  return found;
}

inline void check_roles(const char* operation, size_t roles) {
  STD_TORCH_CHECK(roles >= kState && roles <= size_t(kMaxRoles), operation, ": formats must name 2 to ", kMaxRoles,
                  " roles");
}

}  // namespace wd
