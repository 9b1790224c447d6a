// Attention of up to 32 query rows on one tile of keys: scores, online softmax, weighted sum.
//
// Scores have the query rows in the lanes: each element of a key is loaded once as a scalar and
// meets every row, nothing is reduced across lanes, and the softmax runs over whole registers. (Few
// rows have the head dim in the lanes: attention_few.h; with AVX-512 not the last of many rows.)
// The weighted sum has the head dim in the lanes and the rows in registers.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/simd.h"
#include "vico/softmax.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vico {
namespace VICO_ISA {

constexpr int kTileKeys = 32;   // K and V of a tile, at d 128 in fp32: 32 KiB a KV head
constexpr int kPart = 32;       // elements of a key between two looks at memory
constexpr int kKeysAtOnce = 8;  // that tiles are padded to a multiple of
constexpr int kKeysOfAsk = 4;   // between two looks at memory while values are summed
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Lines that will be needed, asked for a few at a time in the order of their addresses: a decode
// step meets each key once, and the hardware keeps up with a plain stream only.
struct Ahead {
  static constexpr int kBurst = 4;    // lines at a time: a test for each would cost more than they
  static constexpr int kWhole = 256;  // of a burst that is due

  const char* const* rows = nullptr;
  int count = 0, bytes = 0;  // rows of so many bytes each
  int row = 0, at = 0;
  int rate = 0, due = 0;  // bursts in 1 / kWhole: of each step, and by now

  // For all that is left, evenly over so many calls of ask().
  void pace(int steps) {
    const int left =
        row < count ? (count - row) * ((bytes + kBytes - 1) / kBytes) - at / kBytes : 0;
    due = 0;
    rate = (left * kWhole + steps - 1) / steps;
  }
  VICO_INLINE void ask() {
    for (due += rate; due > 0 && row < count; due -= kWhole) {
      const char* from = rows[row] + at;
      if (at + kBytes <= bytes) {
#pragma GCC unroll 4
        for (int i = 0; i < kBurst; ++i) __builtin_prefetch(from + 64 * i, 0, 1);
      } else {
        for (int i = 0; at + i < bytes; i += 64) __builtin_prefetch(from + i, 0, 1);
      }
      at += kBytes;
      if (at >= bytes) at = 0, ++row;
    }
  }

 private:
  static constexpr int kBytes = 64 * kBurst;
};

// How products are summed: one fp32 element at a time, or two bf16 elements side by side in 32 bits
// (exact products, fp32 sums).
struct Singles {
  using Element = float;
  static constexpr int kPerElement = 1;
  template <int W>
  static VICO_INLINE typename Lanes<W>::F add(typename Lanes<W>::F sum, const float* x, float y) {
    return sum + load<typename Lanes<W>::F>(x) * y;
  }
};
#if defined(__AVX512BF16__)
struct Pairs {
  using Element = uint32_t;
  static constexpr int kPerElement = 2;
  template <int W>
  static VICO_INLINE typename Lanes<W>::F add(typename Lanes<W>::F sum, const uint32_t* x,
                                              uint32_t y) {
    if constexpr (W == 16) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(y));
      return _mm512_dpbf16_ps(sum, load<__m512bh>(x), reinterpret_cast<const __m512bh&>(pair));
    } else {
      const __m256i pair = _mm256_set1_epi32(static_cast<int>(y));
      return _mm256_dpbf16_ps(sum, load<__m256bh>(x), reinterpret_cast<const __m256bh&>(pair));
    }
  }
};
#endif

// Eight rows would fill half an AVX-512 register, so fp32 puts two elements of each key side by
// side.
template <int W, typename Dot>
constexpr bool kInterleaved = kLanes == 16 && W == 8 && Dot::kPerElement == 1;

