// The CUDA half of _C over the emulator: the same bindings, no device.
#include "module.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "emulator.h"

namespace {

namespace py = pybind11;

// Has `taken(kernel, (x, y, z), threads, shared, [bytes of a parameter, ...])` take all launches;
// it returns what went wrong, or None.
void set_launcher(const py::function& taken) {
  const auto* kept = new py::function(taken);  // the interpreter may be gone before this module
  emulator::launcher = [kept](const emulator::Launch& launch) -> const char* {
    const py::gil_scoped_acquire acquire;
    py::list arguments;
    for (const auto& [data, bytes] : launch.arguments)
      arguments.append(py::bytes(static_cast<const char*>(data), bytes));
    const dim3 grid = launch.grid, block = launch.block;
    const py::object said =
        (*kept)(reinterpret_cast<uintptr_t>(launch.kernel), py::make_tuple(grid.x, grid.y, grid.z),
                block.x, launch.shared, arguments);
    return said.is_none() ? nullptr : emulator::set_error(said.cast<std::string>().c_str());
  };
}

// Where this module was loaded; what `nm` says of it counts from there.
uintptr_t loaded_at() {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&loaded_at), &info);
  return reinterpret_cast<uintptr_t>(info.dli_fbase);
}

// The addresses of the kernels that were launched so far.
std::vector<uintptr_t> launched_kernels() {
  std::vector<uintptr_t> found;
  for (const void* kernel : emulator::launched_kernels())
    found.push_back(reinterpret_cast<uintptr_t>(kernel));
  return found;
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  m.attr("has_cuda") = true;
  m.def("set_seed", &emulator::set_seed);
  m.def("launches", &emulator::launches);
  m.def("set_launcher", &set_launcher);
  m.def("loaded_at", &loaded_at);
  m.def("launched_kernels", &launched_kernels);
  vico::bind_append(m);
  vico::bind_attention(m);
  vico::bind_retrieve(m);
}
