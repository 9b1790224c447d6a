// Tiles of keys against up to eight query rows, with AVX2 and AVX-512, as they lie in memory.
//
// Both scores and sums have the head dim in the lanes: with the rows in them each element of a key
// would be loaded once for each product, while four rows and three keys (AVX2) take seven loads for
// twelve products, eight rows and two keys (AVX-512) ten for sixteen. fp16 and bf16 become fp32 in
// registers, which a core does beside its multiplications; where a core multiplies pairs of bf16,
// keys are taken as they are and values in pairs of keys.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>

#include "cpu/attention_tile.h"
#include "cpu/lane_sums.h"
#include "cpu/lanes.h"
#include "cpu/rows.h"

namespace vico {
namespace VICO_ISA {

constexpr int kFewRows = 8;
constexpr int kRowsOfPass = kLanes == 16 ? 8 : 4;  // that have sums in registers at once, at most

// Rows of T that are read next, in the order of their addresses, asked for beside each step of the
// head dim, about as fast as these steps read theirs. (Bursts between passes, as Ahead has them for
// AVX2, leave a core with AVX-512 waiting: it has as much to read as to multiply.)
template <typename T>
struct AheadOfSteps {
  const char* const* row = nullptr;
  const char* const* last = nullptr;  // asked for again by whoever goes on
  int bytes = 0, at = 0;              // of a row, and where in it

  template <int ELEMENTS>
  VICO_INLINE void ask() {
    constexpr int kLines = (ELEMENTS * sizeof(T) + 63) / 64;
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(*row + at + 64 * i, 0, 3);
    at += 64 * kLines;
    if (at >= bytes) at = 0, row += row != last;
  }
};
constexpr bool kSteadily = kLanes == 16;
template <typename T>
using FewAhead = std::conditional_t<kSteadily, AheadOfSteps<T>, Ahead>;

using Register = Lanes<kLanes>::F;

// Elements of a row as registers of fp32. Of bf16 the even ones and then the odd ones, at one
// instruction a register; in order they would take two.
VICO_INLINE void read_step(const float* at, Register (&out)[1]) { out[0] = load_lanes(at); }
VICO_INLINE void read_step(const Half* at, Register (&out)[1]) { out[0] = load_lanes(at); }
VICO_INLINE void read_step(const BFloat16* at, Register (&out)[2]) {
  using Bits = Lanes<kLanes>::U;
  const Bits pairs = load<Bits>(at);
  out[0] = (Register)(pairs << 16);
  out[1] = (Register)(pairs & ~0xffffu);
}

// 32 bits in all lanes, whatever they mean.
VICO_INLINE Register everywhere(const float* at) {
#if defined(__AVX512F__)
  int32_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return (Register)_mm512_set1_epi32(bits);
#else
  return (Register)_mm256_broadcast_ss(at);
#endif
}

// Two registers of pieces of 16 bytes, taken from them in turn.
VICO_INLINE void in_turn(Register even, Register odd, float* out) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  const auto a = (__m512d)even, b = (__m512d)odd;
  _mm512_storeu_ps(out, (__m512)_mm512_permutex2var_pd(a, first, b));
  _mm512_storeu_ps(out + 16, (__m512)_mm512_permutex2var_pd(a, second, b));
#else
  const auto a = (__m256)even, b = (__m256)odd;
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(a, b, 0x20));
  _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(a, b, 0x31));
#endif
}

// Rows of keys and values that are multiplied as fp32; q and o have the columns in the order of
// read_step.
template <typename T>
struct Widened {
  static constexpr int kParts = std::is_same_v<T, BFloat16> ? 2 : 1;
  static constexpr int kStep = kLanes * kParts;  // elements of one; the head dim has whole ones
  static constexpr int kKeyParts = kParts, kValueParts = kParts;  // registers of a step
  static constexpr int kKeysOfValue = 1;

  static VICO_INLINE void key(const T* at, Register (&out)[kParts]) { read_step(at, out); }
  static VICO_INLINE Register add(Register sum, Register x, Register y) { return sum + x * y; }

  // A row of q or of zeros.
  static void pack(const T* row, int d, float* out) {
    for (int c = 0; c < d; c += kStep) {
      Register parts[kParts];
      read_step(row + c, parts);
      for (int p = 0; p < kParts; ++p) store(out + c + kLanes * p, parts[p]);
    }
  }

