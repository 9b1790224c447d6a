// Which engine serves a type on this instruction set.
#pragma once

#include "cpu/attention_rows.h"
#if defined(__AMX_BF16__)
#include "cpu/attention_amx.h"
#endif

namespace vico {
namespace VICO_ISA {

template <typename T>
struct EngineFor {
  using type = OnVectors<T>;
};
#if defined(__AMX_BF16__)
template <>
struct EngineFor<BFloat16> {
  using type = OnTiles;
};
#endif
template <typename T>
using EngineOf = typename EngineFor<T>::type;

}  // namespace VICO_ISA
}  // namespace vico
