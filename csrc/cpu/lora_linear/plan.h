// Which plan a call takes. `addmm`: the library's product, then passes of our own over the tall tensors (passes.h).
// `fused`: our own product with the low-rank term in its accumulators (fused.h).
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "../common/dtype.h"
#include "gemm.h"

namespace lorasp {

struct Product {
  DType dtype;
  int64_t M, N, K;
  bool packed;
  // Plan `addmm` would share its own pass with work that is there anyway: the mask of x or dx, the gradient of A.
  bool second_pass;
};

// The tile of plan `fused` if that is the plan of this product, nullptr for plan `addmm`. Throws ValueError for an
// unknown plan and for `fused` where there is no kernel. `op` begins every message.
const GemmKernel* plan_kernel(const char* op, std::string_view plan, const Product& product);

// What plan `auto` stands for: where each was measured to be the faster one.
const char* auto_plan(const Product& product);

}  // namespace lorasp
