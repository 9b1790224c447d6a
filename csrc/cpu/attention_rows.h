// A group of query rows against a range of logical keys, tile by tile, in fp32.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/attention_tile.h"
#include "cpu/rows.h"
#include "vico/rotary.h"

namespace vico {
namespace VICO_ISA {

constexpr int kGroupRows = 128;

// Rows [row0, row0 + rows) of one KV head, row = query * share + head, and the keys they may see.
struct Work {
  int64_t row0;
  int rows;
  int64_t share;
  int64_t first_query;  // logical position of query 0
  int64_t sinks, window, start;
  bool causal;
  int64_t begin, end;  // logical keys that this piece of work is about
  float scale;
  int d;

  int64_t query(int row) const { return (row0 + row) / share; }
  int64_t last_seen(int row) const { return causal ? first_query + query(row) : end - 1; }
  int64_t first_seen(int row) const {
    return std::max(start, causal ? first_query + query(row) - window + 1 : 0);
  }
};

// Floats for one call, kept by the calling thread for its next one unless they are many.
struct Memory {
  static constexpr int64_t kKept = 1 << 22;
  explicit Memory(int64_t floats) {
    static thread_local std::unique_ptr<float[]> kept;
    static thread_local int64_t size = 0;
    if (floats > kKept) {
      own.reset(new float[floats]);
      at = own.get();
      return;
    }
    if (floats > size) {
      kept.reset();
      kept.reset(new float[floats]);
      size = floats;
    }
    at = kept.get();
  }
  std::unique_ptr<float[]> own;
  float* at;
};

// Memory of one thread.
struct Scratch {
  float* q;       // [kGroupRows * d], block by block [d][width]
  float* o;       // [kGroupRows, d]
  float* scores;  // [kTileKeys, 32]
  float* k;       // [kTileKeys, d], where keys must be converted or rotated
  float* v;       // [kTileKeys, d]
  float* rows;    // [3, kGroupRows]
  float* cosine;  // [kMaxHalfDim]
  float* sine;    // [kMaxHalfDim]

