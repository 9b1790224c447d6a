// The scores of topk_blocks on the GPU.
//
// Bound by memory: each summary is read once (once per four query tokens under max pooling) for two
// operations a channel and query row. A warp reads the rows of some blocks side by side and holds
// four query rows against them. The sum of a row has one order whatever stands beside it.
//
// What it takes to be bound by memory: an H200 has about 25 KiB under way on each multiprocessor at
// any time (4.8 TB/s for 0.7 us). Means are read 16 bytes at a time, four blocks of history and two
// steps ahead in each lane: 32 KiB a block of threads, of which 4,096 blocks of history make one
// for each multiprocessor.
//
// Query rows are made first (the mean over tokens, the heads that choose together added up): by
// each block for itself where a stream has one token, else by a kernel of their own.

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/retrieve.h"
#include "cuda/retrieve_queries.h"
#include "cuda/warp.h"
#include "vico/append.h"

namespace vico {
namespace {

constexpr int kMostRows = 4;                      // query rows that are held against a block
constexpr int64_t kSharedFloats = 40 * 1024 / 4;  // of query rows in shared memory
constexpr float kInfinity = __builtin_huge_valf();

template <typename T, int kChannels = kVector>
struct alignas(kChannels * sizeof(T)) Vector {
  T x[kChannels];
};

// Four channels from c on as floats, zeros behind the end of the row.
template <typename T>
__device__ __forceinline__ float4 load_channels(const T* row, int64_t c, int64_t end,
                                                bool vectors) {
  if (vectors && c + kVector <= end) {
    const Vector<T> v = *reinterpret_cast<const Vector<T>*>(row + c);
    return make_float4(to_float(v.x[0]), to_float(v.x[1]), to_float(v.x[2]), to_float(v.x[3]));
  }
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (c < end) v.x = to_float(row[c]);
  if (c + 1 < end) v.y = to_float(row[c + 1]);
  if (c + 2 < end) v.z = to_float(row[c + 2]);
  if (c + 3 < end) v.w = to_float(row[c + 3]);
  return v;
}

// The sums over the lanes of N values: lanes from 32 / N i on have that of value i. One order of
// additions for all of them. Each step sends half of the values away.
template <int N, int kWidth = kWarp / 2>
__device__ __forceinline__ float sums_over_lanes(const float (&v)[N], int lane) {
  const bool upper = (lane & kWidth) != 0;
  if constexpr (N > 1) {
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, upper ? v[i] : v[i + N / 2], kWidth);
      half[i] = (upper ? v[i + N / 2] : v[i]) + other;
    }
    return sums_over_lanes<N / 2, kWidth / 2>(half, lane);
  } else if constexpr (kWidth > 0) {
    const float sum[1] = {v[0] + __shfl_xor_sync(kAllLanes, v[0], kWidth)};
    return sums_over_lanes<1, kWidth / 2>(sum, lane);
  } else {
    return v[0];
  }
}

