// What a piece of attention is about, and the memory of a thread that does it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/attention_tile.h"
#include "vico/rotary.h"

namespace vico {
namespace VICO_ISA {

constexpr int kGroupRows = 128;
constexpr int kDecodeKeys = 24;  // of a tile where rows are few, see attention_decode.h

// Rows [row0, row0 + rows) of each KV head, row = query * share + head, and the keys they may see.
struct Work {
  int64_t row0;
  int rows;
  int64_t share;
  int64_t first_query;  // logical position of query 0
  int64_t sinks, window, start;
  bool causal;
  int64_t begin, end;  // logical keys that this piece of work is about
  float scale;
  int d;

  int64_t query(int row) const { return (row0 + row) / share; }
  int64_t last_seen(int row) const { return causal ? first_query + query(row) : end - 1; }
  int64_t first_seen(int row) const {
    return std::max(start, causal ? first_query + query(row) - window + 1 : 0);
  }
};

// Floats for one call, kept by the calling thread for its next one unless they are many.
struct Memory {
  static constexpr int64_t kKept = 1 << 22;
  explicit Memory(int64_t floats) {
    static thread_local Floats kept;
    static thread_local int64_t size = 0;
    if (floats > kKept) {
      own = make(floats);
      at = own.get();
      return;
    }
    if (floats > size) {
      kept.reset();
      size = 0;  // should the next line throw
      kept = make(floats);
      size = floats;
    }
    at = kept.get();
  }
  float* at;

 private:
  // Registers' worths of it do not stand across cache lines.
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* at) const { ::operator delete(at, kAlignment); }
  };
  using Floats = std::unique_ptr<float[], Free>;
  static Floats make(int64_t floats) {
    return Floats(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)));
  }
  Floats own;
};

// Sines and cosines of the table entries whose keys are rotated: of several, for a tile meets the
// same few for each of its KV heads.
constexpr int kAngles = 8;
constexpr int kAngleFloats = kAngles * 2 * kMaxHalfDim;

// Memory of one thread.
struct Scratch {
  float* q;       // [kGroupRows * d], block by block [d][width], of few rows [width][d]
  float* o;       // [kGroupRows, d]
  float* scores;  // [kScores], as [kTileKeys, 32] or [head, key, kFewRows]
  float* k;       // [kTileKeys, d], where keys must be converted or rotated
  float* v;       // [kTileKeys, d]
  float* rows;    // [3, kGroupRows]
  float* angles;  // [kAngleFloats]

  static constexpr int kScores = kDecodeKeys * kGroupRows;
  static_assert(kScores >= 32 * kTileKeys);
  static int64_t floats(int d) {
    return int64_t{d} * (2 * kGroupRows + 2 * kTileKeys) + kScores + 3 * kGroupRows + kAngleFloats;
  }
  explicit Scratch(float* at, int d) {
    const auto take = [&at](int64_t floats) {
      float* taken = at;
      at += floats;
      return taken;
    };
    q = take(int64_t{kGroupRows} * d);
    o = take(int64_t{kGroupRows} * d);
    k = take(int64_t{kTileKeys} * d);
    v = take(int64_t{kTileKeys} * d);
    scores = take(kScores);
    rows = take(3 * kGroupRows);
    angles = take(kAngleFloats);
  }
  RowState state() const { return {rows, rows + kGroupRows, rows + 2 * kGroupRows}; }
};

}  // namespace VICO_ISA
}  // namespace vico
