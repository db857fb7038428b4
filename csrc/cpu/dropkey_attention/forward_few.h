// The forward pass of few queries: keys and values are read once, where they lie.
#pragma once
#include "logits.h"

namespace lorasp::LORASP_ISA {
namespace {

constexpr int64_t kFewQueries = 4;

template <class E>
struct FewScratch {
  float *q, *s, *o, *piece, *tile;
  uint32_t* words;

  FewScratch(Carver& c, const Head<E>& head) {
    q = c.take<float>(head.d);
    s = c.take<float>(head.n + kForwardKeys);
    o = c.take<float>(head.dv);
    piece = c.take<float>(head.dv);
    tile = c.take<float>(head.has_tiles() ? kForwardKeys + 16 : 0);
    words = c.take<uint32_t>(head.has_tiles() ? 2 * (head.p.Sk / 32 + 2) + kForwardKeys / 32 : 0);
  }
};

// sum (count) += weights[j] * row index[j] of v, for `keys` keys.
template <class S>
inline void add_weighted(const S* v, int64_t stride, const int32_t* index, const float* weights, int64_t keys,
                         int64_t count, float* sum) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= count; c += 4 * kWidth) {
    vf acc[4];
    for (int i = 0; i < 4; ++i) acc[i] = vload(sum + c + i * kWidth);
    for (int64_t j = 0; j < keys; ++j) {
      const S* row = v + index[j] * stride + c;
      const vf weight = vset(weights[j]);
      for (int i = 0; i < 4; ++i) acc[i] = vfma(weight, vload(row + i * kWidth), acc[i]);
    }
    for (int i = 0; i < 4; ++i) vstore(sum + c + i * kWidth, acc[i]);
  }
  for (; c < count; ++c)
    for (int64_t j = 0; j < keys; ++j) sum[c] += weights[j] * scalar(v[index[j] * stride + c]);
}

template <class E>
void forward_few(const Head<E>& head, void* memory) {
  using S = typename E::Source;
  const Attention& p = head.p;
  const int32_t* index = head.keys.index;
  Carver carver(memory);
  const FewScratch<E> w(carver, head);
  const S* k = head.rows(p.k, head.key_head);
  const S* v = head.rows(p.v, head.key_head);
  constexpr int64_t kPiece = 128;  // keys summed before they join o: the rounding of a library product
  for (int64_t i = 0; i < p.Sq; ++i) {
    const S* q = head.rows(p.q, head.h) + i * p.q.row;
    S* o = const_cast<S*>(head.rows(p.o, head.h)) + i * p.o.row;
    for (int64_t c = 0; c < p.D; ++c) w.q[c] = scalar(q[c]);
    const int64_t end = head.limit(i);
    float top = -kInfinity;
    for (int64_t k0 = 0; k0 < end; k0 += kForwardKeys) {
      const int64_t count = smaller(kForwardKeys, round_up(end - k0, kRows)), valid = smaller(count, end - k0);
      const bool tiled = head.has_tiles();
      if (tiled && !bias_tile<E>(head, i, 1, k0, count, w.words, w.tile, kForwardKeys)) {
        for (int64_t j = 0; j < count; ++j) w.s[k0 + j] = -kInfinity;
        continue;
      }
      for (int64_t j = 0; j < valid; ++j) {
        const S* row = k + index[k0 + j] * p.k.row;
        vf even = vzero(), odd = vzero();
        int64_t c = 0;
        for (; c + 2 * kWidth <= p.D; c += 2 * kWidth) {
          even = vfma(vload(row + c), vload(w.q + c), even);
          odd = vfma(vload(row + c + kWidth), vload(w.q + c + kWidth), odd);
        }
        float dot = vsum(vadd(even, odd));
        for (; c < p.D; ++c) dot += scalar(row[c]) * w.q[c];
        float z = dot * p.scale;
        if (tiled) {
          z += w.tile[j];
        } else if (head.keys.bias) {
          z += head.keys.bias[k0 + j];
        }
        w.s[k0 + j] = z;
        top = z > top || z != z ? z : top;
      }
      for (int64_t j = valid; j < count; ++j) w.s[k0 + j] = -kInfinity;
    }
    const Exponent exponent(kLog2e);
    const double base = top == -kInfinity ? 0.0 : -kLog2e * top;
    const vf high = vset(static_cast<float>(base)), low = vset(static_cast<float>(base - static_cast<float>(base)));
    vf sums = vzero();
    for (int64_t j = 0; j < end; j += kWidth) {
      const vf weights = exponent.power<E>(vload(w.s + j), high, low);
      vstore(w.s + j, weights);
      sums = vadd(sums, weights);
    }
    const float sum = vsum(sums);
    float* lse = p.lse + (head.b * p.H + head.h) * p.Sq + i;
    *lse = sum == 0.0f ? -kInfinity : static_cast<float>(top + __builtin_log(sum));
    std::memset(w.o, 0, static_cast<size_t>(head.dv) * sizeof(float));
    for (int64_t j = 0; j < end; j += kPiece) {
      std::memset(w.piece, 0, static_cast<size_t>(head.dv) * sizeof(float));
      add_weighted(v, p.v.row, index + j, w.s + j, smaller(kPiece, end - j), p.Dv, w.piece);
      for (int64_t c = 0; c < head.dv; c += kWidth) vstore(w.o + c, vadd(vload(w.o + c), vload(w.piece + c)));
    }
    const vf factor = vset(sum == 0.0f ? 0.0f : 1.0f / sum);
    for (int64_t c = 0; c < head.dv; c += kWidth) vstore(w.o + c, vmul(vload(w.o + c), factor));
    E::round_row(w.o, p.Dv, o);
  }
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
