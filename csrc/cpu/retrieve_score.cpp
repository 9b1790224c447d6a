// The scores of topk_blocks on the CPU: compiled once per instruction set.
//
// Bound by memory: the summaries of a stream are read once (once per some hundred query tokens
// where these are not averaged first), block by block; queries stay in cache. A block is scored by
// one thread in one order, so that the bits do not depend on the threads.

#include <limits>
#include <type_traits>

#include "cpu/retrieve_queries.h"
#include "cpu/transpose.h"
#include "vico/append.h"
#include "vico/softmax.h"

namespace vico {
namespace VICO_ISA {
namespace {

constexpr int64_t kQueryFloats = 1 << 18;  // of one pass over the summaries: what a cache holds
constexpr int64_t kLogitFloats = 1 << 23;  // of one pass, where softmax needs them all at once
constexpr int64_t kSmallWork = 1 << 15;    // multiplications that are not worth a second thread
constexpr int64_t kTile = 16;              // blocks whose scores are written together
constexpr int64_t kTilesAtOnce = 4;       // that a thread takes: what is asked for ahead is its own
constexpr int64_t kNearFloats = 1 << 13;  // query rows, with their positive parts 64 KiB
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What one thread needs beside the inputs.
struct Buffers {
  Buffers(const ScoreArgs& a, const Plan& plan, int64_t scores)
      : low(plan.shape.segments * plan.d),
        high(a.score == Score::kBound ? plan.d : 0),
        tile(kTile * scores),
        part(a.sub > 1 ? kTile * scores : 0) {}
  std::vector<float> low, high;  // rows that had to be converted
  std::vector<float> tile;       // [kTile, scores of a block]
  std::vector<float> part;       // the same for one part of each block
};

// Row `unit` in fp32: in place, or converted and (a running sum) divided by its count.
template <typename T>
RowView view(const Plan& plan, const void* base, int64_t at, int64_t stride, const int32_t* count,
             std::vector<float>& buffer) {
  const T* row = static_cast<const T*>(base) + at;
  if constexpr (std::is_same_v<T, float>) {
    if (count == nullptr) return {row, stride};
  }
  for (int64_t s = 0; s < plan.shape.segments; ++s)
    load_any(row + s * stride, &buffer[s * plan.d], plan.d);
  if (count != nullptr) {
    const float n = static_cast<float>(*count);
    for (float& x : buffer) x /= n;
  }
  return {buffer.data(), plan.d};
}

// The bound as defined, head by head, for rows where a zero met an infinite bound.
template <typename T>
float exact_bound(const Plan& plan, const Queries& q, const RangeLayout& at, const T* low,
                  const T* high, int64_t u, int64_t row, Buffers& buffers) {
  const int64_t t = row / plan.rows, r = row % plan.rows;
  float total = 0.0f;
  for (int64_t s = 0; s < plan.shape.segments; ++s) {
    load_any(low + s * at.low_stride, buffers.low.data(), plan.d);
    load_any(high + s * at.high_stride, buffers.high.data(), plan.d);
    for (int64_t i = 0; i < plan.merged; ++i) {
      const float* query = &q.heads[(t * plan.heads + plan.head(u, r, s, i)) * plan.d];
      for (int64_t c = 0; c < plan.d; ++c)
        total += query[c] * (query[c] >= 0.0f ? buffers.high[c] : buffers.low[c]);
    }
  }
  return total;
}

bool all_finite(const float* x, int64_t n) {
  int finite = 1;
  for (int64_t i = 0; i < n; ++i) finite &= x[i] - x[i] == 0.0f;
  return finite != 0;
}

// Goes through the rows of a tile that will be read next, in the order of the memory, which is not
// the order that they are read in: asked for like that, they come sooner.
template <typename T>
struct RowsAhead {
  const T *low, *high;  // of its first block
  int64_t units, unit, low_at, high_at;

