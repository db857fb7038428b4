#include "arguments.h"

namespace lorasp {

Tensor rounded(const Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t.contiguous() : t.to(dtype, false, false, at::MemoryFormat::Contiguous);
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
