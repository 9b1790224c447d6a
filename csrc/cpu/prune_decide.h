// Which tokens stay, from their scores and marks: thresholds, rankings, whole columns.
#pragma once

#include "cpu/prune_tokens.h"
#include "vico/similarity.h"

namespace vico {
namespace VICO_ISA {

inline int64_t quota_of(const PruneRule& rule, int64_t size) {
  const double share = static_cast<double>(size) * rule.ratio;
  if (rule.quota == PruneQuota::kRatio) return static_cast<int64_t>(share);
  if (rule.quota == PruneQuota::kDropRatio)
    return size - static_cast<int64_t>(share) / rule.drop_multiple * rule.drop_multiple;
  return rule.number;
}

inline float low_score(const PruneRule& rule, float score) {
  return rule.keep == PruneKeep::kBelow || rule.keep == PruneKeep::kAtMost ? score : -score;
}

// Tokens [begin, end) are one step, chunk or call: chooses by score what quota the tokens that must
// stay leave over.
inline void rank_unit(const PruneRule& rule, int64_t begin, int64_t end, Judged* judged) {
  std::vector<uint64_t> keys;
  int64_t room = quota_of(rule, end - begin);
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t marks = judged->marks[i];
    if (must_stay(marks)) {
      --room;
    } else if (!(marks & kMaskedOut)) {
      keys.push_back(rank_key(false, low_score(rule, judged->score[i]), i - begin));
    }
  }
  const int64_t chosen = std::min<int64_t>(room, keys.size());
  if (chosen <= 0) return;
  std::nth_element(keys.begin(), keys.begin() + (chosen - 1), keys.end());
  for (int64_t i = 0; i < chosen; ++i) judged->keep[begin + (keys[i] & 0x7fffffffu)] = 1;
}

// The same where the quota holds for each group of the unit.
inline void rank_groups(const PruneArgs& a, int64_t unit, int64_t begin, int64_t end,
                        Judged* judged) {
  struct Member {
    int32_t group;
    int order;  // must stay, may stay, may not
    uint64_t key;
  };
  std::vector<Member> members;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t group = a.group_ids[i];
    const uint8_t marks = judged->marks[i];
    const bool counted = group >= 0 && (a.group_k == nullptr || group < a.groups);
    const int order = must_stay(marks) ? 0 : counted && !(marks & kMaskedOut) ? 1 : 2;
    members.push_back(
        {group, order, rank_key(false, low_score(a.rule, judged->score[i]), i - begin)});
  }
  std::sort(members.begin(), members.end(), [](const Member& one, const Member& other) {
    if (one.group != other.group) return one.group < other.group;
    return one.order != other.order ? one.order < other.order : one.key < other.key;
  });
  for (size_t first = 0, last; first < members.size(); first = last) {
    for (last = first; last < members.size() && members[last].group == members[first].group;)
      ++last;
    const int32_t group = members[first].group;
    int64_t quota = quota_of(a.rule, last - first);
    if (a.group_k != nullptr)
      quota = group >= 0 && group < a.groups ? a.group_k[unit * a.group_k_unit + group] : 0;
    for (size_t i = first; i < last && static_cast<int64_t>(i - first) < quota; ++i)
      if (members[i].order == 1) judged->keep[begin + (members[i].key & 0x7fffffffu)] = 1;
  }
}

inline void decide(const PruneArgs& a, const std::vector<Segment>& segments, Judged* judged) {
  const PruneRule& rule = a.rule;
  int64_t unit = 0;
  const auto rank = [&](int64_t begin, int64_t end) {
    if (a.group_ids == nullptr) {
      rank_unit(rule, begin, end, judged);
    } else {
      rank_groups(a, unit, begin, end, judged);
    }
    ++unit;
  };
  if (rule.quota == PruneQuota::kNone) {
    for (int64_t i = 0; i < a.total; ++i) judged->keep[i] = passes(rule, judged->score[i]);
  } else if (rule.scope == PruneScope::kCall) {
    rank(0, a.total);
  } else {
    for (const Segment& s : segments) {
      const int64_t length = rule.scope == PruneScope::kStep ? s.places : s.steps * s.places;
      for (int64_t begin = 0; begin < s.steps * s.places; begin += length)
        rank(s.start + begin, s.start + begin + length);
    }
  }
  if (rule.reduce_any) {
    for (const Segment& s : segments) {
      for (int64_t n = 0; n < s.places; ++n) {
        bool any = false;
        for (int64_t t = 0; t < s.steps; ++t) {
          const uint8_t marks = judged->marks[s.at(t, n)];
          const bool broken = (marks & kBroken) && !(marks & kMaskedOut);
          any |= (judged->keep[s.at(t, n)] || broken) && !(marks & kFirstStep);
        }
        for (int64_t t = 0; t < s.steps; ++t) judged->keep[s.at(t, n)] = any;
      }
    }
  }
  for (int64_t i = 0; i < a.total; ++i) {
    const uint8_t marks = judged->marks[i];
    judged->keep[i] = (judged->keep[i] && !(marks & kMaskedOut)) || must_stay(marks);
  }
}

}  // namespace VICO_ISA
}  // namespace vico
