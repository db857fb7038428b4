// kernels.h in terms of an Engine. Included once per instruction set, after its simd_*.h.
#pragma once
#include "backward.h"
#include "forward.h"

namespace lorasp::LORASP_ISA {
namespace {

template <class E>
void round_rows(const float* in, int64_t rows, int64_t cols, void* out, int64_t out_row) {
  auto* row = static_cast<typename E::Source*>(out);
  for (int64_t r = 0; r < rows; ++r, in += cols, row += out_row) E::round_row(in, cols, row);
}

template <class E>
constexpr AttentionKernels make_attention() {
  return {kForwardQueries,   kBackwardQueries, forward_bytes<E>, forward<E>,
          backward_bytes<E>, backward<E>,      mask_gradient<E>, round_rows<E>};
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
