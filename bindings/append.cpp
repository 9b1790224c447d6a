#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "module.h"
#if defined(VICO_WITH_CUDA)
#include "cuda/append.h"
#endif

namespace py = pybind11;

namespace vico {
namespace {

using Address = std::uintptr_t;

// A tensor as (address, strides); the last stride is 1 and left out.
template <int N>
using Strided = std::pair<Address, std::array<int64_t, N>>;

AppendArgs make_args(int dtype, std::array<int64_t, 7> sizes, int head_dim,
                     std::array<int, 2> sections, bool summary_raw, Strided<2> q, Strided<2> k,
                     Strided<2> v, Strided<2> q_out, Strided<3> k_pages, Strided<3> v_pages,
                     Strided<3> raw_k_pages, Strided<2> positions, Address inv_freq,
                     Strided<1> slots, Address block_of_page, Strided<2> sum, Address count,
                     Strided<3> kmin, Strided<3> kmax) {
  AppendArgs a{};
  a.dtype = static_cast<DType>(dtype);
  std::tie(a.tokens, a.heads, a.kv_heads, a.pages, a.page_size, a.blocks, a.sub) =
      std::tuple_cat(sizes);
  a.head_dim = head_dim;
  a.t_section = sections[0];
  a.h_section = sections[1];
  a.summary_raw = summary_raw;
  a.q = pointer<void>(q.first);
  std::tie(a.q_token, a.q_head) = std::tuple_cat(q.second);
  a.k = pointer<void>(k.first);
  std::tie(a.k_token, a.k_head) = std::tuple_cat(k.second);
  a.v = pointer<void>(v.first);
  std::tie(a.v_token, a.v_head) = std::tuple_cat(v.second);
  a.q_out = pointer<void>(q_out.first);
  std::tie(a.q_out_token, a.q_out_head) = std::tuple_cat(q_out.second);
  a.k_pages = pointer<void>(k_pages.first);
  std::tie(a.k_page, a.k_slot, a.k_kv) = std::tuple_cat(k_pages.second);
  a.v_pages = pointer<void>(v_pages.first);
  std::tie(a.v_page, a.v_slot, a.v_kv) = std::tuple_cat(v_pages.second);
  a.raw_k_pages = pointer<void>(raw_k_pages.first);
  std::tie(a.raw_page, a.raw_slot, a.raw_kv) = std::tuple_cat(raw_k_pages.second);
  a.positions = pointer<int32_t>(positions.first);
  std::tie(a.positions_axis, a.positions_token) = std::tuple_cat(positions.second);
  a.inv_freq = pointer<float>(inv_freq);
  a.slots = pointer<int32_t>(slots.first);
  a.slots_token = slots.second[0];
  a.block_of_page = pointer<int32_t>(block_of_page);
  a.sum = pointer<float>(sum.first);
  std::tie(a.sum_block, a.sum_kv) = std::tuple_cat(sum.second);
  a.count = pointer<int32_t>(count);
  a.kmin = pointer<float>(kmin.first);
  std::tie(a.min_block, a.min_sub, a.min_kv) = std::tuple_cat(kmin.second);
  a.kmax = pointer<float>(kmax.first);
  std::tie(a.max_block, a.max_sub, a.max_kv) = std::tuple_cat(kmax.second);
  return a;
}

}  // namespace

void bind_append(py::module_& m) {
  py::class_<AppendArgs>(m, "AppendArgs")
      .def(py::init(&make_args), py::arg("dtype"), py::arg("sizes"), py::arg("head_dim"),
           py::arg("sections"), py::arg("summary_raw"), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("q_out"), py::arg("k_pages"), py::arg("v_pages"), py::arg("raw_k_pages"),
           py::arg("positions"), py::arg("inv_freq"), py::arg("slots"), py::arg("block_of_page"),
           py::arg("sum"), py::arg("count"), py::arg("kmin"), py::arg("kmax"));
  m.def(
      "rope_append_cpu",
      [](const AppendArgs& args, int n_threads) {
        py::gil_scoped_release release;
        cpu::rope_append(args, n_threads);
      },
      py::arg("args"), py::arg("n_threads"));
#if defined(VICO_WITH_CUDA)
  m.def(
      "rope_append_cuda",
      [](const AppendArgs& args, Address stream) {
        const char* error;
        {
          py::gil_scoped_release release;
          error = rope_append_cuda(args, pointer<void>(stream));
        }
        if (error != nullptr) throw std::runtime_error(std::string("rope_append: CUDA: ") + error);
      },
      py::arg("args"), py::arg("stream"));
#endif
}

}  // namespace vico
