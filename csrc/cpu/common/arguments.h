// What every operator's C++ entry point does with its arguments: it checks them and finds the compute dtype.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

#include "dtype.h"

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

}  // namespace lorasp
