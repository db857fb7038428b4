// From products to probabilities: a logit is z = s * scale [+ bias] and p = 2^(z log2 e - m). Where the scale is all
// there is to a logit (Head::transforms), it is folded into the exponent's factor; factors come in two floats where
// fp32's rounding counts (kFine).
#pragma once
#include "head.h"

namespace lorasp::LORASP_ISA {
namespace {

#if defined(LORASP_AVX512)

inline vf load_hiding(const float* p, __mmask16 valid) { return _mm512_maskz_loadu_ps(valid, p); }
inline vf load_hiding(const bf16* p, __mmask16 valid) { return widen(_mm256_maskz_loadu_epi16(valid, p)); }
inline vf load_hiding(const f16* p, __mmask16 valid) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, p)); }
inline vf load_hiding(const uint8_t* p, __mmask16 valid) {
  const __mmask16 open = _mm_test_epi8_mask(_mm_maskz_loadu_epi8(valid, p), _mm_set1_epi8(-1));
  return _mm512_mask_mov_ps(vset(-kInfinity), open, vzero());
}

// out[j] = row[index[j]] for keys of a list given as bits of row[0] ...; values up to `hidden` become -inf, and NaN
// +inf, which no maximum loses and which makes its query NaN.
// Writes up to 15 floats too many.
template <class M>
inline void compress_row(const M* row, const uint32_t* kept, int64_t range, float hidden, float* out) {
  for (int64_t j = 0; j < range; j += 16) {
    const auto bits = static_cast<__mmask16>(kept[j / 32] >> (j % 32));
    const auto valid = static_cast<__mmask16>(range - j >= 16 ? 0xFFFF : (1 << (range - j)) - 1);
    vf value = load_hiding(row + j, valid);
    value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, vset(hidden), _CMP_LE_OQ), vset(-kInfinity));
    value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), vset(kInfinity));
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(bits, value));
    out += __builtin_popcount(bits);
  }
}

#endif

// What is added to the logits of queries q0 ... q0 + rows - 1 and keys k0 ... k0 + count - 1; rows
// kBackwardKeys or more apart (`ld`). False where no logit of the block is visible.
template <class E>
bool bias_tile(const Head<E>& head, int64_t q0, int64_t rows, int64_t k0, int64_t count, uint32_t* words, float* tile,
               int64_t ld) {
  const Attention& p = head.p;
  const int32_t* index = head.keys.index + k0;
  const int64_t valid = smaller(count, head.keys.count - k0);
  const bool run = index[valid - 1] - index[0] == valid - 1;
  const ScoreMask& mask = p.mask;
  const int64_t range = index[valid - 1] - index[0] + 1;
#if defined(LORASP_AVX512)
  const bool compresses = !run && mask.key == 1;
  uint32_t* kept = words + p.Sk / 32 + 2;
  if (compresses) {
    std::memset(kept, 0, static_cast<size_t>(range / 32 + 1) * sizeof(uint32_t));
    for (int64_t j = 0; j < valid; ++j) kept[(index[j] - index[0]) / 32] |= 1u << ((index[j] - index[0]) % 32);
  }
#endif
  bool any = false;
  for (int64_t r = 0; r < rows; ++r, tile += ld) {
    const int64_t i = q0 + r;
    const int64_t offset = head.b * mask.batch + head.h * mask.head + i * mask.row;
    float best = -kInfinity;
    const auto additive = [&](auto* data) {
      const auto* row = data + offset;
#if defined(LORASP_AVX512)
      if (compresses) return compress_row(row + index[0], kept, range, mask.hidden, tile);
#endif
      const bool straight = run && mask.key == 1;
      if (straight) row += index[0];
      for (int64_t j = 0; j < valid; ++j) {
        const float value = straight ? E::widen(row[j]) : E::widen(row[index[j] * mask.key]);
        tile[j] = value <= mask.hidden ? -kInfinity : value == value ? value : kInfinity;
      }
    };
    switch (mask.kind) {
      case ScoreMask::kNone:
        for (int64_t j = 0; j < valid; ++j) tile[j] = 0.0f;
        break;
      case ScoreMask::kBool: {
        const auto* row = static_cast<const uint8_t*>(mask.data) + offset;
#if defined(LORASP_AVX512)
        if (compresses) {
          compress_row(row + index[0], kept, range, -kInfinity, tile);
          break;
        }
#endif
        if (run && mask.key == 1) {
          row += index[0];
          for (int64_t j = 0; j < valid; ++j) tile[j] = row[j] ? 0.0f : -kInfinity;
        } else {
          for (int64_t j = 0; j < valid; ++j) tile[j] = row[index[j] * mask.key] ? 0.0f : -kInfinity;
        }
        break;
      }
      case ScoreMask::kF32:
        additive(static_cast<const float*>(mask.data));
        break;
      case ScoreMask::kBF16:
        additive(static_cast<const bf16*>(mask.data));
        break;
      case ScoreMask::kF16:
        additive(static_cast<const f16*>(mask.data));
        break;
    }
    for (int64_t j = valid; j < count; ++j) tile[j] = -kInfinity;
    if (p.elements) {
      const int64_t row = ((head.b * p.H + head.h) * p.Sq + i) * p.Sk;
      p.keep_bits(*p.elements, row + index[0], range, words);
      if (run) {
        for (int64_t j = 0; j < count; j += kWidth) vstore(tile + j, vhide(vload(tile + j), words[j / 32] >> (j % 32)));
      } else {
        for (int64_t j = 0; j < valid; ++j) {
          const int64_t bit = index[j] - index[0];
          if (!(words[bit / 32] >> (bit % 32) & 1)) tile[j] = -kInfinity;
        }
      }
    }
    if (head.keys.bias) {
      for (int64_t j = 0; j < valid; ++j) tile[j] += head.keys.bias[k0 + j];
    }
    vf top = vset(-kInfinity);
    for (int64_t j = 0; j < count; j += kWidth) top = vmax(top, vload(tile + j));
    best = vmax_all(top);
    any = any || best > -kInfinity;
  }
  return any;
}

