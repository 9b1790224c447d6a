// Means and variances over the tokens of a step. Tokens are summed in groups of fixed bounds and
// groups in order, so that the bits depend neither on threads nor on the steps of a call.
#pragma once

#include "cpu/prune_tokens.h"
#include "vico/similarity.h"

namespace vico {
namespace VICO_ISA {

constexpr int64_t kGroupTokens = 32;
constexpr int kBlockTokens = 8;

// Sums over tokens by channel, and on demand the sums of squares around their mean.
struct ColumnSums {
  float* sum;     // [padded width]
  float* spread;  // the same or null
  int64_t count;

  void clear(int64_t padded) {
    count = 0;
    std::fill(sum, sum + padded, 0.0f);
    if (spread != nullptr) std::fill(spread, spread + padded, 0.0f);
  }

  // Chan's update: no difference of large sums, however far the mean is from 0.
  void add(const ColumnSums& other, int64_t padded) {
    if (other.count == 0) return;
    const float own = static_cast<float>(count), more = static_cast<float>(other.count);
    const float own_share = count == 0 ? 0.0f : 1.0f / own, share = 1.0f / more;
    const float weight = own * more / (own + more);
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) {
      if (spread != nullptr) {
        const float apart = other.sum[i] * share - sum[i] * own_share;
        spread[i] += other.spread[i] + apart * apart * weight;
      }
      sum[i] += other.sum[i];
    }
    count += other.count;
  }

  template <int kRows, typename T, typename Channels>
  void add_rows(const T* const* rows, const float* scale, int64_t width, Channels channels) {
    const float own = static_cast<float>(count), more = static_cast<float>(kRows);
    const float own_share = count == 0 ? 0.0f : 1.0f / own, share = 1.0f / more;
    const float weight = own * more / (own + more);
    for (int64_t i = 0; i < width; i += kLanes) {
      Floats value[kRows], block = {};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        value[r] = channels(load_lanes(rows[r] + i, width - i), i) * scale[r];
        block += value[r];
      }
      const Floats before = load<Floats>(sum + i);
      if (spread != nullptr) {
        const Floats mean = block * share, apart = mean - before * own_share;
        Floats around = load<Floats>(spread + i) + apart * apart * weight;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) around += (value[r] - mean) * (value[r] - mean);
        store(spread + i, around);
      }
      store(sum + i, before + block);
    }
    count += kRows;
  }
};

// Tokens [first, last) of step t that hold neither NaN nor inf; scaled to length 1 where
// `squares` (of the channels compared) are given.
template <typename T, typename Channels>
void sum_group(const Segment& s, int64_t t, int64_t first, int64_t last, const Judged& judged,
               const float* squares, int64_t width, Channels channels, ColumnSums* into) {
  const T* rows[kGroupTokens];
  float scale[kGroupTokens];
  int64_t whole = 0;
  for (int64_t n = first; n < last; ++n) {
    if (judged.marks[s.at(t, n)] & kBroken) continue;
    rows[whole] = s.token<T>(t, n);
    scale[whole++] = squares == nullptr ? 1.0f : inverse_norm(squares[s.at(t, n)]);
  }
  int64_t r = 0;
  for (; r + kBlockTokens <= whole; r += kBlockTokens)
    into->template add_rows<kBlockTokens>(rows + r, scale + r, width, channels);
  for (; r < whole; ++r) into->template add_rows<1>(rows + r, scale + r, width, channels);
}

// Sums of every group and step of a segment, in one piece of memory.
class SegmentSums {
 public:
  SegmentSums(int64_t steps, int64_t places, int64_t width, bool with_spread)
      : groups((places + kGroupTokens - 1) / kGroupTokens),
        padded_(padded_width(width)),
        with_spread_(with_spread),
        memory_(steps * (groups + 1) * padded_ * (with_spread ? 2 : 1)),
        sums_(steps * (groups + 1)) {
    float* at = memory_.data();
    for (ColumnSums& one : sums_) {
      one = {at, with_spread ? at + padded_ : nullptr, 0};
      at += padded_ * (with_spread ? 2 : 1);
    }
  }
  ColumnSums& group(int64_t t, int64_t g) { return sums_[t * (groups + 1) + 1 + g]; }
  ColumnSums& step(int64_t t) { return sums_[t * (groups + 1)]; }
  void join_step(int64_t t) {
    for (int64_t g = 0; g < groups; ++g) step(t).add(group(t, g), padded_);
  }
  const int64_t groups;

 private:
  int64_t padded_;
  bool with_spread_;
  std::vector<float> memory_;
  std::vector<ColumnSums> sums_;
};

// The mean that each step sees, moved on from the stream's; returns how many means are in it.
inline int32_t move_mean(const ColumnSums& entry, float* mean, int32_t count, int64_t width) {
  if (entry.count == 0) return count;
  const float tokens = static_cast<float>(entry.count), means = static_cast<float>(count + 1);
  for (int64_t i = 0; i < width; ++i) mean[i] += (entry.sum[i] / tokens - mean[i]) / means;
  return count + 1;
}

// The `wanted` channels of the lowest spread as a mask, ties to the lowest index.
inline std::vector<int32_t> quiet_channels(const float* spread, int64_t width, int64_t wanted) {
  std::vector<uint64_t> keys(width);
  for (int64_t i = 0; i < width; ++i) keys[i] = rank_key(false, spread[i], i);
  std::nth_element(keys.begin(), keys.begin() + (wanted - 1), keys.end());
  std::vector<int32_t> mask(padded_width(width), 0);
  for (int64_t i = 0; i < wanted; ++i) mask[keys[i] & 0x7fffffffu] = -1;
  return mask;
}

}  // namespace VICO_ISA
}  // namespace vico
