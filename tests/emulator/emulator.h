// Runs CUDA kernels on a CPU, block after block: each thread of a block is a fiber that runs until
// it must wait for others (a barrier, an exchange within its warp).
//
// It is made to find mistakes, not to be fast: fibers and warps are picked in an order that a seed
// settles, asynchronous copies happen at once or not before they are waited for, shared memory is
// full of NaN at first and ends at a page that may not be touched, and the lanes of a warp must
// meet at the same exchange.
//
// Kernels that are compiled with -fsanitize=thread call the functions at the end of emulator.cpp at
// each access: there two threads that touch the same shared memory, one of them writing, without a
// barrier (or a __syncwarp of their warp) in between are a fault in every order of threads.
//
// What it cannot show: speed, the memory of a real device, races in global memory, and
// instructions that cuda/ptx.h here misreads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;
constexpr int kMaxExchange = 64;  // bytes of a lane

struct Lane {
  alignas(16) unsigned char in[kMaxExchange], out[kMaxExchange];
};

extern unsigned char* shared_memory;
extern size_t shared_bytes;

[[noreturn]] void fail(const char* what);

// Waits for all threads of the block.
void barrier();

// Waits for the lanes of the warp; then `run` makes every lane's `out` of all lanes' `in`. Only
// with `orders` does that order their accesses to memory, as of all exchanges __syncwarp alone
// does.
using Exchange = void (*)(Lane* (&lanes)[kWarp]);
void exchange(Exchange run, const char* name, const void* in, size_t in_bytes, void* out,
              size_t out_bytes, bool orders = false);

// What is no access of the kernel, or one that may race.
#define EMULATOR_UNWATCHED __attribute__((no_sanitize("thread"), noinline))

// The thread that runs reads or writes shared memory behind the compiler's back.
void note_access(const void* p, size_t bytes, bool write);

// `bytes` (16 or 0) of 16 to shared memory, at a time of the emulator's choice up to the wait.
void copy_later(void* to, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int pending);

// Fails unless [p, p + bytes) is dynamic shared memory and p a multiple of bytes.
void check_shared(const void* p, size_t bytes);

// What takes a launch in place of this emulator, such as tests/ptx: null, or what went wrong.
struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared;
  std::vector<std::pair<const void*, size_t>> arguments;
};
using Launcher = std::function<const char*(const Launch&)>;
extern Launcher launcher;
const char* take(const Launch& launch);

// null, or what went wrong.
const char* run_grid(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);
const char* last_error();
const char* set_error(const char* what);  // which is also what it returns
bool may_use(const void* kernel, size_t shared);
void allow(const void* kernel, size_t shared);
void set_seed(unsigned seed);
int64_t launches();  // so far
void note_launch(const void* kernel);
std::vector<const void*> launched_kernels();  // so far

}  // namespace emulator
