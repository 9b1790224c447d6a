// One register of fp32 as elements of any type in memory.
#pragma once

#include <type_traits>

#include "cpu/rows.h"
#include "cpu/simd.h"

#if defined(__AVX512F__)
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
    return __builtin_convertvector((quiet_nan & is_nan) | (nearest & ~is_nan), Shorts);
  } else {
#if defined(__AVX512F__)
    return (Shorts)_mm512_maskz_cvtps_ph(static_cast<__mmask16>(0xffff), (__m512)v,
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
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
