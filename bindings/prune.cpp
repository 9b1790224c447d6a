#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "module.h"

namespace py = pybind11;

namespace vico {
namespace {

using Address = std::uintptr_t;
using Term = std::tuple<int, int, float>;

// A rule, sizes and strides; addresses are filled in per call, so that one layout serves many.
struct PruneLayout {
  PruneArgs args{};
  std::vector<int64_t> shapes;

  PruneLayout(int dtype, const std::vector<Term>& terms, float external, float threshold,
              const std::array<int, 8>& choices, const std::array<int64_t, 3>& numbers,
              double ratio, std::vector<int64_t> segments, const std::array<int64_t, 3>& sizes,
              const std::array<int64_t, 14>& strides)
      : shapes(std::move(segments)) {
    PruneRule& rule = args.rule;
    rule.terms = static_cast<int>(terms.size());
    for (size_t i = 0; i < terms.size() && i < 2; ++i)
      rule.term[i] = {static_cast<PruneReference>(std::get<0>(terms[i])),
                      static_cast<PruneMetric>(std::get<1>(terms[i])), std::get<2>(terms[i])};
    rule.external = external;
    rule.threshold = threshold;
    rule.keep = static_cast<PruneKeep>(choices[0]);
    rule.quota = static_cast<PruneQuota>(choices[1]);
    rule.scope = static_cast<PruneScope>(choices[2]);
    rule.always_keep = static_cast<PruneAlways>(choices[3]);
    rule.reduce_any = choices[4] != 0;
    rule.mask_or = choices[5] != 0;
    rule.history_by_step = choices[6] != 0;
    std::tie(rule.number, rule.drop_multiple, rule.channels) = std::tuple_cat(numbers);
    rule.ratio = ratio;
    args.packed = choices[7] != 0;
    args.dtype = static_cast<DType>(dtype);
    args.segments = static_cast<int64_t>(shapes.size() / 2);
    std::tie(args.width, args.capacity, args.total) = std::tuple_cat(sizes);
    std::tie(args.x_step, args.x_row, args.positions_axis, args.positions_step, args.mask_step,
             args.tokens_row, args.out_positions_axis, args.previous_row, args.previous_place,
             args.last_row, args.last_place, args.mean_row, args.groups, args.group_k_unit) =
        std::tuple_cat(strides);
  }
};

// In the order of PruneArgs.
void prune_cpu(const PruneLayout& layout, const std::array<Address, 16>& at, int n_threads) {
  PruneArgs a = layout.args;
  a.shapes = layout.shapes.data();
  a.x = pointer<void>(at[0]);
  a.positions = pointer<int32_t>(at[1]);
  a.tokens = pointer<void>(at[2]);
  a.out_positions = pointer<int32_t>(at[3]);
  a.index = pointer<int32_t>(at[4]);
  a.cu_count = pointer<int32_t>(at[5]);
  a.mask = pointer<bool>(at[6]);
  a.steps = pointer<int32_t>(at[7]);
  a.previous = pointer<void>(at[8]);
  a.last_kept = pointer<void>(at[9]);
  a.mean = pointer<float>(at[10]);
  a.mean_count = pointer<int32_t>(at[11]);
  a.external_score = pointer<float>(at[12]);
  a.external_mask = pointer<bool>(at[13]);
  a.group_ids = pointer<int32_t>(at[14]);
  a.group_k = pointer<int32_t>(at[15]);
  py::gil_scoped_release release;
  cpu::prune_tokens(a, n_threads);
}

}  // namespace

void bind_prune(py::module_& m) {
  py::class_<PruneLayout>(m, "PruneLayout")
      .def(py::init<int, const std::vector<Term>&, float, float, const std::array<int, 8>&,
                    const std::array<int64_t, 3>&, double, std::vector<int64_t>,
                    const std::array<int64_t, 3>&, const std::array<int64_t, 14>&>(),
           py::arg("dtype"), py::arg("terms"), py::arg("external"), py::arg("threshold"),
           py::arg("choices"), py::arg("numbers"), py::arg("ratio"), py::arg("shapes"),
           py::arg("sizes"), py::arg("strides"));
  m.def("prune_tokens_cpu", &prune_cpu, py::arg("layout"), py::arg("addresses"),
        py::arg("n_threads"));
}

}  // namespace vico
