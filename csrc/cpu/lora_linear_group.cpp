// lora_linear_group on CPU: lorasp::lora_linear_group_fwd_cpp and lorasp::lora_linear_group_bwd_cpp (schemas in
// lorasp/ops/lora_linear_group.py).
//     xa_i = s_i (D_i o x) A_i^T        y_i = x W_i^T + bias_i + xa_i B_i^T
//     g_i  = s_i dy_i B_i               dx  = sum_i (D_i o (g_i A_i) + dy_i W_i)
//     dB_i = dy_i^T xa_i                dA_i = g_i^T (D_i o x)
// Without dropout the members' A stand one under another and are one factor: one product over x for every xa, one over
// x or x[:, columns] for every dA. With it each member has its own mask, drawn while the rows of x are in cache.
// An A or B that trains in part enters as a whole factor, frozen zeros included (partial.h): gathering dy's scattered
// columns first costs as much as the half width saves (2048 x 2048, r 16, half of the rows, one thread, AMX machine:
// bf16 0.36 ms for 0.31, fp32 2.3 ms for 1.5).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "common/scratch.h"
#include "lora_linear/arguments.h"
#include "lora_linear/frozen.h"
#include "lora_linear/fused.h"
#include "lora_linear/partial.h"
#include "lora_linear/plan.h"

namespace lorasp {
namespace {

constexpr const char* kOp = "lora_linear_group";

struct DrawnMasks {
  c10::SmallVector<Dropout, 4> members;

  DrawnMasks(double dropout_p, const OptionalTensor& seed, at::IntArrayRef counters) {
    for (const int64_t counter : counters) members.emplace_back(kOp, dropout_p, seed, counter);
  }
  const KeepMask* keep(size_t i) const { return members[i].keep(); }
  bool drops() const { return keep(0) != nullptr; }
  float scale(double s) const { return static_cast<float>(s * members[0].rescale); }
};

template <class... Lists>
void check_lengths(size_t count, const Lists&... lists) {
  TORCH_CHECK_VALUE(count > 0 && ((lists.size() == count) && ...), kOp,
                    ": every list must have one item per weight, at least one, got ", count, " weights");
}

bool any(const c10::List<bool>& flags) {
  for (const bool flag : flags)
    if (flag) return true;
  return false;
}

// The group shares one plan: the library streams what is the widest weight.
const GemmKernel* group_plan(std::string_view plan, DType dtype, int64_t M, int64_t K, at::IntArrayRef outputs,
                             const OptionalTensors& packed, bool second_pass) {
  Product product{dtype, M, 0, K, true, second_pass};
  for (size_t i = 0; i < outputs.size(); ++i) {
    product.N = std::max(product.N, outputs[i]);
    product.packed = product.packed && packed.get(i).has_value();
  }
  return plan_kernel(kOp, plan, product);
}

struct GatherRows final : RowVisitor {
  const Columns& columns;
  Tall x;
  void* out;
  DType dtype;