// s = s * scale + bias, and -inf from each row's limit on. Panels are `rows` rows high.
template <class E>
void shape_logits(const Head<E>& head, float* s, int64_t rows, int64_t k0, int64_t count, const int64_t* limit,
                  const float* tile, int64_t ld) {
  if (head.transforms()) {
    const vf factor = vset(head.p.scale);
    for (int64_t j = 0; j < count; j += kPanelColumns) {
      float* panel = s + j * rows;
      for (int64_t r = 0; r < rows; ++r, panel += kPanelColumns) {
        for (int half = 0; half < kPanelColumns; half += kWidth) {
          vf bias = vzero();
          if (tile) {
            bias = vload(tile + r * ld + j + half);
          } else if (head.keys.bias) {
            bias = vload(head.keys.bias + k0 + j + half);
          }
          vstore(panel + half, vfma(vload(panel + half), factor, bias));
        }
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = limit[r] <= k0 ? 0 : limit[r] - k0; j < count; ++j)
      s[j / kPanelColumns * rows * kPanelColumns + r * kPanelColumns + j % kPanelColumns] = -kInfinity;
  }
}

// 2^(s * factor + base), both in two parts where it matters.
struct Exponent {
  vf high, low;

  // factor > 0. Both parts are positive: a hidden logit, -inf, stays -inf under both.
  explicit Exponent(double factor) {
    float rounded = static_cast<float>(factor);
    if (rounded >= factor) rounded = __builtin_nextafterf(rounded, 0.0f);
    const float rest = static_cast<float>(factor - static_cast<double>(rounded));
    high = vset(rounded);
    low = vset(rest > __FLT_MIN__ ? rest : __FLT_MIN__);
  }
  template <class E>
  vf power(vf s, vf base, vf base_low) const {
    vf x = fused(s, high, base);
    if constexpr (E::kFine) x = vadd(x, vfma(s, low, base_low));
    return vexp2<E::kFine>(x);
  }

 private:
  // The product is as large as the base: its rounding must not show.
  static vf fused(vf a, vf b, vf c) {
#if defined(LORASP_AVX512) || defined(LORASP_AVX2)
    return vfma(a, b, c);
#else
    for (int i = 0; i < kWidth; ++i) c[i] = static_cast<float>(static_cast<double>(a[i]) * b[i] + c[i]);
    return c;
#endif
  }
};

}  // namespace
}  // namespace lorasp::LORASP_ISA
