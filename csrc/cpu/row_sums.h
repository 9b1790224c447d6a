// Sums over one or two rows of any length, in fp32. The order of the additions depends on the
// length alone, so the bits do not depend on threads, neighbours or how a stream is cut.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"

namespace vico {
namespace VICO_ISA {

using Floats = Lanes<kLanes>::F;
using Ints = Lanes<kLanes>::I;

// Smaller work than this is not worth waking threads for.
constexpr int64_t kElementsPerThread = 1 << 15;

inline int worthwhile_threads(int64_t elements, int n_threads) {
  const int64_t most = elements / kElementsPerThread + 1;
  return most < n_threads ? static_cast<int>(most) : n_threads;
}

// The upper half is added to the lower one until one lane is left.
VICO_INLINE float sum_lanes(Floats v) {
#if defined(__AVX512F__)
  // With the mask of all lanes, as above.
  const auto half = [&v](auto which) {
    return _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xff, (__m512d)v, which.value));
  };
  const __m256 eight =
      _mm256_add_ps(half(std::integral_constant<int, 0>()), half(std::integral_constant<int, 1>()));
#elif defined(__AVX2__)
  const __m256 eight = (__m256)v;
#endif
#if defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  alignas(64) float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
#endif
}

VICO_INLINE Floats absolute(Floats v) { return (Floats)((Ints)v & 0x7fffffff); }

// A product as it is in memory: contracted into a difference it would tell equal vectors apart.
VICO_INLINE Floats rounded(Floats v) {
#if defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  __asm__("" : "+v"(v));
#endif
  return v;
}

// K sums over a row of n: `add(i, left, total)` adds elements i to min(i + kLanes, n) to K totals.
// `next`, the row read after this one (or this one), is asked for beside the additions: a row
// begins pages that the processor's own prefetcher is late for, and asked for in one burst it keeps
// the core waiting.
template <int K, typename T, typename Add>
VICO_INLINE void row_sums(int64_t n, const T* next, float* out, Add&& add) {
  constexpr int kChains = 4;  // hides the latency of the additions
  Floats total[kChains][K];
  std::memset(total, 0, sizeof(total));
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int64_t at = 0; at < kChains * kLanes; at += 64 / int64_t{sizeof(T)})
      __builtin_prefetch(next + i + at, 0, 3);
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain)
      add(i + chain * kLanes, int64_t{kLanes}, total[chain]);
  }
  for (; i < n; i += kLanes) add(i, n - i, total[0]);
  for (int k = 0; k < K; ++k)
    out[k] = sum_lanes((total[0][k] + total[1][k]) + (total[2][k] + total[3][k]));
}

// Channels to leave out, as integers of zeros (out) and ones (in), padded to whole vectors.
struct AllChannels {
  VICO_INLINE Floats operator()(Floats v, int64_t) const { return v; }
};
struct SomeChannels {
  const int32_t* mask;
  VICO_INLINE Floats operator()(Floats v, int64_t i) const {
    return (Floats)((Ints)v & load<Ints>(mask + i));  // not a product: NaN stays out
  }
};

template <typename A, typename Channels = AllChannels>
VICO_NOINLINE float squares_of(const A* a, int64_t n, const A* next, Channels channels = {}) {
  float sum;
  row_sums<1>(n, next, &sum, [&](int64_t i, int64_t left, Floats* total) {
    const Floats v = channels(load_lanes(a + i, left), i);
    total[0] += v * v;
  });
  return sum;
}

template <typename A, typename B, typename Channels = AllChannels>
VICO_NOINLINE float dot_of(const A* a, const B* b, int64_t n, const A* next,
                           Channels channels = {}) {
  float sum;
  row_sums<1>(n, next, &sum, [&](int64_t i, int64_t left, Floats* total) {
    total[0] += channels(load_lanes(a + i, left), i) * channels(load_lanes(b + i, left), i);
  });
  return sum;
}

struct SquaresAndDot {
  float squares, dot;  // of the first row; with the second
};

template <typename T>
VICO_NOINLINE SquaresAndDot squares_and_dot(const T* a, const T* b, int64_t n, const T* next) {
  float sum[2];
  row_sums<2>(n, next, sum, [&](int64_t i, int64_t left, Floats* total) {
    const Floats v = load_lanes(a + i, left), w = load_lanes(b + i, left);
    total[0] += v * v;
    total[1] += v * w;
  });
  return {sum[0], sum[1]};
}

// sum |a - b|
template <typename A, typename B, typename Channels = AllChannels>
VICO_NOINLINE float absolute_distance(const A* a, const B* b, int64_t n, const A* next,
                                      Channels channels = {}) {
  float sum;
  row_sums<1>(n, next, &sum, [&](int64_t i, int64_t left, Floats* total) {
    total[0] += absolute(channels(load_lanes(a + i, left) - load_lanes(b + i, left), i));
  });
  return sum;
}

// sum (a * a_scale - b * b_scale)^2
template <typename A, typename B, typename Channels = AllChannels>
VICO_NOINLINE float square_distance(const A* a, float a_scale, const B* b, float b_scale, int64_t n,
                                    const A* next, Channels channels = {}) {
  float sum;
  row_sums<1>(n, next, &sum, [&](int64_t i, int64_t left, Floats* total) {
    const Floats v = rounded(load_lanes(a + i, left) * a_scale);
    const Floats w = rounded(load_lanes(b + i, left) * b_scale);
    const Floats difference = channels(v - w, i);
    total[0] += difference * difference;
  });
  return sum;
}

}  // namespace VICO_ISA
}  // namespace vico
