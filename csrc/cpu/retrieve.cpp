// summarize_blocks and select_pages on the CPU: compiled once per instruction set.
//
// Summaries are bound by memory: every listed key is read once. The page list is O(pages listed):
// a hash set of the pages seen so far, so that page numbers may be anything and no pool is scanned.

#include "vico/retrieve.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/rows.h"
#include "vico/append.h"
#include "vico/rotary.h"

namespace vico {
namespace VICO_ISA {
namespace {

// KV heads [first, last) of one block, tokens in order: the bits that rope_append's running sums
// and bounds have.
template <typename T>
void summarize_block(const SummarizeArgs& a, int64_t block, int64_t first, int64_t last) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const int d = a.head_dim;
  const bool mean = a.second == nullptr;
  const int64_t row = a.kv_heads * d, cells = (mean ? 1 : a.sub) * row;
  float* low = a.first + block * cells;
  float* high = mean ? nullptr : a.second + block * cells;
  for (int64_t part = 0; part < (mean ? 1 : a.sub); ++part) {
    std::fill(low + part * row + first * d, low + part * row + last * d, mean ? 0.0f : kInf);
    if (!mean) std::fill(high + part * row + first * d, high + part * row + last * d, -kInf);
  }
  alignas(64) float key[kMaxHeadDim];
  int64_t tokens = 0;
  for (int64_t m = 0; m < a.width; ++m) {
    const int64_t page = a.block_pages[block * a.width + m];
    if (page < 0 || page >= a.pages) continue;
    const int64_t fill = std::clamp<int64_t>(a.page_fill[page], 0, a.page_size);
    tokens += fill;
    for (int64_t offset = 0; offset < fill; ++offset) {
      const int64_t at = (mean ? 0 : offset * a.sub / a.page_size) * row;
      for (int64_t g = first; g < last; ++g) {
        load_row(
            static_cast<const T*>(a.k_pages) + page * a.k_page + offset * a.k_slot + g * a.k_kv,
            key, d);
        float* kept = low + at + g * d;
        if (mean) {
#pragma omp simd
          for (int i = 0; i < d; ++i) kept[i] += key[i];
          continue;
        }
        float* top = high + at + g * d;
#pragma omp simd
        for (int i = 0; i < d; ++i) {
          kept[i] = bound_min(kept[i], key[i]);
          top[i] = bound_max(top[i], key[i]);
        }
      }
    }
  }
  if (!mean) return;
  const float count = static_cast<float>(tokens);
#pragma omp simd
  for (int64_t i = first * d; i < last * d; ++i) low[i] /= count;
  if (first == 0) a.count[block] = static_cast<int32_t>(tokens);
}

template <typename T>
void summarize(const SummarizeArgs& a, int n_threads) {
  // Few blocks: the heads of one are shared out. The bits are the same.
  const bool split = a.blocks < n_threads;
  const int64_t heads = split ? 1 : a.kv_heads, pieces = split ? a.kv_heads : 1;
#pragma omp parallel for num_threads(n_threads) schedule(static) if (a.blocks * a.width > 1)
  for (int64_t i = 0; i < a.blocks * pieces; ++i) {
    const int64_t first = i % pieces * heads;
    summarize_block<T>(a, i / pieces, first, first + heads);
  }
}

// The pages listed so far: open addressing, at most half full.
class Seen {
 public:
  explicit Seen(int64_t most) {
    while (size_t{1} << bits_ < 2 * static_cast<size_t>(most)) ++bits_;
    cells_.resize(size_t{1} << bits_);
  }
  void clear() { std::fill(cells_.begin(), cells_.end(), -1); }
  // Whether the page is a new one; from now on it is not. Page numbers below 0 never are.
  bool add(int32_t page) {
    if (page < 0) return false;
    const size_t mask = cells_.size() - 1;
    // The top bits of the product: neighbours in the pool fall far apart.
    size_t at = static_cast<uint32_t>(page) * 2654435769u >> (32 - bits_);
    while (cells_[at] >= 0) {
      if (cells_[at] == page) return false;
      at = (at + 1) & mask;
    }
    cells_[at] = page;
    return true;
  }

 private:
  int bits_ = 3;
  std::vector<int32_t> cells_;
};

void list_row(const PagesArgs& a, int64_t row, Seen& seen, std::vector<int32_t>& tail) {
  const int64_t stream = row / a.rows, length = a.sinks + a.chosen * a.width + a.recent;
  int32_t* out = a.page_table + row * length;
  int32_t* const end = out + length;
  seen.clear();
  for (int64_t i = 0; i < a.sinks; ++i) {
    const int32_t page = a.sink_pages[stream * a.sinks + i];
    if (seen.add(page)) *out++ = page;
  }
  // Recent pages are claimed before the blocks can list them, and stand after them.
  tail.clear();
  for (int64_t i = 0; i < a.recent; ++i) {
    const int32_t page = a.recent_pages[stream * a.recent + i];
    if (seen.add(page)) tail.push_back(page);
  }
  for (int64_t i = 0; i < a.chosen; ++i) {
    const int64_t block = a.block_index[row * a.chosen + i];
    if (block < 0 || block >= a.blocks) continue;
    const int32_t* pages = a.block_pages + (stream * a.blocks + block) * a.width;
    for (int64_t m = 0; m < a.width; ++m)
      if (seen.add(pages[m])) *out++ = pages[m];
  }
  out = std::copy(tail.begin(), tail.end(), out);
  std::fill(out, end, -1);
}

}  // namespace

void summarize_blocks(const SummarizeArgs& a, int n_threads) {
  switch (a.dtype) {
    case DType::kFloat32:
      return summarize<float>(a, n_threads);
    case DType::kFloat16:
      return summarize<Half>(a, n_threads);
    case DType::kBFloat16:
      return summarize<BFloat16>(a, n_threads);
  }
}

void select_pages(const PagesArgs& a, int n_threads) {
  const int64_t rows = a.streams * a.rows, length = a.sinks + a.chosen * a.width + a.recent;
  const auto list = [&](auto each_row) {
    Seen seen(length);
    std::vector<int32_t> tail;
    tail.reserve(a.recent);
    each_row([&](int64_t row) { list_row(a, row, seen, tail); });
  };
  if (rows == 1 || rows * length <= 8192) {  // a team of one thread takes longer than a short list
    list([&](auto run) {
      for (int64_t row = 0; row < rows; ++row) run(row);
    });
    return;
  }
#pragma omp parallel num_threads(n_threads)
  list([&](auto run) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) run(row);
  });
}

}  // namespace VICO_ISA
}  // namespace vico
