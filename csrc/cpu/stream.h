// Writes around the cache, for rows that are large together or that nobody will read soon.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace vico {
namespace VICO_ISA {

constexpr int64_t kStreamAlignment = 64;

VICO_INLINE bool can_stream(const void* row, int64_t bytes) {
#if defined(__SSE2__)
  return reinterpret_cast<uintptr_t>(row) % kStreamAlignment == 0 && bytes % kStreamAlignment == 0;
#else
  (void)row, (void)bytes;
  return false;
#endif
}

VICO_INLINE void stream(float* at, Lanes<kLanes>::F v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(at, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(at, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(at, (__m128)v);
#else
  store(at, v);
#endif
}

// Each thread calls it after its last streamed write, before others may read.
VICO_INLINE void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace VICO_ISA
}  // namespace vico
