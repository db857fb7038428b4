#include "plan.h"

#include <c10/util/Exception.h>

#include "../common/isa.h"
#include "fused.h"

namespace lorasp {
namespace {

bool fused_wins(const Product& p) {
  if (fused_kernel(p.dtype) == nullptr) return false;
  // Few rows of a weight that no cache holds: packing it on the way would double its traffic.
  if (!p.packed && p.M < 64 && p.N * p.K > (int64_t{2} << 20)) return false;
  if (p.dtype == DType::kBF16 && active_isa() == Isa::kAmx) return p.packed || p.M <= 256 || !p.second_pass;
  // Elsewhere the libraries run at the chip's limit, except on few rows.
  if (p.dtype == DType::kBF16) return p.M <= (p.packed ? 64 : 16);
  return p.packed && p.M <= 64;
}

}  // namespace

const char* auto_plan(const Product& product) { return fused_wins(product) ? "fused" : "addmm"; }

const GemmKernel* plan_kernel(const char* op, std::string_view plan, const Product& product) {
  TORCH_CHECK_VALUE(plan == "auto" || plan == "addmm" || plan == "fused", op,
                    ": plan must be auto, addmm or fused for backend cpp, got ", plan);
  if (plan == "addmm" || (plan == "auto" && !fused_wins(product))) return nullptr;
  const GemmKernel* kernel = fused_kernel(product.dtype);
  TORCH_CHECK_VALUE(kernel, op, ": plan fused has no kernel for this dtype on this CPU (instruction set ",
                    active_isa_name(), "); use auto or addmm");
  return kernel;
}

}  // namespace lorasp
