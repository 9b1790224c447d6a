// A group of query rows against a range of logical keys, tile by tile, in fp32.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/attention_pack.h"
#include "cpu/attention_tile.h"
#include "cpu/attention_work.h"
#include "cpu/rows.h"

namespace vico {
namespace VICO_ISA {

// One tile as the kernels take it: rows padded to kKeysAtOnce with zeros, fp32 or (pairs) K of bf16
// and V of two keys side by side; and what to ask memory for meanwhile.
struct TileRows {
  int64_t first;
  int n;
  const float* k[kTileKeys];
  const float* v[kTileKeys];
  Ahead next_k, next_v;
};

#if defined(__AVX2__) && !defined(__AVX512F__)
inline void attend_few_tile(TileRows& t, const float* q, int rows, const RowMask* mask, float scale,
                            int d, const RowState& state, float* scores, float* o) {
  const int keys = (t.n + kKeysAtOnce - 1) / kKeysAtOnce * kKeysAtOnce;
  t.next_k.pace(Few<float>::asks_of_score(keys, rows));
  Few<float>::score(q, rows, t.k, keys, d, scores, &t.next_k);
  soften_few(scores, keys, scale, mask, state);
  t.next_v.pace(Few<float>::asks_of_weigh(keys, rows, d));
  Few<float>::weigh(scores, rows, t.v, keys, d, state.rescale, o, &t.next_v);
}
#endif

template <int W, int NV, typename Dot>
void attend_tile(TileRows& t, const float* q, int rows, const RowMask* mask, float scale, int d,
                 const RowState& state, float* scores, float* o) {
  constexpr int kWidth = W * NV;
  const int groups = (t.n + kKeysAtOnce - 1) / kKeysAtOnce, keys = groups * kKeysAtOnce;
  score_tile<W, NV, Dot>(q, t.k, keys, d / Dot::kPerElement, scores, &t.next_k);
  soften<W, NV>(scores, keys, scale, mask, state);
  using Element = typename Dot::Element;
  if constexpr (Dot::kPerElement == 2)
    for (int j = 0; j < keys; j += 2)
      pair_rows(scores + j * kWidth, scores + (j + 1) * kWidth,
                reinterpret_cast<uint32_t*>(scores + j / 2 * kWidth), kWidth);
  const auto* weights = reinterpret_cast<const Element*>(scores);
  constexpr int kRowsAtOnce = kLanes == 16 ? 8 : 4;
  t.next_v.pace(keys / Dot::kPerElement / kKeysOfAsk * passes_over(d) *
                ((rows + kRowsAtOnce - 1) / kRowsAtOnce));
  for (int r = 0; r < rows;) {
    const int left = rows - r;
    const auto run = [&](auto count) {
      weigh_rows<count, Dot>(weights + r, kWidth, t.v, keys, d, state.rescale + r, o + r * d,
                             &t.next_v);
      r += count;
    };
    using std::integral_constant;
    if (kLanes == 16 && left > 4)
      run(integral_constant<int, 8>{});
    else if (left > 2)
      run(integral_constant<int, 4>{});
    else
      run(integral_constant<int, 2>{});
  }
}

// What a block of `rows` rows (padded to `width`) sees of the tile [first, first + n), which is
// padded to a multiple of `granule` keys.
enum class Seen { kNothing, kSome, kAll };
inline Seen look(const Work& w, int64_t first, int n, int granule, int row, int rows, int width,
                 RowMask* mask) {
  const int64_t end = first + n;
  const int newest = row + rows - 1;
  if (w.last_seen(newest) < first) return Seen::kNothing;
  if (first >= w.sinks && w.first_seen(row) >= end) return Seen::kNothing;
  if (n % granule == 0 && w.last_seen(row) >= end - 1 &&
      (end <= w.sinks || w.first_seen(newest) <= first))
    return Seen::kAll;
  const auto offset = [&](int64_t key, int64_t low, int64_t high) {
    return static_cast<int32_t>(std::clamp(key - first, low, high));
  };
  for (int r = 0; r < width; ++r) {
    const int real = row + std::min(r, rows - 1);
    mask->first[r] = offset(w.first_seen(real), 0, n);
    mask->last[r] = offset(w.last_seen(real), -1, n - 1);
  }
  mask->sinks = offset(w.sinks, 0, n);
  return Seen::kSome;
}

// One tile of one KV head: each block of rows takes its share.
template <typename Dot>
void attend_blocks(const Work& w, TileRows& t, const float* q, float* o, const RowState& state,
                   float* scores) {
  RowMask mask;
  for (int row = 0, width; row < w.rows; row += width, q += int64_t{width} * w.d) {
    width = block_width(w.rows - row);
    const int rows = std::min(width, w.rows - row);
    const Seen seen = look(w, t.first, t.n, kKeysAtOnce, row, rows, width, &mask);
    if (seen == Seen::kNothing) continue;
    const auto run = [&](auto tile) {
      tile(t, q, rows, seen == Seen::kSome ? &mask : nullptr, w.scale, w.d, state.from(row), scores,
           o + int64_t{row} * w.d);
    };
#if defined(__AVX512F__)
    if (width == 32)
      run(attend_tile<16, 2, Dot>);
    else if (width == 16)
      run(attend_tile<16, 1, Dot>);
    else
      run(attend_tile<8, 1, Dot>);
#elif defined(__AVX2__)
    if (width == 16)
      run(attend_tile<8, 2, Dot>);
    else
      run(attend_few_tile);
#else
    run(attend_tile<4, 2, Dot>);
#endif
    t.next_k.count = t.next_v.count = 0;
  }
}

// Calls visit(first, n) for the tiles of up to `keys` keys in [w.begin, w.end) that some row of the
// group sees.
template <typename Visit>
void visible_tiles(const Work& w, int keys, Visit visit) {
  const int64_t end = std::min(w.end, w.last_seen(w.rows - 1) + 1);
  const int64_t recent = std::max<int64_t>(w.first_seen(0), 0);
  const auto range = [&](int64_t from, int64_t to) {
    for (int64_t at = std::max(from, w.begin); at < to; at += keys)
      visit(at, static_cast<int>(std::min<int64_t>(keys, to - at)));
  };
  if (recent <= w.sinks) return range(0, end);
  range(0, std::min(w.sinks, end));
  range(recent, end);
}

// Where the keys of a tile are stored (of the first KV head of a task), and in which table entry.
template <typename T, int KEYS>
struct Located {
  int64_t first;
  int n;
  const T* k[KEYS];
  const T* v[KEYS];
  int64_t entry[KEYS];
};

inline const float* as_float(const float* row, float*, int) { return row; }
template <typename T>
const float* as_float(const T* row, float* out, int d) {
  load_row(row, out, d);
  return out;
}

// The rows of one KV head of a tile, converted or rotated in scratch where they must be.
template <typename Dot, typename T, typename Source>
void stage(const Located<T, kTileKeys>& from, int64_t k_at, int64_t v_at, Source& source,
           const Scratch& scratch, TileRows* to) {
  const int d = source.head_dim();
  const T* zeros = reinterpret_cast<const T*>(zero_row());
  const int keys = (from.n + kKeysAtOnce - 1) / kKeysAtOnce * kKeysAtOnce;
  if constexpr (Dot::kPerElement == 2) {
    for (int j = 0; j < keys; ++j)
      to->k[j] = reinterpret_cast<const float*>(j < from.n ? from.k[j] + k_at : zeros);
    for (int j = 0; j < keys; j += 2) {
      float* pair = scratch.v + int64_t{j} * d;
      pair_rows(&(j < from.n ? from.v[j] + v_at : zeros)->bits,
                &(j + 1 < from.n ? from.v[j + 1] + v_at : zeros)->bits,
                reinterpret_cast<uint32_t*>(pair), d);
      to->v[j / 2] = pair;
    }
  } else {
    for (int j = 0; j < from.n; ++j) {
      to->k[j] = source.key(from.k[j] + k_at, from.entry[j], scratch.k + int64_t{j} * d);
      to->v[j] = as_float(from.v[j] + v_at, scratch.v + int64_t{j} * d, d);
    }
    for (int j = from.n; j < keys; ++j) to->k[j] = to->v[j] = zero_row();
  }
}

// How stored keys of type T are multiplied: bf16 as pairs wherever there are instructions for it.
template <typename T>
struct DotOf {
  using type = Singles;
};
#if defined(__AVX512BF16__)
template <>
struct DotOf<BFloat16> {
  using type = Pairs;
};
#endif
template <typename T>
constexpr bool kHasPairs = DotOf<T>::type::kPerElement == 2;

// What a unit asks memory for of the tile after its own: its rows, or, where a token's heads lie
// side by side, all heads of its share of tokens.
template <typename T, int KEYS>
struct Upcoming {
  Ahead k, v;

