// gemm.h's register tile on AMX: C (32, 32) as four tiles, depth in steps of 32 bf16.
// Packed A step: 32 rows of 64 bytes. Packed B step: two tiles of 16 columns, each [16 depth pairs][16 columns][2].
#if defined(__x86_64__) && defined(__linux__)
#include "gemm.h"

#include "../common/target_amx.h"

#include "../common/transpose16.h"

namespace lorasp {
namespace {

using bf16 = uint16_t;
constexpr int64_t kMR = 32, kNR = 32, kKR = 32, kTile = 16 * 32;

__mmask32 tail_mask(int64_t count) { return count >= 32 ? ~0u : (count <= 0 ? 0u : (1u << count) - 1u); }

void enter() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  // gcc's intrinsic claims to read only the first 8 bytes: without this the other stores may be dropped.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

void pack_rows(const void* a, int64_t lda, int64_t rows, int64_t depth, const unsigned char* bits, int64_t stride_bytes,
               void* packed) {
  const bf16* source = static_cast<const bf16*>(a);
  bf16* out = static_cast<bf16*>(packed);
  for (int64_t r = 0; r < kMR; ++r) {
    const bf16* row = source + r * lda;
    for (int64_t d = 0; d < depth; d += kKR) {
      __mmask32 mask = r < rows ? tail_mask(depth - d) : 0;
      if (bits && mask) {
        uint32_t keep;
        __builtin_memcpy(&keep, bits + r * stride_bytes + d / 8, sizeof(keep));
        mask &= keep;
      }
      _mm512_store_si512(out + d * kMR + r * kKR, _mm512_maskz_loadu_epi16(mask, row + d));
    }
  }
}

void pack_depth_contiguous(const bf16* source, int64_t ld, int64_t columns, int64_t depth, bf16* out) {
  for (int64_t d = 0; d < depth; d += kKR, out += 2 * kTile) {
    const __mmask32 mask = tail_mask(depth - d);
    for (int half = 0; half < 2; ++half) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t n = half * 16 + i;
        r[i] = _mm512_maskz_loadu_epi16(n < columns ? mask : 0, source + n * ld + d);
      }
      transpose16(r);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(out + half * kTile + i * 32, r[i]);
    }
  }
}

void pack_panels(const Operand& w, int64_t panel_bytes, void* packed) {
  const bf16* source = static_cast<const bf16*>(w.data);
  const int64_t panel = panel_bytes / sizeof(bf16);
  bf16* out = static_cast<bf16*>(packed);
  if (w.depth_contiguous) {
    for (int64_t n = 0; n < w.columns; n += kNR, out += panel)
      pack_depth_contiguous(source + n * w.ld, w.ld, w.columns - n, w.depth, out);
    return;
  }
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int64_t padded = (w.depth + kKR - 1) / kKR * kKR;
  constexpr int64_t kAhead = 16;  // rows; the stride defeats the hardware's prefetcher
  for (int64_t d = 0; d < padded; d += 2) {
    const bf16* even_row = source + d * w.ld;
    const bf16* odd_row = even_row + w.ld;
    bf16* tile = out + d / kKR * (2 * kTile) + d % kKR / 2 * 32;
    for (int64_t n = 0; n < w.columns; n += kNR, tile += panel) {
      const __mmask32 mask = tail_mask(w.columns - n);
      if (d + kAhead + 1 < w.depth) {
        _mm_prefetch(reinterpret_cast<const char*>(even_row + kAhead * w.ld + n), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(odd_row + kAhead * w.ld + n), _MM_HINT_T0);
      }
      const __m512i even = _mm512_maskz_loadu_epi16(d < w.depth ? mask : 0, even_row + n);
      const __m512i odd = _mm512_maskz_loadu_epi16(d + 1 < w.depth ? mask : 0, odd_row + n);
      _mm512_store_si512(tile, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(tile + kTile, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

// Rows stream (each packed row block is read once per panel piece); panels stay in L1 for a group of row blocks.
inline void accumulate_steps(const bf16* a, const bf16* b, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step, a += kMR * kKR, b += kNR * kKR) {
    _tile_stream_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTile, 64);
    _tile_stream_loadd(5, a + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

void block(const void* a, const void* b, int64_t steps, const void* extra_a, const void* extra_b, int64_t extra_steps,
           bool accumulate, float* c) {
  constexpr int64_t kRow = kNR * sizeof(float);
  if (accumulate) {
    _tile_loadd(0, c, kRow);
    _tile_loadd(1, c + 16, kRow);
    _tile_loadd(2, c + 16 * kNR, kRow);
    _tile_loadd(3, c + 16 * kNR + 16, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  accumulate_steps(static_cast<const bf16*>(a), static_cast<const bf16*>(b), steps);
  accumulate_steps(static_cast<const bf16*>(extra_a), static_cast<const bf16*>(extra_b), extra_steps);
  _tile_stored(0, c, kRow);
  _tile_stored(1, c + 16, kRow);
  _tile_stored(2, c + 16 * kNR, kRow);
  _tile_stored(3, c + 16 * kNR + 16, kRow);
}

void add_selected(const float* term, const unsigned char* bits, int64_t stride_bytes, float* c) {
  for (int64_t r = 0; r < kMR; ++r, c += kNR, term += kNR) {
    uint32_t keep;
    __builtin_memcpy(&keep, bits + r * stride_bytes, sizeof(keep));
    for (int half = 0; half < 2; ++half) {
      const __mmask16 mask = static_cast<__mmask16>(keep >> (16 * half));
      const __m512 old = _mm512_load_ps(c + 16 * half);
      _mm512_store_ps(c + 16 * half, _mm512_mask_add_ps(old, mask, old, _mm512_load_ps(term + 16 * half)));
    }
  }
}

__m512 widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }

void store(const float* c, int64_t rows, int64_t columns, float scale, const float* bias, bool accumulate, void* y,
           int64_t ldy) {
  bf16* out = static_cast<bf16*>(y);
  const __mmask32 mask = tail_mask(columns);
  const __m512 factor = _mm512_set1_ps(scale);
  const __m512 bias0 = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps();
  const __m512 bias1 = bias ? _mm512_loadu_ps(bias + 16) : _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; ++r, c += kNR, out += ldy) {
    __m512 low = _mm512_fmadd_ps(_mm512_load_ps(c), factor, bias0);
    __m512 high = _mm512_fmadd_ps(_mm512_load_ps(c + 16), factor, bias1);
    if (accumulate) {
      const __m512i old = _mm512_maskz_loadu_epi16(mask, out);
      low = _mm512_add_ps(low, widen(_mm512_castsi512_si256(old)));
      high = _mm512_add_ps(high, widen(_mm512_extracti64x4_epi64(old, 1)));
    }
    _mm512_mask_storeu_epi16(out, mask, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
}

constexpr GemmKernel kKernel{1,         kMR,         kNR,   kKR,          sizeof(bf16), 4,     8,
                             pack_rows, pack_panels, block, add_selected, store,        enter, leave};

}  // namespace

const GemmKernel* gemm_amx_bf16() { return &kKernel; }

}  // namespace lorasp

#include "../common/target_end.h"
#endif
