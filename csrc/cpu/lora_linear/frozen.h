// The frozen product by the fastest library ATen reaches on this CPU.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace lorasp {

// x (M, K) weight (N, K)^T + bias (N,) -> (M, N), contiguous
at::Tensor frozen_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// dy (M, N) weight (N, K) -> (M, K), contiguous
at::Tensor frozen_backward(const at::Tensor& dy, const at::Tensor& weight);

// dx (M, K) += dy (M, N) weight (N, K), without a temporary of dx's size
void frozen_backward_add(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& dx);

}  // namespace lorasp
