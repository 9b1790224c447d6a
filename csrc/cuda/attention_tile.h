// What decode does with a tile of 16 keys, a warp each: scores, online softmax, weighted values.
//
// Rows are (query, head) pairs of one KV head. K and V lie in shared memory, 16 rows of kHead
// channels each, their 16-byte chunks swizzled by the key: chunk c of key j stands at c ^ (j % 8),
// so that eight keys' chunks fall on all banks.
#pragma once

#include "cuda/attention_pages.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace vico {

using shared::Rule;

constexpr int kTileKeys = 16;
constexpr int kChunk = 16;  // bytes of a copy
constexpr float kNothing = -__builtin_huge_valf();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

template <typename T, int kHead>
__device__ __forceinline__ const char* chunk_at(const char* tile, int key, int chunk) {
  return tile + key * (kHead * static_cast<int>(sizeof(T))) + ((chunk ^ (key & 7)) * kChunk);
}
template <typename T, int kHead>
__device__ __forceinline__ char* chunk_at(char* tile, int key, int chunk) {
  return tile + key * (kHead * static_cast<int>(sizeof(T))) + ((chunk ^ (key & 7)) * kChunk);
}

// The places of a lane's chunks in steps of 16 channels, of 16 bits each: `odd`: the second of a
// step's two. As chunk_at, in parts that are known before and an addition for each step.
template <int kHead>
struct ChunkSteps {
  int first;

  __device__ __forceinline__ ChunkSteps(int key, int odd)
      : first(key * (2 * kHead) + (odd ^ (key & 7)) * kChunk) {}
  __device__ __forceinline__ const char* at(const char* tile, int step) const {
    return tile + (first ^ (step % 4 * 2 * kChunk)) + step / 4 * (8 * kChunk);
  }
};

// The maximum to subtract: 0 in rows that saw nothing, which would give -inf - -inf.
__device__ __forceinline__ float above_nothing(float top) { return top == kNothing ? 0.0f : top; }

// The rows of a tile: which query and head each is, and where its query stands.
struct RowTile {
  const AttentionArgs& a;
  int64_t first_row;  // of the stream
  int first, rows;    // of the tile, in the stream's queries * per_group
  int per_group, group;
  int before;  // logical keys before the stream's first query; negative where there are too few
  bool pairs;  // 16-bit elements of the queries stand two by two at multiples of 4 bytes

  __device__ __forceinline__ bool live(int row) const { return first + row < rows; }
  __device__ __forceinline__ int position(int row) const {
    return live(row) ? before + (first + row) / per_group : -1;  // before every key
  }
  __device__ __forceinline__ int64_t query(int row) const {
    return first_row + (first + row) / per_group;
  }
  __device__ __forceinline__ int head(int row) const {
    return group * per_group + (first + row) % per_group;
  }
  template <typename T>
  __device__ __forceinline__ const T* at(int row) const {
    return static_cast<const T*>(a.q) + query(row) * a.q_token + head(row) * a.q_head;
  }
};

// 16-bit types: 16 rows on tensor cores. A lane has rows lane / 4 and lane / 4 + 8.
template <typename T, int kHead>
struct Fold {
  static constexpr int kRows = 16;
  static constexpr int kSumRow = kHead + 8;  // floats of a row of results: no two on the same banks
  static constexpr int kSteps = kHead / 16;  // of the scores' product
  // The queries stay in registers, or in shared memory where the sums leave no room for them; there
  // each lane's part of a step stands together.
  static constexpr bool kInRegisters = kHead <= 128;
  // Steps whose keys or values are read before the first product: each read takes as long as a
  // product, and few warps stand by.
  static constexpr int kTogether = kInRegisters ? 4 : 1;
  // Of shared memory beside the pipeline, for the block and for each warp.
  static constexpr int kBlockBytes = kInRegisters ? 0 : kSteps * kWarp * 16, kWarpBytes = 0;

  uint32_t q[kInRegisters ? kSteps : 1][4];
  const uint4* shared_q;
  float sum[kHead / 8][4];
  float top[2], total[2];  // total: of this lane's keys
  int position[2];

