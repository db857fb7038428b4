// gemm.h's register tile on AVX-512: C (8, 48) in 24 registers. A depth step is one 32-bit lane: one float, or a pair
// of bf16 for vdpbf16ps. Packed A step: 8 lanes. Packed B step: 48 lanes.
#if defined(__x86_64__)
#include "gemm.h"

#include "../common/target_avx512_bf16.h"

#include "../common/transpose16.h"

namespace lorasp {
namespace {

constexpr int64_t kMR = 8, kNR = 48, kVectors = 3;

__mmask16 tail16(int64_t count) { return count >= 16 ? 0xffff : (count <= 0 ? 0 : (1u << count) - 1u); }
__mmask32 tail32(int64_t count) { return count >= 32 ? ~0u : (count <= 0 ? 0u : (1u << count) - 1u); }

struct F32 {
  using Element = float;
  static constexpr int64_t kDepth = 1;

  // 16 lanes of one row; keep: a bit for each of its elements.
  static __m512i load_lanes(const float* row, int64_t depth, uint32_t keep) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(tail16(depth) & static_cast<__mmask16>(keep), row));
  }
  // Lanes of 48 columns at one depth step from rows of w.
  static void load_columns(const float* w, int64_t ldw, int64_t columns, int64_t depth, __m512i lanes[kVectors]) {
    for (int j = 0; j < kVectors; ++j)
      lanes[j] = _mm512_castps_si512(_mm512_maskz_loadu_ps(depth > 0 ? tail16(columns - j * 16) : 0, w + j * 16));
  }
  static __m512 multiply_add(__m512 c, __m512i b, __m512i a) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), c);
  }
  static void add(const float* y, int64_t columns, __m512 c[kVectors]) {
    for (int j = 0; j < kVectors; ++j)
      c[j] = _mm512_add_ps(c[j], _mm512_maskz_loadu_ps(tail16(columns - j * 16), y + j * 16));
  }
  static void store(float* y, int64_t columns, const __m512 c[kVectors]) {
    for (int j = 0; j < kVectors; ++j) _mm512_mask_storeu_ps(y + j * 16, tail16(columns - j * 16), c[j]);
  }
};

struct Bf16 {
  using Element = uint16_t;
  static constexpr int64_t kDepth = 2;

  static __m512i load_lanes(const uint16_t* row, int64_t depth, uint32_t keep) {
    return _mm512_maskz_loadu_epi16(tail32(depth) & keep, row);
  }
  static void load_columns(const uint16_t* w, int64_t ldw, int64_t columns, int64_t depth, __m512i lanes[kVectors]) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __mmask32 even = depth > 0 ? ~0u : 0, odd = depth > 1 ? ~0u : 0;
    const __m512i e0 = _mm512_maskz_loadu_epi16(even & tail32(columns), w);
    const __m512i o0 = _mm512_maskz_loadu_epi16(odd & tail32(columns), w + ldw);
    const __m512i e1 = _mm512_maskz_loadu_epi16(even & tail32(columns - 32), w + 32);
    const __m512i o1 = _mm512_maskz_loadu_epi16(odd & tail32(columns - 32), w + ldw + 32);
    lanes[0] = _mm512_permutex2var_epi16(e0, low, o0);
    lanes[1] = _mm512_permutex2var_epi16(e0, high, o0);
    lanes[2] = _mm512_permutex2var_epi16(e1, low, o1);
  }
  static __m512 multiply_add(__m512 c, __m512i b, __m512i a) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
  }
  static void add(const uint16_t* y, int64_t columns, __m512 c[kVectors]) {
    for (int j = 0; j < kVectors; ++j) {
      const __m256i old = _mm256_maskz_loadu_epi16(tail16(columns - j * 16), y + j * 16);
      c[j] = _mm512_add_ps(c[j], _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(old), 16)));
    }
  }
  static void store(uint16_t* y, int64_t columns, const __m512 c[kVectors]) {
    _mm512_mask_storeu_epi16(y, tail32(columns), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(c[1], c[0])));
    _mm512_mask_storeu_epi16(y + 32, tail32(columns - 32),
                             reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_setzero_ps(), c[2])));
  }
};

template <class T>
void pack_rows(const void* a, int64_t lda, int64_t rows, int64_t depth, const unsigned char* bits, int64_t stride_bytes,
               void* packed) {
  const auto* source = static_cast<const typename T::Element*>(a);
  auto* out = static_cast<int32_t*>(packed);
  const int64_t lanes = (depth + T::kDepth - 1) / T::kDepth;
  for (int64_t lane = 0; lane < lanes; lane += 16) {
    const int64_t d = lane * T::kDepth;
    __m512i r[16] = {};
    for (int64_t i = 0; i < rows; ++i) {
      uint32_t keep = ~0u;
      if (bits) __builtin_memcpy(&keep, bits + i * stride_bytes + d / 8, sizeof(keep));
      r[i] = T::load_lanes(source + i * lda + d, depth - d, keep);
    }
    transpose16(r);
    for (int64_t i = 0; i < 16 && lane + i < lanes; ++i)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (lane + i) * kMR), _mm512_castsi512_si256(r[i]));
  }
}