  // Columns of a row of o in order.
  static void order(float* row, int d) {
    if (kParts == 1) return;
    for (int c = 0; c < d; c += kStep) {
      const auto even = load<Register>(row + c), odd = load<Register>(row + c + kLanes);
#if defined(__AVX512F__)
      in_turn((Register)_mm512_unpacklo_ps((__m512)even, (__m512)odd),
              (Register)_mm512_unpackhi_ps((__m512)even, (__m512)odd), row + c);
#else
      in_turn((Register)_mm256_unpacklo_ps((__m256)even, (__m256)odd),
              (Register)_mm256_unpackhi_ps((__m256)even, (__m256)odd), row + c);
#endif
    }
  }

  // The weights p[key][kFewRows] as `weight` takes them.
  static void prepare(float*, int) {}
  static VICO_INLINE Register weight(const float* p, int j, int row) {
    return everywhere(p + j * kFewRows + row);
  }
  static VICO_INLINE void values(const T* const* v, int j, int at, Register (&out)[kParts]) {
    read_step(v[j] + at, out);
  }
};

#if defined(__AVX512BF16__)
// Rows of bf16 whose products are added in pairs: of neighbouring columns in scores, of
// neighbouring keys in sums, whose weights are rounded to bf16. q has the bits of its rows; o has
// the columns in the order of `values`.
struct Paired {
  static constexpr int kStep = 32;
  static constexpr int kKeyParts = 1, kValueParts = 2;
  static constexpr int kKeysOfValue = 2;

  static VICO_INLINE void key(const BFloat16* at, Register (&out)[1]) {
    out[0] = load<Register>(at);
  }
  static VICO_INLINE Register add(Register sum, Register x, Register y) {
    return (Register)_mm512_dpbf16_ps((__m512)sum, reinterpret_cast<const __m512bh&>(x),
                                      reinterpret_cast<const __m512bh&>(y));
  }
  static void pack(const BFloat16* row, int d, float* out) { std::memcpy(out, row, 2 * d); }
  static void order(float* row, int d) {
    for (int c = 0; c < d; c += kStep)
      in_turn(load<Register>(row + c), load<Register>(row + c + 16), row + c);
  }
  static void prepare(float* p, int keys) {
    for (int j = 0; j < keys; j += 2)
      pair_rows(p + j * kFewRows, p + (j + 1) * kFewRows,
                reinterpret_cast<uint32_t*>(p + j / 2 * kFewRows), kFewRows);
  }
  static VICO_INLINE Register weight(const float* p, int j, int row) {
    return everywhere(p + j / 2 * kFewRows + row);
  }
  static VICO_INLINE void values(const BFloat16* const* v, int j, int at, Register (&out)[2]) {
    const auto one = load<__m512i>(v[j] + at), next = load<__m512i>(v[j + 1] + at);
    out[0] = (Register)_mm512_unpacklo_epi16(one, next);
    out[1] = (Register)_mm512_unpackhi_epi16(one, next);
  }
};
#endif

template <typename T>
struct ProductsOf {
  using type = Widened<T>;
};
#if defined(__AVX512BF16__)
template <>
struct ProductsOf<BFloat16> {
  using type = Paired;
};
#endif

#if defined(__AVX512F__)
// soften() for eight rows, two keys at once.
template <bool MASKED>
VICO_INLINE void soften_pairs(float* s, int keys, float scale, const RowMask* mask,
                              const RowState& state) {
  using I = Lanes<16>::I;
  using U = Lanes<16>::U;
  const auto twice = [](const auto* at) {
    return (Register)_mm512_broadcast_f32x8(_mm256_loadu_ps(reinterpret_cast<const float*>(at)));
  };
  const auto other_key = [](Register x) {
    return (Register)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
  };
  const auto keep = [](float* to, Register x) {
    _mm256_storeu_ps(to, _mm512_castps512_ps256((__m512)x));
  };
  const Register before = twice(state.top);
  const I key = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  I first{}, last{};
  if (MASKED) first = (I)twice(mask->first), last = (I)twice(mask->last);
  Register top = before;
  for (int j = 0; j < keys; j += 2) {
    Register x = load<Register>(s + j * kFewRows) * scale;
    if (MASKED) {
      const I at = key + j;
      x = (last >= at) & ((at < mask->sinks) | (first <= at)) ? x : kNegInf + Register{};
    }
    store(s + j * kFewRows, x);
    top = x > top ? x : top;
  }
  const Register others = other_key(top);
  top = others > top ? others : top;
  keep(state.top, top);
  const Register base = top == kNegInf ? Register{} : top;  // see soften()
  const Register rescale = exp_nonpositive<Register, U>(before - base);
  Register sum{};
  for (int j = 0; j < keys; j += 2) {
    const auto p = exp_nonpositive<Register, U>(load<Register>(s + j * kFewRows) - base);
    store(s + j * kFewRows, p);
    sum += p;
  }
  keep(state.sum, twice(state.sum) * rescale + (sum + other_key(sum)));
  keep(state.rescale, rescale);
}
#endif

