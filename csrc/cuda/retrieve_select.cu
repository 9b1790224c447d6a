// The choice of topk_blocks on the GPU, and with it the page list of topk_pages.
//
// Bound by latency up to some ten thousand blocks: one block of threads a row, whose keys of
// preference (vico/ordering.h) stay in shared memory while at most four passes find the last one
// that is chosen, eight bits each. With more, each of several blocks of threads first lists the
// best of a part; where that is no help (many are chosen, or as many as fit into a budget) one
// makes the keys anew in each pass. Sums are integers, so atomics keep one result. Whoever has
// chosen a row's blocks lists their pages, in the shared memory that held the keys.

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/retrieve.h"
#include "cuda/retrieve_pages.h"
#include "cuda/warp.h"
#include "vico/ordering.h"

namespace vico {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kSelectThreads = 1024;
constexpr int kCopies = 4;          // of the histograms, against collisions
constexpr int kEach = 4;            // items of a thread at a time, side by side
constexpr int kReads = 8;           // of a thread, under way together
constexpr int64_t kCached = 20000;  // keys in shared memory
constexpr int64_t kPart = 16384;    // units of which one block of threads lists the best

__host__ __device__ inline int64_t padded(int64_t items) {
  return (items + kEach - 1) / kEach * kEach;
}

// Digits are numbered from the preferred end: 0 stands for 255.
struct SelectShared {
  alignas(16) int units[kCopies][256];
  unsigned long long tokens[kCopies][256];
  int64_t sums[kSelectThreads / kWarp];
  int small_sums[kSelectThreads / kWarp];
  // What a pass found out.
  int digit, left, taken;
  bool whole;  // all units of the digit are chosen
  int64_t used;
  int last_listed;  // whether the row's last unit is
};

// One row of scores: all of its units, a part of them, or candidates among them, in order.
struct Selection {
  const SelectArgs& a;
  SelectShared& shared;
  int64_t stream;
  int n, units;
  int forced_first, forced_last;  // units before the one and from the other on are forced
  float* scores;
  uint32_t* cache;            // or null
  const int32_t* candidates;  // or null; -1 at the end
  int first, items;

  __device__ __forceinline__ Selection(const SelectArgs& a, SelectShared& shared, int64_t row)
      : a(a), shared(shared), stream(row / a.rows), scores(a.scores + row * a.blocks) {
    n = static_cast<int>(a.blocks);
    if (a.num_blocks != nullptr) n = max(0, min(a.num_blocks[stream], n));
    units = items = static_cast<int>(units_for(n));
    forced_first = static_cast<int>(min(int64_t{units}, units_for(a.force_first)));
    forced_last =
        a.force_last == 0 ? units : static_cast<int>(max(int64_t{0}, n - a.force_last) / a.group);
    cache = nullptr;
    candidates = nullptr;
    first = 0;
  }
  __device__ __forceinline__ int64_t units_for(int64_t blocks) const {
    return (blocks + a.group - 1) / a.group;
  }
  // In `room`, filled up to a multiple of kEach.
  __device__ __forceinline__ void keep_keys(uint32_t* room) {
    if (a.group == 1) {  // the reads of kReads scores are under way together
      for (int from = threadIdx.x; from < items; from += kReads * kSelectThreads) {
        int unit[kReads];
        float score[kReads];
#pragma unroll
        for (int i = 0; i < kReads; ++i)
          unit[i] = unit_of(min(from + i * kSelectThreads, items - 1));
#pragma unroll
        for (int i = 0; i < kReads; ++i) score[i] = scores[max(unit[i], 0)];
#pragma unroll
        for (int i = 0; i < kReads; ++i)
          if (from + i * kSelectThreads < items)
            room[from + i * kSelectThreads] = key_for(unit[i], score[i]);
      }
    } else {
      for (int i = threadIdx.x; i < items; i += kSelectThreads) room[i] = make_key(unit_of(i));
    }
    const int tail = items + static_cast<int>(threadIdx.x);
    if (tail < padded(items)) room[tail] = shared::kKeyAbsent;
    cache = room;
    __syncthreads();
  }

