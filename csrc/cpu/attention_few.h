// Tiles of keys against up to eight query rows, with AVX2, as they lie in memory.
//
// Both scores and sums have the head dim in the lanes: with the rows in them each element of a key
// would be loaded once for each product, while four rows and three keys take seven loads for twelve
// products. fp16 and bf16 become fp32 in registers, which a core does beside its multiplications.
#pragma once

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>

#include "cpu/attention_tile.h"
#include "cpu/lane_sums.h"
#include "cpu/rows.h"

namespace vico {
namespace VICO_ISA {

constexpr int kFewRows = 8;

// Elements of a row as registers of fp32. Of bf16 the even ones and then the odd ones, at one
// instruction a register; in order they would take two.
VICO_INLINE void read_step(const float* at, __m256 (&out)[1]) { out[0] = _mm256_loadu_ps(at); }
VICO_INLINE void read_step(const Half* at, __m256 (&out)[1]) {
  out[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
VICO_INLINE void read_step(const BFloat16* at, __m256 (&out)[2]) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  out[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(~0xffff)));
}

// Rows of keys and values of type T; q and o have the columns in the order of read_step.
template <typename T>
struct Few {
  static constexpr bool kInOrder = !std::is_same_v<T, BFloat16>;
  static constexpr int kParts = kInOrder ? 1 : 2;  // registers of a step
  static constexpr int kStep = 8 * kParts;         // elements of one; the head dim has whole ones
  static constexpr int kKeys = kInOrder ? 3 : 2;   // of a pass with four rows
  static constexpr int kSteps = kInOrder ? 3 : 1;  // of columns, likewise

  // A row of q or of zeros.
  static void pack(const T* row, int d, float* out) {
    for (int c = 0; c < d; c += kStep) {
      __m256 parts[kParts];
      read_step(row + c, parts);
      for (int p = 0; p < kParts; ++p) _mm256_storeu_ps(out + c + 8 * p, parts[p]);
    }
  }

