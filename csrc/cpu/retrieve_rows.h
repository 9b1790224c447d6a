// Rows of a summary against query rows: what scoring does for each block, in fp32.
//
// A row is `segments` runs of d channels (the KV heads that choose together), `stride` apart in the
// summary. Query rows are dense and padded with zeros to `padded(d)` channels a segment. Every sum
// has one order, whatever the number of query rows that share a pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vico {
namespace VICO_ISA {

using F = Lanes<kLanes>::F;

inline int64_t padded(int64_t d) { return (d + kLanes - 1) / kLanes * kLanes; }

// The first n < kLanes floats at `from`, then zeros; reads no further.
inline F load_part(const float* from, int64_t n) {
#if defined(__AVX512F__)
  const __m512 part = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
  return load<F>(&part);
#else
  F part{};
  std::memcpy(&part, from, n * sizeof(float));
  return part;
#endif
}

inline F load_some(const float* from, int64_t n) {
  return n >= kLanes ? load<F>(from) : load_part(from, n);
}

inline F load_up_to(const float* from, int64_t n) { return load_some(from, n); }
template <typename T>
F load_up_to(const T* from, int64_t n) {
  return load_lanes(from, n);
}

// The sum of each vector, in one order: halves are added until eight lanes are left, then
// neighbours, then pairs, then quads.
#if defined(__AVX2__)
VICO_INLINE __m256 eight_lanes(F v) {
#if defined(__AVX512F__)
  __m256 half[2];
  std::memcpy(half, &v, sizeof(half));
  return _mm256_add_ps(half[0], half[1]);
#else
  return reinterpret_cast<__m256>(v);
#endif
}
VICO_INLINE void sums_of(const F (&v)[4], float* out) {
  const __m256 pairs0 = _mm256_hadd_ps(eight_lanes(v[0]), eight_lanes(v[1]));
  const __m256 pairs1 = _mm256_hadd_ps(eight_lanes(v[2]), eight_lanes(v[3]));
  const __m256 quads = _mm256_hadd_ps(pairs0, pairs1);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}
#else
VICO_INLINE void sums_of(const F (&v)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
}
#endif

// Whether any lane of a comparison holds.
VICO_INLINE bool any_of(Lanes<kLanes>::I found) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)found, (__m512i)found) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)found, (__m256i)found) == 0;
#else
  uint64_t words[kLanes / 2], any = 0;
  std::memcpy(words, &found, sizeof(words));
  for (const uint64_t word : words) any |= word;
  return any != 0;
#endif
}

inline float sum_of(F v) {
  float out[4];
  sums_of({v, v, v, v}, out);
  return out[0];
}

// A row of any length in fp32; load_row takes multiples of 8.
template <typename T>
void load_any(const T* row, float* out, int64_t n) {
  const int whole = static_cast<int>(n & ~int64_t{7});
  load_row(row, out, whole);
  if (whole == n) return;
  T rest[8] = {};
  float wide[8];
  std::memcpy(rest, row + whole, (n - whole) * sizeof(T));
  load_row(rest, wide, 8);
  std::memcpy(out + whole, wide, (n - whole) * sizeof(float));
}

struct RowView {
  const float* at;
  int64_t stride;  // between segments
};

struct RowShape {
  int64_t segments, d;
  int64_t query_row() const { return segments * padded(d); }
};

// Memory is asked for this many floats ahead, a page of it: a summary's rows lie one after the
// other.
constexpr int64_t kAhead = 1024;

// Brings bytes nearer that are read a few thousand cycles later; the address may be any.
template <size_t kBytes>
VICO_INLINE void ask_for(const void* at) {
#pragma GCC unroll 4
  for (size_t i = 0; i < kBytes; i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(at) + i), 0, 2);
}

// sum[i] += k * the channels of query row i. Unrolled: an array is in registers only when every
// index is a constant.
template <int N>
VICO_INLINE void add_products(F (&sum)[N], F k, const float* query, int64_t wide) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) sum[i] += k * load<F>(query + i * wide);
}

template <int N>
VICO_INLINE void store_sums(const F (&sum)[N], float* out) {
  F four[4] = {};
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) four[i] = sum[i];
  float all[4];
  sums_of(four, all);
  std::memcpy(out, all, N * sizeof(float));
}

