// The query tokens of one stream as scoring takes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "cpu/retrieve_rows.h"
#include "vico/retrieve.h"

namespace vico {
namespace VICO_ISA {

// What of a summary's row goes with which query rows. A unit is what query rows have in common: all
// KV heads as one long row where the whole stream chooses together, else one KV head. Heads that
// choose together and share a KV head are added up before they meet the keys.
struct Plan {
  explicit Plan(const ScoreArgs& a) : heads(a.heads), share(a.heads / a.kv_heads), d(a.head_dim) {
    const bool alone = a.pool == Pool::kSoftmax || a.scope == Scope::kQueryHead;
    const bool whole = !alone && a.scope == Scope::kStream;
    units = whole ? 1 : a.kv_heads;
    rows = alone ? share : 1;
    shape = {whole ? a.kv_heads : 1, d};
    merged = alone ? 1 : share;
    outputs = a.scope == Scope::kStream ? 1 : a.scope == Scope::kKvHead ? a.kv_heads : heads;
  }
  int64_t heads, share, d;
  int64_t units;    // 1 or G
  int64_t rows;     // query rows of a token in each unit
  int64_t merged;   // heads added up in each segment of a row
  int64_t outputs;  // R
  RowShape shape;   // of one row of one unit

  // The i-th head of segment s of row r of unit u.
  int64_t head(int64_t u, int64_t r, int64_t s, int64_t i) const {
    return (shape.segments > 1 ? s : u) * share + (merged > 1 ? i : r);
  }
  int64_t heads_per_row() const { return shape.segments * merged; }
  int64_t floats_per_token() const { return units * rows * shape.query_row(); }
};

// Vectors of an aligned array do not stand across cache lines.
template <typename T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <typename U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{64}); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
using Floats = std::vector<float, Aligned<float>>;

struct Queries {
  int64_t tokens = 0;
  Floats heads;  // [tokens, H, d]
  Floats rows;   // [units, tokens, rows of a unit, segments, padded d]; of bounds as Parts has it
  Floats norms;  // [units, tokens, rows of a unit]
  struct Output {
    int64_t row, token;
  };
  std::vector<Output> outputs;  // of each query row

  int64_t per_unit(const Plan& plan) const { return tokens * plan.rows; }

  void pack(const Plan& plan, Score score) {
    const int64_t wide = plan.shape.query_row(), all = plan.units * per_unit(plan);
    const bool split = score == Score::kBound;
    rows.assign((split ? 2 : 1) * all * wide, 0.0f);
    norms.assign(all, 0.0f);
    outputs.resize(all);
    for (int64_t u = 0, at = 0; u < plan.units; ++u)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < plan.rows; ++r, ++at) {
          double squares = 0.0;
          for (int64_t s = 0; s < plan.shape.segments; ++s)
            squares += pack_segment(plan, split, u, t, r, s);
          norms[at] = static_cast<float>(std::sqrt(squares));
          outputs[at] = {u * plan.rows + r, t};
        }
  }

 private:
  // Where bounds_of reads the negative and positive parts of a query row: for each group of
  // in_fours and each register of channels the negative parts of its rows, then the positive ones.
  struct Parts {
    float* first;  // of the first channels
    int64_t rows;  // of the group

    Parts(float* unit, int64_t n, int64_t row, int64_t wide) {
      const int64_t fours = n / 4 * 4, pairs = n / 2 * 2;
      rows = row < fours ? 4 : row < pairs ? 2 : 1;
      const int64_t in_group = row < fours ? row % 4 : row < pairs ? row - fours : 0;
      first = unit + 2 * (row - in_group) * wide + in_group * kLanes;
    }
    void put(int64_t c, float negative, float positive) {
      float* to = first + c / kLanes * kLanes * 2 * rows + c % kLanes;
      to[0] = negative;
      to[rows * kLanes] = positive;
    }
  };

  double pack_segment(const Plan& plan, bool split, int64_t u, int64_t t, int64_t r, int64_t s) {
    const int64_t n = per_unit(plan), wide = plan.shape.query_row(), from = s * padded(plan.d);
    const int64_t row = t * plan.rows + r;
    Parts parts(split ? &rows[2 * u * n * wide] : nullptr, n, row, wide);
    double squares = 0.0;
    for (int64_t c = 0; c < plan.d; ++c) {
      double below = 0.0, above = 0.0;
      for (int64_t i = 0; i < plan.merged; ++i) {
        const double q = heads[(t * plan.heads + plan.head(u, r, s, i)) * plan.d + c];
        (q >= 0.0 ? above : below) += q;
        squares += q * q;
      }
      if (split)
        parts.put(from + c, static_cast<float>(below), static_cast<float>(above));
      else
        rows[(u * n + row) * wide + from + c] = static_cast<float>(below + above);
    }
    return squares;
  }
};

// Tokens [first, last) of the query, or their mean as a single one.
template <typename T>
void load_queries(const ScoreArgs& a, int64_t first, int64_t last, bool mean, Queries* out) {
  const int64_t width = a.heads * a.head_dim, d = a.head_dim;
  const auto load = [&](int64_t token, float* to) {
    for (int64_t h = 0; h < a.heads; ++h)
      load_any(static_cast<const T*>(a.query) + token * a.q_token + h * a.q_head, to + h * d, d);
  };
  out->tokens = mean ? 1 : last - first;
  out->heads.resize(out->tokens * width);
  if (!mean) {
    for (int64_t t = first; t < last; ++t) load(t, &out->heads[(t - first) * width]);
    return;
  }
  std::vector<double> total(width, 0.0);
  for (int64_t t = first; t < last; ++t) {
    load(t, out->heads.data());
    for (int64_t i = 0; i < width; ++i) total[i] += out->heads[i];
  }
  for (int64_t i = 0; i < width; ++i)
    out->heads[i] = static_cast<float>(total[i] / static_cast<double>(last - first));
}

}  // namespace VICO_ISA
}  // namespace vico
