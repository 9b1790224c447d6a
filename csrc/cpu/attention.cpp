// sink_window_attention on the CPU: compiled once per instruction set (see CMakeLists.txt).
//
// Decode is bound by memory at few query heads a KV head and by arithmetic at eight (fp32): each
// visible K and V row is read once for all query rows of its KV head, in place; hidden slots are
// not read at all. Keys are split at fixed multiples of logical positions, the partial sums
// combined in order: no bit depends on the number of threads or on the other streams.

#include "vico/attention.h"

#include <omp.h>

#include <vector>

#include "cpu/attention_engine.h"

namespace vico {
namespace VICO_ISA {
namespace {

// Logical keys a task takes for each group of query rows; long prefills have tasks enough without
// more splits, and their partial sums would grow with rows x keys.
constexpr int64_t kSplitKeys = 512;
// Below so many multiply-adds one thread is done before a second one has woken up.
constexpr int64_t kWorthThreads = 1 << 19;
constexpr int64_t kNoWindow = int64_t{1} << 48;  // room to subtract it from a position

struct Task {
  int64_t stream, unit, units, row0, begin, end;
  int64_t partial;  // row of the partial sums that it writes; -1: it is the only one of its rows
  int rows;
};

struct Group {  // rows whose partial sums are to be combined, or that see nothing
  int64_t stream, unit, units, row0, partial, count;
  int rows;
};

// Tables, lengths and who does what, before any key is read. A unit is a set of query heads that
// share a table and a KV head: all heads of a KV head, or one query head with a table of its own.
template <typename Rows>
struct Plan {
  const AttentionArgs& a;
  int64_t units, share;
  int64_t partials = 0, multiply_adds = 0;
  std::vector<int64_t> starts;  // [S, X, L + 1] logical position of each entry's first slot
  std::vector<Task> tasks;
  std::vector<Group> groups;

  explicit Plan(const AttentionArgs& args)
      : a(args), units(std::max(args.kv_heads, args.tables)), share(args.heads / units) {
    starts.resize(a.streams * a.tables * (a.entries + 1));
    for (int64_t s = 0; s < a.streams; ++s) {
      const int64_t queries = first_row(s + 1) - first_row(s);
      if (queries <= 0) continue;
      for (int64_t x = 0; x < a.tables; ++x) scan(s, x);
      const int64_t rows = queries * share;
      const int64_t parts = (rows + Rows::kMost - 1) / Rows::kMost;
      for (int64_t row0 = 0; row0 < rows; row0 += Rows::kMost)
        split(s, row0, static_cast<int>(std::min<int64_t>(Rows::kMost, rows - row0)), parts);
    }
  }

  int64_t first_row(int64_t s) const {
    return std::clamp<int64_t>(a.cu_seqlens_q[s * a.cu_stride], 0, a.queries);
  }
  int64_t table_of(int64_t unit) const { return unit * a.tables / units; }
  const int64_t* starts_of(int64_t s, int64_t x) const {
    return starts.data() + (s * a.tables + x) * (a.entries + 1);
  }
  int64_t total(int64_t s, int64_t unit) const { return starts_of(s, table_of(unit))[a.entries]; }

  Work work(int64_t s, int64_t unit, int64_t row0, int rows) const {
    Work w;
    w.row0 = row0;
    w.rows = rows;
    w.share = share;
    const int64_t keys = total(s, unit);
    w.first_query = keys - (first_row(s + 1) - first_row(s));
    w.sinks = a.sink_tokens;
    w.window = std::min(a.window, kNoWindow);
    w.start = a.window_start == nullptr ? 0 : a.window_start[s * a.start_stride];
    w.causal = true;
    w.begin = 0;
    w.end = keys;
    w.scale = a.sm_scale;
    w.d = a.head_dim;
    return w;
  }

