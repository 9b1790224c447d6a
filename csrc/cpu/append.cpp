// rope_append on the CPU: compiled once per instruction set (see CMakeLists.txt).
//
// Bound by memory: reads q, k, v once and writes q, K and V pages once (2 * N * (H + 2G) * d
// elements); the angles, d/2 sines a token, are shared by all its heads.

#include "vico/append.h"

#include "cpu/lanes.h"
#include "cpu/pack.h"
#include "cpu/rows.h"
#include "cpu/stream.h"
#include "vico/rotary.h"

namespace vico {
namespace VICO_ISA {
namespace {

struct Angles {  // read in whole vectors
  alignas(64) float cosine[kMaxHalfDim];
  alignas(64) float sine[kMaxHalfDim];
};

void angles_of(const AppendArgs& a, int64_t n, const double* turns_per_position, Angles* out) {
  double position[3];
  for (int axis = 0; axis < 3; ++axis)
    position[axis] = a.positions[axis * a.positions_axis + n * a.positions_token];
  const int half = a.head_dim / 2;
  const int bounds[4] = {0, a.t_section, a.t_section + a.h_section, half};
  for (int axis = 0; axis < 3; ++axis) {
#pragma omp simd
    for (int f = bounds[axis]; f < bounds[axis + 1]; ++f)
      sincos_turns(position[axis] * turns_per_position[f], &out->sine[f], &out->cosine[f]);
  }
}

// In registers, rounded once; `streamed` rows are whole vectors.
template <typename T, bool kStreamed>
void rotate_lanes(const T* row, const Angles& angles, T* out, int half) {
  using F = Lanes<kLanes>::F;
  const auto put = [&](T* at, F value, int left) {
    const auto packed = pack_lanes<T>(value);
    if constexpr (kStreamed) {
      stream(at, packed);
    } else if (left >= kLanes) {
      store(at, packed);
    } else {
      std::memcpy(at, &packed, left * sizeof(T));
    }
  };
  for (int f = 0; f < half; f += kLanes) {
    const int left = half - f;
    const F first = load_lanes(row + f, left), second = load_lanes(row + half + f, left);
    const F cosine = load<F>(angles.cosine + f), sine = load<F>(angles.sine + f);
    F low, high;
    rotate_pair(first, second, cosine, sine, &low, &high);
    put(out + f, low, left);
    put(out + half + f, high, left);
  }
}

template <typename T>
void rotate_row(const T* row, const Angles& angles, T* out, int half, bool streamed) {
  if (streamed && half % kLanes == 0 && can_stream(out, 2 * half * sizeof(T)))
    return rotate_lanes<T, true>(row, angles, out, half);
  rotate_lanes<T, false>(row, angles, out, half);
}

template <typename T>
void append_token(const AppendArgs& a, int64_t n, const double* turns_per_position, bool streamed) {
  const int d = a.head_dim, half = d / 2;
  Angles angles;
  angles_of(a, n, turns_per_position, &angles);

  const T* q = static_cast<const T*>(a.q) + n * a.q_token;
  T* q_out = static_cast<T*>(a.q_out) + n * a.q_out_token;
  for (int64_t h = 0; h < a.heads; ++h)
    rotate_row(q + h * a.q_head, angles, q_out + h * a.q_out_head, half, streamed);

  const int64_t slot = a.slots[n * a.slots_token];
  if (slot < 0 || slot >= a.pages * a.page_size) return;
  const int64_t page = slot / a.page_size, offset = slot % a.page_size;
  for (int64_t g = 0; g < a.kv_heads; ++g) {
    const T* k = static_cast<const T*>(a.k) + n * a.k_token + g * a.k_head;
    rotate_row(k, angles,
               static_cast<T*>(a.k_pages) + page * a.k_page + offset * a.k_slot + g * a.k_kv, half,
               false);
    const T* v = static_cast<const T*>(a.v) + n * a.v_token + g * a.v_head;
    std::memcpy(static_cast<T*>(a.v_pages) + page * a.v_page + offset * a.v_slot + g * a.v_kv, v,
                d * sizeof(T));
    if (a.raw_k_pages != nullptr)
      std::memcpy(
          static_cast<T*>(a.raw_k_pages) + page * a.raw_page + offset * a.raw_slot + g * a.raw_kv,
          k, d * sizeof(T));
  }
}

// One KV head's summaries, tokens in order: the order of the additions, and so the bits, do not
// depend on the number of threads or on how a block was cut into calls.
template <typename T>
void summarize_head(const AppendArgs& a, int64_t g) {
  const int d = a.head_dim;
  alignas(64) float key[kMaxHeadDim];
  for (int64_t n = 0; n < a.tokens; ++n) {
    const int64_t slot = a.slots[n * a.slots_token];
    if (slot < 0 || slot >= a.pages * a.page_size) continue;
    const int64_t page = slot / a.page_size, offset = slot % a.page_size;
    const int64_t block = a.block_of_page[page];
    if (block < 0 || block >= a.blocks) continue;
    const T* stored = a.summary_raw ? static_cast<const T*>(a.k) + n * a.k_token + g * a.k_head
                                    : static_cast<const T*>(a.k_pages) + page * a.k_page +
                                          offset * a.k_slot + g * a.k_kv;
    load_row(stored, key, d);
    if (a.sum != nullptr) {
      float* sum = a.sum + block * a.sum_block + g * a.sum_kv;
#pragma omp simd
      for (int i = 0; i < d; ++i) sum[i] += key[i];
      if (g == 0) a.count[block] += 1;
    }
    if (a.kmin != nullptr) {
      const int64_t part = offset * a.sub / a.page_size;
      float* low = a.kmin + block * a.min_block + part * a.min_sub + g * a.min_kv;
      float* high = a.kmax + block * a.max_block + part * a.max_sub + g * a.max_kv;
#pragma omp simd
      for (int i = 0; i < d; ++i) {
        low[i] = bound_min(low[i], key[i]);
        high[i] = bound_max(high[i], key[i]);
      }
    }
  }
}

template <typename T>
void append(const AppendArgs& a, int n_threads) {
  double turns_per_position[kMaxHalfDim];
  for (int f = 0; f < a.head_dim / 2; ++f)
    turns_per_position[f] = static_cast<double>(a.inv_freq[f]) * kInvTwoPi;
  const bool streamed =
      a.tokens * a.heads * a.head_dim * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;
#pragma omp parallel num_threads(n_threads) if (a.tokens > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < a.tokens; ++n) append_token<T>(a, n, turns_per_position, streamed);
    end_stream();
  }
  if (a.block_of_page == nullptr) return;
#pragma omp parallel for num_threads(n_threads) schedule(static) if (a.tokens > 1)
  for (int64_t g = 0; g < a.kv_heads; ++g) summarize_head<T>(a, g);
}

}  // namespace

void rope_append(const AppendArgs& a, int n_threads) {
  switch (a.dtype) {
    case DType::kFloat32:
      return append<float>(a, n_threads);
    case DType::kFloat16:
      return append<Half>(a, n_threads);
    case DType::kBFloat16:
      return append<BFloat16>(a, n_threads);
  }
}

}  // namespace VICO_ISA
}  // namespace vico
