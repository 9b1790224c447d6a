// Which keys a stream's rows see, and how decode cuts them into runs: shared by host and device.
//
// All from the stream's own numbers, so that its bits do not depend on what else is in the call.
// Positions are int32: the caller keeps slots + rows + kPositionSlack below 2^31.
#pragma once

#include <cstdint>

#include "vico/macros.h"

namespace vico {
namespace VICO_ISA {

constexpr int kGranule = 64;  // keys that are listed or left out together
constexpr int kMinRun = 4;    // granules of a run at least
constexpr int kMaxRuns = 64;  // runs of a stream at most
constexpr int64_t kMaxPosition = 0x7fffffff;
constexpr int64_t kPositionSlack = 2 * kGranule;

// The rule of visibility, the same for all rows of a stream. Without a window: kMaxPosition less
// the rows, which hides nothing.
struct Rule {
  int sink_tokens, window, window_start;

  // No `&&`: on a GPU each would be a branch.
  VICO_INLINE bool sees(int i, int j) const {
    return (j <= i) & ((j < sink_tokens) | ((j > i - window) & (j >= window_start)));
  }
  // The first key that a query at first_query or later sees beside the sinks, `keys` if none.
  VICO_INLINE int lowest(int first_query, int keys) const {
    if (window == 0) return keys;
    int low = window_start > 0 ? window_start : 0;
    if (first_query - window + 1 > low) low = first_query - window + 1;
    return low < keys ? low : keys;
  }
};

// The list of a stream's visible keys, in granules: those that hold sinks, then a gap, then the
// rest. A place in the list is a logical key, or `hidden` less behind the gap.
struct Visible {
  int sinks;     // keys before the gap, whole granules
  int hidden;    // keys that the gap leaves out
  int granules;  // the list's length

  VICO_INLINE int key_at(int place) const { return place < sinks ? place : place + hidden; }
};

VICO_INLINE int granules_of(int keys) { return (keys + kGranule - 1) / kGranule; }

VICO_INLINE Visible visible_keys(const Rule& rule, int keys, int queries) {
  const int sinks = granules_of(rule.sink_tokens < keys ? rule.sink_tokens : keys);
  int low = rule.lowest(keys - queries, keys) / kGranule;
  if (low < sinks) low = sinks;
  const int rest = granules_of(keys) - low;
  return {sinks * kGranule, (low - sinks) * kGranule, sinks + (rest > 0 ? rest : 0)};
}

VICO_INLINE int granules_of_run(int granules) {
  const int cut = (granules + kMaxRuns - 1) / kMaxRuns;
  return cut > kMinRun ? cut : kMinRun;
}

VICO_INLINE int runs_of(int granules) {
  const int each = granules_of_run(granules);
  return (granules + each - 1) / each;
}

// No list of up to so many granules has more runs.
VICO_INLINE int most_runs(int64_t granules) {
  const int64_t runs = (granules + kMinRun - 1) / kMinRun;
  return static_cast<int>(runs < kMaxRuns ? runs : kMaxRuns);
}

// The rows of a stream: [start, start + count) within the rows that there are.
struct Rows {
  int64_t start, count;
};
VICO_INLINE Rows rows_between(int64_t start, int64_t stop, int64_t rows) {
  start = start < 0 ? 0 : start < rows ? start : rows;
  stop = stop < 0 ? 0 : stop < rows ? stop : rows;
  return {start, stop > start ? stop - start : 0};
}

}  // namespace VICO_ISA
}  // namespace vico
