// sink_window_attention on the GPU, for streams of few query rows: decode.
//
// Bound by memory: the rows of a KV head (7 to 16 of one query, usually) read each key and value
// once, 4 d bytes in 16 bits, for 4 d operations a row; 16 rows on tensor cores stay far below
// their rate. So a stream's visible keys are cut into runs (vico/decode.h) that fill the device,
// one block each: its warps take a share of the run, fetch 16 keys at a time into shared memory of
// their own by asynchronous 16-byte copies, one or two tiles ahead, and never wait for each other
// until the end. A block writes 4 d bytes a row; a second kernel combines the runs in order.
//
// Not bound by memory: float32 (plain multiplications), and many rows of one KV head, where each 16
// (8 in float32) read the keys again, from L2.

#include "cuda/attention.h"

#include "cuda/attention_pipeline.h"
#include "cuda/attention_tile.h"

namespace vico {
namespace {

__device__ __forceinline__ Rule rule_of(const DecodeArgs& p, int64_t stream) {
  const AttentionArgs& a = p.a;
  const int start = a.window_start == nullptr ? 0 : a.window_start[stream * a.start_stride];
  return {p.sink_tokens, p.window, start};
}

__device__ __forceinline__ shared::Rows rows_of(const AttentionArgs& a, int64_t stream) {
  return shared::rows_between(a.cu_seqlens_q[stream * a.cu_stride],
                              a.cu_seqlens_q[(stream + 1) * a.cu_stride], a.queries);
}

// The table of a group of heads among its stream's.
__device__ __forceinline__ int table_of(const DecodeArgs& p, int group) {
  return p.a.tables == 1 ? 0 : group;
}

// One block: a run of a stream's keys, the heads of one group, every row_tiles-th tile of rows.
// kWhole: see Pipeline.
template <typename T, int kHead, bool kWhole>
__global__ void __launch_bounds__(Plan<T, kHead>::kThreads, Plan<T, kHead>::kBlocks)
    split_kernel(const __grid_constant__ DecodeArgs p) {
  using P = Plan<T, kHead>;
  using Work = typename P::Work;
  constexpr int kRows = Work::kRows;
  VICO_DYNAMIC_SHARED(shared_memory);
  char* const memory = reinterpret_cast<char*>(shared_memory);
  const AttentionArgs& a = p.a;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int head_dim = kWhole ? kHead : a.head_dim;

  // Groups side by side: their keys are neighbours in memory. Divisions of 32 bits: those of 64
  // take as long as the reads that wait for them.
  unsigned block = blockIdx.x;
  const int group = static_cast<int>(block % static_cast<unsigned>(p.groups));
  block /= static_cast<unsigned>(p.groups);
  const int run = static_cast<int>(block % static_cast<unsigned>(p.runs));
  block /= static_cast<unsigned>(p.runs);
  const int first_tile = static_cast<int>(block % static_cast<unsigned>(p.row_tiles));
  const int64_t stream = block / static_cast<unsigned>(p.row_tiles);

  // What comes before the first keys is a chain of reads: whatever can be asked for now, is.
  const int x = table_of(p, group);
  const int32_t* table = a.page_table + stream * a.table_stream + x * a.table_head;
  TableScan<P::kThreads>::prefetch(a, table);
  const Rule rule = rule_of(p, stream);
  const shared::Rows stream_rows = rows_of(a, stream);
  int most = static_cast<int>(a.entries * a.page_size);
  if (a.kv_len != nullptr) most = min(most, max(a.kv_len[stream * a.len_stride], 0));
  // Run 0 goes on: it tells the combination how many keys there are. No `||`: it would wait for
  // the rows before it asks for the length.
  const bool beyond = run > 0 && run >= shared::most_runs(shared::granules_of(most));
  if ((stream_rows.count == 0) | beyond) return;
  const int queries = static_cast<int>(stream_rows.count);

  Cursor* const cursors = reinterpret_cast<Cursor*>(memory + P::kCursorsAt);
  if (threadIdx.x <= P::kWarps) cursors[threadIdx.x] = {static_cast<int>(a.entries), 0};
  const TableScan<P::kThreads> scan(a, table, reinterpret_cast<int*>(memory + P::kSumsAt));
  const int keys = min(scan.total, most);
  if (run == 0 && first_tile == 0 && threadIdx.x == 0 && (a.tables > 1 || group == 0))
    p.totals[stream * a.tables + x] = keys;

  const Visible visible = shared::visible_keys(rule, keys, queries);
  const int each = shared::granules_of_run(visible.granules);
  const int from = run * each * shared::kGranule;
  const int to = min((run + 1) * each, visible.granules) * shared::kGranule;
  if (from >= to) return;

  const int tiles = (to - from) / kTileKeys, per_warp = (tiles + P::kWarps - 1) / P::kWarps;
  const auto share = [&](int w) { return from + min(w * per_warp, tiles) * kTileKeys; };
  for (int w = 0; w < P::kWarps; ++w) scan.find(a, table, visible.key_at(share(w)), &cursors[w]);
  scan.find(a, table, visible.sinks + visible.hidden, &cursors[P::kWarps]);
  __syncthreads();

  const int64_t kv_head = group / (p.groups / static_cast<int>(a.kv_heads));
  Pipeline<T, kHead, kWhole> pipeline{
      p,
      table,
      visible,
      rule,
      keys,
      rule.lowest(keys - queries, keys),
      share(warp),
      share(warp + 1),
      static_cast<const T*>(a.k_pages) + kv_head * a.k_kv,
      static_cast<const T*>(a.v_pages) + kv_head * a.v_kv,
      lane,
      memory + warp * (P::kStages * 2 * P::kTileBytes),
      reinterpret_cast<RowAt<T>*>(memory + P::kRowsAt) + warp * kTileKeys,
      reinterpret_cast<int*>(memory + P::kEntriesAt) + warp * P::kStages * kTileKeys,
      cursors[warp],
      cursors[P::kWarps],
      Lanes(head_dim / (kChunk / static_cast<int>(sizeof(T))), lane),
      {}};
  ptx::keep(pipeline.k);
  ptx::keep(pipeline.v);
  const int32_t* shifts =
      a.page_shift == nullptr ? nullptr : a.page_shift + stream * a.shift_stream + x * a.shift_head;
  const int my_tiles = (pipeline.to - pipeline.from) / kTileKeys;
  const int rows = queries * p.per_group;

#pragma unroll 1
  for (int tile = first_tile; tile * kRows < rows; tile += p.row_tiles) {
    const RowTile row_tile{a,     stream_rows.start, tile * kRows, rows, p.per_group,
                           group, keys - queries,    p.pairs};
    // The keys first: the queries come while these are under way.
#pragma unroll 1
    for (int n = 0; n < P::kStages - 1; ++n) {
      pipeline.fetch(n, n);
      ptx::copy_async_commit();
    }
    Work work;
    work.start(row_tile, memory + P::kPipeline, memory + P::kWarpAt + warp * Work::kWarpBytes,
               head_dim, lane);
    // No row of the tile stands before or behind these: keys in between need no mask.
    const int first_position = keys - queries + tile * kRows / p.per_group;
    const int last_position =
        keys - queries + min(tile * kRows + kRows - 1, rows - 1) / p.per_group;
    int stage = 0, last_stage = P::kStages - 1;
#pragma unroll 1
    for (int n = 0; n < my_tiles; ++n) {
      ptx::copy_async_wait<P::kStages - 2>();
      __syncwarp();  // the copies of all lanes; and all are done with the stage before
      pipeline.fetch(n + P::kStages - 1, last_stage);
      ptx::copy_async_commit();
      if (shifts != nullptr) pipeline.turn(stage, shifts);
      const int j0 = visible.key_at(pipeline.from + n * kTileKeys);
      const bool all_seen = j0 + kTileKeys - 1 <= first_position &&
                            j0 > last_position - rule.window && j0 >= rule.window_start;
      work.fold(pipeline.tile(stage, 0), pipeline.tile(stage, 1), head_dim, rule, j0, all_seen,
                p.scale, lane);
      last_stage = stage;
      stage = stage + 1 < P::kStages ? stage + 1 : 0;
    }
    ptx::copy_async_wait<0>();
    __syncthreads();  // the results take the pipeline's place

    float* const sums = reinterpret_cast<float*>(memory);
    float2* const states = reinterpret_cast<float2*>(sums + P::kWarps * kRows * Work::kSumRow);
    work.finish(sums + warp * kRows * Work::kSumRow, states + warp * kRows, head_dim, lane);
    __syncthreads();
    const int quads = head_dim / 4;
    for (int i = threadIdx.x; i < kRows * quads; i += P::kThreads) {
      const int row = i / quads, c = i % quads;
      if (!row_tile.live(row)) continue;
      float top = kNothing;
#pragma unroll
      for (int w = 0; w < P::kWarps; ++w) top = fmaxf(top, states[w * kRows + row].x);
      float total = 0.0f;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < P::kWarps; ++w) {
        const float2 state = states[w * kRows + row];
        const float weight = ptx::exp2(state.x - above_nothing(top));
        const float4 part =
            *reinterpret_cast<const float4*>(sums + (w * kRows + row) * Work::kSumRow + 4 * c);
        total += weight * state.y;
        sum.x += weight * part.x, sum.y += weight * part.y;
        sum.z += weight * part.z, sum.w += weight * part.w;
      }
      const int64_t at = (row_tile.query(row) * a.heads + row_tile.head(row)) * p.runs + run;
      *reinterpret_cast<float4*>(p.partial + at * head_dim + 4 * c) = sum;
      if (c == 0) p.state[at] = make_float2(top, total);
    }
    __syncthreads();
  }
}

constexpr int kCombineWarps = 8;

// One block: one head of one row, its runs in order. Bound by latency.
template <typename T>
__global__ void __launch_bounds__(kCombineWarps* kWarp, 4)
    combine_kernel(const __grid_constant__ DecodeArgs p) {
  __shared__ float4 shared_sums[kCombineWarps][shared::kMaxHeadDim / 4];
  const AttentionArgs& a = p.a;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = blockIdx.x / a.heads;
  const int head = static_cast<int>(blockIdx.x % a.heads);

  int64_t stream = 0;  // the streams that end at or before the row
  for (int64_t first = 1; first <= a.streams; first += kWarp) {
    const int64_t s = first + lane;
    const bool ended = s <= a.streams && a.cu_seqlens_q[s * a.cu_stride] <= row;
    stream += __popc(__ballot_sync(kAllLanes, ended));
  }
  int used = 0;
  if (stream < a.streams) {  // else padding
    const int queries = static_cast<int>(rows_of(a, stream).count);
    if (queries > 0) {
      const int x = table_of(p, head / p.per_group);
      const int keys = p.totals[stream * a.tables + x];
      const Visible visible = shared::visible_keys(rule_of(p, stream), keys, queries);
      used = min(shared::runs_of(visible.granules), p.runs);
    }
  }

  const int64_t at = (row * a.heads + head) * p.runs;
  constexpr int kHalves = shared::kMaxRuns / kWarp;
  float2 state[kHalves];
  float top = kNothing;
#pragma unroll
  for (int i = 0; i < kHalves; ++i) {
    const int run = lane + kWarp * i;
    state[i] = run < used ? p.state[at + run] : make_float2(kNothing, 0.0f);
    top = fmaxf(top, state[i].x);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
  float weight[kHalves], total = 0.0f;
#pragma unroll
  for (int i = 0; i < kHalves; ++i) {
    weight[i] = ptx::exp2(state[i].x - above_nothing(top));
    total += weight[i] * state[i].y;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);

  constexpr int kQuads = shared::kMaxHeadDim / 4 / kWarp;
  float4 sum[kQuads];
#pragma unroll
  for (int n = 0; n < kQuads; ++n) sum[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int run = warp; run < used; run += kCombineWarps) {
    const float w = __shfl_sync(kAllLanes, run < kWarp ? weight[0] : weight[1], run % kWarp);
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      const int c = 4 * (lane + kWarp * n);
      if (c >= a.head_dim) continue;
      const float4 part = *reinterpret_cast<const float4*>(p.partial + (at + run) * a.head_dim + c);
      sum[n].x += w * part.x, sum[n].y += w * part.y;
      sum[n].z += w * part.z, sum[n].w += w * part.w;
    }
  }
#pragma unroll
  for (int n = 0; n < kQuads; ++n) shared_sums[warp][lane + kWarp * n] = sum[n];
  __syncthreads();

  float shrink = 1.0f;
  if (a.sink_logits != nullptr && total != 0.0f) {  // a row that saw no key stays as it is
    const float sink = a.sink_logits[head] * kLog2E;
    const float most = fmaxf(top, sink);
    shrink = ptx::exp2(top - above_nothing(most));
    total = total * shrink + ptx::exp2(sink - above_nothing(most));
    top = most;
  }
  const float factor = total == 0.0f ? 0.0f : shrink / total;
  if (4 * threadIdx.x < static_cast<unsigned>(a.head_dim)) {
    float4 all = shared_sums[0][threadIdx.x];
#pragma unroll
    for (int w = 1; w < kCombineWarps; ++w) {
      const float4 more = shared_sums[w][threadIdx.x];
      all.x += more.x, all.y += more.y, all.z += more.z, all.w += more.w;
    }
    T* const out = static_cast<T*>(a.out) + row * a.out_token + head * a.out_head + 4 * threadIdx.x;
    out[0] = from_float<T>(all.x * factor);
    out[1] = from_float<T>(all.y * factor);
    out[2] = from_float<T>(all.z * factor);
    out[3] = from_float<T>(all.w * factor);
  }
  if (a.lse != nullptr && threadIdx.x == 0)
    a.lse[row * a.lse_token + head * a.lse_head] =
        total == 0.0f ? kNothing : (top + log2f(total)) * kLn2;
}

int64_t clamped(int64_t x, int64_t most) { return x < most ? x : most; }

// Runs of a stream at most: by the table's length, and by the window where there is one.
int runs_at_most(const AttentionArgs& a) {
  const auto granules = [](int64_t keys) {
    return (keys + shared::kGranule - 1) / shared::kGranule;
  };
  const int64_t slots = a.entries * a.page_size;
  int64_t most = granules(slots);
  if (a.window < slots) {
    const int64_t sinks = granules(clamped(a.sink_tokens, slots));
    most = clamped(most, sinks + granules(a.window + a.queries) + 1);
  }
  return shared::most_runs(most);
}

bool rows_aligned(const AttentionArgs& a, int64_t bytes) {
  const int64_t strides[] = {a.k_page, a.k_slot, a.k_kv, a.v_page, a.v_slot, a.v_kv};
  for (const int64_t stride : strides)
    if (stride * bytes % kChunk != 0) return false;
  return reinterpret_cast<uintptr_t>(a.k_pages) % kChunk == 0 &&
         reinterpret_cast<uintptr_t>(a.v_pages) % kChunk == 0;
}

bool in_pairs(const AttentionArgs& a) {
  return a.q_token % 2 == 0 && a.q_head % 2 == 0 && reinterpret_cast<uintptr_t>(a.q) % 4 == 0;
}

template <typename T, int kHead>
cudaError_t launch_split(const DecodeArgs& p, cudaStream_t stream) {
  using P = Plan<T, kHead>;
  DecodeArgs q = p;
  const int64_t rows_hint = p.row_tiles;  // rows of the longest stream, until here
  q.row_tiles = static_cast<int>((rows_hint + P::Work::kRows - 1) / P::Work::kRows);
  const int64_t blocks = p.a.streams * q.row_tiles * p.runs * p.groups;
  if constexpr (!P::kWide) {  // float32 is not bound by memory
    if (p.aligned && p.a.head_dim == kHead)
      return launch(split_kernel<T, kHead, true>, blocks, P::kThreads, P::kShared, stream, q);
  }
  return launch(split_kernel<T, kHead, false>, blocks, P::kThreads, P::kShared, stream, q);
}

}  // namespace

