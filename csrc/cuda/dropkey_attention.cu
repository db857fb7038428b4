// dropkey_attention on CUDA: lorasp::dropkey_attention_keys_cuda (schema in lorasp/ops/dropkey_attention.py), the lists
// of the keys that pattern `column` keeps.
#include "arguments.h"
#include "dropkey_attention_keys.cuh"

namespace lorasp::cuda {
namespace {

constexpr const char* kKeysOp = "dropkey_attention_keys";

std::tuple<Tensor, Tensor> dropkey_attention_keys_cuda(const Tensor& seed, int64_t rows, int64_t keys,
                                                       double dropout_p) {
  check_tensor(kKeysOp, "seed", seed, {}, ScalarType::Long);
  STD_TORCH_CHECK(rows >= 0 && keys >= 0 && keys < INT32_MAX, kKeysOp, ": rows and keys must be in [0, 2^31), got ",
                  rows, " and ", keys);
  const uint32_t threshold = checked_threshold(kKeysOp, dropout_p);
  const NoGrad no_grad;
  Tensor index = empty(seed, {rows, keys}, ScalarType::Int), rank = empty(seed, {rows, keys + 1}, ScalarType::Int);
  const DeviceScope scope(seed);
  dropkey_attention_keys(scope.device(), rows,
                         {keys,
                          {0, kPurposeDropKey, 0, threshold},
                          static_cast<const int64_t*>(seed.data_ptr()),
                          static_cast<int*>(index.data_ptr()),
                          static_cast<int*>(rank.data_ptr())});
  return {index, rank};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lorasp, LORASP_DISPATCH_KEY, m) {
  m.impl("dropkey_attention_keys_cuda", TORCH_BOX(&dropkey_attention_keys_cuda));
}

}  // namespace lorasp::cuda
