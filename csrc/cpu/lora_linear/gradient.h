// The gradient of a rank-R factor: from the accumulators of outer() to the parameter's own layout.
#pragma once
#include <cstdint>

#include "grid.h"

namespace lorasp {

// Where the parameter's gradient stands. The accumulators hold it for every column of the tall tensor; the gradient of
// A is (R, columns), that of B (columns, R).
struct Gradient {
  // kWhole: all of it; False entries of mask become 0. kRows: rows index[i] of B's, packed. kInPlace: rows index[i] of
  // B's at their own place; of A's, accumulated over selected columns only, column j goes to column index[j] of ld.
  // kEntries: flat entries index[i], packed. Indices ascend.
  enum class Form { kWhole, kRows, kInPlace, kEntries };

  void* data = nullptr;  // nullptr: not asked for
  bool fp32 = false;     // else in the compute dtype
  Form form = Form::kWhole;
  const bool* mask = nullptr;
  const int64_t* index = nullptr;
  int64_t count = 0;
  int64_t ld = 0;
};

// Rows first ... first + R - 1 of the accumulators of rank `stacked` that the grid's rows left at acc, one after
// another. columns_first: the gradient of a B.
void reduce_gradient(const Kernels& k, DType dtype, const Grid& grid, const float* acc, int64_t stacked, int64_t first,
                     int64_t R, bool columns_first, const Gradient& out);

}  // namespace lorasp
