// lora_linear on CPU: lorasp::lora_linear_fwd_cpp and lorasp::lora_linear_bwd_cpp (schemas in
// lorasp/ops/lora_linear.py).
//     xa = s (D o x) A^T            y  = x W^T + bias + xa B^T
//     g  = s dy B                   dx = D o (g A) + dy W        dB = dy^T xa        dA = g^T (D o x)
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cmath>

#include "frozen.h"
#include "fused.h"
#include "isa.h"
#include "passes.h"
#include "scratch.h"

namespace lorasp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Below autograd and autocast: neither a graph nor a cast, whatever the caller's modes are.
struct PlainDispatch {
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

DType compute_dtype(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      TORCH_CHECK_TYPE(false, "lora_linear: ", name, " must be float32, bfloat16 or float16 for backend cpp, got ",
                       t.scalar_type());
  }
}

void check(const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype, bool fp32_too = false) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), "lora_linear: ", name, " must be on cpu, got ", t.device());
  TORCH_CHECK_VALUE(t.sizes() == shape, "lora_linear: ", name, " must be ", shape, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype || (fp32_too && t.scalar_type() == at::kFloat), "lora_linear: ", name,
                   " must be ", dtype, ", got ", t.scalar_type());
}

// The tile of plan `fused` if that is the plan of this call, nullptr for plan `addmm`.
const GemmKernel* plan_kernel(std::string_view plan, DType dtype, int64_t M, bool packed, bool second_pass,
                              int64_t weight_elements) {
  TORCH_CHECK_VALUE(plan == "auto" || plan == "addmm" || plan == "fused",
                    "lora_linear: plan must be auto, addmm or fused for backend cpp, got ", plan);
  // Few rows of a weight that no cache holds: packing it on the way would double its traffic.
  const bool streams_weight = !packed && M < 64 && weight_elements > (int64_t{2} << 20);
  if (plan == "addmm" || (plan == "auto" && (streams_weight || !fused_wins(dtype, M, packed, second_pass))))
    return nullptr;
  const GemmKernel* kernel = fused_kernel(dtype);
  TORCH_CHECK_VALUE(kernel, "lora_linear: plan fused has no kernel for this dtype on this CPU (instruction set ",
                    active_isa_name(), "); use auto or addmm");
  return kernel;
}

Tensor unit_columns(const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1 ? t : t.contiguous(); }

Tall tall(const Tensor& t) { return {t.data_ptr(), t.size(0) == 1 ? t.size(1) : t.stride(0)}; }

// A rank-R factor in the compute dtype, contiguous: as it is, or a rounded copy of fp32 masters.
class Rounded {
 public:
  Rounded(const Tensor& t, const Tensor& like)
      : held_(t.scalar_type() == like.scalar_type()
                  ? t.contiguous()
                  : t.to(like.scalar_type(), false, false, at::MemoryFormat::Contiguous)) {}
  const void* data() const { return held_.const_data_ptr(); }

 private:
  Tensor held_;
};

uint32_t threshold(double dropout_p) { return static_cast<uint32_t>(std::nearbyint(dropout_p * 65536)); }

struct Dropout {
  std::optional<KeepMask> mask;
  double rescale = 1.0;

  Dropout(double dropout_p, const OptionalTensor& seed, int64_t member) {
    constexpr uint32_t kPurpose = 0;
    TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p < 1.0 && threshold(dropout_p) < 65536,
                      "lora_linear: dropout_p must be in [0, 1), got ", dropout_p);
    const uint32_t t = threshold(dropout_p);
    if (t == 0) return;
    TORCH_CHECK_VALUE(seed.has_value(), "lora_linear: seed must be a 0-d int64 tensor when dropout_p > 0, got None");
    check("seed", *seed, {}, at::kLong);
    mask =
        KeepMask{static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), kPurpose, static_cast<uint32_t>(member), t};
    rescale = 65536.0 / (65536.0 - t);
  }
  const KeepMask* keep() const { return mask ? &*mask : nullptr; }
};

