// The frozen product with the low-rank update as extra depth of the same accumulators:
//     y (M, N) = a (M, D) w^T + s (M, R) p^T + bias          forward:  a = x,  s = xa, p = lora_B (N, R)
//     y (M, N) = a (M, D) w   + keep o (s (M, R) p)          backward: a = dy, s = g,  p = lora_A (R, N)
// Torch-free except for the driver. Invariants: packed operands are 64-byte aligned and zero-padded to whole register
// tiles, accumulators are fp32, every output element is written by exactly one thread in one fixed order.
#pragma once
#include <cstdint>

namespace lorasp {

// One instruction set's register tile: C (mr, nr) += A (mr, depth) B (depth, nr), depth in steps of kr.
// Packed A: [step][mr][kr]; packed B: panels of nr columns, [step][...nr * kr in the tile's own order].
struct GemmKernel {
  uint32_t id;             // stored in packed weights: a packed weight fits the kernel that made it
  int64_t mr, nr, kr;
  int64_t element_size;    // of a, w, s, p, y
  int64_t group, group_steps;  // row blocks that share a panel's piece of group_steps while it is in L1
  void (*pack_rows)(const void* a, int64_t lda, int64_t rows, int64_t depth, void* packed);
  // depth_contiguous: w[n * ldw + d]; otherwise w[d * ldw + n].
  void (*pack_panel)(const void* w, int64_t ldw, bool depth_contiguous, int64_t columns, int64_t depth, void* packed);
  // c (mr, nr) = or += a b + extra_a extra_b
  void (*block)(const void* a, const void* b, int64_t steps, const void* extra_a, const void* extra_b,
                int64_t extra_steps, bool accumulate, float* c);
  // Zero the entries of c whose bit is 0; row r's bits start at bits + r * stride_bytes.
  void (*select)(const unsigned char* bits, int64_t stride_bytes, float* c);
  // bias: fp32, nr of them, or null.
  void (*store)(const float* c, int64_t rows, int64_t columns, const float* bias, void* y, int64_t ldy);
  void (*enter)();
  void (*leave)();
};

const GemmKernel* gemm_amx_bf16();
const GemmKernel* gemm_avx512_bf16();
const GemmKernel* gemm_avx512_f32();

// Fills the keep bits of row `row`, columns [0, N): bit i of the row is byte i / 8, bit i % 8.
struct KeepRows {
  virtual void fill(int64_t row, unsigned char* bits) const = 0;

 protected:
  ~KeepRows() = default;
};

struct GemmParams {
  int64_t M, N, D, R;
  const void* a;
  int64_t lda;
  const void* w;            // unused when packed
  int64_t ldw;
  bool depth_contiguous;    // w[n * ldw + d]; otherwise w[d * ldw + n]
  const void* packed;       // pack_gemm_weight's result, or null
  const void* s;            // (M, R), contiguous
  const void* p;
  int64_t ldp;
  bool p_depth_contiguous;
  const float* bias;        // fp32 (N,), or null
  const KeepRows* keep;     // over y, or null
  void* y;
  int64_t ldy;
};

int64_t packed_weight_bytes(const GemmKernel& kernel, int64_t N, int64_t D);
void pack_gemm_weight(const GemmKernel& kernel, const void* w, int64_t ldw, bool depth_contiguous, int64_t N, int64_t D,
                      void* packed);
void gemm(const GemmKernel& kernel, const GemmParams& params);

}  // namespace lorasp
