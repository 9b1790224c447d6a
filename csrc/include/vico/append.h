// The arguments of rope_append as plain data: what bindings fill in and both backends read.
#pragma once

#include <cstdint>

#include "vico/dtype.h"

namespace vico {

// Strides are in elements; the last dimension of every tensor is dense.
struct AppendArgs {
  const void* q;                 // [N, H, d]
  const void* k;                 // [N, G, d]
  const void* v;                 // [N, G, d]
  const int32_t* positions;      // [3, N]
  const float* inv_freq;         // [d/2]
  const int32_t* slots;          // [N]
  const int32_t* block_of_page;  // [P] or null
  void* q_out;                   // [N, H, d]
  void* k_pages;                 // [P, B, G, d]
  void* v_pages;                 // [P, B, G, d]
  void* raw_k_pages;             // [P, B, G, d] or null
  float* sum;                    // [NB, G, d] or null
  int32_t* count;                // [NB] or null
  float* kmin;                   // [NB, sub, G, d] or null
  float* kmax;                   // [NB, sub, G, d] or null

  int64_t tokens, heads, kv_heads, pages, page_size, blocks, sub;
  int head_dim;
  int t_section, h_section;  // frequencies of the first two M-RoPE axes; plain RoPE: d/2, 0
  DType dtype;               // of q, k, v, q_out and the pages
  bool summary_raw;          // the summaries take keys as in raw_k_pages

  int64_t q_token, q_head, k_token, k_head, v_token, v_head, q_out_token, q_out_head;
  int64_t positions_axis, positions_token, slots_token;
  int64_t k_page, k_slot, k_kv, v_page, v_slot, v_kv, raw_page, raw_slot, raw_kv;
  int64_t sum_block, sum_kv;
  int64_t min_block, min_sub, min_kv, max_block, max_sub, max_kv;
};

// Elementwise bounds that keep a NaN once they met one, like torch.minimum and torch.maximum.
#if defined(__CUDACC__)
#define VICO_BOUND __host__ __device__ __forceinline__
#else
#define VICO_BOUND static inline
#endif
VICO_BOUND float bound_min(float kept, float x) { return (x < kept || x != x) ? x : kept; }
VICO_BOUND float bound_max(float kept, float x) { return (x > kept || x != x) ? x : kept; }
#undef VICO_BOUND

}  // namespace vico
