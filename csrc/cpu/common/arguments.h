// What every operator's C++ entry point does with its arguments: checks them, brings them into the compute dtype, reads
// the dropout's seed.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

#include "passes.h"

namespace lorasp {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Below autograd and autocast: neither a graph nor a cast, whatever the caller's modes are.
struct PlainDispatch {
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// fp32, bf16 or fp16; throws for other dtypes. `op` begins every message.
DType compute_dtype(const char* op, const char* name, const Tensor& t);

void check_tensor(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype,
                  bool fp32_too = false);

inline Tensor unit_columns(const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1 ? t : t.contiguous(); }

inline Tall tall(const Tensor& t) { return {t.data_ptr(), t.size(0) == 1 ? t.size(1) : t.stride(0)}; }

// A rank-R factor in the compute dtype, contiguous: as it is, or a rounded copy of fp32 masters.
Tensor rounded(const Tensor& t, at::ScalarType dtype);

struct Dropout {
  std::optional<KeepMask> mask;
  double rescale = 1.0;

  Dropout(const char* op, double dropout_p, const OptionalTensor& seed, int64_t member);
  const KeepMask* keep() const { return mask ? &*mask : nullptr; }
};

}  // namespace lorasp
