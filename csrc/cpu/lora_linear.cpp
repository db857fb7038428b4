// lora_linear on CPU: lorasp::lora_linear_fwd_cpp and lorasp::lora_linear_bwd_cpp (schemas in
// lorasp/ops/lora_linear.py).
//     xa = s (D o x) A^T            y  = x W^T + bias + xa B^T
//     g  = s dy B                   dx = D o (g A) + dy W        dB = dy^T xa        dA = g^T (D o x)
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/scratch.h"
#include "lora_linear/arguments.h"
#include "lora_linear/frozen.h"
#include "lora_linear/fused.h"
#include "lora_linear/plan.h"

namespace lorasp {
namespace {

constexpr const char* kOp = "lora_linear";

void check(const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype, bool fp32_too = false) {
  check_tensor(kOp, name, t, shape, dtype, fp32_too);
}

std::tuple<Tensor, Tensor> lora_linear_forward_cpu(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias,
                                                   const Tensor& lora_A, const Tensor& lora_B,
                                                   const OptionalTensor& seed, double scale, double dropout_p,
                                                   int64_t member, std::string_view plan,
                                                   const OptionalTensor& packed) {
  const PlainDispatch plain;
  TORCH_CHECK_VALUE(x_.dim() == 2 && lora_A.dim() == 2 && lora_B.dim() == 2,
                    "lora_linear: x, lora_A and lora_B must be 2-d, got ", x_.sizes(), ", ", lora_A.sizes(), ", ",
                    lora_B.sizes());
  const DType dtype = compute_dtype(kOp, "x", x_);
  const int64_t M = x_.size(0), K = x_.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check("x", x_, {M, K}, x_.scalar_type());
  check("weight", weight, {N, K}, x_.scalar_type());
  if (bias) check("bias", *bias, {N}, x_.scalar_type());
  check("lora_A", lora_A, {R, K}, x_.scalar_type(), true);
  check("lora_B", lora_B, {N, R}, x_.scalar_type(), true);
  const Dropout dropout(kOp, dropout_p, seed, member);

  const Tensor x = unit_columns(x_);
  const GemmKernel* fused = plan_kernel(kOp, plan, {dtype, M, N, K, packed.has_value(), dropout.keep() != nullptr});
  Tensor xa = at::empty({M, R}, x.options());
  if (M == 0) return {at::empty({M, N}, x.options()), xa};
  const Tensor a = rounded(lora_A, x.scalar_type()), b = rounded(lora_B, x.scalar_type());
  const float xa_scale = static_cast<float>(scale * dropout.rescale);
  if (fused) {
    const Fused f{fused, packed, a.const_data_ptr(), b.const_data_ptr(), R, xa_scale, dropout.keep()};
    return {fused_forward(f, x, weight, bias, xa.mutable_data_ptr()), xa};
  }
  Tensor y = frozen_forward(x, weight, bias);
  const Output output{R, N, xa_scale, xa.mutable_data_ptr(), b.const_data_ptr(), tall(y)};
  forward_pass(dtype, M, K, tall(x), Projection{R, a.const_data_ptr(), dropout.keep(), output}, nullptr, nullptr);
  return {y, xa};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_cpu(
    const Tensor& dy_, const OptionalTensor& x_, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const OptionalTensor& xa_, const OptionalTensor& seed, const OptionalTensor& mask_A, const OptionalTensor& mask_B,
    double scale, double dropout_p, int64_t member, bool need_dx, bool need_dA, bool need_dB, std::string_view plan,
    const OptionalTensor& packed) {
  const PlainDispatch plain;
  TORCH_CHECK_VALUE(dy_.dim() == 2 && lora_A.dim() == 2 && lora_B.dim() == 2,
                    "lora_linear: dy, lora_A and lora_B must be 2-d, got ", dy_.sizes(), ", ", lora_A.sizes(), ", ",
                    lora_B.sizes());
  const DType dtype = compute_dtype(kOp, "dy", dy_);
  const int64_t M = dy_.size(0), K = lora_A.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check("dy", dy_, {M, N}, dy_.scalar_type());
  check("lora_A", lora_A, {R, K}, dy_.scalar_type(), true);
  check("lora_B", lora_B, {N, R}, dy_.scalar_type(), true);
  if (need_dx) check("weight", weight, {N, K}, dy_.scalar_type());
  if (mask_A) check("mask_A", *mask_A, {R, K}, at::kBool);
  if (mask_B) check("mask_B", *mask_B, {N, R}, at::kBool);
  TORCH_CHECK_VALUE(!need_dA || x_, "lora_linear: x must be given when need_dA, got None");
  TORCH_CHECK_VALUE(!need_dB || xa_, "lora_linear: xa must be given when need_dB, got None");
  if (need_dA) check("x", *x_, {M, K}, dy_.scalar_type());
  if (need_dB) check("xa", *xa_, {M, R}, dy_.scalar_type());
  const bool need_g = need_dx || need_dA;
  const Dropout dropout(kOp, need_g ? dropout_p : 0.0, seed, member);

  const Tensor dy = unit_columns(dy_);
  Tensor dlora_A = gradient_like(lora_A, dy, need_dA), dlora_B = gradient_like(lora_B, dy, need_dB);
  Tensor dx = need_dx && M == 0 ? at::empty({M, K}, dy.options()) : at::empty({0}, dy.options());
  if (M == 0) return {dx, dlora_A, dlora_B};

  const Tensor a = rounded(lora_A, dy.scalar_type()), b = rounded(lora_B, dy.scalar_type());
  const Tensor xa = need_dB ? xa_->contiguous() : Tensor(), x = need_dA ? unit_columns(*x_) : Tensor();
  const Tensor kept_A = mask_A && need_dA ? mask_A->contiguous() : Tensor();
  const Tensor kept_B = mask_B && need_dB ? mask_B->contiguous() : Tensor();
  ScratchFrame frame;
  void* g = need_g ? frame.take<char>(M * R * dy.element_size()) : nullptr;
  const float g_scale = static_cast<float>(scale * dropout.rescale);
  const GemmKernel* fused =
      need_dx ? plan_kernel(kOp, plan, {dtype, M, N, K, packed.has_value(), dropout.keep() || need_dA}) : nullptr;
  if (fused) {
    dx = at::empty({M, K}, dy.options());
    const Fused f{fused, packed, a.const_data_ptr(), b.const_data_ptr(), R, g_scale, dropout.keep()};
    fused_backward(f, dy, weight, g, R, dx, false);
  } else if (need_dx) {
    dx = frozen_backward(dy, weight);
  }
  const Tall g_left = fused ? Tall{nullptr, 0} : Tall{g, R};
  if (g_left.data || need_dB)
    dy_pass(dtype, M, N, R, tall(dy), b.const_data_ptr(), g_scale, g_left, need_dB ? xa.const_data_ptr() : nullptr,
            whole_gradient(dlora_B, need_dB, kept_B));
  const Tall dx_left = need_dx && !fused ? tall(dx) : Tall{nullptr, 0};
  const Slice slice{R, whole_gradient(dlora_A, need_dA, kept_A)};
  if (dx_left.data || need_dA)
    dx_pass(dtype, M, K, dx_left, need_dA ? tall(x) : Tall{nullptr, 0},
            Expansion{R, a.const_data_ptr(), dropout.keep(), g, slice}, nullptr);
  return {dx, dlora_A, dlora_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(lorasp, CPU, m) {
  m.impl("lora_linear_fwd_cpp", &lora_linear_forward_cpu);
  m.impl("lora_linear_bwd_cpp", &lora_linear_backward_cpu);
}

}  // namespace lorasp
