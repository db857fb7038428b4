// Eight float lanes of AVX2 with FMA and F16C.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

constexpr int kWidth = 8;
constexpr int kDotRows = 2, kDotRanks = 4;        // 8 accumulators, 4 registers of x
constexpr int kPanelRows = 4, kPanelVectors = 2;  // 8 accumulators of half a panel

using vf = __m256;
struct vf2 {
  vf a, b;
};

inline vf vzero() { return _mm256_setzero_ps(); }
inline vf vset(float v) { return _mm256_set1_ps(v); }
inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline float vsum(vf v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline __m256i lane_mask_32(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
}
inline __m256i lane_mask_16(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits)), lane), lane);
}
inline vf vkeep(vf v, uint32_t bits) { return _mm256_and_ps(v, _mm256_castsi256_ps(lane_mask_32(bits))); }

inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
inline vf vload(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
}
inline vf vload(const f16* p) { return _mm256_cvtph_ps(load_128(p)); }
inline void vstore(float* p, vf v) { _mm256_storeu_ps(p, v); }
inline void vstore(bf16* p, vf v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void vstore(f16* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// 2 * kWidth elements in any order, the same for every load of a type.
inline vf2 split(__m256i pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))))};
}
inline vf2 vload2(const float* p) { return {vload(p), vload(p + 8)}; }
inline vf2 vload2(const f16* p) { return {vload(p), vload(p + 8)}; }
inline vf2 vload2(const bf16* p) { return split(load_256(p)); }
template <class T>
inline vf2 vload2(const T* p, uint32_t bits) {
  const vf2 v = vload2(p);
  return {vkeep(v.a, bits), vkeep(v.b, bits >> 8)};
}
inline vf2 vload2(const bf16* p, uint32_t bits) { return split(_mm256_and_si256(load_256(p), lane_mask_16(bits))); }

// The first `count` elements; those after them are not read and count as 0.
template <class T>
inline vf2 vload2_tail(const T* p, int64_t count, uint32_t bits) {
  T padded[2 * kWidth];
  for (int i = 0; i < 2 * kWidth; ++i) padded[i] = i < count ? p[i] : T{};
  return vload2(padded, bits);
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
