// Host-side entry points of the CUDA retrieval kernels; free of CUDA headers, as bindings are. Each
// launches on `stream` (a cudaStream_t) of the current device and gives null, or what CUDA said.
#pragma once

#include <cstdint>

#include "vico/retrieve.h"

namespace vico {

const char* summarize_blocks_cuda(const SummarizeArgs& args, void* stream);

// Floats that score_blocks_cuda needs beside its arguments; 0: none. Pool::kSoftmax is not served.
int64_t score_blocks_workspace(const ScoreArgs& args);
const char* score_blocks_cuda(const ScoreArgs& args, void* workspace, void* stream);

// Bytes that select_blocks_cuda needs beside its arguments; 0: none. Rule::kMass is not served.
int64_t select_blocks_workspace(const SelectArgs& args);
const char* select_blocks_cuda(const SelectArgs& args, void* workspace, void* stream);

// Bytes that select_pages_cuda needs beside its arguments, where a row is too long for shared
// memory; 0: none.
int64_t select_pages_workspace(const PagesArgs& args);
const char* select_pages_cuda(const PagesArgs& args, void* workspace, void* stream);

// Both, for pages.block_index == args.index: in the launch that chooses, where a row's pages fit
// into shared memory.
int64_t select_block_pages_workspace(const SelectArgs& args, const PagesArgs& pages);
const char* select_block_pages_cuda(const SelectArgs& args, const PagesArgs& pages, void* workspace,
                                    void* stream);

}  // namespace vico