  __device__ __forceinline__ void start(const RowTile& rows, char* block, char*, int head_dim,
                                        int lane) {
    const uint16_t* at[2];
    bool live[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      live[i] = rows.live(row);
      position[i] = rows.position(row);
      at[i] = reinterpret_cast<const uint16_t*>(rows.at<T>(live[i] ? row : 0));
      top[i] = kNothing;
      total[i] = 0.0f;
    }
    shared_q = reinterpret_cast<const uint4*>(block) + lane;
    const auto load_all = [&](const auto& two_at) {
      const auto load = [&](int k, int i) -> uint32_t {
        const int c = 16 * k + 2 * (lane % 4) + 8 * (i / 2);
        return c < head_dim ? two_at(at[i % 2] + c) : 0;
      };
      if constexpr (kInRegisters) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (live[i]) {  // a branch for all of a row's channels
#pragma unroll
            for (int k = 0; k < kSteps; ++k) q[k][i] = load(k, i), q[k][i + 2] = load(k, i + 2);
          } else {
#pragma unroll
            for (int k = 0; k < kSteps; ++k) q[k][i] = q[k][i + 2] = 0;
          }
      } else {
        const auto found = [&](int k, int i) { return live[i % 2] ? load(k, i) : 0; };
        for (int k = threadIdx.x / kWarp; k < kSteps; k += blockDim.x / kWarp)
          reinterpret_cast<uint4*>(block)[k * kWarp + lane] =
              make_uint4(found(k, 0), found(k, 1), found(k, 2), found(k, 3));
      }
    };
    if (rows.pairs)
      load_all([](const uint16_t* x) { return *reinterpret_cast<const uint32_t*>(x); });
    else
      load_all([](const uint16_t* x) { return x[0] | static_cast<uint32_t>(x[1]) << 16; });
    if constexpr (!kInRegisters) __syncthreads();
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] = 0.0f;
  }

  // Keys j0 to j0 + 15; `all_seen`: no row is to be masked.
  __device__ __forceinline__ void fold(const char* keys, const char* values, int head_dim,
                                       const Rule& rule, int j0, bool all_seen, float scale,
                                       int lane) {
    const int matrix = lane / 8, matrix_row = lane % 8;
    const ChunkSteps<kHead> of_keys(matrix / 2 * 8 + matrix_row, matrix % 2);
    const ChunkSteps<kHead> of_values(matrix % 2 * 8 + matrix_row, matrix / 2);
    float score[2][4] = {};
#pragma unroll
    for (int from = 0; from < kSteps; from += kTogether) {
      if (16 * from >= head_dim) break;
      uint32_t b[kTogether][4];
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (16 * (from + j) < head_dim) ptx::load_matrices(b[j], of_keys.at(keys, from + j));
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int k = from + j;
        if (16 * k >= head_dim) break;
        if constexpr (!kInRegisters) {
          const uint4 x = shared_q[k * kWarp];
          q[0][0] = x.x, q[0][1] = x.y, q[0][2] = x.z, q[0][3] = x.w;
        }
        const uint32_t (&a)[4] = q[kInRegisters ? k : 0];
        ptx::multiply_add<T>(score[0], a, b[j][0], b[j][1]);
        ptx::multiply_add<T>(score[1], a, b[j][2], b[j][3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] *= scale;
    if (!all_seen) {  // a branch for all scores, not one for each
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!rule.sees(position[i / 2], j0 + 8 * n + 2 * (lane % 4) + i % 2))
            score[n][i] = kNothing;
    }
    float most[2] = {kNothing, kNothing};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) most[i / 2] = fmaxf(most[i / 2], score[n][i]);
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAllLanes, most[i], 1));
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAllLanes, most[i], 2));
      most[i] = fmaxf(most[i], top[i]);
      shrink[i] = ptx::exp2(top[i] - above_nothing(most[i]));
      top[i] = most[i];
      total[i] *= shrink[i];
    }
    // The scores' layout is that of the left operand of the next product.
    uint32_t weights[4];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float subtract = above_nothing(top[i]);
        const float w0 = ptx::exp2(score[n][2 * i] - subtract);
        const float w1 = ptx::exp2(score[n][2 * i + 1] - subtract);
        total[i] += w0 + w1;
        weights[2 * n + i] = pack(from_float<T>(w0), from_float<T>(w1));
      }
#pragma unroll
    for (int from = 0; from < kSteps; from += kTogether) {
      if (16 * from >= head_dim) break;
      uint32_t b[kTogether][4];
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (16 * (from + j) < head_dim)
          ptx::load_matrices_transposed(b[j], of_values.at(values, from + j));
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (16 * (from + j) >= head_dim) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float (&s)[4] = sum[2 * (from + j) + half];
#pragma unroll
          for (int i = 0; i < 4; ++i) s[i] *= shrink[i / 2];
          ptx::multiply_add<T>(s, weights, b[j][2 * half], b[j][2 * half + 1]);
        }
      }
    }
  }

  // This warp's results into shared memory: sums [kRows, kSumRow], states [kRows].
  __device__ __forceinline__ void finish(float* sums, float2* states, int head_dim, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      total[i] += __shfl_xor_sync(kAllLanes, total[i], 1);
      total[i] += __shfl_xor_sync(kAllLanes, total[i], 2);
      if (lane % 4 == 0) states[row] = make_float2(top[i], total[i]);
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) {
        if (8 * n >= head_dim) break;
        float* to = sums + row * kSumRow + 8 * n + 2 * (lane % 4);
        *reinterpret_cast<float2*>(to) = make_float2(sum[n][2 * i], sum[n][2 * i + 1]);
      }
    }
  }

  static __device__ __forceinline__ uint32_t pack(T low, T high) {
    return bits_of(low) | static_cast<uint32_t>(bits_of(high)) << 16;
  }
  static __device__ __forceinline__ uint16_t bits_of(__half x) { return __half_as_ushort(x); }
  static __device__ __forceinline__ uint16_t bits_of(__nv_bfloat16 x) {
    return __bfloat16_as_ushort(x);
  }
};