int64_t attention_decode_workspace(const AttentionArgs& a) {
  const int64_t parts = a.queries * a.heads * runs_at_most(a);
  return parts * (a.head_dim + 2) + a.streams * a.tables;
}

const char* sink_window_attention_cuda(const AttentionArgs& a, void* workspace, int64_t rows_hint,
                                       void* stream) {
  // Positions are int32 on the device, and rows are counted a few tiles beyond the last.
  if (a.entries * a.page_size + a.queries + shared::kPositionSlack > shared::kMaxPosition ||
      a.queries * a.heads > shared::kMaxPosition / 2)
    return "the table reaches beyond 2^31 positions, or the rows are more than 2^30";
  const int64_t slots = a.entries * a.page_size;
  DecodeArgs p{};
  p.a = a;
  p.runs = runs_at_most(a);
  p.groups = static_cast<int>(a.tables > a.kv_heads ? a.tables : a.kv_heads);
  p.per_group = static_cast<int>(a.heads / p.groups);
  const int64_t parts = a.queries * a.heads * p.runs;
  p.partial = static_cast<float*>(workspace);
  p.state = reinterpret_cast<float2*>(p.partial + parts * a.head_dim);
  p.totals = reinterpret_cast<int32_t*>(p.state + parts);
  p.sink_tokens = static_cast<int>(clamped(a.sink_tokens, slots));
  p.window = static_cast<int>(clamped(a.window, shared::kMaxPosition - a.queries));
  p.scale = a.sm_scale * kLog2E;
  p.pairs = in_pairs(a);
  p.row_tiles = static_cast<int>(clamped(rows_hint < 1 ? 1 : rows_hint, a.queries) * p.per_group);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const cudaError_t status = with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    p.aligned = rows_aligned(a, sizeof(T));
    const cudaError_t split = a.head_dim <= 64    ? launch_split<T, 64>(p, on)
                              : a.head_dim <= 128 ? launch_split<T, 128>(p, on)
                                                  : launch_split<T, 256>(p, on);
    if (split != cudaSuccess) return split;
    return launch(combine_kernel<T>, a.queries * a.heads, kCombineWarps * kWarp, 0, on, p);
  });
  return message_of(status);
}

}  // namespace vico
