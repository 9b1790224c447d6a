// The choice of topk_blocks on the GPU.
//
// Bound by latency up to some ten thousand blocks: one block of threads a row, whose keys of
// preference (vico/ordering.h) stay in shared memory while four passes find the last one that is
// chosen, eight bits each. With more, each of several blocks of threads first lists the best of a
// part; where that is no help (many are chosen, or as many as fit into a budget) one makes the keys
// anew in each pass. Sums are integers, so atomics keep one result.

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/retrieve.h"
#include "cuda/warp.h"
#include "vico/ordering.h"

namespace vico {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kSelectThreads = 1024;
constexpr int kCopies = 4;          // of the histograms, against collisions
constexpr int64_t kCached = 20000;  // keys in shared memory
constexpr int64_t kPart = 16384;    // units of which one block of threads lists the best

struct SelectShared {
  int64_t sums[kSelectThreads / kWarp];
  unsigned long long tokens[kCopies][256];
  int units[kCopies][256];
  // What a pass found out.
  int digit;
  int64_t left, used, taken;
  int last_listed;  // whether the row's last unit is
};

// One row of scores: all of its units, a part of them, or candidates among them, in order.
struct Selection {
  const SelectArgs& a;
  SelectShared& shared;
  int64_t stream, n, units;
  int64_t forced_first, forced_last;  // units before the one and from the other on are forced
  float* scores;
  uint32_t* cache;            // or null
  const int32_t* candidates;  // or null; -1 at the end
  int64_t first, items;

  __device__ __forceinline__ Selection(const SelectArgs& a, SelectShared& shared, int64_t row)
      : a(a), shared(shared), stream(row / a.rows), n(a.blocks), scores(a.scores + row * a.blocks) {
    if (a.num_blocks != nullptr) {
      const int64_t given = a.num_blocks[stream];
      n = given < 0 ? 0 : min(given, n);
    }
    units = items = units_for(n);
    forced_first = min(units, units_for(a.force_first));
    forced_last = a.force_last == 0 ? units : max(int64_t{0}, n - a.force_last) / a.group;
    cache = nullptr;
    candidates = nullptr;
    first = 0;
  }
  __device__ __forceinline__ int64_t units_for(int64_t blocks) const {
    return (blocks + a.group - 1) / a.group;
  }
  __device__ __forceinline__ void keep_keys(uint32_t* room) {
    for (int64_t i = threadIdx.x; i < items; i += kSelectThreads) room[i] = make_key(unit_of(i));
    cache = room;
    __syncthreads();
  }

  __device__ __forceinline__ int64_t unit_of(int64_t item) const {
    return candidates == nullptr ? first + item : candidates[item];
  }
  __device__ __forceinline__ float score_of(int64_t unit) const {
    if (a.group == 1) return scores[unit];
    float total = 0.0f;
    int numbers = 0;
    const int64_t end = min(n, (unit + 1) * a.group);
    for (int64_t b = unit * a.group; b < end; ++b) {
      const float score = scores[b];
      if (score != score) continue;
      total += score;
      ++numbers;
    }
    return total / static_cast<float>(numbers);  // NaN where there is no number
  }
  __device__ __forceinline__ uint32_t make_key(int64_t unit) const {
    if (unit < 0) return shared::kKeyAbsent;
    if (unit < forced_first || unit >= forced_last) return shared::kKeyForced;
    return shared::preference_key(score_of(unit));
  }
  __device__ __forceinline__ uint32_t key(int64_t item) const {
    return cache == nullptr ? make_key(unit_of(item)) : cache[item];
  }
  __device__ __forceinline__ int64_t tokens(int64_t unit) const {
    int64_t total = 0;
    const int64_t end = min(n, (unit + 1) * a.group);
    for (int64_t b = unit * a.group; b < end; ++b)
      total += max(0, a.block_tokens[stream * a.blocks + b]);
    return total;
  }

