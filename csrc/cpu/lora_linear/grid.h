// How a pass over a tall tensor is dealt out to torch's threads.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "skinny.h"

namespace lorasp {

constexpr int64_t element_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline const void* offset(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}
inline void* offset(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * element_size(dtype);
}

// Rows are dealt out in multiples of 32 (two AMX tiles), columns of 64 (whole cache lines, whole panels).
constexpr int64_t kRowUnit = 32, kColumnUnit = 64;
constexpr int64_t kPartElements = 32768;  // less work than this is not worth a thread

struct Part {
  int64_t row, col;  // position in the grid
  int64_t m0, m1, c0, c1;
};

struct Grid {
  int64_t rows, cols;
  int64_t M, columns;

  Part part(int64_t index) const {
    const int64_t row = index / cols, col = index % cols;
    const int64_t row_units = ceil_div(M, kRowUnit), column_units = ceil_div(columns, kColumnUnit);
    return {row,
            col,
            std::min(M, row_units * row / rows * kRowUnit),
            std::min(M, row_units * (row + 1) / rows * kRowUnit),
            std::min(columns, column_units * col / cols * kColumnUnit),
            std::min(columns, column_units * (col + 1) / cols * kColumnUnit)};
  }
};

// Rows cost a packed factor and an accumulator (columns, R) each, columns a partial result (M, R) each, and splitting
// columns at all a second parallel region.
inline Grid choose_grid(int64_t M, int64_t columns, bool split_columns = true) {
  const int64_t useful = M * columns / kPartElements + 1;
  const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), useful);
  const int64_t max_rows = ceil_div(M, kRowUnit), max_cols = split_columns ? ceil_div(columns, kColumnUnit) : 1;
  Grid best{1, 1, M, columns};
  int64_t best_cost = columns;
  for (int64_t rows = 1; rows <= std::min(threads, max_rows); ++rows) {
    const int64_t cols = std::min(threads / rows, max_cols);
    const int64_t cost = rows * columns + (cols > 1 ? cols * M : 0);
    const int64_t parts = rows * cols, best_parts = best.rows * best.cols;
    if (parts > best_parts || (parts == best_parts && cost < best_cost) ||
        (parts == best_parts && cost == best_cost && cols == 1)) {
      best = {rows, cols, M, columns};
      best_cost = cost;
    }
  }
  return best;
}

template <class F>
void for_each_part(const Grid& grid, const Kernels& k, const F& work) {
  at::parallel_for(0, grid.rows * grid.cols, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part part = grid.part(i);
      if (part.m0 < part.m1 && part.c0 < part.c1) work(part);
    }
    if (k.release != nullptr) k.release();
  });
}

}  // namespace lorasp
