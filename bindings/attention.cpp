#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "module.h"
#if defined(VICO_WITH_CUDA)
#include "cuda/attention.h"
#endif

namespace py = pybind11;

namespace vico {
namespace {

using Address = std::uintptr_t;

template <size_t N>
using Sizes = std::array<int64_t, N>;

// Sizes and strides; addresses are filled in per call, so that one layout serves many calls. The
// last stride of q, out and the pages is 1 and left out; absent tensors have strides of 0.
AttentionArgs make_layout(int dtype, Sizes<8> sizes, int head_dim, std::array<int, 2> sections,
                          int64_t sink_tokens, int64_t window, float sm_scale, Sizes<2> q,
                          Sizes<2> out, Sizes<2> lse, Sizes<3> k_pages, Sizes<3> v_pages,
                          Sizes<3> page_table, Sizes<4> page_shift, Sizes<4> vectors) {
  AttentionArgs a{};
  a.dtype = static_cast<DType>(dtype);
  std::tie(a.queries, a.heads, a.kv_heads, a.pages, a.page_size, a.streams, a.tables, a.entries) =
      std::tuple_cat(sizes);
  a.head_dim = head_dim;
  a.t_section = sections[0];
  a.h_section = sections[1];
  a.sink_tokens = sink_tokens;
  a.window = window;
  a.sm_scale = sm_scale;
  std::tie(a.q_token, a.q_head) = std::tuple_cat(q);
  std::tie(a.out_token, a.out_head) = std::tuple_cat(out);
  std::tie(a.lse_token, a.lse_head) = std::tuple_cat(lse);
  std::tie(a.k_page, a.k_slot, a.k_kv) = std::tuple_cat(k_pages);
  std::tie(a.v_page, a.v_slot, a.v_kv) = std::tuple_cat(v_pages);
  std::tie(a.table_stream, a.table_head, a.table_entry) = std::tuple_cat(page_table);
  std::tie(a.shift_stream, a.shift_head, a.shift_entry, a.shift_axis) = std::tuple_cat(page_shift);
  std::tie(a.cu_stride, a.len_stride, a.fill_stride, a.start_stride) = std::tuple_cat(vectors);
  return a;
}

// q, k_pages, v_pages, page_table, cu_seqlens_q, kv_len, page_fill, window_start, sink_logits,
// page_shift, inv_freq, out, lse.
using Addresses = std::array<Address, 13>;

AttentionArgs with_addresses(AttentionArgs a, const Addresses& at) {
  a.q = pointer<void>(at[0]);
  a.k_pages = pointer<void>(at[1]);
  a.v_pages = pointer<void>(at[2]);
  a.page_table = pointer<int32_t>(at[3]);
  a.cu_seqlens_q = pointer<int32_t>(at[4]);
  a.kv_len = pointer<int32_t>(at[5]);
  a.page_fill = pointer<int32_t>(at[6]);
  a.window_start = pointer<int32_t>(at[7]);
  a.sink_logits = pointer<float>(at[8]);
  a.page_shift = pointer<int32_t>(at[9]);
  a.inv_freq = pointer<float>(at[10]);
  a.out = pointer<void>(at[11]);
  a.lse = pointer<float>(at[12]);
  return a;
}

VarlenArgs make_varlen_layout(int dtype, Sizes<4> sizes, int head_dim, float sm_scale, Sizes<2> q,
                              Sizes<2> k, Sizes<2> v, Sizes<2> out, Sizes<2> vectors) {
  VarlenArgs a{};
  a.dtype = static_cast<DType>(dtype);
  std::tie(a.queries, a.keys, a.heads, a.windows) = std::tuple_cat(sizes);
  a.head_dim = head_dim;
  a.sm_scale = sm_scale;
  std::tie(a.q_token, a.q_head) = std::tuple_cat(q);
  std::tie(a.k_token, a.k_head) = std::tuple_cat(k);
  std::tie(a.v_token, a.v_head) = std::tuple_cat(v);
  std::tie(a.out_token, a.out_head) = std::tuple_cat(out);
  std::tie(a.cu_q_stride, a.cu_k_stride) = std::tuple_cat(vectors);
  return a;
}

void varlen_cpu(VarlenArgs a, const std::array<Address, 6>& at, int n_threads) {
  py::gil_scoped_release release;
  a.q = pointer<void>(at[0]);
  a.k = pointer<void>(at[1]);
  a.v = pointer<void>(at[2]);
  a.cu_seqlens_q = pointer<int32_t>(at[3]);
  a.cu_seqlens_k = pointer<int32_t>(at[4]);
  a.out = pointer<void>(at[5]);
  cpu::varlen_attention(a, n_threads);
}

void merge_cpu(int dtype, int64_t rows, int head_dim, const std::array<Address, 6>& at,
               int n_threads) {
  py::gil_scoped_release release;
  MergeArgs a{};
  a.dtype = static_cast<DType>(dtype);
  a.rows = rows;
  a.head_dim = head_dim;
  a.out_a = pointer<void>(at[0]);
  a.lse_a = pointer<float>(at[1]);
  a.out_b = pointer<void>(at[2]);
  a.lse_b = pointer<float>(at[3]);
  a.out = pointer<void>(at[4]);
  a.lse = pointer<float>(at[5]);
  cpu::merge_states(a, n_threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<AttentionArgs>(m, "AttentionLayout")
      .def(py::init(&make_layout), py::arg("dtype"), py::arg("sizes"), py::arg("head_dim"),
           py::arg("sections"), py::arg("sink_tokens"), py::arg("window"), py::arg("sm_scale"),
           py::arg("q"), py::arg("out"), py::arg("lse"), py::arg("k_pages"), py::arg("v_pages"),
           py::arg("page_table"), py::arg("page_shift"), py::arg("vectors"));
  m.def(
      "sink_window_attention_cpu",
      [](const AttentionArgs& layout, const Addresses& addresses, int n_threads) {
        py::gil_scoped_release release;
        cpu::sink_window_attention(with_addresses(layout, addresses), n_threads);
      },
      py::arg("layout"), py::arg("addresses"), py::arg("n_threads"));
#if defined(VICO_WITH_CUDA)
  m.def("sink_window_attention_workspace", &attention_decode_workspace, py::arg("layout"));
  m.def(
      "sink_window_attention_cuda",
      [](const AttentionArgs& layout, const Addresses& addresses, Address workspace,
         int64_t rows_hint, Address stream) {
        const char* error;
        {
          py::gil_scoped_release release;
          error = sink_window_attention_cuda(with_addresses(layout, addresses),
                                             pointer<void>(workspace), rows_hint,
                                             pointer<void>(stream));
        }
        if (error != nullptr)
          throw std::runtime_error(std::string("sink_window_attention: CUDA: ") + error);
      },
      py::arg("layout"), py::arg("addresses"), py::arg("workspace"), py::arg("rows_hint"),
      py::arg("stream"));
#endif
  py::class_<VarlenArgs>(m, "VarlenLayout")
      .def(py::init(&make_varlen_layout), py::arg("dtype"), py::arg("sizes"), py::arg("head_dim"),
           py::arg("sm_scale"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
           py::arg("vectors"));
  m.def("varlen_attention_cpu", &varlen_cpu, py::arg("layout"), py::arg("addresses"),
        py::arg("n_threads"));
  m.def("merge_states_cpu", &merge_cpu, py::arg("dtype"), py::arg("rows"), py::arg("head_dim"),
        py::arg("addresses"), py::arg("n_threads"));
}

}  // namespace vico
