// lora_update on CPU: lorasp::lora_update_fwd_cpp and lorasp::lora_update_bwd_cpp (schemas in
// lorasp/ops/lora_update.py).
//     xa = s (D o x) A^T            y += xa B^T
//     g  = s dy B                   dx += D o (g A)        dB = dy^T xa        dA = g^T (D o x)
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/scratch.h"
#include "lora_linear/arguments.h"

namespace lorasp {
namespace {

constexpr const char* kOp = "lora_update";

void check(const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype, bool fp32_too = false) {
  check_tensor(kOp, name, t, shape, dtype, fp32_too);
}

void check_2d(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 2, kOp, ": ", name, " must be 2-d, got ", t.sizes());
}

// `update` on rows of unit column stride: on `t` itself, or on a copy that is written back.
template <class F>
void in_place(const Tensor& t, const F& update) {
  at::assert_no_internal_overlap(t);
  const Tensor rows = unit_columns(t);
  update(tall(rows));
  if (!rows.is_same(t)) t.copy_(rows);
}

Tensor lora_update_forward_cpu(const Tensor& y, const Tensor& x_, const Tensor& lora_A, const Tensor& lora_B,
                               const OptionalTensor& seed, double scale, double dropout_p, int64_t member) {
  const PlainDispatch plain;
  check_2d("x", x_), check_2d("lora_A", lora_A), check_2d("lora_B", lora_B);
  const DType dtype = compute_dtype(kOp, "x", x_);
  const int64_t M = x_.size(0), K = x_.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check("y", y, {M, N}, x_.scalar_type());
  check("lora_A", lora_A, {R, K}, x_.scalar_type(), true);
  check("lora_B", lora_B, {N, R}, x_.scalar_type(), true);
  const Dropout dropout(kOp, dropout_p, seed, member);

  Tensor xa = at::empty({M, R}, x_.options());
  if (M == 0) return xa;
  const Tensor x = unit_columns(x_);
  const Tensor a = rounded(lora_A, x.scalar_type()), b = rounded(lora_B, x.scalar_type());
  in_place(y, [&](const Tall& rows) {
    const Output output{R,   N, static_cast<float>(scale * dropout.rescale), xa.mutable_data_ptr(), b.const_data_ptr(),
                        rows};
    forward_pass(dtype, M, K, tall(x), Projection{R, a.const_data_ptr(), dropout.keep(), output}, nullptr, nullptr);
  });
  return xa;
}

std::tuple<Tensor, Tensor> lora_update_backward_cpu(const OptionalTensor& dx, const Tensor& dy_,
                                                    const OptionalTensor& x_, const Tensor& lora_A,
                                                    const Tensor& lora_B, const OptionalTensor& xa_,
                                                    const OptionalTensor& seed, double scale, double dropout_p,
                                                    int64_t member, bool need_dA, bool need_dB) {
  const PlainDispatch plain;
  check_2d("dy", dy_), check_2d("lora_A", lora_A), check_2d("lora_B", lora_B);
  const DType dtype = compute_dtype(kOp, "dy", dy_);
  const int64_t M = dy_.size(0), K = lora_A.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check("dy", dy_, {M, N}, dy_.scalar_type());
  check("lora_A", lora_A, {R, K}, dy_.scalar_type(), true);
  check("lora_B", lora_B, {N, R}, dy_.scalar_type(), true);
  TORCH_CHECK_VALUE(!need_dA || x_, "lora_update: x must be given when need_dA, got None");
  TORCH_CHECK_VALUE(!need_dB || xa_, "lora_update: xa must be given when need_dB, got None");
  if (dx) check("dx", *dx, {M, K}, dy_.scalar_type());
  if (need_dA) check("x", *x_, {M, K}, dy_.scalar_type());
  if (need_dB) check("xa", *xa_, {M, R}, dy_.scalar_type());
  const bool need_g = dx || need_dA;
  const Dropout dropout(kOp, need_g ? dropout_p : 0.0, seed, member);

  const Tensor dlora_A = gradient_like(lora_A, dy_, need_dA), dlora_B = gradient_like(lora_B, dy_, need_dB);
  if (M == 0 || !(need_g || need_dB)) return {dlora_A, dlora_B};

  const Tensor dy = unit_columns(dy_);
  const Tensor a = rounded(lora_A, dy.scalar_type()), b = rounded(lora_B, dy.scalar_type());
  const Tensor xa = need_dB ? xa_->contiguous() : Tensor(), x = need_dA ? unit_columns(*x_) : Tensor();
  ScratchFrame frame;
  void* g = need_g ? frame.take<char>(M * R * dy.element_size()) : nullptr;
  dy_pass(dtype, M, N, R, tall(dy), b.const_data_ptr(), static_cast<float>(scale * dropout.rescale), {g, R},
          need_dB ? xa.const_data_ptr() : nullptr, whole_gradient(dlora_B, need_dB));
  const Slice slice{R, whole_gradient(dlora_A, need_dA)};
  const auto spread = [&](const Tall& rows) {
    dx_pass(dtype, M, K, rows, need_dA ? tall(x) : Tall{nullptr, 0},
            Expansion{R, a.const_data_ptr(), dropout.keep(), g, slice}, nullptr);
  };
  if (dx) {
    in_place(*dx, spread);
  } else if (need_dA) {
    spread({nullptr, 0});
  }
  return {dlora_A, dlora_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(lorasp, CPU, m) {
  m.impl("lora_update_fwd_cpp", &lora_update_forward_cpu);
  m.impl("lora_update_bwd_cpp", &lora_update_backward_cpu);
}

}  // namespace lorasp
