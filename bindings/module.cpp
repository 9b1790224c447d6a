// The module _C: one file a word; pointers, sizes and strides in, no torch.
#include "module.h"

#include <omp.h>

#include "cpu/dispatch.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vicostream_kernels; call them through the Python ops.";
#if defined(VICO_WITH_CUDA)
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = VICO_COMPILER;
    info["cuda"] = VICO_CUDA_VERSION;
    info["cuda_architectures"] = VICO_CUDA_ARCHITECTURES;
    info["isa"] = vico::isa_name(vico::active_isa());
    info["openmp"] = _OPENMP;
    return info;
  });
  // Asked only for names that are not there: those of newer Python files beside an older build.
  m.def("__getattr__", [](const std::string& name) -> py::object {
    throw py::attribute_error("the compiled module _C has no '" + name +
                              "': it is older than the Python files beside it; run `make build`, "
                              "or install the package again");
  });
  vico::bind_append(m);
  vico::bind_attention(m);
  vico::bind_retrieve(m);
  vico::bind_prune(m);
  vico::bind_reuse(m);
  vico::bind_preprocess(m);
}
