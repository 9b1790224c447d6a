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
// Ends with a barrier, so that `sums` may be used again. Each warp adds up the sums of all: 32
// reads of shared memory by each of 32 warps would take a thousand cycles.
template <int kThreads, typename T>
__device__ __forceinline__ T sum_before(T x, T* sums, T* whole) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T up_to = inclusive_sum(x, lane);
  if (lane == kWarp - 1) sums[warp] = up_to;
  __syncthreads();
  const T of_warp = lane < kThreads / kWarp ? sums[lane] : T{};
  const T through = inclusive_sum(of_warp, lane);
  *whole = __shfl_sync(kAllLanes, through, kWarp - 1);
  const T before = __shfl_sync(kAllLanes, through - of_warp, warp);
  __syncthreads();
  return before + up_to - x;
}

}  // namespace vico
