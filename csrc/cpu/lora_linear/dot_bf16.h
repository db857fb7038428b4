// Pairs of bf16 multiplied as they are by vdpbf16ps (AVX512-BF16). After simd_avx512.h, with skinny_impl.h.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

// Where column c of a panel lands when two rows are interleaved by unpacklo and unpackhi.
constexpr uint8_t kUnpackOrder[kPanel] = {0, 1, 2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
                                          8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};

inline __m512bh as_pairs(__m512i v) { return (__m512bh)v; }

struct Paired {
  using X = bf16;
  using W = bf16;
  using Lane = uint32_t;
  using Frag = __m512i;
  static constexpr const uint8_t* kPanelOrder = kUnpackOrder;
  static constexpr int kPair = 2;
  static constexpr int kStep = 32;

  static Frag load(const bf16* p) { return _mm512_loadu_si512(p); }
  static Frag load(const bf16* p, uint32_t bits) { return _mm512_maskz_loadu_epi16(bits, p); }
  static Frag load_tail(const bf16* p, int64_t, uint32_t bits) { return load(p, bits); }
  static void store_weight(W* p, Frag w) { _mm512_storeu_si512(p, w); }
  static vf dot(Frag x, const W* w, vf acc) { return _mm512_dpbf16_ps(acc, as_pairs(x), as_pairs(load(w))); }
  static vf madd(vf acc, vf lanes, Lane scalar) {
    return _mm512_dpbf16_ps(acc, as_pairs(_mm512_castps_si512(lanes)),
                            as_pairs(_mm512_set1_epi32(static_cast<int>(scalar))));
  }

  static Lane pair(bf16 low, bf16 high) { return low.bits | static_cast<Lane>(high.bits) << 16; }
  static void pack_rows(const bf16* s, int64_t rows, int64_t R, Lane* out) {
    for (int64_t m = 0; m < rows; ++m, s += R) {
      for (int64_t r = 0; r + 1 < R; r += 2) *out++ = pair(s[r], s[r + 1]);
      if (R % 2) *out++ = s[R - 1].bits;
    }
  }
  static void pack_columns(const bf16* s, int64_t rows, int64_t R, Lane* out) {
    for (int64_t m = 0; m < rows; m += 2, s += 2 * R) {
      for (int64_t r = 0; r < R; ++r) *out++ = m + 1 < rows ? pair(s[r], s[R + r]) : s[r].bits;
    }
  }
  static void pack_panel(const bf16 (*rows)[kPanel], Lane* out) {
    for (int j = 0; j < kPanel; ++j) out[j] = pair(rows[0][j], rows[1][j]);
  }
  static void stage(const Block& x, int64_t m, int64_t c, Lane* out) {
    const auto* row = static_cast<const bf16*>(x.data) + m * x.ld + c;
    const uint32_t valid = low_bits(x.cols - c);
    const uint32_t* bits = x.bits + m * kMaskWords + c / 32;
    const __m512i low = load(row, x.bits ? bits[0] & valid : valid);
    const uint32_t second = m + 1 >= x.rows ? 0 : x.bits ? bits[kMaskWords] & valid : valid;
    const __m512i high = load(row + x.ld, second);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi16(low, high));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi16(low, high));
  }
};

}  // namespace
}  // namespace lorasp::LORASP_ISA