// soften() for kFewRows rows.
VICO_INLINE void soften_few(float* s, int keys, float scale, const RowMask* mask,
                            const RowState& state) {
#if !defined(__AVX512F__)
  soften<kFewRows, 1>(s, keys, scale, mask, state);
#else
  if (mask != nullptr)
    soften_pairs<true>(s, keys, scale, mask, state);
  else
    soften_pairs<false>(s, keys, scale, nullptr, state);
#endif
}

template <typename T>
struct Few {
  using Products = typename ProductsOf<T>::type;
  static constexpr int kStep = Products::kStep;
  static constexpr int kKeyParts = Products::kKeyParts, kValueParts = Products::kValueParts;
  // Keys of a pass of scores with all its rows; steps of columns of a pass of sums, likewise.
  static constexpr int kKeys = kLanes == 16 || kKeyParts == 2 ? 2 : 3;
  static constexpr int kSteps = kValueParts == 2 ? 1 : kLanes == 16 ? 2 : 3;

  static void pack(const T* row, int d, float* out) { Products::pack(row, d, out); }
  static void order(float* row, int d) { Products::order(row, d); }

  static constexpr int keys_of_pass(int rows) {
    if (rows > kRowsOfPass / 2) return kKeys;
    return rows > 1 ? 4 : 8;
  }

  // How often score and weigh call Ahead::ask, at least.
  static int asks_of_score(int keys, int rows) {
    return keys / keys_of_pass(rows) * (rows > kRowsOfPass ? 2 : 1);
  }
  static int asks_of_weigh(int keys, int rows, int d) {
    return (d / kStep + kSteps - 1) / kSteps * (keys / kKeysAtOnce) *
           ((rows + kRowsOfPass - 1) / kRowsOfPass);
  }

  // s[key][kFewRows] of q [kFewRows][d]; zeros beyond the last eight, four, two or one of the rows.
  // The keys are a multiple of kKeysAtOnce.
  template <typename More>
  static VICO_INLINE void score(const float* q, int rows, const T* const* k, int keys, int d,
                                float* s, More* ahead) {
    if (rows > 4) return score_rows<8>(q, k, keys, d, s, ahead);
    for (int j = 0; j < keys; ++j) _mm256_storeu_ps(s + j * kFewRows, _mm256_setzero_ps());
    if (rows > 2)
      score_rows<4>(q, k, keys, d, s, ahead);
    else if (rows == 2)
      score_rows<2>(q, k, keys, d, s, ahead);
    else
      score_rows<1>(q, k, keys, d, s, ahead);
  }

  // o[row] = o[row] * rescale[row] + sum over keys of p[key][row] * v[key]. Overwrites p.
  template <typename More>
  static VICO_INLINE void weigh(float* p, int rows, const T* const* v, int keys, int d,
                                const float* rescale, float* o, More* ahead) {
    Products::prepare(p, keys);
    for (int r = 0; r < rows; r += kRowsOfPass) {
      const auto run = [&](auto count) {
        weigh_rows<count>(p + r, v, keys, d, rescale + r, o + r * d, ahead);
      };
      if (kRowsOfPass == 8 && rows - r > 4)
        run(std::integral_constant<int, kRowsOfPass>{});
      else if (rows - r > 2)
        run(std::integral_constant<int, 4>{});
      else
        run(std::integral_constant<int, 2>{});
    }
  }

 private:
  template <int ROWS, int KEYS, typename More>
  static __attribute__((noinline)) void score_keys(const float* q, const T* const* k, int d,
                                                   float* s, More* ahead) {
    Register acc[KEYS][ROWS] = {};
    const float* column = q;
    for (int c = 0; c < d; c += kStep) {
      if constexpr (kSteadily) ahead->template ask<KEYS * kStep>();
      Register key[KEYS][kKeyParts];
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j) Products::key(k[j] + c, key[j]);
#pragma GCC unroll 2
      for (int p = 0; p < kKeyParts; ++p, column += kLanes)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          auto row = load<Register>(column + r * d);
#if defined(__AVX512F__)
          asm("" : "+v"(row));  // or it is loaded again for each key
#endif
#pragma GCC unroll 8
          for (int j = 0; j < KEYS; ++j) acc[j][r] = Products::add(acc[j][r], row, key[j][p]);
        }
    }
    // Reduced four or sixteen at a time, of several rows or of fewer rows and several keys.
    constexpr int kAtOnce = kLanes == 16 && KEYS * ROWS == 16 ? 16 : 4;
    constexpr int kRun = ROWS < kAtOnce ? ROWS : kAtOnce;
