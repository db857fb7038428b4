// The low-rank passes around the frozen product: partition over torch's threads, block loops, reductions. Same bits on
// every run with the same number of threads.
#pragma once
#include <cstdint>

#include "skinny.h"

namespace lorasp {

// A tensor (M, columns) of the compute dtype with unit column stride; data may be nullptr where a pass allows it.
struct Tall {
  void* data;
  int64_t ld;
};

// A gradient to be written contiguously in the compute dtype or in fp32; False entries of mask become 0.
struct Gradient {
  void* data;
  bool fp32;
  const bool* mask;
};

struct LowRank {
  DType dtype;
  int64_t M, K, N, R;
  const void* A;         // (R, K), compute dtype, contiguous
  const void* B;         // (N, R)
  const KeepMask* keep;  // of an (M, K) mask; nullptr: no dropout
};

// xa (M, R) = round(scale * (keep o x) A^T); y += xa B^T unless y.data is nullptr.
void forward_pass(const LowRank& p, Tall x, Tall y, float scale, void* xa);

// g (M, R) = round(scale * dy B) unless g is nullptr, dB (N, R) = dy^T xa unless dB.data is nullptr: one pass over dy.
void dy_pass(const LowRank& p, Tall dy, const void* xa, float scale, void* g, Gradient dB);

// dx += keep o (g A) unless dx.data is nullptr, dA (R, K) = g^T (keep o x) unless dA.data is nullptr: one mask for
// both.
void dx_pass(const LowRank& p, Tall x, const void* g, Tall dx, Gradient dA);

}  // namespace lorasp
