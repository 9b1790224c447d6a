// What a warp is; sums over the threads before this one, in it and in its block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vico {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of x over this lane and those before it. All lanes call it together.
template <typename T>
__device__ __forceinline__ T inclusive_sum(T x, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T other = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// The sum of x over the threads before this one, and over all of them. `sums` has a place a warp.
// Ends with a barrier, so that `sums` may be used again.
template <int kThreads>
__device__ __forceinline__ int64_t sum_before(int64_t x, int64_t* sums, int64_t* whole) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t up_to = inclusive_sum(x, lane);
  if (lane == kWarp - 1) sums[warp] = up_to;
  __syncthreads();
  int64_t before = up_to - x, all = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += sums[w];
    all += sums[w];
  }
  *whole = all;
  __syncthreads();
  return before;
}

}  // namespace vico
