// Declares the CPU entry points of every instruction set and picks one at run time.
#pragma once

#include "vico/append.h"

namespace vico {

#define VICO_DECLARE(isa)                                  \
  namespace isa {                                          \
  void rope_append(const AppendArgs& args, int n_threads); \
  }
VICO_DECLARE(baseline)
#if defined(VICO_X86)
VICO_DECLARE(avx2)
VICO_DECLARE(avx512)
#endif
#undef VICO_DECLARE

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set of this processor, or less where VICO_ISA (baseline, avx2, avx512) says
// so; read once.
Isa active_isa();
const char* isa_name(Isa isa);

namespace cpu {
void rope_append(const AppendArgs& args, int n_threads);
}

}  // namespace vico
