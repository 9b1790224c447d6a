// How alike two vectors are, from sums over them: what prune and reuse share on every backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "vico/macros.h"

namespace vico {
namespace VICO_ISA {

// Cosine from a dot product and sums of squares: 1 of two zero vectors, 0 of one. The root of the
// product of equal sums is that sum, so equal vectors have exactly 1; fp64 keeps it in range.
VICO_INLINE float cosine_of(float dot, float a_squares, float b_squares) {
  const double product = static_cast<double>(a_squares) * static_cast<double>(b_squares);
  if (product == 0.0) return a_squares == 0.0f && b_squares == 0.0f ? 1.0f : 0.0f;
  const double value = static_cast<double>(dot) / sqrt(product);
  return static_cast<float>(value < -1.0 ? -1.0 : value > 1.0 ? 1.0 : value);  // NaN stays
}

// sum(exp(-distance / 2^(k+1)) for k in -3..1): the scales are powers of two, one exp serves all.
VICO_INLINE float gaussian_of(float distance) {
  const double widest = exp(-0.25 * static_cast<double>(distance));
  double power = widest, sum = widest;
  for (int k = 0; k < 4; ++k) {
    power *= power;
    sum += power;
  }
  return static_cast<float>(sum);
}

// 1 / norm of a vector that the gaussian metric normalises, as torch.nn.functional.normalize has
// it.
VICO_INLINE float inverse_norm(float squares) {
  const float norm = sqrtf(squares);
  return 1.0f / (norm < 1e-12f ? 1e-12f : norm);  // NaN stays
}

// Unsigned integers in the order of the floats, the lowest first: NaN like -inf, -0 like 0.
VICO_INLINE uint32_t rank_bits(float value) {
  if (value != value) value = -INFINITY;
  value += 0.0f;
  union {
    float number;
    uint32_t bits;
  } as{value};
  return as.bits & 0x80000000u ? ~as.bits : as.bits | 0x80000000u;
}

// Sorts by class, then value, then index; unique for each index below 2^31.
VICO_INLINE uint64_t rank_key(bool last, float value, int64_t index) {
  return static_cast<uint64_t>(last) << 63 | static_cast<uint64_t>(rank_bits(value)) << 31 |
         static_cast<uint64_t>(index);
}

}  // namespace VICO_ISA
}  // namespace vico
