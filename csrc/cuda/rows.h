// Tensors (B, S, F) as the operators over rows take them.
#pragma once
#include "arguments.h"

namespace lorasp::cuda {

inline void check_three_dimensional(const char* op, const char* name, const Tensor& t, const char* wanted) {
  STD_TORCH_CHECK(t.dim() == 3, op, ": ", name, " must be ", wanted, ", got ", t.dim(), " dimensions");
}

// t, or a copy where its rows have no unit stride.
inline Tensor unit_rows(const Tensor& t) {
  return t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace lorasp::cuda
