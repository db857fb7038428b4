#include "passes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "isa.h"
#include "scratch.h"

namespace lorasp {
namespace {

constexpr int64_t kElementSize[] = {4, 2, 2};

int64_t element_size(DType dtype) { return kElementSize[static_cast<int>(dtype)]; }

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
Grid choose_grid(int64_t M, int64_t columns) {
  const int64_t useful = M * columns / kPartElements + 1;
  const int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), useful);
  const int64_t max_rows = ceil_div(M, kRowUnit), max_cols = ceil_div(columns, kColumnUnit);
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

const void* offset(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}
void* offset(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * element_size(dtype);
}

// A factor's columns c0 ... c1, packed chunk by chunk.
class PackedFactor {
 public:
  PackedFactor(ScratchFrame& frame, const Factor& w, DType dtype, int64_t c0, int64_t c1, int64_t R,
               size_t (*bytes)(int64_t, int64_t), void (*pack)(const Factor&, int64_t, int64_t, void*))
      : c0_(c0), chunk_bytes_(bytes(std::min(kChunk, c1 - c0), R)) {
    data_ = frame.take<char>(static_cast<int64_t>(chunk_bytes_) * ceil_div(c1 - c0, kChunk));
    for (int64_t c = c0; c < c1; c += kChunk) {
      const Factor chunk{offset(w.data, c * w.stride_c, dtype), w.stride_r, w.stride_c};
      pack(chunk, std::min(kChunk, c1 - c), R, at(c));
    }
  }
  void* at(int64_t c) const { return data_ + static_cast<size_t>((c - c0_) / kChunk) * chunk_bytes_; }

 private:
  int64_t c0_;
  size_t chunk_bytes_;
  char* data_;
};

struct Pass {
  const LowRank& p;
  const Kernels& k;

  explicit Pass(const LowRank& problem) : p(problem), k(kernels(problem.dtype)) {}

  Factor rows_of_A() const { return {p.A, p.K, 1}; }
  Factor columns_of_B() const { return {p.B, 1, p.R}; }

  PackedFactor pack_rowdot(ScratchFrame& frame, const Factor& w, int64_t c0, int64_t c1) const {
    return {frame, w, p.dtype, c0, c1, p.R, k.rowdot_bytes, k.pack_rowdot};
  }
  PackedFactor pack_update(ScratchFrame& frame, const Factor& w, int64_t c0, int64_t c1) const {
    return {frame, w, p.dtype, c0, c1, p.R, k.update_bytes, k.pack_update};
  }
  char* scratch(ScratchFrame& frame) const { return frame.take<char>(static_cast<int64_t>(k.scratch_bytes(p.R))); }
  uint32_t* mask_words(ScratchFrame& frame) const {
    return p.keep ? frame.take<uint32_t>(kBlockM * kMaskWords) : nullptr;
  }

  Block block(const Tall& t, int64_t m, int64_t rows, int64_t c, int64_t cols, const uint32_t* bits) const {
    return {offset(t.data, m * t.ld + c, p.dtype), t.ld, rows, cols, bits};
  }
  void fill_mask(int64_t m, int64_t rows, int64_t c, int64_t cols, uint32_t* bits) const {
    for (int64_t i = 0; i < rows; ++i) k.keep_bits(*p.keep, (m + i) * p.K + c, cols, bits + i * kMaskWords);
  }
  void round_rows(const float* sums, float scale, int64_t m, int64_t rows, void* out) const {
    k.round(sums, scale, rows * p.R, offset(out, m * p.R, p.dtype));
  }

  // out (M, R) from the partial sums of the grid's columns.
  void reduce_rows(const Grid& grid, const float* partial, float scale, void* out) const {
    const int64_t count = p.M * p.R;
    at::parallel_for(0, ceil_div(count, kPanel), kPartElements / kPanel, [&](int64_t begin, int64_t end) {
      float sum[kPanel];
      for (int64_t i = begin * kPanel; i < std::min(count, end * kPanel); i += kPanel) {
        const int64_t width = std::min(kPanel, count - i);
        std::copy_n(partial + i, width, sum);
        for (int64_t col = 1; col < grid.cols; ++col)
          for (int64_t j = 0; j < width; ++j) sum[j] += partial[col * count + i + j];
        k.round(sum, scale, width, offset(out, i, p.dtype));
      }
    });
  }