 private:
  void scan(int64_t s, int64_t x) {
    const int32_t* table = a.page_table + s * a.table_stream + x * a.table_head;
    int64_t* start = starts.data() + (s * a.tables + x) * (a.entries + 1);
    const int64_t length = a.kv_len == nullptr ? INT64_MAX : a.kv_len[s * a.len_stride];
    int64_t at = 0;
    for (int64_t e = 0; e < a.entries; ++e) {
      start[e] = at;
      const int64_t page = table[e * a.table_entry];
      if (page < 0 || page >= a.pages) continue;
      const int64_t fill = a.page_fill == nullptr ? length - at : a.page_fill[page * a.fill_stride];
      at += std::clamp<int64_t>(fill, 0, a.page_size);
    }
    start[a.entries] = at;
  }

  // Units with a table in common are worked on together, as many as scratch memory holds.
  void split(int64_t s, int64_t row0, int rows, int64_t parts) {
    const int64_t keys = kSplitKeys * parts;
    const int64_t together =
        a.tables > 1 ? 1 : std::min<int64_t>(units, Rows::kMost / Rows::padded(rows));
    for (int64_t u = 0; u < units; u += together) {
      const int64_t n = std::min(together, units - u);
      pieces.clear();
      visible_tiles(work(s, u, row0, rows), Rows::kKeys, [&](int64_t first, int tile) {
        multiply_adds += 2 * n * tile * rows * a.head_dim;
        for (const int64_t at : {first / keys * keys, (first + tile - 1) / keys * keys})
          if (pieces.empty() || pieces.back() != at) pieces.push_back(at);
      });
      const int64_t count = static_cast<int64_t>(pieces.size());
      if (count != 1) groups.push_back({s, u, n, row0, partials, count, rows});
      for (const int64_t at : pieces) {
        tasks.push_back({s, u, n, row0, at, at + keys, count == 1 ? -1 : partials, rows});
        if (count != 1) partials += n * rows;
      }
    }
  }

  std::vector<int64_t> pieces;  // first keys of the splits that some row sees
};

// Where one table's keys lie; keys of pages that have moved are rotated.
template <typename T>
class PagedKeys {
 public:
  const int64_t k_unit, v_unit;

  // angles: [kAngleFloats], memory for sines and cosines.
  template <typename Plan>
  PagedKeys(const Plan& plan, const double* turns, const Task& task, float* angles)
      : k_unit(plan.a.k_kv), v_unit(plan.a.v_kv), a_(plan.a), turns_(turns), angles_(angles) {
    std::fill_n(turned_, kAngles, -1);
    const int64_t x = plan.table_of(task.unit);
    const int64_t g = task.unit * a_.kv_heads / plan.units;
    starts_ = plan.starts_of(task.stream, x);
    table_ = a_.page_table + task.stream * a_.table_stream + x * a_.table_head;
    if (a_.page_shift != nullptr)
      shift_ = a_.page_shift + task.stream * a_.shift_stream + x * a_.shift_head;
    k_ = static_cast<const T*>(a_.k_pages) + g * a_.k_kv;
    v_ = static_cast<const T*>(a_.v_pages) + g * a_.v_kv;
  }

  template <int KEYS>
  void locate(int64_t first, int n, Located<T, KEYS>* out) {
    if (first < begin_ || first >= end_)
      enter(std::upper_bound(starts_, starts_ + a_.entries + 1, first) - starts_ - 1);
    for (int j = 0; j < n;) {
      while (first + j >= end_) enter(entry_ + 1);
      const int64_t page = table_[entry_ * a_.table_entry], slot = first + j - begin_;
      const int run = static_cast<int>(std::min<int64_t>(n - j, end_ - first - j));
      const T* k = k_ + page * a_.k_page + slot * a_.k_slot;
      const T* v = v_ + page * a_.v_page + slot * a_.v_slot;
      for (int i = 0; i < run; ++i, ++j, k += a_.k_slot, v += a_.v_slot) {
        out->k[j] = k;
        out->v[j] = v;
        out->entry[j] = entry_;
      }
    }
  }

  int head_dim() const { return a_.head_dim; }
  template <int KEYS>
  bool after(Located<T, KEYS>*) const {
    return false;
  }

  // Whether the keys of an entry must be rotated; makes its angles.
  bool moved(int64_t entry) {
    if (shift_ == nullptr) return false;
    if (turned_[entry % kAngles] != entry) turn(entry);
    return moved_[entry % kAngles];
  }

