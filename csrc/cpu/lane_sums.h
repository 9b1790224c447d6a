// The sum of each of a few vectors, in one order: halves are added until eight lanes are left, then
// neighbours, then pairs, then quads.
#pragma once

#include "cpu/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vico {
namespace VICO_ISA {

#if defined(__AVX2__)
VICO_INLINE __m256 eight_lanes(Lanes<kLanes>::F v) {
#if defined(__AVX512F__)
  __m256 half[2];
  std::memcpy(half, &v, sizeof(half));
  return _mm256_add_ps(half[0], half[1]);
#else
  return reinterpret_cast<__m256>(v);
#endif
}
VICO_INLINE void sums_of(const Lanes<kLanes>::F (&v)[4], float* out) {
  const __m256 pairs0 = _mm256_hadd_ps(eight_lanes(v[0]), eight_lanes(v[1]));
  const __m256 pairs1 = _mm256_hadd_ps(eight_lanes(v[2]), eight_lanes(v[3]));
  const __m256 quads = _mm256_hadd_ps(pairs0, pairs1);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}
#else
VICO_INLINE void sums_of(const Lanes<kLanes>::F (&v)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
}
#endif

VICO_INLINE float sum_of(Lanes<kLanes>::F v) {
  float out[4];
  sums_of({v, v, v, v}, out);
  return out[0];
}

}  // namespace VICO_ISA
}  // namespace vico