  template <typename Source>
  Upcoming(const Located<T, KEYS>* next, int unit, int units, const Source& source) {
    if (next == nullptr) return;
    const int d = source.head_dim();
    const bool adjacent = source.k_unit == d && source.v_unit == d;
    const int from = adjacent ? unit * next->n / units : 0;
    const int to = adjacent ? (unit + 1) * next->n / units : next->n;
    for (int j = from; j < to; ++j) {
      k_rows_[j] =
          reinterpret_cast<const char*>(next->k[j] + (adjacent ? 0 : unit * source.k_unit));
      v_rows_[j] =
          reinterpret_cast<const char*>(next->v[j] + (adjacent ? 0 : unit * source.v_unit));
    }
    k.rows = k_rows_ + from;
    v.rows = v_rows_ + from;
    k.count = v.count = to - from;
    k.bytes = v.bytes = static_cast<int>((adjacent ? units * d : d) * sizeof(T));
  }
  Upcoming(const Upcoming&) = delete;
  Upcoming& operator=(const Upcoming&) = delete;

 private:
  const char *k_rows_[KEYS], *v_rows_[KEYS];
};

// Calls process(now, next) for the visible tiles of up to `keys` keys; next is the one to ask
// memory for, at the last tile what the source knows to come `after` it, or null.
template <typename T, int KEYS, typename Source, typename Process>
void walk_tiles(const Work& w, int keys, Source& source, Process process) {
  Located<T, KEYS> located[2];
  int count = 0;  // one tile behind, so that the next one is known
  visible_tiles(w, keys, [&](int64_t first, int n) {
    Located<T, KEYS>& next = located[count % 2];
    next.first = first;
    next.n = n;
    source.locate(first, n, &next);
    if (count > 0) process(located[(count + 1) % 2], &next);
    ++count;
  });
  if (count == 0) return;
  Located<T, KEYS>* after = source.after(&located[count % 2]) ? &located[count % 2] : nullptr;
  process(located[(count + 1) % 2], after);
}

// All of it, for `units` KV heads whose rows lie one after another in scratch.q (packed), scratch.o
// and the state. Tokens hold all their KV heads side by side, so heads go through memory together,
// tile by tile. Source: locate(first, n, &located), after(&located), key(row, entry, out) -> fp32
// row, head_dim(), k_unit and v_unit from one KV head to the next.
template <typename T, typename Dot, typename Source>
void attend(const Work& w, int units, Source& source, const Scratch& scratch) {
  using Tile = Located<T, kTileKeys>;
  const int padded = padded_rows(w.rows), d = w.d;
  const RowState all = scratch.state();
  std::fill_n(all.top, units * padded, kNegInf);
  std::fill_n(all.sum, units * padded, 0.0f);
  std::fill_n(scratch.o, int64_t{units} * padded * d, 0.0f);
  TileRows tile;
  walk_tiles<T, kTileKeys>(w, kTileKeys, source, [&](const Tile& now, const Tile* next) {
    tile.first = now.first;
    tile.n = now.n;
    for (int u = 0; u < units; ++u) {
      stage<Dot>(now, u * source.k_unit, u * source.v_unit, source, scratch, &tile);
      const Upcoming<T, kTileKeys> upcoming(next, u, units, source);
      tile.next_k = upcoming.k;
      tile.next_v = upcoming.v;
      const int64_t row = int64_t{u} * padded;
      attend_blocks<Dot>(w, tile, scratch.q + row * d, scratch.o + row * d,
                         all.from(static_cast<int>(row)), scratch.scores);
    }
  });
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
