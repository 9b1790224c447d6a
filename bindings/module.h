#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace vico {

// Addresses travel as integers: tensor.data_ptr(), or 0 for an absent tensor.
template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_append(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_retrieve(pybind11::module_& m);
void bind_prune(pybind11::module_& m);
void bind_reuse(pybind11::module_& m);
void bind_preprocess(pybind11::module_& m);

}  // namespace vico
