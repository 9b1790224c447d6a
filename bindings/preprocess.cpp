#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cpu/dispatch.h"
#include "module.h"

namespace py = pybind11;

namespace vico {
namespace {

using Address = std::uintptr_t;

void pack_cpu(const std::array<int64_t, 11>& layout, const std::array<Address, 3>& at,
              int n_threads) {
  PackArgs a{};
  std::tie(a.frames, a.height, a.width, a.patch, a.merge, a.temporal, a.frame, a.row, a.column,
           a.channel, a.value_bytes) = std::tuple_cat(layout);
  a.levels = pointer<uint8_t>(at[0]);
  a.table = pointer<void>(at[1]);
  a.out = pointer<void>(at[2]);
  py::gil_scoped_release release;
  cpu::pack_patches(a, n_threads);
}

}  // namespace

// `layout` holds sizes, then strides, in the order of the fields of PackArgs.
void bind_preprocess(py::module_& m) {
  m.def("pack_patches_cpu", &pack_cpu, py::arg("layout"), py::arg("addresses"),
        py::arg("n_threads"));
}

}  // namespace vico
