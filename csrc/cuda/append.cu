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

__device__ __forceinline__ Place place_of_token(const AppendArgs& a, int64_t n) {
  Place at{0, 0, -1};
  if (n < 0 || n >= a.tokens) return at;
  const int32_t slot = a.slots[n * a.slots_token];
  if (slot < 0 || slot >= a.pages * a.page_size) return at;
  // Slots have 31 bits: a division of 64 takes as long as the read that it is for.
  const unsigned size = static_cast<unsigned>(min(a.page_size, int64_t{0x80000000}));
  at.page = static_cast<int>(static_cast<unsigned>(slot) / size);
  at.offset = static_cast<int>(static_cast<unsigned>(slot) % size);
  const int block = a.block_of_page[at.page];
  if (block >= 0 && block < a.blocks) at.block = block;
  return at;
}

constexpr int kSummaryWarps = 4;
constexpr int kAhead = 16;  // keys whose reads are under way together

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

// One warp per (token, KV head, 32 channels); the warp of a block's first token does that block's
// whole update, tokens in order, so there is one writer and one order of additions. It reads each
// stored key of the call once, many at a time: their reads are what it waits for. Most others find
// their block among the 32 tokens before.
template <typename T>
__global__ void __launch_bounds__(kSummaryWarps* kWarp, 5) summarize_kernel(const AppendArgs a) {
  const int64_t pieces = (a.head_dim + kWarp - 1) / kWarp, warps = a.kv_heads * pieces;
  const int64_t item = int64_t{blockIdx.x} * kSummaryWarps + threadIdx.x / kWarp;
  const int64_t n = item / warps, g = item % warps / pieces;
  const int lane = threadIdx.x % kWarp;
  const int channel = static_cast<int>(item % pieces) * kWarp + lane;
  const bool active = channel < a.head_dim;
  const int block = place_of_token(a, n).block;
  if (block < 0) return;
  for (int64_t stop = n; stop > 0; stop -= kWarp)
    if (__any_sync(kAllLanes, place_of_token(a, stop - 1 - lane).block == block)) return;

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
  Place next = place_of_token(a, n + lane);
  for (int64_t start = n; start < a.tokens; start += kWarp) {
    const Place place = next;
    next = place_of_token(a, start + kWarp + lane);
    const int64_t mine = a.summary_raw ? (start + lane) * a.k_token
                                       : place.page * a.k_page + place.offset * a.k_slot;
    const int my_part =
        a.kmin == nullptr ? 0 : static_cast<int>(place.offset * a.sub / a.page_size);
    unsigned same = __ballot_sync(kAllLanes, place.block == block);
    count += __popc(same);
    while (same != 0) {
      float key[kAhead];
      unsigned left = same;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = __shfl_sync(kAllLanes, mine, left == 0 ? 0 : __ffs(left) - 1);
        key[i] = left != 0 && active ? to_float(keys[at]) : 0.0f;
        left &= left - 1;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (same == 0) break;
        const int part = __shfl_sync(kAllLanes, my_part, __ffs(same) - 1);
        same &= same - 1;
        sum += key[i];
        if (a.kmin != nullptr && active) bounds.take(part, key[i]);
      }
    }
  }
  if (sum_out != nullptr) *sum_out = sum;
  if (active) bounds.leave();
  if (a.count != nullptr && g == 0 && channel == 0) a.count[block] += count;
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
  const int64_t pieces = (a.head_dim + kWarp - 1) / kWarp;
  const int64_t warps = a.tokens * a.kv_heads * pieces;
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
