// Engines: how operands are laid out and multiplied. After a simd_*.h and simd_exp.h.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

constexpr int64_t kPanelColumns = 2 * kWidth;
constexpr int64_t kRows = 32;  // rows staged and packed together; blocks are multiples

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline float scalar(float v) { return v; }
inline float scalar(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
#if defined(LORASP_AVX512) || defined(LORASP_AVX2)
inline float scalar(f16 v) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(v.bits))); }
#else
inline float scalar(f16 v) { return widen(v); }
#endif

// The element type of tensors; sums and statistics are fp32.
template <class S>
struct Elements {
  using Source = S;

  template <class M>
  static float widen(M v) {
    return scalar(v);
  }
  static void round_row(const float* in, int64_t cols, S* out) {
    int64_t c = 0;
    for (; c + kWidth <= cols; c += kWidth) vstore(out + c, vload(in + c));
    if (c == cols) return;
    float wide[kWidth] = {};
    S narrow[kWidth];
    std::memcpy(wide, in + c, static_cast<size_t>(cols - c) * sizeof(float));
    vstore(narrow, vload(wide));
    std::memcpy(out + c, narrow, static_cast<size_t>(cols - c) * sizeof(S));
  }
  // A row of a C operand, times factor.
  static void store_row(const float* c, int64_t next_panel, int64_t cols, float factor, S* out) {
    const vf times = vset(factor);
    for (; cols >= kPanelColumns; cols -= kPanelColumns, c += next_panel, out += kPanelColumns) {
      vstore(out, vmul(vload(c), times));
      vstore(out + kWidth, vmul(vload(c + kWidth), times));
    }
    if (cols == 0) return;
    float scaled[kPanelColumns];
    vstore(scaled, vmul(vload(c), times));
    vstore(scaled + kWidth, vmul(vload(c + kWidth), times));
    round_row(scaled, cols, out);
  }
  // block[m * 16 + x] = source[x * ld + m] for x < 16 and m < columns.
  static void transpose(const float* source, int64_t ld, int64_t columns, float* block) {
#if defined(LORASP_AVX512)
    __m512i r[16];
    for (int x = 0; x < 16; ++x) r[x] = _mm512_loadu_si512(source + x * ld);
    transpose16(r);
    for (int m = 0; m < 16; ++m) _mm512_storeu_si512(block + m * 16, r[m]);
#else
    for (int64_t x = 0; x < 16; ++x)
      for (int64_t m = 0; m < columns; ++m) block[m * 16 + x] = source[x * ld + m];
#endif
  }
};

// Everything in fp32.
template <class S>
struct Single : Elements<S> {
  using T = float;
  static constexpr bool kFine = true;
  static constexpr int64_t kStep = 16;
#if defined(LORASP_AVX512)
  static constexpr int64_t kMR = 8;  // 16 accumulators of 32 registers
#else
  static constexpr int64_t kMR = 4;  // 8 accumulators of 16 registers
#endif

  static void enter() {}
  static void leave() {}
  static constexpr int64_t column(int64_t c) { return c; }

  static void copy_row(const S* row, int64_t cols, float* out) {
    int64_t c = 0;
    for (; c + kWidth <= cols; c += kWidth) vstore(out + c, vload(row + c));
    for (; c < cols; ++c) out[c] = scalar(row[c]);
  }
  static float dot(const float* a, const float* b, int64_t count) {
    vf sum = vzero();
    for (int64_t c = 0; c < count; c += kWidth) sum = vfma(vload(a + c), vload(b + c), sum);
    return vsum(sum);
  }