// out[i] = row . query row i
template <int N>
void dots(RowView row, const RowShape& shape, const float* query, float* out) {
  const int64_t d = shape.d, wide = shape.query_row();
  F even[N] = {}, odd[N] = {};
  for (int64_t s = 0; s < shape.segments; ++s, query += padded(d)) {
    const float* key = row.at + s * row.stride;
    int64_t c = 0;
    for (; c + 2 * kLanes <= d; c += 2 * kLanes) {
      add_products(even, load<F>(key + c), query + c, wide);
      add_products(odd, load<F>(key + c + kLanes), query + c + kLanes, wide);
    }
    if (c < d) add_products(even, load_some(key + c, d - c), query + c, wide);
    if (c + kLanes < d)
      add_products(odd, load_part(key + c + kLanes, d - c - kLanes), query + c + kLanes, wide);
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) even[i] += odd[i];
  store_sums(even, out);
}

// out[r] = row r . query for four rows `step` elements apart, which memory delivers side by side;
// each sum as in dots<1>. The four rows that follow are asked for meanwhile: where a row crosses
// pages, the hardware alone asks too late.
template <typename T>
void dots_of_four(const T* row, int64_t stride, int64_t step, const RowShape& shape,
                  const float* query, float* out) {
  const int64_t d = shape.d;
  F even[4] = {}, odd[4] = {};
  for (int64_t s = 0; s < shape.segments; ++s, query += padded(d)) {
    const T* key = row + s * stride;
    int64_t c = 0;
    for (; c + 2 * kLanes <= d; c += 2 * kLanes) {
      const F q0 = load<F>(query + c), q1 = load<F>(query + c + kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const T* at = key + r * step + c;
        ask_for<2 * kLanes * sizeof(T)>(at + 4 * step);
        even[r] += load_lanes(at) * q0;
        odd[r] += load_lanes(at + kLanes) * q1;
      }
    }
    if (c == d) continue;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const T* rest = key + r * step + c;
      even[r] += load_up_to(rest, d - c) * load<F>(query + c);
      if (c + kLanes < d)
        odd[r] += load_up_to(rest + kLanes, d - c - kLanes) * load<F>(query + c + kLanes);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) even[r] += odd[r];
  store_sums(even, out);
}

// The largest dot product of a key between low and high with each query row. Rows that are merged
// from several heads come as sums of their negative and of their positive parts, and give no number
// where a zero meets an infinite bound. Returns whether any channel has its minimum above its
// maximum: a part without tokens.
template <int N, bool kMerged>
bool bounds(RowView low, RowView high, const RowShape& shape, const float* query,
            const float* positive, float* out) {
  const int64_t d = shape.d, wide = shape.query_row();
  F sum[N] = {};
  Lanes<kLanes>::I crossed{};
  for (int64_t s = 0; s < shape.segments; ++s, query += padded(d), positive += padded(d)) {
    const float *k0 = low.at + s * low.stride, *k1 = high.at + s * high.stride;
    int64_t c = 0;
    const auto add = [&](F bottom, F top) {
      crossed |= bottom > top;
      if constexpr (kMerged) {
        add_products(sum, bottom, query + c, wide);
        add_products(sum, top, positive + c, wide);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
          const F q = load<F>(query + c + i * wide);
          sum[i] += q * (q >= 0.0f ? top : bottom);
        }
      }
    };
    for (; c + kLanes <= d; c += kLanes) {
      ask_for<kLanes * sizeof(float)>(k0 + c + kAhead);
      ask_for<kLanes * sizeof(float)>(k1 + c + kAhead);
      add(load<F>(k0 + c), load<F>(k1 + c));
    }
    if (c < d) add(load_part(k0 + c, d - c), load_part(k1 + c, d - c));
  }
  store_sums(sum, out);
  return any_of(crossed);
}

// Calls pass(first, count as a constant) for all of n query rows, up to four at a time.
template <typename Pass>
void in_fours(int64_t n, Pass pass) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) pass(i, std::integral_constant<int, 4>{});
  if (n & 2) pass(i, std::integral_constant<int, 2>{});
  if (n & 1) pass(i + (n & 2), std::integral_constant<int, 1>{});
}

template <typename T>
float sum_of_squares(const T* row, int64_t stride, const RowShape& shape) {
  F sum[2] = {};
  for (int64_t s = 0; s < shape.segments; ++s) {
    const T* key = row + s * stride;
    int odd = 0;
    for (int64_t c = 0; c < shape.d; c += kLanes, odd ^= 1) {
      const F k = load_up_to(key + c, shape.d - c);
      sum[odd] += k * k;
    }
  }
  return sum_of(sum[0] + sum[1]);
}

}  // namespace VICO_ISA
}  // namespace vico
