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

#if defined(__AVX512F__)
// The sums of sixteen, with fewer shuffles for each: neighbours are added while two vectors become
// one, then quads likewise.
VICO_INLINE void sums_of(const Lanes<kLanes>::F (&v)[16], float* out) {
  __m512 a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const auto x = (__m512)v[2 * i], y = (__m512)v[2 * i + 1];
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const auto quads = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  _mm512_storeu_ps(out, quads(quads(b[0], b[1]), quads(b[2], b[3])));
}
#endif

VICO_INLINE float sum_of(Lanes<kLanes>::F v) {
  float out[4];
  sums_of({v, v, v, v}, out);
  return out[0];
}

}  // namespace VICO_ISA
}  // namespace vico
