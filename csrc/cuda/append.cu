// rope_append on the GPU.
//
// Bound by memory: 2 * N * (H + 2G) * d elements move, a handful of operations each. So: 16-byte
// accesses, the d/2 angles computed once a token into shared memory (one fp64 product each) and
// shared by all heads of the token, K and V straight to their pages.

#include "cuda/append.h"

#include "cuda/launch.h"
#include "cuda/warp.h"
#include "vico/rotary.h"

namespace vico {
namespace {

constexpr int kThreads = 128;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T x[kWidth];
};

template <typename T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> load(const T* p) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(p);
}

template <typename T, int kWidth>
__device__ __forceinline__ void store(T* p, const Vector<T, kWidth>& v) {
  *reinterpret_cast<Vector<T, kWidth>*>(p) = v;
}

// Rotates one vector of channels and its partner half a head away. Its i-th angle is
// angle[i * apart].
template <typename T, int kWidth>
__device__ __forceinline__ void rotate(const T* row, T* out, int f, int half, const float2* angle,
                                       int apart, T* raw_out) {
  const Vector<T, kWidth> first = load<T, kWidth>(row + f);
  const Vector<T, kWidth> second = load<T, kWidth>(row + f + half);
  Vector<T, kWidth> out_first, out_second;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    float a, b;
    const float2 by = angle[i * apart];
    shared::rotate_pair(to_float(first.x[i]), to_float(second.x[i]), by.x, by.y, &a, &b);
    out_first.x[i] = from_float<T>(a);
    out_second.x[i] = from_float<T>(b);
  }
  store<T, kWidth>(out + f, out_first);
  store<T, kWidth>(out + f + half, out_second);
  if (raw_out != nullptr) {
    store<T, kWidth>(raw_out + f, first);
    store<T, kWidth>(raw_out + f + half, second);
  }
}

// One block a token.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(const AppendArgs a) {
  __shared__ float2 angle[shared::kMaxHalfDim];  // (cosine, sine)
  const int64_t n = blockIdx.x;
  const int half = a.head_dim / 2, pairs = half / kWidth;
  for (int f = threadIdx.x; f < half; f += kThreads) {
    const int axis = shared::rotary_axis(f, a.t_section, a.h_section);
    const double position = a.positions[axis * a.positions_axis + n * a.positions_token];
    float sine, cosine;
    shared::sincos_turns(position * (static_cast<double>(a.inv_freq[f]) * shared::kInvTwoPi), &sine,
                         &cosine);
    // First those of all vectors' first channels: what lanes read together lies in other banks.
    angle[f % kWidth * pairs + f / kWidth] = make_float2(cosine, sine);
  }
  const int64_t slot = a.slots[n * a.slots_token];
  const bool written = slot >= 0 && slot < a.pages * a.page_size;
  const int64_t page = written ? slot / a.page_size : 0;
  const int64_t offset = written ? slot - page * a.page_size : 0;
  __syncthreads();

  // Work items: pairs of vectors of q heads, then of k heads, then of v heads.
  const int q_items = static_cast<int>(a.heads) * pairs;
  const int k_items = written ? static_cast<int>(a.kv_heads) * pairs : 0;
  for (int item = threadIdx.x; item < q_items + 2 * k_items; item += kThreads) {
    if (item < q_items) {
      const int h = item / pairs, pair = item - h * pairs;
      rotate<T, kWidth>(static_cast<const T*>(a.q) + n * a.q_token + h * a.q_head,
                        static_cast<T*>(a.q_out) + n * a.q_out_token + h * a.q_out_head,
                        pair * kWidth, half, angle + pair, pairs, nullptr);
    } else if (item < q_items + k_items) {
      const int rest = item - q_items, g = rest / pairs, pair = rest - g * pairs;
      T* raw = a.raw_k_pages == nullptr ? nullptr
                                        : static_cast<T*>(a.raw_k_pages) + page * a.raw_page +
                                              offset * a.raw_slot + g * a.raw_kv;
      rotate<T, kWidth>(
          static_cast<const T*>(a.k) + n * a.k_token + g * a.k_head,
          static_cast<T*>(a.k_pages) + page * a.k_page + offset * a.k_slot + g * a.k_kv,
          pair * kWidth, half, angle + pair, pairs, raw);
    } else {
      const int rest = item - q_items - k_items, g = rest / pairs, f = (rest - g * pairs) * kWidth;
      const T* v = static_cast<const T*>(a.v) + n * a.v_token + g * a.v_head;
      T* out = static_cast<T*>(a.v_pages) + page * a.v_page + offset * a.v_slot + g * a.v_kv;
      store<T, kWidth>(out + f, load<T, kWidth>(v + f));
      store<T, kWidth>(out + f + half, load<T, kWidth>(v + f + half));
    }
  }
}

