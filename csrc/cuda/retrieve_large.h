// The choice among more units than shared memory holds keys of, where few of them are chosen.
//
// The `target` most preferred units lie in as many of their groups at most, those whose largest
// keys are preferred; ties go to the earlier group as they go to the earlier unit. For that many
// blocks of threads make the maxima of parts, 2^bits units each, and of as many parts together.
// Then one block of threads chooses among the maxima of a row, among those of the parts of what it
// chose, and among their units: each time from a few thousand, whatever the scores are and wherever
// the best lie.
#pragma once

#include "cuda/retrieve_selection.h"

namespace vico {
namespace {

constexpr int kMaximaThreads = 128;  // each makes the maximum of a part
constexpr int kMostBits = 7;
static_assert(kMaximaThreads >> kMostBits == 1, "a block of threads has the parts of whole groups");
constexpr int kHeld = 8;          // items of a thread at a time when groups are opened
constexpr int64_t kRoom = 22000;  // words of shared memory
static_assert(sizeof(SelectShared) + 4 * kRoom <= 99 * 1024, "what every GPU of sm_80 and on has");

struct Levels {
  int bits = 0;          // 0: not served
  int most = 0;          // groups, or parts, that may be opened together
  int64_t groups = 0;    // of a row: as many maxima, then those of their parts, group by group
  int64_t launched = 0;  // blocks of threads of a row
  uint32_t* maxima = nullptr;

