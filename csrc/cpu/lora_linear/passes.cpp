#include "passes.h"

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstring>

#include "../common/isa.h"
#include "../common/scratch.h"

namespace lorasp {
namespace {

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

using PackedFactors = c10::SmallVector<PackedFactor, 4>;

// Keep bits of a block of rows, chunk by chunk as Block wants them.
class MaskBlock {
 public:
  MaskBlock(ScratchFrame& frame, int64_t c0, int64_t c1)
      : c0_(c0), c1_(c1), words_(frame.take<uint32_t>(ceil_div(c1 - c0, kChunk) * kBlockM * kMaskWords)) {}

  const uint32_t* at(int64_t c) const { return words_ + (c - c0_) / kChunk * kBlockM * kMaskWords; }
  void fill(KeepBits keep_bits, const KeepMask& keep, int64_t K, int64_t m, int64_t rows) {
    for (int64_t c = c0_; c < c1_; c += kChunk)
      for (int64_t i = 0; i < rows; ++i)
        keep_bits(keep, (m + i) * K + c, std::min(kChunk, c1_ - c), words_ + (at(c) - words_) + i * kMaskWords);
  }
  // This one's bits from those of all columns; `row` and `selected` hold one row of either.
  void select(const MaskBlock& all, const Columns& columns, int64_t rows, uint32_t* row, uint32_t* selected) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < columns.width(); c += kChunk)
        std::memcpy(row + c / 32, all.at(c) + i * kMaskWords, kMaskWords * sizeof(uint32_t));
      columns.gather_bits(row, selected);
      for (int64_t c = 0; c < columns.count(); c += kChunk)
        std::memcpy(words_ + (at(c) - words_) + i * kMaskWords, selected + c / 32, kMaskWords * sizeof(uint32_t));
    }
  }

 private:
  int64_t c0_, c1_;
  uint32_t* words_;
};

struct Pass {
  DType dtype;
  int64_t M;
  const Kernels& k;
  const KeepBits keep_bits = keep_bits_kernel();

  Pass(DType dtype, int64_t M) : dtype(dtype), M(M), k(kernels(dtype)) {}

  // A (R, width): rows are ranks; B (width, R): columns are.
  static Factor factor_A(const void* A, int64_t width) { return {A, width, 1}; }
  static Factor factor_B(const void* B, int64_t R) { return {B, 1, R}; }

  PackedFactor pack_rowdot(ScratchFrame& frame, const Factor& w, int64_t c0, int64_t c1, int64_t R) const {
    return {frame, w, dtype, c0, c1, R, k.rowdot_bytes, k.pack_rowdot};
  }
  PackedFactor pack_update(ScratchFrame& frame, const Factor& w, int64_t c0, int64_t c1, int64_t R) const {
    return {frame, w, dtype, c0, c1, R, k.update_bytes, k.pack_update};
  }
  char* scratch(ScratchFrame& frame, int64_t R) const {
    return frame.take<char>(static_cast<int64_t>(k.scratch_bytes(R)));
  }

  Block block(const Tall& t, int64_t m, int64_t rows, int64_t c, int64_t cols, const uint32_t* bits) const {
    return {offset(t.data, m * t.ld + c, dtype), t.ld, rows, cols, bits};
  }

  // out (rows, R) at row m from R columns of sums (rows, ld).
  void round_rows(const float* sums, int64_t ld, int64_t rows, int64_t R, float scale, const Tall& out,
                  int64_t m) const {
    if (ld == R && out.ld == R) return k.round(sums, scale, rows * R, offset(out.data, m * R, dtype));
    for (int64_t i = 0; i < rows; ++i) k.round(sums + i * ld, scale, R, offset(out.data, (m + i) * out.ld, dtype));
  }

  // out (M, R) from R columns of the partial sums (cols, M, ld) of the grid's columns.
  void reduce_rows(const Grid& grid, const float* partial, int64_t ld, int64_t R, float scale, const Tall& out) const {
    at::parallel_for(0, M, std::max<int64_t>(1, kPartElements / ld), [&](int64_t begin, int64_t end) {
      ScratchFrame frame;
      float* sum = frame.take<float>(R);
      for (int64_t m = begin; m < end; ++m) {
        std::copy_n(partial + m * ld, R, sum);
        for (int64_t col = 1; col < grid.cols; ++col)
          for (int64_t r = 0; r < R; ++r) sum[r] += partial[(col * M + m) * ld + r];
        k.round(sum, scale, R, offset(out.data, m * out.ld, dtype));
      }
    });
  }

  void update(const Output& o, int64_t m, int64_t rows, int64_t c0, int64_t c1, const PackedFactor& b,
              char* scratch) const {
    for (int64_t c = c0; c < c1; c += kChunk)
      k.update(block(o.y, m, rows, c, std::min(kChunk, c1 - c), nullptr), offset(o.xa, m * o.R, dtype), b.at(c), o.R,
               scratch);
  }
};

