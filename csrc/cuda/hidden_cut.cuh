// out = residual + D o x over rows (b, s) of F elements: the forward of hidden_cut and, without a residual, its
// backward. D: per element (rescaled), per row, or a run of rows of each b.
//
// One thread per kUnit elements of `out`, which is contiguous: they share one Philox call, and are written 16 bytes at
// a time, whatever the layout of x and residual. Which rows they lie in is known from two divisions, of which
// contiguous operands and pattern `element` need none. dtypes are data: a grid takes each branch alike, while templates
// would be 18 kernels.
//
// Floor: reads x (of dropped rows: nothing) and the residual, writes out. At 8192 x 4096 in bf16 on 4.3 TB/s beside a
// 348 us frozen GEMM [calc]: forward with residual 201 MB, 47 us, 13 %; backward 134 MB, 31 us, 9 %.
#pragma once
#include "vector.cuh"

namespace lorasp::cuda {

enum class DType : int { kF32, kBF16, kF16 };
enum class CutPattern : int { kElement, kColumn, kSpan };

// (B, S, F) with unit stride in the row.
struct CutOperand {
  const void* data;  // nullptr: absent
  DType dtype;
  int64_t stride_b, stride_s;
  bool contiguous;
};

struct HiddenCutArgs {
  CutOperand x, residual;
  void* out;  // contiguous
  DType out_dtype;
  int64_t count;  // B S F
  Divider F, S;
  CutPattern pattern;
  KeepMask keep;
  const int64_t* seed;  // on the device
  float rescale;
  int64_t length;  // kSpan: rows of a run
  Divider places;  // where it can start
};

// kUnit elements as they lie in memory: one Words in half precision, two in fp32.
struct CutUnit {
  Words half[2];
};

struct CutPlace {
  int64_t b, s, f;
};

__device__ inline CutPlace cut_place(const HiddenCutArgs& args, int64_t index) {
  const Divider::Result row = args.F(index), token = args.S(row.quotient);
  return {token.quotient, token.remainder, row.remainder};
}
__device__ inline void next_element(const HiddenCutArgs& args, CutPlace& place) {
  if (++place.f < args.F.divisor()) return;
  place.f = 0;
  if (++place.s < args.S.divisor()) return;
  place.s = 0;
  ++place.b;
}

__device__ inline bool keeps_row(const HiddenCutArgs& args, const KeepMask& keep, const CutPlace& place) {
  if (args.pattern == CutPattern::kColumn) {
    const int64_t row = place.b * args.S.divisor() + place.s;
    return keep_byte(keep, static_cast<uint64_t>(row) / 8) >> (row % 8) & 1;
  }
  const PhiloxWords words = philox4x32_7(static_cast<uint64_t>(place.b), keep.purpose, 0, keep.seed);
  const int64_t start = args.places(words.word[0]).remainder;
  return place.s < start || place.s >= start + args.length;
}

// Keep bits of `valid` elements from `place` on.
__device__ inline uint32_t keep_rows(const HiddenCutArgs& args, const KeepMask& keep, CutPlace place, int valid) {
  bool kept = keeps_row(args, keep, place);
  if (place.f + valid <= args.F.divisor()) return kept ? 0xFFu : 0u;
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < valid; ++i) {
    bits |= static_cast<uint32_t>(kept) << i;
    next_element(args, place);
    if (place.f == 0 && i + 1 < valid) kept = keeps_row(args, keep, place);
  }
  return bits;
}

// T: float, or bf16 for the bits of either half-precision type.
template <class T>
__device__ inline CutUnit load_run(const T* p, int valid) {
  CutUnit unit{};
#pragma unroll
  for (int h = 0; h < kUnit / kVector<T>; ++h)
    unit.half[h] = load_vector<T>(p + h * kVector<T>, 0, valid - h * kVector<T>, T{});
  return unit;
}
template <class T>
__device__ inline CutUnit load_unit(const HiddenCutArgs& args, const CutOperand& from, int64_t index, CutPlace place,
                                    int valid) {
  const T* data = static_cast<const T*>(from.data);
  if (from.contiguous) return load_run(data + index, valid);
  const auto at = [&] { return data + (place.b * from.stride_b + place.s * from.stride_s + place.f); };
  if (place.f + valid <= args.F.divisor()) return load_run(at(), valid);
  CutUnit unit{};
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if (i >= valid) break;
    set_element<T>(unit.half[i / kVector<T>], i % kVector<T>, load_global(at()));
    next_element(args, place);
  }
  return unit;
}
__device__ inline CutUnit load_unit(const HiddenCutArgs& args, const CutOperand& from, int64_t index,
                                    const CutPlace& place, int valid) {
  return from.dtype == DType::kF32 ? load_unit<float>(args, from, index, place, valid)
                                   : load_unit<bf16>(args, from, index, place, valid);
}

