// Scores of a segment's tokens. Rules that compare tokens with tokens read x once; means and a
// choice of channels need a pass of their own before.
#pragma once

#include <omp.h>

#include <memory>

#include "cpu/prune_means.h"
#include "cpu/stream.h"

namespace vico {
namespace VICO_ISA {

// A vector that tokens are compared with; for the gaussian metric scaled to length 1 by `scale`.
template <typename V>
struct Other {
  const V* values;
  float squares, scale;
};

template <typename T, typename V, typename Channels>
float compare(PruneMetric metric, const T* token, const T* next, float squares,
              const Other<V>& other, int64_t width, float compared, Channels channels) {
  const V* values = other.values;
  switch (metric) {
    case PruneMetric::kCosine:
      return cosine_of(dot_of(token, values, width, next, channels), squares, other.squares);
    case PruneMetric::kL1:
      return absolute_distance(token, values, width, next, channels) / compared;
    case PruneMetric::kL2:
      return std::sqrt(square_distance(token, 1.0f, values, 1.0f, width, next, channels) /
                       compared);
    default:
      return gaussian_of(square_distance(token, inverse_norm(squares), values, other.scale, width,
                                         next, channels));
  }
}

template <typename T>
class Scorer {
 public:
  Scorer(const PruneArgs& a, const Segment& s, Judged* judged, int n_threads)
      : a_(a),
        rule_(a.rule),
        s_(s),
        judged_(*judged),
        threads_(worthwhile_threads(s.steps * s.places * a.width, n_threads)),
        some_channels_(rule_.terms > 0 && rule_.channels < a.width) {}

  void run() {
    bool raw_means = some_channels_, unit_means = false;
    for (int k = 0; k < rule_.terms; ++k) {
      const PruneTerm& term = rule_.term[k];
      const bool frame = term.reference == PruneReference::kFrameMean;
      scaled_ |= term.metric == PruneMetric::kGaussian;
      raw_means |= term.reference == PruneReference::kRunningMean;
      (term.metric == PruneMetric::kGaussian ? unit_means : raw_means) |= frame;
    }
    squares_known_ = raw_means || unit_means;
    if (squares_known_) measure(raw_means, unit_means);
    compared_squares_ = some_channels_ ? channel_squares_.data() : judged_.squares.data();
    if (some_channels_) {
      walk(SomeChannels{mask_.data()});
    } else {
      walk(AllChannels{});
    }
  }

 private:
  // Passes over the tokens before they can be compared: squares, sums by channel, the channels.
  void measure(bool raw_means, bool unit_means) {
    SegmentSums raw(raw_means ? s_.steps : 0, s_.places, a_.width, some_channels_);
    SegmentSums unit(unit_means ? s_.steps : 0, s_.places, a_.width, false);
    const bool unit_now = unit_means && !some_channels_;
    each_group(raw.groups, [&](int64_t t, int64_t g, int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n)
        set_squares(s_.at(t, n), squares(s_.token<T>(t, n), AllChannels{}));
      if (raw_means)
        sum_group<T>(s_, t, first, last, judged_, nullptr, a_.width, AllChannels{},
                     &raw.group(t, g));
      if (unit_now)
        sum_group<T>(s_, t, first, last, judged_, judged_.squares.data(), a_.width, AllChannels{},
                     &unit.group(t, g));
    });
    if (raw_means) join(&raw);
    if (some_channels_) {
      ColumnSums& chunk = raw.step(0);  // later steps are added to a copy of the first
      std::vector<float> memory(2 * padded_width(a_.width), 0.0f);
      ColumnSums all{memory.data(), memory.data() + padded_width(a_.width), 0};
      all.add(chunk, padded_width(a_.width));
      for (int64_t t = 1; t < s_.steps; ++t) all.add(raw.step(t), padded_width(a_.width));
      mask_ = quiet_channels(all.spread, a_.width, rule_.channels);
      channel_squares_.resize(judged_.squares.size());
      const SomeChannels channels{mask_.data()};
      each_group(raw.groups, [&](int64_t t, int64_t g, int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n)
          channel_squares_[s_.at(t, n)] = squares(s_.token<T>(t, n), channels);
        if (unit_means)
          sum_group<T>(s_, t, first, last, judged_, channel_squares_.data(), a_.width, channels,
                       &unit.group(t, g));
      });
    }
    if (unit_means) join(&unit);
    for (int k = 0; k < rule_.terms; ++k) {
      if (rule_.term[k].reference == PruneReference::kFrameMean)
        frame_anchors(k, rule_.term[k].metric == PruneMetric::kGaussian ? unit : raw);
    }
    running_anchors(raw);
  }

