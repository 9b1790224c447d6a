// What the stages of prune_tokens share: where a segment's tokens lie, and what is known of each.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/row_sums.h"
#include "vico/prune.h"

namespace vico {
namespace VICO_ISA {

// One chunk, or one segment of the packed form.
struct Segment {
  int64_t number, steps, places, start;  // start: its first token in the call
  const char* x;
  int64_t x_step, x_row;  // in bytes

  const char* row(int64_t t, int64_t n) const { return x + t * x_step + n * x_row; }
  template <typename T>
  const T* token(int64_t t, int64_t n) const {
    return reinterpret_cast<const T*>(row(t, n));
  }
  int64_t at(int64_t t, int64_t n) const { return start + t * places + n; }
};

inline std::vector<Segment> segments_of(const PruneArgs& a) {
  std::vector<Segment> made;
  const int64_t row = a.x_row * size_of(a.dtype), step = a.x_step * size_of(a.dtype);
  int64_t start = 0;
  for (int64_t s = 0; s < a.segments; ++s) {
    const int64_t steps = a.shapes[2 * s], places = a.shapes[2 * s + 1];
    made.push_back({s, steps, places, start, static_cast<const char*>(a.x) + start * row,
                    a.packed ? places * row : step, row});
    start += steps * places;
  }
  return made;
}

// What one of `threads` works on, of `size` places or rows.
struct Share {
  int64_t begin, end;
};

inline Share share_of(int64_t size, int thread, int threads) {
  return {size * thread / threads, size * (thread + 1) / threads};
}

// A token that must stay, or that may not: known before its score is.
enum Mark : uint8_t { kFirstStep = 1, kBroken = 2, kMaskedIn = 4, kMaskedOut = 8 };
constexpr uint8_t kMust = kFirstStep | kBroken | kMaskedIn;
inline bool must_stay(uint8_t marks) { return (marks & kMust) != 0 && !(marks & kMaskedOut); }

// One value or mark for each token of the call.
struct Judged {
  std::vector<float> score, squares;
  std::vector<uint8_t> marks, keep;
  explicit Judged(int64_t total)
      : score(total, 0.0f), squares(total, 0.0f), marks(total, 0), keep(total, 0) {}
};

// Written as what it does not drop, so that NaN is kept.
inline bool passes(const PruneRule& rule, float score) {
  if (std::isnan(rule.threshold)) return true;
  switch (rule.keep) {
    case PruneKeep::kBelow:
      return !(score >= rule.threshold);
    case PruneKeep::kAtMost:
      return !(score > rule.threshold);
    case PruneKeep::kAbove:
      return !(score <= rule.threshold);
    default:
      return !(score < rule.threshold);
  }
}

inline int64_t padded_width(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

}  // namespace VICO_ISA
}  // namespace vico