  // As many as a call reads that has `blocks` rows.
  RangesAhead<T> take(const ScoreArgs& a, int blocks) {
    const RangesAhead<T> rows{low + low_at + unit * a.sum_kv, high + high_at + unit * a.max_kv};
    for (unit += blocks; unit >= units; unit -= units)
      low_at += a.sum_block, high_at += a.max_block;
    return rows;
  }
};

// best[block, unit, token, row] of a tile: the bound, the largest over the parts of a block.
template <typename T>
void bound_tile(const ScoreArgs& a, const Plan& plan, const Queries& q, int64_t stream,
                int64_t block, int64_t blocks, Buffers& buffers, float* best) {
  const int64_t n = q.per_unit(plan), all = plan.units * n, wide = plan.shape.query_row();
  // With AVX2 two blocks at a time, in the order of the memory, where the query rows stay in the
  // nearest cache meanwhile. Else unit by unit.
  const int64_t together = kLanes == 8 && all * wide <= kNearFloats ? 2 : blocks;
  const RangeLayout at{plan.shape.segments, plan.d,      a.sum_kv, a.max_kv,
                       a.sum_block,         a.max_block, all};
  const bool parts = a.sub > 1;
  float* const found = parts ? buffers.part.data() : best;
  if (parts) std::fill(best, best + blocks * all, -kInf);
  bool any[kTile] = {};
  for (int64_t part = 0; part < a.sub; ++part) {
    bool empty[kTile] = {};
    const T* low = static_cast<const T*>(a.summary) + stream * a.sum_stream + block * a.sum_block +
                   part * a.sum_sub;
    const T* high = static_cast<const T*>(a.summary_max) + stream * a.max_stream +
                    block * a.max_block + part * a.max_sub;
    // The next part of these blocks, or the first one of the blocks behind.
    const bool more = part + 1 < a.sub;
    RowsAhead<T> rows{low + (more ? a.sum_sub : kTile * a.sum_block - part * a.sum_sub),
                      high + (more ? a.max_sub : kTile * a.max_block - part * a.max_sub),
                      plan.units,
                      0,
                      0,
                      0};
    for (int64_t first = 0; first < blocks; first += together)
      for (int64_t u = 0; u < plan.units; ++u) {
        const RowsAhead<T> begun = rows;
        in_fours(n, [&](int64_t i, auto count) {
          rows = begun;  // the same for all query rows
          const auto bound = [&](int64_t b, auto some) {
            bounds_of<some, count>(low + u * a.sum_kv + b * a.sum_block,
                                   high + u * a.max_kv + b * a.max_block,
                                   &q.rows[2 * (u * n + i) * wide], at, &found[b * all + u * n + i],
                                   &empty[b], rows.take(a, some));
          };
          const int64_t end = std::min(first + together, blocks);
          int64_t b = first;
          for (; b + 2 <= end; b += 2) bound(b, std::integral_constant<int, 2>{});
          if (b < end) bound(b, std::integral_constant<int, 1>{});
        });
      }
    for (int64_t b = 0; b < blocks; ++b) {
      if (empty[b]) continue;
      any[b] = true;
      float* const row = found + b * all;
      const bool done = all_finite(row, all);
      for (int64_t i = 0; !done && i < all; ++i)
        if (!std::isfinite(row[i]))
          row[i] = exact_bound(plan, q, at, low + i / n * a.sum_kv + b * a.sum_block,
                               high + i / n * a.max_kv + b * a.max_block, i / n, i % n, buffers);
      for (int64_t i = 0; parts && i < all; ++i)
        best[b * all + i] = bound_max(best[b * all + i], row[i]);
    }
  }
  for (int64_t b = 0; b < blocks; ++b)
    if (!any[b]) std::fill(best + b * all, best + (b + 1) * all, kNaN);
}

template <typename T>
void divide_by_norms(const Plan& plan, const T* row, int64_t stride, const float* q_norms,
                     int64_t n, float* out) {
  // The heads of a row that share a KV head repeat its key.
  const float repeats = static_cast<float>(plan.merged);
  const float norm = std::sqrt(repeats * sum_of_squares(row, stride, plan.shape));
  for (int64_t i = 0; i < n; ++i)
    out[i] /= (q_norms[i] < kCosineEps ? kCosineEps : q_norms[i]) *
              (norm < kCosineEps ? kCosineEps : norm);  // NaN stays
}

template <typename T>
void dot_block(const ScoreArgs& a, const Plan& plan, const Queries& q, int64_t stream,
               int64_t block, Buffers& buffers, float* best) {
  const int64_t n = q.per_unit(plan), wide = plan.shape.query_row();
  const int32_t* count = a.count == nullptr ? nullptr : a.count + stream * a.count_stream + block;
  for (int64_t u = 0; u < plan.units; ++u) {
    const int64_t at = stream * a.sum_stream + block * a.sum_block + u * a.sum_kv;
    const RowView row = view<T>(plan, a.summary, at, a.sum_kv, count, buffers.low);
    float* out = best + u * n;
    in_fours(n, [&](int64_t i, auto some) {
      dots<some>(row, plan.shape, &q.rows[(u * n + i) * wide], out + i);
    });
    if (a.score == Score::kCosine)
      divide_by_norms(plan, row.at, row.stride, &q.norms[u * n], n, out);
  }
}

// Four blocks with one query row a unit.
template <typename T>
void dot_four_blocks(const ScoreArgs& a, const Plan& plan, const Queries& q, int64_t stream,
                     int64_t block, float* best) {
  for (int64_t u = 0; u < plan.units; ++u) {
    const T* at = static_cast<const T*>(a.summary) + stream * a.sum_stream + block * a.sum_block +
                  u * a.sum_kv;
    float found[4];
    dots_of_four(at, a.sum_kv, a.sum_block, plan.shape, &q.rows[u * plan.shape.query_row()], found);
    for (int64_t i = 0; i < 4; ++i) {
      float* out = best + i * plan.units + u;
      *out = found[i];
      if (a.score == Score::kCosine)
        divide_by_norms(plan, at + i * a.sum_block, a.sum_kv, &q.norms[u], 1, out);
    }
  }
}

// Calls put(i, block, its scores of kLanes blocks) for each column i of `found` [kTile, all], as
// far as there are blocks: whole squares change sides in registers.
template <typename Put>
void by_columns(const float* found, int64_t all, int64_t blocks, Put put) {
  static_assert(kTile % kLanes == 0, "a vector ends within the tile");
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + kLanes <= all; i += kLanes)
    for (int64_t b = 0; b < blocks; b += kLanes) {
      Bits square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) square[j] = load<Bits>(found + (b + j) * all + i);
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) put(i + j, b, (F)square[j]);
    }
#endif
  for (; i < all; ++i)
    for (int64_t b = 0; b < blocks; b += kLanes) {
      F column;
      for (int j = 0; j < kLanes; ++j) column[j] = found[(b + j) * all + i];
      put(i, b, column);
    }
}

