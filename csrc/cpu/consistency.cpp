// consistency on CPU: lorasp::consistency_fwd_cpp, consistency_bwd_cpp and consistency_replace_cpp (schemas in
// lorasp/ops/consistency.py). P = softmax(logits), Q = softmax(other):
//     kl = (KL(P|Q) + KL(Q|P)) / 2          js = KL(P|Q)
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "rows/rows.h"
#include "rows/tokens.h"

namespace lorasp {
namespace {

constexpr const char* kWhere = "consistency";
constexpr int64_t kStats = 6;
constexpr int64_t kGrainElements = 16384;  // less than this is not worth a thread

struct Weights {
  float ab, ba;
};

Weights weights(std::string_view kind) {
  TORCH_CHECK_VALUE(kind == "kl" || kind == "js", "consistency: kind must be one of kl, js, got ", kind);
  return kind == "kl" ? Weights{0.5f, 0.5f} : Weights{1.0f, 0.0f};
}

// (B, T) of bool, contiguous; nullptr: every row counts.
struct Mask {
  Tensor held;
  const bool* data = nullptr;

  Mask(const OptionalTensor& mask, const Tensor& logits) {
    if (!mask) return;
    check_tensor(kWhere, "mask", *mask, logits.sizes().slice(0, 2), at::kBool);
    held = mask->contiguous();
    data = held.const_data_ptr<bool>();
  }
  bool counts(int64_t row) const { return data == nullptr || data[row]; }
};

void check_pair(const Tensor& logits, const Tensor& other) {
  TORCH_CHECK_VALUE(logits.dim() == 3 && logits.size(2) > 0, "consistency: logits must be (B, T, V), got ",
                    logits.sizes());
  check_tensor(kWhere, "logits", logits, logits.sizes(), logits.scalar_type());
  check_tensor(kWhere, "other", other, logits.sizes(), logits.scalar_type());
}

template <class F>
void for_each_row(const Rows& rows, const F& work) {
  at::parallel_for(0, rows.count(), ceil_div(kGrainElements, rows.F), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
  });
}

std::tuple<Tensor, Tensor> consistency_forward_cpu(const Tensor& logits, const Tensor& other,
                                                   const OptionalTensor& mask, std::string_view kind) {
  const PlainDispatch plain;
  check_pair(logits, other);
  const Weights weight = weights(kind);
  const Rows a(kWhere, "logits", logits), b(kWhere, "other", other);
  const Mask kept(mask, logits);
  const auto options = logits.options().dtype(at::kFloat);
  Tensor rows = at::empty({a.B, a.S}, options), stats = at::empty({a.B, a.S, kStats}, options);
  auto* row_data = rows.mutable_data_ptr<float>();
  auto* stats_data = stats.mutable_data_ptr<float>();
  const auto pair_stats = row_kernels().pair_stats[static_cast<int>(a.dtype)];
  for_each_row(a, [&](int64_t row) {
    PairStats s{};
    if (kept.counts(row)) pair_stats(a.at(row), b.at(row), a.F, &s);
    const double values[kStats] = {s.max_a, s.over_a, s.max_b, s.over_b, s.kl_ab, s.kl_ba};
    std::copy(values, values + kStats, stats_data + row * kStats);
    row_data[row] = static_cast<float>(weight.ba == 0.0f ? s.kl_ab : (s.kl_ab + s.kl_ba) / 2);
  });
  return {rows, stats};
}

void fill(const Rows& out, int64_t row, float value) {
  if (value == 0.0f) {
    std::memset(out.at(row), 0, static_cast<size_t>(out.F * out.itemsize));
    return;
  }
  const auto round = row_kernels().plain[0][static_cast<int>(out.dtype)];
  for (int64_t column = 0; column < out.F; ++column) round(&value, nullptr, nullptr, 1.0f, 1, out.at(row, column));
}

// da, db: (B, T, V) or not needed.
void gradients(const Tensor& drows_, const Rows& a, const Rows& b, const Tensor& stats_, const Mask& kept,
               std::string_view kind, const std::optional<Rows>& da, const std::optional<Rows>& db) {
  const Weights weight = weights(kind);
  const Tensor drows = drows_.contiguous(), stats = stats_.contiguous();
  const auto* drow_data = drows.const_data_ptr<float>();
  const auto* stats_data = stats.const_data_ptr<float>();
  const auto pair_gradient = row_kernels().pair_gradient[static_cast<int>(a.dtype)];
  for_each_row(a, [&](int64_t row) {
    const float* s = stats_data + row * kStats;
    const bool finite = std::isfinite(weight.ba == 0.0f ? s[4] : s[4] + s[5]);
    if (kept.counts(row) && finite) {
      const auto log_ratio =
          static_cast<float>(std::log(static_cast<double>(s[3])) - std::log(static_cast<double>(s[1])));
      const PairGradient g{s[0],
                           s[1],
                           s[2],
                           s[3],
                           s[4],
                           weight.ba == 0.0f ? 0.0f : s[5],
                           log_ratio,
                           weight.ab * drow_data[row],
                           weight.ba * drow_data[row]};
      pair_gradient(a.at(row), b.at(row), a.F, g, da ? da->at(row) : nullptr, db ? db->at(row) : nullptr);
      return;
    }
    const float value = kept.counts(row) ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    if (da) fill(*da, row, value);
    if (db) fill(*db, row, value);
  });
}

void check_gradient(const Tensor& drows, const Tensor& logits, const Tensor& stats) {
  const int64_t B = logits.size(0), T = logits.size(1);
  check_tensor(kWhere, "drows", drows, {B, T}, at::kFloat);
  check_tensor(kWhere, "stats", stats, {B, T, kStats}, at::kFloat);
}

std::tuple<Tensor, Tensor> consistency_backward_cpu(const Tensor& drows, const Tensor& logits, const Tensor& other,
                                                    const Tensor& stats, const OptionalTensor& mask,
                                                    std::string_view kind, bool need_dlogits, bool need_dother) {
  const PlainDispatch plain;
  check_pair(logits, other);
  check_gradient(drows, logits, stats);
  const auto gradient = [&](bool needed, std::optional<Rows>* rows) {
    Tensor out = needed ? at::empty(logits.sizes(), logits.options()) : at::empty({0}, logits.options());
    if (needed) rows->emplace(kWhere, "gradient", out);
    return out;
  };
  std::optional<Rows> da, db;
  Tensor dlogits = gradient(need_dlogits, &da), dother = gradient(need_dother, &db);
  gradients(drows, Rows(kWhere, "logits", logits), Rows(kWhere, "other", other), stats, Mask(mask, logits), kind, da,
            db);
  return {dlogits, dother};
}

void consistency_replace_cpu(const Tensor& drows, const Tensor& logits, const Tensor& other, const Tensor& stats,
                             const OptionalTensor& mask, std::string_view kind, bool need_dlogits, bool need_dother) {
  const PlainDispatch plain;
  check_pair(logits, other);
  check_gradient(drows, logits, stats);
  for (const Tensor& t : {logits, other}) {
    TORCH_CHECK_VALUE(t.size(2) == 1 || t.stride(2) == 1,
                      "consistency: rows to be replaced must have unit stride, got strides ", t.strides());
  }
  const Rows a(kWhere, "logits", logits), b(kWhere, "other", other);
  const auto when = [](bool needed, const Rows& rows) { return needed ? std::optional<Rows>(rows) : std::nullopt; };
  gradients(drows, a, b, stats, Mask(mask, logits), kind, when(need_dlogits, a), when(need_dother, b));
}

}  // namespace

TORCH_LIBRARY_IMPL(lorasp, CPU, m) {
  m.impl("consistency_fwd_cpp", &consistency_forward_cpu);
  m.impl("consistency_bwd_cpp", &consistency_backward_cpu);
  m.impl("consistency_replace_cpp", &consistency_replace_cpu);
}

}  // namespace lorasp
