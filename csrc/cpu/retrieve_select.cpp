// The choice of topk_blocks on the CPU: compiled once per instruction set.
//
// Each row of scores becomes integer keys of preference (vico/ordering.h); counting how many reach
// a key finds the last one that is chosen, and a last pass lists the chosen ones in ascending
// order. Linear in the number of blocks; only cumulative rules sort, and only as far as they must
// look.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/simd.h"
#include "vico/ordering.h"
#include "vico/retrieve.h"

namespace vico {
namespace VICO_ISA {
namespace {

using U = Lanes<kLanes>::U;

// Keys are padded with kKeyAbsent to a whole number of vectors.
using Keys = std::vector<uint32_t>;

// Calls visit(i) in ascending order for keys from `least` on, which is not kKeyAbsent.
template <typename Visit>
void for_each_from(const Keys& keys, uint32_t least, Visit visit) {
  for (size_t i = 0; i < keys.size(); i += kLanes) {
    uint32_t chosen = lanes_of(load<U>(&keys[i]) >= (U{} + least));
    for (; chosen != 0; chosen &= chosen - 1)
      visit(static_cast<uint32_t>(i) + __builtin_ctz(chosen));
  }
}

size_t count_from(const Keys& keys, uint32_t least) {
  U found{};
  for (size_t i = 0; i < keys.size(); i += kLanes)
    found -= (U)(load<U>(&keys[i]) >= (U{} + least));  // a lane that holds is -1
  size_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) all += found[lane];
  return all;
}

// A key that at least `target` keys reach, bit by bit from the top: the largest such, or a smaller
// one that exactly `target` reach.
uint32_t reached_by(const Keys& keys, size_t target) {
  uint32_t least = 0;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    const size_t found = count_from(keys, least | bit);
    if (found >= target) least |= bit;
    if (found == target) break;
  }
  return least;
}

// What choosing takes beside the scores.
struct Choosing {
  Keys keys;
  Keys few;  // of them, or of what they come to
};

// As `reached_by`, of many keys: only those are looked at closely that reach what `target` of the
// maxima of groups reach. Neighbours in time are often alike: they fall into groups of their own.
uint32_t least_chosen(Choosing& of, size_t target) {
  const Keys& keys = of.keys;
  const size_t groups = (2 * target + kLanes - 1) / kLanes * kLanes;
  if (keys.size() < 4 * groups) return reached_by(keys, target);
  Keys& few = of.few;
  few.assign(groups, kKeyAbsent);
  for (size_t from = 0; from < keys.size(); from += groups) {
    const size_t some = std::min(groups, keys.size() - from);
    for (size_t i = 0; i < some; i += kLanes) {
      const U best = load<U>(&few[i]), key = load<U>(&keys[from + i]);
      const U more = key > best ? key : best;
      std::memcpy(&few[i], &more, sizeof(more));
    }
  }
  const uint32_t least = reached_by(few, target);
  few.clear();
  for_each_from(keys, least, [&](uint32_t i) { few.push_back(keys[i]); });
  few.resize((few.size() + kLanes - 1) / kLanes * kLanes, kKeyAbsent);
  return std::max(least, reached_by(few, target));  // `few` lacks what is below `least`
}

// Units from the most preferred on, sorted piece by piece as they are asked for.
class Ranking {
 public:
  Ranking(const Keys& keys, int64_t units) : entries_(units) {
    for (int64_t i = 0; i < units; ++i) entries_[i] = with_index(keys[i], static_cast<uint32_t>(i));
  }
  int64_t operator[](size_t place) {
    if (place >= sorted_) {
      const size_t end = std::min(entries_.size(), std::max<size_t>(2 * sorted_, 256));
      const auto from = entries_.begin() + sorted_, to = entries_.begin() + end;
      if (to != entries_.end()) std::nth_element(from, to, entries_.end(), std::greater<>());
      std::sort(from, to, std::greater<>());
      sorted_ = end;
    }
    return index_of(entries_[place]);
  }

 private:
  std::vector<uint64_t> entries_;
  size_t sorted_ = 0;
};

class Row {
 public:
  Row(const SelectArgs& a, int64_t row) : a_(a), stream_(row / a.rows), row_(row) {
    n_ = a.num_blocks == nullptr ? a.blocks
                                 : std::clamp<int64_t>(a.num_blocks[stream_], 0, a.blocks);
    units_ = (n_ + a.group - 1) / a.group;
    scores_ = a.scores + row * a.blocks;
    std::fill(scores_ + n_, scores_ + a.blocks, -std::numeric_limits<float>::infinity());
  }