// Scores of `blocks` blocks for all tokens of the pass, into `scores` [R, NB] or `logits`: row by
// row, because the rows of many heads can fall on the same lines of a cache.
void keep(const ScoreArgs& a, const Plan& plan, const Queries& q, int64_t stream, int64_t block,
          int64_t blocks, bool first_pass, const float* found, float* logits, int64_t logit_row) {
  const int64_t all = plan.units * q.per_unit(plan);
  const auto store_some = [&](float* row, int64_t b, F x) {
    if (blocks - b >= kLanes) return store(row + b, x);
    std::memcpy(row + b, &x, (blocks - b) * sizeof(float));
  };
  if (a.pool == Pool::kSoftmax) {
    by_columns(found, all, blocks, [&](int64_t i, int64_t b, F x) {
      store_some(logits + i * logit_row + block, b, x * a.sm_scale);
    });
    return;
  }
  float* scores = a.scores + stream * plan.outputs * a.blocks + block;
  by_columns(found, all, blocks, [&](int64_t i, int64_t b, F x) {
    float* row = scores + q.outputs[i].row * a.blocks;
    if (!first_pass || q.outputs[i].token > 0) {
      const F kept = load_some(row + b, blocks - b);
      x = ((x > kept) | (x != x)) ? x : kept;  // bound_max
    }
    store_some(row, b, x);
  });
}

// One row of logits becomes shares of attention: softmax over those that are numbers.
void attention_share(float* row, int64_t n) {
  using U = Lanes<kLanes>::U;
  const auto logits_at = [&](int64_t i) {
    F x = load_some(row + i, n - i);
    return x == x ? x : F{} - kInf;
  };
  F top = F{} - kInf;
  for (int64_t i = 0; i < n; i += kLanes) {
    F x = logits_at(i);
    for (int64_t lane = n - i; lane < kLanes; ++lane) x[lane] = -kInf;
    top = x > top ? x : top;
  }
  float most = -kInf;
  for (int lane = 0; lane < kLanes; ++lane) most = std::max(most, top[lane]);
  F total{};
  for (int64_t i = 0; i < n; i += kLanes) {
    F w = exp_nonpositive<F, U>(logits_at(i) - most);
    for (int64_t lane = n - i; lane < kLanes; ++lane) w[lane] = 0.0f;
    total += w;
  }
  const float whole = sum_of(total);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F x = load_some(row + i, n - i);
    const F w = exp_nonpositive<F, U>(logits_at(i) - most) / whole;
    const F share = x == x ? w : x;
    std::memcpy(row + i, &share, std::min<int64_t>(kLanes, n - i) * sizeof(float));
  }
}

// Adds the shares of each token, averaged over the heads of the row, to [R, NB]; blocks [from, to).
void add_shares(const ScoreArgs& a, const Plan& plan, const Queries& q, const float* logits,
                int64_t logit_row, int64_t stream, int64_t output, int64_t from, int64_t to,
                bool first_pass) {
  const int64_t n = q.per_unit(plan), together = plan.heads / plan.outputs;
  float* out = a.scores + (stream * plan.outputs + output) * a.blocks;
  if (first_pass) std::fill(out + from, out + to, 0.0f);
  std::vector<float> sum(to - from);
  for (int64_t t = 0; t < q.tokens; ++t) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t h = output * together; h < (output + 1) * together; ++h) {
      const float* row =
          logits + (h / plan.share * n + t * plan.share + h % plan.share) * logit_row + from;
      for (int64_t i = 0; i < to - from; ++i) sum[i] += row[i];
    }
    for (int64_t i = 0; i < to - from; ++i) out[from + i] += sum[i] / static_cast<float>(together);
  }
}

