// The arguments of the attention ops as plain data: what bindings fill in and the backends read.
#pragma once

#include <cstdint>

#include "vico/dtype.h"

namespace vico {

// sink_window_attention. Strides are in elements; the last dimension of q, out and the pages is
// dense. X tables a stream: 1 (shared), one a KV head, or one a query head.
struct AttentionArgs {
  const void* q;                // [Q, H, d]
  const void* k_pages;          // [P, B, G, d]
  const void* v_pages;          // [P, B, G, d]
  const int32_t* page_table;    // [S, X, L]
  const int32_t* cu_seqlens_q;  // [S+1]
  const int32_t* kv_len;        // [S] or null
  const int32_t* page_fill;     // [P], given where kv_len is not
  const int32_t* window_start;  // [S] or null
  const float* sink_logits;     // [H] or null
  const int32_t* page_shift;    // [S, X, L, 3] or null
  const float* inv_freq;        // [d/2], given where page_shift is
  void* out;                    // [Q, H, d]
  float* lse;                   // [Q, H] or null

  int64_t queries, heads, kv_heads, pages, page_size, streams, tables, entries;
  int64_t sink_tokens, window;  // window: INT64_MAX where there is none
  float sm_scale;
  int head_dim;
  int t_section, h_section;  // frequencies of the first two M-RoPE axes; plain RoPE: d/2, 0
  DType dtype;               // of q, out and the pages

  int64_t q_token, q_head, out_token, out_head, lse_token, lse_head;
  int64_t k_page, k_slot, k_kv, v_page, v_slot, v_kv;
  int64_t table_stream, table_head, table_entry;
  int64_t shift_stream, shift_head, shift_entry, shift_axis;
  int64_t cu_stride, len_stride, fill_stride, start_stride;
};

// varlen_attention: W windows, each query of one sees all keys of the same one.
struct VarlenArgs {
  const void* q;                // [Nq, H, d]
  const void* k;                // [Nk, H, d]
  const void* v;                // [Nk, H, d]
  const int32_t* cu_seqlens_q;  // [W+1]
  const int32_t* cu_seqlens_k;  // [W+1]
  void* out;                    // [Nq, H, d]

  int64_t queries, keys, heads, windows;
  float sm_scale;
  int head_dim;
  DType dtype;

  int64_t q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head;
  int64_t cu_q_stride, cu_k_stride;
};

// merge_states: everything dense.
struct MergeArgs {
  const void* out_a;   // [Q, H, d]
  const float* lse_a;  // [Q, H]
  const void* out_b;
  const float* lse_b;
  void* out;
  float* lse;
  int64_t rows;  // Q * H
  int head_dim;
  DType dtype;
};

}  // namespace vico
