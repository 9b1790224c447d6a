// The choice of topk_blocks on the CPU: compiled once per instruction set.
//
// Each row of scores becomes integer keys of preference (vico/ordering.h) in one pass; a second
// finds the last key that is chosen, a third lists the chosen ones in ascending order. Linear in
// the number of blocks; only cumulative rules sort, and only as far as they must look.

#include <algorithm>
#include <cmath>
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

// Calls visit(i) in ascending order for keys above `least`; keys are padded with kKeyAbsent to a
// whole number of vectors. `least` may rise meanwhile.
template <typename Visit>
void for_each_above(const std::vector<uint32_t>& keys, const uint32_t& least, Visit visit) {
  for (size_t i = 0; i < keys.size(); i += kLanes) {
    uint32_t above = lanes_of(load<U>(&keys[i]) > (U{} + least));
    for (; above != 0; above &= above - 1) {
      const uint32_t at = static_cast<uint32_t>(i) + __builtin_ctz(above);
      if (keys[at] > least) visit(at);
    }
  }
}

// The entry (key and index) of the target-th best of more units than that: collects whatever beats
// the best `target` so far, which it cuts back to size each time it has twice as many.
uint64_t last_chosen(const std::vector<uint32_t>& keys, size_t target,
                     std::vector<uint64_t>& best) {
  const auto cut = [&] {
    std::nth_element(best.begin(), best.begin() + (target - 1), best.end(), std::greater<>());
    best.resize(target);
  };
  const size_t most = 2 * target + 64;
  uint32_t least = kKeyAbsent;
  best.clear();
  best.reserve(most);
  for_each_above(keys, least, [&](uint32_t i) {
    best.push_back(with_index(keys[i], i));
    if (best.size() < most) return;
    cut();
    least = key_of(best.back());  // an equal key further on has a higher index and loses
  });
  cut();
  return best.back();
}

// Units from the most preferred on, sorted piece by piece as they are asked for.
class Ranking {
 public:
  Ranking(const std::vector<uint32_t>& keys, int64_t units) : entries_(units) {
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

  void choose(std::vector<uint32_t>& keys, std::vector<uint64_t>& best) {
    keys.assign((units_ + kLanes - 1) / kLanes * kLanes, kKeyAbsent);
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
      const uint64_t last = target < units_ ? last_chosen(keys, target, best) : 0;
      const uint32_t least = last == 0 ? kKeyAbsent : key_of(last) - 1;
      for_each_above(keys, least, [&](uint32_t unit) {
        if (with_index(keys[unit], unit) < last) return;
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

  int64_t force(std::vector<uint32_t>& keys) const {
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

  int64_t wanted(const std::vector<uint32_t>& keys) const {
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

  int64_t wanted_by_mass(const std::vector<uint32_t>& keys) const {
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

  int64_t wanted_by_tokens(const std::vector<uint32_t>& keys) const {
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
    std::vector<uint32_t> keys;
    std::vector<uint64_t> best;
#pragma omp for schedule(dynamic)  // a sleeping thread comes late
    for (int64_t row = 0; row < rows; ++row) Row(a, row).choose(keys, best);
  }
}

}  // namespace VICO_ISA
}  // namespace vico
