// The passes over x, dy and dx that lora_linear, lora_linear_group and lora_update share, on torch's tensors. Each
// streams one large matrix for every member that it can.
//     xa_i = s_i (D_i o x) A_i^T        g_i = s_i dy_i B_i        dB_i = dy_i^T xa_i        dA_i = g_i^T (D_i o x)
#pragma once
#include "arguments.h"
#include "lora_linear_launch.h"

namespace lorasp::cuda {

inline void check_matrices(const char* op, const char* name, const Tensor& rows, const Tensor& lora_A,
                           const Tensor& lora_B) {
  STD_TORCH_CHECK(rows.dim() == 2 && lora_A.dim() == 2 && lora_B.dim() == 2, op, ": ", name,
                  ", lora_A and lora_B must be 2-d, got ", rows.dim(), ", ", lora_A.dim(), " and ", lora_B.dim());
  STD_TORCH_CHECK(lora_A.size(0) > 0 && lora_A.size(1) > 0 && lora_B.size(0) > 0, op,
                  ": lora_A must be (R, K) and lora_B (N, R) with R, K, N >= 1, got (", lora_A.size(0), ", ",
                  lora_A.size(1), ") and (", lora_B.size(0), ", ", lora_B.size(1), ")");
}

// This backend has one plan, and no layout for packed weights.
inline void check_plan(const char* op, const std::string& plan, const std::vector<OptionalTensor>& packed) {
  STD_TORCH_CHECK(plan == "auto" || plan == "addmm", op, ": plan must be auto or addmm for backend cuda, got ", plan);
  for (const OptionalTensor& p : packed) STD_TORCH_CHECK(!p, op, ": packed must be None for backend cuda");
}

// The dropout of a call, whose members draw from one seed.
struct DropoutOfCall {
  Dropout dropout;
  double rescale = 1.0;

