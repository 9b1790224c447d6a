#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(VICO_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vico {
namespace {

#if defined(VICO_AMX)
// Linux gives a process the tile registers when it asks for them; one that knows nothing of them
// refuses. Not every compiler has names for these features.
bool may_use_tiles() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;       // CPUID 7.0 EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa detect() {
  Isa best = Isa::kBaseline;
#if defined(VICO_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    best = Isa::kAvx2;
  if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    best = Isa::kAvx512;
  if (best == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) best = Isa::kAvx512Bf16;
#endif
#if defined(VICO_AMX)
  if (best == Isa::kAvx512Bf16 && may_use_tiles()) best = Isa::kAmx;
#endif
  const char* wanted = std::getenv("VICO_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx})
    if (std::strcmp(wanted, isa_name(isa)) == 0) return isa < best ? isa : best;
  throw std::invalid_argument(std::string("VICO_ISA=") + wanted +
                              " is not one of baseline, avx2, avx512, avx512bf16, amx");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAmx:
      return "amx";
    default:
      return "baseline";
  }
}

Isa active_isa() {
  static const Isa isa = detect();
  return isa;
}

namespace cpu {

#if defined(VICO_X86)
#define VICO_FORWARD(name, Args)                                            \
  void name(const Args& args, int n_threads) {                              \
    if (active_isa() >= Isa::kAvx512) return avx512::name(args, n_threads); \
    if (active_isa() == Isa::kAvx2) return avx2::name(args, n_threads);     \
    return baseline::name(args, n_threads);                                 \
  }
#if defined(VICO_AMX)
#define VICO_ON_AMX(name) \
  if (active_isa() == Isa::kAmx) return amx::name(args, n_threads);
#else
#define VICO_ON_AMX(name)
#endif
#define VICO_FORWARD_BF16(name, Args)                                               \
  void name(const Args& args, int n_threads) {                                      \
    VICO_ON_AMX(name)                                                               \
    if (active_isa() == Isa::kAvx512Bf16) return avx512bf16::name(args, n_threads); \
    if (active_isa() == Isa::kAvx512) return avx512::name(args, n_threads);         \
    if (active_isa() == Isa::kAvx2) return avx2::name(args, n_threads);             \
    return baseline::name(args, n_threads);                                         \
  }
#else
#define VICO_FORWARD(name, Args) \
  void name(const Args& args, int n_threads) { return baseline::name(args, n_threads); }
#define VICO_FORWARD_BF16 VICO_FORWARD
#endif

VICO_FORWARD(rope_append, AppendArgs)
VICO_FORWARD_BF16(sink_window_attention, AttentionArgs)
VICO_FORWARD_BF16(varlen_attention, VarlenArgs)
VICO_FORWARD(merge_states, MergeArgs)
VICO_FORWARD(summarize_blocks, SummarizeArgs)
VICO_FORWARD(score_blocks, ScoreArgs)
VICO_FORWARD(select_blocks, SelectArgs)
VICO_FORWARD(select_pages, PagesArgs)
VICO_FORWARD(select_changed, ChangedArgs)
VICO_FORWARD(gather_rows, GatherArgs)
VICO_FORWARD(merge_rows, MergeRowsArgs)
VICO_FORWARD(prune_tokens, PruneArgs)
VICO_FORWARD(pack_patches, PackArgs)

}  // namespace cpu
}  // namespace vico