// Where a token was written, and the summary row of its block; block -1: none.
struct Place {
  int page, offset, block;
};

// Reads something even where there is nothing: a branch would let no other place's reads begin. So
// the call must have tokens, and the pool pages.
__device__ __forceinline__ Place place_of_token(const AppendArgs& a, int64_t n) {
  const bool there = n >= 0 && n < a.tokens;
  const int32_t slot = a.slots[(there ? n : 0) * a.slots_token];
  const bool written = there & (slot >= 0) & (slot < a.pages * a.page_size);
  // Slots have 31 bits: a division of 64 takes as long as the read that it is for.
  const unsigned size = static_cast<unsigned>(min(a.page_size, int64_t{0x80000000}));
  const unsigned at = written ? static_cast<unsigned>(slot) : 0;
  const int page = static_cast<int>(at / size);
  const int block = a.block_of_page[page];
  const bool listed = written & (block >= 0) & (block < a.blocks);
  return {page, static_cast<int>(at % size), listed ? block : -1};
}

constexpr int kSummaryWarps = 4;
constexpr int kScan = 4;  // tiles of 32 tokens whose places are read together

// The bounds of one part of a block, in registers until the tokens leave the part.
struct Bounds {
  const AppendArgs& a;
  int64_t block, g;
  int channel;
  int part = -1;
  float low = 0.0f, high = 0.0f;

  __device__ __forceinline__ float* low_at() const {
    return a.kmin + block * a.min_block + part * a.min_sub + g * a.min_kv + channel;
  }
  __device__ __forceinline__ float* high_at() const {
    return a.kmax + block * a.max_block + part * a.max_sub + g * a.max_kv + channel;
  }
  __device__ __forceinline__ void leave() const {
    if (part < 0) return;
    *low_at() = low;
    *high_at() = high;
  }
  __device__ __forceinline__ void take(int of_part, float key) {
    if (of_part != part) {
      leave();
      part = of_part;
      low = *low_at();
      high = *high_at();
    }
    low = bound_min(low, key);
    high = bound_max(high, key);
  }
};

// Whether a token before `first` is one of the block.
__device__ __forceinline__ bool seen_before(const AppendArgs& a, int64_t first, int block,
                                            int lane) {
  for (int64_t stop = first; stop > 0; stop -= kScan * kWarp) {
    bool seen = false;
#pragma unroll
    for (int i = 0; i < kScan; ++i)
      seen |= place_of_token(a, stop - 1 - i * kWarp - lane).block == block;
    if (__any_sync(kAllLanes, seen)) return true;
  }
  return false;
}

// Adds the keys of those of 32 tokens that `same` names to a channel's sum and bounds, in order;
// `n` is the lane's token. `keys` has the channel, and the head.
template <typename T>
__device__ __forceinline__ void fold(const AppendArgs& a, const T* keys, bool active, int64_t n,
                                     int lane, unsigned same, float* sum, Bounds* bounds) {
  const int64_t stride = a.summary_raw ? a.k_token : a.k_slot;
  const Place place = place_of_token(a, n);
  const int64_t mine =
      a.summary_raw ? n * a.k_token : place.page * a.k_page + place.offset * a.k_slot;
  const int my_part = a.kmin == nullptr ? 0 : static_cast<int>(place.offset * a.sub / a.page_size);
  while (same != 0) {
    // Keys that stand one after another: one address for all.
    const int leader = __ffs(same) - 1;
    const int64_t at = __shfl_sync(kAllLanes, mine, leader);
    const bool follows = mine == at + (lane - leader) * stride;
    const unsigned row = (__ballot_sync(kAllLanes, follows) & same) >> leader;
    const int run = row == kAllLanes ? kWarp : __ffs(~row) - 1;
    same &= run == kWarp ? 0 : ~(((1u << run) - 1) << leader);
    const T* const from = keys + at;
    const int reads = active ? run : 0;
    float key[kWarp];  // all reads are under way together
#pragma unroll
    for (int i = 0; i < kWarp; ++i) key[i] = i < reads ? to_float(from[i * stride]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kWarp; ++i) *sum = i < run ? *sum + key[i] : *sum;
    if (a.kmin == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kWarp; ++i) {
      if (i >= run) break;
      const int part = __shfl_sync(kAllLanes, my_part, leader + i);
      if (active) bounds->take(part, key[i]);
    }
  }
}

