// summarize_blocks and select_pages on the GPU.
//
// Summaries are bound by memory: each listed key is read once. Pages: cuda/retrieve_pages.h, with a
// table in shared memory unless a row lists thousands.

#include "cuda/retrieve.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/retrieve_pages.h"
#include "cuda/warp.h"
#include "vico/append.h"

namespace vico {
namespace {

constexpr float kInfinity = __builtin_huge_valf();

// ---- summaries

// One block of threads: a block of history and a KV head; a thread has a channel and adds its
// tokens in order, the bits of rope_append's running sums.
template <typename T>
__global__ void __launch_bounds__(256) summarize_kernel(const __grid_constant__ SummarizeArgs a) {
  const int64_t block = blockIdx.x / a.kv_heads, g = blockIdx.x % a.kv_heads;
  const int c = threadIdx.x;
  if (c >= a.head_dim) return;
  const bool mean = a.second == nullptr;
  const T* const keys = static_cast<const T*>(a.k_pages) + g * a.k_kv + c;
  const int64_t parts = mean ? 1 : a.sub;
  for (int64_t part = 0; part < parts; ++part) {
    // Slots of the part: offset * sub / page_size == part.
    const int64_t from = (part * a.page_size + parts - 1) / parts;
    const int64_t to = ((part + 1) * a.page_size + parts - 1) / parts;
    float sum = 0.0f, low = kInfinity, high = -kInfinity;
    int64_t tokens = 0;
    for (int64_t m = 0; m < a.width; ++m) {
      const int64_t page = a.block_pages[block * a.width + m];
      if (page < 0 || page >= a.pages) continue;
      int64_t fill = a.page_fill[page];
      fill = fill < 0 ? 0 : min(fill, a.page_size);
      tokens += fill;
      const T* const slots = keys + page * a.k_page;
      const int64_t end = min(fill, to);
#pragma unroll 4
      for (int64_t offset = from; offset < end; ++offset) {
        const float key = to_float(slots[offset * a.k_slot]);
        sum += key;
        low = bound_min(low, key);
        high = bound_max(high, key);
      }
    }
    const int64_t at = ((block * parts + part) * a.kv_heads + g) * a.head_dim + c;
    a.first[at] = mean ? sum / static_cast<float>(tokens) : low;
    if (!mean) a.second[at] = high;
    if (mean && g == 0 && c == 0) a.count[block] = static_cast<int32_t>(tokens);
  }
}

// ---- pages

constexpr int kPagesThreads = 512;

// One block of threads: one row.
__global__ void __launch_bounds__(kPagesThreads)
    pages_kernel(const __grid_constant__ PagesArgs a, int32_t* workspace, TableSize size) {
  __shared__ int sums[kPagesThreads / kWarp];
  VICO_DYNAMIC_SHARED(shared_memory);
  const int64_t row = blockIdx.x;
  int32_t* const table = workspace == nullptr ? reinterpret_cast<int32_t*>(shared_memory)
                                              : workspace + row * 2 * size.slots();
  list_pages<kPagesThreads>(a, row, table, size, sums);
}

}  // namespace

const char* summarize_blocks_cuda(const SummarizeArgs& a, void* stream) {
  const int threads = (a.head_dim + kWarp - 1) / kWarp * kWarp;
  return message_of(with_type(a.dtype, [&](auto zero) {
    return launch(summarize_kernel<decltype(zero)>, a.blocks * a.kv_heads, threads, 0,
                  static_cast<cudaStream_t>(stream), a);
  }));
}

int64_t select_pages_workspace(const PagesArgs& a) {
  const TableSize size(length_of(a));
  return size.shared() ? 0 : a.streams * a.rows * size.bytes();
}

const char* select_pages_cuda(const PagesArgs& a, void* workspace, void* stream) {
  const int64_t length = length_of(a);
  if (length == 0) return nullptr;
  if (length > kMostPages) return "a row lists 2^30 pages or more";
  const TableSize size(length);
  return message_of(launch(pages_kernel, a.streams * a.rows, kPagesThreads,
                           size.shared() ? size.bytes() : 0, static_cast<cudaStream_t>(stream), a,
                           size.shared() ? nullptr : static_cast<int32_t*>(workspace), size));
}

}  // namespace vico
