// One register of fp32 from elements of any type in memory.
#pragma once

#include <cstring>

#include "cpu/rows.h"
#include "cpu/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vico {
namespace VICO_ISA {

VICO_INLINE Lanes<kLanes>::F load_lanes(const float* at) { return load<Lanes<kLanes>::F>(at); }

VICO_INLINE Lanes<kLanes>::F load_lanes(const BFloat16* at) {
  using Unsigned = Lanes<kLanes>::U;
#if defined(__AVX512F__)
  // GCC widens halves and puts them together. The mask of all lanes: as for Half below.
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  const Unsigned wide = (Unsigned)_mm512_maskz_cvtepu16_epi32(static_cast<__mmask16>(~0), packed);
#elif defined(__AVX2__)
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  const Unsigned wide = (Unsigned)_mm256_cvtepu16_epi32(packed);
#else
  typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));
  const Unsigned wide = __builtin_convertvector(load<Shorts>(at), Unsigned);
#endif
  return (Lanes<kLanes>::F)(wide << 16);
}

VICO_INLINE Lanes<kLanes>::F load_lanes(const Half* at) {
#if defined(__AVX512F__)
  // The mask of all lanes: the plain intrinsic warns of its own undefined operand in GCC 12.
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return (Lanes<kLanes>::F)_mm512_maskz_cvtph_ps(static_cast<__mmask16>(0xffff), halves);
#elif defined(__AVX2__) && defined(__F16C__)
  return (Lanes<kLanes>::F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
  alignas(64) float wide[8];
  static_assert(kLanes <= 8, "");
  load_row(at, wide, kLanes);
  return load<Lanes<kLanes>::F>(wide);
#endif
}

// The next kLanes elements of a row, or the last `left` of them with zeros behind.
template <typename T>
VICO_INLINE Lanes<kLanes>::F load_lanes(const T* at, int64_t left) {
  if (left >= kLanes) return load_lanes(at);
  T padded[kLanes];
  std::memset(padded, 0, sizeof(padded));
  std::memcpy(padded, at, left * sizeof(T));
  return load_lanes(padded);
}

}  // namespace VICO_ISA
}  // namespace vico
