// Tensors of rows (B, S, F) as hidden_cut and consistency see them: two leading strides, unit stride in the row.
#pragma once
#include "../common/arguments.h"

namespace lorasp {

struct Rows {
  Tensor held;  // a copy where the row had no unit stride
  DType dtype;
  char* data;
  int64_t itemsize, B, S, F, stride_b, stride_s;

  Rows(const char* where, const char* name, const Tensor& t)
      : held(t.size(2) <= 1 || t.stride(2) == 1 ? t : t.contiguous()),
        dtype(compute_dtype(where, name, t)),
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
