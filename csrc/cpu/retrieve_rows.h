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

#include "cpu/lane_sums.h"
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

// Brings bytes nearer that are read a few thousand cycles later, into the second level cache or
// (kNear) the first; the address may be any.
constexpr int kNear = 3;
template <size_t kBytes, int kLocality = 2>
VICO_INLINE void ask_for(const void* at) {
#pragma GCC unroll 4
  for (size_t i = 0; i < kBytes; i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(at) + i), 0,
                       kLocality);
}

template <typename T>
constexpr int64_t kLineOf = 64 / sizeof(T);  // elements

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

// Whether any channel was seen with its minimum above its maximum.
class Crossed {
 public:
#if defined(__AVX512F__)
  VICO_INLINE void look(F low, F high) {
    seen_ |= _mm512_cmp_ps_mask((__m512)low, (__m512)high, _CMP_GT_OQ);
  }
  VICO_INLINE bool any() const { return seen_ != 0; }

 private:
  __mmask16 seen_ = 0;
#else
  VICO_INLINE void look(F low, F high) { seen_ |= low > high; }
  VICO_INLINE bool any() const { return lanes_of(seen_) != 0; }

 private:
  Lanes<kLanes>::I seen_{};
#endif
};

// Where the rows of key ranges lie and their bounds go, in elements.
struct RangeLayout {
  int64_t segments, d;
  int64_t low_stride, high_stride;  // between segments
  int64_t low_step, high_step;      // between blocks
  int64_t out_step;                 // between the bounds of two blocks
};

// Where rows that are read later begin.
template <typename T>
struct RangesAhead {
  const T *low, *high;
};

// out[b][i]: the largest dot product of a key between the low and the high row of block b with
// query row i, for B blocks. `query` has, for each register of channels, the negative parts of the
// N rows and then the positive ones (Queries::Parts): two products a channel take less than a
// comparison, a choice and a product. No number where the zero of one part meets an infinite bound.
// Sets `crossed` of a block where a channel has its minimum above its maximum. As many lines as are
// read are asked for meanwhile, from `ahead` on.
//
// A function of its own, with all arguments in registers: those that came by the stack were written
// in halves and read back whole, which waited for the writes at each call.
template <int B, int N, typename T>
__attribute__((noinline)) void bounds_of(const T* low, const T* high, const float* query,
                                         const RangeLayout& at, float* out, bool* crossed,
                                         const RangesAhead<T>& ahead) {
  const T *low_ahead = ahead.low, *high_ahead = ahead.high;
  F sums[B][N] = {};
  Crossed seen[B];
  const auto add = [&](const T* smallest, const T* largest, auto lanes_at) {
    F minima[B], maxima[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) {
      minima[b] = lanes_at(smallest + b * at.low_step);
      maxima[b] = lanes_at(largest + b * at.high_step);
      seen[b].look(minima[b], maxima[b]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i, query += kLanes)
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) sums[b][i] += load<F>(query) * minima[b];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i, query += kLanes)
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) sums[b][i] += load<F>(query) * maxima[b];
  };
  for (int64_t s = 0; s < at.segments; ++s) {
    const T *smallest = low + s * at.low_stride, *largest = high + s * at.high_stride;
    int64_t left = at.d;
    for (; left >= kLanes; left -= kLanes, smallest += kLanes, largest += kLanes) {
      if ((at.d - left) % kLineOf<T> == 0) {
#pragma GCC unroll 2
        for (int b = 0; b < B; ++b, low_ahead += kLineOf<T>, high_ahead += kLineOf<T>) {
          ask_for<64, kNear>(low_ahead);
          ask_for<64, kNear>(high_ahead);
        }
      }
      add(smallest, largest, [](const T* row) { return load_lanes(row); });
    }
    if (left > 0) add(smallest, largest, [&](const T* row) { return load_up_to(row, left); });
  }
#pragma GCC unroll 2
  for (int b = 0; b < B; ++b) {
    store_sums(sums[b], out + b * at.out_step);
    crossed[b] |= seen[b].any();
  }
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