#if defined(__AVX512F__)
// score_keys for eight rows; q is [n / 2][row][2].
VICO_INLINE void score_keys_interleaved(const float* q, const float* const* k, int n, float* s,
                                        Ahead* ahead) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int part = 0; part < n; part += kPart) {
    __m512 acc[kKeysAtOnce] = {};
    const int end = part + kPart < n ? part + kPart : n;
    ahead->ask();
    for (int c = part; c < end; c += 2) {
      const __m512 x = _mm512_loadu_ps(q + c * 8);
#pragma GCC unroll 8
      for (int j = 0; j < kKeysAtOnce; ++j) {
        double y;
        std::memcpy(&y, k[j] + c, sizeof(y));
        acc[j] = _mm512_fmadd_ps(x, _mm512_castpd_ps(_mm512_set1_pd(y)), acc[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kKeysAtOnce; j += 2) {
      const __m512 sum = _mm512_add_ps(_mm512_permutex2var_ps(acc[j], even, acc[j + 1]),
                                       _mm512_permutex2var_ps(acc[j], odd, acc[j + 1]));
      float* at = s + j * 8;
      _mm512_storeu_ps(at, part == 0 ? sum : _mm512_add_ps(_mm512_loadu_ps(at), sum));
    }
  }
}
#endif

// s[key][row] = q[row] . k[key], for KEYS keys. q is [n][W * NV]; n counts elements. Summed in
// parts of kPart: one chain of 128 additions would lose a bit or two more than torch's sums do.
template <int W, int NV, int KEYS, typename Dot>
VICO_INLINE void score_keys(const float* queries, const float* const* k, int n, float* s,
                            Ahead* ahead) {
#if defined(__AVX512F__)
  if constexpr (kInterleaved<W, Dot>) return score_keys_interleaved(queries, k, n, s, ahead);
#endif
  using F = typename Lanes<W>::F;
  using Element = typename Dot::Element;
  const auto* q = reinterpret_cast<const Element*>(queries);
  const Element* key[KEYS];
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j) key[j] = reinterpret_cast<const Element*>(k[j]);
  for (int part = 0; part < n; part += kPart) {
    F acc[KEYS][NV] = {};
    const int end = part + kPart < n ? part + kPart : n;
    ahead->ask();
    for (int c = part; c < end; ++c) {
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j) {
        Element y;
        std::memcpy(&y, key[j] + c, sizeof(y));
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
          acc[j][v] = Dot::template add<W>(acc[j][v], q + (c * NV + v) * W, y);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        float* at = s + (j * NV + v) * W;
        store(at, part == 0 ? acc[j][v] : load<F>(at) + acc[j][v]);
      }
  }
}

// The same for `keys` keys, a multiple of kKeysAtOnce: as many in a pass as registers have sums.
template <int W, int NV, typename Dot>
VICO_INLINE void score_tile(const float* q, const float* const* k, int keys, int n, float* s,
                            Ahead* ahead) {
  constexpr int kKeys = kLanes == 16 ? kKeysAtOnce : 6;
  ahead->pace((keys + kKeys - 1) / kKeys * ((n + kPart - 1) / kPart));
  int j = 0;
  for (; j + kKeys <= keys; j += kKeys)
    score_keys<W, NV, kKeys, Dot>(q, k + j, n, s + j * W * NV, ahead);
  if constexpr (kKeysAtOnce % kKeys != 0)
    for (; j < keys; j += 2) score_keys<W, NV, 2, Dot>(q, k + j, n, s + j * W * NV, ahead);
}

// Which keys of a tile a row sees, as offsets from its first key:
// key <= last and (key < sinks or key >= first).
struct RowMask {
  alignas(64) int32_t first[32];
  alignas(64) int32_t last[32];
  int32_t sinks;
};

// Of each row: running maximum, sum of exponentials, and the factor that is due to what was summed
// before.
struct RowState {
  float* top;
  float* sum;
  float* rescale;

  RowState from(int row) const { return {top + row, sum + row, rescale + row}; }
};

// Scores [keys][W * NV] to weights exp(score - top) in place; MASKED false ignores the mask.
template <int W, int NV, bool MASKED>
VICO_INLINE void soften(float* s, int keys, float scale, const RowMask* mask,
                        const RowState& state) {
  using F = typename Lanes<W>::F;
  using I = typename Lanes<W>::I;
  using U = typename Lanes<W>::U;
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    float* at = s + v * W;
    const F before = load<F>(state.top + v * W);
    I first{}, last{};
    if (MASKED) first = load<I>(mask->first + v * W), last = load<I>(mask->last + v * W);
    F top = before;
    for (int j = 0; j < keys; ++j, at += W * NV) {
      F x = load<F>(at) * scale;
      if (MASKED) {
        const I seen = (last >= j) & (j < mask->sinks ? I{} == 0 : first <= j);
        x = seen ? x : kNegInf + F{};
      }
      store(at, x);
      top = x > top ? x : top;
    }
    store(state.top + v * W, top);
    const F base = top == kNegInf ? F{} : top;  // -inf - -inf where a row has seen nothing yet
    const F rescale = exp_nonpositive<F, U>(before - base);
    F sum{};  // of this tile first: one long chain of additions would lose a bit or two
    at = s + v * W;
    for (int j = 0; j < keys; ++j, at += W * NV) {
      const F p = exp_nonpositive<F, U>(load<F>(at) - base);
      store(at, p);
      sum += p;
    }
    store(state.sum + v * W, load<F>(state.sum + v * W) * rescale + sum);
    store(state.rescale + v * W, rescale);
  }
}