__device__ __forceinline__ float dot(float4 a, float4 b) {
  return (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
}
__device__ __forceinline__ float largest(float q, float low, float high) {
  return q * (q >= 0.0f ? high : low);
}
__device__ __forceinline__ float largest(float4 q, float4 low, float4 high) {
  return (largest(q.x, low.x, high.x) + largest(q.y, low.y, high.y)) +
         (largest(q.z, low.z, high.z) + largest(q.w, low.w, high.w));
}

// Some blocks of history against kRows query rows. What counts is the reading of the summaries: one
// row leaves the registers to have twice as much of it under way.
template <typename T, bool kBound, int kRows>
struct Scorer {
  static constexpr int kBlocks = kBound ? 2 : 4;  // of history; a bound has two rows of each
  static constexpr int kValues = kBlocks * kRows;
  static constexpr int kLanesEach = kWarp / kValues;
  const Args& p;
  int64_t stream, u, first;
  int last;  // of the stream's blocks, counted from `first`
  int lane;

  // Of the lane's result.
  __device__ __forceinline__ int my_block() const { return lane / kLanesEach / kRows; }
  __device__ __forceinline__ int my_row() const { return lane / kLanesEach % kRows; }

  // Blocks beyond the stream's last are read as that one; nobody writes their scores.
  __device__ __forceinline__ int64_t block(int i) const { return min(i, last); }

  __device__ __forceinline__ float4 load(const T* row, int i, int64_t block_stride,
                                         int64_t c) const {
    return load_channels<T>(row + block(i) * block_stride, c, p.a.head_dim, p.vectors);
  }

  __device__ __forceinline__ float product(const float* const (&rows)[kRows], float norm) const {
    float value[kValues] = {}, squares[kBlocks] = {};
    if (p.wide)
      add_wide(rows, value, squares);
    else
      add_narrow(rows, value, squares);
    const ScoreArgs& a = p.a;
    float found = sums_over_lanes(value, lane);
    // Of a mean that is kept as sum and count: 0 / 0 where there are no tokens.
    const bool summed = a.count != nullptr;
    const float count =
        summed ? static_cast<float>(a.count[stream * a.count_stream + first + block(my_block())])
               : 1.0f;
    if (summed) found /= count;
    if (a.score == Score::kCosine) {
      const float sum = sums_over_lanes(squares, lane);
      const float mine = __shfl_sync(kAllLanes, sum, my_block() * (kWarp / kBlocks));
      // The heads of a row that share a KV head repeat its key.
      float key_norm = sqrtf(static_cast<float>(p.plan.merged) * mine);
      if (summed) key_norm /= count;
      found /= (norm < kCosineEps ? kCosineEps : norm) *
               (key_norm < kCosineEps ? kCosineEps : key_norm);  // NaN stays
    }
    return found;
  }

  // Sends the first 2 KiB of each block's row on their way into L2 while the query rows are made,
  // which takes as long as it takes them to come.
  __device__ __forceinline__ void prefetch() const {
    constexpr int kLine = 128, kLanes = kWarp / kBlocks, kLines = 2;
    const ScoreArgs& a = p.a;
    const char* const at =
        reinterpret_cast<const char*>(static_cast<const T*>(a.summary) + stream * a.sum_stream +
                                      (first + block(lane / kLanes)) * a.sum_block + u * a.sum_kv);
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int offset = (lane % kLanes + i * kLanes) * kLine;
      if (offset / static_cast<int>(sizeof(T)) < p.inner) ptx::prefetch(at + offset);
    }
  }

  // Sixteen bytes of each block at a time, and those of the next step under way.
  __device__ __forceinline__ void add_wide(const float* const (&rows)[kRows],
                                           float (&value)[kValues],
                                           float (&squares)[kBlocks]) const {
    constexpr int kWide = 16 / sizeof(T);
    using Chunk = Vector<T, kWide>;
    const ScoreArgs& a = p.a;
    const T* const at = static_cast<const T*>(a.summary) + stream * a.sum_stream +
                        first * a.sum_block + u * a.sum_kv;
    const int each = p.inner / kWide, chunks = p.pieces * each;
    const bool cosine = a.score == Score::kCosine;
    const auto fetch = [&](Chunk(&to)[kBlocks], int chunk) {
      chunk = min(chunk, chunks - 1);
      int64_t offset = int64_t{chunk} * kWide;
      if (p.pieces > 1) {
        const int s = static_cast<int>(static_cast<unsigned>(chunk) / static_cast<unsigned>(each));
        offset = s * a.sum_kv + (chunk - s * each) * kWide;
      }
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        to[i] = *reinterpret_cast<const Chunk*>(at + block(i) * a.sum_block + offset);
    };
    const auto add = [&](const Chunk(&k)[kBlocks], int chunk) {
      if (chunk >= chunks) return;
#pragma unroll
      for (int part = 0; part < kWide; part += kVector) {
        float4 key[kBlocks];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
          key[i] = make_float4(to_float(k[i].x[part]), to_float(k[i].x[part + 1]),
                               to_float(k[i].x[part + 2]), to_float(k[i].x[part + 3]));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 q = *reinterpret_cast<const float4*>(rows[r] + chunk * kWide + part);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) value[i * kRows + r] += dot(q, key[i]);
        }
        if (cosine) {
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) squares[i] += dot(key[i], key[i]);
        }
      }
    };
    Chunk even[kBlocks];
    if constexpr (kRows > 1) {
      for (int from = 0; from < chunks; from += kWarp) {
        fetch(even, from + lane);
        add(even, from + lane);
      }
      return;
    }
    Chunk odd[kBlocks];
    fetch(even, lane);
    for (int from = 0; from < chunks; from += 2 * kWarp) {
      if (from + kWarp < chunks) fetch(odd, from + kWarp + lane);
      add(even, from + lane);
      if (from + 2 * kWarp < chunks) fetch(even, from + 2 * kWarp + lane);
      if (from + kWarp < chunks) add(odd, from + kWarp + lane);
    }
  }

  // Rows of any length and alignment.
  __device__ __forceinline__ void add_narrow(const float* const (&rows)[kRows],
                                             float (&value)[kValues],
                                             float (&squares)[kBlocks]) const {
    const ScoreArgs& a = p.a;
    const T* at = static_cast<const T*>(a.summary) + stream * a.sum_stream + first * a.sum_block +
                  u * a.sum_kv;
    const bool cosine = a.score == Score::kCosine;
    const int head_dim = static_cast<int>(a.head_dim);
    for (int s = 0; s < p.plan.segments; ++s, at += a.sum_kv) {
      for (int c = kVector * lane; c < head_dim; c += kVector * kWarp) {
        float4 k[kBlocks];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) k[i] = load(at, i, a.sum_block, c);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 q = *reinterpret_cast<const float4*>(rows[r] + s * head_dim + c);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) value[i * kRows + r] += dot(q, k[i]);
        }
        if (cosine) {
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) squares[i] += dot(k[i], k[i]);
        }
      }
    }
  }

  // The largest over the parts of a block that have tokens; NaN where none has.
  __device__ __forceinline__ float bound(const float* const (&rows)[kRows]) const {
    const ScoreArgs& a = p.a;
    const int head_dim = static_cast<int>(a.head_dim), merged = static_cast<int>(p.plan.merged);
    float best = -kInfinity;
    bool any = false;
    for (int part = 0; part < a.sub; ++part) {
      const T* low = static_cast<const T*>(a.summary) + stream * a.sum_stream +
                     first * a.sum_block + part * a.sum_sub + u * a.sum_kv;
      const T* high = static_cast<const T*>(a.summary_max) + stream * a.max_stream +
                      first * a.max_block + part * a.max_sub + u * a.max_kv;
      float value[kValues] = {};
      unsigned empty = 0;  // blocks of which some minimum is above its maximum: no tokens
      for (int s = 0; s < p.plan.segments; ++s, low += a.sum_kv, high += a.max_kv)
        for (int c = kVector * lane; c < head_dim; c += kVector * kWarp) {
          float4 k0[kBlocks], k1[kBlocks];
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            k0[i] = load(low, i, a.sum_block, c);
            k1[i] = load(high, i, a.max_block, c);
            const bool crossed =
                k0[i].x > k1[i].x || k0[i].y > k1[i].y || k0[i].z > k1[i].z || k0[i].w > k1[i].w;
            empty |= static_cast<unsigned>(crossed) << i;
          }
          for (int m = 0; m < merged; ++m)
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const float4 q =
                  *reinterpret_cast<const float4*>(rows[r] + (s * merged + m) * head_dim + c);
#pragma unroll
              for (int i = 0; i < kBlocks; ++i) value[i * kRows + r] += largest(q, k0[i], k1[i]);
            }
        }
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2)
        empty |= __shfl_xor_sync(kAllLanes, empty, step);
      const float found = sums_over_lanes(value, lane);
      if ((empty >> my_block() & 1u) != 0) continue;
      any = true;
      best = bound_max(best, found);
    }
    return any ? best : __int_as_float(0x7fc00000);
  }
};

