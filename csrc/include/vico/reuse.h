// The arguments of select_changed, gather_rows and merge_rows as plain data.
#pragma once

#include <cstdint>

#include "vico/dtype.h"

namespace vico {

enum class Likeness : int { kCosine = 0, kL1 = 1, kL2 = 2, kDot = 3 };

// Strides are in elements; the last dimension of every tensor is dense, outputs are contiguous. A
// tensor that all frames share has a frame stride of 0.
struct ChangedArgs {
  const void* feature;    // [F, N, C]
  const void* reference;  // [F or 1, N, C]
  const bool* force;      // [F or 1, N] or null
  int32_t* index;         // [F, K]
  int32_t* count;         // [F]
  float* similarity;      // [F, N]

  int64_t frames, places, width, k, capacity;
  int64_t feature_frame, feature_row, reference_frame, reference_row, force_frame;
  float threshold;  // NaN: none
  Likeness metric;
  DType dtype;
};

struct GatherArgs {
  const void* x;         // [F, N, C]
  const int32_t* index;  // [F, K]
  void* out;             // [F, K, C]

  int64_t frames, places, width, rows;
  int64_t x_frame, x_row, index_frame;
  DType dtype;
};

struct MergeRowsArgs {
  const void* base;      // [F or 1, N, C]
  const void* rows;      // [F, K, C]
  const int32_t* index;  // [F, K]
  const void* residual;  // [F, N, C] or null
  void* out;             // [F, N, C]

  int64_t frames, places, width, replaced;
  int64_t base_frame, base_row, rows_frame, rows_row, index_frame, residual_frame, residual_row;
  DType dtype;
};

}  // namespace vico
