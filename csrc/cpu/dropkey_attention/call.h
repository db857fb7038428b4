// One call of dropkey_attention: its tensors as the kernels see them, and the keys of each head.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

#include "../common/arguments.h"
#include "../common/keep_bits.h"
#include "../common/scratch.h"
#include "kernels.h"

namespace lorasp {

inline bool has_unit_columns(const Tensor& t) { return t.size(3) == 1 || t.stride(3) == 1; }
inline Tensor with_unit_columns(const Tensor& t) { return has_unit_columns(t) ? t : t.contiguous(); }

inline HeadRows head_rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

struct AttentionCall {
  Attention p;
  DType dtype;
  const AttentionKernels& kernels;
  Tensor q, k, v;  // kept alive
  OptionalTensor attn_mask;
  ScoreMask key_mask;  // of a mask that is the same for all queries: it goes into the key lists
  std::optional<KeepMask> columns, elements;
  int64_t span = 0;
  uint64_t seed = 0;

  // Checks every argument.
  AttentionCall(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                const OptionalTensor& seed, double dropout_p, std::string_view pattern, bool is_causal, double scale);
  AttentionCall(const AttentionCall&) = delete;  // p points at elements

  bool empty() const { return p.B == 0 || p.H == 0 || p.Sq == 0; }
  // The keys of one head, in memory of the frame.
  KeyList keys(int64_t b, int64_t h, ScratchFrame& frame) const;

 private:
  void set_mask(at::ScalarType dtype);
  void set_drops(double dropout_p, std::string_view pattern, const OptionalTensor& seed_tensor);
};

}  // namespace lorasp
