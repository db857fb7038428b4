// What every CUDA operator's entry point does with its tensors, on torch's stable ABI: checks them, brings them into
// the compute dtype, finds device and stream. Built for torch 2.11 and later by one set of sources.
#pragma once
// Names that 2.11 has: its error check is TORCH_ERROR_CODE_CHECK, the STABLE_ one is newer.
#define TORCH_TARGET_VERSION ((2ULL << 56) | (11ULL << 48))
#if defined(__CUDACC__) && !defined(USE_CUDA)
#define USE_CUDA  // declares the stable ABI's CUDA functions
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "tile.cuh"

namespace lorasp::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace lorasp::cuda

#if defined(__CUDACC__)
#include "device.h"
#else
#include "emulated_device.h"  // tests/cuda_emulation: CPU tensors, kernels on the emulator
#endif

namespace lorasp::cuda {

// No graph is recorded inside, whatever the caller's mode. The frozen product is not dispatched, so that autocast
// leaves it alone too.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// `sizes` -1: any. `op` begins every message.
inline void check_tensor(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                         ScalarType dtype, bool fp32_too = false) {
  STD_TORCH_CHECK(DeviceScope::holds(t), op, ": ", name, " must be on ", DeviceScope::kName);
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted, got;
  for (const int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  for (int64_t i = 0; i < t.dim(); ++i) {
    got += (got.empty() ? "" : ", ") + std::to_string(t.size(i));
    fits = fits && t.size(i) == sizes.begin()[i];
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must be (", wanted, "), got (", got, ")");
  STD_TORCH_CHECK(t.scalar_type() == dtype || (fp32_too && t.scalar_type() == ScalarType::Float), op, ": ", name,
                  " must have dtype ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

inline Tensor unit_columns(const Tensor& t) {
  return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// A rank-R factor in the compute dtype, contiguous: as it is, or a rounded copy of fp32 masters.
inline Tensor rounded(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <class T>
Matrix<T> matrix(const Tensor& t) {
  const int64_t stride = t.size(0) == 1 ? 0 : t.stride(0);  // torch leaves the stride of a single row open
  T* data = static_cast<T*>(t.data_ptr());
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * sizeof(T) % 16 == 0;
  return {data, t.size(0), t.size(1), stride, aligned};
}

template <class T>
T* data(const OptionalTensor& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// out += a b in place: cuBLAS with beta = 1, rounded once. The dispatcher of the stable ABI knows no Scalar arguments
// (torch 2.11 to 2.13); this is the C function that compiled models call.
inline void add_product(Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(DeviceScope::addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

// f(float() | bf16() | f16()) for a compute dtype.
template <class F>
void with_type(const char* op, const char* name, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(bf16());
    case ScalarType::Half:
      return f(f16());
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16 for backend cuda, got ",
                      torch::headeronly::toString(dtype));
  }
}

inline uint32_t checked_threshold(const char* op, double dropout_p) {
  const uint32_t t = drop_threshold(dropout_p);
  STD_TORCH_CHECK(t < 65536, op, ": dropout_p must be in [0, 1), got ", dropout_p);
  return t;
}

}  // namespace lorasp::cuda
