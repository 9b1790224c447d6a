// varlen_attention and merge_states on the CPU: compiled once per instruction set.
//
// Windows of the ViT are small (64 queries and keys): bound by arithmetic, all their data in L1 and
// L2. One task is a window, a head and as many of its queries as an engine takes.

#include <omp.h>

#include <vector>

#include "cpu/attention_engine.h"
#include "vico/attention.h"

namespace vico {
namespace VICO_ISA {
namespace {

constexpr int64_t kWorthThreads = 1 << 19;  // multiply-adds

struct Task {
  int64_t window, head, row0;
};

struct Windows {
  const VarlenArgs& a;
  int most;  // queries a task
  std::vector<Task> tasks;
  int64_t multiply_adds = 0;

  Windows(const VarlenArgs& args, int rows_a_task) : a(args), most(rows_a_task) {
    for (int64_t w = 0; w < a.windows; ++w) {
      const int64_t rows = first_query(w + 1) - first_query(w);
      const int64_t keys = std::max<int64_t>(first_key(w + 1) - first_key(w), 0);
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t row0 = 0; row0 < rows; row0 += most) tasks.push_back({w, h, row0});
      multiply_adds += int64_t{2} * a.heads * std::max<int64_t>(rows, 0) * keys * a.head_dim;
    }
  }
  int64_t first_query(int64_t w) const {
    return std::clamp<int64_t>(a.cu_seqlens_q[w * a.cu_q_stride], 0, a.queries);
  }
  int64_t first_key(int64_t w) const {
    return std::clamp<int64_t>(a.cu_seqlens_k[w * a.cu_k_stride], 0, a.keys);
  }
};

// Where the keys of one window and head lie.
template <typename T>
struct WindowKeys {
  const T *k, *v;
  int64_t k_token, v_token;
  int d;
  int64_t k_next, v_next, keys_next;  // to the head after this one, and how many keys it has
  int64_t k_unit = 0, v_unit = 0;