template <class T>
void pack_panel(const Operand& w, int64_t n, int32_t* out) {
  const auto* source = static_cast<const typename T::Element*>(w.data) + n * (w.depth_contiguous ? w.ld : 1);
  const int64_t lanes = (w.depth + T::kDepth - 1) / T::kDepth, columns = w.columns - n;
  if (!w.depth_contiguous) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      __m512i v[kVectors];
      T::load_columns(source + lane * T::kDepth * w.ld, w.ld, columns, w.depth - lane * T::kDepth, v);
      for (int j = 0; j < kVectors; ++j) _mm512_store_si512(out + lane * kNR + j * 16, v[j]);
    }
    return;
  }
  for (int64_t lane = 0; lane < lanes; lane += 16) {
    for (int j = 0; j < kVectors; ++j) {
      __m512i r[16] = {};
      for (int64_t i = 0; i < 16 && j * 16 + i < columns; ++i)
        r[i] = T::load_lanes(source + (j * 16 + i) * w.ld + lane * T::kDepth, w.depth - lane * T::kDepth, ~0u);
      transpose16(r);
      for (int64_t i = 0; i < 16 && lane + i < lanes; ++i) _mm512_store_si512(out + (lane + i) * kNR + j * 16, r[i]);
    }
  }
}

template <class T>
void pack_panels(const Operand& w, int64_t panel_bytes, void* packed) {
  auto* out = static_cast<unsigned char*>(packed);
  for (int64_t n = 0; n < w.columns; n += kNR, out += panel_bytes) pack_panel<T>(w, n, reinterpret_cast<int32_t*>(out));
}

template <class T>
void block(const void* a, const void* b, int64_t steps, const void* extra_a, const void* extra_b, int64_t extra_steps,
           bool accumulate, float* c) {
  __m512 acc[kMR][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_setzero_ps();
  const auto* lanes_a = static_cast<const int32_t*>(a);
  const auto* lanes_b = static_cast<const int32_t*>(b);
  for (int part = 0; part < 2; ++part) {
    for (int64_t step = 0; step < steps; ++step, lanes_a += kMR, lanes_b += kNR) {
      __m512i v[kVectors];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) {
        v[j] = _mm512_load_si512(lanes_b + j * 16);
        _mm_prefetch(reinterpret_cast<const char*>(lanes_b + 8 * kNR + j * 16), _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kMR; ++i) {
        const __m512i x = _mm512_set1_epi32(lanes_a[i]);
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) acc[i][j] = T::multiply_add(acc[i][j], v[j], x);
      }
    }
    lanes_a = static_cast<const int32_t*>(extra_a);
    lanes_b = static_cast<const int32_t*>(extra_b);
    steps = extra_steps;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
      float* out = c + i * kNR + j * 16;
      _mm512_store_ps(out, accumulate ? _mm512_add_ps(_mm512_load_ps(out), acc[i][j]) : acc[i][j]);
    }
}

void add_selected(const float* term, const unsigned char* bits, int64_t stride_bytes, float* c) {
  for (int64_t r = 0; r < kMR; ++r, c += kNR, term += kNR) {
    uint64_t keep;
    __builtin_memcpy(&keep, bits + r * stride_bytes, sizeof(keep));
    for (int j = 0; j < kVectors; ++j) {
      const __m512 old = _mm512_load_ps(c + j * 16);
      _mm512_store_ps(c + j * 16, _mm512_mask_add_ps(old, static_cast<__mmask16>(keep >> (16 * j)), old,
                                                     _mm512_load_ps(term + j * 16)));
    }
  }
}

template <class T>
void store(const float* c, int64_t rows, int64_t columns, float scale, const float* bias, bool accumulate, void* y,
           int64_t ldy) {
  auto* out = static_cast<typename T::Element*>(y);
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t r = 0; r < rows; ++r, c += kNR, out += ldy) {
    __m512 v[kVectors];
    for (int j = 0; j < kVectors; ++j)
      v[j] = _mm512_fmadd_ps(_mm512_load_ps(c + j * 16), factor,
                             bias ? _mm512_loadu_ps(bias + j * 16) : _mm512_setzero_ps());
    if (accumulate) T::add(out, columns, v);
    T::store(out, columns, v);
  }
}

void nothing() {}

// Partial sums over pieces of the depth are added up: the rounding error of one long fp32 sum would be several times
// that of a blocked library GEMM.
constexpr int64_t kPieceSteps = 32;

template <class T>
constexpr GemmKernel make(uint32_t id) {
  return {id,
          kMR,
          kNR,
          T::kDepth,
          sizeof(typename T::Element),
          1,
          kPieceSteps,
          pack_rows<T>,
          pack_panels<T>,
          block<T>,
          add_selected,
          store<T>,
          nothing,
          nothing};
}

constexpr GemmKernel kF32 = make<F32>(2), kBf16 = make<Bf16>(3);

}  // namespace

const GemmKernel* gemm_avx512_f32() { return &kF32; }
const GemmKernel* gemm_avx512_bf16() { return &kBf16; }

}  // namespace lorasp

#include "../common/target_end.h"
#endif
