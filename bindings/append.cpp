#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "module.h"
#if defined(VICO_WITH_CUDA)
#include "cuda/append.h"
#endif

namespace py = pybind11;

namespace vico {
namespace {

using Address = std::uintptr_t;

template <size_t N>
using Strides = std::array<int64_t, N>;

// Sizes and strides; addresses are filled in per call, so that one layout serves many calls. The
// last stride of every tensor is 1 and left out; absent tensors have strides of 0.
AppendArgs make_layout(int dtype, std::array<int64_t, 7> sizes, int head_dim,
                       std::array<int, 2> sections, bool summary_raw, Strides<2> q, Strides<2> k,
                       Strides<2> v, Strides<2> q_out, Strides<3> k_pages, Strides<3> v_pages,
                       Strides<3> raw_k_pages, Strides<2> positions, Strides<1> slots,
                       Strides<2> sum, Strides<3> kmin, Strides<3> kmax) {
  AppendArgs a{};
  a.dtype = static_cast<DType>(dtype);
  std::tie(a.tokens, a.heads, a.kv_heads, a.pages, a.page_size, a.blocks, a.sub) =
      std::tuple_cat(sizes);
  a.head_dim = head_dim;
  a.t_section = sections[0];
  a.h_section = sections[1];
  a.summary_raw = summary_raw;
  std::tie(a.q_token, a.q_head) = std::tuple_cat(q);
  std::tie(a.k_token, a.k_head) = std::tuple_cat(k);
  std::tie(a.v_token, a.v_head) = std::tuple_cat(v);
  std::tie(a.q_out_token, a.q_out_head) = std::tuple_cat(q_out);
  std::tie(a.k_page, a.k_slot, a.k_kv) = std::tuple_cat(k_pages);
  std::tie(a.v_page, a.v_slot, a.v_kv) = std::tuple_cat(v_pages);
  std::tie(a.raw_page, a.raw_slot, a.raw_kv) = std::tuple_cat(raw_k_pages);
  std::tie(a.positions_axis, a.positions_token) = std::tuple_cat(positions);
  a.slots_token = slots[0];
  std::tie(a.sum_block, a.sum_kv) = std::tuple_cat(sum);
  std::tie(a.min_block, a.min_sub, a.min_kv) = std::tuple_cat(kmin);
  std::tie(a.max_block, a.max_sub, a.max_kv) = std::tuple_cat(kmax);
  return a;
}

// q, k, v, positions, inv_freq, slots, block_of_page, q_out, k_pages, v_pages, raw_k_pages, sum,
// count, kmin, kmax.
using Addresses = std::array<Address, 15>;

AppendArgs with_addresses(AppendArgs a, const Addresses& at) {
  a.q = pointer<void>(at[0]);
  a.k = pointer<void>(at[1]);
  a.v = pointer<void>(at[2]);
  a.positions = pointer<int32_t>(at[3]);
  a.inv_freq = pointer<float>(at[4]);
  a.slots = pointer<int32_t>(at[5]);
  a.block_of_page = pointer<int32_t>(at[6]);
  a.q_out = pointer<void>(at[7]);
  a.k_pages = pointer<void>(at[8]);
  a.v_pages = pointer<void>(at[9]);
  a.raw_k_pages = pointer<void>(at[10]);
  a.sum = pointer<float>(at[11]);
  a.count = pointer<int32_t>(at[12]);
  a.kmin = pointer<float>(at[13]);
  a.kmax = pointer<float>(at[14]);
  return a;
}

}  // namespace

void bind_append(py::module_& m) {
  py::class_<AppendArgs>(m, "AppendLayout")
      .def(py::init(&make_layout), py::arg("dtype"), py::arg("sizes"), py::arg("head_dim"),
           py::arg("sections"), py::arg("summary_raw"), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("q_out"), py::arg("k_pages"), py::arg("v_pages"), py::arg("raw_k_pages"),
           py::arg("positions"), py::arg("slots"), py::arg("sum"), py::arg("kmin"),
           py::arg("kmax"));
  m.def(
      "rope_append_cpu",
      [](const AppendArgs& layout, const Addresses& addresses, int n_threads) {
        py::gil_scoped_release release;
        cpu::rope_append(with_addresses(layout, addresses), n_threads);
      },
      py::arg("layout"), py::arg("addresses"), py::arg("n_threads"));
#if defined(VICO_WITH_CUDA)
  m.def(
      "rope_append_cuda",
      [](const AppendArgs& layout, const Addresses& addresses, Address stream) {
        const char* error;
        {
          py::gil_scoped_release release;
          error = rope_append_cuda(with_addresses(layout, addresses), pointer<void>(stream));
        }
        if (error != nullptr) throw std::runtime_error(std::string("rope_append: CUDA: ") + error);
      },
      py::arg("layout"), py::arg("addresses"), py::arg("stream"));
#endif
}

}  // namespace vico