// float32: 8 rows with plain multiplications, since tensor cores would round to 10 bits. For the
// scores a lane has one key and four rows, for the values four channels (or eight) and all rows.
template <int kHead>
struct Fold<float, kHead> {
  static constexpr int kRows = 8;
  static constexpr int kSumRow = kHead;
  static constexpr int kBlockBytes = kRows * kHead * 4;               // the queries
  static constexpr int kWarpBytes = (kRows * kTileKeys + kRows) * 4;  // weights, factors
  static constexpr int kQuads = kHead <= 128 ? 1 : kHead / 128;       // of channels, a lane

  const float4* q;
  float *weights, *factors;
  float4 sum[kRows][kQuads];
  float top[4], total[4];
  int position[4];

  __device__ __forceinline__ void start(const RowTile& rows, char* block, char* warp, int head_dim,
                                        int lane) {
    float* queries = reinterpret_cast<float*>(block);
    for (int i = threadIdx.x; i < kRows * kHead; i += blockDim.x) {
      const int row = i / kHead, c = i % kHead;
      const bool there = rows.live(row) && c < head_dim;
      queries[i] = there ? rows.at<float>(row)[c] : 0.0f;
    }
    q = reinterpret_cast<const float4*>(queries);
    weights = reinterpret_cast<float*>(warp);
    factors = weights + kRows * kTileKeys;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      top[i] = kNothing;
      total[i] = 0.0f;
      position[i] = rows.position(lane / 16 * 4 + i);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int n = 0; n < kQuads; ++n) sum[row][n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    __syncthreads();
  }

  __device__ __forceinline__ void fold(const char* keys, const char* values, int head_dim,
                                       const Rule& rule, int j0, bool all_seen, float scale,
                                       int lane) {
    const int key = lane % 16, first = lane / 16 * 4;
    float score[4] = {};
#pragma unroll 2
    for (int c = 0; c < head_dim / 4; ++c) {
      const float4 k = *reinterpret_cast<const float4*>(chunk_at<float, kHead>(keys, key, c));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 x = q[(first + i) * (kHead / 4) + c];
        score[i] += x.x * k.x + x.y * k.y + x.z * k.z + x.w * k.w;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      score[i] *= scale;
      if (!all_seen && !rule.sees(position[i], j0 + key)) score[i] = kNothing;
      float most = score[i];
#pragma unroll
      for (int step = 8; step > 0; step /= 2)
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
      most = fmaxf(most, top[i]);
      const float shrink = ptx::exp2(top[i] - above_nothing(most));
      const float weight = ptx::exp2(score[i] - above_nothing(most));
      top[i] = most;
      total[i] = total[i] * shrink + weight;
      weights[(first + i) * kTileKeys + key] = weight;
      if (key == 0) factors[first + i] = shrink;
    }
    __syncwarp();
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int n = 0; n < kQuads; ++n) {
        const float f = factors[row];
        sum[row][n].x *= f, sum[row][n].y *= f, sum[row][n].z *= f, sum[row][n].w *= f;
      }
#pragma unroll 2
    for (int j = 0; j < kTileKeys; ++j)
#pragma unroll
      for (int n = 0; n < kQuads; ++n) {
        const int c = lane + kWarp * n;
        if (4 * c >= head_dim) break;
        const float4 v = *reinterpret_cast<const float4*>(chunk_at<float, kHead>(values, j, c));
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const float w = weights[row * kTileKeys + j];
          float4& s = sum[row][n];
          s.x += w * v.x, s.y += w * v.y, s.z += w * v.z, s.w += w * v.w;
        }
      }
    __syncwarp();  // the next tile's weights
  }

  __device__ __forceinline__ void finish(float* sums, float2* states, int head_dim, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int step = 8; step > 0; step /= 2)
        total[i] += __shfl_xor_sync(kAllLanes, total[i], step);
      if (lane % 16 == 0) states[lane / 16 * 4 + i] = make_float2(top[i], total[i]);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int n = 0; n < kQuads; ++n) {
        const int c = lane + kWarp * n;
        if (4 * c < head_dim)
          *reinterpret_cast<float4*>(sums + row * kSumRow + 4 * c) = sum[row][n];
      }
  }
};

}  // namespace vico