  __device__ __forceinline__ int unit_of(int item) const {
    return candidates == nullptr ? first + item : candidates[item];
  }
  __device__ __forceinline__ int end_of(int unit) const {
    return static_cast<int>(min(int64_t{n}, (unit + 1) * a.group));
  }
  __device__ __forceinline__ float score_of(int unit) const {
    if (a.group == 1) return scores[unit];
    float total = 0.0f;
    int numbers = 0;
    const int end = end_of(unit);
    for (int b = static_cast<int>(unit * a.group); b < end; ++b) {
      const float score = scores[b];
      if (score != score) continue;
      total += score;
      ++numbers;
    }
    return total / static_cast<float>(numbers);  // NaN where there is no number
  }
  __device__ __forceinline__ uint32_t key_for(int unit, float score) const {
    if (unit < 0) return shared::kKeyAbsent;
    if (unit < forced_first || unit >= forced_last) return shared::kKeyForced;
    return shared::preference_key(score);
  }
  __device__ __forceinline__ uint32_t make_key(int unit) const {
    return key_for(unit, unit < 0 ? 0.0f : score_of(unit));
  }
  __device__ __forceinline__ uint32_t key(int item) const {
    return cache == nullptr ? make_key(unit_of(item)) : cache[item];
  }
  __device__ __forceinline__ int64_t tokens(int unit) const {
    int64_t total = 0;
    const int end = end_of(unit);
    for (int b = static_cast<int>(unit * a.group); b < end; ++b)
      total += max(0, a.block_tokens[stream * a.blocks + b]);
    return total;
  }