  static void pack_a(const float* staged, int64_t cols, int64_t rows, float* out, int64_t all_rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; c += kStep)
        std::memcpy(out + c * all_rows + r * kStep, staged + r * cols + c, kStep * sizeof(float));
  }
  static void pack_a_transposed(const float* staged, int64_t cols, float* out) {
    for (int64_t r = 0; r < kRows; r += kStep)
      for (int64_t c = 0; c < cols; c += 16)
        Single::transpose(staged + r * cols + c, cols, 16, out + r * cols + c * kStep);
  }
  static void pack_b(const float* staged, int64_t cols, float* out, int64_t panel) {
    for (int64_t c = 0; c < cols; c += kPanelColumns, out += panel)
      for (int64_t r = 0; r < kRows; ++r)
        std::memcpy(out + r * kPanelColumns, staged + r * cols + c, kPanelColumns * sizeof(float));
  }
  static void pack_b_transposed(const float* staged, int64_t cols, float* out) {
    for (int64_t r = 0; r < kRows; r += kPanelColumns, out += kPanelColumns * cols) {
      const float* rows = staged + r * cols;
#if defined(LORASP_AVX512)
      float block[16 * 16];
      for (int64_t half = 0; half < kPanelColumns; half += 16) {
        for (int64_t c = 0; c < cols; c += 16) {
          Single::transpose(rows + half * cols + c, cols, 16, block);
          for (int64_t x = 0; x < 16; ++x) vstore(out + (c + x) * kPanelColumns + half, vload(block + 16 * x));
        }
      }
#else
      for (int64_t c = 0; c < cols; ++c)
        for (int64_t m = 0; m < kPanelColumns; ++m) out[c * kPanelColumns + m] = rows[m * cols + c];
#endif
    }
  }

  static void store_a(float* a, int64_t all_rows, int64_t r, int64_t col, vf v0, vf v1) {
    vstore(a + col / kStep * kStep * all_rows + r * kStep + col % kStep, v0);
    col += kWidth;
    vstore(a + col / kStep * kStep * all_rows + r * kStep + col % kStep, v1);
  }
  // Rows r and r + 1 of a B panel.
  static void store_b(float* panel, int64_t r, vf v00, vf v01, vf v10, vf v11) {
    float* row = panel + r * kPanelColumns;
    vstore(row, v00);
    vstore(row + kWidth, v01);
    vstore(row + kPanelColumns, v10);
    vstore(row + kPanelColumns + kWidth, v11);
  }
  static void store_both(float* panel, float* a, int64_t all_rows, int64_t r, int64_t col, vf v00, vf v01, vf v10,
                         vf v11) {
    store_b(panel, r, v00, v01, v10, v11);
    store_a(a, all_rows, r, col, v00, v01);
    store_a(a, all_rows, r + 1, col, v10, v11);
  }

  static void multiply(const float* a, int64_t a_rows, int64_t rows, const float* b, int64_t b_panel, int64_t panels,
                       int64_t steps, bool accumulate, float* c, int64_t c_panel) {
    for (int64_t panel = 0; panel < panels; ++panel, b += b_panel, c += c_panel)
      for (int64_t r = 0; r < rows; r += kMR)
        product(a + r * kStep, a_rows * kStep, b, steps, accumulate, c + r * kPanelColumns);
  }

 private:
  // Sums run over kPiece steps before they join c: the rounding of a library GEMM, not of one long chain.
  static constexpr int64_t kPiece = 2;

  static void product(const float* a, int64_t a_step, const float* b, int64_t steps, bool accumulate, float* c) {
    for (; steps > 0; steps -= kPiece, a += kPiece * a_step, b += kPiece * kStep * kPanelColumns, accumulate = true)
      piece(a, a_step, b, smaller(steps, kPiece), accumulate, c);
  }
  static void piece(const float* a, int64_t a_step, const float* b, int64_t steps, bool accumulate, float* c) {
    vf sum[kMR][2];
#pragma GCC unroll 8
    for (int i = 0; i < kMR; ++i) sum[i][0] = sum[i][1] = vzero();
    for (int64_t step = 0; step < steps; ++step, a += a_step) {
#pragma GCC unroll 4
      for (int64_t d = 0; d < kStep; ++d, b += kPanelColumns) {
        const vf b0 = vload(b), b1 = vload(b + kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < kMR; ++i) {
          const vf lane = vset(a[i * kStep + d]);
          sum[i][0] = vfma(lane, b0, sum[i][0]);
          sum[i][1] = vfma(lane, b1, sum[i][1]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kMR; ++i) {
      float* row = c + i * kPanelColumns;
      vstore(row, accumulate ? vadd(vload(row), sum[i][0]) : sum[i][0]);
      vstore(row + kWidth, accumulate ? vadd(vload(row + kWidth), sum[i][1]) : sum[i][1]);
    }
  }
};

#if defined(LORASP_AVX512_BF16)

// bf16 in pairs along the depth, products summed in fp32. A B step is two tiles of [16 pairs][16 columns][2].
struct Paired : Elements<bf16> {
  using T = bf16;
  static constexpr bool kFine = false;
  static constexpr int64_t kStep = 32, kTile = 512;

  // Two rows interleaved by unpacklo and unpackhi: tile 0 takes columns 0-3, 8-11, 16-19, 24-27.
  static constexpr int64_t column(int64_t c) { return c % 16 / 4 * 8 + c % 4 + c / 16 * 4; }

  static __m512i pack(vf low, vf high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

  static void copy_row(const bf16* row, int64_t cols, bf16* out) {
    std::memcpy(out, row, static_cast<size_t>(cols) * sizeof(bf16));
  }
  static float dot(const bf16* a, const bf16* b, int64_t count) {
    vf sum = vzero();
    for (int64_t c = 0; c < count; c += 32) {
      const vf2 x = vload2(a + c), y = vload2(b + c);
      sum = vfma(x.b, y.b, vfma(x.a, y.a, sum));
    }
    return vsum(sum);
  }

  static void pack_a(const bf16* staged, int64_t cols, int64_t rows, bf16* out, int64_t all_rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; c += kStep)
        _mm512_storeu_si512(out + c * all_rows + r * kStep, _mm512_loadu_si512(staged + r * cols + c));
  }
  // Columns c ... c + 15 of rows 2 i and 2 i + 1, interleaved, for i < 16.
  static void interleave(const bf16* staged, int64_t cols, int64_t c, __m512i r[16]) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < 16; ++i) {
      const bf16* row = staged + 2 * i * cols + c;
      r[i] = _mm512_permutexvar_epi16(
          order, _mm512_inserti64x4(_mm512_castsi256_si512(load_256(row)), load_256(row + cols), 1));
    }
  }
  static void pack_a_transposed(const bf16* staged, int64_t cols, bf16* out) {
    __m512i r[16];
    for (int64_t c = 0; c < cols; c += 16) {
      interleave(staged, cols, c, r);
      transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (c + i) * kStep, r[i]);
    }
  }
  static void pack_b(const bf16* staged, int64_t cols, bf16* out, int64_t panel) {
    __m512i r[16];
    for (int64_t c = 0; c < cols; c += 16) {
      interleave(staged, cols, c, r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + c / 32 * panel + c % 32 / 16 * kTile + i * 32, r[i]);
    }
  }
  static void pack_b_transposed(const bf16* staged, int64_t cols, bf16* out) {
    __m512i r[16];
    for (int64_t c = 0; c < cols; c += kStep) {
      for (int tile = 0; tile < 2; ++tile, out += kTile) {
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(staged + (tile * 16 + i) * cols + c);
        transpose16(r);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 32, r[i]);
      }
    }
  }

  static void store_a(bf16* a, int64_t all_rows, int64_t r, int64_t col, vf v0, vf v1) {
    _mm512_storeu_si512(a + col * all_rows + r * kStep, pack(v0, v1));
  }
  static void store_interleaved(bf16* panel, int64_t r, __m512i even, __m512i odd) {
    bf16* tile = panel + r / kStep * (2 * kTile) + r % kStep * 16;
    _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(tile + kTile, _mm512_unpackhi_epi16(even, odd));
  }
  static void store_b(bf16* panel, int64_t r, vf v00, vf v01, vf v10, vf v11) {
    store_interleaved(panel, r, pack(v00, v01), pack(v10, v11));
  }
  static void store_both(bf16* panel, bf16* a, int64_t all_rows, int64_t r, int64_t col, vf v00, vf v01, vf v10,
                         vf v11) {
    const __m512i even = pack(v00, v01), odd = pack(v10, v11);
    store_interleaved(panel, r, even, odd);
    _mm512_storeu_si512(a + col * all_rows + r * kStep, even);
    _mm512_storeu_si512(a + col * all_rows + (r + 1) * kStep, odd);
  }
};

