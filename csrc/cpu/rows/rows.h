// Elementwise and row-by-row kernels, torch-free: what every instruction set implements for hidden_cut and consistency.
// Rows have unit stride; kernels never allocate.
#pragma once
#include <cstdint>

#include "../common/dtype.h"

namespace lorasp {

// over_a = 1 / sum exp(a - max_a), b likewise; kl_ab = KL(softmax a | softmax b).
struct PairStats {
  double max_a, over_a, max_b, over_b, kl_ab, kl_ba;
};

// The gradients of weight_ab KL(P|Q) + weight_ba KL(Q|P), the row's own gradient folded into the weights.
struct PairGradient {
  float max_a, over_a, max_b, over_b, kl_ab, kl_ba;  // kl_ba finite
  float log_ratio;                                   // log(over_b / over_a)
  float weight_ab, weight_ba;
};

struct RowKernels {
  // out = keep o (scale x) [+ residual]; bits nullptr keeps all. out may be x.
  using Cut = void (*)(const void* x, const void* residual, const uint32_t* bits, float scale, int64_t count,
                       void* out);
  Cut add[3][3];    // [dtype of x][dtype of residual] -> their common dtype, fp32 where they differ
  Cut plain[3][3];  // [dtype of x][dtype of out], residual not read
  void (*pair_stats[3])(const void* a, const void* b, int64_t count, PairStats* stats);
  // da may be a, db may be b; nullptr: not needed.
  void (*pair_gradient[3])(const void* a, const void* b, int64_t count, const PairGradient& row, void* da, void* db);
};

// The table of the instruction set in use.
const RowKernels& row_kernels();

namespace portable {
extern const RowKernels kRowKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RowKernels kRowKernels;
}
namespace avx512 {
extern const RowKernels kRowKernels;
}
namespace avx512_bf16 {
extern const RowKernels kRowKernels;
}
#endif

}  // namespace lorasp
