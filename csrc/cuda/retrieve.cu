// summarize_blocks, the choice of topk_blocks, and select_pages on the GPU.
//
// Summaries are bound by memory: each listed key is read once. The choice is bound by latency up to
// some ten thousand blocks: one block of threads a row, whose keys of preference (vico/ordering.h)
// stay in shared memory while four passes find the last one that is chosen, eight bits each. With
// more, each of several blocks of threads first lists the best of a part; where that is no help
// (many are chosen, or as many as fit into a budget) one makes the keys anew in each pass. Sums are
// integers, so atomics keep one result.

#include "cuda/retrieve.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "vico/append.h"
#include "vico/ordering.h"

namespace vico {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();

// The sum of x over the threads before this one, and over all of them. `sums` has a place a warp.
// Ends with a barrier, so that `sums` may be used again.
template <int kThreads>
__device__ __forceinline__ int64_t sum_before(int64_t x, int64_t* sums, int64_t* whole) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t up_to = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane >= step) up_to += other;
  }
  if (lane == kWarp - 1) sums[warp] = up_to;
  __syncthreads();
  int64_t before = up_to - x, all = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += sums[w];
    all += sums[w];
  }
  *whole = all;
  __syncthreads();
  return before;
}

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

// ---- the choice

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
  static __device__ __forceinline__ int64_t inclusive(int64_t x, int lane) {
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, x, step);
      if (lane >= step) x += other;
    }
    return x;
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
        const int64_t up_to = inclusive(mine, lane);
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
        int64_t now = used + inclusive(mine, lane) - mine;
        int64_t so_far = taken + inclusive(many, lane) - many;
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

const char* summarize_blocks_cuda(const SummarizeArgs& a, void* stream) {
  const int threads = (a.head_dim + kWarp - 1) / kWarp * kWarp;
  return message_of(with_type(a.dtype, [&](auto zero) {
    return launch(summarize_kernel<decltype(zero)>, a.blocks * a.kv_heads, threads, 0,
                  static_cast<cudaStream_t>(stream), a);
  }));
}

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