#if defined(LORASP_AMX)

struct PairedTiles : Paired {
  static constexpr int64_t kMR = 16;

  static void enter() { tiles_configure(16, 16); }
  static void leave() { tiles_release(); }

  static void multiply(const bf16* a, int64_t a_rows, int64_t rows, const bf16* b, int64_t b_panel, int64_t panels,
                       int64_t steps, bool accumulate, float* c, int64_t c_panel) {
    for (int64_t panel = 0; panel < panels; ++panel, b += b_panel, c += c_panel) {
      int64_t r = 0;
      for (; r + 32 <= rows; r += 32) product<2>(a + r * kStep, a_rows * kStep, b, steps, accumulate, c + r * 32);
      if (r < rows) product<1>(a + r * kStep, a_rows * kStep, b, steps, accumulate, c + r * 32);
    }
  }

 private:
  template <int NI>
  static void product(const bf16* a, int64_t a_step, const bf16* b, int64_t steps, bool accumulate, float* c) {
    constexpr int64_t kRow = 32 * sizeof(float);
    if (accumulate) {
      tiles_load<NI, 2>(c, 16 * 32, kRow);
    } else {
      tiles_zero<NI, 2>();
    }
    for (int64_t step = 0; step < steps; ++step, a += a_step, b += 2 * kTile)
      tiles_multiply<NI, 2>(a, 16 * kStep * sizeof(bf16), 64, b, kTile * sizeof(bf16), 64);
    tiles_store<NI, 2>(c, 16 * 32, kRow);
  }
};

