// AMX: tiles of 16 rows of 64 bytes, and what feeds them: fp32 rows to bf16 pairs, transposed.
//
// Sums are fp32 [16][16]; a product adds A [16][32] bf16 times B, whose 32 rows lie in pairs:
// B[i][j] = (row 2i, row 2i + 1) of column j, side by side in 32 bits.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/transpose.h"
#include "vico/macros.h"

namespace vico {
namespace VICO_ISA {

// The tiles of a thread, released at its end. Few rows of queries need no more rows of weights and
// sums: `narrow` gives tmm2, tmm3 and tmm7 eight.
struct TileSession {
  TileSession() = default;
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

  static void configure(bool narrow) {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes a row (16 bits each)
      config[48 + tile] = narrow && (tile == 2 || tile == 3 || tile == 7) ? 8 : 16;  // rows
    }
    _tile_loadconfig(config);
  }
};

// To compilers a tile load reads registers only: what it loads must have been written before.
VICO_INLINE void tiles_read_memory() { asm volatile("" ::: "memory"); }

// Two rows rounded to bf16, side by side in 32 bits a column.
VICO_INLINE __m512i round_pair(__m512 first, __m512 second) {
  const __m512bh both = _mm512_cvtne2ps_pbh(second, first);  // all of first, then all of second
  alignas(64) static constexpr uint16_t kSideBySide[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kSideBySide),
                                  reinterpret_cast<const __m512i&>(both));
}

// 2^x for x <= 0, 0 below -200, NaN of NaN: a polynomial through the Chebyshev nodes of [-1/2,
// 1/2], within 2.1e-7 of 2^f; weights are rounded to bf16 right after.
VICO_INLINE __m512 exp2_nonpositive(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // the second one where either is NaN
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.338130254e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.666368515e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550381014e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402234904e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931471806e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

}  // namespace VICO_ISA
}  // namespace vico
