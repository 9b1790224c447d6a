// Attention of up to 32 query rows on one tile of keys: scores, online softmax, weighted sum.
//
// Scores have the query rows in the lanes: each element of a key is loaded once as a scalar and
// meets every row, nothing is reduced across lanes, and the softmax runs over whole registers.
// The weighted sum has the head dim in the lanes and the rows in registers.
#pragma once

#include <limits>

#include "cpu/simd.h"
#include "vico/softmax.h"

namespace vico {
namespace VICO_ISA {

constexpr int kTileKeys = 32;   // K and V of a tile at d 128 in fp32: half of a 64 KiB L1 + L2
constexpr int kKeysAtOnce = 8;  // accumulators of the score kernel: 8 or 16 registers
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// s[key][row] = q[row] . k[key], for kKeysAtOnce keys. q is [d][W * NV]. Summed in parts of kPart
// elements: one chain of 128 additions would lose a bit or two more than torch's sums do.
template <int W, int NV>
VICO_INLINE void score_keys(const float* q, const float* const* k, int d, float* s) {
  using F = typename Lanes<W>::F;
  constexpr int kPart = 32;
  const float* key[kKeysAtOnce];
#pragma GCC unroll 8
  for (int j = 0; j < kKeysAtOnce; ++j) key[j] = k[j];
  for (int part = 0; part < d; part += kPart) {
    F acc[kKeysAtOnce][NV] = {};
    const int end = part + kPart < d ? part + kPart : d;
    for (int c = part; c < end; ++c) {
      F x[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) x[v] = load<F>(q + (c * NV + v) * W);
#pragma GCC unroll 8
      for (int j = 0; j < kKeysAtOnce; ++j) {
        const float y = key[j][c];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[j][v] += x[v] * y;
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kKeysAtOnce; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        float* at = s + (j * NV + v) * W;
        store(at, part == 0 ? acc[j][v] : load<F>(at) + acc[j][v]);
      }
  }
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
};

// Scores [keys][W * NV] to weights exp(score - top) in place; MASKED false ignores the mask.
template <int W, int NV, bool MASKED>
VICO_INLINE void soften(float* s, int keys, float scale, const RowMask& mask,
                        const RowState& state) {
  using F = typename Lanes<W>::F;
  using I = typename Lanes<W>::I;
  using U = typename Lanes<W>::U;
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    float* at = s + v * W;
    const F before = load<F>(state.top + v * W);
    const I first = load<I>(mask.first + v * W), last = load<I>(mask.last + v * W);
    F top = before;
    for (int j = 0; j < keys; ++j, at += W * NV) {
      F x = load<F>(at) * scale;
      if (MASKED) {
        const I seen = (last >= j) & (j < mask.sinks ? I{} == 0 : first <= j);
        x = seen ? x : kNegInf + F{};
      }
      store(at, x);
      top = x > top ? x : top;
    }
    store(state.top + v * W, top);
    const F base = top == kNegInf ? F{} : top;  // -inf - -inf where a row has seen nothing yet
    const F rescale = exp_nonpositive<F, U>(before - base);
    F sum = load<F>(state.sum + v * W) * rescale;
    at = s + v * W;
    for (int j = 0; j < keys; ++j, at += W * NV) {
      const F p = exp_nonpositive<F, U>(load<F>(at) - base);
      store(at, p);
      sum += p;
    }
    store(state.sum + v * W, sum);
    store(state.rescale + v * W, rescale);
  }
}

// o[row][c] = o[row][c] * rescale[row] + sum over keys of p[key][row] * v[key][c], for ROWS rows
// and NV registers of the head dim from column `at`.
template <int W, int NV, int ROWS>
VICO_INLINE void weigh(const float* p, int p_stride, const float* const* v, int keys, int at,
                       const float* rescale, float* o, int o_stride) {
  using F = typename Lanes<W>::F;
  F acc[ROWS][NV];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[r][n] = load<F>(o + r * o_stride + at + n * W) * rescale[r];
  for (int j = 0; j < keys; ++j) {
    const float* value = v[j] + at;
    F x[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) x[n] = load<F>(value + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float weight = p[j * p_stride + r];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[r][n] += x[n] * weight;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(o + r * o_stride + at + n * W, acc[r][n]);
}

// All columns for ROWS rows: as many registers at once as leave room, then single ones, then the
// half register that a head dim of 8 mod 16 has with AVX-512.
template <int ROWS>
VICO_INLINE void weigh_rows(const float* p, int p_stride, const float* const* v, int keys, int d,
                            const float* rescale, float* o, int o_stride) {
  constexpr int kWide = (kLanes == 16 ? 16 : 8) / (ROWS > 4 ? ROWS : 4);
  int at = 0;
  for (; at + kWide * kLanes <= d; at += kWide * kLanes)
    weigh<kLanes, kWide, ROWS>(p, p_stride, v, keys, at, rescale, o, o_stride);
  for (; at + kLanes <= d; at += kLanes)
    weigh<kLanes, 1, ROWS>(p, p_stride, v, keys, at, rescale, o, o_stride);
#if defined(__AVX512F__)
  if (at < d) weigh<8, 1, ROWS>(p, p_stride, v, keys, at, rescale, o, o_stride);
#endif
}

}  // namespace VICO_ISA
}  // namespace vico
