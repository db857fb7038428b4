// Arguments that only the operators of LoRA layers have: tall tensors, factors, the dropout's seed.
#pragma once
#include <optional>

#include "../common/arguments.h"
#include "../common/keep_bits.h"
#include "passes.h"

namespace lorasp {

inline Tensor unit_columns(const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1 ? t : t.contiguous(); }

inline Tall tall(const Tensor& t) { return {t.data_ptr(), t.size(0) == 1 ? t.size(1) : t.stride(0)}; }

// A rank-R factor in the compute dtype, contiguous: as it is, or a rounded copy of fp32 masters.
Tensor rounded(const Tensor& t, at::ScalarType dtype);

// A gradient like factor t; (0,) like dy where it is not needed, zeros where dy has no rows.
Tensor gradient_like(const Tensor& t, const Tensor& dy, bool needed);
// Where it stands; nowhere where it is not needed. mask: contiguous or undefined.
Gradient whole_gradient(const Tensor& out, bool needed, const Tensor& mask = Tensor());

struct Dropout {
  std::optional<KeepMask> mask;
  double rescale = 1.0;

  Dropout(const char* op, double dropout_p, const OptionalTensor& seed, int64_t member);
  const KeepMask* keep() const { return mask ? &*mask : nullptr; }
};

}  // namespace lorasp
