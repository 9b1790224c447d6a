// Up to eight query rows of each KV head against a range of logical keys, with AVX2 or AVX-512:
// keys that are not rotated, and all values, are read where they lie.
//
// Tiles are small, and memory is asked for the values of a tile while its keys are scored and for
// the next keys while they are summed, all heads of a token at once. More or earlier would be gone
// from the first level cache before its turn; one head after the other breaks the runs of
// addresses.
#pragma once

#include "cpu/attention_few.h"

#if defined(__AVX2__)
#include "cpu/attention_rows.h"

namespace vico {
namespace VICO_ISA {

// Whether attend_few takes so many rows of a head dim.
template <typename T>
bool takes_few(int rows, int d) {
  return rows <= kFewRows && d % Few<T>::kStep == 0;
}

// q as [kFewRows][d], columns as Few<Key> has them.
template <typename Key, typename T>
void pack_few(const T* q, int64_t q_token, int64_t q_head, const Work& w, float* packed) {
  for (int r = 0; r < kFewRows; ++r, packed += w.d) {
    const int64_t at = w.row0 + r;
    const T* row = r < w.rows ? q + at / w.share * q_token + at % w.share * q_head
                              : reinterpret_cast<const T*>(zero_row());
    if constexpr (std::is_same_v<Key, T>)
      Few<T>::pack(row, w.d, packed);
    else
      load_row(row, packed, w.d);
  }
}

// The rows of a tile for all KV heads: those of a token in one piece where they lie side by side,
// or (AheadOfSteps) each for itself.
template <typename T>
struct HeadRows {
  FewAhead<T> list;

  HeadRows(const T* const* first, int n, int64_t unit, int units, int d) {
    const bool adjacent = !kSteadily && (units == 1 || unit == d);
    const int pieces = adjacent ? 1 : units;
    int count = 0;
    for (int j = 0; j < n; ++j)
      for (int u = 0; u < pieces; ++u)
        rows_[count++] = reinterpret_cast<const char*>(first[j] + u * unit);
    list.bytes = (adjacent ? units * d : d) * static_cast<int>(sizeof(T));
    if constexpr (kSteadily) {
      if (count == 0) rows_[count++] = reinterpret_cast<const char*>(zero_row());
      list.row = rows_;
      list.last = rows_ + count - 1;
    } else {
      list.rows = rows_;
      list.count = count;
    }
  }
  HeadRows(const HeadRows&) = delete;
  HeadRows& operator=(const HeadRows&) = delete;

 private:
  const char* rows_[kDecodeKeys * (kGroupRows / kFewRows)];
};

// What attend() does for `units` KV heads whose rows lie one after another in scratch.q (packed),
// scratch.o and the state. Keys are of type T, or fp32 where they may be rotated.
template <typename T, typename Key, typename Source>
void attend_few(const Work& w, int units, Source& source, const Scratch& scratch) {
  using Tile = Located<T, kDecodeKeys>;
  const int d = w.d;
  const RowState all = scratch.state();
  std::fill_n(all.top, units * kFewRows, kNegInf);
  std::fill_n(all.sum, units * kFewRows, 0.0f);
  std::fill_n(scratch.o, int64_t{units} * kFewRows * d, 0.0f);
  RowMask mask;
  walk_tiles<T, kDecodeKeys>(w, kDecodeKeys, source, [&](const Tile& now, const Tile* next) {
    const Seen seen = look(w, now.first, now.n, kKeysAtOnce, 0, w.rows, kFewRows, &mask);
    if (seen == Seen::kNothing) return;
    const int keys = (now.n + kKeysAtOnce - 1) / kKeysAtOnce * kKeysAtOnce;
    const auto key = [&](int j, int64_t at, float* out) -> const Key* {
      if constexpr (std::is_same_v<Key, float>)
        return source.key(now.k[j] + at, now.entry[j], out);
      else
        return now.k[j] + at;
    };
    HeadRows<T> values(now.v, now.n, source.v_unit, units, d);
    if constexpr (!kSteadily) values.list.pace(units * Few<Key>::asks_of_score(keys, w.rows));
    for (int u = 0; u < units; ++u) {
      float* const scores = scratch.scores + u * kFewRows * keys;
      const RowState state = all.from(u * kFewRows);
      const Key* rows[kDecodeKeys];
      for (int j = 0; j < keys; ++j)
        rows[j] = j < now.n ? key(j, u * source.k_unit, scratch.k + int64_t{j} * d)
                            : reinterpret_cast<const Key*>(zero_row());
      Few<Key>::score(scratch.q + int64_t{u} * kFewRows * d, w.rows, rows, keys, d, scores,
                      &values.list);
      soften_few(scores, keys, w.scale, seen == Seen::kSome ? &mask : nullptr, state);
    }
    HeadRows<T> following(next == nullptr ? now.k : next->k, next == nullptr ? 0 : next->n,
                          source.k_unit, units, d);
    if constexpr (!kSteadily) following.list.pace(units * Few<T>::asks_of_weigh(keys, w.rows, d));
    for (int u = 0; u < units; ++u) {
      const T* rows[kDecodeKeys];
      for (int j = 0; j < keys; ++j)
        rows[j] = j < now.n ? now.v[j] + u * source.v_unit : reinterpret_cast<const T*>(zero_row());
      Few<T>::weigh(scratch.scores + u * kFewRows * keys, w.rows, rows, keys, d,
                    all.rescale + u * kFewRows, scratch.o + int64_t{u} * kFewRows * d,
                    &following.list);
    }
  });
  for (int64_t r = 0; r < int64_t{units} * kFewRows; ++r) Few<T>::order(scratch.o + r * d, d);
}

}  // namespace VICO_ISA
}  // namespace vico
#endif