  const float* key(const T* row, int64_t entry, float* out) {
    if (!moved(entry)) return as_float(row, out, a_.head_dim);
    const int half = a_.head_dim / 2;
    const float *sine = sines(entry), *cosine = sine + kMaxHalfDim;
    alignas(64) float stored[kMaxHeadDim];
    load_row(row, stored, a_.head_dim);
#pragma omp simd
    for (int f = 0; f < half; ++f)
      rotate_pair(stored[f], stored[f + half], cosine[f], sine[f], &out[f], &out[f + half]);
    return out;
  }

 private:
  void enter(int64_t entry) {
    entry_ = entry;
    begin_ = starts_[entry];
    end_ = starts_[entry + 1];
  }

  float* sines(int64_t entry) const { return angles_ + entry % kAngles * 2 * kMaxHalfDim; }

  void turn(int64_t entry) {
    turned_[entry % kAngles] = entry;
    const int32_t* shift = shift_ + entry * a_.shift_entry;
    const int bounds[4] = {0, a_.t_section, a_.t_section + a_.h_section, a_.head_dim / 2};
    bool moved = false;
    for (int axis = 0; axis < 3; ++axis)
      moved |= bounds[axis] < bounds[axis + 1] && shift[axis * a_.shift_axis] != 0;
    moved_[entry % kAngles] = moved;
    if (!moved) return;
    float *sine = sines(entry), *cosine = sine + kMaxHalfDim;
    for (int axis = 0; axis < 3; ++axis) {
      const double position = shift[axis * a_.shift_axis];
#pragma omp simd
      for (int f = bounds[axis]; f < bounds[axis + 1]; ++f)
        sincos_turns(position * turns_[f], &sine[f], &cosine[f]);
    }
  }

  const AttentionArgs& a_;
  const double* turns_;
  float* angles_;
  const int64_t* starts_;
  const int32_t* table_;
  const int32_t* shift_ = nullptr;
  const T *k_, *v_;
  int64_t entry_ = 0, begin_ = 0, end_ = 0;  // where locate stands
  int64_t turned_[kAngles];                  // entries whose angles are at hand, or -1
  bool moved_[kAngles];
};

template <typename T, typename Rows>
class Attention {
 public:
  Attention(const Plan<Rows>& plan, float* memory, int64_t scratches)
      : plan_(plan), a_(plan.a), scratch_(memory) {
    partial_o_ = memory + scratches * Rows::floats(a_.head_dim);
    partial_top_ = partial_o_ + plan.partials * a_.head_dim;
    partial_sum_ = partial_top_ + plan.partials;
    if (a_.page_shift == nullptr) return;
    for (int f = 0; f < a_.head_dim / 2; ++f)
      turns_[f] = static_cast<double>(a_.inv_freq[f]) * kInvTwoPi;
  }

  static int64_t floats(const Plan<Rows>& plan, int64_t scratches) {
    return scratches * Rows::floats(plan.a.head_dim) + plan.partials * (plan.a.head_dim + 2);
  }

  void run(const Task& t, int64_t thread) {
    const int d = a_.head_dim;
    const Rows rows(scratch_ + thread * Rows::floats(d), d, a_.page_shift != nullptr);
    Work w = plan_.work(t.stream, t.unit, t.row0, t.rows);
    w.begin = t.begin;
    w.end = std::min(w.end, t.end);
    const int64_t padded = Rows::padded(t.rows);
    for (int64_t u = 0; u < t.units; ++u) {
      const T* q = static_cast<const T*>(a_.q) + plan_.first_row(t.stream) * a_.q_token +
                   (t.unit + u) * plan_.share * a_.q_head;
      rows.pack(q, a_.q_token, a_.q_head, w, u * padded);
    }
    PagedKeys<T> keys(plan_, turns_, t, rows.m.angles);
    rows.run(w, static_cast<int>(t.units), keys);
    for (int64_t u = 0; u < t.units; ++u) {
      const RowState state = rows.m.state().from(static_cast<int>(u * padded));
      const float* o = rows.m.o + u * padded * d;
      if (t.partial < 0) {
        for (int r = 0; r < t.rows; ++r)
          finish(t.stream, t.unit + u, t.row0 + r, o + int64_t{r} * d, state.top[r], state.sum[r]);
        continue;
      }
      const int64_t at = t.partial + u * t.rows;
      std::memcpy(partial_o_ + at * d, o, sizeof(float) * t.rows * d);
      std::memcpy(partial_top_ + at, state.top, sizeof(float) * t.rows);
      std::memcpy(partial_sum_ + at, state.sum, sizeof(float) * t.rows);
    }
  }

