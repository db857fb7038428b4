// hidden_cut on CUDA: lorasp::hidden_cut_fwd_cuda and lorasp::hidden_cut_bwd_cuda (schemas in
// lorasp/ops/hidden_cut.py).
//     y = residual + D o x          dx = D o dy
#include "hidden_cut.cuh"
#include "rows.h"

namespace lorasp::cuda {
namespace {

constexpr const char* kHiddenCutOp = "hidden_cut";

DType dtype_of(const char* name, ScalarType dtype) {
  DType found{};
  with_type(kHiddenCutOp, name, dtype, [&](auto type) {
    using T = decltype(type);
    found = std::is_same_v<T, float> ? DType::kF32 : std::is_same_v<T, bf16> ? DType::kBF16 : DType::kF16;
  });
  return found;
}

CutPattern pattern_of(const std::string& pattern) {
  if (pattern == "element") return CutPattern::kElement;
  if (pattern == "column") return CutPattern::kColumn;
  STD_TORCH_CHECK(pattern == "span", kHiddenCutOp, ": pattern must be one of element, column, span, got ", pattern);
  return CutPattern::kSpan;
}

CutOperand operand(const Tensor& t, DType dtype) {
  return {t.data_ptr(), dtype, t.stride(0), t.stride(1), t.is_contiguous()};
}

// residual + D o x in `dtype`. name: x's.
Tensor cut(const char* name, const Tensor& x_, const OptionalTensor& residual_, const Tensor& seed, double p,
           const std::string& pattern_, ScalarType dtype) {
  check_three_dimensional(kHiddenCutOp, name, x_, "(B, S, F)");
  const CutShape shape{x_.size(0), x_.size(1), x_.size(2)};
  check_tensor(kHiddenCutOp, name, x_, {shape.B, shape.S, shape.F}, x_.scalar_type());
  if (residual_)
    check_tensor(kHiddenCutOp, "residual", *residual_, {shape.B, shape.S, shape.F}, residual_->scalar_type());
  check_tensor(kHiddenCutOp, "seed", seed, {}, ScalarType::Long);
  const CutPattern pattern = pattern_of(pattern_);
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0 && (pattern == CutPattern::kSpan || drop_threshold(p) < 65536), kHiddenCutOp,
                  ": p must be in [0, 1), got ", p);
  const DType x_dtype = dtype_of(name, x_.scalar_type()), out_dtype = dtype_of("the result", dtype);
  const DType residual_dtype = residual_ ? dtype_of("residual", residual_->scalar_type()) : DType{};
  const NoGrad no_grad;
  Tensor out = empty(x_, sizes_of(x_), dtype);
  const DeviceScope scope(x_);
  const Tensor x = unit_rows(x_);
  const OptionalTensor residual = residual_ ? OptionalTensor(unit_rows(*residual_)) : std::nullopt;
  hidden_cut(scope.device(), shape, operand(x, x_dtype), residual ? operand(*residual, residual_dtype) : CutOperand{},
             out.data_ptr(), out_dtype, pattern, p, static_cast<const int64_t*>(seed.data_ptr()));
  return out;
}

Tensor hidden_cut_forward_cuda(const Tensor& x, const OptionalTensor& residual, const Tensor& seed, double p,
                               const std::string& pattern) {
  const bool one_dtype = !residual || residual->scalar_type() == x.scalar_type();
  return cut("x", x, residual, seed, p, pattern, one_dtype ? x.scalar_type() : ScalarType::Float);
}

Tensor hidden_cut_backward_cuda(const Tensor& dy, const Tensor& seed, double p, const std::string& pattern,
                                ScalarType dtype) {
  return cut("dy", dy, std::nullopt, seed, p, pattern, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasp, LORASP_DISPATCH_KEY, m) {
  m.impl("hidden_cut_fwd_cuda", TORCH_BOX(&hidden_cut_forward_cuda));
  m.impl("hidden_cut_bwd_cuda", TORCH_BOX(&hidden_cut_backward_cuda));
}

}  // namespace lorasp::cuda