template <class T>
__device__ inline void widen(const CutUnit& unit, float (&values)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) values[i] = to_float(element<T>(unit.half[i / kVector<T>], i % kVector<T>));
}
__device__ inline void widen(DType dtype, const CutUnit& unit, float (&values)[kUnit]) {
  if (dtype == DType::kF32)
    widen<float>(unit, values);
  else if (dtype == DType::kBF16)
    widen<bf16>(unit, values);
  else
    widen<f16>(unit, values);
}

template <class T>
__device__ inline void store_unit(void* out, int64_t index, const float (&values)[kUnit], int valid) {
#pragma unroll
  for (int h = 0; h < kUnit / kVector<T>; ++h) {
    Words words{};
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) set_element<T>(words, i, from_float<T>(values[h * kVector<T> + i]));
    store_vector<T>(static_cast<T*>(out) + index + h * kVector<T>, words, 0, valid - h * kVector<T>);
  }
}

static __global__ void __launch_bounds__(kThreads) hidden_cut_kernel(const HiddenCutArgs args) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kUnit;
  const int valid = valid_columns(index, args.count);
  if (valid == 0) return;
  const bool by_element = args.pattern == CutPattern::kElement, adds = args.residual.data != nullptr;
  const bool everything_lies_flat = args.x.contiguous && (!adds || args.residual.contiguous);
  const CutPlace place = by_element && everything_lies_flat ? CutPlace{} : cut_place(args, index);
  KeepMask keep = args.keep;
  keep.seed = static_cast<uint64_t>(load_global(args.seed));

  CutUnit x{}, residual{};
  if (adds) residual = load_unit(args, args.residual, index, place, valid);
  uint32_t kept;
  if (by_element) {
    x = load_unit(args, args.x, index, place, valid);  // under way while the bits are made
    kept = keep_byte(keep, static_cast<uint64_t>(index) / kUnit);
  } else {
    kept = keep_rows(args, keep, place, valid);
    if (kept) x = load_unit(args, args.x, index, place, valid);
  }

  float y[kUnit], added[kUnit] = {};
  widen(args.x.dtype, x, y);
  if (adds) widen(args.residual.dtype, residual, added);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) y[i] = (kept >> i & 1 ? y[i] * args.rescale : 0.0f) + added[i];
  if (args.out_dtype == DType::kF32)
    store_unit<float>(args.out, index, y, valid);
  else if (args.out_dtype == DType::kBF16)
    store_unit<bf16>(args.out, index, y, valid);
  else
    store_unit<f16>(args.out, index, y, valid);
}

struct CutShape {
  int64_t B, S, F;
};

// p in [0, 1), for kElement and kColumn with drop_threshold(p) < 65536.
inline void hidden_cut(const Device& device, const CutShape& shape, const CutOperand& x, const CutOperand& residual,
                       void* out, DType out_dtype, CutPattern pattern, double p, const int64_t* seed) {
  const int64_t count = shape.B * shape.S * shape.F;
  if (count == 0) return;
  const uint32_t threshold = drop_threshold(p);
  const bool by_element = pattern == CutPattern::kElement;
  const int64_t length = span_length(p, shape.S);
  launch(hidden_cut_kernel, {ceil_div(count, kThreads * kUnit)}, kThreads, 0, device.stream,
         HiddenCutArgs{x,
                       residual,
                       out,
                       out_dtype,
                       count,
                       Divider(shape.F),
                       Divider(shape.S),
                       pattern,
                       {0, kPurposeHiddenCut, 0, threshold},
                       seed,
                       by_element ? static_cast<float>(65536.0 / (65536.0 - threshold)) : 1.0f,
                       length,
                       Divider(shape.S - length + 1)});
}

}  // namespace lorasp::cuda
