// The engine for any processor, and which one serves a type on this instruction set.
#pragma once

#include "cpu/attention_decode.h"
#include "cpu/attention_rows.h"
#if defined(__AMX_BF16__)
#include "cpu/attention_amx.h"
#endif

namespace vico {
namespace VICO_ISA {

// The engine for any type and processor. Engines say how many rows are a group and how many keys a
// tile, own the memory of a thread, and leave sums [units * padded(rows), d] in m.o.
template <typename T>
struct OnVectors {
  struct Session {};  // what a thread needs while it works
  static constexpr int kMost = kGroupRows, kKeys = kTileKeys;
  static int padded(int rows) { return padded_rows(rows); }
  static int64_t floats(int d) { return Scratch::floats(d); }

  Scratch m;
  bool pairs, rotates;
  OnVectors(float* memory, int d, bool rotates)  // keys that are rotated are fp32
      : m(memory, d), pairs(kHasPairs<T> && !rotates), rotates(rotates) {}
  // Rows of one KV head, as rows `at` and on.
  void pack(const T* q, int64_t q_token, int64_t q_head, const Work& w, int64_t at) const {
#if defined(__AVX2__)
    if (takes_few<T>(w.rows, w.d)) {
      float* const packed = m.q + at * w.d;
      return rotates ? pack_few<float>(q, q_token, q_head, w, packed)
                     : pack_few<T>(q, q_token, q_head, w, packed);
    }
#endif
    pack_queries(q, q_token, q_head, w, pairs, m.q + at * w.d);
  }
  template <typename Source>
  void run(const Work& w, int units, Source& source) const {
#if defined(__AVX2__)
    if (takes_few<T>(w.rows, w.d))
      return rotates ? attend_few<T, float>(w, units, source, m)
                     : attend_few<T, T>(w, units, source, m);
#endif
    if (pairs)
      attend<T, typename DotOf<T>::type>(w, units, source, m);
    else
      attend<T, Singles>(w, units, source, m);
  }
};

template <typename T>
struct EngineFor {
  using type = OnVectors<T>;
};
#if defined(__AMX_BF16__)
template <>
struct EngineFor<BFloat16> {
  using type = OnTiles;
};
#endif
template <typename T>
using EngineOf = typename EngineFor<T>::type;

}  // namespace VICO_ISA
}  // namespace vico
