// dropkey_attention, torch-free: what every instruction set implements, one (batch, query head) at a time.
//     z = scale q k^T + mask;  hidden z = -inf;  p = softmax(z);  o = p v;  lse = log sum exp z
//     dv = p^T do;  dz = p o (do v^T - rowsum(do o o));  dq = scale dz k;  dk = scale dz^T q
// Invariants: keys that no query of the head may see (dropped columns and spans, key padding) are not in its KeyList
// and are neither read nor computed; nothing of size Sq x Sk exists; sums run in one fixed order.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"
#include "../common/keep_bits.h"

namespace lorasp {

// Element (b, h, s, d) is at data[b * batch + h * head + s * row + d].
struct HeadRows {
  const void* data;
  int64_t batch, head, row;
};

// Element (b, h, i, j) is at data[b * batch + h * head + i * row + j * key]; broadcast dimensions have stride 0.
struct ScoreMask {
  enum Kind { kNone, kBool, kF32, kBF16, kF16 };
  Kind kind = kNone;
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, key = 0;
  float hidden = 0;  // additive values at or below it hide
};

struct Attention {
  int64_t B, H, Hkv, Sq, Sk, D, Dv;
  float scale;
  bool is_causal;
  HeadRows q, k, v, o, grad_o;
  float* lse;                // (B, H, Sq) contiguous
  ScoreMask mask;            // kNone where the key lists say it all
  const KeepMask* elements;  // drop decisions per logit, or nullptr
  KeepBits keep_bits;
};

// The keys a head walks, ascending, and what is added to the logits of each, or nullptr.
struct KeyList {
  const int32_t* index;
  int64_t count;
  const float* bias;
};

// Query blocks first, first + step, ... of one head.
struct Share {
  int64_t b, h, first, step;
};

// Where a head's gradients go; null where not needed. dq: this head's rows in the compute dtype. dk, dv: fp32 rows
// (Sk, D) and (Sk, Dv) that are added to.
struct Gradients {
  void* dq;
  int64_t dq_row;
  float* dk;
  float* dv;
};

// dmask, fp32: element (i, j) of this head is at data[i * row + j * key]; added to.
struct MaskGradient {
  float* data;
  int64_t row, key;
};

struct AttentionKernels {
  int64_t forward_queries, backward_queries;  // in a query block
  size_t (*forward_bytes)(const Attention& p, int64_t keys);
  void (*forward)(const Attention& p, const KeyList& keys, const Share& share, void* scratch);
  size_t (*backward_bytes)(const Attention& p, int64_t keys);
  void (*backward)(const Attention& p, const KeyList& keys, const Share& share, const Gradients& out, void* scratch);
  void (*mask_gradient)(const Attention& p, const KeyList& keys, const Share& share, const MaskGradient& out,
                        void* scratch);
  // Rounds fp32 rows (rows, cols) to the compute dtype.
  void (*round_rows)(const float* in, int64_t rows, int64_t cols, void* out, int64_t out_row);
};

// The kernels of the instruction set in use.
const AttentionKernels& attention_kernels(DType dtype);

// One table per compute dtype, in the order of DType.
namespace portable {
extern const AttentionKernels kAttention[3];
}
#if defined(__x86_64__)
namespace avx2 {
extern const AttentionKernels kAttention[3];
}
namespace avx512 {
extern const AttentionKernels kAttention[3];
}
namespace avx512_bf16 {
extern const AttentionKernels kAttention[1];  // bf16
}
#if defined(__linux__)
namespace amx {
extern const AttentionKernels kAttention[1];  // bf16
}
#endif
#endif

}  // namespace lorasp