  // Counts the units whose key begins with `prefix` under `mask`, by their next eight bits; with
  // `weigh` their tokens too.
  __device__ __forceinline__ void count(uint32_t prefix, uint32_t mask, int shift, bool weigh) {
    for (int i = threadIdx.x; i < kCopies * 256; i += kSelectThreads) {
      (&shared.units[0][0])[i] = 0;
      (&shared.tokens[0][0])[i] = 0;
    }
    __syncthreads();
    const int copy = threadIdx.x / kWarp % kCopies;
    for (int64_t item = threadIdx.x; item < items; item += kSelectThreads) {
      const uint32_t k = key(item);
      if ((k & mask) != prefix) continue;
      const int digit = static_cast<int>(k >> shift & 255u);
      atomicAdd(&shared.units[copy][digit], 1);
      if (weigh)
        atomicAdd(&shared.tokens[copy][digit],
                  static_cast<unsigned long long>(tokens(unit_of(item))));
    }
    __syncthreads();
  }
  __device__ __forceinline__ int64_t units_of(int digit) const {
    int64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) sum += shared.units[i][digit];
    return sum;
  }
  __device__ __forceinline__ int64_t tokens_of(int digit) const {
    int64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) sum += static_cast<int64_t>(shared.tokens[i][digit]);
    return sum;
  }

  // The key of the target-th unit in the order of preference, and how many units of that key are
  // among the first `target`; 1 <= target <= the items that are there.
  __device__ __forceinline__ uint32_t last_key(int64_t target, int64_t* equals) {
    uint32_t prefix = 0, mask = 0;
    int64_t left = target;
    for (int shift = 24; shift >= 0; shift -= 8) {
      count(prefix, mask, shift, false);
      if (threadIdx.x < kWarp) {  // a lane has eight digits, the largest first
        const int lane = threadIdx.x;
        int64_t mine = 0;
        for (int i = 0; i < 8; ++i) mine += units_of(255 - 8 * lane - i);
        const int64_t up_to = inclusive_sum(mine, lane);
        int64_t rest = left - (up_to - mine);
        if (rest > 0 && rest <= mine) {
          int digit = 255 - 8 * lane;
          while (rest > units_of(digit)) rest -= units_of(digit--);
          shared.digit = digit;
          shared.left = rest;
        }
      }
      __syncthreads();
      left = shared.left;
      prefix |= static_cast<uint32_t>(shared.digit) << shift;
      mask |= 255u << shift;
      __syncthreads();
    }
    *equals = left;
    return prefix;
  }

  // How many units, from the most preferred on, have `target` tokens or fewer together. Of all
  // units of the row.
  __device__ __forceinline__ int64_t within_tokens() {
    uint32_t prefix = 0, mask = 0;
    int64_t used = 0, taken = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      count(prefix, mask, shift, true);
      if (threadIdx.x == 0) shared.digit = -1;
      __syncthreads();
      if (threadIdx.x < kWarp) {
        const int lane = threadIdx.x;
        int64_t mine = 0, many = 0;
        for (int i = 0; i < 8; ++i) {
          mine += tokens_of(255 - 8 * lane - i);
          many += units_of(255 - 8 * lane - i);
        }
        int64_t now = used + inclusive_sum(mine, lane) - mine;
        int64_t so_far = taken + inclusive_sum(many, lane) - many;
        if (now <= a.target && now + mine > a.target) {
          int digit = 255 - 8 * lane;
          while (now + tokens_of(digit) <= a.target) {
            now += tokens_of(digit);
            so_far += units_of(digit--);
          }
          shared.digit = digit;
          shared.used = now;
          shared.taken = so_far;
        }
      }
      __syncthreads();
      if (shared.digit < 0) return units;  // all of them
      used = shared.used;
      taken = shared.taken;
      prefix |= static_cast<uint32_t>(shared.digit) << shift;
      mask |= 255u << shift;
      __syncthreads();
    }
    // Of those with one key, the first ones that fit.
    for (int64_t first = 0; first < units; first += kSelectThreads) {
      const int64_t unit = first + threadIdx.x;
      const bool equal = unit < units && key(unit) == prefix;
      int64_t whole, fitting;
      const int64_t mine = equal ? tokens(unit) : 0;
      const int64_t before = sum_before<kSelectThreads>(mine, shared.sums, &whole);
      const bool fits = equal && used + before + mine <= a.target;
      sum_before<kSelectThreads>(fits, shared.sums, &fitting);
      taken += fitting;
      used += whole;
      if (used > a.target) break;
    }
    return taken;
  }

  // Lists the units of a key above `last`, and the first `equals` of those with that key, as blocks
  // or as they are; how many units.
  __device__ __forceinline__ int64_t list(uint32_t last, int64_t equals, int32_t* out,
                                          bool as_blocks) {
    constexpr int kEach = 4;  // items of a thread at a time, side by side
    if (threadIdx.x == 0) shared.last_listed = 0;
    int64_t above_before = 0, equal_before = 0;
    for (int64_t start = 0; start < items; start += kEach * kSelectThreads) {
      const int64_t mine = start + kEach * threadIdx.x;
      uint32_t keys[kEach];
      int64_t both = 0;  // above, and equal in the high half
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        keys[i] = mine + i < items ? key(mine + i) : shared::kKeyAbsent;
        both += is_equal(keys[i], last) ? int64_t{1} << 32 : keys[i] > last;
      }
      int64_t whole;
      int64_t before = sum_before<kSelectThreads>(both, shared.sums, &whole);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t equal_rank = equal_before + (before >> 32);
        const bool equal = is_equal(keys[i], last), above = keys[i] > last;
        if (above || (equal && equal_rank < equals)) {
          const int64_t place = above_before + (before & 0xffffffff) + min(equal_rank, equals);
          const int64_t unit = unit_of(mine + i);
          if (as_blocks) {
            const int64_t end = min(n, (unit + 1) * a.group);
            for (int64_t b = unit * a.group; b < end; ++b)
              out[place * a.group + b - unit * a.group] = static_cast<int32_t>(b);
          } else {
            out[place] = static_cast<int32_t>(unit);
          }
          if (unit == units - 1) shared.last_listed = 1;
        }
        before += equal ? int64_t{1} << 32 : above;
      }
      above_before += whole & 0xffffffff;
      equal_before += whole >> 32;
    }
    __syncthreads();
    return above_before + min(equal_before, equals);
  }
  static __device__ __forceinline__ bool is_equal(uint32_t key, uint32_t last) {
    return key == last && key != shared::kKeyAbsent;
  }

  // Lists the `target` most preferred of the items.
  __device__ __forceinline__ int64_t list_best(int64_t target, int64_t there, int32_t* out,
                                               bool as_blocks) {
    if (target <= 0) return 0;
    uint32_t last = shared::kKeyAbsent;  // all that are there
    int64_t equals = 0;
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
  part.first = min(blockIdx.x % parts * kPart, part.units);
  part.items = min(kPart, part.units - part.first);
  part.keep_keys(reinterpret_cast<uint32_t*>(keys));
  int32_t* const out = lists + blockIdx.x * keep;
  const int64_t found = part.list_best(min(keep, part.items), part.items, out, false);
  for (int64_t i = found + threadIdx.x; i < keep; i += kSelectThreads) out[i] = -1;
}

