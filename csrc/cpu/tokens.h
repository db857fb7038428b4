// Tensors of rows (B, S, F) as hidden_cut and consistency see them: two leading strides, unit stride in the row.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "skinny.h"

namespace lorasp {

// Below autograd and autocast: neither a graph nor a cast, whatever the caller's modes are.
struct BelowModes {
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

inline DType row_dtype(const char* where, const char* name, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      TORCH_CHECK_TYPE(false, where, ": ", name, " must be float32, bfloat16 or float16 for backend cpp, got ", type);
  }
}

inline void check_rows(const char* where, const char* name, const at::Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), where, ": ", name, " must be on cpu, got ", t.device());
  TORCH_CHECK_VALUE(t.sizes() == shape, where, ": ", name, " must be ", shape, ", got ", t.sizes());
}

struct Rows {
  at::Tensor held;  // a copy where the row had no unit stride
  DType dtype;
  char* data;
  int64_t itemsize, B, S, F, stride_b, stride_s;

  Rows(const char* where, const char* name, const at::Tensor& t)
      : held(t.size(2) <= 1 || t.stride(2) == 1 ? t : t.contiguous()),
        dtype(row_dtype(where, name, t.scalar_type())),
        data(static_cast<char*>(held.data_ptr())),
        itemsize(held.element_size()),
        B(t.size(0)),
        S(t.size(1)),
        F(t.size(2)),
        stride_b(held.stride(0)),
        stride_s(held.stride(1)) {}

  int64_t count() const { return B * S; }
  char* at(int64_t row, int64_t column = 0) const {
    return data + (row / S * stride_b + row % S * stride_s + column) * itemsize;
  }
  // One row of all elements, where nothing distinguishes rows.
  bool flat() const { return held.is_contiguous(); }
  void flatten() {
    F *= B * S;
    B = S = 1;
    stride_b = stride_s = F;
  }
};

}  // namespace lorasp
