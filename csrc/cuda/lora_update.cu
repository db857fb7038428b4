// lora_update on CUDA: lorasp::lora_update_fwd_cuda and lorasp::lora_update_bwd_cuda (schemas in
// lorasp/ops/lora_update.py).
//     xa = s (D o x) A^T            y += xa B^T
//     g  = s dy B                   dx += D o (g A)        dB = dy^T xa        dA = g^T (D o x)
#include "lora_linear_passes.h"

namespace lorasp::cuda {
namespace {

constexpr const char* kUpdateOp = "lora_update";

Tensor lora_update_forward_cuda(Tensor y, const Tensor& x_, const Tensor& lora_A, const Tensor& lora_B,
                                const OptionalTensor& seed, double scale, double dropout_p, int64_t member) {
  check_matrices(kUpdateOp, "x", x_, lora_A, lora_B);
  const ScalarType dtype = x_.scalar_type();
  const int64_t M = x_.size(0), K = x_.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check_tensor(kUpdateOp, "x", x_, {M, K}, dtype);
  check_tensor(kUpdateOp, "y", y, {M, N}, dtype);
  check_tensor(kUpdateOp, "lora_A", lora_A, {R, K}, dtype, true);
  check_tensor(kUpdateOp, "lora_B", lora_B, {N, R}, dtype, true);
  const DropoutOfCall drop(kUpdateOp, dropout_p, seed);

  const NoGrad no_grad;
  Tensor xa = empty(x_, {M, R}, dtype);
  if (M == 0) return xa;
  const DeviceScope scope(x_);
  const Tensor x = unit_columns(x_);
  const Adapter adapter{N, R, drop.scale(scale), member, rounded(lora_A, dtype), rounded(lora_B, dtype)};
  with_type(kUpdateOp, "x", dtype, [&](auto type) {
    using T = decltype(type);
    in_place(kUpdateOp, "y", y, [&](const Tensor& rows) {
      project_x<T>(scope.device(), x, {adapter}, drop, {xa}, {}, std::nullopt);
      expand_xa<T>(scope.device(), xa, adapter, std::nullopt, true, rows);
    });
  });
  return xa;
}

std::tuple<Tensor, Tensor> lora_update_backward_cuda(OptionalTensor dx, const Tensor& dy_, const OptionalTensor& x,
                                                     const Tensor& lora_A, const Tensor& lora_B,
                                                     const OptionalTensor& xa, const OptionalTensor& seed, double scale,
                                                     double dropout_p, int64_t member, bool need_dA, bool need_dB) {
  check_matrices(kUpdateOp, "dy", dy_, lora_A, lora_B);
  const ScalarType dtype = dy_.scalar_type();
  const int64_t M = dy_.size(0), K = lora_A.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check_tensor(kUpdateOp, "dy", dy_, {M, N}, dtype);
  check_tensor(kUpdateOp, "lora_A", lora_A, {R, K}, dtype, true);
  check_tensor(kUpdateOp, "lora_B", lora_B, {N, R}, dtype, true);
  STD_TORCH_CHECK(!need_dA || x, kUpdateOp, ": x must be given when need_dA, got None");
  STD_TORCH_CHECK(!need_dB || xa, kUpdateOp, ": xa must be given when need_dB, got None");
  if (dx) check_tensor(kUpdateOp, "dx", *dx, {M, K}, dtype);
  if (need_dA) check_tensor(kUpdateOp, "x", *x, {M, K}, dtype);
  if (need_dB) check_tensor(kUpdateOp, "xa", *xa, {M, R}, dtype);
  const DropoutOfCall drop(kUpdateOp, dx || need_dA ? dropout_p : 0.0, seed);

  const NoGrad no_grad;
  Adapter adapter{N, R, drop.scale(scale), member, lora_A, lora_B};
  Tensor dlora_A = gradient_like(lora_A, dy_, need_dA, M == 0, std::nullopt, adapter.dA);
  Tensor dlora_B = gradient_like(lora_B, dy_, need_dB, M == 0, std::nullopt, adapter.dB);
  if (M == 0 || !(dx || need_dA || need_dB)) return {dlora_A, dlora_B};

  const DeviceScope scope(dy_);
  const Tensor dy = unit_columns(dy_);
  adapter.A = rounded(lora_A, dtype), adapter.B = rounded(lora_B, dtype);
  if (need_dB) adapter.xa = contiguous(xa);
  with_type(kUpdateOp, "dy", dtype, [&](auto type) {
    const auto passes = [&](const OptionalTensor& rows) {
      backward_passes<decltype(type)>(scope.device(), {dy}, {adapter}, drop, x, {}, K, rows, true);
    };
    if (dx)
      in_place(kUpdateOp, "dx", *dx, passes);
    else
      passes(std::nullopt);
  });
  return {dlora_A, dlora_B};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasp, LORASP_DISPATCH_KEY, m) {
  m.impl("lora_update_fwd_cuda", TORCH_BOX(&lora_update_forward_cuda));
  m.impl("lora_update_bwd_cuda", TORCH_BOX(&lora_update_backward_cuda));
}

}  // namespace lorasp::cuda
