// The choice among one row's scores by one block of threads: keys of preference (vico/ordering.h)
// in shared memory while at most four passes find the last one that is chosen, eight bits each.
// Sums are integers, so atomics keep one result.
#pragma once

#include "cuda/launch.h"
#include "cuda/warp.h"
#include "vico/ordering.h"
#include "vico/retrieve.h"

namespace vico {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kSelectThreads = 1024;
constexpr int kCopies = 4;  // of the histograms, against collisions
constexpr int kEach = 4;    // items of a thread at a time, side by side
constexpr int kReads = 8;   // of a thread, under way together

__host__ __device__ inline int64_t padded(int64_t items) {
  return (items + kEach - 1) / kEach * kEach;
}

// One row of scores, and in which order its units are preferred.
struct Row {
  const SelectArgs& a;
  int64_t stream;
  int n, units;
  int forced_first, forced_last;  // units before the one and from the other on are forced
  float* scores;

  __device__ __forceinline__ Row(const SelectArgs& a, int64_t row)
      : a(a), stream(row / a.rows), scores(a.scores + row * a.blocks) {
    n = static_cast<int>(a.blocks);
    if (a.num_blocks != nullptr) n = max(0, min(a.num_blocks[stream], n));
    units = static_cast<int>(units_for(n));
    forced_first = static_cast<int>(min(int64_t{units}, units_for(a.force_first)));
    forced_last =
        a.force_last == 0 ? units : static_cast<int>(max(int64_t{0}, n - a.force_last) / a.group);
  }
  __device__ __forceinline__ int64_t units_for(int64_t blocks) const {
    // A division of 64 bits takes as long as a read.
    return a.group == 1 ? blocks : (blocks + a.group - 1) / a.group;
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
    if (unit < forced_first || unit >= forced_last) return shared::kKeyForced;
    return shared::preference_key(score);
  }
  __device__ __forceinline__ uint32_t make_key(int unit) const {
    return key_for(unit, score_of(unit));
  }
  __device__ __forceinline__ int64_t tokens(int unit) const {
    int64_t total = 0;
    const int end = end_of(unit);
    for (int b = static_cast<int>(unit * a.group); b < end; ++b)
      total += max(0, a.block_tokens[stream * a.blocks + b]);
    return total;
  }

  // Calls visit(unit, key) for each unit; where units are blocks a thread's reads of kAhead scores
  // are under way together.
  template <int kAhead, typename Visit>
  __device__ __forceinline__ void for_each_key(const Visit& visit) const {
    if (a.group > 1) {
      for (int i = threadIdx.x; i < units; i += kSelectThreads) visit(i, make_key(i));
      return;
    }
    for (int from = threadIdx.x; from < units; from += kAhead * kSelectThreads) {
      float score[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) score[i] = scores[min(from + i * kSelectThreads, units - 1)];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int unit = from + i * kSelectThreads;
        if (unit < units) visit(unit, key_for(unit, score[i]));
      }
    }
  }
};

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

// Where the chosen ones end in the order of preference: all of a key above `last` are chosen, and
// so many of that key.
struct Cut {
  uint32_t last;
  int equals;
  // No smaller key is chosen.
  __device__ __forceinline__ uint32_t least() const { return equals > 0 ? last : last + 1; }
};

// A choice among items in the order of time: all units of a row, or some of them. kKept: their keys
// are in `cache` for certain.
template <bool kKept>
struct Selection : Row {
  SelectShared& shared;
  const uint32_t* cache;  // keys, filled up to a multiple of kEach; null: made in each pass
  const int32_t* ids;     // of the items
  bool own_ids;           // else they are numbered as they come
  int items;

  __device__ __forceinline__ Selection(const SelectArgs& a, SelectShared& shared, int64_t row)
      : Row(a, row), shared(shared), cache(nullptr), ids(nullptr), own_ids(false), items(units) {}
  __device__ __forceinline__ void keep_keys(uint32_t* room) {
    for_each_key<kReads>([&](int unit, uint32_t key) { room[unit] = key; });
    const int tail = items + static_cast<int>(threadIdx.x);
    if (tail < padded(items)) room[tail] = shared::kKeyAbsent;
    cache = room;
    __syncthreads();
  }
  __device__ __forceinline__ int id_of(int item) const { return own_ids ? ids[item] : item; }
  __device__ __forceinline__ bool kept() const { return kKept || cache != nullptr; }
  __device__ __forceinline__ uint32_t key(int item) const {
    return kept() ? cache[item] : make_key(item);
  }

  // Counts the items whose key begins with `prefix` under `mask`, by their next eight bits; with
  // `weigh` their tokens too: then they are all units.
  __device__ __forceinline__ void count(uint32_t prefix, uint32_t mask, int shift, bool weigh) {
    for (int i = threadIdx.x; i < kCopies * 256; i += kSelectThreads) {
      (&shared.units[0][0])[i] = 0;
      if (weigh) (&shared.tokens[0][0])[i] = 0;
    }
    __syncthreads();
    const int copy = threadIdx.x / kWarp % kCopies;
    const auto add = [&](int item, uint32_t k) {
      if ((k & mask) != prefix) return;
      const int digit = static_cast<int>(~k >> shift & 255u);
      atomicAdd(&shared.units[copy][digit], 1);
      if (weigh)
        atomicAdd(&shared.tokens[copy][digit], static_cast<unsigned long long>(tokens(item)));
    };
    if (!kept())
      for_each_key<kEach>(add);
    else
      for (int item = threadIdx.x; item < items; item += kSelectThreads) add(item, cache[item]);
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
#pragma unroll 1
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
#pragma unroll 1
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

  // Lists what is chosen, as blocks or by its number; how many items. Ends with a barrier.
  __device__ __forceinline__ int list(Cut cut, int32_t* out, bool as_blocks) {
    const auto [last, equals] = cut;
    if (threadIdx.x == 0) shared.last_listed = 0;
    int above_before = 0, equal_before = 0;
    for (int start = 0; start < items; start += kEach * kSelectThreads) {
      const int mine = start + kEach * static_cast<int>(threadIdx.x);
      uint32_t keys[kEach] = {};
      if (kept() && mine < items) {
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
          const int unit = id_of(mine + i);
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

  // Of the `target` most preferred items, at least one.
  __device__ __forceinline__ Cut cut(int target) {
    Cut found{shared::kKeyAbsent, 0};  // all of them
    if (target < items) found.last = last_key(target, &found.equals);
    return found;
  }
};

}  // namespace
}  // namespace vico
