// Query rows of a group in blocks, as the tile kernels read them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/attention_few.h"
#include "cpu/attention_tile.h"
#include "cpu/attention_work.h"
#include "cpu/rows.h"
#include "cpu/transpose.h"

namespace vico {
namespace VICO_ISA {

// Rows that one pass of the tile kernels takes: as wide as registers allow, no wider than needed.
inline int block_width(int rows_left) {
  if (kLanes == 16 && rows_left > 16) return 32;
  if (kLanes >= 8 && rows_left > 8) return 16;
  return 8;
}

inline int padded_rows(int rows) {
  int padded = 0;
  while (padded < rows) padded += block_width(rows - padded);
  return padded;
}

// The zeros that pad tiles and blocks.
inline const float* zero_row() {
  alignas(64) static const float zeros[kMaxHeadDim] = {};
  return zeros;
}

// Elements of 32 bits of one row: fp32, or (pairs) the two bf16 that lie side by side as they are.
template <typename T>
const float* query_elements(const T* row, int d, bool pairs, float* out) {
  if (pairs || std::is_same_v<T, float>) return reinterpret_cast<const float*>(row);
  load_row(row, out, d);
  return out;
}

#if defined(__AVX512F__)
// 16 rows of n elements to [n][width].
VICO_INLINE void pack_columns(const float* const* rows, int n, int width, float* packed) {
  for (int at = 0; at < n; at += 16) {
    const auto lanes = static_cast<__mmask16>(n - at < 16 ? (1 << (n - at)) - 1 : 0xffff);
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(lanes, rows[i] + at);
    transpose(r);
    for (int i = 0; i < 16 && at + i < n; ++i)
      _mm512_storeu_si512(packed + int64_t{at + i} * width, r[i]);
  }
}
#elif defined(__AVX2__)
// 8 rows of n elements to [n][width]; n is a multiple of 8.
VICO_INLINE void pack_columns(const float* const* rows, int n, int width, float* packed) {
  for (int at = 0; at < n; at += 8) {
    __m256i r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = load<__m256i>(rows[i] + at);
    transpose(r);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) store(packed + int64_t{at + i} * width, r[i]);
  }
}
#endif

// q, as [n][width] elements for each block of rows: scores take one of all its rows at a time. fp32
// in blocks that score_keys_interleaved takes is [n / 2][width][2], in those that Few takes
// [width][n].
template <typename T>
void pack_queries(const T* q, int64_t q_token, int64_t q_head, const Work& w, bool pairs,
                  float* packed) {
  alignas(64) float converted[16][kMaxHeadDim];
  const float* rows[16];
  const int n = pairs ? w.d / 2 : w.d;
  for (int first = 0, width; first < w.rows; first += width, packed += int64_t{width} * w.d) {
    width = block_width(w.rows - first);
    for (int part = 0; part < width; part += 16) {
      const int count = std::min(16, width - part);
      for (int r = 0; r < count; ++r) {
        const int64_t row = first + part + r, at = w.row0 + row;
        const T* stored = q + at / w.share * q_token + at % w.share * q_head;
        rows[r] = row < w.rows ? query_elements(stored, w.d, pairs, converted[r]) : zero_row();
      }
#if defined(__AVX512F__)
      if (count == 16) {
        pack_columns(rows, n, width, packed + part);
        continue;
      }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
      if (width == kFewRows)
        for (int r = 0; r < 8; ++r) std::memcpy(packed + r * n, rows[r], n * sizeof(float));
      else
        for (int r = 0; r < 16; r += 8) pack_columns(rows + r, n, width, packed + r);
#else
      for (int r = 0; r < count; ++r) {
        if (width == 8 && !pairs && kInterleaved<8, Singles>)
          for (int c = 0; c < n; c += 2) std::memcpy(packed + c * 8 + 2 * r, rows[r] + c, 8);
        else
          for (int c = 0; c < n; ++c)
            std::memcpy(packed + int64_t{c} * width + part + r, rows[r] + c, sizeof(float));
      }
#endif
    }
  }
}

}  // namespace VICO_ISA
}  // namespace vico
