#include "partial.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <string>

namespace lorasp {
namespace {

std::string item(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// Indices are trusted by the kernels: every one is looked at.
Tensor checked_index(const char* op, const std::string& name, const Tensor& index, int64_t limit) {
  TORCH_CHECK_VALUE(index.device().is_cpu(), op, ": ", name, " must be on cpu, got ", index.device());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, op, ": ", name, " must be Long, got ", index.scalar_type());
  TORCH_CHECK_VALUE(index.dim() == 1, op, ": ", name, " must be 1-d, got ", index.sizes());
  const Tensor held = index.contiguous();
  const auto* data = held.const_data_ptr<int64_t>();
  int64_t before = -1;
  bool ascending = true;
  for (int64_t i = 0; i < held.numel(); before = data[i++]) ascending &= data[i] > before;
  TORCH_CHECK_VALUE(ascending && before < limit, op, ": ", name, " must ascend inside [0, ", limit, ")");
  return held;
}

}  // namespace

Adapters::Adapters(const char* op, const FactorArguments& a, int64_t K, at::IntArrayRef outputs, at::ScalarType compute)
    : op_(op), K_(K), compute_(compute) {
  if (a.columns) {
    columns_index_ = checked_index(op, "columns", *a.columns, K);
    columns_.emplace(columns_index_.const_data_ptr<int64_t>(), columns_index_.numel(), K);
  }
  const auto check = [&](const char* name, size_t i, const Tensor& t, at::IntArrayRef shape) {
    check_tensor(op, item(name, i).c_str(), t, shape, compute, true);
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    Adapter m{outputs[i], 0, total_rank_, a.lora_As[i], a.lora_Bs[i], a.frozen_As.get(i), a.frozen_Bs.get(i)};
    const OptionalTensor rows = a.rows.get(i), entries_A = a.entries_A.get(i), entries_B = a.entries_B.get(i);
    const Tensor& whole_A = m.frozen_A ? *m.frozen_A : m.lora_A;
    TORCH_CHECK_VALUE(whole_A.dim() == 2, op, ": ", item(m.frozen_A ? "frozen_As" : "lora_As", i), " must be 2-d, got ",
                      whole_A.sizes());
    m.R = whole_A.size(0);
    TORCH_CHECK_VALUE(m.R > 0, op, ": ", item("lora_As", i), " must be (R, ", K, ") with R >= 1, got ",
                      whole_A.sizes());
    if (m.frozen_A) {
      check("frozen_As", i, whole_A, {m.R, K});
      TORCH_CHECK_VALUE(entries_A || columns_, op, ": ", item("frozen_As", i), " must come with columns or entries_A");
    } else {
      TORCH_CHECK_VALUE(!entries_A, op, ": ", item("entries_A", i), " must come with frozen_As");
    }
    if (entries_A) m.entries_A = checked_index(op, item("entries_A", i), *entries_A, m.R * K);
    if (entries_B) m.entries_B = checked_index(op, item("entries_B", i), *entries_B, m.N * m.R);
    if (rows) m.rows = checked_index(op, item("rows", i), *rows, m.N);
    if (m.entries_A) {
      check("lora_As", i, m.lora_A, {m.entries_A->numel()});
    } else {
      check("lora_As", i, m.lora_A, {m.R, m.frozen_A ? columns_->count() : K});
    }
    if (m.frozen_B) check("frozen_Bs", i, *m.frozen_B, {m.N, m.R});
    const bool whole_B = m.lora_B.dim() == 2 && m.lora_B.size(0) == m.N;
    if (m.entries_B) {
      check("lora_Bs", i, m.lora_B, {m.entries_B->numel()});
    } else {
      check("lora_Bs", i, m.lora_B, {m.rows && !whole_B ? m.rows->numel() : m.N, m.R});
    }
    total_rank_ += m.R;
    members_.push_back(std::move(m));
  }
}

bool Adapters::spreads_B(size_t i) const {
  const Adapter& m = members_[i];
  return m.rows && !m.entries_B && m.lora_B.size(0) == m.N;
}

void Adapters::build_A(ScratchFrame& frame) {
  const int64_t bytes = at::elementSize(compute_);
  if (members_.size() == 1 && !members_[0].frozen_A) {
    held_.push_back(rounded(members_[0].lora_A, compute_));
    members_[0].A = held_.back().const_data_ptr();
    return;
  }
  char* stack = frame.take<char>(total_rank_ * K_ * bytes);
  for (Adapter& m : members_) {
    char* out = stack + m.first_rank * K_ * bytes;
    m.A = out;
    const Tensor lora = rounded(m.lora_A, compute_);
    const auto* part = static_cast<const char*>(lora.const_data_ptr());
    const Tensor frozen = m.frozen_A ? rounded(*m.frozen_A, compute_) : lora;
    std::memcpy(out, frozen.const_data_ptr(), m.R * K_ * bytes);
    if (m.entries_A) {
      const auto* index = m.entries_A->const_data_ptr<int64_t>();
      for (int64_t e = 0; e < lora.numel(); ++e) std::memcpy(out + index[e] * bytes, part + e * bytes, bytes);
    } else if (m.frozen_A) {
      for (int64_t r = 0; r < m.R; ++r)
        columns_->scatter(part + r * columns_->count() * bytes, bytes, out + r * K_ * bytes);
    }
  }
}

void Adapters::build_B(ScratchFrame& frame) {
  const int64_t bytes = at::elementSize(compute_);
  for (Adapter& m : members_) {
    const Tensor lora = rounded(m.lora_B, compute_);
    const auto* part = static_cast<const char*>(lora.const_data_ptr());
    if (!m.entries_B && m.lora_B.size(0) == m.N) {
      held_.push_back(lora);
      m.B = part;
      continue;
    }
    char* out = frame.take<char>(m.N * m.R * bytes);
    m.B = out;
    if (m.frozen_B) {
      std::memcpy(out, rounded(*m.frozen_B, compute_).const_data_ptr(), m.N * m.R * bytes);
    } else {
      std::memset(out, 0, m.N * m.R * bytes);
    }
    const Tensor& selected = m.entries_B ? *m.entries_B : *m.rows;
    const auto* index = selected.const_data_ptr<int64_t>();
    const int64_t unit = m.entries_B ? bytes : m.R * bytes;
    for (int64_t i = 0; i < selected.numel(); ++i) std::memcpy(out + index[i] * unit, part + i * unit, unit);
  }
}

Tensor Adapters::make_dA(size_t i, bool zero) const {
  const Tensor& like = members_[i].lora_A;
  return zero || spreads_A(i) ? at::zeros(like.sizes(), like.options()) : at::empty(like.sizes(), like.options());
}

Tensor Adapters::make_dB(size_t i, bool zero) const {
  const Tensor& like = members_[i].lora_B;
  return zero || spreads_B(i) ? at::zeros(like.sizes(), like.options()) : at::empty(like.sizes(), like.options());
}

namespace {

Gradient whole_gradient(const Tensor& out, const Tensor& mask) {
  Gradient g;
  g.data = out.mutable_data_ptr(), g.fp32 = out.scalar_type() == at::kFloat;
  g.mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  return g;
}

void select(Gradient& g, Gradient::Form form, const Tensor& index) {
  g.form = form, g.index = index.const_data_ptr<int64_t>(), g.count = index.numel();
}

}  // namespace

Gradient Adapters::gradient_A(size_t i, const Tensor& out, const Tensor& mask) const {
  Gradient g = whole_gradient(out, mask);
  if (members_[i].entries_A) {
    select(g, Gradient::Form::kEntries, *members_[i].entries_A);
  } else if (spreads_A(i)) {
    select(g, Gradient::Form::kInPlace, columns_index_), g.ld = K_;
  }
  return g;
}

Gradient Adapters::gradient_B(size_t i, const Tensor& out, const Tensor& mask) const {
  const Adapter& m = members_[i];
  Gradient g = whole_gradient(out, mask);
  if (m.entries_B) {
    select(g, Gradient::Form::kEntries, *m.entries_B);
  } else if (m.rows) {
    select(g, spreads_B(i) ? Gradient::Form::kInPlace : Gradient::Form::kRows, *m.rows);
  }
  return g;
}

}  // namespace lorasp
