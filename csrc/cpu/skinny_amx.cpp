// The skinny products in bf16 on AMX. The other dtypes use the AVX-512 kernels.
#if defined(__x86_64__) && defined(__linux__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "skinny.h"

// Nothing from another header may be instantiated below: a shared inline function compiled for this target could be
// linked into code that runs on any CPU.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#endif
#define LORASP_ISA amx
#define LORASP_AVX512
#define LORASP_AVX512_BF16
#include "simd_avx512.h"

#include "amx_tiles.h"
#include "keep_bits.h"
#include "skinny_impl.h"

#include "dot_bf16.h"

namespace lorasp::amx {
namespace {

constexpr int64_t kTile = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kRows = 2 * kTile;         // rows of x or y that are multiplied together
constexpr int64_t kStagedCols = 512;         // 32 x 512 halves, masked: half of L1
constexpr int64_t kStagedLd = kStagedCols + 32;
constexpr int64_t kStagedBytes = kRows * kStagedLd * 2;

// Tiles of 16 column pairs by 16 ranks, (column tile, rank tile).
size_t rowdot_bytes(int64_t cols, int64_t R) {
  return static_cast<size_t>(ceil_div(cols, 32) * rank_tiles(R) * kTileBytes);
}

void pack_rowdot(const Factor& w, int64_t cols, int64_t R, void* packed) {
  auto* out = static_cast<uint32_t*>(packed);
  const auto* data = static_cast<const bf16*>(w.data);
  for (int64_t c0 = 0; c0 < cols; c0 += 32) {
    for (int64_t r0 = 0; r0 < R; r0 += kTile, out += kTile * kTile) {
      std::memset(out, 0, kTileBytes);
      for (int64_t r = r0; r < least(r0 + kTile, R); ++r) {
        const bf16* row = data + r * w.stride_r;
        for (int64_t c = c0; c < least(c0 + 32, cols); c += 2) {
          const bf16 second = c + 1 < cols ? row[(c + 1) * w.stride_c] : bf16{0};
          out[(c - c0) / 2 * kTile + r - r0] = Paired::pair(row[c * w.stride_c], second);
        }
      }
    }
  }
}

// Rows m ... of x, masked and filled up with zeros to whole tiles.
void stage_rows(const Block& x, int64_t m, int64_t rows, int64_t c, int64_t cols, bf16* staged) {
  const int64_t padded_rows = round_up(rows, kTile), padded_cols = round_up(cols, 32);
  for (int64_t i = 0; i < padded_rows; ++i, staged += kStagedLd) {
    const bf16* row = static_cast<const bf16*>(x.data) + (m + i) * x.ld + c;
    const uint32_t* bits = x.bits + (m + i) * kMaskWords + c / 32;
    for (int64_t j = 0; j < padded_cols; j += 32) {
      uint32_t keep = i < rows ? low_bits(cols - j) : 0;
      if (x.bits && i < rows) keep &= bits[j / 32];
      _mm512_storeu_si512(staged + j, Paired::load(row + j, keep));
    }
  }
}

// sums (16 NI, rank tiles * 16) = [sums +] a w^T over `steps` column tiles.
template <int NI, int NJ>
void rowdot_tiles(const bf16* a, int64_t lda, int64_t steps, const char* w, int64_t tiles, bool accumulate, float* sums,
                  const bf16* next) {
  const int64_t stride = tiles * kTile * 4;
  if (accumulate) {
    tiles_load<NI, NJ>(sums, kTile * tiles * kTile, stride);
  } else {
    tiles_zero<NI, NJ>();
  }
  for (int64_t step = 0; step < steps; ++step, a += 32, w += tiles * kTileBytes) {
    if (next) {
#pragma GCC unroll 32
      for (int i = 0; i < NI * kTile; ++i) _mm_prefetch(reinterpret_cast<const char*>(next + i * lda + step * 32), _MM_HINT_T0);
    }
    tiles_multiply<NI, NJ>(a, kTile * lda * 2, lda * 2, w, kTileBytes, 64);
  }
  tiles_store<NI, NJ>(sums, kTile * tiles * kTile, stride);
}

template <int NI>
void rowdot_ranks(const bf16* a, int64_t lda, int64_t steps, const char* w, int64_t tiles, bool accumulate, float* sums,
                  const bf16* next) {
  for (int64_t t = 0; t < tiles; t += 2, next = nullptr) {
    if (t + 1 < tiles) {
      rowdot_tiles<NI, 2>(a, lda, steps, w + t * kTileBytes, tiles, accumulate, sums + t * kTile, next);
    } else {
      rowdot_tiles<NI, 1>(a, lda, steps, w + t * kTileBytes, tiles, accumulate, sums + t * kTile, next);
    }
  }
}

void rowdot(const Block& x, const void* packed, int64_t R, bool accumulate, float* out, void* scratch) {
  auto* staged = static_cast<bf16*>(scratch);
  auto* sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + kStagedBytes);
  const int64_t tiles = rank_tiles(R);
  const int64_t whole = x.bits ? 0 : x.cols / 32 * 32;  // columns that can be read as tiles where they are
  tiles_configure(kTile, kTile);
  for (int64_t m = 0; m < x.rows; m += kRows) {
    const int64_t rows = least(kRows, x.rows - m);
    const bool direct = whole > 0 && rows % kTile == 0;
    const auto* data = static_cast<const bf16*>(x.data) + m * x.ld;
    const auto* w = static_cast<const char*>(packed);
    const auto multiply = rows > kTile ? rowdot_ranks<2> : rowdot_ranks<1>;
    if (direct) multiply(data, x.ld, whole / 32, w, tiles, false, sums, data + kRows * x.ld);
    for (int64_t c = direct ? whole : 0; c < x.cols; c += kStagedCols) {
      const int64_t cols = least(kStagedCols, x.cols - c);
      stage_rows(x, m, rows, c, cols, staged);
      multiply(staged, kStagedLd, ceil_div(cols, 32), w + c / 32 * tiles * kTileBytes, tiles, c > 0, sums, nullptr);
    }
    for (int64_t i = 0; i < rows; ++i, out += R) {
      for (int64_t r = 0; r < R; ++r) out[r] = sums[i * tiles * kTile + r] + (accumulate ? out[r] : 0.0f);
    }
  }
}

// Pairs of ranks, split into equal steps of at most 16: pairs of one step, and of all.
constexpr int64_t step_pairs(int64_t R) { return ceil_div(ceil_div(R, 2), ceil_div(R, 32)); }
constexpr int64_t all_pairs(int64_t R) { return step_pairs(R) * ceil_div(R, 32); }

// Panels of (all_pairs, kPanel).
size_t update_bytes(int64_t cols, int64_t R) {
  return static_cast<size_t>(round_up(cols, kPanel) * all_pairs(R)) * 4;
}

void pack_update(const Factor& w, int64_t cols, int64_t R, void* packed) {
  auto* out = static_cast<uint32_t*>(packed);
  for (int64_t c = 0; c < cols; c += kPanel) {
    const Factor panel{static_cast<const bf16*>(w.data) + c * w.stride_c, w.stride_r, w.stride_c};
    lorasp::amx::pack_update<Paired>(panel, least(kPanel, cols - c), R, out);
    out += ceil_div(R, 2) * kPanel;
    for (int64_t pair = ceil_div(R, 2); pair < all_pairs(R); ++pair, out += kPanel) std::memset(out, 0, 4 * kPanel);
  }
}

// y (rows, kPanel) += sums where kept; columns outside `valid` are not touched.
void add_panel(bf16* y, int64_t ld, int64_t rows, const uint32_t* bits, uint32_t valid, const float* sums) {
  for (int64_t i = 0; i < rows; ++i, y += ld, sums += kPanel) {
    const uint32_t keep = bits ? bits[i * kMaskWords] : ~0u;
    vf low = widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(valid), y));
    vf high = widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(valid >> 16), y + 16));
    low = _mm512_mask_add_ps(low, static_cast<__mmask16>(keep), low, vload(sums));
    high = _mm512_mask_add_ps(high, static_cast<__mmask16>(keep >> 16), high, vload(sums + 16));
    _mm512_mask_storeu_epi16(y, valid, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

template <int NI>
void update_rows(const Block& y, int64_t m, int64_t rows, const uint32_t* s, const uint32_t* packed, int64_t R) {
  const int64_t pairs = all_pairs(R), step = step_pairs(R);
  alignas(64) float sums[kRows * kPanel];
  for (int64_t c = 0; c < y.cols; c += kPanel, packed += pairs * kPanel) {
    tiles_zero<NI, 2>();
    for (int64_t q = 0; q < pairs; q += step) {
      tiles_multiply<NI, 2>(s + q, kTile * pairs * 4, pairs * 4, packed + q * kPanel, 64, kPanel * 4);
    }
    tiles_store<NI, 2>(sums, kTile * kPanel, kPanel * 4);
    const uint32_t* bits = y.bits ? y.bits + m * kMaskWords + c / 32 : nullptr;
    add_panel(static_cast<bf16*>(y.data) + m * y.ld + c, y.ld, rows, bits, low_bits(y.cols - c), sums);
  }
}

void update(const Block& y, const void* s, const void* packed, int64_t R, void* scratch) {
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
void outer_tiles(const uint32_t* columns, int64_t ranks, int64_t rank_rows, int64_t steps, const uint32_t* staged,
                 bool accumulate, float* acc) {
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

void outer(const Block& x, const void* s, int64_t R, bool accumulate, float* acc, void* scratch) {
  const int64_t tiles = rank_tiles(R), ranks = rank_padded(R), rank_rows = ranks / tiles, steps = ceil_div(x.rows, 32);
  auto* columns = static_cast<uint32_t*>(scratch);  // (steps, ranks, 16 row pairs)
  alignas(64) uint32_t staged[kBlockM / 2 * kPanel];
  const auto* data = static_cast<const bf16*>(s);
  std::memset(columns, 0, static_cast<size_t>(steps * ranks * kTile) * 4);
  for (int64_t m = 0; m < x.rows; m += 2, data += 2 * R) {
    uint32_t* out = columns + m / 32 * ranks * kTile + m % 32 / 2;
    for (int64_t r = 0; r < R; ++r) out[r * kTile] = Paired::pair(data[r], m + 1 < x.rows ? data[R + r] : bf16{0});
  }
  tiles_configure(rank_rows, kTile);
  for (int64_t c = 0; c < x.cols; c += kPanel, acc += ranks * kPanel) {
    for (int64_t q = 0; q < steps * kTile; ++q) {
      if (2 * q < x.rows) {
        Paired::stage(x, 2 * q, c, staged + q * kPanel);
      } else {
        std::memset(staged + q * kPanel, 0, 4 * kPanel);
      }
    }
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2) {
      outer_tiles<2>(columns + t * rank_rows * kTile, ranks, rank_rows, steps, staged, accumulate,
                     acc + t * rank_rows * kPanel);
    }
    if (t < tiles) {
      outer_tiles<1>(columns + t * rank_rows * kTile, ranks, rank_rows, steps, staged, accumulate,
                     acc + t * rank_rows * kPanel);
    }
  }
}

size_t scratch_bytes(int64_t R) {
  const int64_t rowdot = kStagedBytes + kRows * rank_tiles(R) * kTile * 4;
  const int64_t update = kBlockM * all_pairs(R) * 4, outer = kBlockM / 2 * rank_padded(R) * 4;
  const int64_t products = update > outer ? update : outer;
  return static_cast<size_t>(rowdot > products ? rowdot : products);
}

}  // namespace

const Kernels kKernels[3] = {
    make_kernels<Wide<float>>(),
    {rowdot_bytes, update_bytes, scratch_bytes, pack_rowdot, pack_update, rowdot, update, outer, round<bf16>, keep_bits,
     tiles_release, kUnpackOrder},
    make_kernels<Wide<f16>>()};

}  // namespace lorasp::amx
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