  DropoutOfCall(const char* op, double dropout_p, const OptionalTensor& seed) {
    const uint32_t t = checked_threshold(op, dropout_p);
    if (t == 0) return;
    STD_TORCH_CHECK(seed.has_value(), op, ": seed must be a 0-d int64 tensor when dropout_p > 0, got None");
    check_tensor(op, "seed", *seed, {}, ScalarType::Long);
    dropout = {{0, kPurposeLoRADropout, 0, t}, data<const int64_t>(seed)};
    rescale = 65536.0 / (65536.0 - t);
  }
  bool drops() const { return dropout.keep.threshold > 0; }
  float scale(double s) const { return static_cast<float>(s * rescale); }
};

// One member: its factors (compute dtype, contiguous) and what its backward asks for. Without dropout the A of a group
// lie one under another.
struct [[gnu::visibility("hidden")]] Adapter {
  int64_t N, R;
  float scale;  // with D's factor
  int64_t member;
  Tensor A, B;
  OptionalTensor xa{};  // (M, R), contiguous: for dB
  Gradient dA{}, dB{};
  Selection rows{};  // of dB
  uint32_t word() const { return static_cast<uint32_t>(member); }
};

// The columns of x on which A trains: index (|J|,) int64 and position (K,) int32, both contiguous; or nothing.
struct [[gnu::visibility("hidden")]] Columns {
  OptionalTensor index{}, position{};
  Selection selection() const {
    return position ? Selection{static_cast<const int*>(position->data_ptr()), index->size(0)} : Selection{};
  }
};

// A contiguous factor, which may be the first of several that lie one under another.
template <class T>
Matrix<const T> factor(const Tensor& t) {
  Matrix<const T> m = matrix<const T>(t);
  m.stride = m.cols;
  m.aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * sizeof(T) % 16 == 0;
  return m;
}

inline Tensor positions_of(const Device& device, const Tensor& index, int64_t size) {
  Tensor position = empty(index, {size}, ScalarType::Int);
  find_positions(device, {static_cast<const int64_t*>(index.data_ptr()), index.size(0), size,
                          static_cast<int*>(position.data_ptr())});
  return position;
}

// A matrix with unit column stride as `update` sees it: t itself, or a copy that is written back.
template <class F>
void in_place(const char* op, const char* name, Tensor& t, F&& update) {
  for (int64_t i = 0; i < t.dim(); ++i)
    STD_TORCH_CHECK(t.size(i) <= 1 || t.stride(i) != 0, op, ": ", name,
                    " is written to in place and must not overlap itself, got stride 0");
  Tensor rows = unit_columns(t);
  update(rows);
  if (rows.data_ptr() != t.data_ptr()) torch::stable::copy_(t, rows);
}

// Every xas[i] (M, R) of x (M, K), and x[:, J] into x_columns where it is given.
template <class T>
void project_x(const Device& device, const Tensor& x, const std::vector<Adapter>& adapters, const DropoutOfCall& drop,
               const std::vector<Tensor>& xas, const Columns& columns, const OptionalTensor& x_columns) {
  std::vector<Projection<T>> projections;
  std::vector<int64_t> R;
  for (size_t i = 0; i < adapters.size(); ++i) {
    const Adapter& m = adapters[i];
    projections.push_back({factor<T>(m.A), m.R, m.scale, m.word(), static_cast<T*>(xas[i].data_ptr()), m.R});
    R.push_back(m.R);
  }
  const int64_t floats = project_workspace<T>(device, x.size(0), x.size(1), R, drop.drops());
  const Tensor workspace = empty(x, {floats}, ScalarType::Float);
  project<T>(device, matrix<const T>(x), projections, true, drop.dropout, columns.selection(), data<T>(x_columns),
             static_cast<float*>(workspace.data_ptr()));
}

// y (M, N) = xa B^T + bias, or that added to y.
template <class T>
void expand_xa(const Device& device, const Tensor& xa, const Adapter& m, const OptionalTensor& bias, bool add,
               const Tensor& y) {
  accumulate<T>(device, {{matrix<const T>(xa), factor<T>(m.B), 0}}, false, {}, data<const T>(bias), add, matrix<T>(y));
}

// From one member's dy (M, N): g into g_data, M rows at g_stride, unless it is nullptr, and dB where it is asked for.
template <class T>
void contract_dy(const Device& device, const Tensor& dy, const Adapter& m, T* g_data, int64_t g_stride) {
  const int64_t M = dy.size(0), N = m.N, R = m.R;
  const Selection rows = m.rows.position ? m.rows : Selection{nullptr, N};
  Projection<T> g{};
  if (g_data) g = {factor<T>(m.B), R, m.scale, 0, g_data, g_stride};
  const auto workspace = [&](int64_t floats) { return empty(dy, {floats}, ScalarType::Float); };
  if (g_data && m.dB.out && one_pass_over_dy<T>(M, N, R, rows.count)) {
    const Tensor room = workspace(project_outer_workspace<T>(device, M, N, R));
    project_outer<T>(device, matrix<const T>(dy), g, matrix<const T>(*m.xa), m.rows, m.dB,
                     static_cast<float*>(room.data_ptr()));
    return;
  }
  if (g_data) {
    const Tensor room = workspace(project_workspace<T>(device, M, N, {R}, false));
    project<T>(device, matrix<const T>(dy), {g}, false, {}, {}, nullptr, static_cast<float*>(room.data_ptr()));
  }
  if (m.dB.out) {
    const Tensor room = workspace(outer_workspace<T>(device, M, N, {R}, false));
    outer<T>(device, matrix<const T>(dy), {{matrix<const T>(*m.xa), 0, m.dB}}, false, {}, nullptr, 0, m.rows,
             static_cast<float*>(room.data_ptr()));
  }
}

// Everything of backward but the frozen product: the members' dB and dA where they are asked for, and their low-rank
// share of dx (M, K), or that added to it. x: (M, K), or x[:, J] where `columns` is given.
template <class T>
void backward_passes(const Device& device, const std::vector<Tensor>& dys, const std::vector<Adapter>& adapters,
                     const DropoutOfCall& drop, const OptionalTensor& x, const Columns& columns, int64_t K,
                     const OptionalTensor& dx, bool add) {
  const int64_t M = dys[0].size(0);
  std::vector<size_t> expanded;  // members whose g is needed
  int64_t total = 0;
  for (size_t i = 0; i < adapters.size(); ++i)
    if (dx || adapters[i].dA.out) expanded.push_back(i), total += adapters[i].R;
  // Side by side in one matrix where one mask serves all, else each on its own.
  std::vector<Tensor> g;
  std::vector<Matrix<const T>> gs;
  int64_t before = 0;
  for (const size_t i : expanded) {
    const bool apart = drop.drops() || g.empty();
    if (apart) g.push_back(empty(dys[0], {M, drop.drops() ? adapters[i].R : total}, dys[0].scalar_type()));
    Matrix<const T> h = matrix<const T>(g.back());
    h.data += drop.drops() ? 0 : before, h.cols = adapters[i].R;
    gs.push_back(h);
    before += adapters[i].R;
  }
  size_t next = 0;
  for (size_t i = 0; i < adapters.size(); ++i) {
    const bool needed = next < expanded.size() && expanded[next] == i;
    T* g_data = needed ? const_cast<T*>(gs[next].data) : nullptr;
    contract_dy<T>(device, dys[i], adapters[i], g_data, needed ? g[drop.drops() ? next : 0].size(1) : 0);
    next += needed;
  }
  bool any_dA = false;
  std::vector<Contraction<T>> contractions;
  std::vector<Expansion<T>> expansions;
  std::vector<int64_t> R;
  for (size_t n = 0; n < expanded.size(); ++n) {
    const Adapter& m = adapters[expanded[n]];
    contractions.push_back({gs[n], m.word(), m.dA});
    if (dx) expansions.push_back({gs[n], factor<T>(m.A), m.word()});
    R.push_back(m.R);
    any_dA = any_dA || m.dA.out;
  }
  if (any_dA && x->size(1) > 0) {
    const Tensor rows = unit_columns(*x);
    const Tensor room = empty(rows, {outer_workspace<T>(device, M, rows.size(1), R, drop.drops())}, ScalarType::Float);
    outer<T>(device, matrix<const T>(rows), contractions, true, drop.dropout, data<const int64_t>(columns.index), K, {},
             static_cast<float*>(room.data_ptr()));
  }
  if (dx) accumulate<T>(device, expansions, true, drop.dropout, nullptr, add, matrix<T>(*dx));
}

// A gradient as contiguous tensor like t, (0,) like dy where it is not needed, and where it stands. mask: contiguous.
inline Tensor gradient_like(const Tensor& t, const Tensor& dy, bool needed, bool zero, const OptionalTensor& mask,
                            Gradient& gradient) {
  if (!needed) return empty(dy, {0}, dy.scalar_type());
  if (zero) return torch::stable::new_zeros(t, sizes_of(t), t.scalar_type());
  const Tensor out = empty(t, sizes_of(t), t.scalar_type());
  gradient.out = out.data_ptr(), gradient.fp32 = t.scalar_type() == ScalarType::Float;
  gradient.mask = data<const uint8_t>(mask);
  return out;
}

// Only these flat entries are asked for, packed; nothing where there are none.
inline void select_entries(Gradient& gradient, const OptionalTensor& entries) {
  if (!entries) return;
  gradient.entries = data<const int64_t>(entries), gradient.entry_count = entries->size(0);
  if (gradient.entry_count == 0) gradient.out = nullptr;
}

}  // namespace lorasp::cuda
