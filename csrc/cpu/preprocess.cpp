// Packs uint8 levels into normalised patches on the CPU: compiled once per instruction set.
//
// Bound by the writes, four bytes for each byte read: a patch is written front to back, and its
// pixels, read once for each channel, stay in L1.

#include "vico/preprocess.h"

#include "cpu/simd.h"

namespace vico {
namespace VICO_ISA {
namespace {

// PATCH is 0 where the side is known at run time only.
template <typename T, int PATCH>
void pack_patch(const PackArgs& a, int64_t step, int64_t y, int64_t x, T* out) {
  const int64_t side = PATCH > 0 ? PATCH : a.patch;
  const T* table = static_cast<const T*>(a.table);
  const uint8_t* corner = a.levels + y * a.row + x * a.column;
  for (int64_t channel = 0; channel < 3; ++channel, table += 256) {
    for (int64_t f = 0; f < a.temporal; ++f) {
      const int64_t wanted = step * a.temporal + f;
      const int64_t frame = wanted < a.frames ? wanted : a.frames - 1;
      const uint8_t* line = corner + frame * a.frame + channel * a.channel;
      for (int64_t i = 0; i < side; ++i, line += a.row)
        for (int64_t j = 0; j < side; ++j) *out++ = table[line[j * a.column]];
    }
  }
}

template <typename T>
void pack(const PackArgs& a, int n_threads) {
  const int64_t steps = (a.frames + a.temporal - 1) / a.temporal;
  const int64_t down = a.height / (a.patch * a.merge), across = a.width / (a.patch * a.merge);
  const int64_t size = 3 * a.temporal * a.patch * a.patch, squares = a.merge * a.merge;
  const auto patch = a.patch == 14 ? pack_patch<T, 14> : pack_patch<T, 0>;
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (int64_t line = 0; line < steps * down; ++line) {
    const int64_t step = line / down, top = line % down * a.merge;
    T* out = static_cast<T*>(a.out) + line * across * squares * size;
    for (int64_t left = 0; left < across * a.merge; left += a.merge)
      for (int64_t square = 0; square < squares; ++square, out += size)
        patch(a, step, (top + square / a.merge) * a.patch, (left + square % a.merge) * a.patch,
              out);
  }
}

}  // namespace

void pack_patches(const PackArgs& args, int n_threads) {
  if (args.value_bytes == 4)
    pack<uint32_t>(args, n_threads);
  else
    pack<uint16_t>(args, n_threads);
}

}  // namespace VICO_ISA
}  // namespace vico