// Along the rows, as hardware prefetchers follow it: outer() walks a block panel by panel, and cold memory then comes
// at the latency of every line.
void warm(const Block& block, DType dtype) {
  const int64_t bytes = block.cols * element_size(dtype);
  for (int64_t m = 0; m < block.rows; ++m) {
    const char* row = static_cast<const char*>(offset(block.data, m * block.ld, dtype));
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
}

int64_t largest_rank(c10::ArrayRef<Projection> projections) {
  int64_t R = 1;
  for (const Projection& p : projections) R = std::max(R, p.R);
  return R;
}

}  // namespace

void forward_pass(DType dtype, int64_t M, int64_t K, Tall x, c10::ArrayRef<Projection> projections,
                  const Columns* columns, void* x_columns) {
  const Pass pass(dtype, M);
  const Grid grid = choose_grid(M, K);
  ScratchFrame frame;
  const bool whole_rows = grid.cols == 1;
  const int64_t R = largest_rank(projections);
  c10::SmallVector<float*, 4> partials;
  for (const Projection& p : projections)
    partials.push_back(whole_rows ? nullptr : frame.take<float>(grid.cols * M * p.R));
  for_each_part(grid, pass.k, [&](const Part& part) {
    ScratchFrame local;
    PackedFactors a, b;
    bool masked = false;
    for (const Projection& p : projections) {
      a.push_back(pass.pack_rowdot(local, Pass::factor_A(p.A, K), part.c0, part.c1, p.R));
      masked = masked || p.keep;
      if (!whole_rows) continue;
      for (const Output& o : p.outputs)
        if (o.y.data) b.push_back(pass.pack_update(local, Pass::factor_B(o.B, o.R), 0, o.N, o.R));
    }
    float* sums = local.take<float>(kBlockM * R);
    MaskBlock mask(local, part.c0, masked ? part.c1 : part.c0);
    char* scratch = pass.scratch(local, R);
    for (int64_t m = part.m0; m < part.m1; m += kBlockM) {
      const int64_t rows = std::min(kBlockM, part.m1 - m);
      const PackedFactor* next_b = b.begin();
      for (size_t i = 0; i < projections.size(); ++i) {
        const Projection& p = projections[i];
        float* out = whole_rows ? sums : partials[i] + (part.col * M + m) * p.R;
        if (p.keep) mask.fill(pass.keep_bits, *p.keep, K, m, rows);
        for (int64_t c = part.c0; c < part.c1; c += kChunk) {
          const Block block = pass.block(x, m, rows, c, std::min(kChunk, part.c1 - c), p.keep ? mask.at(c) : nullptr);
          pass.k.rowdot(block, a[i].at(c), p.R, c > part.c0, out, scratch);
        }
        if (i == 0 && columns)
          columns->gather(offset(x.data, m * x.ld, dtype), x.ld, rows, element_size(dtype), part.c0, part.c1,
                          offset(x_columns, m * columns->count(), dtype), columns->count());
        if (!whole_rows) continue;
        int64_t r = 0;
        for (const Output& o : p.outputs) {
          pass.round_rows(sums + r, p.R, rows, o.R, o.scale, {o.xa, o.R}, m);
          if (o.y.data) pass.update(o, m, rows, 0, o.N, *next_b++, scratch);
          r += o.R;
        }
      }
    }
  });
  if (whole_rows) return;
  for (size_t i = 0; i < projections.size(); ++i) {
    int64_t r = 0;
    for (const Output& o : projections[i].outputs) {
      pass.reduce_rows(grid, partials[i] + r, projections[i].R, o.R, o.scale, {o.xa, o.R});
      r += o.R;
      if (o.y.data == nullptr) continue;
      for_each_part(choose_grid(M, o.N), pass.k, [&](const Part& part) {
        ScratchFrame local;
        const PackedFactor b = pass.pack_update(local, Pass::factor_B(o.B, o.R), part.c0, part.c1, o.R);
        char* scratch = pass.scratch(local, o.R);
        for (int64_t m = part.m0; m < part.m1; m += kBlockM)
          pass.update(o, m, std::min(kBlockM, part.m1 - m), part.c0, part.c1, b, scratch);
      });
    }
  }
}

