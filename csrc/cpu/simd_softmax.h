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

// exp(x), x <= 88, exactly 0 below ln 2^-126; NaN stays NaN. What rounding x log2(e) loses is put back: at x = -20 it
// would be six units of the last place.
inline vf vexp(vf x) {
  const vf log2e = vset(1.44269502f);
  x = vmax(vset(-104.0f), x);
  const vf y = vmul(x, log2e);
  const vf rest = vfma(x, vset(1.92596303e-8f), vfma(x, log2e, vsub(vzero(), y)));
  const vf power = vexp2<true>(y);
  return vfma(power, vmul(rest, vset(0.693147182f)), power);
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
