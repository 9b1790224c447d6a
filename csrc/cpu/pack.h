// One register of fp32 as elements of any type in memory.
#pragma once

#include <type_traits>

#include "cpu/rows.h"
#include "cpu/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vico {
namespace VICO_ISA {

// kLanes elements as they lie in memory, rounded once to nearest, ties to even; NaN stays NaN.
template <typename T>
VICO_INLINE auto pack_lanes(Lanes<kLanes>::F v) {
  typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));
  using Ints = Lanes<kLanes>::I;
  using Unsigned = Lanes<kLanes>::U;
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Unsigned bits = (Unsigned)v;
    const Unsigned nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Unsigned quiet_nan = (bits >> 16) | 0x40u;
    const Unsigned is_nan = (Unsigned)((Ints)(bits & 0x7fffffffu) > 0x7f800000);
    const Unsigned wide = (quiet_nan & is_nan) | (nearest & ~is_nan);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m128i low = _mm256_castsi256_si128((__m256i)wide);
    return (Shorts)_mm_packus_epi32(low, _mm256_extracti128_si256((__m256i)wide, 1));
#else
    return __builtin_convertvector(wide, Shorts);
#endif
  } else {
#if defined(__AVX512F__)
    return (Shorts)_mm512_maskz_cvtps_ph(static_cast<__mmask16>(0xffff), (__m512)v,
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__) && defined(__F16C__)
    return (Shorts)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    alignas(64) float wide[kLanes];
    T halves[kLanes];
    store(wide, v);
    store_row(wide, halves, kLanes);
    return load<Shorts>(halves);
#endif
  }
}

}  // namespace VICO_ISA
}  // namespace vico
