// The choice of topk_blocks on the GPU, and with it the page list of topk_pages.
//
// Bound by latency up to some ten thousand blocks: one block of threads a row, whose keys stay in
// shared memory (cuda/retrieve_selection.h). With more, others look for where the best of them are
// first (cuda/retrieve_large.h); where that is no help (many are chosen, or as many as fit into a
// budget) one makes the keys anew in each pass. Whoever has chosen a row's blocks lists their
// pages, in the shared memory that held the keys.

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/retrieve.h"
#include "cuda/retrieve_large.h"
#include "cuda/retrieve_pages.h"
#include "cuda/retrieve_selection.h"
#include "cuda/warp.h"

namespace vico {
namespace {

constexpr int64_t kCached = 20000;  // keys in shared memory

Levels levels_of(const SelectArgs& a) {
  return (a.blocks + a.group - 1) / a.group > kCached ? Levels(a) : Levels();
}

// The pages of the chosen blocks, where they are listed too.
struct Listing {
  PagesArgs a;
  TableSize size;
  bool wanted;
};

// One block of threads: one row, of whose units kLarge finds those that matter by their maxima.
template <bool kLarge>
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ SelectArgs a, const __grid_constant__ Levels levels,
                  bool cached, const __grid_constant__ Listing listing) {
  __shared__ SelectShared shared;
  VICO_DYNAMIC_SHARED(dynamic);
  const int64_t row = blockIdx.x;
  Selection<kLarge> selection(a, shared, row);
  const int n = selection.n, units = selection.units;
  if (!kLarge) {
    for (int64_t b = n + threadIdx.x; b < a.blocks; b += kSelectThreads)
      selection.scores[b] = -kInfinity;
    if (cached) selection.keep_keys(reinterpret_cast<uint32_t*>(dynamic));
  }

  int64_t wanted;
  if (a.rule == Rule::kCount)
    wanted = a.target / a.group;
  else if (a.rule == Rule::kRatio)
    wanted = static_cast<int64_t>(floor(static_cast<double>(n) * a.amount)) / a.group;
  else
    wanted = kLarge ? 0 : selection.within_tokens();  // budgets have no maxima
  const int forced =
      selection.forced_first + units - max(selection.forced_first, selection.forced_last);
  wanted = max(max(selection.units_for(a.min_k), int64_t{forced}), wanted);
  const int target = static_cast<int>(min(min(wanted, a.capacity / a.group), int64_t{units}));

  int32_t* const out = a.index + row * a.capacity;
  int64_t found = 0;
  if (target > 0) {
    Cut cut;
    if constexpr (kLarge)
      cut = narrow(selection, levels, row, target, reinterpret_cast<uint32_t*>(dynamic));
    else
      cut = selection.cut(target);
    found = selection.list(cut, out, true) * a.group;
    if (shared.last_listed != 0) found -= units * a.group - n;  // it may be short
  }
  for (int64_t i = found + threadIdx.x; i < a.capacity; i += kSelectThreads) out[i] = -1;
  if (threadIdx.x == 0) a.chosen[row] = static_cast<int32_t>(found);
  if (!listing.wanted) return;
  __syncthreads();  // the row's blocks are written, its keys no longer read
  list_pages<kSelectThreads>(listing.a, row, reinterpret_cast<int32_t*>(dynamic), listing.size,
                             shared.small_sums);
}

cudaError_t choose(const SelectArgs& a, const Listing& listing, void* workspace,
                   cudaStream_t stream) {
  const int64_t rows = a.streams * a.rows, units = (a.blocks + a.group - 1) / a.group;
  const int64_t word = sizeof(uint32_t), table = listing.wanted ? listing.size.bytes() : 0;
  Levels levels = levels_of(a);
  levels.maxima = static_cast<uint32_t*>(workspace);
  const bool cached = units <= kCached;
  const int64_t keys = levels.bits > 0 ? kRoom * word : cached ? padded(units) * word : 0;
  const int64_t shared = keys < table ? table : keys;
  if (levels.bits == 0)
    return launch(select_kernel<false>, rows, kSelectThreads, shared, stream, a, levels, cached,
                  listing);
  const cudaError_t status =
      launch(maxima_kernel, rows * levels.launched, kMaximaThreads, 0, stream, a, levels);
  if (status != cudaSuccess) return status;
  return launch(select_kernel<true>, rows, kSelectThreads, shared, stream, a, levels, false,
                listing);
}

}  // namespace

int64_t select_blocks_workspace(const SelectArgs& a) {
  const Levels levels = levels_of(a);
  return levels.bits > 0 ? a.streams * a.rows * levels.row_words() * int64_t{sizeof(uint32_t)} : 0;
}

const char* select_blocks_cuda(const SelectArgs& a, void* workspace, void* stream) {
  if (a.rule == Rule::kMass) return "cumulative mass is not served";
  const Listing none{{}, TableSize(0), false};
  return message_of(choose(a, none, workspace, static_cast<cudaStream_t>(stream)));
}

int64_t select_block_pages_workspace(const SelectArgs& a, const PagesArgs& pages) {
  return select_blocks_workspace(a) + select_pages_workspace(pages);
}

const char* select_block_pages_cuda(const SelectArgs& a, const PagesArgs& pages, void* workspace,
                                    void* stream) {
  if (a.rule == Rule::kMass) return "cumulative mass is not served";
  const int64_t length = length_of(pages);
  const TableSize size(length);
  if (size.shared() && length > 0) {
    const Listing listing{pages, size, true};
    return message_of(choose(a, listing, workspace, static_cast<cudaStream_t>(stream)));
  }
  // Thousands of pages a row: their table lies in global memory, and a launch of its own costs
  // little beside filling it.
  const char* const error = select_blocks_cuda(a, workspace, stream);
  if (error != nullptr) return error;
  return select_pages_cuda(pages, static_cast<char*>(workspace) + select_blocks_workspace(a),
                           stream);
}

}  // namespace vico