  void combine(const Group& g) {
    const int d = a_.head_dim;
    alignas(64) float row[kMaxHeadDim];
    const int64_t stride = g.units * g.rows;
    for (int64_t r = 0; r < stride; ++r) {
      float top = kNegInf, sum = 0.0f;
      for (int64_t i = 0; i < g.count; ++i)
        top = std::max(top, partial_top_[g.partial + i * stride + r]);
      std::fill_n(row, d, 0.0f);
      for (int64_t i = 0; i < g.count; ++i) {
        const int64_t at = g.partial + i * stride + r;
        if (partial_sum_[at] == 0.0f) continue;  // saw nothing
        const float share = std::exp(partial_top_[at] - top);
        const float* o = partial_o_ + at * d;
        sum += partial_sum_[at] * share;
#pragma omp simd
        for (int c = 0; c < d; ++c) row[c] += o[c] * share;
      }
      finish(g.stream, g.unit + r / g.rows, g.row0 + r % g.rows, row, top, sum);
    }
  }

 private:
  void finish(int64_t stream, int64_t unit, int64_t row, const float* o, float top, float sum) {
    const int64_t token = plan_.first_row(stream) + row / plan_.share;
    const int64_t head = unit * plan_.share + row % plan_.share;
    finish_row(o, top, sum, a_.sink_logits == nullptr ? nullptr : a_.sink_logits + head,
               a_.head_dim, static_cast<T*>(a_.out) + token * a_.out_token + head * a_.out_head,
               a_.lse == nullptr ? nullptr : a_.lse + token * a_.lse_token + head * a_.lse_head);
  }

  const Plan<Rows>& plan_;
  const AttentionArgs& a_;
  float *scratch_, *partial_o_, *partial_top_, *partial_sum_;
  double turns_[kMaxHalfDim];
};

// Rows of no stream.
template <typename T>
void clear_rows(const AttentionArgs& a, int64_t from, int64_t to) {
  for (int64_t n = from; n < to; ++n)
    for (int64_t h = 0; h < a.heads; ++h) {
      std::memset(static_cast<T*>(a.out) + n * a.out_token + h * a.out_head, 0,
                  a.head_dim * sizeof(T));
      if (a.lse != nullptr) a.lse[n * a.lse_token + h * a.lse_head] = kNegInf;
    }
}

template <typename T, typename Rows>
void run(const AttentionArgs& a, int n_threads) {
  const Plan<Rows> plan(a);
  if (plan.multiply_adds < kWorthThreads) n_threads = 1;
  const int64_t tasks = static_cast<int64_t>(plan.tasks.size());
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  n_threads = static_cast<int>(std::clamp<int64_t>(n_threads, 1, std::max<int64_t>(tasks, 1)));
  Memory memory(Attention<T, Rows>::floats(plan, n_threads));
  Attention<T, Rows> attention(plan, memory.at, n_threads);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
  {
    const int thread = omp_get_thread_num();
    [[maybe_unused]] const typename Rows::Session session;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) attention.run(plan.tasks[i], thread);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < groups; ++i) attention.combine(plan.groups[i]);
  }
  clear_rows<T>(a, 0, plan.first_row(0));
  clear_rows<T>(a, plan.first_row(a.streams), a.queries);
}

}  // namespace

void sink_window_attention(const AttentionArgs& a, int n_threads) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run<float, EngineOf<float>>(a, n_threads);
    case DType::kFloat16:
      return run<Half, EngineOf<Half>>(a, n_threads);
    case DType::kBFloat16:
      return run<BFloat16, EngineOf<BFloat16>>(a, n_threads);
  }
}

}  // namespace VICO_ISA
}  // namespace vico
