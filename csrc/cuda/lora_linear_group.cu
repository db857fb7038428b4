// lora_linear_group on CUDA: lorasp::lora_linear_group_fwd_cuda and lorasp::lora_linear_group_bwd_cuda (schemas in
// lorasp/ops/lora_linear_group.py), plan addmm: the low-rank shares first, the frozen products added by cuBLAS.
//     xa_i = s_i (D_i o x) A_i^T        y_i = x W_i^T + bias_i + xa_i B_i^T
//     g_i  = s_i dy_i B_i               dx  = sum_i (D_i o (g_i A_i) + dy_i W_i)
//     dB_i = dy_i^T xa_i                dA_i = g_i^T (D_i o x)
// One pass over x forms every xa_i and x[:, J], one over x or x[:, J] every dA_i, and one kernel writes all that the
// adapters give to dx; under dropout, where each has a mask of its own, for kMembers of them at a time. Factors that
// train in part are put together at rank-R size. dy_i is read whole: its frozen single features share their sectors
// with trained ones. Indices are never read on the host; they ascend, as lorasp.functional.Partial says.
#include <string>

#include "lora_linear_passes.h"

namespace lorasp::cuda {
namespace {

constexpr const char* kGroupOp = "lora_linear_group";

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

// The operator's factors as they come, one of each per member.
struct FactorArguments {
  const Tensors &lora_As, &lora_Bs;
  const OptionalTensors &frozen_As, &frozen_Bs;
  const OptionalTensor& columns;
  const OptionalTensors &rows, &entries_A, &entries_B;
};

template <class... Lists>
void check_lengths(size_t count, const Lists&... lists) {
  STD_TORCH_CHECK(count > 0 && ((lists.size() == count) && ...), kGroupOp,
                  ": every list must have one item per weight, at least one, got ", count, " weights");
}

void check_member(const char* name, size_t i, const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType dtype,
                  bool fp32_too = false) {
  check_tensor(kGroupOp, (std::string(name) + "[" + std::to_string(i) + "]").c_str(), t, sizes, dtype, fp32_too);
}

Tensor checked_index(const std::string& name, const Tensor& index) {
  check_tensor(kGroupOp, name.c_str(), index, {index.dim() == 1 ? index.size(0) : -1}, ScalarType::Long);
  return torch::stable::contiguous(index);
}

// The members' factors, checked, and whole once they are built.
class Factors {
 public:
  std::vector<Adapter> adapters;
  Columns columns;
  OptionalTensors rows, entries_A, entries_B;  // contiguous

  Factors(const FactorArguments& a, int64_t K, const std::vector<int64_t>& outputs, ScalarType compute)
      : a_(a), K_(K), compute_(compute) {
    if (a.columns) columns.index = checked_index("columns", *a.columns);
    for (size_t i = 0; i < outputs.size(); ++i) add(i, outputs[i]);
  }

  bool partial_A(size_t i) const { return a_.frozen_As[i].has_value(); }
  bool partial_B(size_t i) const { return entries_B[i] || (rows[i] && !whole_B(i)); }
  // Whole, and zero outside of the columns or rows that train.
  bool spreads_A(size_t i) const { return columns.index && !partial_A(i); }
  bool spreads_B(size_t i) const { return rows[i] && !entries_B[i] && whole_B(i); }

  // Sets every member's A and B. stacked: the A lie one under another.
  void build(const Device& device, bool need_A, bool need_B, bool stacked) {
    with_type(kGroupOp, "x", compute_, [&](auto type) {
      using T = decltype(type);
      std::vector<FactorPart<T>> parts;
      OptionalTensor stack;
      int64_t total = 0, before = 0;
      for (const Adapter& m : adapters) total += m.R;
      if (need_A && stacked && adapters.size() > 1) stack = empty(a_.lora_As[0], {total, K_}, compute_);
      for (size_t i = 0; i < adapters.size() && need_A; ++i) {
        Adapter& m = adapters[i];
        const Trains trains = entries_A[i] ? Trains::kEntries : partial_A(i) ? Trains::kColumns : Trains::kWhole;
        if (stack) {
          m.A = torch::stable::narrow(*stack, 0, before, m.R);
          before += m.R;
        } else if (trains == Trains::kWhole) {
          m.A = rounded(a_.lora_As[i], compute_);
          continue;
        } else {
          m.A = empty(a_.lora_As[i], {m.R, K_}, compute_);
        }
        parts.push_back(
            part<T>(trains, a_.lora_As[i], a_.frozen_As[i], entries_A[i] ? entries_A[i] : columns.index, m.A));
      }
      for (size_t i = 0; i < adapters.size() && need_B; ++i) {
        Adapter& m = adapters[i];
        if (!partial_B(i)) {
          m.B = rounded(a_.lora_Bs[i], compute_);
          continue;
        }
        m.B = empty(a_.lora_Bs[i], {m.N, m.R}, compute_);
        parts.push_back(part<T>(entries_B[i] ? Trains::kEntries : Trains::kRows, a_.lora_Bs[i], a_.frozen_Bs[i],
                                entries_B[i] ? entries_B[i] : rows[i], m.B));
      }
      make_factors(device, parts);
    });
  }

