// select_changed, gather_rows, merge_rows on the CPU: compiled once per instruction set.
//
// Bound by memory. select_changed reads features and references once (a shared reference row serves
// all frames while it is in cache); merge_rows reads only the rows that it writes, a shared base
// row for all frames at once.

#include "vico/reuse.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/pack.h"
#include "cpu/row_sums.h"
#include "cpu/stream.h"
#include "vico/similarity.h"

namespace vico {
namespace VICO_ISA {
namespace {

template <typename T>
float likeness(const T* a, const T* next, const T* b, float b_squares, const ChangedArgs& s) {
  const int64_t n = s.width;
  switch (s.metric) {
    case Likeness::kL1:
      return -(absolute_distance(a, b, n, next) / static_cast<float>(n));
    case Likeness::kL2:
      return -std::sqrt(square_distance(a, 1.0f, b, 1.0f, n, next) / static_cast<float>(n));
    case Likeness::kDot:
      return dot_of(a, b, n, next);
    case Likeness::kCosine:
      break;
  }
  const SquaresAndDot sums = squares_and_dot(a, b, n, next);
  return cosine_of(sums.dot, sums.squares, b_squares);
}

// Places whose reference rows stay in the first level cache (their bytes) while one frame after
// another is compared with them: a run of rows for memory, which is read faster than rows apart.
constexpr int64_t kRunBytes = 20 << 10;
constexpr int64_t kMostPlaces = 64;

template <typename T>
void compare_run(const ChangedArgs& s, int64_t begin, int64_t end) {
  const auto row = [&s](int64_t f, int64_t place) {
    return static_cast<const T*>(s.feature) + f * s.feature_frame + place * s.feature_row;
  };
  float squares[kMostPlaces];
  for (int64_t f = 0; f < s.frames; ++f) {
    for (int64_t place = begin; place < end; ++place) {
      const T* other =
          static_cast<const T*>(s.reference) + f * s.reference_frame + place * s.reference_row;
      float* sum = &squares[place - begin];
      if (s.metric == Likeness::kCosine && (f == 0 || s.reference_frame != 0))
        *sum = squares_of(other, s.width, other);
      const T* next = place + 1 < end    ? row(f, place + 1)
                      : f + 1 < s.frames ? row(f + 1, begin)
                      : end < s.places   ? row(0, end)
                                         : row(f, place);
      s.similarity[f * s.places + place] = likeness(row(f, place), next, other, *sum, s);
    }
  }
}

// The key of rank `wanted - 1`: what is not above it is among the first `wanted`.
uint64_t bound_of(std::vector<uint64_t>& keys, int64_t wanted) {
  if (wanted == 0) return 0;
  if (wanted >= static_cast<int64_t>(keys.size())) return ~uint64_t{0};
  std::nth_element(keys.begin(), keys.begin() + (wanted - 1), keys.end());
  return keys[wanted - 1];
}

void list_frame(const ChangedArgs& s, int64_t f) {
  const float* alike = s.similarity + f * s.places;
  const bool* force = s.force == nullptr ? nullptr : s.force + f * s.force_frame;
  const auto key = [&](int64_t i) { return rank_key(force == nullptr || !force[i], alike[i], i); };
  std::vector<uint64_t> keys(s.places);
  for (int64_t i = 0; i < s.places; ++i) keys[i] = key(i);
  const uint64_t changed_bound = bound_of(keys, s.k);
  const uint64_t listed_bound = s.capacity == s.k ? changed_bound : bound_of(keys, s.capacity);

  int32_t* index = s.index + f * s.capacity;
  int64_t listed = 0;
  int32_t count = 0;
  const bool by_threshold = !std::isnan(s.threshold);
  for (int64_t i = 0; i < s.places; ++i) {
    const uint64_t own = key(i);
    const bool changed = (s.k > 0 && own <= changed_bound) || (force != nullptr && force[i]) ||
                         (by_threshold && !(alike[i] >= s.threshold));
    count += changed;
    if (changed && own <= listed_bound) index[listed++] = static_cast<int32_t>(i);
  }
  std::fill(index + listed, index + s.capacity, -1);
  s.count[f] = count;
}

template <typename T>
void select(const ChangedArgs& s, int n_threads) {
  const int workers = worthwhile_threads(s.frames * s.places * s.width, n_threads);
  const int64_t bytes = s.width * int64_t{sizeof(T)};
  // Of few places each thread has some.
  const int64_t most = std::min(kMostPlaces, (s.places + workers - 1) / workers);
  const int64_t run = std::min(most, std::max<int64_t>(1, kRunBytes / bytes));
#pragma omp parallel num_threads(workers)
  {
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < s.places; begin += run)
      compare_run<T>(s, begin, std::min(begin + run, s.places));
#pragma omp for schedule(static)
    for (int64_t f = 0; f < s.frames; ++f) list_frame(s, f);
  }
}

template <typename T>
void gather(const GatherArgs& g, int n_threads) {
  const int64_t total = g.frames * g.rows, bytes = g.width * int64_t{sizeof(T)};
  const bool streamed = total * bytes >= kStreamedBytes;
  const int workers = worthwhile_threads(total * g.width, n_threads);
#pragma omp parallel num_threads(workers)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < total; ++i) {
      const int64_t f = i / g.rows, row = g.index[f * g.index_frame + i % g.rows];
      T* out = static_cast<T*>(g.out) + i * g.width;
      if (row < 0 || row >= g.places) {
        clear_row(out, bytes, streamed);
      } else {
        copy_row(out, static_cast<const T*>(g.x) + f * g.x_frame + row * g.x_row, bytes, streamed);
      }
    }
    end_stream();
  }
}

