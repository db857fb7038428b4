// hidden_cut on CPU: lorasp::hidden_cut_fwd_cpp and lorasp::hidden_cut_bwd_cpp (schemas in lorasp/ops/hidden_cut.py).
//     y = residual + D o x          dx = D o dy
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/keep_bits.h"
#include "rows/rows.h"
#include "rows/tokens.h"

namespace lorasp {
namespace {

constexpr int64_t kPiece = 2048;           // 256 mask bytes, at most 24 KiB of operands
constexpr int64_t kGrainElements = 32768;  // less than this is not worth a thread

// Which rows (b, s) or elements of (B, S, F) are kept.
class Cut {
 public:
  Cut(const Tensor& seed_, double p, std::string_view pattern, int64_t B, int64_t S) : S_(S) {
    TORCH_CHECK_VALUE(pattern == "element" || pattern == "column" || pattern == "span",
                      "hidden_cut: pattern must be one of element, column, span, got ", pattern);
    const uint32_t t = drop_threshold(p);
    TORCH_CHECK_VALUE(p >= 0.0 && p < 1.0 && (pattern == "span" || t < 65536), "hidden_cut: p must be in [0, 1), got ",
                      p);
    check_tensor("hidden_cut", "seed", seed_, {}, at::kLong);
    const auto seed = static_cast<uint64_t>(*seed_.const_data_ptr<int64_t>());
    mask_ = {seed, kPurposeHiddenCut, 0, t};
    by_element = pattern == "element";
    rescale = by_element ? static_cast<float>(65536.0 / (65536.0 - t)) : 1.0f;
    if (pattern != "span") return;
    // As lorasp.rng.span_start has it.
    length_ = span_length(p, S);
    starts_.resize(static_cast<size_t>(B));
    for (int64_t b = 0; b < B; ++b) {
      const uint32_t word = philox4x32_7(static_cast<uint64_t>(b), kPurposeHiddenCut, 0, seed).word[0];
      starts_[static_cast<size_t>(b)] = static_cast<int64_t>(word) % (S - length_ + 1);
    }
  }

  bool by_element;
  float rescale;

  // Column and span only.
  bool keeps(int64_t row) const {
    if (starts_.empty()) return keep_byte(mask_, static_cast<uint64_t>(row) / 8) >> (row % 8) & 1;
    const int64_t s = row % S_, start = starts_[static_cast<size_t>(row / S_)];
    return s < start || s >= start + length_;
  }
  const KeepMask& mask() const { return mask_; }

 private:
  KeepMask mask_;
  int64_t S_, length_ = 0;
  std::vector<int64_t> starts_;
};

// out = residual + D o x, out contiguous.
void apply(const Cut& cut, Rows x, std::optional<Rows> residual, const Tensor& out) {
  if (cut.by_element && x.flat() && (!residual || residual->flat())) {
    x.flatten();
    if (residual) residual->flatten();
  }
  const RowKernels& rows = row_kernels();
  const KeepBits keep_bits = keep_bits_kernel();
  const DType out_dtype = compute_dtype("hidden_cut", "out", out);
  const RowKernels::Cut all = residual ? rows.add[static_cast<int>(x.dtype)][static_cast<int>(residual->dtype)]
                                       : rows.plain[static_cast<int>(x.dtype)][static_cast<int>(out_dtype)];
  const RowKernels::Cut nothing_left =
      residual ? rows.plain[static_cast<int>(residual->dtype)][static_cast<int>(out_dtype)] : nullptr;
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t itemsize = out.element_size(), pieces = ceil_div(x.F, kPiece);
  const int64_t grain = ceil_div(kGrainElements, std::min(x.F, kPiece));
  at::parallel_for(0, x.count() * pieces, grain, [&](int64_t begin, int64_t end) {
    uint32_t bits[kPiece / 32];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces, column = i % pieces * kPiece, count = std::min(kPiece, x.F - column);
      const int64_t element = row * x.F + column;
      const void* from = x.at(row, column);
      const void* added = residual ? residual->at(row, column) : nullptr;
      char* result = to + element * itemsize;
      if (cut.by_element) {
        keep_bits(cut.mask(), element, count, bits);
        all(from, added, bits, cut.rescale, count, result);
      } else if (cut.keeps(row)) {
        all(from, added, nullptr, 1.0f, count, result);
      } else if (added != nullptr) {
        nothing_left(added, nullptr, nullptr, 1.0f, count, result);
      } else {
        std::memset(result, 0, static_cast<size_t>(count * itemsize));
      }
    }
  });
}

Tensor hidden_cut_forward_cpu(const Tensor& x, const OptionalTensor& residual, const Tensor& seed, double p,
                              std::string_view pattern) {
  const PlainDispatch plain;
  TORCH_CHECK_VALUE(x.dim() == 3, "hidden_cut: x must be (B, S, F), got ", x.sizes());
  check_tensor("hidden_cut", "x", x, x.sizes(), x.scalar_type());
  if (residual) check_tensor("hidden_cut", "residual", *residual, x.sizes(), residual->scalar_type());
  const Cut cut(seed, p, pattern, x.size(0), x.size(1));
  const Rows rows("hidden_cut", "x", x);
  std::optional<Rows> added;
  if (residual) added.emplace("hidden_cut", "residual", *residual);
  const auto dtype = residual ? c10::promoteTypes(x.scalar_type(), residual->scalar_type()) : x.scalar_type();
  Tensor out = at::empty(x.sizes(), x.options().dtype(dtype));
  if (out.numel() > 0) apply(cut, rows, added, out);
  return out;
}

Tensor hidden_cut_backward_cpu(const Tensor& dy, const Tensor& seed, double p, std::string_view pattern,
                               at::ScalarType dtype) {
  const PlainDispatch plain;
  TORCH_CHECK_VALUE(dy.dim() == 3, "hidden_cut: dy must be (B, S, F), got ", dy.sizes());
  check_tensor("hidden_cut", "dy", dy, dy.sizes(), dy.scalar_type());
  const Cut cut(seed, p, pattern, dy.size(0), dy.size(1));
  Tensor dx = at::empty(dy.sizes(), dy.options().dtype(dtype));
  if (dx.numel() > 0) apply(cut, Rows("hidden_cut", "dy", dy), std::nullopt, dx);
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(lorasp, CPU, m) {
  m.impl("hidden_cut_fwd_cpp", &hidden_cut_forward_cpu);
  m.impl("hidden_cut_bwd_cpp", &hidden_cut_backward_cpu);
}

}  // namespace lorasp