  // Counts the units whose key begins with `prefix` under `mask`, by their next eight bits; with
  // `weigh` their tokens too.
  __device__ __forceinline__ void count(uint32_t prefix, uint32_t mask, int shift, bool weigh) {
    for (int i = threadIdx.x; i < kCopies * 256; i += kSelectThreads) {
      (&shared.units[0][0])[i] = 0;
      if (weigh) (&shared.tokens[0][0])[i] = 0;
    }
    __syncthreads();
    const int copy = threadIdx.x / kWarp % kCopies;
    for (int item = threadIdx.x; item < items; item += kSelectThreads) {
      const uint32_t k = key(item);
      if ((k & mask) != prefix) continue;
      const int digit = static_cast<int>(~k >> shift & 255u);
      atomicAdd(&shared.units[copy][digit], 1);
      if (weigh)
        atomicAdd(&shared.tokens[copy][digit],
                  static_cast<unsigned long long>(tokens(unit_of(item))));
    }
    __syncthreads();
  }
  // The units of the eight digits that a lane of the first warp looks at, 8 lane and on.
  __device__ __forceinline__ int units_of_lane(int lane, int (&many)[8]) const {
    int all = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) many[i] = 0;
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      const uint4* const at = reinterpret_cast<const uint4*>(&shared.units[copy][8 * lane]);
      const uint4 v = at[0], w = at[1];
      many[0] += static_cast<int>(v.x), many[1] += static_cast<int>(v.y);
      many[2] += static_cast<int>(v.z), many[3] += static_cast<int>(v.w);
      many[4] += static_cast<int>(w.x), many[5] += static_cast<int>(w.y);
      many[6] += static_cast<int>(w.z), many[7] += static_cast<int>(w.w);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) all += many[i];
    return all;
  }
  __device__ __forceinline__ int64_t tokens_of(int digit) const {
    int64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) sum += static_cast<int64_t>(shared.tokens[i][digit]);
    return sum;
  }

  // The key below which no unit is among the first `target` in the order of preference, and how
  // many units of that key are; all of larger keys are. 1 <= target <= the items that are there.
  __device__ __forceinline__ uint32_t last_key(int target, int* equals) {
    uint32_t prefix = 0, mask = 0;
    int left = target;
    for (int shift = 24; shift >= 0; shift -= 8) {
      count(prefix, mask, shift, false);
      if (threadIdx.x < kWarp) {
        const int lane = threadIdx.x;
        int many[8];
        const int mine = units_of_lane(lane, many);
        int rest = left - (inclusive_sum(mine, lane) - mine);
        if (rest > 0 && rest <= mine) {
          bool found = false;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (!found && rest <= many[i]) {
              found = true;
              shared.digit = 255 - 8 * lane - i;
              shared.left = rest;
              shared.whole = rest == many[i];
            }
            rest -= many[i];
          }
        }
      }
      __syncthreads();
      left = shared.left;
      prefix |= static_cast<uint32_t>(shared.digit) << shift;
      mask |= 255u << shift;
      if (shared.whole) {  // whatever the bits that are left
        *equals = 0;
        return prefix == 0 ? 0 : prefix - 1;
      }
    }
    *equals = left;
    return prefix;
  }

  // How many units, from the most preferred on, have `target` tokens or fewer together. Of all
  // units of the row.
  __device__ __forceinline__ int within_tokens() {
    uint32_t prefix = 0, mask = 0;
    int64_t used = 0;
    int taken = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      count(prefix, mask, shift, true);
      if (threadIdx.x == 0) shared.digit = -1;
      __syncthreads();
      if (threadIdx.x < kWarp) {
        const int lane = threadIdx.x;
        int many[8];
        const int all = units_of_lane(lane, many);
        int64_t mine = 0;
        for (int i = 0; i < 8; ++i) mine += tokens_of(8 * lane + i);
        int64_t now = used + inclusive_sum(mine, lane) - mine;
        int so_far = taken + inclusive_sum(all, lane) - all;
        if (now <= a.target && now + mine > a.target) {
          bool found = false;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int64_t more = tokens_of(8 * lane + i);
            if (!found && now + more > a.target) {
              found = true;
              shared.digit = 255 - 8 * lane - i;
              shared.used = now;
              shared.taken = so_far;
            }
            now += more;
            so_far += many[i];
          }
        }
      }
      __syncthreads();
      if (shared.digit < 0) return units;  // all of them
      used = shared.used;
      taken = shared.taken;
      prefix |= static_cast<uint32_t>(shared.digit) << shift;
      mask |= 255u << shift;
    }
    // Of those with one key, the first ones that fit.
    for (int first = 0; first < units; first += kSelectThreads) {
      const int unit = first + static_cast<int>(threadIdx.x);
      const bool equal = unit < units && key(unit) == prefix;
      int64_t whole;
      int fitting;
      const int64_t mine = equal ? tokens(unit) : 0;
      const int64_t before = sum_before<kSelectThreads>(mine, shared.sums, &whole);
      const bool fits = equal && used + before + mine <= a.target;
      sum_before<kSelectThreads>(int{fits}, shared.small_sums, &fitting);
      taken += fitting;
      used += whole;
      if (used > a.target) break;
    }
    return taken;
  }

  // Lists the units of a key above `last`, and the first `equals` of those with that key, as blocks
  // or as they are; how many units.
  __device__ __forceinline__ int list(uint32_t last, int equals, int32_t* out, bool as_blocks) {
    if (threadIdx.x == 0) shared.last_listed = 0;
    int above_before = 0, equal_before = 0;
    for (int start = 0; start < items; start += kEach * kSelectThreads) {
      const int mine = start + kEach * static_cast<int>(threadIdx.x);
      uint32_t keys[kEach] = {};
      if (cache != nullptr && mine < items) {
        const uint4 four = *reinterpret_cast<const uint4*>(cache + mine);
        keys[0] = four.x, keys[1] = four.y, keys[2] = four.z, keys[3] = four.w;
      } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          if (mine + i < items) keys[i] = key(mine + i);
      }
      int both = 0;  // above, and equal in the high half: at most kEach * kSelectThreads of each
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        both += is_equal(keys[i], last) ? 1 << 16 : static_cast<int>(keys[i] > last);
      int whole;
      int before = sum_before<kSelectThreads>(both, shared.small_sums, &whole);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int equal_rank = equal_before + (before >> 16);
        const bool equal = is_equal(keys[i], last), above = keys[i] > last;
        if (above || (equal && equal_rank < equals)) {
          const int place = above_before + (before & 0xffff) + min(equal_rank, equals);
          const int unit = unit_of(mine + i);
          if (as_blocks) {
            const int end = end_of(unit);
            for (int b = static_cast<int>(unit * a.group); b < end; ++b)
              out[place * a.group + b - unit * a.group] = b;
          } else {
            out[place] = unit;
          }
          if (unit == units - 1) shared.last_listed = 1;
        }
        before += equal ? 1 << 16 : static_cast<int>(above);
      }
      above_before += whole & 0xffff;
      equal_before += whole >> 16;
    }
    __syncthreads();
    return above_before + min(equal_before, equals);
  }
  static __device__ __forceinline__ bool is_equal(uint32_t key, uint32_t last) {
    return key == last && key != shared::kKeyAbsent;
  }

  // Lists the `target` most preferred of the items.
  __device__ __forceinline__ int list_best(int target, int there, int32_t* out, bool as_blocks) {
    if (target <= 0) return 0;
    uint32_t last = shared::kKeyAbsent;  // all that are there
    int equals = 0;
    if (target < there) last = last_key(target, &equals);
    return list(last, equals, out, as_blocks);
  }
};

