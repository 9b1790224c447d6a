// Rotary angles that keep their precision for days of stream, the same on host and device.
#pragma once

#include "vico/macros.h"

namespace vico {
namespace VICO_ISA {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxHalfDim = kMaxHeadDim / 2;
constexpr double kInvTwoPi = 0.15915494309189533576888376337251;

// Nearest integer of |x| < 2^51 by the rounding of one addition: vectorises on every instruction
// set, where nearbyint needs SSE4.1.
VICO_INLINE double nearest(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  return (x + kShift) - kShift;
}

// sin and cos of 2 pi turns. The quarter turns are taken off in fp64, where that is exact; the
// rest, at most an eighth of a turn, goes through the minimax polynomials of the Cephes library (S.
// L. Moshier) in fp32. No library sine: its slow path for large arguments spills on GPUs.
VICO_INLINE void sincos_turns(double turns, float* sine, float* cosine) {
  const double quarters = nearest(turns * 4.0);
  const float x = static_cast<float>((turns - quarters * 0.25) * 6.283185307179586476925286766559);
  const double cycle = nearest(quarters * 0.25 - 0.375);  // floor(quarters / 4)
  const int quadrant = static_cast<int>(quarters - cycle * 4.0);

  const float z = x * x;
  const float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
  const float c =
      1.0f - 0.5f * z +
      z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const bool swapped = (quadrant & 1) != 0;
  const float sine_size = swapped ? c : s;
  const float cosine_size = swapped ? s : c;
  *sine = (quadrant & 2) != 0 ? -sine_size : sine_size;
  *cosine = ((quadrant + 1) & 2) != 0 ? -cosine_size : cosine_size;
}

// Which of (t, h, w) drives frequency f: the section that holds it. Plain RoPE has all in the
// first.
VICO_INLINE int rotary_axis(int f, int t_section, int h_section) {
  return f < t_section ? 0 : (f < t_section + h_section ? 1 : 2);
}

// rotate_half on one pair of channels (f, f + d/2), or on a vector of them.
template <typename F>
VICO_INLINE void rotate_pair(F first, F second, F cosine, F sine, F* out_first, F* out_second) {
  *out_first = first * cosine - second * sine;
  *out_second = second * cosine + first * sine;
}

}  // namespace VICO_ISA
}  // namespace vico