template <typename T>
void score_stream(const ScoreArgs& a, const Plan& plan, int64_t stream, int n_threads) {
  const auto end_of = [&](int64_t i) {
    return a.cu_seqlens == nullptr ? i : std::clamp<int64_t>(a.cu_seqlens[i], 0, a.tokens);
  };
  const int64_t begin = end_of(stream), end = end_of(stream + 1);
  const int64_t blocks =
      a.num_blocks == nullptr ? a.blocks : std::clamp<int64_t>(a.num_blocks[stream], 0, a.blocks);
  float* scores = a.scores + stream * plan.outputs * a.blocks;
  if (end <= begin) {
    for (int64_t r = 0; r < plan.outputs; ++r)
      std::fill(scores + r * a.blocks, scores + r * a.blocks + blocks, kNaN);
    return;
  }
  const bool mean = a.pool == Pool::kMean, softmax = a.pool == Pool::kSoftmax;
  int64_t at_once = std::max<int64_t>(1, kQueryFloats / plan.floats_per_token());
  if (softmax) at_once = std::clamp<int64_t>(kLogitFloats / (a.heads * (blocks + 1)), 1, at_once);
  Queries q;
  std::vector<float> logits;
  for (int64_t first = begin; first < end; first = mean ? end : first + at_once) {
    const int64_t last = mean ? end : std::min(end, first + at_once);
    if (a.query_dtype == DType::kFloat32)
      load_queries<float>(a, first, last, mean, &q);
    else if (a.query_dtype == DType::kFloat16)
      load_queries<Half>(a, first, last, mean, &q);
    else
      load_queries<BFloat16>(a, first, last, mean, &q);
    q.pack(plan, a.score);
    const int64_t rows = plan.units * q.per_unit(plan);
    if (softmax) logits.resize(rows * blocks);
    const bool first_pass = first == begin;
    const bool four = a.count == nullptr && a.score != Score::kBound && q.per_unit(plan) == 1;
    const bool share_out = blocks * rows * plan.shape.query_row() > kSmallWork;
#pragma omp parallel num_threads(n_threads) if (share_out)
    {
      Buffers buffers(a, plan, rows);
// Guided: a sleeping thread comes late, and the first one need not wait for half of the work then.
#pragma omp for schedule(guided, kTilesAtOnce)
      for (int64_t from = 0; from < blocks; from += kTile) {
        const int64_t together = std::min(kTile, blocks - from);
        int64_t i = 0;
        if (a.score == Score::kBound) {
          bound_tile<T>(a, plan, q, stream, from, together, buffers, buffers.tile.data());
          i = together;
        }
        for (; four && i + 4 <= together; i += 4)
          dot_four_blocks<T>(a, plan, q, stream, from + i, &buffers.tile[i * rows]);
        for (; i < together; ++i)
          dot_block<T>(a, plan, q, stream, from + i, buffers, &buffers.tile[i * rows]);
        keep(a, plan, q, stream, from, together, first_pass, buffers.tile.data(), logits.data(),
             blocks);
      }
      if (softmax) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row)
          attention_share(logits.data() + row * blocks, blocks);
        constexpr int64_t kStretch = 1024;
        const int64_t stretches = (blocks + kStretch - 1) / kStretch;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < plan.outputs * stretches; ++i) {
          const int64_t from = i % stretches * kStretch;
          add_shares(a, plan, q, logits.data(), blocks, stream, i / stretches, from,
                     std::min(blocks, from + kStretch), first_pass);
        }
      }
    }
  }
  if (!softmax) return;
  for (int64_t r = 0; r < plan.outputs; ++r)
    for (int64_t b = 0; b < blocks; ++b)
      scores[r * a.blocks + b] /= static_cast<float>(end - begin);
}

}  // namespace

void score_blocks(const ScoreArgs& a, int n_threads) {
  const Plan plan(a);
  for (int64_t stream = 0; stream < a.streams; ++stream) {
    if (a.summary_dtype == DType::kFloat32)
      score_stream<float>(a, plan, stream, n_threads);
    else if (a.summary_dtype == DType::kFloat16)
      score_stream<Half>(a, plan, stream, n_threads);
    else
      score_stream<BFloat16>(a, plan, stream, n_threads);
  }
}

}  // namespace VICO_ISA
}  // namespace vico