// The whole update of a block whose first token is among the 32 from `first` on: tokens in order,
// so there is one writer and one order of additions. It reads each stored key of the call once,
// many at a time: their reads are what it waits for.
template <typename T>
__device__ __forceinline__ void summarize(const AppendArgs& a, int64_t first, int block, int64_t g,
                                          int channel, int lane) {
  const bool active = channel < a.head_dim;
  float sum = 0.0f;
  int count = 0;
  float* sum_out = nullptr;
  if (a.sum != nullptr && active) {
    sum_out = a.sum + block * a.sum_block + g * a.sum_kv + channel;
    sum = *sum_out;
  }
  Bounds bounds{a, block, g, channel};
  const T* const keys = a.summary_raw ? static_cast<const T*>(a.k) + g * a.k_head + channel
                                      : static_cast<const T*>(a.k_pages) + g * a.k_kv + channel;
  for (int64_t start = first; start < a.tokens; start += kScan * kWarp) {
    unsigned of_block[kScan], any = 0;
#pragma unroll
    for (int i = 0; i < kScan; ++i) {
      const Place place = place_of_token(a, start + i * kWarp + lane);
      of_block[i] = __ballot_sync(kAllLanes, place.block == block);
      any |= of_block[i];
    }
    if (any == 0) continue;
#pragma unroll 1
    for (int tile = 0; tile < kScan; ++tile) {
      unsigned same = of_block[0];
#pragma unroll
      for (int i = 1; i < kScan; ++i) same = tile == i ? of_block[i] : same;
      if (same == 0) continue;
      count += __popc(same);
      fold(a, keys, active, start + tile * kWarp + lane, lane, same, &sum, &bounds);
    }
  }
  if (sum_out != nullptr) *sum_out = sum;
  if (active) bounds.leave();
  if (a.count != nullptr && g == 0 && channel == 0) a.count[block] += count;
}

// One warp per (32 tokens, KV head, 32 channels): it updates the blocks whose first token of the
// call is among its own. Most have none: the tokens before theirs are of the same block.
template <typename T>
__global__ void __launch_bounds__(kSummaryWarps* kWarp, 4) summarize_kernel(const AppendArgs a) {
  const int64_t pieces = (a.head_dim + kWarp - 1) / kWarp, warps = a.kv_heads * pieces;
  const int64_t item = int64_t{blockIdx.x} * kSummaryWarps + threadIdx.x / kWarp;
  const int64_t first = item / warps * kWarp, g = item % warps / pieces;
  if (first >= a.tokens) return;
  const int lane = threadIdx.x % kWarp;
  const int channel = static_cast<int>(item % pieces) * kWarp + lane;
  const int mine = place_of_token(a, first + lane).block;
  unsigned left = __ballot_sync(kAllLanes, mine >= 0);
#pragma unroll 1
  while (left != 0) {
    const int block = __shfl_sync(kAllLanes, mine, __ffs(left) - 1);
    left &= ~__ballot_sync(kAllLanes, mine == block);
    if (!seen_before(a, first, block, lane)) summarize<T>(a, first, block, g, channel, lane);
  }
}

bool aligned(const AppendArgs& a, int64_t width, int64_t bytes) {
  const int64_t strides[] = {a.q_token,  a.q_head, a.k_token,     a.k_head,     a.v_token,
                             a.v_head,   a.k_page, a.k_slot,      a.k_kv,       a.v_page,
                             a.v_slot,   a.v_kv,   a.q_out_token, a.q_out_head, a.raw_page,
                             a.raw_slot, a.raw_kv};
  for (int64_t stride : strides)
    if (stride % width != 0) return false;
  const void* pointers[] = {a.q, a.k, a.v, a.q_out, a.k_pages, a.v_pages, a.raw_k_pages};
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % (width * bytes) != 0) return false;
  return (a.head_dim / 2) % width == 0;
}

template <typename T>
cudaError_t append(const AppendArgs& a, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const auto kernel = aligned(a, kWide, sizeof(T))            ? rope_append_kernel<T, kWide>
                      : kWide > 4 && aligned(a, 4, sizeof(T)) ? rope_append_kernel<T, 4>
                                                              : rope_append_kernel<T, 1>;
  const cudaError_t status = launch(kernel, a.tokens, kThreads, 0, stream, a);
  if (status != cudaSuccess || a.block_of_page == nullptr) return status;
  if (a.tokens == 0 || a.pages * a.page_size == 0) return status;
  const int64_t pieces = (a.head_dim + kWarp - 1) / kWarp;
  const int64_t warps = (a.tokens + kWarp - 1) / kWarp * a.kv_heads * pieces;
  return launch(summarize_kernel<T>, (warps + kSummaryWarps - 1) / kSummaryWarps,
                kSummaryWarps * kWarp, 0, stream, a);
}

}  // namespace

const char* rope_append_cuda(const AppendArgs& args, void* stream) {
  return message_of(with_type(args.dtype, [&](auto zero) {
    return append<decltype(zero)>(args, static_cast<cudaStream_t>(stream));
  }));
}

}  // namespace vico
