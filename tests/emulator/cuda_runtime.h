// The part of the CUDA runtime and language that our kernels use, in plain C++.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time. A section of its own, so that it can be filled with NaN before each.
#define __shared__ static __attribute__((section("emulated_shared")))

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline void __syncthreads() { emulator::barrier(); }

template <typename T>
struct Shuffled {
  T value;
  int from;
};
template <typename T>
T emulated_shuffle(unsigned mask, T value, int from) {
  if (mask != ~0u) emulator::fail("a shuffle of part of a warp");
  const Shuffled<T> in{value, from};
  T out;
  emulator::exchange(
      [](emulator::Lane*(&lanes)[32]) {
        for (auto* lane : lanes) {
          Shuffled<T> in, other;
          std::memcpy(&in, lane->in, sizeof(in));
          std::memcpy(&other, lanes[in.from & 31]->in, sizeof(other));
          std::memcpy(lane->out, &other.value, sizeof(T));
        }
      },
      "shfl", &in, sizeof(in), &out, sizeof(out));
  return out;
}
inline int emulated_lane() {
  const uint3 t = threadIdx;
  return static_cast<int>((t.z * blockDim.y + t.y) * blockDim.x + t.x) % 32;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulated_shuffle(mask, value, from);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulated_shuffle(mask, value, emulated_lane() ^ lanes);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const int lane = emulated_lane(), from = lane - static_cast<int>(lanes);
  return emulated_shuffle(mask, value, from < 0 ? lane : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  const int lane = emulated_lane(), from = lane + static_cast<int>(lanes);
  return emulated_shuffle(mask, value, from > 31 ? lane : from);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  if (mask != ~0u) emulator::fail("a ballot of part of a warp");
  unsigned out;
  emulator::exchange(
      [](emulator::Lane*(&lanes)[32]) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(lanes[i]->in[0] != 0) << i;
        for (auto* lane : lanes) std::memcpy(lane->out, &votes, sizeof(votes));
      },
      "ballot", &vote, sizeof(vote), &out, sizeof(out));
  return out;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
inline void __syncwarp() {
  emulator::exchange([](emulator::Lane*(&)[32]) {}, "syncwarp", nullptr, 0, nullptr, 0, true);
}
template <typename T>
EMULATOR_UNWATCHED T atomicAdd(T* at, T more) {
  const T before = *at;
  *at += more;
  return before;
}

EMULATOR_UNWATCHED inline int atomicCAS(int* at, int expected, int wanted) {
  const int before = *at;
  if (before == expected) *at = wanted;
  return before;
}
EMULATOR_UNWATCHED inline int atomicMin(int* at, int x) {
  const int before = *at;
  if (x < before) *at = x;
  return before;
}
inline float __int_as_float(int bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorUnknown
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline cudaError_t cudaGetLastError() {
  return emulator::last_error() == nullptr ? cudaSuccess : cudaErrorUnknown;
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorUnknown ? emulator::last_error() : "invalid launch";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > 99 * 1024) return cudaErrorInvalidValue;  // of the smallest devices that we serve
  emulator::allow(kernel, static_cast<size_t>(bytes));
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (!emulator::may_use(reinterpret_cast<const void*>(kernel), config->dynamicSmemBytes))
    return cudaErrorInvalidValue;
  emulator::note_launch(reinterpret_cast<const void*>(kernel));
  if (emulator::launcher) {
    const auto run = [&](const Parameters&... given) {
      return emulator::take({reinterpret_cast<const void*>(kernel),
                             config->gridDim,
                             config->blockDim,
                             config->dynamicSmemBytes,
                             {{&given, sizeof(given)}...}});
    };
    return run(static_cast<Parameters>(arguments)...) == nullptr ? cudaSuccess : cudaErrorUnknown;
  }
  return emulator::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                            [&] { kernel(static_cast<Parameters>(arguments)...); }) == nullptr
             ? cudaSuccess
             : cudaErrorUnknown;
}
