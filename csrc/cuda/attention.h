// Host-side entry points of the CUDA attention kernels; free of CUDA headers, as bindings are.
#pragma once

#include <cstdint>

#include "vico/attention.h"

namespace vico {

// What one call needs beside its arguments: a workspace of floats and int32 numbers of 4 bytes.
int64_t attention_decode_workspace(const AttentionArgs& args);

// Decode on `stream` (a cudaStream_t) of the current device; null, or what CUDA said. `rows_hint`:
// query rows of the longest stream, or more or fewer.
const char* sink_window_attention_cuda(const AttentionArgs& args, void* workspace,
                                       int64_t rows_hint, void* stream);

}  // namespace vico
