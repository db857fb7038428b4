// partial_adamw on CUDA: lorasp::partial_adamw_cuda (schema in lorasp/ops/partial_adamw.py).
#include "arguments.h"
#include "partial_adamw.cuh"

namespace lorasp::cuda {
namespace {

using Tensors = std::vector<Tensor>;

std::string numbered(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

void check_same_sizes(const std::string& name, const Tensor& t, const Tensor& model) {
  bool same = t.dim() == model.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == model.size(d);
  STD_TORCH_CHECK(same, "partial_adamw: ", name, " must be shaped like its parameter");
}

void check_dtype(const std::string& name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "partial_adamw: ", name, " must have dtype ",
                  torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(t.scalar_type()));
}

Grain grain_of(size_t i, const Tensor& param, const OptionalTensor& active) {
  if (!active) return Grain::kAll;
  STD_TORCH_CHECK(param.dim() == 2 && active->dim() == 2, "partial_adamw: actives[", i,
                  "] must be 2-d beside a 2-d parameter, got ", active->dim(), " beside ", param.dim());
  const int64_t P = param.size(0), Q = param.size(1), p = active->size(0), q = active->size(1);
  STD_TORCH_CHECK((p == 1 || p == P) && (q == 1 || q == Q), "partial_adamw: actives[", i, "] must be (1 or ", P,
                  ", 1 or ", Q, "), got (", p, ", ", q, ")");
  if (p == 1) return q == 1 ? Grain::kAll : Grain::kColumn;
  return q == 1 ? Grain::kRow : Grain::kEntry;
}

// Tensors in one piece: themselves, or copies that give_back() writes back.
class InOnePiece {
 public:
  Tensor operator()(const Tensor& t) {
    if (t.is_contiguous()) return t;
    copies_.push_back({t, torch::stable::contiguous(t)});
    return copies_.back().second;
  }
  void give_back() {
    for (auto& [own, copy] : copies_) torch::stable::copy_(own, copy);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

void partial_adamw_cuda(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                        const Tensors& exp_avg_sqs, const Tensors& steps, const std::vector<OptionalTensor>& actives,
                        double lr, double beta1, double beta2, double eps, double weight_decay) {
  const size_t count = params.size();
  for (const size_t other : {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), steps.size(), actives.size()})
    STD_TORCH_CHECK(other == count,
                    "partial_adamw: params, grads, exp_avgs, exp_avg_sqs, steps and actives must be "
                    "as many, got ",
                    count, " and ", other);
  if (count == 0) return;
  const auto check = [&](const std::string& name, const Tensor& t, ScalarType dtype) {
    STD_TORCH_CHECK(DeviceScope::holds(t) && t.get_device_index() == params[0].get_device_index(),
                    "partial_adamw: ", name, " must be on the ", DeviceScope::kName, " device of params[0]");
    check_dtype(name, t, dtype);
  };
  std::vector<Grain> grains;
  for (size_t i = 0; i < count; ++i) {
    const ScalarType dtype = params[i].scalar_type();
    with_type("partial_adamw", numbered("params", i).c_str(), dtype, [](auto) {});
    check(numbered("params", i), params[i], dtype);
    for (const auto& [name, t] : {std::pair("grads", &grads[i]), std::pair("exp_avgs", &exp_avgs[i]),
                                  std::pair("exp_avg_sqs", &exp_avg_sqs[i])}) {
      check(numbered(name, i), *t, dtype);
      check_same_sizes(numbered(name, i), *t, params[i]);
    }
    grains.push_back(grain_of(i, params[i], actives[i]));
    if (actives[i]) check(numbered("actives", i), *actives[i], ScalarType::Bool);
    check(numbered("steps", i), steps[i], ScalarType::Int);
    STD_TORCH_CHECK(steps[i].numel() == (actives[i] ? actives[i]->numel() : 1), "partial_adamw: steps[", i,
                    "] must be shaped like its active");
  }

  const NoGrad no_grad;
  const DeviceScope scope(params[0]);
  const AdamWHyper hyper = adamw_hyper(lr, beta1, beta2, eps, weight_decay);
  InOnePiece written;
  std::vector<Tensor> alive;
  const auto step = [&](auto type, ScalarType dtype) {
    using T = decltype(type);
    std::vector<AdamWItem<T>> items;
    for (size_t i = 0; i < count; ++i) {
      if (params[i].scalar_type() != dtype) continue;
      const auto kept = [&](const Tensor& t) { return alive.emplace_back(torch::stable::contiguous(t)).data_ptr(); };
      const auto in_place = [&](const Tensor& t) { return alive.emplace_back(written(t)).data_ptr(); };
      AdamWItem<T> item{};
      item.param = static_cast<T*>(in_place(params[i]));
      item.grad = static_cast<const T*>(kept(grads[i]));
      item.exp_avg = static_cast<T*>(in_place(exp_avgs[i]));
      item.exp_avg_sq = static_cast<T*>(in_place(exp_avg_sqs[i]));
      item.steps = static_cast<int32_t*>(in_place(steps[i]));
      item.active = actives[i] ? static_cast<const uint8_t*>(kept(*actives[i])) : nullptr;
      if (actives[i])
        shape_item(item, params[i].size(0), params[i].size(1), grains[i]);
      else
        shape_item(item, 1, params[i].numel(), Grain::kAll);
      items.push_back(item);
    }
    partial_adamw<T>(scope.device(), items.data(), static_cast<int64_t>(items.size()), hyper);
  };
  step(float(), ScalarType::Float);
  step(bf16(), ScalarType::BFloat16);
  step(f16(), ScalarType::Half);
  written.give_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasp, LORASP_DISPATCH_KEY, m) {
  m.impl("partial_adamw_cuda", TORCH_BOX(&partial_adamw_cuda));
}

}  // namespace lorasp::cuda
