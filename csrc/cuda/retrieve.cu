// summarize_blocks and select_pages on the GPU.
//
// Summaries are bound by memory: each listed key is read once. The page list is O(pages listed): a
// hash table of the pages seen so far, in shared memory unless a row lists thousands.

#include "cuda/retrieve.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"
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
constexpr int64_t kSharedSlots = 8192;

// Of a table that is at most four fifths full; a power of two.
int64_t slots_for(int64_t pages) {
  int64_t slots = 8;
  while (4 * slots < 5 * pages) slots *= 2;
  return slots;
}

// The pages of one row and who listed them first.
struct Seen {
  int32_t *page, *first;
  uint32_t slots;
  int bits;

  __device__ __forceinline__ uint32_t start(int32_t x) const {
    return static_cast<uint32_t>(x) * 2654435769u >> (32 - bits);
  }
  __device__ __forceinline__ void add(int32_t x, int32_t place) {
    for (uint32_t at = start(x);; at = (at + 1) & (slots - 1)) {
      const int32_t before = atomicCAS(&page[at], -1, x);
      if (before != -1 && before != x) continue;
      atomicMin(&first[at], place);
      return;
    }
  }
  __device__ __forceinline__ int32_t first_of(int32_t x) const {
    uint32_t at = start(x);
    while (page[at] != x) at = (at + 1) & (slots - 1);
    return first[at];
  }
};

// One block of threads: one row.
__global__ void __launch_bounds__(kPagesThreads)
    pages_kernel(const __grid_constant__ PagesArgs a, int32_t* workspace, uint32_t slots,
                 int bits) {
  __shared__ int64_t sums[kPagesThreads / kWarp];
  VICO_DYNAMIC_SHARED(shared_memory);
  const int64_t row = blockIdx.x, stream = row / a.rows;
  const int64_t of_blocks = a.chosen * a.width, length = a.sinks + of_blocks + a.recent;
  int32_t* const table = workspace == nullptr ? reinterpret_cast<int32_t*>(shared_memory)
                                              : workspace + row * 2 * slots;
  Seen seen{table, table + slots, slots, bits};
  for (uint32_t i = threadIdx.x; i < slots; i += kPagesThreads) {
    seen.page[i] = -1;
    seen.first[i] = 0x7fffffff;
  }
  __syncthreads();

  // A page stands where the sinks list it, else the recent pages, else the blocks: claims have that
  // order, places in the list that of time.
  const auto claim_of = [&](int64_t place) {
    return place < a.sinks               ? place
           : place < a.sinks + of_blocks ? place + a.recent
                                         : place - of_blocks;
  };
  const auto page_at = [&](int64_t place) -> int32_t {
    if (place < a.sinks) return a.sink_pages[stream * a.sinks + place];
    place -= a.sinks;
    if (place >= of_blocks) return a.recent_pages[stream * a.recent + place - of_blocks];
    const int64_t block = a.block_index[row * a.chosen + place / a.width];
    if (block < 0 || block >= a.blocks) return -1;
    return a.block_pages[(stream * a.blocks + block) * a.width + place % a.width];
  };
  for (int64_t place = threadIdx.x; place < length; place += kPagesThreads) {
    const int32_t page = page_at(place);
    if (page >= 0) seen.add(page, static_cast<int32_t>(claim_of(place)));
  }
  __syncthreads();
  int32_t* const out = a.page_table + row * length;
  int64_t listed = 0;
  for (int64_t from = 0; from < length; from += kPagesThreads) {
    const int64_t place = from + threadIdx.x;
    const int32_t page = place < length ? page_at(place) : -1;
    const bool kept = page >= 0 && seen.first_of(page) == claim_of(place);
    int64_t whole;
    const int64_t before = sum_before<kPagesThreads>(kept, sums, &whole);
    if (kept) out[listed + before] = page;
    listed += whole;
  }
  for (int64_t i = listed + threadIdx.x; i < length; i += kPagesThreads) out[i] = -1;
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
  const int64_t slots = slots_for(a.sinks + a.chosen * a.width + a.recent);
  return slots <= kSharedSlots ? 0 : a.streams * a.rows * 2 * slots * 4;
}

const char* select_pages_cuda(const PagesArgs& a, void* workspace, void* stream) {
  const int64_t length = a.sinks + a.chosen * a.width + a.recent, slots = slots_for(length);
  if (length == 0) return nullptr;
  if (length > 0x3fffffff) return "a row lists 2^30 pages or more";
  const bool inside = slots <= kSharedSlots;
  int bits = 0;
  while (int64_t{1} << bits < slots) ++bits;
  return message_of(launch(
      pages_kernel, a.streams * a.rows, kPagesThreads, inside ? slots * 2 * sizeof(int32_t) : 0,
      static_cast<cudaStream_t>(stream), a, inside ? nullptr : static_cast<int32_t*>(workspace),
      static_cast<uint32_t>(slots), bits));
}

}  // namespace vico
