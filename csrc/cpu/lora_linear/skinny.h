// The skinny products around the frozen GEMM, torch-free: what every instruction set implements. Kernels see one block
// of a tall tensor at a time (unit column stride, at most kBlockM rows and kChunk columns) and never allocate.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

namespace lorasp {

constexpr int64_t kBlockM = 64;  // 64 x 2048 halves are 256 KiB: a block stays in L2 while two kernels read it
constexpr int64_t kChunk = 2048;
constexpr int64_t kPanel = 32;  // columns in one panel of a packed factor or accumulator
constexpr int64_t kMaskWords = kChunk / 32;

// Ranks are padded to equal tiles of at most 16, the rows of an AMX tile.
constexpr int64_t rank_tiles(int64_t R) { return ceil_div(R, 16); }
constexpr int64_t rank_padded(int64_t R) { return rank_tiles(R) * ceil_div(R, rank_tiles(R)); }

// Floats of the accumulator of outer(): panels of (rank_padded(R), kPanel).
constexpr int64_t accumulator_size(int64_t cols, int64_t R) { return ceil_div(cols, kPanel) * rank_padded(R) * kPanel; }

// Element (r, c) of a rank-R factor is data[r * stride_r + c * stride_c], in the compute dtype.
struct Factor {
  const void* data;
  int64_t stride_r;
  int64_t stride_c;
};

// bits: keep mask of the block or nullptr; column c of row m is bit c % 32 of word m * kMaskWords + c / 32.
struct Block {
  void* data;
  int64_t ld;
  int64_t rows;
  int64_t cols;
  const uint32_t* bits;
};

struct Kernels {
  // Bytes of a packed factor of `cols` columns, and of the scratch the three products below need.
  size_t (*rowdot_bytes)(int64_t cols, int64_t R);
  size_t (*update_bytes)(int64_t cols, int64_t R);
  size_t (*scratch_bytes)(int64_t R);
  void (*pack_rowdot)(const Factor& w, int64_t cols, int64_t R, void* packed);
  void (*pack_update)(const Factor& w, int64_t cols, int64_t R, void* packed);
  // out (rows, R) = [out +] (keep o x) w^T
  void (*rowdot)(const Block& x, const void* packed, int64_t R, bool accumulate, float* out, void* scratch);
  // y += keep o (s w), s (rows, R) in the compute dtype
  void (*update)(const Block& y, const void* s, const void* packed, int64_t R, void* scratch);
  // acc = [acc +] s^T (keep o x); the columns of each panel are stored in the order of panel_order
  void (*outer)(const Block& x, const void* s, int64_t R, bool accumulate, float* acc, void* scratch);
  // Rounds scale * in to the compute dtype.
  void (*round)(const float* in, float scale, int64_t count, void* out);
  // Gives back what a thread holds while it runs kernels (AMX tiles); may be nullptr.
  void (*release)();
  // Column c of a panel of acc stands at position panel_order[c].
  const uint8_t* panel_order;
};

// The kernels of the instruction set in use.
const Kernels& kernels(DType dtype);

// One table per compute dtype, in the order of DType.
namespace portable {
extern const Kernels kKernels[3];
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels[3];
}
namespace avx512 {
extern const Kernels kKernels[3];
}
namespace avx512_bf16 {
extern const Kernels kKernels[3];
}
#if defined(__linux__)
namespace amx {
extern const Kernels kKernels[3];
}
#endif
#endif

}  // namespace lorasp
