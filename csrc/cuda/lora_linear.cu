// lora_linear on CUDA: lorasp::lora_linear_fwd_cuda and lorasp::lora_linear_bwd_cuda (schemas in
// lorasp/ops/lora_linear.py), plan addmm: the frozen product by cuBLAS, the rank-R products by the kernels beside this.
//     xa = s (D o x) A^T            y  = x W^T + bias + xa B^T
//     g  = s dy B                   dx = D o (g A) + dy W        dB = dy^T xa        dA = g^T (D o x)
#include "arguments.h"
#include "lora_linear_launch.cuh"

namespace lorasp::cuda {
namespace {

constexpr const char* kOp = "lora_linear";
constexpr uint32_t kPurposeLoRADropout = 0;

void check(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType dtype,
           bool fp32_too = false) {
  check_tensor(kOp, name, t, sizes, dtype, fp32_too);
}

struct DropoutOfCall {
  Dropout dropout;
  double rescale = 1.0;

  DropoutOfCall(double dropout_p, const OptionalTensor& seed, int64_t member) {
    const uint32_t t = drop_threshold(kOp, dropout_p);
    if (t == 0) return;
    STD_TORCH_CHECK(seed.has_value(), kOp, ": seed must be a 0-d int64 tensor when dropout_p > 0, got None");
    check("seed", *seed, {}, ScalarType::Long);
    dropout = {{0, kPurposeLoRADropout, static_cast<uint32_t>(member), t}, data<const int64_t>(seed)};
    rescale = 65536.0 / (65536.0 - t);
  }
};

void check_matrices(const char* name, const Tensor& rows, const Tensor& lora_A, const Tensor& lora_B) {
  STD_TORCH_CHECK(rows.dim() == 2 && lora_A.dim() == 2 && lora_B.dim() == 2, kOp, ": ", name,
                  ", lora_A and lora_B must be 2-d, got ", rows.dim(), ", ", lora_A.dim(), " and ", lora_B.dim());
}

std::tuple<Tensor, Tensor> lora_linear_forward_cuda(const Tensor& x_, const Tensor& weight, const OptionalTensor& bias_,
                                                    const Tensor& lora_A, const Tensor& lora_B,
                                                    const OptionalTensor& seed, double scale, double dropout_p,
                                                    int64_t member, const std::string& plan,
                                                    const OptionalTensor& packed) {
  check_matrices("x", x_, lora_A, lora_B);
  const ScalarType dtype = x_.scalar_type();
  const int64_t M = x_.size(0), K = x_.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check("x", x_, {M, K}, dtype);
  check("weight", weight, {N, K}, dtype);
  if (bias_) check("bias", *bias_, {N}, dtype);
  check("lora_A", lora_A, {R, K}, dtype, true);
  check("lora_B", lora_B, {N, R}, dtype, true);
  STD_TORCH_CHECK(plan == "auto" || plan == "addmm", kOp, ": plan must be auto or addmm for backend cuda, got ", plan);
  STD_TORCH_CHECK(!packed, kOp, ": packed must be None for backend cuda");
  const DropoutOfCall drop(dropout_p, seed, member);

  const NoGrad no_grad;
  Tensor y = empty(x_, {M, N}, dtype), xa = empty(x_, {M, R}, dtype);
  if (M == 0) return {y, xa};
  const DeviceScope scope(x_);
  const Device& device = scope.device();
  const Tensor x = unit_columns(x_), A = rounded(lora_A, dtype), B = rounded(lora_B, dtype);
  const OptionalTensor bias = bias_ ? OptionalTensor(torch::stable::contiguous(*bias_)) : std::nullopt;
  multiply(y, x, torch::stable::transpose(weight, 0, 1));
  with_type(kOp, "x", dtype, [&](auto type) {
    using T = decltype(type);
    const Tensor workspace = empty(x, {project_workspace<T>(device, M, K, R)}, ScalarType::Float);
    project<T>(device, matrix<const T>(x), matrix<const T>(A), true, R, static_cast<float>(scale * drop.rescale),
               drop.dropout, static_cast<T*>(xa.data_ptr()), static_cast<float*>(workspace.data_ptr()));
    accumulate<T>(device, matrix<const T>(xa), matrix<const T>(B), false, {}, data<const T>(bias), matrix<T>(y));
  });
  return {y, xa};
}

// A gradient in its parameter's dtype, from a launcher that is given where to write it.
template <class T, class F>
void with_gradient_type(const Tensor& gradient, F&& f) {
  if (gradient.scalar_type() == ScalarType::Float)
    f(static_cast<float*>(gradient.data_ptr()));
  else
    f(static_cast<T*>(gradient.data_ptr()));
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_cuda(
    const Tensor& dy_, const OptionalTensor& x_, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const OptionalTensor& xa_, const OptionalTensor& seed, const OptionalTensor& mask_A, const OptionalTensor& mask_B,
    double scale, double dropout_p, int64_t member, bool need_dx, bool need_dA, bool need_dB, const std::string& plan,
    const OptionalTensor& packed) {
  check_matrices("dy", dy_, lora_A, lora_B);
  const ScalarType dtype = dy_.scalar_type();
  const int64_t M = dy_.size(0), K = lora_A.size(1), N = lora_B.size(0), R = lora_A.size(0);
  check("dy", dy_, {M, N}, dtype);
  check("lora_A", lora_A, {R, K}, dtype, true);
  check("lora_B", lora_B, {N, R}, dtype, true);
  if (need_dx) check("weight", weight, {N, K}, dtype);
  if (mask_A) check("mask_A", *mask_A, {R, K}, ScalarType::Bool);
  if (mask_B) check("mask_B", *mask_B, {N, R}, ScalarType::Bool);
  STD_TORCH_CHECK(!need_dA || x_, kOp, ": x must be given when need_dA, got None");
  STD_TORCH_CHECK(!need_dB || xa_, kOp, ": xa must be given when need_dB, got None");
  if (need_dA) check("x", *x_, {M, K}, dtype);
  if (need_dB) check("xa", *xa_, {M, R}, dtype);
  STD_TORCH_CHECK(plan == "auto" || plan == "addmm", kOp, ": plan must be auto or addmm for backend cuda, got ", plan);
  STD_TORCH_CHECK(!packed, kOp, ": packed must be None for backend cuda");
  const bool need_g = need_dx || need_dA;
  const DropoutOfCall drop(need_g ? dropout_p : 0.0, seed, member);

  const NoGrad no_grad;
  const auto gradient_like = [&](const Tensor& t, bool needed) {
    if (!needed) return empty(dy_, {0}, dtype);
    const std::vector<int64_t> sizes{t.size(0), t.size(1)};
    return M == 0 ? torch::stable::new_zeros(dy_, sizes, t.scalar_type()) : empty(dy_, sizes, t.scalar_type());
  };
  Tensor dlora_A = gradient_like(lora_A, need_dA), dlora_B = gradient_like(lora_B, need_dB);
  Tensor dx = need_dx ? empty(dy_, {M, K}, dtype) : empty(dy_, {0}, dtype);
  if (M == 0) return {dx, dlora_A, dlora_B};

  const DeviceScope scope(dy_);
  const Device& device = scope.device();
  const auto kept = [](const OptionalTensor& mask) {
    return mask ? OptionalTensor(torch::stable::contiguous(*mask)) : std::nullopt;
  };
  const OptionalTensor kept_A = kept(mask_A), kept_B = kept(mask_B);
  const Tensor dy = unit_columns(dy_), A = rounded(lora_A, dtype), B = rounded(lora_B, dtype);
  const Tensor g = empty(dy, need_g ? std::vector<int64_t>{M, R} : std::vector<int64_t>{0}, dtype);
  const float g_scale = static_cast<float>(scale * drop.rescale);
  const auto workspace = [&](int64_t floats) { return empty(dy, {floats}, ScalarType::Float); };
  if (need_dx) multiply(dx, dy, weight);
  with_type(kOp, "dy", dtype, [&](auto type) {
    using T = decltype(type);
    T* g_data = static_cast<T*>(g.data_ptr());
    const OptionalTensor xa = need_dB ? OptionalTensor(torch::stable::contiguous(*xa_)) : std::nullopt;
    if (need_g && need_dB && one_pass_over_dy<T>(M, N, R)) {
      const Tensor room = workspace(project_outer_workspace<T>(device, M, N, R));
      with_gradient_type<T>(dlora_B, [&](auto* out) {
        project_outer<T>(device, matrix<const T>(dy), matrix<const T>(B), matrix<const T>(*xa), g_scale,
                         data<const uint8_t>(kept_B), g_data, out, static_cast<float*>(room.data_ptr()));
      });
    } else {
      if (need_g) {
        const Tensor room = workspace(project_workspace<T>(device, M, N, R));
        project<T>(device, matrix<const T>(dy), matrix<const T>(B), false, R, g_scale, {}, g_data,
                   static_cast<float*>(room.data_ptr()));
      }
      if (need_dB) {
        const Tensor room = workspace(outer_workspace<T>(device, M, N, R));
        with_gradient_type<T>(dlora_B, [&](auto* out) {
          outer<T>(device, matrix<const T>(dy), matrix<const T>(*xa), false, {}, data<const uint8_t>(kept_B), out,
                   static_cast<float*>(room.data_ptr()));
        });
      }
    }
    if (need_dA) {
      const Tensor x = unit_columns(*x_), room = workspace(outer_workspace<T>(device, M, K, R));
      with_gradient_type<T>(dlora_A, [&](auto* out) {
        outer<T>(device, matrix<const T>(x), matrix<const T>(g), true, drop.dropout, data<const uint8_t>(kept_A), out,
                 static_cast<float*>(room.data_ptr()));
      });
    }
    if (need_dx)
      accumulate<T>(device, matrix<const T>(g), matrix<const T>(A), true, drop.dropout, nullptr, matrix<T>(dx));
  });
  return {dx, dlora_A, dlora_B};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasp, LORASP_DISPATCH_KEY, m) {
  m.impl("lora_linear_fwd_cuda", TORCH_BOX(&lora_linear_forward_cuda));
  m.impl("lora_linear_bwd_cuda", TORCH_BOX(&lora_linear_backward_cuda));
}

}  // namespace lorasp::cuda
