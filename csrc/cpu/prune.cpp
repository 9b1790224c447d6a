// prune_tokens on the CPU: compiled once per instruction set.
//
// Bound by memory: rules between tokens read x once, then the kept rows once more (mostly from
// cache) and write them. All sums have a fixed order (row_sums.h, prune_means.h), so that threads,
// packing and the cut of a stream into calls do not show in the bits.

#include "vico/prune.h"

#include "cpu/prune_decide.h"
#include "cpu/prune_score.h"
#include "cpu/stream.h"

namespace vico {
namespace VICO_ISA {
namespace {

template <typename T>
void mark(const PruneArgs& a, const std::vector<Segment<T>>& segments, Judged* judged) {
  for (const Segment<T>& s : segments) {
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

template <typename T>
void update_state(const PruneArgs& a, const Segment<T>& s, const Judged& judged) {
  if (a.steps == nullptr) return;
  a.steps[s.number] += static_cast<int32_t>(s.steps);
  const auto put = [&](void* state, int64_t row, int64_t place, int64_t n, int64_t t) {
    std::memcpy(static_cast<T*>(state) + s.number * row + n * place, s.token(t, n),
                a.width * sizeof(T));
  };
  for (int64_t n = 0; n < s.places; ++n) {
    if (a.previous != nullptr) put(a.previous, a.previous_row, a.previous_place, n, s.steps - 1);
    if (a.last_kept == nullptr) continue;
    int64_t t = s.steps - 1;
    while (t >= 0 && !judged.keep[s.at(t, n)]) --t;
    if (t >= 0) put(a.last_kept, a.last_row, a.last_place, n, t);
  }
}

// One kept token: where it came from, in the call and in memory.
template <typename T>
struct Kept {
  const T* token;
  const int32_t* positions;
  int64_t row;
};

// Padding, which nobody reads: it goes around the cache.
void clear_row(void* row, int64_t bytes) {
  if (!can_stream(row, bytes)) {
    std::memset(row, 0, bytes);
    return;
  }
  float* at = static_cast<float*>(row);
  for (int64_t i = 0; i < bytes / int64_t{sizeof(float)}; i += kLanes) stream(at + i, Floats{});
}

template <typename T>
void compact(const PruneArgs& a, const std::vector<Segment<T>>& segments, const Judged& judged,
             int n_threads) {
  std::vector<Kept<T>> kept;
  kept.reserve(std::min(a.capacity, a.total));
  int64_t count = 0;
  a.cu_count[0] = 0;
  for (const Segment<T>& s : segments) {
    const int64_t positions_step = a.packed ? s.places : a.positions_step;
    const int64_t mask_step = a.packed ? s.places : a.mask_step;
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t row = s.at(t, 0);
      const int64_t from = a.packed ? s.start : 0;
      for (int64_t n = 0; n < s.places; ++n) {
        const bool stays = judged.keep[row + n];
        a.mask[from + t * mask_step + n] = stays;
        if (!stays) continue;
        if (count++ < a.capacity)
          kept.push_back({s.token(t, n), a.positions + from + t * positions_step + n, row + n});
      }
    }
    a.cu_count[s.number + 1] = static_cast<int32_t>(count);
  }
  const int64_t filled = static_cast<int64_t>(kept.size());
  for (int64_t i = 0; i < filled; ++i) {
    a.index[i] = static_cast<int32_t>(kept[i].row);
    for (int axis = 0; axis < 3; ++axis)
      a.out_positions[axis * a.out_positions_axis + i] = kept[i].positions[axis * a.positions_axis];
  }
  std::fill(a.index + filled, a.index + a.capacity, -1);
  for (int axis = 0; axis < 3; ++axis)
    std::fill(a.out_positions + axis * a.out_positions_axis + filled,
              a.out_positions + axis * a.out_positions_axis + a.capacity, 0);
  const int workers = worthwhile_threads(a.capacity * a.width, n_threads);
#pragma omp parallel num_threads(workers)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < a.capacity; ++i) {
      T* out = static_cast<T*>(a.tokens) + i * a.tokens_row;
      if (i < filled) {
        std::memcpy(out, kept[i].token, a.width * sizeof(T));
      } else {
        clear_row(out, a.width * sizeof(T));
      }
    }
    end_stream();
  }
}

template <typename T>
void prune(const PruneArgs& a, int n_threads) {
  const std::vector<Segment<T>> segments = segments_of<T>(a);
  Judged judged(a.total);
  mark(a, segments, &judged);
  for (const Segment<T>& s : segments) Scorer<T>(a, s, &judged, n_threads).run();
  decide(a, segments, &judged);
  for (const Segment<T>& s : segments) update_state(a, s, judged);
  compact(a, segments, judged, n_threads);
}

}  // namespace

void prune_tokens(const PruneArgs& args, int n_threads) {
  switch (args.dtype) {
    case DType::kFloat32:
      return prune<float>(args, n_threads);
    case DType::kFloat16:
      return prune<Half>(args, n_threads);
    case DType::kBFloat16:
      return prune<BFloat16>(args, n_threads);
  }
}

}  // namespace VICO_ISA
}  // namespace vico
