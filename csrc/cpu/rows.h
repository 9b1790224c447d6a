// Rows of fp32, fp16 and bf16 in memory to and from fp32 in registers; lengths are multiples of 8.
#pragma once

#include <cstdint>
#include <cstring>

#include "vico/macros.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace vico {
namespace VICO_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline void load_row(const float* row, float* out, int n) {
  std::memcpy(out, row, n * sizeof(float));
}

inline void store_row(const float* row, float* out, int n) {
  std::memcpy(out, row, n * sizeof(float));
}

inline void load_row(const BFloat16* row, float* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = bits_to_float(static_cast<uint32_t>(row[i].bits) << 16);
}

inline void store_row(const float* row, BFloat16* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = float_to_bits(row[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties even
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out[i].bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
  }
}

#if defined(__F16C__)
inline void load_row(const Half* row, float* out, int n) {
  for (int i = 0; i < n; i += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(packed));
  }
}

inline void store_row(const float* row, Half* out, int n) {
  for (int i = 0; i < n; i += 8) {
    const __m128i packed =
        _mm256_cvtps_ph(_mm256_loadu_ps(row + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), packed);
  }
}
#else
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in fp32
    const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return bits_to_float(float_to_bits(value) | sign);
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
  return bits_to_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((size >> 13) & 0x3ffu));
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (size < 0x38800000u) {  // subnormal: the addition's own rounding does it
    const float shifted = bits_to_float(size) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - float_to_bits(0.5f)));
  }
  const uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

VICO_NOINLINE inline void load_row(const Half* row, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = half_to_float(row[i].bits);
}

VICO_NOINLINE inline void store_row(const float* row, Half* out, int n) {
  for (int i = 0; i < n; ++i) out[i].bits = float_to_half(row[i]);
}
#endif

}  // namespace VICO_ISA
}  // namespace vico