  void choose(Choosing& by) {
    Keys& keys = by.keys;
    keys.resize((units_ + kLanes - 1) / kLanes * kLanes);
    std::fill(keys.begin() + units_, keys.end(), kKeyAbsent);
    if (a_.group == 1) {
      std::transform(scores_, scores_ + n_, keys.begin(), preference_key);
    } else {
      for (int64_t i = 0; i < units_; ++i) keys[i] = preference_key(unit_score(i));
    }
    const int64_t forced = force(keys);
    int64_t target = std::max((a_.min_k + a_.group - 1) / a_.group, forced);
    target = std::max(target, wanted(keys));
    target = std::min({target, a_.capacity / a_.group, units_});
    int32_t* out = a_.index + row_ * a_.capacity;
    int64_t count = 0;
    if (target > 0) {
      const uint32_t least = target < units_ ? least_chosen(by, target) : kKeyNaN;
      const size_t above = least == kKeyForced ? 0 : count_from(keys, least + 1);
      int64_t ties = target - static_cast<int64_t>(above);  // the first ones of those at `least`
      for_each_from(keys, least, [&](uint32_t unit) {
        if (keys[unit] == least && ties-- <= 0) return;
        for (int64_t b = begin(unit); b < end(unit); ++b) out[count++] = static_cast<int32_t>(b);
      });
    }
    std::fill(out + count, out + a_.capacity, -1);
    a_.chosen[row_] = static_cast<int32_t>(count);
  }

 private:
  int64_t begin(int64_t unit) const { return unit * a_.group; }
  int64_t end(int64_t unit) const { return std::min(n_, (unit + 1) * a_.group); }

  float unit_score(int64_t unit) const {
    float total = 0.0f;
    int numbers = 0;
    for (int64_t b = begin(unit); b < end(unit); ++b) {
      if (scores_[b] != scores_[b]) continue;
      total += scores_[b];
      ++numbers;
    }
    return total / static_cast<float>(numbers);  // NaN where there is no number
  }

  int64_t force(Keys& keys) const {
    const int64_t first = std::min(units_, (a_.force_first + a_.group - 1) / a_.group);
    const int64_t last =
        a_.force_last == 0 ? units_ : std::max<int64_t>(0, n_ - a_.force_last) / a_.group;
    std::fill(keys.begin(), keys.begin() + first, kKeyForced);
    std::fill(keys.begin() + last, keys.begin() + units_, kKeyForced);
    return first + units_ - std::max(first, last);
  }

  int64_t tokens(int64_t block) const {
    return std::max(0, a_.block_tokens[stream_ * a_.blocks + block]);
  }

  int64_t wanted(const Keys& keys) const {
    if (a_.rule == Rule::kCount) return a_.target / a_.group;
    if (a_.rule == Rule::kRatio)
      return static_cast<int64_t>(std::floor(static_cast<double>(n_) * a_.amount)) / a_.group;
    return a_.rule == Rule::kMass ? wanted_by_mass(keys) : wanted_by_tokens(keys);
  }

  double weight(int64_t unit) const {
    double total = 0.0;
    for (int64_t b = begin(unit); b < end(unit); ++b) {
      const double score = scores_[b] > 0.0f ? scores_[b] : 0.0;  // NaN counts for nothing
      total += a_.block_tokens == nullptr ? score : score * static_cast<double>(tokens(b));
    }
    return total;
  }

  int64_t wanted_by_mass(const Keys& keys) const {
    double whole = 0.0;
    int64_t heavy = 0;
    for (int64_t i = 0; i < units_; ++i) {
      const double w = weight(i);
      whole += w;
      heavy += w > 0.0;
    }
    if (!(whole > 0.0)) return 0;
    Ranking order(keys, units_);
    double reached = 0.0;
    int64_t place = 0;
    // Without the second test, sums in another order than `whole` might never quite reach it.
    while (reached < a_.amount * whole && heavy > 0) {
      const double w = weight(order[place++]);
      reached += w;
      heavy -= w > 0.0;
    }
    return place;
  }

  int64_t wanted_by_tokens(const Keys& keys) const {
    Ranking order(keys, units_);
    int64_t used = 0, place = 0;
    for (; place < units_; ++place) {
      const int64_t unit = order[place];
      for (int64_t b = begin(unit); b < end(unit); ++b) used += tokens(b);
      if (used > a_.target) break;
    }
    return place;
  }

  const SelectArgs& a_;
  int64_t stream_, row_, n_, units_;
  float* scores_;
};

}  // namespace

void select_blocks(const SelectArgs& a, int n_threads) {
  const int64_t rows = a.streams * a.rows;
#pragma omp parallel num_threads(n_threads) if (rows > 1 && rows * a.blocks > 8192)
  {
    Choosing by;
#pragma omp for schedule(dynamic)  // a sleeping thread comes late
    for (int64_t row = 0; row < rows; ++row) Row(a, row).choose(by);
  }
}

}  // namespace VICO_ISA
}  // namespace vico
