// consistency on CUDA: lorasp::consistency_fwd_cuda, consistency_bwd_cuda and consistency_replace_cuda (schemas in
// lorasp/ops/consistency.py). P = softmax(logits), Q = softmax(other):
//     kl = (KL(P|Q) + KL(Q|P)) / 2          js = KL(P|Q)
#include "consistency_launch.cuh"
#include "rows.h"

namespace lorasp::cuda {
namespace {

constexpr const char* kConsistencyOp = "consistency";

bool is_symmetric(const std::string& kind) {
  STD_TORCH_CHECK(kind == "kl" || kind == "js", kConsistencyOp, ": kind must be one of kl, js, got ", kind);
  return kind == "kl";
}

void check_pair(const Tensor& logits, const Tensor& other, const OptionalTensor& mask) {
  check_three_dimensional(kConsistencyOp, "logits", logits, "(B, T, V)");
  const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2);
  STD_TORCH_CHECK(V > 0 && B * T <= INT32_MAX, kConsistencyOp,
                  ": logits must be (B, T, V) with V >= 1 and B T < 2^31, got (", B, ", ", T, ", ", V, ")");
  check_tensor(kConsistencyOp, "logits", logits, {B, T, V}, logits.scalar_type());
  check_tensor(kConsistencyOp, "other", other, {B, T, V}, logits.scalar_type());
  if (mask) check_tensor(kConsistencyOp, "mask", *mask, {B, T}, ScalarType::Bool);
}

template <class T>
LogitRows<T> rows_of(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(1)};
}
template <class T>
LogitRows<T> rows_of(const OptionalTensor& t) {
  return t ? rows_of<T>(*t) : LogitRows<T>{};
}

std::tuple<Tensor, Tensor> consistency_forward_cuda(const Tensor& logits, const Tensor& other,
                                                    const OptionalTensor& mask_, const std::string& kind) {
  check_pair(logits, other, mask_);
  const bool symmetric = is_symmetric(kind);
  const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2);
  const NoGrad no_grad;
  Tensor rows = empty(logits, {B, T}, ScalarType::Float), stats = empty(logits, {B, T, kStats}, ScalarType::Float);
  with_type(kConsistencyOp, "logits", logits.scalar_type(), [&](auto type) {
    using X = decltype(type);
    if (B * T == 0) return;
    const DeviceScope scope(logits);
    const Device& device = scope.device();
    const Tensor a = unit_rows(logits), b = unit_rows(other);
    const OptionalTensor mask = contiguous(mask_);
    const Tensor workspace = empty(logits, {consistency_workspace<X>(device, B * T, V)}, ScalarType::Float);
    consistency_forward<X>(device, B, T, V, rows_of<const X>(a), rows_of<const X>(b),
                           {data<const uint8_t>(mask), symmetric, static_cast<float*>(rows.data_ptr()),
                            static_cast<float*>(stats.data_ptr())},
                           static_cast<float*>(workspace.data_ptr()));
  });
  return {rows, stats};
}

// da, db: (B, T, V) with unit stride in the row, or not needed.
void gradients(const Tensor& drows_, const Tensor& logits, const Tensor& other, const Tensor& stats_,
               const OptionalTensor& mask_, const std::string& kind, const OptionalTensor& da,
               const OptionalTensor& db) {
  const bool symmetric = is_symmetric(kind);
  const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2);
  check_tensor(kConsistencyOp, "drows", drows_, {B, T}, ScalarType::Float);
  check_tensor(kConsistencyOp, "stats", stats_, {B, T, kStats}, ScalarType::Float);
  with_type(kConsistencyOp, "logits", logits.scalar_type(), [&](auto type) {
    using X = decltype(type);
    if (B * T == 0 || (!da && !db)) return;
    const DeviceScope scope(logits);
    const Tensor a = unit_rows(logits), b = unit_rows(other);
    const Tensor drows = torch::stable::contiguous(drows_), stats = torch::stable::contiguous(stats_);
    const OptionalTensor mask = contiguous(mask_);
    consistency_backward<X>(scope.device(), B, T, V,
                            {rows_of<const X>(a),
                             rows_of<const X>(b),
                             rows_of<X>(da),
                             rows_of<X>(db),
                             {},
                             {},
                             0,
                             0,
                             static_cast<const float*>(drows.data_ptr()),
                             static_cast<const float*>(stats.data_ptr()),
                             data<const uint8_t>(mask),
                             symmetric});
  });
}

std::tuple<Tensor, Tensor> consistency_backward_cuda(const Tensor& drows, const Tensor& logits, const Tensor& other,
                                                     const Tensor& stats, const OptionalTensor& mask,
                                                     const std::string& kind, bool need_dlogits, bool need_dother) {
  check_pair(logits, other, mask);
  const NoGrad no_grad;
  const auto gradient = [&](bool needed) {
    return empty(logits, needed ? sizes_of(logits) : std::vector<int64_t>{0}, logits.scalar_type());
  };
  Tensor dlogits = gradient(need_dlogits), dother = gradient(need_dother);
  gradients(drows, logits, other, stats, mask, kind, need_dlogits ? OptionalTensor(dlogits) : std::nullopt,
            need_dother ? OptionalTensor(dother) : std::nullopt);
  return {dlogits, dother};
}

void consistency_replace_cuda(const Tensor& drows, const Tensor& logits, const Tensor& other, const Tensor& stats,
                              const OptionalTensor& mask, const std::string& kind, bool need_dlogits,
                              bool need_dother) {
  check_pair(logits, other, mask);
  for (const Tensor& t : {logits, other})
    STD_TORCH_CHECK(t.size(2) == 1 || t.stride(2) == 1, kConsistencyOp,
                    ": rows to be replaced must have unit stride, got stride ", t.stride(2));
  const NoGrad no_grad;
  gradients(drows, logits, other, stats, mask, kind, need_dlogits ? OptionalTensor(logits) : std::nullopt,
            need_dother ? OptionalTensor(other) : std::nullopt);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasp, LORASP_DISPATCH_KEY, m) {
  m.impl("consistency_fwd_cuda", TORCH_BOX(&consistency_forward_cuda));
  m.impl("consistency_bwd_cuda", TORCH_BOX(&consistency_backward_cuda));
  m.impl("consistency_replace_cuda", TORCH_BOX(&consistency_replace_cuda));
}

}  // namespace lorasp::cuda
