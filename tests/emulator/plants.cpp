// A kernel that reverses numbers within a block by way of shared memory, and faults to plant in it.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/ptx.h"

namespace {

constexpr int kThreads = 64;

enum Plant {
  kNone,
  kNoBarrier,
  kNoWait,
  kNoSyncwarp,
  kUnwritten,
  kSomeLeave,
  kTwoExchanges,
  kLanesLeave,
  kOutside,
  kUnaligned,
  kNotAskedFor,
  kShuffleForSyncwarp,
  kStatic
};

__global__ void reverse(const float* in, float* out, int plant) {
  VICO_DYNAMIC_SHARED(memory);
  __shared__ float left_over;
  float* const numbers = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x, lane = i % 32;
  const float* const from = in + blockIdx.x * kThreads;
  if (plant == kSomeLeave && i == 5) return;
  if (i % 4 == 0) {
    const int at = plant == kOutside ? i + 64 * kThreads : i;
    if (plant != kUnwritten || i != 8)
      vico::ptx::copy_async_16(numbers + at, from + i + (plant == kUnaligned), 16);
  }
  vico::ptx::copy_async_commit();
  if (plant != kNoWait) vico::ptx::copy_async_wait<0>();
  if (plant != kNoBarrier) __syncthreads();
  float x = numbers[kThreads - 1 - i];

  // Within a warp: once more there and back.
  float* const mine = numbers + kThreads + i / 32 * 32;
  mine[lane] = x;
  if (plant == kShuffleForSyncwarp)
    __ballot_sync(~0u, true);  // waits for the lanes, and does not order what they wrote
  else if (plant != kNoSyncwarp)
    __syncwarp();
  x = mine[31 - lane];
  if (plant == kLanesLeave && lane == 3) return;
  if (plant == kTwoExchanges && lane == 3)
    x += __ballot_sync(~0u, false);
  else
    x = __shfl_xor_sync(~0u, x, 31);
  if (plant == kStatic) {  // as if another block had written it
    if (blockIdx.x == 0) left_over = 0.0f;
    __syncthreads();
    x += left_over;
  }
  out[blockIdx.x * kThreads + i] = x;
}

}  // namespace

int main(int, char** arguments) {
  const int plant = std::atoi(arguments[1]);
  emulator::set_seed(static_cast<unsigned>(std::atoi(arguments[2])));
  std::vector<float> in(3 * kThreads + 4), out(3 * kThreads, -1.0f);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(3);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plant == kNotAskedFor ? 64 * 1024 : 2 * kThreads * sizeof(float);
  const cudaError_t status =
      cudaLaunchKernelEx(&config, reverse, static_cast<const float*>(in.data()), out.data(), plant);
  if (status != cudaSuccess) {
    std::puts(cudaGetErrorString(status));
    return 0;
  }
  for (int i = 0; i < 3 * kThreads; ++i) {
    const int wanted = i / kThreads * kThreads + kThreads - 1 - i % kThreads;
    if (!(out[i] == static_cast<float>(wanted))) {
      std::puts("wrong");
      return 0;
    }
  }
  std::puts("right");
  return 0;
}
