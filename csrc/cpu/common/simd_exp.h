// Maxima and powers of two in vector lanes. After a simd_*.h.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// Minimax polynomials of 2^f on [-1/2, 1/2]: relative error 1.9e-9 (below fp32's rounding) and 2.6e-6 (below bf16's).
template <bool kFine>
inline vf exp2_fraction(vf f) {
  vf p;
  if constexpr (kFine) {
    p = vfma(vset(1.534581197e-4f), f, vset(1.339993138e-3f));
    p = vfma(p, f, vset(9.618488959e-3f));
    p = vfma(p, f, vset(5.550328777e-2f));
    p = vfma(p, f, vset(2.402264689e-1f));
    p = vfma(p, f, vset(6.931472057e-1f));
    return vfma(p, f, vset(1.0f));
  } else {
    p = vfma(vset(9.570101878e-3f), f, vset(5.591786178e-2f));
    p = vfma(p, f, vset(2.402474484e-1f));
    p = vfma(p, f, vset(6.931218146e-1f));
    return vfma(p, f, vset(9.999992614e-1f));
  }
}

// 2^x for x <= 127; exactly 0 below -126, so that no subnormal number slows what follows. NaN stays NaN.
#if defined(LORASP_AVX512)

inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
inline float vmax_all(vf v) { return _mm512_reduce_max_ps(v); }

template <bool kFine>
inline vf vexp2(vf x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, vset(-126.0f), _CMP_NLT_UQ);
  const vf n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(normal, exp2_fraction<kFine>(_mm512_sub_ps(x, n)), n);
}

#elif defined(LORASP_AVX2)

inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline float vmax_all(vf v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

template <bool kFine>
inline vf vexp2(vf x) {
  const vf normal = _mm256_cmp_ps(x, vset(-126.0f), _CMP_NLT_UQ);
  const vf clamped = _mm256_max_ps(vset(-126.0f), x);  // NaN passes
  const vf n = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const vf value = _mm256_mul_ps(exp2_fraction<kFine>(_mm256_sub_ps(clamped, n)), _mm256_castsi256_ps(power));
  // A NaN's power is garbage, maybe 0: the addition brings the NaN back.
  return _mm256_and_ps(_mm256_add_ps(value, _mm256_sub_ps(clamped, clamped)), normal);
}

#else

inline vf vmax(vf a, vf b) {
  for (int i = 0; i < kWidth; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
inline float vmax_all(vf v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

template <bool kFine>
inline vf vexp2(vf x) {
  vf n, power;
  for (int i = 0; i < kWidth; ++i) {
    const bool normal = x[i] >= -126.0f;
    const float shifted = (normal ? x[i] : 0.0f) + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    n[i] = normal || x[i] != x[i] ? shifted - 12582912.0f : x[i];
    power[i] = normal ? from_bits((to_bits(shifted) - to_bits(12582912.0f) + 127) << 23) : 0.0f;
    if (x[i] < -126.0f) x[i] = n[i] = 0.0f;
    if (x[i] != x[i]) power[i] = x[i];
  }
  return vmul(exp2_fraction<kFine>(x - n), power);
}

#endif

// -inf where the bit is clear.
inline vf vhide(vf v, uint32_t bits) { return vadd(vkeep(v, bits), vkeep(vset(-kInfinity), ~bits)); }

}  // namespace
}  // namespace lorasp::LORASP_ISA