  // The positions that gathers and gradients need.
  void find_columns(const Device& device) { columns.position = positions_of(device, *columns.index, K_); }
  void find_rows(const Device& device, size_t i) {
    held_.push_back(positions_of(device, *rows[i], adapters[i].N));
    adapters[i].rows = {static_cast<const int*>(held_.back().data_ptr()), rows[i]->size(0)};
  }

 private:
  FactorArguments a_;
  int64_t K_;
  ScalarType compute_;
  Tensors held_;

  bool whole_B(size_t i) const { return a_.lora_Bs[i].dim() == 2 && a_.lora_Bs[i].size(0) == adapters[i].N; }

  void add(size_t i, int64_t N) {
    const auto check = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
      check_member(name, i, t, sizes, compute_, true);
    };
    const auto index = [&](const char* name, const OptionalTensor& t) -> OptionalTensor {
      if (!t) return std::nullopt;
      return checked_index(std::string(name) + "[" + std::to_string(i) + "]", *t);
    };
    const Tensor& lora_A = a_.lora_As[i];
    const Tensor& whole_A = partial_A(i) ? *a_.frozen_As[i] : lora_A;
    const char* whole_name = partial_A(i) ? "frozen_As" : "lora_As";
    STD_TORCH_CHECK(whole_A.dim() == 2, kGroupOp, ": ", whole_name, "[", i, "] must be (R, K), got ", whole_A.dim(),
                    " dimensions");
    const int64_t R = whole_A.size(0);
    STD_TORCH_CHECK(R > 0 && K_ > 0 && N > 0, kGroupOp, ": ", whole_name, "[", i,
                    "] must be (R, K) with R, K, N >= 1, got (", R, ", ", whole_A.size(1), "), K = ", K_,
                    " and N = ", N);
    adapters.push_back({N, R, 1.0f, 0, lora_A, a_.lora_Bs[i]});
    rows.push_back(index("rows", a_.rows[i]));
    entries_A.push_back(index("entries_A", a_.entries_A[i]));
    entries_B.push_back(index("entries_B", a_.entries_B[i]));
    STD_TORCH_CHECK(!partial_A(i) || entries_A[i] || columns.index, kGroupOp, ": frozen_As[", i,
                    "] must come with columns or entries_A");
    STD_TORCH_CHECK(partial_A(i) || !entries_A[i], kGroupOp, ": entries_A[", i, "] must come with frozen_As");
    if (partial_A(i)) check("frozen_As", *a_.frozen_As[i], {R, K_});
    if (entries_A[i])
      check("lora_As", lora_A, {entries_A[i]->size(0)});
    else
      check("lora_As", lora_A, {R, partial_A(i) ? columns.index->size(0) : K_});
    if (a_.frozen_Bs[i]) check("frozen_Bs", *a_.frozen_Bs[i], {N, R});
    if (entries_B[i])
      check("lora_Bs", a_.lora_Bs[i], {entries_B[i]->size(0)});
    else
      check("lora_Bs", a_.lora_Bs[i], {partial_B(i) ? rows[i]->size(0) : N, R});
  }