  void write(const float* values, int64_t count, int64_t at, const Gradient& out) const {
    if (out.fp32) {
      std::copy_n(values, count, static_cast<float*>(out.data) + at);
    } else {
      k.round(values, 1.0f, count, offset(out.data, at, p.dtype));
    }
  }

  // The gradient of a factor from the accumulators of the grid's rows: (R, columns), or (columns, R) if transposed.
  void reduce_gradient(const Grid& grid, const float* acc, bool transposed, const Gradient& out) const {
    const int64_t padded = rank_padded(p.R), size = accumulator_size(grid.columns, p.R);
    const int64_t grain = std::max<int64_t>(1, kPartElements / (kPanel * p.R));
    at::parallel_for(0, ceil_div(grid.columns, kPanel), grain, [&](int64_t begin, int64_t end) {
      ScratchFrame frame;
      float* values = frame.take<float>(p.R * kPanel);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t c = panel * kPanel, cols = std::min(kPanel, grid.columns - c);
        for (int64_t r = 0; r < p.R; ++r) {
          const float* row = acc + (panel * padded + r) * kPanel;
          float sum[kPanel];
          std::copy_n(row, kPanel, sum);
          for (int64_t i = 1; i < grid.rows; ++i)
            for (int64_t j = 0; j < kPanel; ++j) sum[j] += row[i * size + j];
          for (int64_t j = 0; j < cols; ++j) {
            const int64_t at = transposed ? (c + j) * p.R + r : r * grid.columns + c + j;
            const bool kept = out.mask == nullptr || out.mask[at];
            values[transposed ? j * p.R + r : j] = kept ? sum[k.panel_order[j]] : 0.0f;
          }
          if (!transposed) write(values, cols, r * grid.columns + c, out);
        }
        if (transposed) write(values, cols * p.R, c * p.R, out);
      }
    });
  }
};

float* accumulator_at(float* acc, const Grid& grid, const Part& part, int64_t c, int64_t R) {
  return acc + part.row * accumulator_size(grid.columns, R) + accumulator_size(c, R);
}

// Along the rows, as hardware prefetchers follow it: outer() walks a block panel by panel, and cold memory then comes
// at the latency of every line.
void warm(const Block& block, DType dtype) {
  const int64_t bytes = block.cols * (dtype == DType::kF32 ? 4 : 2);
  for (int64_t m = 0; m < block.rows; ++m) {
    const char* row = static_cast<const char*>(offset(block.data, m * block.ld, dtype));
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
}

void update_part(const Pass& pass, const Part& part, Tall y, const void* xa, const PackedFactor& b, char* scratch) {
  const LowRank& p = pass.p;
  for (int64_t c = part.c0; c < part.c1; c += kChunk) {
    const int64_t cols = std::min(kChunk, part.c1 - c);
    pass.k.update(pass.block(y, part.m0, part.m1 - part.m0, c, cols, nullptr), offset(xa, part.m0 * p.R, p.dtype),
                  b.at(c), p.R, scratch);
  }
}

}  // namespace

void forward_pass(const LowRank& p, Tall x, Tall y, float scale, void* xa) {
  const Pass pass(p);
  const Grid grid = choose_grid(p.M, p.K);
  ScratchFrame frame;
  const bool whole_rows = grid.cols == 1;
  float* partial = whole_rows ? nullptr : frame.take<float>(grid.cols * p.M * p.R);
  for_each_part(grid, pass.k, [&](const Part& part) {
    ScratchFrame local;
    const PackedFactor a = pass.pack_rowdot(local, pass.rows_of_A(), part.c0, part.c1);
    std::optional<PackedFactor> b;
    if (whole_rows && y.data) b.emplace(pass.pack_update(local, pass.columns_of_B(), 0, p.N));
    float* sums = local.take<float>(kBlockM * p.R);
    uint32_t* bits = pass.mask_words(local);
    char* scratch = pass.scratch(local);
    for (int64_t m = part.m0; m < part.m1; m += kBlockM) {
      const int64_t rows = std::min(kBlockM, part.m1 - m);
      float* out = whole_rows ? sums : partial + (part.col * p.M + m) * p.R;
      for (int64_t c = part.c0; c < part.c1; c += kChunk) {
        const int64_t cols = std::min(kChunk, part.c1 - c);
        if (bits) pass.fill_mask(m, rows, c, cols, bits);
        pass.k.rowdot(pass.block(x, m, rows, c, cols, bits), a.at(c), p.R, c > part.c0, out, scratch);
      }
      if (!whole_rows) continue;
      pass.round_rows(sums, scale, m, rows, xa);
      if (b) update_part(pass, {0, 0, m, m + rows, 0, p.N}, y, xa, *b, scratch);
    }
  });
  if (whole_rows) return;
  pass.reduce_rows(grid, partial, scale, xa);
  if (y.data == nullptr) return;
  for_each_part(choose_grid(p.M, p.N), pass.k, [&](const Part& part) {
    ScratchFrame local;
    const PackedFactor b = pass.pack_update(local, pass.columns_of_B(), part.c0, part.c1);
    char* scratch = pass.scratch(local);
    for (int64_t m = part.m0; m < part.m1; m += kBlockM) {
      update_part(pass, {0, 0, m, std::min(part.m1, m + kBlockM), part.c0, part.c1}, y, xa, b, scratch);
    }
  });
}

