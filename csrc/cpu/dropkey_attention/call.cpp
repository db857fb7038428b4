#include "call.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace lorasp {
namespace {

constexpr const char* kOp = "dropkey_attention";
constexpr int64_t kPadding = 32;  // kernels read whole blocks of a key list

ScoreMask score_mask(const Tensor& t) {
  ScoreMask mask;
  switch (t.scalar_type()) {
    case at::kBool:
      mask.kind = ScoreMask::kBool;
      break;
    case at::kFloat:
      mask.kind = ScoreMask::kF32;
      mask.hidden = -FLT_MAX / 2;
      break;
    case at::kBFloat16:
      mask.kind = ScoreMask::kBF16;
      mask.hidden = -0x1.FEp127f / 2;
      break;
    default:
      mask.kind = ScoreMask::kF16;
      mask.hidden = -65504.0f / 2;
  }
  const auto stride = [&](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  mask.data = t.const_data_ptr();
  mask.batch = stride(0), mask.head = stride(1), mask.row = stride(2), mask.key = stride(3);
  return mask;
}

// One element of a mask as what is added to a logit: -inf hides.
float mask_value(const ScoreMask& mask, int64_t offset) {
  float value;
  switch (mask.kind) {
    case ScoreMask::kBool:
      return static_cast<const bool*>(mask.data)[offset] ? 0.0f : -INFINITY;
    case ScoreMask::kF32:
      value = static_cast<const float*>(mask.data)[offset];
      break;
    case ScoreMask::kBF16:
      value = static_cast<const at::BFloat16*>(mask.data)[offset];
      break;
    default:
      value = static_cast<const at::Half*>(mask.data)[offset];
  }
  return value <= mask.hidden ? -INFINITY : value;
}

}  // namespace

AttentionCall::AttentionCall(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& mask,
                             const OptionalTensor& seed_, double dropout_p, std::string_view pattern, bool is_causal,
                             double scale)
    : p{}, dtype(compute_dtype(kOp, "q", q_)), kernels(attention_kernels(dtype)), attn_mask(mask) {
  TORCH_CHECK_VALUE(q_.dim() == 4 && k_.dim() == 4 && v_.dim() == 4, "dropkey_attention: q, k and v must be 4-d, got ",
                    q_.sizes(), ", ", k_.sizes(), ", ", v_.sizes());
  p.B = q_.size(0), p.H = q_.size(1), p.Sq = q_.size(2), p.D = q_.size(3);
  p.Hkv = k_.size(1), p.Sk = k_.size(2), p.Dv = v_.size(3);
  TORCH_CHECK_VALUE(p.D >= 1 && p.D <= 256 && p.Dv >= 1 && p.Dv <= 256 && p.Sk <= INT32_MAX - 64,
                    "dropkey_attention: D and Dv must be in 1..256, got ", q_.sizes(), " and ", v_.sizes());
  TORCH_CHECK_VALUE(p.Hkv > 0 ? p.H % p.Hkv == 0 : p.H == 0,
                    "dropkey_attention: k must have a divisor of q's heads, got ", p.H, " and ", p.Hkv);
  check_tensor(kOp, "q", q_, q_.sizes(), q_.scalar_type());
  check_tensor(kOp, "k", k_, {p.B, p.Hkv, p.Sk, p.D}, q_.scalar_type());
  check_tensor(kOp, "v", v_, {p.B, p.Hkv, p.Sk, p.Dv}, q_.scalar_type());
  q = with_unit_columns(q_), k = with_unit_columns(k_), v = with_unit_columns(v_);
  p.q = head_rows(q), p.k = head_rows(k), p.v = head_rows(v);
  p.scale = static_cast<float>(scale);
  p.is_causal = is_causal;
  p.keep_bits = keep_bits_kernel();
  set_mask(q_.scalar_type());
  set_drops(dropout_p, pattern, seed_);
}

void AttentionCall::set_mask(at::ScalarType dtype) {
  if (!attn_mask) return;
  const Tensor& t = *attn_mask;
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.dim() == 4, "dropkey_attention: attn_mask must be 4-d on cpu, got ",
                    t.sizes(), " on ", t.device());
  const int64_t full[] = {p.B, p.H, p.Sq, p.Sk};
  for (int d = 0; d < 4; ++d)
    TORCH_CHECK_VALUE(t.size(d) == 1 || t.size(d) == full[d], "dropkey_attention: attn_mask must be broadcastable to ",
                      at::IntArrayRef(full, 4), ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kBool || t.scalar_type() == at::kFloat || t.scalar_type() == dtype,
                   "dropkey_attention: attn_mask must be bool, float32 or ", dtype, ", got ", t.scalar_type());
  const ScoreMask mask = score_mask(t);
  (mask.row == 0 ? key_mask : p.mask) = mask;
}