  GatherRows(const Columns& columns, Tall x, void* out, DType dtype) : columns(columns), x(x), out(out), dtype(dtype) {}
  void visit(int64_t first, int64_t rows) const override {
    columns.gather(offset(x.data, first * x.ld, dtype), x.ld, rows, element_size(dtype), 0, columns.width(),
                   offset(out, first * columns.count(), dtype), columns.count());
  }
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> lora_linear_group_forward_cpu(
    const Tensor& x_, at::TensorList weights, const OptionalTensors& biases, at::TensorList lora_As,
    at::TensorList lora_Bs, const OptionalTensors& frozen_As, const OptionalTensors& frozen_Bs,
    const OptionalTensor& columns, const OptionalTensors& rows, const OptionalTensors& entries_A,
    const OptionalTensors& entries_B, const OptionalTensor& seed, at::ArrayRef<double> scales, double dropout_p,
    at::IntArrayRef members, bool keep_columns, std::string_view plan, const OptionalTensors& packed) {
  const PlainDispatch plain;
  const size_t G = weights.size();
  check_lengths(G, biases, lora_As, lora_Bs, frozen_As, frozen_Bs, rows, entries_A, entries_B, scales, members, packed);
  TORCH_CHECK_VALUE(x_.dim() == 2, kOp, ": x must be 2-d, got ", x_.sizes());
  const DType dtype = compute_dtype(kOp, "x", x_);
  const int64_t M = x_.size(0), K = x_.size(1);
  check_tensor(kOp, "x", x_, {M, K}, x_.scalar_type());
  c10::SmallVector<int64_t, 4> outputs;
  for (const Tensor& weight : weights) {
    TORCH_CHECK_VALUE(weight.dim() == 2, kOp, ": weights must be 2-d, got ", weight.sizes());
    outputs.push_back(weight.size(0));
    check_tensor(kOp, "weights", weight, {weight.size(0), K}, x_.scalar_type());
  }
  for (size_t i = 0; i < G; ++i)
    if (const OptionalTensor bias = biases.get(i)) check_tensor(kOp, "biases", *bias, {outputs[i]}, x_.scalar_type());
  Adapters adapters(kOp, {lora_As, lora_Bs, frozen_As, frozen_Bs, columns, rows, entries_A, entries_B}, K, outputs,
                    x_.scalar_type());
  TORCH_CHECK_VALUE(!keep_columns || columns, kOp, ": columns must be given when keep_columns, got None");
  const DrawnMasks masks(dropout_p, seed, members);

  const Tensor x = unit_columns(x_);
  const Columns* kept = keep_columns ? adapters.columns() : nullptr;
  const Tensor x_columns = kept ? at::empty({M, kept->count()}, x.options()) : at::empty({0}, x.options());
  const GemmKernel* fused = group_plan(plan, dtype, M, K, outputs, packed, masks.drops());
  std::vector<Tensor> ys(G), xas(G);
  for (size_t i = 0; i < G; ++i) xas[i] = at::empty({M, adapters[i].R}, x.options());
  if (M == 0) {
    for (size_t i = 0; i < G; ++i) ys[i] = at::empty({M, outputs[i]}, x.options());
    return {ys, xas, x_columns};
  }
  ScratchFrame frame;
  adapters.build_A(frame), adapters.build_B(frame);
  if (fused) {
    std::optional<GatherRows> gather;
    if (kept) gather.emplace(*kept, tall(x), x_columns.mutable_data_ptr(), dtype);
    for (size_t i = 0; i < G; ++i) {
      const Adapter& m = adapters[i];
      const OptionalTensor panels = packed.get(i);
      const Fused f{fused, panels, m.A, m.B, m.R, masks.scale(scales[i]), masks.keep(i)};
      ys[i] = fused_forward(f, x, weights[i], biases.get(i), xas[i].mutable_data_ptr(),
                            gather && i == 0 ? &*gather : nullptr);
    }
    return {ys, xas, x_columns};
  }
  c10::SmallVector<Output, 4> made;
  for (size_t i = 0; i < G; ++i) {
    ys[i] = frozen_forward(x, weights[i], biases.get(i));
    const Adapter& m = adapters[i];
    made.push_back({m.R, m.N, masks.scale(scales[i]), xas[i].mutable_data_ptr(), m.B, tall(ys[i])});
  }
  c10::SmallVector<Projection, 4> projections;
  if (masks.drops()) {
    for (size_t i = 0; i < G; ++i) projections.push_back({adapters[i].R, adapters[i].A, masks.keep(i), made[i]});
  } else {
    projections.push_back({adapters.total_rank(), adapters[0].A, nullptr, made});
  }
  forward_pass(dtype, M, K, tall(x), projections, kept, kept ? x_columns.mutable_data_ptr() : nullptr);
  return {ys, xas, x_columns};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_linear_group_backward_cpu(
    at::TensorList dys_, const OptionalTensor& x_, const OptionalTensor& x_columns, at::TensorList weights,
    at::TensorList lora_As, at::TensorList lora_Bs, const OptionalTensors& frozen_As, const OptionalTensors& frozen_Bs,
    const OptionalTensor& columns, const OptionalTensors& rows, const OptionalTensors& entries_A,
    const OptionalTensors& entries_B, const OptionalTensors& xas, const OptionalTensor& seed,
    const OptionalTensors& mask_As, const OptionalTensors& mask_Bs, at::ArrayRef<double> scales, double dropout_p,
    at::IntArrayRef members, int64_t K, bool need_dx, const c10::List<bool>& need_dA, const c10::List<bool>& need_dB,
    std::string_view plan, const OptionalTensors& packed) {
  const PlainDispatch plain;
  const size_t G = dys_.size();
  check_lengths(G, weights, lora_As, lora_Bs, frozen_As, frozen_Bs, rows, entries_A, entries_B, xas, mask_As, mask_Bs,
                scales, members, need_dA, need_dB, packed);
  const DType dtype = compute_dtype(kOp, "dys", dys_[0]);
  const at::ScalarType compute = dys_[0].scalar_type();
  const bool any_dA = any(need_dA), need_any_g = need_dx || any_dA;
  c10::SmallVector<int64_t, 4> outputs;
  for (const Tensor& dy : dys_) {
    TORCH_CHECK_VALUE(dy.dim() == 2, kOp, ": dys must be 2-d, got ", dy.sizes());
    outputs.push_back(dy.size(1));
    check_tensor(kOp, "dys", dy, {dys_[0].size(0), dy.size(1)}, compute);
  }
  const int64_t M = dys_[0].size(0);
  Adapters adapters(kOp, {lora_As, lora_Bs, frozen_As, frozen_Bs, columns, rows, entries_A, entries_B}, K, outputs,
                    compute);
  const OptionalTensor& source = columns ? x_columns : x_;
  const char* source_name = columns ? "x_columns" : "x";
  TORCH_CHECK_VALUE(!any_dA || source, kOp, ": ", source_name, " must be given when need_dA, got None");
  if (any_dA) check_tensor(kOp, source_name, *source, {M, columns ? adapters.columns()->count() : K}, compute);
  const DrawnMasks masks(need_any_g ? dropout_p : 0.0, seed, members);

  const at::TensorOptions options = dys_[0].options();
  std::vector<Tensor> dlora_As(G), dlora_Bs(G), dys(G), kept_xas(G), kept_As(G), kept_Bs(G);
  for (size_t i = 0; i < G; ++i) {
    const Adapter& m = adapters[i];
    if (need_dx) check_tensor(kOp, "weights", weights[i], {m.N, K}, compute);
    TORCH_CHECK_VALUE(!need_dA[i] || !columns || !m.entries_A, kOp,
                      ": entries_A must be None for a member that trains where columns are given");
    TORCH_CHECK_VALUE(!need_dB[i] || xas.get(i), kOp, ": xas must be given when need_dB, got None");
    if (need_dB[i]) check_tensor(kOp, "xas", *xas.get(i), {M, m.R}, compute), kept_xas[i] = xas.get(i)->contiguous();
    const OptionalTensor mask_A = mask_As.get(i), mask_B = mask_Bs.get(i);
    const bool partial_A = m.frozen_A || columns, partial_B = m.entries_B || m.rows;
    TORCH_CHECK_VALUE(!(mask_A && partial_A) && !(mask_B && partial_B), kOp,
                      ": mask_As and mask_Bs must be None where only a part trains");
    if (mask_A) check_tensor(kOp, "mask_As", *mask_A, {m.R, K}, at::kBool), kept_As[i] = mask_A->contiguous();
    if (mask_B) check_tensor(kOp, "mask_Bs", *mask_B, {m.N, m.R}, at::kBool), kept_Bs[i] = mask_B->contiguous();
    dlora_As[i] = need_dA[i] ? adapters.make_dA(i, M == 0) : at::empty({0}, options);
    dlora_Bs[i] = need_dB[i] ? adapters.make_dB(i, M == 0) : at::empty({0}, options);
    dys[i] = unit_columns(dys_[i]);
  }
  Tensor dx = at::empty({0}, options);
  if (need_dx && M == 0) dx = at::empty({M, K}, options);
  if (M == 0) return {dx, dlora_As, dlora_Bs};

  ScratchFrame frame;
  if (need_dx) adapters.build_A(frame);
  if (need_any_g) adapters.build_B(frame);
  // Members that share a mask share one g, side by side, and one pass over x and dx.
  c10::SmallVector<c10::SmallVector<size_t, 4>, 4> units;
  for (size_t i = 0; i < G; ++i) {
    if (!need_dx && !need_dA[i]) continue;
    if (units.empty() || masks.drops()) units.emplace_back();
    units.back().push_back(i);
  }
  c10::SmallVector<Tall, 4> gs(G, Tall{nullptr, 0});
  c10::SmallVector<c10::SmallVector<Slice, 4>, 4> slices(units.size());
  c10::SmallVector<Expansion, 4> expansions;
  for (size_t u = 0; u < units.size(); ++u) {
    int64_t R = 0;
    for (const size_t i : units[u]) R += adapters[i].R;
    void* g = frame.take<char>(M * R * element_size(dtype));
    int64_t first = 0;
    for (const size_t i : units[u]) {
      gs[i] = {offset(g, first, dtype), R};
      first += adapters[i].R;
      slices[u].push_back({adapters[i].R, need_dA[i] ? adapters.gradient_A(i, dlora_As[i], kept_As[i]) : Gradient{}});
    }
    expansions.push_back({R, adapters[units[u][0]].A, masks.keep(units[u][0]), g, slices[u]});
  }

  const GemmKernel* fused = need_dx ? group_plan(plan, dtype, M, K, outputs, packed, masks.drops() || any_dA) : nullptr;
  for (size_t i = 0; i < G; ++i) {
    const Adapter& m = adapters[i];
    const float scale = masks.scale(scales[i]);
    const OptionalTensor panels = packed.get(i);
    if (fused) {
      if (i == 0) dx = at::empty({M, K}, options);
      const Fused f{fused, panels, m.A, m.B, m.R, scale, masks.keep(i)};
      fused_backward(f, dys[i], weights[i], gs[i].data, gs[i].ld, dx, i > 0);
    } else if (need_dx && i == 0) {
      dx = frozen_backward(dys[i], weights[i]);
    } else if (need_dx) {
      frozen_backward_add(dys[i], weights[i], dx);
    }
    const Tall g = fused ? Tall{nullptr, 0} : gs[i];
    if (g.data || need_dB[i])
      dy_pass(dtype, M, m.N, m.R, tall(dys[i]), m.B, scale, g, need_dB[i] ? kept_xas[i].const_data_ptr() : nullptr,
              need_dB[i] ? adapters.gradient_B(i, dlora_Bs[i], kept_Bs[i]) : Gradient{});
  }
  const Tall dx_left = need_dx && !fused ? tall(dx) : Tall{nullptr, 0};
  if (dx_left.data || any_dA) {
    const Tensor x = any_dA ? unit_columns(*source) : Tensor();
    dx_pass(dtype, M, K, dx_left, any_dA ? tall(x) : Tall{nullptr, 0}, expansions,
            any_dA && columns ? adapters.columns() : nullptr);
  }
  return {dx, dlora_As, dlora_Bs};
}

}  // namespace

TORCH_LIBRARY_IMPL(lorasp, CPU, m) {
  m.impl("lora_linear_group_fwd_cpp", &lora_linear_group_forward_cpu);
  m.impl("lora_linear_group_bwd_cpp", &lora_linear_group_backward_cpu);
}

}  // namespace lorasp
