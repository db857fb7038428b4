// AMX tiles: C (0-3) += A (4, 5) B (6, 7) on bf16 pairs, as two by two tiles of 16 x 16 floats.
// Inline assembly, because the compilers' intrinsics do not say that a tile load reads memory.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

#define LORASP_TILE_LOAD(tile, base, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
#define LORASP_TILE_STORE(tile, base, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
#define LORASP_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : :)
#define LORASP_TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// C and A have `rows` rows; A has `pairs` bf16 pairs per row, B as many rows.
inline void tiles_configure(int64_t rows, int64_t pairs) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : pairs);
    config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? 4 * pairs : 64);
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

void tiles_release() { __asm__ volatile("tilerelease" : :); }

// NI x NJ tiles of C at c; the second row of tiles starts next_i floats after the first, the second column 16 after.
template <int NI, int NJ>
inline void tiles_load(const float* c, int64_t next_i, int64_t stride) {
  LORASP_TILE_LOAD(0, c, stride);
  if constexpr (NJ > 1) LORASP_TILE_LOAD(1, c + 16, stride);
  if constexpr (NI > 1) LORASP_TILE_LOAD(2, c + next_i, stride);
  if constexpr (NI > 1 && NJ > 1) LORASP_TILE_LOAD(3, c + next_i + 16, stride);
}

template <int NI, int NJ>
inline void tiles_zero() {
  LORASP_TILE_ZERO(0);
  if constexpr (NJ > 1) LORASP_TILE_ZERO(1);
  if constexpr (NI > 1) LORASP_TILE_ZERO(2);
  if constexpr (NI > 1 && NJ > 1) LORASP_TILE_ZERO(3);
}

template <int NI, int NJ>
inline void tiles_store(float* c, int64_t next_i, int64_t stride) {
  LORASP_TILE_STORE(0, c, stride);
  if constexpr (NJ > 1) LORASP_TILE_STORE(1, c + 16, stride);
  if constexpr (NI > 1) LORASP_TILE_STORE(2, c + next_i, stride);
  if constexpr (NI > 1 && NJ > 1) LORASP_TILE_STORE(3, c + next_i + 16, stride);
}

// Strides in bytes; next_a and next_b lead from the first to the second tile, in bytes.
template <int NI, int NJ>
inline void tiles_multiply(const void* a, int64_t next_a, int64_t stride_a, const void* b, int64_t next_b,
                           int64_t stride_b) {
  LORASP_TILE_LOAD(6, b, stride_b);
  LORASP_TILE_LOAD(4, a, stride_a);
  LORASP_TILE_DOT(0, 4, 6);
  if constexpr (NJ > 1) {
    LORASP_TILE_LOAD(7, static_cast<const char*>(b) + next_b, stride_b);
    LORASP_TILE_DOT(1, 4, 7);
  }
  if constexpr (NI > 1) {
    LORASP_TILE_LOAD(5, static_cast<const char*>(a) + next_a, stride_a);
    LORASP_TILE_DOT(2, 5, 6);
    if constexpr (NJ > 1) LORASP_TILE_DOT(3, 5, 7);
  }
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
