// Element types of the tensors, as bindings name them.
#pragma once

namespace vico {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

}  // namespace vico
