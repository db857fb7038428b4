// The skinny products in bf16 on AMX. The other dtypes use the AVX-512 kernels.
#if defined(__x86_64__) && defined(__linux__)
#include "skinny.h"

#define LORASP_ISA amx
#include "../common/target_avx512_bf16.h"

#include "../common/simd_avx512.h"

#include "../common/amx_tiles.h"
#include "skinny_impl.h"
#include "../common/transpose16.h"

#include "dot_bf16.h"

namespace lorasp::amx {
namespace {

// Tiles of 16 x 16 floats; kRows rows of x or y are multiplied together.
struct Tiled {
  static constexpr int64_t kTile = 16, kTileBytes = 1024, kRows = 2 * kTile;
  // Masked or ragged rows of x go through a copy of 32 x 512 halves, rows apart by no power of two.
  static constexpr int64_t kStagedCols = 512, kStagedLd = kStagedCols + 32, kStagedBytes = kRows * kStagedLd * 2;
  // Panels handled together, so that a row is touched in runs of more than a cache line: rows a power of two apart
  // share the lines of one set. Of 1, 2, 4 and 8 panels these were the fastest.
  static constexpr int64_t kUpdatePanels = 4, kOuterPanels = 2;

  static __m512i load_row(const bf16* p, int64_t count) { return _mm512_maskz_loadu_epi16(low_bits(count), p); }
  static __m512i low_halves(__m512i low, __m512i high) {
    return _mm512_mask_mov_epi16(_mm512_slli_epi32(high, 16), 0x55555555u, low);
  }
  static __m512i high_halves(__m512i low, __m512i high) {
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(low, 16), 0xAAAAAAAAu, high);
  }

  // The first 16 pairs of each of up to 16 rows, transposed.
  static void load_transposed(const bf16* data, int64_t stride, int64_t rows, int64_t count, __m512i r[16]) {
    for (int64_t i = 0; i < kTile; ++i) r[i] = i < rows ? load_row(data + i * stride, count) : _mm512_setzero_si512();
    transpose16(r);
  }

  // Tiles of 16 column pairs by 16 ranks, (column tile, rank tile).
  static size_t rowdot_bytes(int64_t cols, int64_t R) {
    return static_cast<size_t>(ceil_div(cols, 32) * rank_tiles(R) * kTileBytes);
  }