  template <class T>
  FactorPart<T> part(Trains trains, const Tensor& lora, const OptionalTensor& frozen, const OptionalTensor& index,
                     const Tensor& out) {
    const auto stored = [&](const Tensor& t) {
      held_.push_back(torch::stable::contiguous(t));
      return Stored{held_.back().data_ptr(), t.scalar_type() == ScalarType::Float};
    };
    const bool whole = trains == Trains::kWhole;
    return {trains,
            stored(lora),
            !whole && frozen ? stored(*frozen) : Stored{nullptr, false},
            whole ? nullptr : data<const int64_t>(index),
            whole ? 0 : index->size(0),
            out.size(0),
            out.size(1),
            static_cast<T*>(out.data_ptr())};
  }
};

std::tuple<Tensors, Tensors, Tensor> lora_linear_group_forward_cuda(
    const Tensor& x_, const Tensors& weights, const OptionalTensors& biases, const Tensors& lora_As,
    const Tensors& lora_Bs, const OptionalTensors& frozen_As, const OptionalTensors& frozen_Bs,
    const OptionalTensor& columns, const OptionalTensors& rows, const OptionalTensors& entries_A,
    const OptionalTensors& entries_B, const OptionalTensor& seed, const std::vector<double>& scales, double dropout_p,
    const std::vector<int64_t>& members, bool keep_columns, const std::string& plan, const OptionalTensors& packed) {
  const size_t G = weights.size();
  check_lengths(G, biases, lora_As, lora_Bs, frozen_As, frozen_Bs, rows, entries_A, entries_B, scales, members, packed);
  STD_TORCH_CHECK(x_.dim() == 2, kGroupOp, ": x must be 2-d, got ", x_.dim());
  const ScalarType dtype = x_.scalar_type();
  const int64_t M = x_.size(0), K = x_.size(1);
  check_tensor(kGroupOp, "x", x_, {M, K}, dtype);
  std::vector<int64_t> outputs;
  for (size_t i = 0; i < G; ++i) {
    outputs.push_back(weights[i].dim() == 2 ? weights[i].size(0) : -1);
    check_member("weights", i, weights[i], {outputs[i], K}, dtype);
    if (biases[i]) check_member("biases", i, *biases[i], {outputs[i]}, dtype);
  }
  check_plan(kGroupOp, plan, packed);
  STD_TORCH_CHECK(!keep_columns || columns, kGroupOp, ": columns must be given when keep_columns, got None");
  const DropoutOfCall drop(kGroupOp, dropout_p, seed);

  const NoGrad no_grad;
  Factors factors({lora_As, lora_Bs, frozen_As, frozen_Bs, columns, rows, entries_A, entries_B}, K, outputs, dtype);
  Tensors ys, xas;
  for (size_t i = 0; i < G; ++i) {
    Adapter& m = factors.adapters[i];
    m.scale = drop.scale(scales[i]), m.member = members[i];
    ys.push_back(empty(x_, {M, m.N}, dtype)), xas.push_back(empty(x_, {M, m.R}, dtype));
  }
  OptionalTensor x_columns;
  if (keep_columns) x_columns = empty(x_, {M, columns->size(0)}, dtype);
  if (M > 0) {
    const DeviceScope scope(x_);
    const Device& device = scope.device();
    const Tensor x = unit_columns(x_);
    factors.build(device, true, true, !drop.drops());
    if (keep_columns) factors.find_columns(device);
    with_type(kGroupOp, "x", dtype, [&](auto type) {
      using T = decltype(type);
      project_x<T>(device, x, factors.adapters, drop, xas, factors.columns, x_columns);
      for (size_t i = 0; i < G; ++i) {
        expand_xa<T>(device, xas[i], factors.adapters[i], contiguous(biases[i]), false, ys[i]);
        add_product(ys[i], x, torch::stable::transpose(weights[i], 0, 1));
      }
    });
  }
  return {ys, xas, x_columns ? *x_columns : empty(x_, {0}, dtype)};
}

std::tuple<Tensor, Tensors, Tensors> lora_linear_group_backward_cuda(
    const Tensors& dys_, const OptionalTensor& x, const OptionalTensor& x_columns, const Tensors& weights,
    const Tensors& lora_As, const Tensors& lora_Bs, const OptionalTensors& frozen_As, const OptionalTensors& frozen_Bs,
    const OptionalTensor& columns, const OptionalTensors& rows, const OptionalTensors& entries_A,
    const OptionalTensors& entries_B, const OptionalTensors& xas, const OptionalTensor& seed,
    const OptionalTensors& mask_As, const OptionalTensors& mask_Bs, const std::vector<double>& scales, double dropout_p,
    const std::vector<int64_t>& members, int64_t K, bool need_dx, const std::vector<bool>& need_dA,
    const std::vector<bool>& need_dB, const std::string& plan, const OptionalTensors& packed) {
  const size_t G = dys_.size();
  check_lengths(G, weights, lora_As, lora_Bs, frozen_As, frozen_Bs, rows, entries_A, entries_B, xas, mask_As, mask_Bs,
                scales, members, need_dA, need_dB, packed);
  const ScalarType dtype = dys_[0].scalar_type();
  const int64_t M = dys_[0].dim() == 2 ? dys_[0].size(0) : -1;
  std::vector<int64_t> outputs;
  bool any_dA = false;
  for (size_t i = 0; i < G; ++i) {
    outputs.push_back(dys_[i].dim() == 2 ? dys_[i].size(1) : -1);
    check_member("dys", i, dys_[i], {M, outputs[i]}, dtype);
    if (need_dx) check_member("weights", i, weights[i], {outputs[i], K}, dtype);
    any_dA = any_dA || need_dA[i];
  }
  check_plan(kGroupOp, plan, packed);
  const OptionalTensor& source = columns ? x_columns : x;
  const char* source_name = columns ? "x_columns" : "x";
  STD_TORCH_CHECK(!any_dA || source, kGroupOp, ": ", source_name, " must be given when need_dA, got None");
  if (any_dA) check_tensor(kGroupOp, source_name, *source, {M, columns ? columns->size(0) : K}, dtype);
  const DropoutOfCall drop(kGroupOp, need_dx || any_dA ? dropout_p : 0.0, seed);

  const NoGrad no_grad;
  Factors factors({lora_As, lora_Bs, frozen_As, frozen_Bs, columns, rows, entries_A, entries_B}, K, outputs, dtype);
  const DeviceScope scope(dys_[0]);
  const Device& device = scope.device();
  Tensors dlora_As, dlora_Bs, dys;
  OptionalTensors kept;
  bool spreads = false;
  const bool no_columns = columns && columns->size(0) == 0;
  for (size_t i = 0; i < G; ++i) {
    Adapter& m = factors.adapters[i];
    m.scale = drop.scale(scales[i]), m.member = members[i];
    STD_TORCH_CHECK(!need_dA[i] || !columns || !entries_A[i], kGroupOp,
                    ": entries_A must be None for a member that trains where columns are given");
    STD_TORCH_CHECK(!need_dB[i] || xas[i], kGroupOp, ": xas must be given when need_dB, got None");
    STD_TORCH_CHECK(!(mask_As[i] && (frozen_As[i] || columns)) && !(mask_Bs[i] && (rows[i] || entries_B[i])), kGroupOp,
                    ": mask_As and mask_Bs must be None where only a part trains");
    if (mask_As[i]) check_member("mask_As", i, *mask_As[i], {m.R, K}, ScalarType::Bool);
    if (mask_Bs[i]) check_member("mask_Bs", i, *mask_Bs[i], {m.N, m.R}, ScalarType::Bool);
    if (need_dB[i]) check_member("xas", i, *xas[i], {M, m.R}, dtype), m.xa = contiguous(xas[i]);
    kept.push_back(contiguous(mask_As[i]));
    dlora_As.push_back(gradient_like(lora_As[i], dys_[i], need_dA[i], M == 0 || no_columns, kept.back(), m.dA));
    kept.push_back(contiguous(mask_Bs[i]));
    dlora_Bs.push_back(gradient_like(lora_Bs[i], dys_[i], need_dB[i], M == 0, kept.back(), m.dB));
    dys.push_back(unit_columns(dys_[i]));
    spreads = spreads || (need_dA[i] && factors.spreads_A(i));
  }
  Tensor dx = need_dx ? empty(dys[0], {M, K}, dtype) : empty(dys[0], {0}, dtype);
  if (M == 0) return {dx, dlora_As, dlora_Bs};

  factors.build(device, need_dx, need_dx || any_dA, !drop.drops());
  if (spreads) factors.find_columns(device);
  for (size_t i = 0; i < G; ++i) {
    Adapter& m = factors.adapters[i];
    select_entries(m.dA, factors.entries_A[i]), select_entries(m.dB, factors.entries_B[i]);
    if (m.dA.out && factors.spreads_A(i)) m.dA.position = data<const int>(factors.columns.position), m.dA.extent = K;
    if (!m.dB.out || factors.entries_B[i] || !factors.rows[i]) continue;
    factors.find_rows(device, i);
    if (factors.spreads_B(i)) m.dB.position = m.rows.position, m.dB.extent = m.N;
  }
  with_type(kGroupOp, "dys", dtype, [&](auto type) {
    backward_passes<decltype(type)>(device, dys, factors.adapters, drop, source, factors.columns, K,
                                    need_dx ? OptionalTensor(dx) : std::nullopt, false);
  });
  for (size_t i = 0; i < G && need_dx; ++i) add_product(dx, dys[i], weights[i]);
  return {dx, dlora_As, dlora_Bs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasp, LORASP_DISPATCH_KEY, m) {
  m.impl("lora_linear_group_fwd_cuda", TORCH_BOX(&lora_linear_group_forward_cuda));
  m.impl("lora_linear_group_bwd_cuda", TORCH_BOX(&lora_linear_group_backward_cuda));
}

}  // namespace lorasp::cuda
