// What lets one inline function serve host and device.
#pragma once

// A copy at each call would cost the compiler far more than the calls cost: rows are long.
#define VICO_NOINLINE __attribute__((noinline))

#if defined(__CUDACC__)
#define VICO_INLINE __host__ __device__ __forceinline__
#else
#define VICO_INLINE inline __attribute__((always_inline))
#endif

// The CPU sources are compiled once per instruction set, each in a namespace of its own: without
// it the linker would keep one copy of an inline function, possibly the AVX-512 one, for all.
#if !defined(VICO_ISA)
#define VICO_ISA shared
#endif