  // Columns of a row of o in order.
  static void order(float* row, int d) {
    if (kInOrder) return;
    for (int c = 0; c < d; c += kStep) {
      const __m256 even = _mm256_loadu_ps(row + c), odd = _mm256_loadu_ps(row + c + 8);
      const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
      _mm256_storeu_ps(row + c, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_storeu_ps(row + c + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
  }

  static constexpr int keys_of_pass(int rows) { return rows > 2 ? kKeys : rows == 2 ? 4 : 8; }

  // How often score and weigh ask memory, at least.
  static int asks_of_score(int keys, int rows) {
    return keys / keys_of_pass(rows) * (rows > 4 ? 2 : 1);
  }
  static int asks_of_weigh(int keys, int rows, int d) {
    return (d / kStep + kSteps - 1) / kSteps * (keys / kKeysAtOnce) * ((rows + 3) / 4);
  }

  // s[key][kFewRows] of q [kFewRows][d]; zeros beyond the last four, two or one of the rows. The
  // keys are a multiple of kKeysAtOnce.
  static VICO_INLINE void score(const float* q, int rows, const T* const* k, int keys, int d,
                                float* s, Ahead* ahead) {
    if (rows > 4) {
      score_rows<8>(q, k, keys, d, s, ahead);
      return;
    }
    for (int j = 0; j < keys; ++j) _mm256_storeu_ps(s + j * kFewRows, _mm256_setzero_ps());
    if (rows > 2)
      score_rows<4>(q, k, keys, d, s, ahead);
    else if (rows == 2)
      score_rows<2>(q, k, keys, d, s, ahead);
    else
      score_rows<1>(q, k, keys, d, s, ahead);
  }

  // o[row] = o[row] * rescale[row] + sum over keys of p[key][row] * v[key].
  static VICO_INLINE void weigh(const float* p, int rows, const T* const* v, int keys, int d,
                                const float* rescale, float* o, Ahead* ahead) {
    for (int r = 0; r < rows; r += 4)
      if (rows - r > 2)
        weigh_rows<4>(p + r, v, keys, d, rescale + r, o + r * d, ahead);
      else
        weigh_rows<2>(p + r, v, keys, d, rescale + r, o + r * d, ahead);
  }

 private:
  // Sums are reduced four at a time, of four rows or of fewer rows and several keys.
  template <int ROWS, int KEYS>
  static __attribute__((noinline)) void score_keys(const float* q, const T* const* k, int d,
                                                   float* s) {
    __m256 acc[KEYS][ROWS] = {};
    for (int c = 0; c < d; c += kStep) {
      __m256 key[KEYS][kParts];
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j) read_step(k[j] + c, key[j]);
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const __m256 row = _mm256_loadu_ps(q + r * d + c + 8 * p);
#pragma GCC unroll 8
          for (int j = 0; j < KEYS; ++j) acc[j][r] = _mm256_fmadd_ps(row, key[j][p], acc[j][r]);
        }
    }
    constexpr int kKeysOfSum = 4 / ROWS;
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; j += kKeysOfSum) {
      Lanes<8>::F four[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        four[i] = reinterpret_cast<const Lanes<8>::F&>(acc[j + i / ROWS][i % ROWS]);
      float sums[4];
      sums_of(four, sums);
#pragma GCC unroll 4
      for (int i = 0; i < kKeysOfSum; ++i)
        std::memcpy(s + (j + i) * kFewRows, sums + i * ROWS, ROWS * sizeof(float));
    }
  }

  template <int ROWS>
  static VICO_INLINE void score_rows(const float* q, const T* const* k, int keys, int d, float* s,
                                     Ahead* ahead) {
    constexpr int kGroup = ROWS > 4 ? 4 : ROWS;
    constexpr int kMost = keys_of_pass(ROWS);
    const auto pass = [&](auto count, int j) {
#pragma GCC unroll 1
      for (int r = 0; r < ROWS; r += kGroup) {
        ahead->ask();
        score_keys<kGroup, count>(q + r * d, k + j, d, s + j * kFewRows + r);
      }
    };
    int j = 0;
    for (; j + kMost <= keys; j += kMost) pass(std::integral_constant<int, kMost>{}, j);
    if constexpr (kKeysAtOnce % kMost != 0)
      for (; j < keys; ++j) pass(std::integral_constant<int, 1>{}, j);
  }

  template <int ROWS, int STEPS>
  static __attribute__((noinline)) void weigh_columns(const float* p, const T* const* v, int keys,
                                                      int at, const float* rescale, float* o, int d,
                                                      Ahead* ahead) {
    constexpr int kRegisters = STEPS * kParts;
    __m256 acc[ROWS][kRegisters] = {};
#pragma GCC unroll 1
    for (int first = 0; first < keys; first += kKeysAtOnce) {
      ahead->ask();
#pragma GCC unroll 8
      for (int i = 0; i < kKeysAtOnce; ++i) {
        const int j = first + i;
        __m256 value[STEPS][kParts];
#pragma GCC unroll 4
        for (int n = 0; n < STEPS; ++n) read_step(v[j] + at + n * kStep, value[n]);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const __m256 weight = _mm256_broadcast_ss(p + j * kFewRows + r);
#pragma GCC unroll 4
          for (int n = 0; n < kRegisters; ++n)
            acc[r][n] = _mm256_fmadd_ps(weight, value[n / kParts][n % kParts], acc[r][n]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m256 factor = _mm256_broadcast_ss(rescale + r);
#pragma GCC unroll 4
      for (int n = 0; n < kRegisters; ++n) {
        float* sums = o + r * d + at + 8 * n;
        _mm256_storeu_ps(sums, _mm256_fmadd_ps(_mm256_loadu_ps(sums), factor, acc[r][n]));
      }
    }
  }

  // As many columns at once as leave room; of three steps at once never a single one is left.
  template <int ROWS>
  static VICO_INLINE void weigh_rows(const float* p, const T* const* v, int keys, int d,
                                     const float* rescale, float* o, Ahead* ahead) {
    using std::integral_constant;
    int at = 0;
    const auto columns = [&](auto steps, int count) {
      for (; count > 0; --count, at += steps * kStep)
        weigh_columns<ROWS, steps>(p, v, keys, at, rescale, o, d, ahead);
    };
    const int n = d / kStep;
    if constexpr (kSteps == 1) return columns(integral_constant<int, 1>{}, n);
    const int twos = n == 1 ? 0 : (3 - n % 3) % 3;
    columns(integral_constant<int, 2>{}, twos);
    columns(integral_constant<int, kSteps>{}, n / 3 - twos / 2);
    columns(integral_constant<int, 1>{}, n == 1);
  }
};

}  // namespace VICO_ISA
}  // namespace vico
#endif