  template <typename Work>
  void each_group(int64_t groups, Work&& work) {
    const int64_t items = s_.steps * groups;
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int64_t i = 0; i < items; ++i) {
      const int64_t first = i % groups * kGroupTokens;
      work(i / groups, i % groups, first, std::min(first + kGroupTokens, s_.places));
    }
  }

  void join(SegmentSums* sums) {
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int64_t t = 0; t < s_.steps; ++t) sums->join_step(t);
  }

  // Of a row that no other one follows, or one that the processor sees coming.
  template <typename V, typename Channels>
  float squares(const V* row, Channels channels) const {
    return squares_of(row, a_.width, row, channels);
  }

  void set_squares(int64_t at, float sum) {
    judged_.squares[at] = sum;
    if (!std::isfinite(sum)) judged_.marks[at] |= kBroken;
  }

  // One vector for each step (or one for all), ready to be compared with.
  struct Anchors {
    std::vector<float> values, squares;
    int64_t stride = 0;
  };

  void make_room(int k, int64_t rows) {
    anchors_[k].stride = rows == 1 ? 0 : padded_width(a_.width);
    anchors_[k].values.assign(rows * padded_width(a_.width), 0.0f);
    anchors_[k].squares.assign(rows, 0.0f);
  }

  float squares_of_anchor(const float* values) const {
    return some_channels_ ? squares(values, SomeChannels{mask_.data()})
                          : squares(values, AllChannels{});
  }

  void frame_anchors(int k, SegmentSums& sums) {
    make_room(k, s_.steps);
    for (int64_t t = 0; t < s_.steps; ++t) {
      const ColumnSums& step = sums.step(t);
      const float tokens = static_cast<float>(std::max<int64_t>(step.count, 1));
      float* values = anchors_[k].values.data() + t * anchors_[k].stride;
      for (int64_t i = 0; i < a_.width; ++i) values[i] = step.sum[i] / tokens;
      anchors_[k].squares[t] = squares_of_anchor(values);
    }
  }

  void running_anchors(SegmentSums& sums) {
    bool wanted = false;
    for (int k = 0; k < rule_.terms; ++k)
      wanted |= rule_.term[k].reference == PruneReference::kRunningMean;
    if (!wanted) return;
    std::vector<float> mean(padded_width(a_.width), 0.0f);
    int32_t count = 0;
    float* carried = a_.mean == nullptr ? nullptr : a_.mean + s_.number * a_.mean_row;
    if (carried != nullptr) {
      std::copy(carried, carried + a_.width, mean.begin());
      count = a_.mean_count[s_.number];
    }
    std::vector<float> seen;
    if (rule_.history_by_step) {
      for (int64_t t = 0; t < s_.steps; ++t) {
        count = move_mean(sums.step(t), mean.data(), count, a_.width);
        seen.insert(seen.end(), mean.begin(), mean.end());
      }
    } else {
      std::vector<float> memory(padded_width(a_.width), 0.0f);
      ColumnSums all{memory.data(), nullptr, 0};
      for (int64_t t = 0; t < s_.steps; ++t) all.add(sums.step(t), padded_width(a_.width));
      count = move_mean(all, mean.data(), count, a_.width);
      seen = mean;
    }
    if (carried != nullptr) {
      std::copy(mean.begin(), mean.begin() + a_.width, carried);
      a_.mean_count[s_.number] = count;
    }
    for (int k = 0; k < rule_.terms; ++k) {
      if (rule_.term[k].reference != PruneReference::kRunningMean) continue;
      make_room(k, rule_.history_by_step ? s_.steps : 1);
      anchors_[k].values = seen;
      for (size_t t = 0; t < anchors_[k].squares.size(); ++t) {
        float* values = anchors_[k].values.data() + t * padded_width(a_.width);
        const float sum = squares_of_anchor(values);
        anchors_[k].squares[t] = sum;
        if (rule_.term[k].metric != PruneMetric::kGaussian) continue;
        const float scale = inverse_norm(sum);
        for (int64_t i = 0; i < a_.width; ++i) values[i] *= scale;
      }
    }
  }

  // All steps of a place, one after another: the step before is still in cache.
  template <typename Channels>
  void walk(Channels channels) {
#pragma omp parallel num_threads(threads_)
    {
      const Share own = share_of(s_.places, omp_get_thread_num(), omp_get_num_threads());
      for (int64_t n = own.begin; n < own.end; ++n) walk_place(n, channels);
    }
  }

  template <typename Channels>
  Other<T> carried(const void* state, int64_t row, int64_t place, int64_t n,
                   Channels channels) const {
    if (state == nullptr) return {nullptr, NAN, NAN};
    const T* values = static_cast<const T*>(state) + s_.number * row + n * place;
    const float sum = squares(values, channels);
    return {values, sum, inverse_norm(sum)};
  }

  template <typename Channels>
  void walk_place(int64_t n, Channels channels) {
    Other<T> previous{nullptr, NAN, NAN}, first{nullptr, NAN, NAN}, kept{nullptr, NAN, NAN};
    for (int k = 0; k < rule_.terms; ++k) {
      const PruneReference reference = rule_.term[k].reference;
      if (reference == PruneReference::kPrevious)
        previous = carried(a_.previous, a_.previous_row, a_.previous_place, n, channels);
      if (reference == PruneReference::kLastKept)
        kept = carried(a_.last_kept, a_.last_row, a_.last_place, n, channels);
    }
    for (int64_t t = 0; t < s_.steps; ++t) {
      const int64_t at = s_.at(t, n);
      const T* token = s_.token<T>(t, n);
      const T* next = t + 1 < s_.steps    ? s_.token<T>(t + 1, n)
                      : n + 1 < s_.places ? s_.token<T>(0, n + 1)
                                          : token;
      float score = a_.external_score == nullptr ? 0.0f : a_.external_score[at] * rule_.external;
      bool squares_known = squares_known_ || rule_.terms == 0;
      for (int k = 0; k < rule_.terms; ++k) {
        const PruneTerm& term = rule_.term[k];
        const Other<T>& other = term.reference == PruneReference::kPrevious     ? previous
                                : term.reference == PruneReference::kChunkFirst ? first
                                                                                : kept;
        float value;
        if (term.reference >= PruneReference::kFrameMean) {
          value = against_anchor(k, t, token, next, compared_squares_[at], channels);
        } else if (other.values == nullptr) {
          value = NAN;
        } else if (!squares_known && term.metric == PruneMetric::kCosine) {
          const SquaresAndDot sums = squares_and_dot(token, other.values, a_.width, next);
          set_squares(at, sums.squares);
          squares_known = true;
          value = cosine_of(sums.dot, sums.squares, other.squares);
        } else {
          if (!squares_known) set_squares(at, squares_of(token, a_.width, next));
          squares_known = true;
          value = compare(term.metric, token, next, compared_squares_[at], other, a_.width,
                          static_cast<float>(rule_.channels), channels);
        }
        score += value * term.weight;
      }
      if (!squares_known) set_squares(at, squares_of(token, a_.width, next));
      judged_.score[at] = score;
      const Other<T> now{token, compared_squares_[at],
                         scaled_ ? inverse_norm(compared_squares_[at]) : 1.0f};
      previous = now;
      if (t == 0) first = now;
      const uint8_t marks = judged_.marks[at];
      if ((passes(rule_, score) && !(marks & kMaskedOut)) || must_stay(marks)) kept = now;
    }
  }

  template <typename Channels>
  float against_anchor(int k, int64_t t, const T* token, const T* next, float squares,
                       Channels channels) const {
    const Anchors& anchors = anchors_[k];
    const Other<float> other{anchors.values.data() + t * anchors.stride,
                             anchors.squares[anchors.stride == 0 ? 0 : t], 1.0f};
    return compare(rule_.term[k].metric, token, next, squares, other, a_.width,
                   static_cast<float>(rule_.channels), channels);
  }

  const PruneArgs& a_;
  const PruneRule& rule_;
  const Segment& s_;
  Judged& judged_;
  const int threads_;
  const bool some_channels_;
  bool squares_known_ = false, scaled_ = false;
  const float* compared_squares_ = nullptr;
  std::vector<float> channel_squares_;
  std::vector<int32_t> mask_;
  Anchors anchors_[2];
};

}  // namespace VICO_ISA
}  // namespace vico
