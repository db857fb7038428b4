// The forward pass, a block of queries at a time, with an online softmax.
#pragma once
#include "forward_few.h"
#include "logits.h"

namespace lorasp::LORASP_ISA {
namespace {

// o is rescaled only where a row's maximum grows by more than this many powers of two.
constexpr float kSlack = 8.0f;

template <class E>
struct ForwardScratch {
  typename E::T *staged, *k, *v, *q, *probabilities;
  float *s, *o, *tile, *maximum, *sum;
  int64_t* limit;
  uint32_t* words;

  ForwardScratch(Carver& c, const Head<E>& head) {
    using T = typename E::T;
    staged = c.take<T>(kRows * (head.d > head.dv ? head.d : head.dv));
    k = c.take<T>(head.n * head.d);
    v = c.take<T>(head.n * head.dv);
    q = c.take<T>(kForwardQueries * head.d);
    probabilities = c.take<T>(kForwardQueries * kForwardKeys);
    s = c.take<float>(kForwardQueries * kForwardKeys);
    o = c.take<float>(kForwardQueries * head.dv);
    tile = c.take<float>(head.has_tiles() ? kForwardQueries * kForwardKeys + 16 : 0);
    words = c.take<uint32_t>(head.has_tiles() ? 2 * (head.p.Sk / 32 + 2) + kForwardKeys / 32 : 0);
    maximum = c.take<float>(kForwardQueries);
    sum = c.take<float>(kForwardQueries);
    limit = c.take<int64_t>(kForwardQueries);
  }
};

template <class E>
size_t forward_bytes(const Attention& p, int64_t keys) {
  Carver carver(nullptr);
  const KeyList list{nullptr, keys, nullptr};
  if (p.Sq <= kFewQueries) {
    FewScratch<E> scratch(carver, Head<E>(p, list, 0, 0));
    return carver.bytes();
  }
  ForwardScratch<E> scratch(carver, Head<E>(p, list, 0, 0));
  return carver.bytes();
}

// One row of a block: p = 2^(s * factor - m), its sum, and o rescaled where m moved.
template <class E>
inline void softmax_row(const ForwardScratch<E>& w, int64_t r, int64_t rows, int64_t count, double factor, int64_t dv,
                        bool first) {
  const float* s = w.s + r * kPanelColumns;
  const int64_t next = rows * kPanelColumns;
  vf top0 = vset(-kInfinity), top1 = top0;
  for (int64_t j = 0; j < count; j += kPanelColumns) {
    top0 = vmax(top0, vload(s + j * rows));
    top1 = vmax(top1, vload(s + j * rows + kWidth));
  }
  const float top = vmax_all(vmax(top0, top1)) * static_cast<float>(factor);
  float m = w.maximum[r];
  if (first || m == -kInfinity) {
    m = top;
  } else if (top > m + kSlack) {
    const float shrink = __builtin_exp2f(m - top);
    w.sum[r] *= shrink;
    float* o = w.o + r * kPanelColumns;
    for (int64_t c = 0; c < dv; c += kPanelColumns, o += next) {
      vstore(o, vmul(vload(o), vset(shrink)));
      vstore(o + kWidth, vmul(vload(o + kWidth), vset(shrink)));
    }
    m = top;
  }
  w.maximum[r] = m;
  const Exponent exponent(factor);
  const vf base = vset(m == -kInfinity ? 0.0f : -m);
  vf sum0 = vzero(), sum1 = vzero();
  for (int64_t j = 0; j < count; j += kPanelColumns) {
    const vf p0 = exponent.power<E>(vload(s + j * rows), base, vzero());
    const vf p1 = exponent.power<E>(vload(s + j * rows + kWidth), base, vzero());
    sum0 = vadd(sum0, p0);
    sum1 = vadd(sum1, p1);
    E::store_a(w.probabilities, rows, r, j, p0, p1);
  }
  w.sum[r] = (first ? 0.0f : w.sum[r]) + vsum(vadd(sum0, sum1));
}

template <class E>
void forward(const Attention& p, const KeyList& keys, const Share& share, void* memory) {
  const Head<E> head(p, keys, share.b, share.h);
  if (p.Sq <= kFewQueries) return forward_few<E>(head, memory);
  Carver carver(memory);
  const ForwardScratch<E> w(carver, head);
  E::enter();
  pack_keys<E>(head, p.k, p.D, head.d, w.staged, w.k, nullptr);
  pack_keys<E>(head, p.v, p.Dv, head.dv, w.staged, nullptr, w.v);
  const auto* q_rows = head.rows(p.q, share.h);
  auto* o_rows = const_cast<typename E::Source*>(head.rows(p.o, share.h));
  float* lse = p.lse + (share.b * p.H + share.h) * p.Sq;
  for (int64_t block = share.first; block * kForwardQueries < p.Sq; block += share.step) {
    const int64_t q0 = block * kForwardQueries, valid = smaller(kForwardQueries, p.Sq - q0);
    const int64_t rows = round_up(valid, E::kMR);
    for (int64_t r = 0; r < rows; r += kRows) {
      stage<E>(q_rows + (q0 + r) * p.q.row, p.q.row, nullptr, smaller(kRows, valid - r), p.D, head.d, w.staged);
      E::pack_a(w.staged, head.d, smaller(kRows, rows - r), w.q + r * E::kStep, rows);
    }
    for (int64_t r = 0; r < rows; ++r) w.limit[r] = head.limit(smaller(q0 + r, p.Sq - 1));
    const int64_t end = w.limit[rows - 1];
    bool first = true;
    for (int64_t k0 = 0; k0 < end; k0 += kForwardKeys) {
      const int64_t count = smaller(kForwardKeys, round_up(end - k0, kRows));
      const float* tile = nullptr;
      if (head.has_tiles()) {
        if (!bias_tile<E>(head, q0, valid, k0, count, w.words, w.tile, kForwardKeys)) continue;
        for (int64_t r = valid; r < rows; ++r)
          std::memset(w.tile + r * kForwardKeys, 0, static_cast<size_t>(count) * sizeof(float));
        tile = w.tile;
      }
      E::multiply(w.q, rows, rows, w.k + k0 * head.d, head.d * kPanelColumns, count / kPanelColumns, head.d / E::kStep,
                  false, w.s, rows * kPanelColumns);
      shape_logits<E>(head, w.s, rows, k0, count, w.limit, tile, kForwardKeys);
      for (int64_t r = 0; r < rows; ++r) softmax_row<E>(w, r, rows, count, head.factor, head.dv, first);
      E::multiply(w.probabilities, rows, rows, w.v + k0 * kPanelColumns, head.n * kPanelColumns,
                  head.dv / kPanelColumns, count / E::kStep, !first, w.o, rows * kPanelColumns);
      first = false;
    }
    for (int64_t r = 0; r < valid; ++r) {
      const float sum = first ? 0.0f : w.sum[r];
      const bool empty = sum == 0.0f;
      if (empty) {
        std::memset(o_rows + (q0 + r) * p.o.row, 0, static_cast<size_t>(p.Dv) * sizeof(typename E::Source));
        lse[q0 + r] = -kInfinity;
      } else {
        E::store_row(w.o + r * kPanelColumns, rows * kPanelColumns, p.Dv, 1.0f / sum, o_rows + (q0 + r) * p.o.row);
        lse[q0 + r] = static_cast<float>(w.maximum[r] * kLn2 + __builtin_log(sum));
      }
    }
  }
  E::leave();
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