void AttentionCall::set_drops(double dropout_p, std::string_view pattern, const OptionalTensor& seed_tensor) {
  TORCH_CHECK_VALUE(pattern == "column" || pattern == "element" || pattern == "span",
                    "dropkey_attention: pattern must be column, element or span, got ", pattern);
  const uint32_t t = drop_threshold(dropout_p);
  TORCH_CHECK_VALUE(t < 65536, "dropkey_attention: dropout_p must be in [0, 1), got ", dropout_p);
  if (dropout_p == 0.0 || (t == 0 && pattern != "span")) return;
  TORCH_CHECK_VALUE(seed_tensor.has_value(),
                    "dropkey_attention: seed must be a 0-d int64 tensor when dropout_p > 0, got None");
  check_tensor(kOp, "seed", *seed_tensor, {}, at::kLong);
  seed = static_cast<uint64_t>(*seed_tensor->const_data_ptr<int64_t>());
  const KeepMask keep{seed, kPurposeDropKey, 0, t};
  if (pattern == "span") {
    span = span_length(dropout_p, p.Sk);
  } else if (pattern == "column") {
    columns = keep;
  } else {
    elements = keep;
    p.elements = &*elements;
  }
}

KeyList AttentionCall::keys(int64_t b, int64_t h, ScratchFrame& frame) const {
  const int64_t head = b * p.H + h;
  auto* index = frame.take<int32_t>(p.Sk + kPadding);
  const uint32_t* words = nullptr;
  if (columns) {
    auto* taken = frame.take<uint32_t>(p.Sk / 32 + 1);
    p.keep_bits(*columns, head * p.Sk, p.Sk, taken);
    words = taken;
  }
  int64_t gap = 0;
  if (span) {
    const uint32_t word = philox4x32_7(static_cast<uint64_t>(head), kPurposeDropKey, 0, seed).word[0];
    gap = static_cast<int64_t>(word % static_cast<uint64_t>(p.Sk - span + 1));
  }
  const bool biased = key_mask.kind != ScoreMask::kNone;
  float* bias = biased ? frame.take<float>(p.Sk + kPadding) : nullptr;
  const int64_t offset = b * key_mask.batch + h * key_mask.head;
  if (!words && !span && !biased) {
    for (int64_t j = 0; j < p.Sk; ++j) index[j] = static_cast<int32_t>(j);
    return {index, p.Sk, nullptr};
  }
  int64_t count = 0;
  bool adds = false;
  for (int64_t j = 0; j < p.Sk; ++j) {
    if (j == gap) j += span;
    if (j >= p.Sk) break;
    if (words && !(words[j / 32] >> (j % 32) & 1)) continue;
    if (biased) {
      const float value = mask_value(key_mask, offset + j * key_mask.key);
      if (value == -INFINITY) continue;
      adds = adds || value != 0.0f;
      bias[count] = value;
    }
    index[count++] = static_cast<int32_t>(j);
  }
  if (adds) std::fill(bias + count, bias + count + kPadding, 0.0f);
  return {index, count, adds ? bias : nullptr};
}

}  // namespace lorasp
