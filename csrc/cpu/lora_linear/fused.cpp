#include "fused.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../common/isa.h"

namespace lorasp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Stands before the panels of a packed weight, so that a packed weight meets only the kernel and the weight it is of.
struct alignas(64) PackedHeader {
  uint32_t magic = 0x6c736b70, kernel = 0;
  int64_t columns = 0, depth = 0;
};

// The weight (N, K) as one direction reads it, whichever of its strides is 1.
struct Source {
  Tensor held;
  Operand operand;

  Source(const Tensor& weight, bool backward) {
    const bool by_row = weight.stride(1) == 1 || weight.size(1) == 1;
    const bool by_column = weight.stride(0) == 1 || weight.size(0) == 1;
    held = by_row || by_column ? weight : weight.contiguous();
    const int64_t N = weight.size(0), K = weight.size(1);
    const bool rows = by_row || !by_column;
    // A dimension of size 1 has an arbitrary stride, which nothing steps over.
    const int64_t ld = std::max<int64_t>(held.stride(rows ? 0 : 1), 1);
    operand = {held.const_data_ptr(), ld, rows != backward, backward ? K : N, backward ? N : K};
  }
};

const void* panels_of(const GemmKernel& kernel, const OptionalTensor& packed, const Operand& w) {
  if (!packed) return nullptr;
  PackedHeader header;
  const int64_t bytes = packed_weight_bytes(kernel, w.columns, w.depth);
  TORCH_CHECK_VALUE(packed->scalar_type() == at::kByte && packed->is_contiguous() && packed->device().is_cpu() &&
                        packed->numel() == static_cast<int64_t>(sizeof(header)) + bytes,
                    "lora_linear: packed must be the result of pack_weight for this weight, got ", packed->sizes());
  std::memcpy(&header, packed->const_data_ptr(), sizeof(header));
  TORCH_CHECK_VALUE(header.magic == PackedHeader{}.magic && header.kernel == kernel.id && header.columns == w.columns &&
                        header.depth == w.depth,
                    "lora_linear: packed must be packed for this weight, dtype and CPU; pack_weight it again");
  return static_cast<const char*>(packed->const_data_ptr()) + sizeof(header);
}

DType dtype_of(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? DType::kF32 : t.scalar_type() == at::kBFloat16 ? DType::kBF16 : DType::kF16;
}

Tensor pack_weight_cpu(const Tensor& weight, bool backward) {
  const bool known = weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16;
  const GemmKernel* kernel = known ? fused_kernel(dtype_of(weight)) : nullptr;
  TORCH_CHECK_VALUE(kernel, "pack_weight: no packed layout for ", weight.scalar_type(),
                    " on this CPU (instruction set ", active_isa_name(), ")");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.numel() > 0, "pack_weight: weight must be (N, K), got ",
                    weight.sizes());
  const Source source(weight, backward);
  PackedHeader header;
  header.kernel = kernel->id, header.columns = source.operand.columns, header.depth = source.operand.depth;
  const int64_t bytes = packed_weight_bytes(*kernel, header.columns, header.depth);
  Tensor packed = at::empty({static_cast<int64_t>(sizeof(header)) + bytes}, weight.options().dtype(at::kByte));
  auto* out = static_cast<char*>(packed.mutable_data_ptr());
  std::memcpy(out, &header, sizeof(header));
  pack_gemm_weight(*kernel, source.operand, out + sizeof(header));
  return packed;
}

struct MaskRows final : KeepRows {
  const KeepMask& mask;
  int64_t columns;
  const KeepBits keep_bits = keep_bits_kernel();

  MaskRows(const KeepMask& mask, int64_t columns) : mask(mask), columns(columns) {}
  void fill(int64_t row, unsigned char* bits) const override {
    keep_bits(mask, row * columns, columns, reinterpret_cast<uint32_t*>(bits));
  }
};

void product(const Fused& f, const Tensor& a, const Source& source, GemmParams params, const Tensor& y) {
  params.M = a.size(0), params.a = a.const_data_ptr(), params.lda = params.M > 1 ? a.stride(0) : a.size(1);
  params.w = source.operand, params.packed = panels_of(*f.kernel, f.packed, source.operand), params.scale = f.scale;
  params.y = y.mutable_data_ptr(), params.ldy = source.operand.columns;
  gemm(*f.kernel, params);
}

}  // namespace

const GemmKernel* fused_kernel(DType dtype) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (dtype == DType::kF32 && isa >= Isa::kAvx512) return gemm_avx512_f32();
#if defined(__linux__)
  if (dtype == DType::kBF16 && isa == Isa::kAmx) return gemm_amx_bf16();
#endif
  if (dtype == DType::kBF16 && isa == Isa::kAvx512Bf16) return gemm_avx512_bf16();
#endif
  return nullptr;
}

Tensor fused_forward(const Fused& f, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, void* xa,
                     const RowVisitor* visitor) {
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor bias32 = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  GemmParams params{};
  params.q = {f.A, K, true, f.R, K};
  params.p = {f.B, f.R, true, N, f.R};
  params.bias = bias ? bias32.const_data_ptr<float>() : nullptr;
  params.s = xa, params.lds = f.R, params.visitor = visitor;
  std::optional<MaskRows> keep;
  if (f.keep) keep.emplace(*f.keep, K), params.keep_a = &*keep;
  Tensor y = at::empty({x.size(0), N}, x.options());
  product(f, x, Source(weight, false), params, y);
  return y;
}

void fused_backward(const Fused& f, const Tensor& dy, const Tensor& weight, void* g, int64_t ldg, const Tensor& dx,
                    bool accumulate) {
  const int64_t N = weight.size(0), K = weight.size(1);
  GemmParams params{};
  params.q = {f.B, f.R, false, f.R, N};
  params.p = {f.A, K, false, K, f.R};
  params.s = g, params.lds = ldg, params.accumulate = accumulate;
  std::optional<MaskRows> keep;
  if (f.keep) keep.emplace(*f.keep, K), params.keep_y = &*keep;
  product(f, dy, Source(weight, true), params, dx);
}

TORCH_LIBRARY_IMPL(lorasp, CPU, m) { m.impl("pack_weight_cpp", &pack_weight_cpu); }

}  // namespace lorasp
