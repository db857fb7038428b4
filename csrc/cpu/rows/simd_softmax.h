// Sums over a softmax in vector lanes. After simd_exp.h. As on x86, vmin and vmax return their second argument where
// either is NaN.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

#if defined(LORASP_AVX512)

inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
// acc + w d where w is not 0
inline vf vfma_nonzero(vf w, vf d, vf acc) {
  return _mm512_mask3_fmadd_ps(w, d, acc, _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ));
}

#elif defined(LORASP_AVX2)

inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf vfma_nonzero(vf w, vf d, vf acc) {
  return _mm256_fmadd_ps(w, _mm256_and_ps(_mm256_cmp_ps(w, _mm256_setzero_ps(), _CMP_NEQ_UQ), d), acc);
}

#else

inline vf vsub(vf a, vf b) { return a - b; }
inline vf vmin(vf a, vf b) {
  for (int i = 0; i < kWidth; ++i) a[i] = a[i] < b[i] ? a[i] : b[i];
  return a;
}
inline vf vfma_nonzero(vf w, vf d, vf acc) {
  for (int i = 0; i < kWidth; ++i) acc[i] += w[i] != 0.0f ? w[i] * d[i] : 0.0f;
  return acc;
}

#endif

// exp(x), x <= 88, exactly 0 below ln 2^-126; NaN stays NaN. The exponent is reduced in one rounding, so that results
// are within one unit of the last place.
#if defined(LORASP_AVX512) || defined(LORASP_AVX2)

inline vf vexp(vf x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const vf log2e = vset(1.44269502f), log2e_rest = vset(1.92596303e-8f);
#if defined(LORASP_AVX512)
  const __mmask16 normal = _mm512_cmp_ps_mask(x, vset(-87.33f), _CMP_NLT_UQ);
  const vf n = _mm512_roundscale_ps(vmul(x, log2e), kNearest);
  const vf f = vfma(x, log2e_rest, _mm512_fmsub_ps(x, log2e, n));
  return _mm512_maskz_scalef_ps(normal, exp2_fraction<true>(f), n);
#else
  const vf normal = _mm256_cmp_ps(x, vset(-87.33f), _CMP_NLT_UQ);
  x = vmax(vset(-87.33f), x);
  const vf n = _mm256_round_ps(vmul(x, log2e), kNearest);
  const vf f = vfma(x, log2e_rest, _mm256_fmsub_ps(x, log2e, n));  // NaN where x is
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(normal, vfma(exp2_fraction<true>(f), _mm256_castsi256_ps(power), vsub(f, f)));
#endif
}

#else

inline vf vexp(vf x) {
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_expf(x[i]);
  return x;
}

#endif

}  // namespace
}  // namespace lorasp::LORASP_ISA