template <typename T, bool kStreamed>
void add_lanes(const T* a, const T* b, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const auto sum = pack_lanes<T>(load_lanes(a + i) + load_lanes(b + i));
    if constexpr (kStreamed) {
      stream(out + i, sum);
    } else {
      store(out + i, sum);
    }
  }
  if (i == n) return;
  const auto sum = pack_lanes<T>(load_lanes(a + i, n - i) + load_lanes(b + i, n - i));
  std::memcpy(out + i, &sum, (n - i) * sizeof(T));
}

// Added in fp32, rounded once.
template <typename T>
void add_rows(const T* a, const T* b, T* out, int64_t n, bool streamed) {
  if (streamed && can_stream(out, n * sizeof(T))) return add_lanes<T, true>(a, b, out, n);
  add_lanes<T, false>(a, b, out, n);
}

template <typename T>
void merge(const MergeRowsArgs& m, int n_threads) {
  const int64_t total = m.frames * m.places, bytes = m.width * int64_t{sizeof(T)};
  std::vector<int32_t> row_of(total, -1);
  for (int64_t f = 0; f < m.frames; ++f) {
    for (int64_t k = 0; k < m.replaced; ++k) {
      const int64_t place = m.index[f * m.index_frame + k];
      if (place >= 0 && place < m.places) row_of[f * m.places + place] = static_cast<int32_t>(k);
    }
  }
  const bool streamed = total * bytes >= kStreamedBytes;
  const int workers = worthwhile_threads(total * m.width, n_threads);
#pragma omp parallel num_threads(workers)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < total; ++i) {
      const int64_t f = i % m.frames, place = i / m.frames, at = f * m.places + place;
      const T* source =
          row_of[at] >= 0
              ? static_cast<const T*>(m.rows) + f * m.rows_frame + row_of[at] * m.rows_row
              : static_cast<const T*>(m.base) + f * m.base_frame + place * m.base_row;
      T* out = static_cast<T*>(m.out) + at * m.width;
      if (m.residual == nullptr) {
        copy_row(out, source, bytes, streamed);
        continue;
      }
      const T* residual =
          static_cast<const T*>(m.residual) + f * m.residual_frame + place * m.residual_row;
      add_rows(source, residual, out, m.width, streamed);
    }
    end_stream();
  }
}

}  // namespace

#define VICO_BY_DTYPE(function, args)             \
  switch ((args).dtype) {                         \
    case DType::kFloat32:                         \
      return function<float>(args, n_threads);    \
    case DType::kFloat16:                         \
      return function<Half>(args, n_threads);     \
    case DType::kBFloat16:                        \
      return function<BFloat16>(args, n_threads); \
  }

void select_changed(const ChangedArgs& args, int n_threads) { VICO_BY_DTYPE(select, args) }
void gather_rows(const GatherArgs& args, int n_threads) { VICO_BY_DTYPE(gather, args) }
void merge_rows(const MergeRowsArgs& args, int n_threads) { VICO_BY_DTYPE(merge, args) }

}  // namespace VICO_ISA
}  // namespace vico
