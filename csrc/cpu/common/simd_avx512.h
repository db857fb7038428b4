// Sixteen float lanes of AVX-512 (F, BW, DQ, VL).
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

constexpr int kWidth = 16;
constexpr int kDotRows = 4, kDotRanks = 4;        // 16 accumulators, 8 registers of x, 2 of w
constexpr int kPanelRows = 8, kPanelVectors = 2;  // 16 accumulators of one whole panel

using vf = __m512;
struct vf2 {
  vf a, b;
};

inline vf vzero() { return _mm512_setzero_ps(); }
inline vf vset(float v) { return _mm512_set1_ps(v); }
inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline float vsum(vf v) { return _mm512_reduce_add_ps(v); }
inline vf vkeep(vf v, uint32_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }

inline vf widen(__m256i bf16s) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16s), 16)); }
inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
inline vf vload(const bf16* p) { return widen(load_256(p)); }
inline vf vload(const f16* p) { return _mm512_cvtph_ps(load_256(p)); }
inline void vstore(float* p, vf v) { _mm512_storeu_ps(p, v); }

inline __m256i narrow(vf v) {
#if defined(LORASP_AVX512_BF16)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0));
  return _mm512_cvtepi32_epi16(high);
#endif
}
inline void vstore(bf16* p, vf v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
inline void vstore(f16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// 2 * kWidth elements in any order, the same for every load of a type; elements whose bit is clear are not read.
inline vf2 vload2(const float* p) { return {vload(p), vload(p + 16)}; }
inline vf2 vload2(const float* p, uint32_t bits) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits >> 16), p + 16)};
}
inline vf2 split(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))))};
}
inline vf2 vload2(const bf16* p) { return split(_mm512_loadu_si512(p)); }
inline vf2 vload2(const bf16* p, uint32_t bits) { return split(_mm512_maskz_loadu_epi16(bits, p)); }
inline vf2 vload2(const f16* p) { return {vload(p), vload(p + 16)}; }
inline vf2 vload2(const f16* p, uint32_t bits) {
  const __m512i v = _mm512_maskz_loadu_epi16(bits, p);
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(v)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1))};
}
template <class T>
inline vf2 vload2_tail(const T* p, int64_t, uint32_t bits) {
  return vload2(p, bits);
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