  static int64_t floats(int d) {
    return int64_t{d} * (2 * kGroupRows + 2 * kTileKeys) + 32 * kTileKeys + 3 * kGroupRows +
           2 * kMaxHalfDim;
  }
  explicit Scratch(float* at, int d) {
    const auto take = [&at](int64_t floats) {
      float* taken = at;
      at += floats;
      return taken;
    };
    q = take(int64_t{kGroupRows} * d);
    o = take(int64_t{kGroupRows} * d);
    k = take(int64_t{kTileKeys} * d);
    v = take(int64_t{kTileKeys} * d);
    scores = take(32 * kTileKeys);
    rows = take(3 * kGroupRows);
    cosine = take(kMaxHalfDim);
    sine = take(kMaxHalfDim);
  }
  RowState state(int row = 0) const {
    return {rows + row, rows + kGroupRows + row, rows + 2 * kGroupRows + row};
  }
};

// Rows that one pass of the tile kernels takes: as wide as registers allow, no wider than needed.
inline int block_width(int rows_left) {
  if (kLanes == 16 && rows_left > 16) return 32;
  if (kLanes == 16 && rows_left > 8) return 16;
  return 8;
}

// q, as [d][width] for each block of rows: scores take one element of all its rows at a time.
template <typename T>
void pack_queries(const T* q, int64_t q_token, int64_t q_head, const Work& w, float* packed) {
  alignas(64) float row[kMaxHeadDim];
  for (int first = 0, width; first < w.rows; first += width, packed += int64_t{width} * w.d) {
    width = block_width(w.rows - first);
    for (int r = 0; r < width; ++r) {
      if (first + r < w.rows) {
        const int64_t at = w.row0 + first + r;
        load_row(q + at / w.share * q_token + at % w.share * q_head, row, w.d);
      } else {
        std::memset(row, 0, sizeof(row));
      }
      for (int c = 0; c < w.d; ++c) packed[c * width + r] = row[c];
    }
  }
}

template <int W, int NV>
void attend_tile(const float* q, const float* const* k, const float* const* v, int keys, int rows,
                 bool masked, const RowMask& mask, float scale, int d, const RowState& state,
                 float* scores, float* o) {
  constexpr int kWidth = W * NV;
  for (int j = 0; j < keys; j += kKeysAtOnce) score_keys<W, NV>(q, k + j, d, scores + j * kWidth);
  if (masked)
    soften<W, NV, true>(scores, keys, scale, mask, state);
  else
    soften<W, NV, false>(scores, keys, scale, mask, state);
  int r = 0;
  for (; r + 4 < rows; r += 8)
    weigh_rows<8>(scores + r, kWidth, v, keys, d, state.rescale + r, o + r * d, d);
  for (; r + 2 < rows; r += 4)
    weigh_rows<4>(scores + r, kWidth, v, keys, d, state.rescale + r, o + r * d, d);
  for (; r < rows; r += 2)
    weigh_rows<2>(scores + r, kWidth, v, keys, d, state.rescale + r, o + r * d, d);
}

// Keys [first, first + n) of one tile, given as padded rows: each block of rows takes its share.
inline void attend_blocks(const Work& w, const Scratch& scratch, int64_t first, int n,
                          const float* const* k, const float* const* v) {
  const int keys = (n + kKeysAtOnce - 1) / kKeysAtOnce * kKeysAtOnce;
  const float* q = scratch.q;
  RowMask mask;
  for (int row = 0, width; row < w.rows; row += width, q += int64_t{width} * w.d) {
    width = block_width(w.rows - row);
    const int rows = std::min(width, w.rows - row);
    const int64_t end = first + n;
    const int newest = row + rows - 1;
    if (w.last_seen(newest) < first) continue;
    if (first >= w.sinks && w.first_seen(row) >= end) continue;
    const bool masked =
        n != keys || w.last_seen(row) < end - 1 || (end > w.sinks && w.first_seen(newest) > first);
    if (masked) {
      for (int r = 0; r < width; ++r) {
        const int real = row + std::min(r, rows - 1);
        mask.first[r] =
            static_cast<int32_t>(std::clamp<int64_t>(w.first_seen(real) - first, 0, kTileKeys));
        mask.last[r] =
            static_cast<int32_t>(std::clamp<int64_t>(w.last_seen(real) - first, -1, n - 1));
      }
      mask.sinks = static_cast<int32_t>(std::clamp<int64_t>(w.sinks - first, 0, kTileKeys));
    }
    const auto run = [&](auto tile) {
      tile(q, k, v, keys, rows, masked, mask, w.scale, w.d, scratch.state(row), scratch.scores,
           scratch.o + int64_t{row} * w.d);
    };
#if defined(__AVX512F__)
    if (width == 32)
      run(attend_tile<16, 2>);
    else if (width == 16)
      run(attend_tile<16, 1>);
    else
      run(attend_tile<8, 1>);
#elif defined(__AVX2__)
    run(attend_tile<8, 1>);
#else
    run(attend_tile<4, 2>);
#endif
  }
}

// Calls visit(first, n) for the tiles of [w.begin, w.end) that some row of the group sees.
template <typename Visit>
void visible_tiles(const Work& w, Visit visit) {
  const int64_t end = std::min(w.end, w.last_seen(w.rows - 1) + 1);
  const int64_t recent = std::max<int64_t>(w.first_seen(0), 0);
  const auto range = [&](int64_t from, int64_t to) {
    for (int64_t at = std::max(from, w.begin); at < to; at += kTileKeys)
      visit(at, static_cast<int>(std::min<int64_t>(kTileKeys, to - at)));
  };
  if (recent <= w.sinks) return range(0, end);
  range(0, std::min(w.sinks, end));
  range(recent, end);
}

// All of it; scratch.q holds the packed rows. Source::tile(first, n, k, v) gives pointers to the
// fp32 rows of keys and values, padded to kKeysAtOnce with rows of zeros.
template <typename Source>
void attend(const Work& w, Source& source, const Scratch& scratch) {
  const RowState state = scratch.state();
  std::fill_n(state.top, kGroupRows, kNegInf);
  std::fill_n(state.sum, kGroupRows, 0.0f);
  const int64_t padded = std::min<int64_t>(kGroupRows, (w.rows + 7) / 8 * 8);
  std::fill_n(scratch.o, padded * w.d, 0.0f);
  const float* k[kTileKeys];
  const float* v[kTileKeys];
  visible_tiles(w, [&](int64_t first, int n) {
    source.tile(first, n, k, v);
    attend_blocks(w, scratch, first, n, k, v);
  });
}

// The zeros that pad a tile.
inline const float* zero_row() {
  alignas(64) static const float zeros[kMaxHeadDim] = {};
  return zeros;
}

// One row's result from its sums, a learned logit in the denominator where there is one.
template <typename T>
void finish_row(const float* o, float top, float sum, const float* sink_logit, int d, T* out,
                float* lse) {
  alignas(64) float row[kMaxHeadDim];
  float log_sum = kNegInf, factor = 0.0f;
  if (sum != 0.0f) {  // also NaN
    if (sink_logit != nullptr) {
      const float both = std::max(top, *sink_logit);
      const float shrink = std::exp(top - both);
      const float total = sum * shrink + std::exp(*sink_logit - both);
      factor = shrink / total;
      log_sum = both + std::log(total);
    } else {
      factor = 1.0f / sum;
      log_sum = top + std::log(sum);
    }
  }
  for (int c = 0; c < d; ++c) row[c] = sum != 0.0f ? o[c] * factor : 0.0f;
  store_row(row, out, d);
  if (lse != nullptr) *lse = log_sum;
}

}  // namespace VICO_ISA
}  // namespace vico