#pragma GCC unroll 8
    for (int first = 0; first < KEYS * ROWS; first += kAtOnce) {
      Register some[kAtOnce];
#pragma GCC unroll 16
      for (int i = 0; i < kAtOnce; ++i) some[i] = acc[(first + i) / ROWS][(first + i) % ROWS];
      float sums[kAtOnce];
      sums_of(some, sums);
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; i += kRun)
        std::memcpy(s + (first + i) / ROWS * kFewRows + (first + i) % ROWS, sums + i,
                    kRun * sizeof(float));
    }
  }

  template <int ROWS, typename More>
  static VICO_INLINE void score_rows(const float* q, const T* const* k, int keys, int d, float* s,
                                     More* ahead) {
    constexpr int kGroup = ROWS > kRowsOfPass ? kRowsOfPass : ROWS;
    constexpr int kMost = keys_of_pass(ROWS);
    const auto pass = [&](auto count, int j) {
#pragma GCC unroll 1
      for (int r = 0; r < ROWS; r += kGroup) {
        if constexpr (!kSteadily) ahead->ask();
        score_keys<kGroup, count>(q + r * d, k + j, d, s + j * kFewRows + r, ahead);
      }
    };
    int j = 0;
    for (; j + kMost <= keys; j += kMost) pass(std::integral_constant<int, kMost>{}, j);
    if constexpr (kKeysAtOnce % kMost != 0)
      for (; j < keys; ++j) pass(std::integral_constant<int, 1>{}, j);
  }

  template <int ROWS, int STEPS, typename More>
  static __attribute__((noinline)) void weigh_columns(const float* p, const T* const* v, int keys,
                                                      int at, const float* rescale, float* o, int d,
                                                      More* ahead) {
    constexpr int kRegisters = STEPS * kValueParts;
    Register acc[ROWS][kRegisters] = {};
#pragma GCC unroll 1
    for (int first = 0; first < keys; first += kKeysAtOnce) {
      if constexpr (!kSteadily) ahead->ask();
#pragma GCC unroll 8
      for (int i = 0; i < kKeysAtOnce; i += Products::kKeysOfValue) {
        if constexpr (kSteadily) ahead->template ask<STEPS * kStep * Products::kKeysOfValue>();
        const int j = first + i;
        Register value[STEPS][kValueParts];
#pragma GCC unroll 4
        for (int n = 0; n < STEPS; ++n) Products::values(v, j, at + n * kStep, value[n]);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const Register weight = Products::weight(p, j, r);
#pragma GCC unroll 4
          for (int n = 0; n < kRegisters; ++n)
            acc[r][n] = Products::add(acc[r][n], weight, value[n / kValueParts][n % kValueParts]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kRegisters; ++n) {
        float* sums = o + r * d + at + kLanes * n;
        store(sums, load<Register>(sums) * rescale[r] + acc[r][n]);
      }
  }

  // As many columns at once as leave room; of three steps at once never a single one is left.
  template <int ROWS, typename More>
  static VICO_INLINE void weigh_rows(const float* p, const T* const* v, int keys, int d,
                                     const float* rescale, float* o, More* ahead) {
    using std::integral_constant;
    int at = 0;
    const auto columns = [&](auto steps, int count) {
      for (; count > 0; --count, at += steps * kStep)
        weigh_columns<ROWS, steps>(p, v, keys, at, rescale, o, d, ahead);
    };
    const int n = d / kStep;
    if constexpr (kSteps == 1) return columns(integral_constant<int, 1>{}, n);
    const int twos = kSteps == 2 ? n / 2 : n == 1 ? 0 : (3 - n % 3) % 3;
    columns(integral_constant<int, 2>{}, twos);
    if constexpr (kSteps == 3) columns(integral_constant<int, 3>{}, n / 3 - twos / 2);
    columns(integral_constant<int, 1>{}, kSteps == 2 ? n % 2 : n == 1);
  }
};

}  // namespace VICO_ISA
}  // namespace vico
#endif