// One block of threads: the best `keep` units of a part of a row, ascending, -1 padded.
__global__ void __launch_bounds__(kSelectThreads)
    shortlist_kernel(const __grid_constant__ SelectArgs a, int32_t* lists, int64_t parts,
                     int64_t keep) {
  __shared__ SelectShared shared;
  VICO_DYNAMIC_SHARED(keys);
  Selection part(a, shared, blockIdx.x / parts);
  part.first = static_cast<int>(min(blockIdx.x % parts * kPart, int64_t{part.units}));
  part.items = min(static_cast<int>(kPart), part.units - part.first);
  part.keep_keys(reinterpret_cast<uint32_t*>(keys));
  int32_t* const out = lists + blockIdx.x * keep;
  const int wanted = static_cast<int>(min(keep, int64_t{part.items}));
  const int found = part.list_best(wanted, part.items, out, false);
  for (int64_t i = found + threadIdx.x; i < keep; i += kSelectThreads) out[i] = -1;
}

// The pages of the chosen blocks, where they are listed too.
struct Listing {
  PagesArgs a;
  TableSize size;
  bool wanted;
};

// One block of threads: one row, from all of its units or from `candidates` a row of them.
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ SelectArgs a, const int32_t* lists, int64_t candidates,
                  bool cached, const __grid_constant__ Listing listing) {
  __shared__ SelectShared shared;
  VICO_DYNAMIC_SHARED(dynamic);
  const int64_t row = blockIdx.x;
  Selection selection(a, shared, row);
  const int n = selection.n, units = selection.units;
  for (int64_t b = n + threadIdx.x; b < a.blocks; b += kSelectThreads)
    selection.scores[b] = -kInfinity;
  if (lists != nullptr) {
    selection.candidates = lists + row * candidates;
    selection.items = static_cast<int>(candidates);
  }
  if (cached) selection.keep_keys(reinterpret_cast<uint32_t*>(dynamic));

  int64_t wanted;
  if (a.rule == Rule::kCount)
    wanted = a.target / a.group;
  else if (a.rule == Rule::kRatio)
    wanted = static_cast<int64_t>(floor(static_cast<double>(n) * a.amount)) / a.group;
  else
    wanted = selection.within_tokens();
  const int forced =
      selection.forced_first + units - max(selection.forced_first, selection.forced_last);
  wanted = max(max(selection.units_for(a.min_k), int64_t{forced}), wanted);
  const int target = static_cast<int>(min(min(wanted, a.capacity / a.group), int64_t{units}));

  int32_t* const out = a.index + row * a.capacity;
  int64_t found = selection.list_best(target, units, out, true) * a.group;
  if (found > 0 && shared.last_listed != 0) found -= units * a.group - n;  // it may be short
  for (int64_t i = found + threadIdx.x; i < a.capacity; i += kSelectThreads) out[i] = -1;
  if (threadIdx.x == 0) a.chosen[row] = static_cast<int32_t>(found);
  if (!listing.wanted) return;
  __syncthreads();  // the row's blocks are written, its keys no longer read
  list_pages<kSelectThreads>(listing.a, row, reinterpret_cast<int32_t*>(dynamic), listing.size,
                             shared.small_sums);
}