  template <int KEYS>
  void locate(int64_t first, int n, Located<T, KEYS>* out) const {
    for (int j = 0; j < n; ++j) {
      out->k[j] = k + (first + j) * k_token;
      out->v[j] = v + (first + j) * v_token;
      out->entry[j] = 0;
    }
  }
  // The first tile of what this thread is likely to do next: windows have few tiles.
  template <int KEYS>
  bool after(Located<T, KEYS>* out) const {
    out->n = static_cast<int>(std::min<int64_t>(KEYS, keys_next));
    for (int j = 0; j < out->n; ++j) {
      out->k[j] = k + k_next + j * k_token;
      out->v[j] = v + v_next + j * v_token;
    }
    return keys_next > 0;
  }
  int head_dim() const { return d; }
  bool moved(int64_t) const { return false; }
  const float* key(const T* row, int64_t, float* out) const { return as_float(row, out, d); }
};

template <typename T>
void attend_task(const Windows& windows, const Task& t, const EngineOf<T>& engine) {
  const VarlenArgs& a = windows.a;
  const int64_t first_query = windows.first_query(t.window) + t.row0;
  const int64_t first_key = windows.first_key(t.window);
  Work w;
  w.row0 = 0;
  w.rows = static_cast<int>(
      std::min<int64_t>(windows.most, windows.first_query(t.window + 1) - first_query));
  w.share = 1;
  w.first_query = 0;
  w.sinks = w.window = w.start = 0;
  w.causal = false;
  w.begin = 0;
  w.end = std::max<int64_t>(windows.first_key(t.window + 1) - first_key, 0);
  w.scale = a.sm_scale;
  w.d = a.head_dim;
  const T* q = static_cast<const T*>(a.q) + first_query * a.q_token + t.head * a.q_head;
  engine.pack(q, a.q_token, a.q_head, w, 0);
  WindowKeys<T> keys{static_cast<const T*>(a.k) + first_key * a.k_token + t.head * a.k_head,
                     static_cast<const T*>(a.v) + first_key * a.v_token + t.head * a.v_head,
                     a.k_token,
                     a.v_token,
                     a.head_dim,
                     a.k_head,
                     a.v_head,
                     t.head + 1 < a.heads ? w.end : 0};
  engine.run(w, 1, keys);
  const RowState state = engine.m.state();
  T* out = static_cast<T*>(a.out) + first_query * a.out_token + t.head * a.out_head;
  for (int r = 0; r < w.rows; ++r)
    finish_row(engine.m.o + int64_t{r} * w.d, state.top[r], state.sum[r], nullptr, w.d,
               out + r * a.out_token, nullptr);
}

template <typename T>
void varlen(const VarlenArgs& a, int n_threads) {
  using Engine = EngineOf<T>;
  const Windows windows(a, Engine::kMost);
  const int64_t tasks = static_cast<int64_t>(windows.tasks.size());
  if (windows.multiply_adds < kWorthThreads) n_threads = 1;
  n_threads = static_cast<int>(std::clamp<int64_t>(n_threads, 1, std::max<int64_t>(tasks, 1)));
  const int64_t each = Engine::floats(a.head_dim);
  Memory memory(each * n_threads);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  {
    [[maybe_unused]] const typename Engine::Session session;
    const Engine engine(memory.at + each * omp_get_thread_num(), a.head_dim, false);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < tasks; ++i) attend_task<T>(windows, windows.tasks[i], engine);
  }
  const int64_t ranges[2][2] = {{0, windows.first_query(0)},
                                {windows.first_query(a.windows), a.queries}};
  for (const auto& range : ranges)
    for (int64_t n = range[0]; n < range[1]; ++n)
      for (int64_t h = 0; h < a.heads; ++h)
        std::memset(static_cast<T*>(a.out) + n * a.out_token + h * a.out_head, 0,
                    a.head_dim * sizeof(T));
}

template <typename T>
void merge_row(const MergeArgs& a, int64_t n) {
  const int d = a.head_dim;
  alignas(64) float row[kMaxHeadDim], other[kMaxHeadDim];
  const float lse[2] = {a.lse_a[n], a.lse_b[n]};
  const float top = std::max(lse[0], lse[1]);
  const bool nothing = top == kNegInf;
  const float total =
      nothing ? kNegInf : top + std::log(std::exp(lse[0] - top) + std::exp(lse[1] - top));
  std::fill_n(row, d, 0.0f);
  for (int part = 0; part < 2; ++part) {
    if (lse[part] == kNegInf) continue;  // whatever its output holds
    load_row(static_cast<const T*>(part == 0 ? a.out_a : a.out_b) + n * d, other, d);
    const float share = std::exp(lse[part] - total);
#pragma omp simd
    for (int c = 0; c < d; ++c) row[c] += other[c] * share;
  }
  store_row(row, static_cast<T*>(a.out) + n * d, d);
  a.lse[n] = total;
}

template <typename T>
void merge(const MergeArgs& a, int n_threads) {
#pragma omp parallel for num_threads(n_threads) if (a.rows * a.head_dim > kWorthThreads)
  for (int64_t n = 0; n < a.rows; ++n) merge_row<T>(a, n);
}

}  // namespace

void varlen_attention(const VarlenArgs& a, int n_threads) {
  switch (a.dtype) {
    case DType::kFloat32:
      return varlen<float>(a, n_threads);
    case DType::kFloat16:
      return varlen<Half>(a, n_threads);
    case DType::kBFloat16:
      return varlen<BFloat16>(a, n_threads);
  }
}

void merge_states(const MergeArgs& a, int n_threads) {
  switch (a.dtype) {
    case DType::kFloat32:
      return merge<float>(a, n_threads);
    case DType::kFloat16:
      return merge<Half>(a, n_threads);
    case DType::kBFloat16:
      return merge<BFloat16>(a, n_threads);
  }
}

}  // namespace VICO_ISA
}  // namespace vico
