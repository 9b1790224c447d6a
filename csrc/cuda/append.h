// Host-side entry points of the CUDA kernels; free of CUDA headers so that bindings need none.
#pragma once

#include "vico/append.h"

namespace vico {

// Launches on `stream` (a cudaStream_t) of the current device; null, or what CUDA said.
const char* rope_append_cuda(const AppendArgs& args, void* stream);

}  // namespace vico
