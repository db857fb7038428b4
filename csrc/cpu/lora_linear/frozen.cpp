#include "frozen.h"

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <string_view>

#include "../common/isa.h"

namespace lorasp {
namespace {

using LinearPointwise = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                   std::string_view, c10::List<std::optional<at::Scalar>>,
                                   std::optional<std::string_view>);

// oneDNN's linear on a plain weight; empty where torch was built without it.
const std::optional<c10::TypedOperatorHandle<LinearPointwise>>& onednn_linear() {
  static const auto handle = []() -> std::optional<c10::TypedOperatorHandle<LinearPointwise>> {
    const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!schema) return std::nullopt;
    return schema->typed<LinearPointwise>();
  }();
  return handle;
}

// at::linear in fp32 is MKL's, which is slow on CPUs that are not Intel's (measured: oneDNN 0.9 of its time); on
// Intel's it is the faster one (345 against 310 GFLOP/s). Half precision is oneDNN's either way.
bool prefers_onednn(const at::Tensor& x) {
  static const bool foreign = !cpu_vendor().empty() && cpu_vendor() != "GenuineIntel";
  return foreign && x.scalar_type() == at::kFloat && x.size(0) > 1 && onednn_linear();
}

// The op takes a strided bias for a dense one (seen with torch 2.13).
at::Tensor onednn(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto dense = bias ? std::optional(bias->contiguous()) : bias;
  return onednn_linear()->call(x, weight, dense, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// oneDNN multiplies halves in pairs, on AMX in tiles of 32: of a strided row of another length it also reads what is
// behind the row, times zero, and a NaN there spreads (seen with torch 2.13).
at::Tensor readable(const at::Tensor& rows) {
  return rows.element_size() == 2 && rows.size(1) % 32 != 0 ? rows.contiguous() : rows;
}

}  // namespace

at::Tensor frozen_forward(const at::Tensor& strided, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const at::Tensor x = readable(strided);
  return prefers_onednn(x) ? onednn(x, weight, bias) : at::linear(x, weight, bias);
}

at::Tensor frozen_backward(const at::Tensor& strided, const at::Tensor& weight) {
  const at::Tensor dy = readable(strided);
  return prefers_onednn(dy) ? onednn(dy, weight.t(), std::nullopt) : at::mm(dy, weight);
}

void frozen_backward_add(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& dx) {
  at::Tensor out = dx;
  at::addmm_out(out, dx, readable(dy), weight);
}

}  // namespace lorasp