#else

struct PairedDots : Paired {
  static constexpr int64_t kMR = 8;

  static void enter() {}
  static void leave() {}

  static void multiply(const bf16* a, int64_t a_rows, int64_t rows, const bf16* b, int64_t b_panel, int64_t panels,
                       int64_t steps, bool accumulate, float* c, int64_t c_panel) {
    for (int64_t panel = 0; panel < panels; ++panel, b += b_panel, c += c_panel)
      for (int64_t r = 0; r < rows; r += kMR) product(a + r * kStep, a_rows * kStep, b, steps, accumulate, c + r * 32);
  }

 private:
  static __m512bh pair(const bf16* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return (__m512bh)_mm512_set1_epi32(bits);
  }
  static void product(const bf16* a, int64_t a_step, const bf16* b, int64_t steps, bool accumulate, float* c) {
    vf sum[kMR][2];
#pragma GCC unroll 8
    for (int i = 0; i < kMR; ++i) {
      sum[i][0] = accumulate ? vload(c + i * 32) : vzero();
      sum[i][1] = accumulate ? vload(c + i * 32 + 16) : vzero();
    }
    for (int64_t step = 0; step < steps; ++step, a += a_step, b += 2 * kTile) {
#pragma GCC unroll 4
      for (int64_t d = 0; d < kStep; d += 2) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + d * 16);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + d * 16 + kTile);
#pragma GCC unroll 8
        for (int i = 0; i < kMR; ++i) {
          const __m512bh lane = pair(a + i * kStep + d);
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], lane, b0);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], lane, b1);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kMR; ++i) {
      vstore(c + i * 32, sum[i][0]);
      vstore(c + i * 32 + 16, sum[i][1]);
    }
  }
};

#endif
#endif

}  // namespace
}  // namespace lorasp::LORASP_ISA