template <int W, int NV>
VICO_INLINE void soften(float* s, int keys, float scale, const RowMask* mask,
                        const RowState& state) {
  if (mask != nullptr)
    soften<W, NV, true>(s, keys, scale, mask, state);
  else
    soften<W, NV, false>(s, keys, scale, nullptr, state);
}

// o[row][c] = o[row][c] * rescale[row] + sum over keys of p[key][row] * v[key][c], for ROWS rows
// and NV registers of the head dim from column `at`. Of Pairs, p and v hold two keys an element.
template <int W, int NV, int ROWS, typename Dot>
VICO_INLINE void weigh(const typename Dot::Element* p, int p_stride, const float* const* v,
                       int keys, int at, const float* rescale, float* o, int o_stride,
                       Ahead* ahead) {
  using F = typename Lanes<W>::F;
  F acc[ROWS][NV] = {};
  for (int first = 0; first < keys / Dot::kPerElement; first += kKeysOfAsk) {
    ahead->ask();
#pragma GCC unroll 4
    for (int i = 0; i < kKeysOfAsk; ++i) {
      const int j = first + i;
      const auto* value = reinterpret_cast<const typename Dot::Element*>(v[j]) + at;
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const auto weight = p[j * p_stride + r];
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n)
          acc[r][n] = Dot::template add<W>(acc[r][n], value + n * W, weight);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      float* sums = o + r * o_stride + at + n * W;
      store(sums, load<F>(sums) * rescale[r] + acc[r][n]);
    }
}

// Passes of weigh_rows over the head dim, at least.
constexpr int passes_over(int d) {
  return kLanes == 16 ? (d + 4 * kLanes - 1) / (4 * kLanes) : (d / kLanes + 2) / 3;
}

// All columns for ROWS rows: as many registers at once as leave room, then what is left.
template <int ROWS, typename Dot>
VICO_INLINE void weigh_rows(const typename Dot::Element* p, int p_stride, const float* const* v,
                            int keys, int d, const float* rescale, float* o, Ahead* ahead) {
  int at = 0;
  const auto columns = [&](auto width, int count) {
    for (; count > 0; --count, at += width * kLanes)
      weigh<kLanes, width, ROWS, Dot>(p, p_stride, v, keys, at, rescale, o, d, ahead);
  };
  using std::integral_constant;
#if defined(__AVX512F__)
  constexpr int kWide = 16 / (ROWS > 4 ? ROWS : 4);
  columns(integral_constant<int, kWide>{}, d / (kWide * kLanes));
  columns(integral_constant<int, 1>{}, (d - at) / kLanes);
  // the half register that a head dim of 8 mod 16 has
  if (at < d) weigh<8, 1, ROWS, Dot>(p, p_stride, v, keys, at, rescale, o, d, ahead);
#else
  const int n = d / kLanes, twos = n == 1 ? 0 : (3 - n % 3) % 3;
  columns(integral_constant<int, 2>{}, twos);
  columns(integral_constant<int, 3>{}, n / 3 - twos / 2);
  columns(integral_constant<int, 1>{}, n == 1);
#endif
}

// Two rows of bf16 bits, or of fp32 to be rounded, side by side in 32 bits a column.
inline void pair_rows(const uint16_t* first, const uint16_t* second, uint32_t* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = first[i] | static_cast<uint32_t>(second[i]) << 16;
}
inline void pair_rows(const float* first, const float* second, uint32_t* out, int n) {
  const auto round = [](float value) {  // to nearest, ties to even; weights are no signalling NaN
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  };
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = (round(first[i]) >> 16) | (round(second[i]) & 0xffff0000u);
}

}  // namespace VICO_ISA
}  // namespace vico
