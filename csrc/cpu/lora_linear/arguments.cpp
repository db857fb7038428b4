#include "arguments.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace lorasp {

Tensor rounded(const Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t.contiguous() : t.to(dtype, false, false, at::MemoryFormat::Contiguous);
}

Tensor gradient_like(const Tensor& t, const Tensor& dy, bool needed) {
  if (!needed) return at::empty({0}, dy.options());
  return dy.size(0) == 0 ? at::zeros(t.sizes(), t.options()) : at::empty(t.sizes(), t.options());
}

Gradient whole_gradient(const Tensor& out, bool needed, const Tensor& mask) {
  Gradient g;
  if (!needed) return g;
  g.data = out.mutable_data_ptr(), g.fp32 = out.scalar_type() == at::kFloat;
  g.mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  return g;
}

Dropout::Dropout(const char* op, double dropout_p, const OptionalTensor& seed, int64_t member) {
  const uint32_t t = drop_threshold(dropout_p);
  TORCH_CHECK_VALUE(t < 65536, op, ": dropout_p must be in [0, 1), got ", dropout_p);
  if (t == 0) return;
  TORCH_CHECK_VALUE(seed.has_value(), op, ": seed must be a 0-d int64 tensor when dropout_p > 0, got None");
  check_tensor(op, "seed", *seed, {}, at::kLong);
  mask = KeepMask{static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), kPurposeLoRADropout,
                  static_cast<uint32_t>(member), t};
  rescale = 65536.0 / (65536.0 - t);
}

}  // namespace lorasp
