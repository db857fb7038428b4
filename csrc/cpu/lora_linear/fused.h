// Plan `fused` (plan.h): the low-rank term rides in the frozen product's own accumulators (gemm.h). One packed weight
// per direction may be prepared ahead (`lorasp::pack_weight_cpp`); without one, the weight is packed on the way.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "../common/dtype.h"
#include "../common/keep_bits.h"
#include "gemm.h"

namespace lorasp {

// What both directions take: the register tile, the packed weight of the direction, the factors in the compute dtype,
// contiguous, the scale of the projected rows (dropout's rescale included), the mask of x and dx or nullptr.
struct Fused {
  const GemmKernel* kernel;
  const std::optional<at::Tensor>& packed;
  const void* A;  // (R, K)
  const void* B;  // (N, R)
  int64_t R;
  float scale;
  const KeepMask* keep;
};

// The register tile for `dtype` in the active instruction set; nullptr where there is none.
const GemmKernel* fused_kernel(DType dtype);

// y = x weight^T + bias + xa B^T with xa (M, R) = round(scale * (keep o x) A^T), contiguous, which is written too.
at::Tensor fused_forward(const Fused& f, const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, void* xa, const RowVisitor* visitor = nullptr);

// dx (M, K) [+]= dy weight + keep o (g A) with g (M, R) = round(scale * dy B), rows ldg apart, which is written too.
void fused_backward(const Fused& f, const at::Tensor& dy, const at::Tensor& weight, void* g, int64_t ldg,
                    const at::Tensor& dx, bool accumulate);

}  // namespace lorasp
