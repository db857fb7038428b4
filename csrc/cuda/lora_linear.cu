// lora_linear on CUDA: lorasp::lora_linear_fwd_cuda and lorasp::lora_linear_bwd_cuda (schemas in
// lorasp/ops/lora_linear.py), plan addmm: the rank-R products by the kernels beside this, the frozen product by cuBLAS,
// added onto the low-rank share of y and dx.
//     xa = s (D o x) A^T            y  = x W^T + bias + xa B^T
//     g  = s dy B                   dx = D o (g A) + dy W        dB = dy^T xa        dA = g^T (D o x)
#include "lora_linear_passes.h"

namespace lorasp::cuda {
namespace {

constexpr const char* kOp = "lora_linear";

void check(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType dtype,
           bool fp32_too = false) {
  check_tensor(kOp, name, t, sizes, dtype, fp32_too);
}

std::tuple<Tensor, Tensor> lora_linear_forward_cuda(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias_,
                                                    const Tensor& lora_A, const Tensor& lora_B,
                                                    const OptionalTensor& seed, double scale, double dropout_p,
                                                    int64_t member, const std::string& plan,
                                                    const OptionalTensor& packed) {
  check_matrices(kOp, "x", x_, lora_A, lora_B);
  const ScalarType dtype = x_.scalar_type();
  const int64_t M = x_.size(0), K = x_.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check("x", x_, {M, K}, dtype);
  check("weight", weight, {N, K}, dtype);
  if (bias_) check("bias", *bias_, {N}, dtype);
  check("lora_A", lora_A, {R, K}, dtype, true);
  check("lora_B", lora_B, {N, R}, dtype, true);
  check_plan(kOp, plan, {packed});
  const DropoutOfCall drop(kOp, dropout_p, seed);

  const NoGrad no_grad;
  Tensor y = empty(x_, {M, N}, dtype), xa = empty(x_, {M, R}, dtype);
  if (M == 0) return {y, xa};
  const DeviceScope scope(x_);
  const Device& device = scope.device();
  const Tensor x = unit_columns(x_);
  const OptionalTensor bias = contiguous(bias_);
  const Adapter adapter{N, R, drop.scale(scale), member, rounded(lora_A, dtype), rounded(lora_B, dtype)};
  with_type(kOp, "x", dtype, [&](auto type) {
    using T = decltype(type);
    project_x<T>(device, x, {adapter}, drop, {xa}, {}, std::nullopt);
    expand_xa<T>(device, xa, adapter, bias, false, y);
  });
  add_product(y, x, torch::stable::transpose(weight, 0, 1));
  return {y, xa};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_cuda(
    const Tensor& dy_, const OptionalTensor& x_, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const OptionalTensor& xa_, const OptionalTensor& seed, const OptionalTensor& mask_A, const OptionalTensor& mask_B,
    double scale, double dropout_p, int64_t member, bool need_dx, bool need_dA, bool need_dB, const std::string& plan,
    const OptionalTensor& packed) {
  check_matrices(kOp, "dy", dy_, lora_A, lora_B);
  const ScalarType dtype = dy_.scalar_type();
  const int64_t M = dy_.size(0), K = lora_A.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check("dy", dy_, {M, N}, dtype);
  check("lora_A", lora_A, {R, K}, dtype, true);
  check("lora_B", lora_B, {N, R}, dtype, true);
  if (need_dx) check("weight", weight, {N, K}, dtype);
  if (mask_A) check("mask_A", *mask_A, {R, K}, ScalarType::Bool);
  if (mask_B) check("mask_B", *mask_B, {N, R}, ScalarType::Bool);
  STD_TORCH_CHECK(!need_dA || x_, kOp, ": x must be given when need_dA, got None");
  STD_TORCH_CHECK(!need_dB || xa_, kOp, ": xa must be given when need_dB, got None");
  if (need_dA) check("x", *x_, {M, K}, dtype);
  if (need_dB) check("xa", *xa_, {M, R}, dtype);
  check_plan(kOp, plan, {packed});
  const DropoutOfCall drop(kOp, need_dx || need_dA ? dropout_p : 0.0, seed);

  const NoGrad no_grad;
  Adapter adapter{N, R, drop.scale(scale), member, lora_A, lora_B};
  const OptionalTensor kept_A = contiguous(mask_A), kept_B = contiguous(mask_B);
  Tensor dlora_A = gradient_like(lora_A, dy_, need_dA, M == 0, kept_A, adapter.dA);
  Tensor dlora_B = gradient_like(lora_B, dy_, need_dB, M == 0, kept_B, adapter.dB);
  Tensor dx = need_dx ? empty(dy_, {M, K}, dtype) : empty(dy_, {0}, dtype);
  if (M == 0) return {dx, dlora_A, dlora_B};

  const DeviceScope scope(dy_);
  const Tensor dy = unit_columns(dy_);
  adapter.A = rounded(lora_A, dtype), adapter.B = rounded(lora_B, dtype);
  if (need_dB) adapter.xa = contiguous(xa_);
  with_type(kOp, "dy", dtype, [&](auto type) {
    backward_passes<decltype(type)>(scope.device(), {dy}, {adapter}, drop, x_, {}, K,
                                    need_dx ? OptionalTensor(dx) : std::nullopt, false);
  });
  if (need_dx) add_product(dx, dy, weight);
  return {dx, dlora_A, dlora_B};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasp, LORASP_DISPATCH_KEY, m) {
  m.impl("lora_linear_fwd_cuda", TORCH_BOX(&lora_linear_forward_cuda));
  m.impl("lora_linear_bwd_cuda", TORCH_BOX(&lora_linear_backward_cuda));
}

}  // namespace lorasp::cuda
