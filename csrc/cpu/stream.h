// Writes that need not go through the caches.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vico {
namespace VICO_ISA {

constexpr int64_t kStreamAlignment = 64;

// An output of this size is written around the cache: a plain store reads the line first, which
// costs more than the next op saves by finding the end of the output there (1.6 x at 11 MB). A
// smaller one is given memory that was an output just before, which the cache still has.
constexpr int64_t kStreamedBytes = 8 << 20;

VICO_INLINE bool can_stream(const void* row, int64_t bytes) {
#if defined(__x86_64__)
  return reinterpret_cast<uintptr_t>(row) % kStreamAlignment == 0 && bytes % kStreamAlignment == 0;
#else
  (void)row, (void)bytes;
  return false;
#endif
}

// `at` is aligned to the size of the vector.
template <typename V>
VICO_INLINE void stream(void* at, V v) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(at), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(at), (__m256i)v);
#endif
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(at), (__m128i)v);
  if constexpr (sizeof(V) == 8) {
    long long bits;
    std::memcpy(&bits, &v, sizeof(bits));
    return _mm_stream_si64(static_cast<long long*>(at), bits);
  }
#endif
  store(at, v);
}

// Each thread calls it after its last streamed write, before others may read.
VICO_INLINE void end_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

inline void copy_row(void* row, const void* from, int64_t bytes, bool streamed) {
  if (!streamed || !can_stream(row, bytes)) {
    std::memcpy(row, from, bytes);
    return;
  }
  using Vector = Lanes<kLanes>::I;
  for (int64_t i = 0; i < bytes; i += sizeof(Vector))
    stream(static_cast<char*>(row) + i, load<Vector>(static_cast<const char*>(from) + i));
}

inline void clear_row(void* row, int64_t bytes, bool streamed) {
  if (!streamed || !can_stream(row, bytes)) {
    std::memset(row, 0, bytes);
    return;
  }
  using Vector = Lanes<kLanes>::I;
  for (int64_t i = 0; i < bytes; i += sizeof(Vector)) stream(static_cast<char*>(row) + i, Vector{});
}

}  // namespace VICO_ISA
}  // namespace vico
