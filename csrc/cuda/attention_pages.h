// How decode finds its keys: a table's entries -> logical keys -> pages and offsets.
#pragma once

#include "cuda/ptx.h"
#include "cuda/warp.h"
#include "vico/attention.h"
#include "vico/decode.h"

namespace vico {

struct Entry {
  int page, fill;  // -1, 0 where the entry lists nothing
};

__device__ __forceinline__ Entry entry_at(const AttentionArgs& a, const int32_t* table, int e) {
  if (e >= a.entries) return {-1, 0};
  const int page = table[e * a.table_entry];
  if (page < 0 || page >= a.pages) return {-1, 0};
  const int size = static_cast<int>(a.page_size);
  if (a.page_fill == nullptr) return {page, size};
  const int fill = a.page_fill[page * a.fill_stride];
  return {page, fill < 0 ? 0 : fill < size ? fill : size};
}

// Where a logical key lies, at or before it: an entry and the first logical key of that entry.
struct Cursor {
  int entry, start;
};

// A block's view of a whole table: each thread has a stretch of its entries. The table is short
// beside the keys that it lists, and every block reads it anew: the alternative is a launch more.
template <int kThreads>
struct TableScan {
  int first, last;   // entries of this thread
  int before, mine;  // logical keys before them and in them
  int total;

  static __device__ __forceinline__ int stretch(const AttentionArgs& a) {
    return static_cast<int>((a.entries + kThreads - 1) / kThreads);
  }
  static __device__ __forceinline__ void prefetch(const AttentionArgs& a, const int32_t* table) {
    const int64_t e = int64_t{threadIdx.x} * stretch(a);
    if (e < a.entries) ptx::prefetch(table + e * a.table_entry);
  }

  // `sums` [kThreads / kWarp] is shared memory; ends with a barrier between writing and reading it.
  __device__ __forceinline__ TableScan(const AttentionArgs& a, const int32_t* table, int* sums) {
    const int each = stretch(a);
    const int entries = static_cast<int>(a.entries), lane = threadIdx.x % kWarp;
    first = min(static_cast<int>(threadIdx.x) * each, entries);
    last = min(first + each, entries);
    mine = 0;
    for (int e = first; e < last; ++e) mine += entry_at(a, table, e).fill;
    const int up_to = inclusive_sum(mine, lane);
    if (lane == kWarp - 1) sums[threadIdx.x / kWarp] = up_to;
    __syncthreads();
    before = up_to - mine;
    total = 0;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < static_cast<int>(threadIdx.x) / kWarp) before += sums[w];
      total += sums[w];
    }
  }

  // Writes the cursor of a logical key if it lies in this thread's stretch.
  __device__ __forceinline__ void find(const AttentionArgs& a, const int32_t* table, int key,
                                       Cursor* cursor) const {
    if (key < before || key >= before + mine) return;
    int start = before;
    for (int e = first; e < last; ++e) {
      const int fill = entry_at(a, table, e).fill;
      if (key < start + fill) {
        *cursor = {e, start};
        return;
      }
      start += fill;
    }
  }
};

// A warp that walks along a table: lane l holds entry first + l.
struct Walker {
  int first, page, start, stop;

  __device__ __forceinline__ void open(const AttentionArgs& a, const int32_t* table, Cursor at,
                                       int lane) {
    first = at.entry;
    const Entry entry = entry_at(a, table, first + lane);
    page = entry.page;
    stop = at.start + inclusive_sum(entry.fill, lane);
    start = stop - entry.fill;
  }

  // The place of each lane's logical key j, at or behind those that were asked for before; page -1
  // where it is not wanted or not there. All lanes call it together.
  __device__ __forceinline__ void locate(const AttentionArgs& a, const int32_t* table, int j,
                                         bool wanted, int lane, int* at_page, int* at_offset,
                                         int* at_entry) {
    *at_page = -1;
    *at_offset = *at_entry = 0;
    while (true) {
      int i = 0;  // entries that end at or before j
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2)
        if (__shfl_sync(kAllLanes, stop, i + step - 1) <= j) i += step;
      const int found_page = __shfl_sync(kAllLanes, page, i);
      const int found_start = __shfl_sync(kAllLanes, start, i);
      const int found_stop = __shfl_sync(kAllLanes, stop, i);
      if (wanted && found_stop > j) {
        *at_page = found_page;
        *at_offset = j - found_start;
        *at_entry = first + i;
        wanted = false;
      }
      if (!__any_sync(kAllLanes, wanted) || first + kWarp >= a.entries) return;
      open(a, table, {first + kWarp, __shfl_sync(kAllLanes, stop, kWarp - 1)}, lane);
    }
  }
};

}  // namespace vico
