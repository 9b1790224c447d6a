// Planted faults, one for each compute-sanitizer tool. gpu_check runs them to know that a tool
// which reports nothing about our kernels would have reported something: each must be found.
//
//   sanitizer_plants memcheck | racecheck | initcheck | synccheck

#include <cstdio>
#include <cstring>

#include <cuda_runtime.h>

namespace {

__global__ void out_of_bounds(int* data, int n) { data[threadIdx.x + n] = 1; }

// Warp 0 writes what warp 1 reads, and no barrier orders them.
__global__ void shared_race(int* out) {
  __shared__ int cell[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) cell[lane] = lane;
  if (threadIdx.x >= 32) out[lane] = cell[31 - lane];
}

__global__ void uninitialised_read(const int* data, int* out) {
  out[threadIdx.x] = data[threadIdx.x];
}

// Part of a block waits at a barrier that the rest never reaches.
__global__ void divergent_barrier(int* out) {
  __shared__ int cell[16];
  if (threadIdx.x < 16) {
    cell[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = cell[15 - threadIdx.x];
  }
}

int fail(cudaError_t error) {
  std::fprintf(stderr, "sanitizer_plants: %s\n", cudaGetErrorString(error));
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  constexpr int kCount = 64;
  int *data = nullptr, *out = nullptr;
  cudaError_t error = cudaMalloc(&data, kCount * sizeof(int));
  if (error == cudaSuccess) error = cudaMalloc(&out, kCount * sizeof(int));
  if (error != cudaSuccess) return fail(error);
  if (!std::strcmp(argv[1], "memcheck")) {
    out_of_bounds<<<1, 32>>>(data, kCount);
  } else if (!std::strcmp(argv[1], "racecheck")) {
    shared_race<<<1, 64>>>(out);
  } else if (!std::strcmp(argv[1], "initcheck")) {
    uninitialised_read<<<1, 32>>>(data, out);
  } else if (!std::strcmp(argv[1], "synccheck")) {
    divergent_barrier<<<1, 64>>>(out);
  } else {
    return 2;
  }
  error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  return error == cudaSuccess ? 0 : fail(error);
}