  Levels() = default;
  explicit Levels(const SelectArgs& a) {
    const int64_t units = (a.blocks + a.group - 1) / a.group, keep = a.capacity / a.group;
    if (a.rule == Rule::kTokens || keep == 0) return;
    int64_t least = INT64_MAX;
    for (int tried = 1; tried <= kMostBits; ++tried) {
      const int64_t part = int64_t{1} << tried;
      // What is opened, and keys and numbers of all that it may hold; first the maxima's keys lie
      // there.
      const int64_t room = kRoom / (1 + 2 * part) / kEach * kEach;
      const int64_t all = padded((units + part * part - 1) / (part * part));
      const int64_t looked_at = all + 2 * keep * part;
      if (keep > room || all > 2 * room * part || looked_at >= least) continue;
      least = looked_at;
      bits = tried;
      most = static_cast<int>(room);
      groups = all;
      launched = ((all << tried) + kMaximaThreads - 1) / kMaximaThreads;
    }
  }
  __host__ __device__ int64_t row_words() const { return groups + (groups << bits); }
  __device__ __forceinline__ uint32_t* of_groups(int64_t row) const {
    return maxima + row * row_words();
  }
  __device__ __forceinline__ uint32_t* of_parts(int64_t row) const {
    return of_groups(row) + groups;
  }
};

// One block of threads: some groups of a row.
__global__ void __launch_bounds__(kMaximaThreads)
    maxima_kernel(const __grid_constant__ SelectArgs a, const __grid_constant__ Levels levels) {
  __shared__ uint32_t of_threads[kMaximaThreads];
  const unsigned launched = static_cast<unsigned>(levels.launched);
  const int64_t index = blockIdx.x / launched;
  const Row row(a, index);
  const int first_part = static_cast<int>(blockIdx.x % launched) * kMaximaThreads;
  const int part = first_part + static_cast<int>(threadIdx.x), size = 1 << levels.bits;
  const int64_t from = int64_t{part} << levels.bits;
  const int end = static_cast<int>(min(from + size, int64_t{row.units}));
  // Lanes read from other lines of the cache: the fewer instructions, the fewer looks at lines.
  const bool wide = a.group == 1 && reinterpret_cast<uintptr_t>(row.scores) % 16 == 0;
  uint32_t best = shared::kKeyAbsent;
  for (int64_t unit = from; unit < end; unit += kReads) {
    const int u = static_cast<int>(unit);
    float score[kReads];
    if (wide && u + kReads <= end) {
#pragma unroll
      for (int i = 0; i < kReads; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(row.scores + u + i);
        score[i] = four.x, score[i + 1] = four.y, score[i + 2] = four.z, score[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kReads; ++i) score[i] = row.score_of(min(u + i, end - 1));
    }
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const uint32_t key = row.key_for(min(u + i, end - 1), score[i]);
      if (key > best) best = key;
    }
  }
  of_threads[threadIdx.x] = best;
  const int parts = static_cast<int>(levels.groups << levels.bits);
  if (part < parts) levels.of_parts(index)[part] = best;
  // What the choice owes to blocks that are not there is spread over more blocks of threads here.
  const int64_t past = min((from + size) * a.group, a.blocks);
  for (int64_t b = max(from * a.group, int64_t{row.n}); b < past; ++b) row.scores[b] = -kInfinity;
  __syncthreads();
  const int group = (first_part >> levels.bits) + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kMaximaThreads >> levels.bits || group >= levels.groups) return;
  uint32_t of_group = shared::kKeyAbsent;
  for (int i = 0; i < size; ++i) {
    const uint32_t key = of_threads[(threadIdx.x << levels.bits) + i];
    if (key > of_group) of_group = key;
  }
  levels.of_groups(index)[group] = of_group;
}

struct Pair {
  uint32_t first, second;
};

// Of the items of `count` parents, 2^bits each, keys of `least` or more and whose they are, in
// order, filled up as a Selection wants it; how many. `keys_of(item)` gives those of an even item
// and the next one. Ends with a barrier.
template <typename KeysOf>
__device__ __forceinline__ int open_up(const int32_t* parents, int count, int bits, uint32_t least,
                                       uint32_t* keys, int32_t* ids, int* sums,
                                       const KeysOf& keys_of) {
  constexpr int kPairs = kHeld / 2;
  const int all = count << bits;
  int kept = 0;
  for (int from = 0; from < all; from += kHeld * kSelectThreads) {
    const int mine = from + kHeld * static_cast<int>(threadIdx.x);
    int id[kPairs];
    Pair key[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int item = mine + 2 * i;
      id[i] = item < all ? (parents[item >> bits] << bits) + (item & ((1 << bits) - 1)) : -1;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      key[i] = id[i] < 0 ? Pair{shared::kKeyAbsent, shared::kKeyAbsent} : keys_of(id[i]);
    int many = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      many += int{key[i].first >= least} + int{key[i].second >= least};
    int whole;
    int to = kept + sum_before<kSelectThreads>(many, sums, &whole);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (key[i].first >= least) keys[to] = key[i].first, ids[to++] = id[i];
      if (key[i].second >= least) keys[to] = key[i].second, ids[to++] = id[i] + 1;
    }
    kept += whole;
  }
  const int tail = kept + static_cast<int>(threadIdx.x);
  if (tail < padded(kept)) keys[tail] = shared::kKeyAbsent;
  __syncthreads();
  return kept;
}

// Chooses until only units are left, among which the `target` most preferred ones are; the choice
// among them. `room` has kRoom words.
__device__ __forceinline__ Cut narrow(Selection<true>& row, const Levels& levels, int64_t index,
                                      int target, uint32_t* room) {
  const int bits = levels.bits, within = 2 * bits;
  int32_t* const opened = reinterpret_cast<int32_t*>(room);
  uint32_t* const keys = room + levels.most;
  int32_t* const ids = reinterpret_cast<int32_t*>(keys + (levels.most << bits));

  const uint32_t* const of_groups = levels.of_groups(index);
  const int groups = static_cast<int>((int64_t{row.units} + (1 << within) - 1) >> within);
  for (int i = threadIdx.x; i < padded(groups); i += kSelectThreads)
    keys[i] = i < groups ? of_groups[i] : shared::kKeyAbsent;
  __syncthreads();
  row.cache = keys;
  row.ids = ids;
  row.items = groups;

  int level = 0;  // of the keys at hand: of groups, of parts, of units
  const auto keys_of = [&](int id) {
    if (level == 1) {
      const uint64_t both = *reinterpret_cast<const uint64_t*>(levels.of_parts(index) + id);
      return Pair{static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32)};
    }
    const bool first = id < row.units, second = id + 1 < row.units;
    float2 score = make_float2(0.0f, 0.0f);
    if (second && row.a.group == 1 && reinterpret_cast<uintptr_t>(row.scores) % 8 == 0) {
      score = *reinterpret_cast<const float2*>(row.scores + id);
    } else {
      if (first) score.x = row.score_of(id);
      if (second) score.y = row.score_of(id + 1);
    }
    return Pair{first ? row.key_for(id, score.x) : shared::kKeyAbsent,
                second ? row.key_for(id + 1, score.y) : shared::kKeyAbsent};
  };
  while (true) {
    row.own_ids = level > 0;
    const Cut cut = row.cut(target);
    if (level == 2) return cut;
    row.items = row.list(cut, opened, false);
    // Each that is listed has a unit of a key of cut.least() or more: so have all that matter.
    while (true) {
      ++level;
      row.items =
          open_up(opened, row.items, bits, cut.least(), keys, ids, row.shared.small_sums, keys_of);
      if (level == 2 || row.items > levels.most) break;
      // As few parts as may be opened without a choice among them.
      for (int i = threadIdx.x; i < row.items; i += kSelectThreads) opened[i] = ids[i];
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace vico