void dy_pass(DType dtype, int64_t M, int64_t N, int64_t R, Tall dy, const void* B, float scale, Tall g, const void* xa,
             const Gradient& dB) {
  const Pass pass(dtype, M);
  const Grid grid = choose_grid(M, N);
  ScratchFrame frame;
  const bool whole_rows = grid.cols == 1;
  float* partial = whole_rows || !g.data ? nullptr : frame.take<float>(grid.cols * M * R);
  float* acc = dB.data ? frame.take<float>(grid.rows * accumulator_size(N, R)) : nullptr;
  for_each_part(grid, pass.k, [&](const Part& part) {
    ScratchFrame local;
    PackedFactors b;
    if (g.data) b.push_back(pass.pack_rowdot(local, Pass::factor_B(B, R), part.c0, part.c1, R));
    float* sums = g.data ? local.take<float>(kBlockM * R) : nullptr;
    char* scratch = pass.scratch(local, R);
    for (int64_t m = part.m0; m < part.m1; m += kBlockM) {
      const int64_t rows = std::min(kBlockM, part.m1 - m);
      float* out = whole_rows || !g.data ? sums : partial + (part.col * M + m) * R;
      for (int64_t c = part.c0; c < part.c1; c += kChunk) {
        const Block block = pass.block(dy, m, rows, c, std::min(kChunk, part.c1 - c), nullptr);
        if (g.data) pass.k.rowdot(block, b[0].at(c), R, c > part.c0, out, scratch);
        if (!acc) continue;
        if (!g.data) warm(block, dtype);
        pass.k.outer(block, offset(xa, m * R, dtype), R, m > part.m0,
                     acc + part.row * accumulator_size(N, R) + accumulator_size(c, R), scratch);
      }
      if (g.data && whole_rows) pass.round_rows(sums, R, rows, R, scale, g, m);
    }
  });
  if (partial) pass.reduce_rows(grid, partial, R, R, scale, g);
  if (acc) reduce_gradient(pass.k, dtype, grid, acc, R, 0, R, true, dB);
}

void dx_pass(DType dtype, int64_t M, int64_t K, Tall dx, Tall x, c10::ArrayRef<Expansion> expansions,
             const Columns* columns) {
  const Pass pass(dtype, M);
  // Columns of x and of x[:, columns] cannot be split alike.
  const Grid grid = choose_grid(M, K, columns == nullptr);
  const int64_t width = columns ? columns->count() : K;
  const Grid x_grid{grid.rows, grid.cols, M, width};
  ScratchFrame frame;
  c10::SmallVector<float*, 4> accs;
  int64_t R = 1;
  bool masked = false;
  for (const Expansion& e : expansions) {
    bool any = false;
    for (const Slice& slice : e.slices) any = any || slice.dA.data;
    accs.push_back(any ? frame.take<float>(grid.rows * accumulator_size(width, e.R)) : nullptr);
    R = std::max(R, e.R), masked = masked || e.keep;
  }
  for_each_part(grid, pass.k, [&](const Part& part) {
    ScratchFrame local;
    PackedFactors a;
    for (const Expansion& e : expansions)
      if (dx.data) a.push_back(pass.pack_update(local, Pass::factor_A(e.A, K), part.c0, part.c1, e.R));
    const int64_t x0 = columns ? 0 : part.c0, x1 = columns ? width : part.c1;
    MaskBlock mask(local, part.c0, masked ? part.c1 : part.c0);
    const bool selected = masked && columns;
    MaskBlock selected_mask(local, 0, selected ? width : 0);
    uint32_t* row = local.take<uint32_t>(selected ? round_up(K, kChunk) / 32 : 0);
    uint32_t* selected_row = local.take<uint32_t>(selected ? round_up(width, kChunk) / 32 : 0);
    char* scratch = pass.scratch(local, R);
    for (int64_t m = part.m0; m < part.m1; m += kBlockM) {
      const int64_t rows = std::min(kBlockM, part.m1 - m);
      for (size_t i = 0; i < expansions.size(); ++i) {
        const Expansion& e = expansions[i];
        const void* g_rows = offset(e.g, m * e.R, dtype);
        if (e.keep) mask.fill(pass.keep_bits, *e.keep, K, m, rows);
        for (int64_t c = part.c0; dx.data && c < part.c1; c += kChunk)
          pass.k.update(pass.block(dx, m, rows, c, std::min(kChunk, part.c1 - c), e.keep ? mask.at(c) : nullptr),
                        g_rows, a[i].at(c), e.R, scratch);
        if (!accs[i]) continue;
        if (e.keep && columns) selected_mask.select(mask, *columns, rows, row, selected_row);
        for (int64_t c = x0; c < x1; c += kChunk) {
          const uint32_t* bits = e.keep ? (columns ? selected_mask : mask).at(c) : nullptr;
          const Block block = pass.block(x, m, rows, c, std::min(kChunk, x1 - c), bits);
          warm(block, dtype);
          pass.k.outer(block, g_rows, e.R, m > part.m0,
                       accs[i] + part.row * accumulator_size(width, e.R) + accumulator_size(c, e.R), scratch);
        }
      }
    }
  });
  for (size_t i = 0; i < expansions.size(); ++i) {
    int64_t first = 0;
    for (const Slice& slice : expansions[i].slices) {
      if (slice.dA.data)
        reduce_gradient(pass.k, dtype, x_grid, accs[i], expansions[i].R, first, slice.R, false, slice.dA);
      first += slice.R;
    }
  }
}

}  // namespace lorasp
