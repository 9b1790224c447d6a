// The arguments of packing levels into patches, as plain data.
#pragma once

#include <cstdint>

namespace vico {

// Strides are in elements. Levels of height and width that patch * merge divides; a last step that
// is short of frames repeats its last one. `table` holds what each level of each channel becomes:
// [3, 256] values of the output's size, so that one kernel serves every dtype and normalisation.
struct PackArgs {
  const uint8_t* levels;  // [F, height, width, 3]
  const void* table;      // [3, 256]
  void* out;  // [T * h * w, 3 * temporal * patch * patch]: h, w patches by height and width

  int64_t frames, height, width, patch, merge, temporal;
  int64_t frame, row, column, channel;  // strides of levels
  int64_t value_bytes;                  // 2 or 4
};

}  // namespace vico