void dy_pass(const LowRank& p, Tall dy, const void* xa, float scale, void* g, Gradient dB) {
  const Pass pass(p);
  const Grid grid = choose_grid(p.M, p.N);
  ScratchFrame frame;
  const bool whole_rows = grid.cols == 1;
  float* partial = whole_rows || !g ? nullptr : frame.take<float>(grid.cols * p.M * p.R);
  float* acc = dB.data ? frame.take<float>(grid.rows * accumulator_size(p.N, p.R)) : nullptr;
  for_each_part(grid, pass.k, [&](const Part& part) {
    ScratchFrame local;
    std::optional<PackedFactor> b;
    if (g) b.emplace(pass.pack_rowdot(local, pass.columns_of_B(), part.c0, part.c1));
    float* sums = g ? local.take<float>(kBlockM * p.R) : nullptr;
    char* scratch = pass.scratch(local);
    for (int64_t m = part.m0; m < part.m1; m += kBlockM) {
      const int64_t rows = std::min(kBlockM, part.m1 - m);
      float* out = whole_rows || !g ? sums : partial + (part.col * p.M + m) * p.R;
      for (int64_t c = part.c0; c < part.c1; c += kChunk) {
        const Block block = pass.block(dy, m, rows, c, std::min(kChunk, part.c1 - c), nullptr);
        if (g) pass.k.rowdot(block, b->at(c), p.R, c > part.c0, out, scratch);
        if (!acc) continue;
        if (!g) warm(block, p.dtype);
        pass.k.outer(block, offset(xa, m * p.R, p.dtype), p.R, m > part.m0, accumulator_at(acc, grid, part, c, p.R),
                     scratch);
      }
      if (g && whole_rows) pass.round_rows(sums, scale, m, rows, g);
    }
  });
  if (partial) pass.reduce_rows(grid, partial, scale, g);
  if (acc) pass.reduce_gradient(grid, acc, true, dB);
}

void dx_pass(const LowRank& p, Tall x, const void* g, Tall dx, Gradient dA) {
  const Pass pass(p);
  const Grid grid = choose_grid(p.M, p.K);
  ScratchFrame frame;
  float* acc = dA.data ? frame.take<float>(grid.rows * accumulator_size(p.K, p.R)) : nullptr;
  for_each_part(grid, pass.k, [&](const Part& part) {
    ScratchFrame local;
    std::optional<PackedFactor> a;
    if (dx.data) a.emplace(pass.pack_update(local, pass.rows_of_A(), part.c0, part.c1));
    uint32_t* bits = pass.mask_words(local);
    char* scratch = pass.scratch(local);
    for (int64_t m = part.m0; m < part.m1; m += kBlockM) {
      const int64_t rows = std::min(kBlockM, part.m1 - m);
      const void* g_rows = offset(g, m * p.R, p.dtype);
      for (int64_t c = part.c0; c < part.c1; c += kChunk) {
        const int64_t cols = std::min(kChunk, part.c1 - c);
        if (bits) pass.fill_mask(m, rows, c, cols, bits);
        if (a) pass.k.update(pass.block(dx, m, rows, c, cols, bits), g_rows, a->at(c), p.R, scratch);
        if (!acc) continue;
        const Block x_block = pass.block(x, m, rows, c, cols, bits);
        warm(x_block, p.dtype);
        pass.k.outer(x_block, g_rows, p.R, m > part.m0, accumulator_at(acc, grid, part, c, p.R), scratch);
      }
    }
  });
  if (acc) pass.reduce_gradient(grid, acc, false, dA);
}

}  // namespace lorasp