// One block of threads: kTile blocks of history of one stream, one unit.
template <typename T, bool kBound, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 1 && sizeof(T) == 4 ? 3 : 2)
    score_kernel(const __grid_constant__ Args p) {
  using Work = Scorer<T, kBound, kRows>;
  constexpr int kTile = kWarps * Work::kBlocks;
  __shared__ double scratch[kThreads];
  VICO_DYNAMIC_SHARED(shared_memory);
  const ScoreArgs& a = p.a;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles = (a.blocks + kTile - 1) / kTile;
  // Divisions of 32 bits: those of 64 would hold up the first read.
  const unsigned of_tile = blockIdx.x / static_cast<unsigned>(p.plan.units);
  const int64_t u = blockIdx.x % static_cast<unsigned>(p.plan.units);
  const int64_t tile = of_tile % static_cast<unsigned>(tiles);
  const int64_t stream = of_tile / static_cast<unsigned>(tiles);

  int64_t blocks = a.blocks;
  if (a.num_blocks != nullptr) {
    const int64_t given = a.num_blocks[stream];
    blocks = given < 0 ? 0 : given < blocks ? given : blocks;
  }
  const Tokens tokens = tokens_of(a, stream);
  const bool asked = tokens.last > tokens.first;
  float* const scores = a.scores + (stream * p.plan.outputs + u * p.plan.rows) * a.blocks;
  for (int64_t i = threadIdx.x; i < p.plan.rows * kTile; i += kThreads) {
    const int64_t b = tile * kTile + i % kTile;
    if (b >= a.blocks || (b < blocks && asked)) continue;
    scores[i / kTile * a.blocks + b] = b < blocks ? __int_as_float(0x7fc00000) : -kInfinity;
  }
  if (tile * kTile >= blocks || !asked) return;

  const int64_t first = tile * kTile + warp * Work::kBlocks;
  const int last = static_cast<int>(min(blocks - 1 - first, int64_t{Work::kBlocks}));
  const Work work{p, stream, u, first, last, lane};
  if (!kBound && p.packs && p.wide && first < blocks) work.prefetch();

  // Row r of token t at rows + (t * of_token + r) * stride.
  const float *rows, *norms;
  int64_t of_token = 0;  // rows of a token
  if (p.packs) {
    float* const made = reinterpret_cast<float*>(shared_memory);
    float* const made_norms = made + p.plan.rows * p.plan.stride;
    const int count = static_cast<int>(p.plan.rows), unit = static_cast<int>(u);
    const bool normed = a.score == Score::kCosine;  // which is made of one row at a time
    const int step = normed ? 1 : count;
    for (int r = 0; r < count; r += step)
      pack_rows<1>(p, tokens, unit, r, step, made + r * p.plan.stride,
                   normed ? made_norms + r : nullptr, scratch);
    rows = made;
    norms = made_norms;
  } else {
    of_token = p.plan.units * p.plan.rows;
    const int64_t token = a.pool == Pool::kMean ? stream : tokens.first;
    rows = p.packed + (token * of_token + u * p.plan.rows) * p.plan.stride;
    norms = p.norms + token * of_token + u * p.plan.rows;
  }

  if (first >= blocks) return;
  const bool writes = lane % Work::kLanesEach == 0 && work.my_block() <= last;
  // Side by side stand rows of one token, or tokens of one row whose largest score counts.
  const bool largest_of_tokens = a.pool == Pool::kMax && !p.packs;
  const int64_t count = largest_of_tokens ? tokens.last - tokens.first : 1;
  for (int64_t r = 0; r < p.plan.rows; r += largest_of_tokens ? 1 : kRows) {
    float best = -kInfinity;
    for (int64_t t = 0; t < count; t += kRows) {
      const auto row = [&](int i) {
        return largest_of_tokens ? min(t + i, count - 1) * of_token + r
                                 : min(r + i, p.plan.rows - 1);
      };
      const float* chosen[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) chosen[i] = rows + row(i) * p.plan.stride;
      float found;
      if constexpr (kBound)
        found = work.bound(chosen);
      else
        found = work.product(chosen, norms[row(work.my_row())]);
      best = bound_max(best, found);
    }
    if (largest_of_tokens) {
#pragma unroll
      for (int step = Work::kLanesEach; step < Work::kLanesEach * kRows; step *= 2)
        best = bound_max(best, __shfl_xor_sync(kAllLanes, best, step));
      if (writes && work.my_row() == 0) scores[r * a.blocks + first + work.my_block()] = best;
    } else if (writes && r + work.my_row() < p.plan.rows) {
      scores[(r + work.my_row()) * a.blocks + first + work.my_block()] = best;
    }
  }
}

