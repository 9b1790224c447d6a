// The order of preference among scores, as integers: what host and device, CPU and CUDA select by.
#pragma once

#include <cstdint>
#include <cstring>

#include "vico/macros.h"

namespace vico {
namespace VICO_ISA {

// A larger key is preferred. NaN comes last, after -infinity; -0 ties with +0. Numbers lie in
// [0x007fffff, 0xff800000], which leaves room on both sides.
constexpr uint32_t kKeyAbsent = 0;  // never chosen
constexpr uint32_t kKeyNaN = 1;
constexpr uint32_t kKeyForced = 0xffffffffu;

VICO_INLINE uint32_t preference_key(float score) {
  const float zeroed = score + 0.0f;  // -0 becomes +0
  uint32_t bits;
  memcpy(&bits, &zeroed, sizeof(bits));
  const uint32_t key = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return score != score ? kKeyNaN : key;
}

// Key and index in one number: larger is preferred, ties go to the lower index, no two are equal.
VICO_INLINE uint64_t with_index(uint32_t key, uint32_t index) {
  return static_cast<uint64_t>(key) << 32 | (0xffffffffu - index);
}
VICO_INLINE uint32_t key_of(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }
VICO_INLINE uint32_t index_of(uint64_t entry) { return 0xffffffffu - static_cast<uint32_t>(entry); }

}  // namespace VICO_ISA
}  // namespace vico
