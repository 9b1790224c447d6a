// Query rows for the scores of topk_blocks on the GPU: the mean over tokens, the heads that choose
// together added up.
#pragma once

#include "cuda/launch.h"
#include "cuda/warp.h"
#include "vico/retrieve.h"

namespace vico {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kVector = 4;  // channels a lane reads at a time

// What of a summary goes with which query rows: as in the CPU's Plan. A unit is all KV heads where
// the stream chooses as one, else one KV head; its query rows are `rows` heads of each token.
struct Plan {
  int64_t units, rows, share, segments, outputs;
  int64_t merged;  // heads that are added up: in the query, or for a bound in its score
  int64_t stride;  // floats of a query row, [segments, merged for a bound, d], filled up with zeros

  explicit Plan(const ScoreArgs& a) : share(a.heads / a.kv_heads) {
    const bool alone = a.scope == Scope::kQueryHead, whole = a.scope == Scope::kStream;
    units = whole ? 1 : a.kv_heads;
    rows = alone ? share : 1;
    merged = alone ? 1 : share;
    segments = whole ? a.kv_heads : 1;
    outputs = whole ? 1 : alone ? a.heads : a.kv_heads;
    const int64_t length = segments * (a.score == Score::kBound ? merged : 1) * a.head_dim;
    stride = (length + kVector - 1) / kVector * kVector;
  }
};

struct Args {
  ScoreArgs a;
  Plan plan;
  float *packed, *norms;  // [tokens, units, rows, stride] and [tokens, units, rows]; of streams
                          // instead of tokens where these are averaged
  bool packs;             // blocks make their query rows themselves, in shared memory
  bool vectors;           // rows of the summaries stand at multiples of kVector elements
  bool wide;              // and of 16 bytes, which they also are multiples of
  int pieces, inner;      // what of a mean lies together: so many times so many channels
};

struct Tokens {
  int64_t first, last;
};
__device__ __forceinline__ Tokens tokens_of(const ScoreArgs& a, int64_t stream) {
  if (a.cu_seqlens == nullptr) return {stream, stream + 1};
  const auto end = [&](int64_t i) {
    const int64_t x = a.cu_seqlens[i];
    return x < 0 ? 0 : x < a.tokens ? x : a.tokens;
  };
  return {end(stream), end(stream + 1)};
}

template <typename T>
__device__ __forceinline__ double query_at(const ScoreArgs& a, int64_t at) {
  return to_float(static_cast<const T*>(a.query)[at]);
}

// `count` rows of unit u from row r on, of the mean of some tokens, and of a single one its norm
// where `norm` is given; by all threads of the block, of which each reads kTokens side by side.
// Ends with a barrier.
template <typename T, int kTokens>
__device__ __forceinline__ void pack_typed(const Args& p, Tokens tokens, int u, int r, int count,
                                           float* rows, float* norm, double* scratch) {
  constexpr int kAhead = 4;  // elements of a thread whose reads are under way together
  const ScoreArgs& a = p.a;
  const bool bound = a.score == Score::kBound;
  const int apart = bound ? static_cast<int>(p.plan.merged) : 1;
  const int together = bound ? 1 : static_cast<int>(p.plan.merged);
  // Unsigned 32-bit numbers: a division of 64 bits takes as long as the read that it is for.
  const unsigned d = static_cast<unsigned>(a.head_dim), stride = p.plan.stride;
  const unsigned length = static_cast<unsigned>(p.plan.segments) * apart * d;
  const double of = static_cast<double>(tokens.last - tokens.first);
  double squares = 0.0;
  for (unsigned from = threadIdx.x; from < count * stride; from += kAhead * kThreads) {
    int64_t at[kAhead];
    bool there[kAhead];
    double sum[kAhead] = {};
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const unsigned row = (from + j * kThreads) / stride, i = (from + j * kThreads) % stride;
      const unsigned s = i / (apart * d), m = i / d % apart;
      const int64_t group = p.plan.segments > 1 ? s : u;
      const int64_t head = group * p.plan.share + (p.plan.merged > 1 ? m : r + row);
      there[j] = row < static_cast<unsigned>(count) && i < length;
      at[j] = there[j] ? head * a.q_head + i % d : 0;
    }
    for (int other = 0; other < together; ++other) {
      double total[kAhead] = {};
#pragma unroll kTokens
      for (int64_t t = tokens.first; t < tokens.last; ++t) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
          total[j] += query_at<T>(a, t * a.q_token + other * a.q_head + at[j]);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (!there[j]) continue;
        const float q = static_cast<float>(total[j] / of);
        sum[j] += q;
        squares += static_cast<double>(q) * q;
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (from + j * kThreads < count * stride)
        rows[from + j * kThreads] = static_cast<float>(sum[j]);
  }
  if (norm != nullptr) {
    scratch[threadIdx.x] = squares;
    __syncthreads();
    if (threadIdx.x < kWarp) {
      double sum = 0.0;
#pragma unroll
      for (int i = 0; i < kThreads; i += kWarp) sum += scratch[threadIdx.x + i];
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
    }
  }
  __syncthreads();
}

template <int kTokens>
__device__ __forceinline__ void pack_rows(const Args& p, Tokens tokens, int u, int r, int count,
                                          float* rows, float* norm, double* scratch) {
  switch (p.a.query_dtype) {
    case DType::kFloat32:
      return pack_typed<float, kTokens>(p, tokens, u, r, count, rows, norm, scratch);
    case DType::kFloat16:
      return pack_typed<__half, kTokens>(p, tokens, u, r, count, rows, norm, scratch);
    default:
      return pack_typed<__nv_bfloat16, kTokens>(p, tokens, u, r, count, rows, norm, scratch);
  }
}

// One block: one query row.
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Args p) {
  __shared__ double scratch[kThreads];
  const int64_t r = blockIdx.x % p.plan.rows, u = blockIdx.x / p.plan.rows % p.plan.units;
  const int64_t token = blockIdx.x / (p.plan.rows * p.plan.units);
  const Tokens tokens = p.a.pool == Pool::kMean ? tokens_of(p.a, token) : Tokens{token, token + 1};
  if (tokens.last <= tokens.first) return;
  const int64_t at = blockIdx.x;
  pack_rows<4>(p, tokens, static_cast<int>(u), static_cast<int>(r), 1,
               p.packed + at * p.plan.stride, p.norms + at, scratch);
}

}  // namespace
}  // namespace vico