bool reads_vectors(const ScoreArgs& a, int64_t bytes) {
  const int64_t strides[] = {a.sum_stream, a.sum_block, a.sum_sub, a.sum_kv,
                             a.max_stream, a.max_block, a.max_sub, a.max_kv};
  for (const int64_t stride : strides)
    if (stride % kVector != 0) return false;
  return reinterpret_cast<uintptr_t>(a.summary) % (kVector * bytes) == 0 &&
         reinterpret_cast<uintptr_t>(a.summary_max) % (kVector * bytes) == 0;
}

bool reads_wide(const ScoreArgs& a, int64_t bytes) {
  const int64_t of[] = {a.sum_stream, a.sum_block, a.sum_kv, a.head_dim};
  for (const int64_t x : of)
    if (x * bytes % 16 != 0) return false;
  return reinterpret_cast<uintptr_t>(a.summary) % 16 == 0;
}

// Query rows are made by whoever needs them where a stream has one token and they are short.
bool packs(const ScoreArgs& a, const Plan& plan) {
  return a.cu_seqlens == nullptr && plan.rows * (plan.stride + 1) <= kSharedFloats;
}

int64_t packed_rows(const ScoreArgs& a, const Plan& plan) {
  return (a.pool == Pool::kMean ? a.streams : a.tokens) * plan.units * plan.rows;
}