  static void pack_rowdot(const Factor& w, int64_t cols, int64_t R, void* packed) {
    auto* out = static_cast<uint32_t*>(packed);
    for (int64_t c = 0; c < cols; c += 32) {
      for (int64_t r0 = 0; r0 < R; r0 += kTile, out += kTile * kTile) {
        const bf16* corner = static_cast<const bf16*>(w.data) + c * w.stride_c + r0 * w.stride_r;
        __m512i rows[16];
        if (w.stride_c == 1) {
          load_transposed(corner, w.stride_r, R - r0, cols - c, rows);
        } else {
          const int64_t ranks = least(kTile, R - r0);
          for (int64_t i = 0; i < kTile; ++i) {
            const int64_t rest = cols - c - 2 * i;
            const __m512i first = load_row(corner + 2 * i * w.stride_c, rest > 0 ? ranks : 0);
            const __m512i second = load_row(corner + (2 * i + 1) * w.stride_c, rest > 1 ? ranks : 0);
            const __m512i both = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(second)), 16);
            rows[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(first)), both);
          }
        }
        for (int64_t i = 0; i < kTile; ++i) _mm512_storeu_si512(out + i * kTile, rows[i]);
      }
    }
  }

  // Rows m ... of x, masked and filled up with zeros to whole tiles.
  static void stage_rows(const Block& x, int64_t m, int64_t rows, int64_t c, int64_t cols, bf16* staged) {
    for (int64_t i = 0; i < round_up(rows, kTile); ++i, staged += kStagedLd) {
      const bf16* row = static_cast<const bf16*>(x.data) + (m + i) * x.ld + c;
      const uint32_t* bits = x.bits != nullptr && i < rows ? x.bits + (m + i) * kMaskWords + c / 32 : nullptr;
      for (int64_t j = 0; j < cols; j += 32) {
        const uint32_t valid = i < rows ? low_bits(cols - j) : 0;
        _mm512_storeu_si512(staged + j, Paired::load(row + j, bits != nullptr ? bits[j / 32] & valid : valid));
      }
    }
  }

  // sums (16 NI, rank tiles * 16) = [sums +] a w^T over `steps` column tiles.
  template <int NI, int NJ>
  static void rowdot_tiles(const bf16* a, int64_t lda, int64_t steps, const char* w, int64_t tiles, bool accumulate,
                           float* sums) {
    const int64_t stride = tiles * kTile * 4;
    if (accumulate) {
      tiles_load<NI, NJ>(sums, kTile * tiles * kTile, stride);
    } else {
      tiles_zero<NI, NJ>();
    }
    for (int64_t step = 0; step < steps; ++step, a += 32, w += tiles * kTileBytes) {
      tiles_multiply<NI, NJ>(a, kTile * lda * 2, lda * 2, w, kTileBytes, 64);
    }
    tiles_store<NI, NJ>(sums, kTile * tiles * kTile, stride);
  }

  template <int NI>
  static void rowdot_ranks(const bf16* a, int64_t lda, int64_t steps, const char* w, int64_t tiles, bool accumulate,
                           float* sums) {
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2) {
      rowdot_tiles<NI, 2>(a, lda, steps, w + t * kTileBytes, tiles, accumulate, sums + t * kTile);
    }
    if (t < tiles) rowdot_tiles<NI, 1>(a, lda, steps, w + t * kTileBytes, tiles, accumulate, sums + t * kTile);
  }

  static void rowdot(const Block& x, const void* packed, int64_t R, bool accumulate, float* out, void* scratch) {
    auto* staged = static_cast<bf16*>(scratch);
    auto* sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + kStagedBytes);
    const auto* w = static_cast<const char*>(packed);
    const int64_t tiles = rank_tiles(R);
    const int64_t whole = x.bits != nullptr ? 0 : x.cols / 32 * 32;  // columns that are read as tiles where they are
    tiles_configure(kTile, kTile);
    for (int64_t m = 0; m < x.rows; m += kRows) {
      const int64_t rows = least(kRows, x.rows - m);
      const bool direct = whole > 0 && rows % kTile == 0;
      const auto multiply = rows > kTile ? rowdot_ranks<2> : rowdot_ranks<1>;
      if (direct) multiply(static_cast<const bf16*>(x.data) + m * x.ld, x.ld, whole / 32, w, tiles, false, sums);
      for (int64_t c = direct ? whole : 0; c < x.cols; c += kStagedCols) {
        const int64_t cols = least(kStagedCols, x.cols - c);
        stage_rows(x, m, rows, c, cols, staged);
        multiply(staged, kStagedLd, ceil_div(cols, 32), w + c / 32 * tiles * kTileBytes, tiles, c > 0, sums);
      }
      for (int64_t i = 0; i < rows; ++i, out += R) {
        for (int64_t r = 0; r < R; ++r) out[r] = sums[i * tiles * kTile + r] + (accumulate ? out[r] : 0.0f);
      }
    }
  }

  // Pairs of ranks, split into equal steps of at most 16: pairs of one step, and of all.
  static constexpr int64_t step_pairs(int64_t R) { return ceil_div(ceil_div(R, 2), ceil_div(R, 32)); }
  static constexpr int64_t all_pairs(int64_t R) { return step_pairs(R) * ceil_div(R, 32); }

  // Panels of (all_pairs, kPanel), the even columns of a panel before the odd ones.
  static size_t update_bytes(int64_t cols, int64_t R) {
    return static_cast<size_t>(round_up(cols, kPanel) * all_pairs(R)) * 4;
  }

  static void pack_update(const Factor& w, int64_t cols, int64_t R, void* packed) {
    auto* out = static_cast<uint32_t*>(packed);
    const int64_t pairs = all_pairs(R);
    for (int64_t c = 0; c < cols; c += kPanel, out += pairs * kPanel) {
      const bf16* panel = static_cast<const bf16*>(w.data) + c * w.stride_c;
      const int64_t count = cols - c;
      for (int64_t q = 0; q < pairs && w.stride_c == 1; ++q) {
        const __m512i first = load_row(panel + 2 * q * w.stride_r, 2 * q < R ? count : 0);
        const __m512i second = load_row(panel + (2 * q + 1) * w.stride_r, 2 * q + 1 < R ? count : 0);
        _mm512_storeu_si512(out + q * kPanel, low_halves(first, second));
        _mm512_storeu_si512(out + q * kPanel + kTile, high_halves(first, second));
      }
      for (int64_t q = 0; q < pairs && w.stride_c != 1; q += kTile) {
        for (int64_t odd = 0; odd < 2; ++odd) {
          __m512i rows[16];
          const int64_t ranks = R - 2 * q;
          load_transposed(panel + odd * w.stride_c + 2 * q, 2 * w.stride_c, ranks > 0 ? (count - odd + 1) / 2 : 0,
                          ranks, rows);
          for (int64_t i = 0; i < least(kTile, pairs - q); ++i) {
            _mm512_storeu_si512(out + (q + i) * kPanel + odd * kTile, rows[i]);
          }
        }
      }
    }
  }

  // One row of one panel: y += sums (evens, odds) where `keep` is set; elements outside `valid` are not touched.
  template <bool kWhole>
  static void add_row(bf16* y, uint32_t keep, uint32_t valid, const float* sums) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const vf2 v = split(kWhole ? _mm512_loadu_si512(y) : _mm512_maskz_loadu_epi16(valid, y));
    const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(vadd(v.b, vload(sums + kTile)), vadd(v.a, vload(sums)));
    _mm512_mask_storeu_epi16(y, kWhole ? keep : keep & valid, _mm512_permutexvar_epi16(order, rounded));
  }

  template <int NI>
  static void update_rows(const Block& y, int64_t m, int64_t rows, const uint32_t* s, const uint32_t* packed,
                          int64_t R) {
    const int64_t pairs = all_pairs(R), step = step_pairs(R);
    alignas(64) float sums[kUpdatePanels * kRows * kPanel];
    for (int64_t c0 = 0; c0 < y.cols; c0 += kUpdatePanels * kPanel) {
      const int64_t cols = least(kUpdatePanels * kPanel, y.cols - c0);
      for (int64_t c = 0; c < cols; c += kPanel, packed += pairs * kPanel) {
        tiles_zero<NI, 2>();
        for (int64_t q = 0; q < pairs; q += step) {
          tiles_multiply<NI, 2>(s + q, kTile * pairs * 4, pairs * 4, packed + q * kPanel, 64, kPanel * 4);
        }
        tiles_store<NI, 2>(sums + c * kRows, kTile * kPanel, kPanel * 4);
      }
      for (int64_t i = 0; i < rows; ++i) {
        bf16* row = static_cast<bf16*>(y.data) + (m + i) * y.ld + c0;
        const uint32_t* bits = y.bits != nullptr ? y.bits + (m + i) * kMaskWords + c0 / 32 : nullptr;
        for (int64_t c = 0; c < cols; c += kPanel) {
          const uint32_t keep = bits != nullptr ? bits[c / 32] : ~0u;
          const float* from = sums + c * kRows + i * kPanel;
          cols - c >= kPanel ? add_row<true>(row + c, keep, ~0u, from)
                             : add_row<false>(row + c, keep, low_bits(cols - c), from);
        }
      }
    }
  }

  static void update(const Block& y, const void* s, const void* packed, int64_t R, void* scratch) {
    const int64_t pairs = all_pairs(R);
    auto* lanes = static_cast<uint32_t*>(scratch);  // (rows, pairs)
    for (int64_t m = 0; m < y.rows; ++m) {
      Paired::pack_rows(static_cast<const bf16*>(s) + m * R, 1, R, lanes + m * pairs);
      for (int64_t q = ceil_div(R, 2); q < pairs; ++q) lanes[m * pairs + q] = 0;
    }
    tiles_configure(kTile, step_pairs(R));
    for (int64_t m = 0; m < y.rows; m += kRows) {
      const int64_t rows = least(kRows, y.rows - m);
      const auto add_rows = rows > kTile ? update_rows<2> : update_rows<1>;
      add_rows(y, m, rows, lanes + m * pairs, static_cast<const uint32_t*>(packed), R);
    }
  }

  template <int NI>
  static void outer_tiles(const uint32_t* columns, int64_t ranks, int64_t rank_rows, int64_t steps,
                          const uint32_t* staged, bool accumulate, float* acc) {
    if (accumulate) {
      tiles_load<NI, 2>(acc, rank_rows * kPanel, kPanel * 4);
    } else {
      tiles_zero<NI, 2>();
    }
    for (int64_t step = 0; step < steps; ++step, columns += ranks * kTile, staged += kTile * kPanel) {
      tiles_multiply<NI, 2>(columns, rank_rows * 64, 64, staged, 64, kPanel * 4);
    }
    tiles_store<NI, 2>(acc, rank_rows * kPanel, kPanel * 4);
  }

  // Row pair q of `panels` panels from column c, interleaved, zeros outside x.
  static void stage_pair(const Block& x, int64_t q, int64_t c, int64_t panels, uint32_t* out) {
    const bf16* row = static_cast<const bf16*>(x.data) + 2 * q * x.ld + c;
    const uint32_t* bits = x.bits != nullptr ? x.bits + 2 * q * kMaskWords + c / 32 : nullptr;
    const bool whole = 2 * q + 1 < x.rows && c + panels * kPanel <= x.cols;
    for (int64_t p = 0; p < panels; ++p, row += kPanel, out += kBlockM / 2 * kPanel) {
      const uint32_t valid = low_bits(x.cols - c - p * kPanel);
      const uint32_t keep_low = (bits != nullptr ? bits[p] : ~0u) & (2 * q < x.rows ? valid : 0);
      const uint32_t keep_high = 2 * q + 1 < x.rows ? (bits != nullptr ? bits[kMaskWords + p] : ~0u) & valid : 0;
      const bool plain = whole && bits == nullptr;
      const __m512i low = plain ? Paired::load(row) : Paired::load(row, keep_low);
      const __m512i high = plain ? Paired::load(row + x.ld) : Paired::load(row + x.ld, keep_high);
      _mm512_storeu_si512(out, _mm512_unpacklo_epi16(low, high));
      _mm512_storeu_si512(out + kTile, _mm512_unpackhi_epi16(low, high));
    }
  }

  static void outer(const Block& x, const void* s, int64_t R, bool accumulate, float* acc, void* scratch) {
    const int64_t tiles = rank_tiles(R), ranks = rank_padded(R), rank_rows = ranks / tiles;
    const int64_t steps = ceil_div(x.rows, 32);
    auto* columns = static_cast<uint32_t*>(scratch);  // (steps, ranks, 16 row pairs)
    std::memset(columns, 0, static_cast<size_t>(steps * ranks * kTile) * 4);
    const auto* data = static_cast<const bf16*>(s);
    for (int64_t m = 0; m < x.rows; m += 2, data += 2 * R) {
      uint32_t* out = columns + m / 32 * ranks * kTile + m % 32 / 2;
      for (int64_t r = 0; r < R; ++r) out[r * kTile] = Paired::pair(data[r], m + 1 < x.rows ? data[R + r] : bf16{0});
    }
    alignas(64) uint32_t staged[kOuterPanels * kBlockM / 2 * kPanel];  // (panels, row pairs, kPanel)
    tiles_configure(rank_rows, kTile);
    for (int64_t c = 0; c < x.cols; c += kOuterPanels * kPanel) {
      const int64_t panels = least(kOuterPanels, ceil_div(x.cols - c, kPanel));
      for (int64_t q = 0; q < steps * kTile; ++q) stage_pair(x, q, c, panels, staged + q * kPanel);
      for (int64_t p = 0; p < panels; ++p, acc += ranks * kPanel) {
        const uint32_t* panel = staged + p * kBlockM / 2 * kPanel;
        int64_t t = 0;
        for (; t + 2 <= tiles; t += 2) {
          outer_tiles<2>(columns + t * rank_rows * kTile, ranks, rank_rows, steps, panel, accumulate,
                         acc + t * rank_rows * kPanel);
        }
        if (t < tiles) {
          outer_tiles<1>(columns + t * rank_rows * kTile, ranks, rank_rows, steps, panel, accumulate,
                         acc + t * rank_rows * kPanel);
        }
      }
    }
  }

  static size_t scratch_bytes(int64_t R) {
    const int64_t rowdot = kStagedBytes + kRows * rank_tiles(R) * kTile * 4;
    const int64_t update = kBlockM * all_pairs(R) * 4, outer = kBlockM / 2 * rank_padded(R) * 4;
    const int64_t products = update > outer ? update : outer;
    return static_cast<size_t>(rowdot > products ? rowdot : products);
  }
};

}  // namespace

const Kernels kKernels[3] = {
    make_kernels<Wide<float>>(),
    {Tiled::rowdot_bytes, Tiled::update_bytes, Tiled::scratch_bytes, Tiled::pack_rowdot, Tiled::pack_update,
     Tiled::rowdot, Tiled::update, Tiled::outer, round<bf16>, tiles_release, kUnpackOrder},
    make_kernels<Wide<f16>>()};

}  // namespace lorasp::amx
#include "../common/target_end.h"
#endif
