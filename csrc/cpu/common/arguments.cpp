#include "arguments.h"

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

}  // namespace lorasp