template <typename T>
cudaError_t launch_score(const Args& p, size_t shared, cudaStream_t stream) {
  const bool bound = p.a.score == Score::kBound;
  const bool one = p.plan.rows == 1 && (p.packs || p.a.pool != Pool::kMax);
  const int64_t tile =
      kWarps * (bound ? Scorer<T, true, kMostRows>::kBlocks : Scorer<T, false, 1>::kBlocks);
  const int64_t grid = p.a.streams * ((p.a.blocks + tile - 1) / tile) * p.plan.units;
  void (*const kernel)(Args) = bound ? score_kernel<T, true, kMostRows>
                               : one ? score_kernel<T, false, 1>
                                     : score_kernel<T, false, kMostRows>;
  return launch(kernel, grid, kThreads, shared, stream, p);
}

}  // namespace

int64_t score_blocks_workspace(const ScoreArgs& a) {
  const Plan plan(a);
  return packs(a, plan) ? 0 : packed_rows(a, plan) * (plan.stride + 1);
}

const char* score_blocks_cuda(const ScoreArgs& a, void* workspace, void* stream) {
  if (a.pool == Pool::kSoftmax) return "softmax pooling is not served";
  if (a.heads * a.head_dim > 0x7fffffff) return "a query row has 2^31 channels or more";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const Plan plan(a);
  Args p{a, plan, static_cast<float*>(workspace), nullptr, packs(a, plan), false, false, 1, 0};
  const bool together = plan.segments == 1 || a.sum_kv == a.head_dim;
  p.pieces = together ? 1 : static_cast<int>(plan.segments);
  p.inner = static_cast<int>(plan.segments * a.head_dim) / p.pieces;
  const int64_t all = packed_rows(a, plan);
  if (!p.packs) {
    p.norms = p.packed + all * plan.stride;
    const cudaError_t status = launch(pack_kernel, all, kThreads, 0, on, p);
    if (status != cudaSuccess) return message_of(status);
  }
  const size_t shared = p.packs ? plan.rows * (plan.stride + 1) * sizeof(float) : 0;
  return message_of(with_type(a.summary_dtype, [&](auto zero) {
    using T = decltype(zero);
    p.vectors = reads_vectors(a, sizeof(T));
    p.wide = reads_wide(a, sizeof(T));
    return launch_score<T>(p, shared, on);
  }));
}

}  // namespace vico
