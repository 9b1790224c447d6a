// The arguments of the retrieval ops as plain data: what bindings fill in and both backends read.
#pragma once

#include <cstdint>

#include "vico/dtype.h"

namespace vico {

enum class Score : int { kDot = 0, kCosine = 1, kBound = 2 };
enum class Pool : int { kMean = 0, kMax = 1, kSoftmax = 2 };
enum class Scope : int { kStream = 0, kKvHead = 1, kQueryHead = 2 };
enum class Rule : int { kCount = 0, kRatio = 1, kMass = 2, kTokens = 3 };

// Norms below this count as this: a zero vector has cosine 0.
constexpr float kCosineEps = 1e-8f;

// Strides are in elements; the last dimension of keys, query and summaries is dense, index tensors
// and outputs are contiguous.
struct SummarizeArgs {
  const void* k_pages;         // [P, B, G, d]
  const int32_t* block_pages;  // [S * NB, M]
  const int32_t* page_fill;    // [P]
  float* first;                // mean [S * NB, G, d], or minima [S * NB, sub, G, d]
  float* second;               // maxima, or null
  int32_t* count;              // [S * NB] with the mean, else null
  int64_t pages, page_size, kv_heads, blocks, width, sub;
  int head_dim;
  DType dtype;
  int64_t k_page, k_slot, k_kv;
};

struct ScoreArgs {
  const void* query;          // [Q, H, d]
  const void* summary;        // [S, NB, G, d], or minima [S, NB, sub, G, d]
  const void* summary_max;    // maxima, or null
  const int32_t* count;       // [S, NB]: the summary is a sum of so many; or null
  const int32_t* cu_seqlens;  // [S + 1], or null: one token a stream
  const int32_t* num_blocks;  // [S] or null
  float* scores;              // [S, R, NB]
  int64_t tokens, heads, kv_heads, head_dim, streams, blocks, sub;
  DType query_dtype, summary_dtype;
  Score score;
  Pool pool;
  Scope scope;
  float sm_scale;
  int64_t q_token, q_head;
  int64_t sum_stream, sum_block, sum_sub, sum_kv;
  int64_t max_stream, max_block, max_sub, max_kv;
  int64_t count_stream;
};

struct SelectArgs {
  float* scores;                // [S, R, NB]; -inf is written beyond num_blocks
  const int32_t* num_blocks;    // [S] or null
  const int32_t* block_tokens;  // [S, NB] or null
  int32_t* index;               // [S, R, capacity]
  int32_t* chosen;              // [S, R]
  int64_t streams, rows, blocks, capacity;
  Rule rule;
  double amount;   // the share, for kRatio and kMass
  int64_t target;  // blocks for kCount, tokens for kTokens
  int64_t min_k, group, force_first, force_last;
};

struct PagesArgs {
  const int32_t* block_index;   // [S, R, K]
  const int32_t* block_pages;   // [S, NB, M]
  const int32_t* sink_pages;    // [S, Ms] or null
  const int32_t* recent_pages;  // [S, Mr] or null
  int32_t* page_table;          // [S, R, Ms + K * M + Mr]
  int64_t streams, rows, chosen, blocks, width, sinks, recent;
};

}  // namespace vico
