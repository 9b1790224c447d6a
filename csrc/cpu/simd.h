// Vectors of floats as GCC and Clang have them: one source for SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#include "vico/macros.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vico {
namespace VICO_ISA {

// The widest vector that is one register here.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <int W>
struct Lanes;
template <>
struct Lanes<4> {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
};
#if defined(__AVX2__)
template <>
struct Lanes<8> {
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
};
#endif
#if defined(__AVX512F__)
template <>
struct Lanes<16> {
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));
};
#endif

template <typename V>
VICO_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V>
VICO_INLINE void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(v));
}

// Bit i: lane i of a comparison holds.
VICO_INLINE uint32_t lanes_of(Lanes<kLanes>::I found) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)found, (__m512i)found);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)found));
#else
  uint64_t words[kLanes / 2], any = 0;
  std::memcpy(words, &found, sizeof(words));
  for (const uint64_t word : words) any |= word;
  if (any == 0) return 0;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(found[i] & 1) << i;
  return bits;
#endif
}

}  // namespace VICO_ISA
}  // namespace vico
