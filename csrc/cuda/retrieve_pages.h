// The page list of one row of chosen blocks, made by all threads of a block: what select_pages is,
// and how topk_pages ends.
//
// O(pages listed): a hash table of the pages seen so far and who listed them first.
#pragma once

#include "cuda/warp.h"
#include "vico/retrieve.h"

namespace vico {

constexpr int64_t kSharedSlots = 8192;      // of a table in shared memory: 64 KiB
constexpr int64_t kMostPages = 0x3fffffff;  // of a row: places are 32-bit numbers

inline int64_t length_of(const PagesArgs& a) { return a.sinks + a.chosen * a.width + a.recent; }

// The size of a row's table: a power of two, at most four fifths full.
struct TableSize {
  int bits = 3;

  explicit TableSize(int64_t pages) {
    while (4 * slots() < 5 * pages) ++bits;
  }
  __host__ __device__ int64_t slots() const { return int64_t{1} << bits; }
  __host__ __device__ int64_t bytes() const { return slots() * 2 * 4; }
  bool shared() const { return slots() <= kSharedSlots; }
};

// The pages of one row and who listed them first.
struct Seen {
  int32_t *page, *first;
  uint32_t slots;
  int bits;

  __device__ __forceinline__ Seen(int32_t* table, TableSize size)
      : page(table),
        first(table + size.slots()),
        slots(static_cast<uint32_t>(size.slots())),
        bits(size.bits) {}
  __device__ __forceinline__ uint32_t start(int32_t x) const {
    return static_cast<uint32_t>(x) * 2654435769u >> (32 - bits);
  }
  __device__ __forceinline__ void add(int32_t x, int32_t claim) {
    for (uint32_t at = start(x);; at = (at + 1) & (slots - 1)) {
      const int32_t before = atomicCAS(&page[at], -1, x);
      if (before != -1 && before != x) continue;
      atomicMin(&first[at], claim);
      return;
    }
  }
  __device__ __forceinline__ int32_t first_of(int32_t x) const {
    uint32_t at = start(x);
    while (page[at] != x) at = (at + 1) & (slots - 1);
    return first[at];
  }
};

// `table` has size.bytes(), `sums` a place a warp. What the row reads was written before a barrier,
// and so was the last use of `table`.
template <int kThreads>
__device__ __forceinline__ void list_pages(const PagesArgs& a, int64_t row, int32_t* table,
                                           TableSize size, int* sums) {
  constexpr int kHeld = 8;  // places of a thread at a time, whose loads are under way together
  const int64_t stream = row / a.rows;
  const int sinks = static_cast<int>(a.sinks), width = static_cast<int>(a.width);
  const int of_blocks = static_cast<int>(a.chosen) * width, recent = static_cast<int>(a.recent);
  const int length = sinks + of_blocks + recent;
  Seen seen(table, size);
  for (uint32_t i = threadIdx.x; i < seen.slots; i += kThreads) {
    seen.page[i] = -1;
    seen.first[i] = 0x7fffffff;
  }

  // A page stands where the sinks list it, else the recent pages, else the blocks: claims have that
  // order, places in the list that of time.
  const auto claim_of = [&](int place) {
    return place < sinks ? place : place < sinks + of_blocks ? place + recent : place - of_blocks;
  };
  // As few places for each thread as will do: adding a page takes a turn at the table.
  const int each = min(kHeld, (length + kThreads - 1) / kThreads), round = each * kThreads;
  const int mine = each * static_cast<int>(threadIdx.x);
  int32_t held[kHeld];
  const int32_t* const index = a.block_index + row * a.chosen;
  const int32_t* const sink_pages = a.sink_pages + stream * sinks;
  const int32_t* const recent_pages = a.recent_pages + stream * recent;
  const int32_t* const block_pages = a.block_pages + stream * a.blocks * width;
  const auto hold = [&](int from) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const unsigned place = from + mine + i - sinks;  // large: a sink's
      held[i] = i < each && place < static_cast<unsigned>(of_blocks) ? index[place / width] : -1;
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int place = from + mine + i, past = place - sinks - of_blocks;
      const unsigned block = held[i];
      const int32_t* page = block < a.blocks ? block_pages + int64_t{block} * width +
                                                   static_cast<unsigned>(place - sinks) % width
                                             : nullptr;
      if (place < sinks) page = sink_pages + place;
      if (past >= 0) page = past < recent ? recent_pages + past : nullptr;
      held[i] = i < each && page != nullptr ? *page : -1;
    }
  };
  __syncthreads();
  for (int from = 0; from < length; from += round) {
    hold(from);
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (held[i] >= 0) seen.add(held[i], claim_of(from + mine + i));
  }
  __syncthreads();
  int32_t* const out = a.page_table + row * length;
  int listed = 0;
  for (int from = 0; from < length; from += round) {
    if (length > round) hold(from);
    int kept = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (held[i] < 0) continue;
      if (seen.first_of(held[i]) == claim_of(from + mine + i))
        ++kept;
      else
        held[i] = -1;
    }
    int whole;
    int to = listed + sum_before<kThreads>(kept, sums, &whole);
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (held[i] >= 0) out[to++] = held[i];
    listed += whole;
  }
  for (int i = listed + static_cast<int>(threadIdx.x); i < length; i += kThreads) out[i] = -1;
}

}  // namespace vico
