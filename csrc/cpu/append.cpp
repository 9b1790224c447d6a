// rope_append on the CPU: compiled once per instruction set (see CMakeLists.txt).
//
// Bound by memory: reads q, k, v once and writes q, K and V pages once (2 * N * (H + 2G) * d
// elements); the angles, d/2 sines a token, are shared by all its heads.

#include "vico/append.h"

#include "cpu/rows.h"
#include "vico/rotary.h"

namespace vico {
namespace VICO_ISA {
namespace {

struct Angles {
  float cosine[kMaxHalfDim];
  float sine[kMaxHalfDim];
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

void rotate_row(const float* row, const Angles& angles, float* out, int half) {
#pragma omp simd
  for (int f = 0; f < half; ++f)
    rotate_pair(row[f], row[f + half], angles.cosine[f], angles.sine[f], &out[f], &out[f + half]);
}

template <typename T>
void append_token(const AppendArgs& a, int64_t n, const double* turns_per_position) {
  const int d = a.head_dim, half = d / 2;
  alignas(64) float row[kMaxHeadDim], rotated[kMaxHeadDim];
  Angles angles;
  angles_of(a, n, turns_per_position, &angles);

  const T* q = static_cast<const T*>(a.q) + n * a.q_token;
  T* q_out = static_cast<T*>(a.q_out) + n * a.q_out_token;
  for (int64_t h = 0; h < a.heads; ++h) {
    load_row(q + h * a.q_head, row, d);
    rotate_row(row, angles, rotated, half);
    store_row(rotated, q_out + h * a.q_out_head, d);
  }

  const int64_t slot = a.slots[n * a.slots_token];
  if (slot < 0 || slot >= a.pages * a.page_size) return;
  const int64_t page = slot / a.page_size, offset = slot % a.page_size;
  for (int64_t g = 0; g < a.kv_heads; ++g) {
    const T* k = static_cast<const T*>(a.k) + n * a.k_token + g * a.k_head;
    load_row(k, row, d);
    rotate_row(row, angles, rotated, half);
    store_row(rotated,
              static_cast<T*>(a.k_pages) + page * a.k_page + offset * a.k_slot + g * a.k_kv, d);
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
#pragma omp parallel for num_threads(n_threads) schedule(static) if (a.tokens > 1)
  for (int64_t n = 0; n < a.tokens; ++n) append_token<T>(a, n, turns_per_position);
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
