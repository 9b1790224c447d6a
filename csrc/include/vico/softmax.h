// Online softmax: what host and device, scalars and vectors share.
#pragma once

#include <cstdint>
#include <cstring>

#include "vico/macros.h"

namespace vico {
namespace VICO_ISA {

// exp(x) for x <= 0 (or NaN), within 2 ulp; results below FLT_MIN are 0. F is float or a GCC vector
// of floats, I of uint32_t in the same shape. Cody-Waite reduction by ln 2 in two parts, then
// the minimax polynomial of the Cephes library (S. L. Moshier), 2^n put into the exponent bits.
template <typename F, typename I>
VICO_INLINE F exp_nonpositive(F x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: its sum's rounding gives the nearest integer
  const F shifted = x * 1.44269504088896341f + kShift;
  const F n = shifted - kShift;
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  I bits, exponent;
  memcpy(&bits, &p, sizeof(bits));
  memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;  // the low bits of shifted are n; those of kShift leave at the top
  F scaled;
  memcpy(&scaled, &bits, sizeof(scaled));
  const F small = x < -87.33654f ? F{} : x;  // what is left is NaN where x is none of the others
  return x >= -87.33654f ? scaled : small;
}

}  // namespace VICO_ISA
}  // namespace vico
