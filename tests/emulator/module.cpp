// The CUDA half of _C over the emulator: the same bindings, no device.
#include "module.h"

#include "emulator.h"

PYBIND11_MODULE(_emulated, m) {
  m.attr("has_cuda") = true;
  m.def("set_seed", &emulator::set_seed);
  m.def("launches", &emulator::launches);
  vico::bind_append(m);
  vico::bind_attention(m);
  vico::bind_retrieve(m);
}
