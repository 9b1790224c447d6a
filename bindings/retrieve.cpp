#include "vico/retrieve.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "module.h"
#if defined(VICO_WITH_CUDA)
#include "cuda/retrieve.h"
#endif

namespace py = pybind11;

namespace vico {
namespace {

using Address = std::uintptr_t;

template <size_t N>
using Sizes = std::array<int64_t, N>;

// k_pages, block_pages, page_fill, first, second, count; pages, page_size, kv_heads, blocks, width,
// sub; the strides of k_pages but the last.
SummarizeArgs summarize_args(int dtype, int head_dim, const std::array<Address, 6>& at,
                             const Sizes<6>& sizes, const Sizes<3>& strides) {
  SummarizeArgs a{};
  a.k_pages = pointer<void>(at[0]);
  a.block_pages = pointer<int32_t>(at[1]);
  a.page_fill = pointer<int32_t>(at[2]);
  a.first = pointer<float>(at[3]);
  a.second = pointer<float>(at[4]);
  a.count = pointer<int32_t>(at[5]);
  a.dtype = static_cast<DType>(dtype);
  a.head_dim = head_dim;
  std::tie(a.pages, a.page_size, a.kv_heads, a.blocks, a.width, a.sub) = std::tuple_cat(sizes);
  std::tie(a.k_page, a.k_slot, a.k_kv) = std::tuple_cat(strides);
  return a;
}

// Query and summary dtype, score, pool, scope; query, summary, summary_max, count, cu_seqlens,
// num_blocks, scores; tokens, heads, kv_heads, head_dim, streams, blocks, sub; the strides of
// query, of the summaries (stream, block, part, head) and of count.
ScoreArgs score_args(const std::array<int, 5>& kinds, float sm_scale,
                     const std::array<Address, 7>& at, const Sizes<7>& sizes, const Sizes<2>& query,
                     const Sizes<4>& summary, const Sizes<4>& summary_max, int64_t count_stream) {
  ScoreArgs a{};
  a.query_dtype = static_cast<DType>(kinds[0]);
  a.summary_dtype = static_cast<DType>(kinds[1]);
  a.score = static_cast<Score>(kinds[2]);
  a.pool = static_cast<Pool>(kinds[3]);
  a.scope = static_cast<Scope>(kinds[4]);
  a.sm_scale = sm_scale;
  a.query = pointer<void>(at[0]);
  a.summary = pointer<void>(at[1]);
  a.summary_max = pointer<void>(at[2]);
  a.count = pointer<int32_t>(at[3]);
  a.cu_seqlens = pointer<int32_t>(at[4]);
  a.num_blocks = pointer<int32_t>(at[5]);
  a.scores = pointer<float>(at[6]);
  std::tie(a.tokens, a.heads, a.kv_heads, a.head_dim, a.streams, a.blocks, a.sub) =
      std::tuple_cat(sizes);
  std::tie(a.q_token, a.q_head) = std::tuple_cat(query);
  std::tie(a.sum_stream, a.sum_block, a.sum_sub, a.sum_kv) = std::tuple_cat(summary);
  std::tie(a.max_stream, a.max_block, a.max_sub, a.max_kv) = std::tuple_cat(summary_max);
  a.count_stream = count_stream;
  return a;
}

// scores, num_blocks, block_tokens, index, chosen; streams, rows, blocks, capacity, target, min_k,
// group, force_first, force_last.
SelectArgs select_args(int rule, double amount, const std::array<Address, 5>& at,
                       const Sizes<9>& sizes) {
  SelectArgs a{};
  a.rule = static_cast<Rule>(rule);
  a.amount = amount;
  a.scores = pointer<float>(at[0]);
  a.num_blocks = pointer<int32_t>(at[1]);
  a.block_tokens = pointer<int32_t>(at[2]);
  a.index = pointer<int32_t>(at[3]);
  a.chosen = pointer<int32_t>(at[4]);
  std::tie(a.streams, a.rows, a.blocks, a.capacity, a.target, a.min_k, a.group, a.force_first,
           a.force_last) = std::tuple_cat(sizes);
  return a;
}

// Scoring and choice in one call; addresses are filled in per call, so that one layout serves many.
struct TopkLayout {
  ScoreArgs score;
  SelectArgs select;
};

// query, summary, summary_max, count, cu_seqlens, num_blocks, block_tokens, scores, index, chosen.
TopkLayout with_addresses(TopkLayout a, const std::array<Address, 10>& at) {
  a.score.query = pointer<void>(at[0]);
  a.score.summary = pointer<void>(at[1]);
  a.score.summary_max = pointer<void>(at[2]);
  a.score.count = pointer<int32_t>(at[3]);
  a.score.cu_seqlens = pointer<int32_t>(at[4]);
  a.score.num_blocks = a.select.num_blocks = pointer<int32_t>(at[5]);
  a.select.block_tokens = pointer<int32_t>(at[6]);
  a.score.scores = a.select.scores = pointer<float>(at[7]);
  a.select.index = pointer<int32_t>(at[8]);
  a.select.chosen = pointer<int32_t>(at[9]);
  return a;
}

// block_index, block_pages, sink_pages, recent_pages, page_table.
PagesArgs with_addresses(PagesArgs a, const std::array<Address, 5>& at) {
  a.block_index = pointer<int32_t>(at[0]);
  a.block_pages = pointer<int32_t>(at[1]);
  a.sink_pages = pointer<int32_t>(at[2]);
  a.recent_pages = pointer<int32_t>(at[3]);
  a.page_table = pointer<int32_t>(at[4]);
  return a;
}

// streams, rows, chosen, blocks, width, sinks, recent.
PagesArgs pages_layout(const Sizes<7>& sizes) {
  PagesArgs a{};
  std::tie(a.streams, a.rows, a.chosen, a.blocks, a.width, a.sinks, a.recent) =
      std::tuple_cat(sizes);
  return a;
}

#if defined(VICO_WITH_CUDA)
// Calls run() without the GIL and raises what it says.
template <typename Run>
void launched(const char* op, Run&& run) {
  const char* error;
  {
    py::gil_scoped_release release;
    error = run();
  }
  if (error != nullptr) throw std::runtime_error(std::string(op) + ": CUDA: " + error);
}

void bind_retrieve_cuda(py::module_& m) {
  m.def(
      "summarize_blocks_cuda",
      [](int dtype, int head_dim, const std::array<Address, 6>& addresses, const Sizes<6>& sizes,
         const Sizes<3>& strides, Address stream) {
        const SummarizeArgs args = summarize_args(dtype, head_dim, addresses, sizes, strides);
        launched("summarize_blocks",
                 [&] { return summarize_blocks_cuda(args, pointer<void>(stream)); });
      },
      py::arg("dtype"), py::arg("head_dim"), py::arg("addresses"), py::arg("sizes"),
      py::arg("strides"), py::arg("stream"));
  py::class_<ScoreArgs>(m, "ScoreCall")
      .def(py::init(&score_args), py::arg("kinds"), py::arg("sm_scale"), py::arg("addresses"),
           py::arg("sizes"), py::arg("query"), py::arg("summary"), py::arg("summary_max"),
           py::arg("count_stream"));
  m.def("score_blocks_workspace", &score_blocks_workspace, py::arg("call"));
  m.def(
      "score_blocks_cuda",
      [](const ScoreArgs& call, Address workspace, Address stream) {
        launched("topk_blocks", [&] {
          return score_blocks_cuda(call, pointer<void>(workspace), pointer<void>(stream));
        });
      },
      py::arg("call"), py::arg("workspace"), py::arg("stream"));
  m.def(
      "select_blocks_workspace",
      [](int rule, const Sizes<9>& sizes) {
        return select_blocks_workspace(select_args(rule, 0.0, {}, sizes));
      },
      py::arg("rule"), py::arg("sizes"));
  m.def(
      "select_blocks_cuda",
      [](int rule, double amount, const std::array<Address, 5>& addresses, const Sizes<9>& sizes,
         Address workspace, Address stream) {
        const SelectArgs args = select_args(rule, amount, addresses, sizes);
        launched("topk_blocks", [&] {
          return select_blocks_cuda(args, pointer<void>(workspace), pointer<void>(stream));
        });
      },
      py::arg("rule"), py::arg("amount"), py::arg("addresses"), py::arg("sizes"),
      py::arg("workspace"), py::arg("stream"));
  m.def(
      "select_block_pages_workspace",
      [](int rule, const Sizes<9>& sizes, const Sizes<7>& pages) {
        return select_block_pages_workspace(select_args(rule, 0.0, {}, sizes), pages_layout(pages));
      },
      py::arg("rule"), py::arg("sizes"), py::arg("pages"));
  m.def(
      "select_block_pages_cuda",
      [](int rule, double amount, const std::array<Address, 5>& addresses, const Sizes<9>& sizes,
         const std::array<Address, 5>& page_addresses, const Sizes<7>& page_sizes,
         Address workspace, Address stream) {
        const SelectArgs args = select_args(rule, amount, addresses, sizes);
        const PagesArgs pages = with_addresses(pages_layout(page_sizes), page_addresses);
        launched("topk_pages", [&] {
          return select_block_pages_cuda(args, pages, pointer<void>(workspace),
                                         pointer<void>(stream));
        });
      },
      py::arg("rule"), py::arg("amount"), py::arg("addresses"), py::arg("sizes"),
      py::arg("page_addresses"), py::arg("page_sizes"), py::arg("workspace"), py::arg("stream"));
  m.def(
      "select_pages_workspace",
      [](const Sizes<7>& sizes) { return select_pages_workspace(pages_layout(sizes)); },
      py::arg("sizes"));
  m.def(
      "select_pages_cuda",
      [](const std::array<Address, 5>& addresses, const Sizes<7>& sizes, Address workspace,
         Address stream) {
        const PagesArgs args = with_addresses(pages_layout(sizes), addresses);
        launched("select_pages", [&] {
          return select_pages_cuda(args, pointer<void>(workspace), pointer<void>(stream));
        });
      },
      py::arg("addresses"), py::arg("sizes"), py::arg("workspace"), py::arg("stream"));
}
#endif

}  // namespace

void bind_retrieve(py::module_& m) {
#if defined(VICO_WITH_CUDA)
  bind_retrieve_cuda(m);
#endif
  m.def(
      "summarize_blocks_cpu",
      [](int dtype, int head_dim, const std::array<Address, 6>& addresses, const Sizes<6>& sizes,
         const Sizes<3>& strides, int n_threads) {
        const SummarizeArgs args = summarize_args(dtype, head_dim, addresses, sizes, strides);
        py::gil_scoped_release release;
        cpu::summarize_blocks(args, n_threads);
      },
      py::arg("dtype"), py::arg("head_dim"), py::arg("addresses"), py::arg("sizes"),
      py::arg("strides"), py::arg("n_threads"));
  m.def(
      "score_blocks_cpu",
      [](const std::array<int, 5>& kinds, float sm_scale, const std::array<Address, 7>& addresses,
         const Sizes<7>& sizes, const Sizes<2>& query, const Sizes<4>& summary,
         const Sizes<4>& summary_max, int64_t count_stream, int n_threads) {
        const ScoreArgs args = score_args(kinds, sm_scale, addresses, sizes, query, summary,
                                          summary_max, count_stream);
        py::gil_scoped_release release;
        cpu::score_blocks(args, n_threads);
      },
      py::arg("kinds"), py::arg("sm_scale"), py::arg("addresses"), py::arg("sizes"),
      py::arg("query"), py::arg("summary"), py::arg("summary_max"), py::arg("count_stream"),
      py::arg("n_threads"));
  m.def(
      "select_blocks_cpu",
      [](int rule, double amount, const std::array<Address, 5>& addresses, const Sizes<9>& sizes,
         int n_threads) {
        const SelectArgs args = select_args(rule, amount, addresses, sizes);
        py::gil_scoped_release release;
        cpu::select_blocks(args, n_threads);
      },
      py::arg("rule"), py::arg("amount"), py::arg("addresses"), py::arg("sizes"),
      py::arg("n_threads"));
  py::class_<TopkLayout>(m, "TopkLayout")
      .def(py::init([](const std::array<int, 5>& kinds, float sm_scale,
                       const std::array<Address, 7>& addresses, const Sizes<7>& sizes,
                       const Sizes<2>& query, const Sizes<4>& summary, const Sizes<4>& summary_max,
                       int64_t count_stream, int rule, double amount, const Sizes<9>& choice) {
             return TopkLayout{score_args(kinds, sm_scale, addresses, sizes, query, summary,
                                          summary_max, count_stream),
                               select_args(rule, amount, {}, choice)};
           }),
           py::arg("kinds"), py::arg("sm_scale"), py::arg("addresses"), py::arg("sizes"),
           py::arg("query"), py::arg("summary"), py::arg("summary_max"), py::arg("count_stream"),
           py::arg("rule"), py::arg("amount"), py::arg("choice"));
  m.def(
      "topk_blocks_cpu",
      [](const TopkLayout& layout, const std::array<Address, 10>& addresses, int n_threads) {
        const TopkLayout args = with_addresses(layout, addresses);
        py::gil_scoped_release release;
        cpu::score_blocks(args.score, n_threads);
        cpu::select_blocks(args.select, n_threads);
      },
      py::arg("layout"), py::arg("addresses"), py::arg("n_threads"));
  py::class_<PagesArgs>(m, "PagesLayout").def(py::init(&pages_layout), py::arg("sizes"));
  m.def(
      "topk_pages_cpu",
      [](const TopkLayout& layout, const std::array<Address, 10>& addresses,
         const PagesArgs& page_layout, const std::array<Address, 5>& page_addresses,
         int n_threads) {
        const TopkLayout args = with_addresses(layout, addresses);
        const PagesArgs pages = with_addresses(page_layout, page_addresses);
        py::gil_scoped_release release;
        cpu::score_blocks(args.score, n_threads);
        cpu::select_blocks(args.select, n_threads);
        cpu::select_pages(pages, n_threads);
      },
      py::arg("layout"), py::arg("addresses"), py::arg("page_layout"), py::arg("page_addresses"),
      py::arg("n_threads"));
  m.def(
      "select_pages_cpu",
      [](const PagesArgs& layout, Address block_index, Address block_pages, Address sink_pages,
         Address recent_pages, Address page_table, int n_threads) {
        const PagesArgs args = with_addresses(
            layout, {block_index, block_pages, sink_pages, recent_pages, page_table});
        py::gil_scoped_release release;
        cpu::select_pages(args, n_threads);
      },
      py::arg("layout"), py::arg("block_index"), py::arg("block_pages"), py::arg("sink_pages"),
      py::arg("recent_pages"), py::arg("page_table"), py::arg("n_threads"));
}

}  // namespace vico
