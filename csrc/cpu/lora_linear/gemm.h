// The frozen product with the low-rank update as extra depth of the same accumulators:
//     y (M, N) [+]= a (M, D) w + s (M, R) p + bias     s = round(scale * (keep_a o a) q)        keep_y o (s p) for s p
//     forward:  a = x,  w = weight^T, q = lora_A^T, p = lora_B^T, s = xa, keep_a the dropout mask
//     backward: a = dy, w = weight,   q = lora_B,   p = lora_A,   s = g,  keep_y the dropout mask
// so that a is read once and y written once. Torch-free except for the driver's threads. Invariants: packed operands
// are 64-byte aligned and zero-padded to whole register tiles, accumulators are fp32, every output element is written
// by exactly one thread in one fixed order.
#pragma once
#include <cstdint>

namespace lorasp {

// A matrix (depth, columns) with element (d, n) at data[n * ld + d] if depth_contiguous, else at data[d * ld + n].
struct Operand {
  const void* data;
  int64_t ld;
  bool depth_contiguous;
  int64_t columns, depth;
};

// One instruction set's register tile: C (mr, nr) += A (mr, depth) B (depth, nr), depth in steps of kr.
// Packed A: [step][mr][kr]; packed B: panels of nr columns, [step][nr * kr in the tile's own order].
// Bits: row r's start at bits + r * stride_bytes, bit i of a row is bit i % 8 of byte i / 8.
struct GemmKernel {
  uint32_t id;  // stored in packed weights: a packed weight fits the kernel that made it
  int64_t mr, nr, kr;
  int64_t element_size;        // of a, w, q, p, s, y
  int64_t group, group_steps;  // row blocks that share a panel's piece of group_steps while it is in L1
  // Elements whose bit is 0 become 0; bits may be null.
  void (*pack_rows)(const void* a, int64_t lda, int64_t rows, int64_t depth, const unsigned char* bits,
                    int64_t stride_bytes, void* packed);
  // Panels of all columns, panel_bytes apart.
  void (*pack_panels)(const Operand& w, int64_t panel_bytes, void* packed);
  // c (mr, nr) = or += a b + extra_a extra_b
  void (*block)(const void* a, const void* b, int64_t steps, const void* extra_a, const void* extra_b,
                int64_t extra_steps, bool accumulate, float* c);
  // c += term where the bit is 1
  void (*add_selected)(const float* term, const unsigned char* bits, int64_t stride_bytes, float* c);
  // y = round([y +] scale * c + bias); bias: fp32, nr of them, or null
  void (*store)(const float* c, int64_t rows, int64_t columns, float scale, const float* bias, bool accumulate, void* y,
                int64_t ldy);
  void (*enter)();
  void (*leave)();
};

const GemmKernel* gemm_amx_bf16();
const GemmKernel* gemm_avx512_bf16();
const GemmKernel* gemm_avx512_f32();

// Fills the keep bits of one row; may write up to 8 bytes past the last bit.
struct KeepRows {
  virtual void fill(int64_t row, unsigned char* bits) const = 0;

 protected:
  ~KeepRows() = default;
};

// Is shown every row of a once, while it is in a cache close by.
struct RowVisitor {
  virtual void visit(int64_t first, int64_t rows) const = 0;

 protected:
  ~RowVisitor() = default;
};

struct GemmParams {
  int64_t M;
  const void* a;
  int64_t lda;
  Operand w;           // (D, N); data is unused when packed
  const void* packed;  // pack_gemm_weight's result, or null
  Operand q;           // (D, R)
  Operand p;           // (R, N)
  float scale;
  const KeepRows* keep_a;
  const KeepRows* keep_y;
  const float* bias;          // fp32 (N,), or null
  const RowVisitor* visitor;  // or null
  void* s;                    // (M, R), written
  int64_t lds;
  void* y;
  int64_t ldy;
  bool accumulate;  // y += instead of y =
};

int64_t packed_weight_bytes(const GemmKernel& kernel, int64_t columns, int64_t depth);
void pack_gemm_weight(const GemmKernel& kernel, const Operand& w, void* packed);
void gemm(const GemmKernel& kernel, const GemmParams& params);

}  // namespace lorasp