// One block of threads: one row, from all of its units or from `candidates` a row of them.
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ SelectArgs a, const int32_t* lists, int64_t candidates,
                  bool cached) {
  __shared__ SelectShared shared;
  VICO_DYNAMIC_SHARED(keys);
  const int64_t row = blockIdx.x;
  Selection selection(a, shared, row);
  const int64_t n = selection.n, units = selection.units;
  for (int64_t b = n + threadIdx.x; b < a.blocks; b += kSelectThreads)
    selection.scores[b] = -kInfinity;
  if (lists != nullptr) {
    selection.candidates = lists + row * candidates;
    selection.items = candidates;
  }
  if (cached) selection.keep_keys(reinterpret_cast<uint32_t*>(keys));

  int64_t wanted;
  if (a.rule == Rule::kCount)
    wanted = a.target / a.group;
  else if (a.rule == Rule::kRatio)
    wanted = static_cast<int64_t>(floor(static_cast<double>(n) * a.amount)) / a.group;
  else
    wanted = selection.within_tokens();
  const int64_t forced =
      selection.forced_first + units - max(selection.forced_first, selection.forced_last);
  int64_t target = max(max(selection.units_for(a.min_k), forced), wanted);
  target = min(min(target, a.capacity / a.group), units);

  int32_t* const out = a.index + row * a.capacity;
  int64_t found = selection.list_best(target, units, out, true) * a.group;
  if (found > 0 && shared.last_listed != 0) found -= units * a.group - n;  // it may be short
  for (int64_t i = found + threadIdx.x; i < a.capacity; i += kSelectThreads) out[i] = -1;
  if (threadIdx.x == 0) a.chosen[row] = static_cast<int32_t>(found);
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

}  // namespace

int64_t select_blocks_workspace(const SelectArgs& a) {
  const Parts parts(a);
  return a.streams * a.rows * parts.parts * parts.keep * 4;
}

const char* select_blocks_cuda(const SelectArgs& a, void* workspace, void* stream) {
  if (a.rule == Rule::kMass) return "cumulative mass is not served";
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t rows = a.streams * a.rows, units = (a.blocks + a.group - 1) / a.group;
  const Parts parts(a);
  int32_t* const lists = parts.parts > 0 ? static_cast<int32_t*>(workspace) : nullptr;
  if (lists != nullptr) {
    const cudaError_t status =
        launch(shortlist_kernel, rows * parts.parts, kSelectThreads, kPart * sizeof(uint32_t), on,
               a, lists, parts.parts, parts.keep);
    if (status != cudaSuccess) return message_of(status);
  }
  const int64_t candidates = parts.parts * parts.keep,
                items = lists != nullptr ? candidates : units;
  const bool cached = items <= kCached;
  return message_of(launch(select_kernel, rows, kSelectThreads,
                           cached ? items * sizeof(uint32_t) : 0, on, a,
                           static_cast<const int32_t*>(lists), candidates, cached));
}

}  // namespace vico
