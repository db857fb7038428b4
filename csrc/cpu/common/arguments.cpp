#include "arguments.h"

#include <cmath>

namespace lorasp {

DType compute_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, " must be float32, bfloat16 or float16 for backend cpp, got ",
                       t.scalar_type());
  }
}

void check_tensor(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype,
                  bool fp32_too) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), op, ": ", name, " must be on cpu, got ", t.device());
  TORCH_CHECK_VALUE(t.sizes() == shape, op, ": ", name, " must be ", shape, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype || (fp32_too && t.scalar_type() == at::kFloat), op, ": ", name, " must be ",
                   dtype, ", got ", t.scalar_type());
}

Tensor rounded(const Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t.contiguous() : t.to(dtype, false, false, at::MemoryFormat::Contiguous);
}

Dropout::Dropout(const char* op, double dropout_p, const OptionalTensor& seed, int64_t member) {
  constexpr uint32_t kPurpose = 0;
  const auto t = dropout_p >= 0.0 && dropout_p < 1.0 ? static_cast<uint32_t>(std::nearbyint(dropout_p * 65536)) : 65536;
  TORCH_CHECK_VALUE(t < 65536, op, ": dropout_p must be in [0, 1), got ", dropout_p);
  if (t == 0) return;
  TORCH_CHECK_VALUE(seed.has_value(), op, ": seed must be a 0-d int64 tensor when dropout_p > 0, got None");
  check_tensor(op, "seed", *seed, {}, at::kLong);
  mask = KeepMask{static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), kPurpose, static_cast<uint32_t>(member), t};
  rescale = 65536.0 / (65536.0 - t);
}

}  // namespace lorasp
