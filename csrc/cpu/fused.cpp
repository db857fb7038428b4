#include "fused.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "isa.h"

namespace lorasp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Stands before the panels of a packed weight, so that a packed weight meets only the kernel and the weight it is of.
struct alignas(64) PackedHeader {
  uint32_t magic = 0x6c736b70, kernel = 0;
  int64_t columns = 0, depth = 0;
};

// The weight as gemm.h reads it: (columns, depth) of one direction, whichever of its strides is 1.
struct Source {
  Tensor held;
  int64_t columns, depth, ld;
  bool depth_contiguous;

  Source(const Tensor& weight, bool backward) {
    const bool rows_contiguous = weight.stride(1) == 1 || weight.size(1) == 1;
    const bool columns_contiguous = weight.stride(0) == 1 || weight.size(0) == 1;
    held = rows_contiguous || columns_contiguous ? weight : weight.contiguous();
    const bool by_row = rows_contiguous || !columns_contiguous;
    columns = weight.size(backward ? 1 : 0);
    depth = weight.size(backward ? 0 : 1);
    ld = std::max<int64_t>(held.stride(by_row ? 0 : 1), 1);
    depth_contiguous = by_row != backward;
  }
};

const void* panels_of(const GemmKernel& kernel, const OptionalTensor& packed, const Source& source) {
  if (!packed) return nullptr;
  PackedHeader header;
  const int64_t bytes = packed_weight_bytes(kernel, source.columns, source.depth);
  TORCH_CHECK_VALUE(packed->scalar_type() == at::kByte && packed->is_contiguous() && packed->device().is_cpu() &&
                        packed->numel() == static_cast<int64_t>(sizeof(header)) + bytes,
                    "lora_linear: packed must be the result of pack_weight for this weight, got ", packed->sizes());
  std::memcpy(&header, packed->const_data_ptr(), sizeof(header));
  TORCH_CHECK_VALUE(header.magic == PackedHeader{}.magic && header.kernel == kernel.id &&
                        header.columns == source.columns && header.depth == source.depth,
                    "lora_linear: packed must be packed for this weight, dtype and CPU; pack_weight it again");
  return static_cast<const char*>(packed->const_data_ptr()) + sizeof(header);
}

DType dtype_of(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? DType::kF32 : t.scalar_type() == at::kBFloat16 ? DType::kBF16 : DType::kF16;
}

Tensor pack_weight_cpu(const Tensor& weight, bool backward) {
  const bool known = weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16;
  const GemmKernel* kernel = known ? fused_kernel(dtype_of(weight)) : nullptr;
  TORCH_CHECK_VALUE(kernel, "pack_weight: no packed layout for ", weight.scalar_type(), " on this CPU (instruction set ",
                    active_isa_name(), ")");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.numel() > 0, "pack_weight: weight must be (N, K), got ", weight.sizes());
  const Source source(weight, backward);
  PackedHeader header;
  header.kernel = kernel->id, header.columns = source.columns, header.depth = source.depth;
  const int64_t bytes = packed_weight_bytes(*kernel, source.columns, source.depth);
  Tensor packed = at::empty({static_cast<int64_t>(sizeof(header)) + bytes}, weight.options().dtype(at::kByte));
  auto* out = static_cast<char*>(packed.mutable_data_ptr());
  std::memcpy(out, &header, sizeof(header));
  pack_gemm_weight(*kernel, source.held.const_data_ptr(), source.ld, source.depth_contiguous, source.columns,
                   source.depth, out + sizeof(header));
  return packed;
}

struct MaskRows final : KeepRows {
  const KeepMask& mask;
  int64_t columns;
  void (*keep_bits)(const KeepMask&, int64_t, int64_t, uint32_t*);

  MaskRows(const KeepMask& mask, int64_t columns, void (*keep_bits)(const KeepMask&, int64_t, int64_t, uint32_t*))
      : mask(mask), columns(columns), keep_bits(keep_bits) {}
  void fill(int64_t row, unsigned char* bits) const override {
    keep_bits(mask, row * columns, columns, reinterpret_cast<uint32_t*>(bits));
  }
};

Tensor product(const GemmKernel& kernel, const Tensor& a, const Source& source, const OptionalTensor& packed,
               GemmParams params) {
  params.M = a.size(0), params.N = source.columns, params.D = source.depth;
  params.a = a.const_data_ptr(), params.lda = params.M > 1 ? a.stride(0) : params.D;
  params.packed = panels_of(kernel, packed, source);
  params.w = source.held.const_data_ptr(), params.ldw = source.ld, params.depth_contiguous = source.depth_contiguous;
  Tensor y = at::empty({params.M, params.N}, a.options());
  params.y = y.mutable_data_ptr(), params.ldy = params.N;
  gemm(kernel, params);
  return y;
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

bool fused_wins(DType dtype, int64_t M, bool packed) {
  if (fused_kernel(dtype) == nullptr) return false;
  if (dtype == DType::kBF16) return packed || active_isa() == Isa::kAmx;
  return packed && M <= 256;
}

Tensor fused_forward(const GemmKernel& kernel, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const void* xa, const void* B, int64_t R, const OptionalTensor& packed) {
  const Tensor bias32 = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  GemmParams params{};
  params.s = xa, params.p = B, params.ldp = R, params.p_depth_contiguous = true, params.R = R;
  params.bias = bias ? bias32.const_data_ptr<float>() : nullptr;
  return product(kernel, x, Source(weight, false), packed, params);
}

Tensor fused_backward(const GemmKernel& kernel, const Tensor& dy, const Tensor& weight, const void* g, const void* A,
                      int64_t R, const KeepMask* keep,
                      void (*keep_bits)(const KeepMask&, int64_t, int64_t, uint32_t*), const OptionalTensor& packed) {
  const Source source(weight, true);
  GemmParams params{};
  params.s = g, params.p = A, params.ldp = source.columns, params.p_depth_contiguous = false, params.R = R;
  if (keep == nullptr) return product(kernel, dy, source, packed, params);
  const MaskRows rows(*keep, source.columns, keep_bits);
  params.keep = &rows;
  return product(kernel, dy, source, packed, params);
}

TORCH_LIBRARY_IMPL(lorasp, CPU, m) { m.impl("pack_weight_cpp", &pack_weight_cpu); }

}  // namespace lorasp
