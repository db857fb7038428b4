// The backward pass: probabilities recomputed from lse, a block of queries at a time; and the mask's gradient.
#pragma once
#include "logits.h"

namespace lorasp::LORASP_ISA {
namespace {

template <class E>
struct BackwardScratch {
  typename E::T *staged, *k, *v, *k_plain, *q, *grad_o, *q_columns, *grad_o_columns, *p, *dz, *dz_rows;
  float *s, *dp, *dq, *dk, *dv, *tile, *delta;
  float *base, *base_low;  // -lse log2 e in two parts; -inf where a query sees nothing
  int64_t* limit;
  uint32_t* words;

  BackwardScratch(Carver& c, const Head<E>& head) {
    using T = typename E::T;
    constexpr int64_t Q = kBackwardQueries, K = kBackwardKeys;
    staged = c.take<T>(2 * kRows * (head.d > head.dv ? head.d : head.dv));
    k = c.take<T>(head.n * head.d);
    v = c.take<T>(head.n * head.dv);
    k_plain = c.take<T>(head.n * head.d);
    q = c.take<T>(Q * head.d);
    q_columns = c.take<T>(Q * head.d);
    grad_o = c.take<T>(Q * head.dv);
    grad_o_columns = c.take<T>(Q * head.dv);
    p = c.take<T>(Q * K);
    dz = c.take<T>(Q * K);
    dz_rows = c.take<T>(Q * K);
    s = c.take<float>(kRows * K);
    dp = c.take<float>(kRows * K);
    dq = c.take<float>(Q * head.d);
    dk = c.take<float>(head.n * head.d);
    dv = c.take<float>(head.n * head.dv);
    tile = c.take<float>(head.has_tiles() ? kRows * K + 16 : 0);
    words = c.take<uint32_t>(head.has_tiles() ? 2 * (head.p.Sk / 32 + 2) + K / 32 : 0);
    base = c.take<float>(Q);
    base_low = c.take<float>(Q);
    delta = c.take<float>(Q);
    limit = c.take<int64_t>(Q);
  }
};

template <class E>
size_t backward_bytes(const Attention& p, int64_t keys) {
  Carver carver(nullptr);
  const KeyList list{nullptr, keys, nullptr};
  BackwardScratch<E> scratch(carver, Head<E>(p, list, 0, 0));
  return carver.bytes();
}

// The queries' operands and row statistics of one block of `rows` (a multiple of kRows) rows.
template <class E>
void pack_queries(const Head<E>& head, const BackwardScratch<E>& w, int64_t q0, int64_t valid, int64_t rows) {
  const Attention& p = head.p;
  const auto* q_rows = head.rows(p.q, head.h);
  const auto* o_rows = head.rows(p.o, head.h);
  const auto* grad_rows = head.rows(p.grad_o, head.h);
  const float* lse = p.lse + (head.b * p.H + head.h) * p.Sq;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t i = q0 + r, count = smaller(kRows, valid - r);
    stage<E>(q_rows + i * p.q.row, p.q.row, nullptr, count, p.D, head.d, w.staged);
    E::pack_a(w.staged, head.d, kRows, w.q + r * E::kStep, rows);
    E::pack_a_transposed(w.staged, head.d, w.q_columns + r * head.d);
    stage<E>(grad_rows + i * p.grad_o.row, p.grad_o.row, nullptr, count, p.Dv, head.dv, w.staged);
    E::pack_a(w.staged, head.dv, kRows, w.grad_o + r * E::kStep, rows);
    E::pack_a_transposed(w.staged, head.dv, w.grad_o_columns + r * head.dv);
    typename E::T* staged_o = w.staged + kRows * head.dv;
    stage<E>(o_rows + i * p.o.row, p.o.row, nullptr, count, p.Dv, head.dv, staged_o);
    for (int64_t m = 0; m < kRows; ++m) {
      const float row_lse = m < count ? lse[i + m] : -kInfinity;
      const double base = row_lse == -kInfinity ? row_lse : -kLog2e * row_lse;
      w.base[r + m] = static_cast<float>(base);
      w.base_low[r + m] = row_lse == -kInfinity ? 0.0f : static_cast<float>(base - static_cast<double>(w.base[r + m]));
      w.delta[r + m] = E::dot(w.staged + m * head.dv, staged_o + m * head.dv, head.dv);
      w.limit[r + m] = head.limit(smaller(i + m, p.Sq - 1));
    }
  }
}

// p = exp(z - lse) and dz = p o (dp - delta) of kRows queries from row r of the block, as products take them.
template <class E>
void differentiate(const BackwardScratch<E>& w, int64_t r, int64_t rows, int64_t count, double factor, bool need_dz) {
  const Exponent exponent(factor);
  for (int64_t j = 0; j < count; j += kPanelColumns) {
    float* s = w.s + j * kRows;
    const float* dp = w.dp + j * kRows;
    typename E::T* p_panel = w.p + j * rows;
    typename E::T* dz_panel = w.dz + j * rows;
    for (int64_t m = 0; m < kRows; m += 2, s += 2 * kPanelColumns, dp += 2 * kPanelColumns) {
      const vf base0 = vset(w.base[r + m]), base1 = vset(w.base[r + m + 1]);
      const vf low0 = vset(w.base_low[r + m]), low1 = vset(w.base_low[r + m + 1]);
      const vf p00 = exponent.power<E>(vload(s), base0, low0);
      const vf p01 = exponent.power<E>(vload(s + kWidth), base0, low0);
      const vf p10 = exponent.power<E>(vload(s + kPanelColumns), base1, low1);
      const vf p11 = exponent.power<E>(vload(s + kPanelColumns + kWidth), base1, low1);
      E::store_b(p_panel, r + m, p00, p01, p10, p11);
      if (!need_dz) continue;
      const vf delta0 = vset(-w.delta[r + m]), delta1 = vset(-w.delta[r + m + 1]);
      const vf dz00 = vmul(p00, vadd(vload(dp), delta0)), dz01 = vmul(p01, vadd(vload(dp + kWidth), delta0));
      const vf dz10 = vmul(p10, vadd(vload(dp + kPanelColumns), delta1));
      const vf dz11 = vmul(p11, vadd(vload(dp + kPanelColumns + kWidth), delta1));
      E::store_both(dz_panel, w.dz_rows, rows, r + m, j, dz00, dz01, dz10, dz11);
    }
  }
}

// Logits and dp of kRows queries from row r of the block at q0; false where none is visible.
template <class E>
bool scores(const Head<E>& head, const BackwardScratch<E>& w, int64_t q0, int64_t valid, int64_t r, int64_t rows,
            int64_t k0, int64_t count, bool need_dp) {
  const float* tile = nullptr;
  if (head.has_tiles()) {
    const int64_t tile_rows = smaller(kRows, valid - r);
    if (!bias_tile<E>(head, q0 + r, tile_rows, k0, count, w.words, w.tile, kBackwardKeys)) return false;
    for (int64_t m = tile_rows; m < kRows; ++m)
      std::memset(w.tile + m * kBackwardKeys, 0, static_cast<size_t>(count) * sizeof(float));
    tile = w.tile;
  }
  E::multiply(w.q + r * E::kStep, rows, kRows, w.k + k0 * head.d, head.d * kPanelColumns, count / kPanelColumns,
              head.d / E::kStep, false, w.s, kRows * kPanelColumns);
  shape_logits<E>(head, w.s, kRows, k0, count, w.limit + r, tile, kBackwardKeys);
  if (need_dp)
    E::multiply(w.grad_o + r * E::kStep, rows, kRows, w.v + k0 * head.dv, head.dv * kPanelColumns,
                count / kPanelColumns, head.dv / E::kStep, false, w.dp, kRows * kPanelColumns);
  return true;
}

// Adds the transposed accumulators (D, n) to the rows of the keys they belong to.
template <class E>
void add_rows(const Head<E>& head, const float* accumulator, int64_t cols, int64_t padded, float factor, float* out) {
  float block[16 * 16];
  for (int64_t j = 0; j < head.keys.count; j += kPanelColumns) {
    const float* panel = accumulator + j * padded;
    for (int64_t c = 0; c < cols; c += 16) {
      const int64_t width = smaller(16, cols - c);
      for (int64_t first = 0; first < kPanelColumns; first += 16) {
        const int64_t columns = smaller(16, kPanelColumns - first);
        E::transpose(panel + c * kPanelColumns + first, kPanelColumns, columns, block);
        for (int64_t m = 0; m < columns; ++m) {
          const int64_t key = j + E::column(first + m);
          if (key >= head.keys.count) continue;
          float* row = out + head.keys.index[key] * cols + c;
          for (int64_t x = 0; x < width; ++x) row[x] += factor * block[m * 16 + x];
        }
      }
    }
  }
}

template <class E>
void backward(const Attention& p, const KeyList& keys, const Share& share, const Gradients& out, void* memory) {
  using T = typename E::T;
  const Head<E> head(p, keys, share.b, share.h);
  Carver carver(memory);
  const BackwardScratch<E> w(carver, head);
  const bool need_dz = out.dq || out.dk;
  E::enter();
  pack_keys<E>(head, p.k, p.D, head.d, w.staged, w.k, out.dq ? w.k_plain : nullptr);
  if (need_dz) pack_keys<E>(head, p.v, p.Dv, head.dv, w.staged, w.v, nullptr);
  if (out.dk) std::memset(w.dk, 0, static_cast<size_t>(head.n * head.d) * sizeof(float));
  if (out.dv) std::memset(w.dv, 0, static_cast<size_t>(head.n * head.dv) * sizeof(float));
  for (int64_t block = share.first; block * kBackwardQueries < p.Sq; block += share.step) {
    const int64_t q0 = block * kBackwardQueries, valid = smaller(kBackwardQueries, p.Sq - q0);
    const int64_t rows = round_up(valid, kRows);
    pack_queries<E>(head, w, q0, valid, rows);
    if (out.dq) std::memset(w.dq, 0, static_cast<size_t>(rows * head.d) * sizeof(float));
    const int64_t end = w.limit[rows - 1];
    for (int64_t k0 = 0; k0 < end; k0 += kBackwardKeys) {
      const int64_t count = smaller(kBackwardKeys, round_up(end - k0, kRows));
      int64_t start = 0;  // rows before it see nothing of this block
      while (start + kRows < rows && w.limit[start + kRows - 1] <= k0) start += kRows;
      bool any = false;
      for (int64_t r = start; r < rows; r += kRows) {
        if (scores<E>(head, w, q0, valid, r, rows, k0, count, need_dz)) {
          differentiate<E>(w, r, rows, count, head.factor, need_dz);
          any = true;
          continue;
        }
        for (int64_t j = 0; j < count; j += kPanelColumns) {
          std::memset(w.p + j * rows + r * kPanelColumns, 0, sizeof(T) * kRows * kPanelColumns);
          if (need_dz) std::memset(w.dz + j * rows + r * kPanelColumns, 0, sizeof(T) * kRows * kPanelColumns);
        }
        if (need_dz) {
          for (int64_t j = 0; j < count; j += E::kStep)
            std::memset(w.dz_rows + j * rows + r * E::kStep, 0, sizeof(T) * kRows * E::kStep);
        }
      }
      if (!any) continue;
      const int64_t steps = (rows - start) / E::kStep, panels = count / kPanelColumns;
      if (out.dv)
        E::multiply(w.grad_o_columns + start * head.dv, head.dv, head.dv, w.p + start * kPanelColumns,
                    rows * kPanelColumns, panels, steps, true, w.dv + k0 * head.dv, head.dv * kPanelColumns);
      if (out.dk)
        E::multiply(w.q_columns + start * head.d, head.d, head.d, w.dz + start * kPanelColumns, rows * kPanelColumns,
                    panels, steps, true, w.dk + k0 * head.d, head.d * kPanelColumns);
      if (out.dq)
        E::multiply(w.dz_rows + start * E::kStep, rows, rows - start, w.k_plain + k0 * kPanelColumns,
                    head.n * kPanelColumns, head.d / kPanelColumns, count / E::kStep, true,
                    w.dq + start * kPanelColumns, rows * kPanelColumns);
    }
    if (out.dq) {
      auto* dq = static_cast<typename E::Source*>(out.dq);
      for (int64_t r = 0; r < valid; ++r)
        E::store_row(w.dq + r * kPanelColumns, rows * kPanelColumns, p.D, p.scale, dq + (q0 + r) * out.dq_row);
    }
  }
  if (out.dk) add_rows<E>(head, w.dk, p.D, head.d, p.scale, out.dk);
  if (out.dv) add_rows<E>(head, w.dv, p.Dv, head.dv, 1.0f, out.dv);
  E::leave();
}

template <class E>
void mask_gradient(const Attention& p, const KeyList& keys, const Share& share, const MaskGradient& out, void* memory) {
  const Head<E> head(p, keys, share.b, share.h);
  Carver carver(memory);
  const BackwardScratch<E> w(carver, head);
  E::enter();
  pack_keys<E>(head, p.k, p.D, head.d, w.staged, w.k, nullptr);
  pack_keys<E>(head, p.v, p.Dv, head.dv, w.staged, w.v, nullptr);
  const Exponent exponent(head.factor);
  for (int64_t block = share.first; block * kBackwardQueries < p.Sq; block += share.step) {
    const int64_t q0 = block * kBackwardQueries, valid = smaller(kBackwardQueries, p.Sq - q0);
    const int64_t rows = round_up(valid, kRows);
    pack_queries<E>(head, w, q0, valid, rows);
    for (int64_t k0 = 0; k0 < w.limit[rows - 1]; k0 += kBackwardKeys) {
      const int64_t count = smaller(kBackwardKeys, round_up(w.limit[rows - 1] - k0, kRows));
      for (int64_t r = 0; r < rows; r += kRows) {
        if (!scores<E>(head, w, q0, valid, r, rows, k0, count, true)) continue;
        for (int64_t m = 0; m < smaller(kRows, valid - r); ++m) {
          const vf base = vset(w.base[r + m]), low = vset(w.base_low[r + m]), delta = vset(-w.delta[r + m]);
          float dz[kBackwardKeys];
          for (int64_t j = 0; j < count; j += kWidth) {
            const int64_t at = (j / kPanelColumns * kRows + m) * kPanelColumns + j % kPanelColumns;
            const vf p_lanes = exponent.power<E>(vload(w.s + at), base, low);
            vstore(dz + j, vmul(p_lanes, vadd(vload(w.dp + at), delta)));
          }
          float* row = out.data + (q0 + r + m) * out.row;
          const int64_t last = smaller(count, keys.count - k0);
          const int32_t* index = keys.index + k0;
          if (out.key == 1 && index[last - 1] - index[0] == last - 1) {
            for (int64_t j = 0; j < last; ++j) row[index[0] + j] += dz[j];
          } else {
            for (int64_t j = 0; j < last; ++j) row[index[j] * out.key] += dz[j];
          }
        }
      }
    }
  }
  E::leave();
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
