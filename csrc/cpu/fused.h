// Plan `fused`: the low-rank term rides in the frozen product's own accumulators (gemm.h). One packed weight per
// direction may be prepared ahead (`lorasp::pack_weight_cpp`); without one, the weight is packed on the way.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "gemm.h"
#include "skinny.h"

namespace lorasp {

// The register tile for `dtype` in the active instruction set; nullptr where there is none.
const GemmKernel* fused_kernel(DType dtype);

// Whether plan `auto` takes this plan: where it was measured to be the faster one.
bool fused_wins(DType dtype, int64_t M, bool packed);

// x (M, K) weight (N, K)^T + bias + xa (M, R) B (N, R)^T
at::Tensor fused_forward(const GemmKernel& kernel, const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, const void* xa, const void* B, int64_t R,
                         const std::optional<at::Tensor>& packed);

// dy (M, N) weight (N, K) + keep o (g (M, R) A (R, K)); keep may be nullptr
at::Tensor fused_backward(const GemmKernel& kernel, const at::Tensor& dy, const at::Tensor& weight, const void* g,
                          const void* A, int64_t R, const KeepMask* keep, void (*keep_bits)(const KeepMask&, int64_t, int64_t, uint32_t*),
                          const std::optional<at::Tensor>& packed);

}  // namespace lorasp
