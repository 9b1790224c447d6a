#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 x;
};
inline float __half2float(__half h) { return static_cast<float>(h.x); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
inline unsigned short __half_as_ushort(__half h) {
  unsigned short bits;
  std::memcpy(&bits, &h, sizeof(bits));
  return bits;
}
