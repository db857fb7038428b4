// hidden_cut's kernel alone, for ctypes.
#include "harness.h"
#include "hidden_cut.cuh"

using namespace lorasp::cuda;

namespace {

struct Operand {
  const void* data;
  int dtype;
  int64_t stride_b, stride_s;

  int itemsize() const { return dtype == 0 ? 4 : 2; }
  CutOperand of(const CutShape& shape) const {
    if (!data) return {};
    const int64_t last = (shape.B - 1) * stride_b + (shape.S - 1) * stride_s + shape.F;
    provide(data, last * itemsize(), false);
    const bool contiguous = stride_s == shape.F && stride_b == shape.S * shape.F;
    return {data, static_cast<DType>(dtype), stride_b, stride_s, contiguous};
  }
};

}  // namespace

extern "C" {

const char* emulated_hidden_cut(CutShape shape, Operand x, Operand residual, Operand out, int pattern, double p,
                                const int64_t* seed) {
  return emulated([&] {
    provide(seed, 8, false);
    provide(out.data, shape.B * shape.S * shape.F * out.itemsize(), true);
    hidden_cut({4, nullptr}, shape, x.of(shape), residual.of(shape), const_cast<void*>(out.data),
               static_cast<DType>(out.dtype), static_cast<CutPattern>(pattern), p, seed);
  });
}

// The last `count` elements (at most a block's) of `out`, contiguous, whose rows lie apart by strides of 0: one row
// stands for all.
const char* emulated_hidden_cut_end(CutShape shape, Operand x, Operand out, int pattern, double p, const int64_t* seed,
                                    int64_t count) {
  return emulated([&] {
    emulation::GlobalMemory::instance().open();
    emulation::last_block_only() = true;
    const int64_t before = shape.B * shape.S * shape.F - count;
    hidden_cut({4, nullptr}, shape, {x.data, static_cast<DType>(x.dtype), 0, 0, false}, {},
               static_cast<char*>(const_cast<void*>(out.data)) - before * out.itemsize(), static_cast<DType>(out.dtype),
               static_cast<CutPattern>(pattern), p, seed);
  });
}

// quotients and remainders of `count` numbers by one divisor.
void emulated_divide(int64_t divisor, const int64_t* n, int64_t count, int64_t* quotients, int64_t* remainders) {
  const Divider divide(divisor);
  for (int64_t i = 0; i < count; ++i) {
    const Divider::Result result = divide(n[i]);
    quotients[i] = result.quotient, remainders[i] = result.remainder;
  }
}
}
