#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cpu/dispatch.h"
#include "module.h"

namespace py = pybind11;

namespace vico {
namespace {

using Address = std::uintptr_t;

void select_cpu(int dtype, int metric, float threshold, const std::array<int64_t, 10>& layout,
                const std::array<Address, 6>& at, int n_threads) {
  ChangedArgs a{};
  a.dtype = static_cast<DType>(dtype);
  a.metric = static_cast<Likeness>(metric);
  a.threshold = threshold;
  std::tie(a.frames, a.places, a.width, a.k, a.capacity, a.feature_frame, a.feature_row,
           a.reference_frame, a.reference_row, a.force_frame) = std::tuple_cat(layout);
  a.feature = pointer<void>(at[0]);
  a.reference = pointer<void>(at[1]);
  a.force = pointer<bool>(at[2]);
  a.index = pointer<int32_t>(at[3]);
  a.count = pointer<int32_t>(at[4]);
  a.similarity = pointer<float>(at[5]);
  py::gil_scoped_release release;
  cpu::select_changed(a, n_threads);
}

void gather_cpu(int dtype, const std::array<int64_t, 7>& layout, const std::array<Address, 3>& at,
                int n_threads) {
  GatherArgs a{};
  a.dtype = static_cast<DType>(dtype);
  std::tie(a.frames, a.places, a.width, a.rows, a.x_frame, a.x_row, a.index_frame) =
      std::tuple_cat(layout);
  a.x = pointer<void>(at[0]);
  a.index = pointer<int32_t>(at[1]);
  a.out = pointer<void>(at[2]);
  py::gil_scoped_release release;
  cpu::gather_rows(a, n_threads);
}

void merge_rows_of(int dtype, const std::array<int64_t, 11>& layout,
                   const std::array<Address, 5>& at, int n_threads) {
  MergeRowsArgs a{};
  a.dtype = static_cast<DType>(dtype);
  std::tie(a.frames, a.places, a.width, a.replaced, a.base_frame, a.base_row, a.rows_frame,
           a.rows_row, a.index_frame, a.residual_frame, a.residual_row) = std::tuple_cat(layout);
  a.base = pointer<void>(at[0]);
  a.rows = pointer<void>(at[1]);
  a.index = pointer<int32_t>(at[2]);
  a.residual = pointer<void>(at[3]);
  a.out = pointer<void>(at[4]);
  py::gil_scoped_release release;
  cpu::merge_rows(a, n_threads);
}

}  // namespace

// `layout` holds sizes, then strides, in the order of the fields of each Args struct.
void bind_reuse(py::module_& m) {
  m.def("select_changed_cpu", &select_cpu, py::arg("dtype"), py::arg("metric"),
        py::arg("threshold"), py::arg("layout"), py::arg("addresses"), py::arg("n_threads"));
  m.def("gather_rows_cpu", &gather_cpu, py::arg("dtype"), py::arg("layout"), py::arg("addresses"),
        py::arg("n_threads"));
  m.def("merge_rows_cpu", &merge_rows_of, py::arg("dtype"), py::arg("layout"), py::arg("addresses"),
        py::arg("n_threads"));
}

}  // namespace vico
