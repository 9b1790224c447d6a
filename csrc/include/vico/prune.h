// The arguments of prune_tokens as plain data; ops/_prune_rule.py defines what the fields mean.
#pragma once

#include <cstdint>

#include "vico/dtype.h"

namespace vico {

enum class PruneReference : int {
  kPrevious = 0,
  kLastKept = 1,
  kChunkFirst = 2,
  kFrameMean = 3,
  kRunningMean = 4
};
enum class PruneMetric : int { kCosine = 0, kL1 = 1, kL2 = 2, kGaussian = 3 };
enum class PruneKeep : int { kBelow = 0, kAtMost = 1, kAbove = 2, kAtLeast = 3 };
enum class PruneQuota : int { kNone = 0, kNumber = 1, kRatio = 2, kDropRatio = 3 };
enum class PruneScope : int { kStep = 0, kChunk = 1, kCall = 2 };
enum class PruneAlways : int { kNone = 0, kFirst = 1, kFirstOfStream = 2 };

struct PruneTerm {
  PruneReference reference;
  PruneMetric metric;
  float weight;
};

struct PruneRule {
  PruneTerm term[2];
  int terms;
  float external;   // weight of external_score; 0: none
  float threshold;  // NaN: none
  PruneKeep keep;
  PruneQuota quota;
  int64_t number, drop_multiple;  // k; with group_k the numbers come from there
  double ratio;                   // or drop_ratio
  PruneScope scope;
  PruneAlways always_keep;
  bool reduce_any, mask_or, history_by_step;
  int64_t channels;  // how many are compared
};

// Strides are in elements; the last dimension of every tensor is dense.
struct PruneArgs {
  PruneRule rule;
  DType dtype;
  int64_t width, capacity, total, segments;
  const int64_t* shapes;  // [segments, 2]: steps, places
  bool packed;            // steps follow each other without gaps, the step strides do not count
  int64_t x_step, x_row, positions_axis, positions_step, mask_step;
  int64_t tokens_row, out_positions_axis;
  int64_t previous_row, previous_place, last_row, last_place, mean_row;
  int64_t groups, group_k_unit;  // columns of group_k, its stride (0: one row for all units)

  const void* x;                // [T, N, D] or [M, D]
  const int32_t* positions;     // [3, T, N] or [3, M]
  void* tokens;                 // [C, D]
  int32_t* out_positions;       // [3, C]
  int32_t* index;               // [C]
  int32_t* cu_count;            // [segments + 1]
  bool* mask;                   // [T, N] or [M]
  int32_t* steps;               // [segments] or null: no state
  void* previous;               // [segments, L, D] or null
  void* last_kept;              // [segments, L, D] or null
  float* mean;                  // [segments, D] or null
  int32_t* mean_count;          // [segments]
  const float* external_score;  // [total] or null
  const bool* external_mask;    // [total] or null
  const int32_t* group_ids;     // [total] or null
  const int32_t* group_k;       // [units or 1, groups] or null
};

}  // namespace vico
