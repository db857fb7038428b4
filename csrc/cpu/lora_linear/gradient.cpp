#include "gradient.h"

#include <cstring>

#include "../common/scratch.h"

namespace lorasp {
namespace {

struct Writer {
  const Kernels& k;
  DType dtype;
  const Gradient& out;

  void write(const float* values, int64_t count, int64_t at) const {
    if (out.fp32) {
      std::copy_n(values, count, static_cast<float*>(out.data) + at);
    } else {
      k.round(values, 1.0f, count, offset(out.data, at, dtype));
    }
  }

  // The gradient's flat entries from `at` on.
  void run(float* values, int64_t count, int64_t at) const {
    if (out.mask)
      for (int64_t i = 0; i < count; ++i) values[i] = out.mask[at + i] ? values[i] : 0.0f;
    write(values, count, at);
  }

  // Those of them that are selected. Ascending entries never stand before their index: values is compacted in place.
  void entries(float* values, int64_t count, int64_t at) const {
    const int64_t* end = out.index + out.count;
    const int64_t* first = std::lower_bound(out.index, end, at);
    int64_t kept = 0;
    for (const int64_t* entry = first; entry < end && *entry < at + count; ++entry)
      values[kept++] = values[*entry - at];
    write(values, kept, first - out.index);
  }

  // Rows c ... c + cols - 1 of a B's gradient.
  void rows(const float* values, int64_t c, int64_t cols, int64_t R) const {
    const int64_t* end = out.index + out.count;
    for (const int64_t* row = std::lower_bound(out.index, end, c); row < end && *row < c + cols; ++row)
      write(values + (*row - c) * R, R, (out.form == Gradient::Form::kRows ? row - out.index : *row) * R);
  }

  // Row r of an A's gradient, accumulated columns c ... c + cols - 1.
  void spread(const float* values, int64_t r, int64_t c, int64_t cols) const {
    const int64_t bytes = out.fp32 ? sizeof(float) : element_size(dtype);
    char elements[kPanel * sizeof(float)];
    if (out.fp32) {
      std::memcpy(elements, values, cols * bytes);
    } else {
      k.round(values, 1.0f, cols, elements);
    }
    for (int64_t j = 0; j < cols; ++j)
      std::memcpy(static_cast<char*>(out.data) + (r * out.ld + out.index[c + j]) * bytes, elements + j * bytes, bytes);
  }
};

}  // namespace

void reduce_gradient(const Kernels& k, DType dtype, const Grid& grid, const float* acc, int64_t stacked, int64_t first,
                     int64_t R, bool columns_first, const Gradient& out) {
  using Form = Gradient::Form;
  const Writer writer{k, dtype, out};
  const int64_t padded = rank_padded(stacked), size = accumulator_size(grid.columns, stacked);
  const int64_t grain = std::max<int64_t>(1, kPartElements / (kPanel * R));
  at::parallel_for(0, ceil_div(grid.columns, kPanel), grain, [&](int64_t begin, int64_t end) {
    ScratchFrame frame;
    float* values = frame.take<float>(R * kPanel);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t c = panel * kPanel, cols = std::min(kPanel, grid.columns - c);
      for (int64_t r = 0; r < R; ++r) {
        const float* row = acc + (panel * padded + first + r) * kPanel;
        float sum[kPanel];
        std::copy_n(row, kPanel, sum);
        for (int64_t i = 1; i < grid.rows; ++i)
          for (int64_t j = 0; j < kPanel; ++j) sum[j] += row[i * size + j];
        for (int64_t j = 0; j < cols; ++j) values[columns_first ? j * R + r : j] = sum[k.panel_order[j]];
        if (columns_first) continue;
        if (out.form == Form::kEntries) {
          writer.entries(values, cols, r * grid.columns + c);
        } else if (out.form == Form::kInPlace) {
          writer.spread(values, r, c, cols);
        } else {
          writer.run(values, cols, r * grid.columns + c);
        }
      }
      if (!columns_first) continue;
      if (out.form == Form::kEntries) {
        writer.entries(values, cols * R, c * R);
      } else if (out.form == Form::kWhole) {
        writer.run(values, cols * R, c * R);
      } else {
        writer.rows(values, c, cols, R);
      }
    }
  });
}

}  // namespace lorasp
