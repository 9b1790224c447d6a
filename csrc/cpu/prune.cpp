// prune_tokens on the CPU: compiled once per instruction set.
//
// Bound by memory: rules between tokens read x once, then the kept rows once more (mostly from
// cache) and write them. All sums have a fixed order (row_sums.h, prune_means.h), so that threads,
// packing and the cut of a stream into calls do not show in the bits.

#include "vico/prune.h"

#include <omp.h>

#include "cpu/prune_decide.h"
#include "cpu/prune_score.h"
#include "cpu/stream.h"

namespace vico {
namespace VICO_ISA {
namespace {

void mark(const PruneArgs& a, const std::vector<Segment>& segments, Judged* judged) {
  for (const Segment& s : segments) {
    const PruneAlways always = a.rule.always_keep;
    const bool first =
        always == PruneAlways::kFirst ||
        (always == PruneAlways::kFirstOfStream && (a.steps == nullptr || a.steps[s.number] == 0));
    if (first)
      std::fill_n(judged->marks.begin() + s.start, s.places, static_cast<uint8_t>(kFirstStep));
  }
  if (a.external_mask == nullptr) return;
  for (int64_t i = 0; i < a.total; ++i) {
    if (a.rule.mask_or && a.external_mask[i]) judged->marks[i] |= kMaskedIn;
    if (!a.rule.mask_or && !a.external_mask[i]) judged->marks[i] |= kMaskedOut;
  }
}

void update_state(const PruneArgs& a, const Segment& s, const Judged& judged) {
  if (a.steps == nullptr) return;
  a.steps[s.number] += static_cast<int32_t>(s.steps);
  const int64_t size = size_of(a.dtype);
  const auto put = [&](void* state, int64_t row, int64_t place, int64_t n, int64_t t) {
    std::memcpy(static_cast<char*>(state) + (s.number * row + n * place) * size, s.row(t, n),
                a.width * size);
  };
  for (int64_t n = 0; n < s.places; ++n) {
    if (a.previous != nullptr) put(a.previous, a.previous_row, a.previous_place, n, s.steps - 1);
    if (a.last_kept == nullptr) continue;
    int64_t t = s.steps - 1;
    while (t >= 0 && !judged.keep[s.at(t, n)]) --t;
    if (t >= 0) put(a.last_kept, a.last_row, a.last_place, n, t);
  }
}

// The row of the output that is each token's to write: kept tokens have theirs in order, dropped
// ones those behind. Lists of what is kept are written on the way; returns how many that is.
int64_t list_kept(const PruneArgs& a, const std::vector<Segment>& segments, const Judged& judged,
                  std::vector<int32_t>* rows) {
  int64_t count = 0, dropped = std::count(judged.keep.begin(), judged.keep.end(), uint8_t{1});
  a.cu_count[0] = 0;
  for (const Segment& s : segments) {
    const int64_t positions_step = a.packed ? s.places : a.positions_step;
    const int64_t mask_step = a.packed ? s.places : a.mask_step;
    const int64_t from = a.packed ? s.start : 0;
    for (int64_t t = 0; t < s.steps; ++t) {
      const int32_t* positions = a.positions + from + t * positions_step;
      for (int64_t n = 0; n < s.places; ++n) {
        const int64_t token = s.at(t, n);
        const bool stays = judged.keep[token];
        a.mask[from + t * mask_step + n] = stays;
        (*rows)[token] = static_cast<int32_t>(stays ? count : dropped);
        if (stays && count < a.capacity) {
          a.index[count] = static_cast<int32_t>(token);
          for (int axis = 0; axis < 3; ++axis)
            a.out_positions[axis * a.out_positions_axis + count] =
                positions[axis * a.positions_axis + n];
        }
        ++(stays ? count : dropped);
      }
    }
    a.cu_count[s.number + 1] = static_cast<int32_t>(count);
  }
  const int64_t filled = std::min(count, a.capacity);
  std::fill(a.index + filled, a.index + a.capacity, -1);
  for (int axis = 0; axis < 3; ++axis)
    std::fill(a.out_positions + axis * a.out_positions_axis + filled,
              a.out_positions + axis * a.out_positions_axis + a.capacity, 0);
  return count;
}

// Each thread writes the rows of the tokens that it has scored, the last first: these are still in
// its cache. With a row of padding for each dropped token all threads write alike much.
void compact(const PruneArgs& a, const std::vector<Segment>& segments, const Judged& judged,
             int n_threads) {
  std::vector<int32_t> rows(a.total);
  const int64_t count = list_kept(a, segments, judged, &rows);
  const int64_t size = size_of(a.dtype), bytes = a.width * size;
  const bool streamed = a.capacity * bytes >= kStreamedBytes;
  const auto row_at = [&](int64_t row) {
    return static_cast<char*>(a.tokens) + row * a.tokens_row * size;
  };
  const int workers = worthwhile_threads(a.capacity * a.width, n_threads);
#pragma omp parallel num_threads(workers)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (size_t i = segments.size(); i-- > 0;) {
      const Segment& s = segments[i];
      const Share own = share_of(s.places, thread, threads);
      for (int64_t n = own.end; n-- > own.begin;) {
        for (int64_t t = s.steps; t-- > 0;) {
          const int64_t row = rows[s.at(t, n)];
          if (row >= a.capacity) continue;
          if (row < count) {
            copy_row(row_at(row), s.row(t, n), bytes, streamed);
          } else {
            clear_row(row_at(row), bytes, streamed);
          }
        }
      }
    }
    const Share beyond = share_of(a.capacity - a.total, thread, threads);
    for (int64_t row = beyond.begin; row < beyond.end; ++row)
      clear_row(row_at(a.total + row), bytes, streamed);
    end_stream();
  }
}

void score(const PruneArgs& a, const Segment& s, Judged* judged, int n_threads) {
  switch (a.dtype) {
    case DType::kFloat32:
      return Scorer<float>(a, s, judged, n_threads).run();
    case DType::kFloat16:
      return Scorer<Half>(a, s, judged, n_threads).run();
    case DType::kBFloat16:
      return Scorer<BFloat16>(a, s, judged, n_threads).run();
  }
}

}  // namespace

void prune_tokens(const PruneArgs& a, int n_threads) {
  const std::vector<Segment> segments = segments_of(a);
  Judged judged(a.total);
  mark(a, segments, &judged);
  for (const Segment& s : segments) score(a, s, &judged, n_threads);
  decide(a, segments, &judged);
  for (const Segment& s : segments) update_state(a, s, judged);
  compact(a, segments, judged, n_threads);
}

}  // namespace VICO_ISA
}  // namespace vico