// Units that each part of a row lists; 0: there are no parts.
struct Parts {
  int64_t parts, keep;

  explicit Parts(const SelectArgs& a) : parts(0), keep(a.capacity / a.group) {
    const int64_t units = (a.blocks + a.group - 1) / a.group;
    if (units <= kCached || a.rule == Rule::kTokens || keep == 0) return;
    const int64_t wanted = (units + kPart - 1) / kPart;
    if (wanted * keep <= kCached) parts = wanted;
  }
};

cudaError_t choose(const SelectArgs& a, const Listing& listing, void* workspace,
                   cudaStream_t stream) {
  const int64_t rows = a.streams * a.rows, units = (a.blocks + a.group - 1) / a.group;
  const Parts parts(a);
  int32_t* const lists = parts.parts > 0 ? static_cast<int32_t*>(workspace) : nullptr;
  if (lists != nullptr) {
    const cudaError_t status =
        launch(shortlist_kernel, rows * parts.parts, kSelectThreads, kPart * sizeof(uint32_t),
               stream, a, lists, parts.parts, parts.keep);
    if (status != cudaSuccess) return status;
  }
  const int64_t candidates = parts.parts * parts.keep,
                items = lists != nullptr ? candidates : units;
  const bool cached = items <= kCached;
  const int64_t keys = cached ? padded(items) * static_cast<int64_t>(sizeof(uint32_t)) : 0;
  const int64_t table = listing.wanted ? listing.size.bytes() : 0;
  return launch(select_kernel, rows, kSelectThreads, keys < table ? table : keys, stream, a,
                static_cast<const int32_t*>(lists), candidates, cached, listing);
}

}  // namespace

int64_t select_blocks_workspace(const SelectArgs& a) {
  const Parts parts(a);
  return a.streams * a.rows * parts.parts * parts.keep * 4;
}

const char* select_blocks_cuda(const SelectArgs& a, void* workspace, void* stream) {
  if (a.rule == Rule::kMass) return "cumulative mass is not served";
  const Listing none{{}, TableSize(0), false};
  return message_of(choose(a, none, workspace, static_cast<cudaStream_t>(stream)));
}

int64_t select_block_pages_workspace(const SelectArgs& a, const PagesArgs& pages) {
  return select_blocks_workspace(a) + select_pages_workspace(pages);
}

const char* select_block_pages_cuda(const SelectArgs& a, const PagesArgs& pages, void* workspace,
                                    void* stream) {
  if (a.rule == Rule::kMass) return "cumulative mass is not served";
  const int64_t length = length_of(pages);
  const TableSize size(length);
  if (size.shared() && length > 0) {
    const Listing listing{pages, size, true};
    return message_of(choose(a, listing, workspace, static_cast<cudaStream_t>(stream)));
  }
  // Thousands of pages a row: their table lies in global memory, and a launch of its own costs
  // little beside filling it.
  const char* const error = select_blocks_cuda(a, workspace, stream);
  if (error != nullptr) return error;
  return select_pages_cuda(pages, static_cast<char*>(workspace) + select_blocks_workspace(a),
                           stream);
}

}  // namespace vico
