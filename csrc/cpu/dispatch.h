// Declares the CPU entry points of every instruction set and picks one at run time.
#pragma once

#include "vico/append.h"
#include "vico/attention.h"
#include "vico/preprocess.h"
#include "vico/prune.h"
#include "vico/retrieve.h"
#include "vico/reuse.h"

namespace vico {

#define VICO_DECLARE(isa)                                               \
  namespace isa {                                                       \
  void rope_append(const AppendArgs& args, int n_threads);              \
  void sink_window_attention(const AttentionArgs& args, int n_threads); \
  void varlen_attention(const VarlenArgs& args, int n_threads);         \
  void merge_states(const MergeArgs& args, int n_threads);              \
  void summarize_blocks(const SummarizeArgs& args, int n_threads);      \
  void score_blocks(const ScoreArgs& args, int n_threads);              \
  void select_blocks(const SelectArgs& args, int n_threads);            \
  void select_pages(const PagesArgs& args, int n_threads);              \
  void select_changed(const ChangedArgs& args, int n_threads);          \
  void gather_rows(const GatherArgs& args, int n_threads);              \
  void merge_rows(const MergeRowsArgs& args, int n_threads);            \
  void prune_tokens(const PruneArgs& args, int n_threads);              \
  void pack_patches(const PackArgs& args, int n_threads);               \
  }
VICO_DECLARE(baseline)
#if defined(VICO_X86)
VICO_DECLARE(avx2)
VICO_DECLARE(avx512)
namespace avx512bf16 {
void sink_window_attention(const AttentionArgs& args, int n_threads);
void varlen_attention(const VarlenArgs& args, int n_threads);
}  // namespace avx512bf16
#endif
#if defined(VICO_AMX)
namespace amx {
void sink_window_attention(const AttentionArgs& args, int n_threads);
void varlen_attention(const VarlenArgs& args, int n_threads);
}  // namespace amx
#endif
VICO_DECLARE(cpu)  // picks one of the others
#undef VICO_DECLARE

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The best instruction set of this processor, or less where VICO_ISA (baseline, avx2, avx512,
// avx512bf16, amx) says so; read once.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace vico