std::tuple<Tensor, Tensor> lora_linear_forward_cpu(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias,
                                                   const Tensor& lora_A, const Tensor& lora_B,
                                                   const OptionalTensor& seed, double scale, double dropout_p,
                                                   int64_t member, std::string_view plan,
                                                   const OptionalTensor& packed) {
  const PlainDispatch plain;
  TORCH_CHECK_VALUE(x_.dim() == 2 && lora_A.dim() == 2 && lora_B.dim() == 2,
                    "lora_linear: x, lora_A and lora_B must be 2-d, got ", x_.sizes(), ", ", lora_A.sizes(), ", ",
                    lora_B.sizes());
  const DType dtype = compute_dtype("x", x_);
  const int64_t M = x_.size(0), K = x_.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check("x", x_, {M, K}, x_.scalar_type());
  check("weight", weight, {N, K}, x_.scalar_type());
  if (bias) check("bias", *bias, {N}, x_.scalar_type());
  check("lora_A", lora_A, {R, K}, x_.scalar_type(), true);
  check("lora_B", lora_B, {N, R}, x_.scalar_type(), true);
  const Dropout dropout(dropout_p, seed, member);

  const Tensor x = unit_columns(x_);
  const GemmKernel* fused = plan_kernel(plan, dtype, M, packed.has_value(), dropout.keep() != nullptr, N * K);
  Tensor xa = at::empty({M, R}, x.options());
  if (M == 0) return {at::empty({M, N}, x.options()), xa};
  const Rounded a(lora_A, x), b(lora_B, x);
  const LowRank p{dtype, M, K, N, R, a.data(), b.data(), dropout.keep()};
  const float xa_scale = static_cast<float>(scale * dropout.rescale);
  if (fused) {
    const Fused f{fused, packed, a.data(), b.data(), R, xa_scale, p.keep};
    return {fused_forward(f, x, weight, bias, xa.mutable_data_ptr()), xa};
  }
  Tensor y = frozen_forward(x, weight, bias);
  forward_pass(p, tall(x), tall(y), xa_scale, xa.mutable_data_ptr());
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
  const DType dtype = compute_dtype("dy", dy_);
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
  const Dropout dropout(need_g ? dropout_p : 0.0, seed, member);

  const auto gradient_like = [&](const Tensor& t, bool needed) {
    if (!needed) return at::empty({0}, dy_.options());
    return M == 0 ? at::zeros(t.sizes(), t.options()) : at::empty(t.sizes(), t.options());
  };
  const Tensor dy = unit_columns(dy_);
  Tensor dlora_A = gradient_like(lora_A, need_dA), dlora_B = gradient_like(lora_B, need_dB);
  Tensor dx = need_dx && M == 0 ? at::empty({M, K}, dy.options()) : at::empty({0}, dy.options());
  if (M == 0) return {dx, dlora_A, dlora_B};

  const Rounded a(lora_A, dy), b(lora_B, dy);
  const LowRank p{dtype, M, K, N, R, a.data(), b.data(), dropout.keep()};
  const Tensor xa = need_dB ? xa_->contiguous() : Tensor(), x = need_dA ? unit_columns(*x_) : Tensor();
  const Tensor kept_A = mask_A && need_dA ? mask_A->contiguous() : Tensor();
  const Tensor kept_B = mask_B && need_dB ? mask_B->contiguous() : Tensor();
  const auto gradient = [](const Tensor& out, bool needed, const Tensor& mask) -> Gradient {
    if (!needed) return {nullptr, false, nullptr};
    return {out.mutable_data_ptr(), out.scalar_type() == at::kFloat,
            mask.defined() ? mask.const_data_ptr<bool>() : nullptr};
  };
  ScratchFrame frame;
  void* g = need_g ? frame.take<char>(M * R * dy.element_size()) : nullptr;
  const float g_scale = static_cast<float>(scale * dropout.rescale);
  const Tall x_rows = need_dA ? tall(x) : Tall{nullptr, 0};
  const GemmKernel* fused =
      need_dx ? plan_kernel(plan, dtype, M, packed.has_value(), dropout.keep() || need_dA, N * K) : nullptr;
  if (fused) {
    dx = fused_backward({fused, packed, a.data(), b.data(), R, g_scale, p.keep}, dy, weight, g);
    if (need_dB) dy_pass(p, tall(dy), xa.const_data_ptr(), g_scale, nullptr, gradient(dlora_B, need_dB, kept_B));
    if (need_dA) dx_pass(p, x_rows, g, {nullptr, 0}, gradient(dlora_A, need_dA, kept_A));
    return {dx, dlora_A, dlora_B};
  }
  if (need_dx) dx = frozen_backward(dy, weight);
  if (need_g || need_dB)
    dy_pass(p, tall(dy), need_dB ? xa.const_data_ptr() : nullptr, g_scale, g, gradient(dlora_B, need_dB, kept_B));
  if (need_g) dx_pass(p, x_rows, g, need_dx ? tall(dx) : Tall{nullptr, 0}, gradient(dlora_A, need_dA, kept_A));
  return {dx, dlora_A, dlora_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(lorasp, CPU, m) {
  m.impl("lora_linear_fwd_cpp", &lora_linear_forward_cpu);
  m.impl("lora_linear_bwd_cpp", &lora_linear_backward_cpu);
}

}  // namespace lorasp
